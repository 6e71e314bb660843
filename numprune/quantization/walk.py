"""Quantize a model's projections from front to back: the inputs of each come from the quantized ones before it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.blocks import Anatomy, Block
from numprune.calibration import Walker, check_rows
from numprune.errors import InputError
from numprune.families import FAMILIES
from numprune.layers import CopiedLayers, Layers
from numprune.plans import HiddenPlan
from numprune.progress import progress
from numprune.quantization.blocks import BlockFit
from numprune.quantization.linears import linear_of, projections
from numprune.quantization.lm_head import LmHeadBits, last_norm, moments_of, rounding
from numprune.quantization.rounding import Quantized, round_inputs_of, round_to_nearest
from numprune.quantization.schemes import BlockSchemes, of_block
from numprune.renumber import layers_left
from numprune.tasks import CAUSAL, Task

# Takes the tensors of a finished layer by full name: quantized weights, and all other tensors.
Sink = Callable[[Mapping[str, Quantized], Mapping[str, Tensor]], object]


@dataclass(frozen=True)
class Fit:
    """The data and target of GPTQ.


    Attributes:
        rows: (N, S) int64 calibration tokens.
        target: the model whose residual stream is the target, usually the unpruned one; None: the model itself, before
            quantization.
        dropped: layers of the target that the model does not have.
        batch_size: rows at a time.
        coordinates: those of the target's residual stream that the model has, (K,); None: all.
    """

    rows: Tensor
    target: Layers | None = None
    dropped: Sequence[int] = ()
    batch_size: int = 8
    coordinates: Tensor | None = None


def check_target(anatomy: Anatomy, target: Anatomy, dropped: Sequence[int], hidden: HiddenPlan | None = None) -> None:
    """Refuse a target from which the model cannot have been pruned; `hidden`: of the plan. Raises InputError."""
    if hidden is not None:
        if hidden.basis == "fisher":
            raise InputError(
                "the model's residual stream was rotated (basis fisher), so it cannot be fitted to the dense model's; "
                "leave the dense model out"
            )
        if hidden.size != target.hidden_size:
            raise InputError(
                f"the dense model has hidden_size {target.hidden_size}, and the model to quantize was cut from "
                f"{hidden.size}: it was not pruned from that one"
            )
        target = target.narrowed(len(hidden.kept))
    family = FAMILIES[target.family]
    # The families under which the pruned model may be stored.
    others = {family.stand_in and family.stand_in.name, family.windows and family.windows.family}
    for name in ("family", "hidden_size", "head_dim", "vocabulary"):
        ours, theirs = getattr(anatomy, name), getattr(target, name)
        if ours != theirs and not (name == "family" and ours in others):
            raise InputError(
                f"the dense model has {name} {theirs}, the model to quantize {ours}: it was not pruned from that one"
            )
    left = layers_left(target.layers, dropped)
    if anatomy.layers != len(left):
        raise InputError(
            f"the dense model has {target.layers} layers, of which the plan drops {target.layers - len(left)}, and the "
            f"model to quantize has {anatomy.layers}: it was not pruned from that one"
        )
    for index, number in enumerate(left):
        for ours, theirs in zip(anatomy.of_layer(index), target.of_layer(number), strict=True):
            if ours.units and (ours.units > theirs.units or ours.members > theirs.members):
                raise InputError(
                    f"{theirs.name} of the dense model has {theirs.units} units of {theirs.members}, and {ours.name} "
                    f"of the model to quantize {ours.units} of {ours.members}: it was not pruned from that one"
                )


@torch.no_grad()
def quantize_layers(
    layers: Layers, schemes: BlockSchemes, sink: Sink, fit: Fit | None = None, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Quantize the blocks' projections; pass the tensors of each decoder layer to `sink`, first layer first.

    Returns, with `fit`, what leaves the last layer, (N, S, H).

    With `fit`, by GPTQ: inputs come from the quantized layers before, and each block's last projection is first fitted
    to bring the residual stream to that of the target (compensation.py, *residual*), then rounded with the same second
    moments. An unquantized block is only fitted. Without `fit`, each weight is rounded to nearest.

    Args:
        layers: of a model accepted by `check_quantizable`, computing in float32; they are overwritten.
        schemes: of the blocks.
        dtype: stored data type of group scales.

    Raises:
        InputError: the rows do not fit the model.
    """
    steps = None if fit is None else _Fitting(layers, schemes, fit, dtype)
    for index in progress(range(layers.anatomy.layers), "quantize", "layer"):
        blocks = layers.anatomy.of_layer(index)
        with layers.layer(index) as layer:
            if steps is None:
                quantized = {
                    path: round_to_nearest(linear_of(layer, path).weight, scheme, dtype)
                    for block in blocks
                    if (scheme := of_block(schemes, block.name)) is not None
                    for one in projections(block)
                    for path in one.paths
                }
            else:
                quantized = steps.layer(layer, index)
            at = blocks[0].path
            matrices = {f"{at}.{path}.weight": matrix for path, matrix in quantized.items()}
            rest = {f"{at}.{name}": tensor for name, tensor in layer.state_dict().items()}
            sink(matrices, {name: tensor for name, tensor in rest.items() if name not in matrices})
    return None if steps is None else steps.stream.hidden


