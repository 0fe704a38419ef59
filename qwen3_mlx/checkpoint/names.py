"""Names of tensors and modules: those in a checkpoint's files as those of the network.

The published embedding checkpoints hold the decoder alone, without the `model.` in front.
"""

_DECODER = ("embed_tokens", "layers.", "norm.")


def network_name(stored: str) -> str:
    """Return the network's name of a stored tensor, or of a module in config.json."""
    return f"model.{stored}" if stored.startswith(_DECODER) else stored
