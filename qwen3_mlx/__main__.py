"""`python -m qwen3_mlx` is the `qwen3` command."""

from qwen3_mlx.cli.main import main

main()
