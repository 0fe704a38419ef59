"""Writes Markdown on a terminal while it arrives: what is written stays, nothing is drawn twice."""

import re

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from rich.console import Console
from rich.control import Control
from rich.markdown import Markdown
from rich.segment import ControlType
from rich.syntax import Syntax
from rich.text import Text

_FENCE = re.compile(r"(\s*)(`{3,}|~{3,})\s*([^`]*)$")
_PREFIX = re.compile(
    r"(?P<indent>\s*)(?P<quote>(?:> ?)*)(?P<space>\s*)"
    r"(?:(?P<heading>#{1,6})\s+|(?P<bullet>[-*+])\s+|(?P<number>\d{1,9}[.)])\s+)?"
)
_ITEM = re.compile(r"\s*(?:[-*+]|\d{1,9}[.)])\s")
_RULE = re.compile(r"\s*([-*_])(?:\s*\1){2,}\s*$")
_DELIMITER_ROW = re.compile(r"\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$")
_BAR = re.compile(r"(?<!\\)\|")
_WHOLE = re.compile(r"\s*(?:```|~~~|\||\\\[|\$\$|[-*_\s]*$)| {4,}|\t")
"""Beginnings of lines whose kind, or whose look, is known at their end only."""
_FORMULA = re.compile(r"\\\(.*?\\\)|\\\[.*?\\\]|\$\$.+?\$\$|\$(?=[^\s$])[^$]*(?<=[^\s$])\$(?!\d)")
_BRACKET = re.compile(r"\\[()\[\]]")  # of a formula that has no other end
_CLOSED = re.compile(rf"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)|{_FORMULA.pattern}")
_GAP = re.compile(
    r"\s+|(?<=[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef])(?=[^\s\u3001-\u3011\uff01-\uff1f])"
)
"""Where lines may be broken: also between Chinese or Japanese characters."""
_EMPHASIS = re.compile(r"(?<!\S)[*~]+(?=\S)|(?<=\S)[*~]+|(?<!\w)_+(?=\S)|(?<=\S)_+(?!\w)")
_STYLES = {"strong": "bold", "em": "italic", "s": "strike", "link": "underline"}
_HEADINGS = {"#": "bold underline", "##": "bold"}
_MAX_HELD = 400  # characters of a line that wait for the end of an emphasis, a link or a formula
_CODE_CONTEXT = 100  # lines of code that decide on the colours of the next
_THEME = "ansi_dark"  # the terminal's own colours, and no background


def _formula(state: StateInline, silent: bool) -> bool:
    """Keep a formula in LaTeX as it is written: a rule of the parser."""
    match = _FORMULA.match(state.src, state.pos) or _BRACKET.match(state.src, state.pos)
    if match and not silent:
        state.pending += match[0]
    state.pos = match.end() if match else state.pos
    return match is not None


_parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
_parser.inline.ruler.before("escape", "formula", _formula)


