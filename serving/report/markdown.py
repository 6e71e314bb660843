"""The report as Markdown: the verdict first, identity and machine last."""

from collections.abc import Iterable, Sequence
from typing import Any

from numprune.counted import counted
from numprune.serving.report import heads, names, precision, ratios, training, words
from numprune.serving.report.headline import headline, next_commands
from numprune.serving.report.kept import KINDS, by_kind, listed, others, ranges, without
from numprune.serving.report.models import (
    Attention,
    Environment,
    GateResult,
    Generation,
    Learning,
    Output,
    Percentiles,
    Pruning,
    Quality,
    Quantization,
    Ratio,
    Recovery,
    Report,
    ReportedEstimate,
    RuntimeSpeed,
    Sizes,
)

_ABSENT = "-"
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
        _speed(report),
        _memory(report),
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
    return f"# Not judged\n\n{_cell(message)}\n"


def _verdict(report: Report) -> list[str]:
    if report.verdict is None:
        return [f"# {_cell(report.run_id)}: not judged yet", "", _cell(headline(report)), ""]
    gates = report.verdict.gates
    failing = [gate.metric for gate in gates if gate.outcome != "pass"]
    lines = [f"# {_cell(report.run_id)}: {report.verdict.outcome}", "", _cell(headline(report)), ""]
    if commands := [*next_commands(report)]:
        lines += [f"Next: {', then '.join(f'`{command}`' for command in commands)}.", ""]
    lines += [f"- {_cell(reason)}" for reason in report.environment.reasons]
    lines += [
        f"{len(gates) - len(failing)} of {len(gates)} gates pass"
        + (f"; not {_cell(', '.join(failing))}." if failing else "."),
        "",
    ]
    rows = [[gate.metric, _value(gate), _limit(gate), gate.outcome, gate.reason] for gate in gates]
    return [*lines, *_table(["gate", "value", "limit", "outcome", "why"], rows)]


def _value(gate: GateResult) -> str:
    if gate.interval is None:
        return _figure(gate.value)
    return f"{_figure(gate.value)} [{_figure(gate.interval[0])}, {_figure(gate.interval[1])}]"


def _limit(gate: GateResult) -> str:
    limit = f"≥ {_figure(gate.min)}" if gate.max is None else f"≤ {_figure(gate.max)}"
    return limit if gate.bound == "point" else f"{gate.bound} {limit}"


def _pruning(pruning: Pruning) -> list[str]:
    removed = pruning.ratio_removed
    kept = [*_kept(pruning)]
    asked, them = f"Requested: {_share(pruning.ratio_asked)} of the prunable parameters", "them"
    if pruning.budget_asked is not None:
        asked, them = f"Asked for weights of at most {words.size(pruning.budget_asked)}", "the prunable parameters"
    return [
        "## Pruning",
        "",
        f"{_cell(pruning.criterion)} scores, {_cell(pruning.allocation)} allocation, {_cell(pruning.compensation)} "
        f"compensation. {asked}; removed "
        f"{_share(removed.prunable)} of {them} and {_share(removed.parameters)} of all parameters"
        + ("." if removed.kv_bytes is None else f", and {_share(removed.kv_bytes)} of the KV cache."),
        "",
        *([*kept, ""] if kept else []),
        *(_attention(pruning.attention) if pruning.attention else []),
    ]


def _attention(found: Attention) -> list[str]:
    header = ["attention on", "kept heads", "removed heads", "correlation with being kept"]
    rows = [
        [label, _share(kept), _share(removed), _figure(found.spearman.get(key))]
        for key, label, kept, removed in heads.means(found)
    ]
    told = f"Attention of the heads in the dense model, over {counted(found.rows, 'calibration row')}:"
    return [told, "", *_table(header, rows)]


def _learning(found: Learning) -> list[str]:
    return ["## Learned masks", "", _cell(training.of_masks(found)), ""]


def _recovery(found: Recovery) -> list[str]:
    return ["## Training after pruning", "", _cell(training.described(found)), ""]


