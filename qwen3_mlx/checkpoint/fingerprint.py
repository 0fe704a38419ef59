"""Fingerprint of a checkpoint: tells it from others without reading all of its weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_mlx.checkpoint.weights import weight_names

_TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_BLOCK = 4096  # bytes
_BLOCKS = 256  # of each weight file, at equal distances


def fingerprint(
    folder: Path,
    config: Mapping[str, Any],
    held_as: Sequence[object],
    adapter: Sequence[Path] = (),
) -> str:
    """Return a hash of a checkpoint's config, tokenizer, template and weights, and of `held_as`.

    `held_as` is what else determines the numbers: load options, cache format, device; `adapter` are
    the files of an adapter. Of each weight file the hash covers the name, the size, and a mebibyte
    in blocks spread over the file, its header included. That suffices because training changes
    whole matrices.
    """
    digest = hashlib.sha256(json.dumps([config, [str(one) for one in held_as]]).encode())
    for name in _TEXT_FILES:
        if (file := folder / name).is_file():
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    for file in [*_weight_files(folder), *adapter]:
        _add(digest, file)
    return digest.hexdigest()


def weight_digests(folder: Path) -> dict[str, str]:
    """Return a hash of each weight file of a checkpoint that is here, by its name."""
    digests = {}
    for file in _weight_files(folder):
        digest = hashlib.sha256()
        _add(digest, file)
        digests[file.name] = digest.hexdigest()
    return digests


def different_files(found: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """Return the names of the files of both whose `weight_digests` differ."""
    return [name for name, digest in found.items() if own.get(name, digest) != digest]


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files that are here: a machine of a cluster may have some of them alone."""
    files = [folder / name for name in sorted(weight_names(folder))]
    return [file for file in files if file.is_file()]


def _add(digest: "hashlib._Hash", file: Path) -> None:
    """Add a weight file to a hash: its name, its size, and blocks spread over it."""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        digest.update(f"{file.name} {size}".encode())
        for place in range(0, size, max(_BLOCK, size // _BLOCKS)):
            stream.seek(place)
            digest.update(stream.read(_BLOCK))
