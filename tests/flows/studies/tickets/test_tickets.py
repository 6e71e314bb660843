"""The study of lottery tickets in miniature: its files, resuming, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from numprune.allocation import keep_highest
from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.flows.studies.tickets import command, study, training
from numprune.flows.studies.tickets.masks import UnitPruning, WeightPruning, everything, share_left
from numprune.options import PruneOptions, sizes_allowed
from numprune.schedules.scores import magnitude

ROWS = torch.randint(0, 256, (16, training.LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} squared is {number**2}.\n" for number in range(200)))
    return path


def run(text: Path, out: Path, *others: str) -> list[dict[str, Any]]:
    how = ("--steps", "5", "--rewind", "2", "--rounds", "2", "--seeds", "1", "--fraction", "0.4")
    assert command.main(["--text", str(text), "--heldout", str(text), "--out", str(out), *how, *others]) == 0
    results: list[dict[str, Any]] = json.loads((out / "tickets.json").read_text())
    return results


def test_each_ticket_has_its_rivals_and_finished_trainings_are_kept(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = run(text, out, "--rounds", "1")
    assert [(result["kind"], result["round"]) for result in first] == [
        ("dense", 0),
        ("ticket", 1),
        ("reinitialised", 1),
        ("random", 1),
    ]
    capsys.readouterr()
    both = run(text, out)
    assert both[:4] == first  # seconds, too: nothing was trained again
    assert [result["kind"] for result in both[4:]] == ["ticket", "reinitialised", "random"]
    assert [round(result["kept"], 2) for result in both] == pytest.approx([1, *[0.6] * 3, *[0.36] * 3], abs=0.04)
    assert len({result["nll"] for result in both}) == 7
    printed = capsys.readouterr().out
    assert printed == (out / "tickets.md").read_text()
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {7}
    assert (out / "tickets.svg").read_text().count("<svg") == 1

    (damaged,) = (out / "trainings").glob("ticket-0-1-*/step-*")
    damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    again = run(text, out)
    assert [result["nll"] for result in again] == [result["nll"] for result in both]  # the same, bit for bit
    assert again[1]["seconds"] != both[1]["seconds"]


def test_trainings_of_other_code_are_not_reused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(text, tmp_path / "out", "--rounds", "1")
    monkeypatch.setattr(study, "code_version", lambda _: {"sources": "edited"})
    again = run(text, tmp_path / "out", "--rounds", "1")
    assert [result["nll"] for result in again] == [result["nll"] for result in first]
    assert all(one["seconds"] != other["seconds"] for one, other in zip(again, first, strict=True))


def test_single_weights_go_too(text: Path, tmp_path: Path) -> None:
    found = run(text, tmp_path / "out", "--rounds", "1", "--unstructured")
    assert [result["kept"] for result in found] == pytest.approx([1, 0.6, 0.6, 0.6], abs=1e-5)


def test_the_units_of_least_magnitude_go_and_stay_away() -> None:
    model = training.build(seed=0)
    anatomy = read_anatomy(model.config)
    pruning = UnitPruning(anatomy, sizes_allowed(anatomy, PruneOptions(0.0)))
    half = pruning.smaller(model, everything(anatomy), 0.5)
    quarter = pruning.smaller(training.build(seed=1), half, 0.25)
    assert share_left(half) == pytest.approx(0.5, abs=0.01)
    assert share_left(quarter) == pytest.approx(0.25, abs=0.01)
    assert all((mask <= half[name]).all() for name, mask in quarter.items())
    layer = model.model.layers[1]
    block = anatomy.of_layer(1)[1]
    left = half[f"{block.path}.mlp.down_proj.weight"].any(0)
    assert left.nonzero()[:, 0].tolist() == keep_highest(magnitude(layer, block), int(left.sum())).tolist()
    assert torch.equal(half[f"{block.path}.mlp.up_proj.weight"].any(1), left)
    drawn = pruning.random(half, torch.Generator().manual_seed(0))
    assert {name: int(mask.sum()) for name, mask in drawn.items()} == {
        name: int(mask.sum()) for name, mask in half.items()
    }
    assert not torch.equal(drawn[f"{block.path}.mlp.up_proj.weight"].any(1), left)


def test_the_weights_of_least_magnitude_go_and_stay_away() -> None:
    model = training.build(seed=0)
    whole = everything(read_anatomy(model.config))
    half = WeightPruning().smaller(model, whole, 0.5)
    left = torch.cat([model.get_parameter(name)[mask].abs() for name, mask in half.items()])
    gone = torch.cat([model.get_parameter(name)[~mask].abs() for name, mask in half.items()])
    assert share_left(half) == pytest.approx(0.5, abs=1e-5)
    assert left.min() >= gone.max()
    quarter = WeightPruning().smaller(training.build(seed=1), half, 0.25)
    assert all((mask <= half[name]).all() for name, mask in quarter.items())
    drawn = WeightPruning().random(half, torch.Generator().manual_seed(0))
    assert all(int(drawn[name].sum()) == int(mask.sum()) for name, mask in half.items())
    assert not any(torch.equal(drawn[name], mask) for name, mask in half.items())


def test_what_is_removed_stays_zero() -> None:
    model = training.build(seed=0)
    masks = WeightPruning().smaller(model, everything(read_anatomy(model.config)), 0.5)
    steps: list[int] = []
    training.Training(ROWS, 4, seed=0).run(model, masks, 1, {}, lambda step, _: steps.append(step))
    assert steps == [2, 3, 4]
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()


def test_a_rewound_training_continues_bit_for_bit() -> None:
    states: list[dict[str, torch.Tensor]] = []
    model, rewound = training.build(seed=0), training.build(seed=1)
    masks, trainings = everything(read_anatomy(model.config)), training.Training(ROWS, 4, seed=0)
    trainings.run(model, masks, 0, {}, lambda _, optimizer: states.append(training.state_of(model, optimizer)))
    trainings.run(rewound, masks, 2, states[1], lambda *_: None)
    expected = training.state_of(model)
    assert all(torch.equal(weight, expected[name]) for name, weight in training.state_of(rewound).items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "a.txt"], "--text and --heldout belong together"),
        (["--fraction", "1"], "--fraction: 1; it must be over 0 and under 1"),
        (["--rewind", "300"], "--rewind: 300 leaves no step of --steps 300"),
        (["--rounds", "9", "--fraction", "0.6"], "9 rounds of 0.6 are too many: ratio is 0.999"),
        (["--text", "/nowhere/a.txt", "--heldout", "/nowhere/b.txt"], "/nowhere/a.txt"),
    ],
)
def test_mistakes_end_before_the_work(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_ends() -> None:
    model = training.build(seed=0)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").fill_(torch.nan)
    with pytest.raises(InputError, match="training diverged at step 1 of 4: the loss is nan"):
        training.Training(ROWS, 4, seed=0).run(model, everything(read_anatomy(model.config)), 0, {}, lambda *_: None)
