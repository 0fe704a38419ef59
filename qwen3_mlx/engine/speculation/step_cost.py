"""The time of a forward pass by the number of its rows: from a table of chips, then measured."""

from collections.abc import Mapping

from qwen3_mlx.engine.moving_average import MovingAverage

# Time of a pass by its rows, relative to a pass over one row: 4-bit weights, by chip.
# M3 and M4 (M4 Pro, Qwen3-8B: github.com/ml-explore/mlx, issue 3839), M5 (issue 3791), M3 Ultra
# (issues 4265, 3764). The kernel of M1 and M2 reads the weights again for each row; from 6 rows on
# another kernel reads them once for all: there only long drafts can pay.
_M1_M2 = {1: 1.0, 2: 2.0, 6: 6.0, 16: 6.0, 32: 6.0}
_M3_ULTRA = {1: 1.0, 2: 1.7, 4: 2.3, 8: 6.1}
_M3_M4 = {1: 1.0, 2: 1.11, 3: 1.31, 4: 1.45, 6: 1.98, 8: 2.45}
_M5 = {1: 1.0, 3: 1.11, 5: 1.45, 6: 1.7, 8: 2.2}
_CPU = {1: 1.0, 2: 1.1, 4: 1.25, 8: 1.3}  # measured: float32, OpenBLAS on two cores
_M1_GENERATION, _M3_GENERATION, _M5_GENERATION = 13, 15, 17  # of MLX's architecture names

_SECONDS_DECAY = 0.8  # weight of the old value when a new measurement arrives
_MAX_AGE = 500  # steps after which a measurement that was not repeated is dropped


def chip_costs(architecture: str) -> Mapping[int, float]:
    """Return the relative times of passes by their rows, for MLX's name of the device."""
    digits = "".join(filter(str.isdigit, architecture.partition("_g")[2]))
    generation = int(digits) if digits else 0
    if generation < _M1_GENERATION:
        return _CPU
    if generation < _M3_GENERATION:
        return _M1_M2
    if generation >= _M5_GENERATION:
        return _M5
    return _M3_ULTRA if generation == _M3_GENERATION and architecture.endswith("d") else _M3_M4


class StepCostModel:
    """The time of steps by their rows: measured, or else by the table.

    A step is `synchronous` if it was built only after the step before it had been committed.
    """

    def __init__(self, table: Mapping[int, float]) -> None:
        self.table = table
        self._seconds: dict[tuple[bool, int], MovingAverage] = {}
        self._measured_at: dict[tuple[bool, int], int] = {}  # in steps
        self._num_steps = 0

    @property
    def measured(self) -> bool:
        """True if `of` returns seconds."""
        return bool(self._seconds)

    def observe(self, rows: int, seconds: float, *, synchronous: bool) -> None:
        """Record the time of a step."""
        self._num_steps += 1
        key = synchronous, rows
        if key in self._measured_at:  # the first of a kind also sets up what it needs
            average = self._seconds.setdefault(key, MovingAverage(_SECONDS_DECAY))
            # An outlier counts less: the machine had something else to do.
            average.add(min(seconds, 3 * average.value) if average.value else seconds)
        self._measured_at[key] = self._num_steps
        for old in [k for k in self._seconds if self._num_steps - self._measured_at[k] > _MAX_AGE]:
            del self._seconds[old]

    def of(self, rows: int, *, synchronous: bool) -> float:
        """Return the seconds of a step; before any measurement, the time relative to one row."""
        relative = self._relative(rows)
        if not self._seconds:
            return relative
        if (synchronous, rows) in self._seconds:
            return self._seconds[synchronous, rows].value
        candidates = [key for key in self._seconds if key[0] == synchronous] or list(self._seconds)
        nearest = min(candidates, key=lambda key: abs(key[1] - rows))
        return self._seconds[nearest].value * relative / self._relative(nearest[1])

    def _relative(self, rows: int) -> float:
        """Return the table's time of a pass, interpolated between its entries."""
        low = max(width for width in self.table if width <= rows)
        high = min((width for width in self.table if width >= rows), default=None)
        if high is None:
            return self.table[low] * rows / low
        share = (rows - low) / (high - low) if high > low else 0.0
        return self.table[low] + share * (self.table[high] - self.table[low])
