"""The page in a real browser: no requests, no errors, and accessible."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from numprune.serving.report import Report
from numprune.serving.report.page import comparison, html
from numprune.serving.report.page import sweep as sweeps
from tests.serving.pages import AXES, POLICY, encoder, full, judged, swept
from tests.serving.test_page import hostile

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium: make packages"),
    pytest.mark.slow,
]

QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

# WCAG 2.2, 1.4.3: of all text that is shown, the least contrast with what is behind it.
CONTRAST = """
() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a] }
  const light = colour => {
    const [r, g, b] = colour.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor)
      if (colour[3] === 1) return colour
    }
    return [255, 255, 255, 1]
  }
  const found = []
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement
    if (!texts.currentNode.data.trim() || !element.getClientRects().length || element.tagName === 'title') continue
    const style = getComputedStyle(element)
    const [one, other] = [parse(element.ownerSVGElement ? style.fill : style.color), behind(element)].map(light)
    found.push([(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), texts.currentNode.data.trim()])
  }
  return found.sort((a, b) => a[0] - b[0])
}
"""

UNNAMED = """
() => [
  ...[...document.querySelectorAll('svg')].filter(e => !document.getElementById(e.getAttribute('aria-labelledby'))?.textContent),
  ...[...document.querySelectorAll('section, nav, [role=region]')].filter(e => !e.ariaLabel && !e.getAttribute('aria-labelledby')),
  ...[...document.querySelectorAll('table')].filter(e => !e.caption?.textContent),
  ...document.querySelectorAll('img:not([alt])'),
].map(e => e.outerHTML.slice(0, 80))
"""  # noqa: E501 # JavaScript

WIDE = """
() => {
  document.querySelectorAll('details').forEach(details => details.open = true)
  return document.documentElement.scrollWidth
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    passed, failed = (
        judged(full()),
        judged(full(), [{**POLICY[0], "max": 0.01}, {**POLICY[0], "max": 0.055}, POLICY[2]]),
    )
    invalid = full()
    invalid["environment"] |= {"valid": False, "reasons": ["the GPU is hot"]}
    stranger = hostile()
    made = {
        "report": html(failed),
        "hostile": html(stranger),
        "encoder": html(judged(encoder(), [{**POLICY[0], "max": 0.03}])),
        "comparison": comparison([("a", passed), ("b", failed), ("c", judged(invalid)), ("<b>d", stranger)]),
        "sweep": sweeps.html("tiny", "12 candidates, 5 on the front.", "pass", AXES, swept(12)),
        "bare": html(Report.model_validate({**full(), "speed": {}, "memory": {}, "quality": None, "pruning": None})),
    }
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    (folder / "report-7").mkdir()  # to which the sweep's page leads
    shutil.copy(folder / "report.html", folder / "report-7")
    return {name: folder / f"{name}.html" for name in made}


class Visit:
    """One page, opened; `requests` but for itself, and what the browser complained of."""

    def __init__(self, browser: Any, page: Path, **context: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.tab = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context}).new_page()
        self.refused: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("requestfailed", lambda request: self.refused.append(f"{request.failure}: {request.url}"))
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.tab.goto(page.as_uri())
        self.requests = [url for url in self.requests if url != page.as_uri() and not url.startswith("data:")]


@pytest.mark.parametrize("name", ["report", "hostile", "comparison", "bare", "encoder", "sweep"])
def test_the_page_makes_no_request_and_logs_no_browser_error(browser: Any, pages: dict[str, Path], name: str) -> None:
    visit = Visit(browser, pages[name])
    assert visit.requests == []
    assert visit.complaints == []
    assert visit.tab.evaluate("document.querySelectorAll('script, iframe, img').length") == 0
    assert visit.tab.evaluate("performance.getEntriesByType('resource').length") == 0
    assert visit.tab.evaluate(UNNAMED) == []


