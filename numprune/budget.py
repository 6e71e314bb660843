"""The cost of a model from its anatomy alone: parameters, FLOPs and KV cache, before and after a plan."""

from dataclasses import dataclass

from numprune.blocks import Anatomy, Block
from numprune.families import Kind
from numprune.slices import Size


@dataclass(frozen=True)
class Budget:
    """The cost of a model.

    Attributes:
        parameters: total, with tied embeddings counted once.
        prunable_parameters: those of units (attention and MLP projections); ratios refer to these.
        flops_per_token: 2 per weight used for a token, including the output matrix, without attention over the context;
            of a layer's experts, only those that the token is routed to count. In stages, those of an image divided by
            its patches.
        attention_flops_per_context_token: additional FLOPs for each token already in the context; 0 in windows.
        kv_bytes_per_token: keys and values of all layers in the configuration's dtype; 0 for an encoder.
    """

    parameters: int
    prunable_parameters: int
    flops_per_token: int
    attention_flops_per_context_token: int
    kv_bytes_per_token: int


def budget_of(anatomy: Anatomy) -> Budget:
    """Return the cost of `anatomy`."""
    prunable = sum(block.parameters(block.size) for block in anatomy.blocks)
    used = sum(round(_used(block) * anatomy.share_of_tokens(block)) for block in anatomy.blocks)
    attention = anatomy.of_kind("attention")
    cached = attention if anatomy.task == "causal-lm" else ()
    return Budget(
        parameters=anatomy.fixed_parameters + prunable + sum(b.shared_parameters for b in anatomy.blocks if b.units),
        prunable_parameters=prunable,
        flops_per_token=2 * (used + anatomy.output_parameters),
        attention_flops_per_context_token=sum(4 * block.channels for block in attention if not block.in_windows),
        kv_bytes_per_token=sum(2 * block.units * anatomy.head_dim for block in cached) * anatomy.bytes_per_value,
    )


def kv_bytes(anatomy: Anatomy, context: int, value: int | None = None) -> int:
    """Return the bytes of keys and values of one sequence of `context` tokens; a layer with a window keeps only that.

    `value`: bytes of an entry; None: those of the configuration's dtype.
    """
    entries = 0
    for block in anatomy.of_kind("attention"):
        window = anatomy.window_of(block)
        kept = context if window is None else min(context, window)
        entries += 2 * block.units * anatomy.head_dim * kept
    return entries * (value or anatomy.bytes_per_value)


def _used(block: Block) -> int:
    """Return the parameters that a token is multiplied by."""
    return block.parameters(block.size) - block.idle_parameters - block.table_parameters


@dataclass(frozen=True)
class PruningStep:
    """The parameters that are removed with some units of a block, or with members of each of its units.

    Attributes:
        units: removed from one block; in a model in stages from one of the first, and multiples of it from others.
        members: removed from each remaining unit.
        every_layer: share of the prunable parameters if every block of the kind loses this many.
        one_layer: share if a single block does, the one where they are largest.
    """

    units: int
    members: int
    every_layer: float
    one_layer: float


def pruning_step(
    anatomy: Anatomy, kind: Kind, units: int = 0, members: int = 0, *, scores: bool | None = None
) -> PruningStep:
    """Return the step of removing `units` units, or `members` members of each unit, from blocks of this kind.

    Blocks that cannot lose this many are left out; each unit keeps at least one member. `scores`: as in `axes.Axis`.
    """
    prunable = budget_of(anatomy).prunable_parameters
    shares = []
    for block in anatomy.of_kind(kind):
        gone = units * block.multiple
        if block.units >= gone and block.members > members and scores in (None, block.scores is not None):
            left = Size(block.units - gone, block.members - members)
            shares.append((block.parameters(block.size) - block.parameters(left)) / prunable)
    return PruningStep(units, members, sum(shares), max(shares, default=0.0))
