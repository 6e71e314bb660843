"""Learned pruning: trained masks choose the units to keep."""

from numprune.learning.constraint import Counted
from numprune.learning.vib import LEARNING_RATE, SELECTION_ROWS, Learned, Record, Variant, check_learning, learn

__all__ = ["LEARNING_RATE", "SELECTION_ROWS", "Counted", "Learned", "Record", "Variant", "check_learning", "learn"]
