"""What models are for, a file for each task: reading text, predictions, losses and metrics."""

from numprune.tasks.causal import CAUSAL
from numprune.tasks.task import MINIMUM_DOCUMENTS, Comparison, Predictions, Quality, Task, TaskName

__all__ = ["CAUSAL", "MINIMUM_DOCUMENTS", "Comparison", "Predictions", "Quality", "Task", "TaskName"]
