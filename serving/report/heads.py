"""Attention of kept and removed heads, in words and means."""

from collections.abc import Iterator

from numprune.serving.report.models import Attention

CATEGORIES = {
    "special": "Special tokens",
    "self": "The token itself",
    "previous": "The token before",
    "rest": "The rest",
}


def means(found: Attention) -> Iterator[tuple[str, str, float | None, float | None]]:
    """For each kind of attention: its key, its name, the mean share over kept and over removed heads."""
    heads = [head for name in found.heads for head in zip(found.heads[name], found.kept[name], strict=True)]
    for index, (key, label) in enumerate(CATEGORIES.items()):
        of = {kept: [float(shares[index] or 0) for shares, keeps in heads if keeps is kept] for kept in (True, False)}
        yield key, label, _mean(of[True]), _mean(of[False])


def _mean(shares: list[float]) -> float | None:
    return sum(shares) / len(shares) if shares else None
