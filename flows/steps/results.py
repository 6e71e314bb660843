"""Results of the stages, as stored in their folders; field names match the report's where it has the same."""

from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from numprune.budget import Budget
from numprune.flows.names import TaskRuntime
from numprune.plans import Draw, DroppedBlock, DroppedLayer, Price
from numprune.refinement import Refinement
from numprune.serving.report import LatencyBudget, Outcome
from numprune.shape import ShapeChoice

Parity = dict[str, Any]  # `parity.<runtime>` of the report


@dataclass(frozen=True)
class CalibrationRows:
    """`digest`: of the tokens; `packed`: rows may contain parts of several documents."""

    digest: str
    rows: int
    tokens: int
    packed: bool


@dataclass(frozen=True)
class HeldoutRows:
    """`digest`: of the rows; `tokens`: the scored ones."""

    digest: str
    rows: int
    tokens: int
    documents: int
    packed: bool


@dataclass(frozen=True)
class BaselineScores:
    """The baseline's own figures, if its task has them, and its output for each prompt.

    `nll_nats_per_token`: or for each input of a classifier.
    """

    generations: list[dict[str, Any]]
    nll_nats_per_token: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class AttentionProbe:
    """What attention heads attend to, on `rows` rows: by block, each head's shares (numprune.probing.CATEGORIES)."""

    rows: int
    sequence_length: int
    heads: dict[str, list[list[float]]]


@dataclass(frozen=True)
class SequenceCache:
    """Bytes of the KV cache of a sequence of `context` tokens, before and after pruning."""

    context: int
    before: int
    after: int


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A model before and after pruning.

    Attributes:
        digest: of the checkpoint's manifest; `plan`: of the plan's file.
        schemes: that the plan quantizes blocks to, by their names.
        kept_units: [kept, of] by block name.
        window, windowed_layers: the tokens that these layers see, or None: as many as before.
        cache: at the budget's context or the model's, where layers got a window, or None.
        hidden_size: [kept, of], or None: all are kept.
        refinement: of the plan's sizes, or None.
        price: of what budgets chose, or None.
        shape: how hidden size and number of layers were chosen, or None.
    """

    digest: str
    before: Budget
    after: Budget
    prunable_ratio_removed: float
    weight_bytes_before: int
    weight_bytes_after: int
    plan: str
    dropped_layers: list[DroppedLayer]
    dropped_blocks: list[DroppedBlock]
    window: int | None
    windowed_layers: list[int]
    cache: SequenceCache | None
    schemes: dict[str, str]
    kept_units: dict[str, list[int]]
    hidden_size: list[int] | None
    refinement: Refinement | None
    price: Price | None
    shape: ShapeChoice | None


@dataclass(frozen=True)
class TimedCheckpoint(PrunedCheckpoint):
    """A pruned checkpoint within a budget of time; `latency`: as predicted and measured."""

    latency: LatencyBudget


@dataclass(frozen=True)
class GeneratedText:
    """`digest`: of the rows; `answers`: that were sampled, and `tokens`: of those, prompts not counted."""

    digest: str
    rows: int
    answers: int
    tokens: int


@dataclass(frozen=True)
class RecoveryText:
    """`digest`: of all rows; `tokens`: of those to train on, once over."""

    digest: str
    training: int
    selection: int
    tokens: int


@dataclass(frozen=True)
class LearningText(RecoveryText):
    """`draw`: where the rows are from."""

    draw: Draw


@dataclass(frozen=True)
class LearnedMasks:
    """What masks learned to keep: the fields of numprune.learning.Record.

    Attributes:
        digest: of the manifest of the folder with the plan.
        model: of the checkpoint beside the plan, with the trained weights; None: only masks were trained.
    """

    digest: str
    model: str | None
    variant: str
    steps: int
    tokens: int
    seconds: float
    best_step: int
    constraint: str
    removed: float
    kept: float
    divergence: float
    unit: str
    hidden_size: tuple[int, int] | None


@dataclass(frozen=True)
class RecoveredCheckpoint:
    """A checkpoint that was trained after pruning: the fields of numprune.recovery.Recovered.

    `digest`: of its manifest.
    """

    digest: str
    steps: int
    tokens: int
    learning_rate: float
    best_step: int
    kl_before: float
    kl_after: float
    unit: str
    seconds: float
    parameters: int
    blocks: dict[str, float]


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint before and after quantization.

    Attributes:
        digest: of its manifest.
        scheme: of all blocks, or "mixed".
        bits: of the weights of each block, by its name, if they differ.
        lm_head_bits: of the output matrix in the export onnxruntime.
    """

    digest: str
    scheme: str
    group_size: int | None
    bits: dict[str, int]
    lm_head_bits: int
    method: str
    weight_bytes_before: int
    weight_bytes_after: int


@dataclass(frozen=True)
class Exported:
    """`digest`: of the export's manifest."""

    digest: str
    bytes: int


@dataclass(frozen=True)
class AnsweredTask:
    """`items`: answered; `num_fewshot`: examples before each; `accuracy`: by metric, in [0, 1]."""

    items: int
    num_fewshot: int
    accuracy: dict[str, float]


@dataclass(frozen=True)
class TaskAnswers:
    """One model's answers to all tasks, by name; the items are in its folder."""

    runtime: TaskRuntime
    tasks: dict[str, AnsweredTask]


@dataclass(frozen=True)
class ImageFeatures:
    """What a network says of images: how many they are, the length of its features, and its classes, 0 for none."""

    images: int
    features: int
    classes: int


@dataclass(frozen=True)
class ImageMetrics:
    """The fields of the report's section `images` that compare samples with real images."""

    fid: dict[str, Any]
    kid: dict[str, Any]
    inception_score: dict[str, Any] | None
    network: dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """`longest`: tokens of the longest sequence in a request."""

    prompts: int
    longest: int


class Timings(TypedDict):
    """The result of a benchmark: the report's sections for its runtime, and the samples behind them."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    speed: dict[str, Any]
    memory: dict[str, Any]
    environment: dict[str, Any]
    samples: dict[str, Any]


@dataclass(frozen=True)
class Judgement:
    """The verdict; `next_look`: runtimes that another look may settle."""

    outcome: Outcome
    run_id: str
    next_look: list[str]
