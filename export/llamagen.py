"""A checkpoint from the published files of LlamaGen, which are no Hugging Face checkpoints."""

import argparse
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from numprune.errors import InputError, reason
from numprune.export import checkpoint, files, temporary
from numprune.export.config import set_dtype
from numprune.export.headers import read_headers
from numprune.export.shards import writing
from numprune.llamagen.config import LlamaGenConfig
from numprune.llamagen.convert import config_of, converted

_WRAPPERS = ("model", "module", "state_dict")  # of the state dict in published files


def convert(source: Path, out: Path, *, codes_per_image: int, heads: int | None = None) -> LlamaGenConfig:
    """Write a published state dict as a checkpoint of `LlamaGenForCausalLM` to the new folder `out`.

    Args:
        source: a .pt or .safetensors file. Of the former only tensors are read, no code is run.
        codes_per_image, heads: as for `config_of`.

    Raises:
        InputError: the file cannot be read, or is not of a class-conditional LlamaGen.
        IntegrityError: a value is not finite.
    """
    state = _read(source)
    config = config_of(state, codes_per_image, heads)
    with temporary.beside(out) as folder:
        without_values = {name: tensor.to("meta") for name, tensor in state.items()}
        dtypes = {name: tensor.dtype for name, tensor in converted(without_values, config)}
        with writing(folder, dtypes) as writer:
            for name, tensor in converted(state, config):
                writer.add({name: tensor})
        set_dtype(config, read_headers(folder))
        files.write_object(folder / files.CONFIG, json.loads(config.to_json_string()))
        checkpoint.audit(folder)
        temporary.move(folder, out)
    return config


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training checkpoints of LlamaGen also hold the trainer's arguments: a Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, LookupError, TypeError, EOFError):  # their messages say nothing of use
        raise InputError(
            f"{path}: not a file of tensors: it is damaged, or holds Python objects, which are not read; save the "
            "state dict alone"
        ) from None
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: not a file of tensors: {reason(error)}") from None
    for wrapper in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
            break
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for name, value in found.items()
    ):
        raise InputError(
            f"{path}: not a state dict; it must hold dense tensors by name, perhaps under {', '.join(_WRAPPERS)}"
        )
    return found
