"""The plan: which units every block keeps, and everything that is needed to know how it came about."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from numprune.errors import InputError
from numprune.target import Target

PLAN_FILE = "numprune_plan.json"
_MAXIMUM_BYTES = 256 << 20
_SHOWN = 12  # problems of a file that is something else

Index = Annotated[int, Field(ge=0)]


class BlockPlan(BaseModel):
    """One block's part of a plan.

    Attributes:
        units: it had.
        kept: of them, ascending; none: the block is skipped.
        damping: of the least squares that its consumer was fitted by; None where it was not fitted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    units: Index
    kept: list[Index]
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _indices(self) -> "BlockPlan":
        if any(a >= b for a, b in pairwise(self.kept)):
            raise ValueError("kept units must be strictly ascending")
        if self.kept and self.kept[-1] >= self.units:
            raise ValueError(f"unit {self.kept[-1]} is kept of only {self.units}")
        return self


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
        mlp_channels: kept in every layer.
        nats_per_token: what it costs the model by the blocks' error curves. They add up what the blocks lose, each
            refitted by itself, on the calibration rows: a price to rank by, not a forecast.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kv_groups: Index
    mlp_channels: Index
    nats_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Plan(BaseModel):
    """Units kept per block of one model, relative to that model before pruning.

    Attributes:
        version: 1 knows no `splits`.
        splits: that uniform allocation chose from: the one that was taken, then the others, the cheapest first. None
            where nothing was priced: only one split meets the ratio, the consumers are not refitted, or the allocation
            is another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1, 2] = 2
    family: str
    criterion: str
    allocation: str
    compensation: str
    ratio: float
    target: Target
    skips: bool
    damping: float
    seed: int
    calibration: Calibration
    splits: list[PricedSplit] | None = None
    blocks: dict[str, BlockPlan]

    @model_validator(mode="after")
    def _no_block_lost(self) -> "Plan":
        for name, block in self.blocks.items():
            if block.units and not block.kept and not self.skips:
                raise ValueError(f"{name} keeps no unit, although skips is false")
        return self

    def drawn(self, draw: Draw | None) -> "Plan":
        """Return this plan with what is known of its calibration rows' origin."""
        return self.model_copy(update={"calibration": self.calibration.model_copy(update={"draw": draw})})

    def units_kept(self) -> dict[str, int]:
        return {name: len(block.kept) for name, block in self.blocks.items()}

    def write(self, path: Path) -> None:
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
        raise InputError(f"plan {str(path)!r} is larger than {_MAXIMUM_BYTES} bytes")
    try:
        return Plan.model_validate_json(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [f"{'.'.join(map(str, item['loc']))[:80]}: {item['msg'][:200]}" for item in found[:_SHOWN]]
        problems += [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise InputError(f"plan {str(path)!r} is not valid: {'; '.join(problems)}") from None
