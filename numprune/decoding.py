"""Pictures of an image's codes."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Decoder(Protocol):
    """Draws images from their codes.

    Attributes:
        side: pixels of a side of its pictures, which are square.
    """

    @property
    def side(self) -> int: ...

    def pictures(self, codes: Tensor) -> Tensor:
        """Return (n, 3, side, side) uint8 of codes (n, L) int64, in raster order."""
        ...


@dataclass(frozen=True)
class Palette:
    """Draws each code as a pixel of its colour.

    Attributes:
        colours: (codes, 3) uint8.
        side: of an image, in codes.
    """

    colours: Tensor
    side: int

    def pictures(self, codes: Tensor) -> Tensor:
        """Return (n, 3, side, side) uint8 of codes (n, L) int64."""
        return self.colours[codes].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2).contiguous()
