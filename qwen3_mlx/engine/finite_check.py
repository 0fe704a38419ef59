"""The check for NaN and infinity in logits: a damaged network cannot choose a token.

The first logits of each request are checked in the step that computes them; later ones only where
the reply looks like that of a broken network, or its constraint has failed.
"""

import mlx.core as mx

from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.qwen3 import Qwen3


class FiniteCheck:
    """Checks the logits [N, V] of a network."""

    def __init__(self, model: Qwen3, vocabulary: int) -> None:
        """Create the check; logits from `vocabulary` on belong to no token."""
        self._model = model
        self._vocabulary = vocabulary

    def finite_rows(self, logits: mx.array) -> mx.array:
        """Compute which rows [N] of logits [N, V] are finite, unevaluated."""
        return mx.isfinite(logits[:, : self._vocabulary]).all(axis=-1)

    def check(self, finite: mx.array, row: int) -> None:
        """Raise a CheckpointError if `row` is not `finite` [N]."""
        # `tolist` reads what is evaluated; indexing the array would be a computation of its own,
        # which waits for the step in flight.
        if not finite.tolist()[row]:  # type: ignore[index]
            raise self.error()

    def cause_of(self, error: BaseException, logits: mx.array, row: int) -> BaseException:
        """Return the error to report: where the logits are NaN, a grammar fails as well."""
        if isinstance(error, ValueError):
            try:
                self.check(self.finite_rows(logits), row)
            except CheckpointError as broken:
                return broken
            except Exception:  # noqa: BLE001 - the first error is the one to report
                return error
        return error

    def error(self) -> CheckpointError:
        """Create the error of a network whose logits are not finite."""
        dtype = self._model.model.norm.weight.dtype
        wider = "" if dtype == mx.float32 else ', or load it with --dtype float32 (dtype="float32")'
        return CheckpointError(
            f"the logits of {self._model.source} have NaN or infinity among them, so it cannot "
            "choose a token: its weights are damaged, or computing exceeds the range of "
            f"{str(dtype).removeprefix('mlx.core.')}; download or convert it again{wider}"
        )
