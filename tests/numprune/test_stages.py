import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file

from numprune.anatomy import read_anatomy
from numprune.axes import Limits
from numprune.budget import budget_of, pruning_step
from numprune.calibration import Walker
from numprune.configs import pruned_config
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.families import FAMILIES
from numprune.layers import ModelLayers
from numprune.options import PruneOptions
from numprune.probing import attention_masses
from numprune.pruning import dense_moments, prune
from numprune.slices import Size
from numprune.stages import ratio_of
from numprune.target import Target, allowed_sizes
from numprune.windows import windows_of
from tests.conftest import build_tiny, tiny_config, write_checkpoint
from tests.test_families import IMAGES, TASKS

TASK = TASKS["image-classification"]


@pytest.fixture(scope="module")
def layers():
    return ModelLayers(build_tiny("swin"), TASK)


def config_of(**overrides):
    config = tiny_config("swin", **overrides)
    config.architectures = ["SwinForImageClassification"]
    return config


def test_stages_have_their_own_sizes(layers):
    anatomy = layers.anatomy
    assert [block.units for block in anatomy.blocks] == [2, 48, 2, 48, 4, 96]
    assert [anatomy.stream_of((1, 8, 8), layer) for layer in range(3)] == [(64, 32), (64, 32), (16, 64)]
    assert anatomy.mergings == {2: "swin.encoder.layers.0.downsample"}
    assert anatomy.layer_paths[2] == "swin.encoder.layers.1.blocks.0"
    assert (anatomy.hidden_size, anatomy.head_dim, anatomy.context) == (64, 16, 64)
    # The second stage has a quarter of the tokens.
    parameters = [sum(block.parameters(block.size) for block in anatomy.of_layer(layer)) for layer in range(3)]
    parameters = [one - 25 * heads for one, heads in zip(parameters, (2, 2, 4), strict=True)]  # tables multiply nothing
    assert budget_of(anatomy).flops_per_token == 2 * (parameters[0] + parameters[1] + parameters[2] // 4)


def test_the_smallest_step_is_that_of_the_first_stage_and_multiples_in_others() -> None:
    anatomy = read_anatomy(config_of())
    step, blocks = pruning_step(anatomy, "mlp", units=8), anatomy.of_kind("mlp")
    assert [block.multiple for block in blocks] == [1, 1, 2]
    removed = [8 * block.multiple * block.parameters_per_unit for block in blocks]
    assert step.every_layer == pytest.approx(sum(removed) / budget_of(anatomy).prunable_parameters)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_size": 5}, "window_size=5: stage 1 has 4 x 4 tokens, fewer than a window"),
        ({"num_heads": [2]}, "num_heads has 1 entries and depths has 2; each needs one per stage"),
        ({"num_heads": [3, 4]}, "stage 0: num_heads=3 does not divide its hidden size 32"),
        ({"num_heads": [2, 2]}, "layers differ in head_dim"),
        ({"depths": [2, -1]}, r"depths=\[2, -1\]; it must be a list of 1 to 16 positive integers"),
        ({"depths": [2, 10**6]}, r"depths=\[2, 1000000\]; no model has more than 10000 layers"),
        ({"embed_dim": -32}, "embed_dim=-32; it must be a positive integer"),
        ({"hidden_size": 65}, "hidden_size=65: the last stage has 64"),
        ({"mlp_ratio": -1.0}, "mlp_ratio=-1.0; it must be a positive number"),
        ({"mlp_ratio": 0.001}, "layer 0: intermediate_size=0; it must be a positive integer"),
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings=True: swin is supported only with False"),
    ],
)
def test_configurations_that_are_contradictory_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        read_anatomy(config_of(**fields))


def test_per_layer_configurations_of_absurdly_many_layers_are_refused_at_once():
    with pytest.raises(StrictDataclassError, match="no model has more than 10000 layers"):
        tiny_config("numprune_swin", depths=[2, 2**30], num_heads=[2, 4], image_size=224)


def test_published_checkpoints_store_places_in_windows(tmp_path):
    model = build_tiny("swin", num_labels=4)
    folder = write_checkpoint(model, tmp_path / "base")
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name in [name for name in stored if name.endswith("relative_position_bias_table")]:
        stored[name.replace("bias_table", "index")] = torch.zeros(9, 9, dtype=torch.int64)
    save_file(stored, path, {"format": "pt"})
    read = checkpoint.load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(read(pixel_values=IMAGES).logits, model(pixel_values=IMAGES).logits)
    assert not [name for name in checkpoint.audit(folder) if name.endswith("index")]


def test_no_layer_is_dropped(layers):
    with pytest.raises(InputError, match="with depths each layer uses its index, so none can be dropped"):
        prune(build_tiny("swin"), IMAGES, PruneOptions(0.5, drop_layers=1), task=TASK)


