"""The model card of a pruned checkpoint: README.md in the format of the Hugging Face hub.

It replaces the base model's card, whose figures are those of the dense model. Licence, language and the base model's
name on the hub are carried over.
"""

import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from transformers import PreTrainedConfig

from numprune.anatomy import PER_LAYER_PREFIX, code_vocabulary, read_anatomy, task_name
from numprune.budget import budget_of
from numprune.counted import counted, numbered_layers
from numprune.dtypes import name_of
from numprune.errors import InputError
from numprune.export import vllm
from numprune.export.card_changes import KV, PRECISION, QUALITY, TRAINING, UNMEASURED, USE, row
from numprune.export.config import read_config
from numprune.export.files import CARD, MAXIMUM_CONFIG_BYTES, require_size
from numprune.families.family import TaskName
from numprune.modeling import AUTO_OF
from numprune.plans import PLAN_FILE, HiddenPlan, Plan

_CARRIED = ("license", "license_name", "license_link", "language")
_CHARACTERS = 500  # of a carried value
_PER_LAYER = "per-layer-sizes"

_PLUGIN = """\
vLLM needs numprune's plug-in for it. In a numprune checkout, with the environment of vLLM 0.32 active, install both:
`pip install --no-deps . ./serving/vllm_plugin`."""

# Task name -> the hub's pipeline tag.
_PIPELINES = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "classification": "text-classification",
    "embedding": "feature-extraction",
    "image-classification": "image-classification",
}
_OF_IMAGES = "unconditional-image-generation"  # the hub has no tag for images of a class


def write(folder: Path, base: Path, plan: Plan) -> None:
    """Write the card of the checkpoint in `folder`, which was pruned from `base` by `plan`. Raises InputError."""
    metadata = _metadata(base / CARD)
    (folder / CARD).write_text(_text(folder, base, plan, metadata), encoding="utf-8")


def hub_id(folder: Path) -> str | None:
    """Return the hub id of a model in the hub's local cache (models--OWNER--NAME/snapshots/REVISION)."""
    resolved = folder.absolute()
    if resolved.parent.name != "snapshots":
        return None
    kind, *parts = resolved.parent.parent.name.split("--")
    return "/".join(parts) if kind == "models" and len(parts) in (1, 2) else None


def _text(folder: Path, base: Path, plan: Plan, metadata: dict[str, Any]) -> str:
    config = read_config(folder)
    before, after = (budget_of(read_anatomy(read_config(path))) for path in (base, folder))
    per_layer = config.model_type.startswith(PER_LAYER_PREFIX)
    task = task_name(config)
    name = hub_id(base)
    header = ModelCardData(
        **metadata,
        base_model=name,
        library_name="transformers",
        pipeline_tag=_PIPELINES[task] if code_vocabulary(config) is None else _OF_IMAGES,
        tags=["numprune", "structured-pruning", *([_PER_LAYER] if per_layer else [])],
    )
    shown = f"[{name}](https://huggingface.co/{name})" if name else f"`{base.absolute().name}`"
    licence = "under the base model's licence" if "license" in metadata else "see the licence of the base model"
    removed = 1 - after.prunable_parameters / before.prunable_parameters
    rows = [
        ("base model", shown),
        ("method", f"criterion {plan.criterion}, allocation {plan.allocation}, compensation {plan.compensation}"),
        ("removed", f"{removed:.1%} of the prunable parameters ({_asked(plan)})"),
        ("parameters", f"{before.parameters:,} → {after.parameters:,}"),
        *([("attention window", _window(plan))] if plan.window else []),
        *([("hidden size", _hidden_size(plan.hidden))] if plan.hidden else []),
        ("calibration", _calibration(config, task, plan)),
        (TRAINING, "none"),
        ("kept units", f"[{PLAN_FILE}]({PLAN_FILE})"),
        (PRECISION, name_of(config.dtype)),
    ]
    if before.kv_bytes_per_token:
        rows.append((KV, f"{before.kv_bytes_per_token:,} → {after.kv_bytes_per_token:,} bytes"))
    return "\n".join(
        [
            f"---\n{header.to_yaml()}\n---",
            f"# {shown}, pruned\n",
            f"Made by numprune: structured pruning, so the model is smaller in any runtime; {licence}.\n",
            "| | |\n| --- | --- |",
            *(row(key, value) for key, value in rows),
            f"\n{QUALITY}\n{UNMEASURED}",
            _use(config, task, per_layer) + _serve(folder),
        ]
    )


