"""A float32 model computes in float64 and is unchanged afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from numprune.export import float64

TOKENS = torch.arange(40)


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.detach.default:  # of the stored weights
            self.dtypes |= {leaf.dtype for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)}
        return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_no_intermediate_result_is_rounded_to_float32(tiny_model: Callable[..., PreTrainedModel], family: str) -> None:
    model = tiny_model(family)
    float64.in_float64(model)
    with _Recorded() as recorded:
        logits = float64.logits(model, TOKENS)
    assert logits.shape == (40, 259)
    assert torch.float64 in recorded.dtypes
    assert torch.float32 not in recorded.dtypes


def test_float32_differs_only_by_rounding_and_weights_are_unchanged(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        single = model(input_ids=TOKENS[None]).logits[0]
    float64.in_float64(model)
    first, second = (float64.logits(model, TOKENS) for _ in range(2))
    assert first.equal(second)
    torch.testing.assert_close(float64.logits(model, TOKENS, 37), first[37:], rtol=1e-12, atol=1e-12)
    assert 0 < float((single - first).abs().max()) < 1e-4
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(before[name])
