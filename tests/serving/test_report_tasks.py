"""Reports by task, and those of schema 1, which had one task."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from numprune.errors import InputError, IntegrityError
from numprune.serving import gates
from numprune.serving import report as reports
from numprune.serving.gates import Gate, Policy
from numprune.serving.report import UNITS, Report, page
from tests.serving.conftest import estimate
from tests.serving.pages import METRICS, Parsed, encoder, full, judged

SCHEMA_1 = Path(__file__).parent / "data" / "report-1.json"  # as releases from before schema 2 have it
OLD_NAME = "quality.nll_delta_nats_per_token"

LABELS = {
    "embedding": ("Distance from baseline, 1 - cosine", "Spearman correlation of pairwise similarities"),
    "classification": ("KL from baseline, nats/text", "Top-1 agreement"),
    "masked-lm": ("NLL difference, nats/masked token", "KL from baseline, nats/masked token"),
    "image-classification": ("NLL difference, nats/image", "Top-5 accuracy"),
}


def at_most(limit: float, metric: str = "quality.loss_delta", bound: Any = "ci95_upper") -> Policy:
    return Policy(gates=(Gate(metric=metric, bound=bound, max=limit),))


# --- schema 1 -------------------------------------------------------------------------------------


def test_a_schema_1_report_is_read_verified_judged_and_shown(tmp_path: Path) -> None:
    written = json.loads(SCHEMA_1.read_text())
    found = reports.read(SCHEMA_1)
    assert found.quality is not None
    assert found.quality.task == "causal-lm"
    assert found.quality.loss_delta.value == written["quality"]["nll_delta_nats_per_token"]["value"]
    assert found.quality.loss_delta.unit == "nats/token"
    assert found.verdict is not None
    assert found.verdict.gates[0].metric == OLD_NAME
    gates.confirm(found)
    assert "NLL difference, nats/token" in Parsed(page.html(found)).text
    assert f"| {OLD_NAME} | 0.05" in reports.markdown(found)
    reports.write(found, tmp_path / "report.json")
    assert reports.read(tmp_path / "report.json") == found


@pytest.mark.parametrize("metric", [OLD_NAME, "quality.loss_delta"])
@pytest.mark.parametrize(("limit", "outcome"), [(0.1, "pass"), (0.01, "fail")])
@pytest.mark.parametrize("old", [True, False])
def test_a_policy_may_use_either_name(metric: str, limit: float, outcome: str, old: bool) -> None:
    found = reports.read(SCHEMA_1) if old else Report.model_validate(full())
    verdict = gates.judge(found, at_most(limit, metric))
    [gate] = verdict.gates
    assert (gate.metric, gate.outcome, gate.unit) == (metric, outcome, "nats/token")
    assert gate.power is not None


@pytest.mark.parametrize(
    ("part", "value"),
    [("nll_delta_nats_per_token", {"value": 0.049}), ("candidate", {"perplexity": 20.0})],
)
def test_an_altered_schema_1_report_is_refused(tmp_path: Path, part: str, value: dict[str, float]) -> None:
    data = json.loads(SCHEMA_1.read_text())
    data["quality"][part] |= value
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match="altered after its verdict"):
        reports.read(tmp_path / "report.json")


# --- tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", LABELS)
def test_the_loss_of_every_task_is_judged_and_shown_in_its_unit(task: str) -> None:
    report = judged(encoder(task), [{"metric": "quality.loss_delta", "bound": "ci95_upper", "max": 0.03}])
    assert report.verdict is not None
    [gate] = report.verdict.gates
    assert (gate.outcome, gate.unit) == ("pass", UNITS[task])
    shown, text = Parsed(page.html(report)).text, reports.markdown(report)
    for label in LABELS[task]:
        assert label in shown
        assert label in text
    assert "Perplexity" not in shown + text
    assert "alone and in one batch" in shown
    assert "Greedy match" not in shown
    batch = "8 images" if task == "image-classification" else "8 \N{MULTIPLICATION SIGN} 128 tokens"
    assert batch in shown
    assert batch in text


def with_changed(**fields: str | None) -> dict[str, Any]:
    """A report on images; one of them, a single grey pixel, changed its class."""
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
    image = {"name": "cat/7.png", "label": "cat", "baseline": "cat", "candidate": "<b>dog</b>", "png": png, **fields}
    data = encoder("image-classification")
    data["quality"] |= {"accuracy_delta": estimate(-0.02, 0.01, samples=100, unit="item"), "changed": [image]}
    return data


def test_images_that_changed_their_class_are_shown() -> None:
    report = Report.model_validate(with_changed())
    made = page.html(report)
    assert 'src="data:image/png;base64,iVBORw0KGgo' in made
    assert "cat \N{RIGHTWARDS ARROW} &lt;b&gt;dog&lt;/b&gt;" in made
    shown = Parsed(made).text
    for text in ("Images whose class changed", "1 image, those that became wrong first", "label cat", "cat/7.png"):
        assert text in shown
    assert "\N{MINUS SIGN}0.0200" in shown  # the change of accuracy
    assert f"by bootstrap over {report.quality.loss_delta.samples} images." in shown
    for tampered in ('"><script>', "x" * 70_000):
        with pytest.raises(ValidationError, match="png"):
            Report.model_validate(with_changed(png=tampered))


def test_accuracy_is_gated_by_the_interval_of_its_change() -> None:
    report = Report.model_validate(with_changed())
    for minimum, outcome in ((-0.05, "pass"), (-0.025, "inconclusive"), (-0.005, "fail")):
        policy = Policy(gates=(Gate(metric="quality.accuracy_delta", bound="ci95_lower", min=minimum),))
        [gate] = gates.judge(report, policy).gates
        assert gate.outcome == outcome


def test_metrics_of_a_task_are_judged_by_name() -> None:
    report = Report.model_validate(encoder("masked-lm"))
    for name, limit in (("top1_agreement", 0.95), ("nll_nats_per_masked_token.candidate", 2.01)):
        metric = f"quality.metrics.{name}"
        [gate] = gates.judge(report, at_most(limit, metric, "point")).gates
        assert gate.outcome == ("pass" if name == "top1_agreement" else "fail")
        assert gate.value is not None


def test_a_shape_of_an_encoder_is_judged_against_its_noise_floor() -> None:
    data = encoder()
    data["speed"]["onnxruntime"]["shapes"]["8x128"]["noise_floor"]["samples_per_s"]["relative"] = 0.5
    rule = {"bound": "ci95_lower", "min": 1.1}
    names = [f"speed.onnxruntime.{at}samples_per_s.ratio" for at in ("", "shapes.1x128.", "shapes.8x128.")]
    report = judged(data, [{"metric": name, **rule} for name in names])
    assert report.verdict is not None
    assert [gate.outcome for gate in report.verdict.gates] == ["pass", "pass", "inconclusive"]
    assert [gate.noise_floor for gate in report.verdict.gates] == [0.03, 0.03, 0.5]


@pytest.mark.parametrize(
    "metric",
    [OLD_NAME, "quality.perplexity_ratio", "quality.kl_nats_per_token", "quality.generation.degraded_share"],
)
def test_a_gate_on_causal_figures_of_an_encoder_is_a_policy_error(metric: str) -> None:
    report = Report.model_validate(encoder())
    policy = Policy(gates=(*at_most(1.0).gates, *at_most(1.0, metric, "point").gates))
    with pytest.raises(InputError, match=rf"gates\.1\.metric = '{metric}': .*embedding.*quality\.loss_delta"):
        gates.judge(report, policy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"loss_delta": {**encoder()["quality"]["loss_delta"], "unit": "nats/token"}},
            "the loss of embedding must be in",
        ),
        ({"kl_nats_per_token": 0.1}, "only causal-lm has these"),
        ({"task": "regression"}, "task"),
        ({"metrics": {"similarity_spearman": "high"}}, "metrics"),
    ],
)
def test_quality_figures_of_another_task_are_refused(change: dict[str, Any], said: str) -> None:
    data = encoder()
    data["quality"] |= change
    with pytest.raises(ValueError, match=said):
        Report.model_validate(data)


def test_reports_of_different_tasks_are_not_comparable() -> None:
    found = page.differences([Report.model_validate(encoder(task)) for task in ("embedding", "masked-lm")])
    assert ("Task", "their losses are different quantities, so quality is not comparable") in found
    text = Parsed(page.comparison([(task, judged(encoder(task))) for task in METRICS])).text
    assert "Distance from baseline, 1 - cosine" in text
    assert "NLL difference, nats/masked token" in text
