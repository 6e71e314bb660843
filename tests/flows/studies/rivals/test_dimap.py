"""DIMAP as published, against its definition in loops over a whole network."""

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.criteria.dimap import importances
from numprune.errors import InputError
from numprune.flows.studies.rivals import check
from numprune.flows.studies.rivals.dimap import dimap_units, dimap_weights
from tests.conftest import build_tiny

IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def by_definition(weight):
    """Equation 10 for every weight of a layer, in a loop."""
    squares = weight.double().square().flatten().tolist()
    ascending = sorted(squares)
    total, larger = sum(squares), {}
    for value in ascending:
        larger.setdefault(value, total)
        total -= value
    return torch.tensor([value / larger[value] for value in squares]).view_as(weight)


@torch.no_grad()
def test_weights_are_masked_by_one_threshold_per_module():
    model, dense = (build_tiny("vit", hidden_size=16, intermediate_size=24) for _ in range(2))
    for layer in (*model.vit.layers[1:], *dense.vit.layers[1:]):
        layer.attention.q_proj.weight *= 30  # magnitudes of layers differ; relative to their layer they do not
    removed = dimap_weights(model, IMAGES, 0.4, 8)
    modules = {"qkv": [], "projection": [], "mlp": []}
    for before, after in zip(dense.vit.layers, model.vit.layers, strict=True):
        old, new = (
            torch.cat([getattr(layer.attention, f"{name}_proj").weight for name in "qkv"]) for layer in (before, after)
        )
        modules["qkv"].append((by_definition(old), new))
        modules["projection"].append((by_definition(before.attention.o_proj.weight), after.attention.o_proj.weight))
        for name in ("fc1", "fc2"):
            old, new = (getattr(layer.mlp, name).weight for layer in (before, after))
            modules["mlp"].append((by_definition(old), new))
    masked = 0
    for pairs in modules.values():
        ranked, zero = (torch.cat([pair[which].flatten() for pair in pairs]) for which in (0, 1))
        gone = zero == 0
        assert int(gone.sum()) == int(0.4 * len(gone))
        assert ranked[gone].max() <= ranked[~gone].min()
        masked += int(gone.sum())
    assert removed.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert removed.prunable_ratio_removed == masked / budget_of(read_anatomy(model.config)).prunable_parameters
    assert torch.equal(model.vit.layers[0].mlp.fc1.bias, dense.vit.layers[0].mlp.fc1.bias)


@pytest.mark.parametrize("family", ["vit", "swin"])
@torch.no_grad()
def test_units_of_all_layers_are_ranked_within_their_module(family):
    model, dense = build_tiny(family), build_tiny(family)
    anatomy = read_anatomy(dense.config)
    for one in (model, dense):  # the first layer has the larger weights beside small ones
        mlp = one.get_submodule(anatomy.of_kind("mlp")[0].path).mlp
        mlp.fc1.weight[:8] *= 50
    result = dimap_units(model, IMAGES, 0.4, 8)
    after = read_anatomy(result.model.config)
    for kind in ("attention", "mlp"):
        whole, left = (sum(block.parameters(block.size) for block in one.of_kind(kind)) for one in (anatomy, after))
        unit = max(block.parameters_per_unit for block in anatomy.of_kind(kind)) * (8 if kind == "mlp" else 1)
        assert abs(left - 0.6 * whole) <= unit / 2
    assert len({block.units / block.multiple for block in after.of_kind("mlp")}) > 1  # layers differ
    mlp = anatomy.of_kind("mlp")[0]
    scores = importances(dense.get_submodule(mlp.path), mlp).sum(1)
    kept = scores.topk(after.of_kind("mlp")[0].units).indices.sort().values
    small = result.model.get_submodule(mlp.path).mlp.fc1.weight
    assert torch.equal(small, dense.get_submodule(mlp.path).mlp.fc1.weight[kept])
    assert result.parameters == sum(parameter.numel() for parameter in result.model.parameters())
    assert result.model(pixel_values=IMAGES).logits.isfinite().all()


@pytest.mark.parametrize("name", ["dimap-units", "dimap-weights"])
def test_models_with_experts_are_refused(name):
    with pytest.raises(InputError, match=f"{name}: models with experts"):
        check(name, read_anatomy(build_tiny("mixtral").config), 0.3)


def test_what_no_module_can_lose_is_refused_before_any_work():
    anatomy = read_anatomy(build_tiny("vit").config)
    with pytest.raises(InputError, match=r"ratio is 0\.95, .* of the attention parameters can be removed"):
        check("dimap-units", anatomy, 0.95)
    with pytest.raises(InputError, match="norms over all heads"):
        check("dimap-units", read_anatomy(build_tiny("olmo2").config), 0.3)
    check("dimap-weights", anatomy, 0.95)
