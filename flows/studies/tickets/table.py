"""The study's results as a table and as a picture."""

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from numprune.flows.studies.compare.plot import svg_of
from numprune.flows.studies.tickets.study import RIVALS, Kind, Result

_LABELS: dict[Kind, str] = {
    "ticket": "ticket",
    "reinitialised": "reinitialised",
    "random": "random mask",
}
_COLOURS: dict[Kind, str] = {"ticket": "tab:blue", "reinitialised": "tab:orange", "random": "tab:green"}


def as_markdown(results: Sequence[Result], conditions: str) -> str:
    """Return the table: means over seeds, and the range of differences."""
    header = ["kept", *(f"NLL, {_LABELS[kind]}" for kind in RIVALS)]
    header += [f"{_LABELS[kind]} - ticket" for kind in RIVALS[1:]]
    dense = fmean(result.nll for result in results if result.kind == "dense")
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", f"| 100 % (dense) | {dense:.4f} | | | | |"]
    for number in sorted({result.round for result in results} - {0}):
        found = {kind: _of(results, kind, number) for kind in RIVALS}
        kept = fmean(result.kept for result in found["ticket"])
        cells = [f"{100 * kept:.1f} %", *(f"{fmean(result.nll for result in found[kind]):.4f}" for kind in RIVALS)]
        for kind in RIVALS[1:]:
            apart = [other.nll - ticket.nll for other, ticket in zip(found[kind], found["ticket"], strict=True)]
            cells.append(f"{fmean(apart):+.4f} [{min(apart):+.4f}, {max(apart):+.4f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", conditions, ""])


def as_svg(results: Sequence[Result]) -> str:
    """Return a picture: NLL against the kept share, with a point per seed and a line through the means."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    dense = fmean(result.nll for result in results if result.kind == "dense")
    axes.axhline(dense, color="0.4", linestyle="--", label="dense")
    rounds = sorted({result.round for result in results} - {0})
    for kind in RIVALS:
        by_round = [_of(results, kind, number) for number in rounds]
        shares = [100 * fmean(result.kept for result in found) for found in by_round]
        means = [fmean(result.nll for result in found) for found in by_round]
        axes.plot(shares, means, color=_COLOURS[kind], label=_LABELS[kind])
        points = [result for found in by_round for result in found]
        x, y = [100 * result.kept for result in points], [result.nll for result in points]
        axes.plot(x, y, "o", color=_COLOURS[kind], markersize=4)
    axes.invert_xaxis()
    axes.set_xlabel("prunable parameters kept, %")
    axes.set_ylabel("held-out NLL, nats/byte")
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    return svg_of(figure)


def _of(results: Sequence[Result], kind: Kind, number: int) -> list[Result]:
    """Return the results of one kind and round, in the order of the seeds."""
    found = [result for result in results if (result.kind, result.round) == (kind, number)]
    return sorted(found, key=lambda result: result.seed)
