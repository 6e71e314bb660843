"""The bodies of the stages that make the candidate: masks, attention, timings, pruning, training, quantization."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numprune.flows.names import CHECKPOINT, LEARNED, LEARNED_PLAN, ROOFLINE
from numprune.flows.sections import BlockTimings, Learn, Prune, Quantize, Recover
from numprune.flows.stages import Artifact, Text, read_facts
from numprune.flows.steps.results import (
    AttentionProbe,
    LearnedMasks,
    LearningText,
    PrunedCheckpoint,
    QuantizedCheckpoint,
    RecoveredCheckpoint,
    TimedCheckpoint,
)
from numprune.hidden import Width
from numprune.served import Served
from numprune.serving.report import AttentionMaps
from numprune.target import Target
from numprune.timings import TimingTable


def make_learned(
    out: Path,
    *,
    base: Artifact,
    rows: Artifact,
    times: Artifact | None,
    asked: Learn,
    limits: Mapping[str, Any],
    target: Target,
    served: Served,
    device: str,
) -> LearnedMasks:
    """Train masks, into the folder `learned`. A killed training resumes from its last state.

    Args:
        times: the stage of `make_timings`, for a budget of time.
        limits: the fields `names.LEARNED_LIMITS` of the recipe's section on pruning.
        served: how the model is whose time counts.
    """
    import torch

    from numprune.flows.stages import kept_beside
    from numprune.flows.steps.learn import learn_checkpoint, options_of, request_of
    from numprune.flows.steps.training import load_rows

    table = read_facts(times.path, TimingTable) if times else None
    options, where = options_of(asked, limits, target, base.path, table, served), torch.device(device)
    request, draw = request_of(asked, options), read_facts(rows.path, LearningText).draw
    return learn_checkpoint(
        base.path, load_rows(rows.path), draw, options, request, out / LEARNED, where, kept_beside(out)
    )


def make_attention(out: Path, *, base: Artifact, rows: Artifact, stream: bool, device: str) -> AttentionProbe:
    """Measure what the base's attention heads attend to: shared by all ratios and methods."""
    import torch

    from numprune.flows.steps.attention import probe
    from numprune.flows.steps.text import load_calibration

    tokens, _ = load_calibration(rows.path)
    return probe(base.path, tokens, torch.device(device), stream=stream, scratch=out)


def make_attention_maps(
    out: Path, *, base: Artifact, pruned: Artifact, rows: Artifact, rows_digest: str, stream: bool, device: str
) -> AttentionMaps:
    """Draw where the heads of base and pruned model look in held-out images; `pruned`: the stage."""
    import torch

    from numprune.flows.steps.attention_maps import draw_maps
    from numprune.flows.steps.text import load_heldout

    images, where = load_heldout(rows.path, rows_digest), torch.device(device)
    return draw_maps(base.path, pruned.path / CHECKPOINT, images, where, stream=stream, scratch=out)


def make_pruned(
    out: Path,
    *,
    base: Artifact,
    origin: Artifact,
    rows: Artifact,
    learned: Artifact | None,
    asked: Prune,
    target: Target,
    scheme: str,
    device: str,
) -> PrunedCheckpoint:
    """Prune into the folder `checkpoint`: scores, allocation, compensation and surgery in one pass.

    Args:
        base: the recipe's model, `origin`, or what training made of it together with masks.
        learned: with the plan to follow; None: criterion and allocation choose.
        scheme: that a budget counts with.
    """
    import torch

    from numprune.flows.steps.prune import options_of, planned, prune_checkpoint
    from numprune.flows.steps.text import load_calibration

    tokens, draw = load_calibration(rows.path)
    if learned:
        plan, options = planned(learned.path / LEARNED_PLAN, asked)
    else:
        plan, options = None, options_of(asked, target, base.path, scheme)
    return prune_checkpoint(
        base.path,
        tokens,
        options,
        out / CHECKPOINT,
        torch.device(device),
        draw=draw,
        stream=asked.stream,
        plan=plan,
        origin=origin.path,
    )


