"""Hidden size, dropped layers and units in one ratio or budget: prices, and the choice among measured candidates."""

from dataclasses import replace

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.axes import Limits
from numprune.byte_budget import ByteBudget
from numprune.curves import error_at
from numprune.errors import InputError
from numprune.hidden import narrowed
from numprune.layers import CopiedLayers
from numprune.learning import check_learning
from numprune.option_checks import check_options
from numprune.options import PruneOptions, left_of, with_shape
from numprune.planned import check_plan
from numprune.pruning import plan_layers, prune
from numprune.shape import PLAIN, Shape, shape_fields, shapes_of
from numprune.shaping import _Study, choose_shape, divergence
from numprune.target import Target, allowed_sizes
from numprune.time_budget import TimeBudget
from tests.conftest import build_tiny, tiny_config
from tests.numprune.test_time_budget import table

ROWS = torch.randint(0, 256, (16, 20), generator=torch.Generator().manual_seed(0))
APART = torch.arange(len(ROWS)) % 4 == 0
SHAPES = shapes_of([56, 48], [1])
OPTIONS = PruneOptions(0.4, "magnitude", "error", "oneshot", shapes=SHAPES)


@pytest.fixture(scope="module")
def model():
    return build_tiny(num_hidden_layers=3, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def study(model):
    return _Study.of(model, CopiedLayers(model), ROWS[~APART], ROWS[APART], OPTIONS)


def test_combinations_include_the_models_own_shape():
    assert (PLAIN, Shape(None, 1), Shape(56, 0), Shape(56, 1), Shape(48, 0), Shape(48, 1)) == SHAPES
    assert shape_fields([], []) == {"hidden_size": None, "drop_layers": 0}
    assert shape_fields([48], [1]) == {"hidden_size": 48, "drop_layers": 1}
    assert shape_fields([], [1, 2]) == {"shapes": (PLAIN, Shape(None, 1), Shape(None, 2))}


def test_a_price_is_the_sum_of_width_layers_and_units(model, study):
    prices = dict(study.priced())
    assert prices.keys() == {*SHAPES}
    plain = with_shape(OPTIONS, PLAIN)
    layers = CopiedLayers(model)
    sizes = plan_layers(layers, ROWS[~APART], plain).sizes()
    units = sum(error_at(study.errors, block, sizes[block.name]) for block in layers.anatomy.blocks)
    assert prices[PLAIN] == pytest.approx(units)
    nothing = replace(study, options=replace(OPTIONS, ratio=0.0))
    assert dict(nothing.priced())[PLAIN] == 0.0
    narrow = replace(with_shape(OPTIONS, Shape(48, 0)), ratio=0.0)
    made = prune(model, ROWS[~APART], narrow).model
    assert (made.config.hidden_size, made.config.intermediate_size) == (48, model.config.intermediate_size)
    expected = divergence(CopiedLayers(made), layers, ROWS[APART])
    assert dict(nothing.priced())[Shape(48, 0)] == pytest.approx(expected, rel=1e-3)
    (drop,) = study.dropped
    everything = replace(study, options=replace(OPTIONS, ratio=0.34))
    assert dict(everything.priced())[Shape(None, 1)] == pytest.approx(drop.divergence, rel=0.5)


def test_the_candidate_with_the_least_measured_divergence_is_chosen(model):
    options, choice = choose_shape(model, ROWS, OPTIONS)
    measured = {(one.hidden_size, one.drop_layers): one.measured for one in choice.tried if one.measured is not None}
    assert len(choice.tried) == len(SHAPES)
    assert len(measured) in (3, 4)
    assert (64, 0) in measured
    chosen = choice.tried[0]
    assert chosen.measured == min(measured.values())
    assert (options.hidden_size or 64, options.drop_layers, options.shapes) == (*next(iter(measured)), ())
    others = [one.predicted for one in choice.tried[1:]]
    assert others == sorted(others)
    assert choice.rows_apart == 4
    # It is the divergence of what pruning makes of the other rows.
    made = prune(model, ROWS[~APART], with_shape(OPTIONS, PLAIN)).model
    found = divergence(CopiedLayers(made), CopiedLayers(model), ROWS[APART])
    assert found == pytest.approx(measured[64, 0], rel=1e-3)


def test_candidates_share_a_budget_of_bytes(model):
    anatomy = read_anatomy(model.config)
    stored = 4 * sum(parameter.numel() for parameter in model.parameters())
    budget = ByteBudget(int(0.8 * stored), 4 * anatomy.fixed_parameters, 4)
    options, choice = choose_shape(model, ROWS, replace(OPTIONS, ratio=0.0, budget=budget))
    assert len(choice.tried) > 1
    for shape in (Shape(56, 0), Shape(48, 1)):
        made = prune(model, ROWS, with_shape(replace(options, drop_layers=0), shape)).model
        assert 4 * sum(parameter.numel() for parameter in made.parameters()) <= budget.limit


def times_at(anatomy, ms_per_parameter=1e-6):
    allowed = allowed_sizes(anatomy, Target(), Limits())
    around = ms_per_parameter * anatomy.output_parameters
    return table(lambda block, size: ms_per_parameter * block.parameters(size), around, anatomy, allowed)


def test_candidates_share_a_budget_of_time(model):
    anatomy = read_anatomy(model.config)
    times = {one.hidden_size: times_at(one) for one in (anatomy, *(narrowed(anatomy, n, "fisher") for n in (56, 48)))}
    limit_ms = 0.7 * TimeBudget(1, times, "torch").predicted(anatomy).ms
    budget = TimeBudget(limit_ms, times, "torch")
    options, choice = choose_shape(model, ROWS, replace(OPTIONS, ratio=0.0, time_budget=budget))
    assert len(choice.tried) == len(SHAPES)
    made = prune(model, ROWS, with_shape(options, Shape(48, 1)))
    assert 0.6 * limit_ms < budget.predicted(read_anatomy(made.model.config)).ms <= limit_ms
    check_plan(anatomy, made.plan)


def test_a_budget_of_time_counts_the_time_of_the_output_matrix_that_a_rotation_adds():
    model = build_tiny(tie_word_embeddings=True)
    anatomy = read_anatomy(model.config)
    times = {one.hidden_size: times_at(one) for one in (anatomy, narrowed(anatomy, 56, "fisher"))}
    budget = TimeBudget(0.8 * TimeBudget(1, times, "torch").predicted(anatomy).ms, times, "torch")
    options = replace(OPTIONS, ratio=0.0, shapes=shapes_of([56], []), time_budget=budget)
    study = _Study.of(model, CopiedLayers(model), ROWS[~APART], ROWS[APART], options)
    assert dict(study.priced()).keys() == {PLAIN, Shape(56, 0)}


def test_each_hidden_size_is_priced_by_its_own_times(model, study):
    anatomy = read_anatomy(model.config)
    times = {64: times_at(anatomy, 1e-4), **{n: times_at(narrowed(anatomy, n, "fisher")) for n in (56, 48)}}
    budget = TimeBudget(
        0.9 * TimeBudget(1, times, "torch").predicted(narrowed(anatomy, 48, "fisher")).ms, times, "torch"
    )
    priced = dict(replace(study, options=replace(OPTIONS, ratio=0.0, time_budget=budget)).priced())
    assert priced.keys() == {shape for shape in SHAPES if shape.hidden_size}
    del times[56]
    with pytest.raises(InputError, match="hidden size 56 was not measured; measured are 64, 48"):
        check_options(anatomy, replace(with_shape(OPTIONS, Shape(56, 0)), ratio=0.0, time_budget=budget))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shapes": shapes_of([42], [])}, "the hidden size would be 42"),
        ({"shapes": shapes_of([], [3])}, "drop_layers is 3; the model has 3 layers"),
        ({"shapes": shapes_of([], [2])}, "drop_layers is 2: these layers have 0.6667"),
        ({"shapes": shapes_of([0], [0])}, "only the model's own hidden size and number of layers"),
        ({"ratio": 0.0}, "compared at one ratio or budget, and ratio is 0"),
        ({"ratio": 0.0, "budget": ByteBudget(1 << 30, 1 << 20, 4)}, "nothing has to go"),
        ({"allocation": "global"}, "candidates are compared by price; allocation is 'global'"),
        ({"compensation": "none"}, "candidates are priced with refitted weights"),
        ({"drop_blocks": 1}, "leave one of them out"),
        ({"refine": "search"}, "candidates are chosen before sizes are refined"),
    ],
)
def test_candidates_that_make_no_sense_are_refused(model, changes, says):
    with pytest.raises(InputError, match=says):
        check_options(read_anatomy(model.config), replace(OPTIONS, **changes))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_norms_of_heads_count_in_full_beside_a_smaller_hidden_size(family):
    def around(one):
        return 2 * (one.fixed_parameters + sum(block.shared_parameters for block in one.blocks))

    anatomy = read_anatomy(tiny_config(family, tie_word_embeddings=False))
    options = replace(OPTIONS, ratio=0.0, shapes=(), budget=ByteBudget(1 << 30, around(anatomy), 2))
    narrow, left = left_of(anatomy, replace(options, hidden_size=48), ())
    assert left.budget.around == around(narrow)


def test_a_budget_may_be_one_that_only_another_shape_meets(model, study):
    anatomy = read_anatomy(model.config)
    around = 4 * (anatomy.fixed_parameters + sum(block.shared_parameters for block in anatomy.blocks))
    tight = replace(OPTIONS, ratio=0.0, budget=ByteBudget(int(1.4 * around), around, 4))
    check_options(anatomy, tight)
    assert Shape(48, 0) in dict(replace(study, options=tight).priced())
    assert PLAIN not in dict(replace(study, options=tight).priced())
    tightest = replace(OPTIONS, ratio=0.0, budget=ByteBudget(around // 2, around, 4))
    with pytest.raises(InputError, match="take"):
        dict(replace(study, options=tightest).priced())


def test_candidates_need_rows_and_are_chosen_before_pruning(model):
    with pytest.raises(InputError, match="4 rows are too few, use at least 8"):
        choose_shape(model, ROWS[:4], OPTIONS)
    with pytest.raises(ValueError, match="choose_shape takes one of them"):
        prune(model, ROWS, OPTIONS)
    with pytest.raises(InputError, match="masks learn units, not layers"):
        check_learning(read_anatomy(model.config), replace(OPTIONS, criterion="vib"))
