"""Pruning methods side by side on one model, one calibration text and one held-out text, in one command."""
