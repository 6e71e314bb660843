"""python -m numprune.flows.studies.genai: the command."""

import argparse
import importlib.util
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from numprune.anatomy import context_of
from numprune.counted import counted
from numprune.documents import Reading
from numprune.errors import InputError, MissingRuntime
from numprune.export import checkpoint, processors
from numprune.export.genai import check_config
from numprune.flows import children
from numprune.flows.names import EMBEDDED
from numprune.flows.steps.models import model_folder, model_name
from numprune.flows.steps.prune import device_of
from numprune.flows.steps.quantize import check_request, quantize_checkpoint
from numprune.flows.steps.text import calibration_rows, text_rows
from numprune.flows.studies.arguments import add_heldout, add_model, out_folder, parser_of, run, write_results
from numprune.flows.studies.genai.contenders import BUILDER, CONTENDERS, SCHEMES, TORCH, Contender, make
from numprune.progress import Progress
from numprune.serving.benchmark.client import Worker, start_worker
from numprune.serving.benchmark.estimators import paired_ratio
from numprune.serving.benchmark.scheduler import standing_still
from numprune.serving.report import capture

_LOADING_S = 900.0
_EPILOG = """\
  python -m numprune.flows.studies.genai
  python -m numprune.flows.studies.genai MODEL --calibration train.txt --heldout heldout.txt --out results

Each contender runs in its own process. They take turns in random order, while the others are suspended. Needs the extra
`genai`.
"""


@dataclass(frozen=True)
class Result:
    """The results of one contender.

    Attributes:
        rates: decoded tokens/s, one per turn.
        nll: nats per token of the held-out rows.
        megabytes: of the graph and its weights, or of the checkpoint.
    """

    contender: Contender
    rates: Sequence[float]
    nll: float
    megabytes: float

    @property
    def rate(self) -> float:
        return median(self.rates)


def markdown(results: Sequence[Result], conditions: str) -> str:
    """Return the table. Ratios are paired by turn; the builder's best is its fastest model of the same precision."""
    eager = next(one for one in results if one.contender.maker == TORCH)
    lines = [
        "| model | weights, MB | tokens/s | times PyTorch, eager (95 % interval) | times the builder's best "
        "(95 % interval) | NLL, nats/token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in results:
        built = [
            other
            for other in results
            if other.contender.maker == BUILDER and other.contender.precision == one.contender.precision
        ]
        best = max(built, key=lambda other: other.rate, default=None)
        ratios = [_ratio(one, eager), _ratio(one, best) if best else "-"]
        cells = [one.contender.name, f"{one.megabytes:,.1f}", f"{one.rate:,.1f}", *ratios, f"{one.nll:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", conditions, ""])


def _ratio(one: Result, other: Result) -> str:
    if one is other:
        return "1"
    found = paired_ratio(one.rates, other.rates)
    lower, upper = found["interval95"]
    return f"{found['value']:.2f} [{lower:.2f}, {upper:.2f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 error."""
    return run("genai", _study, _parser().parse_args(argv))


def _study(args: argparse.Namespace) -> str:
    contenders = _chosen(args.contenders)
    if min(args.prompt_length, args.steps, args.windows, args.samples) < 1 or args.sequence_length < 2:
        raise InputError("--prompt-length, --steps, --windows and --samples must be at least 1, --sequence-length 2")
    if args.repeats < 2:
        raise InputError(f"--repeats is {args.repeats}; an interval needs at least 2")
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingRuntime("onnxruntime-genai is not installed; run: pip install 'numprune[genai]'")
    base = model_folder(args.model)
    config = checkpoint.read_config(base)
    check_config(config)
    context = context_of(config)
    if args.prompt_length + args.steps > context:
        raise InputError(
            f"--prompt-length + --steps is {args.prompt_length + args.steps}; the model takes at most {context} tokens"
        )
    if args.sequence_length > context:
        raise InputError(f"--sequence-length is {args.sequence_length}; the model takes at most {context} tokens")
    sources = dict.fromkeys(one.source for one in contenders)
    for precision, bits in sources:
        if precision in SCHEMES:
            check_request(base, SCHEMES[precision], lm_head_bits=bits)
    tokenizer, length = checkpoint.load_tokenizer(base), args.sequence_length
    rows, draw = calibration_rows(args.calibration or EMBEDDED, tokenizer, args.samples, length, 0, Reading())
    heldout = text_rows(args.heldout or EMBEDDED, "heldout", tokenizer, length, Reading())
    scored = [row.tolist() for row in heldout.rows if len(row) == length][: args.windows]
    if not scored:
        raise InputError(
            f"--heldout: no document has {length} tokens; give longer text, or a smaller --sequence-length"
        )
    prompt = [token for row in scored for token in row][: args.prompt_length]
    threads = args.threads or processors.quota() or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="numprune-genai-") as scratch:
        checkpoints = dict.fromkeys(sources, base)
        for precision, bits in sources:
            if scheme := SCHEMES.get(precision):
                print(f"genai: quantizing to {scheme}", file=sys.stderr)
                out = checkpoints[precision, bits] = Path(scratch) / f"{precision}-{bits}"
                where = device_of("cpu")
                children.call(quantize_checkpoint, base, scheme, out, where, rows=rows, draw=draw, lm_head_bits=bits)
        folders = {}
        for one in contenders:
            print(f"genai: making {one.name}", file=sys.stderr)
            folders[one] = make(one, checkpoints, Path(scratch))
        rates, nlls = _measured(folders, prompt, scored, args.steps, args.repeats, threads)
        results = [Result(one, rates[one], nlls[one], _megabytes(folder)) for one, folder in folders.items()]
    machine = capture(uses_gpu=False, own_processes=[])
    conditions = (
        f"{model_name(args.model)} on {counted(threads, 'thread')} of {machine.cpu}; a prompt of "
        f"{counted(len(prompt), 'token')}, then {args.steps} decoded one by one; medians of {args.repeats} turns in "
        f"random order; NLL of {sum(len(row) - 1 for row in scored):,} held-out tokens; numprune's int8 and int4 are "
        f"w8a8 and w4a16 (groups of 64) by GPTQ on {counted(args.samples, 'row')} of {length} tokens, with the output "
        "matrix rounded to 8 bits, or to 4 by GPTQ."
    )
    text = markdown(results, conditions)
    write_results(args.out, "genai", text, _record(results, machine, args))
    return text


