"""Where the command keeps its files: the user's settings, and data such as conversations."""

import os
from pathlib import Path

from platformdirs import user_config_path, user_data_path

from qwen3_mlx.errors import Qwen3Error

CONVERSATIONS, CHAT_HISTORY = "conversations.db", "chat_history"
"""Files of data: what was said, and the lines typed in chats."""
_NAME = "qwen3-mlx"


def config_file() -> Path:
    """Return the path of the settings; the file need not exist."""
    return _folder(user_config_path(_NAME, appauthor=False)) / "config.toml"


def data_folder() -> Path:
    """Return the folder of the command's data, which need not exist."""
    return _folder(user_data_path(_NAME, appauthor=False))


def data_file(name: str) -> Path:
    """Return the path of a file of the command's data; creates its folder, for the user alone.

    Raises:
        Qwen3Error: the folder cannot be created.
    """
    folder = data_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Qwen3Error(f"the folder {folder} cannot be created: {error.strerror}") from error
    return folder / name


def _folder(usual: Path) -> Path:
    home = os.environ.get("QWEN3_HOME")
    return Path(home) if home else usual
