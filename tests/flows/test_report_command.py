"""numprune report: pages from files and folders; anything else is one error, and nothing is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from numprune.corpus import TokenRows
from numprune.export import manifest
from numprune.flows.steps.evaluate import section
from numprune.serving.report import Quality as QualitySection
from numprune.serving.report import Report, write
from numprune.tasks import CAUSAL, Comparison, Quality, task
from tests.flows.conftest import Answered
from tests.serving.pages import POLICY, full, judged

Command = Callable[..., Answered]

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def small() -> Report:
    """Judged, and quickly drawn."""
    data = full()
    return judged({**data, "speed": {"onnxruntime": data["speed"]["onnxruntime"]}})


@pytest.fixture
def stage(tmp_path: Path, small: Report) -> Path:
    with manifest.creating(tmp_path / "report-12", kind="stage") as folder:
        write(small, folder / "report.json")
    return tmp_path / "report-12"


def test_one_report(numprune: Command, stage: Path, tmp_path: Path) -> None:
    answered = numprune("report", stage)
    assert answered.code == 0, answered.err
    assert answered.out.splitlines() == [f"{stage}: pass", "page numprune-report.html"]
    assert "<h1>" in (tmp_path / "numprune-report.html").read_text()
    (tmp_path / "numprune-report.html").write_text("an earlier one")
    found = numprune("report", stage / "report.json", "--json").json
    assert found["page"] == "numprune-report.html"
    assert found["reports"] == [
        {"report": str(stage / "report.json"), "run_id": "2026-11-20-quiet-owl", "outcome": "pass"}
    ]
    assert found["differences"] == []
    assert "an earlier one" not in (tmp_path / "numprune-report.html").read_text()


def test_several_reports_are_compared_and_a_failed_gate_does_not_fail_the_command(
    numprune: Command, stage: Path, tmp_path: Path
) -> None:
    data = full()
    data["identity"]["heldout_rows"] = "9" * 64
    write(judged(data, [{**POLICY[0], "max": 0.01}]), tmp_path / "other ümlaut.json")
    answered = numprune("report", stage, "other ümlaut.json", "--out", "both.html")
    assert answered.code == 0, answered.err
    assert answered.out.splitlines()[1] == "other ümlaut.json: fail"
    assert "  Held-out text: quality was measured on different text and is not comparable" in answered.out
    assert "2 reports side by side" in (tmp_path / "both.html").read_text()
    assert sorted(os.listdir(tmp_path)) == ["both.html", "other ümlaut.json", "report-12"]


def damaged(stage: Path, kind: str) -> str:
    """Damage the stage's report; return the expected message."""
    file = stage / "report.json"
    raw, unwrapped = file.read_bytes(), stage / "manifest.json"
    match kind:
        case "a bit":
            raw = raw.replace(b'"value": 0.05', b'"value": 0.04', 1)
            said = "report.json: its SHA-256 is"
        case "no report":
            unwrapped.unlink()
            raw, said = b"<!doctype html>", "not a report"
        case "another schema":
            unwrapped.unlink()
            raw, said = (
                raw.replace(b"numprune/report/2", b"numprune/report/9"),
                "this version reads 'numprune/report/2'",
            )
        case "truncated":
            unwrapped.unlink()
            raw, said = raw[: len(raw) // 2], "not a report"
        case "a verdict of its own":
            unwrapped.unlink()
            data = json.loads(raw)
            data["verdict"] |= {"judged": None}
            data["quality"]["loss_delta"] |= {"ci95_upper": 9.0, "interval95": [0.038, 9.9]}
            raw, said = json.dumps(data).encode(), "its verdict says pass"
        case "not of this stage":
            with manifest.creating(stage.with_name("empty"), kind="stage"):
                pass
            shutil.copy(stage.with_name("empty") / "manifest.json", unwrapped)
            said = "not listed in the manifest beside it"
    file.write_bytes(raw)
    return said


@pytest.mark.parametrize(
    "kind", ["a bit", "no report", "another schema", "truncated", "a verdict of its own", "not of this stage"]
)
def test_invalid_reports_are_refused(numprune: Command, stage: Path, tmp_path: Path, small: Report, kind: str) -> None:
    write(small, tmp_path / "good.json")
    said = damaged(stage, kind)
    answered = numprune("report", "good.json", stage)
    assert (answered.code, answered.out) == (1, "")
    assert answered.err.count("\n") == 1
    assert said in answered.err
    assert "report-12" in answered.err
    assert not list(tmp_path.glob("*.html"))


def test_an_oversized_report_is_refused(numprune: Command, tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)  # nothing of it is on the disk, and nothing but its beginning is read
    answered = numprune("report", "large.json")
    assert answered.code == 1
    assert "large.json: exceeds the 67,108,864-byte limit" in answered.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such file or folder; reports are in the folders of stages"),
        (["."], ".: this folder has no report.json"),
        (["r.json", "--out", "r.json"], "--out r.json: the page is HTML; give a name ending in .html"),
        (["r.json", "--out", "no/where.html"], "--out no/where.html: there is no folder no"),
        (["r.json", "--out", "folder.html"], "--out folder.html: a folder"),
        (["r.json"] * 27, "27 reports; a page compares at most 26"),
    ],
)
def test_arguments_are_checked_first(
    numprune: Command, tmp_path: Path, small: Report, arguments: list[str], said: str
) -> None:
    write(small, tmp_path / "r.json")
    (tmp_path / "folder.html").mkdir()
    answered = numprune("report", *arguments)
    assert answered.code == 1
    assert said in answered.err


