"""Section: what was removed from each layer."""

from collections.abc import Mapping

from numprune.serving.report import precision, training, words
from numprune.serving.report.kept import KINDS, Units, by_kind, listed, others, without
from numprune.serving.report.models import Pruning, Report
from numprune.serving.report.page import attention, charts
from numprune.serving.report.page.blocks import Block, Cell, Chart, Facts, Folded, Pair, Section, Table, Text
from numprune.serving.report.page.charts import Layers

_MAXIMUM_ROWS = 1000


def section(report: Report) -> Section:
    found = report.pruning
    blocks: list[Block] = _blocks(found) if found else [Text("This report is not from a pruning run.", "absent")]
    blocks += attention.blocks(found.attention if found else None)
    if report.learning:
        blocks.append(Text(training.of_masks(report.learning)))
    if report.recovery:
        blocks.append(Text(training.described(report.recovery)))
    if report.quantization:
        blocks.append(Text(precision.quantized(report.quantization)))
        if by_layer := precision.bits_by_layer(report.quantization):
            blocks.append(Facts([*by_layer.items()]))
    return Section("units", "Kept units", blocks)


def _asked(found: Pruning) -> tuple[str, str]:
    if limits := words.budgets(found):
        return "Asked for", limits
    return "Requested", f"{words.share(found.ratio_asked)} of {words.COUNTED[found.ratio_counts]}"


def _blocks(found: Pruning) -> list[Block]:
    removed, dropped = found.ratio_removed, found.dropped_layers
    cached = f"{words.share(removed.kv_bytes)}{words.at_context(removed)}"
    facts = Facts(
        [
            ("Criterion", found.criterion),
            ("Allocation", found.allocation),
            ("Compensation", found.compensation),
            _asked(found),
            (
                "Removed",
                f"{words.share(removed.prunable)} of prunable, {words.share(removed.parameters)} of all parameters",
            ),
            *([("KV cache removed", cached)] if removed.kv_bytes is not None else []),
            *([("Layers dropped", listed(dropped))] if dropped else []),
            *([("Attention window", window)] if (window := words.window(found)) else []),
            *([("Hidden size", "{1:,} → {0:,}".format(*found.hidden_size))] if found.hidden_size else []),
            *([("Shape", "; ".join(found.shape))] if found.shape else []),
            *([("Sizes priced at", found.price.summary)] if found.price else []),
            *([("Sizes refined by", found.refinement.summary)] if found.refinement else []),
        ]
    )
    kinds = by_kind(found.kept_units)
    told = [_told(KINDS[kind], left) for kind, units in kinds.items() if (left := without(units, dropped))]
    drawn = charts.layers(
        "units-layers",
        f"What each layer keeps. {' '.join(told)}",
        [
            Layers(f"{KINDS[kind]} kept", [(layer, kept, of) for layer, (kept, of) in units.items()])
            for kind, units in kinds.items()
        ],
    )
    told_all = " ".join(told) or "The report does not list the kept units."
    tables = [Folded("Kept units, layer by layer", _tables(found, kinds))] if found.kept_units else []
    right: list[Block] = [facts, Text(told_all), *tables]
    caption = (
        "Filled: kept. Outlined: original. Cross: the whole block was removed. A KV group is a KV head with "
        "its query heads."
    )
    return [Pair([Chart(drawn, caption)], right)] if drawn else right


def _told(name: str, units: Units) -> str:
    """One sentence."""
    skipped = [layer for layer, (kept, _) in units.items() if kept == 0]
    different = sorted(set(units.values()))
    if len(different) == 1:
        kept, of = different[0]
        return f"{name}: {kept:,} of {of:,} in every layer."
    total, before = (sum(column) for column in zip(*units.values(), strict=True))
    least, most = (pick(kept for kept, _ in units.values()) for pick in (min, max))
    skip = f"; skipped in {'layer' if len(skipped) == 1 else 'layers'} {listed(skipped)}" if skipped else ""
    return f"{name}: {total:,} of {before:,}, from {least:,} to {most:,} a layer{skip}."


def _tables(found: Pruning, kinds: Mapping[str, Units]) -> list[Block]:
    blocks: list[Block] = []
    numbers = sorted({layer for units in kinds.values() for layer in units})
    if numbers:
        rows: list[list[Cell | str]] = [
            [str(layer), *(_cell(units.get(layer), layer in found.dropped_layers) for units in kinds.values())]
            for layer in numbers[:_MAXIMUM_ROWS]
        ]
        blocks.append(Table("Units kept in each layer", ("Layer", *(KINDS[kind] for kind in kinds)), rows))
    unknown = others(found.kept_units)
    if unknown:
        rest: list[list[Cell | str]] = [
            [Cell(name, tone="code"), _cell(units)] for name, units in list(unknown.items())[:_MAXIMUM_ROWS]
        ]
        blocks.append(Table("Units kept in other blocks", ("Block", "Kept"), rest))
    if max(len(numbers), len(unknown)) > _MAXIMUM_ROWS:
        blocks.append(Text("The rest is in report.json.", "absent"))
    return blocks


def _cell(units: tuple[int, int] | None, dropped: bool = False) -> str:
    if units is None:
        return words.ABSENT
    kept, of = units
    return f"{kept:,} of {of:,}" if kept else f"{'dropped' if dropped else 'skipped'}, of {of:,}"
