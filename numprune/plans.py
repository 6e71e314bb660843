"""The plan: which units every block keeps, and everything that is needed to know how it came about."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from numprune.blocks import Block
from numprune.byte_budget import ByteBudget, SchemeName
from numprune.errors import InputError
from numprune.slices import Kept, Size
from numprune.target import Target

PLAN_FILE = "numprune_plan.json"
_MAXIMUM_BYTES = 256 << 20
_SHOWN = 12  # problems of a file that is something else

Index = Annotated[int, Field(ge=0)]


def _is_none(value: object) -> bool:
    return value is None


class BlockPlan(BaseModel):
    """One block's part of a plan.

    Attributes:
        units: it had.
        members: that each unit had: the query heads of a KV group; 1 where units are not divided.
        kept: units, ascending; none: the block is skipped.
        kept_members: of each unit kept, ascending, as many of each; None: all.
        damping: of the least squares that its consumer was fitted by; None where it was not fitted.
        scheme: that it is to be quantized to, in groups of the target's size; None where no budget chose one, or the
            block stays in the stored precision.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    units: Index
    members: Annotated[int, Field(ge=1)] = 1
    kept: list[Index]
    kept_members: list[Annotated[list[Index], Field(min_length=1)]] | None = None
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    scheme: SchemeName | None = Field(default=None, exclude_if=_is_none)

    @model_validator(mode="after")
    def _indices(self) -> "BlockPlan":
        if any(a >= b for a, b in pairwise(self.kept)):
            raise ValueError("kept units must be strictly ascending")
        if self.kept and self.kept[-1] >= self.units:
            raise ValueError(f"unit {self.kept[-1]} is kept of only {self.units}")
        if self.kept_members is None:
            return self
        if len(self.kept_members) != len(self.kept) or len({len(members) for members in self.kept_members}) > 1:
            raise ValueError("kept_members must be lists of one length, one for each unit kept")
        for unit, members in zip(self.kept, self.kept_members, strict=True):
            if any(a >= b for a, b in pairwise(members)):
                raise ValueError(f"kept members of unit {unit} must be strictly ascending")
            if members[-1] >= self.members:
                raise ValueError(f"member {members[-1]} of unit {unit} is kept of only {self.members}")
        return self

    @classmethod
    def of(cls, block: Block, kept: Kept, damping: float | None, scheme: SchemeName | None = None) -> "BlockPlan":
        """Return the plan that leaves a block with `kept`."""
        return cls(
            units=block.units,
            members=block.members,
            kept=kept.units.tolist(),
            kept_members=kept.members.tolist() if kept.size.units and kept.size.members < block.members else None,
            damping=damping,
            scheme=scheme,
        )

    def to_kept(self) -> Kept:
        """Return what the block is left with."""
        import torch

        units = torch.tensor(self.kept, dtype=torch.long)
        if self.kept_members is None:
            return Kept.whole(units, self.members)
        return Kept(units, torch.tensor(self.kept_members, dtype=torch.long).view(len(units), -1))


class Draw(BaseModel):
    """How calibration rows came out of a text.

    Attributes:
        text: the names of its files, or "embedded:train" for that split of the embedded text.
        seed: of the draw; with all the rest, the same tokenizer, number and length it gives the same rows.
        split, chat: as of `documents.Reading`.
        packed: the rows are of all documents joined by EOS.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: list[str]
    seed: int
    split: str = "file"
    chat: bool = False
    packed: bool = False


class Calibration(BaseModel):
    """The rows of tokens that the plan was made on.

    Attributes:
        digest: of the tokens.
        rows: how many.
        sequence_length: tokens of each.
        draw: where they are from; None where whoever pruned gave rows and did not say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    rows: int
    sequence_length: int
    draw: Draw | None = None


