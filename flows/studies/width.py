"""Compare ways to cut the hidden size, and to drop layers: quality at equal parameters.

    python -m numprune.flows.studies.width [MODEL] [--calibration FILE …] [--heldout FILE …] [--sizes 240,224,192]
        [--layers 1,2] [--out DIR]

At each hidden size, every method keeps as many parameters: the residual stream is rotated, or its coordinates are
reordered, the output matrix is the model's own, and everything is refitted in the same way. Beside them stand, at the
total parameters of those, SliceGPT with its matrices between blocks, and units of heads and MLPs, pruned by obs. For a
model whose output matrix is the embedding, coordinates that leave it so follow with fewer parameters. Layers are
dropped by measured divergence, or by ShortGPT's block influence, and the rest is refitted or not.
"""

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune import basis
from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.corpus import TokenRows
from numprune.counted import counted
from numprune.depth import choose, smallest_layers
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.flows.cli.parser import at_least
from numprune.flows.names import EMBEDDED
from numprune.flows.steps.models import model_folder, model_name
from numprune.flows.steps.prune import device_of
from numprune.flows.steps.text import calibration_rows, text_rows
from numprune.flows.studies.arguments import (
    add_heldout,
    add_model,
    each_once,
    out_folder,
    parser_of,
    run,
    write_results,
)
from numprune.flows.studies.rivals.minitron import embedding_importance, signal_moment
from numprune.flows.studies.rivals.shortgpt import block_influence, check_layers
from numprune.flows.studies.rivals.slicegpt import FAMILIES as SLICEABLE
from numprune.flows.studies.rivals.slicegpt import block_parameters, slice_hidden
from numprune.hidden import Basis, Narrowing, check_narrowable, narrowed
from numprune.layers import CopiedLayers
from numprune.options import PruneOptions
from numprune.plans import DroppedLayer
from numprune.pruning import config_after, prune, prune_layers
from numprune.quality import compare
from numprune.surgery import assemble
from numprune.target import Target
from numprune.tasks import Comparison

_BATCH = 8
_REFITS = ("none", "residual", "joint")


@dataclass(frozen=True)
class Row:
    """One method at one size.

    Attributes:
        size: hidden size, or layers.
        parameters: in total, with what a method adds.
        nll_delta, interval95: against the dense model, in nats per token.
        kl: from the dense model, in nats per token.
    """

    size: str
    method: str
    parameters: int
    nll_delta: float
    interval95: tuple[float, float]
    kl: float


