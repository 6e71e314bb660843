"""What numprune prune prints: a plan, and the latencies of a pruned model."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from numprune.flows.amounts import size
from numprune.flows.cli.parser import Answer

if TYPE_CHECKING:
    from numprune.blocks import Anatomy
    from numprune.plans import Plan
    from numprune.processes import Processes
    from numprune.serving.report import LatencyBudget


def latency_lines(found: "LatencyBudget") -> list[str]:
    how = f" ({found.served})" if found.served else ""
    most = f"at most {found.limit_ms:.4g} ms" + (f" for {found.speedup:g}x" if found.speedup else "")
    if found.measured is None or found.dense_measured is None:
        dense = f"dense {found.dense_predicted.ms:.4g} ms, " if found.dense_predicted else ""
        return [
            f"{found.scenario}{how}, {most}: {dense}pruned {found.predicted.ms:.4g} ms, "
            f"estimated for {found.estimated_for}, not measured"
        ]
    lines = [f"{found.scenario} in {found.runtime}{how}, {most}:"]
    for name, predicted, measured in (
        ("dense", found.dense_predicted, found.dense_measured),
        ("pruned", found.predicted, found.measured),
    ):
        low, high = measured.interval95
        expected = f"predicted {predicted.ms:.4g} ms, " if predicted else ""
        lines.append(f"  {name:<6} {expected}measured {measured.ms:.4g} ms (95 % interval {low:.4g} to {high:.4g})")
    times = "once" if found.corrections == 1 else f"{found.corrections} times"
    return [*lines, f"  the table was corrected {times}"] if found.corrections else lines


def planned_answer(base: Path, plan: "Plan", out: Path | None, started: float, processes: "Processes") -> Answer:
    """The result of `--plan-only`; writes `out`."""
    from numprune.anatomy import read_anatomy
    from numprune.budget import budget_of, kv_bytes
    from numprune.export import checkpoint
    from numprune.export.tasks import load_task
    from numprune.hidden import narrowed
    from numprune.spans import with_windows

    before = read_anatomy(checkpoint.read_config(base))
    spanning = before if plan.window is None else with_windows(before, plan.window, plan.windowed_layers())
    after = spanning.keeping(plan.sizes())
    if plan.hidden:
        after = narrowed(after, len(plan.hidden.kept), plan.hidden.basis)
    budgets = [dataclasses.asdict(budget_of(anatomy)) for anatomy in (before, after)]
    removed = 1 - budgets[1]["prunable_parameters"] / budgets[0]["prunable_parameters"]
    if out is not None and processes.is_main:
        plan.write(out)
    unit = load_task(base).unit
    data = {
        "out": str(out) if out else None,
        "before": budgets[0],
        "after": budgets[1],
        "prunable_ratio_removed": removed,
        "dropped_layers": [drop.model_dump() for drop in plan.dropped],
        "dropped_blocks": [drop.model_dump() for drop in plan.dropped_blocks],
        "window": plan.window,
        "windowed": [one.model_dump() for one in plan.windowed],
        "window_prices": plan.window_prices,
        "hidden_size": [after.hidden_size, before.hidden_size] if plan.hidden else None,
        "sizes": {name: size._asdict() for name, size in plan.sizes().items()},
        "schemes": plan.schemes(),
        "price": plan.price.model_dump() if plan.price else None,
        "shape": plan.shape.model_dump() if plan.shape else None,
        "refinement": plan.refinement.model_dump() if plan.refinement else None,
        "predicted_ms": plan.time_budget.predicted(plan.result(before)).ms if plan.time_budget else None,
        "seconds": time.perf_counter() - started,
    }
    lines = [f"{base}: {removed:.1%} of the prunable parameters would be removed; nothing is pruned"]
    lines += [
        f"  {name.replace('_', ' '):<36} {was:,} -> {budgets[1][name]:,} ({budgets[1][name] / was:.1%})"
        for name, was in budgets[0].items()
    ]
    if limit := plan.time_budget:
        known = [anatomy for anatomy in (before, plan.result(before)) if anatomy.hidden_size in limit.times]
        ms = " -> ".join(f"{limit.predicted(anatomy).ms:.4g}" for anatomy in known)
        lines.append(f"  {'predicted ms':<36} {ms} ({limit.described})")
    if plan.window is not None:
        context = plan.sequence_budget.context if plan.sequence_budget else before.context
        cache = [size(kv_bytes(anatomy, context)) for anatomy in (before, after)]
        lines.append(f"  {f'KV cache at {context:,} tokens':<36} {cache[0]} -> {cache[1]}")
    if plan.hidden:
        basis, kept = plan.hidden.basis, after.hidden_size
        lines.append(f"  {'hidden size':<36} {before.hidden_size:,} -> {kept:,} (basis {basis})")
    lines += [f"  {line}" for line in (*dropped_lines(plan, unit), *window_lines(plan, unit), *sizes_lines(after))]
    lines += [f"  {line}" for line in schemes_lines(plan)]
    lines += [f"  {line}" for line in plan.shape.lines()] if plan.shape else []
    lines += [f"  {'sizes priced at':<36} {plan.price}"] if plan.price else []
    lines += [f"  {plan.refinement}"] if plan.refinement else []
    lines += [f"plan: {out}; follow it with numprune prune {base} OUT --plan {out} --text FILE"] if out else []
    return Answer(data, "\n".join(lines), quiet=not processes.is_main)


def dropped_lines(plan: "Plan", unit: str) -> list[str]:
    dropped = [(f"layer {drop.layer}", drop.divergence) for drop in plan.dropped]
    dropped += [(drop.block, drop.divergence) for drop in plan.dropped_blocks]
    return [
        f"{f'dropped: {what}':<36} {divergence:.4f} {unit} from the dense model, before anything was refitted"
        for what, divergence in dropped
    ]


def window_lines(plan: "Plan", unit: str) -> list[str]:
    """Return the price of a window in each layer, and the layers that get one; none without a window."""
    if plan.window is None:
        return []
    label = f"window of {plan.window:,} tokens"
    alone = [
        f"{f'{label}: layer {layer}':<36} {price:.4f} {unit} from the dense model, in this layer alone"
        for layer, price in plan.window_prices.items()
    ]
    chosen = [
        f"{f'chosen: a window in layer {one.layer}':<36} {one.divergence:.4f} {unit} from the dense model"
        for one in plan.windowed
    ]
    return [*alone, *chosen]


def schemes_lines(plan: "Plan") -> list[str]:
    """Return the planned schemes, a line for each kind of block; none if no budget chose them."""
    kinds: dict[str, list[str]] = {}
    for name, block in plan.blocks.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(block.scheme or ("as stored" if block.kept else "-"))
    return [f"{f'{kind}: scheme by layer':<36} {', '.join(found)}" for kind, found in kinds.items() if plan.schemes()]


def sizes_lines(anatomy: "Anatomy") -> list[str]:
    """The sizes of all layers, one line per kind of block."""
    attention = anatomy.of_kind("attention")
    query_heads = ", ".join(str(block.heads(block.size)) for block in attention)
    lines = [f"{'attention: query heads by layer':<36} {query_heads}"]
    if any(block.scores for block in attention):
        dims = ", ".join(str(block.members) for block in attention)
        lines += [f"{'attention: qk dimensions by layer':<36} {dims}"]
    for kind, what in (("attention", "KV groups"), ("mlp", "channels"), ("experts", "experts")):
        units = ", ".join(str(block.units) for block in anatomy.of_kind(kind))
        lines += [f"{f'{kind}: {what} by layer':<36} {units}"] if units else []
    widths = ", ".join(str(block.members) for block in anatomy.of_kind("experts"))
    return [*lines, f"{'channels per expert by layer':<36} {widths}"] if widths else lines
