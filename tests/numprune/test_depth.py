"""Which layers are dropped, and how the rest of the model compensates."""

from contextlib import ExitStack, contextmanager
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.configs import pruned_config
from numprune.depth import choose, choose_blocks, ratio_left, smallest_blocks
from numprune.errors import InputError
from numprune.layers import ModelLayers, replaced
from numprune.options import PruneOptions, options_of
from numprune.pruning import prune
from numprune.slices import Size
from numprune.target import Target
from tests.conftest import build_tiny

ROWS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))
ALIGNED = Target(align=1)
LAYERS = 4


def build(family="llama", **overrides):
    return build_tiny(family, **{"num_hidden_layers": LAYERS, **overrides})


def log_probabilities(model, rows=ROWS):
    with torch.no_grad():
        return model(input_ids=rows).logits[:, :-1].log_softmax(-1)


def kl(dense, other):
    return float((dense.exp() * (dense - other)).sum(-1).mean())


def without(model, layers):
    """KL(dense || the model with these layers passed over), by the model's own forward pass."""
    dense = log_probabilities(model)
    with replaced([model.model.layers[layer] for layer in layers], lambda hidden, *_, **__: hidden):
        return kl(dense, log_probabilities(model))


@pytest.mark.parametrize(("family", "resident"), [("llama", True), ("llama", False), ("gemma2", True), ("opt", False)])
def test_each_drop_is_the_best_remaining_one(family, resident):
    model = build(family)
    layers = ModelLayers(model)
    layers.resident = resident
    if family == "opt":
        model.model.layers = model.model.decoder.layers
    chosen = choose(layers, ROWS, 3, ratio=0.9, batch_size=5)
    gone = []
    for drop in chosen:
        measured = {layer: without(model, [*gone, layer]) for layer in range(LAYERS) if layer not in gone}
        assert drop.layer == min(measured, key=measured.__getitem__)
        assert drop.divergence == pytest.approx(measured[drop.layer], rel=2e-3, abs=1e-6)
        gone.append(drop.layer)


def silence(model, *layers):
    with torch.no_grad():
        for layer in layers:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()


def test_identity_layers_are_dropped_first_lower_index_first():
    model = build()
    silence(model, 1, 3)
    assert [drop.layer for drop in choose(ModelLayers(model), ROWS, 2, ratio=0.5)] == [1, 3]


def test_costs_are_measured_again_after_each_drop():
    """Of two layers that cancel each other either one alone is dear, and both together cost nothing."""
    model = build()
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            model.model.layers[1].self_attn.get_submodule(name).weight.zero_()  # each token attends to all alike
        one, other = model.model.layers[1], model.model.layers[2]
        other.load_state_dict(one.state_dict())
        for layer in (one, other):
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.mul_(0.05)  # so small that the second reads what the first did
        other.self_attn.o_proj.weight.neg_()
    pair = without(model, [1, 2])
    assert pair < 0.2 * min(without(model, [layer]) for layer in (1, 2))
    first, second = choose(ModelLayers(model), ROWS, 2, ratio=0.5)
    assert {first.layer, second.layer} == {1, 2}
    assert second.divergence < 0.2 * first.divergence


def test_a_round_reads_each_layer_once():
    layers, read = ModelLayers(build()), []
    layers.resident = False

    @contextmanager
    def layer(index):
        read.append(index)
        yield layers._layers[index]

    layers.layer = layer
    (first, _) = choose(layers, ROWS, 2, ratio=0.5, batch_size=5)
    every = list(range(LAYERS))
    assert read == [*every, *[index for index in every if index != first.layer]]


@pytest.mark.parametrize("compensation", ["oneshot", "residual", "joint"])
def test_later_layers_compensate_for_a_dropped_one(compensation):
    def error(name):
        model = build()
        silence(model, 1)  # it is dropped first and costs nothing; then one that does
        dense = log_probabilities(model)
        pruned = prune(model, ROWS, PruneOptions(0.55, compensation=name, drop_layers=2, target=ALIGNED))
        return kl(dense, log_probabilities(pruned.model))

    assert error(compensation) < error("none")


@pytest.mark.parametrize("allocation", ["uniform", "error", "global"])
def test_units_make_up_the_rest_of_the_ratio(allocation):
    model = build()
    anatomy = read_anatomy(model.config)
    pruned = prune(model, ROWS, PruneOptions(0.4, allocation=allocation, drop_layers=1, target=ALIGNED))
    assert pruned.prunable_ratio_removed == pytest.approx(0.4, abs=0.01)
    assert pruned.model.config.num_hidden_layers == LAYERS - 1
    (drop,) = pruned.plan.dropped
    for block in anatomy.blocks:
        plan = pruned.plan.blocks[block.name]
        assert plan.units == block.units
        assert bool(plan.kept) == (block.layer != drop.layer)
    left = [plan for plan in pruned.plan.blocks.values() if plan.kept]
    found = read_anatomy(pruned.model.config).blocks
    assert [len(plan.kept) for plan in left] == [block.units for block in found]


