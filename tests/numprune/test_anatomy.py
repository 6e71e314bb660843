import pytest
from transformers import AutoConfig

from numprune.anatomy import FAMILIES, read_anatomy
from numprune.budget import measure
from numprune.errors import InputError

VARIANTS = [(family, {}) for family in FAMILIES] + [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("mistral", {"head_dim": 32}),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_budget_counts_the_parameters_that_the_model_has(tiny_model, family, overrides):
    model = tiny_model(family, **overrides)
    assert measure(read_anatomy(model.config)).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_units_own_every_row_of_the_producers_and_every_column_of_the_consumer(tiny_model, family, overrides):
    model = tiny_model(family, **overrides)
    for block in read_anatomy(model.config).blocks:
        layer = model.model.layers[block.layer]
        consumer = layer.get_submodule(block.consumer)
        assert consumer.in_features == block.channels
        assert (consumer.bias is not None) == block.consumer_bias
        for producer, rows in block.producers:
            assert layer.get_submodule(producer).out_features == rows * block.units


def test_budget_counts_the_kv_cache(tiny_model):
    model = tiny_model("llama")
    # 2 layers, keys and values, 2 KV heads of 16, float32
    assert measure(read_anatomy(model.config)).kv_bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_unsupported_architecture_is_refused_by_name():
    with pytest.raises(InputError, match=r"'gpt2'.*supported are llama, mistral, qwen2, qwen3"):
        read_anatomy(AutoConfig.for_model("gpt2"))


def test_quantized_model_is_refused():
    config = AutoConfig.for_model("llama")
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(InputError, match="quantized"):
        read_anatomy(config)


def test_heads_that_are_no_multiple_of_the_kv_heads_are_refused():
    with pytest.raises(InputError, match="num_attention_heads=8 is no multiple of num_key_value_heads=3"):
        read_anatomy(AutoConfig.for_model("mistral", num_attention_heads=8, num_key_value_heads=3))
