"""What the base model's attention heads attend to, on a few calibration rows."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from numprune.export.checkpoint import load_model, text_tokenizer
from numprune.export.streaming import CheckpointLayers
from numprune.export.tasks import load_task
from numprune.flows.steps.results import AttentionProbe
from numprune.layers import Layers, ModelLayers
from numprune.placement import place
from numprune.plans import Plan
from numprune.probing import attention_masses, correlations, kept_heads
from numprune.serving.report import AttentionMaps

_ROWS = 8
_TOKENS = 512  # of a row; attention has as many weights as the square


def probe(base: Path, rows: Tensor, device: torch.device, *, stream: bool, scratch: Path) -> AttentionProbe:
    """Run the model in `base` on a few of the rows.

    `stream`: a layer and the next one in memory, with hidden states in `scratch`.
    """
    few = rows[:_ROWS, :_TOKENS] if rows.dim() == 2 else rows[:_ROWS]  # images are whole
    layers = layers_of(base, device, stream=stream, scratch=scratch)
    tokenizer, special = text_tokenizer(base), set[int]()
    if tokenizer is not None:
        special = {*tokenizer.all_special_ids} - {tokenizer.mask_token_id}  # a mask stands for a word
    found = attention_masses(layers, few, special)
    tokens = layers.anatomy.tokens_of(few.shape[1:])
    return AttentionProbe(len(few), tokens, {name: table.tolist() for name, table in found.items()})


def layers_of(folder: Path, device: torch.device, *, stream: bool, scratch: Path) -> Layers:
    """Return the layers of a checkpoint; `stream`: one in memory at a time, with hidden states in `scratch`."""
    if stream:
        return CheckpointLayers(folder, scratch=scratch, device=device)
    return ModelLayers(place(load_model(folder), device), load_task(folder))


def attention_section(found: AttentionProbe, plan: Plan, maps: AttentionMaps | None = None) -> dict[str, Any]:
    """The part `attention` of the report's section on pruning: the heads, and which of them the plan keeps."""
    kept = {name: kept_heads(plan.blocks[name], len(heads)) for name, heads in found.heads.items()}
    masses = {name: np.array(heads) for name, heads in found.heads.items()}
    return {
        **asdict(found),
        "kept": {name: heads.tolist() for name, heads in kept.items()},
        "spearman": correlations(masses, kept),
        "maps": maps,
    }
