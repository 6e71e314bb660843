"""The report as one HTML file for browsers, phones and print, without scripts or network requests.

Reports may be untrusted. Text is escaped everywhere, the amount that is drawn is bounded, and the page's policy allows
only its own style: no external script, font or image can load.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from numprune.serving.report import words
from numprune.serving.report.models import Report
from numprune.serving.report.page import comparison as side_by_side
from numprune.serving.report.page import gates, identity, memory, parity, quality, speed, units
from numprune.serving.report.page.blocks import kind
from numprune.serving.report.page.verdict import verdict

_TEMPLATES = Path(__file__).with_name("templates")
MAXIMUM_REPORTS = side_by_side.MAXIMUM


def html(report: Report) -> str:
    """The page of one report. The same report gives the same page."""
    sections = [
        quality.section(report),
        speed.section(report),
        memory.section(report),
        units.section(report),
        parity.section(report),
        gates.section(report),
        *([served] if (served := speed.served(report)) else []),
        identity.section(report),
    ]
    return render("report.html", report=report, verdict=verdict(report), sections=sections)


def comparison(reports: Sequence[tuple[str, Report]]) -> str:
    """The page of several reports, each with its source; at most MAXIMUM_REPORTS."""
    if not 2 <= len(reports) <= MAXIMUM_REPORTS:
        raise ValueError(f"{len(reports)} reports; the number must be from 2 to {MAXIMUM_REPORTS}")
    entries = side_by_side.entries(reports)
    return render("comparison.html", entries=entries, sections=side_by_side.sections(entries))


def differences(reports: Sequence[Report]) -> list[tuple[str, str]]:
    """Unexpected differences between reports, and their consequences for the figures."""
    return [(item.name, item.consequence) for item, _ in side_by_side.differences(reports)]


def render(template: str, **values: Any) -> str:
    """A page of ours."""
    environment, style, policy = _environment()
    return environment.get_template(template).render(style=style, policy=policy, **values)


@cache
def _environment() -> tuple[Environment, Markup, str]:
    """Templates, the style sheet, and the policy that allows only this style sheet."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    environment.globals["kind"] = kind
    style = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return environment, Markup(style), policy  # noqa: S704 # our own file


def _clean(value: Any) -> Any:
    return words.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
