"""What a search for better sizes is worth for its time, and what a reinforcement-learning agent is.

    python -m numprune.flows.studies.search [MODEL] [--calibration FILE …] [--heldout FILE …] [--ratios 0.3,0.5]
        [--episodes N] [--out DIR]

For each ratio: the sizes of obs/error (the knapsack), the best ones of the search that starts there, and the best ones
of an agent as in AMC, all at the same number of parameters. Search and agent compare plans by the same measure on the
same calibration rows; "confirmed" says whether other calibration rows agree that a plan is better than the knapsack's,
which `numprune prune --refine search` requires. Each plan is then pruned with the compensation `joint` and judged on
held-out text, which decides nothing. Seconds are those in addition to the knapsack's. `--out` keeps the table, and all
measurements as JSON.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from numprune import sensitivity
from numprune.allocation import by_error
from numprune.anatomy import read_anatomy
from numprune.bootstrap import Estimate
from numprune.calibration import Walker
from numprune.choosing import Known, error_curves, least_units, neighbourhood
from numprune.corpus import TokenRows
from numprune.counted import counted
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.export.tasks import load_task
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
from numprune.flows.studies.search.agent import explore
from numprune.inputs import PrecomputedInputs
from numprune.layers import ModelLayers
from numprune.option_checks import check_options
from numprune.options import PruneOptions, sizes_allowed
from numprune.pruning import dense_moments, prune
from numprune.quality import compare
from numprune.quantization.allocation import Form
from numprune.refinement import MINUTES
from numprune.search.divergence import Divergences
from numprune.search.evolution import Found, search
from numprune.search.refine import check_searchable, confirmed, parts, rounds
from numprune.search.space import Space
from numprune.slices import Size
from numprune.tasks import Task

_REWARDED = 8  # rows that an episode is rewarded on
_MEASURED = 8  # of the agent's plans, the best ones are compared on all rows


@dataclass(frozen=True)
class Row:
    """One method at one ratio.

    Attributes:
        removed: share of the prunable parameters.
        seconds: in addition to the knapsack's.
        candidates: plans that were measured.
        divergence: on the calibration rows that plans are compared on.
        confirmed: by other calibration rows; None: of the knapsack's plan itself.
        nll: increase on held-out text, with its 95 % interval.
        change: of the held-out NLL from the knapsack's plan, with its 95 % interval; None: as above.
        kl: on held-out text.
    """

    ratio: float
    method: str
    removed: float
    seconds: float
    candidates: int
    divergence: float
    confirmed: bool | None
    nll: tuple[float, float, float]
    change: tuple[float, float, float] | None
    kl: float


def markdown(rows: Sequence[Row], conditions: str) -> str:
    """The table."""
    header = ["ratio", "method", "removed", "seconds", "plans", "KL, calibration", "confirmed"]
    header += ["NLL increase (95 % interval)", "KL", "NLL change from the knapsack (95 % interval)"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        cells = [f"{row.ratio:.0%}", row.method, f"{row.removed:.2%}", f"{row.seconds:,.0f}", f"{row.candidates:,}"]
        cells += [f"{row.divergence:.4f}", {None: "", True: "yes", False: "no"}[row.confirmed]]
        cells += [_interval(row.nll), f"{row.kl:.4f}", _interval(row.change) if row.change else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", conditions, ""])


def _interval(estimate: tuple[float, float, float]) -> str:
    value, lower, upper = estimate
    return f"{value:+.4f} [{lower:+.4f}, {upper:+.4f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 error."""
    parser = parser_of("search", __doc__)
    add_model(parser)
    add_heldout(parser)
    parser.add_argument("--ratios", default="0.3,0.5", help="shares to remove (default %(default)s)")
    parser.add_argument(
        "--episodes",
        type=at_least(1),
        default=150,
        metavar="N",
        help="plans that the agent tries (default %(default)s)",
    )
    parser.add_argument("--samples", type=at_least(1), default=96, help="calibration rows (default %(default)s)")
    parser.add_argument("--sequence-length", type=at_least(2), default=128, help="tokens per row (default %(default)s)")
    parser.add_argument("--windows", type=at_least(1), default=128, help="held-out rows at most (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit of each search (default %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of search and agent (default %(default)s)")
    parser.add_argument("--out", type=out_folder, help="folder for search.md and search.json")
    return run("search", _study, parser.parse_args(argv))


