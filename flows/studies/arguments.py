"""Helpers shared by the studies' commands: arguments, exit codes and output."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from numprune.errors import DiskError, InputError, NumpruneError
from numprune.export.disk import require_writable
from numprune.flows.names import EMBEDDED

T = TypeVar("T")


def parser_of(study: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser without arguments; `study`: the module below flows/studies."""
    return argparse.ArgumentParser(
        prog=f"python -m numprune.flows.studies.{study}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model and its calibration text."""
    parser.add_argument(
        "model", nargs="?", default=EMBEDDED, help="a Hugging Face folder (default: the embedded model)"
    )
    parser.add_argument("--calibration", nargs="+", metavar="FILE", help="calibration text (default: embedded)")


def add_heldout(parser: argparse.ArgumentParser) -> None:
    """Add the held-out text."""
    parser.add_argument("--heldout", nargs="+", metavar="FILE", help="held-out text (default: embedded)")


def each_once(option: str, values: Sequence[T]) -> Sequence[T]:
    """Return the values of a comma-separated option. Raises InputError if one is repeated."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise InputError(f"{option}: {value} is given twice")
    return values


def out_folder(text: str) -> Path:
    """Argument type: a folder to write in. It need not exist, but it must be possible to create it."""
    try:
        require_writable(Path(text))
    except DiskError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def run(study: str, body: Callable[[argparse.Namespace], str], args: argparse.Namespace) -> int:
    """Print the result of `body`, with progress on stderr. Return the exit code: 0 done, 1 error."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("numprune").setLevel(logging.INFO)
    try:
        sys.stdout.write(body(args))
    except NumpruneError as error:
        print(f"{study}: error: {error}", file=sys.stderr)
        return 1
    return 0


def write_results(out: Path | None, study: str, table: str, data: Any) -> None:
    """Write the table and all measurements into `out`, if given."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{study}.md").write_text(table, encoding="utf-8")
        (out / f"{study}.json").write_text(json.dumps(data, indent=2, allow_nan=False), encoding="utf-8")
