"""python -m numprune.compare: the command."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar, get_args

from numprune.anatomy import read_anatomy
from numprune.axes import AXES, DEFAULT_AXES, Limits
from numprune.errors import InputError, NumpruneError
from numprune.export.checkpoint import read_config
from numprune.export.disk import require_writable
from numprune.flows import children
from numprune.flows.cli.parser import Parser, add_choice, add_reading, at_least, reading
from numprune.flows.names import EMBEDDED, Device
from numprune.flows.steps.models import model_folder, model_name
from numprune.flows.steps.prune import device_of
from numprune.flows.steps.text import row_length
from numprune.flows.studies.compare.methods import METHODS, check, chosen, defaults
from numprune.flows.studies.compare.run import Request, compare
from numprune.flows.studies.compare.table import as_markdown
from numprune.flows.studies.rivals import RIVALS
from numprune.target import Target

T = TypeVar("T")

_LENGTH = 256

_EPILOG = f"""\
A method is criterion/allocation/compensation, or has a plain name: {", ".join(RIVALS)}. Wildcards may stand for any
part: --methods 'obs/*/sequential,flap/global/*,shortgpt'; --methods help lists all {len(METHODS)}.

  python -m numprune.compare                                            the embedded model on its own text
  python -m numprune.compare ./my-model --text train.txt --heldout test.txt --ratios 0.1,0.2,0.3,0.5
  python -m numprune.compare ./my-model --text train.txt --samples 32,128,512 --methods obs/uniform/sequential

Writes compare.csv, compare.md and compare.svg into --out, updated after each method, and prints the Markdown. After an
interruption, the same command resumes; with more ratios, sizes or methods, it runs only what is missing.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 error, 130 interrupted."""
    children.prepare_threads()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # in the children
    try:
        args = _parser().parse_args(argv)
        if args.methods == ["help"]:
            print("\n".join(METHODS))
            return 0
        sys.stdout.write(as_markdown(compare(_request(args))))
    except NumpruneError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compare: interrupted; run the same command to resume", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m numprune.compare",
        description="Pruning methods side by side: one model, one calibration text, one held-out text.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", default=EMBEDDED, help="a Hugging Face folder or hub id (default: the embedded model)"
    )
    parser.add_argument("--text", nargs="+", metavar="FILE", help="calibration text (default: the embedded one)")
    parser.add_argument(
        "--heldout",
        nargs="+",
        metavar="FILE",
        help="held-out text (default: the last fifth of --text, which is then not used for calibration)",
    )
    add_reading(parser)
    numbers = partial(_list, float, "a number"), partial(_list, at_least(1), "a whole number, at least 1")
    parser.add_argument(
        "--ratios",
        type=numbers[0],
        default=[0.3],
        metavar="R,R",
        help="shares of the prunable parameters to remove (default: 0.3)",
    )
    parser.add_argument(
        "--methods", type=_names, metavar="M,M", help="see below (default: published methods and numprune's)"
    )
    parser.add_argument(
        "--samples", type=numbers[1], default=[128], metavar="N,N", help="calibration rows (default: 128)"
    )
    parser.add_argument(
        "--sequence-length",
        type=at_least(2),
        default=_LENGTH,
        metavar="N",
        help="tokens per row (default: %(default)s)",
    )
    parser.add_argument(
        "--align", type=int, default=8, metavar="N", help="intermediate sizes are multiples of this (default: 8)"
    )
    parser.add_argument(
        "--axes",
        type=_names,
        default=DEFAULT_AXES,
        metavar="A,A",
        help=f"what may be pruned, of {', '.join(AXES)}; ratios still refer to all prunable parameters (default: "
        f"{','.join(DEFAULT_AXES)})",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add_choice(parser, "--device", get_args(Device), "auto", "device to run on")
    parser.add_argument(
        "--out", type=Path, default=Path("numprune-compare"), metavar="DIR", help="default: %(default)s"
    )
    return parser


def _request(args: argparse.Namespace) -> Request:
    require_writable(args.out)
    folder = model_folder(args.model)
    config = read_config(folder)
    anatomy = read_anatomy(config)
    if anatomy.task not in ("causal-lm", "image-classification"):
        raise InputError(
            f"{args.model}: only causal language models and image classifiers can be compared; the task of this one is "
            f"{anatomy.task}"
        )
    if anatomy.image is not None and not (args.text and args.heldout):
        raise InputError("image classifiers are compared on images: give --text and --heldout, folders of images")
    target = Target(args.align)
    Limits(axes=args.axes).check(anatomy)

    def works(method: str) -> None:
        for ratio in args.ratios:
            check(method, anatomy, ratio, target, args.axes)

    methods, left_out = chosen(args.methods or defaults(works), works, asked=bool(args.methods))
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    if not methods:
        raise InputError("--methods: none of them is applicable to this model at all --ratios")
    return Request(
        model=folder,
        name=model_name(args.model),
        text=args.text or EMBEDDED,
        heldout=args.heldout or (None if args.text else EMBEDDED),
        reading=reading(args, [*(args.text or []), *(args.heldout or [])]),
        ratios=args.ratios,
        methods=methods,
        samples=args.samples,
        sequence_length=_LENGTH if anatomy.image else row_length(args.sequence_length, anatomy),
        align=args.align,
        axes=tuple(args.axes),
        seed=args.seed,
        device=device_of(args.device).type,
        out=args.out,
    )


def _list(kind: Callable[[str], T], what: str, text: str) -> list[T]:
    """The values of a comma-separated argument, ascending, each once."""
    try:
        return sorted({kind(part): None for part in text.split(",")})  # type: ignore[type-var]
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r}: each must be {what}") from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
