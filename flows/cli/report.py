"""numprune report: shows one report, or several side by side, as an HTML page."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from numprune.errors import InputError, IntegrityError
from numprune.flows.cli.parser import Answer, Subcommands, command

if TYPE_CHECKING:
    from numprune.serving.report import Report

_FILE = "report.json"  # in the folder of a stage or release
_ONE, _SEVERAL = "numprune-report.html", "numprune-comparison.html"


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "report",
        report,
        "write a report, or several side by side, as one self-contained HTML page",
        "numprune report releases/my-llama-1f2e3d4c5b6a7988 other/report.json --out compared.html",
    )
    parser.add_argument(
        "reports", metavar="REPORT", nargs="+", type=Path, help="a report.json, or the folder of a stage or release"
    )
    parser.add_argument(
        "--out",
        metavar="PAGE",
        type=Path,
        help=f"an .html file, replaced if it exists (default: {_ONE} or {_SEVERAL})",
    )


def report(args: argparse.Namespace) -> Answer:
    from numprune.serving.report import page, replace

    if len(args.reports) > page.MAXIMUM_REPORTS:
        raise InputError(f"{len(args.reports)} reports; a page compares at most {page.MAXIMUM_REPORTS}")
    out = _destination(args.out or Path(_ONE if len(args.reports) == 1 else _SEVERAL))
    read = [(str(path), _read(path)) for path in args.reports]
    several = len(read) > 1
    try:
        replace(out, page.comparison(read) if several else page.html(read[0][1]))
    except OSError as error:
        raise InputError(
            f"{out}: the page cannot be written here: {error.strerror}; give another place with --out"
        ) from None
    different = page.differences([found for _, found in read]) if several else []
    data = {
        "page": str(out),
        "reports": [
            {"report": path, "run_id": found.run_id, "outcome": found.verdict.outcome if found.verdict else None}
            for path, found in read
        ],
        "differences": [{"name": name, "consequence": consequence} for name, consequence in different],
    }
    return Answer(data, "\n".join([*_lines(read), *(f"  {name}: {what}" for name, what in different), f"page {out}"]))


def _lines(read: Sequence[tuple[str, "Report"]]) -> list[str]:
    return [f"{path}: {found.verdict.outcome if found.verdict else 'not judged'}" for path, found in read]


def _destination(out: Path) -> Path:
    """Validate the output path before reading anything; a page must not overwrite a report."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out}: the page is HTML; give a name ending in .html")
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"--out {out}: {'a folder' if out.is_dir() else f'there is no folder {out.parent}'}")
    return out


def _read(path: Path) -> "Report":
    """Read and verify a report. Raises InputError, IntegrityError."""
    from numprune.export import manifest
    from numprune.serving import gates
    from numprune.serving import report as reports

    file = path / _FILE if path.is_dir() else path
    if not file.exists():
        what = f"this folder has no {_FILE}" if path.is_dir() else "no such file or folder"
        raise InputError(f"{path}: {what}; reports are in the folders of stages `report-…` and in every release")
    if file.name == _FILE and (file.parent / manifest.FILE_NAME).is_file():
        entry = manifest.read(file.parent).files.get(_FILE)
        if entry is None:
            raise IntegrityError(f"{file}: not listed in the manifest beside it")
        manifest.verify_file(file, entry)
    found = reports.read(file)
    if found.verdict is not None:
        try:
            gates.confirm(found)
        except IntegrityError as error:
            raise IntegrityError(f"{file}: {error}") from None
    return found
