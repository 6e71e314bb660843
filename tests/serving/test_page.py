"""The text of a report's page, whatever the report contains and wherever it comes from."""

import base64
import hashlib
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.serving.report import Report, words
from numprune.serving.report.page import charts, comparison, differences, html
from numprune.serving.report.page.charts import Interval, Limit, Samples
from tests.serving.pages import POLICY, REFINED, REFINED_BY, Parsed, altered, few_documents, full, generation, judged

HOSTILE = (
    "<script>alert(1)</script>\"onload='alert(2)'<img src=x onerror=alert(3)> $\\frac{1} {{ 7 * 7 }} \x00\u202e\ud800"
)

MINIMAL = {
    "created": "2026-11-20T12:00:00Z",
    "run_id": "r",
    "identity": {"base": "a" * 64, "candidate": "b" * 64},
    "environment": {"cpu": "A CPU", "cores": 2, "memory_bytes": 1, "platform": "Linux", "valid": True},
}


@pytest.fixture(scope="module")
def page() -> str:
    return html(judged(full()))


def sections(page: str) -> list[str]:
    return [str(attributes["id"]) for attributes in Parsed(page).named("section")]


def test_the_verdict_comes_first_and_identity_last(page: str) -> None:
    everything = ["quality", "speed", "memory", "units", "parity", "gates", "served", "origin"]
    assert sections(page) == everything
    assert page.index("</h1>") < page.index("perplexity +5.1 %: within your limits.") < page.index('id="quality"')
    headings = [int(tag[1]) for tag, _ in Parsed(page).elements if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))


def test_each_gate_is_one_line_of_the_verdict_and_a_picture_with_its_limit(page: str) -> None:
    assert "pass NLL difference, nats/token: upper bound 0.0600, limit ≤ 0.25" in Parsed(page).text
    assert "gate-0-title" in page
    assert "upper bound ≤\N{NO-BREAK SPACE}0.25: pass." in page
    assert page.count("limit ≤ 0.25") == 2  # on the gate's interval and on that of the section quality


def test_the_page_loads_nothing_and_allows_only_its_own_style(page: str) -> None:
    style = page[page.index("<style>") + 7 : page.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in Parsed(page).named("meta") if "http-equiv" in meta]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not Parsed(page).named("script", "iframe", "object", "embed", "form")
    for _, attributes in Parsed(page).elements:
        assert "style" not in attributes  # the policy would forbid it
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert "@import" not in style
    assert "url(" not in style


def test_charts_have_labels_unique_ids_and_page_colours(page: str) -> None:
    found = Parsed(page)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = found.named("svg")
    assert len(pictures) >= 10
    for picture in pictures:
        assert picture["role"] == "img"
        assert picture["aria-labelledby"] in ids
    assert all(len(title) > 20 for title in re.findall(r"<title id=[^>]*>([^<]*)</title>", page))
    referred = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", page)) - set(sections(page))
    assert referred <= set(ids)
    outside_style = page[page.index("</style>") :]
    assert not re.findall(r'"#[0-9a-f]{3,8}"', outside_style)  # every colour is a variable, so that it can be dark


def test_every_chart_has_a_table(page: str) -> None:
    text = Parsed(page).text
    for figure in ("0.0380 to 0.0620", "\N{MULTIPLICATION SIGN}1.20", "noise ± 3.00 %"):  # quality, speed and its noise
        assert figure in text
    assert "skipped, of 704" in text
    assert "KV groups: 18 of 48, from 0 to 3 a layer; skipped in layers 0, 4, 8." in text
    tables = Parsed(page).named("table")
    assert len(Parsed(page).named("caption")) == len(tables) > 8
    assert all(attributes.get("scope") in ("col", "row") for attributes in Parsed(page).named("th"))


