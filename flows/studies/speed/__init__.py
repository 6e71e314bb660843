"""How long pruning's own work takes, beside the straightforward way to do it and beside the dense forward pass."""
