"""numprune recover: train a pruned checkpoint towards the dense model."""

import argparse
import dataclasses
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from numprune.errors import InputError
from numprune.flows import names
from numprune.flows.cli.parser import (
    Answer,
    Subcommands,
    add_checkpoint_and_out,
    add_choice,
    add_seed,
    add_text,
    at_least,
    check_out,
    command,
    rate,
    reading,
)

if TYPE_CHECKING:
    import torch

    from numprune.recovery import RecoveryOptions
    from numprune.recovery.generated import GeneratedRows

_TOKENS, _GENERATED_SHARE = 1_000_000, 0.5
_OF_TRAINED = (
    ("rank", 16, "rank of the adapters, with --train lora"),
    ("blocks", 4, "number of blocks to train, with --train blocks"),
)
_ROWS = (
    ("--batch-size", 8, "rows per step"),
    ("--micro-batch-size", 8, "rows at a time; fewer need less memory and more time"),
    ("--selection-rows", 64, "held-back rows, not trained on, for choosing the best step"),
)


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "recover",
        recover,
        "train a pruned checkpoint towards the predictions of the dense model",
        "numprune recover ./pruned ./recovered --dense ./my-model --text train.txt --heldout heldout.txt --tokens 1e6",
        shareable=True,
    )
    add_checkpoint_and_out(parser)
    parser.add_argument("--dense", required=True, metavar="MODEL", help="the model that CHECKPOINT was pruned from")
    add_text(parser, "text for training and for choosing the best step")
    parser.add_argument(
        "--heldout",
        nargs="+",
        action="extend",
        type=Path,
        metavar="FILE",
        help="held-out text for comparing the models before and after; not trained on (default: none)",
    )
    parser.add_argument(
        "--generate-from",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="FILE",
        help="prompts, one per record or line, whose answers by the dense model are training text (default: none)",
    )
    parser.add_argument(
        "--generated-share",
        type=_share,
        metavar="R",
        help=f"share of the rows from these answers, the rest from --text (default: {_GENERATED_SHARE:g})",
    )
    parser.add_argument(
        "--tokens",
        type=_count,
        default=_TOKENS,
        metavar="N",
        help=f"training tokens, like 1e6; a shorter text is repeated (default: {_TOKENS:,})",
    )
    parser.add_argument(
        "--learning-rate",
        type=rate,
        metavar="R",
        help="peak learning rate (default: 0.128 divided by the model's hidden size)",
    )
    for name, default, what in _ROWS:
        parser.add_argument(name, type=at_least(1), default=default, metavar="N", help=f"{what} (default: {default})")
    add_choice(
        parser,
        "--train",
        get_args(names.TrainedWeights),
        "all",
        "weights to train (lora: adapters, merged at the end; blocks: the blocks with the largest loss from pruning)",
    )
    for name, default, what in _OF_TRAINED:
        parser.add_argument(f"--{name}", type=at_least(1), metavar="N", help=f"{what} (default: {default})")
    parser.add_argument(
        "--top-k",
        type=at_least(1),
        metavar="K",
        help="compare the dense model's K most probable tokens, and all others as one (default: the whole vocabulary)",
    )
    parser.add_argument(
        "--hidden-weight",
        type=rate,
        metavar="W",
        help="add W times 1 - cosine of the hidden states after each layer to the loss (default: 0)",
    )
    parser.add_argument(
        "--no-gradient-checkpointing",
        dest="gradient_checkpointing",
        action="store_false",
        help="keep all activations: faster, but needs more memory (default: recompute them)",
    )
    add_seed(parser)


