"""An average in which old measurements fade."""


class MovingAverage:
    """Exponential moving average of measurements; a `value` of 0.0 means that there is none."""

    def __init__(self, decay: float, value: float = 0.0) -> None:
        """Begin with an assumed `value`; `decay` is its weight when a measurement arrives."""
        self.value = value
        self._decay = decay

    def add(self, measured: float) -> None:
        """Record a measurement."""
        if self.value:
            measured = self._decay * self.value + (1 - self._decay) * measured
        self.value = measured
