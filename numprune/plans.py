"""The plan: the units that every block keeps, and how they were chosen."""

from collections.abc import Sized
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from numprune.blocks import Anatomy, Block
from numprune.byte_budget import ByteBudget, SchemeName
from numprune.cache_budget import KvBudget, SequenceBudget
from numprune.errors import InputError
from numprune.hidden import Basis, narrowed
from numprune.refinement import Refinement
from numprune.shape import ShapeChoice
from numprune.slices import Kept, Size
from numprune.spans import with_windows
from numprune.target import Target
from numprune.time_budget import TimeBudget

if TYPE_CHECKING:
    from torch import Tensor

PLAN_FILE = "numprune_plan.json"
_MAXIMUM_BYTES = 256 << 20
_SHOWN = 12  # problems shown

Index = Annotated[int, Field(ge=0)]


def _is_none(value: object) -> bool:
    return value is None


def _is_zero(value: int) -> bool:
    return value == 0


def _is_empty(value: Sized) -> bool:
    return not len(value)


class BlockPlan(BaseModel):
    """The part of a plan for one block.

    Attributes:
        units: before pruning.
        members: of each unit before pruning: the query heads of a KV group; 1 if units are not divided.
        kept: indices of the kept units, ascending; empty: the block is skipped.
        kept_members: indices of the kept members of each kept unit, ascending, equally many for each; None: all.
        damping: of the least-squares fit of its consumer; None if it was not fitted.
        scheme: for later quantization, in groups of the target's size; None if no budget chose one, or the block stays
            in the stored precision.
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
        """Return the plan that keeps `kept` of a block."""
        return cls(
            units=block.units,
            members=block.members,
            kept=kept.units.tolist(),
            kept_members=kept.members.tolist() if kept.size.units and kept.size.members < block.members else None,
            damping=damping,
            scheme=scheme,
        )

    def to_kept(self) -> Kept:
        """Return the size of the block after pruning."""
        import torch

        units = torch.tensor(self.kept, dtype=torch.long)
        if self.kept_members is None:
            return Kept.whole(units, self.members)
        return Kept(units, torch.tensor(self.kept_members, dtype=torch.long).view(len(units), -1))


class Draw(BaseModel):
    """How calibration rows were drawn from a text.

    Attributes:
        text: the names of its files, or "embedded:train" for that split of the embedded text.
        seed: of the draw; with the same settings, tokenizer, number and length, it gives the same rows.
        split, chat: as in `documents.Reading`.
        packed: the rows are cut from all documents joined by EOS.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: list[str]
    seed: int
    split: str = "file"
    chat: bool = False
    packed: bool = False


class Calibration(BaseModel):
    """The calibration rows of a plan.

    Attributes:
        digest: of the tokens.
        rows: number of rows.
        sequence_length: tokens per row.
        draw: their origin; None if the caller did not state it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    rows: int
    sequence_length: int
    draw: Draw | None = None


class PricedSplit(BaseModel):
    """One way to split the ratio between attention and MLPs, considered by uniform allocation.

    Attributes:
        kv_groups: kept in every layer.
        query_heads: kept in every KV group; None in plans without that choice.
        mlp_channels: kept in every layer; in stages, in those of the first.
        nats_per_token: its cost by the blocks' error curves: the summed losses of the blocks on the calibration rows,
            each refitted by itself. It ranks splits and does not predict the loss.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kv_groups: Index
    query_heads: Index | None = None
    mlp_channels: Index
    nats_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class HiddenPlan(BaseModel):
    """The coordinates of the residual stream that are kept, in every tensor that reads or writes it.

    Attributes:
        size: the hidden size before pruning.
        kept: their indices, ascending.
        basis: `coordinates`: they are the model's own; `fisher`: they are directions in the order of basis.py, which
            are found again on the calibration rows when the plan is followed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Index
    kept: Annotated[list[Index], Field(min_length=1)]
    basis: Basis = "coordinates"

    @model_validator(mode="after")
    def _indices(self) -> "HiddenPlan":
        if any(a >= b for a, b in pairwise(self.kept)):
            raise ValueError("kept coordinates must be strictly ascending")
        if self.kept[-1] >= self.size:
            raise ValueError(f"coordinate {self.kept[-1]} is kept of only {self.size}")
        if self.basis == "fisher" and self.kept != list(range(len(self.kept))):
            raise ValueError('of the basis "fisher", the first directions must be kept')
        return self


class Price(BaseModel):
    """What the sizes, and the schemes, cost that a budget chose.

    Attributes:
        nats_per_token: by the blocks' error curves, as for a split: it ranks choices and does not predict the loss.
        bound_nats_per_token: the optimum of the linear relaxation: no choice within the budget costs less.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    nats_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bound_nats_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    def __str__(self) -> str:
        price, bound = self.nats_per_token, self.bound_nats_per_token
        share = f" ({price / bound - 1:.2%})" if bound else ""
        return f"{price:.4g} nats per token, at most {max(0.0, price - bound):.2g}{share} above the lowest possible"


