"""Slicing against the dense model if nothing is cut, and against projections of the dense model's stream."""

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.errors import InputError
from numprune.flows.studies.rivals.shortgpt import shortgpt
from numprune.flows.studies.rivals.slicegpt import block_parameters, principal_axes, slice_hidden, slicegpt
from tests.conftest import LLAMA_LIKE, build_tiny

ROWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
BIASED = {"llama": {"attention_bias": True, "mlp_bias": True}}


@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_without_slicing_it_equals_the_dense_model(family, tied):
    overrides = {"tie_word_embeddings": tied, **BIASED.get(family, {})}
    dense = build_tiny(family, **overrides)(ROWS).logits
    sliced = slice_hidden(build_tiny(family, **overrides), ROWS, 64, batch_size=4)
    torch.testing.assert_close(sliced(ROWS).logits, dense, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sliced_it_equals_the_dense_model_with_a_projected_stream():
    """The dense blocks in their own basis: the stream that enters one is projected onto the axes of most energy."""
    model = build_tiny("llama", **BIASED["llama"])
    sliced = slice_hidden(build_tiny("llama", **BIASED["llama"]), ROWS, 40, batch_size=6)
    rope = model.model.rotary_emb(torch.zeros(1), torch.arange(24)[None])
    hidden = model.get_input_embeddings()(ROWS)
    for layer in model.model.layers:
        for module, norm, arguments in (
            (layer.self_attn, layer.input_layernorm, {"position_embeddings": rope, "attention_mask": None}),
            (layer.mlp, layer.post_attention_layernorm, {}),
        ):
            unscaled = hidden / (hidden.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
            axes = torch.linalg.svd(unscaled.flatten(0, 1).double()).Vh[:40].T
            stream = (hidden.double() @ axes @ axes.T).float()
            output = module(norm(stream), **arguments)
            hidden = stream + (output[0] if isinstance(output, tuple) else output)
    expected = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(sliced(ROWS).logits, expected, atol=1e-4, rtol=1e-4)
    assert float((expected - build_tiny("llama", **BIASED["llama"])(ROWS).logits).abs().max()) > 0.1


def test_axes_are_orthogonal_and_sorted_by_energy():
    hidden = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9)
    axes = principal_axes(torch.nn.Identity(), hidden, batch_size=2)
    torch.testing.assert_close(axes.T @ axes, torch.eye(8, dtype=torch.float64))
    energy = (hidden.flatten(0, 1).double() @ axes).square().sum(0)
    assert energy.tolist() == sorted(energy.tolist(), reverse=True)
    torch.testing.assert_close(energy, torch.linalg.svdvals(hidden.flatten(0, 1).double()).square())


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_ratio_counts_the_shortcuts_as_remaining_parameters(ratio):
    anatomy = read_anatomy(build_tiny("qwen2").config)
    result = slicegpt(build_tiny("qwen2"), ROWS, ratio, 8)
    names = {name: parameter.numel() for name, parameter in result.model.named_parameters()}
    projections = sum(
        size for name, size in names.items() if "_proj.weight" in name or "shortcut" in name or "_proj.bias" in name
    )
    assert result.prunable_ratio_removed == pytest.approx(1 - projections / budget_of(anatomy).prunable_parameters)
    assert result.prunable_ratio_removed == pytest.approx(ratio, abs=0.01)
    assert result.parameters == sum(names.values())


def test_without_slicing_the_shortcuts_add_parameters():
    anatomy = read_anatomy(build_tiny().config)
    assert block_parameters(anatomy, 64) == budget_of(anatomy).prunable_parameters + 4 * 64 * 64


def test_rows_longer_than_the_window_are_refused():
    with pytest.raises(InputError, match="sequence length 24 exceeds the model's sliding window of 16"):
        slicegpt(build_tiny("mistral", sliding_window=16), ROWS, 0.3, 8)


def test_a_model_that_skips_blocks_is_refused():
    skipping = shortgpt(build_tiny(), ROWS, 0.5, 8).model
    with pytest.raises(InputError, match="skips blocks"):
        slicegpt(skipping, ROWS, 0.3, 8)