def recover(args: argparse.Namespace) -> Answer:
    from numprune.anatomy import read_anatomy
    from numprune.export import checkpoint, manifest
    from numprune.export.tasks import load_task
    from numprune.flows.stages import peak_memory_bytes
    from numprune.flows.steps.evaluate import compare_checkpoints
    from numprune.flows.steps.generate import read_prompts
    from numprune.flows.steps.prune import device_of
    from numprune.flows.steps.recover import check_request, recover_checkpoint, shared_by, training_rows
    from numprune.flows.steps.text import heldout_rows, row_length
    from numprune.flows.steps.training import check_documents
    from numprune.recovery import require_packages

    started = time.perf_counter()
    check_out(args.out)
    options = options_of_arguments(args)
    if args.generated_share and not args.generate_from:
        raise InputError("--generated-share has an effect only with --generate-from; leave it out")
    require_packages(options)
    source, dense = checkpoint.resolve(args.checkpoint), checkpoint.resolve(args.dense)
    check_request(source, dense, options)
    manifest.sweep(args.out.parent)
    tokenizer = checkpoint.load_tokenizer(source)
    length = row_length(args.sequence_length, read_anatomy(checkpoint.read_config(source)))
    how = reading(args, [*args.text, *(args.heldout or [])])
    heldout = None
    if args.heldout:
        check_documents(args.text, args.heldout, tokenizer, how, "--heldout", read_prompts(args.generate_from))
        heldout = heldout_rows(args.heldout, length, [source], how, dense)
    task, device = load_task(source), device_of("auto")
    if args.generate_from and not task.prompted:
        raise InputError(f"--generate-from: {source} does not continue text; leave it out")
    processes = shared_by(device)
    judged = [heldout] if heldout else []
    with _generated(args, dense, length, options, device) as made:
        text = None if made and args.generated_share == 1 else args.text
        rows = training_rows(text, tokenizer, length, options, how, "--text", judged, made.rows if made else None, task)
        found = recover_checkpoint(source, dense, rows, options, args.out, device, args.out.parent)
    data = {
        "out": str(args.out),
        "method": "distill",
        "train": options.train,
        **vars(found),
        "generated": made and {"answers": made.answers, "tokens": made.tokens},
        "training_seconds": found.seconds,
    }
    measure = "distance" if task.name == "embedding" else "KL"
    told = (
        f"{args.out}: trained on {found.tokens:,} tokens in {found.steps:,} steps, the best after step "
        f"{found.best_step:,}; {measure} from the dense model on selection rows {found.kl_before:.4f} -> "
        f"{found.kl_after:.4f} {task.unit}"
    )
    if heldout is not None and processes.is_main_process:
        before, after = compare_checkpoints([source, args.out], dense, heldout, device)
        data["heldout"] = {"before": before, "after": after}
        losses = [side["loss_delta"]["value"] for side in (before, after)]
        what = "NLL above the dense model's" if task.name == names.CAUSAL_LM else "loss against the dense model"
        told += f"\nheld-out text: {what} {losses[0]:.4f} -> {losses[1]:.4f} {task.unit}"
    data |= {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}
    return Answer(data, told, quiet=not processes.is_main_process)


def options_of_arguments(args: argparse.Namespace) -> "RecoveryOptions":
    """Return the options that the arguments ask for. Raises InputError for one without effect."""
    from numprune.recovery import RecoveryOptions

    for option, train in (("rank", "lora"), ("blocks", "blocks")):
        if getattr(args, option) is not None and args.train != train:
            raise InputError(f"--{option} has an effect only with --train {train}; leave it out")
    asked = {option.name: getattr(args, option.name) for option in dataclasses.fields(RecoveryOptions)}
    return RecoveryOptions(**{name: value for name, value in asked.items() if value is not None})


def _generated(
    args: argparse.Namespace, dense: Path, length: int, options: "RecoveryOptions", device: "torch.device"
) -> "AbstractContextManager[GeneratedRows | None]":
    """The rows that the dense model generates, if any are asked for."""
    from numprune.flows.steps.generate import generated_text, generated_windows

    if not args.generate_from:
        return nullcontext()
    windows = generated_windows(options, length, args.generated_share or _GENERATED_SHARE)
    return generated_text(dense, args.generate_from, windows, length, args.seed, device, args.out.parent)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0 and at most 1")
    return value


_share.__name__ = "float"  # argparse's "invalid float value"


def _count(text: str) -> int:
    value = float(text)
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(value)


_count.__name__ = "int"  # argparse's "invalid int value"