def make_timings(
    out: Path,
    *,
    model: Text,
    scenario: str,
    asked: BlockTimings,
    target: Target,
    served: Served,
    width: Width | None,
    machine: dict[str, str],
) -> TimingTable:
    """Measure or estimate the latencies of the model's blocks. A killed measurement goes on where it stopped.

    `served`: how the model is. `width`: to time it at; None: its own hidden size. `machine` is part of the key.
    """
    from numprune.flows.stages import kept_beside
    from numprune.flows.steps.estimates import estimate
    from numprune.flows.steps.timings import measure, timing_request
    from numprune.scenario import parse_scenario

    assert isinstance(model.source, str)
    base = Path(model.source)
    if asked.runtime == ROOFLINE:
        return estimate(base, [parse_scenario(scenario)], target, asked.sizes, asked.peaks(), served, width)
    return measure(base, timing_request(asked, scenario, target, served, width), kept_beside(out))


def make_pruned_within_time(
    out: Path,
    *,
    base: Artifact,
    origin: Artifact,
    rows: Artifact,
    times: list[Artifact],
    learned: Artifact | None,
    asked: Prune,
    target: Target,
    served: Served,
    device: str,
    machine: dict[str, str],
) -> TimedCheckpoint:
    """Prune into the folder `checkpoint`, which is measured, too.

    Args:
        base, origin, learned: as for `make_pruned`.
        times: the stages of `make_timings`; `served`: as for them.
        machine: part of the key.
    """
    import torch

    from numprune.flows.steps.prune import planned
    from numprune.flows.steps.text import load_calibration
    from numprune.flows.steps.timed_prune import options_within_time, prune_within_time

    tokens, draw = load_calibration(rows.path)
    if learned:
        plan, options = planned(learned.path / LEARNED_PLAN, asked)
    else:
        tables = [read_facts(table.path, TimingTable) for table in times]
        plan, options = None, options_within_time(asked, target, base.path, tables, served)
    return prune_within_time(
        base.path,
        tokens,
        options,
        out / CHECKPOINT,
        torch.device(device),
        draw=draw,
        stream=asked.stream,
        plan=plan,
        origin=origin.path,
    )


def make_recovered(
    out: Path, *, source: Artifact, dense: Artifact, rows: Artifact, asked: Recover, device: str
) -> RecoveredCheckpoint:
    """Train towards the dense model, into the folder `checkpoint`. A killed training resumes from its last state."""
    import torch

    from numprune.flows.stages import kept_beside
    from numprune.flows.steps.recover import options_of, recover_checkpoint
    from numprune.flows.steps.training import load_rows

    options, where = options_of(asked), torch.device(device)
    return recover_checkpoint(
        source.path, dense.path, load_rows(rows.path), options, out / CHECKPOINT, where, kept_beside(out)
    )


def make_quantized(
    out: Path, *, source: Artifact, dense: Artifact, rows: Artifact, asked: Quantize, device: str
) -> QuantizedCheckpoint:
    """Quantize into the folder `checkpoint`; GPTQ fits to the outputs of the dense model, if its stream is the same."""
    import torch

    from numprune.flows.steps.quantize import quantize_checkpoint, schemes_of, target_of
    from numprune.flows.steps.text import load_calibration

    schemes, where = schemes_of(asked.scheme, asked.channels_per_scale, source.path), torch.device(device)
    if asked.method == "rtn":
        found = quantize_checkpoint(source.path, schemes, out / CHECKPOINT, where, lm_head_bits=asked.lm_head_bits)
    else:
        tokens, draw = load_calibration(rows.path)
        found = quantize_checkpoint(
            source.path,
            schemes,
            out / CHECKPOINT,
            where,
            rows=tokens,
            draw=draw,
            dense=target_of(source.path, dense.path),
            lm_head_bits=asked.lm_head_bits,
        )
    return QuantizedCheckpoint(method=asked.method, **found)
