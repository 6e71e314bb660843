"""Measured latencies of a model's blocks: the table that `numprune timings` writes.

The time of a block of one size is the difference between models with one and with R copies of it, divided by R - 1
(as in NVIDIA's ModelOpt, puzzletron). What remains of the model with one copy is the time around the blocks:
embeddings, head, and the fixed cost of a step. Only measured sizes have a time; nothing is interpolated, because
latencies have steps and need not be monotone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from numprune.axes import DEFAULT_AXES, Limits
from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.families import Kind
from numprune.slices import Size
from numprune.target import Target, allowed_sizes

_MAXIMUM_BYTES = 16 << 20
_SHOWN = 6  # problems or sizes shown

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Time(_Part):
    """A median in milliseconds with its 95 % bootstrap interval."""

    ms: Milliseconds
    interval95: tuple[float, float]


class BlockTime(Time):
    """The time of one block of this size."""

    units: Count
    members: Count

    @property
    def size(self) -> Size:
        return Size(self.units, self.members)


class ScenarioTimes(_Part):
    """The times of one scenario, in its notation: around the blocks, and of a block by kind and size."""

    scenario: str
    around: Time
    blocks: dict[str, list[BlockTime]]


class Shape(_Part):
    """What blocks of equal size have to share to take the same time."""

    family: str
    hidden_size: int
    head_dim: int
    vocabulary: int
    sliding_window: int | None


class Key(_Part):
    """What the times are valid for.

    Attributes:
        device: name of the CPU or GPU.
        quantization: scheme of the weights; "none".
        shape: of the model's layers.
    """

    runtime: Annotated[str, Field(pattern=r"^(torch|onnxruntime)$")]
    versions: dict[str, str]
    device: str
    threads: int
    dtype: str
    quantization: str
    tensor_parallel: int
    shape: Shape


class TimingTable(_Part):
    """The measured times of a model's blocks.

    Attributes:
        copies: kind of block -> R.
        visits: measurements of each model, in random order.
        drift: scenario -> time of the largest model at the end of the run, relative to the start.
    """

    version: Literal["numprune/timings/1"] = "numprune/timings/1"
    key: Key
    copies: dict[str, Annotated[int, Field(ge=2)]]
    visits: Count
    drift: dict[str, float]
    scenarios: Annotated[list[ScenarioTimes], Field(min_length=1)]

    def times(self, scenario: str) -> ScenarioTimes:
        """Return the times of a scenario. Raises InputError with the measured ones."""
        for times in self.scenarios:
            if times.scenario == scenario:
                return times
        known = ", ".join(times.scenario for times in self.scenarios)
        raise InputError(f"timings: {scenario} was not measured; measured are {known}; run numprune timings for it")

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def read_timings(path: Path) -> TimingTable:
    """Return the table in a file. Raises InputError."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAXIMUM_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"timings {path}: no such file; run numprune timings MODEL --out {path}") from None
    if len(raw) > _MAXIMUM_BYTES:
        raise InputError(f"timings {path}: exceeds the {_MAXIMUM_BYTES:,}-byte limit")
    try:
        return TimingTable.model_validate_json(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [f"{'.'.join(map(str, item['loc']))[:80]}: {item['msg'][:200]}" for item in found[:_SHOWN]]
        raise InputError(f"timings {path}: not a table of numprune timings: {'; '.join(problems)}") from None


def shape_of(anatomy: Anatomy) -> Shape:
    return Shape(
        family=anatomy.family,
        hidden_size=anatomy.hidden_size,
        head_dim=anatomy.head_dim,
        vocabulary=anatomy.vocabulary,
        sliding_window=anatomy.sliding_window,
    )


def check_key(table: TimingTable, here: Key) -> None:
    """Refuse a table that was measured for something else. Raises InputError with both values of every difference."""
    theirs, ours = (_flat(key.model_dump()) for key in (table.key, here))
    differences = [
        f"{name} is {theirs.get(name, 'missing')} in the table and {ours.get(name, 'missing')} here"
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise InputError(f"timings: {'; '.join(differences)}; measure again with numprune timings")


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found |= {f"{name}.{inner}": one for inner, one in item.items()}
        else:
            found[name] = item
    return found


def check_measurable(anatomy: Anatomy) -> None:
    """Refuse a model whose blocks cannot be timed by copies. Raises InputError."""
    if anatomy.task != "causal-lm":
        raise InputError(f"timings: prefill and decode are those of language models; this is a {anatomy.task} model")
    if anatomy.of_kind("experts"):
        raise InputError("timings: the time of experts depends on how tokens are routed; not supported")
    if anatomy.attention_differs:
        raise InputError("timings: layers with and without sliding windows take different times; not supported")
    if any(block.post_norms for block in anatomy.blocks):
        raise InputError(f"timings: in {anatomy.family} a norm follows each block, so no block can be timed alone")
    if anatomy.numbering_field:
        raise InputError(f"timings: with {anatomy.numbering_field} each layer uses its index; not supported")
    for kind in anatomy.kinds:
        if len([block for block in anatomy.of_kind(kind) if block.units]) < 2:
            raise InputError(f"timings: the model must have at least two blocks of kind {kind}, to time copies of one")


def sizes_to_time(anatomy: Anatomy, target: Target, count: int) -> dict[Kind, list[Size]]:
    """Return the sizes to measure of each kind, ascending: the model's own, and others evenly spaced by parameters.

    Args:
        target: of the pruned model.
        count: number of sizes of a kind, unless the model has more of its own.

    Raises:
        InputError: as `allowed_sizes`.
    """
    allowed = allowed_sizes(anatomy, target, Limits(axes=(*DEFAULT_AXES, "query-heads")))
    found: dict[Kind, list[Size]] = {}
    for kind in anatomy.kinds:
        blocks = [block for block in anatomy.of_kind(kind) if block.units]
        largest = max(blocks, key=lambda block: block.parameters(block.size))
        own = {block.size for block in blocks}
        possible = {size for block in blocks for size in allowed[block.name]} - own
        ordered = sorted(possible, key=lambda size: (largest.parameters(size), size))
        found[kind] = sorted(own | {*_spread(ordered, count - len(own), largest)}, key=lambda size: (*size,))
    return found


def _spread(sizes: Sequence[Size], count: int, block: Block) -> list[Size]:
    """Return up to `count` sizes whose parameters are nearest to even shares of the block's."""
    if len(sizes) <= count:
        return list(sizes)
    whole = block.parameters(block.size)
    targets = [whole * (index + 1) / (count + 1) for index in range(max(count, 0))]
    left = list(sizes)
    chosen = []
    for wanted in targets:
        nearest = min(left, key=lambda size: abs(block.parameters(size) - wanted))
        left.remove(nearest)
        chosen.append(nearest)
    return chosen
