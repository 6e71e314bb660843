"""python -m numprune.flows.studies.learned: the command."""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.flows import names, stages
from numprune.flows.cli.parser import at_least
from numprune.flows.sections import Learn, Recover
from numprune.flows.steps import learn, recover
from numprune.flows.steps.models import model_folder, model_name
from numprune.flows.studies.arguments import (
    add_heldout,
    add_model,
    each_once,
    out_folder,
    parser_of,
    run,
    write_results,
)
from numprune.flows.studies.learned.study import Request, Study, limits, markdown
from numprune.recovery import require_packages
from numprune.target import Target

_DESCRIPTION = """\
Compare learned masks with training-free pruning: quality at equal sizes, training tokens and time.

The training-free methods are obs/uniform/joint and obs/error/joint. The masks of each variant are learned once; their
plan is then applied without a refit and with the refit `joint` on the same calibration rows. `--distill` trains the
best result of each ratio, and the best training-free one, towards the dense model. KL on calibration text that neither
masks nor distillation are trained on decides which is best; the held-out text decides nothing.
"""
_EPILOG = """\
  python -m numprune.flows.studies.learned
  python -m numprune.flows.studies.learned ./my-model --calibration train.txt --heldout test.txt --ratios 0.3,0.5 \\
      --variants faster,full=500000 --distill 1000000 --out results

Writes learned.md, and all measurements as learned.json, into --out, updated after each row. Every finished model is
kept in --out/stages: after an interruption, the same command resumes, inside a training at its last saved step; with
more ratios or variants, it runs only what is missing. Remove that folder when no more is wanted.
"""
_SELECTION_ROWS = 32  # of the distillation; masks are not trained on them


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 error, 130 interrupted."""
    parser = parser_of("learned", _DESCRIPTION, _EPILOG)
    add_model(parser)
    add_heldout(parser)
    parser.add_argument("--ratios", default="0.3,0.5", help="shares to remove (default: %(default)s)")
    parser.add_argument(
        "--variants",
        default="faster,fast",
        help="of full,fast,faster, each with =TOKENS for another number than its own (default: %(default)s)",
    )
    parser.add_argument(
        "--distill", type=at_least(0), default=0, metavar="TOKENS", help="to distil on (default: not at all)"
    )
    parser.add_argument(
        "--samples", type=at_least(1), default=64, help="calibration rows of pruning (default: %(default)s)"
    )
    parser.add_argument(
        "--sequence-length", type=at_least(1), default=256, help="tokens per row (default: %(default)s)"
    )
    parser.add_argument("--windows", type=at_least(1), default=64, help="held-out rows at most (default: %(default)s)")
    parser.add_argument("--out", type=out_folder, help="folder for the results (default: none are kept)")
    return run("learned", _study, parser.parse_args(argv))


def _study(args: argparse.Namespace) -> str:
    requests = [_request(asked) for asked in args.variants.split(",")]
    try:
        ratios = [float(ratio) for ratio in args.ratios.split(",")]
    except ValueError:
        raise InputError(f"--ratios: {args.ratios!r}; each must be a number") from None
    if wrong := [ratio for ratio in ratios if not 0 <= ratio < 1]:
        raise InputError(f"--ratios: {wrong[0]}; each must be at least 0 and under 1")
    each_once("--ratios", ratios)
    each_once("--variants", [str(request) for request in requests])
    base = model_folder(args.model)
    if (task := read_anatomy(checkpoint.read_config(base)).task) != names.CAUSAL_LM:
        raise InputError(f"{args.model}: only causal language models can be studied; the task of this one is {task}")
    for ratio in ratios:
        asked = learn.options_of(Learn(method="vib"), limits(ratio), Target(), base)
        learn.check_request(base, asked, "parameters", args.sequence_length)
    distilled = None
    if args.distill:
        distilled = Recover(method="distill", tokens=args.distill, selection_rows=_SELECTION_ROWS)
        options = recover.options_of(distilled)
        require_packages(options)
        recover.check_request(base, base, options)
    with nullcontext(args.out) if args.out else tempfile.TemporaryDirectory(prefix="numprune-learned-") as workspace:
        stages.sweep(Path(workspace))
        study = Study(
            Path(workspace),
            base,
            args.calibration or names.EMBEDDED,
            args.heldout or names.EMBEDDED,
            args.samples,
            args.windows,
            args.sequence_length,
            distilled,
        )
        conditions = f"{model_name(args.model)}; {study.conditions}"
        rows = []
        for ratio in ratios:
            for row in study.rows(ratio, requests):
                rows.append(row)
                table = markdown(rows, conditions)
                write_results(args.out, "learned", table, [asdict(one) for one in rows])
    return table


def _request(asked: str) -> Request:
    """Return the variant and tokens of one part of `--variants`. Raises InputError."""
    name, _, tokens = asked.partition("=")
    known = {variant: variant for variant in get_args(names.LearningVariant)}
    if name not in known:
        raise InputError(f"--variants: {name!r}; it must be one of {', '.join(known)}")
    if tokens and not (tokens.isdecimal() and int(tokens)):
        raise InputError(f"--variants: tokens of {name} are {tokens!r}; give a whole number of at least 1")
    return Request(known[name], int(tokens or names.LEARNING_TOKENS[known[name]]))
