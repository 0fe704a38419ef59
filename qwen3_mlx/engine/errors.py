"""The error that requests end with when the device or the engine fails."""

from qwen3_mlx.errors import Qwen3Error

_DEVICE_FAILED = (
    "the device failed, probably because it is out of memory ({}); its caches were dropped"
)
_ENGINE_FAILED = (
    "the engine failed ({}: {}); this is a bug, and the caches of the step were dropped"
)


def engine_error(error: BaseException) -> Qwen3Error:
    """Return the error that the requests of a failed step end with."""
    if isinstance(error, Qwen3Error):
        return error
    if isinstance(error, RuntimeError | MemoryError):
        failure = Qwen3Error(_DEVICE_FAILED.format(str(error) or repr(error)))
    else:
        failure = Qwen3Error(_ENGINE_FAILED.format(type(error).__name__, error))
    failure.__cause__ = error
    return failure
