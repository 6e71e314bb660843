"""Attention spans: which layers of a model may see only a window of the last tokens.

No tensor library is needed; windowing.py chooses the layers.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from numprune.blocks import Anatomy
from numprune.cache_budget import SequenceBudget
from numprune.errors import InputError
from numprune.families import FAMILIES

Enough = Callable[[Sequence[int]], bool]  # whether windows in these layers suffice


def full_layers(anatomy: Anatomy) -> list[int]:
    """Return the layers whose attention sees the whole context."""
    return [block.layer for block in anatomy.of_kind("attention") if block.units and anatomy.window_of(block) is None]


def check_window(anatomy: Anatomy, window: int | None, count: int, budget: SequenceBudget | None) -> None:
    """Refuse windows that the model cannot have, before any work.

    Args:
        window: tokens that some layers will see.
        count: of these layers; 0: as many as the budget needs.
        budget: of the KV cache of a sequence, or None.

    Raises:
        InputError: with the reason and the remedy.
    """
    if window is None:
        given = f"window_layers is {count}" if count else f"the budget is {budget}"
        raise InputError(f"{given}, and no window is given; set window to the tokens that these layers see, like 1024")
    asked = f"window is {window}"
    if FAMILIES[anatomy.family].windows is None:
        able = ", ".join(name for name, family in FAMILIES.items() if family.windows is not None)
        raise InputError(f"{asked}: single layers of {anatomy.family} cannot have a window; those of {able} can")
    if anatomy.task != "causal-lm":
        raise InputError(f"{asked}: only decoders have windows, and the model is for {anatomy.task}; leave it out")
    if not 1 <= window < anatomy.context:
        raise InputError(f"{asked}; it must be at least 1, and less than the model's context of {anatomy.context}")
    if not count and budget is None:
        raise InputError(f"{asked}: give window_layers, or a budget of KV cache like kv=8MiB@ctx=4096")
    if count and budget is not None:
        raise InputError(f"window_layers is {count}, and the budget is {budget}; leave one of them out")
    _check_layers(anatomy, window, count)
    if budget is not None:
        _check_budget(anatomy, window, budget)


def _check_layers(anatomy: Anatomy, window: int, count: int) -> None:
    if any(not block.units for block in anatomy.of_kind("attention")):
        raise InputError(f"window is {window}: a layer has no attention, which is not supported beside windows")
    full = full_layers(anatomy)
    if not full:
        raise InputError(
            f"window is {window}: every layer of the model already has a window of {anatomy.sliding_window}; leave "
            "window and window_layers out"
        )
    if len(full) < anatomy.layers and window != anatomy.sliding_window:
        raise InputError(
            f"window is {window}, and the model's own windows are {anatomy.sliding_window}: a configuration holds one "
            f"size; set window to {anatomy.sliding_window}"
        )
    if count < 0 or count > len(full):
        raise InputError(f"window_layers is {count}; it must be at most {len(full)}, the layers without a window")


def _check_budget(anatomy: Anatomy, window: int, budget: SequenceBudget) -> None:
    if budget.context > anatomy.context:
        raise InputError(f"the budget is {budget}, and the model takes at most {anatomy.context:,} tokens")
    before, least = budget.cost(anatomy), budget.cost(with_windows(anatomy, window, full_layers(anatomy)))
    if budget.limit >= before:
        raise InputError(f"the budget is {budget}, and the model takes {before:,} as it is; leave the budget out")
    if budget.limit < least:
        raise InputError(
            f"the budget is {budget}, and with a window of {window} in every layer it takes {least:,}; allow more, or "
            "choose a smaller window"
        )


def check_reach(window: int | None, length: int) -> None:
    """Refuse rows of `length` tokens in which nothing lies beyond the window. Raises InputError."""
    if window is not None and length <= window:
        raise InputError(
            f"window is {window}, and rows of {length} tokens do not reach beyond it, so its price cannot be "
            f"measured; use rows of more than {window} tokens, better {2 * window} or more"
        )


def enough(anatomy: Anatomy, window: int, count: int, budget: SequenceBudget | None) -> Enough:
    """Return what tells whether windows in some layers are as many as `count`, or meet the budget."""
    if budget is None:
        return lambda chosen: len(chosen) >= count
    return lambda chosen: budget.cost(with_windows(anatomy, window, chosen)) <= budget.limit


def least_windows(anatomy: Anatomy, window: int, suffices: Enough) -> Anatomy:
    """Return the anatomy with as few windows as possible, in the layers with the most KV heads."""
    chosen: list[int] = []
    for layer in sorted(full_layers(anatomy), key=lambda layer: -anatomy.of_layer(layer)[0].units):
        if suffices(chosen):
            break
        chosen.append(layer)
    return with_windows(anatomy, window, chosen)


def with_windows(anatomy: Anatomy, window: int, layers: Collection[int]) -> Anatomy:
    """Return the anatomy with a window in these layers beside those that have one."""
    own = FAMILIES[anatomy.family].windows
    if not layers or own is None:
        return anatomy
    full = [layer for layer in full_layers(anatomy) if layer not in layers]
    blocks = (
        replace(block, sliding=bool(full) and block.layer not in full) if block.kind == "attention" else block
        for block in anatomy.blocks
    )
    return replace(
        anatomy,
        family=own.family or anatomy.family,
        blocks=tuple(blocks),
        sliding_window=window,
        attention_differs=bool(full),
    )
