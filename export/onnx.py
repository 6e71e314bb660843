"""ONNX with KV cache and dynamic batch, prompt and past lengths: standard operators only, one file plus its weights.

There is one flavour, named in the model's metadata: operators of the ONNX standard alone, which ONNX Runtime and
TensorRT both take and which are exact for left-padded rows (see `onnx_decoder`).
"""

from importlib.metadata import version
from pathlib import Path

from pydantic import JsonValue

from numprune.anatomy import Anatomy, read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint, manifest
from numprune.export.onnx_decoder import FAMILIES, OPSETS, write_decoder
from numprune.export.onnx_graph import DATA_FILE, Graph, save
from numprune.export.weights import read_tensor

MODEL_FILE = "model.onnx"
FLAVOUR = "standard-operators"


def check_family(anatomy: Anatomy) -> None:
    """Refuse a family whose network the writer does not know. Raises InputError."""
    if anatomy.family not in FAMILIES:
        raise InputError(
            f"{anatomy.family} is not supported in ONNX, nor in TensorRT, which is built from it; supported are "
            f"{', '.join(FAMILIES)}. Leave onnx and tensorrt out"
        )


def export(source: Path, out: Path, *, opset: int = 23) -> manifest.Manifest:
    """Write the checkpoint `source` as ONNX in float32 to the new folder `out`.

    The weights pass through memory one tensor at a time. Biases, norms, sliding windows, tied embeddings and layers of
    different sizes are taken from the checkpoint; the graph keeps logits of the positions that `logits_to_keep` names,
    all of them for scoring or the last one for the first token.

    Args:
        source: a checkpoint folder of a supported architecture.
        out: must not exist.
        opset: 23, or 20 for runtimes that do not know Attention, RMSNormalization and RotaryEmbedding.

    Raises:
        InputError: `out` exists, or the architecture, opset or a setting of config.json is not supported.
        IntegrityError: the checkpoint is not what its configuration says.
    """
    if opset not in OPSETS:
        raise InputError(f"opset={opset} is not supported; choose one of {', '.join(map(str, OPSETS))}")
    config = checkpoint.read_config(source)
    check_family(read_anatomy(config))
    headers = checkpoint.audit(source)
    checkpoint.load_tokenizer(source)
    facts: dict[str, JsonValue] = {
        "flavour": FLAVOUR,
        "opset": opset,
        "dtype": "float32",
        "onnx": version("onnx"),
        "file": MODEL_FILE,
    }
    parents = {"checkpoint": manifest.folder_digest(source)}
    with manifest.creating(out, kind="onnx", parents=parents, facts=facts) as folder:
        with (folder / DATA_FILE).open("wb") as data:
            graph = Graph(data)
            write_decoder(graph, config, frozenset(headers), lambda name: read_tensor(headers[name]), opset)
        metadata = {"flavour": FLAVOUR, "family": config.model_type, "checkpoint": parents["checkpoint"]}
        save(graph.model(opset, metadata), folder / MODEL_FILE)
        checkpoint.copy_around_weights(config, source, folder)
    return manifest.read(out)
