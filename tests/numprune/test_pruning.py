import pytest
import torch

from numprune import sensitivity
from numprune.anatomy import read_anatomy
from numprune.choosing import Known
from numprune.errors import InputError
from numprune.layers import ModelLayers
from numprune.options import PruneOptions, uses_gradients
from numprune.pruning import dense_moments, prune
from numprune.slices import Size
from numprune.target import Target
from tests.conftest import build_tiny

ROWS = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))


def output_error(options):
    with torch.no_grad():
        dense = build_tiny().model(ROWS).last_hidden_state
        return float((prune(build_tiny(), ROWS, options).model.model(ROWS).last_hidden_state - dense).square().mean())


def output_kl(options):
    """KL(dense || pruned) on the calibration rows, nats per token, of a model whose layers matter unequally."""
    with torch.no_grad():
        models = build_tiny(num_hidden_layers=3), build_tiny(num_hidden_layers=3)
        for model in models:
            model.model.layers[1].self_attn.o_proj.weight.mul_(0.2)
            model.model.layers[1].mlp.down_proj.weight.mul_(0.2)
        dense = models[0](ROWS).logits.log_softmax(-1)
        pruned = prune(models[1], ROWS, options).model(ROWS).logits.log_softmax(-1)
        return float((dense.exp() * (dense - pruned)).sum(-1).mean())


@pytest.mark.parametrize("criterion", ["random", "wanda", "numerical", "obs"])
def test_compensation_brings_outputs_closer_to_the_dense_model(criterion):
    none, oneshot, sequential, residual, joint = (
        output_error(PruneOptions(0.55, criterion, compensation=name, target=Target(align=32)))  # only one split
        for name in ("none", "oneshot", "sequential", "residual", "joint")
    )
    assert oneshot < none
    assert sequential < oneshot
    assert joint < residual < sequential


def test_residual_fits_each_block_to_the_remaining_stream_error():
    dense, options = build_tiny(), PruneOptions(0.3, compensation="residual", damping=0, target=Target(align=1))
    pruned = prune(build_tiny(), ROWS, options).model
    streams, inputs = {}, {}

    def keep(place, name):
        return lambda _module, args: place.__setitem__(name, args[0].flatten(0, 1).double())

    for name, model in (("dense", dense), ("pruned", pruned)):
        for layer in (0, 1):
            model.model.layers[layer].post_attention_layernorm.register_forward_pre_hook(keep(streams, (name, layer)))
    for layer in (0, 1):
        pruned.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(keep(inputs, layer))
        pruned.model.layers[layer].input_layernorm.register_forward_pre_hook(keep(streams, ("before", layer)))
    with torch.no_grad():
        dense.model(ROWS)
        pruned.model(ROWS)
    for layer in (0, 1):
        target = streams["dense", layer] - streams["before", layer]
        expected = torch.linalg.lstsq(inputs[layer], target).solution.T
        torch.testing.assert_close(
            pruned.model.layers[layer].self_attn.o_proj.weight.double(), expected, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("compensation", "expected"),
    [("none", {None}), ("oneshot", {0.01, None}), ("joint", {0.01, 0.1, 1.0, 10.0, 100.0})],
)
def test_the_plan_records_the_damping_of_each_block(compensation, expected):
    options = PruneOptions(0.4, compensation=compensation, damping=0.01, target=Target(align=1))
    found = {block.damping for block in prune(build_tiny(), ROWS, options).plan.blocks.values()}
    assert found <= expected
    assert compensation != "joint" or found != {0.01}  # so few rows call for more than the least


def test_residual_lets_an_intact_block_compensate_for_others():
    options = PruneOptions(0.1, compensation="residual", allocation="error", criterion="obs", target=Target(align=1))
    model = build_tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.05)
    before = model.model.layers[1].self_attn.o_proj.weight.clone()
    result = prune(model, ROWS, options)
    assert result.plan.sizes() | {"layers.0.mlp": Size(0)} == {
        "layers.0.attention": Size(2, 2),
        "layers.0.mlp": Size(0),
        "layers.1.attention": Size(2, 2),
        "layers.1.mlp": Size(96),
    }
    assert not torch.equal(result.model.model.layers[1].self_attn.o_proj.weight, before)


