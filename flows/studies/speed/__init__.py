"""Time the work of pruning against straightforward implementations and against the dense forward pass."""
