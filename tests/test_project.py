"""The project as a whole: its version, which way its imports point, and what it does not do."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qwen3_mlx

_ROOT = Path(__file__).parent.parent
_PACKAGE = _ROOT / "qwen3_mlx"
# A room may import those below it, and nothing beside it. `qwen3_mlx` is the public face.
_RANKS = {
    "arguments": 0,
    "errors": 0,
    "extras": 0,
    "interrupt": 0,
    "processes": 0,
    "version": 0,
    "backend": 1,
    "files": 1,
    "cache": 2,
    "model": 3,
    "checkpoint": 4,
    "engine": 4,
    "text": 4,
    "cluster": 5,
    "api": 6,
    "mcp": 6,
    "evaluate": 7,
    "tuning": 8,
    "qwen3_mlx": 9,
    "bench": 10,
    "server": 10,
    "verify": 11,
    "cli": 12,
    "__main__": 13,
}


def _modules() -> dict[str, Path]:
    names = {}
    for path in sorted(_PACKAGE.rglob("*.py")):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


_MODULES = _modules()
_TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in _MODULES.items()}


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _imported(node: ast.AST) -> Iterator[str]:
    """Name the modules that an import statement imports, and nothing for any other node."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        for alias in node.names:
            below = f"{node.module}.{alias.name}"
            if below in _MODULES:
                yield below
            else:
                yield str(node.module)


def _own_imports(tree: ast.AST) -> Iterator[str]:
    """Name the package's modules that are imported in `tree`, wherever the statement stands."""
    for node in ast.walk(tree):
        yield from (name for name in _imported(node) if name.split(".")[0] == "qwen3_mlx")


_NO_BACKEND = "import sys; sys.modules['mlx.core'] = None; "  # importing it is an ImportError
_MISSING = (
    r"MLX cannot be loaded \(.*mlx\.core.*\); on Linux it needs a backend: "
    r"pip install 'mlx\[cpu\]', or 'mlx\[cuda12\]' or 'mlx\[cuda13\]' for an NVIDIA GPU"
)


def _python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)


@pytest.mark.parametrize("arguments", [["Hello"], ["--help"], ["doctor"]])
@pytest.mark.parametrize("name", ["qwen3_mlx", "convert"])
def test_without_a_backend_the_command_says_so_in_one_line(name: str, arguments: list[str]) -> None:
    program = f"{_NO_BACKEND} import runpy; runpy.run_module({name!r}, run_name='__main__')"
    done = _python(program, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"qwen3: {_MISSING}\n", done.stderr)


@pytest.mark.parametrize("name", ["load", "convert", "Qwen3Error", "LLM"])
def test_without_a_backend_the_package_says_what_to_install(name: str) -> None:
    done = _python(f"{_NO_BACKEND} import qwen3_mlx; qwen3_mlx.{name}")
    assert done.returncode == 1
    assert re.fullmatch(f"ImportError: {_MISSING}", done.stderr.splitlines()[-1])


def test_the_command_starts_where_a_missing_backend_is_caught() -> None:
    scripts = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert scripts == {"qwen3": "qwen3_mlx.__main__:main"}


def test_the_changelog_tells_of_this_version() -> None:
    changelog = (_ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[?(\d[^\]\s]*)", changelog, re.MULTILINE)
    assert versions[0] == qwen3_mlx.__version__


@pytest.mark.parametrize("module", _MODULES)
def test_imports_point_down(module: str) -> None:
    room = _room(module)
    for name in _own_imports(_TREES[module]):
        below = _RANKS[_room(name)] < _RANKS[room]
        assert below or _room(name) == room, f"{module} imports {name}"


def test_imports_make_no_circle() -> None:
    graph = {module: set(_own_imports(tree)) for module, tree in _TREES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(_MODULES)


@pytest.mark.parametrize("module", _MODULES)
def test_no_import_of_ours_hides_in_a_function(module: str) -> None:
    for node in ast.walk(_TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            hidden = list(_own_imports(node))
            assert not hidden, f"{module}: {node.name} imports {hidden}"


@pytest.mark.parametrize("module", [name for name in _MODULES if _room(name) != "cli"])
def test_only_the_command_line_prints(module: str) -> None:
    for node in ast.walk(_TREES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{module} prints in line {node.lineno}"


@pytest.mark.parametrize("module", [name for name in _MODULES if _room(name) == "text"])
def test_text_knows_only_strings(module: str) -> None:
    for node in ast.walk(_TREES[module]):
        for name in _imported(node):
            assert name.split(".")[0] != "mlx", f"{module} imports {name}"


def test_the_demo_is_data() -> None:
    assert not [name for name in _MODULES if _room(name) == "demo"]


def test_importing_loads_none_of_the_heavy_packages() -> None:
    program = "import sys, qwen3_mlx, qwen3_mlx.api.llm; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=_ROOT
    )
    loaded = set(result.stdout.split())
    assert "mlx.core" in loaded
    assert not loaded & {"transformers", "torch", "mlx_lm", "huggingface_hub", "pydantic"}


_FOREIGN = r"(Give|Say|Tell|Have|Let|Do|Make|Whether|Who|What)\b"
"""How no docstring begins: functions return, compute, check, create, parse or raise."""


@pytest.mark.parametrize("module", _MODULES)
def test_docstrings_are_in_the_words_of_the_field(module: str) -> None:
    assert ast.get_docstring(_TREES[module]), f"{module} does not say what it is"
    for node in ast.walk(_TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = ast.get_docstring(node) or ""
            assert not re.match(_FOREIGN, text), f"{module}: {node.name} begins {text[:20]!r}"
            word = re.search(r"\b([Ww]hoever|[Ss]omebody|[Nn]obody)\b", text)
            assert not word, f"{module}: {node.name} has {word.group()!r}"


def test_every_public_name_resolves() -> None:
    for name in qwen3_mlx.__all__:
        assert getattr(qwen3_mlx, name)


def test_nothing_is_left_unfinished() -> None:
    folders = ("qwen3_mlx", "benchmarks", "docs", "examples", "scripts", "tests")
    files = [path for folder in folders for path in (_ROOT / folder).rglob("*")]
    mark = re.compile(r"\b(TO[D]O|FIX[M]E)\b")
    found = [
        f"{path}: {line.strip()}"
        for path in [*files, *_ROOT.iterdir()]
        if path.suffix in (".md", ".py", ".sh", ".toml") or path.name == "Makefile"
        for line in path.read_text("utf-8").splitlines()
        if mark.search(line)
    ]
    assert not found
