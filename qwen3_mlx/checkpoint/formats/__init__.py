"""Formats of stored weights, a file each."""
