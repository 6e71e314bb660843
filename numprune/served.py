"""How a model is served whose latency counts. No tensor library is needed."""

from dataclasses import dataclass
from typing import Literal

from numprune.byte_budget import MIXED, SchemeName
from numprune.errors import InputError
from numprune.quantization.schemes import Scheme, in_groups
from numprune.target import Target


@dataclass(frozen=True)
class Served:
    """How a model is served whose latency counts.

    Attributes:
        scheme: of its projections; None: they are not quantized.
        lm_head_bits: of the output matrix of a quantized model in ONNX Runtime.
        dtype: in which it is computed, as for numprune.export.precision.choose.
        tensor_parallel: devices that share each layer.
    """

    scheme: Scheme | None = None
    lm_head_bits: Literal[4, 8] = 8
    dtype: str = "auto"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.scheme is not None:
            raise InputError(f"dtype is {self.dtype!r}: quantized weights have their own format; omit it")
        if self.lm_head_bits != 8 and self.scheme is None:
            raise InputError(f"lm_head_bits is {self.lm_head_bits}, which needs a scheme; choose one, or leave it out")

    @property
    def quantization(self) -> str:
        """The scheme in words, or "none"."""
        head = ", output matrix in 4 bits" if self.lm_head_bits == 4 else ""
        return f"{self.scheme}{head}" if self.scheme else "none"

    def __str__(self) -> str:
        """What differs from the model as it is stored, on one device; empty if nothing does."""
        form = self.quantization if self.scheme else self.dtype.removeprefix("auto")
        devices = f"on {self.tensor_parallel} devices" if self.tensor_parallel > 1 else ""
        return ", ".join(part for part in (form, devices) if part)

    def bytes_per_weight(self, unquantized: int) -> float:
        """Return the bytes of a projection's weight without its scale; `unquantized`: of other weights."""
        return self.scheme.bits / 8 if self.scheme else unquantized


AS_STORED = Served()


def served_as(scheme: SchemeName | str, target: Target, lm_head_bits: Literal[4, 8] = 8, dtype: str = "auto") -> Served:
    """Return how a model for a target is served.

    Args:
        scheme: a name of a scheme, or "none".

    Raises:
        InputError: the scheme is "mixed", or does not support the target's groups, or goes with no `dtype`.
    """
    if scheme == MIXED:
        raise InputError("scheme mixed: a table of latencies is of blocks in one scheme; choose one for all")
    form = None if scheme == "none" else in_groups(scheme, target.quantization_group)
    return Served(form, lm_head_bits, dtype, target.tensor_parallel)
