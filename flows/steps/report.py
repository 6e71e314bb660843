"""Assembles and judges the report."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.export import precision
from numprune.export.checkpoint import read_config, weight_bytes
from numprune.flows.amounts import size
from numprune.flows.sections import Learn, Prune, Recover
from numprune.flows.steps.results import (
    GeneratedText,
    Judgement,
    LearnedMasks,
    PrunedCheckpoint,
    QuantizedCheckpoint,
    RecoveredCheckpoint,
    TimedCheckpoint,
    Timings,
)
from numprune.serving import benchmark, gates
from numprune.serving.benchmark import vllm as benchmark_vllm
from numprune.serving.junit import junit
from numprune.serving.report import (
    UNITS,
    Environment,
    Identity,
    Report,
    combine,
    markdown,
    package_versions,
    page,
    write,
)
from numprune.units import OF_CODES

JSON, TEXT, PAGE, JUNIT = "report.json", "report.md", "report.html", "junit.xml"


def assemble(
    name: str,
    identity: Mapping[str, Any],
    sections: Mapping[str, Any],
    benchmarks: Mapping[str, Mapping[str, Any]],
    price_per_hour: float | None = None,
    candidates: int = 1,
) -> Report:
    """Assemble a report, not judged yet.

    Args:
        name: of the run, with the time.
        identity: digests; versions are added.
        sections: `pruning`, `sizes`, `quality`, `parity`: those that exist.
        benchmarks: runtime -> result of `run_benchmark`; at least one.
        price_per_hour: of the machine, in any currency.
        candidates: how many this one is chosen among.
    """
    created = datetime.now(UTC)
    environments = [Environment.model_validate(found["environment"]) for found in benchmarks.values()]
    return Report(
        created=created,
        run_id=f"{name}-{created:%Y%m%dT%H%M%SZ}",
        identity=Identity.model_validate({**identity, "packages": package_versions()}),
        environment=reduce(combine, environments),
        speed={runtime: found["speed"] for runtime, found in benchmarks.items()},
        memory={runtime: found["memory"] for runtime, found in benchmarks.items()},
        price_per_hour=price_per_hour,
        candidates=candidates,
        **sections,
    )


def pruning_section(asked: Prune, learned: Learn | None, pruned: PrunedCheckpoint) -> dict[str, Any]:
    """The requested pruning and its result; `learned`: the masks that chose the units, or None."""
    before, after, found = pruned.before, pruned.after, pruned.refinement
    cached = before.kv_bytes_per_token, after.kv_bytes_per_token  # none of an encoder
    if pruned.cache is not None:
        cached = pruned.cache.before, pruned.cache.after
    return {
        "criterion": learned.method if learned else asked.criterion,
        **asked.model_dump(include={"allocation", "compensation"}),
        "ratio_asked": asked.ratio if asked.allowed.sizes_by_ratio else None,
        "ratio_counts": learned.constraint if learned and learned.constraint in ("flops", "kv-bytes") else "parameters",
        "budget_asked": asked.allowed.bytes,
        "kv_budget_asked": asked.allowed.kv,
        "price": None if pruned.price is None else {**pruned.price.model_dump(), "summary": str(pruned.price)},
        "latency": pruned.latency if isinstance(pruned, TimedCheckpoint) else None,
        "ratio_removed": {
            "prunable": 1 - after.prunable_parameters / before.prunable_parameters,
            "parameters": 1 - after.parameters / before.parameters,
            "kv_bytes": 1 - cached[1] / cached[0] if cached[0] else None,
            "kv_context": None if pruned.cache is None else pruned.cache.context,
        },
        "kept_units": pruned.kept_units,
        "dropped_layers": [drop.layer for drop in pruned.dropped_layers],
        "window": pruned.window,
        "windowed_layers": pruned.windowed_layers,
        "sequence_budget_asked": None if asked.allowed.sequence is None else _of_sequence(*asked.allowed.sequence),
        "hidden_size": pruned.hidden_size,
        "shape": pruned.shape.lines() if pruned.shape else [],
        "refinement": None if found is None else {**found.model_dump(), "summary": str(found)},
    }


def _of_sequence(limit: int, context: int) -> str:
    return f"at most {size(limit)} of KV cache at {context:,} tokens"


def sizes(baseline: Path, candidate: Path) -> dict[str, Any]:
    """The report's section `sizes` of two stored checkpoints."""
    one, other = (budget_of(read_anatomy(read_config(folder))) for folder in (baseline, candidate))
    return {
        "dtype": {"baseline": precision.stored(baseline), "candidate": precision.stored(candidate)},
        "parameters": {"baseline": one.parameters, "candidate": other.parameters},
        "weight_bytes": {"baseline": weight_bytes(baseline), "candidate": weight_bytes(candidate)},
        **(
            {"kv_bytes_per_token": {"baseline": one.kv_bytes_per_token, "candidate": other.kv_bytes_per_token}}
            if one.kv_bytes_per_token
            else {}
        ),
        "flops_per_token": {"baseline": one.flops_per_token, "candidate": other.flops_per_token},
    }


