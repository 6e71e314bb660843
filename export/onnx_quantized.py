"""Quantized matrices as MatMulNBits, an operator that only ONNX Runtime has, reads them.

Values of B bits are raised by 2^(B-1) to be positive, and a row's are cut into blocks that have a scale each; of 4-bit
values two share a byte, the first in its lower half. Nothing is rounded: groups of a scheme are its blocks, and a row
with a single scale repeats it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from numprune.quantization import Quantized

# Of rows with one scale. Inputs are rounded in the same blocks: in larger ones, products are a quarter faster, but the
# errors of log-probabilities are a third larger (SmolLM2-135M).
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Blocked:
    """A matrix (out, D) in blocks of `size` values.

    Attributes:
        bits: of a value, 4 or 8.
        columns: D; the last block of a row is filled up with zeros.
        values: (out, blocks, size * bits / 8) uint8.
        scales: (out, blocks) float32.
    """

    bits: int
    size: int
    columns: int
    values: Tensor
    scales: Tensor

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of MatMulNBits."""
        return {"K": self.columns, "N": len(self.values), "bits": self.bits, "block_size": self.size}


def blocked(matrix: Quantized) -> Blocked:
    """Return a matrix whose values are integers as MatMulNBits reads it."""
    bits, columns = matrix.scheme.bits, matrix.values.shape[1]
    size = matrix.scheme.group_size or BLOCK_SIZE
    blocks = -(-columns // size)
    raised = pad(matrix.values.to(torch.int16), (0, blocks * size - columns)) + 2 ** (bits - 1)
    values = raised.to(torch.uint8).unflatten(1, (blocks, size))
    if bits == 4:
        values = values[..., 0::2] | values[..., 1::2] << 4
    scales = matrix.scales if matrix.scheme.group_size else matrix.scales.expand(-1, blocks)
    return Blocked(bits, size, columns, values, scales)
