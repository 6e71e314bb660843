"""A smaller hidden size from the command line and in a recipe."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.errors import InputError
from numprune.export import checkpoint, manifest
from numprune.flows import forecast, recipe
from numprune.flows.steps.checks.recipe import check
from numprune.hidden import narrowed
from numprune.plans import PLAN_FILE, read_plan
from tests.flows.conftest import Answered

Command = Callable[..., Answered]
SAMPLED = ("--samples", 8, "--sequence-length", 32)


@pytest.mark.parametrize("basis", ["fisher", "coordinates"])
def test_prune_cuts_the_hidden_size(numprune: Command, tiny: Path, tmp_path: Path, basis: str) -> None:
    base, text = tiny / "base", ("--text", tiny / "train.txt", *SAMPLED)
    asked = ("--hidden-size", 48, "--basis", basis, "--compensation", "residual", *text)
    pruned = numprune("prune", base, tmp_path / "out", *asked, "--json")
    assert pruned.code == 0, pruned.err
    assert pruned.json["hidden_size"] == [48, 64]
    wanted = budget_of(narrowed(read_anatomy(checkpoint.read_config(base)), 48, basis))  # type: ignore[arg-type]
    assert pruned.json["parameters_after"] == wanted.parameters
    assert pruned.json["prunable_ratio_removed"] == pytest.approx(0.25)
    plan = read_plan(tmp_path / "out" / PLAN_FILE)
    assert plan.hidden is not None
    assert (plan.hidden.basis, len(plan.hidden.kept), plan.ratio) == (basis, 48, 0.0)
    assert manifest.read(tmp_path / "out").facts["plan"]["hidden"] == {"size": 64, "basis": basis}
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["hidden_size"], stored["model_type"]) == (48, "llama")
    assert f"(basis {basis})" in numprune("inspect", tmp_path / "out").out
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("directions of the rotated residual stream" in card) is (basis == "fisher")

    planned = numprune("prune", base, tmp_path / "plan.json", *asked, "--plan-only")
    assert planned.code == 0, planned.err
    assert f"64 -> 48 (basis {basis})" in planned.out
    assert (
        f"{budget_of(read_anatomy(checkpoint.read_config(base))).parameters:,} -> {wanted.parameters:,}" in planned.out
    )
    followed = numprune("prune", base, tmp_path / "followed", "--plan", tmp_path / "plan.json", *text, "--json")
    assert followed.code == 0, followed.err
    assert followed.json["digest"] == pruned.json["digest"]


def test_candidates_are_compared_and_the_plan_says_how(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    base, text = tiny / "base", ("--text", tiny / "train.txt", *SAMPLED)
    asked = ("--ratio", 0.55, "--hidden-size", 48, 56, "--drop-layers", 1, "--basis", "coordinates", *text)
    pruned = numprune("prune", base, tmp_path / "out", *asked, "--json")
    assert pruned.code == 0, pruned.err
    plan = read_plan(tmp_path / "out" / PLAN_FILE)
    assert plan.shape is not None
    assert pruned.json["shape"] == plan.shape.model_dump()
    chosen = plan.shape.tried[0]
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["hidden_size"], 2 - stored["num_hidden_layers"]) == (chosen.hidden_size, chosen.drop_layers)
    assert plan.shape.lines()[0] in numprune("inspect", tmp_path / "out").out
    followed = numprune("prune", base, tmp_path / "followed", "--plan", tmp_path / "out" / PLAN_FILE, *text, "--json")
    assert followed.json["digest"] == pruned.json["digest"]
    refused = numprune("prune", base, tmp_path / "streamed", *asked, "--stream")
    assert "candidates are pruned and compared in memory, which streaming avoids" in refused.err


def test_candidates_in_a_recipe_are_forecast(tiny: Path, tmp_path: Path) -> None:
    changes = ["prune.hidden_size=[56]", "prune.drop_layers=[0, 1]", "prune.ratio=0.55", "prune.basis=coordinates"]
    asked = recipe.load(tiny / "recipe.toml", changes)
    found = forecast.forecast(asked, tmp_path / "w")
    assert (found["shapes"], found["hidden_size"], found["exact"]) == (4, None, False)
    assert "one of 4 candidates" in forecast.text(found)
    (tmp_path / "resolved.toml").write_text(asked.to_toml())
    assert recipe.load(tmp_path / "resolved.toml") == asked
    for change in ("prune.hidden_size=[]", "prune.drop_layers=[1, 1]", "prune.hidden_size='auto'"):
        with pytest.raises(InputError, match=r"prune\.(hidden_size|drop_layers)"):
            recipe.load(tiny / "recipe.toml", [*changes, change])


def test_a_basis_alone_is_refused(numprune: Command, tmp_path: Path) -> None:
    answered = numprune("prune", "m", tmp_path / "o", "--ratio", 0.3, "--basis", "fisher", "--text", "t")
    assert answered.code == 1
    assert "has an effect only with --hidden-size; leave it out" in answered.err


def test_a_basis_alone_in_a_recipe_is_refused(tiny: Path) -> None:
    with pytest.raises(
        InputError, match=r"prune\.basis = 'coordinates': it has an effect only with prune\.hidden_size"
    ):
        recipe.load(tiny / "recipe.toml", ["prune.basis=coordinates"])


def test_a_recipe_with_a_hidden_size_is_forecast(tiny: Path, tmp_path: Path) -> None:
    changes = ["prune.hidden_size=48", "prune.ratio=0.25"]
    found = forecast.forecast(recipe.load(tiny / "recipe.toml", changes), tmp_path / "w")
    anatomy = read_anatomy(checkpoint.read_config(tiny / "base"))
    wanted = budget_of(narrowed(anatomy, 48, "fisher"))
    assert (found["hidden_size"], found["exact"]) == ([48, 64], True)
    assert found["after"][0]["parameters"] == wanted.parameters
    assert "hidden size: 64 -> 48" in forecast.text(found)
    changes.append("prune.allocation=error")
    (aim,) = forecast.forecast(recipe.load(tiny / "recipe.toml", changes), tmp_path / "w")["after"]
    assert aim["parameters"] == wanted.parameters


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.basis=pca"], r"prune\.basis"),
        (["prune.hidden_size=42"], "prune: the hidden size would be 42"),
        (["learn.method=vib"], "prune: hidden_size: masks choose it if axes has hidden-size; leave it out"),
        (
            ["recover.method=distill", "recover.train=blocks"],
            r"prune: hidden_size: with a smaller one, blocks cannot be priced .* set recover\.train to all or lora",
        ),
        (
            ["recover.method=distill", "recover.hidden_weight=0.5"],
            r"hidden_size: with a smaller one, hidden states cannot be compared .* set recover\.hidden_weight to 0",
        ),
    ],
)
def test_what_a_hidden_size_excludes_is_refused_before_any_work(
    tiny: Path, tmp_path: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny)
    with pytest.raises(InputError, match=message):
        check(recipe.load(tiny / "recipe.toml", ["prune.hidden_size=48", *overrides]), tmp_path)
