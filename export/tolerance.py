"""How far an export may be from its checkpoint: by float32 rounding errors, or by noise in lower precision."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from numprune.export import noise
from numprune.export.noise import Noise

# Measured on a CPU, in ONNX Runtime and PyTorch: correct exports differ by up to 3 times the reference's float32 error.
# That is 1e-5 for the embedded model, 6e-5 for SmolLM2-135M, and 1e-3 (on text 2e-4) with 20 or 50 % of it removed.
# The smallest difference of a wrong export was 3e-3: an epsilon of 1e-5 instead of 1e-6.
FLOOR = 1e-3  # of a logit, and of a log-probability in nats
FACTOR = 8


class Found(Protocol):
    """Errors found on one text."""

    @property
    def error(self) -> float:
        """The largest."""

    @property
    def noise(self) -> Noise | None:
        """Only for a candidate that is judged by noise."""


class Limit(Protocol):
    """The limit on one text."""

    def share(self, found: Found) -> float:
        """Return the errors as a share of the limit; above 1, or NaN, is refused."""

    def describe(self, found: Found) -> dict[str, Any]:
        """Return plain JSON: the tolerance and its criterion."""

    @property
    def reason(self) -> str:
        """The limit in words."""


@dataclass(frozen=True)
class Allowed:
    """For float32: a limit on the largest error."""

    floor: float
    float32_error: float | None  # of the reference; None: not measured, because the text is within the floor

    @property
    def tolerance(self) -> float:
        return max(self.floor, FACTOR * (self.float32_error or 0.0))

    @property
    def yardstick(self) -> str:
        return "floor" if self.tolerance == self.floor else "float32 error"

    def share(self, found: Found) -> float:
        return found.error / self.tolerance

    def describe(self, found: Found) -> dict[str, Any]:
        return {"float32_error": self.float32_error, "tolerance": self.tolerance, "yardstick": self.yardstick}

    @property
    def reason(self) -> str:
        assert self.float32_error is not None  # measured for every text that exceeds the floor
        return (
            f"the tolerance is {self.tolerance:.3g} ({FACTOR} times PyTorch's own float32 error there, "
            f"{self.float32_error:.2g}, and at least {self.floor:g})"
        )


@dataclass(frozen=True)
class AllowedNoise:
    """For half precision or rounded activations: limits on mean and 99th percentile, relative to PyTorch in `dtype`."""

    dtype: str
    floor: Noise

    def share(self, found: Found) -> float:
        assert found.noise is not None
        return found.noise.share_of(self.floor)

    def describe(self, found: Found) -> dict[str, Any]:
        assert found.noise is not None
        return {
            "noise": asdict(found.noise),
            "noise_floor": asdict(self.floor),
            "tolerance": noise.FACTOR * self.floor.p99,
            "yardstick": f"{self.dtype} noise",
        }

    @property
    def reason(self) -> str:
        return f"the limit is {noise.FACTOR} times the error of PyTorch in {self.dtype}, which is {self.floor}"
