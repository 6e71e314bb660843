"""Compare pruning to budgets of time with pruning by ratio: how much faster a model of the same quality is.

    python -m numprune.flows.studies.milliseconds [MODEL] --timings TABLE [--limits 60,50,45] [--ratios 0.1,0.2,0.3]
        [--calibration FILE …] [--heldout FILE …] [--out DIR]

Each limit, in milliseconds of the table's scenario, is met as `numprune prune --budget` meets it: predicted, measured,
corrected if need be. It is compared with the model of as many parameters by ratio, with the allocation `error`. All
models are measured in turn, in the runtime and the scenario of the table. The last columns are the time of a model by
ratio of the same held-out loss, interpolated between the two nearest ones, over that of the model within the budget.
The interval draws visits and documents, the same ones for all models. `--out` keeps the table, and all measurements as
JSON.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from numprune import quality
from numprune.anatomy import read_anatomy
from numprune.corpus import TokenRows
from numprune.counted import counted
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.flows.cli.parser import at_least
from numprune.flows.names import EMBEDDED
from numprune.flows.steps.models import model_folder, model_name
from numprune.flows.steps.prune import device_of, prune_checkpoint
from numprune.flows.steps.served import opened_by
from numprune.flows.steps.text import calibration_rows, text_rows
from numprune.flows.steps.timed_prune import prune_within_time, time_budget
from numprune.flows.steps.timings import runtime_of, timed_in
from numprune.flows.studies.arguments import (
    add_heldout,
    add_model,
    each_once,
    out_folder,
    parser_of,
    run,
    write_results,
)
from numprune.option_checks import check_options
from numprune.options import PruneOptions
from numprune.plans import Draw
from numprune.scenario import parse_scenario
from numprune.served import AS_STORED
from numprune.serving.benchmark.visits import in_turn, weighted_medians
from numprune.serving.report import LatencyBudget
from numprune.target import Target
from numprune.tasks import Comparison
from numprune.timings import TimingTable, read_timings

_DENSE = "dense"
_KL = "kl_nats_per_token"
_DRAWS = 2000


@dataclass(frozen=True)
class Model:
    """A pruned checkpoint; `removed`: share of its prunable parameters; `within`: its budget, None: by ratio."""

    name: str
    folder: Path
    removed: float
    within: LatencyBudget | None = None


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        removed: share of the prunable parameters.
        predicted: milliseconds by the table as it was corrected last, with their 95 % interval; None: by ratio.
        corrections: of the table, until the budget was met; None: by ratio.
        ms: measured in turn with the others, with their interval.
        nll: increase on held-out text, in nats per token, with its interval.
        kl: on held-out text.
        gain: time of a model by ratio of the same loss, over this one's, with its 95 % interval; None: by ratio, or
            the loss exceeds that of the largest ratio.
        gain_kl: likewise of the same KL.
    """

    name: str
    removed: float
    predicted: tuple[float, float, float] | None
    corrections: int | None
    ms: tuple[float, float, float]
    nll: tuple[float, float, float]
    kl: float
    gain: tuple[float, float, float] | None
    gain_kl: float | None


