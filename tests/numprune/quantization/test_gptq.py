"""GPTQ equals rounding to nearest without correlations, and OBS if the grid is only zero."""

import pytest
import torch

from numprune.linalg import spd_inverse
from numprune.quantization import SCHEMES, Scheme, round_to_nearest
from numprune.quantization.gptq import error_feedback, feedback_factor, gptq

GENERATOR = torch.Generator().manual_seed(0)


def scheme(name: str) -> Scheme:
    return Scheme(name, 32 if name == "w4a16" else None)


def correlated(channels: int) -> torch.Tensor:
    """Second moments of inputs that have a common part and a few outliers."""
    inputs = torch.randn(4 * channels, channels, generator=GENERATOR, dtype=torch.float64)
    inputs = (
        inputs
        + 2
        * inputs
        @ torch.randn(channels, 3, generator=GENERATOR, dtype=torch.float64)
        @ torch.randn(3, channels, generator=GENERATOR, dtype=torch.float64)
        / channels**0.5
    )
    inputs[:, ::17] *= 6
    return inputs.T @ inputs / len(inputs)


def weight(channels: int) -> torch.Tensor:
    return torch.randn(48, channels, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEMES)
def test_without_correlations_it_is_rounding_to_nearest(name: str) -> None:
    dense = weight(160)
    found, nearest = (
        gptq(dense, torch.eye(160, dtype=torch.float64), scheme(name)),
        round_to_nearest(dense, scheme(name)),
    )
    assert torch.equal(found.values.float(), nearest.values.float())
    assert torch.equal(found.scales, nearest.scales)


@pytest.mark.parametrize("name", SCHEMES)
def test_with_correlations_gptq_beats_rounding(name: str) -> None:
    dense, gram = weight(320), correlated(320)  # more columns than a block

    def error(matrix: torch.Tensor) -> float:
        return float(((matrix.double() - dense) @ gram * (matrix.double() - dense)).sum())

    nearest = error(round_to_nearest(dense, scheme(name)).dequantized())
    assert 0 < error(gptq(dense, gram, scheme(name)).dequantized()) < 0.7 * nearest


def test_rounding_columns_to_zero_is_the_obs_update() -> None:
    dense, gram = weight(200), correlated(200)
    removed, kept = torch.arange(0, 200, 3), torch.arange(200)[torch.arange(200) % 3 > 0]
    order = torch.cat([removed, kept])
    found = error_feedback(
        dense,
        feedback_factor(gram, order),
        order,
        lambda column, index: torch.zeros_like(column) if index % 3 == 0 else column,
    )
    inverse = spd_inverse(gram)
    update = torch.linalg.solve(inverse[removed[:, None], removed], inverse[removed])
    torch.testing.assert_close(found, dense - dense[:, removed] @ update)


def test_inputs_that_never_occur_are_harmless() -> None:
    dense, gram = weight(64), correlated(64)
    gram[5] = gram[:, 5] = 0
    assert torch.isfinite(gptq(dense, gram, scheme("w4a16")).dequantized()).all()
    assert torch.isfinite(gptq(dense, torch.zeros_like(gram), scheme("w4a16")).dequantized()).all()
