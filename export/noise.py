"""The rounding noise of half precision: errors against float32, measured in those of PyTorch in the same precision.

Nothing that computes in bfloat16 or float16 agrees with float32 to a fixed number of digits. How far PyTorch itself is
off, on the same weights and the same tokens, is the noise floor; a runtime may be off by `FACTOR` times as much.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

FACTOR = 4
CONTRAST = 5  # how often that must fit into the spread of the logits: a wrong export is off by about their spread


@dataclass(frozen=True)
class Noise:
    """Absolute errors: of log-probabilities in nats, or of an encoder's outputs."""

    mean: float
    p99: float

    def share_of(self, floor: "Noise") -> float:
        """The larger of the two ratios to `FACTOR` times `floor`: above 1 is refused."""
        return max(_ratio(self.mean, FACTOR * floor.mean), _ratio(self.p99, FACTOR * floor.p99))

    def worst(self, other: "Noise | None") -> "Noise":
        """The larger of each."""
        return Noise(max(self.mean, other.mean), max(self.p99, other.p99)) if other else self

    def __str__(self) -> str:
        return f"{self.mean:.2g} on average, {self.p99:.2g} at the 99th percentile"


def of_logits(expected: Tensor, found: Tensor) -> Noise:
    """Of log-probabilities, over all positions and the whole vocabulary: logits (positions, V) each."""
    return of_errors(found.float().log_softmax(-1) - expected.float().log_softmax(-1))


def of_errors(errors: Tensor) -> Noise:
    """Of signed errors, of any shape. An error that is NaN or infinite makes both infinite."""
    values = errors.abs().flatten().numpy()
    if not np.isfinite(values).all():
        return Noise(np.inf, np.inf)
    return Noise(float(values.mean(dtype=np.float64)), float(np.quantile(values, 0.99)))


def _ratio(error: float, limit: float) -> float:
    return error / limit if limit else (np.inf if error else 0.0)
