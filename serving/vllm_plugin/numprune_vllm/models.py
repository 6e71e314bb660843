"""Models whose layers differ, by their names in config.json. vLLM imports this; `register` never does."""

from functools import cache
from typing import Any

from numprune_vllm.architectures import ARCHITECTURES
from numprune_vllm.backend import PerLayerBackend
from numprune_vllm.native import native_class


@cache
def __getattr__(name: str) -> Any:
    """Create a family's class on demand, so that only this one of vLLM's model modules is imported."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    family = ARCHITECTURES[name]
    return native_class(name, family) if family.vllm.native else PerLayerBackend
