"""Entry point of the `qwen3` command and of `python -m qwen3_mlx`.

If MLX cannot be loaded, the error is one line instead of a traceback.
"""

import gc
import sys

gc.disable()  # imports leave no garbage, and looking for it takes a tenth of `--help`
try:
    import qwen3_mlx.backend  # noqa: F401 - for its error
    from qwen3_mlx.cli.main import main
except ImportError as error:
    sys.exit(f"qwen3: {error}")
except KeyboardInterrupt:  # where `qwen3_mlx.interrupt` did not recognise the command
    sys.exit(130)
finally:
    gc.freeze()  # no later collection looks at modules
    gc.enable()

if __name__ == "__main__":
    main()
