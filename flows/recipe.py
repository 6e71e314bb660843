"""The recipe of `numprune optimize`: TOML, one model per section, all problems reported together.

This module only reads and validates the recipe; `checks` decides whether files, model and runtimes support it.
"""

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from numprune.byte_budget import parse
from numprune.documents import WHOLE_FILE, Reading, separator
from numprune.errors import InputError
from numprune.flows.names import (
    ALL_ITEMS,
    BUILT_IN,
    CAUSAL_LM,
    DEFAULT_AXES,
    LEARNING_RATE,
    LEARNING_TOKENS,
    SEQUENCE_LENGTH,
    TASKS_OWN,
    Allocation,
    Axis,
    Compensation,
    Criterion,
    Device,
    Dtype,
    ExportFormat,
    LearningMethod,
    LearningVariant,
    QuantizationMethod,
    QuantizedTo,
    Recovery,
    Runtime,
    TaskRuntime,
    TorchMode,
    TrainedWeights,
)
from numprune.serving.benchmark.load import REPEATS_RULE, are_repeats
from numprune.serving.gates import Gate
from numprune.serving.problems import described, listed
from numprune.serving.report import CORPUS_NAME, MAXIMUM_PROMPTS, ModelName
from numprune.target import Target as SizeTarget

EMBEDDED = "embedded"  # the model or text that comes with numprune
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
EMBEDDED_RECIPE = EMBEDDED_FOLDER / "recipe.toml"
NO_BUDGET = "none"
_MOST_EXAMPLES = 100
_MAXIMUM_BYTES = 1 << 20


def _text(value: Any) -> Any:
    return value if value == EMBEDDED else _files(value, 'must be "embedded" or a list of text files')


def _files(value: Any, rule: str = "must be a list of text files") -> Any:
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not files or not all(isinstance(file, str) and file for file in files):
        raise ValueError(rule)
    return files


def _heldout(value: Any) -> Any:
    if not isinstance(value, dict):
        return _text(value)
    if not value:
        raise ValueError("must name at least one corpus")
    if unusable := [name for name in value if not re.fullmatch(CORPUS_NAME, name)]:
        raise ValueError(f"{unusable[0]!r} cannot name a corpus; use lower-case letters, digits, - and _")
    return {name: _text(text) for name, text in value.items()}


def _prompt_files(value: Any) -> Any:
    return [] if value == [] else _files(value)


def _prompts(value: Any) -> Any:
    if value == BUILT_IN:
        return value
    if not isinstance(value, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in value):
        raise ValueError(f'must be "{BUILT_IN}" or a list of texts that are not empty')
    if len(value) > MAXIMUM_PROMPTS:
        raise ValueError(f"must have at most {MAXIMUM_PROMPTS} prompts")
    return value


def _distinct(value: list[Any]) -> list[Any]:
    if len(set(value)) != len(value):
        raise ValueError("must not contain duplicates")
    return value


def _separator(value: str) -> str:
    try:
        separator(value)
    except InputError as error:
        raise ValueError(str(error)) from None
    return value


def _budget(value: str) -> str:
    try:
        if value != NO_BUDGET:
            parse(value)
    except InputError as error:
        raise ValueError(str(error)) from None
    return value


def _repeats(value: int) -> int:
    if not are_repeats(value):
        raise ValueError(REPEATS_RULE)
    return value


