"""Convert and quantize a Qwen3 checkpoint for MLX: python convert.py SOURCE OUTPUT [OPTIONS].

This is `qwen3 convert`; python convert.py --help lists the options.
"""

import sys

from qwen3_mlx.__main__ import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
