import json

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.options import PruneOptions
from numprune.plans import BlockPlan, Draw, HiddenPlan, read_plan
from numprune.pruning import prune
from numprune.slices import Kept
from tests.conftest import build_tiny


@pytest.fixture
def plan():
    rows = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    return prune(build_tiny(), rows, PruneOptions(0.3)).plan


def test_plan_round_trips(plan, tmp_path):
    plan.write(tmp_path / "new" / "plan.json")
    assert read_plan(tmp_path / "new" / "plan.json") == plan


def test_the_source_of_the_calibration_rows_is_recorded(plan, tmp_path):
    assert plan.calibration.draw is None
    drawn = plan.drawn(Draw(text=["train.txt"], seed=7))
    drawn.write(tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json")
    assert read == drawn
    assert (read.calibration.draw.text, read.calibration.draw.seed) == (["train.txt"], 7)
    assert read.drawn(None) == plan


@pytest.mark.parametrize("version", [1, 2])
def test_a_plan_of_an_earlier_version_is_read(plan, tmp_path, version):
    """The first knew of no splits to choose from, both of no members."""
    content = json.loads(plan.model_dump_json()) | {"version": version}
    for block in content["blocks"].values():
        del block["members"], block["kept_members"]
    for split in content["splits"]:
        del split["query_heads"]
    if version == 1:
        del content["splits"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    read = read_plan(tmp_path / "plan.json")
    assert (read.splits is None) == (version == 1)
    assert {name: block.kept for name, block in read.blocks.items()} == {
        name: block.kept for name, block in plan.blocks.items()
    }


def test_a_plan_records_the_kept_units():
    block = read_anatomy(build_tiny().config).blocks[0]
    every = torch.arange(2)
    for kept in (
        Kept.whole(every, 2),
        Kept(every, torch.tensor([[1], [0]])),
        Kept(every[1:], torch.tensor([[0]])),
        Kept.whole(every[:0], 2),
    ):
        plan = BlockPlan.of(block, kept, None)
        assert (plan.units, plan.members, plan.kept_members is None) == (2, 2, kept.size in ((2, 2), (0, 1)))
        read = BlockPlan.model_validate_json(plan.model_dump_json()).to_kept()
        assert read.size == kept.size
        assert torch.equal(read.units, kept.units)
        assert torch.equal(read.members, kept.members)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(version=4), "version"),
        (lambda p: p["splits"][0].update(nats_per_token=-1), "splits.0.nats_per_token: .* greater than or equal to 0"),
        (lambda p: p.pop("family"), "family"),
        (lambda p: p["calibration"].update(draw={"text": ["train.txt"]}), "calibration.draw.seed: Field required"),
        (lambda p: p.update(note="x"), "note"),
        (lambda p: p["blocks"]["layers.0.mlp"].update(kept=[3, 2]), "ascending"),
        (lambda p: p["blocks"]["layers.0.mlp"].update(kept=[96]), "unit 96 is kept of only 96"),
        (lambda p: p["blocks"]["layers.0.mlp"].update(kept=[-1]), "greater than or equal to 0"),
        (lambda p: p["blocks"]["layers.0.attention"].update(kept_members=[[0], [0, 1]]), "lists of one length"),
        (lambda p: p["blocks"]["layers.0.attention"].update(kept_members=[[0]]), "one for each unit kept"),
        (lambda p: p["blocks"]["layers.0.attention"].update(kept_members=[[0], []]), "at least 1 item"),
        (lambda p: p["blocks"]["layers.0.attention"].update(kept_members=[[1, 0], [0, 1]]), "of unit 0 .* ascending"),
        (lambda p: p["blocks"]["layers.0.attention"].update(kept_members=[[0], [2]]), "member 2 of unit 1 is kept of"),
        (lambda p: p["blocks"]["layers.0.mlp"].update(kept=[]), "layers.0.mlp keeps no unit, although skips is false"),
    ],
)
def test_damaged_plans_are_refused_with_the_field(plan, tmp_path, change, message):
    content = json.loads(plan.model_dump_json())
    change(content)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_plan(tmp_path / "plan.json")


def test_a_plan_that_keeps_the_hidden_size_says_nothing_of_it(plan, tmp_path):
    assert "hidden" not in plan.model_dump()
    narrow = plan.model_copy(update={"hidden": HiddenPlan(size=64, kept=[0, 5, 63])})
    narrow.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == narrow
    assert narrow.coordinates().tolist() == [0, 5, 63]


def test_missing_and_truncated_plans_are_refused(plan, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_plan(tmp_path / "none.json")
    (tmp_path / "plan.json").write_text(plan.model_dump_json()[:100])
    with pytest.raises(InputError, match="not valid"):
        read_plan(tmp_path / "plan.json")
