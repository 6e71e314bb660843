"""Prunes a checkpoint."""

import hashlib
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune import pruning
from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy
from numprune.budget import budget_of, kv_bytes
from numprune.byte_budget import LEVELS, ByteBudget, ValueBytes
from numprune.cache_budget import KvBudget, SequenceBudget
from numprune.corpus import rows_digest
from numprune.dtypes import name_of
from numprune.errors import InputError, IntegrityError
from numprune.export import card, compressed_tensors, manifest
from numprune.export.checkpoint import (
    audit,
    check_vocabulary,
    load_model,
    read_config,
    save,
    save_around_weights,
    text_tokenizer,
    weight_bytes,
)
from numprune.export.shards import writing
from numprune.export.streaming import CheckpointLayers
from numprune.export.tasks import load_task
from numprune.export.tokenizer import other_reading
from numprune.export.weights import DTYPES, dtypes_of
from numprune.families import FAMILIES
from numprune.flows.sections import Prune
from numprune.flows.steps.results import PrunedCheckpoint, SequenceCache
from numprune.layers import Layers, ModelLayers
from numprune.option_checks import check_options
from numprune.options import PruneOptions
from numprune.options import options_of as options_of_plan
from numprune.placement import place
from numprune.planned import check_plan
from numprune.plans import PLAN_FILE, Draw, DroppedLayer, HiddenPlan, Plan, read_plan
from numprune.processes import ALONE, Processes, check_shareable
from numprune.quantization.allocation import Form, block_bytes
from numprune.renumber import renumber_tensors
from numprune.search.refine import check_searchable
from numprune.shape import ShapeChoice
from numprune.shaping import check_comparable, choose_shape
from numprune.surgery import skeleton
from numprune.target import Target
from numprune.tensors import tensor_table
from numprune.windowing import windowed

logger = logging.getLogger(__name__)


def device_of(device: str) -> torch.device:
    """The device that "auto" means here, or the requested one."""
    available = torch.cuda.is_available()
    return torch.device("cuda" if device == "cuda" or (device == "auto" and available) else "cpu")


def options_of(asked: Prune, target: Target, base: Path, scheme: str) -> PruneOptions:
    """Return the options of a recipe for the model in `base`; `scheme` as in `byte_budget`."""
    allowed = asked.allowed
    budget = None if allowed.bytes is None else byte_budget(base, allowed.bytes, scheme)
    fields = asked.model_dump(exclude={"stream", "budget", "hidden_size", "drop_layers"}) | asked.shape_options()
    fields["window"] = asked.window or None
    cache = None if allowed.kv is None else kv_budget(base, allowed.kv)
    sequence = None if allowed.sequence is None else sequence_budget(base, allowed.sequence)
    return PruneOptions(**fields, target=target, budget=budget, kv_budget=cache, sequence_budget=sequence)


def planned(path: Path, asked: Prune) -> tuple[Plan, PruneOptions]:
    """Return the plan in a file and the options to follow it with: the recipe's for what it does not decide."""
    plan = read_plan(path).model_copy(update={"compensation": asked.compensation, "damping": asked.damping})
    return plan, replace(options_of_plan(plan), batch_size=asked.batch_size)


def byte_budget(base: Path, limit: int, scheme: str) -> ByteBudget:
    """Return a budget for the pruned model of `base`.

    Args:
        limit: bytes that its weights may take.
        scheme: of its later quantization, a key of `LEVELS`.

    Raises:
        InputError: the matrices of the blocks are stored in different precisions, or as `audit`.
        IntegrityError: as `audit`.
    """
    config = read_config(base)
    anatomy, table = read_anatomy(config), tensor_table(config)
    # Pruning writes neither copies of tied tensors nor buffers, which the audit leaves out.
    stored = {name: header for name, header in audit(base).items() if name not in table.tied}
    matrices = (f"{block.path}.{part.tensor}" for block in anatomy.blocks for part in block.slices)
    dtypes = {DTYPES[stored[part].dtype] for name in matrices for part in table.parts[name]}
    if len(dtypes) > 1:
        raise InputError(
            f"budget: the layers of {base} are stored in {' and '.join(sorted(map(name_of, dtypes)))}; store them in "
            "one precision, or prune by a ratio"
        )
    value = cast(ValueBytes, dtypes.pop().itemsize)
    blocks = sum(block_bytes(block, Form(block.size, None), value) for block in anatomy.blocks)
    return ByteBudget(limit, sum(header.bytes for header in stored.values()) - blocks, value, LEVELS[scheme])