def quantize_model(
    model: PreTrainedModel,
    schemes: BlockSchemes,
    fit: Fit | None = None,
    dtype: torch.dtype = torch.float32,
    task: Task = CAUSAL,
    lm_head_bits: LmHeadBits = 8,
) -> tuple[PreTrainedModel, dict[str, Quantized]]:
    """Return a copy of `model` with quantized computation, and the quantized weights by name.

    Arguments and errors are those of `quantize_layers`; `lm_head_bits` 4 rounds the output matrix, see lm_head.py.
    """
    result = copy.deepcopy(model)
    matrices: dict[str, Quantized] = {}

    def sink(found: Mapping[str, Quantized], rest: Mapping[str, Tensor]) -> None:
        matrices.update(found)
        state = {name: matrix.dequantized() for name, matrix in found.items()} | dict(rest)
        result.load_state_dict(state, strict=False)  # of one layer

    leaving = quantize_layers(CopiedLayers(model, task), schemes, sink, fit, dtype)
    if lm_head_bits == 4:
        moments = None if leaving is None else moments_of(last_norm(result), leaving, result.device)
        head = result.get_output_embeddings().weight
        head.data = rounding(moments)(head.data)
    for name, matrix in matrices.items():
        round_inputs_of(result.get_submodule(name.removesuffix(".weight")), matrix.scheme)
    return result, matrices


class _Fitting:
    """The streams of the quantized model and of its target, side by side.

    Attributes:
        stream: of the quantized model.
    """

    def __init__(self, layers: Layers, schemes: BlockSchemes, fit: Fit, dtype: torch.dtype) -> None:
        check_rows(layers.anatomy, fit.rows)
        self._schemes, self._fit = schemes, fit
        row = fit.rows.shape[1:]
        self._walker = Walker(layers, row, fit.batch_size)
        self.stream = self._walker.embed(fit.rows)
        if fit.target is None:
            self._target, self._target_stream = self._walker, self._walker.copy(self.stream)
        else:
            self._target = Walker(fit.target, row, fit.batch_size)
            self._target_stream = self._target.embed(fit.rows)
        self._aims = layers.allocate(*self.stream.hidden.shape)  # the desired output of a block, (N, S, H)
        self._blocks = BlockFit(self._walker, self.stream, self._aims, dtype)
        left = layers_left(self._target.layers.anatomy.layers, fit.dropped)
        self._numbers = dict(enumerate(left))  # layer -> its index in the target
        self._next = 0  # of the target's layers

    def layer(self, layer: nn.Module, index: int) -> dict[str, Quantized]:
        """Quantize one layer in place; return its quantized weights by path."""
        blocks = self._walker.layers.anatomy.of_layer(index)
        if self._fit.target is None:
            return self._quantized(layer, blocks, layer, blocks)
        number = self._numbers[index]
        for dropped in range(self._next, number):
            with self._fit.target.layer(dropped) as dense:
                self._target.through(dense, dropped, self._target_stream.hidden, self._target_stream.hidden)
        self._next = number + 1
        with self._fit.target.layer(number) as dense:
            return self._quantized(layer, blocks, dense, self._fit.target.anatomy.of_layer(number))

    def _quantized(
        self, layer: nn.Module, blocks: Sequence[Block], dense: nn.Module, dense_blocks: Sequence[Block]
    ) -> dict[str, Quantized]:
        quantized: dict[str, Quantized] = {}
        for block, dense_block in zip(blocks, dense_blocks, strict=True):
            if dense_block.units:
                self._aim(dense, dense_block)
            if not block.units:
                continue
            # Only now, because the target may be this very layer.
            quantized |= self._blocks.quantize(layer, block, of_block(self._schemes, block.name))
            self._walker.advance(layer, block, self.stream)
        return quantized

    def _aim(self, dense: nn.Module, block: Block) -> None:
        """Run the target's block, and store the desired output of the quantized one."""
        scale = self._walker.layers.anatomy.residual_scale
        for batch, run in self._target.run(dense, block, self._target_stream):
            aim = self._kept(run.output).to(self._aims.device)
            if not block.norm_behind:
                aim = aim + (self._kept(self._target_stream.hidden[batch]) - self.stream.hidden[batch]) / scale
            self._aims[batch] = aim
            self._target_stream.write(batch, run.after)

    def _kept(self, hidden: Tensor) -> Tensor:
        """Return what the model has of the target's (…, H)."""
        kept = self._fit.coordinates
        return hidden if kept is None else hidden.index_select(-1, kept.to(hidden.device))
