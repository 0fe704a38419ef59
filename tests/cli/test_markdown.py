"""Markdown on a terminal: what is written at once stays, in whatever pieces the text arrives."""

import io
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qwen3_mlx.cli.console import visible
from qwen3_mlx.cli.markdown import MarkdownWriter
from qwen3_mlx.cli.screen import AnswerWriter
from tests.cli.harness import Terminal

TEXT = r"""# A **title**
Some *prose* with `a * b` and __strong__ words, 5 * 3 * 2 and snake_case_names, a
[link](https://example.org/x), a vector<int>, \*stars\*, \( a_1*b*c = \frac{a}{b} \), $x_1*y*z$,
$5 and $6.

- item that is longer than the forty columns of this terminal
  - nested **strong words over** it
    continued
1. first
> quoted *text*
---
\[
a_1 * b_2 * c \\
\]

| Name | Value |
|:-----|------:|
| `a` | **12** |
| \(x\) | 3 |

```python
def f():
    if __name__ == "__main__":

        return '''one
        two'''
```
   ```sh
   ls *.py
   ```
    indented __code__
中文**重要的文字**没有空格，`代码`也是如此，这是一个很长很长的段落需要折行。
**not closed, `not either
the end"""
PLAIN = r"""A title
Some prose with a * b and strong words,
5 * 3 * 2 and snake_case_names, a
link (https://example.org/x), a
vector<int>, *stars*, \( a_1*b*c =
\frac{a}{b} \), $x_1*y*z$,
$5 and $6.

• item that is longer than the forty
  columns of this terminal
  • nested strong words over it
    continued
1. first
▎ quoted text
────────────────────
\[
a_1 * b_2 * c \\
\]

"""


def written(pieces: Sequence[str], *, colours: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        width=40,
        force_terminal=colours,
        color_system="standard" if colours else None,
        legacy_windows=False,
    )
    writer = MarkdownWriter(console)
    for piece in pieces:
        writer.write(piece)
    writer.close()
    return out.getvalue()


def test_what_is_shown() -> None:
    shown = written([TEXT])
    assert shown.startswith(PLAIN)
    lines = shown.splitlines()
    for line in (
        "def f():",
        '    if __name__ == "__main__":',
        "        return '''one",
        "ls *.py",  # without the indentation of its fence
        "    indented __code__",
        "中文重要的文字没有空格，代码也是如此，这",
        "**not closed, `not either",
        "the end",
    ):
        assert line in lines
    rows = [line.split() for line in lines if "12" in line or "\\(x\\)" in line]
    assert rows == [["a", "12"], ["\\(x\\)", "3"]]


def test_a_table_that_would_lose_a_cell_is_shown_as_it_is() -> None:
    for rows in ("| a |\n|---|\n| `x|y` |", "| a |\n| b |", "| a |\n|---|---|\n| b |"):
        assert written([rows]).endswith(f"{rows}\n")


def test_styles() -> None:
    shown = written(["**a** *b* `c`"], colours=True)
    assert shown == "\x1b[1ma\x1b[0m \x1b[3mb\x1b[0m \x1b[36mc\x1b[0m\n"


@settings(max_examples=40)
@given(st.lists(st.integers(0, len(TEXT)), max_size=400).map(sorted))
def test_pieces_do_not_matter(cuts: list[int]) -> None:
    pieces = [TEXT[start:stop] for start, stop in zip([0, *cuts], [*cuts, None], strict=True)]
    assert written(pieces) == WHOLE


WHOLE = written([TEXT])


@settings(max_examples=60)
@given(st.text("ab *_`[](!)\\$|#->1.\n\t~中，", max_size=60), st.integers(0, 60))
def test_any_text_is_shown_and_pieces_do_not_matter(text: str, cut: int) -> None:
    shown = written([text])
    assert written([text[:cut], text[cut:]]) == shown
    assert shown.count("a") >= text.count("a") and shown.count("b") >= text.count("b")


def test_words_are_written_when_no_later_text_can_change_them() -> None:
    out = io.StringIO()
    writer = MarkdownWriter(Console(file=out, width=40))
    for piece, shown in (
        ("one", ""),
        (" two", "one"),
        (" **three", "one two"),
        (" four** ", "one two three four"),
        ("\n", "one two three four\n"),
        ("```\ncode", "one two three four\n```\n"),
    ):
        writer.write(piece)
        assert out.getvalue() == shown


LONG = "\n".join(
    f"def f{i}(x):\n    if x * {i} > 3 and __name__ == '__main__':\n\n        return x * {i} * y"
    for i in range(20)
)
SHOW = """
import sys
from qwen3_mlx.cli.screen import Screen
from qwen3_mlx.text.events import Finish, Text, Usage
answer = sys.argv[1]
pieces = [Text(answer[i : i + 15]) for i in range(0, len(answer), 15)]
Screen(show_thinking=True).show([*pieces, Finish("stop", Usage(1, 0, 1, 0))])
"""


def test_code_taller_than_the_terminal_is_shown_line_by_line() -> None:
    answer = f"Here it is:\n\n```python\n{LONG}\n```\n\nDone: \\( \\frac{{a}}{{b}} \\)\n"
    with Terminal([sys.executable, "-c", SHOW, answer]) as terminal:
        assert terminal.end() == 0
        assert terminal.text().strip() == answer.strip()


def test_a_model_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b]52;c;x\x07\tb\n\x9b") == "a␛]52;c;x␇\tb\n�"


def test_without_a_terminal_answers_are_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    answer = AnswerWriter()
    for piece in ("**a", "** \x1b"):
        answer.write(piece)
    answer.close()
    assert capsys.readouterr().out == "**a** \x1b\n"
