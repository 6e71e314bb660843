"""Quantizes a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.anatomy import layers_path, read_anatomy
from numprune.blocks import Anatomy
from numprune.byte_budget import LEVELS, MIXED, SchemeName
from numprune.dtypes import name_of
from numprune.errors import InputError, IntegrityError
from numprune.export import card_changes, checkpoint, compressed_tensors, files, genai, manifest
from numprune.export.config import write_config
from numprune.export.shards import writing
from numprune.export.streaming import CheckpointLayers
from numprune.export.weights import DTYPES, dtypes_of, main_dtype
from numprune.flows.steps.prune import describe, plan_facts
from numprune.plans import PLAN_FILE, Draw, Plan, read_plan
from numprune.quantization import BlockSchemes, Quantized, Scheme, check_quantizable, schemes_by_tensor
from numprune.quantization.allocation import planned_schemes
from numprune.quantization.compressed_tensors import (
    CONFIG_FIELD,
    QuantizationConfig,
    config_of,
    read_quantization,
    tensors_of,
)
from numprune.quantization.compressed_tensors import dtypes_of as dtypes_of_parts
from numprune.quantization.lm_head import LmHeadBits, moments_of, rounding
from numprune.quantization.walk import Fit, check_target, quantize_layers
from numprune.renumber import renumber_tensors
from numprune.target import not_split
from numprune.tensors import tensor_table


def quantize_checkpoint(
    source: Path,
    schemes: BlockSchemes,
    out: Path,
    device: torch.device,
    *,
    rows: Tensor | None = None,
    draw: Draw | None = None,
    dense: Path | None = None,
    lm_head_bits: LmHeadBits = 8,
) -> dict[str, Any]:
    """Write the quantized `source` to the new folder `out`; return the figures. One layer is in memory at a time.

    Args:
        schemes: that the blocks are quantized to, by their names in `source`; of none, `out` is a copy.
        rows: (N, S) int64 calibration tokens for GPTQ; None rounds each weight separately.
        draw: the source of the rows.
        dense: the model that `source` was pruned from, whose residual stream is the target; None: its own.
        lm_head_bits: 4 rounds the output matrix, too (numprune.quantization.lm_head).

    Raises:
        InputError: `out` exists, or the model, rows or dense model cannot be used.
        IntegrityError: a file is damaged.
    """
    check_request(source, schemes, dense, lm_head_bits=lm_head_bits)
    config, plan = checkpoint.read_config(source), plan_of(source)
    anatomy = read_anatomy(config)
    matrices = schemes_by_tensor(anatomy, schemes)
    lm_head_bits = lm_head_bits if matrices else 8
    parents = {"base": manifest.folder_digest(source)} | ({"dense": manifest.folder_digest(dense)} if dense else {})
    facts = _facts(anatomy, schemes, rows, draw, lm_head_bits)
    with manifest.creating(out, kind="checkpoint", parents=parents, facts={"quantization": facts}) as folder:
        layers = CheckpointLayers(source, scratch=folder, device=device)
        target = CheckpointLayers(dense, scratch=folder, device=device) if dense else None
        dropped, coordinates = (plan.dropped_layers(), plan.coordinates()) if plan and dense else ([], None)
        fit = Fit(rows, target, dropped, coordinates=coordinates) if matrices and rows is not None else None
        _write(layers, schemes, folder, fit, lm_head_bits)
        checkpoint.copy_around_weights(config, source, folder)
        if matrices:
            card_changes.set_quantization(folder, _set_config(config, matrices, folder), lm_head_bits)
        checkpoint.audit(folder)
        _check_budget(anatomy, plan, schemes, checkpoint.weight_bytes(folder))
    return {
        **{name: facts[name] for name in ("scheme", "group_size", "bits", "lm_head_bits")},
        "digest": manifest.read(out).digest,
        "weight_bytes_before": checkpoint.weight_bytes(source),
        "weight_bytes_after": checkpoint.weight_bytes(out),
    }


def write_quantized(
    model: PreTrainedModel,
    matrices: Mapping[str, Quantized],
    schemes: BlockSchemes,
    base: Path,
    plan: Plan | None,
    out: Path,
    *,
    rows: Tensor | None = None,
    draw: Draw | None = None,
    lm_head_bits: LmHeadBits = 8,
    recovery: Mapping[str, Any] | None = None,
) -> None:
    """Write a model that was quantized in memory to the new folder `out`, as `quantize_checkpoint` does.

    Args:
        model: as `quantize_model` returned it, with its quantized `matrices`.
        schemes: that its blocks were quantized to.
        base: the checkpoint that it was made from.
        plan: by which it was pruned before; None: it was not.
        rows, draw, lm_head_bits: as for `quantize_checkpoint`.
        recovery: how it was trained in memory before, for the manifest; None: it was not.

    Raises:
        InputError: `out` exists.
        IntegrityError: a value does not fit in the data type that it is stored in, or the weights in the plan's budget.
    """
    anatomy = read_anatomy(model.config)
    parents = {"base": manifest.folder_digest(base)}
    facts: dict[str, Any] = {"quantization": _facts(anatomy, schemes, rows, draw, lm_head_bits)}
    if plan is not None:
        facts |= plan_facts(plan)
    if recovery is not None:
        facts["recovery"] = recovery
    stored = checkpoint.audit(base)
    scale_dtype = main_dtype(stored)
    by_name = {name: matrix.scheme for name, matrix in matrices.items()}
    dtypes = dtypes_of(stored, tensor_table(checkpoint.read_config(base)).tied)
    full = renumber_tensors(dtypes, layers_path(model.config), plan.dropped_layers() if plan else ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    with manifest.creating(out, kind="checkpoint", parents=parents, facts=facts) as folder:
        with writing(folder, _quantized_dtypes(full, by_name, scale_dtype)) as writer:
            for name, tensor in checkpoint.stored_tensors(model, state).items():
                whole = name not in matrices
                writer.add({name: tensor} if whole else tensors_of(name, matrices[name], scale_dtype))
        if plan is None:
            checkpoint.copy_around_weights(checkpoint.read_config(base), base, folder)
        else:
            model.config.architectures, model.config.dtype = [type(model).__name__], scale_dtype
            write_config(model.config, base, folder)
            files.carry(base, folder)
        quantized = _set_config(model.config, by_name, folder) if matrices else None
        if plan is not None:
            describe(folder, base, plan)
        if recovery is not None:
            card_changes.set_training(folder, card_changes.distilled(recovery))
        if quantized is not None:
            card_changes.set_quantization(folder, quantized, lm_head_bits)
        checkpoint.audit(folder)
        _check_budget(anatomy, plan or plan_of(base), schemes, checkpoint.weight_bytes(folder))


def schemes_of(asked: str, group_size: int | None, source: Path) -> BlockSchemes:
    """Return what to quantize the checkpoint `source` to.

    Args:
        asked: a scheme for all blocks, or "mixed": those of the plan that `source` was pruned by.
        group_size: channels that share a scale, of w4a16; None: whole rows do. A plan's groups are its own.

    Raises:
        InputError: "mixed", and there is no plan, or its budget did not choose a scheme for each block.
    """
    if asked != MIXED:
        return Scheme(cast(SchemeName, asked), group_size)
    plan = with_schemes(plan_of(source), source)
    if group_size not in (None, plan.target.quantization_group):
        raise InputError(
            f"group_size is {group_size}, and the plan of {source} has groups of {plan.target.quantization_group}; "
            "leave the group size out"
        )
    return planned_schemes(plan)


def with_schemes(plan: Plan | None, source: Path) -> Plan:
    """Return the plan, whose budget has chosen a scheme for each block; `source` is named in the error.

    Raises InputError: there is no such plan.
    """
    if plan is None or plan.budget is None or plan.budget.levels != LEVELS[MIXED]:
        raise InputError(
            f"{source}: has no plan with a scheme for each block; prune with a budget and the scheme {MIXED}, or "
            "choose one scheme for all blocks"
        )
    return plan


def check_request(
    source: Path,
    schemes: BlockSchemes,
    dense: Path | None = None,
    tensor_parallel: int = 1,
    lm_head_bits: LmHeadBits = 8,
) -> None:
    """Refuse a quantization that is not supported, or that the given number of GPUs cannot share.

    Raises InputError.
    """
    config = checkpoint.read_config(source)
    anatomy = read_anatomy(config)
    compressed_tensors.refuse_quantized(source, "quantization")
    if faults := not_split(anatomy, tensor_parallel):
        raise InputError(
            f"--tensor-parallel {tensor_parallel} does not divide {'; '.join(faults)}; choose a smaller one, or prune "
            f"again with --tensor-parallel {tensor_parallel}"
        )
    check_quantizable(anatomy, schemes, tensor_parallel)
    genai.check_lm_head(config, [schemes] if isinstance(schemes, Scheme) else schemes.values(), lm_head_bits)
    if dense is not None:
        compressed_tensors.refuse_quantized(dense, "--dense")
        plan = plan_of(source)
        dropped, hidden = (plan.dropped_layers(), plan.hidden) if plan else ([], None)
        check_target(anatomy, read_anatomy(checkpoint.read_config(dense)), dropped, hidden)


def target_of(source: Path, dense: Path) -> Path | None:
    """Return the model to whose residual stream GPTQ fits: `dense`, or None for one that is rotated in `source`."""
    plan = plan_of(source)
    return None if plan and plan.hidden and plan.hidden.basis == "fisher" else dense


def dropped_layers(source: Path) -> list[int]:
    """Return the layers that a checkpoint lacks of the model that it was pruned from."""
    plan = plan_of(source)
    return plan.dropped_layers() if plan else []


def plan_of(source: Path) -> Plan | None:
    """Return the plan of the pruned checkpoint `source`, or None."""
    path = source / PLAN_FILE
    return read_plan(path) if path.exists() else None


def _named(anatomy: Anatomy, schemes: BlockSchemes) -> dict[str, Any]:
    """Return the facts `scheme`, `group_size` and `bits`."""
    if isinstance(schemes, Scheme):
        return {"scheme": schemes.name, "group_size": schemes.group_size, "bits": {}}
    sizes = [scheme.group_size for scheme in schemes.values() if scheme.group_size is not None]
    bits = {
        block.name: schemes[block.name].bits if block.name in schemes else 8 * anatomy.bytes_per_value
        for block in anatomy.blocks
        if block.units
    }
    return {"scheme": MIXED, "group_size": max(sizes, default=None), "bits": bits}


def _facts(
    anatomy: Anatomy, schemes: BlockSchemes, rows: Tensor | None, draw: Draw | None, lm_head_bits: LmHeadBits
) -> dict[str, Any]:
    """Return the manifest's facts about the quantization."""
    method = "rtn" if rows is None else "gptq"
    facts = {**_named(anatomy, schemes), "method": method, "lm_head_bits": lm_head_bits}
    if rows is not None:
        facts |= {"rows": rows.shape[0], "sequence_length": rows.shape[1]}
        facts |= {"draw": draw.model_dump(mode="json") if draw else None}
    return facts


