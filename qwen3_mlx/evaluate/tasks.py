"""Evaluation tasks: lm-eval asks and computes the metrics, a loaded checkpoint answers.

The requests of tasks begin alike: with the same examples, or with one question for several choices.
So they are sorted, and what neighbours share is read once and then comes from the prefix cache.
"""

import logging
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Event as Flag
from typing import TYPE_CHECKING, Any, TypeVar

from qwen3_mlx.arguments import Progress
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.extras import install_command
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text

if TYPE_CHECKING:
    from qwen3_mlx.api.llm import LLM

_log = logging.getLogger(__name__)
_LANES = 8  # requests at once: half as many as prefixes are kept
_MAX_GENERATED = 256  # tokens of a reply where a task sets no limit, as in lm-eval
_SEED = 1234  # lm-eval's own
_SAMPLING = {parameter.name for parameter in fields(SamplingParams)}

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Answering:
    """The form of requests and answers.

    Attributes:
        chat: render the requests by the checkpoint's chat template. The thinking of replies, which
            token ids separate, is then no part of the answers.
        thinking: switches the thinking on or off; None is the checkpoint's default. Needs `chat`.
        seed: of the choice of examples and of sampling; None is lm-eval's.
    """

    chat: bool = False
    thinking: bool | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.thinking is not None and not self.chat:
            raise ValueError("thinking is switched in conversations only: set chat as well")


_PLAIN = Answering()


@dataclass(frozen=True, slots=True)
class TaskResults:
    """The results of tasks, and what they took.

    Attributes:
        results: what lm-eval's `evaluate` returns; the metrics are `results["results"]`.
        prompt_tokens: tokens of all requests, generated ones not included.
        tokens_read: those of them that were computed; the others were shared with other requests.
        shortened: requests that lost their beginning, because the context window is shorter.
        unfinished: replies that ended inside their thinking, so that their answer is empty.
    """

    results: dict[str, Any]
    prompt_tokens: int
    tokens_read: int
    shortened: int
    unfinished: int


