"""Refining the sizes of a plan by search: plans of the same budget are compared by their measured divergence.

The knapsack of allocation `error` adds up the prices of blocks. A (1+8) search starts from its plan and switches sizes
between two blocks at a time (space.py), as EvoPress does (Sieberling et al. 2024, arXiv 2410.14649). Plans are compared
by successive halving on a few calibration rows (evolution.py), with weights that are refitted to the dense model's
inputs (levels.py), by the divergence of their predictions from the dense model's (divergence.py). The best plan
replaces the knapsack's only if rows that had no part in the search confirm it (refine.py).
"""
