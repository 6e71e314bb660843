"""Which layers get a window, what it costs, and the model with these windows."""

import re
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM

from numprune.anatomy import read_anatomy
from numprune.budget import kv_bytes
from numprune.budget_texts import parse_budgets
from numprune.cache_budget import SequenceBudget
from numprune.errors import InputError
from numprune.layers import ModelLayers
from numprune.option_checks import check_options, known_results
from numprune.options import PruneOptions, options_of
from numprune.planned import check_plan
from numprune.pruning import prune
from numprune.quantization.walk import check_target
from numprune.spans import check_reach, full_layers, with_windows
from numprune.target import Target
from numprune.windowing import choose, windowed_config
from tests.conftest import build_tiny, tiny_config

WINDOW, LAYERS = 6, 4
ROWS = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2")
ALONE = PruneOptions(0.0, window=WINDOW, window_layers=2, target=Target(align=1))


def build(family="llama", **overrides):
    fields = {"num_hidden_layers": LAYERS, **overrides}
    if family == "gemma2":
        fields |= {"sliding_window": WINDOW, "layer_types": ["sliding_attention", *["full_attention"] * 3]}
    return build_tiny(family, **fields)


@pytest.fixture(scope="module")
def llama():
    return build()


def log_probabilities(model, rows=ROWS):
    with torch.no_grad():
        return model(input_ids=rows).logits[:, :-1].log_softmax(-1)


def by_hand(model, layers):
    """The predictions of a model whose layers see a window, by a mask given to each of them."""
    places = torch.arange(ROWS.shape[1])
    behind = (places[:, None] - places)[None, None]
    masks = {True: (behind >= 0) & (behind < WINDOW), False: behind >= 0}
    if model.config._attn_implementation == "eager":
        masks = {key: torch.where(mask, 0.0, torch.finfo(torch.float32).min) for key, mask in masks.items()}
    own = full_layers(read_anatomy(model.config))

    def mask(layer):
        return lambda _module, args, given: (
            args,
            {**given, "attention_mask": masks[layer in layers or layer not in own]},
        )

    hooks = [
        layer.register_forward_pre_hook(mask(index), with_kwargs=True) for index, layer in enumerate(model.model.layers)
    ]
    try:
        return log_probabilities(model)
    finally:
        for hook in hooks:
            hook.remove()


def divergence(model, layers):
    dense, other = log_probabilities(model), by_hand(model, layers)
    return float((dense.exp() * (dense - other)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_price_is_the_divergence_of_the_model_with_that_window(family):
    model = build(family)
    spans = choose(ModelLayers(model), ROWS, WINDOW, lambda chosen: len(chosen) == 2, batch_size=4)
    assert set(spans.prices) == set(full_layers(read_anatomy(model.config)))
    for layer, price in spans.prices.items():
        assert price == pytest.approx(divergence(model, [layer]), rel=2e-3)
    first, second = spans.layers
    assert first.layer == min(spans.prices, key=spans.prices.get)
    assert second.divergence == pytest.approx(divergence(model, [first.layer, second.layer]), rel=2e-3)


def test_the_chosen_layers_are_the_best_of_all_sets(llama):
    spans = choose(ModelLayers(llama), ROWS, WINDOW, lambda chosen: len(chosen) == 2)
    best = min(combinations(range(LAYERS), 2), key=lambda layers: divergence(llama, layers))
    assert set(spans.indices) == {*best}


def test_an_increase_is_measured_again_beside_the_layers_chosen_before(llama):
    layers = ModelLayers(llama)
    everything = choose(layers, ROWS, WINDOW, lambda chosen: len(chosen) == LAYERS)
    for count in range(1, LAYERS + 1):
        found = everything.indices[:count]
        assert everything.layers[count - 1].divergence == pytest.approx(divergence(llama, found), rel=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_computes_what_the_masks_say(family):
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune(model, ROWS, ALONE)
    layers = pruned.plan.windowed_layers()
    assert torch.allclose(log_probabilities(pruned.model), by_hand(model, layers), atol=2e-5)
    after = pruned.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert pruned.plan.family == family
    assert pruned.model.config.model_type == ("smollm3" if family in ("llama", "mistral") else family)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"head_dim": 24}), ("mistral", {"head_dim": 24})],
)
def test_biases_and_head_sizes_carry_over(family, overrides):
    model = build(family, **overrides)
    pruned = prune(model, ROWS, ALONE)
    expected = by_hand(model, pruned.plan.windowed_layers())
    assert torch.allclose(log_probabilities(pruned.model), expected, atol=2e-5)