def _chosen(wanted: Sequence[str]) -> Sequence[Contender]:
    """Return the contenders whose names contain one of the words, and PyTorch as the reference. Raises InputError."""
    if unknown := [word for word in wanted if not any(word in one.name for one in CONTENDERS)]:
        raise InputError(
            f"--contenders: {unknown[0]!r} matches no name; available: {'; '.join(one.name for one in CONTENDERS)}"
        )
    return [one for one in CONTENDERS if one.maker == TORCH or any(word in one.name for word in wanted)]


def _measured(
    folders: Mapping[Contender, Path],
    prompt: Sequence[int],
    scored: Sequence[Sequence[int]],
    steps: int,
    repeats: int,
    threads: int,
) -> tuple[dict[Contender, list[float]], dict[Contender, float]]:
    """Return the tokens/s of each turn, and the NLL."""
    order, turns = random.Random(0), list(folders)
    rates: dict[Contender, list[float]] = {one: [] for one in folders}
    nlls = {}
    with ExitStack() as stack, Progress(len(folders) * (repeats + 1), "genai", "turn", leave=True) as bar:
        command = [sys.executable, "-P", "-m", "numprune.flows.studies.genai.worker", str(os.getpid())]
        workers: dict[Contender, Worker] = {}
        for one, folder in folders.items():
            with standing_still(worker.pid for worker in workers.values()):
                worker = stack.enter_context(start_worker(one.name, _LOADING_S, command))
                worker.ask("load", program=one.program, folder=str(folder), threads=threads)
                nlls[one] = worker.ask("nll", rows=scored)
                worker.ask("decode", prompt=prompt, steps=steps)  # warms up
            workers[one] = worker
            bar.update()
        for _ in range(repeats):
            order.shuffle(turns)
            for one in turns:
                with standing_still(worker.pid for other, worker in workers.items() if other is not one):
                    rates[one].append(1 / workers[one].ask("decode", prompt=prompt, steps=steps))
                bar.update()
    return rates, nlls


def _megabytes(folder: Path) -> float:
    graph = [path.stat().st_size for path in folder.glob("*.onnx*")]
    return (sum(graph) if graph else checkpoint.weight_bytes(folder)) / 1e6


def _record(results: Sequence[Result], machine: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return all measurements as plain JSON."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {
        "settings": settings,
        "environment": machine.model_dump(mode="json"),
        "results": [
            {"name": one.contender.name, "tokens_per_s": one.rates, "nll_nats_per_token": one.nll, "mb": one.megabytes}
            for one in results
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("genai", sys.modules["numprune.flows.studies.genai"].__doc__, _EPILOG)
    add_model(parser)
    add_heldout(parser)
    parser.add_argument("--contenders", nargs="+", default=[""], metavar="PART", help="of their names (default: all)")
    parser.add_argument("--samples", type=int, default=32, help="calibration rows (default %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens per row (default %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="held-out rows at most (default %(default)s)")
    parser.add_argument("--prompt-length", type=int, default=128, help="tokens (default %(default)s)")
    parser.add_argument("--steps", type=int, default=48, help="tokens decoded in a turn (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="turns of each (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of each process (default: the CPUs it may use)")
    parser.add_argument("--out", type=out_folder, help="folder for genai.md and genai.json")
    return parser
