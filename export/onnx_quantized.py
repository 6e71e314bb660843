"""Quantized matrices in the layout of MatMulNBits, an operator of ONNX Runtime.

2^(B-1) is added to B-bit values to make them unsigned. A row is divided into blocks with one scale each; two 4-bit
values share a byte, the first in its lower half. Nothing is rounded: the groups of a scheme become blocks, and a row's
single scale is repeated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from numprune.quantization import Quantized

# For rows with one scale. Inputs are rounded in the same blocks: with larger blocks, products are a quarter faster, but
# the errors of log-probabilities are a third larger (SmolLM2-135M).
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Blocked:
    """A matrix (out, D) in blocks of `size` values.

    Attributes:
        bits: of a value, 4 or 8.
        columns: D; the last block of a row is padded with zeros.
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
        """The attributes of MatMulNBits."""
        return {"K": self.columns, "N": len(self.values), "bits": self.bits, "block_size": self.size}


def blocked(matrix: Quantized, size: int = BLOCK_SIZE) -> Blocked:
    """Return a matrix of integer values in the layout of MatMulNBits; `size`: of blocks, for rows with one scale."""
    bits, columns = matrix.scheme.bits, matrix.values.shape[1]
    size = matrix.scheme.group_size or size
    blocks = -(-columns // size)
    raised = pad(matrix.values.to(torch.int16), (0, blocks * size - columns)) + 2 ** (bits - 1)
    values = raised.to(torch.uint8).unflatten(1, (blocks, size))
    if bits == 4:
        values = values[..., 0::2] | values[..., 1::2] << 4
    scales = matrix.scales if matrix.scheme.group_size else matrix.scales.expand(-1, blocks)
    return Blocked(bits, size, columns, values, scales)
