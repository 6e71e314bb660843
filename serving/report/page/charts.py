"""The charts. Each function returns None for data that cannot be drawn; the tables beside them have every figure.

Baseline and candidate differ in shape and fill as well as in colour; the range that a limit forbids is hatched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from numprune.serving.front import Estimate
from numprune.serving.report import words
from numprune.serving.report.page.ink import (
    BAD,
    BAND,
    BASELINE,
    CANDIDATE,
    GRID,
    INK,
    MUTED,
    drawable,
    finite,
    padded,
    picture,
)

MAXIMUM_LAYERS: Final = 256
MAXIMUM_ROWS: Final = 40
MAXIMUM_DOTS: Final = 200


@dataclass(frozen=True)
class Interval:
    """One row: a value with its interval; `floor` is the noise floor of a ratio, ± around 1."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class Limit:
    """A maximum (`is_maximum`) or a minimum."""

    value: float
    is_maximum: bool


def intervals(
    key: str,
    title: str,
    rows: Sequence[Interval],
    *,
    axis: str = "",
    reference: float | None = None,
    limit: Limit | None = None,
) -> Markup | None:
    """Rows of intervals over one axis, with their limit.

    Args:
        axis: axis label.
        reference: the value for no difference.
    """
    ends = finite(end for row in rows for end in (row.value, row.low, row.high))
    bounds = [*ends, *([] if limit is None else [limit.value]), *([] if reference is None else [reference])]
    floors = [1 + side * row.floor for row in rows if row.floor is not None for side in (-1, 1)]
    if not ends or len(rows) > MAXIMUM_ROWS or not drawable(bounds, floors):
        return None
    left, right = padded(min(bounds), max(bounds))
    # The floor is clipped: a wide one would squeeze everything else.
    around = [edge for edge in floors if abs(edge - 1) < 2 * (right - left)]
    left, right = min([left, *around]), max([right, *around])
    labelled = any(row.label for row in rows)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5))
        for index, row in enumerate(rows):
            _row(axes, index, row)
        if reference is not None:
            axes.axvline(reference, color=MUTED, linewidth=1)
        if limit is not None:
            _limit(axes, limit, left, right)
        axes.set_yticks(range(len(rows)) if labelled else [], [row.label for row in rows] if labelled else [])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        _ticks(axes.xaxis)
        axes.set_xlabel(axis)

    return picture(key, title, len(rows) * 24 + (44 if axis else 30) + (14 if limit else 0), draw)


def _row(axes: Axes, index: int, row: Interval) -> None:
    if row.floor is not None:
        axes.add_patch(Rectangle((1 - row.floor, index - 0.42), 2 * row.floor, 0.84, facecolor=BAND, linewidth=0))
    if row.value is None:
        return
    known = (row.low, row.high)
    if known != (None, None):
        low, high = (edge if end is None else end for end, edge in zip(known, axes.get_xlim(), strict=True))
        axes.plot([low, high], [index, index], color=CANDIDATE, linewidth=3, solid_capstyle="butt", alpha=0.55)
        axes.plot([low, high], [index, index], "|", color=CANDIDATE, markersize=9, markeredgewidth=1.5)
    axes.plot([row.value], [index], "D", color=CANDIDATE, markersize=5.5)


def _limit(axes: Axes, limit: Limit, left: float, right: float) -> None:
    """The line, hatching on the forbidden side, and the value above."""
    beyond = (limit.value, right) if limit.is_maximum else (left, limit.value)
    axes.axvspan(*beyond, facecolor="none", edgecolor=BAD, hatch="//////", linewidth=0, alpha=0.55)
    axes.axvline(limit.value, color=BAD, linewidth=2)
    side = "left" if limit.value < (left + right) / 2 else "right"
    sign = "≤" if limit.is_maximum else "≥"
    above = axes.get_ylim()[1] - 0.08
    axes.text(limit.value, above, f"limit {sign} {words.plain(limit.value)}", color=BAD, ha=side, va="bottom")


