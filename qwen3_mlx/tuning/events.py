"""What a training run reports while it goes on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """A run before its first step.

    Attributes:
        lessons: the lessons that are learned from.
        valid: the lessons that validations are computed on.
        keep: the lessons whose replies shall not change.
        tokens: the tokens of all lessons to learn from.
        learned: those of them that are learned; the others are context.
        longest: the tokens of the longest lesson.
        cut: lessons that were cut at their end.
        left_out: lessons of which nothing to learn would have remained.
        steps: the steps of the run.
        epochs: how often that is through all lessons.
        trained: the number of trained parameters.
        memory: the bytes that a step takes beside the model, estimated.
    """

    lessons: int
    valid: int
    keep: int
    tokens: int
    learned: int
    longest: int
    cut: int
    left_out: int
    steps: int
    epochs: float
    trained: int
    memory: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step: its loss in nats a token, and the KL divergence on what is to be kept, if any."""

    step: int
    steps: int
    loss: float
    kept_kl: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Validated:
    """A validation after a step; step 0 is the model before it is trained."""

    step: int
    loss: float
    best: bool


@dataclass(frozen=True, slots=True)
class SampleReply:
    """The likeliest reply to the prompt of a lesson, to validate with if there are any.

    `step` is how many steps were done before.
    """

    step: int
    prompt: str
    reply: str
    expected: str


TuningEvent = TuningPlan | StepDone | Validated | SampleReply
