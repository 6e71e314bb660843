"""The report's headline, and the commands to run next."""

from collections.abc import Iterator

from numprune.serving.report import names, ratios, rules, words
from numprune.serving.report.models import GateResult, Report

_RUNTIMES = {"vllm": "vLLM", "tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime", "torch": "PyTorch"}
_SPEEDS = {"decode_tokens_per_s": "decode", "output_tokens_per_s": "output", "latency": "latency"}


def headline(report: Report) -> str:
    """`24 % smaller, decode 1.15× faster (ONNX Runtime), perplexity +8.1 %: within your limits.`"""
    if not report.environment.valid:
        return f"The machine was not fit for measurements, so there is no verdict: {report.environment.reasons[0]}."
    figures = [figure for figure in (_size(report), _speed(report), _quality(report)) if figure]
    sentence = ": ".join(part for part in (", ".join(figures), _conclusion(report)) if part)
    return f"{sentence[0].upper()}{sentence[1:]}."


def next_commands(report: Report) -> Iterator[str]:
    """Yield the commands to run after a pass; none for other reports, or without a model name."""
    name = report.identity.name
    if name is None or report.verdict is None or report.verdict.outcome != "pass":
        return
    yield f"numprune registry promote {name}@candidate"
    found = report.quality
    if found is None or (found.task not in ("masked-lm", "image-classification") and found.images is None):
        yield f"numprune serve {name}@production"


def _size(report: Report) -> str:
    """The parameters or, where fewer bits store them, the bytes of the weights."""
    if report.sizes is None:
        return ""
    pair = report.sizes.weight_bytes if report.quantization else report.sizes.parameters
    ratio = pair.ratio if pair else None
    if ratio is None:
        return ""
    percent = 100 * abs(1 - ratio)
    if percent < 0.5:
        return "same size"
    return f"{words.number(percent, 2)} % {'smaller' if ratio < 1 else 'larger'}"


def _speed(report: Report) -> str:
    """The speed in the runtime nearest to production."""
    runtime = next((name for name in (*_RUNTIMES, *report.speed) if name in report.speed), None)
    if runtime is None:
        return ""
    found = report.speed[runtime]
    name = next((name for name in _SPEEDS if ratios.reading(name, found)), None)
    if name is None:
        return ""
    shapes = [names.shape(key, images=names.of_images(report)) for key in list(found.shapes)[:1]]
    where = ", ".join([_RUNTIMES.get(runtime, runtime), *shapes])
    told, label = ratios.reading(name, found), _SPEEDS[name]
    what = label if label == "latency" else f"{label} speed"
    if told == ratios.UNCLEAR:
        return f"{told} in {what} ({where})"
    if told not in ("faster", "slower"):
        return f"{what} {told} ({where})"
    if label == "latency":
        told = "lower" if told == "faster" else "higher"
    value = getattr(found, name).ratio.value
    factor = words.number(max(value, 1 / value) if value else value, 3)
    return f"{label} {factor}\N{MULTIPLICATION SIGN} {told} ({where})"


def _quality(report: Report) -> str:
    found = report.quality
    if found is None or found.loss_delta.value is None:
        return ""
    if found.perplexity_ratio is not None:
        ratio = found.perplexity_ratio.value
        return "" if ratio is None else f"perplexity {words.signed(100 * (ratio - 1), 2)} %"
    label = "distance from baseline" if found.task == "embedding" else names.loss(found)
    show = words.signed if names.is_difference(found) else words.number
    return f"{label} {show(found.loss_delta.value, 2)} ({found.loss_delta.unit})"


def _conclusion(report: Report) -> str:
    if report.verdict is None:
        return "not judged yet"
    failed, undecided = (
        [gate for gate in report.verdict.gates if gate.outcome == outcome] for outcome in ("fail", "inconclusive")
    )
    if failed:
        told = f"{rules.seen(failed[0])}, limit {rules.limit(failed[0])}"
        return f"outside your limit on {_with_others(report, failed, told)}"
    if undecided:
        return f"undecided on {_with_others(report, undecided, undecided[0].reason)}"
    return "within your limits"


def _with_others(report: Report, gates: list[GateResult], told: str) -> str:
    """The first gate, with its details, and the number of others."""
    others = f", and {len(gates) - 1} more" if len(gates) > 1 else ""
    return f"{words.gate(gates[0], report)} ({told}){others}"
