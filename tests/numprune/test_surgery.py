"""Cutting equals masking, and stock loaders read the result."""

import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.configs import pruned_config
from numprune.errors import InputError
from numprune.layers import ModelLayers
from numprune.options import PruneOptions
from numprune.pruning import Pruned, config_after, prune_layers
from numprune.slices import Kept, Size
from numprune.surgery import assemble, cut_layer
from numprune.target import Target
from tests.conftest import LLAMA_LIKE

ROWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
PROMPT = ROWS[:2, :9]

MODELS = [(family, {}) for family in LLAMA_LIKE] + [
    ("llama", {"num_key_value_heads": 4}),  # no grouping
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 128}),
]


def logits(model, tokens=ROWS):
    with torch.no_grad():
        return model(tokens).logits


def prune(model, rows, options):
    """Prune with the model's own layers and not with copies: it then computes what is left, the rest being masked."""
    layers, cut = ModelLayers(model), {}
    plan = prune_layers(layers, rows, options, cut.update)
    pruned = assemble(model, config_after(layers, plan), cut)
    return Pruned(pruned, plan, budget_of(layers.anatomy), budget_of(read_anatomy(pruned.config)))


def assert_generates_as_uncached(model):
    model.generation_config.eos_token_id = None
    cached, uncached = (
        model.generate(PROMPT, max_new_tokens=12, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_the_sliced_model_matches_the_masked_model_round_trips_and_has_the_predicted_size(
    tiny_model, tmp_path, family, overrides, allocation
):
    model = tiny_model(family, **overrides)
    before = read_anatomy(model.config)
    options = PruneOptions(
        0.4, criterion="numerical", allocation=allocation, compensation="sequential", target=Target(align=8)
    )
    pruned = prune(model, ROWS, options)
    masked, sliced = logits(model), pruned.model
    torch.testing.assert_close(logits(sliced), masked, atol=1e-5, rtol=1e-5)

    predicted = budget_of(before.keeping(pruned.plan.sizes()))
    assert budget_of(read_anatomy(sliced.config)) == predicted
    assert sum(p.numel() for p in sliced.parameters()) == predicted.parameters < budget_of(before).parameters

    sliced.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.config.model_type == sliced.config.model_type
    torch.testing.assert_close(logits(loaded), logits(sliced), atol=1e-6, rtol=1e-6)
    if allocation == "uniform":
        assert loaded.config.model_type in LLAMA_LIKE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "overrides"),
    [*((family, {}) for family in LLAMA_LIKE), ("llama", {"attention_bias": True, "mlp_bias": True})],
)
def test_skipped_blocks_match_masked_blocks(tiny_model, tmp_path, family, overrides):
    model = tiny_model(family, num_hidden_layers=3, **overrides)
    before = read_anatomy(model.config)
    plan = prune(model, ROWS, PruneOptions(0.3, allocation="global", target=Target(align=1))).plan
    gone = ["layers.0.attention", "layers.1.mlp", "layers.2.attention", "layers.2.mlp"]
    for name in gone:
        consumer = model.model.layers[int(name[7])].get_submodule(
            "self_attn.o_proj" if "att" in name else "mlp.down_proj"
        )
        for parameter in consumer.parameters():
            parameter.data.zero_()
    nothing = Kept.whole(torch.tensor([], dtype=torch.long), 1)
    kept = {name: nothing if name in gone else block.to_kept() for name, block in plan.blocks.items()}
    cut = {}
    for index, layer in enumerate(model.model.layers):
        cut |= cut_layer(layer, before.of_layer(index), kept, {})
    after = before.keeping({name: left.size for name, left in kept.items()})
    sliced = assemble(model, pruned_config(model.config, after), cut)
    torch.testing.assert_close(logits(sliced), logits(model), atol=1e-5, rtol=1e-5)

    predicted = budget_of(after)
    assert budget_of(read_anatomy(sliced.config)) == predicted
    assert sum(p.numel() for p in sliced.parameters()) == predicted.parameters

    sliced.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded), logits(sliced), atol=1e-6, rtol=1e-6)
    assert_generates_as_uncached(loaded)

    again = prune(loaded, ROWS, PruneOptions(0.2, allocation="global", target=Target(align=1)))
    assert again.plan.sizes()["layers.0.attention"] == Size(0)


