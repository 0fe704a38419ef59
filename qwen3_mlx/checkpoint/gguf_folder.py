"""The folder that describes a GGUF file: config.json, tokenizer and the like, from its metadata.

The folder lies among the user's cached files and is written once; the weights stay in the file.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Container, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from qwen3_mlx.checkpoint.formats.methods import GGUF
from qwen3_mlx.checkpoint.gguf_file import (
    gguf_tensors,
    read_gguf,
    read_remote_gguf,
    without_lists,
)
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.weights import GGUF_POINTER, Weights
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import Entry, read_json

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of tokens
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # of Qwen's tokenizer.json, between whose matches no merge reaches
# Converters mark all of Qwen's added tokens as control tokens, but these are text.
_PLAIN = (
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
_END_OF_TEXT, _END_OF_TURN = "<|endoftext|>", "<|im_end|>"
_POOLED_BY_LAST_TOKEN = 3
_UNFINISHED, _STALE_SECONDS = "unfinished-", 3600
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p"}
_YARN = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attn_factor",
}


def gguf_folder(file: Path) -> Path:
    """Return the folder that describes a GGUF file, written if it is not there.

    The parts of a split file are found by the name of any of them.

    Raises:
        CheckpointError: a part is missing, the file is broken or is not of a Qwen3, or the folder
            cannot be written.
    """
    files = _parts(file.absolute())  # a link in the hub's cache is called as the file was
    try:
        states = [(str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in files]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    folder = _cache() / sha256(json.dumps(states).encode()).hexdigest()[:32]
    if not _is_whole(folder):
        tensors = {
            name: entry for part in files for name, entry in gguf_tensors(part, files[0]).items()
        }
        contents = _contents(files, read_gguf(files[0]).metadata, tensors)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            _write(folder, contents)
        except OSError as error:
            raise CheckpointError(
                f"{folder}, which describes {file.name}, cannot be written: {error.strerror}"
            ) from error
    return folder


def describe_remote(source: Source, files: Sequence[str]) -> tuple[dict[str, Any], Weights]:
    """Return the config.json of a GGUF file on the hub, and its tensors without their numbers.

    Only the headers of the file, or of its parts, are downloaded. Nothing is stored.

    Raises:
        CheckpointError: as `gguf_folder` does, or the hub cannot be reached.
    """
    names = {source.path(file): file for file in files}
    parts = _parts(source.path(files[0]), names)
    headers: dict[Path, Mapping[str, Entry]] = {}
    first: Mapping[str, Any] = {}
    for part in parts:
        read = partial(source.read_range, names[part])
        header = read_remote_gguf(part, read, without_lists(first))
        first = first or header.metadata
        headers[part] = header.tensors
    weights = Weights(parts[0].parent, headers)
    return _contents(parts, first, weights.stored)["config.json"], weights


def _parts(file: Path, present: Container[Path] | None = None) -> list[Path]:
    """Return all parts of a file, which are those `present`, or on disk."""
    match = _SPLIT.fullmatch(file.name)
    if not match:
        return [file]
    stem, number, count = match.groups()
    if not 1 <= int(number) <= int(count):
        raise CheckpointError(f"{file} is called part {int(number)} of {int(count)}")
    files = [
        file.with_name(f"{stem}-{part:05}-of-{count}.gguf") for part in range(1, int(count) + 1)
    ]
    missing = (
        part.name for part in files if not (part.is_file() if present is None else part in present)
    )
    if first := next(missing, ""):
        others = sum(1 for _ in missing)
        more = f" and {others} more" if others else ""
        raise CheckpointError(f"{file.parent} lacks {first}{more}: all parts are needed")
    return files


def _is_whole(folder: Path) -> bool:
    """Return whether a folder has all of its files as they were written."""
    try:
        sizes = read_json(folder / GGUF_POINTER)["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (CheckpointError, KeyError, AttributeError, TypeError, OSError):
        return False


def _cache() -> Path:
    home = os.environ.get("QWEN3_HOME")
    return (Path(home) if home else user_cache_path("qwen3-mlx", appauthor=False)) / "gguf"


def _write(folder: Path, contents: Mapping[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.glob(f"{_UNFINISHED}*"):
        if time.time() - other.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_UNFINISHED))
    try:
        sizes: dict[str, int] = {}
        for name, content in contents.items():
            if name == GGUF_POINTER:
                content = {**content, "sizes": sizes}
            text = content if isinstance(content, str) else json.dumps(content)
            sizes[name] = (unfinished / name).write_bytes(text.encode("utf-8", "replace"))
        unfinished.rename(folder)
    except OSError:
        if not _is_whole(folder):  # nobody else has written it meanwhile
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _contents(
    files: Sequence[Path], metadata: Mapping[str, Any], tensors: Mapping[str, Entry]
) -> dict[str, Any]:
    """Return the contents of the folder's files, by their names."""
    if metadata.get("split.count", len(files)) != len(files):
        raise CheckpointError(
            f"{files[0]} is one of {metadata['split.count']} parts; it was renamed"
        )
    try:
        vocabulary = tensors["model.embed_tokens.weight"].shape[0]
        _check_tokens(metadata, vocabulary)
        contents: dict[str, Any] = {
            "config.json": _config(metadata, vocabulary, tied="lm_head.weight" not in tensors),
            "tokenizer.json": _tokenizer(metadata),
            "tokenizer_config.json": _tokenizer_config(metadata),
            "generation_config.json": _generation_config(metadata),
        }
    except KeyError as error:
        raise CheckpointError(f"{files[0]} has no {error} in its metadata or tensors") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{files[0]} has metadata that is wrong: {error}") from error
    if template := metadata.get("tokenizer.chat_template"):
        contents["chat_template.jinja"] = str(template)
    return {**contents, GGUF_POINTER: {"files": [str(file) for file in files]}}  # the last