def markdown(rows: Sequence[Row], conditions: str) -> str:
    """The table."""
    header = ["model", "removed", "predicted ms", "corrections", "measured ms", "NLL increase", "KL"]
    header += ["speedup over pruning by ratio at equal NLL", "at equal KL"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        corrections = "" if row.corrections is None else str(row.corrections)
        cells = [row.name, f"{row.removed:.1%}", _interval(row.predicted, ".3g"), corrections, _interval(row.ms, ".3g")]
        cells += [_interval(row.nll, "+.4f"), f"{row.kl:.4f}", _interval(row.gain, ".2f")]
        cells.append("" if row.gain_kl is None else f"{row.gain_kl:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"In brackets: 95 % intervals. {conditions}", ""])


def _interval(estimate: tuple[float, float, float] | None, form: str) -> str:
    if estimate is None:
        return ""
    value, low, high = estimate
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def gain(
    model: str,
    curve: Sequence[str],
    ms: Mapping[str, Sequence[float]],
    lost: Mapping[str, Comparison],
) -> tuple[float, float, float] | None:
    """Return how many times as fast a model is as one on a curve at its loss, with the 95 % interval.

    Args:
        curve: the dense model and others, by what was removed.
        ms: of each model in every visit.
        lost: by each model but the dense one, on the same rows.

    None: the loss exceeds that of the last model of the curve, or does in more than 2.5 % of the draws.
    """
    generator = np.random.default_rng(0)
    scored = lost[model].scored
    documents = generator.integers(0, len(scored), (_DRAWS, len(scored)))
    visits = generator.integers(0, len(ms[model]), (_DRAWS, len(ms[model])))
    # The first draw is of everything, once.
    documents[0], visits[0] = np.arange(documents.shape[1]), np.arange(visits.shape[1])

    def losses(name: str) -> np.ndarray:
        if name not in lost:
            return np.zeros(_DRAWS)
        found: np.ndarray = lost[name].difference[documents].sum(1) / scored[documents].sum(1)
        return found

    def times(name: str) -> np.ndarray:
        found: np.ndarray = np.median(np.array(ms[name])[visits], axis=1)
        return found

    on_curve = (np.stack([of(name) for name in curve], axis=1) for of in (losses, times))  # each (draws, models)
    found = np.array([rival_ms(*drawn) for drawn in zip(losses(model), *on_curve, strict=True)]) / times(model)
    if np.isnan(found[0]) or np.isnan(found).mean() > 0.025:
        return None
    low, high = np.nanquantile(found, [0.025, 0.975]).tolist()
    return float(found[0]), low, high


def rival_ms(loss: float, losses: np.ndarray, ms: np.ndarray) -> float:
    """Return the time at which models on a curve lose `loss`; NaN: they all lose less.

    Between two models, the time is linear in the square root of the loss, because losses grow about with the square of
    what is removed. A model that is no better, or no faster, than one from which more was removed counts as that one.

    Args:
        losses, ms: (models,) by what was removed.
    """
    at, quickest = np.minimum.accumulate(losses[::-1])[::-1], np.minimum.accumulate(ms)
    return float(np.interp(math.sqrt(max(loss, 0.0)), np.sqrt(np.maximum(at, 0.0)), quickest, right=math.nan))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 error."""
    parser = parser_of("milliseconds", __doc__)
    add_model(parser)
    add_heldout(parser)
    parser.add_argument("--timings", required=True, type=Path, metavar="TABLE", help="of numprune timings")
    parser.add_argument("--scenario", help="of the table (default: its only one)")
    parser.add_argument("--limits", default="60,50,45", help="in milliseconds (default %(default)s)")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4,0.5", help="shares to remove (default %(default)s)")
    parser.add_argument("--compensation", default="joint", help="of all models (default %(default)s)")
    parser.add_argument("--align", type=at_least(1), default=8, help="as for the table (default %(default)s)")
    parser.add_argument("--samples", type=at_least(1), default=128, help="calibration rows (default %(default)s)")
    parser.add_argument("--sequence-length", type=at_least(2), default=256, help="tokens per row (default %(default)s)")
    parser.add_argument("--windows", type=at_least(1), default=160, help="held-out rows at most (default %(default)s)")
    parser.add_argument("--visits", type=at_least(3), default=8, help="of each model (default %(default)s)")
    parser.add_argument("--out", type=out_folder, help="folder for milliseconds.md and milliseconds.json")
    return run("milliseconds", _body, parser.parse_args(argv))


def _body(args: argparse.Namespace) -> str:
    limits, ratios = _numbers("--limits", args.limits), sorted(_numbers("--ratios", args.ratios))
    base, table, length = model_folder(args.model), read_timings(args.timings), args.sequence_length
    tokenizer = checkpoint.text_tokenizer(base)
    if tokenizer is None:
        raise InputError(f"{model_name(args.model)} reads images; the study is of models that read text")
    study = _Study.of(args, base, table)
    asked = [study.within(limit) for limit in limits], [study.options(ratio) for ratio in ratios]
    rows, draw = calibration_rows(args.calibration or EMBEDDED, tokenizer, args.samples, length, 0, Reading())
    read = text_rows(args.heldout or EMBEDDED, "heldout", tokenizer, length, Reading(), args.windows * length)
    heldout = read.part(slice(args.windows))
    with tempfile.TemporaryDirectory(prefix="numprune-milliseconds-") as scratch:
        models = study.pruned(*asked, rows, draw, Path(scratch))
        ms = study.measured(models, args.visits, Path(scratch))
        lost = _lost(base, models, heldout)
    result = _rows(models, ms, lost)
    conditions = (
        f"{model_name(args.model)}, {study.scenario} in {table.key.runtime}, {table.key.dtype}, {table.key.threads} "
        f"threads of {table.key.device}; {args.compensation}, {args.samples} calibration rows of {length} tokens; loss "
        f"on {int(heldout.scored.sum()):,} tokens of {counted(heldout.documents, 'held-out document')}."
    )
    text = markdown(result, conditions)
    write_results(args.out, "milliseconds", text, {"rows": [asdict(row) for row in result], "visits": ms})
    return text


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [*each_once(option, [float(part) for part in text.split(",")])]
    except ValueError:
        raise InputError(f"{option}: {text!r} must be numbers, separated by commas") from None


@dataclass(frozen=True)
class _Study:
    """What all models share."""

    base: Path
    table: TimingTable
    scenario: str
    common: PruneOptions

    @classmethod
    def of(cls, args: argparse.Namespace, base: Path, table: TimingTable) -> "_Study":
        known = [times.scenario for times in table.scenarios]
        if args.scenario is None and len(known) > 1:
            raise InputError(f"--timings: the table has {', '.join(known)}; choose one with --scenario")
        if table.estimate:
            raise InputError(f"--timings {args.timings}: an estimate; the study measures, so give a measured table")
        target = Target(align=args.align)
        common = PruneOptions(0.0, allocation="error", compensation=args.compensation, target=target)
        return cls(base, table, str(parse_scenario(args.scenario or known[0])), common)

    def within(self, limit: float) -> PruneOptions:
        """Return the options for a limit. Raises InputError."""
        budget = time_budget(self.base, f"{limit:.12g}ms@{self.scenario}", [self.table], self.common, AS_STORED)
        return self._checked(replace(self.common, time_budget=budget))

    def options(self, ratio: float) -> PruneOptions:
        """Return the options for a ratio. Raises InputError."""
        return self._checked(replace(self.common, ratio=ratio))

    def _checked(self, options: PruneOptions) -> PruneOptions:
        check_options(read_anatomy(checkpoint.read_config(self.base)), options)
        return options

    def pruned(
        self,
        limits: Sequence[PruneOptions],
        ratios: Sequence[PruneOptions],
        rows: Tensor,
        draw: Draw,
        scratch: Path,
    ) -> list[Model]:
        """Return the models within limits, and then those by ratio, with those of as many parameters among them."""
        device, found = device_of("auto"), list[Model]()
        for options in limits:
            assert options.time_budget is not None
            limit = f"{options.time_budget.limit_ms:.12g} ms"
            print(f"pruning: {limit}", file=sys.stderr)
            out = scratch / f"within-{len(found)}"
            made = prune_within_time(self.base, rows, options, out, device, draw=draw, stream=False)
            found.append(Model(limit, out, made.prunable_ratio_removed, made.latency))
        equal = {f"ratio, parameters of {model.name}": self.options(model.removed) for model in found}
        for name, options in {**{f"ratio {one.ratio:g}": one for one in ratios}, **equal}.items():
            print(f"pruning: {name}", file=sys.stderr)
            out = scratch / f"ratio-{len(found)}"
            removed = prune_checkpoint(self.base, rows, options, out, device, draw=draw).prunable_ratio_removed
            found.append(Model(name, out, removed))
        return found

    def measured(self, models: Sequence[Model], visits: int, scratch: Path) -> dict[str, list[float]]:
        """Return the milliseconds of the dense model and the others in every visit."""
        runtime = runtime_of(self.base, self.table.key.runtime)
        timed = timed_in(parse_scenario(self.scenario), read_anatomy(checkpoint.read_config(self.base)))
        # Model names may not be valid file names.
        folders = {_DENSE: self.base, **{model.folder.name: model.folder for model in models}}
        (exports := scratch / "exports").mkdir()
        found = in_turn(runtime, opened_by(runtime, folders, exports, [timed]), timed, visits)
        return {_DENSE: found[_DENSE], **{model.name: found[model.folder.name] for model in models}}


def _lost(base: Path, models: Sequence[Model], heldout: TokenRows) -> dict[str, Comparison]:
    device = device_of("auto")
    dense = checkpoint.load_model(base, torch.float32).to(device)
    found = {}
    for model in models:
        print(f"held-out text: {model.name}", file=sys.stderr)
        found[model.name] = quality.compare(checkpoint.load_model(model.folder).to(device), dense, heldout)
    return found


def _rows(models: Sequence[Model], ms: Mapping[str, Sequence[float]], lost: Mapping[str, Comparison]) -> list[Row]:
    by_ratio = sorted((model for model in models if model.within is None), key=lambda model: model.removed)
    curve = [_DENSE, *(model.name for model in by_ratio)]
    kl = np.array([0.0, *(lost[model.name].metrics[_KL] for model in by_ratio)])
    medians = np.array([_median(ms[name])[0] for name in curve])
    found = [Row(_DENSE, 0.0, None, None, _median(ms[_DENSE]), (0.0, 0.0, 0.0), 0.0, None, None)]
    for model in sorted(models, key=lambda model: model.removed):
        latency, loss, measured = model.within, lost[model.name], _median(ms[model.name])
        at_kl = rival_ms(loss.metrics[_KL], kl, medians) / measured[0]
        found.append(
            Row(
                name=model.name,
                removed=model.removed,
                predicted=None if latency is None else (latency.predicted.ms, *latency.predicted.interval95),
                corrections=None if latency is None else latency.corrections,
                ms=measured,
                nll=(loss.loss_delta.value, *loss.loss_delta.interval95),
                kl=loss.metrics[_KL],
                gain=None if latency is None else gain(model.name, curve, ms, lost),
                gain_kl=None if latency is None or math.isnan(at_kl) else at_kl,
            )
        )
    return found


def _median(values: Sequence[float]) -> tuple[float, float, float]:
    ms, interval = weighted_medians([values], [1.0])
    return ms, *interval


if __name__ == "__main__":
    sys.exit(main())
