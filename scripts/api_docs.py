"""Prints the reference of the Python API as Markdown, generated from the source.

`make docs` writes it to docs/api.md; `api_docs.py --check docs/api.md` fails if that is stale.
The source is parsed, not imported, so every Python version prints the same.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import generated

_PACKAGE = Path(__file__).parent.parent / "qwen3_mlx"
_HEAD = """\
# The Python API

<!-- Generated from the docstrings by `make docs`; edit those instead. -->

What `from qwen3_mlx import ...` provides; other modules may change without notice. The terms are
those of the [glossary](glossary.md). `help()` shows the same in a terminal, with the
[options](#options) in the signature of each method that takes them.
"""
_ORDER = (  # what a reader needs first; any other public name follows
    *("load", "convert", "LLM", "Options", "TextOptions", "SamplingParams", "Conversation"),
    *("Reply", "Stream", "AsyncStream", "Event", "mcp.connect", "mcp.Servers", "mcp.Call"),
)
_SECTION = re.compile(r"[\w ]+:")
_ENTRY = re.compile(r"    (\**\w+(?:, \w+)*): (.*)")
_WIDTH = 88  # of a signature in one line
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def reference() -> str:
    """Return a section for each public name: signature, docstring, and the members of a class."""
    face = ast.parse((_PACKAGE / "__init__.py").read_text("utf-8"))
    (modules,) = (
        ast.literal_eval(node.value)
        for node in face.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES"
    )
    modules |= {name: "mcp.servers" for name in _ORDER if name.startswith("mcp.")}
    names = [*_ORDER, *sorted(modules.keys() - set(_ORDER))]
    return "\n".join([_HEAD, *(_section(name, modules[name]) for name in names)])


def _section(name: str, module: str) -> str:
    local = name.removeprefix("mcp.")
    tree = ast.parse((_PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, _Function | ast.ClassDef) and node.name == local:
            members = _members(node, tree) if isinstance(node, ast.ClassDef) else []
            return "\n".join([f"## {name}\n", *_described(node), *members])
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return f"## {name}\n\n```python\n{ast.unparse(node)}\n```\n"
    raise SystemExit(f"qwen3_mlx/{module} does not define {name}")


def _members(owner: ast.ClassDef, tree: ast.Module) -> list[str]:
    """Return the public members of a class, those of its bases in the package last."""
    members: dict[str, _Function] = {}
    for holder in _with_bases(owner, tree):
        for node in holder.body:
            if isinstance(node, _Function) and not node.name.startswith("_"):
                members.setdefault(node.name, node)
    return [
        line
        for name, node in members.items()
        for line in (f"### {owner.name}.{name}\n", *_described(node))
    ]


def _with_bases(owner: ast.ClassDef, tree: ast.Module) -> Iterator[ast.ClassDef]:
    yield owner
    for base in [ast.unparse(base).partition("[")[0] for base in owner.bases]:
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == base:
                yield from _with_bases(node, tree)
            elif isinstance(node, ast.ImportFrom) and any(n.name == base for n in node.names):
                package, _, module = (node.module or "").partition(".")
                if package == _PACKAGE.name:
                    file = _PACKAGE / f"{module.replace('.', '/')}.py"
                    imported = ast.parse(file.read_text("utf-8"))
                    (found,) = (n for n in imported.body if getattr(n, "name", "") == base)
                    assert isinstance(found, ast.ClassDef)
                    yield from _with_bases(found, imported)


def _described(node: _Function | ast.ClassDef) -> list[str]:
    """Return the signature and the docstring of a function, a property or a class."""
    text = _markdown(ast.get_docstring(node) or "")
    return [f"```python\n{_signature(node)}\n```\n", f"{text}\n"]


def _signature(node: _Function | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        fields = [item for item in fields if not ast.unparse(item.target).startswith("_")]
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        return "\n".join([f"class {node.name}{bases}", *(f"    {_source(f)}" for f in fields)])
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if "property" in decorators:
        return f"{node.name}:{returns.removeprefix(' ->')}"
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    arguments = _arguments(node.args)
    line = f"{kind} {node.name}({', '.join(arguments)}){returns}"
    if len(line) <= _WIDTH:
        return line
    listed = "".join(f"    {argument},\n" for argument in arguments)
    return f"{kind} {node.name}(\n{listed}){returns}"


def _arguments(arguments: ast.arguments) -> list[str]:
    """Return the arguments of a signature as they are written."""
    first = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(first) - len(arguments.defaults))
    listed = [_argument(*pair) for pair in zip(first, [*missing, *arguments.defaults], strict=True)]
    if arguments.vararg:
        listed.append(f"*{_argument(arguments.vararg)}")
    elif arguments.kwonlyargs:
        listed.append("*")
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    listed += [_argument(*pair) for pair in keywords]
    return [*listed, *([f"**{_argument(arguments.kwarg)}"] if arguments.kwarg else [])]


def _argument(argument: ast.arg, default: ast.expr | None = None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    equals = " = " if annotation else "="
    value = ast.unparse(default) if default else ""
    return f"{argument.arg}{annotation}{equals if value else ''}{_constants().get(value, value)}"


@cache
def _constants() -> dict[str, str]:
    """Return the values of the package's constants by their names."""
    statements = [
        statement
        for file in _PACKAGE.rglob("*.py")
        for statement in ast.parse(file.read_text("utf-8")).body
    ]
    return {
        ast.unparse(statement.targets[0]): ast.unparse(statement.value)
        for statement in statements
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
    }


def _source(field: ast.AnnAssign) -> str:
    value = f" = {ast.unparse(field.value)}" if field.value else ""
    return f"{ast.unparse(field.target)}: {ast.unparse(field.annotation)}{value}"


def _markdown(docstring: str) -> str:
    """Return a docstring as Markdown: its sections are lists."""
    lines: list[str] = []
    for line, following in pairwise([*docstring.splitlines(), ""]):
        entry = _ENTRY.fullmatch(line)
        in_list = bool(lines) and lines[-1].startswith(("- ", "  "))
        if line.endswith(":") and line[0] != " " and following.startswith("    "):
            lines += [f"**{line}**" if _SECTION.fullmatch(line) else line, ""]
        elif entry:
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif line.startswith("        "):
            lines.append(f"  {line.strip()}")
        elif line.startswith("    "):
            lines.append(f"- {line.strip()}" if in_list else line.strip())
        else:
            lines.append(line)
    text = "\n".join(lines).strip()
    return re.sub(r"see `((?:Text)?Options)`", lambda match: _link(match[1]), text)


def _link(name: str) -> str:
    return f"see [`{name}`](#{name.lower()})"


if __name__ == "__main__":
    sys.exit(generated.run(sys.argv[1:], reference))
