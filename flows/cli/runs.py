"""numprune runs: lists, shows and cleans up the runs of a workspace."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numprune.counted import counted
from numprune.flows.amounts import size
from numprune.flows.cli.parser import Answer, Parser, Subcommands, add_workspace, at_least, command, group

if TYPE_CHECKING:
    from numprune.flows.clean import Item
    from numprune.flows.runs import RecordedRun

_LINES = 20  # of the log
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def add(commands: Subcommands) -> None:
    verbs = group(
        commands,
        "runs",
        "list and show the runs of a workspace, and delete unused workspace data",
        "numprune runs list",
    )

    def add_one(verb: str, run: Callable[[argparse.Namespace], Answer], text: str, example: str) -> Parser:
        parser = command(verbs, verb, run, text, f"numprune runs {example}")
        add_workspace(parser)
        return parser

    add_one("list", list_all, "list the runs of a workspace, newest first", "list --workspace /data/numprune")
    shown = add_one("show", show, "show a run: stages with time and memory, outcome, log", "show 20261121")
    shown.add_argument("which", nargs="?", metavar="RUN", help="run id or a prefix of it (default: the newest)")
    cleaned = add_one(
        "clean",
        clean,
        "find unused workspace data (stages, unpublished releases, unfinished folders); --yes deletes it",
        "clean --keep 10 --older-than 30d --yes",
    )
    cleaned.add_argument(
        "--keep", type=at_least(0), metavar="N", help="forget all but the newest N runs (default: forget none)"
    )
    cleaned.add_argument(
        "--older-than",
        type=_age,
        metavar="AGE",
        help="forget runs older than this: 12h, 30d, 8w; with --keep, both must hold (default: forget none)",
    )
    cleaned.add_argument("--yes", action="store_true", help="delete it (default: only list)")


def list_all(args: argparse.Namespace) -> Answer:
    from numprune.flows import clean, runs

    workspace = _workspace(args)
    found = runs.list_runs(workspace)
    folders = sorted(path for path in workspace.iterdir() if path.is_dir()) if workspace.is_dir() else []
    used = {path.name: clean.size(path) for path in folders if not path.is_symlink()}
    lines = [_line(run) for run in found] or [f"{workspace}: no run was recorded here"]
    lines += ["", "disk: " + ", ".join(f"{name} {size(count)}" for name, count in used.items())] if used else []
    data = {"workspace": str(workspace), "runs": [_data(run) for run in found], "disk": used}
    return Answer(data, "\n".join(lines))


def show(args: argparse.Namespace) -> Answer:
    from numprune.flows import runs

    workspace = _workspace(args)
    run = runs.find(workspace, args.which)
    log = runs.log_tail(run, _LINES)
    lines = [_line(run)]
    if run.problem:
        lines.append(f"  problem   {run.problem}")
    if run.record:
        record = run.record
        facts = {
            "recipe": f"{record.source} ({record.recipe[:12]})",
            "error": record.error,
            "report": record.report and f"{workspace / record.report}",
            "release": record.release and f"{workspace / record.release}",
            "published": record.version,
        }
        lines += [f"  {name:<9} {value}" for name, value in facts.items() if value]
        lines += ["", f"  {'stage':<28} {'seconds':>9} {'peak memory':>12} {'on disk':>10}"]
        for stage in record.stages:
            numbers = f"{stage.seconds:>9.1f} {size(stage.peak_memory_bytes):>12} {size(stage.bytes):>10}"
            gone = "" if (workspace / "stages" / stage.folder).exists() else "  removed since"
            lines.append(f"  {stage.name:<28} {numbers}{'  reused' if stage.reused else ''}{gone}")
    if log:
        lines += ["", *(f"  {_readable(line)}" for line in log)]
    return Answer({**_data(run), "folder": str(run.folder), "log": log}, "\n".join(lines))


def clean(args: argparse.Namespace) -> Answer:
    from numprune.flows import clean as cleaning

    workspace = _workspace(args)
    found = cleaning.look(workspace, args.keep, args.older_than)
    went, busy = cleaning.remove(workspace, found) if args.yes else ([], [])
    freed = sum(item.bytes for item in went)
    lines = [*map(_item_line, found.goes)]
    lines += [f"{_item_line(item)}: stays" for item in found.stays]
    lines += [f"{item.path}: in use again, kept" for item in busy]
    if args.yes:
        lines.append(f"removed {counted(len(went), 'folder')}, {size(freed)}")
    elif found.goes:
        lines.append(f"{size(found.bytes)} can be removed: run the same command with --yes")
    else:
        lines.append("nothing to remove")
    data = {
        "workspace": str(workspace),
        "disk": found.used,
        "goes": [_item(item) for item in found.goes],
        "stays": [_item(item) for item in found.stays],
        "bytes": found.bytes,
        "done": args.yes,
        "removed": [str(item.path) for item in went],
        "busy": [str(item.path) for item in busy],
        "freed_bytes": freed,
    }
    return Answer(data, "\n".join(lines))


def _workspace(args: argparse.Namespace) -> Path:
    from numprune.flows.stages import workspace_folder

    return workspace_folder(args.workspace)


def _age(text: str) -> timedelta:
    match = re.fullmatch(r"([0-9]{1,4})([hdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age; write 12h, 30d or 8w")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _data(run: "RecordedRun") -> dict[str, Any]:
    record = run.record.model_dump(mode="json", by_alias=True) if run.record else {}
    return {**record, "run": run.run, "state": run.state, "problem": run.problem}


def _line(run: "RecordedRun") -> str:
    record = run.record
    if record is None:
        return f"{run.run}  {run.started:%Y-%m-%d %H:%M} UTC  {run.state}"
    took = f"{record.seconds:.0f} s" if record.seconds is not None else "-"
    made = sum(not stage.reused for stage in record.stages)
    parts = [f"{run.started:%Y-%m-%d %H:%M} UTC", f"{run.state:<12}", f"{took:>7}"]
    parts += [f"{made} of {len(record.stages)} stages made", record.name, record.version or ""]
    return "  ".join([run.run, *parts]).rstrip()


def _item(item: "Item") -> dict[str, Any]:
    return {"kind": item.kind, "path": str(item.path), "bytes": item.bytes, "why": item.why}


def _item_line(item: "Item") -> str:
    return f"{item.kind:<9} {size(item.bytes):>10}  {item.path}: {item.why}"


def _readable(line: str) -> str:
    """A log line in readable form; a truncated line is unchanged."""
    try:
        found = json.loads(line)
        parts: Sequence[Any] = (found["time"], found["level"], found["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return line
    text = "  ".join(map(str, parts))
    return "".join(mark if mark.isprintable() else " " for mark in text)
