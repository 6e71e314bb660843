"""Routed experts in ONNX: matrix products whose shapes do not depend on the routing.

For a few tokens, the weights of their experts are gathered, so a decoding step reads no others. For a prompt, gathered
weights would be many times as large as the layer; there, every expert computes all tokens, and the routing weights the
results.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

EXPERTS = "numprune_onnx"  # the name under which transformers finds it


def _experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' output (T, H) for tokens (T, H), each routed to `chosen` (T, k) with `weights` (T, k)."""

    def gathered(*routed: Tensor) -> Tensor:
        found: Tensor = batched_mm_experts_forward(module, *routed)
        return found

    def every(*routed: Tensor) -> Tensor:
        return _every_expert(module, *routed)

    experts = module.down_proj.shape[0]
    few = chosen.shape[0] * chosen.shape[1] <= experts  # the gathered weights are no larger than the layer
    found: Tensor = torch.cond(few, gathered, every, (hidden, chosen, weights))
    return found


def _every_expert(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    inner = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", hidden)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outputs = _linear(module, "down_proj", inner)  # (E, T, H)
    routing = hidden.new_zeros(hidden.shape[0], outputs.shape[0]).scatter_add(1, chosen, weights.to(hidden.dtype))
    return (routing.transpose(0, 1)[..., None] * outputs).sum(0)


def _linear(module: Any, name: str, states: Tensor) -> Tensor:
    """Return all experts' projections (E, T, out) of (T, in) or (E, T, in). Weights keep their stored layout."""
    weight = getattr(module, name)
    # Not states @ weightᵀ: ONNX Runtime would keep a transposed copy of the weights in addition to the gathered ones.
    found = states @ weight if module.is_transposed else (weight @ states.transpose(-1, -2)).transpose(-1, -2)
    return found + getattr(module, f"{name}_bias")[:, None] if module.has_bias else found


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)
