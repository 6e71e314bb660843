"""Measured latencies of a model's blocks: the table that `numprune timings` writes.

The time of a block of one size is the difference between models with one and with R copies of it, divided by R - 1
(as in NVIDIA's ModelOpt, puzzletron; see timed_models.py). What remains of the model with one copy is the time around
the blocks: embeddings, head, and the fixed cost of a step. Only measured sizes have a time; nothing is interpolated,
because latencies have steps and need not be monotone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from numprune.axes import DEFAULT_AXES, Limits
from numprune.blocks import Anatomy, Block
from numprune.errors import InputError
from numprune.families.family import TaskName
from numprune.hidden import Width, check_hidden_size, narrowed
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
    """The times of one scenario, in its notation: around the blocks, and of a block by what it is timed as, and size.

    `within_layers`: whole layers were timed, so that a removed block has no time of its own. `estimated_for`: the
    device that the times are estimated for by its data sheet; None: they were measured.
    """

    scenario: str
    around: Time
    blocks: dict[str, list[BlockTime]]
    within_layers: bool = False
    estimated_for: str | None = None


class Shape(_Part):
    """What models have to share so that blocks of equal size, and what is around them, take the same time.

    `tied`: the output matrix is the embedding.
    """

    family: str
    task: TaskName
    hidden_size: int
    tied: bool
    head_dim: int
    vocabulary: int
    sliding_window: int | None
    image: tuple[int, int, int] | None


class Key(_Part):
    """What the times are valid for.

    Attributes:
        runtime: "roofline": the times are estimates.
        implementation: of layers of different sizes in vLLM: "plug-in", or "stock" if vLLM has none.
        device: name of the CPU or GPU.
        quantization: scheme of the weights, as `Served.quantization`.
        shape: of the model's layers.
    """

    runtime: Annotated[str, Field(pattern=r"^(torch|onnxruntime|tensorrt|vllm|roofline)$")]
    versions: dict[str, str]
    implementation: Literal["plug-in", "stock"] | None = None
    device: str
    threads: int
    dtype: str
    quantization: str
    tensor_parallel: int
    shape: Shape


class TimingTable(_Part):
    """The times of a model's blocks.

    Attributes:
        estimate: they were not measured.
        copies: what blocks are timed as -> R; empty for an estimate, like `drift`.
        visits: measurements of each model, in random order; 0 for an estimate.
        drift: scenario -> time of the largest model at the end of the run, relative to the start.
        routing: of tokens to experts. "uniform": routers were random; a trained one that prefers some experts can be
            slower or faster. None: the model has no experts.
    """

    version: Literal["numprune/timings/1"] = "numprune/timings/1"
    key: Key
    estimate: bool = False
    copies: dict[str, Annotated[int, Field(ge=2)]]
    visits: Annotated[int, Field(ge=0)]
    drift: dict[str, float]
    routing: Literal["uniform"] | None = None
    scenarios: Annotated[list[ScenarioTimes], Field(min_length=1)]

    @model_validator(mode="after")
    def _says_that_it_is_an_estimate(self) -> Self:
        device = self.key.device if self.estimate else None
        if self.estimate != (self.key.runtime == "roofline") or self.estimate == bool(self.visits):
            raise ValueError("estimate, key.runtime and visits contradict each other")
        if any(times.estimated_for != device for times in self.scenarios):
            raise ValueError("estimate and scenarios.estimated_for contradict each other")
        return self

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
        task=anatomy.task,
        hidden_size=anatomy.hidden_size,
        tied=anatomy.is_tied,
        head_dim=anatomy.head_dim,
        vocabulary=anatomy.vocabulary,
        sliding_window=anatomy.sliding_window,
        image=anatomy.image,
    )


def anatomy_at(anatomy: Anatomy, width: Width | None, target: Target) -> Anatomy:
    """Return the anatomy to time, at this hidden size; None: the model's own. Raises InputError as `check_hidden_size`.

    The output matrix is separate from the embedding where pruning to a smaller hidden size separates them.
    """
    if width is None or width.hidden_size == anatomy.hidden_size:
        return anatomy
    check_hidden_size(anatomy, width.hidden_size, target)
    return narrowed(anatomy, *width)


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


def sizes_to_time(anatomy: Anatomy, target: Target, count: int) -> dict[str, list[Size]]:
    """Return the sizes to measure by what blocks are timed as: the model's own, and others evenly spaced by parameters.

    Args:
        target: of the pruned model.
        count: number of sizes of a kind, unless the model has more of its own.

    Raises:
        InputError: as `allowed_sizes`, or layers differ in width and tokens.
    """
    if any(block.stage is not None for block in anatomy.blocks):
        raise InputError(f"timings: layers of {anatomy.family} differ in width and in tokens; not supported")
    allowed = allowed_sizes(anatomy, target, Limits(axes=(*DEFAULT_AXES, "query-heads")))
    found: dict[str, list[Size]] = {}
    for kind in dict.fromkeys(block.timed_as for block in anatomy.blocks if block.units):
        blocks = [block for block in anatomy.blocks if block.timed_as == kind and block.units]
        largest = max(blocks, key=lambda block: block.parameters(block.size))
        own = {block.size for block in blocks}
        possible = {size for block in blocks for size in allowed[block.name] if size.units} - own
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
