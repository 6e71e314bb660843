"""Accuracy on tasks in a report: its gates, consistency and presentation."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from numprune.paired import paired_accuracy
from numprune.serving import gates
from numprune.serving import report as reports
from numprune.serving.gates import Gate, Policy
from numprune.serving.report import GateResult, Report, page
from tests.serving.conftest import COMPLETE
from tests.serving.pages import Parsed

DELTA = "tasks.arc_easy.acc_norm.accuracy_delta"


def report(lost: int, gained: int, items: int) -> Report:
    baseline = np.arange(items) < items // 2
    candidate = baseline.copy()
    candidate[:lost] = False
    candidate[items - gained :] = True
    found = asdict(paired_accuracy(baseline, candidate))
    accuracy = {"runtime": "torch", "num_fewshot": 0, **found}
    return Report.model_validate({**COMPLETE, "tasks": {"arc_easy": {"acc_norm": accuracy}}})


def judged(found: Report, margin: float = 0.02) -> GateResult:
    policy = Policy(gates=(Gate(metric=DELTA, bound="ci95_lower", min=-margin),))
    [gate] = gates.judge(found, policy).gates
    return gate


@pytest.mark.parametrize(
    ("lost", "gained", "outcome"), [(10, 10, "pass"), (120, 20, "fail"), (60, 20, "inconclusive"), (0, 0, "pass")]
)
def test_a_gate_on_accuracy_has_three_outcomes(lost: int, gained: int, outcome: str) -> None:
    gate = judged(report(lost, gained, 2000))
    assert gate.outcome == outcome
    assert gate.samples == 2000
    assert gate.power is not None


def test_few_items_are_inconclusive() -> None:
    gate = judged(report(0, 0, 50))
    assert gate.outcome == "inconclusive"
    assert gate.samples_needed is not None
    assert 50 < gate.samples_needed < 2000
    assert gate.power is not None
    assert gate.power < 0.8
    assert "with 50 a candidate equal to the baseline passes" in gate.reason


@pytest.mark.parametrize(
    ("field", "value"),
    [("right_to_wrong", 7), ("candidate", 0.9), ("items", 999), ("wrong_to_right", 990)],
)
def test_figures_that_contradict_each_other_are_refused(field: str, value: Any) -> None:
    data = report(20, 10, 1000).to_json()
    data["tasks"]["arc_easy"]["acc_norm"][field] = value
    with pytest.raises(ValidationError, match="change"):
        Report.model_validate(data)


def test_it_is_shown() -> None:
    found = report(20, 10, 1000)
    parsed = Parsed(page.html(found)).text
    assert "Answered by both models in torch, with no examples before each item." in parsed
    assert "arc_easy, acc_norm" in parsed
    row = (
        "| arc_easy, acc_norm | 1,000 | 50.0 % | 49.0 % | -0.01 [-0.02182, 0.0007834] (n = 1000) | 20 | 10 | 0.09874 |"
    )
    assert row in reports.markdown(found)
    assert "### Tasks" in reports.quality_section(found)


def test_a_report_without_tasks_says_nothing_of_them() -> None:
    found = Report.model_validate(COMPLETE)
    assert "Tasks" not in reports.markdown(found)
    assert "Accuracy on tasks" not in page.html(found)
