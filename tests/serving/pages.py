"""Reports for the tests of the page: one with every section, and ways to change it."""

import copy
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

from numprune.serving import front, gates
from numprune.serving.front import Estimate, Point
from numprune.serving.report import UNITS, Report
from numprune.serving.report.page.sweep import Row
from tests.serving.conftest import COMPLETE, Json, estimate

POLICY = [
    {"metric": "quality.loss_delta", "bound": "ci95_upper", "max": 0.25},
    {"metric": "speed.onnxruntime.decode_tokens_per_s.ratio", "bound": "ci95_lower", "min": 0.5},
    {"metric": "sizes.parameters.ratio", "bound": "point", "max": 0.85},
]

METRICS: dict[str, dict[str, Any]] = {
    "embedding": {"similarity_spearman": 0.97},
    "classification": {"kl_nats_per_text": 0.02, "top1_agreement": 0.96},
    "masked-lm": {
        "nll_nats_per_masked_token": {"baseline": 2.0, "candidate": 2.02},
        "kl_nats_per_masked_token": 0.03,
        "top1_agreement": 0.9,
    },
    "image-classification": {
        "nll_nats_per_image": {"baseline": 0.5, "candidate": 0.52},
        "kl_nats_per_image": 0.01,
        "accuracy": {"baseline": 0.9, "candidate": 0.88},
        "top5_accuracy": {"baseline": 0.99, "candidate": 0.98},
        "top1_agreement": 0.95,
        "right_to_wrong": 3,
        "wrong_to_right": 1,
    },
}


def full() -> Json:
    """Every section, layers that differ, a skipped block, two concurrencies of a server."""
    data = copy.deepcopy(COMPLETE)
    local = data["speed"]["onnxruntime"]
    local["itl"] = {"ratio": estimate(1.001, 0.02, samples=10, unit="repeat")}
    local["runtime"] = {"baseline": {"device": "cpu"}, "candidate": {"device": "cpu", "threads": 2}}
    level = copy.deepcopy(local)
    for side, rate in (("baseline", 100.0), ("candidate", 120.0)):
        level[side]["output_tokens_per_s"] = rate
        level[side]["by_repeat"]["output_tokens_per_s"] = [rate + repeat for repeat in range(10)]
    level["output_tokens_per_s"] = {"ratio": estimate(1.2, 0.02, samples=10, unit="repeat")}
    level["noise_floor"]["output_tokens_per_s"] = {"relative": 0.05, "neighbours": 5}
    data["speed"]["vllm"] = {**copy.deepcopy(level), "concurrency": {"1": level, "4": copy.deepcopy(level)}}
    memory = {"peak_bytes_load": 2 << 30, "peak_bytes_run": 3 << 30, "weight_bytes": 1 << 30, "kv_tokens": 87296}
    data["memory"]["vllm"] = {
        "baseline": memory,
        "candidate": {**memory, "weight_bytes": 3 << 28, "kv_tokens": 116480},
        "peak_bytes": {"baseline": 3 << 30, "candidate": 3 << 30},
        "kv_tokens": {"baseline": 87296, "candidate": 116480},
    }
    data["pruning"]["kept_units"] = {
        **{f"layers.{layer}.attention": [layer % 4, 4] for layer in range(12)},
        **{f"layers.{layer}.mlp": [0 if layer == 7 else 704 - 8 * layer, 704] for layer in range(12)},
    }
    data["quality"]["generation"] = generation()
    data["sizes"]["dtype"] = {"baseline": "bfloat16", "candidate": "bfloat16"}
    local["dtype"] = {"baseline": "float32", "candidate": "float32"}
    data["environment"]["gpu"] = {"name": "A GPU", "uuid": "GPU-1", "driver": "570", "memory_bytes": 80 << 30}
    data["parity"]["vllm"] = {"logprob_error_max": 2e-5, "tolerance": 1e-3, "greedy_match": 1.0, "positions": 358}
    return data


def encoder(task: str = "embedding") -> Json:
    """The report of an encoder: a forward pass at two shapes, and no KV cache."""
    data = copy.deepcopy(COMPLETE)
    causal = data["quality"]
    data["quality"] = {
        "task": task,
        "loss_delta": {**estimate(0.02, 0.004), "unit": UNITS[task]},
        "metrics": METRICS[task],
        **{key: causal[key] for key in ("tokens", "documents", "document_deltas")},
    }
    level = data["speed"]["onnxruntime"]
    for side, ms in (("baseline", 10.0), ("candidate", 8.0)):
        by_repeat = {"latency": [ms + 0.1 * n for n in range(10)], "samples_per_s": [1000 / ms - n for n in range(10)]}
        level[side] = {
            "latency_ms": {"p50": ms, "samples": 40},
            "samples_per_s": 1000 / ms,
            "by_repeat": by_repeat,
        }
    level |= {
        "latency": {"ratio": estimate(0.8, 0.01, samples=10, unit="repeat")},
        "samples_per_s": {"ratio": estimate(1.25, 0.02, samples=10, unit="repeat")},
        "noise_floor": {name: {"relative": 0.03, "neighbours": 5} for name in ("latency", "samples_per_s")},
    }
    for name in ("ttft", "decode_tokens_per_s"):
        del level[name]
    data["parity"]["onnxruntime"] = {"output_error_max": 2e-6, "tolerance": 1e-3, "positions": 1280}
    data["speed"]["onnxruntime"] = {**copy.deepcopy(level), "shapes": {"1x128": level, "8x128": copy.deepcopy(level)}}
    return data


