"""The time of pruning one decoder layer, relative to its forward pass, measured with the functions of `prune`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from numprune.blocks import Block
from numprune.calibration import Walker, consumer_of
from numprune.compensation import choose_damping, refit
from numprune.criteria import CRITERIA, BlockView
from numprune.flows.studies.speed.clock import now, seconds
from numprune.inputs import split_rows
from numprune.joint import Aims, fits_producer, refit_producer
from numprune.layers import ModelLayers
from numprune.moments import Moments
from numprune.slices import Kept
from numprune.surgery import channels_of

CRITERION = "obs"
PER_TOKEN = ("forward", "to the consumer", "sums", "sums with targets", "consumer")
FIXED = ("score", "least squares", "damping")
# The parts of each compensation, and how often they run. Except for `oneshot`, inputs come from the pruned prefix: the
# block is run dense, and on these inputs up to its consumer, whose stored inputs the pruned consumer reads.
_FROM_PREFIX = ("forward", "to the consumer", "sums with targets", "score", "least squares", "damping")
PARTS = {
    "oneshot": dict.fromkeys(("forward", "sums", "score", "least squares"), 1),
    "residual": dict.fromkeys((*_FROM_PREFIX, "consumer"), 1),
    "joint": dict.fromkeys((*_FROM_PREFIX, "producers"), 1),
}
# The work before it if uniform allocation has a choice: moments and error curves of the dense blocks, and the gradients
# of a quarter of the rows, which take about as long as a forward pass of all rows.
PARTS["split"] = {"forward": 2, "sums": 1, "score": 1}
_RATIO = 0.3
_DAMPING = 1e-3
_BATCH = 8  # rows


@dataclass(frozen=True)
class Size:
    """The sizes of a decoder layer."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class LayerTimes:
    """Seconds for one decoder layer and `tokens` calibration tokens.

    Attributes:
        measured_tokens: those that were run; times that grow with the tokens were multiplied by tokens /
            measured_tokens.
        parts: of both blocks together: "forward", a dense forward pass; "to the consumer", the same without the
            consumers; "sums", the moments of the consumers' inputs; "sums with targets", including moments of targets,
            with a quarter of the rows separate; "score", by greedy OBS; "least squares"; "damping", its choice;
            "consumer", the pruned consumers alone; "producers", `joint`'s fit of the producer and the pruned blocks,
            including all passes over the kept units.
    """

    size: Size
    tokens: int
    measured_tokens: int
    parts: dict[str, float]

    def whole(self, work: str) -> float:
        """Return the seconds of pruning with a compensation, greedy OBS, or of the choice of the split before it."""
        return sum(times * self.parts[name] for name, times in PARTS[work].items())

    def besides(self, work: str) -> float:
        """Return the seconds of all work other than forward passes of the dense layer, or parts of one."""
        passes = ("forward", "to the consumer", "consumer")
        return sum(times * self.parts[name] for name, times in PARTS[work].items() if name not in passes)