def test_dropped_layers_are_named_and_not_counted_as_kept() -> None:
    data = full()
    kept = {f"layers.{layer}.attention": [0 if layer == 1 else 3, 4] for layer in range(4)}
    data["pruning"] |= {"kept_units": kept, "dropped_layers": [1], "hidden_size": [224, 256], "refinement": REFINED}
    data["pruning"] |= {"window": 1024, "windowed_layers": [3, 0], "sequence_budget_asked": "at most 8 MiB of KV cache"}
    text = Parsed(html(judged(data))).text
    assert "KV groups: 3 of 4 in every layer." in text
    assert "dropped, of 4" in text
    assert re.search(r"Layers dropped\s+1", text)
    assert re.search(r"Hidden size\s+256 → 224", text)
    assert re.search(r"Attention window\s+1,024 tokens in layers 0, 3, for at most 8 MiB of KV cache", text)
    assert re.search(rf"Sizes refined by\s+{re.escape(REFINED_BY)}", text)


def test_the_same_report_gives_the_same_page(page: str) -> None:
    assert html(judged(full())) == page


@pytest.mark.parametrize(
    ("policy", "change", "outcome", "why"),
    [
        (
            [{**POLICY[0], "max": 0.01}],
            {},
            "fail",
            "outside your limit on NLL difference, nats/token (upper bound 0.0600, limit ≤ 0.01).",
        ),
        (
            [{**POLICY[0], "max": 0.055}, POLICY[2]],
            {},
            "inconclusive",
            "undecided on NLL difference, nats/token (the interval straddles",
        ),
        (
            POLICY,
            {"valid": False, "reasons": ["the GPU is hot"]},
            "invalid-environment",
            "The machine was not fit for measurements, so there is no verdict: the GPU is hot.",
        ),
    ],
)
def test_the_header_gives_the_reason(policy: Any, change: Any, outcome: str, why: str) -> None:
    data = full()
    data["environment"] |= change
    for heavy in ("speed", "memory", "pruning"):  # not what this is about
        data[heavy] = {} if heavy != "pruning" else None
    found = Parsed(html(judged(data, policy)))
    assert found.named("header")[0]["class"] == f"verdict {outcome}"
    assert why in found.text


def test_missing_measurements_are_mentioned() -> None:
    page = html(Report.model_validate(MINIMAL))
    assert sections(page) == ["quality", "speed", "memory", "units", "parity", "gates", "origin"]
    text = Parsed(page).text
    assert "Not judged yet" in text
    assert text.count("Not measured in this run.") == 3
    assert not Parsed(page).named("svg")


def test_older_reports_without_samples_have_a_page() -> None:
    data = full()
    data["quality"]["document_deltas"] = None
    data["speed"] = {"onnxruntime": data["speed"]["onnxruntime"]}
    for side in ("baseline", "candidate"):
        data["speed"]["onnxruntime"][side]["by_repeat"] = {}
    page = html(Report.model_validate(data))
    assert "has no figures by document" in page
    assert "speed-onnxruntime-ratios-title" in page
    assert "speed-onnxruntime-repeats" not in page


@pytest.mark.slow
@pytest.mark.parametrize("documents", [1, 3])
def test_few_documents_are_not_drawn_as_a_distribution(documents: int) -> None:
    data = full()
    few_documents(data, documents)
    page = html(Report.model_validate(data))
    text = Parsed(page).text
    assert "bootstrap over 40 windows: there are too few documents to resample" in text
    assert "Documents that lost" not in text
    assert "Median document" not in text
    assert "quality-documents-title" not in page  # the histogram
    assert ("text 2" in text) == (documents == 3)


def test_generations_are_shown_side_by_side(page: str) -> None:
    text = Parsed(page).text
    assert "Greedy, from 3 prompts through the chat template, up to 64 tokens each." in text
    assert "Prompt 0 Paris. 64 tokens Paris, I think. 64 tokens" in text
    assert f"Prompt 1 The sea is blue. 64 tokens {words.ABSENT} 64 tokens, empty" in text


def test_the_precision_of_measurements_is_shown_if_known(page: str) -> None:
    text = Parsed(page).text
    said = (
        "onnxruntime computes in float32, while the weights are stored in bfloat16: sizes refer to the stored weights"
    )
    assert text.count(said) == 2  # with speed, and with memory
    assert "Weights stored in bfloat16" in text


def test_windows_that_no_prompt_exceeded_are_reported() -> None:
    data, told = full(), "so attention beyond them was not compared."
    for exceeded in (True, False):
        data["parity"]["vllm"] |= {"window": 4096, "beyond_window": exceeded}
        assert (told in Parsed(html(Report.model_validate(data))).text) is not exceeded