def _quantization(found: Quantization) -> list[str]:
    layers = [f"- {kind}: {bits}" for kind, bits in precision.bits_by_layer(found).items()]
    return ["## Quantization", "", _cell(precision.quantized(found)), "", *([*layers, ""] if layers else [])]


def _kept(pruning: Pruning) -> Iterable[str]:
    if pruning.dropped_layers:
        yield f"- Layers dropped: {listed(pruning.dropped_layers)}"
    for kind, units in by_kind(pruning.kept_units).items():
        parts = [
            f"{f'layer {first}' if first == last else f'layers {first} to {last}'}: {kept:,} of {of:,}"
            for first, last, (kept, of) in ranges(without(units, pruning.dropped_layers))
        ]
        yield f"- {KINDS[kind]} kept: {'; '.join(parts)}"
    for name, (kept, of) in others(pruning.kept_units).items():
        yield f"- {_cell(name)} kept: {kept:,} of {of:,}"


def _sizes(sizes: Sizes) -> list[str]:
    pairs = {
        "parameters": sizes.parameters,
        "weight bytes": sizes.weight_bytes,
        "KV-cache bytes per token": sizes.kv_bytes_per_token,
        "FLOPs per token": sizes.flops_per_token,
    }
    rows = [
        [name, _amount(pair.baseline), _amount(pair.candidate), _figure(pair.ratio)]
        for name, pair in pairs.items()
        if pair is not None
    ]
    stored = [f"Weights are stored in {_cell(precision.named(sizes.dtype))}.", ""] if sizes.dtype else []
    return ["## Sizes", "", *stored, *_table(["", "baseline", "candidate", "ratio"], rows)]


def _quality(quality: Quality) -> list[str]:
    return [
        "## Quality",
        "",
        f"{names.measured_on(quality)}{', packed' if quality.packed else ''}; "
        f"intervals are two-sided, 95 %, over {_units(quality.loss_delta)}.",
        "",
        *_table(["", "baseline", "candidate", "difference"], _quality_rows(quality)),
        *(_corpora(quality) if quality.corpora else []),
        *(_generation(quality.generation) if quality.generation else []),
    ]


def _corpora(quality: Quality) -> list[str]:
    """The other corpora; their names show where the first is."""
    header, *rows = names.corpora(quality)
    return [f"Other held-out text, beside {quality.corpus} above:", "", *_table(header, rows)]


def _quality_rows(quality: Quality) -> Iterable[list[str]]:
    one, other, ratio = quality.baseline, quality.candidate, quality.perplexity_ratio
    if one is None or other is None or ratio is None:  # not of causal-lm
        yield [f"{names.loss(quality)}, {quality.loss_delta.unit}", "", "", _estimate(quality.loss_delta)]
        yield from _recovery_rows(quality)
        for name, is_share, sides in names.metrics(quality):
            show = _share if is_share else _figure
            yield [name, "" if sides.baseline is None else show(sides.baseline), show(sides.candidate), ""]
        return
    before, after = one.nll_nats_per_token, other.nll_nats_per_token
    yield ["NLL, nats per token", _figure(before), _figure(after), _estimate(quality.loss_delta)]
    yield from _recovery_rows(quality)
    if quality.quantization_loss_delta:
        yield ["of which by quantization", "", "", _estimate(quality.quantization_loss_delta)]
    yield ["perplexity", _figure(one.perplexity), _figure(other.perplexity), f"ratio {_estimate(ratio)}"]
    yield ["KL from the baseline, nats per token", "", _figure(quality.kl_nats_per_token), ""]
    yield ["top-1 agreement with the baseline", "", _share(quality.top1_agreement), ""]


def _tasks(report: Report) -> list[str]:
    rows = [
        [
            name,
            f"{found.items:,}",
            _share(found.baseline),
            _share(found.candidate),
            _estimate(found.accuracy_delta),
            f"{found.right_to_wrong:,}",
            f"{found.wrong_to_right:,}",
            _figure(found.mcnemar_p),
        ]
        for name, found in names.accuracies(report.tasks)
    ]
    if not rows:
        return []
    header = ["task", "items", "baseline", "candidate", "difference", "right to wrong", "wrong to right", "McNemar's p"]
    return ["### Tasks", "", _cell(names.answered(report.tasks)), "", *_table(header, rows)]


