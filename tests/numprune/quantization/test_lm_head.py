"""The output matrix in 4 bits: exact in every stored data type, and better by GPTQ than by rounding to nearest."""

import copy

import pytest
import torch

from numprune.errors import InputError
from numprune.moments import Moments
from numprune.quantization import Scheme
from numprune.quantization.lm_head import check_groups, on_grid, rounding, scales_of
from numprune.quantization.walk import Fit, quantize_model
from tests.conftest import build_tiny

ROWS = torch.randint(0, 250, (12, 32), generator=torch.Generator().manual_seed(0))


def matrix(rows: int = 300) -> torch.Tensor:
    """Rows of very different sizes, one of zeros and one almost so."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, 96, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[5], weight[6] = 0, weight[6] * 1e-7
    return weight


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)


@pytest.fixture(scope="module")
def moments() -> Moments:
    found = Moments(96)
    found.add(inputs())
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_every_data_type_holds_the_values_and_yields_the_integers(
    moments: Moments, dtype: torch.dtype, method: str
) -> None:
    found = rounding(moments if method == "gptq" else None)(matrix())
    stored = found.to(dtype)
    assert torch.equal(stored.float(), found)
    integers = on_grid(stored)
    assert integers is not None
    assert torch.equal(integers.dequantized(), found)
    assert (int(integers.values.min()), int(integers.values.max())) == (-8, 7)


def test_gptq_has_less_error_in_the_logits_than_rounding_to_nearest(moments: Moments) -> None:
    def error(found: torch.Tensor) -> float:
        return float(((found - matrix()) @ inputs().T).square().mean())

    assert error(rounding(moments)(matrix())) < 0.7 * error(rounding(None)(matrix()))


def test_rows_are_rounded_independently_of_each_other(moments: Moments) -> None:
    """So a matrix larger than memory is rounded in slabs."""
    whole = rounding(moments)(matrix())
    assert torch.equal(torch.cat([rounding(moments)(part) for part in matrix().split(77)]), whole)


def test_scales_have_the_least_error_of_those_considered() -> None:
    weight = matrix()
    spanning = (weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5).clamp_min(2.0**-20)

    def error(scales: torch.Tensor) -> float:
        steps = scales.repeat_interleave(32, 1)
        return float(((weight / steps).round().clamp(-8, 7) * steps - weight).square().sum())

    assert error(scales_of(weight).float()) < 0.95 * error(spanning)


def test_other_values_are_on_no_grid() -> None:
    assert on_grid(matrix()) is None
    assert on_grid(rounding(None)(matrix())[:, :80]) is None  # groups do not divide it
    large = torch.zeros(2, 32)
    large[1, :2] = torch.tensor([8.0, 1.0])  # the grid ends at 7
    assert on_grid(large) is None
    assert on_grid(-large) is not None


@pytest.mark.parametrize("tied", [True, False])
def test_the_matrix_of_a_model_is_rounded_for_the_inputs_of_the_quantized_one(tied: bool) -> None:
    model = build_tiny(tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    scheme = Scheme("w4a16", 32)
    whole, _ = quantize_model(model, scheme, Fit(ROWS))
    found, _ = quantize_model(model, scheme, Fit(ROWS), lm_head_bits=4)
    nearest, _ = quantize_model(model, scheme, lm_head_bits=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    heads = [one.get_output_embeddings().weight for one in (found, nearest)]
    assert all(on_grid(head.detach()) is not None for head in heads)
    embedded = found.get_input_embeddings().weight
    assert torch.equal(embedded, heads[0] if tied else before["model.embed_tokens.weight"])
    with torch.no_grad():
        states = whole.model(ROWS).last_hidden_state
        errors = [float((states @ (head - before["lm_head.weight"]).T).square().mean()) for head in heads]
    assert errors[0] < 0.8 * errors[1]


def test_hidden_sizes_that_groups_do_not_divide_are_refused() -> None:
    check_groups(96)
    with pytest.raises(InputError, match=r"lm_head_bits is 4: groups of 32 do not divide .* hidden_size 80; use 8"):
        check_groups(80)
