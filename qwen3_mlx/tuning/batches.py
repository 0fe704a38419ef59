"""Batches of lessons: by seed and step alone, so that a run that is resumed sees the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import mlx.core as mx

from qwen3_mlx.tuning.lessons import Lesson


class Batches:
    """Lessons in batches of about equal length, in another order each epoch."""

    def __init__(self, lessons: Sequence[Lesson], size: int, seed: int) -> None:
        self._lessons, self._size, self._seed = list(lessons), size, seed
        self._epoch, self._order = -1, list[list[Lesson]]()

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self._lessons) // self._size)

    def at(self, step: int) -> list[Lesson]:
        """Return the lessons of a step, counted from 0."""
        epoch, place = divmod(step, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[place]

    def _shuffled(self, epoch: int) -> list[list[Lesson]]:
        random = Random(f"{self._seed}/{epoch}")
        lessons = list(self._lessons)
        random.shuffle(lessons)  # lessons of one length meet others each time: the sort is stable
        batches = in_batches(lessons, self._size)
        random.shuffle(batches)
        return batches


def in_batches(lessons: Sequence[Lesson], size: int) -> list[list[Lesson]]:
    """Return lessons in batches of up to `size`, of about equal length."""
    ordered = sorted(lessons, key=lambda lesson: len(lesson.ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@dataclass(frozen=True, slots=True)
class Batch:
    """B lessons as arrays, padded on the right to L + 1 tokens; R tokens are learned.

    Attributes:
        ids: the tokens [B, L + 1], int32; padding is 0, and no learned token sees it.
        rows: which of the B·L hidden states the learned tokens are predicted from, [R].
        targets: the learned tokens [R].
    """

    ids: mx.array
    rows: mx.array
    targets: mx.array

    @classmethod
    def of(cls, lessons: Sequence[Lesson]) -> "Batch":
        """Create the arrays, on the thread that will compute with them."""
        length = max(len(lesson.ids) for lesson in lessons)
        padded = [[*lesson.ids, *[0] * (length - len(lesson.ids))] for lesson in lessons]
        rows, targets = list[int](), list[int]()
        for place, lesson in enumerate(lessons):
            first = place * (length - 1) - 1
            rows += range(first + lesson.start, first + len(lesson.ids))
            targets += lesson.ids[lesson.start :]
        return cls(*(mx.array(numbers, dtype=mx.int32) for numbers in (padded, rows, targets)))
