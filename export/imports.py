"""Imports of large libraries."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Disable garbage collection in the body: large imports create no garbage, and collecting is slow."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def leave_out_torch() -> None:
    """Have every import of torch fail from now on, so that transformers reads configurations without it.

    That is far faster, and transformers supports it, but has no setting for it. For a process of our own that builds no
    model; where torch is imported already, nothing is left to gain and nothing is done.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment] # as the import system defines
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no torch


def leave_out_sklearn() -> None:
    """Have transformers do without scikit-learn, which it imports, with pandas, for assisted generation alone.

    For a process of our own. The lm-evaluation-harness needs it: call `bring_back_sklearn` before importing that.
    """
    if "sklearn" not in sys.modules:
        sys.modules["sklearn"] = None  # type: ignore[assignment] # as in leave_out_torch


def bring_back_sklearn() -> None:
    """Undo `leave_out_sklearn`; what transformers imported without it stays so."""
    if sys.modules.get("sklearn", ...) is None:
        del sys.modules["sklearn"]
