"""Compare learned masks with training-free pruning: quality at equal sizes, training tokens and time.

    python -m numprune.flows.studies.learned [MODEL] [--calibration FILE …] [--heldout FILE …] [--ratios 0.3,0.5]
        [--variants faster,fast] [--tokens N] [--out DIR]

The training-free methods are obs/uniform/joint and obs/error/joint. The masks of each variant are learned once; their
plan is then applied without a refit and with the refit `joint` on the same calibration rows. `--out` keeps the table,
and all measurements as JSON.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from numprune.documents import Reading
from numprune.errors import InputError, NumpruneError
from numprune.export import checkpoint
from numprune.flows import names
from numprune.flows.recipe import EMBEDDED
from numprune.flows.steps.checks import model_folder
from numprune.flows.steps.evaluate import compare_checkpoints
from numprune.flows.steps.learn import PLAN, Request, TrainingRows, check_request, learn_checkpoint, training_rows
from numprune.flows.steps.prune import device_of, prune_checkpoint
from numprune.flows.steps.results import PrunedCheckpoint
from numprune.flows.steps.text import calibration_rows, text_rows
from numprune.options import PruneOptions, options_of
from numprune.plans import read_plan
from numprune.serving.report import ReportedEstimate

_REFITS = ("none", "joint")
_LEARNED = PruneOptions(0.0, "vib", "error", axes=get_args(names.LearnedAxis))


@dataclass(frozen=True)
class Row:
    """One method at one ratio.

    Attributes:
        removed: share of the prunable parameters.
        tokens: for training; 0 without training.
        seconds: of learning and pruning.
        quality: the report's section, against the dense model.
    """

    method: str
    ratio: float
    removed: float
    parameters: int
    tokens: int
    seconds: float
    quality: Mapping[str, Any]


@dataclass(frozen=True)
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
    parser = argparse.ArgumentParser(
        prog="python -m numprune.flows.studies.learned",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", default=EMBEDDED, help="a Hugging Face folder (default: the embedded model)"
    )
    parser.add_argument("--calibration", nargs="+", metavar="FILE", help="text to learn and fit on (default: embedded)")
    parser.add_argument("--heldout", nargs="+", metavar="FILE", help="text to judge by (default: embedded)")
    parser.add_argument("--ratios", default="0.3,0.5", help="shares to remove (default %(default)s)")
    parser.add_argument("--variants", default="faster,fast", help="of full,fast,faster (default %(default)s)")
    parser.add_argument("--tokens", type=int, help="to train on (default: the variant's own)")
    parser.add_argument("--samples", type=int, default=64, help="calibration rows of pruning (default %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens per row (default %(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="held-out rows at most (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for learned.md and learned.json")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("numprune").setLevel(logging.INFO)
    try:
        sys.stdout.write(_study(args))
    except NumpruneError as error:
        print(f"learned: error: {error}", file=sys.stderr)
        return 1
    return 0


def _study(args: argparse.Namespace) -> str:
    variants = args.variants.split(",")
    if unknown := [name for name in variants if name not in get_args(names.LearningVariant)]:
        raise InputError(f"variant is {unknown[0]!r}; it must be one of {', '.join(names.LEARNING_TOKENS)}")
    try:
        ratios = [float(ratio) for ratio in args.ratios.split(",")]
    except ValueError:
        raise InputError(f"ratios are {args.ratios!r}; each must be a number") from None
    base = model_folder(args.model)
    for ratio in ratios:
        check_request(base, replace(_LEARNED, ratio=ratio))
    text, length, device = args.calibration or EMBEDDED, args.sequence_length, device_of("auto")
    tokenizer = checkpoint.load_tokenizer(base)
    rows, _ = calibration_rows(text, tokenizer, args.samples, length, 0, Reading())
    heldout = text_rows(args.heldout or EMBEDDED, "heldout", tokenizer, length, Reading(), args.windows * length)
    table: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="numprune-learned-") as scratch:
        for ratio in ratios:
            made = [*_training_free(base, rows, ratio, Path(scratch))]
            for variant in variants:
                asked = Request(variant, args.tokens or names.LEARNING_TOKENS[variant], names.LEARNING_RATE)
                training = training_rows(text, base, length, asked.tokens, 0, Reading())
                made += _learned(base, rows, training, asked, ratio, Path(scratch))
            qualities = compare_checkpoints([one.folder for one in made], base, heldout, device)
            table += [_row(one, ratio, quality) for one, quality in zip(made, qualities, strict=True)]
    judged = table[0].quality
    conditions = (
        f"{base.name}; {args.samples} calibration rows of {length} tokens; quality on {judged['tokens']:,} tokens of "
        f"{judged['documents']} held-out documents."
    )
    result = markdown(table, conditions)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "learned.md").write_text(result, encoding="utf-8")
        data = json.dumps([asdict(row) for row in table], indent=2, allow_nan=False)
        (args.out / "learned.json").write_text(data, encoding="utf-8")
    return result


def _training_free(base: Path, rows: Tensor, ratio: float, scratch: Path) -> Iterator[_Made]:
    for allocation in ("uniform", "error"):
        folder = scratch / f"{allocation}-{ratio}"
        started = time.perf_counter()
        options = PruneOptions(ratio, allocation=allocation)
        found = prune_checkpoint(base, rows, options, folder, device_of("auto"))
        yield _Made(f"obs/{allocation}/joint", folder, found, 0, time.perf_counter() - started)


def _learned(
    base: Path, rows: Tensor, training: TrainingRows, asked: Request, ratio: float, scratch: Path
) -> Iterator[_Made]:
    """Learn once, and apply the plan with each refit."""
    out = scratch / f"{asked.variant}-{ratio}"
    options, device = replace(_LEARNED, ratio=ratio), device_of("auto")
    learned = learn_checkpoint(base, training, options, asked, out, device)
    for refit in _REFITS:
        folder = scratch / f"{asked.variant}-{ratio}-{refit}"
        started = time.perf_counter()
        plan = read_plan(out / PLAN).model_copy(update={"compensation": refit})
        found = prune_checkpoint(learned.model, rows, options_of(plan), folder, device, plan=plan)
        seconds = learned.record.seconds + time.perf_counter() - started
        yield _Made(f"vib {asked.variant}/{refit}", folder, found, learned.record.tokens, seconds)


def _row(made: _Made, ratio: float, quality: Mapping[str, Any]) -> Row:
    removed, parameters = made.found.prunable_ratio_removed, made.found.after.parameters
    return Row(made.method, ratio, removed, parameters, made.tokens, made.seconds, quality)


if __name__ == "__main__":
    sys.exit(main())
