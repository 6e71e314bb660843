"""What may be pruned in a model: the axes, and the protected parts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.families import Kind
from numprune.slices import GONE, Size


class Axis(NamedTuple):
    """The units of all blocks of a kind, or the members of these units.

    `scores`: only of blocks whose members are dimensions of queries and keys, or only of others; None: of all.
    """

    kind: Kind
    part: Literal["units", "members"]
    scores: bool | None = None


AXES: dict[str, Axis] = {
    "kv-groups": Axis("attention", "units"),
    "query-heads": Axis("attention", "members", scores=False),
    "qk-dims": Axis("attention", "members", scores=True),
    "channels": Axis("mlp", "units"),
    "experts": Axis("experts", "units"),
    "expert-channels": Axis("experts", "members"),
}
HIDDEN_SIZE = "hidden-size"  # the axis of the whole model: coordinates of the residual stream
DEFAULT_AXES = ("kv-groups", "channels", "experts", "expert-channels")

_LAYER = re.compile(r"layers\.(-?\d{1,6})(?:\.(\w+))?")


@dataclass(frozen=True)
class Limits:
    """What pruning may remove.

    Attributes:
        axes: what may be pruned, names of `AXES` or HIDDEN_SIZE.
        keep: what is not pruned: layers (`layers.0`, `layers.-1`), blocks (`layers.0.mlp`), or all blocks of a kind.
        floors: kind of block -> the smallest share of its units, and of all their members, that each such block keeps.
        skips: a block may also lose all its units; its layer then passes the residual stream through.
    """

    axes: Sequence[str] = DEFAULT_AXES
    keep: Sequence[str] = ()
    floors: Mapping[str, float] = field(default_factory=dict)
    skips: bool = False

    def check(self, anatomy: Anatomy) -> None:
        """Refuse names and shares that are not valid for this model. Raises InputError with the valid ones."""
        known = (*AXES, HIDDEN_SIZE)
        for name in self.axes:
            if name not in known:
                raise InputError(f"axes: {name!r} is unknown; choose from {', '.join(known)}")
        if not self.axes:
            raise InputError(f"axes: nothing may be pruned; choose from {', '.join(known)}")
        for kind, share in self.floors.items():
            if kind not in anatomy.kinds:
                raise InputError(f"floors: {kind!r} is unknown; the model's blocks are {' and '.join(anatomy.kinds)}")
            if not 0 <= share <= 1:
                raise InputError(f"floors: {kind} is {share}; it must be between 0 and 1")
        self.protected(anatomy)

    def protected(self, anatomy: Anatomy) -> frozenset[str]:
        """Return the names of the protected blocks.

        Raises:
            InputError: `keep` names something that the model does not have.
        """
        return frozenset(block.name for name in self.keep for block in _named(name, anatomy))

    def allows(self, block: Block, size: Size, protected: frozenset[str]) -> bool:
        """Return whether the block may have this size; `protected` blocks must not become smaller."""
        if size == block.size:
            return True
        floor = self.floors.get(block.kind, 0.0)
        if block.name in protected or size.units * size.members < floor * block.units * block.members:
            return False
        if size == GONE:
            return self.skips
        return (size.units == block.units or self.takes(block, "units")) and (
            size.members == block.members or self.takes(block, "members")
        )

    def takes(self, block: Block, part: Literal["units", "members"]) -> bool:
        """Return whether an axis prunes this part of the block, its units or its members."""
        axes = (AXES[name] for name in self.axes if name in AXES)
        return any(axis[:2] == (block.kind, part) and axis.scores in (None, bool(block.scores)) for axis in axes)


def _named(name: str, anatomy: Anatomy) -> tuple[Block, ...]:
    """Return the blocks that an entry of `keep` names."""
    if name in anatomy.kinds:
        return anatomy.of_kind(name)
    kinds = " or ".join(anatomy.kinds)
    match = _LAYER.fullmatch(name)
    if match is None:
        raise InputError(
            f"keep: {name!r} is unknown; it must be a layer (layers.0), a block (layers.0.mlp), or {kinds}"
        )
    index, kind = int(match[1]), match[2]
    if not -anatomy.layers <= index < anatomy.layers:
        raise InputError(f"keep: {name!r} is unknown; the model has layers.0 to layers.{anatomy.layers - 1}")
    blocks = tuple(block for block in anatomy.of_layer(index % anatomy.layers) if kind in (None, block.kind))
    if not blocks:
        raise InputError(f"keep: {name!r} is unknown; the blocks of a layer are {kinds}")
    return blocks
