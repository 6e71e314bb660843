"""The tensors of a checkpoint, by name and shape, as its configuration says. torch is not needed.

A checkpoint names some tensors otherwise than the model in transformers does, and may store in parts what the model has
in one tensor (the experts of a layer), or as one what it has in two (DINOv2's gates and up projections).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numprune.anatomy import family_of, model_prefix, read_anatomy
from numprune.blocks import Anatomy, Block
from numprune.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorTable:
    """The tensors of a checkpoint.

    Attributes:
        shapes: of every tensor by name, tied ones included.
        tied: name of a tensor that need not be stored -> the one that it equals.
        linear: names of the weights of Linear layers.
        parts: name of a tensor in the model, tied ones included -> the names of what it is stored as, in order.
        base: what names begin with, but not where the model was stored without a head.
    """

    shapes: Mapping[str, Shape]
    tied: Mapping[str, str]
    linear: frozenset[str]
    parts: Mapping[str, tuple[str, ...]]
    base: str


def tensor_table(config: "PreTrainedConfig") -> TensorTable:
    """Return the tensors that a checkpoint with this configuration must have. Raises InputError as `read_anatomy`."""
    family, anatomy, prefix = family_of(config), read_anatomy(config), model_prefix(config)
    tied = _tied(family, anatomy, f"{prefix}{family.embedding}.weight")
    around = {**anatomy.around, **{name: anatomy.around[source] for name, source in tied.items()}}
    parts: dict[str, dict[str, Shape]] = {name: {family.stored_name(name): shape} for name, shape in around.items()}
    embeddings = {f"{prefix}{name}" for name in (*family.around, f"{family.embedding}.weight")}
    embeddings |= {f"{prefix}{family.positions[0]}.weight"} if family.positions else set()
    linear = {name for name, shape in around.items() if len(shape) == 2 and name.endswith(".weight")} - embeddings
    for block in anatomy.blocks:
        for name, shape in block.tensors().items():
            parts[f"{block.path}.{name}"] = _parts(family, block, name, shape)
            matrix = len(shape) == 2 and name.endswith(".weight")
            if matrix and block.routing is None and not family.transposed:
                linear.add(f"{block.path}.{name}")
    return TensorTable(
        shapes=_stacked(parts.values()),
        tied={family.stored_name(name): family.stored_name(source) for name, source in tied.items()},
        linear=frozenset(name for part in linear for name in parts[part]),
        parts={name: tuple(stored) for name, stored in parts.items()},
        base=f"{family.prefix or family.layers.partition('.')[0]}.",
    )


def _stacked(parts: Iterable[Mapping[str, Shape]]) -> dict[str, Shape]:
    """Return the shape of each stored tensor; what several tensors of the model are stored as has the rows of all."""
    shapes: dict[str, Shape] = {}
    for stored in parts:
        for name, (rows, *others) in stored.items():
            shapes[name] = (rows + shapes[name][0] if name in shapes else rows, *others)
    return shapes


def _parts(family: Family, block: Block, name: str, shape: Shape) -> dict[str, Shape]:
    """Return what a tensor of a block, called `name` in its layer, is stored as: names and shapes."""
    experts = family.experts
    if block.routing is None or experts is None or experts.stored is None:
        return {family.stored_name(f"{block.path}.{name}"): shape}
    gate, up, down = experts.stored
    names = {f"{experts.module}.{experts.writer}": (gate, up), f"{experts.module}.{experts.reader}": (down,)}
    if name not in names:
        return {family.stored_name(f"{block.path}.{name}"): shape}
    count, rows, columns = shape
    return {
        family.stored_name(f"{block.path}.{experts.module}.{expert}.{part}.weight"): (rows // len(names[name]), columns)
        for part in names[name]
        for expert in range(count)
    }


def _tied(family: Family, anatomy: Anatomy, embedding: str) -> dict[str, str]:
    """Return the tensors of the head that are tied -> what they equal: the embedding, or the bias of the head."""
    if anatomy.task not in ("causal-lm", "masked-lm"):
        return {}
    missing = {name: fields for name, fields in family.untied.items() if name not in anatomy.around}
    biases: dict[tuple[str, ...], str] = {}
    biases |= {fields: name for name, fields in family.heads_of.get(anatomy.task, {}).items() if len(fields) == 1}
    return {name: embedding if len(fields) == 2 else biases[fields] for name, fields in missing.items()}
