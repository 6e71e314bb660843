"""The contenders: one model in several precisions, exported by numprune and by onnxruntime-genai's builder."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from numprune.errors import MissingRuntime
from numprune.export import genai, onnx
from numprune.quantization import Scheme
from numprune.quantization.lm_head import LmHeadBits

Precision = Literal["float32", "int8", "int4"]
Program = Literal["torch", "onnxruntime", "onnxruntime-genai"]

Source = tuple[Precision, LmHeadBits]

BUILDER = "genai's builder"
TORCH = "PyTorch, eager"
SCHEMES: dict[Precision, Scheme] = {"int8": Scheme("w8a8"), "int4": Scheme("w4a16", 64)}
_BUILDER_PRECISIONS: dict[Precision, str] = {"float32": "fp32", "int8": "int8", "int4": "int4"}
_LAST_LINES = 5


@dataclass(frozen=True)
class Contender:
    """A way to run the model.

    Attributes:
        maker: the exporter.
        precision: of the weights.
        program: the runtime.
        options: of the builder.
        lm_head_bits: of the output matrix in numprune's quantized exports.
    """

    maker: str
    precision: Precision
    program: Program
    options: tuple[tuple[str, str], ...] = ()
    lm_head_bits: LmHeadBits = 8

    @property
    def name(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options) or "default settings"
        head = ", lm_head_bits=4" if self.lm_head_bits == 4 else ""
        suffix = {BUILDER: f", {options}", "numprune": f"{head}, in {self.program}"}.get(self.maker, "")
        return f"{self.maker}, {self.precision}{suffix}"

    @property
    def source(self) -> Source:
        """The checkpoint that is exported; the builder quantizes the model itself."""
        return ("float32" if self.maker == BUILDER else self.precision), self.lm_head_bits


# The builder's settings that can make decoding on a CPU faster: larger blocks have fewer scales.
_LAST_ONLY = ("prune_lm_head", "true")
_FASTER = (("block_size", "128"), _LAST_ONLY)
CONTENDERS = (
    Contender(TORCH, "float32", "torch"),
    Contender("numprune onnx", "float32", "onnxruntime"),
    Contender("numprune", "float32", "onnxruntime"),
    Contender("numprune", "float32", "onnxruntime-genai"),
    Contender("numprune", "int8", "onnxruntime"),
    Contender("numprune", "int4", "onnxruntime"),
    Contender("numprune", "int4", "onnxruntime-genai"),
    Contender("numprune", "int4", "onnxruntime", lm_head_bits=4),
    Contender("numprune", "int4", "onnxruntime-genai", lm_head_bits=4),
    Contender(BUILDER, "float32", "onnxruntime-genai"),
    Contender(BUILDER, "float32", "onnxruntime-genai", (_LAST_ONLY,)),
    Contender(BUILDER, "int8", "onnxruntime-genai"),
    Contender(BUILDER, "int8", "onnxruntime-genai", _FASTER),
    Contender(BUILDER, "int4", "onnxruntime-genai"),
    Contender(BUILDER, "int4", "onnxruntime-genai", _FASTER),
)


def make(contender: Contender, checkpoints: Mapping[Source, Path], scratch: Path) -> Path:
    """Return the contender's folder, created in `scratch` once.

    Args:
        checkpoints: the model and its quantized versions.

    Raises MissingRuntime with the builder's last lines if it fails.
    """
    source = checkpoints[contender.source]
    if contender.program == "torch":
        return source
    options = (str(contender.lm_head_bits), *(value for _, value in contender.options))
    parts = (contender.maker, contender.precision, *options)
    out = scratch / "-".join(parts).replace(" ", "-").replace("'", "")
    if not out.exists():
        if contender.maker == BUILDER:
            _build(contender, source, out)
        elif contender.maker == "numprune":
            genai.export(source, out)
        else:
            onnx.export(source, out)
    return out


def _build(contender: Contender, model: Path, out: Path) -> None:
    command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "--execution_provider", "cpu"]
    command += ["--input", str(model), "--output", str(out), "--cache_dir", str(out.with_name("cache"))]
    command += ["--precision", _BUILDER_PRECISIONS[contender.precision]]
    if contender.options:
        command += ["--extra_options", *(f"{key}={value}" for key, value in contender.options)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = " | ".join((ended.stderr or ended.stdout).strip().splitlines()[-_LAST_LINES:])
        raise MissingRuntime(f"{contender.name}: onnxruntime-genai's builder failed: {last}")
