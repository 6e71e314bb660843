import json

import pytest
import torch

from numprune.errors import InputError
from numprune.plan import Draw, read_plan
from numprune.pruning import PruneOptions, prune
from tests.conftest import build_tiny


@pytest.fixture
def plan():
    rows = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    return prune(build_tiny(), rows, PruneOptions(0.3)).plan


def test_plan_round_trips(plan, tmp_path):
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


def test_where_the_calibration_rows_are_from_is_kept(plan, tmp_path):
    assert plan.calibration.draw is None
    drawn = plan.drawn(Draw(text=["train.txt"], seed=7))
    drawn.write(tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json")
    assert read == drawn
    assert (read.calibration.draw.text, read.calibration.draw.seed) == (["train.txt"], 7)
    assert read.drawn(None) == plan


def test_a_plan_of_version_1_is_read(plan, tmp_path):
    """It was written before uniform allocation had splits to choose from."""
    content = json.loads(plan.model_dump_json()) | {"version": 1}
    del content["splits"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    read = read_plan(tmp_path / "plan.json")
    assert read.splits is None
    assert read.blocks == plan.blocks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(version=3), "version"),
        (lambda p: p["splits"][0].update(nats_per_token=-1), "splits.0.nats_per_token: .* greater than or equal to 0"),
        (lambda p: p.pop("family"), "family"),
        (lambda p: p["calibration"].update(draw={"text": ["train.txt"]}), "calibration.draw.seed: Field required"),
        (lambda p: p.update(note="x"), "note"),
        (lambda p: p["blocks"]["layers.0.mlp"].update(kept=[3, 2]), "ascending"),
        (lambda p: p["blocks"]["layers.0.mlp"].update(kept=[96]), "unit 96 is kept of only 96"),
        (lambda p: p["blocks"]["layers.0.mlp"].update(kept=[-1]), "greater than or equal to 0"),
        (lambda p: p["blocks"]["layers.0.mlp"].update(kept=[]), "layers.0.mlp keeps no unit, although skips is false"),
    ],
)
def test_damaged_plans_are_refused_with_the_field(plan, tmp_path, change, message):
    content = json.loads(plan.model_dump_json())
    change(content)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_plan(tmp_path / "plan.json")


def test_missing_and_cut_plans_are_refused(plan, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_plan(tmp_path / "none.json")
    (tmp_path / "plan.json").write_text(plan.model_dump_json()[:100])
    with pytest.raises(InputError, match="not valid"):
        read_plan(tmp_path / "plan.json")
