"""The architectures that numprune knows, a file for each. docs/adding-an-architecture.md shows how to add one."""

from numprune.families.family import Family, Kind, Matrix, Wiring
from numprune.families.llama import LLAMA
from numprune.families.mistral import MISTRAL
from numprune.families.qwen2 import QWEN2
from numprune.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

__all__ = ["FAMILIES", "Family", "Kind", "Matrix", "Wiring"]
