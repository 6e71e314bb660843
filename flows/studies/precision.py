"""Compare a dense and a pruned model, each in every scheme, in bytes, quality and speed.

    python -m numprune.flows.studies.precision [MODEL] [--calibration FILE …] [--heldout FILE …] [--ratio 0.3]
        [--schemes w8a8,w4a16:64] [--runtimes torch,onnxruntime,vllm] [--out DIR]

Quality is measured on the held-out text in PyTorch. Each model is timed in turns with the dense one. ONNX Runtime and
vLLM run the stored (quantized) weights; PyTorch computes with dequantized weights, so only the dense and the pruned
model are timed there. `--out` keeps the table, and all measurements as JSON.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from numprune.corpus import TokenRows
from numprune.counted import counted
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint, genai, onnx, vllm
from numprune.export.precision import FLOAT32
from numprune.flows import children
from numprune.flows.cli.parser import at_least
from numprune.flows.names import EMBEDDED, Runtime
from numprune.flows.steps.evaluate import compare_checkpoints
from numprune.flows.steps.export import export
from numprune.flows.steps.models import model_folder, model_name
from numprune.flows.steps.prune import device_of, prune_checkpoint
from numprune.flows.steps.quantize import check_request, quantize_checkpoint
from numprune.flows.steps.text import calibration_rows, text_rows
from numprune.flows.studies.arguments import (
    add_heldout,
    add_model,
    each_once,
    out_folder,
    parser_of,
    run,
    write_results,
)
from numprune.options import PruneOptions
from numprune.quantization import SCHEMES, Scheme
from numprune.serving.benchmark import run_benchmark
from numprune.serving.benchmark.load import REPEATS_RULE, Load, are_repeats
from numprune.serving.benchmark.vllm import ServedLoad, run_served
from numprune.serving.report import ReportedEstimate, RuntimeSpeed
from numprune.serving.vllm import environment
from numprune.target import Target

DENSE, PRUNED = "dense", "pruned"
RUNTIMES: tuple[Runtime, ...] = ("torch", "onnxruntime", "vllm")
_METRIC = {"vllm": "output_tokens_per_s"}  # other runtimes: decode_tokens_per_s


@dataclass(frozen=True)
class Variant:
    """A model in a folder.

    Attributes:
        base: what it is without quantization: DENSE or PRUNED.
        scheme: that it is quantized to; None: it is not.
    """

    base: str
    scheme: Scheme | None
    folder: Path

    @property
    def name(self) -> str:
        return self.base if self.scheme is None else f"{self.base}, {self.scheme}"


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        weight_bytes: as stored.
        quality: the report's section, against the dense model; for the dense model, that of any other.
        quantization: the difference from the unquantized model, as in that section; None if it is not quantized.
        speed: runtime -> the report's section, of this model and the dense one; empty for the dense model.
    """

    name: str
    weight_bytes: int
    quality: Mapping[str, Any]
    quantization: Mapping[str, Any] | None = None
    speed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def markdown(rows: Sequence[Row], runtimes: Sequence[str], conditions: str) -> str:
    """Return the table; the first of `rows` is the dense model, and "-" means not measured.

    Rates of different comparisons are not comparable where a machine's speed varies, so a model has only its ratio to
    the dense model of the same comparison, and the dense model the median of its rates.
    """
    header = ["model", "weights, MB", "NLL, nats/token", "increase over dense", "increase by quantization"]
    header += [f"{runtime}, times dense tokens/s" for runtime in runtimes]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        dense = row is rows[0]
        side = row.quality["baseline" if dense else "candidate"]
        delta = "-" if dense else _interval(row.quality["loss_delta"], "+.4f")
        cost = "-" if row.quantization is None else _interval(row.quantization, "+.4f")
        cells = [row.name, f"{row.weight_bytes / 1e6:,.1f}", f"{side['nll_nats_per_token']:.4f}", delta, cost]
        cells += [_dense_rate(runtime, rows) if dense else _ratio(runtime, row) for runtime in runtimes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", conditions, ""])


def _dense_rate(runtime: str, rows: Sequence[Row]) -> str:
    found = [RuntimeSpeed.model_validate(row.speed[runtime]) for row in rows if runtime in row.speed]
    rates = [getattr(speed.baseline, _METRIC.get(runtime, "decode_tokens_per_s")) for speed in found]
    return f"{median(rates):,.1f} tokens/s" if rates else "-"


def _ratio(runtime: str, row: Row) -> str:
    if runtime not in row.speed:
        return "-"
    speed = getattr(RuntimeSpeed.model_validate(row.speed[runtime]), _METRIC.get(runtime, "decode_tokens_per_s"))
    return _interval(speed.ratio.model_dump(), ".2f")


def _interval(estimate: Mapping[str, Any], form: str) -> str:
    found = ReportedEstimate.model_validate({key: value for key, value in estimate.items() if key != "unit"})
    lower, upper = found.interval95
    return f"{found.value:{form}} [{lower:{form}}, {upper:{form}}]"


def scheme_of(text: str) -> Scheme:
    """`w8a8`, `fp8`, `w4a16` (groups of 128) or `w4a16:64`. Raises InputError."""
    name, _, group = text.partition(":")
    if name not in SCHEMES or (group and not group.isdecimal()):
        raise InputError(f"scheme is {text!r}; it must be one of {', '.join(SCHEMES)}, or w4a16:GROUP")
    return Scheme(name, int(group) if group else (128 if name == "w4a16" else None))


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("precision", __doc__)
    add_model(parser)
    add_heldout(parser)
    parser.add_argument("--ratio", type=float, default=0.3, help="share to remove (default %(default)s)")
    parser.add_argument("--compensation", default="residual", help="of pruning (default %(default)s)")
    parser.add_argument("--schemes", default="w8a8,w4a16:64", help="comma-separated (default %(default)s)")
    parser.add_argument(
        "--runtimes", default="torch,onnxruntime", help="of torch,onnxruntime,vllm (default %(default)s)"
    )
    for option, value, what in (
        ("--samples", 32, "calibration rows"),
        ("--sequence-length", 256, "tokens per row"),
        ("--windows", 64, "held-out rows at most"),
    ):
        parser.add_argument(option, type=at_least(1), default=value, help=f"{what} (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=6, help="of each timing, even (default %(default)s)")
    parser.add_argument("--vllm", metavar="ENV", help="virtual environment with vLLM (default: .venv-vllm)")
    parser.add_argument("--out", type=out_folder, help="folder for precision.md and precision.json")
    return run("precision", _study, parser.parse_args(argv))


def _study(args: argparse.Namespace) -> str:
    runtimes = args.runtimes.split(",")
    if unknown := [name for name in runtimes if name not in RUNTIMES]:
        raise InputError(f"runtime is {unknown[0]!r}; it must be one of {', '.join(RUNTIMES)}")
    each_once("--runtimes", runtimes)
    schemes = each_once("--schemes", [scheme_of(text) for text in args.schemes.split(",")])
    if not are_repeats(args.repeats):
        raise InputError(f"--repeats is {args.repeats}; it {REPEATS_RULE}")
    base = model_folder(args.model)
    served = environment.find(args.vllm) if "vllm" in runtimes else None  # before any work
    for scheme in schemes:
        check_request(base, scheme)
    load = Load(repeats=args.repeats)
    groups = [scheme.group_size or 1 for scheme in schemes]
    target = Target(align=32, quantization_group=max(groups))
    options = PruneOptions(args.ratio, compensation=args.compensation, target=target)
    tokenizer, length = checkpoint.load_tokenizer(base), args.sequence_length
    rows, draw = calibration_rows(args.calibration or EMBEDDED, tokenizer, args.samples, length, 0, Reading())
    read = text_rows(args.heldout or EMBEDDED, "heldout", tokenizer, length, Reading(), args.windows * length)
    heldout = read.part(slice(args.windows))
    with tempfile.TemporaryDirectory(prefix="numprune-precision-") as scratch:
        pruned = Path(scratch) / PRUNED
        children.call(prune_checkpoint, base, rows, options, pruned, device_of("auto"))
        variants = []
        for name, folder, dense in ((DENSE, base, None), (PRUNED, pruned, base)):
            variants.append(Variant(name, None, folder))
            for scheme in schemes:
                made = Variant(name, scheme, Path(scratch) / f"quantized-{len(variants)}")
                device = device_of("auto")
                children.call(
                    quantize_checkpoint, folder, scheme, made.folder, device, rows=rows, draw=draw, dense=dense
                )
                variants.append(made)
        quality, quantization = _quality(variants, heldout)
        speed: dict[str, dict[str, Any]] = {one.name: {} for one in variants}
        for runtime in runtimes:
            for name, found in _timed(runtime, variants, load, served, Path(scratch)).items():
                speed[name][runtime] = found["speed"]
        table = [
            Row(
                one.name,
                checkpoint.weight_bytes(one.folder),
                quality[one.name],
                quantization.get(one.name),
                speed[one.name],
            )
            for one in variants
        ]
    conditions = (
        f"{model_name(args.model)}, {args.ratio:.0%} removed (obs, uniform, {args.compensation}); quantized by gptq, "
        f"the pruned model towards the outputs of the dense one; {args.samples} calibration rows of {length} tokens. "
        f"NLL on {quality[DENSE]['tokens']:,} held-out tokens of {counted(heldout.documents, 'document')}, in PyTorch. "
        f"Decoding at batch 1, {args.repeats} repeats of each timing, in turn. In brackets: 95 % intervals, paired."
    )
    text = markdown(table, runtimes, conditions)
    write_results(args.out, "precision", text, [asdict(row) for row in table])
    return text


def _quality(
    variants: Sequence[Variant], heldout: TokenRows
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """By name: the section against the dense model, and the difference that quantization makes."""
    dense, *others = variants
    device = device_of("auto")
    (pruned,) = (one for one in others if one.name == PRUNED)

    def compared(these: Sequence[Variant], baseline: Path) -> dict[str, dict[str, Any]]:
        found = compare_checkpoints([one.folder for one in these], baseline, heldout, device)
        return {one.name: section for one, section in zip(these, found, strict=True)}

    quality = compared(others, dense.folder)
    of_pruned = compared([one for one in others if one.base == PRUNED and one is not pruned], pruned.folder)
    beside = {one.name: quality[one.name] for one in others if one.base == DENSE} | of_pruned
    return {DENSE: quality[PRUNED], **quality}, {name: section["loss_delta"] for name, section in beside.items()}


def _timed(
    runtime: str, variants: Sequence[Variant], load: Load, served: environment.Environment | None, scratch: Path
) -> dict[str, dict[str, Any]]:
    """Return results of `run_benchmark` or `run_served` for each model whose stored weights the runtime supports."""
    if served is not None and runtime == "vllm":
        sides = _served(variants, served, scratch)
        dense = sides.pop(DENSE)
        found: dict[str, dict[str, Any]] = {}
        for base in (PRUNED, DENSE):  # all servers at once may not fit into memory
            beside = {one.name: sides[one.name] for one in variants if one.base == base and one.name in sides}
            if beside:
                found |= run_served(beside, dense, served, ServedLoad(repeats=load.repeats, concurrency=(1,)))
        return found
    if runtime == "onnxruntime":
        sides = _exported(variants, scratch)
    else:
        sides = {one.name: one.folder for one in variants if one.scheme is None}
    dense = sides.pop(DENSE)
    return {name: run_benchmark(side, dense, runtime, load) for name, side in sides.items()}


def _exported(variants: Sequence[Variant], scratch: Path) -> dict[str, Path]:
    """Return the models for ONNX Runtime, with its own operators if the dense and the pruned model support them."""
    sides, kind = {}, genai.KIND
    try:
        for one in variants:
            if one.scheme is None:
                genai.check_config(checkpoint.read_config(one.folder))
    except InputError as error:
        print(f"standard operators: {error}", file=sys.stderr)
        kind = onnx.KIND
    for number, one in enumerate(variants):
        try:
            if one.scheme is not None:
                genai.check_config(checkpoint.read_config(one.folder))
                genai.check_scheme(one.scheme, FLOAT32)
        except InputError as error:
            print(f"{one.name}: not run in ONNX Runtime: {error}", file=sys.stderr)
            continue
        sides[one.name] = scratch / f"onnx-{number}"
        export(one.folder, sides[one.name], kind)
    return sides


def _served(variants: Sequence[Variant], served: environment.Environment, scratch: Path) -> dict[str, Path]:
    """Return the models that vLLM serves on this machine."""
    device = "cpu" if served.cpu else "gpu"
    sides = {}
    for number, one in enumerate(variants):
        try:
            if one.scheme is not None:
                vllm.check_quantized(one.scheme, checkpoint.read_config(one.folder).dtype, device)
        except InputError as error:
            print(f"{one.name}: not served: {error}", file=sys.stderr)
            continue
        sides[one.name] = scratch / f"vllm-{number}"
        vllm.export(one.folder, sides[one.name])
    return sides


if __name__ == "__main__":
    sys.exit(main())
