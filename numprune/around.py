"""The tensors outside a model's layers, by its configuration: embeddings, norms, patch merging, heads."""

from collections.abc import Mapping
from typing import Any

from numprune.codes import CodeVocabulary
from numprune.families.family import Family, Patches, Shape, TaskName
from numprune.fields import pair, require_sizes
from numprune.stages import read_stages


def norm_tensors(family: Family, path: str, size: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a norm's parameters."""
    return {f"{path}.{name}": (size,) for name in (("weight", "bias") if family.norm_bias else ("weight",))}


def tensors_around(
    family: Family, config: Any, task: TaskName, prefix: str, context: int, codes: CodeVocabulary | None
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors outside the layers.

    Args:
        task, prefix, context, codes: of the model, as anatomy.py reads them.

    Raises:
        InputError: a size is missing, or not a positive whole number.
    """
    hidden = config.hidden_size

    def shapes(tensors: Mapping[str, Shape]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(_size(config, field) for field in fields) for name, fields in tensors.items()}

    around: dict[str, tuple[int, ...]]
    if family.patches:
        around = _patch_embeddings(family, family.patches, config, context)
    else:
        around = {f"{family.embedding}.weight": (config.vocab_size, hidden)}
    if family.positions:
        path, extra = family.positions
        around[f"{path}.weight"] = (config.max_position_embeddings + extra, hidden)
    around |= shapes(family.around) | _merging_tensors(family, config)
    if family.projection and config.embedding_size != hidden:
        around |= {
            f"{family.projection}.weight": (hidden, config.embedding_size),
            f"{family.projection}.bias": (hidden,),
        }
    if family.final_norm:
        around |= norm_tensors(family, family.final_norm, hidden)
    around = {f"{prefix}{name}": shape for name, shape in around.items()}
    around |= shapes(family.heads_of.get(task, {}))
    if task in ("causal-lm", "masked-lm") and not config.tie_word_embeddings:
        head = shapes(family.untied)
        around |= head if codes is None else {name: (codes.codes, *shape[1:]) for name, shape in head.items()}
    return around


def _merging_tensors(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    stages = family.stages
    if stages is None:
        return {}
    found: dict[str, tuple[int, ...]] = {}
    for number, stage in enumerate(read_stages(stages, config)[:-1]):
        path, hidden = f"{family.layers}.{number}.{stages.merging}", stage.hidden_size
        found[f"{path}.{stages.reduction}.weight"] = (2 * hidden, 4 * hidden)
        found |= norm_tensors(family, f"{path}.{stages.norm}", 4 * hidden)
    return found


def _patch_embeddings(family: Family, patches: Patches, config: Any, context: int) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size if family.stages is None else getattr(config, family.stages.width)
    further: dict[str, tuple[int, ...]] = {}
    if patches.masked is not None and config.use_mask_token:
        further[patches.masked] = (1, hidden)
    if patches.positions is not None:
        further[patches.positions] = (1, context, hidden)
    return {
        **dict.fromkeys(patches.tokens, (1, 1, hidden)),
        **further,
        f"{family.embedding}.weight": (hidden, config.num_channels, *pair(config, "patch_size")),
        f"{family.embedding}.bias": (hidden,),
    }


def _size(config: Any, size: str) -> int:
    """Return a size of a `Shape`. Raises InputError."""
    times, _, field = size.rpartition(" * ")
    require_sizes(config, field)
    return int(times or 1) * int(getattr(config, field))