# --- from strangers --------------------------------------------------------------------------------


def hostile() -> Report:
    data = altered(full(), lambda _: HOSTILE, (str,))
    data["identity"]["packages"] = {HOSTILE: HOSTILE}
    data["pruning"]["kept_units"][HOSTILE] = [1, 2]
    data["parity"]["onnxruntime"] = {HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}}
    data["verdict"] = {
        "outcome": "fail",
        "gates": [{"metric": HOSTILE, "bound": "point", "max": 1, "value": 2, "outcome": "fail", "reason": HOSTILE}],
    }
    return Report.model_validate(data)


def test_report_text_is_escaped_on_the_page(page: str) -> None:
    report = hostile()
    for made in (html(report), comparison([(HOSTILE, report), (HOSTILE, judged(full()))])):
        found = Parsed(made)
        known = {tag for tag, _ in Parsed(page).elements} | {"ol", "br", "bdi"}
        assert {tag for tag, _ in found.elements} <= known
        assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
        assert "<script>alert(1)</script>" in found.text  # shown, not run
        assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|49\b", found.text)
        made.encode("utf-8")
        assert not {"\x00", "\u202e"} & set(made)


@pytest.mark.slow
@pytest.mark.parametrize("value", [1e308, -1e308, 5e-324, 0.0, None])
def test_extreme_numbers_do_not_break_the_page(value: Any) -> None:
    assert "</html>" in html(Report.model_validate(altered(full(), lambda _: value, (int, float))))


@pytest.mark.slow
def test_a_huge_report_has_a_page_of_bounded_size() -> None:
    data = full()
    gate = {"metric": "a.b", "bound": "point", "max": 1.0, "outcome": "fail", "reason": "not there"}
    data["verdict"] = {"outcome": "fail", "gates": [gate] * 5_000}
    data["pruning"]["kept_units"] = {f"layers.{layer}.mlp": [1, 2] for layer in range(50_000)}
    data["pruning"]["dropped_layers"] = list(range(50_000))
    data["parity"] = {f"r{index}": {"facts": ["x" * 10_000] * 10} for index in range(100)}
    data["identity"]["packages"] = {f"package-{index}": "1" for index in range(10_000)}
    side: dict[str, Any] = {"by_repeat": {"ttft": [1.0] * 5_000}}
    speed = {"load": {}, "warmup": 0, "order": "AB" * 5_000, "failed_requests": 0, "baseline": side, "candidate": side}
    outputs = [{**generation()["outputs"][0], "prompt": "x" * 100_000} for _ in range(100)]
    none = {"empty": 0, "empty_share": 0, "repeating": 0, "repeating_share": 0}
    counts = {"prompts": 100, "degraded": 0, "degraded_share": 0, "baseline": none, "candidate": none}
    data["quality"]["generation"] |= {**counts, "outputs": outputs}
    data["speed"] = {f"r{index}": {**speed, "repeats": 5_000} for index in range(30)}
    page = html(Report.model_validate(data))
    assert len(page) < 3 << 20
    assert page.count("more gates are in report.json") == 2


FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.floats(-2, 2)


@given(st.one_of(st.none(), FLOATS, st.integers()))
def test_figures_are_never_longer_than_their_column(value: Any) -> None:
    for show in (words.number, words.signed, words.share, words.times, words.change, words.size, words.plain):
        assert 1 <= len(show(value)) <= 24


@given(value=FLOATS, low=st.none() | FLOATS, high=st.none() | FLOATS, floor=st.none() | FLOATS, limit=FLOATS)
@settings(max_examples=25, deadline=None)
def test_an_interval_is_drawn_or_left_out(value: float, low: Any, high: Any, floor: Any, limit: float) -> None:
    drawn = charts.intervals(
        "k", "t", [Interval("row", value, low, high, floor)], reference=1.0, limit=Limit(limit, is_maximum=True)
    )
    if drawn is not None:
        assert "NaN" not in drawn
        assert "inf" not in drawn


@given(values=st.lists(FLOATS, min_size=1, max_size=30))
@settings(max_examples=20, deadline=None)
def test_documents_and_repeats_are_drawn_or_left_out(values: list[float]) -> None:
    for drawn in (
        charts.histogram("k", "t", values, None, "x"),
        charts.strips("k", "t", [Samples("m", values, [None, *values])]),
    ):
        assert drawn is None or "nan" not in drawn.lower()


