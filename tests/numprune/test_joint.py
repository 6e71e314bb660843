"""The fitted producer against `torch.linalg.lstsq` on its normal equations."""

import pytest
import torch

from numprune import joint
from numprune.anatomy import read_anatomy
from numprune.calibration import Walker, consumer_weight
from numprune.layers import ModelLayers
from numprune.slices import Kept
from numprune.surgery import channels_of, narrowed
from tests.conftest import LLAMA_LIKE, build_tiny

SMALL = {"hidden_size": 16, "intermediate_size": 12, "head_dim": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
ROWS = torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(0))
OF_SMALL = {"gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}}
UNITS = {"attention": torch.tensor([1]), "mlp": torch.tensor([0, 3, 4, 5, 9, 11])}


def kept_of(block):
    return Kept.whole(UNITS[block.kind], block.members)


# Fused matrices besides: stacked, transposed, and interleaved by head. A plain MLP has no linear producer.
BLOCKS = [(family, kind) for family in (*LLAMA_LIKE, "phi3") for kind in ("attention", "mlp")]
BLOCKS += [("gpt2", "attention"), ("gpt_neox", "attention")]


def output_of(walker, layer, block, stream):
    with torch.no_grad():
        return walker.run_batch(layer, block, stream.hidden).output


def refit(walker, layer, block, kept, pruned, aims, damping):
    channels = channels_of(block, kept)
    stored = torch.cat([inputs for _, inputs in walker.inputs(layer, block, pruned)])
    return joint.refit_producer(
        walker, layer, block, kept, pruned, lambda batch: stored[batch][..., channels], aims, damping
    )


def linear_of(block):
    """The name of the matrix that the block's output is linear in."""
    return block.linear[0].tensor


def first_layer(family):
    """Model, walker, layer, its blocks, the stream in front of it, and one to aim at."""
    model = build_tiny(family, **SMALL, **OF_SMALL.get(family, {}))
    walker = Walker(ModelLayers(model), ROWS.shape[1:], batch_size=4)
    pruned = walker.embed(ROWS)
    aim = pruned.hidden + torch.randn(pruned.hidden.shape, generator=torch.Generator().manual_seed(1))
    blocks = read_anatomy(model.config).of_layer(0)
    return walker, model.get_submodule(blocks[0].path), blocks, pruned, aim


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), BLOCKS)
def test_enough_steps_solve_the_least_squares_of_the_linear_producer(monkeypatch, family, kind):
    monkeypatch.setattr(joint, "STEPS", 300)
    walker, layer, blocks, pruned, aim = first_layer(family)
    block = next(block for block in blocks if block.kind == kind)
    kept = kept_of(block)
    small, left = narrowed(layer, block, kept), block.resized(kept.size)
    producer = joint._Producer(small, left)
    start = producer.get()

    @torch.no_grad()
    def output(rows):
        producer.put(producer.every, rows)
        return output_of(walker, small, left, pruned).double().flatten()

    origin = output(torch.zeros_like(start))
    columns = []  # the output is affine in the rows: a column for each of their values
    for index in range(start.numel()):
        unit = torch.zeros_like(start)
        unit.view(-1)[index] = 1
        columns.append(output(unit) - origin)
    matrix = torch.stack(columns, dim=1)
    aimed = (aim - pruned.hidden).double().flatten()
    best = torch.linalg.lstsq(matrix, aimed - origin, driver="gelsd").solution
    output(start)
    with torch.no_grad():
        fitted = refit(walker, layer, block, kept, pruned, joint.Aims(aim, pruned.hidden), 1e-9)
        producer.put(producer.every, joint._Producer(fitted, left).get())
    least = matrix @ best + origin - aimed
    found = output(producer.get()) - aimed
    assert float(found.square().sum()) == pytest.approx(float(least.square().sum()), rel=1e-3)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_dead_channels_and_reached_targets_are_harmless(damping):
    walker, layer, blocks, pruned, _ = first_layer("llama")
    block, every = blocks[1], Kept.whole(torch.arange(12), 1)
    with torch.no_grad():
        layer.mlp.up_proj.weight[3] = 0
        layer.mlp.gate_proj.weight[5] = 0
        layer.mlp.down_proj.weight[:, 7] = 0
        aim = output_of(walker, layer, block, pruned)
        refit(walker, layer, block, every, pruned, joint.Aims(aim), damping)
        torch.testing.assert_close(output_of(walker, layer, block, pruned), aim, rtol=1e-4, atol=1e-4)
        layer.mlp.down_proj.weight.zero_()
        refit(walker, layer, block, every, pruned, joint.Aims(torch.zeros_like(aim)), damping)
        assert all(torch.isfinite(value).all() for value in layer.state_dict().values())


@pytest.mark.parametrize(("family", "kind"), BLOCKS)
def test_only_kept_producer_rows_change_and_the_stream_gets_closer(family, kind):
    walker, layer, blocks, pruned, aim = first_layer(family)
    block = next(block for block in blocks if block.kind == kind)
    kept = kept_of(block)
    small, left = narrowed(layer, block, kept), block.resized(kept.size)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    refit(walker, layer, block, kept, pruned, joint.Aims(aim, pruned.hidden), 1e-3)
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    producer = linear_of(block)
    assert changed == {producer}
    place, part = block.linear
    rest = torch.ones(before[producer].shape[place.dim], dtype=torch.bool)
    rest[place.entries(kept, block.size, part)] = False
    values, were = (state[producer].movedim(place.dim, 0) for state in (layer.state_dict(), before))
    assert torch.equal(values[rest], were[rest])
    after = narrowed(layer, block, kept)
    errors = [
        float((aim - pruned.hidden - output_of(walker, module, left, pruned)).square().sum())
        for module in (small, after)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("family", "kind"), BLOCKS)
def test_a_narrowed_layer_matches_the_masked_layer(family, kind):
    walker, layer, blocks, pruned, _ = first_layer(family)
    block = next(block for block in blocks if block.kind == kind)
    small = narrowed(layer, block, kept_of(block))
    rest = torch.ones(block.units, block.channels_per_unit, dtype=torch.bool)
    rest[UNITS[kind]] = False
    with torch.no_grad():
        consumer_weight(layer, block)[:, rest.flatten()] = 0
    torch.testing.assert_close(output_of(walker, small, block, pruned), output_of(walker, layer, block, pruned))