def generation() -> Json:
    """Three prompts, on one of which the candidate says nothing and on one of which both loop."""
    texts = [("Paris.", "Paris, I think."), ("The sea is blue.", "\n\n"), ("a b " * 32, "of the " * 32)]
    outputs = [
        {
            "prompt": f"Prompt {number}",
            **{
                side: {"text": text, "tokens": 64, "empty": not text.strip(), "repeating": len(text) > 100}
                for side, text in zip(("baseline", "candidate"), pair, strict=True)
            },
        }
        for number, pair in enumerate(texts)
    ]
    return {
        "prompts": 3,
        "chat_template": True,
        "maximum_tokens": 64,
        "baseline": {"empty": 0, "empty_share": 0.0, "repeating": 1, "repeating_share": 1 / 3},
        "candidate": {"empty": 1, "empty_share": 1 / 3, "repeating": 1, "repeating_share": 1 / 3},
        "degraded": 1,
        "degraded_share": 1 / 3,
        "outputs": outputs,
    }


def few_documents(data: Json, count: int) -> None:
    """Make the report one of so few documents that windows are resampled."""
    quality = data["quality"]
    quality["documents"] = count
    for name in ("loss_delta", "perplexity_ratio"):
        quality[name]["sampling_unit"] = "window"
    deltas = [0.05 + 0.01 * index for index in range(count)]
    worst = [{"name": f"text {index}", "tokens": 9, "loss_delta": deltas[index]} for index in reversed(range(count))]
    quality["document_deltas"] = {"values": deltas, "worst": worst}


def judged(data: Json, policy: list[dict[str, Any]] | None = None) -> Report:
    report = Report.model_validate(data)
    return report.judged(gates.judge(report, gates.Policy.model_validate({"gates": policy or POLICY})))


def altered(data: Json, change: Callable[[Any], Any], kinds: tuple[type, ...]) -> Json:
    """The report with `change` made to every leaf of those kinds, but where the schema then refuses the report."""
    data = copy.deepcopy(data)
    for node, key in list(_leaves(data, kinds)):
        before = node[key]
        node[key] = change(before)
        try:
            Report.model_validate(data)
        except ValueError:
            node[key] = before
    return data


def _leaves(node: Any, kinds: tuple[type, ...]) -> Iterator[tuple[Any, Any]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list):
            yield from _leaves(value, kinds)
        elif isinstance(value, kinds) and not isinstance(value, bool):
            yield node, key


class Parsed(HTMLParser):
    """What a page is made of: its elements with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


AXES = ("NLL difference, nats/token", "Decode tokens/s, ratio (onnxruntime)", "Weight bytes, ratio")


def swept(count: int) -> list[Row]:
    """The candidates of a sweep: they trade loss for bytes and speed, the last one failed, and the third is chosen."""

    def at(index: int) -> Point:
        loss, speed = 0.02 + 0.01 * index + 0.05 * (index % 3 == 1), 1.05 + 0.03 * index
        return Point(
            Estimate(loss, loss - 0.008, loss + 0.008),
            Estimate(speed, speed - 0.02, speed + 0.02),
            Estimate(*[0.95 - 0.04 * (index - index % 3)] * 3),
        )

    points = [*map(at, range(count - 1)), None]
    return [
        Row(
            number=index + 1,
            label=f"prune.ratio = {0.05 * (index + 1):.2f}, quantize.scheme = none",
            outcome="pass" if point else "error",
            note="" if point else "data.samples = 99999: the text has 12 full rows",
            link=f"report-{index + 1}/report.html" if point else "",
            point=point,
            on_front=is_on,
            chosen=index == 2,
        )
        for index, (point, is_on) in enumerate(zip(points, front.on_front(points), strict=True))
    ]


REFINED_BY = "search: 31 generations, 248 candidates: confirmed"
REFINED = {
    "generations": 31,
    "candidates": 248,
    "stopped": "no gain",
    "unit": "nats/token",
    "rows": 32,
    "divergence_before": 0.1526,
    "divergence_after": 0.1443,
    "rows_apart": 96,
    "change_apart": -0.0061,
    "change_apart_upper": -0.0032,
    "confirmed": True,
    "summary": REFINED_BY,
}
