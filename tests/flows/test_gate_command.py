"""numprune gate: exit codes, JUnit XML and Markdown, through the real command line."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from numprune.serving import gates
from numprune.serving.report import Report, read, write
from tests.serving.conftest import COMPLETE

Json = dict[str, Any]
RULE = '[[gates]]\nmetric = "{}"\nbound = "{}"\n{}\n'
NLL = "quality.loss_delta"
PASS = RULE.format(NLL, "ci95_upper", "max = 0.1")


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., Path]:
    """`report(environment={…})` writes a report with other fields."""

    def make(**fields: Any) -> Path:
        path = tmp_path / "report of a run é.json"
        write(Report.model_validate(COMPLETE | fields), path)
        return path

    return make


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], Path]:
    def make(text: str) -> Path:
        path = tmp_path / "policy.toml"
        path.write_text(text)
        return path

    return make


def shell(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    command = [sys.executable, "-m", "numprune.flows.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def cases_of(path: Path) -> dict[str, str]:
    """Name of each test case and how it ended."""
    cases = ElementTree.parse(path).getroot().iter("testcase")
    return {
        case.attrib["name"]: "pass" if len(case) == 0 else f"{case[0].tag} {case[0].attrib['type']}" for case in cases
    }


INVALID = {**COMPLETE["environment"], "valid": False, "reasons": ["the fan is off"]}


@pytest.mark.parametrize(
    ("limit", "environment", "code", "outcome", "test"),
    [
        (0.1, COMPLETE["environment"], 0, "pass", "pass"),
        (0.01, COMPLETE["environment"], 2, "fail", "failure fail"),
        (0.055, COMPLETE["environment"], 3, "inconclusive", "failure inconclusive"),
        (0.1, INVALID, 4, "invalid environment", "error invalid environment"),
    ],
)
def test_exit_code_junit_and_markdown_say_the_same(
    numprune: Any,
    report: Any,
    policy: Any,
    tmp_path: Path,
    limit: float,
    environment: Json,
    code: int,
    outcome: str,
    test: str,
) -> None:
    junit, page = tmp_path / "gates ü.xml", tmp_path / "summary.md"
    judged = numprune(
        "gate",
        report(environment=environment),
        "--policy",
        policy(RULE.format(NLL, "ci95_upper", f"max = {limit}")),
        "--json",
        "--junit",
        junit,
        "--markdown",
        page,
    )
    assert (judged.code, judged.json["outcome"]) == (code, outcome)
    assert cases_of(junit) == {f"{NLL} max (ci95_upper)": test}
    text = page.read_text()
    assert text.startswith(f"# 2026-11-20-quiet-owl: {outcome}\n")
    assert f"| {NLL} | 0.05 [0.04, 0.06] | ci95_upper ≤ {limit:g} |" in text.replace("\\_", "_")


def test_the_real_command_in_a_ci_step(
    report: Any, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GitHub: commands of the step append to its summary, and it stops at an exit code other than 0."""
    summary, junit = tmp_path / "step_summary_1", tmp_path / "gates.xml"
    summary.write_text("Tests: 12 passed.\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    rules = policy(PASS + RULE.format("sizes.parameters.ratio", "point", "max = 0.1"))
    done = shell("gate", report(), "--policy", rules, "--junit", junit, "--markdown", summary)
    assert done.returncode == 2, done.stderr
    assert "fail          sizes.parameters.ratio" in done.stdout
    written = summary.read_text()
    assert written.startswith("Tests: 12 passed.\n\n\n# 2026-11-20-quiet-owl: fail\n")
    assert "1 of 2 gates pass; not sizes.parameters.ratio." in written
    assert shell("gate", tmp_path / "gone.json", "--policy", rules, "--markdown", summary).returncode == 1
    assert summary.read_text().startswith(f"{written}\n\n# Not judged\n")
    assert list(cases_of(junit).values()) == ["pass", "failure fail"]
    assert not list(tmp_path.glob(".*"))


def test_an_error_replaces_what_an_earlier_run_left(numprune: Any, report: Any, policy: Any, tmp_path: Path) -> None:
    junit, page = tmp_path / "gates.xml", tmp_path / "summary.md"
    outputs = ("--junit", junit, "--markdown", page)
    assert numprune("gate", report(), "--policy", policy(PASS), *outputs).code == 0
    refused = numprune("gate", tmp_path / "gone.json", "--policy", policy(PASS), *outputs)
    assert refused.code == 1
    assert cases_of(junit) == {"report": "error error"}
    assert page.read_text().startswith("# Not judged\n")
    assert "gone.json: no such report" in page.read_text().replace("\\_", "_")


@pytest.mark.parametrize("option", ["--junit", "--markdown"])
def test_unwritable_outputs_are_refused(numprune: Any, report: Any, policy: Any, tmp_path: Path, option: str) -> None:
    measured, rules = report(), policy(PASS)
    for target, why in [
        (tmp_path / "no such folder" / "out", "cannot be written: No such file or directory"),
        (tmp_path, "is not a file"),
        (Path("/dev/null"), "is not a file"),
        (measured, "is the report, which it would replace"),
        (rules, "is the policy, which it would replace"),
    ]:
        before = measured.read_bytes(), rules.read_bytes()
        refused = numprune("gate", measured, "--policy", rules, option, target)
        assert refused.code == 1
        assert f"{option} {target}: " in refused.err
        assert why in refused.err
        assert (measured.read_bytes(), rules.read_bytes()) == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    same = numprune("gate", measured, "--policy", rules, "--junit", tmp_path / "x", "--markdown", tmp_path / "x")
    assert same.code == 1
    assert "--markdown" in same.err


def test_an_output_that_is_a_link_stays_a_link(numprune: Any, report: Any, policy: Any, tmp_path: Path) -> None:
    (tmp_path / "real.xml").write_text("old")
    (tmp_path / "link.xml").symlink_to("real.xml")
    assert numprune("gate", report(), "--policy", policy(PASS), "--junit", tmp_path / "link.xml").code == 0
    assert (tmp_path / "link.xml").is_symlink()
    assert list(cases_of(tmp_path / "real.xml").values()) == ["pass"]


# --- a report that was altered after its verdict ----------------------------------------------------


@pytest.mark.parametrize(
    "alter",
    [
        lambda data: data["quality"]["loss_delta"].update(value=0.049),  # the outcome stays
        lambda data: data["quality"].update(tokens=5001),
        lambda data: data["identity"].update(candidate="f" * 64),
        lambda data: data["speed"]["onnxruntime"].update(failed_requests=1),
        lambda data: data["environment"].update(cpu="Another CPU"),
        lambda data: data["verdict"]["gates"][0].update(outcome="fail"),
        lambda data: data["verdict"].update(judged="0" * 64),
    ],
)
def test_a_report_altered_after_its_verdict_is_refused(
    numprune: Any, report: Any, policy: Any, alter: Callable[[Json], None]
) -> None:
    path, rules = report(), policy(PASS)
    unjudged = read(path)
    write(unjudged.judged(gates.judge(unjudged, gates.read_policy(rules))), path)
    assert numprune("gate", path, "--policy", rules).code == 0
    data = json.loads(path.read_text())
    alter(data)
    path.write_text(json.dumps(data))
    refused = numprune("gate", path, "--policy", rules)
    assert refused.code == 1
    assert "altered after its verdict" in refused.err or "does not follow from the gates" in refused.err


def test_a_verdict_that_contradicts_its_measurements_is_refused(numprune: Any, report: Any, policy: Any) -> None:
    path, rules = report(), policy(RULE.format(NLL, "ci95_upper", "max = 0.01"))
    unjudged = read(path)
    data = unjudged.judged(gates.judge(unjudged, gates.read_policy(rules))).to_json()
    data["verdict"]["outcome"] = data["verdict"]["gates"][0]["outcome"] = "pass"  # consistently, and the digest kept
    path.write_text(json.dumps(data))
    refused = numprune("gate", path, "--policy", rules)
    assert refused.code == 1
    assert f"its verdict says pass for {NLL}, but its measurements give fail" in refused.err


# --- what a policy may ask, and what a report may lack ----------------------------------------------

DECODE = "speed.onnxruntime.decode_tokens_per_s.ratio"


def _speed(**fields: Any) -> Json:
    return {"speed": {"onnxruntime": COMPLETE["speed"]["onnxruntime"] | fields}}


def _nll(**fields: Any) -> Json:
    delta = COMPLETE["quality"]["loss_delta"] | fields
    return {"quality": COMPLETE["quality"] | {"loss_delta": delta}}


@pytest.mark.parametrize(
    ("fields", "rule", "code", "why"),
    [
        ({}, ("quality.loss_delte", "ci95_upper", "max = 9.0"), 2, f"did you mean {NLL}"),
        ({}, ("speed.vllm.ttft.ratio", "ci95_upper", "max = 9.0"), 2, "the report has no speed.vllm.ttft.ratio"),
        ({"quality": None}, (NLL, "ci95_upper", "max = 9.0"), 2, f"the report has no {NLL}"),
        (_nll(value=None), (NLL, "ci95_upper", "max = 9.0"), 2, "was not measured (null, NaN or infinite)"),
        (_nll(ci95_upper=None), (NLL, "ci95_upper", "max = 9.0"), 2, "a bound of"),
        (_nll(samples=0), (NLL, "ci95_upper", "max = 9.0"), 2, "has no samples"),
        (_nll(samples=1), (NLL, "ci95_upper", "max = 9.0"), 2, "only one sample, so no interval"),
        (_speed(noise_floor={}), (DECODE, "ci95_lower", "min = 0.5"), 2, "noise_floor.decode_tokens_per_s was not"),
        (_speed(failed_requests=3), (DECODE, "ci95_lower", "min = 0.5"), 2, "failed_requests is 3"),
        (
            _speed(noise_floor={"decode_tokens_per_s": {"relative": 0.3, "neighbours": 4}}),
            (DECODE, "ci95_lower", "min = 1.05"),  # the lower bound is 1.15
            3,
            "the limit 1.05 is tighter than the noise floor 1 ± 0.3",
        ),
    ],
)
def test_missing_measurements_do_not_pass(
    numprune: Any,
    report: Any,
    policy: Any,
    tmp_path: Path,
    fields: Json,
    rule: tuple[str, str, str],
    code: int,
    why: str,
) -> None:
    junit = tmp_path / "gates.xml"
    judged = numprune("gate", report(**fields), "--policy", policy(RULE.format(*rule)), "--json", "--junit", junit)
    assert judged.code == code
    assert why in judged.json["gates"][0]["reason"]
    assert set(cases_of(junit).values()) == {"failure fail" if code == 2 else "failure inconclusive"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_invalid_numbers_are_refused_or_fail(numprune: Any, report: Any, policy: Any, number: str) -> None:
    path = report()
    text = json.dumps(json.loads(path.read_text()))
    path.write_text(text.replace('"loss_delta": {"value": 0.05', f'"loss_delta": {{"value": {number}'))
    assert number in path.read_text()
    judged = numprune("gate", path, "--policy", policy(PASS))
    assert judged.code in (1, 2)
    assert "is not JSON" in judged.err or "was not measured" in judged.out
