"""Lottery tickets: do the units that pruning keeps train better than random units, or than new weights?"""