def markdown(rows: Sequence[Row], conditions: str) -> str:
    """The table."""
    header = ["kept", "method", "parameters", "NLL increase (95 % interval)", "KL"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        lower, upper = row.interval95
        cells = [row.size, row.method, f"{row.parameters:,}", f"{row.nll_delta:+.4f} [{lower:+.4f}, {upper:+.4f}]"]
        lines.append(f"| {' | '.join([*cells, f'{row.kl:.4f}'])} |")
    return "\n".join([*lines, "", conditions, ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("width", __doc__)
    add_model(parser)
    add_heldout(parser)
    parser.add_argument("--sizes", type=_numbers, default=[240, 224, 192], help="hidden sizes (default 240,224,192)")
    parser.add_argument("--layers", type=_numbers, default=[], help="numbers of layers to drop (default: none)")
    parser.add_argument(
        "--compensation", choices=_REFITS, default="residual", help="the refit of all methods (default %(default)s)"
    )
    parser.add_argument("--samples", type=at_least(1), default=32, help="calibration rows (default %(default)s)")
    parser.add_argument("--sequence-length", type=at_least(2), default=256, help="tokens per row (default %(default)s)")
    parser.add_argument("--windows", type=at_least(1), default=64, help="held-out rows at most (default %(default)s)")
    parser.add_argument("--out", type=out_folder, help="folder for width.md and width.json")
    return run("width", _study, parser.parse_args(argv))


def _numbers(text: str) -> list[int]:
    try:
        return [at_least(1)(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers, like 240,224") from None


def _study(args: argparse.Namespace) -> str:
    each_once("--sizes", args.sizes)
    each_once("--layers", args.layers)
    base = model_folder(args.model)
    anatomy, length = read_anatomy(checkpoint.read_config(base)), args.sequence_length
    check_narrowable(anatomy)
    for size in args.sizes:
        if size >= anatomy.hidden_size:
            raise InputError(f"--sizes: {size} is not smaller than the model's hidden size {anatomy.hidden_size}")
    if args.layers:
        check_layers(anatomy)
        smallest_layers(anatomy, max(args.layers))
    model, tokenizer = checkpoint.load(base)
    rows, _ = calibration_rows(args.calibration or EMBEDDED, tokenizer, args.samples, length, 0, Reading())
    read = text_rows(args.heldout or EMBEDDED, "heldout", tokenizer, length, Reading(), args.windows * length)
    heldout = read.part(slice(args.windows))
    study = _Study(model.to(device_of("auto")), rows, heldout, args.compensation)
    table = [*study.widths(args.sizes), *study.depths(args.layers)]
    conditions = (
        f"{model_name(args.model)}, {budget_of(anatomy).parameters:,} parameters, refitted by {args.compensation}; "
        f"{args.samples} calibration rows of {length} tokens; quality on {heldout.tokens:,} tokens of "
        f"{counted(heldout.documents, 'held-out document')}."
    )
    result = markdown(table, conditions)
    write_results(args.out, "width", result, [asdict(row) for row in table])
    return result


class _Study:
    """One model, one calibration and one held-out text."""

    def __init__(self, model: PreTrainedModel, rows: Tensor, heldout: TokenRows, compensation: str) -> None:
        self._model, self._rows, self._heldout, self._compensation = model, rows, heldout, compensation
        self._anatomy = read_anatomy(model.config)

    def widths(self, sizes: Sequence[int]) -> Iterator[Row]:
        if not sizes:
            return
        layers, own = CopiedLayers(self._model), _untied(self._model)
        moments = basis.measure(layers, self._rows, _BATCH)
        with_first = basis.measure(layers, self._rows, _BATCH, first=0)
        minitron = embedding_importance(self._model, self._rows, _BATCH).argsort(descending=True)
        pca = basis.principal_axes(signal_moment(self._model, self._rows, _BATCH))
        for size in sizes:
            cheapest = basis.cheapest_coordinates(moments, size)
            for name, rotation in (
                ("Minitron's importance", self._reordered(minitron[:size])),
                ("one basis of principal components", pca),
                ("coordinates", self._reordered(cheapest)),
                ("fisher, with first tokens", basis.choose(with_first, size, "fisher").rotation),
                ("fisher", basis.choose(moments, size, "fisher").rotation),
            ):
                yield self._row(size, name, self._narrowed(own, Narrowing(torch.arange(size), rotation)))
            if self._anatomy.is_tied:
                shared = self._narrowed(self._model, Narrowing(cheapest))
                yield self._row(size, "coordinates, output matrix shared", shared)
            yield from self._at_equal_parameters(size)

    def _reordered(self, first: Tensor) -> Tensor:
        """Return the permutation of coordinates, (H, H) float64, that puts some `first`."""
        size = self._anatomy.hidden_size
        rest = [coordinate for coordinate in range(size) if coordinate not in {*first.tolist()}]
        return torch.eye(size, dtype=torch.float64)[:, [*first.tolist(), *rest]]

    def _narrowed(self, model: PreTrainedModel, narrowing: Narrowing) -> PreTrainedModel:
        which: Basis = "coordinates" if narrowing.rotation is None else "fisher"
        options = PruneOptions(
            0.0, compensation=self._compensation, hidden_size=len(narrowing.kept), basis=which, target=Target(align=1)
        )
        return self._pruned(model, options, narrowing=narrowing)

    def _at_equal_parameters(self, size: int) -> Iterator[Row]:
        """Other methods at the total parameters of a rotated model of this hidden size."""
        anatomy, dense = self._anatomy, budget_of(self._anatomy)
        parameters = budget_of(narrowed(anatomy, size, "fisher")).parameters
        if anatomy.family in SLICEABLE:
            around = anatomy.vocabulary * anatomy.hidden_size

            def sliced(width: int) -> int:
                return block_parameters(anatomy, width) + around + anatomy.vocabulary * width

            width = min(range(1, anatomy.hidden_size), key=lambda width: abs(sliced(width) - parameters))
            yield self._row(size, "SliceGPT", slice_hidden(copy.deepcopy(self._model), self._rows, width, _BATCH))
        ratio = (dense.parameters - parameters) / dense.prunable_parameters
        if 0 < ratio < 1:
            options = PruneOptions(ratio, compensation=self._compensation)
            yield self._row(size, "units (obs / uniform)", prune(self._model, self._rows, options).model)

    def depths(self, counts: Sequence[int]) -> Iterator[Row]:
        if not counts:
            return
        influence = block_influence(self._model, self._rows, _BATCH).argsort(stable=True).tolist()
        greedy = choose(CopiedLayers(self._model), self._rows, max(counts), ratio=1.0)
        for count in counts:
            chosen = (
                ("block influence (ShortGPT)", influence[:count]),
                ("measured divergence", [drop.layer for drop in greedy[:count]]),
            )
            for name, layers in chosen:
                for refit in dict.fromkeys(("none", self._compensation)):
                    how = "" if refit == "none" else f", {refit}"
                    yield self._row(f"{count} fewer", f"{name}{how}", self._shallower(layers, refit))

    def _shallower(self, layers: Sequence[int], refit: str) -> PreTrainedModel:
        sizes = [sum(block.parameters(block.size) for block in self._anatomy.of_layer(layer)) for layer in layers]
        ratio = sum(sizes) / budget_of(self._anatomy).prunable_parameters
        options = PruneOptions(ratio, compensation=refit, drop_layers=len(layers))
        dropped = [DroppedLayer(layer=layer, divergence=0.0) for layer in layers]
        return self._pruned(self._model, options, dropped=dropped)

    def _pruned(
        self,
        model: PreTrainedModel,
        options: PruneOptions,
        dropped: Sequence[DroppedLayer] = (),
        narrowing: Narrowing | None = None,
    ) -> PreTrainedModel:
        layers, cut = CopiedLayers(model), dict[str, Tensor]()
        made = prune_layers(layers, self._rows, options, cut.update, dropped=dropped, narrowing=narrowing)
        return assemble(model, config_after(layers, made), cut, narrowing)

    def _row(self, size: Any, method: str, made: nn.Module) -> Row:
        found: Comparison = compare(made, self._model, self._heldout)
        delta = found.loss_delta
        return Row(
            size=str(size),
            method=method,
            parameters=sum(parameter.numel() for parameter in made.parameters()),
            nll_delta=delta.value,
            interval95=delta.interval95,
            kl=found.metrics["kl_nats_per_token"],
        )


def _untied(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose output matrix is not the embedding's."""
    copied = copy.deepcopy(model)
    copied.config.tie_word_embeddings = False
    head = copied.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    return copied


if __name__ == "__main__":
    sys.exit(main())
