"""Compare learned masks with training-free pruning: quality at equal sizes, training tokens and time.

    python -m numprune.flows.studies.learned [MODEL] [--calibration FILE …] [--heldout FILE …] [--ratios 0.3,0.5]
        [--variants faster,fast,full=500000] [--distill TOKENS] [--out DIR]

The training-free methods are obs/uniform/joint and obs/error/joint. The masks of each variant are learned once; their
plan is then applied without a refit and with the refit `joint` on the same calibration rows. `--distill` trains the
best result of each ratio, and the best training-free one, towards the dense model. KL on calibration text that neither
masks nor distillation are trained on decides which is best; the held-out text decides nothing. `--out` keeps the table,
and all measurements as JSON.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from numprune.corpus import TokenRows, rows_digest
from numprune.counted import counted
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.flows import names
from numprune.flows.cli.parser import at_least
from numprune.flows.names import EMBEDDED
from numprune.flows.steps import recover
from numprune.flows.steps.checks import model_folder, model_name
from numprune.flows.steps.evaluate import compare_checkpoints
from numprune.flows.steps.learn import Request, check_request, learn_checkpoint, training_rows
from numprune.flows.steps.prune import device_of, prune_checkpoint
from numprune.flows.steps.results import PrunedCheckpoint
from numprune.flows.steps.text import Text, calibration_rows, text_rows
from numprune.flows.studies.arguments import add_heldout, add_model, out_folder, parser_of, run, write_results
from numprune.options import PruneOptions, options_of
from numprune.plans import read_plan
from numprune.recovery import RecoveryOptions, RecoveryRows, require_packages
from numprune.recovery.loss import Distillation
from numprune.serving.report import ReportedEstimate

_REFITS = ("none", "joint")
_LEARNED = PruneOptions(0.0, "vib", "error", axes=names.LEARNED_AXES)
_SELECTION_ROWS = 32  # of the distillation; masks are not trained on them


@dataclass(frozen=True)
class Row:
    """One method at one ratio.

    Attributes:
        removed: share of the prunable parameters.
        tokens: for training; 0 without training.
        seconds: of learning, pruning and distillation.
        quality: the report's section, against the dense model.
    """

    method: str
    ratio: float
    removed: float
    parameters: int
    tokens: int
    seconds: float
    quality: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Made:
    """A pruned checkpoint and its cost."""

    method: str
    folder: Path
    found: PrunedCheckpoint
    tokens: int
    seconds: float


def markdown(rows: Sequence[Row], conditions: str) -> str:
    """The table."""
    header = [
        "ratio",
        "method",
        "removed",
        "parameters",
        "tokens trained",
        "seconds",
        "NLL increase (95 % interval)",
        "KL",
    ]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        delta = {key: value for key, value in row.quality["loss_delta"].items() if key != "unit"}
        estimate = ReportedEstimate.model_validate(delta)
        lower, upper = estimate.interval95
        cells = [f"{row.ratio:.0%}", row.method, f"{row.removed:.1%}", f"{row.parameters:,}", f"{row.tokens:,}"]
        cells += [f"{row.seconds:,.0f}", f"{estimate.value:+.4f} [{lower:+.4f}, {upper:+.4f}]"]
        cells.append(f"{row.quality['kl_nats_per_token']:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", conditions, ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("learned", __doc__)
    add_model(parser)
    add_heldout(parser)
    parser.add_argument("--ratios", default="0.3,0.5", help="shares to remove (default %(default)s)")
    parser.add_argument(
        "--variants",
        default="faster,fast",
        help="of full,fast,faster, each with =TOKENS for another number than its own (default %(default)s)",
    )
    parser.add_argument(
        "--distill", type=at_least(0), default=0, metavar="TOKENS", help="to distil on (default: not at all)"
    )
    parser.add_argument(
        "--samples", type=at_least(1), default=64, help="calibration rows of pruning (default %(default)s)"
    )
    parser.add_argument("--sequence-length", type=at_least(1), default=256, help="tokens per row (default %(default)s)")
    parser.add_argument("--windows", type=at_least(1), default=64, help="held-out rows at most (default %(default)s)")
    parser.add_argument("--out", type=out_folder, help="folder for learned.md and learned.json")
    return run("learned", _study, parser.parse_args(argv))


@dataclass(frozen=True)
class _Study:
    """The conditions shared by all rows of the table.

    Attributes:
        rows: of calibration.
        heldout: text for evaluation.
        distilled: rows for distillation; None: no distillation.
    """

    base: Path
    text: Text
    length: int
    rows: Tensor
    heldout: TokenRows
    distilled: RecoveryRows | None
    options: RecoveryOptions
    device: torch.device
    scratch: Path

    @property
    def selection(self) -> list[TokenRows]:
        """The rows that decide what to distil, if anything is."""
        if self.distilled is None:
            return []
        rows = list(self.distilled.selection)
        return [TokenRows(rows, [0] * len(rows), ["selection"], rows_digest(self.distilled.selection))]


def _study(args: argparse.Namespace) -> str:
    requests = [_request(asked) for asked in args.variants.split(",")]
    try:
        ratios = [float(ratio) for ratio in args.ratios.split(",")]
    except ValueError:
        raise InputError(f"ratios are {args.ratios!r}; each must be a number") from None
    for name, given in (("ratios", ratios), ("variants", requests)):
        if len({*given}) < len(given):
            raise InputError(f"{name} are {getattr(args, name)!r}; name each once")
    base = model_folder(args.model)
    for ratio in ratios:
        check_request(base, replace(_LEARNED, ratio=ratio), "parameters", args.sequence_length)
    text, length = args.calibration or EMBEDDED, args.sequence_length
    options = RecoveryOptions(tokens=args.distill, selection_rows=_SELECTION_ROWS)
    if args.distill:
        require_packages(options)
        recover.check_request(base, base, options)
    tokenizer = checkpoint.load_tokenizer(base)
    rows, _ = calibration_rows(text, tokenizer, args.samples, length, 0, Reading())
    read = text_rows(args.heldout or EMBEDDED, "heldout", tokenizer, length, Reading(), args.windows * length)
    heldout = read.part(slice(args.windows))
    distilled = None
    if args.distill:
        distilled = recover.training_rows(text, tokenizer, length, options, Reading(), "--calibration", [heldout])
    table: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="numprune-learned-") as scratch:
        study = _Study(base, text, length, rows, heldout, distilled, options, device_of("auto"), Path(scratch))
        for ratio in ratios:
            made = [*_training_free(study, ratio)]
            for asked in requests:
                made += _learned(study, asked, ratio)
            made += _distilled(study, made)
            qualities = compare_checkpoints([one.folder for one in made], base, heldout, study.device)
            table += [_row(one, ratio, quality) for one, quality in zip(made, qualities, strict=True)]
    judged = table[0].quality
    conditions = (
        f"{model_name(args.model)}; {args.samples} calibration rows of {length} tokens; quality on "
        f"{judged['tokens']:,} tokens of {counted(judged['documents'], 'held-out document')}."
    )
    result = markdown(table, conditions)
    write_results(args.out, "learned", result, [asdict(row) for row in table])
    return result


def _request(asked: str) -> Request:
    """Return the variant and tokens of one part of `--variants`. Raises InputError."""
    name, _, tokens = asked.partition("=")
    known = {variant: variant for variant in get_args(names.LearningVariant)}
    if name not in known:
        raise InputError(f"variant is {name!r}; it must be one of {', '.join(known)}")
    if tokens and not (tokens.isdecimal() and int(tokens)):
        raise InputError(f"tokens of {name} are {tokens!r}; give a whole number of at least 1")
    return Request(known[name], int(tokens or names.LEARNING_TOKENS[known[name]]), names.LEARNING_RATE)


def _training_free(study: _Study, ratio: float) -> Iterator[_Made]:
    for allocation in ("uniform", "error"):
        folder = study.scratch / f"{allocation}-{ratio}"
        started = time.perf_counter()
        options = PruneOptions(ratio, allocation=allocation)
        found = prune_checkpoint(study.base, study.rows, options, folder, study.device)
        yield _Made(f"obs/{allocation}/joint", folder, found, 0, time.perf_counter() - started)


def _learned(study: _Study, asked: Request, ratio: float) -> Iterator[_Made]:
    """Learn once, and apply the plan with each refit."""
    out, base = study.scratch / f"{asked.variant}-{asked.tokens}-{ratio}", study.base
    judged = [study.heldout, *study.selection]
    rows, draw = training_rows(study.text, base, study.length, asked.tokens, 0, Reading(), "--calibration", judged)
    options = replace(_LEARNED, ratio=ratio)
    learned = learn_checkpoint(base, rows, draw, options, asked, out, study.device, study.scratch)
    for refit in _REFITS:
        folder = out.with_name(f"{out.name}-{refit}")
        started = time.perf_counter()
        plan = read_plan(out / names.LEARNED_PLAN).model_copy(update={"compensation": refit})
        model = out / names.LEARNED_MODEL if learned.model else base
        found = prune_checkpoint(model, study.rows, options_of(plan), folder, study.device, plan=plan)
        seconds = learned.seconds + time.perf_counter() - started
        yield _Made(f"vib {asked.variant}/{refit}", folder, found, learned.tokens, seconds)


def _distilled(study: _Study, made: Sequence[_Made]) -> Iterator[_Made]:
    """Distil the best model, and the best training-free one, which may be the same."""
    if study.distilled is None:
        return
    dense, selection = checkpoint.load(study.base)[0].to(study.device), study.distilled.selection.to(study.device)

    @torch.no_grad()
    def divergence(one: _Made) -> float:
        return float(Distillation(checkpoint.load(one.folder)[0].to(study.device), dense)(selection))

    found = {one: divergence(one) for one in made}
    for source in dict.fromkeys(min(some, key=lambda one: found[one]) for some in (made, made[:2])):
        folder = source.folder.with_name(f"{source.folder.name}-distilled")
        trained = recover.recover_checkpoint(
            source.folder, study.base, study.distilled, study.options, folder, study.device, study.scratch
        )
        method, seconds = f"{source.method} + distillation", source.seconds + trained.seconds
        yield _Made(method, folder, source.found, source.tokens + trained.tokens, seconds)


def _row(made: _Made, ratio: float, quality: Mapping[str, Any]) -> Row:
    removed, parameters = made.found.prunable_ratio_removed, made.found.after.parameters
    return Row(made.method, ratio, removed, parameters, made.tokens, made.seconds, quality)


if __name__ == "__main__":
    sys.exit(main())
