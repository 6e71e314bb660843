"""What attention heads look at: the mean share of their attention on special tokens, itself, the one before, the rest.

For images also where the class token looks. The kinds of heads are those of Clark et al., What Does BERT Look At?
(BlackboxNLP 2019). Notation: n heads, S tokens, P patches.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from numprune.blocks import Anatomy, Block
from numprune.calibration import check_rows
from numprune.families import FAMILIES
from numprune.layers import Layers
from numprune.plans import BlockPlan
from numprune.progress import progress
from numprune.windows import windows_of

CATEGORIES: Final = ("special", "self", "previous", "rest")


@torch.no_grad()
def attention_masses(layers: Layers, rows: Tensor, special: Collection[int]) -> dict[str, Tensor]:
    """Return each attention block's masses, (n, 4) in [0, 1] in the order of `CATEGORIES`, by block name.

    A token's attention on special tokens and on the first token of its row, which decoders use as a sink, is "special";
    what is left of it is on the token itself, on the one before, and on the rest. Means are over the rows' tokens but
    the first of each, which sees nothing else in a decoder. They add up to less than 1 where a learned sink (GPT-OSS)
    takes its share. One layer is walked at a time, with one row at a time.

    Args:
        layers: of a supported model, in memory or streamed.
        rows: (N, S) int64 tokens, S > 1, or images (N, C, height, width).
        special: ids of special tokens.

    Raises InputError for rows that are not the model's.
    """
    check_rows(layers.anatomy, rows)
    found: dict[str, Tensor] = {}
    marked = _special(layers.anatomy, rows, special)
    for name, row, weights in _all_weights(layers, rows):
        own = marked[row, : weights.shape[-1]]  # later stages have fewer tokens, none of them special
        share = masses(weights, own.to(weights.device)).cpu() / len(rows)
        found[name] = found[name] + share if name in found else share
    return found


@torch.no_grad()
def attention_maps(layers: Layers, images: Tensor) -> dict[str, Tensor]:
    """Return the attention on each patch, by block name: (N, n, P) in [0, 1]; P differs between stages.

    That of the first token, the class's, or where images have no such token the mean of all patches.

    Args:
        layers: of a classifier of images.
        images: (N, C, height, width).

    Raises InputError for images that are not the model's.
    """
    check_rows(layers.anatomy, images)
    patches = FAMILIES[layers.anatomy.family].patches
    assert patches is not None
    count = len(patches.tokens)
    maps: dict[str, list[Tensor]] = {}
    for name, _, weights in _all_weights(layers, images):
        seen = weights[:, 0, count:] if count else weights.mean(1)
        maps.setdefault(name, []).append(seen.float().cpu())
    return {name: torch.stack(found) for name, found in maps.items()}


def _all_weights(layers: Layers, rows: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Yield the name of each attention block, the index of a row, and the attention there, (n, S, S)."""
    with _eager(layers.config):
        entered = [layers.enter(row[None]) for row in rows]
        hidden = [one.hidden for one in entered]
        for index in progress(range(layers.anatomy.layers), "attention", "layer"):
            blocks = [block for block in layers.anatomy.of_layer(index) if block.kind == "attention" and block.units]
            with layers.layer(index) as layer, _eager(*_configs(layer, blocks)):
                for number, one in enumerate(entered):
                    with _watched(layer, blocks) as weights:
                        entering = one.arguments[index].merged(hidden[number])
                        hidden[number] = one.arguments[index].call(layer, entering)
                    for name, seen in weights.items():
                        yield name, number, seen[0]


def _special(anatomy: Anatomy, rows: Tensor, special: Collection[int]) -> Tensor:
    """Return which tokens are special, (N, S) bool; for images, all but those of patches."""
    if patches := FAMILIES[anatomy.family].patches:
        return (torch.arange(anatomy.context) < len(patches.tokens)).expand(len(rows), -1)
    marked = torch.isin(rows, torch.tensor(sorted(special), dtype=rows.dtype))
    marked[:, 0] = True
    return marked


def masses(weights: Tensor, special: Tensor) -> Tensor:
    """Return the means over all tokens but the first, (n, 4).

    Args:
        weights: (n, S, S) attention of each token, in the second dimension, on each, in the last.
        special: (S,) bool, tokens that count as special.
    """
    later = weights[:, 1:].double()
    on_special = later[..., special].sum(-1)  # (n, S - 1), as all below
    on_self = later.diagonal(1, 1, 2).masked_fill(special[1:], 0)
    on_previous = later.diagonal(0, 1, 2).masked_fill(special[:-1], 0)
    rest = later.sum(-1) - on_special - on_self - on_previous
    return torch.stack([on_special, on_self, on_previous, rest], -1).mean(1)


def kept_heads(block: BlockPlan, count: int) -> np.ndarray:
    """Return which of its `count` heads an attention block keeps, (n,) bool.

    Its members are heads, or dimensions of queries and keys, of which every head keeps some.
    """
    if count == block.units:
        return np.isin(np.arange(count), block.kept)
    heads, left = np.zeros((block.units, block.members), bool), block.to_kept()
    for unit, members in zip(left.units.tolist(), left.members.tolist(), strict=True):
        heads[unit, members] = True
    return heads.ravel()


def correlations(found: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Return Spearman's rank correlation of each category's mass with being kept, over all heads of the model.

    None where all heads were kept, or none, or all have the same mass.

    Args:
        found: block name -> (n, 4) masses.
        kept: block name -> (n,) bool, of the same blocks.
    """
    from scipy import stats

    if not kept:
        return dict.fromkeys(CATEGORIES)
    table = np.concatenate([found[name] for name in kept])  # (heads, 4)
    decided = np.concatenate([kept[name] for name in kept]).astype(float)
    return {
        category: float(stats.spearmanr(column, decided).statistic) if np.ptp(column) and np.ptp(decided) else None
        for category, column in zip(CATEGORIES, table.T, strict=True)
    }


@contextmanager
def _watched(layer: nn.Module, blocks: Sequence[Block]) -> Iterator[dict[str, Tensor]]:
    """Give each block's weights (1, n, S, S) by its name, once the layer has run.

    What returns them, beside its output, is an attention block's first module in every family.
    """
    weights: dict[str, Tensor] = {}

    def watch(block: Block, _: nn.Module, __: Any, output: Any) -> None:
        weights[block.name] = windows_of(layer, block).attention(output[1]) if block.in_windows else output[1]

    with ExitStack() as stack:
        for block in blocks:
            module = layer.get_submodule(block.modules[0])
            stack.callback(module.register_forward_hook(partial(watch, block)).remove)
        yield weights


def _configs(layer: nn.Module, blocks: Sequence[Block]) -> list[Any]:
    """Return the configurations of attention blocks: the model's, or copies of it where layers differ (modeling.py)."""
    modules: list[Any] = [layer.get_submodule(block.modules[0]) for block in blocks]
    return [module.config for module in modules]


@contextmanager
def _eager(*configs: Any) -> Iterator[None]:
    """Have the model compute attention such that its weights are there to be seen."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