def _calibration(config: PreTrainedConfig, task: TaskName, plan: Plan) -> str:
    rows, length = plan.calibration.rows, plan.calibration.sequence_length
    if task == "image-classification":
        return counted(rows, "image")
    if code_vocabulary(config) is not None:
        return f"{counted(rows, 'image')} of {counted(length - 1, 'code')}"
    return f"{rows:,} rows of {length:,} tokens"


def _asked(plan: Plan) -> str:
    limits = [plan.time_budget.described] if plan.time_budget else []
    limits += [f"{plan.budget.limit:,} bytes of weights"] if plan.budget else []
    limits += [str(plan.kv_budget)] if plan.kv_budget else []
    return f"to meet a budget of {' and '.join(limits)}" if limits else f"{plan.ratio:.1%} asked for"


def _window(plan: Plan) -> str:
    asked = f", for at most {plan.sequence_budget}" if plan.sequence_budget else ""
    return f"{plan.window:,} tokens in {numbered_layers(plan.windowed_layers())} of the base model{asked}"


def _hidden_size(hidden: HiddenPlan) -> str:
    rotated = ", directions of the rotated residual stream" if hidden.basis == "fisher" else ""
    return f"{hidden.size:,} → {len(hidden.kept):,}{rotated}"


def _use(config: Any, task: TaskName, per_layer: bool) -> str:
    ours = type(config).__module__.startswith("numprune.")
    if per_layer:
        needs = "Layers differ in size, so transformers needs numprune to load it."
    elif ours:
        needs = "transformers needs numprune to load this architecture."
    else:
        needs = "This is a stock architecture: transformers loads it without numprune."
    imports = "import numprune.modeling\n" if ours else ""
    reader, reads = (
        ("AutoTokenizer", "tokenizer") if task != "image-classification" else ("AutoImageProcessor", "processor")
    )
    name, names, reading = (
        AUTO_OF[task].__name__,
        f"{AUTO_OF[task].__name__}, {reader}",
        f'{reads} = {reader}.from_pretrained(".")\n',
    )
    if code_vocabulary(config) is not None:
        # An image generator has no tokenizer, and transformers' own class for it no auto class.
        name = name if ours else config.architectures[0]
        names, reading = name, ""
    return (
        f"{USE}{needs}\n\n```python\n{imports}from transformers import {names}\n\n"
        f'model = {name}.from_pretrained(".", dtype="auto")\n{reading}```\n\n'
    )


def _serve(folder: Path) -> str:
    """How to serve the checkpoint in `folder` with vLLM."""
    try:
        facts = vllm.serving_facts(folder)
    except InputError:
        return "vLLM does not serve this model.\n"
    options = facts["needs"]
    assert isinstance(options, list)
    install = f"{_PLUGIN}\n\n" if facts["plugin"] else ""
    command = shlex.join(["vllm", "serve", ".", *map(str, options)])
    return f"{install}To serve it, replace the dot by the name of the repository or folder:\n\n```\n{command}\n```\n"


def _metadata(card: Path) -> dict[str, Any]:
    """Return the metadata of the base's card that also holds for the pruned model; empty without a card.

    A card is untrusted text: only plain values are carried over.
    """
    if not card.exists():
        return {}
    require_size(card, MAXIMUM_CONFIG_BYTES)
    try:
        found = metadata_load(card) or {}
    except (ValueError, RecursionError, yaml.YAMLError):  # not UTF-8, not YAML, or not a mapping
        return {}
    return {key: found[key] for key in _CARRIED if _is_plain(found.get(key))}


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and len(item) <= _CHARACTERS for item in items)
