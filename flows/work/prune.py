"""A dense checkpoint to a pruned one."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numprune import pruning
from numprune.anatomy import read_anatomy
from numprune.budget import measure
from numprune.export import manifest
from numprune.export.checkpoint import PLAN, load, read_config, save, weight_bytes
from numprune.flows.bundle import CHECKPOINT
from numprune.flows.work.text import load_calibration
from numprune.target import Target


def device_of(device: str) -> torch.device:
    """The device that "auto" means here, or the one asked for."""
    available = torch.cuda.is_available()
    return torch.device("cuda" if device == "cuda" or (device == "auto" and available) else "cpu")


def prune_checkpoint(
    base: Path, rows: Tensor, options: pruning.PruneOptions, out: Path, device: torch.device
) -> dict[str, Any]:
    """Write the pruned `base` to the new folder `out`, in the base's precision, with its plan; return the figures.

    Raises InputError (`out` exists, or the model, rows or options cannot be used), IntegrityError.
    """
    dtype = read_config(base).dtype or torch.float32
    model, tokenizer = load(base)
    pruned = pruning.prune(model.to(device), rows, options)
    facts: dict[str, Any] = {"plan": pruned.plan.model_dump(mode="json", exclude={"blocks"})}
    with manifest.creating(
        out, kind="checkpoint", parents={"base": manifest.folder_digest(base)}, facts=facts
    ) as folder:
        save(pruned.model.cpu(), tokenizer, folder, dtype=dtype)
        pruned.plan.write(folder / PLAN)
    return {
        "digest": manifest.read(out).digest,
        # From the files, not from the models in memory, which are in float32: the bytes of the cache depend on it.
        "before": dataclasses.asdict(measure(read_anatomy(read_config(base)))),
        "after": dataclasses.asdict(measure(read_anatomy(read_config(out)))),
        "prunable_ratio_removed": pruned.prunable_ratio_removed,
        "weight_bytes_before": weight_bytes(base),
        "weight_bytes_after": weight_bytes(out),
        "plan": hashlib.sha256((out / PLAN).read_bytes()).hexdigest(),
        "kept_units": {name: [len(block.kept), block.units] for name, block in pruned.plan.blocks.items()},
    }


def make_pruned(
    out: Path, *, base: Path, rows: Path, options: dict[str, Any], target: dict[str, int], device: str
) -> dict[str, Any]:
    """Stage: the pruned checkpoint, in the folder `checkpoint`."""
    chosen = pruning.PruneOptions(**options, target=Target(**target))
    return prune_checkpoint(base, load_calibration(rows), chosen, out / CHECKPOINT, torch.device(device))
