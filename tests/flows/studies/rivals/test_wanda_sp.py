"""Wanda-sp against the authors' formula in loops, and against the dense model with those units masked."""

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.errors import InputError
from numprune.flows.studies.rivals.wanda_sp import highest, unit_scores, wanda_sp
from tests.conftest import build_tiny

ROWS = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))


def test_a_unit_s_score_follows_the_authors_formula():
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(5, 6, generator=generator), torch.randn(20, 6, generator=generator)
    expected = []
    for unit in range(3):
        channels = []
        for j in (2 * unit, 2 * unit + 1):
            norm = sum(float(value) ** 2 for value in x[:, j]) ** 0.5
            channels.append(sum(abs(float(weight[i, j])) * norm for i in range(5)) / 5)
        expected.append(sum(channels))
    found = unit_scores(weight, x.double().square().sum(0), units=3)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_mean_over_rows_ranks_differently_from_the_column_norm():
    """One large weight in a column: its L2 norm is the larger, its L1 mean the smaller."""
    weight = torch.tensor([[3.0, 2.0], [0.0, 2.0]])
    assert weight.norm(dim=0).argmin() == 1
    assert unit_scores(weight, torch.ones(2, dtype=torch.float64), units=2).argmin() == 0


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, [0, 1, 2, 3]), (0.3, [0, 2, 3]), (0.5, [0, 3]), (0.99, [3])])
def test_the_number_of_units_is_rounded_down(ratio, expected):
    assert highest(torch.tensor([0.5, 0.1, 0.4, 0.9]), ratio).tolist() == expected


def energies_of(model, blocks):
    """Run the whole model; return the sum of squares of each input channel of the blocks' consumers."""
    found = {}

    def hook(name):
        def record(_module, inputs):
            found[name] = inputs[0].double().reshape(-1, inputs[0].shape[-1]).square().sum(0)

        return record

    consumers = {block.name: model.get_submodule(f"{block.path}.{block.consumer}") for block in blocks}
    handles = [consumer.register_forward_pre_hook(hook(name)) for name, consumer in consumers.items()]
    model(ROWS)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_each_layer_is_scored_on_the_output_of_the_pruned_layers_before_it(family):
    """The authors' loop on the whole model: units are masked by zeros in the consumer instead of being cut."""
    masked = build_tiny(family, num_hidden_layers=3)
    anatomy = read_anatomy(masked.config)
    for index in range(3):
        energies = energies_of(masked, anatomy.of_layer(index))
        for block in anatomy.of_layer(index):
            weight = masked.get_submodule(f"{block.path}.{block.consumer}").weight
            weight = weight if block.reader.dim == 1 else weight.T
            scores = unit_scores(weight, energies[block.name], block.units)
            for unit in scores.argsort()[: int(0.5 * block.units)].tolist():
                weight[:, unit * block.channels_per_unit : (unit + 1) * block.channels_per_unit] = 0

    result = wanda_sp(build_tiny(family, num_hidden_layers=3), ROWS, 0.5, 2)
    torch.testing.assert_close(result.model(ROWS).logits, masked(ROWS).logits, atol=1e-4, rtol=1e-4)
    assert result.parameters == sum(parameter.numel() for parameter in result.model.parameters())
    assert result.prunable_ratio_removed == 0.5
    after = read_anatomy(result.model.config)
    assert all(small.units == block.units // 2 for small, block in zip(after.blocks, anatomy.blocks, strict=True))


@torch.no_grad()
def test_at_ratio_zero_nothing_changes():
    dense = build_tiny()
    result = wanda_sp(build_tiny(), ROWS, 0.0, 8)
    torch.testing.assert_close(result.model(ROWS).logits, dense(ROWS).logits)
    assert result.parameters == budget_of(read_anatomy(dense.config)).parameters
    assert result.prunable_ratio_removed == 0


@pytest.mark.parametrize(("family", "message"), [("mixtral", "experts"), ("olmo2", "norms over all heads")])
def test_models_whose_units_cannot_go_alone_are_refused(family, message):
    with pytest.raises(InputError, match=f"wanda-sp: .*{message}"):
        wanda_sp(build_tiny(family), ROWS, 0.3, 8)
