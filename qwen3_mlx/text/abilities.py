"""What a checkpoint can do by its chat template and tokens: chat, thinking, tools."""

from dataclasses import dataclass
from pathlib import Path

from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.tokenizer import Tokenizer

_TOOL = {"type": "function", "function": {"name": "a_tool", "parameters": {"type": "object"}}}
_MESSAGES = [{"role": "system", "content": "?"}, {"role": "user", "content": "?"}]


@dataclass(frozen=True, slots=True)
class Abilities:
    """The abilities of a checkpoint.

    Attributes:
        chat: whether it has a chat template; a base model has none.
        thinking: "hybrid" (on and off), "always" or "never"; None without a template or tokenizer.
        tools: whether the template tells the model of tools.
    """

    chat: bool
    thinking: str | None
    tools: bool

    @classmethod
    def of(cls, folder: Path) -> "Abilities":
        """Detect the abilities by rendering the template, never by a name.

        Raises:
            CheckpointError: the template or the tokenizer cannot be read.
        """
        template, tokenizer = ChatTemplate.from_folder(folder), folder / "tokenizer.json"
        if template is None:
            return cls(False, None, False)
        mode = None
        if tokenizer.is_file():
            found = Thinking.of(template, Tokenizer(tokenizer))
            mode = "hybrid" if found.hybrid else "always" if found.can_think else "never"
        return cls(True, mode, _shows_tools(template))


def _shows_tools(template: ChatTemplate) -> bool:
    try:
        return "a_tool" in template.render(_MESSAGES, tools=[_TOOL])
    except Qwen3Error:  # a template without a system turn, or without tools
        return False
