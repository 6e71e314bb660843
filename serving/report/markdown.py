"""The report as Markdown: the verdict first, identity and machine last."""

from collections.abc import Iterable

from numprune.counted import counted
from numprune.serving.report import heads, image_metrics, names, precision, training, words
from numprune.serving.report.headline import headline, next_commands
from numprune.serving.report.kept import KINDS, by_kind, listed, others, ranges, without
from numprune.serving.report.markdown_cells import amount, cell, estimate, figure, plain, share, table
from numprune.serving.report.markdown_speed import memory_sections, speed_sections
from numprune.serving.report.models import (
    Attention,
    Environment,
    GateResult,
    Generation,
    Images,
    Learning,
    Output,
    Pruning,
    Quality,
    Quantization,
    Recovery,
    Report,
    Sizes,
)

_CHARACTERS = 200  # of a prompt or output; report.json has all of it


def markdown(report: Report) -> str:
    """A page that reads well as text and renders everywhere. Missing sections are omitted."""
    sections = [
        _verdict(report),
        _pruning(report.pruning) if report.pruning else [],
        _learning(report.learning) if report.learning else [],
        _recovery(report.recovery) if report.recovery else [],
        _quantization(report.quantization) if report.quantization else [],
        _sizes(report.sizes) if report.sizes else [],
        _quality(report.quality) if report.quality else [],
        _tasks(report),
        speed_sections(report),
        memory_sections(report),
        _parity(report),
        _environment(report.environment),
        _identity(report),
    ]
    return "\n".join(line for lines in sections for line in lines)


def quality_section(report: Report) -> str:
    """The quality section alone, with the tasks; empty if quality was not measured."""
    return "\n".join([*_quality(report.quality), *_tasks(report)]) if report.quality else ""


def not_judged(message: str) -> str:
    """The page of a report that could not be judged."""
    return f"# Not judged\n\n{cell(message)}\n"


def _verdict(report: Report) -> list[str]:
    if report.verdict is None:
        return [f"# {cell(report.run_id)}: not judged yet", "", cell(headline(report)), ""]
    gates = report.verdict.gates
    failing = [gate.metric for gate in gates if gate.outcome != "pass"]
    lines = [f"# {cell(report.run_id)}: {report.verdict.outcome}", "", cell(headline(report)), ""]
    if commands := [*next_commands(report)]:
        lines += [f"Next: {', then '.join(f'`{command}`' for command in commands)}.", ""]
    lines += [f"- {cell(reason)}" for reason in report.environment.reasons]
    lines += [
        f"{len(gates) - len(failing)} of {len(gates)} gates pass"
        + (f"; not {cell(', '.join(failing))}." if failing else "."),
        "",
    ]
    rows = [[gate.metric, _value(gate), _limit(gate), gate.outcome, gate.reason] for gate in gates]
    return [*lines, *table(["gate", "value", "limit", "outcome", "why"], rows)]


def _value(gate: GateResult) -> str:
    if gate.interval is None:
        return figure(gate.value)
    return f"{figure(gate.value)} [{figure(gate.interval[0])}, {figure(gate.interval[1])}]"


def _limit(gate: GateResult) -> str:
    limit = f"≥ {figure(gate.min)}" if gate.max is None else f"≤ {figure(gate.max)}"
    return limit if gate.bound == "point" else f"{gate.bound} {limit}"


def _pruning(pruning: Pruning) -> list[str]:
    removed = pruning.ratio_removed
    kept = [*_kept(pruning)]
    counted_as = words.COUNTED[pruning.ratio_counts]
    asked = f"Requested: {share(pruning.ratio_asked)} of the {counted_as}"
    them = "them" if pruning.ratio_counts == "parameters" else "the prunable parameters"
    if limits := words.budgets(pruning):
        asked, them = f"Asked for {limits}", "the prunable parameters"
    return [
        "## Pruning",
        "",
        f"{cell(pruning.criterion)} scores, {cell(pruning.allocation)} allocation, {cell(pruning.compensation)} "
        f"compensation. {asked}; removed "
        f"{share(removed.prunable)} of {them} and {share(removed.parameters)} of all parameters"
        + (
            "."
            if removed.kv_bytes is None
            else f", and {share(removed.kv_bytes)} of the KV cache{words.at_context(removed)}."
        ),
        "",
        *([*kept, ""] if kept else []),
        *(_attention(pruning.attention) if pruning.attention else []),
    ]


def _attention(found: Attention) -> list[str]:
    header = ["attention on", "kept heads", "removed heads", "correlation with being kept"]
    rows = [
        [label, share(kept), share(removed), figure(found.spearman.get(key))]
        for key, label, kept, removed in heads.means(found)
    ]
    told = f"Attention of the heads in the dense model, over {counted(found.rows, 'calibration row')}:"
    return [told, "", *table(header, rows)]


def _learning(found: Learning) -> list[str]:
    return ["## Learned masks", "", cell(training.of_masks(found)), ""]


