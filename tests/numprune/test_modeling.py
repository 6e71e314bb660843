"""Configurations and initialization of per-layer models; tests/test_families.py tests what the models compute."""

import pytest
import torch
from transformers import AutoConfig

from numprune.anatomy import PER_LAYER_PREFIX
from numprune.configs import class_name
from numprune.families import FAMILIES
from numprune.modeling import AUTO_OF
from tests.conftest import OF_FAMILY, TINY, tiny_config

SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16, "use_sliding_window": True}
REFUSED = {
    "unknown block": ({1: {"skip": ["norm"]}}, {}, "known are attention, mlp"),
    "groups": ({1: {"num_key_value_heads": 3}}, {}, "is not a multiple of num_key_value_heads=3"),
    "no attention": ({index: {"skip": ["attention"]} for index in range(2)}, {}, "at least one must have it"),
    "layer types": ({1: {"skip": ["attention"]}}, SLIDING, "with different layer_types"),
}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_contradictory_configuration_is_refused(family, fault):
    layers, fields, message = REFUSED[fault]
    with pytest.raises(Exception, match=message):  # transformers wraps what validate_architecture raises
        AutoConfig.for_model(PER_LAYER_PREFIX + family, **TINY, **fields, per_layer_config=layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_built_from_its_configuration_has_the_initial_weights_of_the_stock_class(family):
    task = FAMILIES[family].tasks[0]

    def built(name, **more):
        torch.manual_seed(0)
        config = tiny_config(name, **{**OF_FAMILY.get(family, {}), **more})
        config.architectures = [class_name(config, task)]  # some families have several for a task
        return AUTO_OF[task].from_config(config)

    stock = built(family)
    first, again = (dict(built(PER_LAYER_PREFIX + family, per_layer_config={}).named_parameters()) for _ in range(2))
    for name, weight in stock.named_parameters():
        assert torch.equal(first[name], again[name]), name
        if weight.numel() >= 1000:
            assert first[name].std().item() == pytest.approx(weight.std().item(), rel=0.15), name
    assert first.keys() == dict(stock.named_parameters()).keys()
