"""Lines of input of a chat: commands, of which each is a function here, and messages."""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from qwen3_mlx.cli import desktop
from qwen3_mlx.cli.attachments import read_attachment
from qwen3_mlx.cli.chat_session import ChatSession, Message
from qwen3_mlx.cli.console import local_time, note, visible
from qwen3_mlx.cli.conversation_log import ConversationLog
from qwen3_mlx.cli.error_wording import closest_command, hint, of_the_system
from qwen3_mlx.cli.recording import note_continued, with_system
from qwen3_mlx.cli.tool_file import load_functions
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.sizes import DEMO, SIZES
from qwen3_mlx.text.described_tool import DescribedTool

_MAX_ABOUT = 100  # characters of a tool's description
_HITS = 20  # messages that /search shows at most
_FILES = Path()  # among completions: any file
_SWITCHES = {"on": True, "off": False}
_SWITCHED = {value: name for name, value in _SWITCHES.items()}
_NONE = "none"  # the argument that removes
_DEFAULT = "the model's default"
_SETTINGS = {  # names of /set, and those of the library
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "max_tokens": "max_tokens",
    "thinking": "thinking",
    "budget": "thinking_budget",
}


@dataclass(frozen=True, slots=True)
class Command:
    """A command: how it is used, what it does in words, and the function that gets its argument.

    `completions` are words that complete its argument; a `Path` stands for files.
    """

    usage: str
    help: str
    run: Callable[[ChatSession, str], None]
    completions: Iterable[str] | Path = ()


def run(session: ChatSession, lines: Iterable[str]) -> bool:
    """Run lines of input until one of them ends the chat; return whether all succeeded.

    Errors are shown, and the chat goes on.
    """
    turns, succeeded = iter(lines), True
    while True:
        try:
            line = next(turns, None)
            if line is None or not take(session, line):
                return succeeded
        except BrokenPipeError:  # the reader of stdout is gone
            return succeeded
        except KeyboardInterrupt:  # in a command, or in a tool
            note("stopped")
        except OSError as error:
            succeeded = False
            note(f"qwen3: {of_the_system(error)}")
        except (Qwen3Error, ValueError, TypeError) as error:
            succeeded = False
            note(f"qwen3: {error}")


def take(session: ChatSession, line: str) -> bool:
    """Run one line of input: a command or a message. Return False to end the chat.

    Only a line that begins with a known command is one. Two slashes begin a message with one.

    Raises:
        ValueError: the line is a misspelt command.
    """
    line = line.rstrip()  # a paste often ends with a new line
    words = line.strip()
    name, _, rest = words.partition(" ")
    name = name.lower()
    if not words:
        return True
    if words.startswith("//"):
        session.say(words[1:])
    elif name in ("/exit", "/quit") and not rest:
        return False
    elif name in ("/think", "/no_think") and rest:  # of the message: the model obeys them
        session.say(line)
    elif command := COMMANDS.get(name):
        command.run(session, rest.strip())
    elif name.startswith("/") and (meant := closest_command(name, COMMANDS)):
        raise ValueError(f"there is no command {name}; did you mean {meant}? /{name} says it")
    else:
        session.say(line)
    return True


def completions() -> dict[str, Iterable[str] | Path]:
    """Return the commands with what completes their arguments."""
    return {name: command.completions for name, command in COMMANDS.items()} | {"/exit": ()}


# --- commands: each gets the text after its name ----------------------------------------------


def _help(session: ChatSession, _: str) -> None:
    note(_HELP_OF_TERMINAL if session.editor else _HELP)


def _new(session: ChatSession, _: str) -> None:
    session.begin(_system_messages(session))
    note("A new conversation.")


def _model(session: ChatSession, text: str) -> None:
    if text:
        session.use_model(text)
    note(f"{session.model_name}, context {session.llm.context:,} tokens")


def _system(session: ChatSession, text: str) -> None:
    if text:
        new = "" if text.lower() == _NONE else text
        session.conversation.messages = with_system(session.conversation.messages, new)
    found = _system_messages(session)
    note(f"The system prompt is: {visible(found[0]['content'])}" if found else "No system prompt.")


def _system_messages(session: ChatSession) -> list[Message]:
    """Return the system prompt of the conversation, or nothing."""
    return [each for each in session.conversation.messages[:1] if each["role"] == "system"]


