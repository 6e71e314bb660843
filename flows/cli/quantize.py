"""numprune quantize: stores the weights of a checkpoint's layers in 8 or 4 bits."""

import argparse
import time
from typing import get_args

from numprune.errors import InputError
from numprune.flows import names
from numprune.flows.amounts import size
from numprune.flows.cli.parser import (
    Answer,
    Subcommands,
    add_checkpoint_and_out,
    add_choice,
    add_group_size,
    add_lm_head_bits,
    add_seed,
    add_text,
    at_least,
    check_out,
    command,
    reading,
)

_SAMPLES = 128


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "quantize",
        quantize,
        "quantize a checkpoint to the compressed-tensors format, which vLLM serves",
        "numprune quantize ./pruned ./pruned-w4a16 --scheme w4a16 --dense ./my-model --text train.txt",
    )
    add_checkpoint_and_out(parser)
    add_choice(
        parser,
        "--scheme",
        (*get_args(names.Scheme), "mixed"),
        None,
        "format of weights (w) and activations (a); mixed: for each block as in the plan of CHECKPOINT",
    )
    add_group_size(parser, "; with mixed, the plan's")
    add_lm_head_bits(
        parser,
        "of the output matrix when exported to onnxruntime, where 4 also rounds its values, and those of an embedding "
        "tied to it, in OUT",
    )
    add_choice(
        parser,
        "--method",
        get_args(names.QuantizationMethod),
        "gptq",
        "rounding: gptq compensates for errors and needs a text, rtn rounds to nearest and needs none",
    )
    parser.add_argument(
        "--dense",
        metavar="MODEL",
        help="the model that CHECKPOINT was pruned from, to whose outputs gptq fits (default: to those of CHECKPOINT)",
    )
    add_text(parser, "text to calibrate gptq on", required=False)
    parser.add_argument(
        "--samples",
        type=at_least(1),
        default=_SAMPLES,
        metavar="N",
        help=f"rows of the text to calibrate on (default: {_SAMPLES})",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=at_least(1),
        default=1,
        metavar="N",
        help="GPUs that will share each layer (default: 1)",
    )
    add_seed(parser)


def quantize(args: argparse.Namespace) -> Answer:
    from numprune.anatomy import read_anatomy
    from numprune.export import checkpoint, compressed_tensors, manifest
    from numprune.export.tasks import load_task
    from numprune.flows.stages import peak_memory_bytes
    from numprune.flows.steps.prune import device_of
    from numprune.flows.steps.quantize import check_request, quantize_checkpoint, schemes_of
    from numprune.flows.steps.text import calibration_rows, row_length

    started = time.perf_counter()
    check_out(args.out)
    _check_method(args)
    source = checkpoint.resolve(args.checkpoint)
    group = args.group_size or (names.GROUP_SIZE if args.scheme == "w4a16" else None)
    schemes = schemes_of(args.scheme, group, source)
    dense = checkpoint.resolve(args.dense) if args.dense else None
    bits = args.lm_head_bits
    check_request(source, schemes, dense, args.tensor_parallel, bits)
    manifest.sweep(args.out.parent)
    rows, draw = None, None
    if args.method == "gptq":
        length = row_length(args.sequence_length, read_anatomy(checkpoint.read_config(source)))
        tokenizer, how = checkpoint.load_tokenizer(source), reading(args, args.text)
        task = load_task(source)
        rows, draw = calibration_rows(args.text, tokenizer, args.samples, length, args.seed, how, task=task)
    facts = quantize_checkpoint(
        source, schemes, args.out, device_of("auto"), rows=rows, draw=draw, dense=dense, lm_head_bits=bits
    )
    data = {
        "out": str(args.out),
        "method": args.method,
        **facts,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    found = compressed_tensors.quantization_in(args.out)
    head = ", output matrix rounded to 4 bits" if facts["lm_head_bits"] == 4 else ""
    told = f"{found}, {args.method}{head}" if found else "a copy, since the plan quantizes no block"
    text = (
        f"{args.out}: {told}; weights {size(data['weight_bytes_before'])} -> "
        f"{size(data['weight_bytes_after'])}; in {data['seconds']:.1f} s, peak {size(data['peak_memory_bytes'])}"
    )
    return Answer(data, text)


def _check_method(args: argparse.Namespace) -> None:
    """Raises InputError if gptq has no text, or if rtn gets options that it does not use."""
    if args.method == "gptq" and not args.text:
        raise InputError("the following arguments are required: --text, or --method rtn (see numprune quantize --help)")
    if args.method == "rtn":
        for option in ("text", "dense"):
            if getattr(args, option):
                raise InputError(f"--method rtn uses neither a text nor a model; omit --{option}")