def test_worthless_blocks_can_be_removed_whole(tiny_model):
    model = tiny_model(num_hidden_layers=3)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    options = PruneOptions(0.3, criterion="magnitude", allocation="global", skips=True, target=Target(align=1))
    pruned = prune(model, ROWS, options)
    assert pruned.plan.blocks["layers.1.mlp"].kept == []
    assert pruned.model.config.per_layer_config[1].skip == ["mlp"]
    assert pruned.prunable_ratio_removed == pytest.approx(0.3, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_cached_generation_matches_uncached_generation(tiny_model, family, allocation):
    model = tiny_model(family, num_hidden_layers=3)
    pruned = prune(
        model, ROWS, PruneOptions(0.4, criterion="wanda", allocation=allocation, target=Target(align=1))
    ).model
    assert_generates_as_uncached(pruned)


def test_a_llama_whose_heads_no_longer_divide_becomes_an_equivalent_mistral(tiny_model, tmp_path):
    model = tiny_model("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    sliced = prune(model, ROWS, PruneOptions(0.25, compensation="none", target=Target(align=1))).model
    masked = logits(model)
    assert sliced.config.num_attention_heads == 6
    assert sliced.config.model_type == "mistral"
    assert sliced.config.sliding_window is None
    torch.testing.assert_close(logits(sliced), masked, atol=1e-5, rtol=1e-5)
    sliced.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="not a multiple of the number of attention"):
        AutoConfig.for_model("llama", **{k: v for k, v in sliced.config.to_dict().items() if k != "model_type"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded), masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rope_type", "extra"), [("linear", {}), ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0})]
)
def test_scaled_rotary_embeddings_survive(tiny_model, rope_type, extra):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64, **extra}
    model = tiny_model(
        "llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=8, rope_parameters=rope
    )
    pruned = prune(model, ROWS, PruneOptions(0.25, target=Target(align=1))).model
    torch.testing.assert_close(logits(pruned), logits(model), atol=1e-5, rtol=1e-5)


def test_a_pruned_model_can_be_pruned_again(tiny_model):
    once = prune(
        tiny_model(num_hidden_layers=3), ROWS, PruneOptions(0.2, allocation="global", target=Target(align=1))
    ).model
    twice = prune(once, ROWS, PruneOptions(0.3, allocation="global", target=Target(align=1))).model
    torch.testing.assert_close(logits(twice), logits(once), atol=1e-5, rtol=1e-5)


def test_bias_compensation_adds_the_flap_bias(tiny_model):
    model = tiny_model("llama", mlp_bias=False)
    dense = tiny_model("llama", mlp_bias=False)
    options = PruneOptions(0.3, criterion="flap", allocation="global", compensation="bias", target=Target(align=1))
    result = prune(model, ROWS, options)
    assert result.model.config.attention_bias
    assert sum(p.numel() for p in result.model.parameters()) == result.after.parameters
    layer, original = result.model.model.layers[0].mlp, dense.model.layers[0].mlp
    kept = result.plan.blocks["layers.0.mlp"].kept
    torch.testing.assert_close(layer.down_proj.weight, original.down_proj.weight[:, kept])
    assert layer.down_proj.bias.abs().max() > 0
    assert layer.up_proj.bias.abs().max() == 0


def test_bias_compensation_is_refused_without_bias_support(tiny_model):
    with pytest.raises(InputError, match="projections of mistral cannot have a bias"):
        prune(tiny_model("mistral"), ROWS, PruneOptions(0.3, compensation="bias", target=Target(align=1)))


def test_a_per_layer_configuration_can_be_pickled() -> None:
    config = AutoConfig.for_model("numprune_llama", per_layer_config={})
    assert type(pickle.loads(pickle.dumps(config))) is type(config)
