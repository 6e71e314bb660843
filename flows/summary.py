"""The result of a run, for a terminal, for Prefect's UI and as JSON."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numprune.counted import counted
from numprune.flows.amounts import size
from numprune.flows.stages import StageResult
from numprune.serving import gates
from numprune.serving import report as reports
from numprune.serving.report import GateResult, Pruning, Quality, Report, RuntimeSpeed, names, ratios, words
from numprune.serving.report.headline import headline, next_commands
from numprune.serving.report.kept import listed

Summary = Mapping[str, Any]


def summarize(
    run: str,
    judged: Path,
    stages: Sequence[StageResult[Any]],
    release: Path | None,
    version: str | None,
    location: Sequence[str],
) -> dict[str, Any]:
    """Plain JSON: verdict, sizes, quality, speed, paths and times.

    Args:
        run: its id (see runs.py); `run_id` is that that of the report, which an earlier run may have produced.
        judged: the folder with report.json, report.html and junit.xml.
        release, version: None if nothing was published.
        location: the options with which a command finds the registry.
    """
    verdict = reports.read(judged / "report.json")
    report = verdict.to_json()
    return {
        "run": run,
        "run_id": report["run_id"],
        "outcome": report["verdict"]["outcome"],
        "headline": headline(verdict),
        "next": [f"{command} {shlex.join(location)}" for command in next_commands(verdict)],
        "reasons": report["environment"]["reasons"],
        "gates": report["verdict"]["gates"],
        "next_look": gates.next_look(verdict),
        **_removed(report),
        "sizes": report["sizes"],
        "quality": report["quality"] and {**report["quality"], "changed": []},  # without pictures
        "tasks": report["tasks"],
        "speed": {runtime: _ratios(speed) for runtime, speed in verdict.speed.items()},
        "cost_per_million_tokens": _costs(verdict),
        "report": str((release or judged) / "report.json"),
        "page": str((release or judged) / "report.html"),
        "junit": str(judged / "junit.xml"),
        "release": str(release) if release else None,
        "artifacts": {path.name: str(path) for path in sorted(release.iterdir()) if path.is_dir()} if release else {},
        "version": version,
        "stages": [
            {
                "name": stage.name,
                "seconds": round(stage.seconds, 3),
                "reused": stage.reused,
                "peak_memory_bytes": stage.peak_memory_bytes,
            }
            for stage in stages
        ],
    }


def refusal(found: Summary) -> str:
    """Why nothing was published: the gates that did not pass, or the problems of the machine."""
    stopped = [gate for gate in found["gates"] if gate["outcome"] != "pass"]
    whys = [*found["reasons"], *(f"{gate['metric']} {gate['outcome']}: {gate['reason']}" for gate in stopped)]
    return f"{found['outcome']}, nothing was published: {'; '.join([*whys, *_next_run(found)])}"


def _next_run(found: Summary) -> Iterator[str]:
    """What the same command would measure next, if the verdict is inconclusive."""
    if found["outcome"] == "invalid environment":
        yield "this measurement does not count; run the same command again"
    elif found["next_look"]:
        again = ", ".join(found["next_look"])
        yield f"run the same command again to add repeats of {again} (at most {gates.LOOKS} looks)"
    elif found["outcome"] == "inconclusive":
        yield "the same command would measure nothing more; see the reasons, or raise benchmark.repeats to start over"


def text(found: Summary) -> str:
    """The closing summary of `numprune optimize`."""
    lines = [found["headline"], "", f"{found['run_id']}: {found['outcome']}", ""]
    lines += [f"  {name:<9} {value}" for name, value in _lines(found)]
    lines += ["", *gate_lines(found["gates"]), "", *_stage_lines(found), ""]
    lines += [f"  run       {found['run']}", f"  report    {found['page']}"]
    if found["release"]:
        lines += [f"  release   {found['release']}", f"  published {found['version']} as candidate"]
        lines += [f"  {name:<9} {path}" for name, path in found["artifacts"].items()]
        lines += [f"  {'' if index else 'next':<9} {command}" for index, command in enumerate(found["next"])]
    else:
        lines.append(f"  {refusal(found)}")
    return "\n".join(lines)


def markdown(found: Summary) -> str:
    """The same in tables."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _lines(found))
    stages = "\n".join(
        f"| {stage['name']} | {stage['seconds']:.1f} | {'reused' if stage['reused'] else ''} |"
        for stage in found["stages"]
    )
    published = f"published {found['version']}, {found['release']}; next: `{'`, then `'.join(found['next'])}`"
    where = published if found["release"] else refusal(found)
    return (
        f"# {found['run_id']}: {found['outcome']}\n\n{found['headline']}\n\n{where}\n\n"
        f"| | baseline → candidate |\n| --- | --- |\n{rows}\n\n"
        f"| stage | seconds | |\n| --- | --- | --- |\n{stages}\n"
    )


