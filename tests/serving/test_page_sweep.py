"""The text of a sweep's page."""

from dataclasses import replace

from numprune.serving.report.page.sweep import RULE, html
from tests.serving.pages import AXES, Parsed, swept
from tests.serving.test_page import HOSTILE


def page(rows: list, headline: str = "2 candidates.") -> str:
    return html("tiny", headline, "pass", AXES, rows)


def test_the_page_has_the_rule_every_candidate_and_its_links() -> None:
    rows = swept(12)
    text = page(rows)
    shown = Parsed(text).text
    assert RULE in shown
    for row in rows:
        assert row.label in shown
        assert text.count(f'href="report-{row.number}/report.html"') == (3 if row.link else 0)
    assert "3 (chosen)" in shown
    assert "error: data.samples = 99999: the text has 12 full rows" in " ".join(shown.split())
    assert page(rows) == text
    assert not Parsed(text).named("script", "iframe", "object", "embed", "form")


def test_a_circle_is_explained_if_a_candidate_is_chosen() -> None:
    rows = swept(4)
    legend = "The circle marks the chosen one."
    assert legend in Parsed(page(rows)).text
    assert legend not in Parsed(page([replace(row, chosen=False) for row in rows])).text


def test_before_the_first_candidate_has_ended_there_is_no_chart() -> None:
    rows = [replace(row, point=None, on_front=False, link="", outcome="pending", chosen=False) for row in swept(3)]
    assert "No candidate has all figures yet." in Parsed(page(rows)).text
    assert "<svg" not in page(rows)


def test_settings_and_errors_are_text() -> None:
    rows = [replace(row, label=HOSTILE, note=HOSTILE) for row in swept(3)]
    found = Parsed(page(rows, HOSTILE))
    assert not found.named("script", "img")
    assert not [attributes for _, attributes in found.elements if "onload" in attributes]


def test_figures_that_cannot_be_drawn_are_in_the_table() -> None:
    first, *others = swept(3)
    assert first.point is not None
    endless = replace(first.point.loss, value=1e300, high=1e301)
    text = page([replace(first, point=replace(first.point, loss=endless)), *others])
    assert "<svg" not in text
    assert "+1.00e+300" in Parsed(text).text