def _study(args: argparse.Namespace) -> str:
    try:
        ratios = each_once("--ratios", [float(ratio) for ratio in args.ratios.split(",")])
    except ValueError:
        raise InputError(f"--ratios: {args.ratios!r} must be numbers, separated by commas") from None
    base, length = model_folder(args.model), args.sequence_length
    task, anatomy = load_task(base), read_anatomy(checkpoint.read_config(base))
    if not task.generates:
        raise InputError(f"{model_name(args.model)} is for {task.name}; the study is of causal language models")
    asked = [
        PruneOptions(ratio, allocation="error", refine="search", refine_minutes=args.minutes, seed=args.seed)
        for ratio in ratios
    ]
    for options in asked:
        check_options(anatomy, options)
    check_searchable(args.samples, resident=True)
    network, tokenizer = checkpoint.load(base)
    rows, _ = calibration_rows(args.calibration or EMBEDDED, tokenizer, args.samples, length, 0, Reading())
    read = text_rows(args.heldout or EMBEDDED, "heldout", tokenizer, length, Reading(), args.windows * length)
    heldout = read.part(slice(args.windows))
    study = _Study(network.to(device_of("auto")), task, rows, heldout, args.episodes)
    table = [row for options in asked for row in study.rows_of(options)]
    conditions = (
        f"{model_name(args.model)}; {args.samples} calibration rows of {length} tokens; quality on "
        f"{int(heldout.scored.sum()):,} tokens of {counted(heldout.documents, 'held-out document')}."
    )
    result = markdown(table, conditions)
    write_results(args.out, "search", result, [asdict(row) for row in table])
    return result


@dataclass(frozen=True)
class _Tried:
    """The best plan of a method, and what it took."""

    method: str
    plan: Mapping[str, Size]
    seconds: float
    candidates: int
    divergence: float
    confirmed: bool | None


class _Study:
    """What all rows of the table share: the dense model, text, and what the knapsack reads."""

    def __init__(self, network: PreTrainedModel, task: Task, rows: Tensor, heldout: TokenRows, episodes: int) -> None:
        self._network, self._task, self._rows, self._heldout = network, task, rows, heldout
        self._episodes = episodes
        self._layers = ModelLayers(network, task)
        self._gradients = sensitivity.measure(self._layers, rows)
        self._moments = dict(dense_moments(self._layers, rows))

    def rows_of(self, options: PruneOptions) -> Iterator[Row]:
        """Yield the knapsack's row, that of the search, and the agent's."""
        knapsack: PreTrainedModel | None = None
        for tried in self._tried(options):
            forms = {name: Form(size, None) for name, size in tried.plan.items()}
            known = Known(None, self._gradients, forms)
            unrefined = replace(options, refine="none", refine_minutes=MINUTES)
            pruned = prune(self._network, self._rows, unrefined, known, self._task)
            lost = compare(pruned.model, self._network, self._heldout, self._task)
            change = None if knapsack is None else compare(pruned.model, knapsack, self._heldout, self._task)
            knapsack = knapsack or pruned.model
            yield Row(
                ratio=options.ratio,
                method=tried.method,
                removed=pruned.prunable_ratio_removed,
                seconds=tried.seconds,
                candidates=tried.candidates,
                divergence=tried.divergence,
                confirmed=tried.confirmed,
                nll=_with_interval(lost.loss_delta),
                change=None if change is None else _with_interval(change.loss_delta),
                kl=lost.metrics["kl_nats_per_token"],
            )

    def _tried(self, options: PruneOptions) -> list[_Tried]:
        anatomy, walker = self._layers.anatomy, Walker(self._layers, self._rows.shape[1:], options.batch_size)
        allowed = sizes_allowed(anatomy, options)
        inputs = PrecomputedInputs(self._moments)
        errors = error_curves(self._layers, inputs, options, self._gradients, least_units(allowed))
        start = by_error(anatomy, options.ratio, allowed, errors)
        space, levels = neighbourhood(anatomy, options, self._moments, self._gradients, errors, start)
        compared, others = parts(self._rows)
        measure, apart = (Divergences(walker, some, levels) for some in (compared, others))
        seed, seconds = options.seed, 60 * options.refine_minutes
        ways: dict[str, Callable[[], Found]] = {
            "search": lambda: search(space, start, measure, rounds(len(compared)), seed=seed, seconds=seconds),
            "agent": lambda: _acted(space, start, measure, self._episodes, seed),
        }
        tried: list[_Tried] = []
        for method, way in ways.items():
            started = time.perf_counter()
            found = way()
            taken = time.perf_counter() - started
            tried = tried or [_Tried("knapsack", start, 0.0, 1, found.before, None)]
            _, record = confirmed(found, start, lambda plans: apart(plans, slice(None)), len(compared), self._task.unit)
            tried.append(_Tried(method, found.plan, taken, found.candidates, found.after, record.confirmed))
        return tried


def _acted(space: Space, start: Mapping[str, Size], measure: Divergences, episodes: int, seed: int) -> Found:
    """Return the agent's best plan as a search would."""
    tried = explore(space, lambda plan: -float(measure([plan], slice(_REWARDED)).mean()), episodes, seed)
    best = list(tried.plans[:_MEASURED])
    before, *after = measure([start, *best], slice(None)).mean(1).tolist()
    least = after.index(min(after))
    return Found(best[least], episodes, tried.candidates, before, after[least], "no gain")


def _with_interval(found: Estimate) -> tuple[float, float, float]:
    return found.value, *found.interval95
