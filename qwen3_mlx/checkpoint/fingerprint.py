"""What tells one checkpoint from another, without reading all of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_mlx.checkpoint.weights import weight_names

_TEXT = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_BLOCK = 4096  # bytes
_BLOCKS = 256  # of each weight file, at equal distances


def fingerprint(folder: Path, config: Mapping[str, Any], held_as: Sequence[object]) -> str:
    """Give a hash of a checkpoint's config, tokenizer, template and weights, and how they are held.

    Of each weight file its size and a mebibyte all over it are taken, its header among it: whoever
    trains a model on changes whole matrices of it.
    """
    found = hashlib.sha256(json.dumps([config, [str(one) for one in held_as]]).encode())
    for name in _TEXT:
        if (file := folder / name).is_file():
            found.update(hashlib.sha256(file.read_bytes()).digest())
    for name in sorted(weight_names(folder)):
        with (folder / name).open("rb") as stream:
            size = stream.seek(0, 2)
            found.update(f"{name} {size}".encode())
            for place in range(0, size, max(_BLOCK, size // _BLOCKS)):
                stream.seek(place)
                found.update(stream.read(_BLOCK))
    return found.hexdigest()
