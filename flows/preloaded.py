"""What the processes of a run share: imported once, by the server that they are forked from (children.py).

A module that is missing here is imported again by every process that needs it.
"""

import gc
from importlib import import_module

from numprune.export.imports import leave_out_sklearn, uncollected

leave_out_sklearn()
with uncollected():
    for _name in (
        "numprune.flows.steps.prune",
        "numprune.flows.steps.evaluate",
        "numprune.flows.steps.prepare",
        "numprune.flows.chain",
        "numprune.flows.cli",  # the main module of most
    ):
        import_module(_name)
    gc.freeze()  # a collection in a child would write to, and so copy, what is shared
