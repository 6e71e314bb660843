"""Formatting of figures: few digits, units, and words for unknown values."""

import math
import re

from numprune.serving.report import names
from numprune.serving.report.kept import listed
from numprune.serving.report.models import GateResult, LatencyBudget, Pruning, RatioRemoved, Report, ReportedEstimate

ABSENT = "–"  # noqa: RUF001
NARROW = "\N{NARROW NO-BREAK SPACE}"
WIDE = "\N{NO-BREAK SPACE}"

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

_METRICS = {
    "quality.nll_delta_nats_per_token": "NLL difference, nats/token",  # the name of schema 1
    "quality.perplexity_ratio": "Perplexity, ratio",
    "quality.kl_nats_per_token": "KL divergence, nats/token",
    "quality.top1_agreement": "Top-1 agreement",
    "quality.generation.degraded": "Degraded outputs",
    "quality.generation.degraded_share": "Degraded outputs, share",
    "quality.generation.candidate.empty": "Empty outputs",
    "quality.generation.candidate.empty_share": "Empty outputs, share",
    "quality.generation.candidate.repeating": "Repeating outputs",
    "quality.generation.candidate.repeating_share": "Repeating outputs, share",
    "quality.images.guided_kl_nats_per_code": "KL of guided distributions, nats/code",
    "quality.images.fid.delta": "FID, difference",
    "quality.images.kid.delta": "KID, difference",
    "quality.images.inception_score.delta": "Inception Score, difference",
    "sizes.parameters.ratio": "Parameters, ratio",
    "sizes.weight_bytes.ratio": "Weight bytes, ratio",
    "sizes.kv_bytes_per_token.ratio": "KV cache per token, ratio",
    "sizes.flops_per_token.ratio": "FLOPs per token, ratio",
}

_LOSSES = {  # by unit; a classifier's nats/text can be either of two losses
    "nats/token": "NLL difference",
    "nats/code": "NLL difference",
    "nats/masked token": "NLL difference",
    "1 - cosine": "Distance from baseline",
}

COUNTED = {
    "parameters": "prunable parameters",
    "flops": "FLOPs of the blocks",
    "bytes": "bytes of the blocks",
    "kv-bytes": "KV-cache bytes",
    "milliseconds": "time of the blocks",
}

LATENCIES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2e": "End to end",
    "latency": "Latency of a batch",
}
RATES = {
    "decode_tokens_per_s": "Decode",
    "prefill_tokens_per_s": "Prefill",
    "output_tokens_per_s": "Output",
    "goodput_requests_per_s": "Goodput",
    "samples_per_s": "Throughput",
}
ENERGY = {"joules_per_token": "Energy"}
# Others are in tokens/s.
RATE_UNITS = {"goodput_requests_per_s": "requests/s", "samples_per_s": "samples/s", "joules_per_token": "J/token"}

_SPEED = re.compile(
    r"speed\.(?P<runtime>[a-z0-9_-]+)(?:\.concurrency\.(?P<level>\d+)|\.shapes\.(?P<shape>\d+x\d+))?"
    r"\.(?P<name>[a-z0-9_]+)\.ratio"
)
_QUALITY = re.compile(r"quality\.metrics\.(?P<name>[a-z0-9_]+)(?P<side>\.candidate|\.baseline)?")
_PEAK = re.compile(r"memory\.(?P<runtime>[a-z0-9_-]+)\.(?P<name>peak_bytes|kv_tokens)\.ratio")
_TASK = re.compile(r"tasks\.(?P<task>[A-Za-z0-9_-]+)\.(?P<metric>[A-Za-z0-9_-]+)\.accuracy_delta")
_MEMORY = {"peak_bytes": "Peak memory, ratio", "kv_tokens": "Tokens in the KV cache, ratio"}


def metric(path: str, unit: str | None = None, *, images: bool = False) -> str:
    """Return a readable name for a metric's dotted path, with its unit, or the path itself.

    `images`: a batch consists of images, not of texts.
    """
    if path == "quality.loss_delta":
        return f"{_LOSSES.get(unit, 'Loss')}, {unit}" if unit else "Loss"
    if path in _METRICS:
        return _METRICS[path]
    if (found := _QUALITY.fullmatch(path)) and found["name"] in names.METRICS:
        of_baseline = ", baseline" if found["side"] == ".baseline" else ""
        return f"{names.METRICS[found['name']]}{of_baseline}"
    if (found := _SPEED.fullmatch(path)) and found["name"] in LATENCIES | RATES | ENERGY:
        level = f", {found['level']} at a time" if found["level"] else ""
        level += f", {names.shape(found['shape'], images=images)}" if found["shape"] else ""
        return f"{named(found['name'])}, ratio ({found['runtime']}{level})"
    if found := _PEAK.fullmatch(path):
        return f"{_MEMORY[found['name']]} ({found['runtime']})"
    if found := _TASK.fullmatch(path):
        return f"Accuracy difference ({found['task']}, {found['metric']})"
    return path


