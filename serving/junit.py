"""A verdict as JUnit XML, for the test page of a CI system: one test case for each gate.

A gate that passes is a passed test; one that fails or is inconclusive is a failure of that type; in an invalid
environment nothing was judged, and every gate is an error. None is ever skipped. The XML is valid against the schema of
Ant's JUnit reports and against that of Jenkins' xUnit plug-in, which between them want all of the attributes below;
GitLab and GitHub's readers take what they know of it.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from xml.etree import ElementTree

from numprune.serving.report import GateResult, Report, Verdict

_SUITE = "numprune.gates"
# What XML 1.0 has no way to write, not even escaped: control characters, halves of surrogate pairs, two non-characters.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report, verdict: Verdict) -> str:
    """The document; `verdict` is of this report, which need not carry it."""
    invalid = "; ".join(report.environment.reasons) if verdict.outcome == "invalid environment" else None
    cases = [_case(gate, invalid) for gate in verdict.gates]
    facts = {
        "outcome": verdict.outcome,
        "run_id": report.run_id,
        "base": report.identity.base,
        "candidate": report.identity.candidate,
    }
    return _document(cases, report.created, facts, [_line(gate) for gate in verdict.gates])


def junit_error(message: str, now: datetime) -> str:
    """The document of a report that could not be judged: one test case, an error."""
    case = _element("testcase", name="report", classname=_SUITE, time="0")
    case.append(_element("error", message, type="error", message=message))
    return _document([case], now, {"outcome": "error"}, [message])


def _document(cases: Sequence[ElementTree.Element], when: datetime, facts: dict[str, str], lines: Sequence[str]) -> str:
    suite = _element(
        "testsuite",
        name=_SUITE,
        package="numprune",
        id="0",
        timestamp=f"{when:%Y-%m-%dT%H:%M:%S}",  # the schema has no time zone
        hostname="localhost",  # required; which machine it was is the report's affair
        tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        errors=str(sum(case.find("error") is not None for case in cases)),
        skipped="0",
        time="0",  # required; judging takes none
    )
    properties = _element("properties")
    properties.extend(_element("property", name=name, value=value) for name, value in facts.items())
    suite.append(properties)
    suite.extend(cases)
    suite.append(_element("system-out", "\n".join(lines)))
    suite.append(_element("system-err"))
    root = _element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(gate: GateResult, invalid: str | None) -> ElementTree.Element:
    # The limit is no part of the name: CI systems follow a test's history by it.
    side = "max" if gate.min is None else "min"
    case = _element("testcase", name=f"{gate.metric} {side} ({gate.bound})", classname=_SUITE, time="0")
    if invalid is not None:
        case.append(_element("error", _line(gate), type="invalid environment", message=invalid))
    elif gate.outcome != "pass":
        case.append(_element("failure", _line(gate), type=gate.outcome, message=gate.reason))
    return case


def _line(gate: GateResult) -> str:
    """Everything that was seen, in full precision."""
    seen = gate.model_dump(mode="json", exclude_none=True)
    return ", ".join(f"{name}: {value}" for name, value in seen.items())


def _element(tag: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
    element = ElementTree.Element(tag, {name: _legal(value) for name, value in attributes.items()})
    element.text = None if text is None else _legal(text)
    return element


def _legal(text: str) -> str:
    return _ILLEGAL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