def _quantized_dtypes(
    full: Mapping[str, torch.dtype], matrices: Mapping[str, Scheme], scale_dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Return the data types that tensors are stored in; `full`: those of the unquantized ones."""
    found: dict[str, torch.dtype] = {}
    for name, dtype in full.items():
        parts = dtypes_of_parts(name, matrices[name], name_of(scale_dtype)) if name in matrices else {}
        found |= {part: getattr(torch, of_part) for part, of_part in parts.items()} or {name: dtype}
    return found


def _check_budget(anatomy: Anatomy, plan: Plan | None, schemes: BlockSchemes, found: int) -> None:
    """Refuse weights of more bytes than the budget that chose these schemes. Raises IntegrityError."""
    if plan is None or plan.budget is None:
        return
    chosen = schemes_by_tensor(anatomy, planned_schemes(plan))
    if schemes_by_tensor(anatomy, schemes) == chosen and found > plan.budget.limit:
        raise IntegrityError(
            f"the quantized weights take {found:,} bytes, and the plan's budget is {plan.budget.limit:,}; prune again, "
            "or remove the budget from an edited plan"
        )


def _write(
    layers: CheckpointLayers, schemes: BlockSchemes, folder: Path, fit: Fit | None, lm_head_bits: LmHeadBits
) -> None:
    """Write the weights."""
    scale_dtype = main_dtype(layers.stored)
    matrices = schemes_by_tensor(layers.anatomy, schemes)
    full = {name: DTYPES[header.dtype] for name, header in layers.stored.items()}
    with writing(folder, _quantized_dtypes(full, matrices, scale_dtype)) as writer:

        def sink(quantized: Any, rest: Any) -> None:
            for name, matrix in quantized.items():
                writer.add(tensors_of(name, matrix, scale_dtype))
            layers.write(rest, writer)

        leaving = quantize_layers(layers, schemes, sink, fit, scale_dtype)
        rounded = None
        if lm_head_bits == 4:
            with layers.last_norm() as norm:
                moments = None if leaving is None else moments_of(norm, leaving, layers.device)
            rounded = rounding(moments)
        layers.copy_around(writer, rounded=rounded)


def _set_config(config: Any, schemes: Mapping[str, Scheme], folder: Path) -> QuantizationConfig:
    """Have the config.json of a checkpoint say how its weights are quantized; `schemes`: of each by its name."""
    paths = {name.removesuffix(".weight"): scheme for name, scheme in schemes.items()}
    linears = (name.removesuffix(".weight") for name in tensor_table(config).linear)
    content = files.read_object(folder / files.CONFIG)
    content[CONFIG_FIELD] = config_of(paths, [name for name in linears if name not in paths])
    files.write_object(folder / files.CONFIG, content)
    found = read_quantization(content)
    assert found is not None
    return found
