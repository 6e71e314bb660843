"""A checkpoint to a quantized one."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.anatomy import layers_path, read_anatomy
from numprune.errors import InputError
from numprune.export import card, checkpoint, compressed_tensors, files, manifest
from numprune.export.config import write_config
from numprune.export.shards import writing
from numprune.export.streaming import CheckpointLayers
from numprune.export.weights import DTYPES, dtypes_of, main_dtype
from numprune.flows.recipe import Quantize
from numprune.flows.steps.prune import describe, plan_facts
from numprune.plans import PLAN_FILE, Draw, Plan, read_plan
from numprune.quantization import Quantized, Scheme, check_quantizable, quantized_tensors
from numprune.quantization.compressed_tensors import CONFIG_FIELD, config_of, tensors_of
from numprune.quantization.compressed_tensors import dtypes_of as parts_of
from numprune.quantization.walk import Fit, check_target, quantize_layers
from numprune.renumber import renumber_tensors
from numprune.surgery import skeleton
from numprune.target import not_split


def quantize_checkpoint(
    source: Path,
    scheme: Scheme,
    out: Path,
    device: torch.device,
    *,
    rows: Tensor | None = None,
    draw: Draw | None = None,
    dense: Path | None = None,
) -> dict[str, Any]:
    """Write the quantized `source` to the new folder `out`; return the figures. One layer is in memory at a time.

    Args:
        rows: (N, S) int64 calibration tokens for GPTQ; None: each weight is rounded by itself.
        draw: where the rows are from.
        dense: the model that `source` was pruned from, whose residual stream is to be kept to; None: its own.

    Raises:
        InputError: `out` exists, or the model, rows or dense model cannot be used.
        IntegrityError: a file is not what it should be.
    """
    check_request(source, scheme, dense)
    config, dropped = checkpoint.read_config(source), dropped_layers(source)
    parents = {"base": manifest.folder_digest(source)} | ({"dense": manifest.folder_digest(dense)} if dense else {})
    facts = _facts(scheme, rows, draw)
    with manifest.creating(out, kind="checkpoint", parents=parents, facts={"quantization": facts}) as folder:
        layers = CheckpointLayers(source, scratch=folder, device=device)
        target = CheckpointLayers(dense, scratch=folder, device=device) if dense else None
        fit = None if rows is None else Fit(rows, target, dropped)
        _write(layers, scheme, folder, fit)
        checkpoint.copy_around_weights(config, source, folder)
        _set_config(config, scheme, folder)
        card.set_quantization(folder, scheme)
        checkpoint.audit(folder)
    return {
        "digest": manifest.read(out).digest,
        "weight_bytes_before": checkpoint.weight_bytes(source),
        "weight_bytes_after": checkpoint.weight_bytes(out),
    }


def write_quantized(
    model: PreTrainedModel,
    matrices: Mapping[str, Quantized],
    scheme: Scheme,
    base: Path,
    plan: Plan | None,
    out: Path,
    *,
    rows: Tensor | None = None,
    draw: Draw | None = None,
) -> None:
    """Write a model that was quantized in memory to the new folder `out`, as `quantize_checkpoint` does.

    Args:
        model: as `quantize_model` returned it, with its quantized `matrices`.
        base: the checkpoint that it was made from.
        plan: by which it was pruned before; None: it was not.
        rows, draw: as of `quantize_checkpoint`.

    Raises:
        InputError: `out` exists.
        IntegrityError: a value does not fit in the data type that it is stored in.
    """
    parents = {"base": manifest.folder_digest(base)}
    facts: dict[str, Any] = {"quantization": _facts(scheme, rows, draw)}
    if plan is not None:
        facts |= plan_facts(plan)
    stored = checkpoint.audit(base)
    scale_dtype = main_dtype(stored)
    full = renumber_tensors(dtypes_of(stored), layers_path(model.config), plan.dropped_layers() if plan else ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    with manifest.creating(out, kind="checkpoint", parents=parents, facts=facts) as folder:
        with writing(folder, _quantized_dtypes(full, matrices, scheme, scale_dtype)) as writer:
            for name, tensor in checkpoint.stored_tensors(model, state).items():
                whole = name not in matrices
                writer.add({name: tensor} if whole else tensors_of(name, matrices[name], scale_dtype))
        if plan is None:
            checkpoint.copy_around_weights(checkpoint.read_config(base), base, folder)
        else:
            model.config.architectures, model.config.dtype = [type(model).__name__], scale_dtype
            write_config(model.config, base, folder)
            files.carry(base, folder)
        _set_config(model.config, scheme, folder)
        if plan is not None:
            describe(folder, base, plan)
        card.set_quantization(folder, scheme)
        checkpoint.audit(folder)


def scheme_of(asked: Quantize) -> Scheme:
    """Return the scheme that a recipe asks for, which is not "none"."""
    assert asked.scheme != "none"
    return Scheme(asked.scheme, asked.channels_per_scale)


def check_request(source: Path, scheme: Scheme, dense: Path | None = None, tensor_parallel: int = 1) -> None:
    """Refuse what `quantize_checkpoint` could not do, or what GPUs that share each layer could not run.

    Raises InputError.
    """
    anatomy = read_anatomy(checkpoint.read_config(source))
    compressed_tensors.refuse_quantized(source, "quantization")
    if faults := not_split(anatomy, tensor_parallel):
        raise InputError(
            f"--tensor-parallel {tensor_parallel} does not divide {'; '.join(faults)}; choose a smaller one, or prune "
            f"again with --tensor-parallel {tensor_parallel}"
        )
    check_quantizable(anatomy, scheme, tensor_parallel)
    if dense is not None:
        compressed_tensors.refuse_quantized(dense, "--dense")
        check_target(anatomy, read_anatomy(checkpoint.read_config(dense)), dropped_layers(source))


def dropped_layers(source: Path) -> list[int]:
    """Return the layers that a checkpoint lacks of the model that it was pruned from."""
    """Return the layers that the model lacks of the one that it was pruned from."""
    path = source / PLAN_FILE
    return list(read_plan(path).dropped_layers()) if path.exists() else []


def _facts(scheme: Scheme, rows: Tensor | None, draw: Draw | None) -> dict[str, Any]:
    """What the manifest says of the quantization."""
    facts: dict[str, Any] = {
        "scheme": scheme.name,
        "group_size": scheme.group_size,
        "method": "rtn" if rows is None else "gptq",
    }
    if rows is not None:
        facts |= {"rows": rows.shape[0], "sequence_length": rows.shape[1]}
        facts |= {"draw": draw.model_dump(mode="json") if draw else None}
    return facts


def _quantized_dtypes(
    full: Mapping[str, torch.dtype], matrices: Collection[str], scheme: Scheme, scale_dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Return the data types that tensors are stored in; `full`: those of the unquantized ones."""
    found: dict[str, torch.dtype] = {}
    for name, dtype in full.items():
        found |= parts_of(name, scheme, scale_dtype) if name in matrices else {name: dtype}
    return found


