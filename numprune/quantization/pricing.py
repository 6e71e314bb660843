"""The cost of rounding a block in nats per token, comparable with that of removals (curves.py).

An error dy at a block's output costs 1/2 tr(S E[dy dy^T]), with S the sensitivity of the loss to it (sensitivity.py).
It is measured: each block is quantized by GPTQ on its inputs in the dense model, with inputs rounded if the scheme does
so, and compared with the unquantized block.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from numprune.calibration import Walker
from numprune.progress import progress
from numprune.quantization.allocation import Rounding
from numprune.quantization.blocks import BlockFit
from numprune.quantization.schemes import Scheme


@torch.no_grad()
def rounding_prices(walker: Walker, rows: Tensor, output: Mapping[str, Tensor], schemes: Sequence[Scheme]) -> Rounding:
    """Return the cost of each block of the dense model in each scheme.

    Args:
        walker: over the dense model, computing in float32.
        rows: (N, S) int64 calibration tokens.
        output: S of every block.
        schemes: accepted by `check_quantizable`.
    """
    layers, share = walker.layers, walker.share(len(rows))
    stream = walker.embed(rows[share], share.start)
    aims = layers.allocate(*stream.hidden.shape)
    fit = BlockFit(walker, stream, aims, torch.float32)
    blocks = [block.name for block in layers.anatomy.blocks]
    prices = {name: torch.zeros(len(schemes), dtype=torch.float64) for name in blocks}
    for index in progress(range(layers.anatomy.layers), "price bits", "layer"):
        with layers.layer(index) as layer:
            for block in (block for block in layers.anatomy.of_layer(index) if block.units):
                for batch, run in walker.run(layer, block, stream):
                    aims[batch] = run.output.to(aims.device)
                for number, scheme in enumerate(schemes):
                    rounded = copy.deepcopy(layer)
                    fit.quantize(rounded, block, scheme)
                    for batch, run in walker.run(rounded, block, stream):
                        error = (run.output - aims[batch].to(run.output.device)).flatten(0, -2).float()
                        priced = error @ output[block.name].to(error)
                        prices[block.name][number] += float((priced * error).double().sum()) / 2 / rows.numel()
                walker.advance(layer, block, stream)
    layers.processes.add_up(*prices.values())
    return {name: dict(zip(schemes, found.tolist(), strict=True)) for name, found in prices.items()}
