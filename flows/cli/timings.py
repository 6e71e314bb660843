"""numprune timings: measure the latency of a model's blocks, for budgets of time."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from numprune.errors import InputError
from numprune.flows import names
from numprune.flows.cli.parser import (
    MODEL,
    Answer,
    Subcommands,
    add_choice,
    add_dtype,
    add_group_size,
    add_lm_head_bits,
    add_seed,
    at_least,
    check_out,
    command,
)
from numprune.roofline import DEVICES, peaks_of

if TYPE_CHECKING:
    from numprune.timings import ScenarioTimes, TimingTable

_VISITS = 5


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "timings",
        timings,
        "measure the latency of a model's blocks at several sizes, for numprune prune --budget in milliseconds",
        "numprune timings ./my-model --runtime onnxruntime --scenario decode,b=1,ctx=512 --out timings.json",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    where = parser.add_mutually_exclusive_group(required=True)
    runtimes = get_args(names.TimedRuntime)
    where.add_argument(
        "--runtime",
        choices=runtimes,
        metavar="RUNTIME",
        help=f"runtime to measure in; one of {', '.join(runtimes)} (default: none)",
    )
    where.add_argument(
        "--roofline",
        choices=[*DEVICES],
        metavar="DEVICE",
        help="estimate instead, from the data sheet of a device that is not at hand; no gate on a speed can pass then; "
        f"one of {', '.join(DEVICES)} (default: none)",
    )
    where.add_argument(
        "--peak-tflops",
        type=_rate,
        metavar="N",
        help="estimate for another device: its peak in 10^12 dense FLOP/s, in the model's precision; needs --bandwidth "
        "(default: none)",
    )
    parser.add_argument(
        "--bandwidth",
        type=_rate,
        metavar="N",
        help="memory bandwidth of the device of --peak-tflops, in GB/s (default: none)",
    )
    parser.add_argument(
        "--scenario",
        nargs="+",
        action="extend",
        required=True,
        metavar="SCENARIO",
        help="what to time: decode,b=BATCH,ctx=TOKENS (one step of the batch with so many tokens in the KV cache), "
        "prefill,b=BATCH,len=TOKENS or request,b=BATCH,len=TOKENS,out=TOKENS (prompts and their answers); of encoders "
        "forward,b=BATCH,len=TOKENS, or forward,b=BATCH for images; may be repeated",
    )
    parser.add_argument("--out", required=True, metavar="TABLE", type=Path, help="the file to write; must not exist")
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default=names.TIMED_SIZES,
        metavar="N",
        help=f"sizes of each kind of block, 2 to {names.MOST_TIMED_SIZES}; a budget of time chooses among them, "
        f"so more usually give a better model (default: {names.TIMED_SIZES})",
    )
    parser.add_argument(
        "--align", type=at_least(1), default=8, metavar="N", help="intermediate sizes are multiples of N (default: 8)"
    )
    parser.add_argument(
        "--hidden-size",
        type=at_least(1),
        metavar="N",
        help="time the blocks, embeddings and head at this hidden size, for numprune prune --hidden-size N (default: "
        "the model's)",
    )
    parser.add_argument(
        "--basis",
        choices=get_args(names.Basis),
        metavar="BASIS",
        help="with --hidden-size: the basis for numprune prune; fisher has an output matrix separate from the "
        f"embedding; one of {', '.join(get_args(names.Basis))} (default: fisher)",
    )
    parser.add_argument(
        "--visits",
        type=at_least(3),
        metavar="N",
        help=f"measurements of each model, spread over the run in random order (default: {_VISITS})",
    )
    add_choice(
        parser,
        "--scheme",
        ("none", *get_args(names.Scheme)),
        "none",
        "time the model as numprune quantize stores it: format of weights (w) and activations (a)",
    )
    add_group_size(parser)
    add_lm_head_bits(parser, "of the output matrix with --scheme in onnxruntime")
    add_dtype(parser, "precision that the runtime computes in, without --scheme; auto as for numprune export")
    parser.add_argument(
        "--tensor-parallel",
        type=at_least(1),
        default=1,
        metavar="N",
        help="devices that share each layer, in vllm or estimated; on a CPU, N processes (default: 1)",
    )
    add_seed(parser)
    parser.set_defaults(seed=None)


def _sizes(text: str) -> int:
    value = int(text)
    if not 2 <= value <= names.MOST_TIMED_SIZES:
        raise argparse.ArgumentTypeError(f"{value} must be from 2 to {names.MOST_TIMED_SIZES}")
    return value


_sizes.__name__ = "int"  # argparse's "invalid int value"


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} must be more than 0, and finite")
    return value


_rate.__name__ = "float"


def timings(args: argparse.Namespace) -> Answer:
    from numprune.export import checkpoint
    from numprune.flows.steps.estimates import estimate
    from numprune.flows.steps.timings import Request, measure
    from numprune.hidden import Width
    from numprune.scenario import parse_scenario
    from numprune.served import served_as
    from numprune.serving.report import replace
    from numprune.target import Target

    started = time.perf_counter()
    check_out(args.out)
    scenarios = [parse_scenario(text) for text in args.scenario]
    if len(set(scenarios)) < len(scenarios):
        raise InputError("--scenario: the same scenario is given twice; omit one")
    if args.basis is not None and args.hidden_size is None:
        raise InputError(f"--basis {args.basis} has an effect only with --hidden-size; leave it out")
    base = checkpoint.resolve(args.model)
    if args.group_size and args.scheme != "w4a16":
        raise InputError(f"--group-size {args.group_size} has an effect only with --scheme w4a16; leave it out")
    group = args.group_size or (names.GROUP_SIZE if args.scheme == "w4a16" else 1)
    target = Target(args.align, args.tensor_parallel, group)
    served = served_as(args.scheme, target, args.lm_head_bits, args.dtype or "auto")
    width = None if args.hidden_size is None else Width(args.hidden_size, args.basis or "fisher")
    if args.runtime is None:
        for option, given in (("--visits", args.visits), ("--seed", args.seed)):
            if given is not None:
                raise InputError(f"{option} has an effect only with --runtime; leave it out")
        peaks = peaks_of(args.roofline or "", args.peak_tflops or 0.0, args.bandwidth or 0.0)
        table = estimate(base, scenarios, target, args.sizes, peaks, served, width)
    elif args.bandwidth is not None:
        raise InputError("--bandwidth has an effect only with --peak-tflops; leave it out")
    else:
        visits, seed = args.visits or _VISITS, args.seed or 0
        asked = Request(args.runtime, scenarios, target, args.sizes, visits, seed, served, width)
        table = measure(base, asked, args.out.absolute().parent)
    replace(args.out, table.to_json())
    seconds = time.perf_counter() - started
    done = "estimated" if table.estimate else "measured"
    data = {"out": str(args.out), **table.model_dump(mode="json"), "seconds": seconds}
    return Answer(data, "\n".join([*_lines(table), f"{args.out}: {done} in {seconds:.0f} s"]))


def _lines(table: "TimingTable") -> list[str]:
    key = table.key
    runtime = f"{key.runtime} ({key.implementation})" if key.implementation else key.runtime
    form = key.dtype if key.quantization == "none" else f"{key.dtype} ({key.quantization})"
    device = key.device if key.tensor_parallel == 1 else f"{key.tensor_parallel} x {key.device}"
    lines = [f"{runtime}, {form}, {device}, {key.threads} threads"]
    if table.estimate:
        lines = [f"estimated for {device} in {form}, not measured"]
    lines[0] += f", at hidden size {key.shape.hidden_size:,}"
    if table.routing:
        lines.append("experts with random routers: one that prefers some experts can be slower or faster")
    for times in table.scenarios:
        drift = "" if table.estimate else f": drift {table.drift[times.scenario] - 1:+.1%}"
        lines += [f"{times.scenario}{drift}", *_times(times)]
    return lines


def _times(times: "ScenarioTimes") -> list[str]:
    rows = [("embeddings, head", times.around)]
    for kind, measured in times.blocks.items():
        rows += [(f"{kind} {one.units}" + (f"x{one.members}" if one.members > 1 else ""), one) for one in measured]
    return [
        f"  {name:<24} {one.ms:>10.4g} ms"
        + (" estimated" if times.estimated_for else "  (95 % interval {:.4g} to {:.4g})".format(*one.interval95))
        for name, one in rows
    ]
