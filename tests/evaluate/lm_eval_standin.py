"""A stand-in for lm-eval, so that the tests need neither its 45 packages nor their versions.

It has what `qwen3_mlx.evaluate.tasks` uses, in one module, and reads the tasks of tests/data/eval.
`python -m benchmarks.eval_tasks` runs the same tasks by lm-eval itself.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from fnmatch import filter as matching
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
import yaml

_NAMES = ("", ".api", ".api.model", ".models", ".models.utils", ".tasks", ".utils")


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this module imported in place of all modules of lm-eval."""
    for name in _NAMES:
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", sys.modules[__name__])


class TemplateLM:
    """Splits requests into the ids of a context and of its continuation."""

    def loglikelihood(self: Any, requests: list[Any]) -> Any:
        pairs = []
        for request in requests:
            context, continuation = request.args
            before = self.tok_encode(context) if context else [self.eot_token_id]
            whole = self.tok_encode(context + continuation)
            pairs.append((request.args, before, whole[len(before) if context else 0 :]))
        return self._loglikelihood_tokens(pairs)


class Task:
    """A task of a YAML file."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.OUTPUT_TYPE = config["output_type"]
        self.seed: int | None = None

    def get_config(self, key: str) -> Any:
        return self.config.get(key)

    def set_config(self, key: str, value: Any, update: bool = False) -> None:
        self.config[key] = self.config[key] | value if update else value

    def set_fewshot_seed(self, seed: int) -> None:
        self.seed = seed

    def documents(self, split: str) -> list[dict[str, Any]]:
        file = Path(self.config["dataset_kwargs"]["data_files"][self.config[split]])
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()]

    def render(self, name: str, document: dict[str, Any]) -> str:
        template = self.config[name]
        if template in document:
            return str(document[template])
        return str(jinja2.Template(template, keep_trailing_newline=True).render(document))

    def context(self, document: dict[str, Any], model: Any, chat: bool) -> str:
        examples = ""
        if count := self.config["num_fewshot"]:
            for example in self.documents("fewshot_split")[:count]:
                examples += self.render("doc_to_text", example)
                examples += self.render("doc_to_target", example) + self.config["fewshot_delimiter"]
        text = examples + self.render("doc_to_text", document)
        if chat:
            return str(model.apply_chat_template([{"role": "user", "content": text}]))
        return text

    def requests(self, document: dict[str, Any], model: Any, chat: bool) -> Iterator[Any]:
        context = self.context(document, model, chat)
        if self.OUTPUT_TYPE == "multiple_choice":
            yield from (SimpleNamespace(args=(context, text)) for text in document["choices"])
        elif self.OUTPUT_TYPE == "generate_until":
            yield SimpleNamespace(args=(context, self.config["generation_kwargs"]))
        else:
            yield SimpleNamespace(args=(self.render("doc_to_target", document),))

    def metrics(self, documents: list[dict[str, Any]], answers: list[list[Any]]) -> dict[str, Any]:
        if self.OUTPUT_TYPE == "multiple_choice":
            chosen = [max(range(len(found)), key=found.__getitem__) for found in answers]
            right = [one == doc["answer"] for one, doc in zip(chosen, documents, strict=True)]
            return {"acc,none": fmean(right), "acc_stderr,none": 0.0}
        if self.OUTPUT_TYPE == "loglikelihood_rolling":
            size = sum(len(document["text"].encode()) for document in documents)
            total = sum(answer for (answer,) in answers)
            return {"bits_per_byte,none": -total / size / math.log(2)}
        targets = [self.render("doc_to_target", document) for document in documents]
        replies, name = [reply for (reply,) in answers], "none"
        for filtered in self.config.get("filter_list", ()):
            pattern, name = re.compile(filtered["filter"][0]["regex_pattern"]), filtered["name"]
            replies = [(pattern.findall(reply) or [""])[0] for reply in replies]
        equal = [reply == target for reply, target in zip(replies, targets, strict=True)]
        return {f"exact_match,{name}": fmean(equal)}


class TaskManager:
    """Finds tasks; beside those of a folder there is one, to stand for those of lm-eval."""

    def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
        files = Path(include_path).glob("*.yaml") if include_path else ()
        configs = [yaml.safe_load(file.read_text("utf-8")) for file in files]
        self._configs = {config["task"]: config for config in configs}
        self.all_tasks = sorted([*self._configs, *(["gsm8k"] if include_defaults else [])])

    def match_tasks(self, names: list[str]) -> list[str]:
        return [task for name in names for task in matching(self.all_tasks, name)]

    def load(self, names: list[str]) -> dict[str, Any]:
        return {"tasks": {name: Task(self._configs[name]) for name in self.match_tasks(names)}}


def evaluate(model: Any, loaded: dict[str, Any], *, limit: float | None, **options: Any) -> Any:
    """Ask the requests of all tasks, and return their metrics."""
    sys.stdout.write("what lm-eval prints\n")
    results: dict[str, Any] = {"results": {}, "n-shot": {}}
    for name, task in loaded["tasks"].items():
        documents = task.documents("test_split")[: limit and int(limit)]
        chat = options["apply_chat_template"]
        requests = [[*task.requests(document, model, chat)] for document in documents]
        kind = {"multiple_choice": "loglikelihood"}.get(task.OUTPUT_TYPE, task.OUTPUT_TYPE)
        answers = iter(getattr(model, kind)([request for few in requests for request in few]))
        grouped = [[next(answers) for _ in few] for few in requests]
        results["results"][name] = {"alias": name} | task.metrics(documents, grouped)
        results["n-shot"][name] = task.config["num_fewshot"]
    return results


def normalize_gen_kwargs(options: dict[str, Any], most: int) -> dict[str, Any]:
    """Return the generation options of a task in their one form."""
    options = {"do_sample": False, "until": [], "max_gen_toks": most} | options
    if isinstance(options["until"], str):
        options["until"] = [options["until"]]
    return options


def simple_parse_args_string(text: str) -> dict[str, Any]:
    """Return the values of NAME=VALUE,..."""
    return {name: yaml.safe_load(value) for name, value in re.findall(r"(\w+)=([^,]*)", text)}


def get_rolling_token_windows(
    token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield what each window reads, and what it predicts: tokens that none before it has."""
    assert context_len == 1
    ids = [prefix_token, *token_list]
    for start in range(0, len(token_list), max_seq_len):
        end = min(start + max_seq_len, len(token_list))
        yield ids[max(0, end - max_seq_len) : end], token_list[start:end]


def make_disjoint_window(pair: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """Return a window with only what stands before its predictions in its first part."""
    read, predicted = pair
    return read[: len(read) - len(predicted) + 1], predicted


def handle_non_serializable(value: Any) -> str:
    """Return a value that JSON lacks as text."""
    return str(value)