def gate_lines(gates: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line per gate: outcome, metric, value, interval, limit, reason."""
    for gate in map(GateResult.model_validate, gates):
        limit = f">= {gate.min:g}" if gate.max is None else f"<= {gate.max:g}"
        value = "not measured" if gate.value is None else f"{gate.value:.4g}"
        bounds = [
            ("-inf", "inf")[side] if bound is None else f"{bound:.4g}" for side, bound in enumerate(gate.interval or ())
        ]
        interval = (f" [{', '.join(bounds)}]" if bounds else "") + (f" {gate.unit}" if gate.unit else "")
        yield f"  {gate.outcome:<13} {gate.metric} = {value}{interval}, {gate.bound} {limit}: {gate.reason}"


def _lines(found: Summary) -> Iterator[tuple[str, str]]:
    sizes, quality = found["sizes"], found["quality"]
    if found["dropped_layers"]:
        yield "dropped", f"layers {listed(found['dropped_layers'])}"
    if found["window"]:
        yield "window", found["window"]
    if found["hidden_size"]:
        yield "narrowed", "hidden size {1:,} → {0:,}".format(*found["hidden_size"])
    if sizes:
        parts = [
            f"{label} {amount(pair['baseline'])} → {amount(pair['candidate'])} (x{pair['ratio']:.3f})"
            for key, label, amount in (
                ("parameters", "parameters", _amount),
                ("weight_bytes", "weights", size),
                ("kv_bytes_per_token", "KV cache per token", size),
            )
            if (pair := sizes[key]) is not None and pair["ratio"] is not None
        ]
        yield "sizes", ", ".join(parts)
    if quality:
        yield "quality", of_quality(quality)
        if (outputs := quality["generation"]) is not None:
            before, after = outputs["baseline"], outputs["candidate"]
            yield (
                "outputs",
                f"empty {before['empty']} → {after['empty']}, repeating {before['repeating']} → {after['repeating']}, "
                f"degraded {outputs['degraded']}, of {counted(outputs['prompts'], 'prompt')}",
            )
    for name, of_task in found["tasks"].items():
        for metric, accuracy in of_task.items():
            yield "task", of_accuracy(name, metric, accuracy)
    for runtime, measured in found["speed"].items():
        parts = [_ratio(label, ratio) for label, ratio in measured.items()]
        yield "speed", f"{runtime}: {', '.join(parts)}"
    for runtime, cost in found["cost_per_million_tokens"].items():
        sides = " → ".join(_figure(cost[side], False) for side in ("baseline", "candidate"))
        yield "cost", f"{runtime}: {sides} per million {cost['tokens']}"


def of_quality(section: Mapping[str, Any]) -> str:
    """The section `quality` of a report in one line."""
    found = Quality.model_validate(section)
    delta = found.loss_delta
    low, high = delta.interval95
    interval = "" if low is None or high is None else f" [{low:+.4f}, {high:+.4f}]"
    value = "not measured" if delta.value is None else f"{delta.value:+.4f}"
    parts = [f"{names.loss(found)} {value} {delta.unit}{interval}"]
    if found.baseline and found.candidate:
        parts.insert(0, f"perplexity {found.baseline.perplexity:.2f} → {found.candidate.perplexity:.2f}")
    for name, is_share, sides, _ in names.metrics(found):
        before = "" if sides.baseline is None else f"{_figure(sides.baseline, is_share)} → "
        parts.append(f"{name} {before}{_figure(sides.candidate, is_share)}")
    return f"{', '.join(parts)}, on {names.measured_on(found)} ({names.resampled(found)})"


def of_accuracy(task: str, metric: str, found: Mapping[str, Any]) -> str:
    """One accuracy of the section `tasks` in one line."""
    before, after = (_figure(found[side], True) for side in ("baseline", "candidate"))
    change = f"change {found['accuracy_delta']['value']:+.4f}{_interval(found['accuracy_delta'], '+.4f')}"
    return (
        f"{task} {metric} {before} → {after}, {change}; of {counted(found['items'], 'item')}, "
        f"{found['right_to_wrong']:,} right to wrong and {found['wrong_to_right']:,} wrong to right"
    )


def _figure(value: float | None, is_share: bool) -> str:
    return "not measured" if value is None else f"{value:.1%}" if is_share else f"{value:.4f}"


def _ratios(speed: RuntimeSpeed) -> dict[str, Any]:
    """The ratios by name, each with its reading."""
    shown = {
        "decode_tokens_per_s": "decode tokens/s",
        "prefill_tokens_per_s": "prefill tokens/s",
        "output_tokens_per_s": "output tokens/s",
        "ttft": "TTFT",
        "tpot": "TPOT",
        "itl": "ITL",
        "samples_per_s": "samples/s",
        "latency": "latency",
        "joules_per_token": "J/token",
    }
    found = {key: getattr(speed, key) for key in shown}
    return {
        shown[key]: {**ratio.ratio.model_dump(mode="json"), "reading": ratios.reading(key, speed)}
        for key, ratio in found.items()
        if ratio is not None
    }


def _costs(report: Report) -> dict[str, Any]:
    """Costs by runtime; for an encoder, at its first shape."""
    costs = {name: ratios.cost(report, speed, next(iter(speed.shapes), "")) for name, speed in report.speed.items()}
    return {name: cost._asdict() for name, cost in costs.items() if cost is not None}


def _stage_lines(found: Summary) -> Iterator[str]:
    for stage in found["stages"]:
        note = "reused" if stage["reused"] else f"peak {size(stage['peak_memory_bytes'])}"
        yield f"  {stage['name']:<26} {stage['seconds']:7.1f} s  {note}"
    total = found.get("seconds", sum(stage["seconds"] for stage in found["stages"]))
    yield f"  {'total':<26} {total:7.1f} s"


def _ratio(label: str, ratio: Mapping[str, Any]) -> str:
    told = f" ({ratio['reading']})" if ratio["reading"] in (ratios.UNCLEAR, ratios.TOO_NOISY) else ""
    value = "not measured" if ratio["value"] is None else f"x{ratio['value']:.3f}"
    return f"{label} {value}{_interval(ratio)}{told}"


def _interval(estimate: Mapping[str, Any], form: str = ".3f") -> str:
    lower, upper = estimate["interval95"]
    return "" if lower is None or upper is None else f" [{lower:{form}}, {upper:{form}}]"


def _amount(value: float) -> str:
    return f"{value:,.0f}"


def _removed(report: Mapping[str, Any]) -> dict[str, Any]:
    """What was removed of the model as a whole."""
    pruning = report["pruning"] or {}
    pruning = report["pruning"] or {}
    return {
        "dropped_layers": pruning.get("dropped_layers", []),
        "hidden_size": pruning.get("hidden_size"),
        "window": words.window(Pruning.model_validate(pruning)) if pruning else "",
    }


def of_report(report: Report) -> Iterator[str]:
    """The lines of a standalone report."""
    data = report.to_json()
    speed = {runtime: _ratios(section) for runtime, section in report.speed.items()}
    for reason in report.environment.reasons:
        yield f"  invalid   {reason}"
    costs = _costs(report)
    shown = {**{name: data[name] for name in ("sizes", "quality", "tasks")}, "speed": speed}
    for name, value in _lines({**shown, **_removed(data), "cost_per_million_tokens": costs}):
        yield f"  {name:<9} {value}"
