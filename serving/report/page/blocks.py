"""Building blocks of a page. All text is plain; the templates escape it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

Tone = str  # "" or a class of page.css: "pass", "fail", "inconclusive", "code"


@dataclass(frozen=True)
class Cell:
    """`note` is shown in small print below `text`, line by line; `link`: a relative URL, of ours, of `text`."""

    text: str
    note: str = ""
    tone: Tone = ""
    link: str = ""


@dataclass(frozen=True)
class Table:
    """The first cell of each row is its heading."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    numeric: bool = True  # all columns but the first are figures

    @property
    def cells(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Chart:
    """A chart with a caption. The SVG's title describes it; a table beside it has the figures."""

    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Text:
    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    items: Sequence[tuple[str, Cell | str]]

    @property
    def cells(self) -> list[tuple[str, Cell]]:
        return [(name, value if isinstance(value, Cell) else Cell(value)) for name, value in self.items]


@dataclass(frozen=True)
class Folded:
    """Shown on demand, and in print."""

    title: str
    blocks: Sequence["Block"]


@dataclass(frozen=True)
class Pair:
    """Side by side where there is room: a chart and its figures."""

    left: Sequence["Block"]
    right: Sequence["Block"]


@dataclass(frozen=True)
class Gallery:
    """Charts, side by side as space allows."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Picture:
    """`png`: in base64; `lines` below it, the first one emphasized."""

    png: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Pictures:
    """Small pictures, side by side as space allows."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Heading:
    """Within a section."""

    text: str


Block = Table | Chart | Text | Facts | Folded | Pair | Gallery | Pictures | Heading


@dataclass(frozen=True)
class Section:
    """`key` is its anchor."""

    key: str
    title: str
    blocks: Sequence[Block] = field(default=())


def kind(block: Block) -> str:
    """The template macro that renders it."""
    return type(block).__name__.lower()
