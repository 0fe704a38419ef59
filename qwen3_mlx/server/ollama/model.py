"""The served models as Ollama's clients see them: names, descriptions, and what is loaded."""

import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from fastapi.responses import Response

from qwen3_mlx import backend
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.engine.memory import count_weights
from qwen3_mlx.server.model_source import DEFAULT
from qwen3_mlx.server.models import ModelPool, ServedModel
from qwen3_mlx.server.ollama.schema import ModelRequest
from qwen3_mlx.server.wire import Json, warnings_header
from qwen3_mlx.text.kind import CHAT, EMBEDDING, RERANKER

_NEVER = "9999-12-31T23:59:59Z"  # expiry of a model that stays loaded
_CAPABILITIES = {  # in Ollama's words, and our own for reranking
    CHAT: ["completion", "tools"],
    EMBEDDING: ["embedding"],
    RERANKER: ["reranking"],
}


def model_entries(pool: ModelPool) -> list[dict[str, Any]]:
    """Return the entries of all models, and that of the default one under this name as well."""
    entries = [model_entry(model, name) for model in pool.models for name in model.source.names]
    known = any(model.source.answers_to(DEFAULT) for model in pool.models)
    return entries if known else [*entries, model_entry(pool.default, DEFAULT)]


def model_entry(model: ServedModel, name: str) -> dict[str, Any]:
    """Return the entry of a list of models, under one of the model's names."""
    config, size = model.source.config, model.weight_bytes or model.source.nbytes
    family, weights = config.model_type, count_weights(config)
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(model.created),
        "size": size,
        "digest": sha256(name.encode()).hexdigest(),  # Ollama's command line shows a part of it
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": _in_words(weights),
            "quantization_level": f"{8 * size / weights:.1f} bits",
        },
    }


def loaded_models(pool: ModelPool) -> list[dict[str, Any]]:
    """Return the entries of the loaded models, the one that stays longest first."""
    loaded = sorted(pool.loaded, key=lambda pair: -pool.seconds_left(pair[0]))
    return [_loaded_model(model, llm, pool.seconds_left(model)) for model, llm in loaded]


def _loaded_model(model: ServedModel, llm: LLM, seconds: float) -> dict[str, Any]:
    """Return the entry of a model with what it takes now, its caches included."""
    size = model.weight_bytes + llm.activity().cache_bytes
    return {
        **model_entry(model, model.name),
        "size": size,
        "size_vram": size if backend.on_gpu() else 0,
        "expires_at": _NEVER if seconds == math.inf else timestamp(time.time() + seconds),
        "context_length": model.context,
    }


def model_details(model: ServedModel, name: str) -> dict[str, Any]:
    """Return the entry of a model under a name, with its capabilities.

    Whether it thinks is known once it is loaded.
    """
    thinking = ["thinking"] if model.thinking and model.thinking.can_think else []
    config = model.source.config
    family = config.model_type
    return {
        **model_entry(model, name),
        "capabilities": [*_CAPABILITIES[model.kind], *thinking],
        "model_info": {
            "general.architecture": family,
            f"{family}.context_length": model.context,
            f"{family}.embedding_length": config.hidden_size,
        },
    }


def unloaded(
    pool: ModelPool, model: ServedModel, body: ModelRequest, content: Mapping[str, Any]
) -> Response | None:
    """Unload the model as soon as it is idle and return `content`, if a request asks for no more.

    Otherwise return None.
    """
    if not body.is_empty or body.model_seconds != 0:
        return None
    pool.unload(model)
    return Json(content, headers=warnings_header(keep_alive_warnings(model, body)))


def keep_alive_warnings(model: ServedModel, body: ModelRequest) -> list[str]:
    """Return a warning if a model that always stays loaded should be closed some time."""
    ignored = model.stays_despite(body.model_seconds)
    return ["keep_alive was ignored: the model stays loaded"] * ignored


def _in_words(count: int) -> str:
    """Return a number of weights as 8.2B, or 1.9M."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def timestamp(seconds: float) -> str:
    """Return a time in the form of RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
