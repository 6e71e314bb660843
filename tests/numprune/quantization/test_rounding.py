"""Values on a scheme's grid, and their scales."""

import pytest
import torch

from numprune.errors import InputError
from numprune.quantization import SCHEMES, Scheme, round_to_nearest
from numprune.quantization.rounding import per_channel, round_tokens

GENERATOR = torch.Generator().manual_seed(0)


def scheme(name: str) -> Scheme:
    return Scheme(name, 32 if name == "w4a16" else None)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_weight_moves_by_more_than_half_a_step(name: str) -> None:
    weight = torch.randn(24, 96, generator=GENERATOR) * torch.logspace(-3, 1, 24)[:, None]
    found = round_to_nearest(weight, scheme(name))
    error, steps = (found.dequantized() - weight).abs(), per_channel(found.scales, 96)
    assert found.scales.shape == (24, 3 if name == "w4a16" else 1)
    # FP8 has three bits behind the leading one, and subnormal numbers in steps of 2^-9.
    bound = torch.maximum(weight.abs() / 16, steps * 2**-10) if name == "fp8" else steps / 2
    assert (error <= bound * (1 + 1e-4)).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_on_the_grid_are_unchanged(name: str) -> None:
    found = round_to_nearest(torch.randn(8, 64, generator=GENERATOR), scheme(name))
    again = round_to_nearest(found.dequantized(), scheme(name))
    torch.testing.assert_close(again.dequantized(), found.dequantized(), rtol=2e-1 if name == "w4a16" else 2e-2, atol=0)


def test_zero_rows_and_half_precision_scales() -> None:
    weight = torch.randn(4, 64, generator=GENERATOR)
    weight[1] = 0
    weight[2] *= 1e-9  # float16 has no scale as small as this row's
    found = round_to_nearest(weight, scheme("w4a16"), torch.float16)
    assert torch.equal(found.scales, found.scales.half().float())
    assert torch.equal(found.dequantized()[1:3], torch.zeros(2, 64))
    assert torch.isfinite(found.dequantized()).all()


@pytest.mark.parametrize("name", ["fp8", "w8a8"])
def test_every_token_has_its_own_scale(name: str) -> None:
    tokens = torch.randn(2, 5, 40, generator=GENERATOR) * torch.logspace(-2, 2, 5)[:, None]
    tokens[0, 0] = 0
    rounded = round_tokens(tokens, scheme(name))
    assert torch.equal(rounded[0, 0], tokens[0, 0])
    largest = tokens.abs().amax(-1, keepdim=True)
    bound = largest / 254 if name == "w8a8" else torch.maximum(tokens.abs() / 16, largest / 448 * 2**-10)
    assert ((rounded - tokens).abs() <= bound * (1 + 1e-5)).all()
    assert not torch.equal(rounded, tokens)
    one = round_tokens(tokens[1, 3], scheme(name))
    assert torch.equal(one, rounded[1, 3])  # no token depends on its neighbours


@pytest.mark.parametrize(
    ("name", "group_size", "says"),
    [("w4a16", 48, "32, 64, 128"), ("fp8", 64, "one scale per row"), ("int3", None, "fp8, w8a8, w4a16")],
)
def test_unknown_schemes_are_refused(name: str, group_size: int | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Scheme(name, group_size)


def test_scales_of_ordinary_weights_are_subnormal_in_half_precision() -> None:
    weight = torch.randn(4, 64, generator=GENERATOR) * 1e-4  # 4-bit scales of about 4e-5; float16 is normal from 6e-5
    found = round_to_nearest(weight, scheme("w4a16"), torch.float16)
    error = (found.dequantized() - weight).abs()
    # A scale itself is off by half of 2^-24, up to 8 times.
    assert (error <= per_channel(found.scales, 64) / 2 + 8 * 2**-25).all()


def test_float64_weights_have_float32_scales() -> None:
    found = round_to_nearest(torch.full((1, 64), 1e-45, dtype=torch.float64), scheme("w4a16"), torch.float64)
    assert torch.isfinite(found.dequantized()).all()
    assert found.scales.min() > 0
