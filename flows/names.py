"""The names that a recipe and the command line may use.

They stand here, and not only where they are implemented, so that neither needs a tensor library to refuse a wrong one;
a test keeps them the same.
"""

from typing import Literal

Criterion = Literal[
    "numerical", "numerical-newton", "obs", "taylor", "flap", "wanda", "magnitude", "random", "frequency"
]
Allocation = Literal["uniform", "global", "error"]
Axis = Literal["kv-groups", "query-heads", "channels", "experts", "expert-channels"]
Compensation = Literal["none", "bias", "oneshot", "sequential", "residual", "joint"]
DEFAULT_AXES: tuple[Axis, ...] = ("kv-groups", "channels", "experts", "expert-channels")
Scheme = Literal["fp8", "w8a8", "w4a16"]
GROUP_SIZES = (32, 64, 128)
QuantizationMethod = Literal["gptq", "rtn"]
ExportFormat = Literal["vllm", "onnx", "tensorrt"]
Runtime = Literal["torch", "onnxruntime", "tensorrt", "vllm"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# In which an export is proved.
RUNTIME_OF_EXPORT: dict[str, str] = {"vllm": "torch", "onnx": "onnxruntime", "tensorrt": "tensorrt"}
# What a runtime runs; torch runs the checkpoint.
EXPORT_OF_RUNTIME: dict[str, str] = {"onnxruntime": "onnx", "tensorrt": "tensorrt"}
SEQUENCE_LENGTH = 512
CAUSAL_LM = "causal-lm"  # the task of decoders
BUILT_IN = "built-in"  # the prompts of numprune.generation
