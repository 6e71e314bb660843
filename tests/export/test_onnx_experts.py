"""Experts in an ONNX graph compute the same as the model's."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from numprune.export.onnx_experts import EXPERTS

SIZES = {"hidden_size": 16, "intermediate_size": 12, "num_local_experts": 6, "num_experts_per_tok": 2}


@pytest.mark.parametrize(("family", "kind"), [("mixtral", MixtralExperts), ("gpt_oss", GptOssExperts)])
@pytest.mark.parametrize("tokens", [1, 3, 4, 20])  # up to three of them gather the weights of their experts
def test_exported_experts_match_the_model(family: str, kind: Any, tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES)
    config._experts_implementation = "eager"
    module = kind(config)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    hidden = torch.randn(tokens, 16, generator=draw)
    weights, chosen = torch.rand(tokens, 6, generator=draw).softmax(-1).topk(2)
    with torch.no_grad():
        expected = module(hidden, chosen, weights)
        found = ALL_EXPERTS_FUNCTIONS[EXPERTS](module, hidden, chosen, weights)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
