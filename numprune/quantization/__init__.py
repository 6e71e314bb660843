"""Quantization of a model's Linear layers: schemes, rounding, GPTQ, and the pass that applies them front to back.

This package handles tensors: compressed_tensors.py defines the storage format, and `export` writes and reads the files.
walk.py is imported separately, because it needs SciPy, which vLLM's environment lacks. Notation as in the core, and

    Q   grid values (out, D): integers, or FP8 numbers        s   scales (out, D / group size)
"""

from numprune.byte_budget import SchemeName
from numprune.quantization.linears import (
    bytes_saved,
    check_quantizable,
    quantized_tensors,
    schemes_by_block,
    schemes_by_tensor,
    ungrouped,
)
from numprune.quantization.rounding import Quantized, round_inputs_of, round_to_nearest
from numprune.quantization.schemes import GROUP_SIZES, SCHEMES, BlockSchemes, Method, Scheme, of_block

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