def _ticks(axis: Axis, most: int = 5, *, whole: bool = False) -> None:
    """A limited number of ticks, with enough digits to distinguish them, and thousands separators."""
    locator = MaxNLocator(most, integer=whole, min_n_ticks=1)
    steps = np.diff(locator.tick_values(*axis.get_view_interval()))
    digits = next((n for n in range(12) if not len(steps) or abs(round(steps[0], n) / steps[0] - 1) < 1e-6), 12)

    def show(value: float, _: int) -> str:
        return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")

    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(show))


def histogram(key: str, title: str, values: Sequence[float], mean: float | None, axis: str) -> Markup | None:
    """Histogram of the documents' losses; a bin edge is at zero."""
    if not drawable(values, [mean]):
        return None
    bins = MaxNLocator(nbins=24, steps=[1, 2, 2.5, 5, 10])
    edges = np.asarray(bins.tick_values(min([*values, 0.0]), max([*values, 0.0])))
    counts, _ = np.histogram(values, bins=edges)
    heights = 100 * counts / len(values)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        centres, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
        worse, better = (counts > 0) & (centres > 0), (counts > 0) & (centres < 0)
        axes.bar(centres[worse], heights[worse], width * 0.86, color=CANDIDATE)
        axes.bar(centres[better], heights[better], width * 0.86, facecolor="none", edgecolor=CANDIDATE, linewidth=1.2)
        axes.axvline(0, color=MUTED, linewidth=1)
        if mean is not None:
            axes.axvline(mean, color=INK, linewidth=1.5, linestyle=(0, (4, 2)))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda height, _: f"{height:g} %"))
        _ticks(axes.xaxis, 6)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(axis)

    return picture(key, title, 170, draw)


@dataclass(frozen=True)
class Spot:
    """A candidate by two figures; `label` is a link if there is one."""

    label: str
    x: Estimate
    y: Estimate
    on_front: bool
    chosen: bool
    link: str = ""


def scatter(key: str, title: str, spots: Sequence[Spot], x_axis: str, y_axis: str) -> Markup | None:
    """Candidates with both of their intervals; lines for the unpruned model, of ratio 1 and no loss."""
    columns = [1.0, *(end for spot in spots for end in (spot.x.low, spot.x.value, spot.x.high))]
    heights = [0.0, *(end for spot in spots for end in (spot.y.low, spot.y.value, spot.y.high))]
    if not spots or len(spots) > MAXIMUM_DOTS or not drawable(columns, heights):
        return None
    left, right = padded(min(columns), max(columns))
    bottom, top = padded(min(heights), max(heights))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlim=(left, right), ylim=(bottom, top))
        axes.axvline(1, color=GRID, linewidth=1.2)
        axes.axhline(0, color=GRID, linewidth=1.2)
        for spot in spots:
            colour, fill = (CANDIDATE, CANDIDATE) if spot.on_front else (MUTED, "none")
            across = [spot.x.low, spot.x.high], [spot.y.value] * 2
            upwards = [spot.x.value] * 2, [spot.y.low, spot.y.high]
            for xs, ys in (across, upwards):
                axes.plot(xs, ys, color=colour, linewidth=1.5, alpha=0.55)
            axes.plot([spot.x.value], [spot.y.value], "D", color=colour, markerfacecolor=fill, markersize=5.5)
            if spot.chosen:
                axes.plot([spot.x.value], [spot.y.value], "o", color=INK, markerfacecolor="none", markersize=14)
            axes.annotate(
                spot.label,
                (spot.x.value, spot.y.value),
                (5, 4),
                textcoords="offset points",
                url=spot.link or None,
                color=INK,
            )
        _ticks(axes.xaxis)
        _ticks(axes.yaxis)
        axes.set_xlabel(x_axis)
        axes.set_title(y_axis)

    return picture(key, title, 260, draw)


@dataclass(frozen=True)
class Samples:
    label: str
    baseline: Sequence[float | None]
    candidate: Sequence[float | None]


