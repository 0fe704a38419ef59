"""An average in which old measurements fade."""


class MovingAverage:
    """Exponential moving average of measurements; `value` is 0.0 before the first."""

    def __init__(self, decay: float) -> None:
        """Begin with no measurement; `decay` is the weight of the old value when one arrives."""
        self.value = 0.0
        self._decay = decay

    def add(self, measured: float) -> None:
        """Record a measurement."""
        if self.value:
            measured = self._decay * self.value + (1 - self._decay) * measured
        self.value = measured