class DroppedLayer(BaseModel):
    """A layer that is removed as a whole.

    Attributes:
        layer: its index in the model before pruning.
        divergence: of the predictions from the dense model's without this layer and those dropped before it, on a few
            calibration rows and without refitting: KL divergence in the unit of the task's loss, or 1 - cosine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Index
    divergence: Annotated[float, Field(allow_inf_nan=False)]


class DroppedBlock(BaseModel):
    """An attention block or MLP that is removed as a whole because of `drop_blocks`.

    Attributes:
        block: its name.
        divergence: as for a layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: str
    divergence: Annotated[float, Field(allow_inf_nan=False)]


class WindowedLayer(BaseModel):
    """A layer that gets a window.

    Attributes:
        layer: its index in the model before pruning.
        divergence: of the predictions from the dense model's with windows in this layer and those chosen before it, on
            a few calibration rows, in the unit of the task's loss.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Index
    divergence: Annotated[float, Field(allow_inf_nan=False)]


class Plan(BaseModel):
    """What is kept of each block of a model, relative to the model before pruning.

    Attributes:
        version: version 1 has no `splits`; version 2 has no members, axes, protection, dropped layers or `base`.
        budget: that chose sizes and schemes; None: the plan has no schemes.
        time_budget, kv_budget: that chose sizes, together with `budget` if it is given; None: they limit nothing.
        sequence_budget: that chose how many layers get a window.
        price: of what the budgets chose; None without a budget, or if a search or masks chose something else.
        base: digest of the checkpoint for which the plan was made; None: unknown, or removed to apply it to another.
        window: tokens that some layers see in the result; None: they see as many as before.
        window_layers: how many were asked for; 0: as many as `sequence_budget` needs.
        windowed: these layers, in the order in which they were chosen; the other layers see as many as before.
        window_prices: layer -> divergence with a window in this layer alone, for all that had none.
        dropped: the removed layers, in the order in which they were chosen; their blocks keep no unit. The other layers
            are renumbered in the result, but not here.
        dropped_blocks: the removed blocks, in the order in which they were chosen.
        hidden: None: the hidden size stays.
        shape: how hidden size and number of layers were chosen; None: there were no candidates.
        splits: considered by uniform allocation: first the chosen one, then the others, cheapest first. None if nothing
            was
            priced: only one split meets the ratio, the consumers are not refitted, or the allocation is another.
        refinement: of the sizes, by search; None: they were not refined.
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
    time_budget: TimeBudget | None = Field(default=None, exclude_if=_is_none)
    kv_budget: KvBudget | None = Field(default=None, exclude_if=_is_none)
    sequence_budget: SequenceBudget | None = Field(default=None, exclude_if=_is_none)
    price: Price | None = Field(default=None, exclude_if=_is_none)
    drop_layers: Index = 0
    drop_blocks: Index = Field(default=0, exclude_if=_is_zero)
    window: Annotated[int, Field(ge=1)] | None = Field(default=None, exclude_if=_is_none)
    window_layers: Index = Field(default=0, exclude_if=_is_zero)
    damping: float
    seed: int
    calibration: Calibration
    dropped: list[DroppedLayer] = []
    dropped_blocks: list[DroppedBlock] = Field(default=[], exclude_if=_is_empty)
    windowed: list[WindowedLayer] = Field(default=[], exclude_if=_is_empty)
    window_prices: dict[Index, float] = Field(default={}, exclude_if=_is_empty)
    hidden: HiddenPlan | None = Field(default=None, exclude_if=_is_none)
    shape: ShapeChoice | None = Field(default=None, exclude_if=_is_none)
    splits: list[PricedSplit] | None = None
    refinement: Refinement | None = Field(default=None, exclude_if=_is_none)
    blocks: dict[str, BlockPlan]

    @model_validator(mode="after")
    def _no_block_lost(self) -> "Plan":
        dropped, alone = tuple(f"layers.{layer}." for layer in self.dropped_layers()), self.names_of_dropped_blocks()
        for name, block in self.blocks.items():
            if name.startswith(dropped) or name in alone:
                if block.kept:
                    raise ValueError(
                        f"{name} keeps units, although {'it' if name in alone else 'its layer'} is dropped"
                    )
            elif block.units and not block.kept and not self.skips:
                raise ValueError(f"{name} keeps no unit, although skips is false")
        return self

    def drawn(self, draw: Draw | None, base: str | None = None) -> "Plan":
        """Return this plan with the origin of its calibration rows and the digest of the model."""
        calibration = self.calibration.model_copy(update={"draw": draw})
        return self.model_copy(update={"calibration": calibration, "base": base})

    def dropped_layers(self) -> list[int]:
        """Return the indices of the dropped layers, in the order in which they were chosen."""
        return [drop.layer for drop in self.dropped]

    def windowed_layers(self) -> list[int]:
        """Return the indices of the layers that get a window, in the order in which they were chosen."""
        return [one.layer for one in self.windowed]

    @property
    def all_dropped(self) -> list["DroppedLayer | DroppedBlock"]:
        return [*self.dropped, *self.dropped_blocks]

    def names_of_dropped_blocks(self) -> list[str]:
        """Return the names of the dropped blocks, in the order in which they were chosen."""
        return [drop.block for drop in self.dropped_blocks]

    def coordinates(self) -> "Tensor | None":
        """Return the kept coordinates of the residual stream, or None: all."""
        import torch

        return None if self.hidden is None else torch.tensor(self.hidden.kept, dtype=torch.long)

    def result(self, anatomy: Anatomy) -> Anatomy:
        """Return the anatomy after pruning."""
        spanning = anatomy if self.window is None else with_windows(anatomy, self.window, self.windowed_layers())
        left = spanning.keeping(self.sizes()).without(self.dropped_layers())
        return narrowed(left, len(self.hidden.kept), self.hidden.basis) if self.hidden else left

    def sizes(self) -> dict[str, Size]:
        """Return the size of each block after pruning, by name."""
        return {name: block.to_kept().size for name, block in self.blocks.items()}

    @property
    def limits(self) -> list[str]:
        """What the result must stay within: every budget, and the ratio if none of them determines sizes."""
        found = [f"budget {self.budget.limit:,} bytes"] if self.budget else []
        found += [f"budget {self.time_budget.described}"] if self.time_budget else []
        found += [f"budget {self.kv_budget}"] if self.kv_budget else []
        found = found or [f"ratio {self.ratio:g}"]
        return found + ([f"budget {self.sequence_budget}"] if self.sequence_budget else [])

    def schemes(self) -> dict[str, SchemeName]:
        """Return the scheme of each block to be quantized, by name."""
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
