"""Read config.json with precise errors, and write it so that older readers compute the same model.

Reading does not need torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from numprune import dtypes
from numprune.anatomy import PER_LAYER_PREFIX, read_anatomy
from numprune.configs import pruned_config
from numprune.errors import InputError, reason
from numprune.export import files
from numprune.export.compressed_tensors import quantization_in
from numprune.export.headers import FLOATS, TensorHeader, has_weights, main_dtype, read_headers
from numprune.quantization import compressed_tensors

_ADAPTER = "adapter_config.json"


def read_config(folder: Path) -> Any:
    """Return the configuration of a supported architecture. Its dtype is that of the stored weights, if there are any.

    Raises:
        InputError: config.json is missing or malformed, or the architecture is not supported.
        IntegrityError: a file of weights is missing or truncated.
    """
    config = declared_config(folder)
    if has_weights(folder):
        set_dtype(config, read_headers(folder))
    return config


def set_dtype(config: Any, stored: Mapping[str, TensorHeader]) -> None:
    """Set the dtype of `config` to that of the stored weights."""
    config.dtype = dtypes.in_config(FLOATS[main_dtype(stored)])


def declared_config(folder: Path) -> Any:
    """Return the configuration of a supported architecture, with the dtype that config.json declares.

    The quantization config is left out: compressed_tensors.py handles it, and weights are read into a floating-point
    model.

    A Llama whose head count does not divide the hidden size is read as a Mistral configuration of the same network,
    which transformers accepts.

    Raises:
        InputError: config.json is missing or malformed, or the architecture is not supported.
    """
    if (folder / _ADAPTER).exists():
        raise InputError(
            f"{folder / _ADAPTER}: the folder contains an adapter, which would be ignored; merge the adapter first "
            "(peft: merge_and_unload) and save the merged model to a separate folder"
        )
    path = folder / files.CONFIG
    if not path.exists():
        raise InputError(f"{path}: missing; a model is a folder with config.json, safetensors weights and a tokenizer")
    content = files.read_object(path)
    quantization_in(folder)  # refuses all others
    for field in ("dtype", "torch_dtype"):
        declared = content.get(field)
        if declared not in (None, "auto", *FLOATS.values()):
            raise InputError(f"{path}: {field}={str(declared)[:80]!r}; it must be one of {', '.join(FLOATS.values())}")
    try:
        config = _parse(folder, content)
        read_anatomy(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a malformed file can make transformers raise anything
        raise InputError(f"{path}: transformers cannot read it: {reason(error)}") from error
    if hasattr(config, compressed_tensors.CONFIG_FIELD):
        delattr(config, compressed_tensors.CONFIG_FIELD)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) and isinstance(window, int) and window < 1:
        raise InputError(f"{path}: sliding_window={window}; use null for no window, or the number of tokens it spans")
    return config


def _parse(folder: Path, content: dict[str, Any]) -> Any:
    if content.get("model_type") == "llama" and content.get("head_dim"):
        hidden, heads = content.get("hidden_size"), content.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads:
            # transformers requires this to divide evenly, even where head_dim is given. numprune does not.
            config = AutoConfig.for_model(**{**content, "model_type": f"{PER_LAYER_PREFIX}llama"})
            return pruned_config(config, read_anatomy(config))
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def write_config(config: Any, source: Path, folder: Path) -> None:
    """Write config.json into `folder`.

    Args:
        config: with the architectures and dtype of the model in `folder`.
        source: the folder of the base model. Its generation settings are carried along:
            transformers reads it from config.json where there is no generation_config.json, and does not write it.
    """
    fields = json.loads(config.to_json_string())
    fields.pop("auto_map", None)  # names code that is not copied
    before = files.read_object(source / files.CONFIG)
    generation = GenerationConfig().to_dict().keys() & before.keys()
    fields |= {name: before[name] for name in generation - fields.keys()}
    files.write_object(folder / files.CONFIG, dict(sorted({**fields, **_for_older_readers(fields)}.items())))


def copy_config(config: Any, source: Path, folder: Path) -> None:
    """Copy config.json, byte for byte if other readers understand it as `read_config` did (`config`)."""
    if files.read_object(source / files.CONFIG).get("model_type") == config.model_type:
        files.copy_without_code(source / files.CONFIG, folder / files.CONFIG)
    else:
        write_config(config, source, folder)


def _for_older_readers(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that transformers before version 5 (and vLLM of that time) reads in place of `dtype` and
    `rope_parameters`.

    Without these fields, they silently compute in float32 with a theta of 10,000 and no scaling.
    """
    older = {"torch_dtype": fields["dtype"]}
    rotary = fields.get("rope_parameters") or {}
    if "rope_theta" in rotary:  # otherwise none, or one for each kind of layer
        older |= {name: rotary[name] for name in ("rope_theta", "partial_rotary_factor") if name in rotary}
        scaling = {name: value for name, value in rotary.items() if name not in older}
        older["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    return older
