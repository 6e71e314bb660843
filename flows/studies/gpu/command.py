"""python -m numprune.flows.studies.gpu: the command. Every part runs in its own process with a time limit."""

import argparse
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
import transformers

import numprune
from numprune.errors import MissingRuntime, NumpruneError
from numprune.flows.studies.arguments import out_folder
from numprune.flows.studies.gpu.parts import PARTS
from numprune.flows.studies.gpu.sizes import LLAMA_3_8B, MINIATURE
from numprune.flows.studies.gpu.tables import as_markdown
from numprune.serving.report import environment

_EPILOG = """\
  python -m numprune.flows.studies.gpu --out docs/gpu
  python -m numprune.flows.studies.gpu --out /tmp/gpu --miniature

Writes DEVICE.json and DEVICE.md. Exit code: 0 if every check passed and every part finished, otherwise 1; completed
measurements are written in any case.
"""
_MINIATURE_LIMIT = 600  # seconds per part; a busy CPU may be slow
_ROWS = "rows"  # characters of a part's output in its result
_PROBLEM = "problem"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.part:
        return _run_part(args.part, device, args.miniature)
    try:
        if device.type == "cpu" and not args.miniature:
            raise MissingRuntime(
                f"torch {torch.__version__} sees no CUDA device; run it on a machine with an NVIDIA GPU, or try it on "
                "a CPU with --miniature"
            )
        args.out.mkdir(parents=True, exist_ok=True)
    except (NumpruneError, OSError) as error:
        print(f"gpu: error: {error}", file=sys.stderr)
        return 1
    record = _measure(device, args.miniature)
    name = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-") + ("-miniature" if args.miniature else "")
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (args.out / f"{name}.md").write_text(as_markdown(record), encoding="utf-8")
    print(f"gpu: wrote {args.out / name}.json and .md", file=sys.stderr)
    problems = [f"{name}: {part[_PROBLEM]}" for name, part in record["parts"].items() if part[_PROBLEM]]
    problems += [f"{row['check']}: {row[_PROBLEM]}" for row in record["parts"]["checks"][_ROWS] if row[_PROBLEM]]
    for problem in problems:
        print(f"gpu: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _measure(device: torch.device, miniature: bool) -> dict[str, Any]:
    start = time.monotonic()
    uses_gpu = device.type == "cuda"
    before = environment.capture(uses_gpu=uses_gpu)
    parts = {}
    for number, (name, part) in enumerate(PARTS.items(), 1):
        limit = _MINIATURE_LIMIT if miniature else part.limit
        _progress(f"part {number} of {len(PARTS)}: {name}, at most {limit} s")
        parts[name] = run_limited(_command(name, miniature), limit)
    machine = environment.combine(before, environment.capture(uses_gpu=uses_gpu))
    return {
        "device": torch.cuda.get_device_name(device) if uses_gpu else machine.cpu,
        "miniature": miniature,
        "environment": machine.model_dump(mode="json"),
        "versions": {
            "numprune": numprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cuda": torch.version.cuda,
        },
        "seconds": time.monotonic() - start,
        "parts": parts,
    }


def _command(part: str, miniature: bool) -> list[str]:
    command = [sys.executable, "-m", "numprune.flows.studies.gpu", "--part", part]
    return [*command, "--miniature"] if miniature else command


def run_limited(command: Sequence[str], limit: float) -> dict[str, Any]:
    """Run a process that prints rows of JSON, at most `limit` s; return its output.

    Returns:
        "rows", "seconds", and "problem": None if the process ended well.
    """
    start, problem = time.monotonic(), None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate(timeout=limit)
            if process.returncode:
                problem = f"ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:g} s"
            process.kill()
            printed, _ = process.communicate()
        except BaseException:
            process.kill()
            raise
    lines = printed.splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]  # no partial row
    if rows and "error" in rows[-1]:
        problem = rows.pop()["error"]
    return {_ROWS: rows, _PROBLEM: problem, "seconds": time.monotonic() - start}


def _run_part(name: str, device: torch.device, miniature: bool) -> int:
    """Print the rows of a part, one per line."""
    try:
        for row in PARTS[name].rows(device, MINIATURE if miniature else LLAMA_3_8B, _progress):
            print(json.dumps(row), flush=True)
    except Exception as error:  # it goes into the record
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return 1
    return 0


def _progress(what: str) -> None:
    print(f"gpu: {what}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m numprune.flows.studies.gpu",
        description="Check and measure numprune on a GPU, in under eight minutes: the checks that need one, the time "
        "of pruning a layer of Llama-3-8B's size, and prefill and decoding of narrower models in torch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=out_folder, help="folder for the results")
    what.add_argument("--part", choices=PARTS, help="run one part in this process and print its rows as JSON")
    parser.add_argument(
        "--miniature",
        action="store_true",
        help="toy sizes, on a CPU if there is no GPU: tries everything, but the figures are meaningless",
    )
    return parser
