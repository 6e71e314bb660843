"""The task of a checkpoint, from its configuration, its tokenizer and the files of sentence-transformers."""

from pathlib import Path
from typing import Any

from numprune.anatomy import task_name
from numprune.errors import InputError
from numprune.export import files
from numprune.export.config import read_config
from numprune.export.tokenizer import load_tokenizer
from numprune.tasks import CAUSAL, Task
from numprune.tasks.classification import Classification
from numprune.tasks.embedding import POOLINGS, Embedding, Pooling
from numprune.tasks.masked import masked_lm

MODULES = "modules.json"

# The older fields of sentence-transformers' 1_Pooling/config.json, since replaced by a single one.
_MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_lasttoken": "last",
}
_NAMES: dict[str, Pooling] = {
    **{name: name for name in POOLINGS},
    "lasttoken": "last",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
}


def load_task(folder: Path) -> Task:
    """Return the task of the checkpoint in `folder`.

    Raises:
        InputError: a file is missing or malformed, or the task is not supported.
    """
    config = read_config(folder)
    name = task_name(config)
    if name == "causal-lm":
        return CAUSAL
    if name == "masked-lm":
        return masked_lm(load_tokenizer(folder))
    return classification(config) if name == "classification" else embedding(folder)


def classification(config: Any) -> Classification:
    """Return the task of a classifier. Raises InputError unless it chooses one of several classes."""
    kind = getattr(config, "problem_type", None)
    if config.num_labels < 2 or kind not in (None, "single_label_classification"):
        raise InputError(
            f"num_labels={config.num_labels}, problem_type={kind!r}: only classifiers that choose one of "
            "several classes are supported"
        )
    return Classification({str(label): index for label, index in config.label2id.items()})


def embedding(folder: Path) -> Embedding:
    """Return the task of an embedding model, with the pooling declared in sentence-transformers' files.

    Raises:
        InputError: they declare modules that are not supported, or are malformed.
    """
    path = folder / MODULES
    if not path.is_file():
        return Embedding()
    pooling: Pooling = "mean"
    normalized = False
    for module in files.read_array(path):
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        if kind == "Pooling":
            pooling = _pooling(folder / _inside(path, module) / files.CONFIG)
        elif kind == "Normalize":
            normalized = True
        elif kind != "Transformer":
            raise InputError(
                f"{path}: module {kind or module!r} is not supported; supported are Transformer, Pooling and Normalize"
            )
    return Embedding(pooling, normalized, declared=True)


def _inside(path: Path, module: dict[str, Any]) -> str:
    name = module.get("path")
    if not isinstance(name, str) or name != Path(name).name:
        raise InputError(f'{path}: "path": {str(name)[:80]!r} is not the name of a folder beside it')
    return name


def _pooling(path: Path) -> Pooling:
    content = files.read_object(path)
    if "pooling_mode" in content:
        named = content["pooling_mode"]
        found = [_NAMES[named]] if isinstance(named, str) and named in _NAMES else []
    else:
        named = sorted(name for name, value in content.items() if name.startswith("pooling_mode_") and value is True)
        found = [_MODES[name] for name in named if name in _MODES]
    if len(found) != 1:
        raise InputError(f"{path}: pooling {named}; it must be one of {', '.join(POOLINGS)}")
    return found[0]