def _recovery(found: Recovery) -> list[str]:
    return ["## Training after pruning", "", cell(training.described(found)), ""]


def _quantization(found: Quantization) -> list[str]:
    layers = [f"- {kind}: {bits}" for kind, bits in precision.bits_by_layer(found).items()]
    return ["## Quantization", "", cell(precision.quantized(found)), "", *([*layers, ""] if layers else [])]


def _kept(pruning: Pruning) -> Iterable[str]:
    if pruning.dropped_layers:
        yield f"- Layers dropped: {listed(pruning.dropped_layers)}"
    if window := words.window(pruning):
        yield f"- Attention window: {cell(window)}"
    if pruning.hidden_size:
        yield "- Hidden size: {1:,} → {0:,}".format(*pruning.hidden_size)
    for line in pruning.shape:
        yield f"- {cell(line[:1].upper() + line[1:])}"
    if pruning.price:
        yield f"- Sizes priced at {cell(pruning.price.summary)}"
    if pruning.refinement:
        yield f"- Sizes refined by {cell(pruning.refinement.summary)}"
    for kind, units in by_kind(pruning.kept_units).items():
        parts = [
            f"{f'layer {first}' if first == last else f'layers {first} to {last}'}: {kept:,} of {of:,}"
            for first, last, (kept, of) in ranges(without(units, pruning.dropped_layers))
        ]
        yield f"- {KINDS[kind]} kept: {'; '.join(parts)}"
    for name, (kept, of) in others(pruning.kept_units).items():
        yield f"- {cell(name)} kept: {kept:,} of {of:,}"


def _sizes(sizes: Sizes) -> list[str]:
    pairs = {
        "parameters": sizes.parameters,
        "weight bytes": sizes.weight_bytes,
        "KV-cache bytes per token": sizes.kv_bytes_per_token,
        "FLOPs per token": sizes.flops_per_token,
    }
    rows = [
        [name, amount(pair.baseline), amount(pair.candidate), figure(pair.ratio)]
        for name, pair in pairs.items()
        if pair is not None
    ]
    stored = [f"Weights are stored in {cell(precision.named(sizes.dtype))}.", ""] if sizes.dtype else []
    return ["## Sizes", "", *stored, *table(["", "baseline", "candidate", "ratio"], rows)]


def _quality(quality: Quality) -> list[str]:
    return [
        "## Quality",
        "",
        f"{names.measured_on(quality)}{', packed' if quality.packed else ''}; "
        f"intervals are two-sided, 95 %, over {names.resampled(quality)}{names.too_few(quality)}.",
        "",
        *table(["", "baseline", "candidate", "difference"], _quality_rows(quality)),
        *(_corpora(quality) if quality.corpora else []),
        *(_generation(quality.generation) if quality.generation else []),
        *(_images(quality.images) if quality.images else []),
    ]


def _corpora(quality: Quality) -> list[str]:
    """The other corpora; their names show where the first is."""
    header, *rows = names.corpora(quality)
    return [f"Other held-out {names.material(quality)}, beside {quality.corpus} above:", "", *table(header, rows)]


def _quality_rows(quality: Quality) -> Iterable[list[str]]:
    one, other, ratio = quality.baseline, quality.candidate, quality.perplexity_ratio
    if one is None or other is None or ratio is None:  # not of causal-lm
        yield [f"{names.loss(quality)}, {quality.loss_delta.unit}", "", "", estimate(quality.loss_delta)]
        yield from _recovery_rows(quality)
        for name, is_share, sides, change in names.metrics(quality):
            show = share if is_share else figure
            changed = estimate(change) if change else ""
            yield [name, "" if sides.baseline is None else show(sides.baseline), show(sides.candidate), changed]
        return
    before, after = one.nll_nats_per_token, other.nll_nats_per_token
    per = quality.loss_delta.unit.replace("/", " per ")
    yield [f"NLL, {per}", figure(before), figure(after), estimate(quality.loss_delta)]
    yield from _recovery_rows(quality)
    if quality.quantization_loss_delta:
        yield ["of which by quantization", "", "", estimate(quality.quantization_loss_delta)]
    yield ["perplexity", figure(one.perplexity), figure(other.perplexity), f"ratio {estimate(ratio)}"]
    yield [f"KL from the baseline, {per}", "", figure(quality.kl_nats_per_token), ""]
    yield ["top-1 agreement with the baseline", "", share(quality.top1_agreement), ""]


def _tasks(report: Report) -> list[str]:
    rows = [
        [
            name,
            f"{found.items:,}",
            share(found.baseline),
            share(found.candidate),
            estimate(found.accuracy_delta),
            f"{found.right_to_wrong:,}",
            f"{found.wrong_to_right:,}",
            figure(found.mcnemar_p),
        ]
        for name, found in names.accuracies(report.tasks)
    ]
    if not rows:
        return []
    header = ["task", "items", "baseline", "candidate", "difference", "right to wrong", "wrong to right", "McNemar's p"]
    return ["### Tasks", "", cell(names.answered(report.tasks)), "", *table(header, rows)]


