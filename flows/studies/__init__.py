"""Measurements that the documentation reports: methods and rivals side by side, speed, error rates, serving, memory.

No production stage depends on this package, so an edit here invalidates none.
"""
