"""The measurements reported in the documentation: methods and rivals side by side, speed, error rates, serving, memory.

No production stage depends on this package, so a change here invalidates none.
"""
