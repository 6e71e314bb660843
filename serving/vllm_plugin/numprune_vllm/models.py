"""Models whose layers differ, by the names that config.json gives. vLLM imports this, never `register`."""

from functools import cache
from typing import Any

from numprune_vllm.architectures import ARCHITECTURES
from numprune_vllm.backend import PerLayerBackend
from numprune_vllm.native import native_class


@cache
def __getattr__(name: str) -> Any:
    """Make a family's class when vLLM asks for it, so that of vLLM's models only this one's module is imported."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    family = ARCHITECTURES[name]
    return native_class(name, family) if family.vllm.native else PerLayerBackend
