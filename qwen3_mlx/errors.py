"""The errors a caller may act on; a wrong argument is a `ValueError` or `TypeError` instead."""


class Qwen3Error(Exception):
    """Something that cannot be done as asked; the message says what, and the way out."""


class CheckpointError(Qwen3Error):
    """A checkpoint that cannot be found, read or honoured."""


class ContextError(Qwen3Error):
    """A prompt, or a prompt and the reply asked for, that the context window does not hold."""
