"""Default calibration text, available on every machine."""

from importlib import import_module

from qwen3_mlx.errors import Qwen3Error


def default_text() -> str:
    """Return English prose with code in it: the topics of Python's help, some 460,000 characters.

    The text depends on the version of Python; on one machine it stays the same.

    Raises:
        Qwen3Error: this Python was installed without its help topics.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise Qwen3Error(
            "this Python lacks the text of its own help (pydoc_data); give a text of your own"
        ) from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics))
