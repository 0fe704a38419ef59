"""The checkpoint's own chat template: messages in, prompt text out."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3_mlx.errors import CheckpointError, Qwen3Error

Tool = Mapping[str, Any]
# What the expressions of a template can come to.
_RUN_TIME_ERRORS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError),
)


class ChatTemplate:
    """A Jinja template in the environment that the published ones are written for.

    It runs sandboxed: a checkpoint's template can format text and nothing else.
    """

    def __init__(self, source: str) -> None:
        """Compile `source`.

        Raises:
            CheckpointError: it is not a valid template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = source
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the checkpoint's chat template is broken in line {error.lineno}: {error.message}"
            ) from error

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate | None":
        """Read the template of a checkpoint, or give None where it has none (a base model).

        It lies in chat_template.jinja, or in tokenizer_config.json as older checkpoints have it.
        """
        beside, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        place = beside if beside.is_file() else config
        if not place.is_file():
            return None
        try:
            source: Any = place.read_text(encoding="utf-8")
            if place == config:
                source = json.loads(source).get("chat_template")
            if isinstance(source, list):  # several, by name
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{place} cannot be read: {error}") from error
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{place}: its chat_template has no name or text") from error
        if source is not None and not isinstance(source, str):
            raise CheckpointError(f"{place}: its chat_template is {source!r:.40}, not text")
        return cls(source) if source else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Write the prompt for normalised `messages`; thinking None is the template's default.

        Raises:
            Qwen3Error: the template refuses the messages.
        """
        switch = {} if thinking is None else {"enable_thinking": thinking}
        try:
            if "<function=" in self.source:  # Qwen3-Coder's, which goes through the arguments
                messages = [_with_arguments_read(message) for message in messages]
            return self._template.render(
                messages=messages,
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **switch,
            )
        except (TemplateError, *_RUN_TIME_ERRORS) as error:
            raise Qwen3Error(
                f"the checkpoint's chat template refuses these messages: {error}"
            ) from error


def _with_arguments_read(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Make objects of arguments of calls that are JSON text, as OpenAI's clients send them."""
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    read = []
    for call in calls:
        function = dict(call.get("function", call))
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError as error:
                raise ValueError(f"the arguments of a tool call are not JSON: {error}") from error
        read.append({**call, "function": function})
    return {**message, "tool_calls": read}


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter sorts keys and escapes HTML, which no checkpoint was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
