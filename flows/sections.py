"""The sections of a recipe, with the values that each key can have."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from numprune.budget_texts import Asked, parse_budgets
from numprune.cache_budget import is_of_sequence
from numprune.documents import WHOLE_FILE, Reading
from numprune.flows.names import (
    ALL_ITEMS,
    BUILT_IN,
    CAUSAL_LM,
    DEFAULT_AXES,
    LEARNING_RATE,
    LEARNING_TOKENS,
    MOST_TIMED_SIZES,
    ROOFLINE,
    SEQUENCE_LENGTH,
    TASKS_OWN,
    TIMED_SIZES,
    Allocation,
    Axis,
    Basis,
    Compensation,
    Criterion,
    Device,
    Dtype,
    ExportFormat,
    LearningConstraint,
    LearningMethod,
    LearningVariant,
    QuantizationMethod,
    QuantizedTo,
    Recovery,
    Refine,
    Runtime,
    TaskRuntime,
    TimedRuntime,
    TorchMode,
    TrainedWeights,
)
from numprune.flows.values import (
    NO_BUDGET,
    Budget,
    Candidates,
    Count,
    FewShot,
    Heldout,
    Limit,
    Pack,
    PromptFiles,
    Prompts,
    Repeats,
    Seed,
    Separator,
    Text,
    distinct,
)
from numprune.refinement import MINUTES
from numprune.roofline import Peaks, peaks_of
from numprune.serving.report import ModelName
from numprune.shape import shape_fields, shapes_of
from numprune.target import Target as SizeTarget

NO_FILE = "none"
MAXIMUM_IMAGES = 1000


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Section):
    """`path`: a Hugging Face folder, a hub id, or "embedded"; `device`: where it is calibrated and evaluated."""

    path: Annotated[str, Field(min_length=1)]
    device: Device = "auto"


class Data(Section):
    """Text files, or "embedded"; `samples` calibration rows of `sequence_length` tokens are drawn with `seed`.

    For a model that reads images: folders of images, whose subfolders are their classes, .parquet files, or folders
    saved by `datasets`; `samples` images are drawn.

    `heldout` may also be several corpora by name. The first is what `quality` in the report is of.

    `split`, `chat` and `pack` are the fields of numprune.documents.Reading.
    """

    calibration: Text
    heldout: Heldout
    samples: Count = 128
    sequence_length: Annotated[int, Field(ge=2, lt=2**31)] = SEQUENCE_LENGTH
    seed: Seed = 0
    split: Separator = WHOLE_FILE
    chat: bool = False
    pack: Pack = "auto"

    @property
    def corpora(self) -> dict[str, str | list[str]]:
        """The held-out text by name, the first one first; "" is the name of text that has none."""
        return self.heldout if isinstance(self.heldout, dict) else {"": self.heldout}

    @property
    def heldout_fields(self) -> dict[str, str | list[str]]:
        """The held-out text by the field that names it."""
        return {f"data.heldout.{name}".rstrip("."): text for name, text in self.corpora.items()}

    def reading(self) -> Reading:
        return Reading(self.split, self.chat, self.pack)


class Prune(Section):
    """The fields of numprune.options.PruneOptions except the target; `stream`: layer by layer, from disk.

    `hidden_size` is 0 if it stays, or if masks choose it. It and `drop_layers` may be lists of candidates, to which the
    model's own are added.

    `budget`, in the place of `ratio`, which is 0 then: bytes that the released weights may take, as "6GiB", where
    `quantize.scheme` determines how blocks may be stored; the time of one step, as "20ms@decode,b=8,ctx=2048" or
    "1.3x@decode,b=8,ctx=2048", by the latencies that `timings` describes; the bytes of KV cache of a token, as
    "kv=64KiB/token"; or a list of these. The allocation "error" divides it. `refine` "search" starts from its sizes.
    The bytes of KV cache of a sequence, as "kv=8MiB@ctx=4096", are kept by windows instead: `window` tokens, or 0, in
    as many layers as it needs, or in `window_layers`.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.3
    criterion: Criterion = "obs"
    allocation: Allocation = "uniform"
    compensation: Compensation = "joint"
    axes: Annotated[list[Axis], Field(min_length=1), AfterValidator(distinct)] = list(DEFAULT_AXES)
    keep: list[Annotated[str, Field(min_length=1)]] = []
    floors: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    skips: bool = False
    budget: Budget = NO_BUDGET
    drop_layers: Candidates = 0
    drop_blocks: Annotated[int, Field(ge=0, lt=2**31)] = 0
    window: Annotated[int, Field(ge=0, lt=2**31)] = 0
    window_layers: Annotated[int, Field(ge=0, lt=2**31)] = 0
    hidden_size: Candidates = 0
    basis: Basis = "fisher"
    refine: Refine = "none"
    refine_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = MINUTES
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    seed: Seed = 0
    batch_size: Count = 8
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _by_budget(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("budget", NO_BUDGET) == NO_BUDGET:
            return data
        limits = [data["budget"]] if isinstance(data["budget"], str) else data["budget"]
        divided = not isinstance(limits, list) or not all(map(is_of_sequence, map(str, limits)))
        return {"ratio": 0.0, **({"allocation": "error"} if divided else {}), **data}

    def shape_options(self) -> dict[str, Any]:
        """Hidden size and dropped layers as fields of PruneOptions."""
        asked = (self.hidden_size, self.drop_layers)
        sizes, drops = ([one] if isinstance(one, int) else one for one in asked)
        fields = shape_fields([size for size in sizes if size], drops)
        # A list of one is a candidate beside the model's own.
        return fields if all(isinstance(one, int) for one in asked) else {"shapes": shapes_of(sizes, drops)}

    @property
    def allowed(self) -> Asked:
        """What `budget` limits."""
        if self.budget == NO_BUDGET:
            return Asked()
        return parse_budgets([self.budget] if isinstance(self.budget, str) else self.budget)


class BlockTimings(Section):
    """How the latencies of blocks are measured for a budget of time: see numprune.timings.

    `sizes` of each kind of block, in `runtime`, each model in `visits` visits. With the runtime "roofline", they are
    estimated for `device`, or for one of `peak_tflops` and `bandwidth_gb_s`: see numprune.roofline.
    """

    runtime: TimedRuntime | Literal["roofline"] = "torch"
    device: str = ""
    peak_tflops: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    bandwidth_gb_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    sizes: Annotated[int, Field(ge=2, le=MOST_TIMED_SIZES)] = TIMED_SIZES
    visits: Annotated[int, Field(ge=3, lt=2**31)] = 5
    seed: Seed = 0

    @model_validator(mode="after")
    def _estimated_for_a_device(self) -> Self:
        if self.runtime == ROOFLINE:
            self.peaks()
            for name in ("visits", "seed"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f'{name}: it has no effect with runtime = "roofline"; leave it out')
        elif given := [name for name in ("device", "peak_tflops", "bandwidth_gb_s") if getattr(self, name)]:
            raise ValueError(f'{given[0]}: it has an effect only with runtime = "roofline"; leave it out')
        return self

    def peaks(self) -> Peaks:
        """Return the rates of the device that times are estimated for. Raises InputError."""
        return peaks_of(self.device, self.peak_tflops, self.bandwidth_gb_s)


class Learn(Section):
    """Masks that choose what pruning keeps: with `method` "none", `prune.criterion` does.

    They are trained on text of `data.calibration`, in rows of `data.sequence_length` tokens, for `tokens`; 0: as many
    as the variant asks for. `constraint`: of what `prune.ratio` is a share; "auto": parameters, or bytes with
    `prune.budget`. `learning_rate`: of the weights, which "faster" does not train. See numprune.learning.
    """

    method: Literal["none"] | LearningMethod = "none"
    variant: LearningVariant = "faster"
    tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    constraint: Literal["auto"] | LearningConstraint = "auto"
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = LEARNING_RATE
    seed: Seed = 0

    @property
    def trained_tokens(self) -> int:
        return self.tokens or LEARNING_TOKENS[self.variant]


class Recover(Section):
    """Training after pruning: `method` "none" does none; the rest are fields of numprune.recovery.RecoveryOptions.

    It is trained on text of `data.calibration`, in rows of `data.sequence_length` tokens. With `prompts`, files with a
    prompt in each record or line, `generated_share` of the rows are the dense model's answers to them.
    """

    method: Literal["none"] | Recovery = "none"
    tokens: Count = 1_000_000
    learning_rate: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = "auto"
    batch_size: Count = 8
    micro_batch_size: Count = 8
    selection_rows: Count = 64
    gradient_checkpointing: bool = True
    top_k: Literal["all"] | Count = "all"
    hidden_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    train: TrainedWeights = "all"
    rank: Count = 16
    blocks: Count = 4
    prompts: PromptFiles = []
    generated_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    seed: Seed = 0


class Quantize(Section):
    """How the pruned weights are stored: `scheme` "none" leaves them unchanged. See numprune.quantization.

    "mixed": each block in the stored precision, in w8a8 or in w4a16, as `prune.budget` decides. `group_size`: channels
    that share a scale in w4a16; the other schemes have a scale per row. `lm_head_bits`: of the output matrix in the
    export onnxruntime; with 4, its values are rounded in the checkpoint, too (numprune.quantization.lm_head).
    """

    scheme: QuantizedTo = "none"
    method: QuantizationMethod = "gptq"
    group_size: Literal[32, 64, 128] = 128
    lm_head_bits: Literal[4, 8] = 8

    @property
    def channels_per_scale(self) -> int | None:
        """None if a whole row shares a scale, or nothing is quantized."""
        return self.group_size if self.scheme in ("w4a16", "mixed") else None


class Target(Section):
    """The servers: the fields of numprune.target.Target, and vLLM's device and version."""

    align: Count = 8
    tensor_parallel: Count = 1
    quantization_group: Count = 1
    device: Literal["gpu", "cpu"] = "gpu"
    vllm: Annotated[str, Field(min_length=1)] = "0.32.0"

    def sizes(self) -> SizeTarget:
        return SizeTarget(**self.model_dump(exclude={"device", "vllm"}))


class Export(Section):
    """The exports of the pruned checkpoint. Without "vllm", the release holds the checkpoint as pruning wrote it.

    `dtype`: precision of the exports and of both sides of a benchmark; see numprune.export.precision.choose.
    """

    targets: Annotated[list[ExportFormat], AfterValidator(distinct)] = ["vllm", "onnx"]
    shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(MB|GB)$")] = "5GB"
    opset: Literal[20, 23] = 23
    dtype: Dtype = "auto"


class Evaluate(Section):
    """`prompts` for greedy generation with both models: "built-in", or a list of texts; [] for none.

    `tasks` of the lm-evaluation-harness, by name or as a YAML file, are answered by both models in `task_runtime`.
    `num_fewshot`: examples per item, or "task" for the task's own number. `limit`: items of each task, or "all".

    From an image generator and the dense model, `samples` images are drawn with classifier-free `guidance` of this
    scale; 1: none. `decoder`: state dict of the image tokenizer that turns its codes into pictures; "none": the model
    folder has the colours of the codes, or no pictures are shown.

    FID, KID and, if it has classes, the Inception Score are measured by the network in the file `fid_network`, of
    `fid_samples` images from each model and the real images in `fid_images`: folders, or .parquet files.
    """

    prompts: Prompts = BUILT_IN
    tasks: Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(distinct)] = []
    num_fewshot: FewShot = TASKS_OWN
    limit: Limit = ALL_ITEMS
    task_runtime: TaskRuntime = "torch"
    samples: Annotated[int, Field(ge=1, le=MAXIMUM_IMAGES)] = 20
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    decoder: Annotated[str, Field(min_length=1)] = NO_FILE
    fid_network: Annotated[str, Field(min_length=1)] = NO_FILE
    fid_images: PromptFiles = []
    fid_samples: Count = 10_000


