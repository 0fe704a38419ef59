"""What a checkpoint can do by its files, chat template and tokens: chat, thinking, tools."""

from dataclasses import dataclass
from pathlib import Path

from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.kind import CHAT, Kind
from qwen3_mlx.text.rerank_prompt import drops_user
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.tokenizer import Tokenizer

_TOOL = {"type": "function", "function": {"name": "a_tool", "parameters": {"type": "object"}}}
_MESSAGES = [{"role": "system", "content": "?"}, {"role": "user", "content": "?"}]


@dataclass(frozen=True, slots=True)
class Abilities:
    """The abilities of a checkpoint.

    Attributes:
        kind: what it is for: "chat", "embedding" or "reranker".
        chat: whether it has a chat template that shows what a user says; a base model has none.
        thinking: "hybrid" (on and off), "always" or "never"; None without a template or tokenizer.
        tools: whether the template tells the model of tools.
    """

    kind: str
    chat: bool
    thinking: str | None
    tools: bool

    @classmethod
    def of(cls, folder: Path, output: str) -> "Abilities":
        """Detect the abilities, never by a name; `output` is what the network computes.

        Raises:
            CheckpointError: the template or the tokenizer cannot be read.
        """
        template, file = ChatTemplate.from_folder(folder), folder / "tokenizer.json"
        tokenizer = Tokenizer(file) if file.is_file() else None
        kind = Kind.of(folder, tokenizer, template, output).name
        if template is None or kind != CHAT or drops_user(template):
            return cls(kind, False, None, False)
        mode = None
        if tokenizer:
            found = Thinking.of(template, tokenizer)
            mode = "hybrid" if found.hybrid else "always" if found.can_think else "never"
        return cls(kind, True, mode, _shows_tools(template))


def _shows_tools(template: ChatTemplate) -> bool:
    try:
        return "a_tool" in template.render(_MESSAGES, tools=[_TOOL])
    except Qwen3Error:  # a template without a system turn, or without tools
        return False
