"""DIMAP's importances, by their definition and in a choice."""

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.criteria.dimap import importances, weight_importances
from numprune.errors import InputError
from numprune.images import Processor
from numprune.option_checks import check_options
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.target import Target
from numprune.tasks.image_classification import ImageClassification
from tests.conftest import build_tiny, image_processor

OPTIONS = PruneOptions(0.25, criterion="dimap", compensation="none", target=Target(align=1))


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 12}


def by_definition(*weights):
    """The importance of every weight of a layer of the paper, as tensors like the weights."""
    squares = torch.cat([weight.flatten() for weight in weights]).double().square()
    shares = squares / ((squares >= squares[:, None]) * squares).sum(1)
    parts = shares.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


@torch.no_grad()
def test_importances_are_those_of_the_paper_summed_over_units():
    model = build_tiny("vit", **SMALL)
    layer, (attention, mlp) = model.vit.layers[0], read_anatomy(model.config).of_layer(0)
    (fc1,), (fc2,) = by_definition(layer.mlp.fc1.weight), by_definition(layer.mlp.fc2.weight)
    torch.testing.assert_close(importances(layer, mlp)[:, 0], fc1.sum(1) + fc2.sum(0))
    heads = layer.attention
    query, key, value = by_definition(heads.q_proj.weight, heads.k_proj.weight, heads.v_proj.weight)
    (output,) = by_definition(heads.o_proj.weight)
    expected = (query + key + value + output.T).view(2, 8, 16).sum((1, 2))
    found = importances(layer, attention)
    torch.testing.assert_close(found.sum(1), expected)
    # Members are dimensions of queries and keys, which share the rest.
    own = (query + key).view(2, 8, 16).sum(2)
    rest = (value + output.T).view(2, 8, 16).sum((1, 2))
    torch.testing.assert_close(found, own + rest[:, None] / 8)


def test_equal_magnitudes_are_equally_important() -> None:
    """Half precision has many of them; equation 10 counts all that are not smaller."""
    (found,) = weight_importances([torch.tensor([[2.0, -2.0, 0.0], [1.0, 2.0, 0.0]])])
    assert found.tolist() == [[4 / 12, 4 / 12, 0], [1 / 13, 4 / 12, 0]]


@torch.no_grad()
def test_relative_position_biases_do_not_count():
    model = build_tiny("swin")
    anatomy = read_anatomy(model.config)
    block = anatomy.blocks[0]
    layer = model.get_submodule(block.path)
    heads = layer.attention
    query, key, value = by_definition(heads.q_proj.weight, heads.k_proj.weight, heads.v_proj.weight)
    (output,) = by_definition(heads.o_proj.weight)
    expected = (query + key + value + output.T).view(2, 16, 32).sum((1, 2))
    torch.testing.assert_close(importances(layer, block)[:, 0], expected)


@torch.no_grad()
def test_query_heads_share_their_key_and_value():
    model = build_tiny("llama", **SMALL)
    layer, block = model.model.layers[0], read_anatomy(model.config).of_layer(0)[0]
    heads = layer.self_attn
    query, key, value = by_definition(heads.q_proj.weight, heads.k_proj.weight, heads.v_proj.weight)
    (output,) = by_definition(heads.o_proj.weight)
    shared = (key.sum() + value.sum()) / 2
    expected = (query + output.T).view(2, 8, 16).sum((1, 2)) + shared
    torch.testing.assert_close(importances(layer, block), expected[None])


def test_the_unit_with_the_largest_weights_is_kept():
    model = build_tiny("vit")
    anatomy = read_anatomy(model.config)
    block = anatomy.of_kind("mlp")[0]
    layer = model.get_submodule(block.path)
    with torch.no_grad():
        layer.mlp.fc1.weight[7] *= 20
        layer.mlp.fc2.weight[:, 3] *= 20
    assert set(importances(layer, block)[:, 0].topk(2).indices.tolist()) == {3, 7}
    rows = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = ImageClassification({"a": 0, "b": 1}, Processor("{}", (1, 8, 8), image_processor()))
    plan = prune(model, rows, OPTIONS, task=task).plan
    assert {3, 7} <= set(plan.blocks[block.name].kept)


def test_experts_are_refused():
    with pytest.raises(InputError, match="criterion dimap ranks no experts, and mixtral has some"):
        check_options(read_anatomy(build_tiny("mixtral").config), OPTIONS)
