"""ONNX with dynamic batch size and lengths, including a decoder's KV cache: one graph file and its weights.

The graph uses standard ONNX operators only, which both ONNX Runtime and TensorRT support and which are exact for
left-padded rows. Networks that `onnx_decoder` supports are written directly, all others are traced by `onnx_traced`;
the graphs have the same inputs and outputs.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint, compressed_tensors, manifest
from numprune.export.onnx_decoder import OPSETS, write_decoder, writes
from numprune.export.onnx_graph import DATA_FILE, Graph, save
from numprune.export.onnx_standard import StandardOperators
from numprune.export.precision import DTYPES, FLOAT32
from numprune.export.tasks import load_task
from numprune.export.weights import read_finite

KIND = "onnx"  # of the folder
MODEL_FILE = "model.onnx"
FLAVOUR = "standard-operators"
VOCABULARY = "vocabulary"  # in the manifest if some input tokens have no logit

# Rotary embeddings whose frequencies do not depend on the sequence length: they are constants of the graph.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


def check_config(config: Any) -> None:
    """Refuse a model that cannot be exported to ONNX. Raises InputError."""
    found = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in found.values() if isinstance(value, dict)]
    for parameters in by_layer_type or [found]:
        kind = parameters.get("rope_type", "default")
        if kind not in _STATIC_ROPE:
            raise InputError(
                f"config.json: rope_type={kind!r} is not supported in ONNX, nor in TensorRT, which is built from it; "
                f"supported are {', '.join(_STATIC_ROPE)}. Leave onnx and tensorrt out"
            )


def export(source: Path, out: Path, *, opset: int = 23, dtype: str = FLOAT32) -> manifest.Manifest:
    """Write the checkpoint `source` as ONNX to the new folder `out`.

    Biases, norms, sliding windows, tied embeddings and layers of different sizes are taken from the checkpoint; the
    graph computes logits at the positions in `logits_to_keep`: all of them for scoring, or the last one for the first
    token. A network that is written directly passes through memory one tensor at a time; a traced one is in memory as a
    whole.

    Args:
        source: a checkpoint folder of a supported architecture.
        out: must not exist.
        opset: 23, or 20 for runtimes that do not know Attention, RMSNormalization and RotaryEmbedding.
        dtype: of weights, KV cache and hidden states, one of `precision.DTYPES`. Other inputs and outputs are int64
            and float32.

    A quantized checkpoint is written with its dequantized weights.

    Raises:
        InputError: `out` exists, or the architecture, opset, a setting of config.json or a scheme that rounds
            activations is not supported.
        IntegrityError: the checkpoint is not what its configuration says, or a weight is too large for `dtype`.
    """
    if opset not in OPSETS:
        raise InputError(f"opset={opset} is not supported; choose one of {', '.join(map(str, OPSETS))}")
    found = compressed_tensors.quantization_in(source)
    if found and any(scheme.rounds_inputs for scheme in found.schemes):
        compressed_tensors.refuse_quantized(source, "ONNX, whose graph rounds no activations,")
    config = checkpoint.read_config(source)
    check_config(config)
    anatomy = read_anatomy(config)
    direct = writes(config)
    packages = ("onnx",) if direct else ("onnx", "onnxscript", "torch", "transformers")
    facts: dict[str, JsonValue] = {
        "flavour": FLAVOUR,
        "exporter": "numprune" if direct else "torch",
        "opset": opset,
        "dtype": dtype,
        **({VOCABULARY: anatomy.vocabulary} if anatomy.predicted != anatomy.vocabulary else {}),
        **{package: version(package) for package in packages},
        "file": MODEL_FILE,
    }
    parents = {"checkpoint": manifest.folder_digest(source)}
    metadata = {"flavour": FLAVOUR, "family": config.model_type, "checkpoint": parents["checkpoint"]}
    with manifest.creating(out, kind=KIND, parents=parents, facts=facts) as folder:
        if direct:
            _write(source, folder, config, opset, dtype, metadata)
        else:
            from numprune.export.onnx_traced import trace

            model = checkpoint.load_model(source, DTYPES[dtype])
            trace(model, load_task(source), folder / MODEL_FILE, opset, metadata)
        checkpoint.copy_around_weights(config, source, folder)
    return manifest.read(out)


def _write(source: Path, folder: Path, config: Any, opset: int, dtype: str, metadata: dict[str, str]) -> None:
    headers = checkpoint.audit(source)
    checkpoint.load_tokenizer(source)
    with (folder / DATA_FILE).open("wb") as data:
        graph = Graph(data, DTYPES[dtype])
        write_decoder(
            graph, config, frozenset(headers), lambda name: read_finite(headers[name]), opset, StandardOperators
        )
    save(graph.model(opset, metadata), folder / MODEL_FILE)
