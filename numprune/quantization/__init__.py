"""Quantization of a model's Linear layers: schemes, rounding, GPTQ, and the walk that applies them front to back.

Only tensors: export/compressed_tensors.py writes the result to the disk and reads it again. Notation as in the core,
and

    Q   grid values (out, D): integers, or FP8 numbers        s   scales (out, D / group size)
"""

from numprune.quantization.linears import check_quantizable, quantized_tensors
from numprune.quantization.rounding import Quantized, round_inputs_of, round_to_nearest
from numprune.quantization.schemes import GROUP_SIZES, SCHEMES, Method, Scheme, SchemeName
from numprune.quantization.walk import Fit, check_target, quantize_layers

__all__ = [
    "GROUP_SIZES",
    "SCHEMES",
    "Fit",
    "Method",
    "Quantized",
    "Scheme",
    "SchemeName",
    "check_quantizable",
    "check_target",
    "quantize_layers",
    "quantized_tensors",
    "round_inputs_of",
    "round_to_nearest",
]
