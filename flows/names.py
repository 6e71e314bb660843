"""The names allowed in recipes and on the command line, and those of folders.

The former are repeated here so that neither needs a tensor library to refuse a wrong one; a test keeps them in sync
with the implementation.
"""

from collections.abc import Collection
from typing import Literal

Criterion = Literal[
    "numerical", "numerical-newton", "obs", "taylor", "flap", "dimap", "wanda", "magnitude", "random", "frequency"
]
Allocation = Literal["uniform", "global", "error"]
Axis = Literal["kv-groups", "query-heads", "qk-dims", "channels", "experts", "expert-channels", "hidden-size"]
Basis = Literal["fisher", "coordinates"]
Compensation = Literal["none", "bias", "oneshot", "sequential", "residual", "joint"]
Refine = Literal["none", "search"]
DEFAULT_AXES: tuple[Axis, ...] = ("kv-groups", "channels", "experts", "expert-channels")
Recovery = Literal["distill"]
TrainedWeights = Literal["all", "lora", "blocks"]
LearnedAxis = Literal["kv-groups", "query-heads", "channels", "experts", "expert-channels", "hidden-size"]
LEARNED_AXES: tuple[LearnedAxis, ...] = ("kv-groups", "channels", "experts")  # by default
LearningMethod = Literal["vib"]
LearningVariant = Literal["full", "fast", "faster"]
# What each variant trains on by default: 5,000 rows of 512 tokens, or 3 % of that.
LEARNING_TOKENS: dict[LearningVariant, int] = {"full": 2_560_000, "fast": 76_800, "faster": 76_800}
LEARNING_RATE = 1e-4  # of the weights
# Of [prune]: what masks may remove.
LEARNED_LIMITS = ("ratio", "budget", "allocation", "axes", "keep", "floors", "skips")
LearningConstraint = Literal["parameters", "flops", "bytes", "kv-bytes", "milliseconds"]
CHECKPOINT = "checkpoint"  # the folder of a checkpoint in its stage, and the part of a release that servers load
# The folder of a run's learned masks; in it, and in that of `numprune learn`: the plan, and the trained weights.
LEARNED, LEARNED_PLAN, LEARNED_MODEL = "learned", "plan.json", "model"
Scheme = Literal["fp8", "w8a8", "w4a16"]
QuantizedTo = Literal["none", "mixed", "fp8", "w8a8", "w4a16"]  # mixed: a scheme for each block
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 128  # by default
TIMED_SIZES, MOST_TIMED_SIZES = 16, 64  # of each kind of block: by default, and at most
LM_HEAD_BITS = (4, 8)
QuantizationMethod = Literal["gptq", "rtn"]
ExportFormat = Literal["vllm", "onnx", "onnxruntime", "tensorrt"]
Runtime = Literal["torch", "onnxruntime", "tensorrt", "vllm"]
Device = Literal["auto", "cpu", "cuda"]
TorchMode = Literal["auto", "eager", "compiled"]
TaskRuntime = Literal["torch", "vllm"]
TASKS_OWN: Literal["task"] = "task"  # number of examples before an item
ALL_ITEMS: Literal["all"] = "all"  # of a task
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# The runtime in which an export is verified.
RUNTIME_OF_EXPORT: dict[str, str] = {
    "vllm": "torch",
    "onnx": "onnxruntime",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
}
ENGINE_BATCH, ENGINE_LENGTH = 8, 1024  # engines of TensorRT run at least these
# The exports that a runtime can run, fastest first; torch runs the checkpoint.
EXPORTS_OF_RUNTIME: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "tensorrt": ("tensorrt",),
    "vllm": ("vllm",),
}
SEQUENCE_LENGTH = 512
# The folder with the state of a training, before its digest, and the lock file in it.
TRAINING, TRAINING_LOCK = ".training-", "lock"
TIMINGS = ".timings-"  # the same for a measurement of latencies
ROOFLINE: Literal["roofline"] = "roofline"  # the times of blocks are estimated
TimedRuntime = Literal["torch", "onnxruntime", "tensorrt", "vllm"]  # in which single blocks are timed
Scheduler = Literal["threads", "dask", "ray"]  # of a sweep's candidates
Objective = Literal["fastest", "smallest", "best-quality"]  # by which a sweep chooses
CAUSAL_LM = "causal-lm"  # the task of decoders
EMBEDDED = "embedded"  # the model or text that comes with numprune
BUILT_IN = "built-in"  # the prompts of numprune.generation


def export_of(runtime: str, formats: Collection[str]) -> str | None:
    """Return the export that a runtime runs; None if it runs the checkpoint, or if its export is not among them."""
    return next((name for name in EXPORTS_OF_RUNTIME.get(runtime, ()) if name in formats), None)


def runtime_of(export_format: str, formats: Collection[str]) -> str | None:
    """Return the runtime that times an export; None if no runtime does, or if it times another of `formats`."""
    runtime = RUNTIME_OF_EXPORT[export_format]
    return runtime if export_of(runtime, formats) == export_format else None


def folder_name(export_format: str) -> str:
    """Return the name of an export in a release, and its folder in the stage."""
    return CHECKPOINT if export_format == "vllm" else export_format
