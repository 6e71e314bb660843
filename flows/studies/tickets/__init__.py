"""Lottery tickets: whether what pruning leaves trains better than the same shape with other weights or other units."""