def strips(key: str, title: str, metrics: Sequence[Samples]) -> Markup | None:
    """A dot for each repeat, baseline above candidate, with their medians; an axis for each metric."""
    shown = [found for found in metrics if finite(found.baseline) and finite(found.candidate)]
    if not shown or len(shown) > MAXIMUM_ROWS or not drawable(*(row.baseline for row in shown)):
        return None
    if not drawable(*(row.candidate for row in shown)):
        return None

    def draw(figure: Figure) -> None:
        for axes, found in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
            for row, (values, marker, colour, filled) in enumerate(
                ((found.baseline, "o", BASELINE, False), (found.candidate, "D", CANDIDATE, True))
            ):
                dots = finite(values)[:MAXIMUM_DOTS]
                heights = [row + 0.09 * (index % 5 - 2) for index in range(len(dots))]
                fill = colour if filled else "none"
                axes.plot(dots, heights, marker, color=colour, markerfacecolor=fill, markersize=4, markeredgewidth=1)
                middle = float(np.median(dots))
                axes.plot([middle, middle], [row - 0.42, row + 0.42], color=INK, linewidth=2)
            both = finite([*found.baseline, *found.candidate])
            axes.set_xlim(*padded(min(both), max(both)))
            axes.set_ylim(1.6, -0.6)
            axes.set_yticks([0, 1], ["baseline", "candidate"])
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            _ticks(axes.xaxis)
            axes.set_title(found.label)

    return picture(key, title, 88 * len(shown) + 4, draw)


def shares(key: str, title: str, rows: Sequence[tuple[str, float | None]]) -> Markup | None:
    """The candidate as a share of the baseline: filled bars in the outline of the whole."""
    known = [(label, ratio) for label, ratio in rows if ratio is not None]
    if not known or len(known) > MAXIMUM_ROWS or not drawable(ratio for _, ratio in known):
        return None
    largest = max(1.0, *(ratio for _, ratio in known))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlim=(0, 1.2 * largest), ylim=(len(known) - 0.5, -0.5))
        for index, (_, ratio) in enumerate(known):
            axes.barh(index, 1, 0.62, facecolor="none", edgecolor=BASELINE, linewidth=1)
            axes.barh(index, ratio, 0.62, facecolor=CANDIDATE, linewidth=0)
            axes.text(max(ratio, 1) + 0.02 * largest, index, words.share(ratio), va="center")
        axes.set_yticks(range(len(known)), [label for label, _ in known])
        axes.tick_params(axis="y", length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xticks([])

    return picture(key, title, 27 * len(known) + 6, draw)


@dataclass(frozen=True)
class Layers:
    """Units of one kind: for each layer (its index, kept, of)."""

    label: str
    kept: Sequence[tuple[int, int, int]]


def layers(key: str, title: str, kinds: Sequence[Layers]) -> Markup | None:
    """The units kept in each layer: filled bars in the outline of the original; a cross if none is left."""
    if not kinds or not all(0 < len(kind.kept) <= MAXIMUM_LAYERS for kind in kinds):
        return None
    if not drawable(of for kind in kinds for _, _, of in kind.kept) or any(
        layer > 10 * MAXIMUM_LAYERS for kind in kinds for layer, _, _ in kind.kept
    ):
        return None

    def draw(figure: Figure) -> None:
        for axes, kind in zip(figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0], kinds, strict=True):
            places, kept, of = (list(column) for column in zip(*kind.kept, strict=True))
            axes.bar(places, of, 0.8, facecolor=BAND, edgecolor=BASELINE, linewidth=0.8)
            axes.bar(places, kept, 0.8, facecolor=CANDIDATE, linewidth=0)
            gone = [(place, whole) for place, left, whole in kind.kept if left == 0]
            axes.plot([place for place, _ in gone], [whole / 2 for _, whole in gone], "x", color=BAD, markersize=6)
            axes.set_title(kind.label)
            axes.set_ylim(0, max(of) * 1.02)
            _ticks(axes.yaxis, 4, whole=True)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.tick_params(axis="both", length=0)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.margins(x=0.02)
            _ticks(axes.xaxis, 12, whole=True)
        axes.set_xlabel("layer")

    return picture(key, title, 105 * len(kinds) + 20, draw)
