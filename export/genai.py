"""ONNX with ONNX Runtime's own operators, in a folder that onnxruntime-genai loads: the fastest form for that runtime.

The network is that of `onnx` with other operators (see `onnx_fused`). genai_config.json tells onnxruntime-genai what is
not in the graph: the names of its inputs and outputs, special tokens, and generation defaults.

A quantized checkpoint keeps its values. For speed, the inputs of every quantized matrix are also rounded, to 8 bits in
blocks, and so is the output matrix, to 8 bits, unless its values are on a 4-bit grid; the manifest states both.
"""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from torch import Tensor

from numprune.anatomy import family_of
from numprune.errors import InputError
from numprune.export import checkpoint, files, manifest, onnx
from numprune.export.headers import QuantizedHeader
from numprune.export.onnx_decoder import ACTIVATIONS, FAMILIES, head_dim_of, turns_all, write_decoder, writes
from numprune.export.onnx_fused import FusedOperators, output_matrix
from numprune.export.onnx_graph import DATA_FILE, Graph, save
from numprune.export.precision import DTYPES, FLOAT32
from numprune.export.weights import read_finite
from numprune.quantization import Quantized, Scheme
from numprune.quantization.lm_head import LmHeadBits, check_groups

KIND = "onnxruntime"
CONFIG_FILE = "genai_config.json"
OPSET = 23
_HEAD_DIM = 16  # GroupQueryAttention's rotary embeddings need a head size that is a multiple of this
_GENERATION = "generation_config.json"


def check_config(config: Any) -> None:
    """Refuse a network that this export does not support. Raises InputError."""
    onnx.check_config(config)
    if not writes(config):
        raise InputError(
            f"onnxruntime: supported are {', '.join(FAMILIES)} with hidden_act {', '.join(ACTIVATIONS)}, not "
            f"{family_of(config).name} with {getattr(config, 'hidden_act', None)}"
            f"{'' if turns_all(config) else ' and layers without rotary positions'}; use onnx (--to onnx)"
        )
    if (head_dim := head_dim_of(config)) % _HEAD_DIM:
        raise InputError(
            f"onnxruntime: head_dim={head_dim}: its GroupQueryAttention only supports multiples of {_HEAD_DIM}; use "
            "onnx (--to onnx)"
        )


def check_precision(dtype: str, device: str) -> None:
    """Refuse a precision that GroupQueryAttention does not support on a device. Raises InputError."""
    if device == "cuda" and dtype == FLOAT32:
        raise InputError(
            "onnxruntime: on CUDA its GroupQueryAttention only supports float16 and bfloat16; export in one of them "
            "(dtype), or use onnx (--to onnx)"
        )


def check_scheme(scheme: Scheme, dtype: str) -> None:
    """Refuse quantized weights that this export cannot run in a precision. Raises InputError."""
    if scheme.is_float:
        raise InputError(
            f"onnxruntime: ONNX Runtime computes with no FP8 weights, and the scheme is {scheme}; quantize to w8a8 or "
            "w4a16, or use vLLM (--to vllm)"
        )
    if dtype != FLOAT32:
        raise InputError(
            f"onnxruntime: quantized weights ({scheme}) are for CPUs, where the rest is computed in float32, not "
            f"{dtype}; leave dtype out or use float32; on a GPU use vLLM (--to vllm)"
        )


def check_lm_head(config: Any, schemes: Iterable[Scheme], bits: LmHeadBits) -> None:
    """Refuse an output matrix in 4 bits where this export cannot store it.

    Args:
        config: of the checkpoint.
        schemes: of its other matrices.
        bits: of the output matrix.

    Raises InputError.
    """
    if bits == 8:
        return
    try:
        check_config(config)
        for scheme in schemes:
            check_scheme(scheme, FLOAT32)
    except InputError as error:
        raise InputError(f"lm_head_bits is 4, which only the export onnxruntime stores; use 8: {error}") from None
    check_groups(config.hidden_size)


