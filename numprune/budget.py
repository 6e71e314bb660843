"""What an anatomy costs: parameters, arithmetic and cache, before and after a plan, without touching a weight."""

from dataclasses import dataclass

from numprune.blocks import Anatomy
from numprune.families import Kind
from numprune.slices import Size


@dataclass(frozen=True)
class Budget:
    """The cost of a model.

    Attributes:
        parameters: all of them, tied embeddings counted once.
        prunable_parameters: those that belong to a unit (attention and MLP projections); ratios refer to these.
        flops_per_token: 2 per weight that a token meets, the output matrix included, attention over the context not; of
            a layer's experts a token meets those it is routed to.
        attention_flops_per_context_token: added to it for each token already in the context.
        kv_bytes_per_token: keys and values of all layers in the configuration's dtype; an encoder keeps none.
    """

    parameters: int
    prunable_parameters: int
    flops_per_token: int
    attention_flops_per_context_token: int
    kv_bytes_per_token: int


def budget_of(anatomy: Anatomy) -> Budget:
    """Return the cost of `anatomy`."""
    prunable = sum(block.parameters(block.size) for block in anatomy.blocks)
    idle = sum(block.idle_parameters for block in anatomy.blocks)
    attention = anatomy.of_kind("attention")
    cached = attention if anatomy.task == "causal-lm" else ()
    return Budget(
        parameters=anatomy.fixed_parameters + prunable + sum(b.shared_parameters for b in anatomy.blocks if b.units),
        prunable_parameters=prunable,
        flops_per_token=2 * (prunable - idle + anatomy.output_parameters),
        attention_flops_per_context_token=sum(4 * block.channels for block in attention),
        kv_bytes_per_token=sum(2 * block.units * anatomy.head_dim for block in cached) * anatomy.bytes_per_value,
    )


@dataclass(frozen=True)
class PruningStep:
    """What the removal of some units of a block, or of members of each of its units, takes from the model.

    Attributes:
        units: of one block.
        members: of each unit that is left.
        every_layer: share of the prunable parameters that goes when every block of the kind loses so many.
        one_layer: share when one block does, the one where they are largest.
    """

    units: int
    members: int
    every_layer: float
    one_layer: float


def pruning_step(anatomy: Anatomy, kind: Kind, units: int = 0, members: int = 0) -> PruningStep:
    """Return what so many units, or members of each unit, of the blocks of this kind take from the model.

    Blocks that cannot lose so many are left out; each unit keeps at least one member.
    """
    prunable = budget_of(anatomy).prunable_parameters
    shares = []
    for block in anatomy.of_kind(kind):
        if block.units >= units and block.members > members:
            left = Size(block.units - units, block.members - members)
            shares.append((block.parameters(block.size) - block.parameters(left)) / prunable)
    return PruningStep(units, members, sum(shares), max(shares, default=0.0))
