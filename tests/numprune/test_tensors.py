"""The table of a checkpoint's tensors equals that of transformers' model, for every family and task."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from numprune.anatomy import PER_LAYER_PREFIX
from numprune.configs import class_name
from numprune.families import FAMILIES
from numprune.modeling import AUTO_OF
from numprune.tensors import tensor_table
from tests.conftest import OF_FAMILY, TINY

of_task = pytest.mark.parametrize(
    ("family", "task"), [(name, task) for name, family in FAMILIES.items() for task in family.tasks]
)


def build(family, task, model_type=None, **fields):
    """A model without values."""
    sizes = {} if FAMILIES[family].stages else TINY
    fields = {**sizes, "sliding_window": None, **OF_FAMILY.get(family, {}), **fields}
    config = AutoConfig.for_model(model_type or family, **fields)
    config.architectures = [class_name(config, task)]
    with torch.device("meta"):
        model = AUTO_OF[task].from_config(config)
    assert config.architectures == [type(model).__name__]
    return model


def check(model):
    found, state = tensor_table(model.config), model.state_dict()
    parts = {name: tuple(revert_weight_conversion(model, {name: tensor})) for name, tensor in state.items()}
    assert found.shapes == {
        name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()
    }
    assert found.parts == parts
    assert found.tied == {parts[name][0]: parts[source][0] for name, source in model.all_tied_weights_keys.items()}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert found.linear == {parts[name][0] for name in linear}
    assert found.base == f"{model.base_model_prefix}."


def flags(family):
    """The configuration's fields that say whether there are biases."""
    wirings = [wiring for wiring in (family.attention, family.mlp, family.shared) if wiring is not None]
    found = [matrix.bias for wiring in wirings for matrix in (*wiring.writers, wiring.reader)]
    return {flag for flag in found if isinstance(flag, str)}


@pytest.mark.parametrize(
    ("family", "task", "tied"),
    [
        (name, task, tied)
        for name, family in FAMILIES.items()
        for task in family.tasks
        for tied in (True, False)
        if tied in family.requires.get("tie_word_embeddings", (True, False))
    ],
)
@pytest.mark.parametrize("biases", [True, False])
def test_the_table_is_that_of_the_model(family, task, tied, biases):
    entry = FAMILIES[family]
    check(build(family, task, tie_word_embeddings=tied, **dict.fromkeys(flags(entry), biases)))


# By layer, in the family's own fields: other heads and width; no attention and a width of its own.
@of_task
@pytest.mark.parametrize("second", [{"width": 40}, {"skip": ["attention"], "width": 40}, {"skip": ["mlp"]}])
def test_the_table_of_a_model_whose_layers_differ(family, task, second):
    entry = FAMILIES[family]
    skip = second.get("skip", [])
    if entry.experts is not None:
        sizes = {entry.experts.count: 3, entry.experts.width: 16}
        skip = [kind for kind in skip if kind == "attention" or entry.mlp is not None]
    else:
        sizes = {entry.width: second["width"]} if "width" in second else {}
    if "attention" not in skip:
        sizes |= {entry.heads: 2, **({entry.kv_heads: 1} if entry.kv_heads else {})}
    layers = {0: {}, 1: {**sizes, **({"skip": skip} if skip else {})}}
    if "attention" in skip and len(set(getattr(build(family, task).config, "layer_types", None) or ())) > 1:
        pytest.skip("attention cannot be skipped where layers attend in different ways")
    if entry.attention.joint_norms and "attention" not in skip:
        layers[1] = {field: value for field, value in layers[1].items() if field not in (entry.heads, entry.kv_heads)}
    if entry.stages:
        layers[2] = {entry.heads: 4, entry.width: 96}  # the second stage has other sizes than the first
    check(build(family, task, PER_LAYER_PREFIX + family, per_layer_config=layers))
