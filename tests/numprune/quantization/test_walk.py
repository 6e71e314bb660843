"""Models quantized front to back."""

import pytest
import torch
from torch import nn

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.families import FAMILIES
from numprune.layers import CopiedLayers
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.quantization import Scheme, check_quantizable, quantized_tensors
from numprune.quantization.walk import Fit, check_target, quantize_model
from numprune.target import Target
from tests.conftest import build_tiny

ROWS = torch.randint(0, 256, (64, 24), generator=torch.Generator().manual_seed(0))
HELD = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(1))
W4 = Scheme("w4a16", 32)
LINEAR = [name for name, one in FAMILIES.items() if not (one.transposed or one.experts or one.patches)]


@torch.no_grad()
def difference(model, other) -> float:
    return float((model(HELD).logits - other(HELD).logits).square().mean())


@pytest.mark.parametrize("family", LINEAR)
def test_every_linear_of_the_decoder_layers_is_quantized(family: str) -> None:
    model = build_tiny(family)
    anatomy = read_anatomy(model.config)
    inside = model.get_submodule(anatomy.layers_path).named_modules()
    linears = {f"{anatomy.layers_path}.{path}.weight" for path, module in inside if isinstance(module, nn.Linear)}
    assert set(quantized_tensors(anatomy)) == linears
    assert linears


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3", "gemma2", "opt", "olmo2"])
def test_gptq_is_closer_to_the_model_than_rounding(family: str) -> None:
    model = build_tiny(family)
    nearest, gptq = (quantize_model(model, W4, fit)[0] for fit in (None, Fit(ROWS)))
    assert difference(gptq, model) < 0.9 * difference(nearest, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "w8a8"])
def test_eight_bits_are_closer_than_four(name: str) -> None:
    model = build_tiny(tie_word_embeddings=True)
    eight, matrices = quantize_model(model, Scheme(name), Fit(ROWS))
    assert 0 < difference(eight, model) < 0.5 * difference(quantize_model(model, W4, Fit(ROWS))[0], model)
    assert set(matrices) == set(quantized_tensors(read_anatomy(model.config)))


def test_a_dense_target_recovers_pruning_loss() -> None:
    """With the dense model's streams as targets the result is nearer to that model than with the pruned one's."""
    dense = build_tiny()
    options = PruneOptions(0.4, compensation="none", target=Target(align=1, quantization_group=32))
    pruned = prune(dense, ROWS, options).model
    own, _ = quantize_model(pruned, W4, Fit(ROWS))
    to_dense, _ = quantize_model(pruned, W4, Fit(ROWS, CopiedLayers(dense)))
    assert difference(to_dense, dense) < 0.9 * difference(own, dense)


def test_dropped_layers_still_run_in_the_dense_target() -> None:
    """A layer that adds nothing is dropped: the dense model's streams are the pruned one's, and so are the results."""
    dense = build_tiny(num_hidden_layers=3)
    for linear in (dense.model.layers[1].self_attn.o_proj, dense.model.layers[1].mlp.down_proj):
        linear.weight.data.zero_()
    pruned = prune(dense, ROWS, PruneOptions(1 / 3, drop_layers=1, compensation="none", target=Target(align=96)))
    assert pruned.plan.dropped_layers() == [1]
    own, matrices = quantize_model(pruned.model, W4, Fit(ROWS))
    to_dense, others = quantize_model(pruned.model, W4, Fit(ROWS, CopiedLayers(dense), [1]))
    for name, matrix in matrices.items():
        assert torch.equal(matrix.values, others[name].values)
    assert torch.equal(own(HELD).logits, to_dense(HELD).logits)


def test_layers_that_skip_blocks_are_quantized() -> None:
    dense = build_tiny(num_hidden_layers=3)
    dense.model.layers[1].mlp.down_proj.weight.data.zero_()
    options = PruneOptions(0.35, criterion="magnitude", allocation="global", skips=True, target=Target(align=32))
    pruned = prune(dense, ROWS, options).model
    assert pruned.config.per_layer_config[1].skip == ["mlp"]
    _, matrices = quantize_model(pruned, Scheme("w8a8"), Fit(ROWS, CopiedLayers(dense)))
    assert not any(".1.mlp." in name for name in matrices)
    assert any(".2.mlp." in name for name in matrices)


def test_models_without_linear_layers_are_refused_by_name() -> None:
    for family in FAMILIES:
        if family not in LINEAR:
            with pytest.raises(InputError, match=family):
                check_quantizable(read_anatomy(build_tiny(family).config), W4)


def test_group_sizes_that_do_not_divide_are_refused_with_alternatives() -> None:
    anatomy = read_anatomy(build_tiny().config)  # 64 hidden, 96 inner channels
    check_quantizable(anatomy, W4)
    with pytest.raises(InputError, match=r"group_size is 64, .* the 96 inputs of layers\.0\.mlp .*group size of 32,"):
        check_quantizable(anatomy, Scheme("w4a16", 64))
    check_quantizable(anatomy, Scheme("w8a8"), tensor_parallel=2)
    with pytest.raises(InputError, match=r"96 inputs of layers\.0\.mlp mlp.down_proj on 2 GPUs; prune to sizes"):
        check_quantizable(anatomy, W4, tensor_parallel=2)


def test_a_target_of_another_shape_is_refused() -> None:
    anatomy = read_anatomy(build_tiny().config)
    with pytest.raises(InputError, match="hidden_size 32"):
        check_target(anatomy, read_anatomy(build_tiny(hidden_size=32).config), ())
    with pytest.raises(InputError, match="3 layers, of which the plan drops 0"):
        check_target(anatomy, read_anatomy(build_tiny(num_hidden_layers=3).config), ())
    with pytest.raises(InputError, match=r"layers\.0\.mlp of the dense model has 64 units of 1, .* 96 of 1"):
        check_target(anatomy, read_anatomy(build_tiny(intermediate_size=64).config), ())
    narrow = read_anatomy(build_tiny(num_attention_heads=4, num_key_value_heads=1, head_dim=16).config)
    with pytest.raises(InputError, match=r"layers\.0\.attention of the dense model has 1 units"):
        check_target(anatomy, narrow, ())


def test_a_llama_pruned_into_a_mistral_is_accepted() -> None:
    """Stock Llama cannot hold heads that do not divide the hidden size."""
    dense = read_anatomy(build_tiny(num_attention_heads=4, num_key_value_heads=4, head_dim=16).config)
    pruned = read_anatomy(build_tiny("mistral", num_attention_heads=3, num_key_value_heads=3, head_dim=16).config)
    check_target(pruned, dense, ())
    with pytest.raises(InputError, match="family mistral, the model to quantize llama"):
        check_target(dense, pruned, ())


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("mlp.up_proj", "mlp.down_proj"),
        ("input_layernorm", "self_attn.q_proj"),
        ("self_attn.v_proj", "self_attn.o_proj"),
    ],
)
def test_an_overflow_in_calibration_is_named(written, named):
    model = build_tiny()
    with torch.no_grad():
        model.model.layers[1].get_submodule(written).weight.mul_(1e19)
    with pytest.raises(InputError, match=f"^model.layers.1.{named}: activations overflow float32"):
        quantize_model(model, Scheme("w8a8"), Fit(ROWS))
    quantize_model(model, Scheme("w8a8"))  # round to nearest reads no activations