def learning_section(asked: Learn, learned: LearnedMasks) -> dict[str, Any]:
    """How the masks were trained that chose the units."""
    return {
        "method": asked.method,
        "variant": learned.variant,
        "seed": asked.seed,
        "learning_rate": asked.learning_rate if learned.model else None,
        "tokens": learned.tokens,
        "steps": learned.steps,
        "best_step": learned.best_step,
        "seconds": learned.seconds,
        "kept_by_masks": learned.kept,
        "selection_divergence": learned.divergence,
        "unit": learned.unit,
    }


def recovery_section(
    asked: Recover, recovered: RecoveredCheckpoint, generated: GeneratedText | None = None
) -> dict[str, Any]:
    """How the pruned checkpoint was trained."""
    return {
        "method": asked.method,
        "train": asked.train,
        "seed": asked.seed,
        "learning_rate": recovered.learning_rate,
        "tokens": recovered.tokens,
        "steps": recovered.steps,
        "best_step": recovered.best_step,
        "parameters": recovered.parameters,
        "blocks": recovered.blocks,
        "seconds": recovered.seconds,
        "generated": None if generated is None else {"answers": generated.answers, "tokens": generated.tokens},
        "selection_kl_nats_per_token" if recovered.unit in (UNITS["causal-lm"], OF_CODES) else "selection_divergence": {
            "baseline": recovered.kl_before,
            "candidate": recovered.kl_after,
        },
    }


def quantization_section(quantized: QuantizedCheckpoint) -> dict[str, Any]:
    """The report's section on quantization."""
    return {
        "scheme": quantized.scheme,
        "group_size": quantized.group_size,
        "bits": quantized.bits,
        "lm_head_bits": quantized.lm_head_bits,
        "method": quantized.method,
        "weight_bytes": {"baseline": quantized.weight_bytes_before, "candidate": quantized.weight_bytes_after},
    }


def judged(report: Report, policy: Sequence[gates.Gate], out: Path) -> Judgement:
    """Judge a report, and write it to `out` in all formats."""
    report = report.judged(gates.judge(report, gates.Policy(gates=tuple(policy))))
    write(report, out / JSON)
    (out / TEXT).write_text(markdown(report), encoding="utf-8")
    (out / PAGE).write_text(page.html(report), encoding="utf-8")
    assert report.verdict is not None  # judged
    (out / JUNIT).write_text(junit(report, report.verdict), encoding="utf-8")
    return Judgement(report.verdict.outcome, report.run_id, gates.next_look(report))


def pooled(runtime: str, looks: Sequence[Timings]) -> dict[str, Any]:
    """Several looks pooled into one benchmark."""
    return benchmark_vllm.pool(looks) if runtime == "vllm" else benchmark.pool(looks)
