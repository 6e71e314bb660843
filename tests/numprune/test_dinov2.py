"""What DINOv2 has and no other family: layer scale, a width that is a ratio, an MLP with a gate by a flag."""

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.configs import pruned_config
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.export.streaming import CheckpointLayers
from numprune.families import FAMILIES
from numprune.layers import ModelLayers, unscale
from numprune.options import PruneOptions
from numprune.pruning import prune, prune_layers
from numprune.slices import Size
from numprune.target import Target
from tests.conftest import build_tiny, tiny_config, write_checkpoint
from tests.numprune.test_tensors import build, check

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
of_mlp = pytest.mark.parametrize("gated", [False, True])


def tiny(gated: bool = False):
    return build_tiny("dinov2", use_swiglu_ffn=gated)


@torch.no_grad()
def logits(model):
    return model(pixel_values=IMAGES).logits


@of_mlp
def test_layer_scales_move_into_the_consumers(gated):
    model = tiny(gated)
    layer = model.dinov2.encoder.layer[0]
    with torch.no_grad():
        layer.layer_scale2.lambda1[3] = 0
    expected = logits(model)
    layers = ModelLayers(model)
    for index in range(2):
        with layers.layer(index):
            pass
    assert (layer.layer_scale1.lambda1 == 1).all()
    assert (layer.layer_scale2.lambda1 == 1).all()
    assert not (layer.mlp.down_proj if gated else layer.mlp.fc2).weight[3].any()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    unscale(layer, layers.anatomy.of_layer(0))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@of_mlp
@pytest.mark.parametrize("hidden", [64, 384, 768, 1536])
def test_ratios_and_widths_are_inverse(gated, hidden):
    family = FAMILIES["dinov2"]
    widths = {ratio: family.width_of(ratio, hidden, gated=gated) for ratio in range(1, 9)}
    assert {ratio: family.ratio_of(width, hidden, gated=gated) for ratio, width in widths.items()} == {
        ratio: ratio for ratio in widths
    }
    assert all(family.ratio_of(width + 8, hidden, gated=gated) is None for width in widths.values())


@of_mlp
@pytest.mark.parametrize(("width", "stock"), [("whole", True), ("half", True), ("other", False)])
def test_uniform_widths_are_stock_if_they_are_a_ratio(gated, width, stock):
    model = tiny(gated)
    anatomy = read_anatomy(model.config)
    widths = {"whole": anatomy.blocks[1].units, "half": 48 if gated else 64, "other": 40}
    sizes = {
        block.name: Size(widths[width]) if block.kind == "mlp" else Size(3, block.members) for block in anatomy.blocks
    }
    config = pruned_config(model.config, anatomy.keeping(sizes))
    assert (config.model_type == "dinov2") is stock
    assert read_anatomy(config).blocks == anatomy.keeping(sizes).blocks


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_table_of_tensors_with_a_gate(per_layer):
    fields = {"use_swiglu_ffn": True}
    if per_layer:
        layers = {0: {"intermediate_size": 40}, 1: {"num_attention_heads": 2, "skip": ["mlp"]}}
        check(build("dinov2", "image-classification", "numprune_dinov2", **fields, per_layer_config=layers))
    else:
        check(build("dinov2", "image-classification", **fields))


def test_a_gated_model_is_pruned_streamed_and_read_back(tmp_path):
    base = write_checkpoint(tiny(gated=True), tmp_path / "base")
    options = PruneOptions(0.3, allocation="error", compensation="joint", target=Target(align=1))
    layers, cut = CheckpointLayers(base, scratch=tmp_path), {}
    plan = prune_layers(layers, IMAGES, options, lambda made: cut.update({k: v.clone() for k, v in made.items()}))
    pruned = prune(checkpoint.load_model(base), IMAGES, options, task=layers.task)
    assert plan.sizes() == pruned.plan.sizes()
    inside = pruned.model.state_dict()
    for name, value in cut.items():
        torch.testing.assert_close(value, inside[name], atol=1e-4, rtol=1e-3)
    checkpoint.save(pruned.model, base, tmp_path / "pruned")
    read = checkpoint.load_model(tmp_path / "pruned")
    torch.testing.assert_close(logits(read), logits(pruned.model), atol=1e-6, rtol=1e-6)


def test_images_must_be_square():
    with pytest.raises(InputError, match=r"image_size=8 x 16: dinov2 is supported only with square images"):
        read_anatomy(tiny_config("dinov2", image_size=[8, 16], architectures=["Dinov2ForImageClassification"]))
