import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.allocation import by_error, check_ratio, global_sort, uniform
from numprune.axes import AXES, DEFAULT_AXES, Limits
from numprune.budget import budget_of
from numprune.errors import InputError
from numprune.option_checks import check_options
from numprune.options import PruneOptions
from numprune.slices import Size
from numprune.target import Target, allowed_sizes
from tests.numprune.test_allocation import anatomy, random_errors, removed

UNALIGNED = Target(align=1)


@pytest.mark.parametrize(
    ("axes", "attention", "widths"),
    [
        (("kv-groups",), {(units, 2) for units in (1, 2, 3, 4)}, 1),
        (("query-heads",), {(4, members) for members in (1, 2)}, 1),
        (("channels",), {(4, 2)}, 704),
        (tuple(AXES), {(units, members) for units in (1, 2, 3, 4) for members in (1, 2)}, 704),
    ],
)
def test_only_the_named_axes_are_pruned(axes, attention, widths):
    allowed = allowed_sizes(anatomy(), UNALIGNED, Limits(axes))
    assert set(allowed["layers.0.attention"]) == attention
    assert len(allowed["layers.0.mlp"]) == widths


def test_the_default_prunes_whole_groups():
    base = anatomy()
    by_default, whole = (allowed_sizes(base, UNALIGNED, limits) for limits in (Limits(), Limits(DEFAULT_AXES)))
    assert by_default == whole
    assert {size.members for size in by_default["layers.0.attention"]} == {2}


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    keep=st.lists(st.sampled_from(["layers.0", "layers.-1.attention", "layers.1.mlp", "attention"]), max_size=2),
    floors=st.dictionaries(st.sampled_from(["attention", "mlp"]), st.sampled_from([0.25, 0.5, 0.7])),
    ratio=st.floats(0, 0.8),
    skips=st.booleans(),
    seed=st.integers(0, 99),
)
def test_protected_blocks_stay_and_the_ratio_is_still_met(keep, floors, ratio, skips, seed):
    base = anatomy()
    limits = Limits(tuple(AXES), keep, floors, skips)
    allowed = allowed_sizes(base, UNALIGNED, limits)
    try:
        check_ratio(base, ratio, allowed)
    except InputError:
        return
    kept = by_error(base, ratio, allowed, random_errors(base, seed))
    assert removed(base, kept) >= ratio - 1e-4
    protected = {
        "layers.0": ("layers.0.attention", "layers.0.mlp"),
        "layers.-1.attention": ("layers.2.attention",),
        "layers.1.mlp": ("layers.1.mlp",),
        "attention": tuple(f"layers.{layer}.attention" for layer in range(3)),
    }
    for block in base.blocks:
        if any(block.name in protected[name] for name in keep):
            assert kept[block.name] == block.size
        left = block.resized(kept[block.name])
        assert left.channels >= floors.get(block.kind, 0) * block.channels
        assert left.units >= floors.get(block.kind, 0) * block.units
        assert left.units or skips


def test_floors_hold_under_uniform_and_global():
    base = anatomy()
    allowed = allowed_sizes(base, UNALIGNED, Limits(floors={"mlp": 0.9}))
    scores = {block.name: random_errors(base, 0)[block.name].diff(dim=0)[:, 0] for block in base.blocks}
    for kept in (uniform(base, 0.2, allowed), global_sort(base, 0.2, allowed, scores)):
        assert all(kept[block.name].units >= 0.9 * 704 for block in base.of_kind("mlp"))
        assert any(kept[block.name].units < 4 for block in base.of_kind("attention"))


def test_a_ratio_made_unreachable_by_protection_is_refused_with_the_reachable_one():
    base = anatomy()
    allowed = allowed_sizes(base, UNALIGNED, Limits(keep=["mlp"]))
    least = base.keeping({b.name: Size(1, 2) if b.kind == "attention" else b.size for b in base.blocks})
    reachable = 1 - budget_of(least).prunable_parameters / budget_of(base).prunable_parameters
    with pytest.raises(InputError, match=rf"keep and floors protect\) at most {reachable:.3f} of the prunable"):
        check_ratio(base, 0.5, allowed)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"axes": ["heads"]},
            "axes: 'heads' is unknown; choose from kv-groups, query-heads, qk-dims, channels, experts",
        ),
        ({"axes": []}, "axes: nothing may be pruned; choose from kv-groups"),
        ({"keep": ["layers.3"]}, r"keep: 'layers.3' is unknown; the model has layers.0 to layers.2"),
        ({"keep": ["layers.-4.mlp"]}, r"keep: 'layers.-4.mlp' is unknown; the model has layers.0 to layers.2"),
        ({"keep": ["layers.0.norm"]}, r"keep: 'layers.0.norm' is unknown; the blocks of a layer are attention or mlp"),
        ({"keep": ["lm_head"]}, r"keep: 'lm_head' is unknown; it must be a layer \(layers.0\), a block"),
        ({"floors": {"heads": 0.5}}, "floors: 'heads' is unknown; the model's blocks are attention and mlp"),
        ({"floors": {"mlp": 1.5}}, "floors: mlp is 1.5; it must be between 0 and 1"),
        ({"floors": {"mlp": float("nan")}}, "floors: mlp is nan"),
        (
            {"keep": ["layers.0"]},
            "keep: uniform allocation gives every layer the same size, and layers.0.attention is protected while "
            r"layers.1.attention is not; use allocation error, or keep attention everywhere \('attention'\)",
        ),
        ({"axes": list(AXES), "allocation": "global"}, "axes: allocation global sorts whole units; omit query-he"),
    ],
)
def test_invalid_names_and_shares_are_refused_with_valid_ones(limits, message):
    with pytest.raises(InputError, match=message):
        check_options(anatomy(), PruneOptions(0.1, **limits))


def test_uniform_allocation_can_keep_a_whole_kind():
    every = [f"layers.{layer}.attention" for layer in range(3)]
    for keep in (["attention"], every):
        check_options(anatomy(), PruneOptions(0.1, keep=keep))


def test_a_protected_block_that_does_not_suit_the_target_is_refused():
    with pytest.raises(InputError, match=r"layers.0.mlp: none of its sizes that axes, keep and floors allow suits"):
        allowed_sizes(anatomy(intermediate_size=700), Target(quantization_group=64), Limits(keep=["mlp"]))
