"""Plans without pruning, and pruning by a plan, edited or not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numprune.anatomy import read_anatomy
from numprune.export import checkpoint, manifest
from numprune.plans import PLAN_FILE
from tests.flows.conftest import Answered

Command = Callable[..., Answered]


@pytest.fixture
def prune(numprune: Command, tiny: Path) -> Command:
    """`prune(*arguments, model=…)` on the tiny model and its text."""

    def run(*arguments: Any, model: Path = tiny / "base") -> Answered:
        return numprune("prune", model, *arguments, "--text", tiny / "train.txt", "--json")

    return run


HOW = ("--ratio", 0.3, "--samples", 8, "--sequence-length", 64, "--align", 8)


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    plan = json.loads(source.read_text())
    change(plan)
    target.write_text(json.dumps(plan))
    return target


def kept(plan: Path) -> dict[str, list[int]]:
    return {name: block["kept"] for name, block in json.loads(plan.read_text())["blocks"].items()}


@pytest.mark.parametrize("more", [(), ("--drop-layers", 1, "--ratio", 0.6, "--allocation", "error", "--seed", 3)])
def test_a_plan_reproduces_its_pruned_model(prune: Command, tmp_path: Path, more: Any) -> None:
    first = prune(tmp_path / "first", *HOW, *more)
    assert first.code == 0, first.err
    second = prune(tmp_path / "second", "--plan", tmp_path / "first" / PLAN_FILE)
    assert second.code == 0, second.err
    assert second.json["digest"] == first.json["digest"]
    streamed = prune(tmp_path / "streamed", "--plan", tmp_path / "first" / PLAN_FILE, "--stream")
    assert streamed.json["parameters_after"] == first.json["parameters_after"]


@pytest.mark.parametrize(
    ("more", "stream"),
    [((), ()), (("--drop-layers", 1, "--ratio", 0.6), ("--stream",)), (("--allocation", "error"), ())],
)
def test_plan_only_predicts_the_pruned_sizes_and_writes_nothing_else(
    prune: Command, tmp_path: Path, more: Any, stream: Any
) -> None:
    file = tmp_path / "plan.json"
    planned = prune(file, *HOW, *more, "--plan-only", *stream)
    assert planned.code == 0, planned.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    made = prune(tmp_path / "pruned", *HOW, *more)
    pruned = read_anatomy(checkpoint.read_config(tmp_path / "pruned"))
    sizes = [size["units"] for size in planned.json["sizes"].values() if size["units"]]
    assert sizes == [block.units for block in pruned.blocks]
    assert planned.json["after"]["parameters"] == made.json["parameters_after"]
    assert planned.json["before"]["parameters"] == made.json["parameters_before"]
    assert planned.json["dropped_layers"] == made.json["dropped_layers"]
    followed = prune(tmp_path / "followed", "--plan", file)
    assert followed.code == 0, followed.err
    assert followed.json["parameters_after"] == made.json["parameters_after"]
    assert kept(tmp_path / "followed" / PLAN_FILE) == kept(file)


def test_a_plan_is_described_in_text(numprune: Command, tiny: Path) -> None:
    told = numprune(
        "prune", tiny / "base", *HOW, "--ratio", 0.6, "--drop-layers", 1, "--plan-only", "--text", tiny / "train.txt"
    )
    assert told.code == 0, told.err
    assert "nothing is pruned" in told.out
    for line in ("parameters", "flops per token", "kv bytes per token", "dropped: layer", "mlp: channels by layer"):
        assert line in told.out, line


def test_an_edited_plan_is_followed(prune: Command, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    prune(file, *HOW, "--allocation", "error", "--plan-only")
    units = list(range(8, 32))
    plan = edited(file, tmp_path / "mine.json", lambda plan: plan["blocks"]["layers.1.mlp"].update(kept=units))
    made = prune(tmp_path / "out", "--plan", plan)
    assert made.code == 0, made.err
    assert json.loads((tmp_path / "out" / PLAN_FILE).read_text())["blocks"]["layers.1.mlp"]["kept"] == units
    assert read_anatomy(checkpoint.read_config(tmp_path / "out")).blocks[3].units == 24


def drop_all(plan: dict[str, Any]) -> None:
    for layer in (0, 1):
        plan["blocks"][f"layers.{layer}.attention"]["kept"] = []
    plan["skips"] = True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda plan: plan["blocks"]["layers.1.mlp"].update(kept=[0, 1, 2]),
            "layers.1.mlp keeps 3 units, which the plan's target or limits do not allow; the nearest",
        ),
        (
            lambda plan: plan["blocks"]["layers.1.mlp"].update(units=999),
            "layers.1.mlp: the plan is for 999 units, the model has 96",
        ),
        (lambda plan: plan["blocks"].pop("layers.0.mlp"), "layers.0.mlp: the plan does not cover it"),
        (
            lambda plan: plan["blocks"].update({"layers.9.mlp": plan["blocks"]["layers.1.mlp"]}),
            "layers.9.mlp: the model has no such block",
        ),
        (lambda plan: plan.update(family="qwen2"), "it is for qwen2, the model is llama"),
        (lambda plan: plan.update(allocation="uniform"), 'allocation is "uniform", but layers keep different sizes'),
        (lambda plan: plan.update(criterion="magic"), "criterion is 'magic'"),
        (lambda plan: plan.update(base="0" * 64), "the plan was made for a model with digest 000"),
        (drop_all, "no attention block keeps a unit"),
        (lambda plan: plan.update(drop_layers=1), "drop_layers is 1, and 0 layers are dropped"),
        (
            lambda plan: plan.update(drop_layers=1, dropped=[{"layer": 7, "divergence": 0.1}]),
            "layer 7 is dropped, and the model has 2",
        ),
        (lambda plan: plan["blocks"]["layers.1.mlp"].update(kept=[]), "layers.1.mlp keeps no unit"),
    ],
)
def test_a_plan_that_does_not_match_the_model_is_refused(
    prune: Command, tmp_path: Path, change: Any, said: str
) -> None:
    file = tmp_path / "plan.json"
    prune(file, *HOW, "--allocation", "error", "--plan-only")
    plan = json.loads(file.read_text())
    plan["blocks"]["layers.0.mlp"]["kept"] = list(range(8))  # so that layers differ, whatever was chosen
    file.write_text(json.dumps(plan))
    answered = prune(tmp_path / "out", "--plan", edited(file, tmp_path / "mine.json", change))
    assert answered.code == 1
    assert said in answered.err
    assert not (tmp_path / "out").exists()


def test_a_plan_without_digest_applies_to_other_weights_of_the_same_sizes(
    prune: Command, tmp_path: Path, tiny: Path
) -> None:
    other = shutil.copytree(tiny / "base", tmp_path / "other")
    (other / manifest.FILE_NAME).unlink(missing_ok=True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    file = tmp_path / "plan.json"
    prune(file, *HOW, "--plan-only")
    refused = prune(tmp_path / "refused", "--plan", file, model=other)
    assert 'remove "base" from the plan' in refused.err
    assert refused.code == 1
    taken = prune(
        tmp_path / "taken", "--plan", edited(file, tmp_path / "mine.json", lambda plan: plan.pop("base")), model=other
    )
    assert taken.code == 0, taken.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--plan", "p.json", "--ratio", "0.3", "--skips"), "omit --ratio, --skips, or edit the plan"),
        (("--plan", "p.json", "--plan-only"), "--plan-only and --plan exclude each other"),
        (("--plan", "p.json"), "plan 'p.json' does not exist"),
    ],
)
def test_options_that_contradict_a_plan_are_refused(prune: Command, tmp_path: Path, arguments: Any, said: str) -> None:
    answered = prune(tmp_path / "out", *arguments)
    assert answered.code == 1
    assert said in answered.err
