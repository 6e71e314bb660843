"""The location of a block's units and members in its tensors.

A block is divided into units, and its units may be divided into members. A unit of attention is a KV group; its members
are the query heads that share the KV head. A unit of a sparse layer's experts is an expert; its members are its
channels. Units are removed individually. All remaining units keep the same number of members, each its own choice, so
that a pair of numbers gives the size of a block.

Sizes are also computed for models that are never loaded, so torch is imported only in functions of tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Size(NamedTuple):
    """The size of a block.

    Attributes:
        units: number of units.
        members: per unit; 1 if units are not divided.
    """

    units: int
    members: int = 1


GONE = Size(0)


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of a block.

    Attributes:
        units: (K,) indices, ascending.
        members: (K, M) indices inside each of these units, ascending.
    """

    units: "Tensor"
    members: "Tensor"

    @classmethod
    def whole(cls, units: "Tensor", members: int) -> "Kept":
        """Return `units` (K,), ascending, with all their `members`."""
        import torch

        return cls(units, torch.arange(members, device=units.device).repeat(len(units), 1))

    @property
    def size(self) -> Size:
        units, members = self.members.shape
        return Size(units, members) if units else GONE

    def to(self, device: "torch.device") -> "Kept":
        return Kept(self.units.to(device), self.members.to(device))


class Extent(NamedTuple):
    """The entries of a tensor's dimension that belong to each unit or, if `divided`, to each member."""

    entries: int
    divided: bool = False

    def of_unit(self, members: int) -> int:
        """Return the entries of a unit with this number of members."""
        return self.entries * members if self.divided else self.entries


@dataclass(frozen=True)
class Slice:
    """The location of a block's units in one stored tensor.

    Attributes:
        tensor: its name in the layer.
        dim: the dimension that the units divide.
        parts: the entries of `dim` that a unit owns in each part of the tensor.
        width: the size of the other dimension, the hidden size unless it is a `table`; None: there is no other.
        interleaved: all parts of a unit are adjacent; otherwise the first parts of all units come first.
        stacked: the first dimension of the tensor counts units, each with its own entries of `dim`.
        table: it is no matrix of a projection, and its other dimension is not the hidden size.
    """

    tensor: str
    dim: int
    parts: tuple[Extent, ...]
    width: int | None
    interleaved: bool = False
    stacked: bool = False
    table: bool = False

    def entries_per_unit(self, members: int) -> int:
        """Return the entries of `dim` that a unit with this number of members owns."""
        return sum(part.of_unit(members) for part in self.parts)

    @property
    def hidden_dim(self) -> int | None:
        """The dimension that is not divided among units, the hidden size, or None."""
        if self.width is None or self.table:
            return None
        return (3 if self.stacked else 1) - self.dim

    def parameters_per_unit(self, members: int) -> int:
        return self.entries_per_unit(members) * (1 if self.width is None else self.width)

    def shape(self, size: Size) -> tuple[int, ...]:
        """Return the shape of the tensor of a block of this size."""
        before: tuple[int, ...] = (size.units,) if self.stacked else ()
        entries = self.entries_per_unit(size.members) * (1 if self.stacked else size.units)
        if self.width is None:
            return (*before, entries)
        return (*before, entries, self.width) if self.dim == len(before) else (*before, self.width, entries)

    def by_entry(self, tensor: "Tensor") -> "Tensor":
        """Return a tensor of the block as (entries, …); for a stack, unit after unit."""
        return tensor.movedim(self.dim, 1).flatten(0, 1) if self.stacked else tensor.movedim(self.dim, 0)

    def cut(self, tensor: "Tensor", kept: Kept, of: Size) -> "Tensor":
        """Return the kept part of the tensor of a block of size `of`."""
        entries = self.entries(kept.to(tensor.device), of)
        if not self.stacked:
            return tensor.index_select(self.dim, entries)
        found = self.by_entry(tensor).index_select(0, entries)
        return found.unflatten(0, (len(kept.units), -1)).movedim(1, self.dim).contiguous()

    def entries(self, kept: Kept, of: Size, part: int | None = None) -> "Tensor":
        """Return the kept indices along `dim`, ascending, of a block of size `of`, in one part or in all.

        For a stack, the indices refer to `by_entry`.
        """
        import torch

        wanted: Sequence[int] = range(len(self.parts)) if part is None else (part,)
        found = []
        for index in wanted:
            extent, offset = self.parts[index], sum(before.of_unit(of.members) for before in self.parts[:index])
            if self.interleaved or self.stacked:
                stride, start = self.entries_per_unit(of.members), offset
            else:
                stride, start = extent.of_unit(of.members), offset * of.units
            first = start + kept.units[:, None] * stride  # (K, 1)
            if extent.divided:
                first = first + kept.members * extent.entries  # (K, M)
            found.append((first[..., None] + torch.arange(extent.entries, device=first.device)).flatten())
        return torch.cat(found).sort().values
