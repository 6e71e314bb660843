"""What was pruned, on which machine, and the result."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from numprune.serving.report.models.fields import (
    Corpus,
    Count,
    Finite,
    Metric,
    Model,
    ModelName,
    Number,
    Runtime,
    Sha256,
    number,
)

_MAXIMUM_BYTES: Final = 512 << 10  # of a picture in base64


class Identity(Model):
    """SHA-256 digests of inputs and outputs; None for those that this run does not have.

    `name`: the registered model of which a release becomes a version. `learning_rows`: the rows for training and
    selecting masks; `learned`: the checkpoint with the weights trained with them. `pruned`: the checkpoint before
    training or quantization; `recovered`: the trained checkpoint; `recovery_rows`: the rows for training and selection,
    of which the base generated `generated_rows`. `corpora_rows`: held-out rows of each named corpus except the first.
    `tasks`: all requests of the tasks. `decoder`: the file that turned an image generator's codes into pictures;
    `fid_network` and `fid_images`: the network and the real images that these were compared by.
    """

    name: ModelName | None = None
    base: Sha256
    candidate: Sha256
    recipe: Sha256 | None = None
    calibration_rows: Sha256 | None = None
    heldout_rows: Sha256 | None = None
    corpora_rows: dict[Corpus, Sha256] = Field(default={})
    learning_rows: Sha256 | None = None
    learned: Sha256 | None = None
    plan: Sha256 | None = None
    pruned: Sha256 | None = None
    recovery_rows: Sha256 | None = None
    generated_rows: Sha256 | None = None
    recovered: Sha256 | None = None
    tasks: Sha256 | None = None
    decoder: Sha256 | None = None
    fid_network: Sha256 | None = None
    fid_images: Sha256 | None = None
    exports: dict[Runtime, Sha256] = Field(default={})
    packages: dict[str, str] = Field(default={})


class Gpu(Model):
    """One GPU as reported by nvidia-smi; None for missing values."""

    name: str
    uuid: str
    driver: str
    memory_bytes: Number = None
    sm_clock_mhz: Number = None
    max_sm_clock_mhz: Number = None
    power_limit_watts: Number = None
    temperature_celsius: Number = None
    throttle: tuple[str, ...] = ()  # current throttle reasons
    processes: tuple[int, ...] = ()  # other processes that use it


class Environment(Model):
    """The machine. `valid` is false if there is a reason to distrust its measurements."""

    cpu: str
    cores: Count
    memory_bytes: Count
    platform: str
    gpu: Gpu | None = None
    load_average: tuple[Number, Number, Number] | None = None  # over 1, 5 and 15 minutes
    valid: bool = Field(strict=True)
    reasons: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _explained(self) -> Self:
        if self.valid == bool(self.reasons):
            raise ValueError("valid must be true if and only if there are no reasons")
        return self


class RatioRemoved(Model):
    """Shares removed, in [0, 1].

    `kv_bytes`: of the KV cache; where layers got a window, of that of a sequence of `kv_context` tokens.
    """

    prunable: Number = None
    parameters: Number = None
    kv_bytes: Number = None
    kv_context: Count | None = None


class AttentionMaps(Model):
    """Attention on the patches of some held-out images, before and after pruning.

    Attributes:
        by: whose attention it is: the class token's, or the mean of all patches.
        images: their names.
        layers: of the dense model, those that are shown.
        png: in base64. Each image is a band of three rows: beside the image, a square for each layer, with the mean
            over the dense model's heads that were kept, over those that were removed, and over the pruned model's.
            Squares of one image and layer share their scale: the darkest patch of the three is the maximum.
    """

    by: Literal["class token", "patches"]
    images: tuple[str, ...] = Field(min_length=1)
    layers: tuple[Count, ...] = Field(min_length=1)
    png: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=_MAXIMUM_BYTES)]


class Attention(Model):
    """What the dense model's attention heads look at, on some calibration rows (see numprune.probing).

    Attributes:
        heads: each head's shares of attention by block: on special tokens, on itself, on the token before, on the rest.
        kept: whether it was kept, in the same order.
        spearman: rank correlation of each share with being kept, over all heads; None if undefined.
        maps: of a classifier of images.
    """

    rows: Count
    sequence_length: Count
    heads: dict[str, tuple[tuple[Number, Number, Number, Number], ...]]
    kept: dict[str, tuple[bool, ...]]
    spearman: dict[Metric, Number]
    maps: AttentionMaps | None = None

    @model_validator(mode="after")
    def _of_the_same_heads(self) -> Self:
        if {name: len(of) for name, of in self.heads.items()} != {name: len(of) for name, of in self.kept.items()}:
            raise ValueError("heads and kept must be of the same heads")
        return self


class Milliseconds(Model):
    """A latency with its 95 % interval."""

    ms: Finite
    interval95: tuple[Finite, Finite]


class LatencyBudget(Model):
    """A budget of time: the latency of one step, predicted from those of blocks and measured when it was pruned.

    `served`: how both models differ from the stored ones, like "w8a8"; empty: they do not. `corrections`: how often a
    measurement corrected the prediction. `estimated_for`: the device that the latencies of blocks are estimated for by
    its data sheet; the models were then not measured. `dense_predicted` is None if the blocks were only timed at a
    smaller hidden size. `speedup`: what was asked for; `limit_ms` is the baseline's latency divided by it.
    """

    scenario: str
    runtime: Runtime
    limit_ms: Finite
    dense_predicted: Milliseconds | None
    dense_measured: Milliseconds | None
    predicted: Milliseconds
    measured: Milliseconds | None
    corrections: Count
    estimated_for: str | None = None
    served: str = ""
    speedup: Finite | None = None

    @model_validator(mode="after")
    def _estimated_or_measured(self) -> Self:
        if {self.estimated_for is None} != {one is not None for one in (self.dense_measured, self.measured)}:
            raise ValueError("a latency is either measured or estimated for a device")
        return self


class Refinement(Model):
    """A search for better sizes of the same budget.

    Divergences are means over calibration rows, in `unit`, from the baseline: of the first plan and of the best one on
    the `rows` of the search, and the change on `rows_apart`, with its one-sided 95 % bound. `confirmed`: the bound is
    below 0, so the best plan is used. `summary`: all of it in words.
    """

    generations: Count
    candidates: Count
    stopped: str
    unit: str
    rows: Count
    divergence_before: Finite
    divergence_after: Finite
    rows_apart: Count
    change_apart: Finite | None
    change_apart_upper: Finite | None
    confirmed: bool
    summary: str


class Price(Model):
    """Of the sizes that budgets chose, by error curves; no choice within the budgets costs less than the bound."""

    nats_per_token: Finite
    bound_nats_per_token: Finite
    summary: str


class Pruning(Model):
    criterion: str
    allocation: str
    compensation: str
    ratio_asked: Number = None
    ratio_counts: Literal["parameters", "flops", "kv-bytes"] = "parameters"  # of what the ratio was asked
    budget_asked: Number = None  # bytes of weights, instead of a ratio
    kv_budget_asked: Number = None  # bytes of KV cache per token, instead of a ratio
    latency: LatencyBudget | None = None  # that was asked for, instead of a ratio
    price: Price | None = None  # of what budgets chose
    ratio_removed: RatioRemoved
    kept_units: dict[str, tuple[Count, Count]] = Field(default={})  # block -> (kept, of)
    attention: Attention | None = None
    dropped_layers: list[Count] = Field(default=[])  # by index in the baseline; their blocks keep nothing
    window: Count | None = None  # tokens that `windowed_layers` see, by index in the baseline
    windowed_layers: list[Count] = Field(default=[])
    sequence_budget_asked: str | None = None  # bytes of KV cache of a sequence, which the windows keep
    hidden_size: tuple[Count, Count] | None = None  # (kept, of), if coordinates were removed
    shape: list[str] = Field(default=[])  # candidates of hidden size and layers, the chosen one first
    refinement: Refinement | None = None  # of the sizes


class SizePair(Model):
    """`ratio` is candidate / baseline; it is computed if omitted and checked if given."""

    baseline: Number
    candidate: Number
    ratio: Number = None

    @model_validator(mode="before")
    @classmethod
    def _with_ratio(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("ratio") is not None:
            return data
        return {**data, "ratio": _quotient(number(data.get("candidate")), number(data.get("baseline")))}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        expected = _quotient(self.candidate, self.baseline)
        if self.ratio is not None and (expected is None or not math.isclose(self.ratio, expected, rel_tol=1e-6)):
            raise ValueError(f"ratio {self.ratio} is not candidate / baseline")
        return self


class Learning(Model):
    """How the masks were trained that chose the units to keep (see numprune.learning).

    Attributes:
        learning_rate: of the weights, where they were trained with the masks.
        best_step: whose masks chose.
        seconds: wall time.
        kept_by_masks: share of the counted cost that those masks kept by themselves, before rounding. It is
            `ratio_counts` of `pruning`; with a budget, bytes of the blocks.
        selection_divergence: from the dense model of what the plan keeps, before any refit, on rows that were not
            trained on but chosen by.
        unit: of the divergence.
    """

    method: str
    variant: str
    seed: Count
    learning_rate: Number = None
    tokens: Count
    steps: Count
    best_step: Count
    seconds: Number
    kept_by_masks: Number
    selection_divergence: Number
    unit: str


class Generated(Model):
    """Text that the dense model generated for the training.

    Attributes:
        answers: to the user's prompts.
        tokens: of the answers, without the prompts.
    """

    answers: Count
    tokens: Count


class Recovery(Model):
    """How the pruned weights were trained (see numprune.recovery).

    Attributes:
        train: the trained weights: "all", "lora" for adapters, which were merged, or "blocks" for those of some blocks.
        best_step: the step whose weights were kept; 0: those before training.
        parameters: number of trained parameters.
        blocks: the trained blocks: name -> divergence from the dense model with only that block pruned.
        seconds: wall time.
        selection_kl_nats_per_token: KL from the dense model before training and of the kept weights, on held-back rows;
            `selection_divergence`: the same for other tasks, in the unit of their loss.
    """

    method: str
    train: str
    seed: Count
    learning_rate: Number
    tokens: Count
    steps: Count
    best_step: Count
    parameters: Count
    blocks: dict[str, Number] = Field(default={})
    seconds: Number
    generated: Generated | None = None
    selection_kl_nats_per_token: SizePair | None = None
    selection_divergence: SizePair | None = None

    @model_validator(mode="after")
    def _of_one_task(self) -> Self:
        if (self.selection_kl_nats_per_token is None) == (self.selection_divergence is None):
            raise ValueError("a training has either selection_kl_nats_per_token or selection_divergence")
        return self


class Quantization(Model):
    """How the pruned weights are stored (see numprune.quantization).

    `bits`: of the weights of each block, if the scheme is mixed; `lm_head_bits`: of the output matrix in the export
    onnxruntime; `weight_bytes`: before and after.
    """

    scheme: str
    group_size: Count | None = None
    bits: dict[str, Count] = Field(default={})
    lm_head_bits: Count = 8
    method: str
    weight_bytes: SizePair


def _quotient(numerator: int | float | None, denominator: int | float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


class Dtypes(Model):
    """Names of torch data types, like "float32" and "bfloat16"."""

    baseline: str
    candidate: str


class Sizes(Model):
    """`dtype`: of the stored weights."""

    dtype: Dtypes | None = None
    parameters: SizePair | None = None
    weight_bytes: SizePair | None = None
    kv_bytes_per_token: SizePair | None = None
    flops_per_token: SizePair | None = None
