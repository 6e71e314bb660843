"""python -m numprune.flows.studies.speed: the command."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

import torch

from numprune.errors import InputError, NumpruneError
from numprune.flows.cli.parser import add_choice
from numprune.flows.names import Device
from numprune.flows.steps.prune import device_of
from numprune.flows.studies.speed.layer import PARTS, LayerTimes, Size, measure_layer
from numprune.flows.studies.speed.parts import Part, measure_parts

_EPILOG = """\
  python -m numprune.flows.studies.speed
  python -m numprune.flows.studies.speed --channels 704,2048 --layer 1024x2816x16x4 --measured-tokens 4096

Runs on a GPU if there is one. On a CPU, the default sizes take about half an hour and 12 GB of memory. With
OMP_NUM_THREADS=1 it measures processor time, which is meaningful on a busy machine, too.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 error."""
    args = _parser().parse_args(argv)
    try:
        device = device_of(args.device)
        size = _size(args.layer)
        channels = [_positive("--channels", value) for value in args.channels.split(",")]
        measured = args.measured_tokens
        if measured is None:
            measured = args.tokens if device.type == "cuda" else 2048
        if min(args.repeats, args.tokens, measured, args.sequence_length) < 1 or args.patience < 0:
            raise InputError(
                "--repeats, --tokens, --measured-tokens and --sequence-length must be at least 1, --patience 0"
            )
        parts = measure_parts(channels, args.repeats, args.patience, device, _progress)
        layer = measure_layer(size, args.tokens, measured, args.sequence_length, args.repeats, device, _progress)
    except NumpruneError as error:
        print(f"speed: error: {error}", file=sys.stderr)
        return 1
    environment = _environment(device)
    if args.json:
        record = {
            "environment": environment,
            "repeats": args.repeats,
            "parts": [asdict(part) | {"speedup": part.speedup} for part in parts],
            "layer": asdict(layer) | {"whole": {name: layer.whole(name) for name in PARTS}},
        }
        print(json.dumps(record, indent=1))
    else:
        sys.stdout.write(as_markdown(environment, parts, layer))
    return 0


def as_markdown(environment: dict[str, Any], parts: Sequence[Part], layer: LayerTimes) -> str:
    """Return both tables as Markdown."""
    machine = environment["device"]
    if not environment["gpu"]:
        threads = environment["threads"]
        machine += f", {threads} threads" if threads > 1 else ", one thread (processor time)"
    lines = [
        f"Medians, both ways in turns, on {machine}, torch {environment['torch']}.",
        "",
        "| part | channels | as published, s | numprune, s | times faster |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {part.name} | {part.channels} | {_figure(part.straightforward_seconds)}"
        f"{'' if part.share_run == 1 else f' ({100 * part.share_run:.2g} % run)'} "
        f"| {_figure(part.seconds)} | {_figure(part.speedup)} |"
        for part in parts
    ]
    if any(part.share_run < 1 for part in parts):
        lines += [
            "",
            "If a share is given, only that much was run, and the rest is extrapolated from equal steps.",
        ]
    size = layer.size
    rows = {
        **layer.parts,
        **{f"**all but forward passes, `{name}`**": layer.besides(name) for name in PARTS},
        **{f"**whole, `{name}`**": layer.whole(name) for name in PARTS},
    }
    forward = layer.parts["forward"]
    lines += [
        "",
        f"One layer, hidden size {size.hidden}, intermediate size {size.intermediate}, {size.heads} heads "
        f"({size.kv_heads} KV), {layer.tokens} calibration tokens, float32:",
        "",
        "| work | s | of a forward pass |",
        "| --- | --- | --- |",
        *(f"| {name} | {_figure(time)} | {_figure(time / forward)} |" for name, time in rows.items()),
        "",
    ]
    if layer.measured_tokens < layer.tokens:
        lines += [
            f"Times that grow with the tokens were measured for {layer.measured_tokens} and multiplied by "
            f"{layer.tokens / layer.measured_tokens:g}.",
            "",
        ]
    lines += [
        "The additional forward and backward passes of `joint` over the kept units count as its own work.",
        "",
    ]
    return "\n".join(lines)


def _figure(value: float) -> str:
    """Format with three significant digits and without exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _environment(device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _size(text: str) -> Size:
    parts = text.split("x")
    if len(parts) != 4:
        raise InputError(
            f"--layer is {text!r}; it must be HIDDENxINTERMEDIATExHEADSxKV_HEADS, for example 4096x11008x32x32"
        )
    size = Size(*(_positive("--layer", part) for part in parts))
    if size.hidden % (2 * size.heads) or size.heads % size.kv_heads:
        raise InputError(f"--layer is {text!r}: the heads must divide half the hidden size, and the KV heads the heads")
    return size


def _positive(option: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise InputError(f"{option} holds {text!r}; it must be a positive whole number")
    return int(text)


def _progress(what: str) -> None:
    print(f"speed: {what}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m numprune.flows.studies.speed",
        description="Time of pruning: each part against its published form, a whole layer against its forward pass.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--channels", default="704,2048,4096", help="comma-separated (default %(default)s)")
    parser.add_argument(
        "--layer",
        default="4096x11008x32x32",
        help="hidden and intermediate size, heads and KV heads of the whole layer (default %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=128 * 2048, help="of the calibration (default %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a row (default %(default)s)")
    parser.add_argument(
        "--measured-tokens", type=int, help="calibration tokens that are run (default: 2048 on a CPU, all on a GPU)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of everything (default %(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=20,
        help="seconds after which a published form is extrapolated (default %(default)s)",
    )
    add_choice(parser, "--device", get_args(Device), "auto", "device to run on")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of tables")
    return parser
