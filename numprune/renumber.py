"""Renumber the remaining layers after others are dropped, in tensor names and in the configuration."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from numprune.families.family import Family, PerLayer

T = TypeVar("T")

# transformers refuses a configuration whose list does not have one entry per layer.
_OF_ANY_FAMILY: Mapping[str, PerLayer] = {"layer_types": "entry"}


def layers_left(layers: int, dropped: Collection[int]) -> list[int]:
    """Return the indices of the remaining layers out of `layers`: the n-th of them becomes layer n."""
    return [layer for layer in range(layers) if layer not in dropped]


def renumber_tensors(named: Mapping[str, T], path: str, dropped: Collection[int]) -> dict[str, T]:
    """Return `named` (full tensor name -> anything) under the new names, without the dropped layers' tensors.

    `path`: of the layers in the model.
    """
    prefix, renumbered = f"{path}.", {}
    for name, value in named.items():
        if name.startswith(prefix):
            number, _, inside = name.removeprefix(prefix).partition(".")
            if int(number) in dropped:
                continue
            name = f"{prefix}{_new_number(int(number), dropped)}.{inside}"
        renumbered[name] = value
    return renumbered


def renumber_fields(family: Family, fields: Mapping[str, Any], dropped: Collection[int]) -> dict[str, Any]:
    """Return the per-layer fields of the configuration after dropping layers.

    Args:
        family: of the model.
        fields: all fields of the configuration; those that are None stay None.
        dropped: layers; must be empty if a layer computes with its own index (`numbering_field`).
    """
    renumbered: dict[str, Any] = {}
    for name, says in {**_OF_ANY_FAMILY, **family.per_layer}.items():
        value = fields.get(name)
        if value is not None and says == "entry":
            renumbered[name] = [value[layer] for layer in layers_left(len(value), dropped)]
        elif value is not None and says == "first":
            renumbered[name] = _new_number(value, dropped)
        elif value is not None and says == "layers":
            renumbered[name] = [_new_number(layer, dropped) for layer in value if layer not in dropped]
    return renumbered


def numbering_field(family: Family, config: Any) -> str | None:
    """Return the field that makes each layer compute with its own index (no layer can be dropped), or None."""
    for name, says in family.per_layer.items():
        value = getattr(config, name)
        if (says == "index" and value) or (says == "step" and value != 1):
            return name
    return None


def _new_number(layer: int, dropped: Collection[int]) -> int:
    return layer - sum(other < layer for other in dropped)