class MarkdownWriter:
    """Writes Markdown as it arrives, words as soon as no later text can change their look.

    Only a table waits for its end. The split of the text into pieces does not change what is
    written.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begin()

    def _begin(self) -> None:
        self._line = ""  # what is not written of the last line
        self._in_line = False  # a part of the last line is written
        self._column = self._indent = 0
        self._is_spaced = False  # a space precedes the next word
        self._style = ""
        self._after_blank = True
        self._in_list = False
        self._fence: tuple[int, str, str] | None = None  # of code: indentation, marker, language
        self._code: list[str] = []
        self._formula_end = ""
        self._table: list[str] = []

    def write(self, text: str) -> None:
        """Write what is settled by a further piece of text."""
        *lines, rest = text.split("\n")
        for line in lines:
            self._end_line(self._line + line)
        self._line += rest
        self._grow()

    def close(self) -> None:
        """Write what is left."""
        if self._line or self._in_line:
            self._end_line(self._line)
        self._end_table()
        self._begin()

    # --- lines ----------------------------------------------------------------------------------

    def _grow(self) -> None:
        """Write what is settled of an unfinished line."""
        line = self._line
        if self._fence or self._formula_end or not line.strip():
            return
        if self._table and not "|".startswith(line.strip()[0]):
            self._end_table()
        if not self._in_line:
            if _WHOLE.match(line) or not _has_word(line):
                return
            self._line = line = self._begin_prose(line)
        self._line = self._write_settled(line)

    def _end_line(self, line: str) -> None:
        self._line = ""
        line = line.removesuffix("\r")
        if self._in_line:
            self._write_words(self._write_settled(line))
            self._end_prose()
        elif self._fence:
            self._code_line(line, self._fence)
        elif self._formula_end:
            self._raw_line(line)
            self._formula_end = "" if self._formula_end in line else self._formula_end
        elif line.lstrip().startswith("|"):
            self._table.append(line)
            if not self._console.is_dumb_terminal:
                self._console.print(f"table: {len(self._table)} rows", style="dim", end="\r")
        else:
            self._end_table()
            self._block_line(line)

    def _block_line(self, line: str) -> None:
        """Write a whole line that is no part of code, of a formula or of a table."""
        if not line.strip():
            if not self._after_blank:
                self._console.print()
            self._after_blank = True
        elif fence := _FENCE.match(line):
            self._fence, self._code = (len(fence[1]), fence[2], fence[3].strip()), []
            self._raw_line(line.strip(), "dim")
        elif _RULE.match(line):
            self._raw_line("─" * 20, "dim")
        elif end := _formula_end(line):
            self._formula_end = end
            self._raw_line(line)
        elif re.match(r" {4}|\t", line) and not self._in_list and not _ITEM.match(line):
            self._raw_line(line)
        else:
            self._write_words(self._write_settled(self._begin_prose(line)))
            self._end_prose()

    def _raw_line(self, line: str | Text, style: str = "") -> None:
        text = line if isinstance(line, Text) else Text(line)
        self._console.print(text, style=style, soft_wrap=True)
        self._after_blank = False

    def _code_line(self, line: str, fence: tuple[int, str, str]) -> None:
        indent, marker, language = fence
        if re.fullmatch(rf"\s*{marker[0]}{{{len(marker)},}}\s*", line):
            self._fence = None
            self._raw_line(line.strip(), "dim")
            return
        line = line[min(indent, len(line) - len(line.lstrip())) :]
        self._code = [*self._code[1 - _CODE_CONTEXT :], line]
        syntax = Syntax("", language.split(" ")[0] or "text", theme=_THEME)
        coloured = syntax.highlight("\n".join(self._code)).split("\n", allow_blank=True)
        shown = coloured[len(self._code) - 1]
        self._raw_line(shown if shown.plain == line else line)

    def _end_table(self) -> None:
        rows, self._table = self._table, []
        if not rows:
            return
        self._console.control(Control((ControlType.ERASE_IN_LINE, 2)))
        if _is_table(rows):
            table = Markdown("", hyperlinks=False)
            table.parsed = _parser.parse("\n".join(row.strip() for row in rows))
            self._console.print(table)
            self._after_blank = True  # the table ends with a blank line
        else:
            for row in rows:
                self._raw_line(row)

    # --- words ----------------------------------------------------------------------------------

    def _begin_prose(self, line: str) -> str:
        """Write what marks a line as heading, quote or item; return its words."""
        match = _PREFIX.match(line)
        assert match  # all of it is optional
        item = match["bullet"] or match["number"]
        self._in_list = bool(item) or (self._in_list and bool(match["indent"]))
        self._style = _HEADINGS.get(match["heading"], "bold") if match["heading"] else ""
        prefix = match["indent"] + "▎ " * match["quote"].count(">") + match["space"]
        if item:
            prefix += f"{'•' if match['bullet'] else item} "
        self._in_line, self._is_spaced = True, False
        self._write(Text(prefix))
        self._indent = min(self._column, self._console.width // 2)
        return line[match.end() :]

    def _end_prose(self) -> None:
        self._console.print()
        self._in_line = self._after_blank = False
        self._column = self._indent = 0

    def _write_settled(self, text: str) -> str:
        """Write the words that no later text can change; return the others."""
        start = 0
        for gap in _GAP.finditer(text):
            words = text[start : gap.start()]
            if len(words) > _MAX_HELD or not _is_open(words):
                self._write_words(words)
                self._is_spaced = gap.end() > gap.start()
                start = gap.end()
        return text[start:]

    def _write_words(self, text: str) -> None:
        for word in _inline(text).split(" "):
            if not word.plain:
                continue
            if self._column > self._indent:
                is_full = self._column + self._is_spaced + word.cell_len > self._console.width
                self._write(Text("\n" + " " * self._indent if is_full else " " * self._is_spaced))
            self._write(word)
            self._is_spaced = True

    def _write(self, text: Text) -> None:
        self._console.print(text, style=self._style, end="", soft_wrap=True)
        _, newline, last = text.plain.rpartition("\n")
        self._column = Text(last).cell_len + (0 if newline else self._column)


def _has_word(line: str) -> bool:
    """Return whether an unfinished line has a word, so that what marks its kind is whole."""
    prefix = _PREFIX.match(line)
    assert prefix  # all of it is optional
    return _GAP.search(line, prefix.end() + 1) is not None


def _is_table(rows: list[str]) -> bool:
    """Return whether rows are a table in which no cell would be lost for want of a column."""
    if len(rows) < 2 or not _DELIMITER_ROW.match(rows[1]):
        return False
    bars = [len(_BAR.findall(row.strip().strip("|"))) for row in rows]
    return max(bars) == bars[0]


def _formula_end(line: str) -> str:
    """Return what ends a formula of several lines, if the line begins one."""
    for begin, end in (("\\[", "\\]"), ("$$", "$$")):
        if line.lstrip().startswith(begin) and end not in line.lstrip()[2:]:
            return end
    return ""


def _is_open(text: str) -> bool:
    """Return whether words may belong to an emphasis, link or formula that goes on after them."""
    rest = _CLOSED.sub("", text)
    if "`" in rest or "\\(" in rest or "\\[" in rest:
        return True
    rest = re.sub(r"\\.", "", rest)
    links_closed = rest.count("[") <= rest.count("]") and rest.count("](") <= rest.count(")")
    return not links_closed or len(_EMPHASIS.findall(rest)) % 2 == 1


def _inline(source: str) -> Text:
    """Return words in Markdown as styled text; links are followed by their address."""
    text, styles, begins = Text(), [""], [0]
    [root] = _parser.parseInline(source)
    for token in root.children or ():
        kind, _, edge = token.type.rpartition("_")
        if edge == "open":
            styles.append(f"{styles[-1]} {_STYLES[kind]}")
            begins.append(len(text))
            address = token.attrGet("href")
        elif edge == "close":
            styles.pop()
            if kind == "link" and text.plain[begins[-1] :] != address:
                text.append(f" ({address})")
            begins.pop()
        elif token.type == "code_inline":
            text.append(token.content, f"{styles[-1]} cyan")
        elif token.type == "image":
            text.append(f"{token.content} ({token.attrGet('src')})")
        else:
            text.append(token.content, styles[-1])
    return text