def export(source: Path, out: Path, *, dtype: str = FLOAT32) -> manifest.Manifest:
    """Write the checkpoint `source` for ONNX Runtime to the new folder `out`.

    Args:
        source: a checkpoint folder of a Llama-like model.
        out: must not exist.
        dtype: of weights, KV cache and hidden states: a name of `precision.DTYPES`. Quantized weights keep their
            values; the rest is then in float32.

    Raises:
        InputError: `out` exists, or the architecture, a setting of config.json or the scheme of quantized weights is
            not supported.
        IntegrityError: the checkpoint is not what its configuration says, or a weight is too large for `dtype`.
    """
    config = checkpoint.read_config(source)
    check_config(config)
    headers = checkpoint.audit(source)
    quantized = {name: header for name, header in headers.items() if isinstance(header, QuantizedHeader)}
    for header in quantized.values():
        check_scheme(header.scheme, dtype)
    tokenizer = checkpoint.load_tokenizer(source)

    def tensor(name: str) -> Tensor:
        return read_finite(headers[name])

    output = output_matrix(config, quantized, tensor)
    facts: dict[str, JsonValue] = {
        "flavour": KIND,
        "exporter": "numprune",
        "opset": OPSET,
        "dtype": dtype,
        "onnx": version("onnx"),
        "file": onnx.MODEL_FILE,
        **({"rounded": _rounded(quantized, output)} if output else {}),
    }
    parents = {"checkpoint": manifest.folder_digest(source)}
    metadata = {"flavour": KIND, "family": config.model_type, "checkpoint": parents["checkpoint"]}
    with manifest.creating(out, kind=KIND, parents=parents, facts=facts) as folder:
        with (folder / DATA_FILE).open("wb") as data:
            graph = Graph(data, DTYPES[dtype])
            write_decoder(
                graph,
                config,
                frozenset(headers),
                tensor,
                OPSET,
                partial(FusedOperators, quantized, output),
            )
        save(graph.model(OPSET, metadata), folder / onnx.MODEL_FILE)
        checkpoint.copy_around_weights(config, source, folder)
        settings = _settings(config, tokenizer.pad_token_id, folder)
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return manifest.read(out)


def _rounded(quantized: Mapping[str, QuantizedHeader], output: Quantized) -> dict[str, JsonValue]:
    """Return what is rounded, and how: the weights by the checkpoint's schemes, the rest by this export."""
    return {
        "weights": ", ".join(sorted({str(header.scheme) for header in quantized.values()})),
        "activations": "int8",
        "output_matrix": f"int{output.scheme.bits}",
    }


def _settings(config: Any, padding: int | None, folder: Path) -> dict[str, Any]:
    """Return genai_config.json, with the sizes of the first layer that has attention; the graph has all others."""
    layers = config.per_layer_config
    sizes = next(layer for layer in layers if "attention" not in getattr(layer, "skip", ()))
    special, search = _generation(folder)
    ends = special.get("eos_token_id")
    return {
        "model": {
            "type": family_of(config).name,
            **special,
            # Rows are padded with this token, and any equal token in a batch of prompts counts as padding.
            "pad_token_id": padding
            if padding is not None
            else next(iter(ends), 0)
            if isinstance(ends, list)
            else ends or 0,
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": onnx.MODEL_FILE,
                "hidden_size": config.hidden_size,
                "head_size": head_dim_of(config),
                "num_attention_heads": sizes.num_attention_heads,
                "num_key_value_heads": sizes.num_key_value_heads or sizes.num_attention_heads,
                "num_hidden_layers": len(layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {**search, "max_length": config.max_position_embeddings, "past_present_share_buffer": True},
    }


def _generation(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the special tokens and sampling defaults that the checkpoint's files state."""
    said = files.read_object(folder / files.CONFIG)
    if (folder / _GENERATION).is_file():
        said |= files.read_object(folder / _GENERATION)
    special = {name: said[name] for name in ("bos_token_id", "eos_token_id") if _is_token(said.get(name))}
    kinds: dict[str, type | tuple[type, ...]] = {
        "do_sample": bool,
        "top_k": int,
        **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), (int, float)),
    }
    search = {name: said[name] for name, kind in kinds.items() if isinstance(said.get(name), kind)}
    return special, search


def _is_token(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, list) and bool(value))
