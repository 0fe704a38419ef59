"""Exceptions that a caller may act on; a wrong argument raises `ValueError` or `TypeError`."""


class Qwen3Error(Exception):
    """Base of this package's errors; the message names the problem and the way out."""


class CheckpointError(Qwen3Error):
    """A checkpoint cannot be found, read or run."""


class CapacityError(Qwen3Error):
    """A checkpoint does not fit the memory that is available.

    `fits_alone` is True if it would fit without the other models of this process.
    """

    def __init__(self, message: str, *, fits_alone: bool) -> None:
        super().__init__(message)
        self.fits_alone = fits_alone


class KindError(Qwen3Error):
    """The checkpoint is for something else; `needed` is the kind of one that could do it."""

    def __init__(self, message: str, needed: str) -> None:
        super().__init__(message)
        self.needed = needed


class ClusterError(Qwen3Error):
    """A machine that holds a part of the model is gone or silent: load the model again."""


class NoLeaderError(Qwen3Error):
    """The leader of a cluster does not answer, or has ended before it computed."""


class ContextError(Qwen3Error):
    """The prompt, or the prompt and the requested reply together, exceed the context window."""
