"""The grid of a sweep: every combination, or every problem before any work."""

from pathlib import Path
from typing import Any

import pytest

from numprune.errors import InputError
from numprune.flows.recipe import EMBEDDED_RECIPE
from numprune.flows.sweep import choice, sweep
from numprune.flows.sweep.grid import MAXIMUM, expand, parse
from numprune.serving.front import Estimate, Point


def test_every_combination_is_a_candidate_and_the_last_key_varies_fastest() -> None:
    grid = parse(["prune.ratio=0.1,0.2", "quantize.scheme=none,w8a8"])
    assert grid == {"prune.ratio": [0.1, 0.2], "quantize.scheme": ["none", "w8a8"]}
    made = expand(EMBEDDED_RECIPE, grid, ["prune.seed=7"])
    assert [(one.number, one.label) for one in made] == [
        (1, "prune.ratio=0.1, quantize.scheme=none"),
        (2, "prune.ratio=0.1, quantize.scheme=w8a8"),
        (3, "prune.ratio=0.2, quantize.scheme=none"),
        (4, "prune.ratio=0.2, quantize.scheme=w8a8"),
    ]
    assert [(one.recipe.prune.ratio, one.recipe.quantize.scheme) for one in made[1:3]] == [(0.1, "w8a8"), (0.2, "none")]
    assert {one.recipe.prune.seed for one in made} == {7}


def test_values_are_toml_or_plain_strings() -> None:
    grid = parse(
        ['prune.axes=["channels"],["channels", "kv-groups"]', "prune.skips=true,false", "prune.budget=6GiB,4GiB"]
    )
    assert grid == {
        "prune.axes": [["channels"], ["channels", "kv-groups"]],
        "prune.skips": [True, False],
        "prune.budget": ["6GiB", "4GiB"],
    }
    made = expand(EMBEDDED_RECIPE, {"prune.axes": grid["prune.axes"]})
    assert made[1].recipe.prune.axes == ["channels", "kv-groups"]
    assert made[0].label == 'prune.axes=["channels"]'


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["prune.ratio"], "--grid prune.ratio: must be section.key=value,value"),
        (["prune.ratio=0.1", "prune.ratio=0.2"], "--grid prune.ratio: given twice"),
    ],
)
def test_words_that_are_no_grid_are_refused(words: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse(words)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["prune.ratio=0.1,0.10"], "prune.ratio: 0.1 is given twice"),
        (["ratio=0.1,0.2"], "ratio: must be section.key"),
        (["prun.ratio=0.1,0.2"], "prun.ratio: the recipe has no section 'prun'"),
        (["benchmark.repeats=4,6"], "benchmark.repeats: candidates that are measured differently cannot be compared"),
        (["data.heldout=a.txt,b.txt"], "data.heldout: candidates that are measured differently cannot be compared"),
        (["prune.seed=1,2"], "prune.seed: also given by --set"),
        (["prune.ratio=0.1"], "1 combination; give at least two"),
        (["prune.ratio=1979-05-27,1979-05-28"], "prune.ratio: the values must be text, numbers, true or false, or lis"),
        ([f"data.seed={','.join(map(str, range(MAXIMUM + 1)))}"], f"65 combinations; at most {MAXIMUM} are compared"),
        (["prune.ratio=0.1,1.5"], r"prune.ratio=1.5: recipe [\s\S]*prune.ratio = 1.5: must be less than 1"),
        (["prune.ratoi=0.1,0.2", "prune.skips=true,false"], "and 3 more: recipe[\\s\\S]*did you mean 'ratio'"),
    ],
)
def test_a_grid_is_refused_with_its_problem(words: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        expand(EMBEDDED_RECIPE, parse(words), ["prune.seed=0"])


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(InputError) as refused:
        expand(Path("missing.toml"), parse(["model.path=a,b", "prune.ratio=0.1,0.1"]))
    assert "model.path" in str(refused.value)
    assert "prune.ratio: 0.1 is given twice" in str(refused.value)


def test_two_spellings_of_one_recipe_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"data.calibration=.*: the same recipe as candidate 1; omit one of the values"
    ):
        expand(EMBEDDED_RECIPE, {"data.calibration": ["train.txt", "./train.txt"]})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"choose": "fast"}, "choose is 'fast'; it must be one of fastest, smallest, best-quality, or None"),
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"grid": {"quantize.scheme": "none"}}, "quantize.scheme: 'none' must be a list of values"),
        ({"grid": {"data.calibration": [Path("a"), Path("b")]}}, "data.calibration: the values must be text, numbers"),
    ],
)
def test_arguments_in_python_are_checked_before_any_work(given: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        sweep(None, **{"grid": {"prune.ratio": [0.1, 0.2]}, "workspace": tmp_path / "w", **given})
    assert not (tmp_path / "w").exists()


# --- the choice -----------------------------------------------------------------------------------


def at(loss: float, speed: float, size: float) -> Point:
    return Point(*(Estimate(value, value, value) for value in (loss, speed, size)))


POINTS = [at(0.1, 1.1, 0.9), at(0.2, 1.3, 0.8), at(0.3, 1.2, 0.7), at(0.9, 9.0, 0.1), None, at(0.1, 1.1, 0.9)]
OUTCOMES = ["pass", "pass", "pass", "fail", "error", "pass"]


@pytest.mark.parametrize(("objective", "index"), [("best-quality", 0), ("fastest", 1), ("smallest", 2)])
def test_the_best_of_those_that_pass_is_chosen_and_the_first_of_equals(objective: str, index: int) -> None:
    assert choice.best(objective, OUTCOMES, POINTS) == index  # type: ignore[arg-type]


def test_without_one_that_passes_none_is_chosen() -> None:
    assert choice.best("fastest", ["fail", "error"], [POINTS[0], None]) is None
    assert choice.without_one(["fail", "error"]) == "fail"
    assert choice.without_one(["error", "error"]) is None
    assert choice.without_one(["fail", "inconclusive"]) == "inconclusive"
    assert choice.without_one(["inconclusive", "invalid environment"]) == "invalid environment"
