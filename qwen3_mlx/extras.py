"""Installed packages: their versions, and the command that installs optional ones (extras).

importlib.metadata takes 15 ms to import, which --help need not wait for.
"""

import re
import sys
from importlib.util import find_spec

_EXTRA_REQUIREMENT = re.compile(r"""([^;]+?)\s*;\s*extra == ['"](\w+)['"]""")


def install_command(extra: str) -> str:
    """Return the shell command that installs an extra's packages into the running Python.

    The command names the packages, because this project may run from a clone and is not on PyPI.
    """
    from importlib.metadata import PackageNotFoundError, requires

    try:
        matches = [_EXTRA_REQUIREMENT.fullmatch(line) for line in requires("qwen3-mlx") or ()]
    except PackageNotFoundError:  # run from a clone that is not installed
        matches = []
    packages = [f"'{match[1]}'" for match in matches if match and match[2] == extra]
    pip = f"{sys.executable} -m pip install"
    if not find_spec("pip"):  # environments created by uv have none
        pip = f"uv pip install --python {sys.executable}"
    return " ".join([pip, *(packages or [f"'.[{extra}]'"])])


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
