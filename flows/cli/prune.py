"""numprune prune: prune a model, only plan it, or follow a plan."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from numprune.counted import numbered_layers
from numprune.errors import InputError
from numprune.flows import names
from numprune.flows.amounts import size
from numprune.flows.cli.arguments import NeededUnless
from numprune.flows.cli.parser import (
    MODEL,
    Answer,
    Subcommands,
    add_dtype,
    add_lm_head_bits,
    add_text,
    at_least,
    check_out,
    command,
    reading,
)
from numprune.flows.cli.planned import latency_lines, planned_answer
from numprune.flows.cli.pruning_options import DEFAULTS, add_limits, add_number, options_within_budget

if TYPE_CHECKING:
    from numprune.flows.steps.results import PrunedCheckpoint
    from numprune.options import PruneOptions
    from numprune.plans import Plan
    from numprune.serving.report import LatencyBudget

_SAMPLES = 128


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "prune",
        prune,
        "prune a model and write the result as a checkpoint",
        "numprune prune ./my-model ./pruned --ratio 0.3 --text train.txt",
        shareable=True,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        action=NeededUnless,
        unless="--plan-only",
        help="the folder to write, or the file with --plan-only; must not exist",
    )
    parser.add_argument(
        "--ratio",
        type=float,
        metavar="R",
        help="share of the prunable parameters to remove, from 0 to under 1 (default: the plan's, or none with "
        "--hidden-size or --window)",
    )
    parser.add_argument(
        "--budget",
        metavar="LIMIT",
        action="append",
        help="bytes of all weights after quantization to --scheme, like 6GiB; with --timings the time of one step, "
        "like 20ms@decode,b=8,ctx=2048, a throughput, like 1500tok/s@decode,b=8,ctx=2048, or a speedup, like "
        "1.3x@decode,b=8,ctx=2048; or bytes of KV cache, like kv=64KiB/token; may be repeated, for each of these; "
        "replaces --ratio, and is divided by allocation error; bytes of KV cache of a sequence, like "
        "kv=8MiB@ctx=4096, are met by --window (default: none)",
    )
    parser.add_argument(
        "--timings",
        nargs="+",
        action="extend",
        type=Path,
        metavar="TABLE",
        help="with a --budget of time: the table of numprune timings, measured on this machine, and one for each "
        "--hidden-size; the pruned model is measured, too (default: none)",
    )
    parser.add_argument(
        "--scheme",
        choices=get_args(names.QuantizedTo),
        metavar="SCHEME",
        help="with --budget: the scheme for numprune quantize afterwards; mixed chooses none, w8a8 or w4a16 for each "
        f"block; one of {', '.join(get_args(names.QuantizedTo))} (default: none)",
    )
    add_lm_head_bits(parser, "with --timings and --scheme, bits of the output matrix as timed", default=None)
    add_dtype(parser, "with --timings, precision of the table")
    for option, choices, help_text in (
        ("criterion", names.Criterion, "score of the units"),
        ("allocation", names.Allocation, "how removals are divided among layers"),
        ("compensation", names.Compensation, "how kept channels compensate for removed ones"),
    ):
        parser.add_argument(
            f"--{option}",
            choices=get_args(choices),
            metavar=option.upper(),
            help=f"{help_text}; one of {', '.join(get_args(choices))} (default: {DEFAULTS[option]})",
        )
    parser.add_argument(
        "--plan-only",
        action="store_true",
        help="choose what to keep without pruning; print it, and write the plan to OUT if given",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="apply this plan with its options; kept weights are fitted to the text (default: make a new plan)",
    )
    add_text(parser, "text to calibrate on")
    parser.add_argument(
        "--samples",
        type=at_least(1),
        metavar="N",
        help="rows of the text to calibrate on (default: 128, or as many as the plan was chosen on without training)",
    )
    add_limits(parser, get_args(names.Axis), names.DEFAULT_AXES)
    parser.add_argument(
        "--drop-layers",
        nargs="+",
        action="extend",
        type=at_least(0),
        metavar="N",
        help="whole layers to drop, the cheapest ones; units make up the rest; several numbers are candidates beside 0 "
        "(default: 0)",
    )
    add_number(
        parser, "drop_blocks", 0, "attention blocks and MLPs to drop, likewise, with --allocation error or global"
    )
    parser.add_argument(
        "--window",
        type=at_least(1),
        metavar="TOKENS",
        help="tokens that some layers see, those in which this costs least: --window-layers of them, or as many as a "
        "--budget like kv=8MiB@ctx=4096 needs; rows of the text must be longer (default: as many as before)",
    )
    add_number(parser, "window_layers", 1, "with --window: layers that get the window")
    parser.add_argument(
        "--refine",
        choices=get_args(names.Refine),
        metavar="METHOD",
        help="with --allocation error or --budget: search makes the sizes fit better, at the same ratio or budget, by "
        f"measuring plans; one of {', '.join(get_args(names.Refine))} (default: {DEFAULTS['refine']})",
    )
    parser.add_argument(
        "--refine-minutes",
        type=float,
        metavar="M",
        help=f"time limit of --refine search in minutes (default: {DEFAULTS['refine_minutes']:g})",
    )
    parser.add_argument(
        "--hidden-size",
        nargs="+",
        action="extend",
        type=at_least(1),
        metavar="N",
        help="hidden size of the result; units make up the rest of the ratio or budget; several sizes are candidates, "
        "compared with the model's and all --drop-layers (default: the model's)",
    )
    parser.add_argument(
        "--basis",
        choices=get_args(names.Basis),
        metavar="BASIS",
        help="what a smaller hidden size keeps: fisher, rotated directions, with an output matrix separate from the "
        f"embedding, or coordinates (default: {DEFAULTS['basis']})",
    )
    add_number(parser, "seed", 0, "seed of every random draw")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="keep only a layer and the next one in memory, for models larger than memory (default: the whole model)",
    )


def prune(args: argparse.Namespace) -> Answer:
    from numprune.anatomy import read_anatomy
    from numprune.export import checkpoint, compressed_tensors
    from numprune.export.tasks import load_task
    from numprune.flows.stages import peak_memory_bytes
    from numprune.flows.steps.prune import device_of, plan_checkpoint, prune_checkpoint
    from numprune.flows.steps.text import calibration_rows, row_length
    from numprune.flows.steps.timed_prune import prune_within_time
    from numprune.option_checks import check_options
    from numprune.options import LEARNED
    from numprune.planned import check_plan
    from numprune.processes import check_shareable, join
    from numprune.spans import check_reach

    started = time.perf_counter()
    _check_arguments(args)
    base = checkpoint.resolve(args.model)
    compressed_tensors.refuse_quantized(base, "pruning")
    options, plan = _asked(args, base)
    anatomy = read_anatomy(checkpoint.read_config(base))
    if plan is None:
        check_options(anatomy, options)
    else:
        check_plan(anatomy, plan)
    # Masks are trained on more rows than weights need to be refitted; plans of schedules are calibrated on none.
    as_before = plan is not None and plan.criterion not in LEARNED
    samples = args.samples or (plan.calibration.rows if plan and as_before else 0) or _SAMPLES
    length = args.sequence_length or (plan.calibration.sequence_length if plan and not anatomy.image else None)
    length = row_length(length, anatomy)
    if plan is None:
        check_reach(options.window, length)
    tokenizer, how = checkpoint.text_tokenizer(base), reading(args, args.text)
    rows, draw = calibration_rows(args.text, tokenizer, samples, length, options.seed, how, task=load_task(base))
    processes = join(device_of("auto"))
    device = processes.device
    check_shareable(options, len(rows), processes, planned=plan is not None)
    if args.plan_only:
        scratch = args.out.parent if args.out else Path.cwd()
        planned = plan_checkpoint(
            base, rows, options, scratch, device, draw=draw, stream=args.stream, processes=processes
        )
        return planned_answer(base, planned, args.out, started, processes)
    made: PrunedCheckpoint
    latency: LatencyBudget | None = None
    if options.time_budget is not None and plan is None:
        timed = prune_within_time(base, rows, options, args.out, device, draw=draw, stream=args.stream)
        made, latency = timed, timed.latency
    else:
        made = prune_checkpoint(
            base, rows, options, args.out, device, draw=draw, stream=args.stream, plan=plan, processes=processes
        )
    peak = peak_memory_bytes()
    data = {
        "out": str(args.out),
        "digest": made.digest,
        "parameters_before": made.before.parameters,
        "parameters_after": made.after.parameters,
        "prunable_ratio_removed": made.prunable_ratio_removed,
        "dropped_layers": [drop.model_dump() for drop in made.dropped_layers],
        "dropped_blocks": [drop.model_dump() for drop in made.dropped_blocks],
        "window": made.window,
        "windowed_layers": made.windowed_layers,
        "hidden_size": made.hidden_size,
        "price": made.price.model_dump() if made.price else None,
        "shape": made.shape.model_dump() if made.shape else None,
        "refinement": made.refinement.model_dump() if made.refinement else None,
        "schemes": made.schemes,
        "weight_bytes_before": made.weight_bytes_before,
        "weight_bytes_after": made.weight_bytes_after,
        "latency": latency.model_dump(mode="json") if latency else None,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak,
    }
    dropped = [drop.block for drop in made.dropped_blocks]
    if made.dropped_layers:
        dropped.append("layers " + ", ".join(str(drop.layer) for drop in made.dropped_layers))
    without = f", without {', '.join(dropped)}" if dropped else ""
    spanning = f", a window of {made.window:,} tokens in {numbered_layers(made.windowed_layers)}" if made.window else ""
    narrowed = ", hidden size {1:,} -> {0:,}".format(*made.hidden_size) if made.hidden_size else ""
    text = (
        f"{args.out}: {made.before.parameters:,} -> {made.after.parameters:,} parameters, "
        f"{made.prunable_ratio_removed:.1%} of the prunable ones removed"
        f"{without}{spanning}{narrowed}; weights "
        f"{size(made.weight_bytes_before)} -> {size(made.weight_bytes_after)}; in {data['seconds']:.1f} s, "
        f"peak {size(peak)}"
    )
    if made.shape:
        text += "\n" + "\n".join(made.shape.lines())
    if made.price:
        text += f"\nsizes priced at {made.price}"
    if made.refinement:
        text += f"\n{made.refinement}"
    if latency:
        text += "\n" + "\n".join(latency_lines(latency))
    if made.schemes:
        quantizing = f"numprune quantize {args.out} QUANTIZED --scheme mixed --dense {base} --text FILE"
        text += f"\nits plan quantizes {len(made.schemes)} of {len(made.kept_units)} blocks: {quantizing}"
    return Answer(data, text, quiet=not processes.is_main)


def _check_arguments(args: argparse.Namespace) -> None:
    """Raises InputError if an argument is missing or OUT exists; removes what a killed run left beside OUT."""
    from numprune.export import manifest

    if args.out is None and not args.plan_only:
        raise InputError("the following arguments are required: OUT (see numprune prune --help)")
    if all(given is None for given in (args.plan, args.ratio, args.budget, args.hidden_size, args.window)):
        raise InputError(
            "the following arguments are required: --ratio, --budget, --hidden-size, --window or --plan (see "
            "numprune prune --help)"
        )
    if args.basis is not None and args.hidden_size is None:
        raise InputError(f"--basis {args.basis} has an effect only with --hidden-size; leave it out")
    if args.out is not None:
        check_out(args.out)
        manifest.sweep(args.out.parent)  # its remains can be large


def _asked(args: argparse.Namespace, base: Path) -> "tuple[PruneOptions, Plan | None]":
    """Return the options for the model in `base`, and the plan if they come from one. Raises InputError."""
    from numprune.options import options_of
    from numprune.plans import read_plan

    asked = ("ratio", "budget", "scheme", "lm_head_bits", "dtype", "timings", *DEFAULTS)
    given = {name: getattr(args, name) for name in asked if getattr(args, name) is not None}
    if args.plan is None:
        return options_within_budget({"ratio": 0.0, **given}, base), None
    if args.plan_only:
        raise InputError("--plan-only and --plan exclude each other; omit one of them")
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"--plan has its own options; omit {options}, or edit the plan")
    plan = read_plan(args.plan)
    return options_of(plan), plan