class Benchmark(Section):
    """The load of each repeat, on both sides; see numprune.serving.benchmark, and its `vllm` for that runtime.

    `torch_mode`: decoding mode of the runtime torch; "auto": compiled on a GPU. `batch_sizes`, `lengths` and `passes`
    are for encoders, which have no prompts and no output; images all have one length. `price_per_hour` of the machine,
    in any currency, adds the cost of a million tokens to the report; 0: unknown.
    """

    runtimes: Annotated[list[Runtime], Field(min_length=1), AfterValidator(distinct)] = ["torch", "onnxruntime"]
    device: Device = "auto"
    torch_mode: TorchMode = "auto"
    prompts: Count = 4
    prompt_length: Count = 128
    output_length: Annotated[int, Field(ge=2, lt=2**31)] = 32
    batch_size: Count = 1
    repeats: Repeats = 10
    warmup: Count = 1
    seed: Seed = 0
    concurrency: Annotated[list[Count], Field(min_length=1), AfterValidator(distinct)] = [1, 4]
    goodput_ttft_ms: Count = 200
    goodput_tpot_ms: Count = 50
    kv_cache_mib: Count = 256
    maximum_failed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    batch_sizes: Annotated[list[Count], Field(min_length=1), AfterValidator(distinct)] = [1, 8]
    lengths: Annotated[list[Count], Field(min_length=1), AfterValidator(distinct)] = [32, 128]
    passes: Count = 4
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def load(self, runtime: str, task: str = CAUSAL_LM, image_tokens: int | None = None) -> dict[str, Any]:
        """The runtime's load: fields of Load, of ServedLoad or, for encoders, of EncoderLoad.

        `image_tokens`: of every image, for a model that reads images.
        """
        encoders = {"batch_sizes", "lengths", "passes"}
        if task != CAUSAL_LM:
            load = self.model_dump(include={*encoders, "repeats", "warmup", "seed"})
            return load if image_tokens is None else {**load, "lengths": [image_tokens]}
        served = {"concurrency", "goodput_ttft_ms", "goodput_tpot_ms", "kv_cache_mib", "maximum_failed"}
        return self.model_dump(
            exclude={
                "runtimes",
                "device",
                "torch_mode",
                "price_per_hour",
                *encoders,
                *({"batch_size"} if runtime == "vllm" else served),
            }
        )


class Registry(Section):
    """`uri`: an MLflow server or database, or "workspace" for SQLite and files inside the workspace."""

    name: ModelName
    uri: Annotated[str, Field(min_length=1)] = "workspace"
