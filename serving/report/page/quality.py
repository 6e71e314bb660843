"""Section: the loss of quality on held-out text."""

import statistics
from collections.abc import Iterator

from numprune.serving.report import names, words
from numprune.serving.report.models import Quality, Report, path_of
from numprune.serving.report.page import changed, charts, generation, images, tasks
from numprune.serving.report.page.blocks import Block, Cell, Chart, Facts, Folded, Pair, Section, Table, Text
from numprune.serving.report.page.charts import Interval, Limit

_METRIC = "quality.loss_delta"


def section(report: Report) -> Section:
    found = report.quality
    blocks = list(_blocks(found, report)) if found else [Text("Not measured in this run.", "absent")]
    return Section("quality", "Quality", [*blocks, *tasks.blocks(report)])


def _blocks(found: Quality, report: Report) -> Iterator[Block]:
    against = "candidate minus baseline" if names.is_difference(found) else "candidate against baseline"
    yield Text(
        f"On {names.measured_on(found)}{', packed' if found.packed else ''}, {against}, paired by "
        f"{names.paired_by(found)}. Intervals are two-sided, 95\N{NO-BREAK SPACE}%, by bootstrap over "
        f"{names.resampled(found)}{names.too_few(found)}."
    )
    table = Table(
        f"Quality on held-out {names.material(found)}", ("", "Baseline", "Candidate", "Difference"), list(_rows(found))
    )
    documents, told = _documents(found)
    drawn = [chart for chart in (_difference(found, _limit(report)), documents) if chart]
    if drawn:
        yield Pair(drawn, [table, *told])
    else:
        yield from [table, *told]
    yield from changed.blocks(found)
    if found.corpora:
        header, *rows = names.corpora(found)
        yield Table(
            f"Other held-out {names.material(found)}, beside {found.corpus} above",
            tuple(header),
            [[*row] for row in rows],
        )
    if found.generation is not None:
        yield from generation.blocks(found.generation)
    yield from images.classes(found.classes)
    if found.images is not None:
        yield from images.blocks(found.images)


def _difference(found: Quality, limit: Limit | None) -> Chart | None:
    delta, axis = found.loss_delta, f"{names.loss(found)}, {found.loss_delta.unit}"
    interval = f"{axis}: {words.signed(delta.value)}, 95 % interval {words.interval(delta)}."
    drawn = charts.intervals(
        "quality-loss",
        interval + (f" The gate's limit is {words.plain(limit.value)}." if limit else ""),
        [Interval("", delta.value, *delta.interval95)],
        axis=axis,
        reference=0.0,
        limit=limit,
    )
    forbidden = " Hatched: the range that the gate forbids." if limit else ""
    return Chart(drawn, f"Difference with its interval; 0 is no loss.{forbidden}") if drawn else None


def _rows(found: Quality) -> Iterator[list[Cell | str]]:
    one, other, ratio = found.baseline, found.candidate, found.perplexity_ratio
    delta = Cell(words.signed(found.loss_delta.value), words.interval(found.loss_delta))
    if one is None or other is None or ratio is None:  # not of causal-lm
        yield [f"{names.loss(found)}, {found.loss_delta.unit}", "", "", delta]
        yield from _recovery_rows(found)
        for name, is_share, sides, change in names.metrics(found):
            show = words.share if is_share else words.number
            changed: Cell | str = Cell(words.signed(change.value), words.interval(change)) if change else ""
            yield [name, "" if sides.baseline is None else show(sides.baseline), show(sides.candidate), changed]
        return
    unit = found.loss_delta.unit
    yield [f"NLL, {unit}", words.number(one.nll_nats_per_token), words.number(other.nll_nats_per_token), delta]
    yield from _recovery_rows(found)
    if quantized := found.quantization_loss_delta:
        yield ["of which by quantization", "", "", Cell(words.signed(quantized.value), words.interval(quantized))]
    yield [
        "Perplexity",
        words.number(one.perplexity),
        words.number(other.perplexity),
        Cell(words.times(ratio.value), words.interval(ratio, 4)),
    ]
    yield [f"KL from baseline, {unit}", "", words.number(found.kl_nats_per_token, 3), ""]
    yield ["Top-1 agreement", "", words.share(found.top1_agreement), ""]


def _recovery_rows(found: Quality) -> Iterator[list[Cell | str]]:
    """The model before training, and what training changed."""
    if found.pruned and found.recovery_loss_delta:
        before, gained = found.pruned.loss_delta, found.recovery_loss_delta
        loss = words.number(found.pruned.nll_nats_per_token) if found.candidate else ""
        yield ["before training", "", loss, Cell(words.signed(before.value), words.interval(before))]
        yield ["of which by training", "", "", Cell(words.signed(gained.value), words.interval(gained))]


def _documents(found: Quality) -> tuple[Chart | None, list[Block]]:
    """The distribution and its figures."""
    apart = found.document_deltas
    if apart is None:
        return None, [Text("This report has no figures by document.", "absent")]
    rows: list[list[Cell | str]] = [
        [Cell(one.name, tone="code"), f"{one.tokens:,}", words.signed(one.loss_delta)] for one in apart.worst
    ]
    loss, unit = names.loss(found), found.loss_delta.unit
    what, few = names.document(found), names.too_few(found)
    header = (what.capitalize(), names.counted_as(found), f"{loss}, {unit}")
    if few:
        return None, [Table(f"{what.capitalize()}s", header, rows)] if len(rows) > 1 else []
    values = apart.values
    worse = words.share(sum(value > 0 for value in values) / len(values))
    ten, half, ninety = (words.signed(_quantile(values, percent)) for percent in (10, 50, 90))
    lost = (
        [(f"{what.capitalize()}s that lost", worse)] if names.is_difference(found) else []
    )  # a distance cannot improve
    facts = Facts(
        [
            *lost,
            (f"Median {what}", half),
            (f"Eight in ten {what}s", f"{ten} to {ninety}"),
            ("Least and largest", f"{words.signed(values[0])} to {words.signed(values[-1])}"),
        ]
    )
    worst = Table(f"{what.capitalize()}s that lost most", header, rows)
    drawn = charts.histogram(
        "quality-documents",
        f"{what.capitalize()}s by their loss ({loss}, {unit}): {worse} lost; the median is {half}, eight in ten lie "
        f"from {ten} to {ninety}.",
        values,
        found.loss_delta.value,
        f"{loss} of {'an' if what == 'image' else 'a'} {what}, {unit}",
    )
    by = "what they lost (filled) or won (outlined)" if names.is_difference(found) else "their distance"
    caption = f"Share of {what}s by {by}; dashed: the mean over all."
    told: list[Block] = [facts, *([Folded(f"The {what}s that lost most", [worst])] if rows else [])]
    return Chart(drawn, caption) if drawn else None, told


def _limit(report: Report) -> Limit | None:
    """The limit of the gate on the difference, if any."""
    for gate in report.verdict.gates if report.verdict else ():
        if path_of(gate.metric) == _METRIC and gate.max is not None:
            return Limit(gate.max, is_maximum=True)
    return None


def _quantile(values: tuple[float, ...], percent: int) -> float:
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