def test_error_allocation_loses_less_than_an_even_one():
    even, priced = (
        output_kl(PruneOptions(0.4, criterion="obs", compensation="residual", allocation=name, target=Target(align=1)))
        for name in ("uniform", "error")
    )
    assert priced < even


@pytest.mark.parametrize(("small", "kept"), [("self_attn.o_proj", (1, 88)), ("mlp.down_proj", (2, 56))])
def test_uniform_prunes_the_kind_of_block_with_the_smaller_loss(small, kept):
    model = build_tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.get_submodule(small).weight.mul_(0.05)
    plan = prune(model, ROWS, PruneOptions(0.25, compensation="oneshot", target=Target(align=1))).plan
    assert [(split.kv_groups, split.mlp_channels) for split in plan.splits] == sorted(
        [(1, 88), (2, 56)], key=kept.__ne__
    )
    assert plan.splits[0].nats_per_token < plan.splits[1].nats_per_token
    assert {name: size.units for name, size in plan.sizes().items()} == {
        f"layers.{layer}.{kind}": count
        for layer in (0, 1)
        for kind, count in zip(("attention", "mlp"), kept, strict=True)
    }


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (PruneOptions(0.3, compensation="none"), 2),  # no error curve describes consumers that are not refitted
        (PruneOptions(0.3, compensation="residual"), 1),  # one KV group: a single split
        (PruneOptions(0.3, allocation="error", compensation="oneshot"), 2),
    ],
)
def test_a_plan_has_no_splits_if_uniform_prices_none(monkeypatch, options, groups):
    if options.allocation == "uniform":
        monkeypatch.setattr(sensitivity, "measure", lambda *_args, **_how: pytest.fail("gradients were measured"))
    assert prune(build_tiny(num_key_value_heads=groups), ROWS, options).plan.splits is None


