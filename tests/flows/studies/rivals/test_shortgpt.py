"""Depth pruning against the paper's formula, and against the dense model without those layers."""

import pytest
import torch
from torch import nn

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.errors import InputError
from numprune.flows.studies.rivals.shortgpt import block_influence, layers_to_drop, shortgpt
from tests.conftest import LLAMA_LIKE, build_tiny

ROWS = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_influence_follows_the_paper_s_formula():
    model = build_tiny(num_hidden_layers=3)
    states = []  # entering each layer, and leaving the last
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, inputs, output: states.append((inputs[0], output)))
    model(ROWS)
    expected = []
    for before, after in states[:3]:
        pairs = zip(before.double().flatten(0, 1), after.double().flatten(0, 1), strict=True)
        cosines = [float(a @ b / (a @ a).sqrt() / (b @ b).sqrt()) for a, b in pairs]
        expected.append(1 - sum(cosines) / len(cosines))
    found = block_influence(build_tiny(num_hidden_layers=3), ROWS, batch_size=2)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("family", LLAMA_LIKE)
@torch.no_grad()
def test_the_result_is_the_dense_model_without_the_least_influential_layers(family):
    dense = build_tiny(family, num_hidden_layers=4)
    influence = block_influence(dense, ROWS, 8)
    result = shortgpt(build_tiny(family, num_hidden_layers=4), ROWS, 0.45, 8)
    kept = sorted(influence.argsort().tolist()[2:])
    dense.model.layers = nn.ModuleList(dense.model.layers[index] for index in kept)
    torch.testing.assert_close(result.model(ROWS, use_cache=False).logits, dense(ROWS, use_cache=False).logits)
    assert result.parameters == sum(parameter.numel() for parameter in dense.parameters())
    assert result.prunable_ratio_removed == 0.5


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.0, set()), (0.1, set()), (0.2, {2}), (0.3, {2}), (0.4, {2, 0}), (0.9, {2, 0, 3})],
)
def test_the_number_of_layers_is_the_nearest_and_at_least_one_stays(ratio, expected):
    anatomy = read_anatomy(build_tiny(num_hidden_layers=4).config)
    assert layers_to_drop(anatomy, torch.tensor([0.2, 0.9, 0.1, 0.5]), ratio) == expected


def test_mixed_attention_windows_are_refused():
    model = build_tiny("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1)
    assert budget_of(read_anatomy(model.config)).parameters
    with pytest.raises(InputError, match="sliding windows in some layers only"):
        shortgpt(model, ROWS, 0.5, 8)
