# ruff: noqa: F811 - fixtures of another file
"""Latencies that are estimated from a device's data sheet, not measured."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.export.files import CARD
from numprune.flows.candidate import time_blocks
from numprune.flows.names import ROOFLINE
from numprune.flows.recipe import load
from numprune.flows.run import prepare
from numprune.flows.stages import Text
from numprune.flows.steps.bodies.candidate import make_timings
from numprune.flows.steps.estimates import estimate_key
from numprune.hidden import Width
from numprune.time_budget import TimeBudget
from numprune.timings import read_timings
from tests.conftest import build_tiny, write_checkpoint
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
    anatomy = read_anatomy(checkpoint.read_config(base))
    whole = TimeBudget(1, {anatomy.hidden_size: found.times(DECODE)}, ROOFLINE).predicted(anatomy).ms
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


def test_each_hidden_size_needs_its_own_table(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    base = write_checkpoint(build_tiny(tie_word_embeddings=True), tmp_path / "base")
    tables = {size: tmp_path / f"{size}.json" for size in (64, 56, 48)}
    peaks = ("--peak-tflops", 1e-3, "--bandwidth", 1e-3, "--scenario", DECODE, "--align", 8)
    for size, table in tables.items():
        basis = "fisher" if size == 64 else "coordinates"  # nothing is rotated at the model's own hidden size
        made = numprune("timings", base, *peaks, "--hidden-size", size, "--basis", basis, "--out", table)
        assert made.code == 0, made.err
        shape = read_timings(table).key.shape
        assert (shape.hidden_size, shape.tied) == (size, True)
    anatomy = read_anatomy(checkpoint.read_config(base))
    whole = TimeBudget(1, {64: read_timings(tables[64]).times(DECODE)}, ROOFLINE).predicted(anatomy).ms
    budget = ("--budget", f"{0.7 * whole:.6f}ms@{DECODE}", "--compensation", "oneshot", "--plan-only")
    text = (*SAMPLED, "--text", inputs / "train.txt")

    def asked(sizes: tuple[int, ...], given: tuple[int, ...], basis: str = "coordinates", *more: object) -> Answered:
        timings = ("--timings", *(tables[size] for size in given), "--basis", basis, *more)
        return numprune("prune", base, *budget, *timings, "--hidden-size", *sizes, *text, "--json")

    alone = asked((48,), (48,))
    assert alone.code == 0, alone.err
    assert alone.json["hidden_size"] == [48, 64]
    assert 0.5 * whole < alone.json["predicted_ms"] <= 0.7 * whole
    for sizes, given, basis, says in (
        ((48,), (64,), "coordinates", r"no table is of hidden size 48; make it with numprune timings \S+ --roofline"),
        ((56, 48), (64, 48), "coordinates", f"--scenario {DECODE} --hidden-size 56 --basis coordinates --out TABLE"),
        ((48,), (64, 56, 48), "coordinates", "hidden size of the result cannot be 56; leave these tables out"),
        ((48,), (48, 48), "coordinates", "two tables are of hidden size 48"),
        ((48,), (48,), "fisher", r"shape\.tied is True in the table and False here"),
    ):
        refused = asked(sizes, given, basis)
        assert refused.code == 1
        assert re.search(says, refused.err), refused.err
    budget = ("--budget", f"1.3x@{DECODE}", *budget[2:])
    refused = asked((48,), (48,))
    assert "a speedup is over the model itself, and no table is of its hidden size 64; give that table" in refused.err
    faster = asked((48,), (48, 64))
    assert 0.5 * whole < faster.json["predicted_ms"] <= whole / 1.3
    refused = asked((48,), (64,), "coordinates", "--align", 16, "--dtype", "bfloat16")
    assert "--hidden-size 48 --basis coordinates --align 16 --dtype bfloat16 --out TABLE" in refused.err
    refused = numprune("timings", base, *peaks, "--basis", "fisher", "--out", tmp_path / "other.json")
    assert "--basis fisher has an effect only with --hidden-size; leave it out" in refused.err
    refused = numprune("timings", base, *peaks, "--hidden-size", 42, "--out", tmp_path / "other.json")
    assert "the hidden size would be 42, and the target needs 8 or a multiple of it" in refused.err


def test_a_recipe_estimates_every_hidden_size_and_checks_the_budget(
    numprune: Command, inputs: Path, tmp_path: Path
) -> None:
    device = ["timings.runtime=roofline", "timings.peak_tflops=1e-3", "timings.bandwidth_gb_s=1e-3"]
    asked = [*device, "prune.hidden_size=[48]", "prune.drop_layers=[0, 1]", "timings.sizes=4"]
    recipe = load(inputs / "recipe.toml", [f"prune.budget=250ms@{DECODE}", *asked])
    run = prepare(recipe, tmp_path)
    assert [*run.timing_keys] == [None, Width(48, "fisher")]
    stage = time_blocks(run, Width(48, "fisher"))
    assert stage.label == "timings at hidden size 48"
    table = stage.body(tmp_path, **stage.arguments)
    assert table.key.model_dump_json() == run.timing_keys[Width(48, "fisher")]
    overrides = [part for one in asked for part in ("--set", one)]
    answered = numprune("plan", inputs / "recipe.toml", "--set", f"prune.budget=250ms@{DECODE}", *overrides)
    assert answered.code == 0, answered.err
    stages = [line.strip().split("  ")[0] for line in answered.out.splitlines()]
    assert stages.index("timings") < stages.index("timings at hidden size 48") < stages.index("prune")
    recipe = load(inputs / "recipe.toml", [f"prune.budget=1.3x@{DECODE}", *device, "prune.hidden_size=48"])
    assert [*prepare(recipe, tmp_path).timing_keys] == [Width(48, "fisher"), None]
    refused = numprune("plan", inputs / "recipe.toml", "--set", f"prune.budget=100x@{DECODE}", *overrides)
    assert f"the budget is 100x@{DECODE}" in refused.err
    refused = numprune("plan", inputs / "recipe.toml", "--set", f"prune.budget=1us@{DECODE}", *overrides)
    assert "and the quickest measured size of every block take" in refused.err


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
        "width": None,
        "machine": {},
    }
    table = make_timings(tmp_path, model=Text(str(inputs / "base"), ""), scenario=DECODE, **named)
    assert table.key == estimate_key(inputs / "base", "L4")
    assert prepare(recipe, tmp_path).timing_keys == {None: table.key.model_dump_json()}
    answered = numprune("plan", inputs / "recipe.toml", *(part for one in asked for part in ("--set", one)))
    assert answered.code == 0, answered.err
    assert "among sizes that are estimated for L4, not measured" in answered.out