def _recovery_rows(quality: Quality) -> Iterable[list[str]]:
    if quality.pruned and quality.recovery_loss_delta:
        loss = figure(quality.pruned.nll_nats_per_token) if quality.candidate else ""
        yield ["before training", "", loss, estimate(quality.pruned.loss_delta)]
        yield ["of which by training", "", "", estimate(quality.recovery_loss_delta)]


def _generation(found: Generation) -> list[str]:
    through = "through the chat template" if found.chat_template else "as plain text"
    counts = [
        ["empty", str(found.baseline.empty), str(found.candidate.empty)],
        ["repeating", str(found.baseline.repeating), str(found.candidate.repeating)],
    ]
    outputs = [[_shown(pair.prompt), _output(pair.baseline), _output(pair.candidate)] for pair in found.outputs]
    return [
        f"Greedy generation from {counted(found.prompts, 'prompt')}, {through}, up to {found.maximum_tokens} tokens "
        f"each. {found.degraded} degraded: the candidate's output is empty or repeating and the baseline's is neither.",
        "",
        *table(["outputs", "baseline", "candidate"], counts),
        *table(["prompt", "baseline", "candidate"], outputs),
    ]


def _images(found: Images) -> list[str]:
    return [
        f"{counted(found.samples, 'image')} from each model, guidance {words.number(found.guidance)}; report.html "
        "shows them side by side.",
        "",
        *table(
            ["samples", "value"],
            [
                ["KL of guided distributions, nats/code", words.number(found.guided_kl_nats_per_code, 3)],
                ["divergence of code frequencies, nats", words.number(found.code_divergence_nats, 3)],
                ["the same between two sets of the baseline", words.number(found.code_divergence_of_dense_nats, 3)],
            ],
        ),
        *_distances(found),
    ]


def _distances(found: Images) -> list[str]:
    if found.network is None:
        return []
    rows = [
        [cell(f"{text} ({interval})" if interval else text) for text, interval in row]
        for row in image_metrics.rows(found)
    ]
    return [
        cell(image_metrics.measured_by(found.network)),
        "",
        *table(["samples", "baseline", "candidate", "difference"], rows),
    ]


def _output(output: Output) -> str:
    failures = [name for name in ("empty", "repeating") if getattr(output, name)]
    return " ".join([_shown(output.text), *(f"({', '.join(failures)})" for _ in failures[:1])])


def _shown(text: str) -> str:
    return f"{text[:_CHARACTERS]}…" if len(text) > _CHARACTERS else text


def _parity(report: Report) -> list[str]:
    if not report.parity:
        return []
    lines = ["## Parity with the checkpoint", ""]
    for runtime, facts in report.parity.items():
        rows = [[key, plain(value)] for key, value in facts.items()]
        lines += [f"### {runtime}", "", *table(["", "found"], rows)]
    return lines


def _environment(environment: Environment) -> list[str]:
    rows = [
        ["CPU", f"{environment.cpu}, {counted(environment.cores, 'core')}"],
        ["memory", f"{amount(environment.memory_bytes)} bytes"],
        ["platform", environment.platform],
    ]
    if environment.load_average is not None:
        rows.append(["load average", ", ".join(figure(value) for value in environment.load_average)])
    if environment.gpu is not None:
        gpu = environment.gpu
        clocks = f"{figure(gpu.sm_clock_mhz)} of {figure(gpu.max_sm_clock_mhz)} MHz"
        rows.append(["GPU", f"{gpu.name}, driver {gpu.driver}, {clocks}, limit {figure(gpu.power_limit_watts)} W"])
    rows += [["invalid", reason] for reason in environment.reasons]
    return ["## Machine", "", *table(["", "found"], rows)]


def _identity(report: Report) -> list[str]:
    identity = report.identity
    digests = {
        "base": identity.base,
        "candidate": identity.candidate,
        "recipe": identity.recipe,
        "calibration rows": identity.calibration_rows,
        "held-out rows": identity.heldout_rows,
        **{f"held-out rows, {name}": digest for name, digest in identity.corpora_rows.items()},
        "plan": identity.plan,
        "pruned checkpoint": identity.pruned,
        "rows of mask training": identity.learning_rows,
        "checkpoint trained with masks": identity.learned,
        "rows of training": identity.recovery_rows,
        "generated rows": identity.generated_rows,
        "trained checkpoint": identity.recovered,
        "task items": identity.tasks,
        "decoder of images": identity.decoder,
        "network of FID": identity.fid_network,
        "real images of FID": identity.fid_images,
        **{f"export {name}": digest for name, digest in identity.exports.items()},
    }
    rows = [[name, digest] for name, digest in digests.items() if digest is not None]
    packages = ", ".join(f"{name} {version}" for name, version in identity.packages.items())
    return [
        "## Identity",
        "",
        f"Run {cell(report.run_id)}, {report.created.isoformat()}.",
        "",
        *table(["", "SHA-256"], rows),
        *([cell(packages), ""] if packages else []),
    ]
