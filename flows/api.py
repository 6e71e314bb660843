"""The Python API: everything that `import numprune` provides.

    import numprune

    model = numprune.load("my-model")
    rows = numprune.calibration_rows("train.jsonl", model)
    plan = numprune.plan(model, rows, numprune.PruneOptions(ratio=0.3))
    pruned = numprune.apply(plan, model, rows)
    print(numprune.evaluate(pruned, "heldout.jsonl", baseline=model).loss_delta)
    numprune.save(pruned, "pruned")
    recovery = numprune.RecoveryOptions(tokens=200_000)
    trained = numprune.recover(pruned, model, numprune.recovery_rows("train.jsonl", model, recovery), recovery)
    small = numprune.quantize(trained, numprune.Scheme("w8a8"), rows, dense=model)
    numprune.save(small, "pruned-w8a8")
    numprune.export_checkpoint("pruned", "pruned-onnx", to="onnx")

    # a budget of 2 GiB chooses the size and the bits (4, 8 or 16) of each block
    budget = numprune.weight_budget(model, "2GiB", scheme="mixed")
    target = numprune.Target(quantization_group=64)
    options = numprune.PruneOptions(ratio=0, allocation="error", target=target, budget=budget)
    mixed = numprune.quantize(numprune.prune(model, rows, options), "mixed", rows, dense=model)
    numprune.save(mixed, "mixed")

No function modifies its arguments. The command line does the same with folders and can stream models larger than
memory; `numprune optimize` runs the whole pipeline with benchmark, gates and registry.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

from numprune import pruning, quality
from numprune.byte_budget import MIXED, ByteBudget, parse
from numprune.cache_budget import KvBudget, SequenceBudget, parse_kv, parse_sequence
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint, compressed_tensors, genai, manifest
from numprune.export.tasks import load_task
from numprune.flows.in_memory import CalibrationRows, Model, Quantization, Training
from numprune.flows.names import Dtype, ExportFormat, QuantizedTo
from numprune.flows.rows import Text, calibration_rows, files, recovery_rows
from numprune.flows.steps import export as exports
from numprune.flows.steps import prune as steps
from numprune.flows.steps import quantize as quantizing
from numprune.flows.steps import recover as recovering
from numprune.flows.steps import text as texts
from numprune.layers import ModelLayers
from numprune.option_checks import check_options
from numprune.options import PruneOptions, options_of
from numprune.placement import place
from numprune.plans import Plan, read_plan
from numprune.quantization import BlockSchemes, Scheme, check_quantizable, schemes_by_tensor
from numprune.quantization.allocation import planned_schemes
from numprune.quantization.lm_head import LmHeadBits
from numprune.quantization.walk import Fit, check_target, quantize_model
from numprune.recovery import RecoveryOptions, RecoveryRows, distill
from numprune.shape import ShapeChoice, shapes_of
from numprune.shaping import choose_shape
from numprune.target import Target
from numprune.tasks import Comparison, Quality
from numprune.windowing import windowed

__all__ = [
    "ByteBudget",
    "CalibrationRows",
    "Comparison",
    "KvBudget",
    "Model",
    "Plan",
    "PruneOptions",
    "Quality",
    "Reading",
    "RecoveryOptions",
    "RecoveryRows",
    "Scheme",
    "SequenceBudget",
    "Target",
    "apply",
    "calibration_rows",
    "evaluate",
    "export_checkpoint",
    "kv_budget",
    "load",
    "plan",
    "prune",
    "quantize",
    "read_plan",
    "recover",
    "recovery_rows",
    "save",
    "sequence_budget",
    "shapes_of",
    "weight_budget",
]


def load(model: str | Path, device: str = "auto") -> Model:
    """Read a checkpoint into memory, in float32.

    Args:
        model: a Hugging Face folder, or a hub id if a hub can be reached. No code from it is run.
        device: "cpu", "cuda", or "auto" (CUDA if there is a GPU). If a GPU has no room for the model and a pruned one,
            the layers are spread over all GPUs, for which the extra `learn` is needed.

    Raises:
        InputError: no such model, an unsupported architecture, a malformed file, or too little memory.
        IntegrityError: stored tensors contradict config.json.
    """
    folder = checkpoint.resolve(model)
    network = place(checkpoint.load_model(folder), steps.device_of(device), models=2)  # and a pruned one
    return Model(folder, network, checkpoint.text_tokenizer(folder), load_task(folder))


def weight_budget(model: Model, limit: str, *, scheme: QuantizedTo = "none") -> ByteBudget:
    """Return a budget for the stored weights of what `model` becomes, for `PruneOptions.budget`.

    Args:
        model: to be pruned.
        limit: bytes of all weights, once they are quantized: "6GiB", "500 MB".
        scheme: what the pruned model will be quantized to: "fp8", "w8a8", "w4a16", or "none". With "mixed" the plan
            chooses for each block: as it is stored, w8a8, or w4a16 in groups of the target's `quantization_group`.

    Raises:
        InputError: `limit` is no number of bytes, or the model was pruned or quantized already.
    """
    _refuse_quantized(model, "pruning")
    if model.plan is not None:
        raise InputError("the model is pruned already: save it, and load it from its folder")
    return steps.byte_budget(model.folder, parse(limit), scheme)


def kv_budget(model: Model, limit: str) -> KvBudget:
    """Return a budget for the KV cache of what `model` becomes, for `PruneOptions.kv_budget`.

    Args:
        model: to be pruned.
        limit: bytes of keys and values of one token in all layers: "kv=64KiB/token".

    Raises:
        InputError: `limit` is written in another way.
    """
    return steps.kv_budget(model.folder, parse_kv(limit))


def sequence_budget(model: Model, limit: str) -> SequenceBudget:
    """Return a budget for the KV cache of a sequence, for `PruneOptions.sequence_budget`, which windows keep.

    Args:
        model: to be pruned.
        limit: bytes of keys and values of one sequence in all layers, and its tokens: "kv=8MiB@ctx=4096".

    Raises:
        InputError: `limit` is written in another way.
    """
    return steps.sequence_budget(model.folder, parse_sequence(limit))


def plan(model: Model, rows: CalibrationRows, options: PruneOptions) -> Plan:
    """Choose what to keep, without pruning.

    The plan can be written, read with `read_plan`, edited and applied. Units are chosen on the dense model, whereas
    `prune` chooses each block's units after pruning the blocks before it.

    Raises:
        InputError: the options are not valid for this model.
    """
    _refuse_quantized(model, "pruning")
    dense = ModelLayers(model.network, model.task)
    check_options(dense.anatomy, options)
    options, shape = _with_one_shape(model, rows, options)
    layers = windowed(dense, rows.tokens, options)
    dropped = pruning.what_to_drop(layers, rows.tokens, options)
    narrowing = pruning.narrowing_of(layers, rows.tokens, options)
    made = pruning.plan_layers(layers, rows.tokens, options, dropped=dropped, narrowing=narrowing)
    return made.model_copy(update={"shape": shape}).drawn(rows.draw, manifest.folder_digest(model.folder))


def apply(plan: Plan, model: Model, rows: CalibrationRows) -> Model:
    """Return `model` pruned by `plan`, compensated on `rows`; `model` is not modified.

    Raises:
        InputError: the plan is for another model, or has sizes that its target does not support.
    """
    steps.check_applies(plan, model.anatomy, model.folder, manifest.folder_digest(model.folder))
    return _pruned(model, rows, options_of(plan), plan, plan.shape)


def prune(model: Model, rows: CalibrationRows, options: PruneOptions) -> Model:
    """Return `model` pruned and compensated; `model` is not modified.

    Raises:
        InputError: the options are not valid for this model.
    """
    check_options(model.anatomy, options)
    options, shape = _with_one_shape(model, rows, options)
    return _pruned(model, rows, options, None, shape)


def _with_one_shape(
    model: Model, rows: CalibrationRows, options: PruneOptions
) -> tuple[PruneOptions, ShapeChoice | None]:
    if not options.shapes:
        return options, None
    _refuse_quantized(model, "pruning")
    return choose_shape(model.network, rows.tokens, options, model.task)


def _pruned(
    model: Model, rows: CalibrationRows, options: PruneOptions, plan: Plan | None, shape: ShapeChoice | None
) -> Model:
    _refuse_quantized(model, "pruning")
    found = pruning.prune(model.network, rows.tokens, options, task=model.task, plan=plan)
    made = found.plan.model_copy(update={"shape": shape}).drawn(rows.draw, manifest.folder_digest(model.folder))
    return Model(model.folder, found.model, model.tokenizer, model.task, made)


def recover(model: Model, dense: Model, rows: RecoveryRows, options: RecoveryOptions) -> Model:
    """Return `model` trained towards the predictions of `dense`; neither is modified.

    The result's `training` states the kept step and its gain: the best step on `rows.selection`, or the initial weights
    if no step was better. Training needs the extra `learn`.

    Args:
        model: pruned from `dense`, by `apply` or `prune`, or read from a checkpoint.
        dense: the unpruned model.
        rows: from `recovery_rows`, or your own rows (N, S) and (M, S).
        options: of the training.

    Raises:
        InputError: a package is missing, or the models, rows or options do not fit together.
        IntegrityError: the training diverged.
    """
    for one in (model, dense):
        _refuse_quantized(one, "training")
    sides = [(one.network.config, one.tokenizer) for one in (model, dense) if one.tokenizer is not None]
    if len(sides) < 2:
        raise InputError("training reads text, and a model that classifies images cannot be trained")
    recovering.check_pair(sides[0], sides[1], ("the model", "dense"))
    here = model.plan.dropped_layers() if model.plan else None  # since it was read
    network = copy.deepcopy(model.network)
    result = distill(
        network,
        dense.network,
        rows,
        options,
        network.device,
        stored=recovering.stored_dtypes(model.folder, network, here or ()),
        dropped=quantizing.dropped_layers(model.folder) if here is None else here,
        task=model.task,
    )
    return replace(model, network=network, training=Training(options, result, rows.digest))


def quantize(
    model: Model,
    scheme: Scheme | Literal["mixed"],
    rows: CalibrationRows | None = None,
    *,
    dense: Model | None = None,
    lm_head_bits: LmHeadBits = 8,
) -> Model:
    """Return `model` with the weights of its layers in 8 or 4 bits; `model` and `dense` are not modified.

    Args:
        model: pruned or not.
        scheme: `Scheme("fp8")`, `Scheme("w8a8")`, or `Scheme("w4a16", group_size)`; "mixed": as chosen for each block
            by the plan of `model`, made with a budget for "mixed".
        rows: for GPTQ, which compensates rounding errors; None: each weight is rounded to the nearest value.
        dense: the unpruned model, to whose outputs GPTQ fits; None: to those of `model`.
        lm_head_bits: of the output matrix when the model is exported to onnxruntime; 4 also rounds its values, and
            those of an embedding tied to it, in the model.

    Raises:
        InputError: the model or this scheme is not supported, or `model` was not pruned from `dense`.
    """
    _refuse_quantized(model, "quantization")
    plan = model.plan or quantizing.plan_of(model.folder)
    if isinstance(scheme, str) and scheme != MIXED:
        raise InputError(f"scheme is {scheme!r}; it must be a Scheme, or {MIXED!r}")
    schemes: BlockSchemes = (
        scheme if isinstance(scheme, Scheme) else planned_schemes(quantizing.with_schemes(plan, model.folder))
    )
    check_quantizable(model.anatomy, schemes, plan.target.tensor_parallel if plan else 1)
    matrices = schemes_by_tensor(model.anatomy, schemes)
    genai.check_lm_head(model.network.config, set(matrices.values()), lm_head_bits)
    lm_head_bits = lm_head_bits if matrices else 8
    dropped, hidden = (plan.dropped_layers(), plan.hidden) if plan else ([], None)
    if dense is not None:
        _refuse_quantized(dense, "dense")
        if rows is None:
            raise InputError("without rows each weight is rounded to the nearest value: omit `dense`, or give rows")
        check_target(model.anatomy, dense.anatomy, dropped, hidden)
    target = ModelLayers(dense.network, dense.task) if dense else None
    coordinates = plan.coordinates() if plan and target else None
    fit = Fit(rows.tokens, target, dropped, coordinates=coordinates) if rows and matrices else None
    scale_dtype = checkpoint.read_config(model.folder).dtype
    network, quantized = quantize_model(model.network, schemes, fit, scale_dtype, model.task, lm_head_bits)
    return replace(model, network=network, quantization=Quantization(schemes, quantized, rows, lm_head_bits))


def save(model: Model, out: str | Path) -> Path:
    """Write a model as a checkpoint, with plan, model card and manifest.

    Weights are stored in the base model's precision; quantized weights in the compressed-tensors format.

    Args:
        model: returned by `apply`, `prune`, `recover` or `quantize`.
        out: a folder that does not exist yet.

    Raises:
        InputError: `out` exists, or the model is unchanged.
        IntegrityError: the weights exceed the plan's budget, or a value does not fit in the stored precision.
    """
    folder, plan, quantized = Path(out), model.plan, model.quantization
    trained = model.training
    recovery = recovering.facts_of(trained.options, trained.result, trained.rows_digest) if trained else None
    if quantized is not None:
        tokens, draw = (quantized.rows.tokens, quantized.rows.draw) if quantized.rows else (None, None)
        quantizing.write_quantized(
            model.network,
            quantized.matrices,
            quantized.schemes,
            model.folder,
            plan,
            folder,
            rows=tokens,
            draw=draw,
            lm_head_bits=quantized.lm_head_bits,
            recovery=recovery,
        )
    elif recovery is not None:
        recovering.write_recovered(model.network, recovery, plan, model.folder, folder)
    elif plan is not None:
        steps.write_pruned(model.network, plan, model.folder, folder)
    else:
        raise InputError("the model is neither pruned nor quantized: apply a plan first, or quantize it")
    return folder


def _refuse_quantized(model: Model, use: str) -> None:
    if model.quantization is not None:
        raise InputError(f"the model is quantized ({model.quantization}); {use} needs the unquantized one")
    compressed_tensors.refuse_quantized(model.folder, use)


@overload
def evaluate(model: Model, text: Text, *, baseline: None = None, sequence_length: int | None = None) -> Quality: ...


@overload
def evaluate(model: Model, text: Text, *, baseline: Model, sequence_length: int | None = None) -> Comparison: ...


def evaluate(
    model: Model, text: Text, *, baseline: Model | None = None, sequence_length: int | None = None
) -> Quality | Comparison:
    """Return the model's NLL on a text or, with a baseline, the difference with an interval over documents.

    Args:
        model: to evaluate.
        text: one or more files of held-out text, or folders of images, not used for any choice.
        baseline: compared token by token; usually the unpruned model.
        sequence_length: tokens per window; None: 512, or the model's context if shorter.

    Raises:
        InputError: a file cannot be read, the models have different vocabularies, or the task has no loss without a
            baseline: embedding models, and classifiers on unlabelled texts or images.
    """
    tokens = texts.row_length(sequence_length, model.anatomy)
    rows = texts.text_rows(files(text), "heldout", model.tokenizer, tokens, Reading(), task=model.task)
    if baseline is not None:
        return quality.compare(model.network, baseline.network, rows, model.task)
    found = quality.evaluate(model.network, rows, model.task)
    if found is None:
        raise InputError(f"a {model.task.name} model has no loss of its own on this text; give a baseline")
    return found


def export_checkpoint(
    source: str | Path, out: str | Path, *, to: ExportFormat, dtype: Dtype = "auto"
) -> dict[str, Any]:
    """Export a checkpoint and verify that the export computes the same.

    Args:
        source: a checkpoint folder, for example from `save`.
        out: a folder that does not exist yet; it is created after parity is verified.
        to: "vllm", "onnx", "onnxruntime" or "tensorrt".
        dtype: "float32", "bfloat16", "float16", or "auto": as stored, but float32 for runtimes on a CPU.

    Returns:
        The figures of the parity check.

    Raises:
        InputError: `out` exists, or the target does not support the model.
        MissingRuntime: the target's libraries are not installed.
        ParityError: the export does not compute the same.
    """
    _, proof = exports.export_and_prove(checkpoint.resolve(source), Path(out), to, dtype)
    return proof
