"""Which models are timed, and that their differences are the times of blocks wherever times add up."""

import math

import pytest

from numprune.anatomy import read_anatomy
from numprune.configs import pruned_config
from numprune.errors import InputError
from numprune.slices import GONE
from numprune.target import Target
from numprune.time_budget import TimeBudget
from numprune.timed_models import TimedModels, check_measurable, within_layers
from numprune.timings import BlockTime, ScenarioTimes, Time, sizes_to_time
from tests.conftest import tiny_config

AROUND_MS = 3.0
PER_LAYER = {0: {"skip": ["mlp"]}, 1: {}}
BERT, VIT = ({"architectures": [name]} for name in ("BertForMaskedLM", "ViTForImageClassification"))
WINDOWED = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
SPARSE = {"num_hidden_layers": 5, "mlp_only_layers": [1, 3]}  # layers with experts, and without


def milliseconds(block, layer_types):
    """Of a machine on which a window saves half of the attention's time."""
    saved = block.kind == "attention" and layer_types and layer_types[block.layer] == "sliding_attention"
    return (0.5 if saved else 1.0) * 1e-3 * block.parameters(block.size) + 0.125 * bool(block.units)


def whole(anatomy, config):
    layer_types = getattr(config, "layer_types", None)
    return AROUND_MS + math.fsum(milliseconds(block, layer_types) for block in anatomy.blocks)


def measured(config):
    """The table of a machine without noise."""
    anatomy = read_anatomy(config)
    check_measurable(anatomy)
    models = TimedModels(anatomy, sizes_to_time(anatomy, Target(align=16), 3), 4)

    def of_model(model):
        built, dropped = models.built(model)
        smaller = pruned_config(config, built, dropped=dropped)
        return whole(read_anatomy(smaller), smaller)

    times = {model: of_model(model) for model in models.models}

    def time(weights):
        assert weights.keys() <= times.keys()
        ms = math.fsum(weight * times[model] for model, weight in weights.items())
        return {"ms": ms, "interval95": (ms, ms)}

    blocks = {
        kind: [BlockTime(**time(models.of_block(kind, size)), **size._asdict()) for size in sizes]
        for kind, sizes in models.sizes.items()
    }
    around = Time(**time(models.around()))
    return models, ScenarioTimes(scenario="", around=around, blocks=blocks, within_layers=within_layers(anatomy))


@pytest.mark.parametrize(
    ("family", "changes", "kinds"),
    [
        ("llama", {}, ["attention", "mlp"]),
        ("vit", VIT, ["attention", "mlp"]),
        ("bert", BERT, ["attention", "mlp"]),
        ("gemma3_text", WINDOWED, ["sliding-attention", "mlp", "attention"]),
        ("qwen2_moe", SPARSE, ["attention", "mlp", "experts"]),
        ("gpt_oss", WINDOWED, ["sliding-attention", "experts", "attention"]),
    ],
)
def test_differences_between_models_are_the_times_of_blocks(family, changes, kinds):
    config = tiny_config(family, **changes)
    models, times = measured(config)
    assert [*times.blocks] == kinds
    anatomy = models.anatomy
    budget = TimeBudget(1, {anatomy.hidden_size: times}, "torch")
    assert times.around.ms == pytest.approx(AROUND_MS)
    for chosen in (0, 1, -1):
        sizes = {block.name: models.sizes[block.timed_as][chosen] for block in anatomy.blocks}
        changed = anatomy.keeping(sizes)
        assert budget.predicted(changed).ms == pytest.approx(whole(changed, config))
    assert budget.measured(anatomy.blocks[0], GONE) == (family in ("llama", "vit"))
    assert len({model.name for model in models.models}) == len(models.models)


def test_smallest_layers_are_measured_once():
    models, _ = measured(tiny_config("bert", **BERT))
    sizes = sum(len(of_kind) for of_kind in models.sizes.values())
    assert len(models.models) == 2 * (sizes - 1)


def test_models_in_stages_are_refused():
    swin = read_anatomy(tiny_config("swin", architectures=["SwinForImageClassification"]))
    with pytest.raises(InputError, match="layers of swin differ in width and in tokens"):
        sizes_to_time(swin, Target(), 2)


@pytest.mark.parametrize(
    ("family", "overrides", "says"),
    [
        ("llama", {"num_hidden_layers": 1}, "at least two blocks of kind attention"),
        ("gemma3_text", {}, "at least two blocks of kind sliding-attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "each layer uses its index"),
        (
            "numprune_bert",
            {"architectures": ["NumpruneBertForMaskedLM"], "per_layer_config": PER_LAYER},
            r"layers\.0\.mlp was removed",
        ),
    ],
)
def test_models_whose_blocks_cannot_be_timed_are_refused(family, overrides, says):
    with pytest.raises(InputError, match=says):
        check_measurable(read_anatomy(tiny_config(family, **overrides)))