def test_the_anatomy_with_windows_is_that_of_the_configuration():
    for family in FAMILIES:
        config = build(family).config
        for layers in ([2], [1, 3], [*range(LAYERS)]):
            after = with_windows(read_anatomy(config), WINDOW, layers)
            assert read_anatomy(windowed_config(config, WINDOW, layers)) == after


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_vllms_own_class_refuses_windows_that_it_would_ignore(family):
    """It sees the whole context in every layer, and asserts only that max_window_layers is the number of layers."""
    config = tiny_config(family, num_hidden_layers=LAYERS, max_window_layers=LAYERS)
    assert windowed_config(config, WINDOW, [1, 2]).max_window_layers != LAYERS


def test_the_checkpoint_generates_the_same_with_and_without_a_cache(llama, tmp_path):
    made = prune(llama, ROWS, ALONE).model
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(log_probabilities(loaded), log_probabilities(made), atol=1e-6)
    prompt = ROWS[:2, :9]
    cached = loaded.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(cached, loaded.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False))


def test_kv_bytes_of_a_sequence(llama):
    anatomy = read_anatomy(llama.config)
    config = llama.config
    per_token = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads * 4  # of a layer
    assert kv_bytes(anatomy, 100) == LAYERS * 100 * per_token
    assert kv_bytes(with_windows(anatomy, WINDOW, [1, 2]), 100) == (2 * 100 + 2 * WINDOW) * per_token
    assert kv_bytes(with_windows(anatomy, WINDOW, [1, 2]), 5) == LAYERS * 5 * per_token
    assert kv_bytes(with_windows(anatomy, WINDOW, [*range(LAYERS)]), 100, 2) == LAYERS * WINDOW * per_token // 2


def test_a_budget_of_kv_cache_takes_as_few_windows_as_it_needs(llama):
    anatomy = read_anatomy(llama.config)
    limit = kv_bytes(with_windows(anatomy, WINDOW, [0, 1, 2]), 64)
    options = replace(ALONE, window_layers=0, sequence_budget=SequenceBudget(limit, 64, 4))
    plan = prune(llama, ROWS, options).plan
    assert len(plan.windowed) == 3
    assert plan.limits == ["ratio 0", f"budget {limit:,} bytes of KV cache at 64 tokens"]
    assert kv_bytes(plan.result(anatomy), 64) == limit
    assert known_results(anatomy, options)[0].attention_differs
    less = replace(options, sequence_budget=SequenceBudget(limit - 1, 64, 4))
    assert len(prune(llama, ROWS, less).plan.windowed) == LAYERS


def test_units_are_pruned_beside_windows(llama):
    options = replace(ALONE, ratio=0.3, allocation="error")
    pruned = prune(llama, ROWS, options)
    anatomy = read_anatomy(pruned.model.config)
    assert pruned.model.config.model_type == "numprune_smollm3"
    assert sorted(set(range(LAYERS)) - {*full_layers(anatomy)}) == sorted(pruned.plan.windowed_layers())
    assert anatomy == pruned.plan.result(read_anatomy(llama.config))
    assert pruned.prunable_ratio_removed >= 0.3


def test_the_result_is_quantized_towards_the_dense_model(llama):
    pruned = prune(llama, ROWS, ALONE)
    check_target(read_anatomy(pruned.model.config), read_anatomy(llama.config), [])


