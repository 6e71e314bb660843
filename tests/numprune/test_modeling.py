"""Configurations of per-layer models; tests/test_families.py tests what the models compute."""

import pytest
from transformers import AutoConfig

import numprune.modeling  # noqa: F401 - registers the per-layer classes
from numprune.anatomy import PER_LAYER_PREFIX
from tests.conftest import TINY

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
