"""numprune from Python: what `import numprune` gives.

    import numprune

    model = numprune.load("my-model")
    rows = numprune.calibration_rows("train.jsonl", model)
    plan = numprune.plan(model, rows, numprune.PruneOptions(ratio=0.3))
    pruned = numprune.apply(plan, model, rows)
    print(numprune.evaluate(pruned, "heldout.jsonl", baseline=model).loss_delta)
    numprune.save(pruned, "pruned")
    numprune.export_checkpoint("pruned", "pruned-onnx", to="onnx")

No function changes the model that it is given. The command line does the same from folder to folder and can stream
models that are larger than the memory; `numprune optimize` runs the whole chain with benchmark, gates and registry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune import pruning, quality
from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy
from numprune.budget import Budget, budget_of
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint, compressed_tensors, manifest
from numprune.export.tasks import load_task
from numprune.flows.names import Dtype, ExportFormat
from numprune.flows.steps import export as exports
from numprune.flows.steps import prune as steps
from numprune.flows.steps import text as texts
from numprune.layers import ModelLayers
from numprune.options import PruneOptions, check_options, options_of
from numprune.plans import Draw, Plan, read_plan
from numprune.target import Target
from numprune.tasks import Comparison, Quality, Task

__all__ = [
    "CalibrationRows",
    "Comparison",
    "Model",
    "Plan",
    "PruneOptions",
    "Quality",
    "Reading",
    "Target",
    "apply",
    "calibration_rows",
    "evaluate",
    "export_checkpoint",
    "load",
    "plan",
    "prune",
    "read_plan",
    "save",
]

Text = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Model:
    """A model in memory, in float32.

    Attributes:
        folder: the checkpoint that it, or the model that it was pruned from, was read from.
        network: transformers' model.
        tokenizer: its tokenizer.
        task: what it is for: a causal or masked language model, a classifier, an embedding model.
        plan: by which it was pruned; None for a model as it was read.
    """

    folder: Path
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    plan: Plan | None = None

    @property
    def anatomy(self) -> Anatomy:
        """Its prunable blocks and their sizes."""
        return read_anatomy(self.network.config)

    @property
    def budget(self) -> Budget:
        """Parameters, FLOPs per token and KV-cache bytes per token."""
        return budget_of(self.anatomy)


@dataclass(frozen=True)
class CalibrationRows:
    """Token rows to calibrate on.

    Attributes:
        tokens: (N, S) int64.
        draw: the text that they are from, and how they were drawn; None for rows of your own.
    """

    tokens: Tensor
    draw: Draw | None = None


def load(model: str | Path, device: str = "auto") -> Model:
    """Read a checkpoint into memory, in float32.

    Args:
        model: a Hugging Face folder, or a hub id where a hub can be reached. No code from it is run.
        device: "cpu", "cuda", or "auto": CUDA where there is a GPU.

    Raises:
        InputError: no such model, an unsupported architecture, or a malformed file.
        IntegrityError: stored tensors that are not what config.json says.
    """
    folder = checkpoint.resolve(model)
    network, tokenizer = checkpoint.load(folder)
    return Model(folder, network.to(steps.device_of(device)), tokenizer, load_task(folder))


def calibration_rows(
    text: Text,
    model: Model,
    *,
    samples: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    reading: Reading | None = None,
) -> CalibrationRows:
    """Draw rows of tokens to calibrate on.

    Args:
        text: one or more files; .jsonl, .json and .parquet files hold a document per record.
        model: whose tokenizer and context they are for.
        samples: N, how many rows.
        sequence_length: S, tokens of a row; None: 512, or the model's context where that is shorter.
        seed: of the draw.
        reading: how documents are split, rendered and packed; None: the defaults.

    Raises:
        InputError: a file cannot be read, or has too little text.
    """
    length = texts.row_length(sequence_length, model.anatomy.context)
    tokens, draw = texts.calibration_rows(
        _files(text), model.tokenizer, samples, length, seed, reading or Reading(), task=model.task
    )
    return CalibrationRows(tokens, draw)


def plan(model: Model, rows: CalibrationRows, options: PruneOptions) -> Plan:
    """Choose what to keep, and prune nothing.

    The plan can be written, read again with `read_plan`, edited, and applied. Units are chosen on the dense model;
    `prune` chooses those of each block after the blocks before it have been pruned.

    Raises:
        InputError: options that cannot work for this model.
    """
    compressed_tensors.refuse_quantized(model.folder, "pruning")
    layers = ModelLayers(model.network, model.task)
    check_options(layers.anatomy, options)
    dropped = pruning.layers_to_drop(layers, rows.tokens, options)
    made = pruning.plan_layers(layers, rows.tokens, options, dropped=dropped)
    return made.drawn(rows.draw, manifest.folder_digest(model.folder))


def apply(plan: Plan, model: Model, rows: CalibrationRows) -> Model:
    """Return `model` pruned by `plan`, compensated on `rows`; `model` stays as it is.

    Raises:
        InputError: the plan is for another model, or names sizes that its target cannot run.
    """
    steps.check_applies(plan, model.anatomy, model.folder, manifest.folder_digest(model.folder))
    return _pruned(model, rows, options_of(plan), plan)


def prune(model: Model, rows: CalibrationRows, options: PruneOptions) -> Model:
    """Return `model` pruned and compensated; `model` stays as it is.

    Raises:
        InputError: options that cannot work for this model.
    """
    check_options(model.anatomy, options)
    return _pruned(model, rows, options, None)


def _pruned(model: Model, rows: CalibrationRows, options: PruneOptions, plan: Plan | None) -> Model:
    compressed_tensors.refuse_quantized(model.folder, "pruning")
    found = pruning.prune(model.network, rows.tokens, options, task=model.task, plan=plan)
    made = found.plan.drawn(rows.draw, manifest.folder_digest(model.folder))
    return Model(model.folder, found.model, model.tokenizer, model.task, made)


def save(pruned: Model, out: str | Path) -> Path:
    """Write a pruned model as a checkpoint, in the precision of its base, with plan, model card and manifest.

    Args:
        pruned: what `apply` or `prune` returned.
        out: a folder that does not exist yet.

    Raises:
        InputError: `out` exists, or the model is not pruned.
    """
    if pruned.plan is None:
        raise InputError("the model is not pruned: apply a plan first")
    folder = Path(out)
    steps.write_pruned(pruned.network, pruned.plan, pruned.folder, folder)
    return folder


@overload
def evaluate(model: Model, text: Text, *, baseline: None = None, sequence_length: int | None = None) -> Quality: ...


@overload
def evaluate(model: Model, text: Text, *, baseline: Model, sequence_length: int | None = None) -> Comparison: ...


def evaluate(
    model: Model, text: Text, *, baseline: Model | None = None, sequence_length: int | None = None
) -> Quality | Comparison:
    """Return the model's NLL on a text, or with a baseline what changed, with an interval over the text's documents.

    Args:
        model: to measure.
        text: one or more files, of text that nothing was chosen on.
        baseline: to compare with, token by token; usually the model that `model` was pruned from.
        sequence_length: tokens of a window; None: 512, or the model's context where that is shorter.

    Raises:
        InputError: a file cannot be read, the models have different vocabularies, or there is no loss to measure
            without a baseline: embedding models, and classifiers on texts without labels.
    """
    tokens = texts.row_length(sequence_length, model.anatomy.context)
    rows = texts.text_rows(_files(text), "heldout", model.tokenizer, tokens, Reading(), task=model.task)
    if baseline is not None:
        return quality.compare(model.network, baseline.network, rows, model.task)
    found = quality.evaluate(model.network, rows, model.task)
    if found is None:
        raise InputError(f"a model of {model.task.name} has no loss on this text by itself; give a baseline")
    return found


def export_checkpoint(
    source: str | Path, out: str | Path, *, to: ExportFormat, dtype: Dtype = "auto"
) -> dict[str, Any]:
    """Export a checkpoint and prove that the export computes what the checkpoint computes.

    Args:
        source: a checkpoint folder, for example one that `save` wrote.
        out: a folder that does not exist yet; it appears once parity is proved.
        to: "vllm", "onnx", "onnxruntime" or "tensorrt".
        dtype: "float32", "bfloat16", "float16", or "auto": as it is stored, and float32 for runtimes on a CPU.

    Returns:
        The figures of the parity check.

    Raises:
        InputError: `out` exists, or the target cannot hold the model.
        MissingRuntime: the target's libraries are not installed.
        ParityError: the export computes something else.
    """
    _, proof = exports.export_and_prove(checkpoint.resolve(source), Path(out), to, dtype)
    return proof


def _files(text: Text) -> list[Path]:
    return [Path(text)] if isinstance(text, str | Path) else [Path(file) for file in text]