def measure_layer(
    size: Size,
    tokens: int,
    measured_tokens: int,
    sequence_length: int,
    repeats: int,
    device: torch.device,
    progress: Callable[[str], None],
) -> LayerTimes:
    """Return the times of a layer with random weights in float32, medians of `repeats`.

    Args:
        size: of the layer.
        tokens: calibration tokens for which the times are stated.
        measured_tokens: at most this many are run, in whole rows, at least two.
        sequence_length: tokens per row.
        repeats: number of runs.
        device: to run on.
        progress: called with the next step.
    """
    layers = ModelLayers(_one_layer(size, sequence_length).to(device))
    walker = Walker(layers, (sequence_length,), _BATCH)
    rows = max(2, min(tokens, measured_tokens) // sequence_length)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, sequence_length, size.hidden, generator=generator, device=device)
    runs: list[Counter[str]] = []
    with layers.layer(0) as layer, torch.no_grad():
        blocks = layers.anatomy.of_layer(0)
        for block in blocks:  # libraries are loaded on first use
            _block_times(walker, layer, block, hidden[:1], "numerical-newton", device)
        for repeat in range(repeats):
            runs.append(Counter())
            for block in blocks:
                progress(f"layer of {size.hidden} and {size.intermediate}, {block.kind}, {repeat + 1} of {repeats}")
                runs[-1].update(_block_times(walker, layer, block, hidden, CRITERION, device))
    times = {name: median(run[name] for run in runs) for name in runs[0]}
    scale = tokens / (rows * sequence_length)
    parts = {name: times[name] * scale for name in PER_TOKEN} | {name: times[name] for name in FIXED}
    # The solves of this fit do not grow with the tokens: the time of each further row is the difference from one row.
    one = times["producers, one row"]
    each = max(times["producers"] - one, 0) / (rows - 1)  # a negative difference is noise
    parts["producers"] = one + each * (tokens / sequence_length - 1)
    return LayerTimes(size, tokens, rows * sequence_length, parts)


def _one_layer(size: Size, sequence_length: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=sequence_length,
        num_hidden_layers=1,
        vocab_size=8,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def _block_times(
    walker: Walker, layer: nn.Module, block: Block, hidden: Tensor, criterion: str, device: torch.device
) -> dict[str, float]:
    times = dict.fromkeys(PER_TOKEN, 0.0)
    consumer = consumer_of(layer, block)
    moments = Moments(block.channels, device=device)
    fitted, held_out = (Moments(block.channels, consumer.out_features, device) for _ in range(2))
    behind, read = hidden.clone(), hidden.new_empty(*hidden.shape[:-1], block.channels)
    start = now(device)
    for batch, run in walker.run(layer, block, walker.stream(hidden)):
        times["forward"] += now(device) - start
        times["sums"] += seconds(partial(moments.add, run.inputs), device)
        with_targets = partial(split_rows, batch, run.inputs, run.output, fitted, held_out)
        times["sums with targets"] += seconds(with_targets, device)
        behind[batch] = run.after
        start = now(device)
    start = now(device)
    for batch, inputs in walker.inputs(layer, block, walker.stream(hidden)):
        read[batch] = inputs
    times["to the consumer"] = now(device) - start
    weight = consumer.weight.double()
    view = BlockView(weight, moments.gram, moments.mean, block.channels_per_unit, _RATIO, seed=0)
    units = torch.arange(max(1, round((1 - _RATIO) * block.units)), device=device)
    view = replace(view, removed=block.units - len(units))
    times["score"] = seconds(partial(CRITERIA[criterion], view), device)
    left = Kept.whole(units, block.members)
    kept = channels_of(block, left)
    times["least squares"] = seconds(partial(refit, weight, None, kept, moments, _DAMPING), device)
    held = held_out if held_out.count else fitted

    def choose() -> None:
        choose_damping(weight[:, kept], None, fitted.of(kept), held.of(kept), _DAMPING)

    times["damping"] = seconds(choose, device)

    def consumed(batch: slice) -> Tensor:
        return read[batch][..., kept]

    def give(rows: int) -> None:
        stream = walker.stream(hidden[:rows].clone())
        for batch in walker.batches(rows):
            output = functional.linear(consumed(batch), consumer.weight[:, kept])
            walker.give(layer, block, stream, batch, output)

    times["consumer"] = seconds(partial(give, len(hidden)), device)

    def refit_and_advance(rows: int) -> None:
        stream = walker.stream(hidden[:rows].clone())
        aims = Aims(behind[:rows], hidden[:rows])
        small = refit_producer(walker, layer, block, left, stream, consumed, aims, _DAMPING)
        walker.advance(small, block.resized(left.size), stream)

    own = refit_and_advance if fits_producer(walker.layers.anatomy, block) else give
    times["producers"] = seconds(partial(own, len(hidden)), device)
    times["producers, one row"] = seconds(partial(own, 1), device)
    return times
