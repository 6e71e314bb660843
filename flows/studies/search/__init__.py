"""Sizes by the knapsack, by search from there, and by a reinforcement-learning agent, on the same budget."""
