"""numprune inspect, evaluate and export."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from numprune.counted import counted
from numprune.export.imports import uncollected
from numprune.flows import names
from numprune.flows.amounts import size
from numprune.flows.cli.parser import (
    MODEL,
    Answer,
    Subcommands,
    add_checkpoint_and_out,
    add_choice,
    add_text,
    check_out,
    command,
    reading,
)
from numprune.flows.cli.planned import dropped_lines, sizes_lines, window_lines

if TYPE_CHECKING:
    from numprune.families.family import TaskName
    from numprune.plans import PricedSplit


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "inspect",
        inspect,
        "show what can be pruned in a model",
        "numprune inspect ./my-model",
        needs_torch=False,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)

    parser = command(
        commands,
        "evaluate",
        evaluate,
        "measure NLL and perplexity, optionally against a baseline",
        "numprune evaluate ./pruned ./pruned-more --baseline ./my-model --text heldout.txt",
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help=f"{MODEL}; several are evaluated one after the other"
    )
    parser.add_argument(
        "--baseline", metavar="MODEL", help="compare each model with this one, token by token (default: none)"
    )
    add_text(parser, "text to score")

    parser = command(
        commands,
        "export",
        export,
        "export a checkpoint, and verify that the export computes the same",
        "numprune export ./pruned ./pruned-onnx --to onnx",
    )
    add_checkpoint_and_out(parser)
    add_choice(parser, "--to", get_args(names.ExportFormat), None, "export format")
    add_choice(
        parser,
        "--dtype",
        get_args(names.Dtype),
        "auto",
        "precision of weights, KV cache and hidden states; auto: as stored; float32 for ONNX without a GPU",
    )


def inspect(args: argparse.Namespace) -> Answer:
    with uncollected():
        from numprune.anatomy import read_anatomy
        from numprune.budget import budget_of, kv_bytes, pruning_step
        from numprune.dtypes import name_of
        from numprune.export import compressed_tensors
        from numprune.export.audit import read_audited
        from numprune.export.files import resolve
        from numprune.plans import PLAN_FILE, read_plan
        from numprune.target import Target
        from numprune.units import LOSS_UNITS

    folder = resolve(args.model)
    config, stored = read_audited(folder)
    quantized = compressed_tensors.quantization_in(folder)
    anatomy = read_anatomy(config)
    plan = read_plan(folder / PLAN_FILE) if (folder / PLAN_FILE).exists() else None
    align = Target().align
    attention = anatomy.of_kind("attention") if anatomy.task == names.CAUSAL_LM else ()
    slides = [block.layer for block in attention if anatomy.window_of(block) is not None]
    granularity = {
        "query-heads": pruning_step(anatomy, "attention", members=1, scores=False),
        "qk-dims": pruning_step(anatomy, "attention", members=align, scores=True),
        "attention": pruning_step(anatomy, "attention", units=1),
        "mlp": pruning_step(anatomy, "mlp", units=align),
        "experts": pruning_step(anatomy, "experts", units=1),
        "expert-channels": pruning_step(anatomy, "experts", members=align),
    }
    data = {
        "model": str(folder),
        "architecture": (config.architectures or [config.model_type])[0],
        "family": anatomy.family,
        "task": anatomy.task,
        **_declared(anatomy.task, config, folder),
        "layers": anatomy.layers,
        "hidden_size": anatomy.hidden_size,
        "head_dim": anatomy.head_dim,
        **({"image": list(anatomy.image)} if anatomy.image else {"vocabulary": anatomy.vocabulary}),
        "context": anatomy.context,
        "sliding_window": anatomy.sliding_window,
        **(
            {"windowed_layers": slides, "kv_bytes_of_a_full_context": kv_bytes(anatomy, anatomy.context)}
            if slides
            else {}
        ),
        "quantization": str(quantized) if quantized else None,
        "dtype": name_of(config.dtype),
        "uniform": anatomy.is_uniform,
        "weight_bytes": sum(header.bytes for header in stored.values()),
        **dataclasses.asdict(budget_of(anatomy)),
        "granularity": {kind: dataclasses.asdict(found) for kind, found in granularity.items()},
        "blocks": [
            {
                "name": block.name,
                "kind": block.kind,
                "units": block.units,
                "members": block.members,
                "channels_per_unit": block.channels_per_unit,
                "parameters_per_unit": block.parameters_per_unit,
            }
            for block in anatomy.blocks
        ],
        "plan": plan.model_dump(mode="json", exclude={"blocks": True, "hidden": {"kept"}}) if plan else None,
    }
    lines = [f"{folder}"]
    lines += [
        f"  {name:<36} {_shown(name, value)}"
        for name, value in data.items()
        if name not in ("model", "granularity", "blocks", "plan")
    ]
    lines += [f"  {line}" for line in sizes_lines(anatomy)]
    layers, others = (", first stage", ", multiples in the others") if anatomy.mergings else (" of every layer", "")
    for key, kind, smallest in (
        ("query-heads", "attention", "1 head of every group"),
        ("qk-dims", "attention", f"{align} qk dimensions"),
        ("attention", "attention", f"1 KV group{layers}"),
        ("mlp", "mlp", f"{align} channels{layers}"),
        ("experts", "experts", "1 expert of every layer"),
        ("expert-channels", "experts", f"{align} channels of every expert"),
    ):
        share = granularity[key]
        if not share.one_layer:
            continue  # the model has none: without grouping, no query head can go without its KV head
        lines.append(
            f"  {f'{kind}: {smallest}':<36} {share.every_layer:.2%} of the prunable parameters, "
            f"{share.one_layer:.3%} in one layer{others if share.units else ''}"
        )
    if plan:
        lines.append(
            f"  {'pruned by':<36} {plan.criterion}, {plan.allocation}, {plan.compensation}, {', '.join(plan.limits)}"
        )
        lines += [f"  {line}" for line in dropped_lines(plan, LOSS_UNITS[anatomy.task])]
        lines += [f"  {line}" for line in window_lines(plan, LOSS_UNITS[anatomy.task])]
        if plan.shape:
            lines += [f"  {line}" for line in plan.shape.lines()]
        if plan.price:
            lines.append(f"  {'sizes priced at':<36} {plan.price}")
        if plan.refinement:
            lines.append(f"  {'sizes refined by':<36} {plan.refinement}")
        if plan.hidden:
            lines.append(f"  {'hidden size before':<36} {plan.hidden.size:,} (basis {plan.hidden.basis})")
        channels = f"channel per layer{' of the first stage' if anatomy.mergings else ''}"
        lines += [
            f"  {'other split' if number else 'chosen split':<36} {_groups(split)} and "
            f"{counted(split.mlp_channels, channels)}, priced at {split.nats_per_token:.4f} nats per token"
            for number, split in enumerate(plan.splits or ())
        ]
    return Answer(data, "\n".join(lines))


def _groups(split: "PricedSplit") -> str:
    heads = f" of {split.query_heads} query heads" if split.query_heads and split.query_heads > 1 else ""
    return f"{counted(split.kv_groups, 'KV group')}{heads}"


def _declared(task: "TaskName", config: Any, folder: Path) -> dict[str, Any]:
    """The pooling of an embedding model; empty for other models. Raises InputError if the classes are not supported."""
    from numprune.export.declared import classes_of, pooling_in

    if task == "classification":
        classes_of(config)
    if task != "embedding":
        return {}
    found = pooling_in(folder)
    return {"pooling": found.pooling, "pooling_declared": found.declared, "normalized": found.normalized}


def evaluate(args: argparse.Namespace) -> Answer:
    from numprune.anatomy import code_vocabulary
    from numprune.export import checkpoint
    from numprune.flows import summary
    from numprune.flows.steps.evaluate import compare_checkpoints, evaluate_checkpoint
    from numprune.flows.steps.prune import device_of
    from numprune.flows.steps.text import heldout_rows

    models = [checkpoint.resolve(model) for model in args.models]
    baseline = checkpoint.resolve(args.baseline) if args.baseline else None
    rows = heldout_rows(args.text, args.sequence_length, models, reading(args, args.text), baseline)
    device = device_of("auto")
    counts = "code" if code_vocabulary(checkpoint.read_config(models[0])) is not None else "token"
    if baseline is None:
        found = [{"model": str(model), **evaluate_checkpoint(model, rows, device)} for model in models]
        lines = [_metrics_line(data) if "task" in data else _quality_line(data, counts) for data in found]
    else:
        sections = compare_checkpoints(models, baseline, rows, device)
        found = [_compared(model, baseline, section) for model, section in zip(models, sections, strict=True)]
        if sections[0]["task"] == names.CAUSAL_LM:
            lines = [_quality_line({**found[0], **found[0]["baseline"]}, counts)]
            lines += [line for data in found for line in (_quality_line(data, counts), _difference_line(data, counts))]
        else:
            lines = [f"{model}: {summary.of_quality(section)}" for model, section in zip(models, sections, strict=True)]
    return Answer(found[0] if len(found) == 1 else {"candidates": found}, "\n".join(lines))


def _compared(model: Path, baseline: Path, section: dict[str, Any]) -> dict[str, Any]:
    shared = {"model": str(model), **{name: section[name] for name in ("task", "tokens", "documents", "packed")}}
    if section["task"] != names.CAUSAL_LM:
        given = [name for name in ("loss_delta", "metrics", "accuracy_delta") if name in section]
        return {**shared, "baseline": {"model": str(baseline)}, **{name: section[name] for name in given}}
    return {
        **shared,
        **section["candidate"],
        "baseline": {"model": str(baseline), **section["baseline"]},
        "nll_delta_nats_per_token": section["loss_delta"],
        **{name: section[name] for name in ("kl_nats_per_token", "top1_agreement", "perplexity_ratio")},
        **({"classes": section["classes"]} if "classes" in section else {}),  # of an image generator
    }


def export(args: argparse.Namespace) -> Answer:
    from numprune.export import checkpoint, manifest
    from numprune.flows.steps.export import export_and_prove

    check_out(args.out)
    manifest.sweep(args.out.parent)
    source = checkpoint.resolve(args.checkpoint)
    made, proof = export_and_prove(source, args.out, args.to, args.dtype)
    data = {
        "out": str(args.out),
        "target": args.to,
        "dtype": made.facts["dtype"],
        "digest": made.digest,
        "bytes": sum(entry.size for entry in made.files.values()),
        "files": sorted(made.files),
        "parity": proof,
    }
    amount = f"{counted(len(made.files), 'file')}, {size(data['bytes'])}"
    within = f", but not beyond windows of {proof['window']:,} tokens" if proof.get("beyond_window") is False else ""
    return Answer(data, f"{args.out}: {args.to} in {made.facts['dtype']}, {amount}; parity verified{within}")


def _quality_line(data: dict[str, Any], counts: str) -> str:
    """`counts`: "token", or "code" of images."""
    documents = counted(data["documents"], "image" if counts == "code" else "document")
    return (
        f"{data['model']}: perplexity {data['perplexity']:.4f}, NLL {data['nll_nats_per_token']:.6f} nats/{counts} on "
        f"{counted(data['tokens'], counts)} of {documents}"
        f"{', packed' if data['packed'] else ''}"
    )


def _metrics_line(data: dict[str, Any]) -> str:
    from numprune.serving.report.names import METRICS

    figures = ", ".join(f"{METRICS[name]} {value:.4f}" for name, value in data["metrics"].items())
    amount = f"{counted(data['tokens'], 'token')} of {counted(data['documents'], 'document')}"
    if data["task"] == "image-classification":
        amount = counted(data["documents"], "image")
    return f"{data['model']}: {figures}, on {amount}"


def _difference_line(data: dict[str, Any], counts: str) -> str:
    delta = data["nll_delta_nats_per_token"]
    unit = "image" if counts == "code" else delta["sampling_unit"]
    low, high = delta["interval95"]
    interval = f" [{low:+.4f}, {high:+.4f}]" if low is not None and high is not None else ""
    return (
        f"difference: NLL {delta['value']:+.4f} nats/{counts}{interval} ({delta['samples']} {unit}s), "
        f"KL {data['kl_nats_per_token']:.4f} nats/{counts}, top-1 agreement {data['top1_agreement']:.2%}"
    )


def _shown(name: str, value: Any) -> str:
    if "bytes" in name:
        return f"{size(value)} ({value:,} bytes)" if value >= 1024 else f"{value:,} bytes"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
