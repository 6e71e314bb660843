"""A checkpoint to what other programs run, and the proof that it computes the same."""

from pathlib import Path
from typing import Any

from numprune.errors import InputError
from numprune.export import manifest, parity, parity_encoder, temporary
from numprune.export.tasks import load_task
from numprune.flows.bundle import folder_name
from numprune.flows.names import RUNTIME_OF_EXPORT


def export(source: Path, out: Path, export_format: str, **options: Any) -> manifest.Manifest:
    """Write the checkpoint `source` to the new folder `out` as `export_format`. Raises what its exporter raises."""
    if export_format == "vllm":
        from numprune.export import vllm

        return vllm.export(source, out, **options)
    if export_format == "onnx":
        from numprune.export import onnx

        return onnx.export(source, out, **options)
    if export_format == "tensorrt":
        from numprune.export import tensorrt

        return tensorrt.export(source, out, **options)
    raise InputError(f"the export format is {export_format!r}; it must be one of vllm, onnx, tensorrt")


def export_and_prove(source: Path, out: Path, export_format: str) -> tuple[manifest.Manifest, dict[str, Any]]:
    """Write an export to the new folder `out`, which appears only after its parity is proved.

    Raises InputError, IntegrityError, MissingRuntime, ParityError.
    """
    with temporary.beside(out) as folder:
        export(source, folder / "export", export_format)
        proof = prove(source, folder / "export", RUNTIME_OF_EXPORT[export_format])
        temporary.move(folder / "export", out)
    return manifest.read(out), proof


def prove(reference: Path, candidate: Path, runtime: str) -> dict[str, Any]:
    """`candidate` in `runtime` computes what `reference` does: what was compared. Raises ParityError."""
    kind = parity if load_task(reference).name == "causal-lm" else parity_encoder
    return dict(kind.check(reference, candidate, runtime))


def make_export(
    out: Path, *, source: Path, export_format: str, options: dict[str, Any], machine: dict[str, str]
) -> dict[str, Any]:
    """Stage: one export, in a folder of the stage with the name it will have in a release.

    `machine` is where, for exports that are made for one: on another it is another stage.
    """
    made = export(source, out / folder_name(export_format), export_format, **options)
    return {"digest": made.digest, "bytes": sum(entry.size for entry in made.files.values())}


def make_parity(out: Path, *, reference: Path, candidate: Path, runtime: str) -> dict[str, Any]:
    """Stage: `candidate` in `runtime` computes what `reference` does. Raises ParityError."""
    return prove(reference, candidate, runtime)