def kv_budget(base: Path, limit: int) -> KvBudget:
    """Return a budget of `limit` bytes of KV cache per token, in the data type of the checkpoint. Raises InputError."""
    return KvBudget(limit, read_anatomy(read_config(base)).bytes_per_value)


def sequence_budget(base: Path, asked: tuple[int, int]) -> SequenceBudget:
    """Return a budget of bytes of KV cache at a context, in the data type of the checkpoint. Raises InputError."""
    limit, context = asked
    return SequenceBudget(limit, context, read_anatomy(read_config(base)).bytes_per_value)


def prune_checkpoint(
    base: Path,
    rows: Tensor,
    options: PruneOptions,
    out: Path,
    device: torch.device,
    *,
    draw: Draw | None = None,
    stream: bool = False,
    plan: Plan | None = None,
    shape: ShapeChoice | None = None,
    origin: Path | None = None,
    processes: Processes = ALONE,
) -> PrunedCheckpoint:
    """Write the pruned `base` to the new folder `out`, in the base's precision, with its plan; return the figures.

    `draw`: the source of the rows, for the plan. `stream`: only a layer and the next one are in memory, with hidden
    states in files on `out`'s disk; the result is the same. `plan`: the plan to follow, with its own `options`.
    `shape`: how that of the options was chosen; None: if they have candidates, one is chosen here.
    `origin`: the model that `base` was trained from, for the model card; None: `base` is the user's own.
    `processes`: that share the rows; all call this, one writes, and all get the figures.

    Raises InputError (`out` exists, or the model, rows, options or plan cannot be used), IntegrityError, ProcessError.
    """
    compressed_tensors.refuse_quantized(base, "pruning")
    anatomy, digest = read_anatomy(read_config(base)), manifest.folder_digest(base)
    if plan is None:
        _check(anatomy, rows, options, processes, stream=stream)
        options, chosen = with_one_shape(base, rows, options, device, stream=stream)
        shape = shape or chosen
    else:
        check_applies(plan, anatomy, base, digest)
        check_shareable(options, len(rows), processes, planned=True)
    if problem := other_reading(base):
        logger.warning("%s", problem)
    coordinates = [*range(options.hidden_size or 0)]  # which ones is not among the facts
    hidden = HiddenPlan(size=anatomy.hidden_size, kept=coordinates, basis=options.basis) if coordinates else None
    described = pruning.describe(anatomy, rows, options, {}, hidden=hidden).drawn(draw, digest)
    processes.require_same("models, texts and options", f"{described.model_dump_json()} {options} {plan} {stream}")
    with _checkpoint(out, digest, described) if processes.is_main else nullcontext() as folder:
        if stream:
            made = _prune_streamed(base, rows, options, folder, folder or out.parent, device, plan, processes)
        else:
            made = _prune_in_memory(base, rows, options, folder, device, plan, processes)
        made = made.drawn(draw, digest).model_copy(update={"shape": plan.shape if plan else shape})
        processes.require_same("plans", made.model_dump_json())
        if folder is not None:
            describe(folder, origin or base, made)
            check_budget(made, folder)
    processes.wait()
    # From the files, not from the float32 model in memory: the size of the cache depends on the data type.
    sides = [read_anatomy(read_config(folder)) for folder in (base, out)]
    before, after = map(budget_of, sides)
    return PrunedCheckpoint(
        digest=manifest.read(out).digest,
        before=before,
        after=after,
        prunable_ratio_removed=1 - after.prunable_parameters / before.prunable_parameters,
        weight_bytes_before=weight_bytes(base),
        weight_bytes_after=weight_bytes(out),
        plan=hashlib.sha256((out / PLAN_FILE).read_bytes()).hexdigest(),
        dropped_layers=list(made.dropped),
        dropped_blocks=list(made.dropped_blocks),
        window=made.window,
        windowed_layers=made.windowed_layers(),
        cache=_cache(made, *sides) if made.window is not None else None,
        schemes=dict(made.schemes()),
        kept_units=_kept_units(made),
        hidden_size=[len(made.hidden.kept), made.hidden.size] if made.hidden else None,
        refinement=made.refinement,
        price=made.price,
        shape=made.shape,
    )


