"""The tasks of models, one file each: reading text, predictions, losses and metrics."""

from numprune.tasks.causal import CAUSAL
from numprune.tasks.task import MINIMUM_DOCUMENTS, Comparison, Predictions, Quality, Task, TaskName, TextTask

__all__ = ["CAUSAL", "MINIMUM_DOCUMENTS", "Comparison", "Predictions", "Quality", "Task", "TaskName", "TextTask"]
