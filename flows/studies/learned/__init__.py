"""Compare learned masks with training-free pruning: quality at equal sizes, training tokens and time."""