def _recovery_rows(quality: Quality) -> Iterable[list[str]]:
    if quality.pruned and quality.recovery_loss_delta:
        loss = _figure(quality.pruned.nll_nats_per_token) if quality.candidate else ""
        yield ["before training", "", loss, _estimate(quality.pruned.loss_delta)]
        yield ["of which by training", "", "", _estimate(quality.recovery_loss_delta)]


def _units(estimate: ReportedEstimate) -> str:
    few = ": there are too few documents, so they hold for this text only" if estimate.sampling_unit == "window" else ""
    return f"{counted(estimate.samples, estimate.sampling_unit)}{few}"


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
        *_table(["outputs", "baseline", "candidate"], counts),
        *_table(["prompt", "baseline", "candidate"], outputs),
    ]


def _output(output: Output) -> str:
    failures = [name for name in ("empty", "repeating") if getattr(output, name)]
    return " ".join([_shown(output.text), *(f"({', '.join(failures)})" for _ in failures[:1])])


def _shown(text: str) -> str:
    return f"{text[:_CHARACTERS]}…" if len(text) > _CHARACTERS else text


def _speed(report: Report) -> list[str]:
    lines = []
    for runtime, speed in report.speed.items():
        levels = [(f"{runtime}, {level} at a time", found, "") for level, found in speed.concurrency.items()]
        levels += [(f"{runtime}, {names.shape(shape)}", found, shape) for shape, found in speed.shapes.items()]
        for name, found, shape in levels or [(runtime, speed, "")]:
            lines += [
                f"## Speed, {name}",
                "",
                f"{counted(found.repeats, 'repeat')} after {found.warmup} of warm-up, in the order "
                f"{_cell(found.order)}; {counted(found.failed_requests, 'failed request')}. Ratios are candidate / "
                f"baseline with a two-sided 95 % interval. {_cell(precision.computed(report, runtime))}".rstrip(),
                "",
                *_table(
                    ["", "baseline", "candidate", "ratio", "noise floor"],
                    _speed_rows(found, ratios.cost(report, found, shape)),
                ),
            ]
    return lines


_LATENCIES = {
    "ttft": "TTFT, ms",
    "tpot": "TPOT, ms",
    "itl": "ITL, ms",
    "e2e": "end to end, ms",
    "latency": "latency of a batch, ms",
}
_RATES = {
    "decode_tokens_per_s": "decode, tokens/s",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "output_tokens_per_s": "output, tokens/s",
    "goodput_requests_per_s": "goodput, requests/s",
    "samples_per_s": "throughput, texts/s",
}


def _speed_rows(speed: RuntimeSpeed, cost: ratios.Cost | None) -> Iterable[list[str]]:
    one, other = speed.baseline, speed.candidate
    for key, name in _LATENCIES.items():
        before, after = getattr(one, f"{key}_ms"), getattr(other, f"{key}_ms")
        if before is not None or after is not None:
            yield [name, _percentiles(before), _percentiles(after), *_ratio(speed, key, getattr(speed, key))]
    for key, name in _RATES.items():
        slow, fast = getattr(one, key), getattr(other, key)
        if slow is not None or fast is not None:
            yield [name, _figure(slow), _figure(fast), *_ratio(speed, key, getattr(speed, key))]
    if one.joules_per_token is not None:
        used = [_figure(one.joules_per_token), _figure(other.joules_per_token)]
        yield ["energy, J per output token", *used, *_ratio(speed, "joules_per_token", speed.joules_per_token)]
    if cost is not None:
        yield [f"cost per million {cost.tokens}", _figure(cost.baseline), _figure(cost.candidate), "", ""]


def _ratio(speed: RuntimeSpeed, key: str, ratio: Ratio | None) -> list[str]:
    floor, told = ratios.floor(key, speed), ratios.reading(key, speed)
    return [
        _ABSENT if ratio is None else ": ".join(part for part in (_estimate(ratio.ratio), told) if part),
        _ABSENT if floor is None else f"± {_figure(floor)}",
    ]


