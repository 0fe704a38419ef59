"""What a forward pass takes by the number of its rows: from a table of chips, then as measured."""

from collections.abc import Mapping

# Seconds of a pass over so many rows, where a pass over one row takes 1: 4-bit weights, by chip.
# M3 and M4 (M4 Pro, Qwen3-8B: github.com/ml-explore/mlx, issue 3839), M5 (issue 3791), M3 Ultra
# (issues 4265, 3764). The kernel of M1 and M2 reads the weights anew for each row until, from 6
# rows on, another takes all at once: there only long proposals can pay.
_OLD = {1: 1.0, 2: 2.0, 6: 6.0, 16: 6.0, 32: 6.0}
_M3_ULTRA = {1: 1.0, 2: 1.7, 4: 2.3, 8: 6.1}
_M3_M4 = {1: 1.0, 2: 1.11, 3: 1.31, 4: 1.45, 6: 1.98, 8: 2.45}
_M5 = {1: 1.0, 3: 1.11, 5: 1.45, 6: 1.7, 8: 2.2}
_CPU = {1: 1.0, 2: 1.1, 4: 1.25, 8: 1.3}  # measured: float32, OpenBLAS on two cores
_FIRST_OF_APPLE, _M3, _M5_GENERATION = 13, 15, 17

_MEMORY = 0.8  # how much a new measurement leaves of the old
_STALE = 500  # steps after which what was not measured again is thought anew of


def chip_costs(architecture: str) -> Mapping[int, float]:
    """Give the relative costs of passes by their rows, for what MLX calls the device."""
    digits = "".join(filter(str.isdigit, architecture.partition("_g")[2]))
    generation = int(digits) if digits else 0
    if generation < _FIRST_OF_APPLE:
        return _CPU
    if generation < _M3:
        return _OLD
    if generation >= _M5_GENERATION:
        return _M5
    return _M3_ULTRA if generation == _M3 and architecture.endswith("d") else _M3_M4


class StepCostModel:
    """What steps of so many rows take: measured, and where not yet, as the table has it.

    A step that `synchronous` was built only when the one before it had been told.
    """

    def __init__(self, table: Mapping[int, float]) -> None:
        self.table = table
        self._seconds: dict[tuple[bool, int], float] = {}
        self._seen: dict[tuple[bool, int], int] = {}  # by number of the step: when it was measured
        self._steps = 0

    @property
    def measured(self) -> bool:
        """Whether `of` gives seconds."""
        return bool(self._seconds)

    def observe(self, rows: int, seconds: float, *, synchronous: bool) -> None:
        """Take note of a step."""
        self._steps += 1
        kind = synchronous, rows
        before = self._seconds.get(kind)
        if before is not None:
            seconds = min(seconds, 3 * before)  # the machine had something else to do
            seconds = _MEMORY * before + (1 - _MEMORY) * seconds
        if kind in self._seen:  # the first also sets up what such a step needs
            self._seconds[kind] = seconds
        self._seen[kind] = self._steps
        for other in [one for one in self._seconds if self._steps - self._seen[one] > _STALE]:
            del self._seconds[other]

    def of(self, rows: int, *, synchronous: bool) -> float:
        """Give the seconds of a step, or, where none was measured, in passes of one row."""
        expected = self._expected(rows)
        if not self._seconds:
            return expected
        if (synchronous, rows) in self._seconds:
            return self._seconds[synchronous, rows]
        alike = [one for one in self._seconds if one[0] == synchronous] or list(self._seconds)
        nearest = min(alike, key=lambda one: abs(one[1] - rows))
        return self._seconds[nearest] * expected / self._expected(nearest[1])

    def _expected(self, rows: int) -> float:
        low = max(known for known in self.table if known <= rows)
        high = min((known for known in self.table if known >= rows), default=None)
        if high is None:
            return self.table[low] * rows / low
        share = (rows - low) / (high - low) if high > low else 0.0
        return self.table[low] + share * (self.table[high] - self.table[low])
