"""numprune timings: measure the latency of a model's blocks, for budgets of time."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from numprune.errors import InputError
from numprune.flows import names
from numprune.flows.cli.parser import MODEL, Answer, Subcommands, add_choice, add_seed, at_least, check_out, command

if TYPE_CHECKING:
    from numprune.timings import ScenarioTimes, TimingTable

_SIZES, _MOST_SIZES, _VISITS = 8, 12, 5


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "timings",
        timings,
        "measure the latency of a model's blocks at several sizes, for numprune prune --budget in milliseconds",
        "numprune timings ./my-model --runtime onnxruntime --scenario decode,b=1,ctx=512 --out timings.json",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    add_choice(parser, "--runtime", get_args(names.TimedRuntime), None, "runtime to measure in")
    parser.add_argument(
        "--scenario",
        nargs="+",
        action="extend",
        required=True,
        metavar="SCENARIO",
        help="what to time: decode,b=BATCH,ctx=TOKENS (one step of the batch with so many tokens in the KV cache) or "
        "prefill,b=BATCH,len=TOKENS; may be repeated",
    )
    parser.add_argument("--out", required=True, metavar="TABLE", type=Path, help="the file to write; must not exist")
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default=_SIZES,
        metavar="N",
        help=f"sizes of each kind of block, 2 to {_MOST_SIZES}; pruning to a budget of time chooses among them "
        f"(default: {_SIZES})",
    )
    parser.add_argument(
        "--align", type=at_least(1), default=8, metavar="N", help="intermediate sizes are multiples of N (default: 8)"
    )
    parser.add_argument(
        "--visits",
        type=at_least(3),
        default=_VISITS,
        metavar="N",
        help=f"measurements of each model, spread over the run in random order (default: {_VISITS})",
    )
    add_seed(parser)


def _sizes(text: str) -> int:
    value = int(text)
    if not 2 <= value <= _MOST_SIZES:
        raise argparse.ArgumentTypeError(f"{value} must be from 2 to {_MOST_SIZES}")
    return value


_sizes.__name__ = "int"  # argparse's "invalid int value"


def timings(args: argparse.Namespace) -> Answer:
    from numprune.export import checkpoint
    from numprune.flows.steps.timings import Request, measure
    from numprune.scenario import parse_scenario
    from numprune.serving.report import replace
    from numprune.target import Target

    started = time.perf_counter()
    check_out(args.out)
    scenarios = [parse_scenario(text) for text in args.scenario]
    if len(set(scenarios)) < len(scenarios):
        raise InputError("--scenario: the same scenario is given twice; omit one")
    base = checkpoint.resolve(args.model)
    asked = Request(args.runtime, scenarios, Target(align=args.align), args.sizes, args.visits, args.seed)
    table = measure(base, asked, args.out.absolute().parent)
    replace(args.out, table.to_json())
    seconds = time.perf_counter() - started
    data = {"out": str(args.out), **table.model_dump(mode="json"), "seconds": seconds}
    return Answer(data, "\n".join([*_lines(table), f"{args.out}: measured in {seconds:.0f} s"]))


def _lines(table: "TimingTable") -> list[str]:
    key = table.key
    lines = [f"{key.runtime}, {key.dtype}, {key.device}, {key.threads} threads"]
    for times in table.scenarios:
        lines += [f"{times.scenario}: drift {table.drift[times.scenario] - 1:+.1%}", *_times(times)]
    return lines


def _times(times: "ScenarioTimes") -> list[str]:
    rows = [("embeddings, head", times.around)]
    for kind, measured in times.blocks.items():
        rows += [(f"{kind} {one.units}" + (f"x{one.members}" if one.members > 1 else ""), one) for one in measured]
    return [
        f"  {name:<24} {one.ms:>10.4g} ms  (95 % interval {one.interval95[0]:.4g} to {one.interval95[1]:.4g})"
        for name, one in rows
    ]
