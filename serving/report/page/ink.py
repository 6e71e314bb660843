"""Matplotlib figures as inline SVG: with the page's font and colours (dark mode too), and without inline styles.

Figures are drawn in placeholder colours, which become the page's CSS variables. Inline styles become attributes, so
that the page's Content-Security-Policy need not allow them. Text stays text: it is smaller, sharp in the reader's own
font, and searchable. The same figure gives the same SVG.
"""

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from typing import Any, Final

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from numprune.serving.report import words

WIDTH: Final = 340  # user units, about the CSS pixels of a phone
FONT: Final = 12

INK, MUTED, GRID, BASELINE, CANDIDATE, BAD, BAND = (f"#0a0b{shade:02x}" for shade in range(7))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BASELINE: "baseline", CANDIDATE: "candidate"} | {
    BAD: "bad",
    BAND: "band",
}
_LARGEST, _SMALLEST = 1e12, 1e-12  # beyond this, tick labels lose their digits

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # matplotlib treats a dollar sign as math
    "font.family": ["DejaVu Sans"],  # used for measuring; wider than the fonts that pages are shown in
    "font.size": FONT - 1.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": FONT - 1,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "hatch.color": MUTED,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "axes.linewidth": 0.8,
    "path.simplify": False,
}


def drawable(*groups: Iterable[float | None]) -> bool:
    """Whether there is something to draw within the range of an axis."""
    values = [value for group in groups for value in group if value is not None]
    return bool(values) and all(value == 0 or _SMALLEST < abs(value) < _LARGEST for value in values)


def picture(key: str, title: str, height: float, draw: Callable[[Figure], None]) -> Markup:
    """An `<svg>` with `title` for screen readers.

    Args:
        key: of letters, digits and dashes; its ids begin with it.
        title: one sentence.
        height: in user units, of which the width is WIDTH.
        draw: adds axes to the figure.
    """
    written = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": key}):  # type: ignore[dict-item]  # its keys are literals
        air = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=3 / 72)
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout=air)
        draw(figure)
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    # matplotlib's own output, so not untrusted XML.
    root = ET.fromstring(written.getvalue())  # noqa: S314
    _tidy(root, key)
    heading = ET.Element("title", {"id": f"{key}-title"})
    heading.text = words.printable(title)
    root.insert(0, heading)
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704 # ElementTree escapes


def _tidy(root: ET.Element, key: str) -> None:
    """Keep only visible elements, with allowed attributes and ids unique to this chart."""
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": f"{key}-title"} | {
        "stroke-linejoin": "round",
        "focusable": "false",
    }
    root.tag = "svg"
    for parent in list(root.iter()):
        for child in list(parent):
            name = _local(child.tag)
            if name in ("metadata", "style") or (name == "path" and _invisible(child)):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.text = element.text.strip() or None if element.text and element.tag != "text" else element.text
        element.tail = None
        element.attrib = _attributes(element, key)


def _invisible(path: ET.Element) -> bool:
    return path.get("style") == "fill: none"


def _attributes(element: ET.Element, key: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in element.attrib.items():
        match _local(name):
            case "id":
                if element.tag in ("path", "clipPath", "pattern"):  # other ids are not referenced
                    found["id"] = f"{key}-{value}"
            case "href":
                found["href"] = f"#{key}-{value[1:]}" if value.startswith("#") else value  # a link of ours
            case "clip-path":
                found["clip-path"] = _referring(value, key)
            case "style":
                found |= _properties(value, key)
            case "d":
                found["d"] = " ".join(_shorter(value).split())
            case "target":  # of a link, which opens like those of the tables
                pass
            case "transform" if value.startswith("rotate(-0 "):
                pass
            case "fill" | "stroke" as plain:
                found[plain] = f"var(--{_VARIABLES[value]})" if value.startswith("#") else value
            case plain:
                found[plain] = _shorter(value) if plain in ("x", "y") else value
    return found


def _properties(style: str, key: str) -> dict[str, str]:
    found = {}
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name and name != "font-family":
            found[name] = f"var(--{_VARIABLES[value]})" if value.startswith("#") else _referring(value, key)
    return found


def _referring(value: str, key: str) -> str:
    return re.sub(r"url\(#(\w+)\)", rf"url(#{key}-\1)", value)


def _shorter(text: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}", text)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def padded(low: float, high: float, share: float = 0.08) -> tuple[float, float]:
    """Limits of an axis with a margin; never of zero width."""
    width = high - low
    air = share * width if width > 1e-9 * max(abs(low), abs(high)) else max(abs(low), abs(high)) * 0.1
    air = air or 1.0
    return low - air, high + air


def finite(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]
