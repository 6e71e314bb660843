import pytest
from transformers import AutoConfig

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.errors import InputError
from numprune.layers import ModelLayers
from tests.conftest import LLAMA_LIKE

VARIANTS = [(family, {}) for family in LLAMA_LIKE] + [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("mistral", {"head_dim": 32}),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_budget_counts_the_parameters_of_the_model(tiny_model, family, overrides):
    model = tiny_model(family, **overrides)
    assert budget_of(read_anatomy(model.config)).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_tensor_names_match_the_model(tiny_model, family, overrides):
    model = tiny_model(family, **overrides)
    anatomy = read_anatomy(model.config)
    found = dict(anatomy.around)
    for block in anatomy.blocks:
        found |= {f"{block.path}.{name}": shape for name, shape in block.tensors().items()}
    assert found == {name: tuple(value.shape) for name, value in model.named_parameters()}


def test_budget_counts_the_kv_cache(tiny_model):
    model = tiny_model("llama")
    # 2 layers, keys and values, 2 KV heads of 16, float32
    assert budget_of(read_anatomy(model.config)).kv_bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_unsupported_architecture_is_refused_by_name():
    with pytest.raises(InputError, match=r"'mamba'.*supported are llama, .*; docs/adding-an-architecture.md shows how"):
        read_anatomy(AutoConfig.for_model("mamba"))


FACTORS = ("short_factor", "long_factor")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True: gpt2 is supported only with False"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False: opt is supported only with True"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim=32: opt is supported only with 768"),
        ("gemma", {"use_bidirectional_attention": True}, "gemma is supported only with None or False"),
        (
            "stablelm",
            {"use_parallel_residual": True},
            "use_parallel_residual=True: stablelm is supported only with False",
        ),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True: stablelm is supported only with False"),
        ("stablelm", {"hidden_act": "gelu"}, "hidden_act='gelu': stablelm is supported only with 'silu'"),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1] * 48,
                    "long_factor": [1] * 48,
                }
            },
            "rope_parameters.rope_type='longrope': phi3 is supported only with 'default'",
        ),
    ],
)
def test_an_unsupported_variant_of_a_family_is_refused(family, fields, message):
    with pytest.raises(InputError, match=message):
        read_anatomy(AutoConfig.for_model(family, **fields))


@pytest.mark.parametrize("name", ["bfloat17", "nn", "", 16])
def test_an_unknown_data_type_is_refused(tiny_model, name):
    config = tiny_model().config
    config.dtype = name
    with pytest.raises(InputError, match=f"dtype={name}; it must be one of float64, float32, "):
        read_anatomy(config)


def test_a_quantized_model_cannot_be_pruned(tiny_model):
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(InputError, match="quantized"):
        ModelLayers(model)


def test_heads_that_are_not_a_multiple_of_the_kv_heads_are_refused():
    with pytest.raises(InputError, match="num_attention_heads=8 is not a multiple of num_key_value_heads=3"):
        read_anatomy(AutoConfig.for_model("mistral", num_attention_heads=8, num_key_value_heads=3))