def _set(session: ChatSession, text: str) -> None:
    name, _, value = text.replace("=", " ", 1).partition(" ")
    if not name:
        note("\n".join(f"{name:<20}{value}" for name, value in _shown(session, _SETTINGS)))
        return
    name = name.lower().replace("-", "_").removeprefix("thinking_")
    if name not in _SETTINGS:
        raise ValueError(f"there is no setting {name}; {hint(name, _SETTINGS)}")
    try:
        _change(session, name, _value(name, value.strip()))
    except (ValueError, TypeError) as error:
        raise ValueError(str(error).replace(_SETTINGS[name], name)) from error
    [(_, shown)] = _shown(session, [name])
    note(f"{name} is {shown}.")


def _value(name: str, text: str) -> Any:
    """Return a value of /set; None for the model's own."""
    if text.lower() in ("", "default", "none"):
        return None
    if name == "thinking" and text.lower() in _SWITCHES:
        return _SWITCHES[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        expected = "on or off" if name == "thinking" else "a number"
        raise ValueError(f"{name} takes {expected}, not {text!r}") from None


def _shown(session: ChatSession, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield settings with their values as text; where one is the model's, with it if known."""
    prepared = session.llm.prepare("?", thinking=session.option("thinking"))
    for name in names:
        value = session.option(_SETTINGS[name])
        known = prepared.thinks if name == "thinking" else getattr(prepared.sampling, name, None)
        if value is not None:
            yield name, _written(value)
        else:
            yield name, _DEFAULT if known is None else f"{_written(known)} ({_DEFAULT})"


def _written(value: Any) -> str:
    return _SWITCHED[value] if isinstance(value, bool) else str(value)


def _change(session: ChatSession, name: str, value: Any) -> None:
    """Change a setting, and the other one of thinking and budget if it contradicts."""
    changes = {_SETTINGS[name]: value}
    if name == "thinking":
        session.llm.thinking.resolve(value)
        if value is False:
            changes["thinking_budget"] = None
    if name == "budget" and value is not None:
        if session.option("thinking") is False:
            changes["thinking"] = None
    session.set_options(**changes)


def _think(session: ChatSession, _: str) -> None:
    _change(session, "thinking", True)
    note("Thinking is on.")


def _nothink(session: ChatSession, _: str) -> None:
    _change(session, "thinking", False)
    note("Thinking is off.")


def _budget(session: ChatSession, text: str) -> None:
    if text and not text.isdecimal():
        raise ValueError(f"/budget takes a number of tokens, not {text!r}")
    _change(session, "budget", int(text) if text else None)
    note(f"Thinking takes at most {text} tokens." if text else "Thinking has no budget.")


def _attach(session: ChatSession, text: str) -> None:
    context = session.llm.context
    kept = [] if text.lower() == _NONE else session.files
    added = [read_attachment(_file(text, "/file"))] if text and text.lower() != _NONE else []
    parts = [*kept, *added]
    tokens = [len(session.llm.tokenizer.encode(part)) for part in parts]
    names = [part.partition(":\n")[0] for part in parts]
    if added and tokens[-1] >= context:
        raise ValueError(
            f"{names[-1]} has {tokens[-1]:,} tokens, more than the context window of {context:,}"
        )
    session.files = parts
    for name, count in zip(names, tokens, strict=True):
        note(f"{name}: {count:,} tokens of {context:,}; sent with your next message.")
    if not parts:
        note("No files.")


def _tools(session: ChatSession, text: str) -> None:
    if text.lower() == _NONE:
        session.use_functions([])
        session.use_servers([])
    elif text.lower().endswith(".json"):
        session.use_servers([_file(text, "/tools")])
        return
    elif text:
        functions = load_functions(_file(text, "/tools"))
        session.use_functions(functions)
        note(f"The model may call {', '.join(each.__name__ for each in functions)}.")
        return
    described = session.llm.prepare("?", tools=session.tools).tools
    for tool, shown in zip(session.tools, described, strict=True):
        where = f" of {tool.server}" if isinstance(tool, DescribedTool) else ""
        function = shown["function"]
        note(visible(f"{function['name']}{where}: {shorten(function['description'], _MAX_ABOUT)}"))
    if not described:
        note("No tools.")


def _retry(session: ChatSession, _: str) -> None:
    session.reply(session.conversation.retry)


def _edit(session: ChatSession, text: str) -> None:
    if not text and session.editor:
        last = [each for each in session.conversation.messages if each["role"] == "user"]
        before = str(last[-1]["content"]) if last else ""
        with session.released():
            text = desktop.edit(before)
        if text.strip() in ("", before.strip()):
            note("Nothing is changed.")
            return
        if not last:
            session.say(text)
            return
    if not text:
        raise ValueError("/edit takes the new text of the last message")
    session.reply(lambda: session.conversation.edit(text))


def _branch(session: ChatSession, text: str) -> None:
    if text and not text.isdecimal():
        raise ValueError(f"/branch takes the number of a branch, not {text!r}")
    number = session.branch(int(text) if text else None)
    note(f"This is branch {number}; /branch N goes to another.")


def _copy(session: ChatSession, _: str) -> None:
    answers = [each for each in session.conversation.messages if each["role"] == "assistant"]
    text = str(answers[-1].get("content") or "") if answers else ""
    if not text:
        raise ValueError("there is no answer to copy")
    note(f"{len(text):,} characters copied by {desktop.copy(text)}.")


def _save(session: ChatSession, text: str) -> None:
    session.conversation.save(_file(text, "/save"))
    note(f"Saved: {text}")


def _load(session: ChatSession, text: str) -> None:
    file = _file(text, "/load")
    if text.isdecimal() and not file.exists():
        with ConversationLog.open() as log:
            found = log.find(int(text))
            session.begin(log.messages(found.id), found.id)
        note_continued(found)
    else:
        session.begin(session.llm.conversation(file=file).messages)
        session.record()
        note(f"{len(session.conversation.messages)} messages.")
    session.recall()


def _search(session: ChatSession, text: str) -> None:
    if not text:
        raise ValueError("/search takes words of a recorded message")
    with ConversationLog.open() as log:
        hits = log.search(text, _HITS)
    lines = [
        f"{hit.conversation:>5}  {local_time(hit.changed)}  {hit.role:<10}{visible(hit.excerpt)}"
        for hit in hits
    ]
    note("\n".join(lines) if lines else "No message has these words.")
    if lines:
        note("/load and a number goes on with that conversation.")


def _stats(session: ChatSession, _: str) -> None:
    usages = session.usages
    prompt = sum(usage.prompt_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages)
    generated = sum(usage.completion_tokens for usage in usages)
    thinking = sum(usage.reasoning_tokens for usage in usages)
    note(
        f"{len(usages)} replies · {prompt:,} prompt tokens, {cached:,} cached · "
        f"{generated:,} reply tokens, {thinking:,} thinking · "
        f"{generated / session.seconds if usages else 0:.1f} tokens/s"
    )


def _file(text: str, command: str) -> Path:
    """Return the file that a command states: as it is, in quotes, or with escaped blanks."""
    if not text:
        raise ValueError(f"{command} takes a file")
    file = Path(text).expanduser()
    if not file.exists() and re.search(r"[\"'\\]", text):
        words = shlex.split(text)
        file = Path(words[0]).expanduser() if len(words) == 1 else file
    return file


COMMANDS = {
    "/new": Command("", "begin a new conversation; the system prompt stays", _new),
    "/model": Command(
        "NAME", "go on with another model; alone, name the current one", _model, (*SIZES, DEMO)
    ),
    "/system": Command(
        "TEXT", "set the system prompt; alone, show it; none removes it", _system, (_NONE,)
    ),
    "/think": Command("", "turn thinking on", _think),
    "/nothink": Command("", "turn thinking off", _nothink),
    "/budget": Command("N", "limit thinking to N tokens; alone, remove the limit", _budget),
    "/set": Command("NAME VALUE", "change a setting; alone, list them", _set, _SETTINGS),
    "/file": Command(
        "FILE",
        "send it with the next message; alone, list them; none removes them",
        _attach,
        _FILES,
    ),
    "/tools": Command(
        "FILE",
        "offer functions of a .py or MCP servers of a .json; alone, list; none removes",
        _tools,
        _FILES,
    ),
    "/retry": Command("", "generate the last reply again", _retry),
    "/edit": Command("TEXT", "replace the last message and reply; alone, in $EDITOR", _edit),
    "/branch": Command("N", "go on in a copy of the conversation; with N, in branch N", _branch),
    "/copy": Command("", "copy the last answer to the clipboard", _copy),
    "/save": Command("FILE", "save the conversation", _save, _FILES),
    "/load": Command("FILE|ID", "go on with a saved or a recorded conversation", _load, _FILES),
    "/search": Command("WORDS", "find recorded conversations by their words", _search),
    "/stats": Command("", "tokens and speed so far", _stats),
    "/help": Command("", "list the commands", _help),
}
_HELP = "\n".join(
    [
        *(f"{f'{name} {each.usage}':<20}{each.help}" for name, each in COMMANDS.items()),
        "/exit               leave the chat, as does Ctrl-D",
        "// begins a message with a slash. A line that ends with \\ continues.",
    ]
)
_HELP_OF_TERMINAL = f"""\
{_HELP}
Enter sends; Alt-Enter begins a line; Tab completes commands and files.
Up, Down and Ctrl-R find earlier lines; Ctrl-X Ctrl-E opens $EDITOR.
While it answers: Enter ends the thinking, Ctrl-C the answer; what you type comes next."""
