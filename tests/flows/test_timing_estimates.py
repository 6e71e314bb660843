# ruff: noqa: F811 - fixtures of another file
"""Latencies that are estimated from a device's data sheet, not measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.export.files import CARD
from numprune.flows.names import ROOFLINE
from numprune.flows.recipe import load
from numprune.flows.run import prepare
from numprune.flows.stages import Text
from numprune.flows.steps.bodies.candidate import make_timings
from numprune.flows.steps.estimates import estimate_key
from numprune.time_budget import TimeBudget
from numprune.timings import read_timings
from tests.flows.conftest import Answered
from tests.flows.timing import DECODE, SAMPLED, inputs  # noqa: F401 - a fixture

Command = Callable[..., Answered]


def test_an_estimate_chooses_sizes_and_says_everywhere_that_it_is_one(
    numprune: Command, inputs: Path, tmp_path: Path
) -> None:
    base, table = inputs / "base", tmp_path / "table.json"
    command = ("timings", base, "--peak-tflops", 1e-3, "--bandwidth", 1e-3, "--scenario", DECODE)
    answered = numprune(*command, "--align", 32, "--out", table)
    assert answered.code == 0, answered.err
    refused = numprune(*command, "--visits", 3, "--out", tmp_path / "other.json")
    assert refused.is_error
    assert "--visits has an effect only with --runtime" in refused.err
    device = "a device of 0.001 TFLOP/s and 0.001 GB/s"
    assert f"estimated for {device} in float32, not measured" in answered.out
    found = read_timings(table)
    assert (found.estimate, found.visits, found.key.runtime) == (True, 0, ROOFLINE)
    whole = TimeBudget(1, found.times(DECODE), ROOFLINE).predicted(read_anatomy(checkpoint.read_config(base))).ms
    budget = ("--budget", f"{0.8 * whole:.6f}ms@{DECODE}", "--timings", table, "--compensation", "oneshot")
    text = (*SAMPLED, "--text", inputs / "train.txt")
    answered = numprune("prune", base, tmp_path / "pruned", *budget, *text)
    assert answered.code == 0, answered.err
    assert f"estimated for {device}, not measured" in answered.out
    assert f"estimated for {device}" in (tmp_path / "pruned" / CARD).read_text()
    answered = numprune("prune", base, "--plan-only", *budget, *text)
    assert f"estimated for {device}" in answered.out
    for word, instead in (('"estimate": true', '"estimate": false'), ('"visits": 0', '"visits": 3')):
        table.write_text(found.to_json().replace(word, instead))
        refused = numprune("prune", base, tmp_path / "again", *budget, *text)
        assert refused.code == 1
        assert "estimate, key.runtime and visits contradict each other" in refused.err


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["timings.runtime=roofline"], "needs a device, or both its peak"),
        (["timings.device=h200"], 'device: it has an effect only with runtime = "roofline"'),
        (
            ["timings.runtime=roofline", "timings.device=h200", "timings.seed=1"],
            'seed: it has no effect with runtime = "roofline"',
        ),
        (
            [
                *("timings.runtime=roofline", "timings.device=h200"),
                'gates=[{metric="speed.torch.decode_tokens_per_s.ratio", bound="ci95_lower", min=1.05}]',
            ],
            "gates: speed.torch.decode_tokens_per_s.ratio can never pass, because timings.runtime = 'roofline'",
        ),
    ],
)
def test_recipes_with_estimates_are_refused_where_they_promise_a_speed(
    inputs: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        load(inputs / "recipe.toml", [f"prune.budget=5ms@{DECODE}", *overrides])


def test_the_stage_of_a_recipe_estimates(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    asked = [f"prune.budget=1us@{DECODE}", "timings.runtime=roofline", "timings.device=l4", "timings.sizes=4"]
    recipe = load(inputs / "recipe.toml", asked)
    named: dict[str, Any] = {
        "asked": recipe.timings,
        "target": recipe.sizes(),
        "served": recipe.served(),
        "machine": {},
    }
    table = make_timings(tmp_path, model=Text(str(inputs / "base"), ""), scenario=DECODE, **named)
    assert table.key == estimate_key(inputs / "base", "L4")
    assert prepare(recipe, tmp_path).timings_key == table.key.model_dump_json()
    answered = numprune("plan", inputs / "recipe.toml", *(part for one in asked for part in ("--set", one)))
    assert answered.code == 0, answered.err
    assert "among sizes that are estimated for L4, not measured" in answered.out
