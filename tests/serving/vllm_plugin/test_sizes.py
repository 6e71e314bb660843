"""The plug-in's own account of a model, which must not drift from numprune's."""

import pytest
import torch
from numprune_vllm.configs import ARCHITECTURES
from numprune_vllm.sizes import LayerSizes, check_parallel, expected_tensors, read_layers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import numprune.modeling  # noqa: F401 - registers the per-layer classes
from numprune.anatomy import FAMILIES, PER_LAYER_PREFIX
from numprune.export import vllm
from tests.serving.vllm_plugin.engine import SIZES

LAYERS = {
    "mixed": {0: {"num_attention_heads": 2, "num_key_value_heads": 1, "skip": ["mlp"]}, 2: {"skip": ["attention"]}},
    "gone": {0: {"skip": ["mlp", "attention"]}},
    "all alike": {},
}
VARIANTS = {"plain": {}, "biases": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True}}


def ours(architecture):
    """numprune's own configuration class."""
    return CONFIG_MAPPING[ARCHITECTURES[architecture].model_type]


def test_the_plug_in_knows_the_families_that_it_serves():
    served = {PER_LAYER_PREFIX + name for name, family in FAMILIES.items() if family.vllm.per_layer}
    assert {config.model_type for config in ARCHITECTURES.values()} == served


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_configuration_and_tensors_are_those_of_numprune_s_model(architecture, layers, variant):
    fields = {**SIZES, **VARIANTS[variant], "per_layer_config": LAYERS[layers]}
    config = ours(architecture)(**fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == architecture
    theirs = ARCHITECTURES[architecture].from_dict(config.to_dict())
    assert theirs.to_dict() == config.to_dict()
    assert expected_tensors(theirs).shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_plug_in_s_configurations_are_numprune_s():
    """Two distributions, neither of which may need the other."""
    for architecture, config in ARCHITECTURES.items():
        assert [base.__name__ for base in config.__mro__] == [base.__name__ for base in ours(architecture).__mro__]


SLIDING = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 16, "use_sliding_window": True}
REFUSED = {
    "unknown block": ({1: {"skip": ["norm"]}}, {}, "known are attention, mlp"),
    "groups": ({1: {"num_key_value_heads": 3}}, {}, "is no multiple of num_key_value_heads=3"),
    "no attention": ({index: {"skip": ["attention"]} for index in range(4)}, {}, "at least one must have it"),
    "layer types": ({1: {"skip": ["attention"]}}, SLIDING, "while layer_types differ"),
}


@pytest.mark.parametrize(
    ("architecture", "fault"),
    [(name, fault) for name in ARCHITECTURES for fault in REFUSED if fault != "layer types" or "Qwen" in name],
)
def test_both_refuse_what_cannot_be_served(architecture, fault):
    layers, fields, message = REFUSED[fault]
    for config in (ARCHITECTURES[architecture], ours(architecture)):
        with pytest.raises(Exception, match=message):  # transformers wraps what validate_architecture raises
            config(**{**SIZES, **fields}, per_layer_config=layers)


def test_what_may_not_differ_between_layers_is_refused():
    config = ARCHITECTURES["NumpruneLlamaForCausalLM"](**SIZES, per_layer_config={1: {"head_dim": 64}})
    with pytest.raises(ValueError, match=r"per_layer_config sets head_dim; only .* and skip may differ"):
        read_layers(config)


def test_a_missing_head_size_is_refused():
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    with pytest.raises(ValueError, match="head_dim is missing"):
        expected_tensors(ARCHITECTURES["NumpruneQwen2ForCausalLM"](**sizes, per_layer_config={}))


SPLITS = [LayerSizes(8, 2, 96), LayerSizes(0, 0, 64), LayerSizes(4, 1, 0)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_layers_that_split_pass(ranks):
    check_parallel(SPLITS, ranks)


@pytest.mark.parametrize(
    ("layer", "ranks", "fault"),
    [
        (LayerSizes(6, 2, 96), 4, r"layer 3 num_attention_heads=6"),
        (LayerSizes(12, 6, 96), 4, r"layer 3 num_key_value_heads=6"),
        (LayerSizes(12, 3, 96), 4, r"layer 3 num_key_value_heads=3"),
        (LayerSizes(8, 2, 98), 4, r"layer 3 intermediate_size=98"),
        (LayerSizes(0, 0, 33), 2, r"layer 3 intermediate_size=33"),
        (LayerSizes(3, 3, 33), 2, r"heads=3; layer 3 num_key_value_heads=3; layer 3 intermediate_size=33\. Serve with"),
    ],
)
def test_a_layer_that_does_not_split_is_refused_by_name(layer, ranks, fault):
    with pytest.raises(ValueError, match=rf"tensor_parallel_size={ranks} does not divide .*{fault}"):
        check_parallel([*SPLITS, layer], ranks)


def splits(config, ranks):
    try:
        check_parallel(read_layers(config), ranks)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "layers",
    [
        {},
        {1: {"skip": ["attention"], "intermediate_size": 36}},
        {1: {"num_attention_heads": 2, "num_key_value_heads": 1, "skip": ["mlp"]}, 2: {"intermediate_size": 40}},
        {1: {"num_attention_heads": 6, "num_key_value_heads": 3}},
    ],
)
def test_export_promises_the_splits_that_the_plug_in_accepts(layers):
    fields = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4, "per_layer_config": layers}
    promised = vllm.preflight(ours("NumpruneLlamaForCausalLM")(**fields))["tensor_parallel"]
    config = ARCHITECTURES["NumpruneLlamaForCausalLM"](**fields)
    assert promised == [ranks for ranks in (1, 2, 4, 8) if splits(config, ranks)]
