"""Free-form facts as a list of names and values."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from numprune.serving.report import words
from numprune.serving.report.page.blocks import Cell, Facts, Table

_MAXIMUM = 200
_LONGEST = 400  # characters
_DEEPEST = 8


def block(facts: Mapping[str, Any]) -> Facts:
    """Every leaf by its dotted path."""
    items = list(islice(_leaves(facts, "", 0), _MAXIMUM + 1))
    shown = [(name, Cell(shorten(value))) for name, value in items[:_MAXIMUM]]
    return Facts([*shown, ("more", "the rest is in report.json")] if len(items) > _MAXIMUM else shown)


def sides(caption: str, baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> Table:
    """Two sets of facts side by side, one row per leaf of either."""
    one, other = (dict(islice(_leaves(side, "", 0), _MAXIMUM)) for side in (baseline, candidate))
    rows = [
        [name, *(shorten(side.get(name, words.ABSENT)) for side in (one, other))]
        for name in dict.fromkeys([*one, *other])
    ]
    return Table(caption, ("", "Baseline", "Candidate"), rows, numeric=False)


def shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _leaves(value: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and (value or not path) and depth < _DEEPEST:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{shorten(key)}" if path else shorten(key), depth + 1)
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value) and depth < _DEEPEST:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}", depth + 1)
    else:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return words.ABSENT
    if isinstance(value, int | float):
        return words.number(value)
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value[:_MAXIMUM]) if value else "none"
    return str(value)[: _LONGEST + 1]
