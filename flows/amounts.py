"""Amounts for a terminal and for reports."""


def size(count: float) -> str:
    """Bytes in the largest unit that gives at least 1: 13.2 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