def test_an_encoder_page_starts_with_its_loss_and_has_every_shape(browser: Any, pages: dict[str, Path]) -> None:
    tab = Visit(browser, pages["encoder"]).tab
    first = tab.get_by_role("list", name="Gates").get_by_role("listitem").first.inner_text()
    assert first.endswith("pass Distance from baseline, 1 - cosine: upper bound 0.0240, limit ≤\N{NO-BREAK SPACE}0.03")
    table = tab.get_by_role("table", name="A forward pass, onnxruntime")
    shapes = [f"{size} \N{MULTIPLICATION SIGN} 128 tokens" for size in (1, 8)]
    assert table.get_by_role("rowheader").all_inner_texts() == shapes
    assert not tab.locator("summary").get_by_text("Every repeat").first.is_visible()
    tab.get_by_text(f"onnxruntime, {shapes[1]}").first.click()
    assert tab.locator("summary").get_by_text(f"Every repeat, onnxruntime, {shapes[1]}").first.is_visible()


def test_the_content_security_policy_blocks_injected_markup(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    """Were escaping to fail, nothing would run or load."""
    foreign = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x'><style>h1{display:none}</style>"
    spoiled = pages["bare"].read_text().replace("</h1>", f"</h1>{foreign}")
    (tmp_path / "spoiled.html").write_text(spoiled)
    visit = Visit(browser, tmp_path / "spoiled.html")
    assert visit.tab.title() != "run"
    assert visit.tab.is_visible("h1")
    assert visit.refused == ["csp: http://127.0.0.1:9/x"]
    assert len([complaint for complaint in visit.complaints if "Content Security Policy" in complaint]) >= 3


def test_every_candidate_of_a_sweep_leads_to_its_report(browser: Any, pages: dict[str, Path]) -> None:
    tab = Visit(browser, pages["sweep"]).tab
    for number in range(1, 12):  # the last one failed
        charts = tab.locator("svg a").get_by_text(str(number), exact=True)
        assert charts.count() == 2
        assert all(box["height"] > 5 for box in (label.bounding_box() for label in charts.all()))
        assert tab.get_by_role("rowheader").get_by_role("link", name=f"{number}").first.is_visible()
    tab.locator("svg a").get_by_text("7", exact=True).first.click()
    assert tab.url.endswith("/report-7/report.html")


def test_every_section_is_visible(browser: Any, pages: dict[str, Path]) -> None:
    tab = Visit(browser, pages["report"]).tab
    headings = tab.get_by_role("heading", level=2).all_inner_texts()
    assert headings == [
        *("Quality", "Speed", "Memory and size", "Kept units", "Parity", "Gates", "Behind a server"),
        "Identity and environment",
    ]
    assert tab.get_by_role("heading", level=1).inner_text().endswith("Fail")
    assert tab.get_by_role("navigation").get_by_role("link").all_inner_texts() == headings
    first = tab.get_by_role("list", name="Gates").get_by_role("listitem").first
    assert first.inner_text().endswith(
        "fail NLL difference, nats/token: upper bound 0.0600, limit ≤\N{NO-BREAK SPACE}0.01"
    )
    assert first.bounding_box()["y"] < 400  # at once, without scrolling
    assert tab.get_by_role("img").count() >= 10
    assert all(box["height"] > 20 for box in (svg.bounding_box() for svg in tab.locator("svg").all()))


@pytest.mark.parametrize("name", ["report", "hostile", "comparison", "encoder", "sweep"])
def test_phones_scroll_vertically_only(browser: Any, pages: dict[str, Path], name: str) -> None:
    tab = Visit(browser, pages[name], viewport={"width": 360, "height": 740}).tab
    assert tab.evaluate(WIDE) == 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison", "sweep"])
def test_all_text_has_enough_contrast(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    tab = Visit(browser, pages[name], color_scheme=scheme).tab
    tab.evaluate(WIDE)
    found = tab.evaluate(CONTRAST)
    assert len(found) > 100
    assert [text for text in found if text[0] < 4.5] == []
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 26)"
    assert dark == (scheme == "dark")


def test_print_shows_folded_sections_in_light_colours(browser: Any, pages: dict[str, Path]) -> None:
    tab = Visit(browser, pages["report"], color_scheme="dark").tab
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.get_by_text("a" * 64).bounding_box()["height"] > 0
    assert not tab.get_by_role("navigation").is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.pdf(format="A4").startswith(b"%PDF")
