"""State dicts in files that are no Hugging Face checkpoints."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from numprune.errors import InputError, reason

_WRAPPERS = ("model", "module", "state_dict")  # of the state dict in published files


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or .pt file by name. Of a .pt file only tensors are read, no code is run.

    Raises InputError: the file cannot be read, or holds something else.
    """
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