def gate(found: GateResult, report: Report) -> str:
    """The name of a gate's metric in a report."""
    return metric(found.metric, found.unit, images=names.of_images(report))


def named(name: str) -> str:
    """`ttft` → Time to first token; `decode_tokens_per_s` → Decode tokens/s."""
    if name in LATENCIES:
        return LATENCIES[name]
    return f"{(RATES | ENERGY)[name]} {RATE_UNITS.get(name, 'tokens/s')}"


def number(value: float | None, digits: int = 4) -> str:
    """A number with the given significant digits; integers and values from 1,000 are shown in full."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if isinstance(value, int) or value == 0:
        return _minus(f"{value:,}") if abs(value) < 10**15 else _minus(f"{float(value):.{digits - 1}e}")
    size = math.floor(math.log10(abs(value)))
    if not -5 < size < 15:
        return _minus(f"{value:.{digits - 1}e}")
    return _minus(f"{value:,.{max(0, digits - 1 - size)}f}")


def plain(value: float | None) -> str:
    """A number without trailing zeros: 0.25, not 0.2500."""
    return ABSENT if value is None else _minus(f"{value:,.4g}" if 1e-4 < abs(value) < 1e4 else number(value))


def signed(value: float | None, digits: int = 3) -> str:
    text = number(value, digits)
    return f"+{text}" if value is not None and math.isfinite(value) and value > 0 else text


def share(value: float | None) -> str:
    return ABSENT if value is None else f"{number(100 * value, 3)}{NARROW}%"


def times(value: float | None) -> str:
    """A ratio, with a times sign before it."""
    return ABSENT if value is None else f"\N{MULTIPLICATION SIGN}{number(value, 3)}"


def change(ratio: float | None) -> str:
    """A ratio as a percentage change: −24.2 %."""
    return ABSENT if ratio is None else f"{signed(100 * (ratio - 1))}{NARROW}%"


def size(value: float | None) -> str:
    """Bytes in the largest unit that gives at least 1."""
    if value is None:
        return ABSENT
    power = min(int(math.log2(abs(value)) / 10), len(_UNITS) - 1) if abs(value) >= 1 else 0
    return f"{plain(value / 1024**power)}{WIDE}{_UNITS[power]}"


def span(lower: float | None, upper: float | None, digits: int = 3) -> str:
    return f"{number(lower, digits)} to {number(upper, digits)}"


def interval(estimate: ReportedEstimate, digits: int = 3) -> str:
    return span(*estimate.interval95, digits)


def budgets(found: Pruning) -> str:
    """The budgets that pruning had to stay within; empty if there was a ratio."""
    limits = [latency(found.latency)] if found.latency else []
    limits += [] if found.budget_asked is None else [f"weights of at most {size(found.budget_asked)}"]
    limits += [] if found.kv_budget_asked is None else [f"at most {size(found.kv_budget_asked)} of KV cache per token"]
    return "; ".join(limits)


def window(found: Pruning) -> str:
    """The layers that see only a window; empty if there are none."""
    if found.window is None:
        return ""
    asked = f", for {printable(found.sequence_budget_asked)}" if found.sequence_budget_asked else ""
    layers = "layer" if len(found.windowed_layers) == 1 else "layers"
    return f"{found.window:,} tokens in {layers} {listed(found.windowed_layers)}{asked}"


def at_context(removed: RatioRemoved) -> str:
    """Where the share of the KV cache that was removed depends on the context: at which."""
    return "" if removed.kv_context is None else f" at {removed.kv_context:,} tokens"


def latency(found: LatencyBudget) -> str:
    """The budget of time, and how the prediction compares with the measurement."""
    how = f" ({printable(found.served)})" if found.served else ""
    most = f"at most {plain(found.limit_ms)} ms"
    if found.speedup is not None:
        most += f" for {plain(found.speedup)}x"
    if found.measured is None or found.dense_measured is None:
        device = printable(found.estimated_for or "")
        before = f", from {number(found.dense_predicted.ms)} ms" if found.dense_predicted else ""
        return (
            f"{most} in the scenario {printable(found.scenario)}{how}: estimated for {device}, "
            f"not measured, are {number(found.predicted.ms)} ms{before}"
        )
    low, high = found.measured.interval95
    return (
        f"{most} in the scenario {printable(found.scenario)} in {found.runtime}{how}: "
        f"{number(found.predicted.ms)} ms predicted, {number(found.measured.ms)} ms measured ({span(low, high)}), from "
        f"{number(found.dense_measured.ms)} ms"
    )


def printable(text: str) -> str:
    """Remove characters that HTML cannot contain or that would reorder the text around them."""
    return "".join(map(_printable, text))


def _printable(letter: str) -> str:
    if letter.isprintable() or letter in f"\n{NARROW}{WIDE}":
        return letter
    return " " if letter.isspace() else "\N{REPLACEMENT CHARACTER}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
