import pytest

from numprune.errors import InputError
from numprune.serving.benchmark.load import Load, interleaving


def test_all_problems_are_reported_together():
    with pytest.raises(InputError) as caught:
        Load(prompts=0, output_length=1, repeats=2, seed=-1)
    message = str(caught.value)
    for name in ("load.prompts = 0", "load.output_length = 1", "load.repeats = 2", "load.seed = -1"):
        assert name in message
    assert "load.prompt_length" not in message


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"repeats": 2}, "load.repeats = 2: must be an even number, at least 4"),
        ({"repeats": 5}, "load.repeats = 5: must be an even number, at least 4"),
        ({"prompts": 3, "batch_size": 2}, "multiple of load.batch_size = 2"),
        ({"prompts": 2.0}, "must be an integer"),
        ({"warmup": 0}, "at least 1"),
        ({"repeats": True}, "must be an even number"),
    ],
)
def test_an_unmeasurable_load_is_refused(fields, what):
    with pytest.raises(InputError, match=what):
        Load(**fields)


def test_prompts_are_determined_by_the_seed():
    load = Load(prompts=3, prompt_length=50)
    ids = load.token_ids(259)
    assert [len(row) for row in ids] == [50, 50, 50]
    assert all(0 <= token < 259 for row in ids for token in row)
    assert len({token for row in ids for token in row}) > 80
    assert ids == Load(prompts=3, prompt_length=50).token_ids(259)
    assert ids != Load(prompts=3, prompt_length=50, seed=1).token_ids(259)


def test_positions_are_the_required_cache_length():
    assert Load(prompt_length=8, output_length=2).positions == 9


def test_sides_take_turns_and_go_first_equally_often():
    assert interleaving(6) == "ABBAABBAABBA"
    pairs = [interleaving(10)[index : index + 2] for index in range(0, 20, 2)]
    assert pairs.count("AB") == pairs.count("BA") == 5
    # A drift that is linear in time hits both sides the same.
    times = {side: sum(index for index, letter in enumerate(interleaving(10)) if letter == side) for side in "AB"}
    assert times["A"] == times["B"]
