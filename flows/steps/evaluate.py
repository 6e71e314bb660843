"""Quality on held-out text, in the words of report.json."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from numprune.corpus import TokenRows
from numprune.export.checkpoint import load
from numprune.flows.steps.text import load_heldout
from numprune.quality import Comparison, Quality, compare, evaluate
from numprune.serving.report import MAXIMUM_DOCUMENTS, MAXIMUM_WORST


def compare_checkpoints(candidate: Path, baseline: Path, rows: TokenRows, device: torch.device) -> dict[str, Any]:
    """The report's section `quality`. Raises InputError, IntegrityError."""
    dense, _ = load(baseline)
    pruned, _ = load(candidate)
    return section(compare(pruned.to(device), dense.to(device), rows), rows)


def evaluate_checkpoint(model: Path, rows: TokenRows, device: torch.device) -> Quality:
    """NLL of one model. Raises InputError, IntegrityError."""
    loaded, _ = load(model)
    return evaluate(loaded.to(device), rows)


def section(found: Comparison, rows: TokenRows) -> dict[str, Any]:
    return finite(
        {
            "tokens": found.candidate.tokens,
            "documents": found.documents,
            "packed": rows.packed,
            "baseline": side(found.baseline),
            "candidate": side(found.candidate),
            "nll_delta_nats_per_token": dataclasses.asdict(found.nll_delta_nats_per_token),
            "perplexity_ratio": dataclasses.asdict(found.perplexity_ratio),
            "document_deltas": document_deltas(found, rows),
            "kl_nats_per_token": found.kl_nats_per_token,
            "top1_agreement": found.top1_agreement,
        }
    )


def document_deltas(found: Comparison, rows: TokenRows) -> dict[str, Any]:
    """Each document's difference in nats per token, or the quantiles of many; and those that lost most, by name."""
    sums = np.bincount(rows.document, found.candidate.nll - found.baseline.nll)
    tokens = np.bincount(rows.document, found.candidate.scored)
    scored = np.flatnonzero(tokens)
    deltas = sums[scored] / tokens[scored]
    few = len(deltas) <= MAXIMUM_DOCUMENTS
    values = np.sort(deltas if few else np.quantile(deltas, np.linspace(0, 1, MAXIMUM_DOCUMENTS)))
    return {
        "values": values.tolist(),
        "worst": [
            {
                "name": rows.names[scored[index]],
                "tokens": int(tokens[scored[index]]),
                "nll_delta_nats_per_token": float(deltas[index]),
            }
            for index in np.argsort(-deltas, kind="stable")[:MAXIMUM_WORST]
        ],
    }


def finite(value: Any) -> Any:
    """`value` with every number that JSON lacks (the bounds of a single sample) as null, on which no gate passes."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def side(quality: Quality) -> dict[str, Any]:
    return {"nll_nats_per_token": quality.nll_nats_per_token, "perplexity": quality.perplexity}


def make_quality(
    out: Path, *, candidate: Path, baseline: Path, rows: Path, rows_digest: str, device: str
) -> dict[str, Any]:
    """Stage: the section `quality`."""
    return compare_checkpoints(candidate, baseline, load_heldout(rows, rows_digest), torch.device(device))
