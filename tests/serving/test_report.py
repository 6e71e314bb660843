"""The report: its schema refuses lies and NaN, reading survives hostile files, its page has the main figures first."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from numprune.errors import InputError, IntegrityError
from numprune.serving import report as reports
from numprune.serving.report import LossDelta, Report, SizePair, Verdict
from tests.serving.pages import REFINED, REFINED_BY, few_documents, full, generation

SMI = "NVIDIA H100, GPU-1234, 570.1, 81559, {clock}, 1980, 700.00, 40, {mask}"


def test_a_report_survives_writing_and_reading(tmp_path: Path, report_json: Any) -> None:
    report = Report.model_validate(report_json)
    reports.write(report, tmp_path / "report.json")
    assert reports.read(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["schema"] == "numprune/report/2"
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), 10**400])
def test_non_finite_numbers_become_null(tmp_path: Path, report_json: Any, put: Any, value: Any) -> None:
    for path in ("quality.kl_nats_per_token", "quality.loss_delta.ci95_upper"):
        put(report_json, path, value)
    report_json["parity"]["onnxruntime"] = {"maximum_error": value, "nested": [{"worst": value}]}
    reports.write(Report.model_validate(report_json), tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["quality"]["kl_nats_per_token"] is None
    assert data["quality"]["loss_delta"]["ci95_upper"] is None
    assert data["parity"]["onnxruntime"] == {"maximum_error": None, "nested": [{"worst": None}]}


@pytest.mark.parametrize("value", [True, "0.02", [0.02]])
def test_what_is_not_a_number_is_refused(report_json: Any, put: Any, value: Any) -> None:
    with pytest.raises(ValidationError, match="kl_nats_per_token"):
        Report.model_validate(put(report_json, "quality.kl_nats_per_token", value))


def test_unknown_fields_are_refused(report_json: Any, put: Any) -> None:
    with pytest.raises(ValidationError, match=r"quality\.perplexitty"):
        Report.model_validate(put(report_json, "quality.perplexitty", 1.0))


def test_numpy_numbers_are_accepted(report_json: Any, put: Any) -> None:
    put(report_json, "quality.kl_nats_per_token", np.float32(0.5))
    put(report_json, "sizes.weight_bytes.baseline", np.int64(4000))
    data = json.loads(json.dumps(Report.model_validate(report_json).to_json()))
    assert data["quality"]["kl_nats_per_token"] == 0.5
    assert data["sizes"]["weight_bytes"]["baseline"] == 4000


@pytest.mark.parametrize(
    "change",
    [
        {"ci95_upper": 0.02},  # below the lower bound
        {"interval95": [0.045, 0.2]},  # narrower than the one-sided bounds
        {"samples": -1},
        {"samples": True},
        {"sampling_unit": "token"},
    ],
)
def test_a_contradictory_estimate_is_refused(report_json: Any, change: dict[str, Any]) -> None:
    good = report_json["quality"]["loss_delta"]
    LossDelta.model_validate(good)
    with pytest.raises(ValidationError):
        LossDelta.model_validate({**good, **change})


def _document(delta: float) -> dict[str, Any]:
    return {"name": "d", "tokens": 1, "loss_delta": delta}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("quality.document_deltas.values", [0.0] * 39),  # of 40 documents
        ("quality.document_deltas.values", [1.0, *[0.0] * 39]),
        ("quality.document_deltas.worst", [_document(0.1), _document(0.2)]),
        ("quality.documents", 500),
        ("speed.onnxruntime.baseline.by_repeat.ttft", [1.0] * 9),  # of 10 repeats
        ("speed.onnxruntime.repeats", 8),
    ],
)
def test_per_document_figures_cover_all_documents(report_json: Any, put: Any, path: str, value: Any) -> None:
    Report.model_validate(report_json)
    with pytest.raises(ValidationError, match=r"document|by_repeat"):
        Report.model_validate(put(report_json, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("prompts", 4),
        ("degraded", 0),
        ("degraded_share", 0.0),
        ("degraded_share", None),
        ("candidate.empty", 0),
        ("candidate.repeating_share", 0.0),
        ("baseline.repeating", 0),
        ("outputs", []),
    ],
)
def test_generation_counts_must_match_the_outputs(report_json: Any, put: Any, path: str, value: Any) -> None:
    Report.model_validate(put(report_json, "quality.generation", generation()))
    with pytest.raises(ValidationError, match=r"generation counts|at least 1 item"):
        Report.model_validate(put(report_json, f"quality.generation.{path}", value))


def test_named_corpora_have_figures_of_their_own_and_a_first_one(report_json: Any) -> None:
    first = report_json["quality"]
    other = {key: value for key, value in first.items() if key != "generation"}
    whole = {**report_json, "quality": {**first, "corpus": "prose", "corpora": {"code": other}}}
    text = reports.markdown(Report.model_validate(whole))
    assert "Other held-out text, beside prose above:" in text
    assert "| code | " in text
    for quality in (
        {**first, "corpora": {"code": other}},
        {**first, "corpus": "code", "corpora": {"code": other}},
        {**first, "corpus": "prose", "corpora": {"code": {**other, "corpus": "x"}}},
        {**first, "corpus": "prose", "corpora": {"a.b": other}},
    ):
        with pytest.raises(ValidationError, match="corpor"):
            Report.model_validate({**report_json, "quality": quality})


def test_a_ratio_follows_from_its_sizes() -> None:
    assert SizePair(baseline=4, candidate=3).ratio == 0.75
    assert SizePair(baseline=0, candidate=3).ratio is None
    assert SizePair(baseline=None, candidate=3).ratio is None
    with pytest.raises(ValidationError, match="candidate / baseline"):
        SizePair(baseline=4, candidate=3, ratio=0.5)


def test_a_verdict_follows_from_its_gates(report_json: Any) -> None:
    gate = {"metric": "sizes.parameters.ratio", "bound": "point", "max": 0.8, "reason": "", "outcome": "fail"}
    with pytest.raises(ValidationError, match="does not follow"):
        Verdict.model_validate({"outcome": "pass", "gates": [gate]})
    with pytest.raises(ValidationError):
        Verdict.model_validate({"outcome": "pass", "gates": []})
    invalid = Verdict.model_validate({"outcome": "invalid environment", "gates": [gate]})
    with pytest.raises(ValidationError, match="contradicts"):  # the environment is valid
        Report.model_validate(report_json).judged(invalid)


def test_an_environment_is_valid_only_without_reasons(report_json: Any) -> None:
    with pytest.raises(ValidationError, match="reason"):
        Report.model_validate(
            {**report_json, "environment": {**report_json["environment"], "reasons": ["the GPU is hot"]}}
        )


# --- reading ---------------------------------------------------------------------------------------


def test_reading_reports_unsupported_versions(tmp_path: Path, report_json: Any) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**report_json, "schema": "numprune/report/3"}))
    said = r"schema: 'numprune/report/3'; this version reads 'numprune/report/2' and 'numprune/report/1'"
    with pytest.raises(IntegrityError, match=said):
        reports.read(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"schema": "numprune/report/2", "schema": "numprune/report/2"}',
        '{"schema": "numprune/report/1", "created": NaN}',
        '{"schema": "numprune/report/1"}',
        '{"schema": "numprune/report/2"}',
        '{"schema": "numprune/report/1", "run_id": ' + "9" * 5000 + "}",
        "\udcff",
    ],
)
def test_any_invalid_file_gives_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(IntegrityError, match=r"report\.json"):
        reports.read(path)


def test_reading_reports_every_problem(tmp_path: Path, report_json: Any, put: Any) -> None:
    put(report_json, "quality.tokens", "many")
    put(report_json, "identity.base", "0x12")
    (tmp_path / "report.json").write_text(json.dumps(report_json))
    with pytest.raises(IntegrityError, match=r"identity\.base: .*quality\.tokens: .*\(given: 'many'\)"):
        reports.read(tmp_path / "report.json")


def test_a_file_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "report.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(IntegrityError, match="exceeds the"):
        reports.read(tmp_path / "report.json")


def test_a_missing_report_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such report"):
        reports.read(tmp_path / "report.json")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_facts_are_always_json(value: Any) -> None:
    verdictless = {**_MINIMAL, "parity": {"torch": {"facts": value}}}
    json.dumps(Report.model_validate(verdictless).to_json(), allow_nan=False)


_MINIMAL = {
    "created": "2026-11-20T12:00:00Z",
    "run_id": "r",
    "identity": {"base": "a" * 64, "candidate": "b" * 64},
    "environment": {"cpu": "A CPU", "cores": 2, "memory_bytes": 1, "platform": "Linux", "valid": True},
}


# --- the page --------------------------------------------------------------------------------------


def test_the_markdown_starts_with_the_verdict_and_ends_with_identity(report_json: Any) -> None:
    gate = {"metric": "sizes.parameters.ratio", "bound": "point", "max": 0.7, "value": 0.75}
    verdict = {"outcome": "fail", "gates": [{**gate, "outcome": "fail", "reason": "beyond the limit"}]}
    page = reports.markdown(Report.model_validate({**report_json, "verdict": verdict}))
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings[0] == "# 2026-11-20-quiet-owl: fail"
    assert [heading.strip("# ").split(",")[0].split(" ")[0] for heading in headings[1:]] == [
        "Pruning", "Sizes", "Quality", "Speed", "Memory", "Parity", "onnxruntime", "Machine", "Identity",
    ]  # fmt: skip
    assert "| sizes.parameters.ratio | 0.75 | ≤ 0.7 | fail | beyond the limit |" in page
    assert "0 of 1 gates pass; not sizes.parameters.ratio." in page
    assert "| perplexity | 20.09 | 21.12 | ratio 1.051 [1.039, 1.063] (n = 40) |" in page
    assert "| decode, tokens/s | 100 | 125 | 1.2 [1.14, 1.26] (n = 10): faster | ± 0.03 |" in page


def test_the_markdown_of_a_minimal_report() -> None:
    page = reports.markdown(Report.model_validate(_MINIMAL))
    assert page.startswith("# r: not judged yet")
    assert "Quality" not in page
    assert "a" * 64 in page


def test_report_text_cannot_break_the_markdown(report_json: Any) -> None:
    hostile = "x | y\n# Passed\n<script>alert(1)</script> [a](javascript:b) `c`"
    report_json["run_id"] = hostile
    report_json["parity"]["onnxruntime"] = {hostile: hostile}
    report_json["environment"]["cpu"] = hostile
    page = reports.markdown(Report.model_validate(report_json))
    assert "<script>" not in page
    assert "](" not in page
    assert not any(line.startswith("# Passed") for line in page.splitlines())
    tables = [line for line in page.splitlines() if line.startswith("| ") and "alert" in line]
    assert tables
    assert all(line.replace("\\|", "").count("|") == 3 for line in tables)


def test_the_markdown_groups_layers_of_equal_sizes(report_json: Any) -> None:
    kept = {f"layers.{layer}.{kind}": [2, 3] for layer in range(30) for kind in ("attention", "mlp")}
    kept |= {f"layers.{layer}.attention.query_heads": [4 if layer < 9 else 2, 9] for layer in range(30)}
    report_json["pruning"]["kept_units"] = {**kept, "layers.7.mlp": [0, 3], "embedding": [1, 2]}
    lines = reports.markdown(Report.model_validate(report_json)).splitlines()
    assert [line for line in lines if "kept:" in line] == [
        "- KV groups kept: layers 0 to 29: 2 of 3",
        "- Query heads kept: layers 0 to 8: 4 of 9; layers 9 to 29: 2 of 9",
        "- MLP channels kept: layers 0 to 6: 2 of 3; layer 7: 0 of 3; layers 8 to 29: 2 of 3",
        "- embedding kept: 1 of 2",
    ]


def test_the_markdown_names_dropped_layers(report_json: Any) -> None:
    kept = {f"layers.{layer}.{kind}": [2, 3] for layer in range(4) for kind in ("attention", "mlp")}
    gone = {f"layers.2.{kind}": [0, 3] for kind in ("attention", "mlp")}
    report_json["pruning"] |= {"kept_units": kept | gone, "dropped_layers": [2]}
    lines = reports.markdown(Report.model_validate(report_json)).splitlines()
    assert [line for line in lines if "kept:" in line or "dropped" in line] == [
        "- Layers dropped: 2",
        "- KV groups kept: layers 0 to 1: 2 of 3; layer 3: 2 of 3",
        "- MLP channels kept: layers 0 to 1: 2 of 3; layer 3: 2 of 3",
    ]


def test_a_ratio_of_another_cost_is_named(report_json: Any) -> None:
    report_json["pruning"] |= {"ratio_counts": "kv-bytes"}
    told = reports.markdown(Report.model_validate(report_json))
    assert "of the KV-cache bytes; removed" in told
    assert "of the prunable parameters and" in told


def test_the_markdown_names_the_new_hidden_size(report_json: Any) -> None:
    report_json["pruning"] |= {"hidden_size": [1792, 2048]}
    assert "- Hidden size: 2,048 → 1,792" in reports.markdown(Report.model_validate(report_json)).splitlines()


def test_the_markdown_names_the_layers_with_a_window(report_json: Any) -> None:
    report_json["pruning"] |= {"window": 1024, "windowed_layers": [5, 3]}
    lines = reports.markdown(Report.model_validate(report_json)).splitlines()
    assert "- Attention window: 1,024 tokens in layers 3, 5" in lines


def test_the_markdown_says_how_sizes_were_refined(report_json: Any) -> None:
    report_json["pruning"] |= {"refinement": REFINED}
    lines = reports.markdown(Report.model_validate(report_json)).splitlines()
    assert f"- Sizes refined by {REFINED_BY}" in lines


def test_the_markdown_shows_generations_and_precision() -> None:
    page = reports.markdown(Report.model_validate(full()))
    assert "1 degraded: the candidate's output is empty or repeating" in page
    assert "| repeating | 1 | 1 |" in page
    assert "| Prompt 0 | Paris. | Paris, I think. |" in page
    assert "| Prompt 1 | The sea is blue. | (empty) |" in page
    assert (
        page.count("onnxruntime computes in float32, while the weights are stored in bfloat16") == 1
    )  # of vllm nothing is known


@pytest.mark.parametrize(("documents", "told"), [(1, "1 held-out document; "), (3, "3 held-out documents; ")])
def test_the_markdown_says_when_intervals_are_over_windows(report_json: Any, documents: int, told: str) -> None:
    few_documents(report_json, documents)
    page = reports.markdown(Report.model_validate(report_json))
    assert told in page
    assert "over 40 windows: there are too few documents to resample, so they hold for this text only." in page


# --- the machine -----------------------------------------------------------------------------------


def _install_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, devices: str, processes: str) -> None:
    """A program that answers as nvidia-smi does (its manual, CSV without header and units)."""
    script = folder / "nvidia-smi"
    script.write_text(
        f"#!/bin/sh\ncase $1 in\n--query-gpu=*) printf '{devices}' ;;\n"
        f"--query-compute-apps=*) printf '{processes}' ;;\nesac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_this_machine_is_described() -> None:
    environment = reports.capture()
    assert environment.valid
    assert environment.gpu is None
    assert environment.cores >= 1
    assert environment.memory_bytes > 1 << 28
    assert environment.cpu
    assert reports.package_versions()["torch"].startswith("2.13")
    assert "surely-not-installed" not in reports.package_versions(["surely-not-installed"])


def test_a_healthy_gpu_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install_smi(tmp_path, monkeypatch, SMI.format(clock=1980, mask="0x0000000000000005"), f"{os.getpid()}\\n")
    environment = reports.capture(uses_gpu=True)
    assert environment.valid, environment.reasons
    assert environment.gpu is not None
    assert environment.gpu.memory_bytes == 81559 << 20
    assert environment.gpu.sm_clock_mhz == 1980
    assert environment.gpu.processes == ()


@pytest.mark.parametrize(
    ("mask", "processes", "reason"),
    [
        ("0x0000000000000060", "", "software thermal slowdown"),
        ("0x0000000000000001", "1\\n", "is used by another process, too: 1"),
        ("[N/A]", "", "cannot be read"),
    ],
)
def test_a_throttled_shared_or_unreadable_gpu_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str, processes: str, reason: str
) -> None:
    _install_smi(tmp_path, monkeypatch, SMI.format(clock="[N/A]", mask=mask), processes)
    environment = reports.capture(uses_gpu=True)
    assert not environment.valid
    assert any(reason in given for given in environment.reasons)


def test_a_missing_gpu_that_was_used_is_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = reports.capture(uses_gpu=True)
    assert environment.reasons == ("the GPU's state cannot be read: nvidia-smi is not on the PATH",)


def test_pooled_environments_keep_the_reasons_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = reports.capture()
    monkeypatch.setenv("PATH", str(tmp_path))
    after = reports.capture(uses_gpu=True)
    assert reports.combine(before, before).valid
    assert reports.combine(before, after).reasons == after.reasons
    assert not reports.combine(after, before).valid