def _percentiles(found: Percentiles | None) -> str:
    if found is None:
        return _ABSENT
    named = {"p50": found.p50, "p90": found.p90, "p95": found.p95, "p99": found.p99}
    return ", ".join(f"{name} {_figure(value)}" for name, value in named.items() if value is not None) or _ABSENT


def _memory(report: Report) -> list[str]:
    lines = []
    for runtime, memory in report.memory.items():
        one, other = memory.baseline, memory.candidate
        rows = [
            ["weights", _amount(one.weight_bytes), _amount(other.weight_bytes)],
            *(
                [["KV cache per token", _amount(one.kv_bytes_per_token), _amount(other.kv_bytes_per_token)]]
                if (one.kv_bytes_per_token, other.kv_bytes_per_token) != (None, None)
                else []
            ),
            ["peak of the load", _amount(one.peak_bytes_load), _amount(other.peak_bytes_load)],
            ["peak of the run", _amount(one.peak_bytes_run), _amount(other.peak_bytes_run)],
        ]
        if memory.kv_tokens is not None:
            rows.append(["tokens in the KV cache", _amount(one.kv_tokens), _amount(other.kv_tokens)])
        lines += [f"## Memory, {runtime} (bytes)", "", *_table(["", "baseline", "candidate"], rows)]
    return lines


def _parity(report: Report) -> list[str]:
    if not report.parity:
        return []
    lines = ["## Parity with the checkpoint", ""]
    for runtime, facts in report.parity.items():
        rows = [[key, _plain(value)] for key, value in facts.items()]
        lines += [f"### {runtime}", "", *_table(["", "found"], rows)]
    return lines


def _environment(environment: Environment) -> list[str]:
    rows = [
        ["CPU", f"{environment.cpu}, {counted(environment.cores, 'core')}"],
        ["memory", f"{_amount(environment.memory_bytes)} bytes"],
        ["platform", environment.platform],
    ]
    if environment.load_average is not None:
        rows.append(["load average", ", ".join(_figure(value) for value in environment.load_average)])
    if environment.gpu is not None:
        gpu = environment.gpu
        clocks = f"{_figure(gpu.sm_clock_mhz)} of {_figure(gpu.max_sm_clock_mhz)} MHz"
        rows.append(["GPU", f"{gpu.name}, driver {gpu.driver}, {clocks}, limit {_figure(gpu.power_limit_watts)} W"])
    rows += [["invalid", reason] for reason in environment.reasons]
    return ["## Machine", "", *_table(["", "found"], rows)]


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
        **{f"export {name}": digest for name, digest in identity.exports.items()},
    }
    rows = [[name, digest] for name, digest in digests.items() if digest is not None]
    packages = ", ".join(f"{name} {version}" for name, version in identity.packages.items())
    return [
        "## Identity",
        "",
        f"Run {_cell(report.run_id)}, {report.created.isoformat()}.",
        "",
        *_table(["", "SHA-256"], rows),
        *([_cell(packages), ""] if packages else []),
    ]


# --- cells ----------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[_cell(cell) for cell in row] for row in rows]
    return [
        f"| {' | '.join(header)} |",
        f"| {' | '.join('---' for _ in header)} |",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
    ]


def _cell(text: str) -> str:
    """Escape text from a report: no markup, no line break, no cell separator."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`|*":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped.replace("](", "] (")  # no link


def _figure(value: float | None) -> str:
    """Four significant digits, integers whole."""
    if value is None:
        return _ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _amount(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return _ABSENT if value is None else f"{100 * value:.1f} %"


def _estimate(estimate: ReportedEstimate) -> str:
    lower, upper = estimate.interval95
    return f"{_figure(estimate.value)} [{_figure(lower)}, {_figure(upper)}] (n = {estimate.samples})"


def _plain(value: Any) -> str:
    """A free-form fact: numbers shortened, the rest unchanged."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if value is None or isinstance(value, bool | str):
        return _ABSENT if value is None else str(value).lower() if isinstance(value, bool) else value
    return _figure(value)
