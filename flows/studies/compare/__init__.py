"""Compare pruning methods on one model, one calibration text and one held-out text, with one command."""