@pytest.mark.slow
def test_a_plan_is_followed(llama, tmp_path):
    anatomy = read_anatomy(llama.config)
    for options in (ALONE, replace(ALONE, ratio=0.3)):
        made = prune(llama, ROWS, options)
        made.plan.write(tmp_path / "plan.json")
        check_plan(anatomy, made.plan)
        again = prune(llama, ROWS, options_of(made.plan), plan=made.plan)
        assert torch.allclose(log_probabilities(again.model), log_probabilities(made.model), atol=1e-5)
        assert again.plan.windowed == made.plan.windowed


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"windowed": []}, "windowed must be layers that get a window"),
        ({"window_layers": 3}, "window_layers is 3, and 2 layers get a window"),
        ({"windowed": [{"layer": 9, "divergence": 0.0}, {"layer": 1, "divergence": 0.0}]}, "layer 9 gets a window"),
        ({"window": None}, "window is missing"),
    ],
)
def test_an_edited_plan_that_does_not_fit_is_refused(llama, edit, message):
    plan = prune(llama, ROWS, ALONE).plan
    edited = type(plan).model_validate({**plan.model_dump(), **edit})
    with pytest.raises(InputError, match=message):
        check_plan(read_anatomy(llama.config), edited)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {}, "window is 6: single layers of gpt2 cannot have a window; those of llama, mistral"),
        ("gpt_oss", {}, "single layers of gpt_oss cannot have a window"),
        ("llama", {"window": None}, "window_layers is 2, and no window is given"),
        ("llama", {"window": 256}, "window is 256; it must be at least 1, and less than the model's context of 256"),
        ("llama", {"window_layers": 0}, "give window_layers, or a budget of KV cache"),
        ("llama", {"window_layers": 5}, "window_layers is 5; it must be at most 4, the layers without a window"),
        ("gemma2", {"window": 5}, "the model's own windows are 6: a configuration holds one size; set window to 6"),
        ("gemma2", {"window_layers": 4}, "it must be at most 3"),
        ("llama", {"hidden_size": 32}, "leave hidden_size out, or prune twice"),
        ("llama", {"refine": "search", "allocation": "error"}, "set refine to none"),
        ("llama", {"ratio": 0.5, "drop_layers": 1}, "a dropped layer could be one that gets a window"),
        ("llama", {"skips": True, "allocation": "error"}, "must keep the attention of every layer"),
        ("llama", {"sequence_budget": SequenceBudget(1 << 14, 64, 4)}, "leave one of them out"),
        (
            "llama",
            {"window_layers": 0, "sequence_budget": SequenceBudget(1 << 30, 64, 4)},
            "as it is; leave the budget out",
        ),
        (
            "llama",
            {"window_layers": 0, "sequence_budget": SequenceBudget(100, 64, 4)},
            "with a window of 6 in every layer it takes",
        ),
        (
            "llama",
            {"window_layers": 0, "sequence_budget": SequenceBudget(100, 4096, 4)},
            "the model takes at most 256 tokens",
        ),
    ],
)
def test_impossible_windows_are_refused_before_any_work(family, changes, message):
    anatomy = read_anatomy((build if family != "gpt_oss" else build_tiny)(family).config)
    with pytest.raises(InputError, match=re.escape(message)):
        check_options(anatomy, replace(ALONE, **changes))


def test_windows_beside_those_of_every_layer_are_refused():
    anatomy = read_anatomy(build("mistral", sliding_window=24).config)
    for window in (WINDOW, 24):
        with pytest.raises(
            InputError, match=f"window is {window}: every layer of the model already has a window of 24;"
        ):
            check_options(anatomy, replace(ALONE, window=window))


def test_rows_that_do_not_reach_beyond_the_window_are_refused(llama):
    with pytest.raises(InputError, match="window is 6, and rows of 6 tokens do not reach beyond it"):
        prune(llama, ROWS[:, :6], ALONE)
    check_reach(None, 1)


def test_budget_texts():
    assert parse_budgets(["kv=8MiB@ctx=4096", "kv=64KiB/token"]).sequence == (8 << 20, 4096)
    for text in ("kv=8MiB@ctx=0", "kv=8MiB@4096", "kv=@ctx=5", "kv=8MiB@ctx=4096@ctx=2"):
        with pytest.raises(InputError, match=re.escape("or kv=SIZE@ctx=TOKENS, like kv=8MiB@ctx=4096")):
            parse_budgets([text])
