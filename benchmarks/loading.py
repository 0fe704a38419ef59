"""Peak memory of loading, measured in its own process; prints a line of JSON.

python -m benchmarks.loading FOLDER [BITS]

Without BITS, a quantized checkpoint is loaded as stored. With BITS, an unquantized one is quantized
while loading.
"""

import json
import sys
from pathlib import Path

from qwen3_mlx import backend  # first: the BLAS

# isort: split

import mlx.core as mx

from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.files import read_json
from qwen3_mlx.model.quantization import Format


def main() -> None:
    """Load and print the bytes of the peak, the result, the files and the largest tensor."""
    folder = Path(sys.argv[1])
    wanted = Format(int(sys.argv[2]), 64) if len(sys.argv) > 2 else None
    options = LoadOptions(backend.compute_dtype(), quantize=wanted, dequantize=False)
    model = load_model(read_json(folder / "config.json"), Weights(folder), options, lambda *_: None)
    shapes = Weights(folder).tensors.values()
    figures = {
        "peak": mx.get_peak_memory(),
        "result": sum(array.nbytes for array in model.tensors().values()),
        "files": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "largest tensor": 2 * max(tensor.shape[0] * tensor.shape[-1] for tensor in shapes),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
