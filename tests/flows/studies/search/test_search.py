"""The study of searches in miniature, and its agent on divergences that are known."""

import json
import math
from pathlib import Path

import pytest

from numprune.errors import InputError
from numprune.flows.studies.search import command
from numprune.flows.studies.search.agent import explore
from numprune.options import PruneOptions
from numprune.target import Target
from tests.conftest import build_tiny, write_checkpoint
from tests.numprune.search.test_space import anatomy_of, space_of


def test_a_line_for_each_method_at_the_same_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number**2}, halved {number / 2}.\n" for number in range(300)))
    base, out = write_checkpoint(build_tiny(), tmp_path / "base"), tmp_path / "out"
    how = (
        "--ratios",
        "0.4",
        "--episodes",
        "12",
        "--samples",
        "16",
        "--sequence-length",
        "32",
        "--windows",
        "20",
        "--minutes",
        "5",
    )
    files = ("--calibration", text, "--heldout", text, "--out", out)
    assert command.main([str(word) for word in (base, *how, *files)]) == 0
    printed = capsys.readouterr().out
    assert printed == (out / "search.md").read_text()
    knapsack, search, agent = rows = json.loads((out / "search.json").read_text())
    assert [row["method"] for row in rows] == ["knapsack", "search", "agent"]
    assert knapsack["candidates"] == 1 < agent["candidates"] <= 12
    assert (knapsack["confirmed"], knapsack["change"]) == (None, None)
    assert search["divergence"] <= knapsack["divergence"]
    for row in (search, agent):
        assert 0.4 <= row["removed"] == pytest.approx(knapsack["removed"], abs=0.02)
        change, lower, upper = row["change"]
        assert lower <= change <= upper
        assert change == pytest.approx(row["nll"][0] - knapsack["nll"][0], abs=1e-6)
    assert "quality on 620 tokens of 1 held-out document." in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratios", "half"], "--ratios: 'half' must be numbers"),
        (["--ratios", "0.3,0.3"], "--ratios: 0.3 is given twice"),
        (["--ratios", "0.99"], "ratio is 0.99, but"),
        (["--samples", "8"], "8 rows are too few"),
        (["--minutes", "0"], "refine_minutes is 0.0; it must be more than 0"),
    ],
)
def test_requests_without_sense_are_refused(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert command.main(words) == 1
    assert said in capsys.readouterr().err


def test_an_agent_stays_within_the_budget_and_learns() -> None:
    anatomy = anatomy_of()
    space, _ = space_of(anatomy, PruneOptions(0.4, allocation="error", target=Target(align=8)))
    blocks = anatomy.blocks
    rewards: list[float] = []

    def reward(plan):  # type: ignore[no-untyped-def]
        assert 0 <= space.limit - space.cost(plan) <= max(ladder[1].cost for ladder in space.ladders.values())
        lost = math.fsum(
            (1 - block.parameters(plan[block.name]) / block.parameters(block.size)) ** 2 for block in blocks
        )
        rewards.append(-lost)
        return -lost

    found = explore(space, reward, 120, seed=0)
    assert found.candidates == len(rewards) <= 120
    first, last = rewards[:30], rewards[-30:]  # the first quarter is random
    assert sum(last) / 30 > sum(first) / 30 + 0.1
    assert -reward(found.plans[0]) == min(-value for value in rewards)
    again = explore(space, reward, 120, seed=0)
    assert again.plans[0] == found.plans[0]


def test_an_agent_that_finds_no_plan_for_a_server_says_so() -> None:
    anatomy = anatomy_of(layers=24, num_key_value_heads=8)
    space, _ = space_of(anatomy, PruneOptions(0.4, allocation="error", target=Target(align=8)))
    with pytest.raises(InputError, match=r"^--episodes: each of the 2 plans that the agent tried gives attention more"):
        explore(space, lambda _: 0.0, 2, seed=0)
