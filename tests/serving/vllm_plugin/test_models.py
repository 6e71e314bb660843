"""vLLM against transformers: equal log-probabilities for any layer sizes, and damaged weights refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from numprune.anatomy import PER_LAYER_PREFIX
from numprune.export import checkpoint, manifest, vllm
from numprune.families import FAMILIES
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.target import Target
from tests.conftest import LLAMA_LIKE, build_tiny, write_checkpoint
from tests.serving.vllm_plugin.engine import SIZES, EngineError, build, reference

pytestmark = pytest.mark.vllm

DECODERS = [name for name, family in FAMILIES.items() if "causal-lm" in family.tasks and family.vllm.runs]

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
# Of a model with windows in the first and the third layer, shorter than the longest prompt.
WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

CASES = {
    "llama, biases, no groups, tied": (
        "llama",
        {
            "per_layer_config": MHA,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama, heads that do not divide the hidden size": (
        "llama",
        {"num_attention_heads": 3, "num_key_value_heads": 3, "attention_bias": True, "per_layer_config": {}},
    ),
    "llama, whole layers gone": ("llama", {"per_layer_config": GONE}),
    "llama, groups that differ, scaled rotary embedding": (
        "llama",
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
    "mistral, sliding window": ("mistral", {"per_layer_config": MIXED, "sliding_window": 16}),
    "qwen2, no groups, tied": (
        "qwen2",
        {"per_layer_config": MHA, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "gpt2, all layers alike": ("gpt2", {"per_layer_config": {}, "n_head": 3}),
    # vLLM's own classes do not do these.
    "qwen2, sliding windows in some layers": (
        "qwen2",
        {"per_layer_config": MHA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "smollm3, windows in some layers": ("smollm3", {"per_layer_config": MHA, **WINDOWS, "no_rope_layers": [1] * 4}),
    "qwen3, biases": ("qwen3", {"per_layer_config": MIXED, "attention_bias": True}),
}


def layers_of(family: str, *, windows: bool) -> dict[int, dict[str, object]]:
    """MIXED, and groups of another size, in the family's own fields. With windows no layer goes without attention."""
    entry = FAMILIES[family]

    def heads(query: int, kv: int) -> dict[str, object]:
        return {entry.heads: query, entry.kv_heads: kv} if entry.kv_heads else {entry.heads: query}

    second = heads(3, 3) if windows else {"skip": ["attention"]}
    return {0: heads(2, 1) | {entry.width: 40}, 1: second | {entry.width: 64}, 2: heads(4, 4) | {"skip": ["mlp"]}}


YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32}

