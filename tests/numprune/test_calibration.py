import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.calibration import Walker, check_rows, consumer_of
from numprune.errors import InputError
from numprune.layers import ModelLayers
from numprune.moments import Moments
from tests.conftest import build_tiny


def rows(n=5, length=12):
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(0))


def test_run_yields_consumer_inputs_and_block_outputs(tiny_model):
    model, tokens = tiny_model("llama", attention_bias=True, mlp_bias=True), rows()
    walker = Walker(ModelLayers(model), tokens.shape[1:], batch_size=2)
    stream = walker.embed(tokens)
    for block in read_anatomy(model.config).blocks:
        seen = 0
        layer = model.model.layers[block.layer]
        for index, run in walker.run(layer, block, stream):
            before = stream.read(index)
            assert run.inputs.shape == (*before.shape[:2], block.channels)
            torch.testing.assert_close(consumer_of(layer, block)(run.inputs), run.output)
            torch.testing.assert_close(before + run.output, run.after)
            seen += len(before)
        assert seen == len(tokens)


def test_walks_leave_the_layer_unchanged(tiny_model):
    model, tokens = tiny_model(), rows()
    walker = Walker(ModelLayers(model), tokens.shape[1:])
    block = read_anatomy(model.config).blocks[0]
    layer = model.model.layers[0]
    walk = walker.run(layer, block, walker.embed(tokens))
    next(walk)
    assert not consumer_of(layer, block)._forward_hooks
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((1, 4), 259), "token 259 is outside the model's vocabulary of 259"),
        (torch.zeros(1, 300, dtype=torch.long), "sequence length 300 exceeds the model's 256"),
    ],
)
def test_rows_with_unknown_tokens_are_refused(tiny_model, tokens, message):
    model = tiny_model("mistral", sliding_window=8)
    with pytest.raises(InputError, match=message):
        check_rows(read_anatomy(model.config), tokens)


def test_moments_accumulate_over_batches():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 7, generator=generator), torch.randn(50, 3, generator=generator)
    moments = Moments(7, outputs=3)
    for part in range(0, 50, 8):
        moments.add(x[part : part + 8], y[part : part + 8])
    x, y = x.double(), y.double()
    torch.testing.assert_close(moments.gram, x.T @ x / 50)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.cross, y.T @ x / 50)
    torch.testing.assert_close(moments.target_mean, y.mean(0))


def test_empty_moments_are_an_error():
    with pytest.raises(ValueError, match="no inputs"):
        _ = Moments(3).gram
    with pytest.raises(ValueError, match="y is missing"):
        Moments(3, outputs=2).add(torch.zeros(1, 3))


def test_moments_round_trip_through_tensors():
    generator = torch.Generator().manual_seed(0)
    moments = Moments(4, outputs=2)
    moments.add(torch.randn(9, 4, generator=generator), torch.randn(9, 2, generator=generator))
    restored = Moments.restored(moments.tensors(), torch.device("cpu"))
    for name in ("gram", "mean", "cross", "target_mean"):
        assert torch.equal(getattr(restored, name), getattr(moments, name))


@pytest.mark.parametrize(("family", "gone"), [("gpt_neox", "attention"), ("qwen2_moe", "mlp")])
def test_a_block_beside_a_removed_one_reads_the_layer_input(family, gone):
    model, tokens = build_tiny(f"numprune_{family}", per_layer_config={1: {"skip": [gone]}}), rows()
    layers = ModelLayers(model)
    assert layers.anatomy.has_parallel_blocks
    walker = Walker(layers, tokens.shape[1:])
    stream = walker.embed(tokens)
    for block in layers.anatomy.blocks:
        if block.units:
            with layers.layer(block.layer) as layer:
                walker.advance(layer, block, stream)
    with torch.no_grad(), layers.head() as head:
        torch.testing.assert_close(head(tokens, stream.hidden), model(tokens).logits, atol=1e-4, rtol=1e-4)
