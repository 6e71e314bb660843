"""Windows in some layers: the model with them, and the choice of the layers.

No weight changes. The price of a window is measured: the KL divergence of the predictions from the dense model's, on
rows longer than the window. Layers are chosen one after another, each time the one that raises it least. A layer's
increase is measured alone first, and again before it is chosen, together with those chosen before it; if it is then no
longer the lowest, the next one is measured (accelerated greedy, Minoux 1978). That is exact if no increase becomes
smaller by other choices.

For L layers, the first measurement takes L^2 / 2 layer runs, like a round of depth.py, and each one after it at most
2 L.
"""

import copy
import logging
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from numprune.anatomy import PER_LAYER_PREFIX, read_anatomy
from numprune.calibration import Walker, check_rows
from numprune.configs import NOT_CARRIED, pruned_config
from numprune.depth import divergences
from numprune.families import FAMILIES
from numprune.layers import Arguments, Entered, Head, Layers
from numprune.options import PruneOptions
from numprune.plans import Plan, WindowedLayer
from numprune.progress import Progress
from numprune.spans import Enough, check_reach, enough, full_layers, with_windows

logger = logging.getLogger(__name__)

_ROWS = 8  # calibration rows for the choice, spread evenly over all rows
_SLIDES, _FULL = "sliding_attention", "full_attention"  # in `layer_types`


@dataclass(frozen=True)
class Spans:
    """The layers that get a window.

    Attributes:
        window: tokens that they see.
        layers: in the order in which they were chosen.
        prices: layer -> divergence with a window in this layer alone, of those that saw the whole context.
    """

    window: int
    layers: tuple[WindowedLayer, ...]
    prices: dict[int, float]

    @property
    def indices(self) -> list[int]:
        return [one.layer for one in self.layers]


def windowed_config(config: PreTrainedConfig, window: int, layers: Collection[int]) -> PreTrainedConfig:
    """Return the configuration of the same model with a window in these layers beside those that have one."""
    anatomy = read_anatomy(config)
    own = FAMILIES[anatomy.family].windows
    assert own is not None  # by check_window
    after = with_windows(anatomy, window, layers)
    fields = {key: value for key, value in config.to_dict().items() if key not in {*NOT_CARRIED, *own.dropped}}
    fields |= {name: [value] * anatomy.layers for name, value in own.entries.items()}
    fields |= {"sliding_window": window, **own.fields}
    fields["layer_types"] = [
        _FULL if after.window_of(block) is None else _SLIDES for block in after.of_kind("attention")
    ]
    differ = config.model_type.startswith(PER_LAYER_PREFIX)
    if differ or own.family:
        fields["head_dim"] = anatomy.head_dim
    name = f"{PER_LAYER_PREFIX if differ else ''}{after.family}"
    return pruned_config(AutoConfig.for_model(name, **fields, **({"per_layer_config": {}} if differ else {})), after)


class Windowed:
    """The layers of a model, some of which see only a window (numprune.layers.Layers).

    Attributes:
        spans: the windows.
        dense: the model without them.
    """

    def __init__(self, layers: Layers, spans: Spans) -> None:
        self.dense, self.spans = layers, spans
        self.anatomy = with_windows(layers.anatomy, spans.window, spans.indices)
        self.config = windowed_config(layers.config, spans.window, spans.indices)
        self.task, self.processes, self.resident = layers.task, layers.processes, layers.resident
        self.device, self.dtype = layers.device, layers.dtype

    def enter(self, tokens: Tensor, mask: Tensor | None = None) -> Entered:
        entered = self.dense.enter(tokens, mask)
        sized = copy.copy(self.dense.config)  # with the attention implementation, on which the mask's form depends
        sized.sliding_window = self.spans.window
        seen = create_sliding_window_causal_mask(
            config=sized,
            inputs_embeds=entered.hidden,
            attention_mask=None if mask is None else mask.to(entered.hidden.device),
            past_key_values=None,
        )
        chosen = {*self.spans.indices}
        arguments = (
            _seeing(given, seen) if layer in chosen else given for layer, given in enumerate(entered.arguments)
        )
        return Entered(entered.hidden, tuple(arguments))

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        return self.dense.layer(index)

    def head(self) -> AbstractContextManager[Head]:
        return self.dense.head()

    def allocate(self, *shape: int, near: int | None = None) -> Tensor:
        return self.dense.allocate(*shape, near=near)


def _seeing(given: Arguments, mask: Any) -> Arguments:
    return replace(given, named={**given.named, "attention_mask": mask})


def windowed(layers: Layers, rows: Tensor, options: PruneOptions, plan: Plan | None = None) -> Layers:
    """Return the layers with the windows that the options ask for, or that a plan says; without any, the layers.

    Raises:
        InputError: the rows do not fit the model, or do not reach beyond the window.
    """
    if options.window is None:
        return layers
    if plan is not None:
        return Windowed(layers, Spans(options.window, tuple(plan.windowed), plan.window_prices))
    suffices = enough(layers.anatomy, options.window, options.window_layers, options.sequence_budget)
    return Windowed(layers, choose(layers, rows, options.window, suffices, options.batch_size))


