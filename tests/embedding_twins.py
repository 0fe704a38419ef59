"""The twins of embedding models and rerankers, put together from `tests/golden/embed`."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.support import read_weights

GOLDEN = Path(__file__).parent / "golden" / "embed"
YES, NO = 266, 262  # of the twins' tokenizer


@cache
def golden(name: str) -> Any:
    """Return what the reference programs computed."""
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


def write_twin(name: str, folder: Path) -> Path:
    """Write the twin `name`, laid out as published, into `folder`."""
    shutil.copytree(GOLDEN / name, folder)
    shutil.copy(GOLDEN / "tokenizer_config.json", folder)
    tokenizer = json.loads((GOLDEN / "tokenizer.json").read_text("utf-8"))
    if name.startswith("reranker"):  # appends nothing
        tokenizer["post_processor"] = tokenizer["post_processor"]["processors"][0]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if name == "reranker-seq-cls":
        weights = read_weights(GOLDEN / "reranker")
        rows = weights["model.embed_tokens.weight"].astype(mx.float32)
        weights["score.weight"] = (rows[YES] - rows[NO])[None].astype(mx.bfloat16)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder
