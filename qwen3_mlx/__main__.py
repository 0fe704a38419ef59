"""The `qwen3` command, also `python -m qwen3_mlx`: says in one line if MLX cannot be loaded."""

import sys

try:
    import qwen3_mlx.backend  # noqa: F401 - for its error
    from qwen3_mlx.cli.main import main
except ImportError as error:
    sys.exit(f"qwen3: {error}")
except KeyboardInterrupt:  # where `qwen3_mlx.interrupt` could not see that this is the command
    sys.exit(130)

if __name__ == "__main__":
    main()