# --- what the page draws ---------------------------------------------------------------------------


def comparison(rows: TokenRows, candidate: Quality, baseline: Quality) -> Comparison:
    metrics = {"kl_nats_per_token": 0.1, "top1_agreement": 0.9}
    return task.compared(CAUSAL, rows, candidate.nll - baseline.nll, metrics, 0, candidate, baseline)


def compared(deltas: list[float], names: list[str], windows: int = 2) -> dict[str, object]:
    """The section of a comparison in which each document has so many windows of ten scored tokens."""
    document = [index for index in range(len(deltas)) for _ in range(windows)]
    rows = TokenRows([torch.zeros(11, dtype=torch.int64)] * len(document), document, names, "0" * 64)
    scored = np.full(len(document), 10)
    baseline = np.full(len(document), 30.0)
    nll = baseline + 10 * np.repeat(deltas, windows)
    made = section(comparison(rows, Quality(nll, scored), Quality(baseline, scored)), rows)
    QualitySection.model_validate(made)
    deltas_section = made["document_deltas"]
    assert isinstance(deltas_section, dict)
    return deltas_section


def test_documents_stay_separate_even_with_equal_names() -> None:
    found = compared([0.3, -0.1, 0.2], ["a.txt", "a.txt", "b.txt"])
    assert found["values"] == pytest.approx([-0.1, 0.2, 0.3])
    assert [(worst["name"], worst["tokens"]) for worst in found["worst"]] == [  # type: ignore[attr-defined]
        ("a.txt", 20),
        ("b.txt", 20),
        ("a.txt", 20),
    ]


def test_documents_stay_separate_in_packed_rows() -> None:
    """The middle row ends "a", holds all of "b", and begins "c"; its first token is not scored."""
    rows = TokenRows([torch.zeros(4)] * 3, [0, 0, 1, 2, 2], ["a", "b", "c"], "0" * 64, [[4], [2, 1, 1], [4]])
    delta = np.array([3.0, 2.0, 5.0, 1.0, 3.0])
    made = section(comparison(rows, Quality(delta, rows.scored), Quality(0 * delta, rows.scored)), rows)
    QualitySection.model_validate(made)
    assert (made["tokens"], made["packed"]) == (9, True)
    assert made["document_deltas"]["values"] == pytest.approx([(1 + 3) / 4, (3 + 2) / 4, 5 / 1])


def test_many_documents_are_summarized_by_quantiles() -> None:
    deltas = np.random.default_rng(0).normal(size=1_001)
    found = compared(deltas.tolist(), [str(index) for index in range(1_001)], windows=1)
    values = found["values"]
    assert isinstance(values, list)
    assert len(values) == 200
    assert (values[0], values[-1]) == pytest.approx((deltas.min(), deltas.max()))
    assert np.median(values) == pytest.approx(np.median(deltas), abs=0.02)
    assert found["worst"][0]["name"] == str(deltas.argmax())  # type: ignore[index]
