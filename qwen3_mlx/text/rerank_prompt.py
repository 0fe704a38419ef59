"""The prompt of a reranker: whether a document meets the requirements of a query, yes or no.

The text is that of the model card of Qwen3-Reranker, or of a chat template that takes a query and
a document.
"""

import re
from collections.abc import Sequence

from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.prompt import ControlTokenEscaper, ControlTokens
from qwen3_mlx.text.template import ChatTemplate

_CARD = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: ",
    "\n<Query>: ",
    "\n<Document>: ",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
_CUT = re.compile(r"\S \Z")
_ROLES = ("system", "query", "document")


class RerankPrompt:
    """Writes the prompts of a query and its documents.

    Names of control tokens in the texts are plain text: no document can forge a prompt.
    """

    def __init__(
        self, control: ControlTokens, pieces: Sequence[str] | None, instruction: str, query: str
    ) -> None:
        """Create the writer; `pieces` as `takes_documents` returns them, None is the card's.

        Raises:
            ValueError: a text is not valid Unicode.
        """
        self._tokenizer = control.tokenizer
        self._escaper = ControlTokenEscaper(control)
        first, second, third, after = pieces or _CARD
        self.after_ids = self._tokenizer.encode(after)
        written = (
            f"{first}{self._escaper.hide(instruction)}{second}{self._escaper.hide(query)}{third}"
        )
        # What stands before the documents is encoded once, if the ids are those of the whole text.
        cut = len(written) - 1 if self._tokenizer.can_be_cut and _CUT.search(written) else 0
        self._shared_ids, self._lead = self._encoded(written[:cut]), written[cut:]

    def ids(self, document: str) -> list[int]:
        """Return the ids up to the end of the document; `after_ids` follow.

        Raises:
            ValueError: the text is not valid Unicode.
        """
        return self._shared_ids + self._encoded(self._lead + self._escaper.hide(document))

    def _encoded(self, written: str) -> list[int]:
        return self._tokenizer.encode(self._escaper.prompt(written))


def takes_documents(template: ChatTemplate) -> tuple[str, ...] | None:
    """Return the text around instruction, query and document in a reranker's chat template.

    None if it is another: it shows what a user says, or leaves out one of the three.
    """
    marks = [_mark(role) for role in _ROLES]
    rendered = _rendered(template, _ROLES)
    in_order = re.findall("|".join(marks), rendered) == marks
    return tuple(re.split("|".join(marks), rendered)) if in_order and drops_user(template) else None


def drops_user(template: ChatTemplate) -> bool:
    """Return whether a chat template leaves out what the user says."""
    # Some templates require a system turn. One that refuses both has its own words for that.
    tries = (_rendered(template, roles) for roles in (("user",), ("system", "user")))
    rendered = next(filter(None, tries), "")
    return bool(rendered) and _mark("user") not in rendered


def _rendered(template: ChatTemplate, roles: Sequence[str]) -> str:
    """Return a conversation in which each role says its mark; "" if the template refuses it."""
    try:
        return template.render([{"role": role, "content": _mark(role)} for role in roles])
    except Qwen3Error:
        return ""


def _mark(role: str) -> str:
    return f"xq7w{role}"  # a text to find in what a template renders
