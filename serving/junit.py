"""A verdict as JUnit XML for CI systems: one test case per gate.

A passing gate is a passed test; a failed or inconclusive gate is a failure of that type; in an invalid environment
nothing is judged, and every gate is an error. No test is ever skipped. The XML is valid against the schemas of Ant's
JUnit reports and of Jenkins' xUnit plug-in, which together require all of the attributes below; GitLab and GitHub read
a subset.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from xml.etree import ElementTree

from numprune.serving.report import GateResult, Report, Verdict

_SUITE = "numprune.gates"
# Characters that XML 1.0 cannot represent, even escaped: control characters, lone surrogates, two non-characters.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report, verdict: Verdict) -> str:
    """The document for a `verdict` on this report, which need not contain it."""
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
        timestamp=f"{when:%Y-%m-%dT%H:%M:%S}",  # the schema allows no time zone
        hostname="localhost",  # required; the report describes the machine
        tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        errors=str(sum(case.find("error") is not None for case in cases)),
        skipped="0",
        time="0",  # required; gates take no time
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
    # The name excludes the limit, because CI systems track a test's history by name.
    side = "max" if gate.min is None else "min"
    case = _element("testcase", name=f"{gate.metric} {side} ({gate.bound})", classname=_SUITE, time="0")
    if invalid is not None:
        case.append(_element("error", _line(gate), type="invalid environment", message=invalid))
    elif gate.outcome != "pass":
        case.append(_element("failure", _line(gate), type=gate.outcome, message=gate.reason))
    return case


def _line(gate: GateResult) -> str:
    """All figures in full precision."""
    seen = gate.model_dump(mode="json", exclude_none=True)
    return ", ".join(f"{name}: {value}" for name, value in seen.items())


def _element(tag: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
    element = ElementTree.Element(tag, {name: _legal(value) for name, value in attributes.items()})
    element.text = None if text is None else _legal(text)
    return element


def _legal(text: str) -> str:
    return _ILLEGAL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
