"""Plot the comparison: NLL increase against the share removed, one line per method."""

import io

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from numprune.flows.studies.compare.table import Row, Table

_MARKERS = "os^vDPX*<>"


def as_svg(table: Table) -> str:
    """Return an SVG, the same for the same table; the axis is logarithmic if all increases are positive."""
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in table.in_order():
        lines.setdefault((row.method, row.samples), []).append(row)
    methods = list(dict.fromkeys(method for method, _ in lines))
    sizes = list(table.conditions.calibration)
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for (method, samples), rows in lines.items():
        index = methods.index(method)
        rows = sorted(rows, key=lambda row: row.prunable_ratio_removed)
        axes.plot(
            [100 * row.prunable_ratio_removed for row in rows],
            [row.nll_increase for row in rows],
            label=method if len(sizes) == 1 else f"{method}, {samples} rows",
            color=colours[index * 2 % 20 + index // 10 % 2],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=("-", "--", ":", "-.")[sizes.index(samples) % 4],
            linewidth=1.5,
            markersize=5,
        )
    if all(row.nll_increase > 0 for row in table.rows):
        axes.set_yscale("log")
    axes.set_xlabel("prunable parameters removed, %")
    axes.set_ylabel(f"increase of held-out NLL, {table.conditions.unit}")
    axes.set_title(table.conditions.model)
    axes.grid(which="both", color="0.9")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return svg_of(figure)


def svg_of(figure: Figure) -> str:
    """Return a figure as an SVG, the same for the same figure."""
    picture = io.StringIO()
    # By default, ids are random and the date is written.
    with rc_context({"svg.hashsalt": "numprune"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()