def _check_tokens(metadata: Mapping[str, Any], vocabulary: int) -> None:
    """Check the lists that the tokenizer is made of.

    Raises:
        KeyError: one is missing.
        ValueError: one is something else.
    """
    tokens, types, merges = (
        metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges")
    )
    for name, values, kind in (
        ("tokens", tokens, str),
        ("token_type", types, int),
        ("merges", merges, str),
    ):
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError(f"tokenizer.ggml.{name} is no list of {kind.__name__}")
    if not len(tokens) == len(types) == vocabulary:
        raise ValueError(
            f"{len(tokens):,} tokens with {len(types):,} types, where the embedding has "
            f"{vocabulary:,} rows"
        )
    if not all(" " in merge for merge in merges):
        raise ValueError("a merge has no two parts")
    for name in ("eos", "eot", "padding"):
        number = metadata.get(key := f"tokenizer.ggml.{name}_token_id")
        if number is not None and not (type(number) is int and 0 <= number < len(tokens)):
            raise ValueError(f"{key} is {number!r:.50}, which is no token")


def _config(metadata: Mapping[str, Any], vocabulary: int, *, tied: bool) -> dict[str, Any]:
    family = metadata["general.architecture"]

    def stated(key: str) -> Any:
        return metadata[f"{family}.{key}"]

    is_moe = family == "qwen3moe"
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if is_moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if is_moe else "qwen3",
        "hidden_size": stated("embedding_length"),
        "intermediate_size": stated("feed_forward_length"),
        "num_hidden_layers": stated("block_count"),
        "num_attention_heads": stated("attention.head_count"),
        "num_key_value_heads": stated("attention.head_count_kv"),
        "head_dim": stated("attention.key_length"),
        "max_position_embeddings": stated("context_length"),
        "rms_norm_eps": _rounded(stated("attention.layer_norm_rms_epsilon")),
        "rope_theta": stated("rope.freq_base"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "quantization_config": {"quant_method": GGUF},
    }
    if is_moe:
        config |= {
            "num_experts": stated("expert_count"),
            "num_experts_per_tok": stated("expert_used_count"),
            "moe_intermediate_size": stated("expert_feed_forward_length"),
            "norm_topk_prob": True,  # as llama.cpp has it for this architecture
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    scaling = f"{family}.rope.scaling."
    if (kind := metadata.get(f"{scaling}type")) not in (None, "none"):
        found = {
            key: _rounded(metadata[scaling + name])
            for name, key in _YARN.items()
            if scaling + name in metadata
        }
        config["rope_scaling"] = {"rope_type": kind, **found}
    return config


def _rounded(number: float) -> float:
    """Return a number of 32 bits as it was written, in at most seven digits."""
    return float(f"{number:.7g}") if isinstance(number, float) else number


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json; its ids are those of the published one."""
    kind, before = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    if (kind, before) != ("gpt2", "qwen2"):
        raise CheckpointError(
            f"the tokenizer is {kind}, {before}; that of Qwen3 is gpt2, qwen2, and no other is read"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    no = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), False)
    byte_level = {"type": "ByteLevel", **no}
    pattern = {"pattern": {"Regex": _PATTERN}, "behavior": "Isolated", "invert": False}
    split = {"type": "Split", **pattern}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "special": kind == _CONTROL and token not in _PLAIN,
            }
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _post_processor(metadata, tokens, byte_level),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {
                token: number
                for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
                if kind == _NORMAL
            },
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _post_processor(
    metadata: Mapping[str, Any], tokens: Sequence[str], byte_level: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return what is added to a text: an end to that of an embedding model, otherwise nothing."""
    pooling = metadata.get(f"{metadata['general.architecture']}.pooling_type")
    if pooling != _POOLED_BY_LAST_TOKEN:
        return byte_level
    end = {"SpecialToken": {"id": _END_OF_TEXT, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    described = {"id": _END_OF_TEXT, "ids": [tokens.index(_END_OF_TEXT)], "tokens": [_END_OF_TEXT]}
    appended = {
        "type": "TemplateProcessing",
        "single": [text, end],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}, end],
        "special_tokens": {_END_OF_TEXT: described},
    }
    return {"type": "Sequence", "processors": [byte_level, appended]}


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    config = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None}
    for name, key in (("eos_token", "eos"), ("pad_token", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        config[name] = None if number is None else tokens[number]
    return config


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation_config.json: sampling, and all tokens that end a reply."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ends = {metadata["tokenizer.ggml.eos_token_id"], metadata.get("tokenizer.ggml.eot_token_id")}
    ends |= {tokens.index(token) for token in (_END_OF_TURN, _END_OF_TEXT) if token in tokens}
    sampling = {
        key: _rounded(metadata[f"general.sampling.{name}"])
        for name, key in _SAMPLING.items()
        if f"general.sampling.{name}" in metadata
    }
    return {"eos_token_id": sorted(end for end in ends if end is not None), **sampling}
