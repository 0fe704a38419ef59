"""The Qwen3 network in MLX, its config.json, and the quantization formats of its weights."""