def _pack(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError('must be "auto", true or false')
    return value


def _few_shot(value: Any) -> Any:
    if value != TASKS_OWN and not (type(value) is int and 0 <= value <= _MOST_EXAMPLES):
        raise ValueError(f'must be "{TASKS_OWN}" or a number from 0 to {_MOST_EXAMPLES}')
    return value


def _limit(value: Any) -> Any:
    if value != ALL_ITEMS and not (type(value) is int and 1 <= value < 2**31):
        raise ValueError(f'must be "{ALL_ITEMS}" or a number of items, at least 1')
    return value


Text = Annotated[str | list[str], PlainValidator(_text)]
Heldout = Annotated[str | list[str] | dict[str, str | list[str]], PlainValidator(_heldout)]
PromptFiles = Annotated[list[str], PlainValidator(_prompt_files)]
Prompts = Annotated[str | list[str], PlainValidator(_prompts)]
FewShot = Annotated[int | Literal["task"], PlainValidator(_few_shot)]
Limit = Annotated[int | Literal["all"], PlainValidator(_limit)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Section):
    """`path`: a Hugging Face folder, a hub id, or "embedded"; `device`: where it is calibrated and evaluated."""

    path: Annotated[str, Field(min_length=1)]
    device: Device = "auto"


class Data(Section):
    """Text files, or "embedded"; `samples` calibration rows of `sequence_length` tokens are drawn with `seed`.

    `heldout` may also be several corpora by name. The first is what `quality` in the report is of.

    `split`, `chat` and `pack` are the fields of numprune.documents.Reading.
    """

    calibration: Text
    heldout: Heldout
    samples: Count = 128
    sequence_length: Annotated[int, Field(ge=2, lt=2**31)] = SEQUENCE_LENGTH
    seed: Seed = 0
    split: Annotated[str, AfterValidator(_separator)] = WHOLE_FILE
    chat: bool = False
    pack: Annotated[bool | Literal["auto"], PlainValidator(_pack)] = "auto"

    @property
    def corpora(self) -> dict[str, str | list[str]]:
        """The held-out text by name, the first one first; "" is the name of text that has none."""
        return self.heldout if isinstance(self.heldout, dict) else {"": self.heldout}

    def reading(self) -> Reading:
        return Reading(self.split, self.chat, self.pack)


class Prune(Section):
    """The fields of numprune.options.PruneOptions except the target; `stream`: layer by layer, from disk.

    `budget`: bytes that the released weights may take, as "6GiB", in the place of `ratio`, which is 0 then;
    `quantize.scheme` determines how blocks may be stored. The allocation "error" divides it.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.3
    criterion: Criterion = "obs"
    allocation: Allocation = "uniform"
    compensation: Compensation = "joint"
    axes: Annotated[list[Axis], Field(min_length=1), AfterValidator(_distinct)] = list(DEFAULT_AXES)
    keep: list[Annotated[str, Field(min_length=1)]] = []
    floors: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    skips: bool = False
    budget: Annotated[str, AfterValidator(_budget)] = NO_BUDGET
    drop_layers: Annotated[int, Field(ge=0, lt=2**31)] = 0
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    seed: Seed = 0
    batch_size: Count = 8
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _by_budget(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("budget", NO_BUDGET) == NO_BUDGET:
            return data
        return {"ratio": 0.0, "allocation": "error", **data}

    @property
    def bytes_allowed(self) -> int | None:
        """Of the released weights; None: the ratio decides."""
        return None if self.budget == NO_BUDGET else parse(self.budget)


class Learn(Section):
    """Masks that choose what pruning keeps: with `method` "none", `prune.criterion` does.

    They are trained on text of `data.calibration`, in rows of `data.sequence_length` tokens, for `tokens`; 0: as many
    as the variant asks for. `learning_rate`: of the weights, which "faster" does not train. See numprune.learning.
    """

    method: Literal["none"] | LearningMethod = "none"
    variant: LearningVariant = "faster"
    tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
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
    train: TrainedWeights = "all"
    rank: Count = 16
    blocks: Count = 4
    prompts: PromptFiles = []
    generated_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    seed: Seed = 0


class Quantize(Section):
    """How the pruned weights are stored: `scheme` "none" leaves them unchanged. See numprune.quantization.

    "mixed": each block in the stored precision, in w8a8 or in w4a16, as `prune.budget` decides. `group_size`: channels
    that share a scale in w4a16; the other schemes have a scale per row.
    """

    scheme: QuantizedTo = "none"
    method: QuantizationMethod = "gptq"
    group_size: Literal[32, 64, 128] = 128

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

    targets: Annotated[list[ExportFormat], AfterValidator(_distinct)] = ["vllm", "onnx"]
    shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(MB|GB)$")] = "5GB"
    opset: Literal[20, 23] = 23
    dtype: Dtype = "auto"


class Evaluate(Section):
    """`prompts` for greedy generation with both models: "built-in", or a list of texts; [] for none.

    `tasks` of the lm-evaluation-harness, by name or as a YAML file, are answered by both models in `task_runtime`.
    `num_fewshot`: examples per item, or "task" for the task's own number. `limit`: items of each task, or "all".
    """

    prompts: Prompts = BUILT_IN
    tasks: Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(_distinct)] = []
    num_fewshot: FewShot = TASKS_OWN
    limit: Limit = ALL_ITEMS
    task_runtime: TaskRuntime = "torch"


class Benchmark(Section):
    """The load of each repeat, on both sides; see numprune.serving.benchmark, and its `vllm` for that runtime.

    `torch_mode`: decoding mode of the runtime torch; "auto": compiled on a GPU. `batch_sizes`, `lengths` and `passes`
    are for encoders, which have no prompts and no output. `price_per_hour` of the machine, in any currency, adds the
    cost of a million tokens to the report; 0: unknown.
    """

    runtimes: Annotated[list[Runtime], Field(min_length=1), AfterValidator(_distinct)] = ["torch", "onnxruntime"]
    device: Device = "auto"
    torch_mode: TorchMode = "auto"
    prompts: Count = 4
    prompt_length: Count = 128
    output_length: Annotated[int, Field(ge=2, lt=2**31)] = 32
    batch_size: Count = 1
    repeats: Annotated[int, Field(lt=2**31), AfterValidator(_repeats)] = 10
    warmup: Count = 1
    seed: Seed = 0
    concurrency: Annotated[list[Count], Field(min_length=1), AfterValidator(_distinct)] = [1, 4]
    goodput_ttft_ms: Count = 200
    goodput_tpot_ms: Count = 50
    kv_cache_mib: Count = 256
    maximum_failed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    batch_sizes: Annotated[list[Count], Field(min_length=1), AfterValidator(_distinct)] = [1, 8]
    lengths: Annotated[list[Count], Field(min_length=1), AfterValidator(_distinct)] = [32, 128]
    passes: Count = 4
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def load(self, runtime: str, task: str = CAUSAL_LM) -> dict[str, Any]:
        """The runtime's load: fields of Load, of ServedLoad or, for encoders, of EncoderLoad."""
        encoders = {"batch_sizes", "lengths", "passes"}
        if task != CAUSAL_LM:
            return self.model_dump(include={*encoders, "repeats", "warmup", "seed"})
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


class Recipe(Section):
    """A whole recipe; every path in it is absolute. Gates have no default: every release must be gated."""

    model: Model
    data: Data
    learn: Learn = Learn()
    prune: Prune = Prune()
    recover: Recover = Recover()
    quantize: Quantize = Quantize()
    target: Target = Target()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    benchmark: Benchmark = Benchmark()
    gates: Annotated[list[Gate], Field(min_length=1)]
    registry: Registry

    @model_validator(mode="after")
    def _groups_agree(self) -> Self:
        asked, groups = self.target.quantization_group, self.quantize.channels_per_scale
        if groups is not None and asked not in (1, groups):
            raise ValueError(
                f"target.quantization_group = {asked}: quantize.group_size is {groups}; omit "
                "target.quantization_group, or set both to the same value"
            )
        return self

    @model_validator(mode="after")
    def _training_options_have_an_effect(self) -> Self:
        of: dict[str, TrainedWeights] = {"rank": "lora", "blocks": "blocks"}
        for name, train in of.items():
            value, default = getattr(self.recover, name), Recover.model_fields[name].default
            if value != default and self.recover.train != train:
                raise ValueError(
                    f'recover.{name} = {value}: it has an effect only with recover.train = "{train}"; leave it out'
                )
        if self.recover.generated_share != Recover.model_fields["generated_share"].default and not self.recover.prompts:
            raise ValueError(
                f"recover.generated_share = {self.recover.generated_share}: it has an effect only with "
                "recover.prompts; leave it out"
            )
        if self.learn.learning_rate != LEARNING_RATE and self.learn.variant == "faster":
            raise ValueError(
                f"learn.learning_rate = {self.learn.learning_rate}: it is that of the weights, which "
                'learn.variant = "faster" does not train; leave it out'
            )
        return self

    @model_validator(mode="after")
    def _bits_follow_from_a_budget(self) -> Self:
        if self.quantize.scheme == "mixed" and self.prune.bytes_allowed is None:
            raise ValueError(
                'quantize.scheme = "mixed": the bits of each block follow from a budget of bytes; set prune.budget, or '
                "choose one scheme for all"
            )
        if self.prune.bytes_allowed is not None and self.export.dtype != "auto":
            raise ValueError(
                f"export.dtype = {self.export.dtype!r}: prune.budget counts the weights as they are stored; leave "
                "export.dtype out"
            )
        return self

    def sizes(self) -> SizeTarget:
        """The servers' constraints on sizes, including groups of channels that share a scale."""
        groups = self.quantize.channels_per_scale
        return replace(self.target.sizes(), **({} if groups is None else {"quantization_group": groups}))

    def to_toml(self) -> str:
        """The recipe with all defaults filled in, as stored in a release."""
        data = self.model_dump(mode="json", exclude_none=True)
        gates = data.pop("gates")
        tables = [(f"[{name}]", section) for name, section in data.items()] + [("[[gates]]", gate) for gate in gates]
        return "\n".join("\n".join([header, *_lines(section), ""]) for header, section in tables)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


def source_of(asked: str | None) -> Path:
    """Return the file of the requested recipe, by default the embedded one."""
    return Path(asked) if asked else EMBEDDED_RECIPE


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the validated recipe in `path`, changed by `overrides`.

    Args:
        path: a TOML file; paths in it are relative to its folder.
        overrides: `section.key=value`, the value in TOML syntax or as a plain string; paths are relative to the current
            folder.

    Raises:
        InputError: the file is missing or not TOML, or has invalid values; one line per problem.
    """
    data = _read(path)
    _make_absolute(data, path.parent)
    problems = [problem for override in overrides if (problem := _override(data, override))]
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += described(error, Recipe)
    if problems:
        raise InputError(listed(f"recipe {path}", problems))
    try:
        recipe.to_toml().encode()
    except UnicodeEncodeError:  # a name whose bytes are not text, which a shell can pass and a release cannot store
        raise InputError(f"recipe {path}: a name or path in it is not UTF-8; rename the file or folder") from None
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAXIMUM_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"recipe {path}: no such file") from None
    if len(raw) > _MAXIMUM_BYTES:
        raise InputError(f"recipe {path}: exceeds the {_MAXIMUM_BYTES:,}-byte limit")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOML's own and Unicode's errors are ValueErrors
        raise InputError(f"recipe {path}: not TOML: {error}") from None


def _override(data: dict[str, Any], override: str) -> str | None:
    """Apply `override` to `data`; return the problem, if any."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not (parts == ["gates"] or (len(parts) == 2 and all(parts))):
        return f"--set {override}: must be section.key=value, or gates=[…]"
    value = _value(text)
    if parts == ["gates"]:
        data["gates"] = value
        return None
    section = data.setdefault(parts[0], {})
    if not isinstance(section, dict):
        return f"--set {override}: {parts[0]} has no keys that can be set"
    where = (parts[0], parts[1])
    section[parts[1]] = _anchored(value, Path.cwd(), where) if where in _PATHS else value
    return None


def _value(text: str) -> Any:
    """`text` as a TOML value; anything else is a plain string, so that a shell needs no second pair of quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # TOML's own errors are ValueErrors
        return text
    return parsed["value"] if len(parsed) == 1 else text


_PATHS = {
    ("model", "path"),
    ("data", "calibration"),
    ("data", "heldout"),
    ("recover", "prompts"),
    ("evaluate", "tasks"),
}
TASK_FILES = (".yaml", ".yml")


def _make_absolute(data: dict[str, Any], base: Path) -> None:
    for section, key in _PATHS:
        keys = data.get(section)
        if isinstance(keys, dict) and key in keys:
            keys[key] = _anchored(keys[key], base, (section, key))


def _anchored(value: Any, base: Path, key: tuple[str, ...]) -> Any:
    """`value` relative to `base` if it is a path; "embedded", hub ids, names and invalid values are unchanged."""
    if isinstance(value, list):
        return [_anchored(item, base, key) for item in value]
    if isinstance(value, dict):
        return {name: _anchored(item, base, key) for name, item in value.items()}
    if not isinstance(value, str) or value in ("", EMBEDDED):
        return value
    if key == ("evaluate", "tasks") and not value.endswith(TASK_FILES):
        return value
    try:
        path = (base / Path(value).expanduser()).absolute()
    except RuntimeError:  # an unknown ~user is a folder name
        path = (base / value).absolute()
    if key == ("model", "path") and not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", value):
        return value
    return os.path.normpath(path)


def _lines(section: dict[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in section.items()]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(key)} = {_toml(item)}' for key, item in value.items())}}}"
    # JSON's strings, numbers, booleans and arrays are valid TOML, except that TOML requires DEL to be escaped.
    return json.dumps(value, ensure_ascii=False).replace(chr(127), chr(92) + "u007f")