class PricedSplit(BaseModel):
    """One way to split the ratio between attention and MLPs that uniform allocation had to choose from.

    Attributes:
        kv_groups: kept in every layer.
        query_heads: kept in every KV group; None in plans that know of no such choice.
        mlp_channels: kept in every layer.
        nats_per_token: what it costs the model by the blocks' error curves. They add up what the blocks lose, each
            refitted by itself, on the calibration rows: a price to rank by, not a forecast.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kv_groups: Index
    query_heads: Index | None = None
    mlp_channels: Index
    nats_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DroppedLayer(BaseModel):
    """A layer that is gone as a whole.

    Attributes:
        layer: its number in the model before pruning.
        divergence: of the predictions without it and those dropped before it from the dense model's, on a few
            calibration rows, before anything is refitted: KL divergence in the unit of the task's loss, or 1 - cosine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Index
    divergence: Annotated[float, Field(allow_inf_nan=False)]


class Plan(BaseModel):
    """What is kept of each block of one model, relative to that model before pruning.

    Attributes:
        version: 1 knows no `splits`, 2 no members, axes and protection, no dropped layers and no `base`.
        budget: that chose sizes and schemes; None: the ratio chose the sizes, and the plan has no schemes.
        base: digest of the checkpoint that it was made for; None: not known, or removed to have it applied to another.
        dropped: the layers that are gone, in the order in which they were chosen; their blocks keep no unit. The others
            are renumbered in the result, and not here.
        splits: that uniform allocation chose from: the one that was taken, then the others, the cheapest first. None
            where nothing was priced: only one split meets the ratio, the consumers are not refitted, or the allocation
            is another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1, 2, 3] = 3
    base: str | None = None
    family: str
    criterion: str
    allocation: str
    compensation: str
    ratio: float
    target: Target
    axes: list[str] = ["kv-groups", "channels"]
    keep: list[str] = []
    floors: dict[str, float] = {}
    skips: bool
    budget: ByteBudget | None = Field(default=None, exclude_if=_is_none)
    drop_layers: Index = 0
    damping: float
    seed: int
    calibration: Calibration
    dropped: list[DroppedLayer] = []
    splits: list[PricedSplit] | None = None
    blocks: dict[str, BlockPlan]

    @model_validator(mode="after")
    def _no_block_lost(self) -> "Plan":
        dropped = tuple(f"layers.{layer}." for layer in self.dropped_layers())
        for name, block in self.blocks.items():
            if name.startswith(dropped):
                if block.kept:
                    raise ValueError(f"{name} keeps units, although its layer is dropped")
            elif block.units and not block.kept and not self.skips:
                raise ValueError(f"{name} keeps no unit, although skips is false")
        return self

    def drawn(self, draw: Draw | None, base: str | None = None) -> "Plan":
        """Return this plan with what is known of its calibration rows' origin, and of the model."""
        calibration = self.calibration.model_copy(update={"draw": draw})
        return self.model_copy(update={"calibration": calibration, "base": base})

    def dropped_layers(self) -> list[int]:
        """Return the numbers of the layers that are gone, in the order in which they were chosen."""
        return [drop.layer for drop in self.dropped]

    def sizes(self) -> dict[str, Size]:
        """Return the size that is left of each block, by its name."""
        return {name: block.to_kept().size for name, block in self.blocks.items()}

    def schemes(self) -> dict[str, SchemeName]:
        """Return the scheme of each block that is to be quantized, by its name."""
        return {name: block.scheme for name, block in self.blocks.items() if block.scheme is not None}

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_plan(path: Path) -> Plan:
    """Return the validated plan in `path`.

    Raises:
        InputError: the file is missing, too large, or not a plan; every problem with its field.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAXIMUM_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"plan {str(path)!r} does not exist") from None
    if len(raw) > _MAXIMUM_BYTES:
        raise InputError(f"plan {str(path)!r} exceeds the {_MAXIMUM_BYTES:,}-byte limit")
    try:
        return Plan.model_validate_json(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [f"{'.'.join(map(str, item['loc']))[:80]}: {item['msg'][:200]}" for item in found[:_SHOWN]]
        problems += [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise InputError(f"plan {str(path)!r} is not valid: {'; '.join(problems)}") from None
