import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.allocation import check_ratio, uniform
from numprune.errors import InputError
from numprune.target import Target, allowed_counts, nearest
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
        allowed = allowed_counts(base, target)
    except InputError:
        return
    for block in base.blocks:
        counts = allowed[block.name]
        assert list(counts) == sorted(set(counts))
        assert 0 not in counts
        for count in counts:
            assert count * block.channels_per_unit % (group * parallel) == 0
            if block.kind == "attention":
                assert count % parallel == 0 or parallel % count == 0
                assert count * queries // keys % parallel == 0
            else:
                assert count % (align * parallel) == 0 or count == block.units


def test_the_target_decides_what_pruning_keeps():
    base = anatomy(num_attention_heads=8, num_key_value_heads=8)
    allowed = allowed_counts(base, Target(align=32, tensor_parallel=2))
    kept = uniform(base, 0.3, allowed)
    assert (kept["layers.0.attention"], kept["layers.0.mlp"] % 64) == (6, 0)
    assert list(allowed["layers.0.attention"]) == [1, 2, 4, 6, 8][1:]  # one head cannot be halved


def test_kv_heads_are_copied_where_there_are_fewer_than_gpus():
    base = anatomy(num_attention_heads=8, num_key_value_heads=2)
    assert list(allowed_counts(base, Target(tensor_parallel=4))["layers.0.attention"]) == [1, 2]


@pytest.mark.parametrize(
    ("target", "block"),
    [(Target(tensor_parallel=16), "attention"), (Target(align=1, quantization_group=1024), "attention")],
)
def test_a_target_that_no_size_suits_is_refused_before_anything_is_done(target, block):
    with pytest.raises(InputError, match=rf"layers\.0\.{block}: none of its sizes .* choose a smaller tensor_parallel"):
        allowed_counts(anatomy(), target)


@pytest.mark.parametrize("field", ["align", "tensor_parallel", "quantization_group"])
def test_a_target_of_nothing_is_refused(field):
    with pytest.raises(InputError, match=f"{field} is 0; it must be at least 1"):
        Target(**{field: 0})


def test_the_ratio_is_held_against_what_the_target_leaves():
    base = anatomy(num_key_value_heads=4)
    with pytest.raises(InputError, match=r"at most 0\.5\d+ of the prunable"):
        check_ratio(base, 0.7, allowed_counts(base, Target(align=176, tensor_parallel=2)))


def test_nearest_prefers_the_larger_of_two():
    assert [nearest([8, 16, 24], exact) for exact in (0, 12, 12.1, 19.9, 90)] == [8, 16, 16, 16, 24]