@torch.no_grad()
def choose(layers: Layers, rows: Tensor, window: int, suffices: Enough, batch_size: int = 8) -> Spans:
    """Return the layers that get a window, in the order in which they were chosen.

    Args:
        layers: of the dense model.
        rows: (N, S) int64 calibration tokens, S > `window`.
        window: tokens that these layers will see; it has passed `check_window`.
        suffices: when to stop.
        batch_size: rows at a time.

    Raises:
        InputError: the rows do not fit the model, or do not reach beyond the window.
    """
    check_rows(layers.anatomy, rows)
    check_reach(window, rows.shape[1])
    meter = _Meter(layers, rows[:: max(1, len(rows) // _ROWS)][:_ROWS], window, batch_size)
    prices = meter.measure((), full_layers(layers.anatomy))
    increases, measured = dict(prices), {*prices}  # those measured beside the present choice
    chosen: list[WindowedLayer] = []
    while not suffices([one.layer for one in chosen]):
        layer = min(increases, key=increases.__getitem__)
        before = chosen[-1].divergence if chosen else 0.0
        if layer not in measured:
            increases[layer] = meter.measure([one.layer for one in chosen], [layer])[layer] - before
            measured.add(layer)
            continue
        chosen.append(WindowedLayer(layer=layer, divergence=before + increases.pop(layer)))
        measured.clear()
        logger.info("window in layer %d: %.4f %s from the dense model", layer, chosen[-1].divergence, layers.task.unit)
    return Spans(window, tuple(map(_rounded, chosen)), {layer: _digits(price) for layer, price in prices.items()})


class _Meter:
    """Measures the divergence of a model with windows from the dense one, on rows (N, S) shared by all processes."""

    def __init__(self, layers: Layers, rows: Tensor, window: int, batch_size: int) -> None:
        everywhere = tuple(WindowedLayer(layer=layer, divergence=0) for layer in full_layers(layers.anatomy))
        self._predictions = len(rows) * layers.task.predictions_in(rows.shape[1])
        self._walker = Walker(layers, rows.shape[1:], batch_size)
        self._narrow = Walker(Windowed(layers, Spans(window, everywhere, {})), rows.shape[1:], batch_size)
        rows = rows[self._walker.share(len(rows))]
        self._parts = rows.split(batch_size if layers.resident else len(rows)) if len(rows) else ()
        self._dense: list[Tensor] = []  # output of the dense model's last layer, by part

    def measure(self, chosen: Collection[int], candidates: Iterable[int]) -> dict[int, float]:
        """Return the divergence with windows in the layers `chosen` and one candidate, by candidate.

        The first call must be without chosen layers.
        """
        layers, totals = self._walker.layers, dict.fromkeys(candidates, 0.0)
        with Progress(layers.anatomy.layers * len(self._parts), "windows", "layer") as bar:
            for number, part in enumerate(self._parts):
                outputs = self._outputs(part, chosen, totals.keys(), bar)
                for layer, total in divergences(layers, part, self._dense[number], outputs).items():
                    totals[layer] += total
        summed = torch.tensor([*totals.values()], dtype=torch.float64)
        layers.processes.add_up(summed)
        return dict(zip(totals, (summed / self._predictions).tolist(), strict=True))

    def _outputs(
        self, rows: Tensor, chosen: Collection[int], candidates: Collection[int], bar: Progress
    ) -> dict[int, Tensor]:
        """Return the last layer's output (n, S, H) with windows in `chosen` and one candidate, by candidate."""
        layers = self._walker.layers
        shared = self._walker.embed(rows).hidden  # with the windows in `chosen` alone, as far as it is needed
        outputs: dict[int, Tensor] = {}
        until = max(candidates) if len(self._dense) == len(self._parts) else layers.anatomy.layers
        for index in range(layers.anatomy.layers):
            bar.update()
            walker = self._narrow if index in chosen else self._walker
            entering = layers.allocate(*shared.shape).copy_(shared) if index in candidates else None
            with layers.layer(index) as layer:
                for hidden in (*([shared] if index < until else []), *outputs.values()):
                    walker.through(layer, index, hidden, hidden)
                if entering is not None:
                    self._narrow.through(layer, index, entering, entering)
                    outputs[index] = entering
        if until == layers.anatomy.layers:
            self._dense.append(shared)
        return outputs


def _rounded(one: WindowedLayer) -> WindowedLayer:
    return WindowedLayer(layer=one.layer, divergence=_digits(one.divergence))


def _digits(value: float) -> float:
    return float(f"{value:.4g}")  # further digits depend on the machine
