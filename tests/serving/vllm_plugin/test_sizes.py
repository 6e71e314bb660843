"""Configurations, checked by the plug-in before vLLM loads anything."""

import pytest
import torch
from numprune_vllm.architectures import ARCHITECTURES
from numprune_vllm.sizes import Expected, check_layers, check_parallel, check_settings, expected_tensors
from transformers import AutoConfig

from numprune.anatomy import PER_LAYER_PREFIX
from numprune.errors import InputError
from numprune.families import FAMILIES
from numprune.quantization import Scheme
from numprune.quantization.compressed_tensors import CONFIG_FIELD, config_of
from tests.serving.vllm_plugin.engine import build, sizes_of


def config(family="llama", **fields):
    return AutoConfig.for_model(PER_LAYER_PREFIX + family, **{**sizes_of(family), "per_layer_config": {}, **fields})


def test_the_plug_in_knows_the_families_that_it_serves():
    assert list(ARCHITECTURES.values()) == [family for family in FAMILIES.values() if family.vllm.per_layer]
    for architecture, family in ARCHITECTURES.items():
        assert type(build(PER_LAYER_PREFIX + family.name, per_layer_config={})).__name__ == architecture


def test_settings_that_must_be_equal_in_all_layers_are_checked():
    with pytest.raises(ValueError, match=r"per_layer_config sets head_dim; only .* and skip may differ"):
        check_layers(config(per_layer_config={1: {"head_dim": 64}}))


def test_a_missing_head_size_is_refused():
    with pytest.raises(ValueError, match="head_dim is missing"):
        check_layers(config("qwen2", head_dim=None))


def test_a_setting_unsupported_by_every_vllm_class_is_refused():
    with pytest.raises(ValueError, match="numprune_gpt2: vLLM does not run it with reorder_and_upcast_attn"):
        check_settings(config("gpt2", reorder_and_upcast_attn=True))


def test_only_known_buffers_are_ignored():
    """The buffer that old GPT-2 checkpoints hold ends like one of its biases."""
    expected = Expected({"h.0.attn.c_attn.bias": (96,)}, computed=FAMILIES["gpt2"].computed)
    assert expected.ignores("h.0.attn.bias")
    assert not expected.ignores("h.0.attn.c_attn.bias")
    assert not expected.ignores("h.0.mlp.c_fc.bias")


# Layer 0 has 8 query heads, 2 KV heads and a width of 96, layer 1 no attention, layer 2 no MLP.
LAYERS = {
    0: {},
    1: {"skip": ["attention"], "intermediate_size": 64},
    2: {"num_attention_heads": 4, "num_key_value_heads": 1, "skip": ["mlp"]},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_layers_that_split_pass(ranks):
    check_parallel(config(**HEADS, per_layer_config=LAYERS), ranks)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "ranks", "fault"),
    [
        (6, 2, 96, 4, r"layer 3 num_attention_heads=6"),
        (12, 6, 96, 4, r"layer 3 num_key_value_heads=6"),
        (12, 3, 96, 4, r"layer 3 num_key_value_heads=3"),
        (8, 2, 98, 4, r"layer 3 intermediate_size=98"),
        (3, 3, 33, 2, r"heads=3; layer 3 num_key_value_heads=3; layer 3 intermediate_size=33\. Serve with"),
    ],
)
def test_a_layer_that_does_not_split_is_refused_by_name(heads, kv_heads, width, ranks, fault):
    last = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": width}
    with pytest.raises(ValueError, match=rf"tensor_parallel_size={ranks} does not divide .*{fault}"):
        check_parallel(config(**HEADS, per_layer_config={**LAYERS, 3: last}), ranks)


def test_messages_use_the_family_s_size_names():
    with pytest.raises(ValueError, match=r"does not divide layer 2 n_head=3; layer 3 n_inner=33\. Serve"):
        check_parallel(config("gpt2", per_layer_config={2: {"n_head": 3}, 3: {"n_inner": 33}}), 2)


def test_quantized_experts_are_refused_by_name():
    quantization = {CONFIG_FIELD: config_of({"model.layers.0.self_attn.q_proj": Scheme("w8a8")}, ["lm_head"])}
    with pytest.raises(InputError, match="mixtral has experts"):
        expected_tensors(config("mixtral", **quantization))


@pytest.mark.parametrize(
    ("scheme", "stored", "dtype"),
    [
        (Scheme("w8a8"), "weight", torch.int8),
        (Scheme("fp8"), "weight", torch.float8_e4m3fn),
        (Scheme("w4a16", 32), "weight_packed", torch.int32),
    ],
)
def test_quantized_tensors_have_the_data_types_of_their_scheme(scheme, stored, dtype):
    layer = "model.layers.0.mlp.down_proj"
    quantization = {CONFIG_FIELD: config_of({layer: scheme}, ["lm_head", "model.layers.1.mlp.down_proj"])}
    found = expected_tensors(config(intermediate_size=64, **quantization))
    assert found.dtypes[f"{layer}.{stored}"] == (dtype,)
    assert f"{layer}.weight_scale" not in found.dtypes  # any floating point
    assert "model.layers.1.mlp.down_proj.weight" in found.shapes  # it is ignored
    assert found.dtypes.keys() <= found.shapes.keys()
