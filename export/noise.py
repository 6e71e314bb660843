"""The rounding noise of half precision: errors against float32, relative to PyTorch's errors in the same precision.

No computation in bfloat16 or float16 agrees with float32 to a fixed number of digits. PyTorch's own error, on the same
weights and tokens, is the noise floor; a runtime may err by `FACTOR` times as much.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

FACTOR = 4
CONTRAST = 5  # spread of the logits / allowed error, at least: a wrong export errs by about the spread


@dataclass(frozen=True)
class Noise:
    """Absolute errors, of log-probabilities in nats or of an encoder's outputs."""

    mean: float
    p99: float

    def share_of(self, floor: "Noise") -> float:
        """Return the larger of the two ratios to `FACTOR` times `floor`; above 1 is refused."""
        return max(_ratio(self.mean, FACTOR * floor.mean), _ratio(self.p99, FACTOR * floor.p99))

    def worst(self, other: "Noise | None") -> "Noise":
        """Return the larger value of each."""
        return Noise(max(self.mean, other.mean), max(self.p99, other.p99)) if other else self

    def __str__(self) -> str:
        return f"{self.mean:.2g} on average, {self.p99:.2g} at the 99th percentile"


def of_logits(expected: Tensor, found: Tensor) -> Noise:
    """Return the noise of log-probabilities over all positions and the whole vocabulary; logits are (positions, V)."""
    return of_errors(found.float().log_softmax(-1) - expected.float().log_softmax(-1))


def of_errors(errors: Tensor) -> Noise:
    """Return the noise of signed errors of any shape. A NaN or infinite error makes both values infinite."""
    values = errors.abs().flatten().numpy()
    if not np.isfinite(values).all():
        return Noise(np.inf, np.inf)
    return Noise(float(values.mean(dtype=np.float64)), float(np.quantile(values, 0.99)))


def _ratio(error: float, limit: float) -> float:
    return error / limit if limit else (np.inf if error else 0.0)
