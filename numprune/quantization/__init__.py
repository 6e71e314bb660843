"""Quantization of a model's Linear layers: schemes, rounding, GPTQ, and the pass that applies them front to back.

This package handles tensors: compressed_tensors.py defines the storage format, and `export` writes and reads the files.
walk.py is imported separately, because it needs SciPy, which vLLM's environment lacks. Rounding is imported on first
use, because checkpoints are inspected without torch. Notation as in the core, and

    Q   grid values (out, D): integers, or FP8 numbers        s   scales (out, D / group size)
"""

from typing import TYPE_CHECKING, Any

from numprune.byte_budget import SchemeName
from numprune.quantization.linears import (
    bytes_saved,
    check_quantizable,
    quantized_tensors,
    schemes_by_block,
    schemes_by_tensor,
    ungrouped,
)
from numprune.quantization.schemes import GROUP_SIZES, SCHEMES, BlockSchemes, Method, Scheme, of_block

if TYPE_CHECKING:
    from numprune.quantization.rounding import Quantized, round_inputs_of, round_to_nearest

__all__ = [
    "GROUP_SIZES",
    "SCHEMES",
    "BlockSchemes",
    "Method",
    "Quantized",
    "Scheme",
    "SchemeName",
    "bytes_saved",
    "check_quantizable",
    "of_block",
    "quantized_tensors",
    "round_inputs_of",
    "round_to_nearest",
    "schemes_by_block",
    "schemes_by_tensor",
    "ungrouped",
]


def __getattr__(name: str) -> Any:
    if name in ("Quantized", "round_inputs_of", "round_to_nearest"):
        from numprune.quantization import rounding

        return getattr(rounding, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
