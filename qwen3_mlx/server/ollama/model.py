"""The served model as Ollama's clients see it: its names, and its description."""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from qwen3_mlx import backend
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.engine.memory import count_weights
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.service import Service
from qwen3_mlx.text.kind import CHAT, EMBEDDING

_NEVER = "9999-12-31T23:59:59Z"  # expiry of the model, which stays loaded


def model_names(service: Service) -> list[str]:
    """Return the names of the served model."""
    return [*dict.fromkeys((service.settings.model, "default"))]


def check_model(service: Service, name: str | None) -> None:
    """Check that a name is one of the served model's; no name stands for it, too.

    Raises:
        ApiError: the name is another model's (404).
    """
    names = model_names(service)
    if name and name.lower().removesuffix(":latest") not in [own.lower() for own in names]:
        raise ApiError(404, f"model {name!r:.200} not found; there is {' or '.join(names)}")


def model_entry(service: Service, name: str) -> dict[str, Any]:
    """Return the entry of a list of models, under one of the names of the served model."""
    family, weights = service.llm.config.model_type, count_weights(service.llm.config)
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(service.created),
        "size": service.weight_bytes,
        "digest": sha256(name.encode()).hexdigest(),  # Ollama's command line shows a part of it
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": _in_words(weights),
            "quantization_level": f"{8 * service.weight_bytes / weights:.1f} bits",
        },
    }


def loaded_model(service: Service) -> dict[str, Any]:
    """Return the entry of the served model with what it takes now, its caches included."""
    size = service.weight_bytes + service.llm.activity().cache_bytes
    return {
        **model_entry(service, service.settings.model),
        "size": size,
        "size_vram": size if backend.on_gpu() else 0,
        "expires_at": _NEVER,
        "context_length": service.context,
    }


def model_details(service: Service) -> dict[str, Any]:
    """Return the entry of the served model, with its capabilities."""
    config = service.llm.config
    family = config.model_type
    return {
        **model_entry(service, service.settings.model),
        "capabilities": _capabilities(service.llm),
        "model_info": {
            "general.architecture": family,
            f"{family}.context_length": service.context,
            f"{family}.embedding_length": config.hidden_size,
        },
    }


def _capabilities(llm: LLM) -> list[str]:
    """Return Ollama's words for what the model can do, and our own for reranking."""
    if llm.kind != CHAT:
        return ["embedding"] if llm.kind == EMBEDDING else ["reranking"]
    return ["completion", "tools", *(["thinking"] if llm.thinking.can_think else [])]


def _in_words(count: int) -> str:
    """Return a number of weights as 8.2B, or 1.9M."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def timestamp(seconds: float) -> str:
    """Return a time in the form of RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
