"""A complete report as plain JSON, for tests to change; a registry and releases for it."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numprune.export import manifest
from numprune.serving import registry as registries
from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.registry import Registry
from numprune.serving.report import Report, markdown, write
from tests.serving.workspaces import MakeRelease

Json = dict[str, Any]


def estimate(value: Any, half_width: float = 0.01, samples: int = 40, unit: str = "document") -> Json:
    return {
        "value": value,
        "ci95_lower": value - half_width,
        "ci95_upper": value + half_width,
        "interval95": [value - 1.2 * half_width, value + 1.2 * half_width],
        "samples": samples,
        "sampling_unit": unit,
    }


def _side(milliseconds: float) -> Json:
    latency = {"p50": milliseconds, "p90": milliseconds * 1.1, "p95": None, "p99": None, "samples": 40}
    drift = [1 + 0.01 * (repeat % 4) for repeat in range(10)]
    return {
        "ttft_ms": latency,
        "itl_ms": latency,
        "decode_tokens_per_s": 1000.0 / milliseconds,
        "prefill_tokens_per_s": 9000.0 / milliseconds,
        "by_repeat": {
            "ttft": [milliseconds * slower for slower in drift],
            "decode_tokens_per_s": [*(1000.0 / milliseconds / slower for slower in drift[1:]), None],
        },
    }


COMPLETE: Json = {
    "schema": "numprune/report/2",
    "created": "2026-11-20T12:00:00Z",
    "run_id": "2026-11-20-quiet-owl",
    "identity": {
        "base": "a" * 64,
        "candidate": "b" * 64,
        "recipe": "c" * 64,
        "plan": "d" * 64,
        "exports": {"onnx": "e" * 64},
        "packages": {"torch": "2.13.0"},
    },
    "environment": {
        "cpu": "A CPU",
        "cores": 2,
        "memory_bytes": 8 << 30,
        "platform": "Linux",
        "load_average": [0.1, 0.2, 0.3],
        "valid": True,
        "reasons": [],
    },
    "pruning": {
        "criterion": "numerical",
        "allocation": "uniform",
        "compensation": "oneshot",
        "ratio_asked": 0.3,
        "ratio_removed": {"prunable": 0.3, "parameters": 0.25, "kv_bytes": 0.25},
        "kept_units": {"layers.0.mlp": [490, 704], "layers.0.attention": [3, 4]},
    },
    "sizes": {
        "parameters": {"baseline": 1000, "candidate": 750, "ratio": 0.75},
        "weight_bytes": {"baseline": 2000, "candidate": 1500},
    },
    "quality": {
        "task": "causal-lm",
        "tokens": 5000,
        "documents": 40,
        "baseline": {"nll_nats_per_token": 3.0, "perplexity": 20.09},
        "candidate": {"nll_nats_per_token": 3.05, "perplexity": 21.12},
        "loss_delta": {**estimate(0.05), "unit": "nats/token"},
        "perplexity_ratio": estimate(1.051),
        "document_deltas": {
            "values": [0.002 * index - 0.01 for index in range(40)],
            "worst": [
                {
                    "name": f"heldout.jsonl:{40 - index}",
                    "tokens": 125,
                    "loss_delta": 0.068 - 0.002 * index,
                }
                for index in range(10)
            ],
        },
        "kl_nats_per_token": 0.02,
        "top1_agreement": 0.93,
    },
    "speed": {
        "onnxruntime": {
            "load": {"prompts": 4, "prompt_length": 64},
            "warmup": 1,
            "repeats": 10,
            "order": "ABBA",
            "failed_requests": 0,
            "baseline": _side(10.0),
            "candidate": _side(8.0),
            "ttft": {"ratio": estimate(0.8, samples=10, unit="repeat")},
            "decode_tokens_per_s": {"ratio": estimate(1.2, 0.05, samples=10, unit="repeat")},
            "noise_floor": {"decode_tokens_per_s": {"relative": 0.03, "neighbours": 5}},
        }
    },
    "memory": {
        "onnxruntime": {
            "baseline": {"peak_bytes_run": 4000, "weight_bytes": 2000},
            "candidate": {"peak_bytes_run": 3000, "weight_bytes": 1500},
            "peak_bytes": {"baseline": 4000, "candidate": 3000},
        }
    },
    "parity": {"onnxruntime": {"maximum_error": 1e-6, "greedy_match": 1.0, "worst": {"row": 0, "token": 7}}},
}


@pytest.fixture
def report_json() -> Json:
    """A report of a run in which everything went well; not judged yet."""
    return copy.deepcopy(COMPLETE)


@pytest.fixture
def put() -> Callable[[Json, str, Any], Json]:
    """`put(report, "quality.tokens", 0)` sets one field of a report's JSON and returns the report."""

    def change(data: Json, path: str, value: Any) -> Json:
        *way, last = path.split(".")
        node = data
        for part in way:
            node = node[part]
        node[last] = value
        return data

    return change


@pytest.fixture(scope="session")
def _empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make its tables: once a session, then a copy for each test."""
    workspace = tmp_path_factory.mktemp("template")
    registries.open_registry(None, workspace)
    return workspace / "registry"


@pytest.fixture
def workspace(_empty_registry: Path, tmp_path: Path) -> Path:
    """With a space and letters beyond ASCII in its path."""
    folder = tmp_path / "wörk späce 作業"
    shutil.copytree(_empty_registry, folder / "registry")
    return folder


@pytest.fixture
def registry(workspace: Path) -> Registry:
    return registries.open_registry(None, workspace)


@pytest.fixture
def make_release(tmp_path: Path, report_json: Json) -> MakeRelease:
    """`make_release("a")` writes the folder of a release; its content follows from its name."""

    def make(
        content: str = "a", *, limit: float = 0.8, change: Callable[[Path], object] = lambda _: None, **report: Any
    ) -> Path:
        parts = tmp_path / f"parts {content} {len(list(tmp_path.iterdir()))}"
        with manifest.creating(parts / "checkpoint", kind="checkpoint") as partial:
            (partial / "model.safetensors").write_bytes(content.encode() * 1000)
            (partial / "config.json").write_text(json.dumps({"model": content}))
        with manifest.creating(parts / "onnx", kind="onnx") as partial:
            (partial / "model.onnx").write_bytes(content.encode() * 500)
        candidate = manifest.read(parts / "checkpoint").digest
        identity = {"candidate": candidate, "exports": {"onnx": manifest.read(parts / "onnx").digest}}
        data = {**report_json, "identity": {**report_json["identity"], **identity}, **report}
        unjudged = Report.model_validate(data)
        policy = Policy(gates=(Gate(metric="sizes.parameters.ratio", bound="point", max=limit),))
        judged = unjudged.judged(judge(unjudged, policy)) if limit else unjudged
        release = parts / "release"
        with manifest.creating(release, kind="release", parents={"checkpoint": candidate}) as partial:
            shutil.copytree(parts / "checkpoint", partial / "checkpoint")
            shutil.copytree(parts / "onnx", partial / "onnx")
            write(judged, partial / "report.json")
            (partial / "report.md").write_text(markdown(judged))
            change(partial)
        return release

    return make
