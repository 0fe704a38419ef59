"""The public function `tune`: trains an adapter for a checkpoint with lessons."""

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.load import load
from qwen3_mlx.arguments import Progress, plain
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.evaluate.plots import draw_losses
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import DEMO, folder_name
from qwen3_mlx.text.kind import CHAT
from qwen3_mlx.tuning.batches import Batches
from qwen3_mlx.tuning.events import SampleReply, StepDone, TuningEvent, TuningPlan, Validated
from qwen3_mlx.tuning.keep import answered, read_keep
from qwen3_mlx.tuning.lessons import Lesson, Line, encode, read_lines
from qwen3_mlx.tuning.memory import check_step_fits, count_trained
from qwen3_mlx.tuning.run_folder import PICTURE, RunFolder
from qwen3_mlx.tuning.settings import Settings, check_count
from qwen3_mlx.tuning.trainer import StepLoss, Trainer, check_finite

_log = logging.getLogger(__name__)
_STEPS = 200
_VALID_SHARE = 0.1  # of the lines
_MAX_VALID = 128  # lessons, or validations would take longer than the training
_VALIDATIONS = 10  # in a run
_PATIENCE = 4  # validations without a better one, after which a run stops
_SAVE_SECONDS = 60
_SAMPLE_TOKENS = 64
_PROGRESS = ("best", "best_step", "loss_before", "last_loss", "_stale", "_validated")

Report = Callable[[TuningEvent], None]


@dataclass(frozen=True, slots=True)
class Tuning:
    """The result of `tune`.

    Attributes:
        folder: the folder of the adapter.
        steps: the steps that were done.
        best_step: the step whose parameters are in the adapter.
        stopped_early: whether the validations were no better for so long that the run stopped.
        loss_before: the validation loss of the model as it was, in nats a token; None if there
            were too few lines for a validation.
        loss: the validation loss of the adapter; without a validation, the loss of the last step.
        kept_kl: what was forgotten: the mean KL divergence from the untrained model on the replies
            that were to be kept, in nats a token; None without `keep`.
        seconds: the time that this call took.
        peak_memory: the most bytes that MLX has held at once, the model included.
        usage: a command that uses the adapter.
    """

    folder: Path
    steps: int
    best_step: int
    stopped_early: bool
    loss_before: float | None
    loss: float
    kept_kl: float | None
    seconds: float
    peak_memory: int
    usage: str


