"""Benchmarks of a candidate against its baseline."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import compressed_tensors, genai, precision
from numprune.export.checkpoint import audit, check_finite, read_config, resolve
from numprune.export.manifest import folder_digest
from numprune.export.runtimes import device_of as runtime_device
from numprune.export.runtimes.encoder import NAMES as ENCODER_RUNTIMES
from numprune.export.tasks import load_task
from numprune.flows.names import CAUSAL_LM, RUNTIME_OF_EXPORT, TorchMode, export_of
from numprune.flows.steps.evaluate import compare_checkpoints
from numprune.flows.steps.export import cast_to, export, precision_of
from numprune.flows.steps.prune import device_of
from numprune.flows.steps.report import assemble, sizes
from numprune.flows.steps.results import Timings
from numprune.flows.steps.text import heldout_rows
from numprune.generation import PROMPTS
from numprune.serving.benchmark import EncoderLoad, load_of, run_benchmark
from numprune.serving.benchmark.vllm import ServedLoad, run_served
from numprune.serving.report import Report
from numprune.serving.vllm import environment
from numprune.serving.vllm.environment import Environment

logger = logging.getLogger(__name__)


def time_both(
    candidate: Path,
    baseline: Path,
    runtime: str,
    device: str,
    dtype: str,
    torch_mode: TorchMode,
    load: Mapping[str, Any],
) -> Timings:
    """Benchmark two sides, both in `dtype`; `load`: the recipe's load."""
    if runtime == "vllm":
        served = ServedLoad(**{**load, "concurrency": tuple(load["concurrency"])})
        found = run_served({"candidate": candidate}, baseline, environment.find(), served, dtype=dtype)["candidate"]
    else:
        work = load_of(load)
        found = run_benchmark(candidate, baseline, runtime, work, device=device, dtype=dtype, torch_mode=torch_mode)
    return cast(Timings, found)  # validated on reading


def benchmark_report(
    candidate: str,
    baseline: str,
    runtime: str,
    text: list[Path] | None,
    length: int | None,
    reading: Reading,
    *,
    dtype: str = precision.AUTO,
    torch_mode: TorchMode = "auto",
    vllm: Environment | None = None,
    served: ServedLoad | None = None,
    shapes: Mapping[str, Any] | None = None,
) -> Report:
    """A report on two checkpoints, not judged: sizes, speed, memory and, with `text`, quality.

    Args:
        dtype: precision of both sides; `precision.AUTO`: by the candidate's stored precision.
        torch_mode: as for `run_benchmark`.
        vllm, served: for the runtime "vllm".
        shapes: fields of EncoderLoad, for encoders.

    Raises InputError, IntegrityError, MissingRuntime, and what the benchmark raises.
    """
    sides = {"baseline": resolve(baseline), "candidate": resolve(candidate)}
    task = load_task(sides["baseline"])
    load = None
    if task.name != CAUSAL_LM:
        load = encoder_load(read_anatomy(read_config(sides["baseline"])), runtime, shapes or {})
    if task.name == CAUSAL_LM and shapes:
        raise InputError(f"{baseline}: --batch-sizes, --lengths and --passes are for encoders, but it is a decoder")
    if task.name != CAUSAL_LM and torch_mode != "auto":
        raise InputError(
            f"{baseline}: --torch-mode {torch_mode}: only decoding is compiled, and {task.name} models do not "
            "generate; omit it"
        )
    chosen = precision_of(sides["candidate"], runtime, dtype)
    for folder in sides.values():
        check_finite(audit(folder))  # NaN takes a runtime as long as any number
    export_format = exported_as(runtime, [*sides.values()], chosen)
    rows = heldout_rows(text, length, [sides["candidate"]], reading, sides["baseline"]) if text else None
    digests = {name: folder_digest(folder) for name, folder in sides.items()}
    identity: dict[str, Any] = {"base": digests["baseline"], "candidate": digests["candidate"]}
    sections: dict[str, Any] = {"sizes": sizes(sides["baseline"], sides["candidate"])}
    if rows is not None:
        identity["heldout_rows"] = rows.digest
        [sections["quality"]] = compare_checkpoints(
            [sides["candidate"]], sides["baseline"], rows, device_of("auto"), PROMPTS
        )
    with tempfile.TemporaryDirectory(prefix="numprune-") as scratch:
        if export_format is not None:
            for name, folder in sides.items():
                logger.info("%s runs %s: exporting the %s to a temporary folder", runtime, export_format, name)
                made = export(folder, Path(scratch) / name, export_format, dtype=cast_to(export_format, chosen, dtype))
                sides[name] = Path(scratch) / name
            identity["exports"] = {export_format: made.digest}
        if vllm is not None:
            found = run_served({"candidate": sides["candidate"]}, sides["baseline"], vllm, served, dtype=chosen)[
                "candidate"
            ]
        else:
            found = run_benchmark(
                sides["candidate"], sides["baseline"], runtime, load, dtype=chosen, torch_mode=torch_mode
            )
    return assemble(Path(candidate).name, identity, sections, {runtime: found})


def exported_as(runtime: str, sides: Sequence[Path], dtype: str) -> str | None:
    """The export that `runtime` runs of all these checkpoints in a precision; None if it runs the checkpoints.

    Raises InputError for quantized weights that only the standard ONNX graph supports: it would dequantize them.
    """
    formats = dict.fromkeys(RUNTIME_OF_EXPORT)
    if runtime == RUNTIME_OF_EXPORT[genai.KIND] and not _runs_fused(sides, dtype):
        del formats[genai.KIND]
    return export_of(runtime, formats)


def _runs_fused(sides: Sequence[Path], dtype: str) -> bool:
    """Whether ONNX Runtime's own operators know these networks, in this precision. Raises as `exported_as`."""
    quantized = [found for side in sides if (found := compressed_tensors.quantization_in(side))]
    try:
        for side in sides:
            genai.check_config(read_config(side))
    except InputError:
        return False
    for found in quantized:
        for scheme in found.schemes:
            genai.check_scheme(scheme, dtype)
    try:
        genai.check_precision(dtype, runtime_device(genai.KIND))
    except InputError:
        if quantized:
            raise
        return False
    return True


def encoder_load(anatomy: Anatomy, runtime: str, fields: Mapping[str, Any]) -> EncoderLoad:
    """The load of an encoder in `runtime`. Raises InputError for a runtime that does not time encoders."""
    if runtime not in ENCODER_RUNTIMES:
        raise InputError(
            f"{runtime} times generation, which {anatomy.task} models do not have; they are timed in "
            f"{' and '.join(ENCODER_RUNTIMES)}"
        )
    if anatomy.image is None:
        return EncoderLoad(**fields)
    if "lengths" in fields:
        raise InputError("--lengths: the model reads images, which all have one size; omit it")
    return EncoderLoad(**fields, lengths=(anatomy.context,))
