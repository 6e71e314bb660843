"""The bodies of the stages that export checkpoints, verify the exports, and write the answers expected of servers."""

from pathlib import Path
from typing import Any

from numprune.flows.names import folder_name
from numprune.flows.stages import Artifact
from numprune.flows.steps.results import Answers, Exported, Parity


def make_vllm(out: Path, *, source: Artifact, shard_size: str, dtype: str | None) -> Exported:
    """Export for vLLM, into the release's folder name, like the other exports. `dtype` None: as stored."""
    return _exported(out, source, "vllm", shard_size=shard_size, dtype=dtype)


def make_onnx(out: Path, *, source: Artifact, opset: int, dtype: str) -> Exported:
    return _exported(out, source, "onnx", opset=opset, dtype=dtype)


def make_onnxruntime(out: Path, *, source: Artifact, dtype: str) -> Exported:
    return _exported(out, source, "onnxruntime", dtype=dtype)


def make_tensorrt(
    out: Path, *, source: Artifact, max_batch: int, max_length: int, dtype: str, machine: dict[str, str]
) -> Exported:
    """Build an engine; `machine` is part of the key because an engine fits one kind of GPU."""
    return _exported(out, source, "tensorrt", max_batch=max_batch, max_length=max_length, dtype=dtype)


def _exported(out: Path, source: Artifact, export_format: str, **options: Any) -> Exported:
    from numprune.flows.steps.export import export

    made = export(source.path, out / folder_name(export_format), export_format, **options)
    return Exported(made.digest, sum(entry.size for entry in made.files.values()))


def make_parity(out: Path, *, reference: Artifact, candidate: Artifact, runtime: str, device: str) -> Parity:
    """Verify that `candidate` in `runtime` on `device` computes what `reference` does. Raises ParityError."""
    from numprune.flows.steps.export import prove

    return prove(reference.path, candidate.path, runtime, device)


def make_reference_answers(out: Path, *, checkpoint: Artifact, unquantized: Artifact | None, device: str) -> Answers:
    """Write reference-answers.json: the answers expected from a server of the checkpoint.

    A quantized checkpoint is held to the noise floor of the `unquantized` one.
    """
    import torch

    from numprune.flows.steps.reference_answers import answers_of
    from numprune.serving.reference_answers import PooledAnswers

    before = unquantized.path if unquantized else None
    made = answers_of(checkpoint.path, torch.device(device), unquantized=before)
    made.write(out)
    texts = made.inputs if isinstance(made, PooledAnswers) else made.prompts
    return Answers(len(texts), made.length)
