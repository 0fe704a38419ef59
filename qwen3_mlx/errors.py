"""Exceptions that a caller may act on; a wrong argument raises `ValueError` or `TypeError`."""


class Qwen3Error(Exception):
    """Base of this package's errors; the message names the problem and the way out."""


class CheckpointError(Qwen3Error):
    """A checkpoint cannot be found, read or run."""


class ContextError(Qwen3Error):
    """The prompt, or the prompt and the requested reply together, exceed the context window."""