# --- what is read from figures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "half_width", "floor", "said"),
    [
        ("decode_tokens_per_s", 1.2, 0.05, 0.03, "faster"),
        ("decode_tokens_per_s", 0.8, 0.05, 0.03, "slower"),
        ("ttft", 0.8, 0.05, 0.03, "faster"),
        ("ttft", 1.2, 0.05, 0.03, "slower"),
        ("ttft", 1.02, 0.05, 0.03, "no clear difference"),
        ("ttft", 0.98, 0.01, 0.03, "within the noise"),
        ("ttft", 0.5, 0.1, 1.2, "too noisy to measure"),
    ],
)
def test_a_ratio_in_words(name: str, value: float, half_width: float, floor: float, said: str) -> None:
    from numprune.serving.report.ratios import reading
    from tests.serving.conftest import estimate

    data = full()["speed"]["onnxruntime"]
    data[name] = {"ratio": estimate(value, half_width, samples=10, unit="repeat")}
    data["noise_floor"][name] = {"relative": floor, "neighbours": 5}
    assert reading(name, Report.model_validate({**MINIMAL, "speed": {"torch": data}}).speed["torch"]) == said


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, words.ABSENT),
        (0, "0"),
        (0.07655, "0.0766"),
        (1.3234, "1.32"),
        (20279.9, "20,280"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (4148480, "4,148,480"),
    ],
)
def test_few_digits(value: Any, shown: str) -> None:
    assert words.number(value, 3) == shown


def test_metrics_have_readable_names() -> None:
    assert words.metric("speed.vllm.concurrency.4.ttft.ratio") == "Time to first token, ratio (vllm, 4 at a time)"
    assert words.metric("memory.torch.peak_bytes.ratio") == "Peak memory, ratio (torch)"
    assert words.metric("quality.tokens") == "quality.tokens"


# --- several ---------------------------------------------------------------------------------------


def test_incomparable_reports_are_marked() -> None:
    one, other = full(), full()
    other["identity"] |= {"heldout_rows": "9" * 64, "base": "8" * 64, "packages": {"torch": "2.14.0"}}
    other["environment"]["cpu"] = "Another"
    other["speed"]["onnxruntime"]["load"]["prompts"] = 8
    del other["speed"]["vllm"]  # not measured there, which nobody can take for the same
    reports = [Report.model_validate(data) for data in (one, one, other)]
    named = [name for name, _ in differences(reports)]
    assert named == ["Base weights", "Held-out text", "Machine", "Load of onnxruntime", "Packages"]
    assert differences(reports[:2]) == []
    text = Parsed(comparison([("a.json", reports[0]), ("b.json", reports[1]), ("c.json", reports[2])])).text
    assert "Held-out text (A, B against C): quality was measured on different text and is not comparable." in text
    assert "2.13.0" in text


def test_verdicts_figures_and_intervals_are_shown_side_by_side() -> None:
    data = full()
    data["quality"]["loss_delta"]["value"] += 0.001
    passed, failed = judged(full()), judged(data, [{**POLICY[0], "max": 0.01}])
    page = comparison([("one/report.json", passed), ("two/report.json", failed)])
    found = Parsed(page)
    assert [attributes["class"] for attributes in found.named("li") if "class" in attributes] == ["pass", "fail"]
    assert sections(page) == ["comparable", "figures", "intervals", "gates", "origin"]
    assert "one/report.json" in found.text
    title = re.search(r'<title id="all-quality-0-title">([^<]*)', page)
    assert title is not None
    assert "A 0.0500 (0.0380 to 0.0620); B 0.0510" in title[1]
    assert "No report identifies its held-out text" in found.text
    assert page.count('role="img"') == 6


def test_a_page_compares_two_to_twenty_six_reports() -> None:
    report = Report.model_validate(MINIMAL)
    for count in (1, 27):
        with pytest.raises(ValueError, match=f"{count} reports"):
            comparison([("r", report)] * count)
    assert "26 reports side by side" in comparison([("r", report)] * 26)
