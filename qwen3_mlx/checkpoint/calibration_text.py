"""Text that is on every machine, to measure a model with where nobody gives a better one."""

from importlib import import_module

from qwen3_mlx.errors import Qwen3Error


def default_text() -> str:
    """Give English prose with code in it: the topics of Python's own help, some 460,000 characters.

    Which words they are depends on the version of Python; on one machine they stay the same.

    Raises:
        Qwen3Error: this Python came without them.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise Qwen3Error(
            "this Python lacks the text of its own help (pydoc_data); give a text of your own"
        ) from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics))
