"""Distances between image generators."""

import math

import pytest
import torch

from numprune.image_quality import code_divergence, guided_divergence
from numprune.sampling import guided
from tests.conftest import build_tiny

SIZES = {"vocab_size": 20, "num_classes": 3, "max_position_embeddings": 10}
ROWS = torch.tensor([[16, 1, 2, 3, 4, 5, 6, 7, 8, 9], [18, 9, 8, 7, 6, 5, 4, 3, 2, 1], [17, 0, 0, 1, 1, 2, 2, 3, 3, 4]])


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guided_divergence_is_that_of_both_guided_distributions(scale):
    model, dense = build_tiny("llamagen", seed=1, **SIZES), build_tiny("llamagen", **SIZES)
    without = ROWS.clone()
    without[:, 0] = 19
    with torch.no_grad():
        ours, theirs = (
            guided(one(ROWS).logits, one(without).logits, scale)[:, :-1].log_softmax(-1) for one in (model, dense)
        )
    expected = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert expected > 0.01
    assert guided_divergence(model, dense, ROWS, scale, batch_size=2) == pytest.approx(expected, rel=1e-4)
    assert guided_divergence(dense, dense, ROWS, scale) == pytest.approx(0, abs=1e-6)


def test_code_divergence_is_jensen_shannons():
    one, other = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1], [2, 2]])
    assert code_divergence(one, one, 5) == 0
    assert code_divergence(one, torch.tensor([[2, 3]]), 5) == pytest.approx(math.log(2))
    # Halves of 0, 1 and of 1, 2: the mixture is 1/4, 1/2, 1/4.
    assert code_divergence(one, other, 5) == pytest.approx(0.5 * math.log(2))
    assert code_divergence(one, other, 5) == pytest.approx(code_divergence(other, one, 5))
