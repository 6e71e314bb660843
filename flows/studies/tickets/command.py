"""python -m numprune.flows.studies.tickets: the command."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from numprune.documents import read_documents
from numprune.errors import InputError, NumpruneError
from numprune.flows import children
from numprune.flows.cli.parser import Parser, at_least
from numprune.flows.embedded import corpus

_HELDOUT_ROWS = 256

_EPILOG = """\
  python -m numprune.flows.studies.tickets                          the embedded text, some minutes
  python -m numprune.flows.studies.tickets --unstructured
  python -m numprune.flows.studies.tickets --text train.txt --heldout test.txt --rounds 6 --fraction 0.2 --seeds 3

Trains a small Llama over bytes, prunes it by magnitude, rewinds it to its weights after --rewind steps and trains it
again, --rounds times. Each ticket is compared with the same shape, initialised anew, and with random units.

Writes tickets.md, tickets.json and tickets.svg into --out, and prints the table. Finished trainings are kept there: the
same command resumes after an interruption, and with more rounds or seeds only the new ones are trained.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 error, 130 interrupted."""
    children.prepare_threads()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("numprune").setLevel(logging.INFO)
    try:
        sys.stdout.write(_run(_parser().parse_args(argv)))
    except NumpruneError as error:
        print(f"tickets: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tickets: interrupted; run the same command to resume", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m numprune.flows.studies.tickets",
        description="Lottery tickets: iterative pruning with rewinding, against random reinitialisation.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", nargs="+", metavar="FILE", help="training text (default: the embedded text)")
    parser.add_argument("--heldout", nargs="+", metavar="FILE", help="held-out text (default: the embedded text)")
    parser.add_argument("--steps", type=at_least(1), default=300, metavar="N", help="steps per training (default: 300)")
    parser.add_argument(
        "--rewind", type=at_least(0), default=30, metavar="K", help="step to which tickets are rewound (default: 30)"
    )
    parser.add_argument("--rounds", type=at_least(1), default=4, metavar="N", help="rounds of pruning (default: 4)")
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.3,
        metavar="F",
        help="share of what is left that each round removes (default: 0.3)",
    )
    parser.add_argument("--seeds", type=at_least(1), default=2, metavar="N", help="models to train (default: 2)")
    parser.add_argument("--unstructured", action="store_true", help="remove single weights instead of units")
    parser.add_argument(
        "--out", type=Path, default=Path("numprune-tickets"), metavar="DIR", help="default: %(default)s"
    )
    return parser


def _run(args: argparse.Namespace) -> str:
    from numprune.export.disk import require_writable
    from numprune.flows.studies.tickets.study import Settings, Study
    from numprune.flows.studies.tickets.table import as_markdown, as_svg
    from numprune.flows.studies.tickets.training import BATCH_SIZE, byte_rows

    if bool(args.text) != bool(args.heldout):
        raise InputError("--text and --heldout belong together; give both or none")
    if not 0 < args.fraction < 1:
        raise InputError(f"--fraction: {args.fraction:g}; it must be over 0 and under 1")
    if args.rewind >= args.steps:
        raise InputError(f"--rewind: {args.rewind} leaves no step of --steps {args.steps}; rewind to an earlier one")
    settings = Settings(args.steps, args.rewind, args.fraction, structured=not args.unstructured)
    settings.pruning(args.rounds)
    require_writable(args.out)
    rows = byte_rows(_documents(args.text, "train"), args.steps * BATCH_SIZE)
    heldout = byte_rows(_documents(args.heldout, "heldout"), _HELDOUT_ROWS)
    study = Study(settings, args.rounds, range(args.seeds), rows, heldout)
    results = study.run(args.out)
    table = as_markdown(results, study.conditions)
    for name, content in (
        ("tickets.md", table),
        ("tickets.svg", as_svg(results)),
        ("tickets.json", json.dumps([asdict(result) for result in results], indent=1, allow_nan=False)),
    ):
        (args.out / name).write_text(content, encoding="utf-8")
    return table


def _documents(files: Sequence[str] | None, part: corpus.Split) -> Iterator[str]:
    if files is None:
        return (text for _, text in corpus.documents(part))
    return (document.text for document in read_documents(files))