def tune(  # noqa: PLR0913 - one keyword a choice
    source: str | Path | None = None,
    *,
    data: str | Path,
    out: str | Path = "adapter",
    type: str = "lora",
    rank: int = 8,
    scale: float = 2.0,
    layers: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch: int = 4,
    accumulate: int = 1,
    learning_rate: float | None = None,
    max_length: int = 2048,
    checkpointing: bool = False,
    valid: str | Path | None = None,
    keep: str | Path | None = None,
    keep_weight: float = 1.0,
    resume: bool = False,
    seed: int = 0,
    revision: str | None = None,
    bits: int | None = None,
    dtype: str | None = None,
    dequantize: bool | None = None,
    report: Report | None = None,
    download_progress: Progress | None = None,
) -> Tuning:
    """Fine-tune a checkpoint with lessons, and write an adapter in mlx-lm's format.

    The adapter with the lowest validation loss is kept. The training stops when four validations
    in a row, of ten in a run, are no better. It can be interrupted at any time, and resumed.

    Args:
        source: the checkpoint, as in `load`.
        data: the lessons, a file of JSON Lines. A line is a conversation, {"messages": [...]} and
            perhaps "tools"; {"prompt": ..., "completion": ...}; or {"text": ...}. Of a
            conversation each turn of the assistant's is learned, but those with "weight": 0.
        out: the folder to write; default "adapter".
        type: "lora" (default) trains low-rank matrices beside the weights; "dora" their magnitudes,
            too; "full" the weights of the layers themselves.
        rank: of the low-rank matrices; default 8.
        scale: what scales their product, alpha / rank; default 2.
        layers: train only this many of the last layers; default None, all.
        steps: batches to train with; default 200.
        epochs: how often to go through all lessons, instead of `steps`; default None.
        batch: lessons that are computed at once; default 4.
        accumulate: batches in a step, whose gradients are added up: in less memory, a step is that
            of a larger batch; default 1.
        learning_rate: of Adam; default None, which is 2e-4, and 1e-5 with the type "full".
        max_length: tokens of a lesson; longer ones are cut at their end. Default 2048.
        checkpointing: True computes activations twice, to hold fewer of them; default False.
        valid: a file of lessons to validate with; default None, a tenth of the lines of `data`.
        keep: a file of what shall not change: lessons, or as text a question a line. To a question
            the model replies before it is trained, with and without thinking. With each step the KL
            divergence from the untrained model on such replies is part of the loss, and it is
            measured at the end. Default None.
        keep_weight: the weight of that part; default 1.
        resume: True continues the training in `out`, if there is one; default False.
        seed: of the initial matrices, the order of the lessons and the choice of those to validate
            with; default 0.
        revision, bits, dtype, dequantize: how the checkpoint is loaded; see `load`. Quantized
            weights stay as they are beside low-rank matrices.
        report: called with each event of `qwen3_mlx.tuning.events`, the first of which is the
            `TuningPlan`; default None.
        download_progress: callable (done, total) bytes; default None.

    Returns:
        A `Tuning`: the losses, and how to use the adapter.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of its range.
        CheckpointError: the checkpoint cannot be found or read.
        Qwen3Error: a line is no lesson, the training does not fit the memory, or `out` has
            another training.
        KeyboardInterrupt: Ctrl-C; the state is saved for `resume`.
    """
    started = time.perf_counter()
    settings = Settings(
        type=type,
        rank=plain(rank),
        scale=plain(scale),
        layers=plain(layers),
        batch=plain(batch),
        accumulate=plain(accumulate),
        learning_rate=plain(learning_rate),
        max_length=plain(max_length),
        checkpointing=plain(checkpointing),
        keep_weight=plain(keep_weight),
        seed=plain(seed),
    )
    steps, epochs = _checked_length(plain(steps), plain(epochs))
    # What is wrong with the data is found before gigabytes are downloaded.
    lines = read_lines(Path(data))
    valid_lines = None if valid is None else read_lines(Path(valid))
    keep_lines = None if keep is None else read_keep(Path(keep))
    name = DEMO if source is None else str(source)
    files = {"data": lines, "valid": valid_lines, "keep": keep_lines}
    digests = {key: _digest(lines) for key, lines in files.items()}
    held_as = {"revision": revision, "bits": bits, "dtype": dtype, "dequantize": dequantize}
    identity = {"model": name, **held_as, **settings.as_dict(), **digests}
    with (
        RunFolder(Path(out), identity, resume=plain(resume)) as folder,
        load(
            source,
            revision=revision,
            bits=bits,
            dtype=dtype,
            dequantize=dequantize,
            download_progress=download_progress,
        ) as llm,
    ):
        mx.reset_peak_memory()
        if llm.kind != CHAT:
            raise Qwen3Error(f"{name} is an {llm.kind} model; chat and base models can be tuned")
        window = llm.config.context_window
        settings = replace(settings, max_length=min(settings.max_length, window))
        lessons, checked, cut, left_out = _split(llm, lines, valid_lines, settings)
        order = Batches(lessons, settings.step_lessons, settings.seed)
        steps = steps or max(1, round((epochs or 0) * len(order)))
        kept = _kept(llm, keep_lines, settings)
        report = report or (lambda _: None)
        memory = check_step_fits(
            llm.config,
            settings,
            [*lessons, *checked],
            kept,
            backend.compute_dtype(dtype).size,
            backend.available_memory(),
        )
        report(
            TuningPlan(
                lessons=len(lessons),
                valid=len(checked),
                keep=len(kept),
                tokens=sum(len(lesson.ids) for lesson in lessons),
                learned=sum(lesson.learned for lesson in lessons),
                longest=max(len(lesson.ids) for lesson in lessons),
                cut=cut,
                left_out=left_out,
                steps=steps,
                epochs=steps / len(order),
                trained=count_trained(llm.config, settings),
                memory=memory.total,
            )
        )
        trainer = llm.compute(lambda model: Trainer(model, settings, lessons, kept))
        shown = min(checked or lessons, key=lambda lesson: len(lesson.ids))
        run = _Run(llm, trainer, folder, checked, shown, steps, name, report)
        run.train()
        run.draw()
        if run.best is not None and run.loss_before is not None and run.best >= run.loss_before:
            _log.warning(
                "the adapter is no better on the validation lessons than the model as it was: take "
                "a smaller learning_rate, or more lessons"
            )
        measured = Random(settings.seed).sample(kept, min(len(kept), _MAX_VALID))
        return Tuning(
            folder=folder.folder,
            steps=trainer.step,
            best_step=run.best_step or trainer.step,
            stopped_early=trainer.step < steps,
            loss_before=run.loss_before,
            loss=run.last_loss if run.best is None else run.best,
            kept_kl=llm.compute(lambda _: trainer.mean_divergence(measured)) if kept else None,
            seconds=time.perf_counter() - started,
            peak_memory=mx.get_peak_memory(),
            usage=shlex.join(
                ["qwen3", "--model", name, *(["--revision", revision] if revision else [])]
                + ["--adapter", folder_name(folder.folder)]
            ),
        )


