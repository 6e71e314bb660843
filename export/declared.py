"""The task settings that a checkpoint's files declare: a classifier's classes, an embedding model's pooling.

torch is not needed.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numprune.errors import InputError
from numprune.export import files
from numprune.pooling import POOLINGS, Pooling

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


@dataclass(frozen=True)
class DeclaredPooling:
    """How an embedding model pools a text, as in `numprune.tasks.embedding.Embedding`."""

    pooling: Pooling = "mean"
    normalized: bool = False
    declared: bool = False


def classes_of(config: Any) -> dict[str, int]:
    """Return name -> index of each class, without names that several classes share.

    Raises InputError unless the model chooses one of several classes, and each name has the index of one of them.
    """
    kind = getattr(config, "problem_type", None)
    if config.num_labels < 2 or kind not in (None, "single_label_classification"):
        raise InputError(
            f"num_labels={config.num_labels}, problem_type={kind!r}: only classifiers that choose one of "
            "several classes are supported"
        )
    found: dict[str, int] = {}
    for field, named in (
        ("label2id", list((config.label2id or {}).items())),
        ("id2label", [(label, index) for index, label in config.id2label.items()]),
    ):
        for label, index in named:
            number = int(index) if str(index).isdecimal() else -1  # transformers' own examples write "0"
            if not 0 <= number < config.num_labels:
                raise InputError(
                    f"config.json: {field} has index {str(index)[:80]!r} for {str(label)[:80]!r}; indices must be 0 to "
                    f"{config.num_labels - 1}"
                )
            found[str(label)] = number
    shown = Counter(map(str, config.id2label.values()))
    return {label: index for label, index in found.items() if shown[label] < 2}


def pooling_in(folder: Path) -> DeclaredPooling:
    """Return the pooling declared in sentence-transformers' files in `folder`; mean pooling without such files.

    Raises:
        InputError: they declare modules that are not supported, or are malformed.
    """
    path = folder / MODULES
    if not path.is_file():
        return DeclaredPooling()
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
    return DeclaredPooling(pooling, normalized, declared=True)


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
