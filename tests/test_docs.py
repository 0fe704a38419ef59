"""The documents: links, files and names that they mention exist, and lists are complete."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from runpy import run_path

import pytest

_ROOT = Path(__file__).parent.parent
_PACKAGE = _ROOT / "qwen3_mlx"
_DOCS = _ROOT / "docs"
_PAGES = sorted([*_ROOT.glob("*.md"), *_DOCS.rglob("*.md")])
_GUIDES = ("tour.md", "extending.md")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"[\w./-]+\.(?:py|md|sh|toml|yml|json|js|css|html|jinja)")


def _name(path: Path) -> str:
    return str(path.relative_to(_ROOT))


def _prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return _FENCE.sub("", page.read_text("utf-8"))


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", _PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_list_of_pages_is_complete() -> None:
    index = _DOCS / "README.md"
    listed = {(_DOCS / link).resolve() for link in _LINK.findall(_prose(index))}
    assert listed >= {page for page in _DOCS.glob("*.md") if page != index}


def test_decisions_are_numbered_dated_and_listed() -> None:
    folder = _DOCS / "decisions"
    records = sorted(folder.glob("[0-9]*.md"))
    rows = []
    for number, record in enumerate(records, 1):
        text = record.read_text("utf-8")
        head = re.match(rf"# {number:03}\. (.+)\n\n(\d{{4}}-\d\d-\d\d), ", text)
        assert head, record
        parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert parts == ["Context", "Decision", "Consequences"], record
        rows.append(f"| [{number:03}]({record.name}) | {head[1]} | {head[2]} |")
    assert "\n".join(rows) in (folder / "README.md").read_text("utf-8")


# --- files and names ------------------------------------------------------------------------------


def _find(path: str) -> Path | None:
    """Return a file that a page names from the root, or from the package's folder."""
    found = [base / path for base in (_ROOT, _PACKAGE) if (base / path).exists()]
    return found[0] if found else None


@pytest.mark.parametrize(
    "page", [page for page in _PAGES if page.name != "CHANGELOG.md"], ids=_name
)
def test_files_that_are_named_exist(page: Path) -> None:
    for code in _CODE.findall(_prose(page)):
        for path in re.findall(rf"^{_FILE.pattern}(?=$|:)", code):
            if "/" in path and not path.startswith(("./", "/")):
                assert _find(path), f"`{path}`"


@cache
def _defined(file: Path) -> frozenset[str]:
    """Return the names that a module defines, those of members with the name of their class."""
    return frozenset(_names(ast.parse(file.read_text("utf-8")), ""))


def _names(scope: ast.AST, prefix: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
            yield from _names(node, f"{prefix}{node.name}.")
            if isinstance(node, ast.ClassDef):  # its functions' attributes of self
                yield from _attributes(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.If | ast.With | ast.Try | ast.For | ast.While):
            yield from _names(node, prefix)


def _attributes(owner: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(owner):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "self" and isinstance(node.ctx, ast.Store):
                yield f"{owner.name}.{node.attr}"


@pytest.mark.parametrize("page", _PAGES, ids=_name)
def test_names_on_the_pages_exist(page: Path) -> None:
    """`path.py: name, Class.member` names what that module defines."""
    stated = 0
    for code in _CODE.findall(_prose(page)):
        path, colon, names = code.partition(": ")
        if colon and path.endswith(".py"):
            file = _find(path)
            assert file, code
            for name in names.split(", "):
                stated += 1
                assert name in _defined(file), f"{path} does not define {name}"
    assert stated or page.name not in _GUIDES


def test_the_pictures_of_the_design_name_files_that_exist() -> None:
    blocks = "\n".join(_FENCE.findall((_DOCS / "design.md").read_text("utf-8")))
    everywhere = {path.name for base in (_PACKAGE, _ROOT / "tests") for path in base.rglob("*.py")}
    for path in re.findall(r"(?<![\w}/])[\w/]+\.py\b", blocks):
        assert _find(path) or path in everywhere, path


def test_the_rooms_list_every_module() -> None:
    text = (_DOCS / "design.md").read_text("utf-8")
    listed = set(re.findall(r"\w+", _FENCE.findall(text[text.index("## Rooms") :])[0]))
    assert {path.stem for path in _PACKAGE.rglob("*.py")} - listed == {"__main__"}


# --- messages and variables ----------------------------------------------------------------------


def _strings(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_quoted_messages_exist() -> None:
    page = _prose(_DOCS / "troubleshooting.md")
    messages = [
        message
        for heading in re.findall(r"^### (.+)$", page, re.MULTILINE)
        for message in _CODE.findall(heading)
    ]
    assert len(messages) > 40
    strings = list(_strings(_PACKAGE))
    for message in messages:
        for part in re.split(r"\.\.\.", message):
            words = part.strip(" ;,:()")
            assert any(words in string for string in strings), f"{message!r}: {words!r}"


_ENVIRON = (
    r"environ(?:\.\w+\(|\[)\s*\"([A-Z][A-Z0-9_]+)\"",
    r"\"([A-Z][A-Z0-9_]+)\" (?:not )?in os\.environ",
    r"envvar=\"([A-Z0-9_]+)\"",
    r"constants\.(HF_[A-Z_]+)",
    r"\b(QWEN3_[A-Z]+)\b",
    r"\b(HF_[A-Z]+(?:_[A-Z]+)*)\b",
)


def test_every_variable_of_the_environment_is_on_its_page_and_exists() -> None:
    rows = re.findall(r"^\| (`.+?) \|", _prose(_DOCS / "environment.md"), re.MULTILINE)
    documented = {name for row in rows for name in _CODE.findall(row)}
    folders = ("qwen3_mlx", "scripts", "tests", "benchmarks", "examples")
    files = [file for folder in folders for file in (_ROOT / folder).rglob("*.*")]
    sources = {
        file: file.read_text("utf-8")
        for file in [*files, _ROOT / "Makefile"]
        if file.suffix in (".py", ".sh", "") and file != Path(__file__)
    }
    package = "\n".join(text for file, text in sources.items() if _PACKAGE in file.parents)
    read = {name for pattern in _ENVIRON for name in re.findall(pattern, package)}
    read |= set(re.findall(r"\bQWEN3_[A-Z]+\b", "\n".join(sources.values())))
    assert read - documented == set()
    pages = "\n".join(page.read_text("utf-8") for page in _PAGES if page.name != "environment.md")
    everything = "\n".join([*sources.values(), pages])
    assert documented - set(re.findall(r"\b\w+\b", everything)) == set()


# --- releases ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "changelog", "words"),
    [
        ("v1.2.0", "# Changelog\n\n## [1.2.0]\n\n- A.\n", []),
        ("v1.2.0", "## [Unreleased]\n\n## [1.2.0]\n\n- A.\n", []),
        ("1.2.0", "## [1.2.0]\n\n- A.\n", ["the tag is 1.2.0"]),
        ("v1.2.0", "## [Unreleased]\n\n- B.\n\n## [1.2.0]\n", ["entries under [Unreleased]"]),
        ("v1.2.0", "## [1.1.0]\n", ["CHANGELOG.md is 1.1.0"]),
        ("v1.2.1", "", ["the tag is v1.2.1", "CHANGELOG.md is none"]),
    ],
)
def test_a_release_needs_one_version(tag: str, changelog: str, words: list[str]) -> None:
    found = run_path(str(_ROOT / "scripts/check_release.py"))["problems"](tag, "1.2.0", changelog)
    assert len(found) == len(words)
    for problem, part in zip(found, words, strict=True):
        assert part in problem
