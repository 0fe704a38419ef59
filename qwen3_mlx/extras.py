"""Packages that are not installed with this one by themselves, and the command that adds them."""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

_OF_EXTRA = re.compile(r"""([^;]+?)\s*;\s*extra == ['"](\w+)['"]""")


def install_command(extra: str) -> str:
    """Return the shell command that adds an extra's packages to the Python that runs.

    It names the packages: this project may have come from a clone, and is not on PyPI.
    """
    try:
        stated = [_OF_EXTRA.fullmatch(line) for line in requires("qwen3-mlx") or ()]
    except PackageNotFoundError:  # run from a clone that is not installed
        stated = []
    packages = [f"'{found[1]}'" for found in stated if found and found[2] == extra]
    pip = f"{sys.executable} -m pip install"
    if not find_spec("pip"):  # as in the environments that uv makes
        pip = f"uv pip install --python {sys.executable}"
    return " ".join([pip, *(packages or [f"'.[{extra}]'"])])
