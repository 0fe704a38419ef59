"""Checks whether this machine computes right, for `qwen3 doctor --verify`."""
