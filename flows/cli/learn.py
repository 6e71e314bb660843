"""numprune learn: trained masks choose the units to keep."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import get_args

from numprune.errors import InputError
from numprune.flows import names
from numprune.flows.amounts import size
from numprune.flows.cli.parser import (
    Answer,
    Subcommands,
    add_checkpoint_and_out,
    add_choice,
    add_dtype,
    add_lm_head_bits,
    add_seed,
    add_text,
    at_least,
    check_out,
    command,
    rate,
    reading,
)
from numprune.flows.cli.pruning_options import add_limits, options_within_budget

_GIVEN = (  # arguments that are options of pruning
    "ratio",
    "budget",
    "timings",
    "scheme",
    "lm_head_bits",
    "dtype",
    "allocation",
    "compensation",
    "align",
    "tensor_parallel",
    "quantization_group",
    "axes",
    "keep",
    "floor",
    "skips",
    "seed",
)


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "learn",
        learn,
        "train masks that choose the units to keep, and write their plan for numprune prune --plan",
        "numprune learn ./my-model ./learned --ratio 0.3 --variant faster --text train.txt",
    )
    add_checkpoint_and_out(parser)
    parser.add_argument(
        "--ratio",
        type=float,
        metavar="R",
        help="share of what --constraint counts to remove, from 0 to under 1 (default: none; give this or --budget)",
    )
    parser.add_argument(
        "--budget",
        metavar="LIMIT",
        action="append",
        help="bytes of all weights, like 6GiB, or with --timings the time of one step, like 20ms@decode,b=8,ctx=2048, "
        "a throughput, like 1500tok/s@decode,b=8,ctx=2048, or a speedup, like "
        "1.3x@decode,b=8,ctx=2048; replaces --ratio (default: none)",
    )
    parser.add_argument(
        "--timings",
        nargs=1,
        type=Path,
        metavar="TABLE",
        help="with a --budget of time: the table of numprune timings, measured on this machine (default: none)",
    )
    parser.add_argument(
        "--scheme",
        choices=("none", *get_args(names.Scheme)),
        metavar="SCHEME",
        help="with --timings: the scheme for numprune quantize afterwards, as timed; one of "
        f"{', '.join(('none', *get_args(names.Scheme)))} (default: none)",
    )
    add_lm_head_bits(parser, "with --timings and --scheme, bits of the output matrix as timed", default=None)
    add_dtype(parser, "with --timings, precision of the table")
    parser.add_argument(
        "--constraint",
        choices=get_args(names.LearningConstraint),
        metavar="CONSTRAINT",
        help="counted cost (parameters: of the blocks; flops: of the blocks per token, including attention within a "
        "row; bytes: of the weights, with --budget; milliseconds: of a step, with --budget and --timings; kv-bytes: of "
        "the KV cache, which only removes KV groups); one of "
        f"{', '.join(get_args(names.LearningConstraint))} (default: parameters, or what --budget limits)",
    )
    add_choice(
        parser,
        "--method",
        get_args(names.LearningMethod),
        "vib",
        "what the masks minimize (vib: the variational information bottleneck)",
    )
    add_choice(
        parser,
        "--variant",
        get_args(names.LearningVariant),
        "faster",
        "full and fast train masks and weights, faster only the masks; fast and faster use 3 %% of the tokens",
    )
    add_choice(
        parser,
        "--allocation",
        ("error", "uniform"),
        "error",
        "how masks become sizes: individually for each layer (error), or the same in every layer (uniform)",
    )
    add_choice(
        parser,
        "--compensation",
        get_args(names.Compensation),
        "joint",
        "how kept channels compensate for removed ones in prune --plan",
    )
    add_text(parser, "text for training and for evaluating the masks")
    parser.add_argument(
        "--tokens",
        type=at_least(1),
        metavar="N",
        help="training tokens; a shorter text is repeated "
        f"(default: {', '.join(f'{tokens:,} with {variant}' for variant, tokens in names.LEARNING_TOKENS.items())})",
    )
    parser.add_argument(
        "--learning-rate",
        type=rate,
        metavar="R",
        help=f"peak learning rate of the weights, with full and fast (default: {names.LEARNING_RATE:g})",
    )
    add_limits(parser, get_args(names.LearnedAxis), names.LEARNED_AXES)
    add_seed(parser)


def learn(args: argparse.Namespace) -> Answer:
    from numprune.anatomy import read_anatomy
    from numprune.export import checkpoint, manifest
    from numprune.flows.stages import peak_memory_bytes
    from numprune.flows.steps.learn import Request, check_request, implied_constraint, learn_checkpoint, training_rows
    from numprune.flows.steps.prune import device_of
    from numprune.flows.steps.text import row_length
    from numprune.serving.report.words import COUNTED

    started = time.perf_counter()
    check_out(args.out)
    if args.learning_rate is not None and args.variant == "faster":
        raise InputError("--learning-rate is that of the weights, which faster does not train; leave it out")
    if args.ratio is None and args.budget is None:
        raise InputError("the following arguments are required: --ratio or --budget (see numprune learn --help)")
    given = {name: getattr(args, name) for name in _GIVEN if getattr(args, name) is not None}
    source = checkpoint.resolve(args.checkpoint)
    options = options_within_budget({"criterion": args.method, "axes": names.LEARNED_AXES, **given}, source)
    constraint = args.constraint or implied_constraint(options)
    length = row_length(args.sequence_length, read_anatomy(checkpoint.read_config(source)))
    check_request(source, options, constraint, length)
    manifest.sweep(args.out.parent)
    asked = Request(
        args.variant,
        args.tokens or names.LEARNING_TOKENS[args.variant],
        names.LEARNING_RATE if args.learning_rate is None else args.learning_rate,
        constraint,
    )
    rows, draw = training_rows(args.text, source, length, asked.tokens, args.seed, reading(args, args.text), "--text")
    made = learn_checkpoint(source, rows, draw, options, asked, args.out, device_of("auto"), args.out.parent)
    plan, model = args.out / names.LEARNED_PLAN, args.out / names.LEARNED_MODEL if made.model else source
    data = {
        **dataclasses.asdict(made),
        "out": str(args.out),
        "model": str(model),
        "plan": str(plan),
        "method": args.method,
        "training_seconds": made.seconds,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    narrowed = ", hidden size {1:,} -> {0:,}".format(*made.hidden_size) if made.hidden_size else ""
    text = (
        f"{plan}: {made.removed:.1%} of the {COUNTED[constraint]} to remove{narrowed}; {args.method} "
        f"{made.variant}, {made.tokens:,} tokens in {made.steps:,} steps, the best after step {made.best_step:,}: "
        f"{made.divergence:.4f} {made.unit} from the dense model before any refit; in "
        f"{data['seconds']:.1f} s, peak {size(data['peak_memory_bytes'])}\n"
        f"follow it with numprune prune {model} OUT --plan {plan} --text FILE"
    )
    return Answer(data, text)
