"""`python -m qwen3_mlx.verify [MODEL]`: the checks without the `qwen3` command."""

import os
import sys

try:
    from qwen3_mlx.errors import Qwen3Error
    from qwen3_mlx.verify.run import line_of, verify
except ImportError as error:  # MLX cannot be loaded
    sys.exit(f"qwen3_mlx.verify: {error}")
except KeyboardInterrupt:
    sys.exit(130)

_USAGE = "usage: python -m qwen3_mlx.verify [MODEL]"


def main(arguments: list[str]) -> int:
    """Run the checks; return the exit code."""
    if arguments in (["--help"], ["-h"]):
        _write(_USAGE)
        return 0
    if len(arguments) > 1 or any(word.startswith("-") for word in arguments):
        sys.stderr.write(f"{_USAGE}\n")
        return 2
    try:
        report = verify(*arguments, on_row=lambda row: _write(line_of(row)))
    except (Qwen3Error, ValueError) as error:
        sys.stderr.write(f"qwen3_mlx.verify: {error}\n")
        return 1
    _write(f"\n{report}")
    return 1 if report.failed else 0


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        sys.exit(1)
    except OSError as error:  # as of a full disk
        sys.exit(f"qwen3_mlx.verify: {error}")