# Heads whose size is not the hidden size divided by them, where the architecture allows it, and biases that vLLM's own
# classes leave out.
UNIFORM = {
    "llama": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": YARN}),
    "mistral": ("mistral", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "qwen2": ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "gemma, biases": ("gemma", {"attention_bias": True}),
    "smollm3, windows in some layers": ("smollm3", {**WINDOWS, "no_rope_layers": [1] * 4}),
    "qwen2, windows in some layers": ("qwen2", WINDOWS),
}


def check(computed, model):
    """What vLLM computed is what transformers does."""
    expected = reference(model)
    assert computed.tokens == expected.tokens
    assert [a.shape for a in computed.logprobs] == [a.shape for a in expected.logprobs]
    worst = max(np.abs(a - b).max() for a, b in zip(computed.logprobs, expected.logprobs, strict=True))
    print(f"worst |Δ log-probability| {worst:.1e}")
    assert worst <= 1e-4


def exported(model, tmp_path) -> tuple[Path, manifest.Manifest]:
    """A checkpoint written and exported as a release's is."""
    checkpoint.save(model, write_checkpoint(model, tmp_path / "base"), tmp_path / "model")
    return tmp_path / "out", vllm.export(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_a_model_whose_layers_differ(engine, tmp_path, case):
    family, config = CASES[case]
    model = build(PER_LAYER_PREFIX + family, **config)
    model.save_pretrained(tmp_path)
    check(engine.run(tmp_path), model)


@pytest.mark.parametrize("family", [name for name in DECODERS if FAMILIES[name].vllm.per_layer])
def test_every_family_with_layers_that_differ(engine, tmp_path, family):
    types = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family in ("gemma2", "gemma3_text") else {}
    layers = layers_of(family, windows=bool(types))
    model = build(PER_LAYER_PREFIX + family, per_layer_config=layers, **types)
    folder, made = exported(model, tmp_path)
    assert made.facts["plugin"]
    check(engine.run(folder), model)


def needed(made: manifest.Manifest) -> dict[str, str]:
    """The options that the server must be started with, as vLLM's `LLM` takes them."""
    words = [word.removeprefix("--").replace("-", "_") for word in made.facts["needs"]]
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize("case", UNIFORM)
def test_a_uniform_model_runs_on_stock_vllm(engine, tmp_path, case):
    family, config = UNIFORM[case]
    model = build(family, **config)
    folder, made = exported(model, tmp_path)
    assert not made.facts["plugin"]
    check(engine.run(folder, **needed(made)), model)


@pytest.mark.parametrize("family", [name for name in DECODERS if name not in LLAMA_LIKE])
def test_every_other_family_runs_pruned_uniformly(engine, tmp_path, family):
    rows = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(0))
    fields = {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4}
    fields |= {"word_embed_proj_dim": 128} if family == "opt" else {}
    align = 32 if family == "gpt_oss" else 8  # vLLM's CPU kernels pad other experts, and not those with biases
    fields |= {"intermediate_size": 96} if family == "gpt_oss" else {}
    model = build_tiny(family, **fields, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    options = PruneOptions(0.1, "magnitude", compensation="none", target=Target(align=align))
    pruned = prune(model, rows, options).model
    folder, made = exported(pruned, tmp_path)
    assert not made.facts["plugin"]
    check(engine.run(folder, load_format="numprune", **needed(made)), pruned)


def test_a_model_pruned_globally_and_exported(engine, tmp_path):
    rows = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(0))
    model = prune(build("llama"), rows, PruneOptions(0.4, allocation="global", target=Target(align=1))).model
    folder, made = exported(model, tmp_path)
    assert made.facts["plugin"]
    check(engine.run(folder), model)


def test_the_cache_follows_each_layer_s_kv_heads(engine, tmp_path):
    build("numprune_llama", per_layer_config=MIXED).save_pretrained(tmp_path)
    kv_heads = 1 + 0 + 2 + 2
    bytes_per_token = kv_heads * SIZES["head_dim"] * 2 * 4  # keys and values in float32
    room = 16 << 20
    tokens = engine.run(tmp_path, kv_cache_bytes=room).kv_tokens
    assert room // bytes_per_token - 32 < tokens <= room // bytes_per_token  # whole blocks of 32


# StableLM's class of vLLM's takes no other number of heads than the hidden size has room for.
@pytest.mark.parametrize(("family", "bias"), [("llama", "attention_bias"), ("stablelm", "use_qkv_bias")])
def test_two_processes_share_each_layer(engine, tmp_path, family, bias):
    model = build(PER_LAYER_PREFIX + family, per_layer_config=MIXED, **{bias: True})
    model.save_pretrained(tmp_path)
    check(engine.run(tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp"), model)


def test_unshardable_layers_are_refused_before_loading(engine, tmp_path):
    build("numprune_llama", per_layer_config=MHA, num_key_value_heads=4).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"tensor_parallel_size=2 does not divide layer 1 num_attention_heads=1; .*"):
        engine.run(tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp")


K_PROJ = "model.layers.3.self_attn.k_proj.weight"
O_BIAS = "model.layers.3.self_attn.o_proj.bias"
# What is done to the tensors, what to config.json, and what is said. vLLM's own Llama loads the first three.
FAULTS = {
    "wider": (
        {},
        {"intermediate_size": 80},
        r"layers\.3\.mlp\.\S+: stored with shape .*96.* config\.json implies .*80",
    ),
    "missing": ({K_PROJ: None}, {}, r"layers\.3\.self_attn\.k_proj\.weight \[64, 64\]: not stored"),
    "extra": (
        {O_BIAS: torch.ones(64)},
        {},
        r"layers\.3\.self_attn\.o_proj\.bias: stored, but .* has no such tensor",
    ),
    "smaller": ({K_PROJ: torch.ones(32, 64)}, {}, r"k_proj\.weight: stored with shape \[32, 64\], .* \[64, 64\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_contradict_the_configuration_are_refused(engine, tmp_path, fault):
    tensors, fields, message = FAULTS[fault]
    build("numprune_llama", per_layer_config=MIXED).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    changed = {name: tensor for name, tensor in (load_file(weights) | tensors).items() if tensor is not None}
    save_file(changed, weights)
    with pytest.raises(EngineError, match=message):
        engine.run(tmp_path)


def test_dense_weights_beside_a_pruned_configuration_are_refused(engine, tmp_path):
    build("numprune_llama", per_layer_config=MIXED).save_pretrained(tmp_path)
    save_file(build("llama").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(EngineError, match=r"layers\.\d\.\S+: stored"):
        engine.run(tmp_path)


# Model type, its configuration, vLLM's options: its own class, the one that runs transformers' model, and ours.
RELOADED = {
    "stock": ("llama", {}, {}),
    "transformers": ("qwen2", UNIFORM["qwen2"][1], {"model_impl": "transformers"}),
    "per layer": ("numprune_llama", {"per_layer_config": MIXED}, {}),
}


@pytest.mark.parametrize("kind", RELOADED)
def test_only_matching_weights_are_reloaded_into_a_running_engine(engine, tmp_path, kind):
    """By itself vLLM would cut the wider ones to size."""
    model_type, config, options = RELOADED[kind]
    running, other, wider = (tmp_path / name for name in ("running", "other", "wider"))
    build(model_type, **config).save_pretrained(running)
    model = build(model_type, **config, seed=1)
    model.save_pretrained(other)
    build(model_type, **config, intermediate_size=128).save_pretrained(wider)
    answer = engine.run(running, reload=[other, wider], load_format="numprune", **options)
    assert answer.refused[0] == ""
    assert re.search(r"layers\.\d\.mlp\.\S+: stored with shape .*128.* config\.json implies .*96", answer.refused[1])
    check(answer, model)  # the refused ones have changed nothing
