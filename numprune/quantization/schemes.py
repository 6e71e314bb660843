"""Number formats of quantized matrices."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from numprune.byte_budget import SchemeName
from numprune.errors import InputError

Method = Literal["gptq", "rtn"]
SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)
GROUP_SIZES = (32, 64, 128)  # supported by vLLM's kernels


@dataclass(frozen=True)
class Scheme:
    """A number format for the weights of Linear layers and, for some schemes, for their inputs.

    All formats are symmetric, without zero points.

    Attributes:
        name: `fp8`: weights and inputs in FP8 (e4m3); `w8a8`: both in 8-bit integers; `w4a16`: weights in 4-bit
            integers, inputs unquantized.
        group_size: channels of a row that share a scale, for `w4a16`; None: the whole row.

    Raises:
        InputError: the scheme does not support this group size.
    """

    name: SchemeName
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in SCHEMES:
            raise InputError(f"scheme is {self.name!r}; it must be one of {', '.join(SCHEMES)}")
        if self.group_size is None:
            return
        if self.name != "w4a16":
            raise InputError(f"group_size is {self.group_size}, but {self.name} has one scale per row; omit it")
        if self.group_size not in GROUP_SIZES:
            raise InputError(f"group_size is {self.group_size}; it must be one of {', '.join(map(str, GROUP_SIZES))}")

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return 4 if self.name == "w4a16" else 8

    @property
    def is_float(self) -> bool:
        """Whether the grid consists of FP8 numbers, not integers."""
        return self.name == "fp8"

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of quantized layers are rounded, too, with a scale for each token."""
        return self.name != "w4a16"

    def __str__(self) -> str:
        return self.name if self.group_size is None else f"{self.name}, groups of {self.group_size}"


def in_groups(name: str, group: int) -> Scheme:
    """Return a scheme for a target with this `quantization_group`. Raises InputError."""
    if name == "w4a16" and group not in GROUP_SIZES:
        raise InputError(
            f"quantization_group is {group}; for blocks in w4a16 it must be one of {', '.join(map(str, GROUP_SIZES))}"
        )
    return Scheme(cast(SchemeName, name), group if name == "w4a16" else None)


# One scheme for all blocks, or block name -> scheme; other blocks are not quantized.
BlockSchemes = Scheme | Mapping[str, Scheme]


def of_block(schemes: BlockSchemes, name: str) -> Scheme | None:
    """Return the scheme of the block of this name, or None if it is not quantized."""
    return schemes if isinstance(schemes, Scheme) else schemes.get(name)


def listed(schemes: Iterable[Scheme]) -> str:
    """Return the distinct names of the schemes, in words."""
    return " and ".join(sorted({str(scheme) for scheme in schemes}))
