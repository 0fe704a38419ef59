"""The folder of kept prompts that `load` opens for a checkpoint."""

from pathlib import Path

from qwen3_mlx import backend
from qwen3_mlx.api.checkpoints import ResolvedCheckpoint
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.checkpoint.fingerprint import fingerprint
from qwen3_mlx.errors import Qwen3Error


def open_prompt_cache(
    place: str | Path | None,
    max_gb: float,
    target: ResolvedCheckpoint,
    kind: type[DiskPrefixes] = DiskPrefixes,
) -> DiskPrefixes | None:
    """Return the prefixes of a checkpoint in the folder `place`, of at most `max_gb` (10^9 bytes).

    Raises:
        ValueError: `place` is empty.
        Qwen3Error: the folder cannot be used.
    """
    if place is None:
        return None
    if place == "":  # as of a variable of the shell that is not set
        raise ValueError("prompt_cache must be a folder, not an empty text")
    held_as = [target.options, target.cache, backend.on_gpu()]
    held_as += [target.share] if target.share else []
    adapter = target.adapter.files if target.adapter else []
    try:
        # Caches are valid for the same weights only.
        key = fingerprint(target.folder, target.config, held_as, adapter)
        return kind(Path(place), key, limit=int(max_gb * 1e9))
    except FileExistsError as error:
        raise Qwen3Error(f"prompt_cache: {place} is a file; name a folder") from error
    except OSError as error:
        raise Qwen3Error(
            f"prompt_cache: {place} cannot be used: {error.strerror or error}; name another folder"
        ) from error