def check_lm_eval() -> None:
    """Check that tasks can be run, before a model is loaded for them.

    Raises:
        Qwen3Error: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise Qwen3Error(f"evaluation tasks need lm-eval: {install_command('eval')}")


def run_tasks(
    llm: "LLM",
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: str | None = None,
    answering: Answering = _PLAIN,
    progress: Progress | None = None,
) -> TaskResults:
    """Evaluate a model on tasks of lm-eval.

    Args:
        llm: the model.
        tasks: names of tasks, groups or tags; * stands for any letters.
        include: a folder with further tasks.
        limit: documents of each task, or, below 1, a share of them; None is all.
        num_fewshot: examples before each question, unless the task demands none; None is the
            task's own number.
        gen_kwargs: NAME=VALUE,...: changes of the generation options of tasks.
        answering: the form of requests and answers.
        progress: callable (done, total) requests of one kind.

    Raises:
        ValueError: there is no such task, or `limit` is not above 0.
        Qwen3Error: lm-eval is not installed, or the checkpoint cannot do what a task asks for.
    """
    check_lm_eval()
    if limit is not None and limit <= 0:
        raise ValueError(f"limit must be above 0, not {limit}")
    llm.thinking.resolve(answering.thinking)
    # Imported here because they take a second. They are untyped.
    import numpy as np
    from lm_eval import evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import simple_parse_args_string

    class Model(_Answers, TemplateLM):  # type: ignore[misc]
        """The model that lm-eval asks."""

    seed = answering.seed
    with redirect_stdout(sys.stderr):  # lm-eval prints there, too
        loaded = _load(tasks, include)
        for name, task in loaded["tasks"].items():
            generates = task.OUTPUT_TYPE == "generate_until"
            if answering.thinking and not generates:
                raise Qwen3Error(
                    f"the task {name} compares the likelihoods of given texts, before which "
                    "nothing is thought; leave thinking=True out"
                )
            if generates and gen_kwargs:
                changes = simple_parse_args_string(gen_kwargs)
                task.set_config("generation_kwargs", changes, update=True)
            own = task.get_config("num_fewshot")
            if num_fewshot and own == 0:
                _log.warning("%s has no examples, whatever num_fewshot is", name)
            elif num_fewshot is not None or own is None:
                task.set_config("num_fewshot", num_fewshot or 0)
            task.set_fewshot_seed(_SEED if seed is None else seed)
        random.seed(seed or 0)
        np.random.seed(_SEED if seed is None else seed)
        model = Model(llm, answering, progress)
        results = evaluate(
            model,
            loaded,
            limit=limit,
            apply_chat_template=answering.chat,
            fewshot_as_multiturn=answering.chat,
            log_samples=False,
        )
    tokens, cached, shortened, unfinished = map(sum, zip((0, 0, 0, 0), *model.counts, strict=True))
    return TaskResults(results, tokens, tokens - cached, shortened, unfinished)


def _load(names: Sequence[str], include: Path | None) -> dict[str, Any]:
    """Return lm-eval's tasks and groups of these names.

    Raises:
        ValueError: there is none of a name.
    """
    from lm_eval.tasks import TaskManager

    # Without lm-eval's own 10,000 tasks, to read which takes seconds, where they are not needed.
    folders = {"include_path": str(include)} if include else {}
    manager = TaskManager(**folders, include_defaults=include is None)
    if include and not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(**folders)
    for name in names:
        if not manager.match_tasks([name]):
            close = ", ".join(get_close_matches(name, manager.all_tasks))
            hint = f"close to it are {close}" if close else "see lm-eval ls tasks"
            raise ValueError(f"there is no task {name!r}; {hint}")
    loaded: dict[str, Any] = manager.load(list(names))
    return loaded


class _Answers:
    """The methods of lm-eval's `TemplateLM` that answer requests, beside those that it brings.

    `counts` has, for each request, its prompt tokens, how many of them came from the prefix cache,
    whether it lost its beginning, and whether its reply ended inside its thinking.
    """

    def __init__(self, llm: "LLM", answering: Answering, progress: Progress | None) -> None:
        super().__init__()  # lm-eval's
        self.counts: list[tuple[int, int, bool, bool]] = []
        self.max_length = llm.context
        self._llm = llm
        self._answering = answering
        self._progress = progress
        self._cancelled = Flag()

    @property
    def eot_token_id(self) -> int:
        """The token before a text without context; lm-eval's `hf` takes the same one."""
        if self._llm.prefix_id is None:
            raise Qwen3Error(
                "tokenizer_config.json names no eos_token, which stands before a text without "
                "context"
            )
        return self._llm.prefix_id

    @property
    def tokenizer_name(self) -> str:
        """The name of the chat template, for lm-eval's caches."""
        return self._llm.model.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation; without `add_generation_prompt` its last message is continued."""
        return self._llm.render(
            chat_history,
            self._answering.thinking,
            add_generation_prompt=add_generation_prompt,
            continue_last=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of a text; Qwen3's tokenizer adds none."""
        return self._llm.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log probability of each continuation, and whether it is the likeliest."""
        for _, _, continuation in requests:
            if len(continuation) > self.max_length:
                raise Qwen3Error(
                    f"a text of {len(continuation):,} tokens is to be scored at once, and the "
                    f"context window is {self.max_length:,}"
                )
        # The last token is only scored, not read.
        texts = [(context + rest)[-self.max_length - 1 :] for _, context, rest in requests]

        def score(index: int) -> tuple[float, bool]:
            ids, continuation = texts[index], requests[index][2]
            if not continuation:
                return 0.0, True
            found = self._llm.score(ids, len(ids) - len(continuation), self._cancelled)
            shortened = len(ids) < len(requests[index][1]) + len(continuation)
            self.counts.append((len(ids) - 1, found.cached_tokens, shortened, False))
            greedy = all(one.logprob == one.top[0][1] for one in found.logprobs)
            return sum(one.logprob for one in found.logprobs), greedy

        return self._answer(texts, score)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log probabilities of whole texts, cut into windows as lm-eval's `hf` does."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = list[tuple[None, list[int], list[int]]](), list[int]()
        for index, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(index)
        sums = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[index] += value
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the replies, without their thinking if prompts are rendered as conversations."""
        from lm_eval.models.utils import normalize_gen_kwargs

        seed = _SEED if self._answering.seed is None else self._answering.seed

        def generate(index: int) -> str:
            context, options = requests[index].args
            options = normalize_gen_kwargs(options, _MAX_GENERATED)
            # By the place, since repetitions of one request are to differ where they are sampled.
            return self._generate(self.tok_encode(context), options, seed + index)

        # Sorted as texts, and encoded only when it is their turn: all ids would take much memory.
        return self._answer([request.args[0] for request in requests], generate)

    def _generate(self, ids: list[int], options: dict[str, Any], seed: int) -> str:
        """Return a reply by the generation options of a task, normalised."""
        most, stop = options.pop("max_gen_toks"), [text for text in options.pop("until") if text]
        if (room := self.max_length - most) < 1:
            raise Qwen3Error(
                f"a reply of {most:,} tokens (max_gen_toks) leaves no room for a prompt in the "
                f"context window of {self.max_length:,}"
            )
        prepared = self._llm.prepare_text(
            ids[-room:],
            max_tokens=most,
            stop=stop or None,
            seed=seed,
            loop_guard=False,
            sampling=_sampling(options),
        )
        if self._answering.chat:
            thinking = self._llm.thinking
            tags = [token for token in ids if token in (thinking.open_id, thinking.close_id)]
            inside = tags[-1:] == [thinking.open_id]
            prepared = replace(prepared, thinking=thinking, inside=inside)
        events, text, thinks = SimpleQueue[Event | BaseException](), "", False
        self._llm.submit(prepared, events.put, self._cancelled)
        while not isinstance(event := events.get(), Finish):
            if isinstance(event, BaseException):
                raise event
            thinks = thinks or isinstance(event, Reasoning)
            text += event.text if isinstance(event, Text) else ""
        if event.reason == "cancelled":
            raise Qwen3Error("the evaluation was cancelled")
        usage, unfinished = event.usage, thinks and event.reason == "length" and not text
        counts = (usage.prompt_tokens, usage.cached_tokens, len(ids) > room, unfinished)
        self.counts.append(counts)
        return text

    def _answer(self, prompts: Sequence[Any], answer: Callable[[int], R]) -> list[R]:
        """Return `answer(index)` of each prompt, several at a time; prompts are ids or texts.

        The first one is alone, so that the others find what all have in common. Then neighbours in
        alphabetical order follow each other: so each finds what it shares with the one before.
        """
        order = sorted(range(len(prompts)), key=prompts.__getitem__)
        answers, done = dict[int, R](), count(1)

        def run(indices: Sequence[int]) -> None:
            for index in indices:
                answers[index] = answer(index)
                if self._progress:
                    self._progress(next(done), len(order))

        lane = max(1, -(-(len(order) - 1) // _LANES))
        with ThreadPoolExecutor(_LANES) as pool:
            try:
                run(order[:1])
                starts = range(1, len(order), lane)
                lanes = [pool.submit(run, order[start : start + lane]) for start in starts]
                for ended in as_completed(lanes):
                    ended.result()
            except BaseException:
                self._cancelled.set()  # or leaving the block would wait for the other lanes
                raise
        return [answers[index] for index in range(len(prompts))]


def _sampling(options: dict[str, Any]) -> SamplingParams:
    """Return the sampling parameters among the generation options of a task.

    Raises:
        Qwen3Error: there is an option that cannot be honoured.
    """
    if options.get("num_beams") == 1:  # a beam alone is no beam search
        del options["num_beams"]
    greedy = not options.pop("do_sample")
    for name in options.keys() - _SAMPLING:
        raise Qwen3Error(
            f"a task is to generate with {name}={options[name]!r}, which is not supported"
        )
    sampling = SamplingParams(**options)
    return replace(sampling, temperature=0.0) if greedy else sampling