class _Run:
    """A training run: its steps, validations and files.

    Attributes:
        best: the lowest validation loss so far, after `best_step`; None before the first.
        loss_before: the validation loss before the first step.
        last_loss: the loss of the last step.
    """

    def __init__(
        self,
        llm: LLM,
        trainer: Trainer,
        folder: RunFolder,
        valid: Sequence[Lesson],
        shown: Lesson,
        steps: int,
        name: str,
        report: Report,
    ) -> None:
        self.report = report
        self.best: float | None = None
        self.best_step = 0
        self.loss_before: float | None = None
        self.last_loss = 0.0
        self._stale = 0  # validations since the best one
        self._validated = -1  # the step of the last one
        self._llm, self._trainer, self._folder = llm, trainer, folder
        self._valid, self._shown, self._steps = valid, shown, steps
        self._config = trainer.adapter_config(name)

    def train(self) -> None:
        """Train, from where the folder's state stands to the last step or an early stop."""
        trainer, compute = self._trainer, self._llm.compute
        if self._folder.progress:
            self._restore()
        elif self._folder.resumes:
            _log.warning("%s has no state to resume: beginning anew", self._folder.folder)
        every, saved = max(1, self._steps // _VALIDATIONS), time.monotonic()
        try:
            while True:
                due = trainer.step % every == 0 or trainer.step == self._steps
                if due and self._validated != trainer.step:
                    self._validate()
                    self._save()
                    saved = time.monotonic()
                    self._sample()
                if trainer.step >= self._steps or self._stale >= _PATIENCE:
                    break
                self._advance()
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        except BaseException:
            self._save()  # after the step that runs: jobs are queued
            raise
        if self.best_step not in (0, trainer.step):
            compute(lambda _: trainer.load(self._folder.adapter()))
            self._sample()

    def draw(self) -> None:
        """Draw the losses, if matplotlib is installed."""
        if find_spec("matplotlib") is None:
            _log.info("no %s without matplotlib", PICTURE)
            return
        entries = self._folder.log
        training = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
        valid = {entry["step"]: entry["valid_loss"] for entry in entries if "valid_loss" in entry}
        draw_losses(self._folder.folder / PICTURE, training, valid, self.best_step)

    def _advance(self) -> None:
        trainer, started = self._trainer, time.perf_counter()

        def advance(_: Qwen3) -> StepLoss:  # one job: Ctrl-C finds it done or not begun
            done = trainer.advance()
            self.last_loss = done.loss
            kept = {} if done.kept_kl is None else {"kept_kl": done.kept_kl}
            entry = {"step": trainer.step, "loss": done.loss, "tokens": done.tokens}
            self._folder.log.append(entry | kept)
            return done

        done = self._llm.compute(advance)
        seconds = time.perf_counter() - started
        self.report(
            StepDone(trainer.step, self._steps, done.loss, done.kept_kl, done.tokens, seconds)
        )

    def _restore(self) -> None:
        progress, trainer = self._folder.progress, self._trainer
        for name in _PROGRESS:
            setattr(self, name, progress[name])
        self._llm.compute(lambda _: trainer.restore(self._folder.arrays(), progress["step"]))

    def _validate(self) -> None:
        event = self._llm.compute(self._validated_now)
        if event:
            self.report(event)

    def _validated_now(self, _: Qwen3) -> Validated | None:
        """Compute the validation loss; save the parameters if it is the lowest, or if none is."""
        trainer, event = self._trainer, None
        best = trainer.step > 0
        loss = trainer.mean_loss(self._valid or [self._shown])
        check_finite(f"the validation after step {trainer.step}", loss)
        if self._valid:
            if trainer.step == 0:
                self.loss_before = loss
            elif best := self.best is None or loss < self.best:
                self.best, self.best_step, self._stale = loss, trainer.step, 0
            else:
                self._stale += 1
            self._folder.log.append({"step": trainer.step, "valid_loss": loss})
            event = Validated(trainer.step, loss, best)
        if best:
            self._folder.save_adapter(trainer.parameters(), self._config)
        self._validated = trainer.step
        return event

    def _save(self) -> None:
        progress = {name: getattr(self, name) for name in _PROGRESS}
        progress["step"] = self._trainer.step
        self._llm.compute(lambda _: self._folder.save(self._trainer.state(), progress))

    def _sample(self) -> None:
        """Report a reply, so that the effect can be seen."""
        llm, lesson = self._llm, self._shown
        words = llm.processor
        ends, prompt = words.end_ids | words.turn_end_ids, lesson.ids[: lesson.start]
        ids = llm.compute(lambda _: self._trainer.reply(prompt, ends, _SAMPLE_TOKENS))
        decode = llm.tokenizer.decode
        expected = [token for token in lesson.ids[lesson.start :] if token not in ends]
        self.report(
            SampleReply(self._trainer.step, decode(list(prompt)), decode(ids), decode(expected))
        )


def _checked_length(steps: Any, epochs: Any) -> tuple[int | None, float | None]:
    """Return the steps or the epochs of a run; one of them is None."""
    if steps is not None and epochs is not None:
        raise ValueError("steps and epochs exclude each other")
    if epochs is not None and (not isinstance(epochs, int | float) or not 0 < epochs < 1e9):
        raise ValueError(f"epochs must be a number above 0, not {epochs!r}")
    if epochs is None:
        steps = _STEPS if steps is None else steps
        check_count("steps", steps, 1)
    return steps, epochs


def _split(
    llm: LLM, lines: Sequence[Line], valid: Sequence[Line] | None, settings: Settings
) -> tuple[list[Lesson], list[Lesson], int, int]:
    """Return the lessons to learn from, those to validate with, and how many are cut, left out."""
    found = encode(llm.processor, lines, settings.max_length)
    groups, random = list(found.lessons), Random(settings.seed)
    if valid is not None:
        checked = list(encode(llm.processor, valid, settings.max_length).lessons)
    elif len(groups) == 1:
        checked = []
        _log.warning("one line is too few for a validation: the last step is kept, not the best")
    else:
        random.shuffle(groups)  # of whole lines: no conversation stands on both sides
        count = max(1, round(_VALID_SHARE * len(groups)))
        checked, groups = groups[:count], groups[count:]
    validating = list(chain.from_iterable(checked))
    if len(validating) > _MAX_VALID:
        validating = random.sample(validating, _MAX_VALID)
    return list(chain.from_iterable(groups)), validating, found.cut, found.left_out


def _kept(llm: LLM, lines: Sequence[Line] | None, settings: Settings) -> list[Lesson]:
    """Return the lessons whose replies are to be kept, the missing ones generated."""
    if lines is None:
        return []
    found = encode(llm.processor, answered(llm, lines), settings.max_length)
    llm.forget()  # the weights that these prompts were read with are about to change
    return list(chain.from_iterable(found.lessons))


def _digest(lines: Sequence[Line] | None) -> str | None:
    """Return a digest of what lines say; the file may be a pipe, which is read once."""
    if lines is None:
        return None
    said = repr([(line.messages, line.tools, line.text) for line in lines])
    return blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
