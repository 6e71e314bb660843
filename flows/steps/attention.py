"""What the base model's attention heads attend to, on a few calibration rows."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from numprune.export.checkpoint import load, load_tokenizer
from numprune.export.streaming import CheckpointLayers
from numprune.export.tasks import load_task
from numprune.flows.steps.results import AttentionProbe
from numprune.layers import Layers, ModelLayers
from numprune.plans import Plan
from numprune.probing import attention_masses, correlations, kept_heads

_ROWS = 8
_TOKENS = 512  # of a row; attention has as many weights as the square


def probe(base: Path, rows: Tensor, device: torch.device, *, stream: bool, scratch: Path) -> AttentionProbe:
    """Run the model in `base` on a few of the rows (N, S).

    `stream`: one layer in memory at a time, with hidden states in `scratch`.
    """
    few = rows[:_ROWS, :_TOKENS]
    layers: Layers = (
        CheckpointLayers(base, scratch=scratch, device=device)
        if stream
        else ModelLayers(load(base)[0].to(device), load_task(base))
    )
    tokenizer = load_tokenizer(base)
    special = {*tokenizer.all_special_ids} - {tokenizer.mask_token_id}  # a mask stands for a word
    found = attention_masses(layers, few, special)
    return AttentionProbe(len(few), few.shape[1], {name: table.tolist() for name, table in found.items()})


def attention_section(found: AttentionProbe, plan: Plan) -> dict[str, Any]:
    """The part `attention` of the report's section on pruning: the heads, and which of them the plan keeps."""
    kept = {name: kept_heads(plan.blocks[name]) for name in found.heads}
    masses = {name: np.array(heads) for name, heads in found.heads.items()}
    return {
        **asdict(found),
        "kept": {name: heads.tolist() for name, heads in kept.items()},
        "spearman": correlations(masses, kept),
    }
