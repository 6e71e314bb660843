"""Checks of a recipe against files, model and runtimes: everything that can be known before any work.

`recipe` runs them all and reports every problem together; the other modules are named after what they check.
"""
