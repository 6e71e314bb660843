"""Reports of a model that was pruned and quantized within a budget of bytes."""

import copy

import pytest
from pydantic import ValidationError

from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.report import Report, markdown, page
from tests.serving.conftest import COMPLETE

BITS = {"layers.0.attention": 4, "layers.0.mlp": 8, "layers.1.attention": 4, "layers.1.mlp": 16}


def test_text_and_page_say_the_budget_and_the_bits_of_each_layer() -> None:
    data = copy.deepcopy(COMPLETE)
    price = {"nats_per_token": 0.02, "bound_nats_per_token": 0.019, "summary": "0.02 nats per token, or more"}
    data["pruning"] |= {
        "ratio_asked": None,
        "budget_asked": 6 << 30,
        "kv_budget_asked": 64 << 10,
        "price": price,
        "shape": ["chosen shape: 48"],
    }
    sizes = {"baseline": 100, "candidate": 40}
    data["quantization"] = {"scheme": "mixed", "group_size": 32, "method": "gptq", "weight_bytes": sizes, "bits": BITS}
    report = Report.model_validate(data)
    text = markdown(report)
    assert "Asked for weights of at most 6" in text
    assert "- Attention: layers 0 to 1: 4 bits\n- MLPs: layer 0: 8 bits; layer 1: 16 bits\n" in text
    for shown in (text, page.html(report)):
        assert "quantized to the bits chosen for each block, 32 channels per scale, by gptq: " in shown
        assert "1 block in 16 bits, 1 block in 8 bits, 2 blocks in 4 bits" in shown
        assert "layer 0: 8 bits; layer 1: 16 bits" in shown
        assert "eights of at most" in shown
        assert "of KV cache per token" in shown
        assert "0.02 nats per token, or more" in shown
        assert "hosen shape: 48" in shown
    data["quantization"] |= {"weight_bytes": {"baseline": 40, "candidate": 40}, "bits": dict.fromkeys(BITS, 16)}
    report = Report.model_validate(data)
    for shown in (markdown(report), page.html(report)):
        assert "no weight was quantized" in shown
        assert "quantized to" not in shown


def test_text_and_page_say_the_budget_of_time_and_what_was_measured() -> None:
    data = copy.deepcopy(COMPLETE)

    def found(ms: float) -> dict[str, object]:
        return {"ms": ms, "interval95": [ms - 0.25, ms + 0.25]}

    data["pruning"] |= {
        "ratio_asked": None,
        "latency": {
            "scenario": "decode,b=8,ctx=2048",
            "runtime": "onnxruntime",
            "limit_ms": 20,
            "dense_predicted": found(27),
            "dense_measured": found(27.5),
            "predicted": found(19.75),
            "measured": found(19.5),
            "corrections": 0,
        },
    }
    report = Report.model_validate(data)
    for shown in (markdown(report), page.html(report)):
        assert "at most 20 ms in the scenario decode,b=8,ctx=2048 in onnxruntime" in shown
        assert "19.75 ms predicted, 19.50 ms measured (19.2 to 19.8), from 27.50 ms" in shown
    data["pruning"]["latency"]["speedup"] = 1.375
    assert "at most 20 ms for 1.375x in the scenario decode,b=8,ctx=2048" in markdown(Report.model_validate(data))


@pytest.mark.parametrize("metric", ["speed.onnxruntime.decode_tokens_per_s.ratio", "pruning.latency.predicted.ms"])
def test_an_estimate_is_called_one_and_passes_no_gate_on_a_speed(metric: str) -> None:
    data = copy.deepcopy(COMPLETE)
    times = {"ms": 19.75, "interval95": [19.75, 19.75]}
    data["pruning"]["latency"] = {
        "scenario": "decode,b=8,ctx=2048",
        "runtime": "roofline",
        "limit_ms": 20,
        "dense_predicted": times | {"ms": 27},
        "dense_measured": None,
        "predicted": times,
        "measured": None,
        "corrections": 0,
        "estimated_for": "H200 SXM",
    }
    report = Report.model_validate(data)
    for shown in (markdown(report), page.html(report)):
        assert "decode,b=8,ctx=2048: estimated for H200 SXM, not measured, are 19.75 ms, from 27.00 ms" in shown
    alone = copy.deepcopy(data)
    alone["pruning"]["latency"]["dense_predicted"] = None
    shown = markdown(Report.model_validate(alone))
    assert "not measured, are 19.75 ms" in shown
    assert "19.75 ms, from" not in shown
    limit = {"min": 1e-9} if metric.startswith("speed") else {"max": 1e9}
    [found] = judge(report, Policy(gates=(Gate(metric=metric, bound="point", **limit),))).gates
    assert found.outcome == "fail"
    assert "estimated for H200 SXM, not measured: no gate on a speed can pass" in found.reason
    data["pruning"]["latency"]["measured"] = times
    with pytest.raises(ValidationError, match="either measured or estimated for a device"):
        Report.model_validate(data)
