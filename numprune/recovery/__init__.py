"""Training after pruning: a short distillation of a pruned model towards the dense one.

Notation: rows of S tokens, V the vocabulary, p = (p, V) the dense model's distribution of the next token, q the pruned
one's. The loss is KL(p || q) in nats per token, and optionally a term on the hidden states.

`accelerate` places the models, casts, and runs several processes. It is an optional package, imported on use.
"""

from numprune.recovery.options import RecoveryOptions
from numprune.recovery.rows import RecoveryRows, draw_rows
from numprune.recovery.training import Recovered, check_training, distill, require_packages

__all__ = [
    "Recovered",
    "RecoveryOptions",
    "RecoveryRows",
    "check_training",
    "distill",
    "draw_rows",
    "require_packages",
]
