"""Exports a checkpoint, and verifies that the export computes the same."""

from pathlib import Path
from typing import Any

from numprune.errors import InputError
from numprune.export import compressed_tensors, manifest, parity, parity_encoder, precision, temporary
from numprune.export.format_parity import check_format
from numprune.export.runtimes import device_of
from numprune.export.tasks import load_task
from numprune.flows.names import RUNTIME_OF_EXPORT
from numprune.flows.recipe import Recipe


def export(source: Path, out: Path, export_format: str, **options: Any) -> manifest.Manifest:
    """Write the checkpoint `source` to the new folder `out` as `export_format`. Raises what its exporter raises."""
    if export_format == "vllm":
        from numprune.export import vllm

        return vllm.export(source, out, **options)
    if export_format == "onnx":
        from numprune.export import onnx

        return onnx.export(source, out, **options)
    if export_format == "onnxruntime":
        from numprune.export import genai

        return genai.export(source, out, **options)
    if export_format == "tensorrt":
        from numprune.export import tensorrt

        return tensorrt.export(source, out, **options)
    raise InputError(f"the export format is {export_format!r}; it must be one of {', '.join(RUNTIME_OF_EXPORT)}")


def export_and_prove(
    source: Path, out: Path, export_format: str, dtype: str = precision.AUTO
) -> tuple[manifest.Manifest, dict[str, Any]]:
    """Write an export to the new folder `out`, which appears only once parity is verified.

    Raises InputError, IntegrityError, MissingRuntime, ParityError.
    """
    chosen = precision_of(source, RUNTIME_OF_EXPORT[export_format] if export_format != "vllm" else "vllm", dtype)
    if export_format == "onnxruntime":
        from numprune.export import genai

        genai.check_precision(chosen, device_of("onnxruntime", "auto"))
    with temporary.beside(out) as folder:
        export(source, folder / "export", export_format, dtype=cast_to(export_format, chosen, dtype))
        proof = prove(source, folder / "export", RUNTIME_OF_EXPORT[export_format])
        temporary.move(folder / "export", out)
    return manifest.read(out), proof


def precision_of(source: Path, runtime: str, asked: str, device: str = "auto") -> str:
    """The compute precision of the checkpoint `source` in `runtime`. Raises InputError, MissingRuntime."""
    return precision.choose(asked, precision.stored(source), runtime, device_of(runtime, device))


def precisions(recipe: Recipe, base: Path) -> dict[str, str]:
    """Runtime -> its compute precision. Raises InputError if a runtime does not support the requested one."""
    exported = {name if name == "vllm" else RUNTIME_OF_EXPORT[name] for name in recipe.export.targets}
    return {
        runtime: precision_of(base, runtime, recipe.export.dtype, recipe.benchmark.device)
        for runtime in sorted({*exported, *recipe.benchmark.runtimes})
    }


def cast_to(export_format: str, chosen: str, asked: str) -> str | None:
    """The precision to export in; None to keep every tensor's own."""
    return None if export_format == "vllm" and asked == precision.AUTO else chosen


def prove(reference: Path, candidate: Path, runtime: str, device: str = "auto") -> dict[str, Any]:
    """Verify that `candidate` in `runtime` on `device` matches `reference`. Raises ParityError."""
    kind = parity if load_task(reference).name == "causal-lm" else parity_encoder
    before, after = precision.stored(reference), precision.stored(candidate)
    # Equal weights must agree to the last digits; a cast to half precision loses some.
    dtype = after if after != before and after in precision.DTYPES else precision.FLOAT32
    found = dict(kind.check(reference, candidate, runtime, device=device, dtype=dtype))
    quantized = runtime == "torch" and compressed_tensors.quantization_in(reference)
    return {**found, "format": check_format(reference, candidate)} if quantized else found
