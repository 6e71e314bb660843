"""What kind of attention heads was kept, and where they look in images, within the section on kept units."""

from collections.abc import Iterator, Sequence

from markupsafe import Markup
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from numprune.counted import counted
from numprune.serving.report import heads, words
from numprune.serving.report.kept import layer_of
from numprune.serving.report.models import Attention, AttentionMaps
from numprune.serving.report.page.blocks import Block, Cell, Chart, Heading, Pair, Table, Text
from numprune.serving.report.page.ink import BAD, CANDIDATE, MUTED, picture

_MAXIMUM = 1024  # heads


def blocks(found: Attention | None) -> Iterator[Block]:
    """Nothing without a probe."""
    if found is None or not found.heads:
        return
    yield Heading("Attention of the heads, before pruning")
    yield Text(
        f"Mean share of a head's attention in the dense model, over {found.rows:,} calibration rows of "
        f"{found.sequence_length:,} tokens. Special tokens include the first of each row. Correlation: Spearman's, "
        "over all heads, with being kept; above 0, heads with more of this attention were kept."
    )
    rows: list[list[Cell | str]] = [
        [label, words.share(kept), words.share(removed), words.number(found.spearman.get(key), 2)]
        for key, label, kept, removed in heads.means(found)
    ]
    table = Table("Attention of kept and removed heads", ("", "Kept heads", "Removed heads", "Correlation"), rows)
    drawn = _picture(found, rows)
    caption = "A square for each head: the darker, the more attention. Crossed out: removed."
    yield Pair([Chart(drawn, caption)], [table]) if drawn else table
    if found.maps is not None:
        yield from _maps(found.maps)


def _maps(found: AttentionMaps) -> Iterator[Block]:
    yield Heading("Attention on images, before and after pruning")
    layers = f"layers {', '.join(map(str, found.layers))}" if len(found.layers) > 1 else f"layer {found.layers[0]}"
    alt = f"Attention of kept and removed heads in {counted(len(found.images), 'image')}, before and after pruning"
    who = "the class token looks" if found.by == "class token" else "patches look on average"
    drawn = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(alt, found.png)
    yield Chart(
        drawn,
        f"Beside each image, where {who} in {layers}: the darker, the more attention. First row: the "
        "dense model's kept heads (mean). Second: its removed heads; grey: none. Third: the pruned model. Squares of "
        "one image and layer share their scale.",
    )
    yield Text(f"Images, held out: {', '.join(found.images)}.")


def _picture(found: Attention, rows: Sequence[Sequence[Cell | str]]) -> Markup | None:
    """For each kind of attention a row of squares for each layer."""
    layers = sorted((layer, name) for name in found.heads if (layer := layer_of(name)) is not None)
    most = max((len(found.heads[name]) for _, name in layers), default=0)
    if not most or most * len(layers) > _MAXIMUM:
        return None
    told = "; ".join(f"{row[0]}: kept {row[1]}, removed {row[2]}" for row in rows)
    gone = [
        (head, row) for row, (_, name) in enumerate(layers) for head, kept in enumerate(found.kept[name]) if not kept
    ]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, 2, sharex=True, sharey=True).flat
        for index, (axes, label) in enumerate(zip(grid, heads.CATEGORIES.values(), strict=True)):
            axes.set(title=label, xlim=(-0.6, most - 0.4), ylim=(len(layers) - 0.4, -0.6))
            for row, (_, name) in enumerate(layers):
                for head, shares in enumerate(found.heads[name]):
                    colour = to_rgba(CANDIDATE, min(max(shares[index] or 0.0, 0.0), 1.0))
                    axes.add_patch(Rectangle((head - 0.45, row - 0.45), 0.9, 0.9, fc=colour, ec=MUTED, lw=0.3))
            size = max(2.0, min(7.0, 100 / max(most, len(layers))))
            axes.plot(
                [head for head, _ in gone], [row for _, row in gone], "x", color=BAD, markersize=size, markeredgewidth=1
            )
            axes.set_xticks(sorted({0, most - 1}))
            ends = sorted({0, len(layers) - 1})
            axes.set_yticks(ends, [str(layers[row][0]) for row in ends])
            axes.tick_params(length=0)
            axes.spines[["left", "bottom"]].set_visible(False)
        figure.supxlabel("head", size="medium", color=MUTED)
        figure.supylabel("layer", size="medium", color=MUTED)

    height = 2 * max(40.0, min(280.0, 140.0 * len(layers) / most)) + 70
    return picture("attention-heads", f"Mean attention of each head, before pruning. {told}.", height, draw)
