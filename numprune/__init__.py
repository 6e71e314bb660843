"""numprune: from a transformer and a recipe to a pruned, exported, benchmarked, gated and published artifact.

This folder is the core: tensors, models and plans in, tensors, models and plans out. It imports nothing of `export`,
`serving` or `flows`; those stand beside it in the repository and are reached as `numprune.export` and so on through
symbolic links, so that an installed numprune takes one top-level name only.

Notation used throughout the core:

    N   rows of calibration tokens          S   tokens in a row
    H   hidden size                         D   channels of a consumer projection (its input features)
    P   channels removed                    K   channels kept
    W   consumer weight (out, D)            x   its input (D,); y = W x its output
    G = E[x x^T]  Gram matrix (D, D)        mu = E[x]  mean (D,)

A *consumer* is the projection that reads a block's hidden channels: `o_proj` of attention, `down_proj` of an MLP.

From Python, `import numprune` gives what `__all__` names; see flows/api.py. It is imported when it is first used, so
that the command line starts without the tensor libraries.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numprune.flows.api import (
        ByteBudget,
        CalibrationRows,
        Comparison,
        Model,
        Plan,
        PruneOptions,
        Quality,
        Reading,
        Scheme,
        Target,
        apply,
        calibration_rows,
        evaluate,
        export_checkpoint,
        load,
        plan,
        prune,
        quantize,
        read_plan,
        save,
        weight_budget,
    )

__version__ = "0.3.0"

__all__ = [
    "ByteBudget",
    "CalibrationRows",
    "Comparison",
    "Model",
    "Plan",
    "PruneOptions",
    "Quality",
    "Reading",
    "Scheme",
    "Target",
    "__version__",
    "apply",
    "calibration_rows",
    "evaluate",
    "export_checkpoint",
    "load",
    "plan",
    "prune",
    "quantize",
    "read_plan",
    "save",
    "weight_budget",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from numprune.flows import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
