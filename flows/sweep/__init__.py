"""Sweeps: the candidates of a grid of recipes, their Pareto front, and the best of them published.

from numprune.flows.sweep import sweep

found = sweep(
    "my.toml",
    {"prune.ratio": [0.1, 0.2, 0.3], "quantize.scheme": ["none", "w8a8"]},
    choose="fastest",
)
print([candidate.label for candidate in found.candidates if candidate.on_front], found.page)
"""

from numprune.flows.sweep.results import Result, Sweep
from numprune.flows.sweep.run import sweep

__all__ = ["Result", "Sweep", "sweep"]