def test_batch_size_does_not_change_the_result():
    plans = [prune(build_tiny(), ROWS, PruneOptions(0.4, target=Target(align=1), batch_size=size)) for size in (3, 16)]
    assert plans[0].plan == plans[1].plan
    for a, b in zip(plans[0].model.parameters(), plans[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_ratio_zero_leaves_the_model_unchanged():
    result = prune(build_tiny(), ROWS, PruneOptions(0.0))
    assert result.prunable_ratio_removed == 0
    for a, b in zip(result.model.parameters(), build_tiny().parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_can_be_saved_before_it_is_pruned(tmp_path, dtype):
    """`save_pretrained` leaves the name of the data type in the configuration, where there was the data type."""
    model = build_tiny().to(dtype)
    model.config.dtype = dtype
    before = read_anatomy(model.config)
    model.save_pretrained(tmp_path)
    assert isinstance(model.config.dtype, str)
    assert read_anatomy(model.config) == before
    found = prune(model, ROWS, PruneOptions(0.3)).plan
    assert found.sizes() == prune(build_tiny().to(dtype), ROWS, PruneOptions(0.3)).plan.sizes()


@pytest.mark.parametrize(
    ("options", "scale", "named"),
    [
        (PruneOptions(0.3, compensation="none"), 1e19, "model.layers.1.mlp.down_proj: activations"),
        (PruneOptions(0.3, compensation="residual"), 1e19, "model.layers.1.mlp.down_proj: activations"),
        (PruneOptions(0.3, "wanda", "global", "none"), 1e38, "model.layers.1.mlp.down_proj: activations"),
        (PruneOptions(0.3, allocation="error"), 1e38, "model.layers.1: hidden states"),
    ],
)
def test_an_overflow_in_calibration_is_named(options, scale, named):
    """Its squares, or itself; every weight is finite."""
    model = build_tiny(num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(scale)
    with pytest.raises(InputError, match=f"^{named} overflow float32 on the calibration text.*numprune evaluate"):
        prune(model, ROWS, options)


def test_gradients_that_overflow_are_named():
    model = build_tiny(num_hidden_layers=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e30)
    with pytest.raises(InputError, match=r"^model\.layers\.2\.mlp\.down_proj: gradients overflow"):
        prune(model, ROWS, PruneOptions(0.3, allocation="error"))


def test_a_plan_records_its_provenance():
    plan = prune(build_tiny(), ROWS, PruneOptions(0.3, criterion="obs", seed=7)).plan
    assert (plan.family, plan.criterion, plan.ratio, plan.seed) == ("llama", "obs", 0.3, 7)
    assert (plan.calibration.rows, plan.calibration.sequence_length) == (16, 32)
    assert len(plan.calibration.digest) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PruneOptions(0.3, criterion="magic"), "criterion is 'magic'; it must be one of random, magnitude"),
        (PruneOptions(0.3, allocation="best"), "allocation is 'best'; it must be one of uniform, global, error"),
        (PruneOptions(0.3, compensation="some"), "compensation is 'some'"),
        (PruneOptions(0.3, damping=-1), "damping is -1"),
        (PruneOptions(0.999), "at most"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        prune(build_tiny(), ROWS, options)


@pytest.mark.parametrize(
    ("rows", "blocks"),
    [
        (7, {"layers.0.attention": 64, "layers.0.mlp": 96}),  # 224 tokens
        (8, {"layers.0.mlp": 96}),  # 256 tokens
        (12, {}),
    ],
)
def test_too_few_calibration_tokens_for_either_kind_of_block_warn(caplog, rows, blocks):
    prune(build_tiny(), ROWS[:rows], PruneOptions(0.3))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == len(blocks)
    for warning, (name, channels) in zip(warnings, blocks.items(), strict=True):
        few = f"{32 * rows} calibration tokens are fewer than {4 * channels}, four times the {channels} channels of "
        assert warning.startswith(few + name)


@pytest.mark.parametrize("compensation", ["none", "bias"])
def test_without_least_squares_few_tokens_do_not_warn(caplog, compensation):
    prune(build_tiny(), ROWS[:2], PruneOptions(0.3, compensation=compensation))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def known_of(rows, taylor=False):
    layers = ModelLayers(build_tiny())
    return Known(dict(dense_moments(layers, rows)), sensitivity.measure(layers, rows, taylor=taylor))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("criterion", "allocation", "compensation"),
    [
        ("wanda", "uniform", "none"),
        ("flap", "global", "bias"),
        ("obs", "uniform", "oneshot"),
        ("obs", "uniform", "residual"),
        ("taylor", "uniform", "oneshot"),
        ("flap", "global", "sequential"),
        ("obs", "error", "residual"),
        ("obs", "error", "joint"),
        ("taylor", "global", "none"),
    ],
)
def test_precomputed_moments_give_the_same_result(criterion, allocation, compensation):
    options = PruneOptions(0.4, criterion, allocation, compensation, target=Target(align=1))
    known = known_of(ROWS, taylor=criterion == "taylor")
    collected, given = prune(build_tiny(), ROWS, options), prune(build_tiny(), ROWS, options, known)
    assert given.plan == collected.plan
    for a, b in zip(given.model.parameters(), collected.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("criterion", "allocation", "compensation", "gradients"),
    [
        ("wanda", "uniform", "none", False),
        ("taylor", "uniform", "none", True),
        ("obs", "error", "none", True),
    ],
)
def test_precomputed_moments_are_used(criterion, allocation, compensation, gradients):
    """Of other rows: then the result is those rows'."""
    options = PruneOptions(0.4, criterion, allocation, compensation, target=Target(align=1))
    assert uses_gradients(options) is gradients
    other = ROWS.flip(1)
    given = prune(build_tiny(), ROWS, options, known_of(other, taylor=criterion == "taylor"))
    expected = prune(build_tiny(), other, options)
    for a, b in zip(given.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_taylor_keeps_the_most_salient_units_by_autograd():
    model = build_tiny()
    model(input_ids=ROWS, use_cache=False, labels=ROWS).loss.backward()
    plan = prune(build_tiny(), ROWS, PruneOptions(0.4, "taylor", "uniform", "none", target=Target(align=1))).plan
    for block in read_anatomy(model.config).blocks:
        layer = model.model.layers[block.layer]
        score = torch.zeros(block.units)
        for part in block.slices:
            weight = layer.get_parameter(part.tensor)
            salience = (weight * weight.grad).detach().abs()
            score += (salience if part.dim == 0 else salience.T).reshape(block.units, -1).sum(1)
        kept = plan.blocks[block.name].kept
        assert 0 < len(kept) < block.units
        assert kept == sorted(score.argsort(descending=True)[: len(kept)].tolist())
