"""numprune: from a transformer and a recipe to a pruned, exported, benchmarked, gated and published artifact.

This folder is the core: functions of tensors, models and plans. It imports nothing from `export`, `serving` or `flows`,
which are siblings in the repository and are imported as `numprune.export` and so on through symbolic links, so that an
installed numprune has a single top-level name.

Notation used throughout the core:

    N   rows of calibration tokens          S   tokens in a row
    H   hidden size                         D   channels of a consumer projection (its input features)
    P   channels removed                    K   channels kept
    W   consumer weight (out, D)            x   its input (D,); y = W x its output
    G = E[x x^T]  Gram matrix (D, D)        mu = E[x]  mean (D,)

A *consumer* is the projection that reads a block's hidden channels: `o_proj` of attention, `down_proj` of an MLP.

`import numprune` provides the names in `__all__`, which flows/api.py defines. They are imported on first use, so that
the command line starts without the tensor libraries.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numprune.flows.api import (
        ByteBudget,
        CalibrationRows,
        Comparison,
        KvBudget,
        Model,
        Plan,
        PruneOptions,
        Quality,
        Reading,
        RecoveryOptions,
        RecoveryRows,
        Scheme,
        SequenceBudget,
        Target,
        apply,
        calibration_rows,
        evaluate,
        export_checkpoint,
        kv_budget,
        load,
        plan,
        prune,
        quantize,
        read_plan,
        recover,
        recovery_rows,
        save,
        sequence_budget,
        shapes_of,
        weight_budget,
    )

__version__ = "0.3.0"

__all__ = [
    "ByteBudget",
    "CalibrationRows",
    "Comparison",
    "KvBudget",
    "Model",
    "Plan",
    "PruneOptions",
    "Quality",
    "Reading",
    "RecoveryOptions",
    "RecoveryRows",
    "Scheme",
    "SequenceBudget",
    "Target",
    "__version__",
    "apply",
    "calibration_rows",
    "evaluate",
    "export_checkpoint",
    "kv_budget",
    "load",
    "plan",
    "prune",
    "quantize",
    "read_plan",
    "recover",
    "recovery_rows",
    "save",
    "sequence_budget",
    "shapes_of",
    "weight_budget",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from numprune.flows import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