def _cache(plan: Plan, before: Anatomy, after: Anatomy) -> SequenceCache:
    context = plan.sequence_budget.context if plan.sequence_budget else before.context
    return SequenceCache(context, kv_bytes(before, context), kv_bytes(after, context))


def _check(anatomy: Anatomy, rows: Tensor, options: PruneOptions, processes: Processes, *, stream: bool) -> None:
    check_options(anatomy, options)
    check_shareable(options, len(rows), processes)
    if options.refine != "none":
        check_searchable(len(rows), resident=not stream)


def with_one_shape(
    base: Path, rows: Tensor, options: PruneOptions, device: torch.device, *, stream: bool
) -> tuple[PruneOptions, ShapeChoice | None]:
    """Return the options with one of their shapes, and how it was chosen; None: there were no candidates.

    Raises InputError as `check_comparable` and `choose_shape`.
    """
    if not options.shapes:
        return options, None
    check_comparable(len(rows), resident=not stream)
    return choose_shape(place(load_model(base), device, models=2), rows, options, load_task(base))


def check_applies(plan: Plan, anatomy: Anatomy, base: Path, digest: str) -> None:
    """Raises InputError unless the plan can be followed on the model in `base`, whose files have this digest."""
    check_plan(anatomy, plan)
    if plan.base not in (None, digest):
        raise InputError(
            f"the plan was made for a model with digest {plan.base}, and {base} has {digest}: its units say "
            'nothing of other weights; remove "base" from the plan to apply it nevertheless'
        )


def write_pruned(model: PreTrainedModel, plan: Plan, base: Path, out: Path) -> None:
    """Write `model`, which was made by `plan` from that in `base`, to the new folder `out`.

    Raises InputError, IntegrityError.
    """
    with _checkpoint(out, manifest.folder_digest(base), plan) as folder:
        save(model, base, folder, dropped=plan.dropped_layers())
        describe(folder, base, plan)
        check_budget(plan, folder)


def check_budget(plan: Plan, folder: Path) -> None:
    """Refuse weights of more bytes than the plan's budget, unless they will be quantized. Raises IntegrityError."""
    found = weight_bytes(folder)
    if plan.budget is not None and not plan.schemes() and found > plan.budget.limit:
        raise IntegrityError(
            f"the pruned weights take {found:,} bytes, and the budget is {plan.budget.limit:,}; prune again, or remove "
            "the budget from an edited plan"
        )


def _checkpoint(out: Path, base_digest: str, plan: Plan) -> AbstractContextManager[Path]:
    return manifest.creating(out, kind="checkpoint", parents={"base": base_digest}, facts=plan_facts(plan))


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Return the manifest's facts about the plan."""
    return {
        "plan": plan.model_dump(
            mode="json",
            exclude={
                "blocks": True,
                "dropped": True,
                "dropped_blocks": True,
                "windowed": True,
                "window_prices": True,
                "hidden": {"kept"},
                "splits": True,
                "refinement": True,
                "price": True,
                "shape": True,
            },
        )
    }


def describe(folder: Path, base: Path, plan: Plan) -> None:
    """Record the provenance in the checkpoint."""
    plan.write(folder / PLAN_FILE)
    card.write(folder, base, plan)


