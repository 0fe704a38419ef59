"""Check that a tag can be released: python scripts/check_release.py v0.1.0

The tag, the package's version and the newest version of the changelog are the same, and the
changelog has no unreleased entries.
"""

import re
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def problems(tag: str, version: str, changelog: str) -> list[str]:
    """Return what speaks against releasing `version` as `tag`; nothing if all is well."""
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and qwen3_mlx/version.py says {version}")
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    unreleased = [text for text in sections if text.startswith("[Unreleased]")]
    released = [text for text in sections if text not in unreleased]
    if any(text.removeprefix("[Unreleased]").strip() for text in unreleased):
        found.append("CHANGELOG.md has entries under [Unreleased]: give them a version")
    newest = re.match(r"\[([^\]]+)\]", released[0]) if released else None
    if not newest or newest[1] != version:
        stated = newest[1] if newest else "none"
        found.append(f"the newest version in CHANGELOG.md is {stated}, not {version}")
    return found


def main(arguments: list[str]) -> int:
    """Print what speaks against the release of a tag; return 1 if anything does."""
    if len(arguments) != 1:
        print("usage: check_release.py TAG", file=sys.stderr)
        return 2
    version = re.search(
        r'"(.+)"', (_ROOT / "qwen3_mlx/version.py").read_text("utf-8").split("=")[1]
    )
    assert version, "qwen3_mlx/version.py states no version"
    found = problems(arguments[0], version[1], (_ROOT / "CHANGELOG.md").read_text("utf-8"))
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
