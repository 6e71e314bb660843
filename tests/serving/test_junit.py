"""JUnit XML says exactly what the verdict says."""

from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.junit import junit, junit_error
from numprune.serving.report import Report

Json = dict[str, Any]
NLL = "quality.loss_delta"
POLICY = Policy(
    gates=(
        Gate(metric=NLL, bound="ci95_upper", max=0.1),
        Gate(metric=NLL, bound="ci95_upper", max=0.055),
        Gate(metric="sizes.parameters.ratio", bound="point", max=0.5),
        Gate(metric="quality.no_such_metric", bound="point", min=0.0),
    )
)
# Of each element: the attributes it must have and those it may have beside them, the elements it may hold. What Ant's
# schema and that of Jenkins' xUnit plug-in both allow.
SCHEMA: dict[str, tuple[set[str], set[str], list[str]]] = {
    "testsuites": (set(), set(), ["testsuite"]),
    "testsuite": (
        {"name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors", "time"},
        {"skipped"},
        ["properties", "testcase", "system-out", "system-err"],
    ),
    "properties": (set(), set(), ["property"]),
    "property": ({"name", "value"}, set(), []),
    "testcase": ({"name", "classname", "time"}, set(), ["failure", "error"]),
    "failure": ({"type"}, {"message"}, []),
    "error": ({"type"}, {"message"}, []),
    "system-out": (set(), set(), []),
    "system-err": (set(), set(), []),
}


def read(text: str) -> ElementTree.Element:
    """The suite of a document that keeps the schema."""
    root = ElementTree.fromstring(text.encode())  # as a file holds it, the declared encoding included
    assert root.tag == "testsuites"
    for element in root.iter():
        needed, allowed, inside = SCHEMA[element.tag]
        assert needed <= element.attrib.keys() <= needed | allowed
        order = [inside.index(child.tag) for child in element]
        assert order == sorted(order)
    (suite,) = root
    assert [child.tag for child in suite if child.tag != "testcase"] == ["properties", "system-out", "system-err"]
    assert datetime.strptime(suite.attrib["timestamp"], "%Y-%m-%dT%H:%M:%S")
    cases = suite.findall("testcase")
    assert suite.attrib["tests"] == str(len(cases))
    assert suite.attrib["failures"] == str(len(suite.findall("testcase/failure")))
    assert suite.attrib["errors"] == str(len(suite.findall("testcase/error")))
    return suite


def test_each_gate_is_a_test_case_with_its_outcome(report_json: Json) -> None:
    report = Report.model_validate(report_json)
    verdict = judge(report, POLICY)
    suite = read(junit(report, verdict))
    outcomes = []
    for case, gate in zip(suite.findall("testcase"), verdict.gates, strict=True):
        assert case.attrib["name"].startswith(f"{gate.metric} ")
        failure = case.find("failure")
        outcomes.append("pass" if failure is None else failure.attrib["type"])
        if failure is not None:
            assert failure.attrib["message"] == gate.reason
            assert f"outcome: {gate.outcome}" in (failure.text or "")
    assert outcomes == ["pass", "inconclusive", "fail", "fail"]
    assert suite.attrib | {"failures": "3", "errors": "0", "skipped": "0"} == suite.attrib
    printed = suite.findtext("system-out") or ""
    assert f"metric: {NLL}, bound: ci95_upper, max: 0.1, value: 0.05" in printed  # a passed gate's figures, too
    properties = {found.attrib["name"]: found.attrib["value"] for found in suite.iter("property")}
    assert properties["outcome"] == "fail"
    assert properties["candidate"] == "b" * 64


def test_in_an_invalid_environment_every_gate_is_an_error(report_json: Json) -> None:
    report_json["environment"] |= {"valid": False, "reasons": ["the GPU is throttled", "shared"]}
    report = Report.model_validate(report_json)
    suite = read(junit(report, judge(report, POLICY)))
    errors = suite.findall("testcase/error")
    assert len(errors) == len(POLICY.gates)
    assert {error.attrib["type"] for error in errors} == {"invalid environment"}
    assert {error.attrib["message"] for error in errors} == {"the GPU is throttled; shared"}
    assert suite.attrib["failures"] == "0"


def test_unjudged_gates_are_errors() -> None:
    suite = read(junit_error("report.json: no such report", datetime(2026, 11, 20, tzinfo=UTC)))
    (error,) = suite.findall("testcase/error")
    assert error.attrib == {"type": "error", "message": "report.json: no such report"}


@pytest.mark.parametrize("text", ["<&>\"']]>", "\x00\x1b[31m", "\ud800", "\ufffe", "a\u2028b\n\tc", "ünïcode 🎲"])
def test_text_from_a_report_stays_text(report_json: Json, text: str) -> None:
    report_json["environment"] |= {"valid": False, "reasons": [text]}
    report_json["run_id"] = text
    report = Report.model_validate(report_json)
    suite = read(junit(report, judge(report, POLICY)))
    found = suite.findall("testcase/error")[0].attrib["message"]
    assert found == text or found.startswith("\\u")


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=[])))
def test_any_message_can_be_written_and_read_back(message: str) -> None:
    suite = read(junit_error(message, datetime(2026, 11, 20, tzinfo=UTC)))
    found = suite.findall("testcase/error")[0].attrib["message"]
    if message.isprintable():
        assert found == message
