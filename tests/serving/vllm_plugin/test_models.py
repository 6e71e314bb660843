"""The plug-in in vLLM against transformers: the same log-probabilities, and nothing wrong gets loaded."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.serving.vllm_plugin.engine import SIZES, EngineError, build, reference

pytestmark = pytest.mark.vllm

# Fewer heads and a narrower MLP, a layer without attention, one without MLP, one as the configuration says.
MIXED = {
    0: {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40},
    1: {"skip": ["attention"], "intermediate_size": 64},
    2: {"skip": ["mlp"]},
}
MHA = {
    1: {"num_attention_heads": 1, "num_key_value_heads": 1},
    2: {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 33},
}
GONE = {0: {"skip": ["attention", "mlp"]}, 3: {"skip": ["attention", "mlp"]}}  # first and last layer

CASES = {
    "llama": ("numprune_llama", {"per_layer_config": MIXED}),
    "llama, biases, no groups, tied": (
        "numprune_llama",
        {
            "per_layer_config": MHA,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama, heads that do not divide the hidden size": (
        "numprune_llama",
        {"num_attention_heads": 3, "num_key_value_heads": 3, "attention_bias": True, "per_layer_config": {}},
    ),
    "llama, whole layers gone": ("numprune_llama", {"per_layer_config": GONE}),
    "llama, groups that differ, scaled rotary embedding": (
        "numprune_llama",
        {
            "per_layer_config": {1: {"num_key_value_heads": 4}, 2: {"num_key_value_heads": 1}},
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("numprune_mistral", {"per_layer_config": MIXED}),
    "mistral, sliding window": ("numprune_mistral", {"per_layer_config": MIXED, "sliding_window": 16}),
    "qwen2": ("numprune_qwen2", {"per_layer_config": MIXED}),
    "qwen2, no groups, tied": (
        "numprune_qwen2",
        {"per_layer_config": MHA, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "qwen3": ("numprune_qwen3", {"per_layer_config": MIXED}),
    "qwen3, biases, no groups": (
        "numprune_qwen3",
        {"per_layer_config": MHA, "num_key_value_heads": 4, "attention_bias": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_vllm_computes_what_transformers_does(engine, tmp_path, case):
    model_type, config = CASES[case]
    expected = reference(build(model_type, tmp_path / "model", **config))
    computed = engine.run(tmp_path / "model")
    assert computed.tokens == expected.tokens
    assert all(a.shape == b.shape for a, b in zip(computed.logprobs, expected.logprobs, strict=True))
    worst = max(np.abs(a - b).max() for a, b in zip(computed.logprobs, expected.logprobs, strict=True))
    print(f"worst |Δ log-probability| {worst:.1e}")
    assert worst <= 1e-4


def test_the_cache_has_the_size_of_each_layer_s_own_kv_heads(engine, tmp_path):
    build("numprune_llama", tmp_path / "model", per_layer_config=MIXED)
    kv_heads = 1 + 0 + 2 + 2
    bytes_per_token = kv_heads * SIZES["head_dim"] * 2 * 4  # keys and values in float32
    room = 16 << 20
    tokens = engine.run(tmp_path / "model", kv_cache_bytes=room).kv_tokens
    assert room // bytes_per_token - 32 < tokens <= room // bytes_per_token  # whole blocks of 32


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


K_PROJ = "model.layers.3.self_attn.k_proj.weight"
O_BIAS = "model.layers.3.self_attn.o_proj.bias"
FAULTS = {
    # Each but the last is loaded by vLLM's own Llama without an error.
    "wider MLP": (lambda t: t, {"intermediate_size": 80}, r"layers\.3\.mlp\.\S+: stored with shape"),
    "missing": (without(K_PROJ), {}, r"layers\.3\.self_attn\.k_proj\.weight \[64, 64\]: not stored"),
    "extra bias": (
        lambda t: t | {O_BIAS: t["model.norm.weight"].clone()},
        {},
        r"layers\.3\.self_attn\.o_proj\.bias: stored, but it has no place",
    ),
    "fewer KV heads": (
        lambda t: t | {K_PROJ: t[K_PROJ][:32].clone()},
        {},
        r"k_proj\.weight: stored with shape \[32, 64\], but config\.json means \[64, 64\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_configuration_s_are_refused(engine, tmp_path, fault):
    damage, edit, message = FAULTS[fault]
    build("numprune_llama", tmp_path / "model", per_layer_config=MIXED)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | edit))
    save_file(damage(load_file(tmp_path / "model/model.safetensors")), tmp_path / "model/model.safetensors")
    with pytest.raises(EngineError, match=message):
        engine.run(tmp_path / "model")


def test_dense_weights_beside_a_pruned_configuration_are_refused(engine, tmp_path):
    build("numprune_llama", tmp_path / "dense", per_layer_config={})
    build("numprune_llama", tmp_path / "pruned", per_layer_config=MIXED)
    shutil.copy(tmp_path / "dense/model.safetensors", tmp_path / "pruned/model.safetensors")
    with pytest.raises(EngineError, match=r"layers\.\d\.\S+: stored with shape \[\d+(, \d+)?\]"):
        engine.run(tmp_path / "pruned")
