import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.allocation import check_ratio, uniform
from numprune.axes import AXES, Limits
from numprune.errors import InputError
from numprune.slices import Size
from numprune.target import Target, allowed_sizes, nearest
from tests.numprune.test_allocation import anatomy


@settings(max_examples=100, deadline=None)
@given(
    heads=st.sampled_from([(8, 8), (8, 4), (8, 2), (24, 8), (32, 32)]),
    parallel=st.sampled_from([1, 2, 4, 8]),
    align=st.sampled_from([1, 8, 32]),
    group=st.sampled_from([1, 32, 64]),
)
def test_every_allowed_size_splits_over_the_gpus_and_into_groups(heads, parallel, align, group):
    queries, keys = heads
    base = anatomy(num_attention_heads=queries, num_key_value_heads=keys, hidden_size=32 * queries)
    target = Target(align=align, tensor_parallel=parallel, quantization_group=group)
    try:
        allowed = allowed_sizes(base, target, Limits(tuple(AXES)))
    except InputError:
        return
    for block in base.blocks:
        sizes = allowed[block.name]
        assert list(sizes) == sorted(set(sizes))
        assert Size(0) not in sizes
        for size in sizes:
            left = block.resized(size)
            assert left.channels % (group * parallel) == 0
            if block.kind == "attention":
                assert left.units % parallel == 0 or parallel % left.units == 0
                assert left.units * left.members % parallel == 0
            else:
                assert left.units % (align * parallel) == 0 or left.units == block.units


def test_the_target_decides_what_pruning_keeps():
    base = anatomy(num_attention_heads=8, num_key_value_heads=8)
    allowed = allowed_sizes(base, Target(align=32, tensor_parallel=2), Limits())
    kept = uniform(base, 0.3, allowed)
    assert (kept["layers.0.attention"].units, kept["layers.0.mlp"].units % 64) == (6, 0)
    assert list(allowed["layers.0.attention"]) == [Size(2), Size(4), Size(6), Size(8)]  # one head cannot be halved


def test_kv_heads_are_replicated_if_fewer_than_gpus():
    base = anatomy(num_attention_heads=8, num_key_value_heads=2)
    assert list(allowed_sizes(base, Target(tensor_parallel=4), Limits())["layers.0.attention"]) == [
        Size(1, 4),
        Size(2, 4),
    ]


@pytest.mark.parametrize(
    ("target", "block"),
    [(Target(tensor_parallel=16), "attention"), (Target(align=1, quantization_group=1024), "attention")],
)
def test_a_target_that_no_size_suits_is_refused_before_any_work(target, block):
    with pytest.raises(InputError, match=rf"layers\.0\.{block}: none of its sizes .* choose a smaller tensor_parallel"):
        allowed_sizes(anatomy(), target, Limits())


@pytest.mark.parametrize("field", ["align", "tensor_parallel", "quantization_group"])
def test_a_target_of_zero_is_refused(field):
    with pytest.raises(InputError, match=f"{field} is 0; it must be at least 1"):
        Target(**{field: 0})


def test_the_ratio_is_checked_against_the_target():
    base = anatomy(num_key_value_heads=4)
    with pytest.raises(InputError, match=r"at most 0\.5\d+ of the prunable"):
        check_ratio(base, 0.7, allowed_sizes(base, Target(align=176, tensor_parallel=2), Limits()))


def test_nearest_prefers_the_larger_of_two():
    assert [nearest([8, 16, 24], exact) for exact in (0, 12, 12.1, 19.9, 90)] == [8, 16, 16, 16, 24]
