"""Section: what pruning costs, in nats per token of held-out text."""

import statistics
from collections.abc import Iterator

from numprune.serving.report.models import Estimate, Quality, Report
from numprune.serving.report.page import charts, generation, words
from numprune.serving.report.page.blocks import Block, Cell, Chart, Facts, Folded, Pair, Section, Table, Text
from numprune.serving.report.page.charts import Interval, Limit

_METRIC = "quality.nll_delta_nats_per_token"
_TOO_FEW = ": the documents are too few to resample, so they speak for this text alone"


def section(report: Report) -> Section:
    found = report.quality
    blocks = list(_blocks(found, report)) if found else [Text("Not measured in this run.", "absent")]
    return Section("quality", "Quality", blocks)


def _blocks(found: Quality, report: Report) -> Iterator[Block]:
    delta = found.nll_delta_nats_per_token
    yield Text(
        f"On {words.count(found.tokens, 'token')} of {words.count(found.documents, 'held-out document')}"
        f"{', packed' if found.packed else ''}, candidate "
        "minus baseline, paired by token. Intervals are two-sided, 95\N{NO-BREAK SPACE}%, by bootstrap over "
        f"{words.count(delta.samples, delta.sampling_unit)}{_TOO_FEW if _few(found) else ''}."
    )
    table = Table("Quality on held-out text", ("", "Baseline", "Candidate", "Difference"), list(_rows(found)))
    documents, told = _documents(found)
    drawn = [chart for chart in (_difference(delta, _limit(report)), documents) if chart]
    if drawn:
        yield Pair(drawn, [table, *told])
    else:
        yield from [table, *told]
    if found.generation is not None:
        yield from generation.blocks(found.generation)


def _few(found: Quality) -> bool:
    """Whether the documents are too few to resample, and to make a distribution."""
    return found.nll_delta_nats_per_token.sampling_unit == "window"


def _difference(delta: Estimate, limit: Limit | None) -> Chart | None:
    interval = f"NLL difference {words.signed(delta.value)} nats per token, 95 % interval {words.interval(delta)}."
    drawn = charts.intervals(
        "quality-nll",
        interval + (f" The gate's limit is {words.plain(limit.value)}." if limit else ""),
        [Interval("", delta.value, *delta.interval95)],
        axis="NLL difference, nats per token",
        reference=0.0,
        limit=limit,
    )
    forbidden = " Hatched: what the gate forbids." if limit else ""
    return Chart(drawn, f"Difference with its interval; 0 is no loss.{forbidden}") if drawn else None


def _rows(found: Quality) -> Iterator[list[Cell | str]]:
    one, other, delta, ratio = found.baseline, found.candidate, found.nll_delta_nats_per_token, found.perplexity_ratio
    yield [
        "NLL, nats/token",
        words.number(one.nll_nats_per_token),
        words.number(other.nll_nats_per_token),
        Cell(words.signed(delta.value), words.interval(delta)),
    ]
    yield [
        "Perplexity",
        words.number(one.perplexity),
        words.number(other.perplexity),
        Cell(words.times(ratio.value), words.interval(ratio, 4)),
    ]
    yield ["KL from baseline, nats/token", "", words.number(found.kl_nats_per_token, 3), ""]
    yield ["Top-1 agreement", "", words.share(found.top1_agreement), ""]


def _documents(found: Quality) -> tuple[Chart | None, list[Block]]:
    """The distribution, and its figures."""
    apart = found.document_deltas
    if apart is None:
        return None, [Text("This report does not tell the documents apart.", "absent")]
    rows: list[list[Cell | str]] = [
        [Cell(one.name, tone="code"), f"{one.tokens:,}", words.signed(one.nll_delta_nats_per_token)]
        for one in apart.worst
    ]
    header = ("Document", "Tokens", "Difference, nats/token")
    if _few(found):
        return None, [Table("Documents", header, rows)] if len(rows) > 1 else []
    values = apart.values
    worse = words.share(sum(value > 0 for value in values) / len(values))
    ten, half, ninety = (words.signed(_quantile(values, percent)) for percent in (10, 50, 90))
    facts = Facts(
        [
            ("Documents that lost", worse),
            ("Median document", half),
            ("Eight in ten documents", f"{ten} to {ninety}"),
            ("Least and largest", f"{words.signed(values[0])} to {words.signed(values[-1])}"),
        ]
    )
    worst = Table("Documents that lost most", header, rows)
    drawn = charts.histogram(
        "quality-documents",
        f"Documents by their NLL difference: {worse} lost; the median is {half}, eight in ten lie from {ten} to "
        f"{ninety} nats per token.",
        values,
        found.nll_delta_nats_per_token.value,
        "NLL difference of a document, nats per token",
    )
    caption = "Share of documents by what they lost (filled) or won (outlined); dashed: the mean over all tokens."
    told: list[Block] = [facts, *([Folded("The documents that lost most", [worst])] if rows else [])]
    return Chart(drawn, caption) if drawn else None, told


def _limit(report: Report) -> Limit | None:
    """Of the gate on the difference, where there is one."""
    for gate in report.verdict.gates if report.verdict else ():
        if gate.metric == _METRIC and gate.max is not None:
            return Limit(gate.max, is_maximum=True)
    return None


def _quantile(values: tuple[float, ...], percent: int) -> float:
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
