"""The table of learned masks, resuming, and errors reported before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from numprune.errors import InputError
from numprune.flows.steps import learn, prune, recover
from numprune.flows.studies.learned import command
from tests.conftest import build_tiny, write_checkpoint


class Watched:
    """Counts the calls of the functions that do the work, with the rows given to each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, list[Any]] = {}
        self.failing = ""
        self._watch(monkeypatch, prune, "prune_checkpoint", 1)
        self._watch(monkeypatch, learn, "learn_checkpoint", 1)
        self._watch(monkeypatch, recover, "recover_checkpoint", 2)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, place: int) -> None:
        real, calls = getattr(module, name), self.rows.setdefault(name, [])

        def watched(*given: Any, **named: Any) -> Any:
            if name == self.failing:
                raise InputError("the machine was switched off")
            calls.append(given[place])
            return real(*given, **named)

        monkeypatch.setattr(module, name, watched)

    def counts(self) -> list[int]:
        return [len(calls) for calls in self.rows.values()]


def test_a_line_for_each_method_and_ratio_and_finished_ones_are_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number**2}, halved {number / 2}.\n" for number in range(300)))
    base, out = write_checkpoint(build_tiny(), tmp_path / "base"), tmp_path / "out"
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{number} cubed is {number**3}.\n" for number in range(60)))
    how = ("--ratios", "0.3", "--variants", "faster=500", "--samples", "8", "--sequence-length", "32")
    files = ("--calibration", text, "--heldout", other, "--windows", 30, "--distill", 4000, "--out", out)
    arguments = [str(word) for word in (base, *how, *files)]
    watched.failing = "recover_checkpoint"
    assert command.main(arguments) == 1
    assert "switched off" in capsys.readouterr().err
    assert watched.counts() == [4, 1, 0]
    before = json.loads((out / "learned.json").read_text())
    watched.failing = ""
    assert command.main(arguments) == 0
    assert watched.counts()[:2] == [4, 1]
    assert json.loads((out / "learned.json").read_text())[:4] == before  # seconds, too

    printed = capsys.readouterr().out
    assert printed == (out / "learned.md").read_text()
    assert f" quality on {30 * 31} tokens of 1 " in printed
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:-2]]
    methods = ["obs/uniform/joint", "obs/error/joint", "vib faster=500/none", "vib faster=500/joint"]
    assert [row[1] for row in cells[:4]] == methods
    assert [row[4] for row in cells[:4]] == ["0", "0", "512", "512"]
    assert 1 <= len(cells[4:]) <= 2
    for row in cells[4:]:
        undistilled = cells[methods.index(row[1].removesuffix(" + distillation"))]
        assert int(row[4].replace(",", "")) == int(undistilled[4]) + 4096
        assert float(row[7]) < float(undistilled[7])
    assert all(float(row[2].rstrip("%")) == pytest.approx(30, abs=3) for row in cells)
    (masks,), deciding = watched.rows["learn_checkpoint"], watched.rows["recover_checkpoint"][0].selection.tolist()
    assert len(deciding) == 32
    assert not [row for row in torch.cat([masks.training, masks.selection]).tolist() if row in deciding]

    trained = watched.counts()[2]
    other.write_text("".join(f"{number} doubled is {2 * number}.\n" for number in range(60)))
    assert command.main([*arguments[:-2], "--distill", "0", "--out", str(out)]) == 0
    assert watched.counts() == [6, 2, trained]  # masks must not be trained on other held-out text: new rows, new plan


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variants", "slow"], "--variants: 'slow'"),
        (["--variants", "faster=many"], "tokens of faster are 'many'"),
        (["--ratios", "half"], "--ratios: 'half'"),
        (["--ratios", "0.99"], "ratio is 0.99"),
        (["--ratios", "0.3,nan"], "--ratios: nan; each must be at least 0 and under 1"),
        (["--ratios", "0.3,0.30"], "--ratios: 0.3 is given twice"),
        (["--variants", "fast,faster,fast"], "--variants: fast is given twice"),
        (["--variants", "fast,fast=76800"], "--variants: fast is given twice"),
        (["/nowhere/model"], "/nowhere/model"),
    ],
)
def test_mistakes_end_before_the_work(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 1
    assert said in capsys.readouterr().err
