"""Everything with a layer's number gets the new one."""

import pytest
import torch
from transformers import AutoConfig

from numprune.anatomy import read_anatomy
from numprune.configs import pruned_config
from numprune.layers import replaced
from numprune.renumber import renumber_tensors
from numprune.surgery import assemble
from tests.conftest import build_tiny

ROWS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


def test_later_tensors_are_renumbered_and_dropped_ones_are_absent():
    names = {f"gpt_neox.layers.{layer}.mlp": layer for layer in (0, 2, 9, 10, 11)}
    names |= {"gpt_neox.embed_in.weight": -1, "embed_out.weight": -2}
    assert renumber_tensors(names, "gpt_neox.layers", [2, 10]) == {
        "gpt_neox.layers.0.mlp": 0,
        "gpt_neox.layers.8.mlp": 9,
        "gpt_neox.layers.9.mlp": 11,
        "gpt_neox.embed_in.weight": -1,
        "embed_out.weight": -2,
    }


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("dropped", "first"), [([0], 1), ([1, 3], 1), ([3], 2), ([0, 1], 0)])
def test_window_counts_follow_the_remaining_first_layers(family, dropped, first):
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model = build_tiny(family, num_hidden_layers=4, **windows)
    with replaced([model.model.layers[layer] for layer in dropped], lambda hidden, *_, **__: hidden), torch.no_grad():
        expected = model(ROWS).logits
    config = pruned_config(model.config, read_anatomy(model.config).without(dropped), dropped=dropped)
    assert config.max_window_layers == first
    # Whoever reads `layer_types` and whoever reads `max_window_layers` sees the same windows.
    older = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    assert AutoConfig.for_model(**older).layer_types == config.layer_types
    tensors = renumber_tensors(model.state_dict(), "model.layers", dropped)
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.")}
    with torch.no_grad():
        torch.testing.assert_close(assemble(model, config, inside)(ROWS).logits, expected, atol=1e-5, rtol=1e-5)
