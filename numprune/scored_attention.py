"""Attention whose queries and keys have fewer dimensions than its values: the stock modules read one size for all."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward


class _ScoredAttention:
    """Forward pass of transformers' ViTAttention, with the dimensions that the projections have.

    The factor of the scores stays that of the stock module.
    """

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return output (n, S, H) and, in eager attention, weights (n, heads, S, S)."""
        shape = (*hidden_states.shape[:-1], self.num_attention_heads, -1)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (one(hidden_states).view(shape).transpose(1, 2) for one in projections)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def take_dims_from_weights(attention: nn.Module) -> None:
    """Make a module of ViT, DeiT or DINOv2 attend with the dimensions of its weights, in place."""
    stock = type(attention)
    if issubclass(stock, _ScoredAttention):
        return
    if stock not in _CLASSES:
        _CLASSES[stock] = type(stock.__name__, (_ScoredAttention, stock), {"__module__": __name__})
    attention.__class__ = _CLASSES[stock]