@pytest.mark.parametrize("layer", [0, 1, 2])  # padded; padded and shifted; of the second stage
def test_windows_hold_each_token_once(layers, layer):
    module, block = layers._layers[layer], layers.anatomy.of_layer(layer)[0]
    windows = windows_of(module, block)
    hidden = torch.randn(3, *layers.anatomy.stream_of((1, 8, 8), layer))
    placed = windows.by_position(hidden)
    assert placed.shape[1] % 9 == 0
    assert placed.shape[1] > hidden.shape[1]
    torch.testing.assert_close(windows.by_token(placed.view(-1, 9, placed.shape[-1])), hidden)
    assert float(placed.abs().sum()) == pytest.approx(float(hidden.abs().sum()), rel=1e-5)
    entered = []
    module.attention.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        module(hidden, block.stage.grid)
    torch.testing.assert_close(
        windows.by_position(module.layernorm_before(hidden)), entered[0].view(3, -1, 32 * 2 ** (layer // 2))
    )


def test_moments_count_tokens_and_no_padding(layers):
    counts = {name: moments.count for name, moments in dense_moments(layers, IMAGES)}
    assert counts == {
        f"layers.{layer}.{kind}": len(IMAGES) * (16 if layer == 2 else 64)
        for layer in range(3)
        for kind in ("attention", "mlp")
    }


def test_attention_is_that_inside_windows(layers):
    found = attention_masses(layers, IMAGES[:1], ())
    layers._model.set_attn_implementation("eager")
    entered = layers.enter(IMAGES[:1])
    hidden = entered.hidden
    for index, arguments in enumerate(entered.arguments):
        module, block = layers._layers[index], layers.anatomy.of_layer(index)[0]
        with torch.no_grad():
            hidden, weights = module(arguments.merged(hidden), *arguments.positional, **arguments.named)
        windows = windows_of(module, block)
        on_self = windows.by_token(weights.diagonal(dim1=2, dim2=3).transpose(1, 2))[0, 1:].mean(0)
        inside = windows.by_token((weights * (windows.tokens >= 0).view(len(weights), 1, 1, -1)).sum(3).mT)[0, 1:].mean(
            0
        )
        masses = found[block.name]
        assert masses.shape == (block.units, 4)
        torch.testing.assert_close(masses[:, 1].float(), on_self)
        torch.testing.assert_close(masses.sum(1).float(), inside)  # the rest is on padding
        assert (masses[:, 0] == 0).all()  # no token is special
    layers._model.set_attn_implementation("sdpa")


def test_a_stage_whose_blocks_are_all_gone_still_merges(layers):
    anatomy = layers.anatomy
    gone = {block.name: Size(0) if block.layer < 2 else block.size for block in anatomy.blocks}
    walker = Walker(layers, IMAGES.shape[1:], batch_size=4)
    stream = walker.embed(IMAGES)
    for block in anatomy.keeping(gone).of_layer(2):
        with layers.layer(2) as layer:
            walker.advance(layer, block, stream)
    assert stream.hidden.shape == (len(IMAGES), 16, 64)


def test_ratios_give_the_width_again():
    for hidden in (96, 128, 192):
        config = config_of(embed_dim=hidden, num_heads=[hidden // 16, hidden // 8])
        for width in range(1, 4 * hidden + 1):
            ratio = ratio_of(width, FAMILIES["swin"].stages, config)
            assert [int(ratio * hidden * 2**stage) for stage in range(4)] == [width * 2**stage for stage in range(4)]


def test_uniform_results_are_stock_and_aligned_in_all_stages():
    model = build_tiny("swin")
    anatomy = read_anatomy(model.config)
    pruned = prune(model, IMAGES, PruneOptions(0.3, target=Target(align=8)), task=TASK)
    assert pruned.model.config.model_type == "swin"
    assert pruned.model.config.mlp_ratio == 0.5
    sizes = pruned.plan.sizes()
    assert [sizes[block.name].units for block in anatomy.of_kind("mlp")] == [16, 16, 32]
    assert [sizes[block.name].units for block in anatomy.of_kind("attention")] == [2, 2, 4]
    assert pruned.plan.result(anatomy).is_uniform
    for block in anatomy.of_kind("mlp"):
        assert {size.units % 8 for size in allowed_sizes(anatomy, Target(align=8), Limits())[block.name]} == {0}


def test_widths_that_are_no_multiples_give_a_per_layer_configuration(layers):
    anatomy = layers.anatomy
    sizes = {block.name: block.size for block in anatomy.blocks}
    for last, kind in ((32, "swin"), (24, "numprune_swin")):
        after = anatomy.keeping(
            sizes | {"layers.0.mlp": Size(16), "layers.1.mlp": Size(16), "layers.2.mlp": Size(last)}
        )
        config = pruned_config(layers.config, after)
        assert config.model_type == kind
        assert read_anatomy(config).blocks == after.blocks
        assert read_anatomy(copy.deepcopy(config)).blocks == after.blocks
