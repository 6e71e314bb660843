"""Pruning inside the user's own training: a callback for transformers' `Trainer`.

import numprune
from numprune.schedules import GradualPruning

pruning = GradualPruning(0.3, criterion="movement")
trainer = Trainer(model, args, train_dataset=rows, callbacks=[pruning])
trainer.train()
trainer.save_model("trained")

trained = numprune.load("trained")
pruned = numprune.apply(pruning.plan, trained, numprune.calibration_rows("train.jsonl", trained))
numprune.save(pruned, "pruned")
"""

from numprune.schedules.gradual import GradualPruning

__all__ = ["GradualPruning"]
