"""One gate on one figure of a report."""

from typing import Any

from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.report import GateResult, Report

Json = dict[str, Any]
NLL = "quality.loss_delta"
DECODE = "speed.onnxruntime.decode_tokens_per_s.ratio"


def check(data: Json, metric: str, bound: str, **limit: float) -> GateResult:
    policy = Policy(gates=(Gate(metric=metric, bound=bound, **limit),))
    return judge(Report.model_validate(data), policy).gates[0]