def test_the_first_and_the_last_layers_can_be_dropped():
    for layer in (0, LAYERS - 1):
        model = build()
        silence(model, layer)
        dense = log_probabilities(model)
        pruned = prune(model, ROWS, PruneOptions(0.25, drop_layers=1, target=ALIGNED))
        assert [drop.layer for drop in pruned.plan.dropped] == [layer]
        assert kl(dense, log_probabilities(pruned.model)) < 1e-6


def test_no_layers_dropped_changes_nothing():
    one, other = (prune(build(), ROWS, PruneOptions(0.3, target=ALIGNED, **more)) for more in ({}, {"drop_layers": 0}))
    assert one.plan == other.plan
    assert not one.plan.dropped


def resized(units):
    """A model whose blocks have `units` by name, the others all, and do nothing in layers 0 to 2."""
    config = build().config
    anatomy = read_anatomy(config)
    left = anatomy.keeping(
        {block.name: Size(units.get(block.name, block.units), block.members) for block in anatomy.blocks}
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(pruned_config(config, left), attn_implementation="sdpa").eval()


def test_an_identity_layer_larger_than_the_ratio_stays():
    model = resized({"layers.3.mlp": 24})
    silence(model, 0)
    sizes = [
        sum(block.parameters(block.size) for block in read_anatomy(model.config).of_layer(layer))
        for layer in range(LAYERS)
    ]
    layers = ModelLayers(model)
    assert [drop.layer for drop in choose(layers, ROWS, 1, ratio=sizes[0] / sum(sizes))] == [0]
    assert [drop.layer for drop in choose(layers, ROWS, 1, ratio=sizes[3] / sum(sizes))] == [3]
    # The first must leave room for the second.
    assert 3 in [drop.layer for drop in choose(layers, ROWS, 2, ratio=(sizes[0] + sizes[3]) / sum(sizes))]


def test_the_last_attention_block_always_stays():
    model = resized({f"layers.{layer}.attention": 0 for layer in (0, 2, 3)})
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    assert 1 not in [drop.layer for drop in choose(ModelLayers(model), ROWS, 3, ratio=0.9)]


def test_protected_layers_stay_and_protection_follows_renumbering():
    model = build()
    silence(model, 1)
    keep = ["layers.1", "layers.-1.mlp"]
    plan = prune(model, ROWS, PruneOptions(0.4, allocation="error", drop_layers=1, keep=keep, target=ALIGNED)).plan
    (drop,) = plan.dropped
    assert drop.layer not in (1, LAYERS - 1)
    for name in ("layers.1.attention", "layers.1.mlp", f"layers.{LAYERS - 1}.mlp"):
        assert len(plan.blocks[name].kept) == plan.blocks[name].units
    assert any(0 < len(block.kept) < block.units for block in plan.blocks.values())


def without_blocks(model, names):
    """KL(dense || the model with these blocks silent), by the model's own forward pass."""
    dense = log_probabilities(model)
    modules = [model.model.layers[int(name.split(".")[1])] for name in names]
    with ExitStack() as stack:
        for name, layer in zip(names, modules, strict=True):
            last = layer.self_attn.o_proj if name.endswith("attention") else layer.mlp.down_proj
            stack.enter_context(replaced([last], lambda x, layer=layer: torch.zeros(*x.shape[:-1], 64)))
        return kl(dense, log_probabilities(model))


@pytest.mark.parametrize("resident", [True, False])
def test_each_dropped_block_is_the_best_remaining_one(resident):
    model = build(num_hidden_layers=3)
    layers = ModelLayers(model)
    layers.resident = resident
    chosen = choose_blocks(layers, ROWS, 4, ratio=0.95, batch_size=5)
    names, gone = [block.name for block in layers.anatomy.blocks], []
    for drop in chosen:
        kinds = [name.rpartition(".")[2] for name in names if name not in gone]
        measured = {
            name: without_blocks(model, [*gone, name])
            for name in names
            if name not in gone and kinds.count(name.rpartition(".")[2]) > 1
        }
        assert drop.block == min(measured, key=measured.__getitem__)
        assert drop.divergence == pytest.approx(measured[drop.block], rel=2e-3, abs=1e-6)
        gone.append(drop.block)


@pytest.mark.slow
@pytest.mark.parametrize("compensation", ["none", "oneshot", "residual", "joint"])
def test_the_model_lacks_exactly_the_dropped_blocks(compensation):
    model = build()
    anatomy = read_anatomy(model.config)
    share = sum(block.parameters(block.size) for block in anatomy.of_kind("attention")) / LAYERS
    share /= budget_of(anatomy).prunable_parameters
    keep = ["mlp"]
    options = PruneOptions(
        2 * share, allocation="error", compensation=compensation, drop_blocks=2, keep=keep, target=ALIGNED
    )
    pruned = prune(model, ROWS, options)
    names = pruned.plan.names_of_dropped_blocks()
    assert len(names) == 2
    assert pruned.prunable_ratio_removed == pytest.approx(2 * share)
    found = {block.name for block in read_anatomy(pruned.model.config).blocks if not block.units}
    assert found == {*names}
    dense = log_probabilities(model)
    error = kl(dense, log_probabilities(pruned.model))
    untouched = without_blocks(model, names)
    if compensation in ("none", "oneshot"):
        assert error == pytest.approx(untouched, rel=1e-3)
    else:
        assert error < untouched
    again = prune(model, ROWS, options_of(pruned.plan), plan=pruned.plan)
    assert again.plan == pruned.plan
    torch.testing.assert_close(log_probabilities(again.model), log_probabilities(pruned.model), atol=1e-4, rtol=1e-3)


def test_units_make_up_the_rest_beside_dropped_blocks():
    pruned = prune(build(), ROWS, PruneOptions(0.4, allocation="error", drop_blocks=2, target=ALIGNED))
    assert pruned.prunable_ratio_removed == pytest.approx(0.4, abs=0.01)
    kept = {name: len(block.kept) for name, block in pruned.plan.blocks.items()}
    assert [name for name, count in kept.items() if not count] == sorted(pruned.plan.names_of_dropped_blocks())


def test_protected_blocks_and_the_last_of_a_kind_stay():
    anatomy = read_anatomy(build().config)
    assert len(smallest_blocks(anatomy, 2 * LAYERS - 2)) == 2 * LAYERS - 2
    with pytest.raises(InputError, match="drop_blocks is 7; at most 6 can be dropped"):
        smallest_blocks(anatomy, 7)
    with pytest.raises(InputError, match="drop_blocks is 4; at most 3 can be dropped"):
        smallest_blocks(anatomy, 4, {block.name for block in anatomy.of_kind("mlp")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PruneOptions(0.9, drop_layers=4), "drop_layers is 4; the model has 4 layers, and at least one must stay"),
        (PruneOptions(0.9, drop_layers=-1), "drop_layers is -1"),
        (
            PruneOptions(0.3, drop_layers=1, keep=["mlp"]),
            "drop_layers is 1; keep protects blocks of all layers except 0",
        ),
        (
            PruneOptions(0.4, drop_layers=2),
            "drop_layers is 2: these layers have 0.5000 of the prunable parameters, which exceeds the ratio 0.4; "
            "drop fewer, or choose a ratio of at least 0.5",
        ),
        (
            PruneOptions(0.98, drop_layers=1),
            "with drop_layers 1 the other layers must lose 0.9733 of theirs: ratio is 0.97",
        ),
        (PruneOptions(0.5, drop_blocks=1), "drop_blocks: uniform allocation gives every layer the same size"),
        (
            PruneOptions(0.5, allocation="error", drop_blocks=1, drop_layers=1),
            "drop_blocks and drop_layers are given; leave one of them out",
        ),
        (
            PruneOptions(0.1, allocation="error", drop_blocks=2),
            r"drop_blocks is 2: these blocks have 0\.\d+ of the prunable parameters, which exceeds the ratio 0\.1",
        ),
    ],
)
def test_impossible_drops_are_refused_before_any_work(options, message):
    with pytest.raises(InputError, match=message):
        prune(build(), ROWS, options)


def test_layers_that_use_their_index_cannot_be_dropped():
    with pytest.raises(InputError, match="with scale_attn_by_inverse_layer_idx each layer uses its index"):
        prune(build("gpt2", scale_attn_by_inverse_layer_idx=True), ROWS, PruneOptions(0.3, drop_layers=1))


def test_the_remaining_ratio_counts_the_dropped_parameters():
    anatomy = read_anatomy(build().config)
    assert ratio_left(anatomy, 0.4, [1]) == pytest.approx(0.2)
    assert ratio_left(anatomy, 0.25, [3]) == 0
    assert ratio_left(anatomy, 0.3, []) == 0.3
    shares = [ratio_left(anatomy, 0.6, range(count)) for count in range(3)]
    assert all(more > fewer for more, fewer in pairwise(shares))
