"""What pruning one decoder layer costs besides its forward passes, measured with the parts that `prune` is made of."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from numprune.anatomy import Block
from numprune.calibration import Walker, consumer_of
from numprune.compensation import refit
from numprune.criteria import CRITERIA, BlockView
from numprune.flows.speed.clock import now, seconds
from numprune.layers import ModelLayers
from numprune.statistics import Moments
from numprune.surgery import channels_of

SUMS = ("without targets", "with targets")
SCORES = ("numerical", "obs")
_RATIO = 0.3
_DAMPING = 1e-3
_BATCH = 8  # rows


@dataclass(frozen=True)
class Size:
    """A decoder layer's."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class LayerTimes:
    """Seconds for one decoder layer and `tokens` calibration tokens.

    Attributes:
        measured_tokens: those that were run; what grows with the tokens was multiplied by tokens / measured_tokens.
        forward: the dense forward pass.
        sums: the moments of all tokens, without and with those of targets, which only inputs from the pruned prefix
            need.
        scores: by criterion, of both blocks.
        least_squares: of both blocks.
    """

    size: Size
    tokens: int
    measured_tokens: int
    forward: float
    sums: dict[str, float]
    scores: dict[str, float]
    least_squares: float

    def besides(self, sums: str, criterion: str) -> float:
        """Return the seconds of all that is not a forward pass."""
        return self.sums[sums] + self.scores[criterion] + self.least_squares


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
        tokens: calibration tokens that the times are given for.
        measured_tokens: at most so many are run, in whole rows.
        sequence_length: tokens of a row.
        repeats: how often everything is run.
        device: to run on.
        progress: told what comes next.
    """
    layers = ModelLayers(_one_layer(size, sequence_length).to(device))
    walker = Walker(layers, sequence_length, _BATCH)
    rows = max(1, min(tokens, measured_tokens) // sequence_length)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, sequence_length, size.hidden, generator=generator, device=device)
    runs: list[Counter[str]] = []
    with layers.layer(0) as layer, torch.no_grad():
        blocks = layers.anatomy.of_layer(0)
        for block in blocks:  # libraries are loaded when they are first called
            _block_times(walker, layer, block, hidden[:1], ("numerical-newton",), device)
        for repeat in range(repeats):
            runs.append(Counter())
            for block in blocks:
                progress(f"layer of {size.hidden} and {size.intermediate}, {block.kind}, {repeat + 1} of {repeats}")
                runs[-1].update(_block_times(walker, layer, block, hidden, SCORES, device))
    times = {name: median(run[name] for run in runs) for name in runs[0]}
    scale = tokens / (rows * sequence_length)
    return LayerTimes(
        size,
        tokens,
        rows * sequence_length,
        times["forward"] * scale,
        {name: times[name] * scale for name in SUMS},
        {name: times[name] for name in SCORES},
        times["least squares"],
    )


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
    walker: Walker, layer: nn.Module, block: Block, hidden: Tensor, criteria: Sequence[str], device: torch.device
) -> dict[str, float]:
    """Return the seconds of "forward", each of `SUMS`, "least squares", and each criterion."""
    times = dict.fromkeys(("forward", *SUMS), 0.0)
    consumer = consumer_of(layer, block)
    moments = Moments(block.channels, device=device)
    with_targets = Moments(block.channels, consumer.out_features, device)
    start = now(device)
    for _, inputs, output in walker.run(layer, block, hidden):
        times["forward"] += now(device) - start
        times["without targets"] += seconds(partial(moments.add, inputs), device)
        times["with targets"] += seconds(partial(with_targets.add, inputs, output), device)
        start = now(device)
    weight = consumer.weight.double()
    view = BlockView(weight, moments.gram, moments.mean, block.channels_per_unit, _RATIO, seed=0)
    for name in criteria:
        times[name] = seconds(partial(CRITERIA[name], view), device)
    kept = channels_of(block, torch.arange(max(1, round((1 - _RATIO) * block.units)), device=device))
    times["least squares"] = seconds(partial(refit, weight, None, kept, moments, _DAMPING), device)
    return times
