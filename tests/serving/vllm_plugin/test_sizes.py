"""The plug-in's own account of a model, which must not drift from numprune's."""

import pytest
import torch
from numprune_vllm.configs import ARCHITECTURES
from numprune_vllm.sizes import LayerSizes, check_parallel, read_layers, tensor_shapes
from transformers import AutoModelForCausalLM

from numprune import modeling
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
    return getattr(modeling, ARCHITECTURES[architecture].__name__)


def test_the_plug_in_knows_numprune_s_families():
    assert {config.model_type for config in ARCHITECTURES.values()} == {PER_LAYER_PREFIX + name for name in FAMILIES}


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
    assert tensor_shapes(theirs) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "layers",
    [
        {1: {"skip": ["norm"]}},
        {1: {"num_key_value_heads": 3}},
        {index: {"skip": ["attention"]} for index in range(SIZES["num_hidden_layers"])},
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_refuse_the_same_configurations(architecture, layers):
    said = []
    for config in (ARCHITECTURES[architecture], ours(architecture)):
        with pytest.raises(Exception) as caught:  # transformers wraps what validate_architecture raises
            config(**SIZES, per_layer_config=layers)
        said.append(str(caught.value))
    assert said[0] == said[1].replace(ours(architecture).__module__, ARCHITECTURES[architecture].__module__)


def test_what_may_not_differ_between_layers_is_refused():
    config = ARCHITECTURES["NumpruneLlamaForCausalLM"](**SIZES, per_layer_config={1: {"head_dim": 64}})
    with pytest.raises(ValueError, match=r"per_layer_config sets head_dim; only .* and skip may differ"):
        read_layers(config)


def test_a_missing_head_size_is_refused():
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    with pytest.raises(ValueError, match="head_dim is missing"):
        tensor_shapes(ARCHITECTURES["NumpruneQwen2ForCausalLM"](**sizes, per_layer_config={}))


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
    promised = vllm.preflight(modeling.NumpruneLlamaConfig(**fields))["tensor_parallel"]
    config = ARCHITECTURES["NumpruneLlamaForCausalLM"](**fields)
    assert promised == [ranks for ranks in (1, 2, 4, 8) if splits(config, ranks)]
