"""Renders messages into the text of a prompt with the checkpoint's own chat template."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.text.messages import parsed_arguments

Tool = Mapping[str, Any]
TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
# Errors that the expressions of a template can raise.
_TEMPLATE_ERRORS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError),
)


class _Generation(Extension):
    """`{% generation %}`: marks the reply for training; here only its body is rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        """Parse the block; variables are local to its body, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


@lru_cache(maxsize=8)  # it takes 15 ms; a draft model, or one loaded again, has the same template
def _compiled(source: str) -> Template:
    """Compile a template in an environment of its own; raises Jinja's errors, and others."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


class ChatTemplate:
    """A Jinja template, in the same environment as in transformers.

    It runs sandboxed: a checkpoint's template can format text and nothing else.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile `source`; `special_tokens`, such as `eos_token`, are variables in it.

        Raises:
            CheckpointError: it is not a valid template.
        """
        self._special_tokens = dict(special_tokens or {})
        self.source = source
        try:
            self._template = _compiled(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the checkpoint's chat template is broken in line {error.lineno}: {error.message}"
            ) from error
        except (TemplateError, *_TEMPLATE_ERRORS) as error:
            raise CheckpointError(f"the checkpoint's chat template is broken: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate | None":
        """Read the template of a checkpoint; return None if it has none (a base model).

        It is in chat_template.jinja or, in older checkpoints, in tokenizer_config.json.

        Raises:
            CheckpointError: it cannot be read, or is not a valid template.
        """
        beside, config = folder / "chat_template.jinja", read_tokenizer_config(folder)
        source: Any = config.get("chat_template")
        place = folder / TOKENIZER_CONFIG
        try:
            if beside.is_file():
                place = beside
                source = beside.read_text(encoding="utf-8")
            if isinstance(source, list):  # several templates, by name
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{place} cannot be read: {error}") from error
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{place}: its chat_template has no name or text") from error
        if source is not None and not isinstance(source, str):
            raise CheckpointError(f"{place}: its chat_template is {source!r:.40}, not text")
        return cls(source, special_tokens(config)) if source else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        escape: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> str:
        """Render the prompt of normalised `messages`; `thinking` None is the template's default.

        `escape` replaces each message by the one that is rendered.

        Raises:
            Qwen3Error: the template refuses the messages.
        """
        switch = {} if thinking is None else {"enable_thinking": thinking}
        # Qwen3-Coder's iterates over the arguments of calls, so they become objects before they are
        # escaped; other templates print the text of the arguments.
        if "<function=" in self.source:
            messages = [_with_parsed_arguments(message) for message in messages]
        if escape:
            messages = [escape(message) for message in messages]
        try:
            variables = {
                **self._special_tokens,
                # Some templates read the thinking as `thinking`; transformers adds it, too.
                "messages": [
                    {"thinking": message["reasoning_content"], **message}
                    if message.get("reasoning_content") is not None
                    else message
                    for message in messages
                ],
                "tools": list(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **switch,
            }
            return self._template.render(variables)
        except (TemplateError, *_TEMPLATE_ERRORS) as error:
            raise Qwen3Error(
                f"the checkpoint's chat template refuses these messages: {error}"
            ) from error


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; empty if the file does not exist.

    Raises:
        CheckpointError: it cannot be read.
    """
    place = folder / TOKENIZER_CONFIG
    if not place.is_file():
        return {}
    try:
        content = json.loads(place.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{place} cannot be read: it is not an object")
    return content


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a tokenizer_config.json defines, such as `eos_token`.

    Each is a string, or an object with its `content`; null if the checkpoint has none.
    """
    named = {}
    for name in _SPECIAL_TOKENS:
        token = tokenizer_config.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            named[name] = text
    return named


def _with_parsed_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parse the arguments of calls into objects, because this template iterates over them."""
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    read = []
    for call in calls:
        function = dict(call.get("function", call))
        read.append({**call, "function": {**function, "arguments": parsed_arguments(function)}})
    return {**message, "tool_calls": read}


def _tojson(  # with transformers' signature
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter sorts keys and escapes HTML, which no checkpoint was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