def _kept_units(plan: Plan) -> dict[str, list[int]]:
    """Return [kept, of] by block name; also, if members were removed, `NAME.query_heads`, `.qk_dims` or `.channels`."""
    found = {name: [len(block.kept), block.units] for name, block in plan.blocks.items()}
    if any(block.kept_members for block in plan.blocks.values()):
        for name, block in plan.blocks.items():
            units, members = block.to_kept().size
            if name.endswith(".experts"):
                found[f"{name}.channels"] = [members, block.members]
            elif name.endswith(".attention") and FAMILIES[plan.family].attention.scores:
                found[f"{name}.qk_dims"] = [members, block.members]
            elif block.members > 1:
                found[f"{name}.query_heads"] = [units * members, block.units * block.members]
    return found


def _prune_in_memory(
    base: Path,
    rows: Tensor,
    options: PruneOptions,
    folder: Path | None,
    device: torch.device,
    plan: Plan | None,
    processes: Processes,
) -> Plan:
    """Prune, and write the result to `folder`, if this process has one."""
    model = place(load_model(base), device, models=2)  # and the pruned one
    pruned = pruning.prune(model, rows, options, task=load_task(base), plan=plan, processes=processes)
    if folder is not None:
        save(pruned.model, base, folder, dropped=pruned.plan.dropped_layers())
    return pruned.plan


def _prune_streamed(
    base: Path,
    rows: Tensor,
    options: PruneOptions,
    folder: Path | None,
    scratch: Path,
    device: torch.device,
    plan: Plan | None,
    processes: Processes,
) -> Plan:
    """Prune layer by layer, likewise; `scratch`: a folder with space for hidden states."""
    stored = CheckpointLayers(base, scratch=scratch, device=device, processes=processes)
    check_vocabulary(base, text_tokenizer(base), stored.config)
    layers = windowed(stored, rows, options, plan)
    dropped = pruning.what_to_drop(layers, rows, options) if plan is None else plan.all_dropped
    gone = [drop.layer for drop in dropped if isinstance(drop, DroppedLayer)]
    narrowing = pruning.narrowing_of(layers, rows, options, plan)
    if folder is None:
        return pruning.prune_layers(
            layers, rows, options, lambda _: None, dropped=dropped, plan=plan, narrowing=narrowing
        )
    dtypes = dtypes_of(stored.stored, tensor_table(stored.config).tied)
    with writing(folder, renumber_tensors(dtypes, layers.anatomy.layers_path, gone)) as writer:
        made = pruning.prune_layers(
            layers,
            rows,
            options,
            lambda tensors: stored.write(tensors, writer),
            dropped=dropped,
            plan=plan,
            narrowing=narrowing,
        )
        stored.copy_around(writer, narrowing)  # last, because the output matrix is refitted last
    save_around_weights(skeleton(pruning.config_after(layers, made)), base, folder)
    return made


def plan_checkpoint(
    base: Path,
    rows: Tensor,
    options: PruneOptions,
    scratch: Path,
    device: torch.device,
    *,
    draw: Draw | None = None,
    stream: bool = False,
    processes: Processes = ALONE,
) -> Plan:
    """Return the plan by which `base` would be pruned, leaving nothing on disk.

    `scratch`: a folder with space for the hidden states of `stream`; the other arguments are `prune_checkpoint`'s.

    Raises InputError, IntegrityError, ProcessError.
    """
    compressed_tensors.refuse_quantized(base, "pruning")
    _check(read_anatomy(read_config(base)), rows, options, processes, stream=stream)
    options, shape = with_one_shape(base, rows, options, device, stream=stream)
    digest = manifest.folder_digest(base)
    processes.require_same("models, texts and options", f"{digest} {rows_digest(rows)} {options} {stream}")
    layers: Layers
    if stream:
        layers = CheckpointLayers(base, scratch=scratch, device=device, processes=processes)
        check_vocabulary(base, text_tokenizer(base), layers.config)
    else:
        layers = ModelLayers(place(load_model(base), device), load_task(base), processes)
    layers = windowed(layers, rows, options)
    dropped = pruning.what_to_drop(layers, rows, options)
    narrowing = pruning.narrowing_of(layers, rows, options)
    plan = pruning.plan_layers(layers, rows, options, dropped=dropped, narrowing=narrowing)
    plan = plan.model_copy(update={"shape": shape}).drawn(draw, digest)
    processes.require_same("plans", plan.model_dump_json())
    return plan
