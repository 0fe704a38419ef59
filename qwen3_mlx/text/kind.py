"""What a checkpoint is for: chat, embedding or reranking, by its files, its tokens and its network.

Embedding models and rerankers are published with the files of sentence-transformers: modules.json
lists the modules that a text passes through, each with a folder and a config.json. Conversions for
MLX drop these files, so the tokenizer, the chat template and the network are asked as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.config import SCORE, STATES
from qwen3_mlx.text.rerank_prompt import takes_documents
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.tokenizer import Tokenizer, read_json_file

CHAT, EMBEDDING, RERANKER = "chat", "embedding", "reranker"
_DESCRIBED = {CHAT: "a chat model", EMBEDDING: "an embedding model", RERANKER: "a reranker"}
LAST_TOKEN = "lasttoken"  # sentence-transformers' name of the pooling
_POOLING_FLAG = "pooling_mode_"  # of its older files: one key for each mode
_KNOWN = {"Transformer", "Pooling", "Normalize", "LogitScore"}
# Of the model card, for conversions without config_sentence_transformers.json.
WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
_CARD_PROMPTS = {"query": f"Instruct: {WEB_SEARCH}\nQuery:", "document": ""}


@dataclass(frozen=True, slots=True)
class Kind:
    """The kind of a checkpoint, and what its files say of vectors or scores.

    Attributes:
        name: `CHAT`, `EMBEDDING` or `RERANKER`.
        problem: why its vectors or scores cannot be computed as the files say; "" if they can.
        prompts: texts that stand before a text to embed, by name.
        default_prompt: the one that is used unless another is named; "" if none is.
        instruction: the task of a reranker, unless another is given.
        max_tokens: the most tokens of a text, if the files limit them.
        answers: the ids of "no" and "yes" of a reranker, if the files name them.
        pieces: the text around instruction, query and document in a reranker's chat template.
    """

    name: str = CHAT
    problem: str = ""
    prompts: Mapping[str, str] = field(default_factory=lambda: _CARD_PROMPTS)
    default_prompt: str = ""
    instruction: str = WEB_SEARCH
    max_tokens: int | None = None
    answers: tuple[int, int] | None = None
    pieces: tuple[str, ...] | None = None

    @property
    def described(self) -> str:
        """The kind as a noun with its article."""
        return _DESCRIBED[self.name]

    @classmethod
    def of(
        cls,
        folder: Path,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        output: str,
    ) -> "Kind":
        """Detect the kind of the checkpoint in `folder`; `output` is what its network computes.

        Raises:
            CheckpointError: a file cannot be read.
        """
        modules, pieces = _modules(folder), takes_documents(template) if template else None
        if output == SCORE or "LogitScore" in modules or pieces:
            name = RERANKER
        elif "Pooling" in modules or output == STATES or (tokenizer and tokenizer.around[1]):
            name = EMBEDDING
        else:
            return cls()
        stated = _read(folder / "config_sentence_transformers.json")
        prompts, default = stated.get("prompts") or {}, stated.get("default_prompt_name") or ""
        if not _is_text(prompts) or default not in {"", *prompts}:
            raise CheckpointError(
                f"{folder}: config_sentence_transformers.json has prompts that are no texts by name"
            )
        own = prompts.get(default, "")
        limit = _read(folder / "sentence_bert_config.json").get("max_seq_length")
        score = _read(folder / modules["LogitScore"]) if "LogitScore" in modules else {}
        answers = score.get("false_token_id"), score.get("true_token_id")
        stated_answers = all(type(token) is int and token >= 0 for token in answers)
        return cls(
            name,
            _problem(folder, modules),
            prompts if prompts and name == EMBEDDING else _CARD_PROMPTS,
            own if name == EMBEDDING else "",
            own if own and name == RERANKER else WEB_SEARCH,
            limit if type(limit) is int else None,
            answers if stated_answers else None,  # type: ignore[arg-type]
            pieces,
        )


def _modules(folder: Path) -> dict[str, str]:
    """Return the modules of modules.json, by class: the path of each one's config.json."""
    file = folder / "modules.json"
    if not file.is_file():
        return {}
    try:
        return {
            # The packages of these classes have moved, their names have not.
            module["type"].rpartition(".")[2]: f"{module['path']}/config.json"
            for module in read_json_file(file)
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is no list of modules with type and path") from error


def _problem(folder: Path, modules: Mapping[str, str]) -> str:
    """Return why the modules cannot be honoured; "" if they can, or none are named."""
    if others := sorted(modules.keys() - _KNOWN):
        return f"it has modules that are not supported: {', '.join(others)}"
    if "Pooling" not in modules:
        return ""
    if not (folder / modules["Pooling"]).is_file():
        return f"there is no {modules['Pooling']}, so its pooling is not known"
    stated = _read(folder / modules["Pooling"])
    found = stated.get("pooling_mode") or [
        key.removeprefix(_POOLING_FLAG)
        for key, on in stated.items()
        if key.startswith(_POOLING_FLAG) and on
    ]
    modes = [found] if isinstance(found, str) else list(found)
    return "" if modes == [LAST_TOKEN] else f"its pooling is {' and '.join(modes) or 'not stated'}"


def _read(file: Path) -> dict[str, Any]:
    content = read_json_file(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return content


def _is_text(prompts: object) -> bool:
    return isinstance(prompts, dict) and all(isinstance(text, str) for text in prompts.values())
