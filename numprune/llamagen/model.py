"""LlamaGen as a model of transformers, registered with its auto classes.

Notation for shapes: B rows, S positions, D channels of a head.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from numprune.llamagen.config import LlamaGenConfig


def rotary_table(position_ids: Tensor, grid: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (B, S, D), float32, of positions (B, S): 0 is the class, then codes row by row.

    The first half of the frequencies turns with the row, the second with the column. Both values are zero at the class.
    """
    half = head_dim // 2
    frequencies = base ** (-torch.arange(0, half, 2, device=position_ids.device).float() / half)  # (D / 4,)
    code = (position_ids - 1).clamp(min=0)[..., None]
    row, column = torch.div(code, grid, rounding_mode="floor"), code % grid
    angles = torch.cat([row * frequencies, column * frequencies], -1)  # (B, S, D / 2)
    angles = torch.cat([angles, angles], -1)
    is_code = (position_ids > 0)[..., None].float()
    return angles.cos() * is_code, angles.sin() * is_code


class GridRotaryEmbedding(nn.Module):
    """Two-dimensional rotary embeddings. They have no buffers, which would be lost on the meta device."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self._grid, self._head_dim = config.grid, int(config.head_dim)
        self._base = float(config.rope_parameters["rope_theta"])

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_table(position_ids, self._grid, self._head_dim, self._base)
        return cos.to(hidden.dtype), sin.to(hidden.dtype)


class LlamaGenModel(LlamaModel):
    config_class = LlamaGenConfig

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        self.rotary_emb = GridRotaryEmbedding(config)


class LlamaGenForCausalLM(LlamaForCausalLM):
    config_class = LlamaGenConfig

    def __init__(self, config: LlamaGenConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LlamaGenModel(config)
        codes = config.vocab_size - config.num_classes - 1
        self.lm_head = nn.Linear(config.hidden_size, codes, bias=False)
        self.post_init()


AutoModel.register(LlamaGenConfig, LlamaGenModel)
AutoModelForCausalLM.register(LlamaGenConfig, LlamaGenForCausalLM)