def _write(layers: CheckpointLayers, scheme: Scheme, folder: Path, fit: Fit | None) -> None:
    """Write the weights."""
    scale_dtype = main_dtype(layers.stored)
    matrices = set(quantized_tensors(layers.anatomy))
    full = {name: DTYPES[header.dtype] for name, header in layers.stored.items()}
    with writing(folder, _quantized_dtypes(full, matrices, scheme, scale_dtype)) as writer:
        layers.copy_around(writer)

        def sink(quantized: Any, rest: Any) -> None:
            for name, matrix in quantized.items():
                writer.add(tensors_of(name, matrix, scale_dtype))
            layers.write(rest, writer)

        quantize_layers(layers, scheme, sink, fit, scale_dtype)


def _set_config(config: Any, scheme: Scheme, folder: Path) -> None:
    """Have the config.json of a checkpoint say how its weights are quantized."""
    matrices = set(quantized_tensors(read_anatomy(config)))
    linears = (name for name, module in skeleton(config).named_modules() if isinstance(module, nn.Linear))
    ignored = [name for name in linears if f"{name}.weight" not in matrices]
    content = files.read_object(folder / files.CONFIG)
    content[CONFIG_FIELD] = config_of(scheme, ignored)
    files.write_object(folder / files.CONFIG, content)
