"""Compare the dense model and pruned ones on vLLM servers in one run.

    python -m numprune.flows.studies.served [MODEL] [--calibration FILE …] [--ratio 0.3] [--methods M,M] [--out DIR]

A method is criterion/allocation/compensation; the defaults are one with equal layers and one with layers of different
sizes. Prunes, exports, starts all servers, measures them in turn and prints a Markdown table; `--out` keeps it, and all
measurements as JSON.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint, vllm
from numprune.flows import children
from numprune.flows.names import EMBEDDED
from numprune.flows.steps.models import model_folder
from numprune.flows.steps.prune import device_of, prune_checkpoint
from numprune.flows.steps.text import calibration_rows
from numprune.flows.studies.arguments import add_model, out_folder, parser_of, run, write_results
from numprune.options import PruneOptions
from numprune.serving.benchmark.vllm import ServedLoad, run_served
from numprune.serving.report import Environment as Machine
from numprune.serving.report import Percentiles, ReportedEstimate, RuntimeMemory, RuntimeSpeed, SpeedSide
from numprune.serving.vllm import environment
from numprune.target import Target

METHODS = ("obs/uniform/joint", "obs/error/joint")
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """A model's name, its parameters, and the result of `run_served`; for the dense model, that of any other model."""

    name: str
    parameters: int
    found: Mapping[str, Any]

    @property
    def speed(self) -> RuntimeSpeed:
        return RuntimeSpeed.model_validate(self.found["speed"])

    @property
    def memory(self) -> RuntimeMemory:
        return RuntimeMemory.model_validate(self.found["memory"])


def markdown(rows: Sequence[Row], load: ServedLoad) -> str:
    """Return the table and its conditions, a line per model and concurrency; the first of `rows` is the dense model."""
    lines = [
        f"| model | parameters | tokens in {load.kv_cache_mib} MiB of KV cache | requests at a time | output tokens/s "
        "| of dense (95 % interval) | TTFT p50, ms | TPOT p50, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        dense = row is rows[0]
        memory = row.memory.baseline if dense else row.memory.candidate
        for level, speed in row.speed.concurrency.items():
            side = speed.baseline if dense else speed.candidate
            ratio = None if dense or speed.output_tokens_per_s is None else speed.output_tokens_per_s.ratio
            cells = [
                row.name,
                f"{row.parameters:,}",
                f"{memory.kv_tokens:,}",
                level,
                _rate(side),
                "1" if dense else _interval(ratio),
                _p50(side.ttft_ms),
                _p50(side.tpot_ms),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    machine = Machine.model_validate(rows[0].found["environment"])
    runtime = rows[0].speed.runtime
    lines += [
        "",
        f"vLLM {runtime.get('vllm')} on {machine.cores} cores of {machine.cpu}"
        f"{f' and {machine.gpu.name}' if machine.gpu else ''}; prompts of {load.prompt_length} tokens, "
        f"{load.output_length} tokens each; {load.repeats} repeats of {load.prompts} requests in each stream, all "
        "servers in turn.",
        *(
            f"Not valid, {row.name}: {reason}"
            for row in rows[1:]
            for reason in Machine.model_validate(row.found["environment"]).reasons
        ),
    ]
    return "\n".join(lines) + "\n"


def _rate(side: SpeedSide) -> str:
    return "-" if side.output_tokens_per_s is None else f"{side.output_tokens_per_s:,.1f}"


def _p50(found: Percentiles | None) -> str:
    return "-" if found is None or found.p50 is None else f"{found.p50:.1f}"


def _interval(ratio: ReportedEstimate | None) -> str:
    if ratio is None or ratio.value is None:
        return "-"
    lower, upper = ratio.interval95
    return f"{ratio.value:.2f} ({lower:.2f} to {upper:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("served", __doc__)
    add_model(parser)
    parser.add_argument("--ratio", type=float, default=0.3, help="share to remove (default %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default %(default)s)")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows (default %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens per row (default %(default)s)")
    parser.add_argument("--align", type=int, default=8, help="of intermediate sizes (default %(default)s)")
    load = ServedLoad()
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(load.concurrency), metavar="N")
    for field in ("prompts", "prompt_length", "output_length", "repeats", "kv_cache_mib"):
        option = f"--{field.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(load, field), help="default %(default)s")
    parser.add_argument("--vllm", metavar="ENV", help="virtual environment with vLLM (default: .venv-vllm)")
    parser.add_argument("--out", type=out_folder, help="folder for served.md and served.json")
    return run("served", _served, parser.parse_args(argv))


def _served(args: argparse.Namespace) -> str:
    load = ServedLoad(
        prompts=args.prompts,
        prompt_length=args.prompt_length,
        output_length=args.output_length,
        concurrency=tuple(args.concurrency),
        repeats=args.repeats,
        kv_cache_mib=args.kv_cache_mib,
    )
    options = {method: _options(method, args.ratio, args.align) for method in args.methods.split(",")}
    base = model_folder(args.model)
    found = environment.find(args.vllm)  # before the work
    tokenizer = checkpoint.load_tokenizer(base)
    text = args.calibration or EMBEDDED
    rows, _ = calibration_rows(text, tokenizer, args.samples, args.sequence_length, 0, Reading())
    with tempfile.TemporaryDirectory(prefix="numprune-served-") as scratch:
        vllm.export(base, Path(scratch) / DENSE)
        candidates: dict[str, Path] = {}
        parameters: dict[str, int] = {}
        for index, (method, chosen) in enumerate(options.items()):
            print(f"pruning: {method}", file=sys.stderr)
            pruned, exported = Path(scratch) / f"pruned-{index}", Path(scratch) / f"served-{index}"
            figures = children.call(prune_checkpoint, base, rows, chosen, pruned, device_of("auto"))
            vllm.export(pruned, exported)
            candidates[method] = exported
            parameters |= {
                DENSE: figures.before.parameters,
                method: figures.after.parameters,
            }
        results = run_served(candidates, Path(scratch) / DENSE, found, load)
    any_result = next(iter(results.values()))
    table = [Row(DENSE, parameters[DENSE], any_result)]
    table += [Row(method, parameters[method], result) for method, result in results.items()]
    text = markdown(table, load)
    write_results(args.out, "served", text, results)
    return text


def _options(method: str, ratio: float, align: int) -> PruneOptions:
    parts = method.split("/")
    if len(parts) != 3:
        raise InputError(f"method is {method!r}; it must be criterion/allocation/compensation")
    return PruneOptions(
        ratio, criterion=parts[0], allocation=parts[1], compensation=parts[2], target=Target(align=align)
    )


if __name__ == "__main__":
    sys.exit(main())
