"""The report as one HTML file: for a browser, a phone, or paper; without scripts, and without a single request.

A report may be untrusted. Its text is escaped wherever it appears, what is drawn of it is bounded, and the page
forbids itself everything but its own style: no script, no font, no picture from elsewhere could load.
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
    return _render("report.html", report=report, verdict=verdict(report), sections=sections)


def comparison(reports: Sequence[tuple[str, Report]]) -> str:
    """The page of several reports, each with where it is from; MAXIMUM_REPORTS at most."""
    if not 2 <= len(reports) <= MAXIMUM_REPORTS:
        raise ValueError(f"{len(reports)} reports are not from 2 to {MAXIMUM_REPORTS}")
    entries = side_by_side.entries(reports)
    return _render("comparison.html", entries=entries, sections=side_by_side.sections(entries))


def differences(reports: Sequence[Report]) -> list[tuple[str, str]]:
    """What differs between reports though it should not, and what that means for their figures."""
    return [(item.name, item.consequence) for item, _ in side_by_side.differences(reports)]


def _render(template: str, **values: Any) -> str:
    environment, style, policy = _environment()
    return environment.get_template(template).render(style=style, policy=policy, **values)


@cache
def _environment() -> tuple[Environment, Markup, str]:
    """Templates, the style sheet, and the policy under which only this style sheet counts."""
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
