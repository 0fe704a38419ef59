"""`qwen3 embed` and `qwen3 rerank`: vectors of texts, and scores of documents for a query."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_mlx.cli.console import Bar, note, visible
from qwen3_mlx.cli.evaluate import read_text
from qwen3_mlx.cli.option_groups import option, with_options
from qwen3_mlx.cli.options import Json, Model, Quiet, TextOptions, load_model
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.files import atomic_write

_LINES = ".jsonl"
_ARRAY = ".npy"
_PLACE = re.compile(r"^(?:texts|documents)\[(\d+)\]")  # of the library's errors
_File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="File with a text on each line, or - for stdin; .jsonl: JSON strings, or objects "
        'with a "text".',
        show_default=False,
    ),
]
_JsonLines = Annotated[
    bool, option("--jsonl", text="Read FILE as JSON lines, whatever it is called.")
]


@with_options
def embed(  # noqa: PLR0913 - one parameter an option
    *,
    file: _File,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "-o",
            dir_okay=False,
            text="Write the vectors to this .npy or .jsonl file (default: JSON lines on stdout).",
        ),
    ] = None,
    instruction: Annotated[
        str | None, option(text="The task that the texts are queries of; documents need none.")
    ] = None,
    prompt_name: Annotated[
        str | None, option(text="A prompt that the checkpoint names, such as query.")
    ] = None,
    dimensions: Annotated[int | None, option(text="Dimensions of the vectors.")] = None,
    truncate: Annotated[
        bool, option("--truncate", text="Cut texts that are longer than the context window.")
    ] = False,
    pooling: Annotated[
        str | None,
        option(text="last: the last token's hidden state, whatever the checkpoint's files say."),
    ] = None,
    jsonl: _JsonLines = False,
    model: Model = None,
    loading: TextOptions,
    quiet: Quiet = False,
) -> None:
    """Compute the vector of each text in FILE with an embedding model.

    [bold]qwen3 embed -m Qwen/Qwen3-Embedding-0.6B documents.txt -o documents.npy[/bold]
    [bold]echo "a query" | qwen3 embed -m ... --prompt-name query -[/bold]

    Each line has a vector of length 1, so products of vectors are cosines.
    """
    if output and output.suffix not in (_ARRAY, _LINES):
        raise ValueError(f"--output must be a {_ARRAY} or {_LINES} file, not {output}")
    texts = _texts(file, as_json=jsonl)
    loaded = load_model(model, loading, quiet=quiet)
    with loaded as llm, Bar("embedding") as bar, _lines_named(file):
        vectors = llm.embed(
            texts,
            instruction=instruction,
            prompt_name=prompt_name,
            dimensions=dimensions,
            pooling=pooling,
            truncate=truncate,
            progress=None if quiet else bar,
        )
    if output and output.suffix == _ARRAY:
        import numpy as np  # takes 0.1 s, which --help need not wait for

        with atomic_write(output) as stream:
            np.save(stream, np.array(vectors))
        return
    rows: Any = vectors.tolist()
    lines = (
        # Nine digits are enough for a float32.
        json.dumps({"index": index, "embedding": [float(f"{x:.9g}") for x in row]})
        for index, row in enumerate(rows)
    )
    if output is None:
        for line in lines:
            print(line)
        return
    with atomic_write(output) as stream:
        stream.writelines(f"{line}\n".encode() for line in lines)


@with_options
def rerank(  # noqa: PLR0913 - one parameter an option
    *,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The query.", show_default=False)],
    file: _File,
    instruction: Annotated[
        str | None, option(text="The task, in a sentence (default: the checkpoint's, web search).")
    ] = None,
    scoring: Annotated[
        str | None,
        option(text='yes-no: the probability of "yes", whatever the checkpoint is.'),
    ] = None,
    jsonl: _JsonLines = False,
    as_json: Json = False,
    model: Model = None,
    loading: TextOptions,
    quiet: Quiet = False,
) -> None:
    """Order the documents in FILE by how well they answer QUERY, with a reranker.

    [bold]qwen3 rerank -m Qwen/Qwen3-Reranker-0.6B "capital of China" documents.txt[/bold]

    Each line is the probability of a document, a tab and the document, the best first.
    With --json: an object for each document, a line each.
    """
    documents = _texts(file, as_json=jsonl)
    loaded = load_model(model, loading, quiet=quiet)
    with loaded as llm, Bar("reranking") as bar, _lines_named(file):
        scores = llm.rerank(
            query,
            documents,
            instruction=instruction,
            scoring=scoring,
            progress=None if quiet else bar,
        )
    show = visible if sys.stdout.isatty() else str
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        score, text = round(scores[index], 6), documents[index]
        if as_json:
            print(json.dumps({"index": index, "score": score, "text": text}, ensure_ascii=False))
        else:
            print(f"{score:.4f}\t{show(' '.join(text.splitlines()))}")


def _texts(file: Path, *, as_json: bool) -> list[str]:
    """Return the texts of a file or of stdin: its lines, or those of JSON lines."""
    content = read_text(file).removeprefix("\ufeff").removesuffix("\n")
    if not content:
        note(f"There is no text in {_name(file)}.")
        return []
    lines = [line.removesuffix("\r") for line in content.split("\n")]
    return [*_parsed(file, lines)] if as_json or file.suffix == _LINES else lines


@contextmanager
def _lines_named(file: Path) -> Iterator[None]:
    """Name the line of the file where an error of the block names one of its texts."""
    try:
        yield
    except (Qwen3Error, ValueError, TypeError) as error:
        line = _PLACE.sub(lambda found: f"line {int(found[1]) + 1} of {_name(file)}", str(error))
        error.args = (line,)
        raise


def _name(file: Path) -> str:
    return "stdin" if str(file) == "-" else str(file)


def _parsed(file: Path, lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(
                f"line {number} of {_name(file)} is neither a JSON string nor an object with a text"
            )
        yield text
