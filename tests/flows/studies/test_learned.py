"""The table of learned masks, and errors reported before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch

from numprune.flows.steps import recover
from numprune.flows.studies import learned
from tests.conftest import build_tiny, write_checkpoint


def test_a_line_for_each_method_and_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, Any] = {}

    def watch(module: Any, name: str, place: int) -> None:
        real = getattr(module, name)

        def watched(*given: Any) -> Any:
            rows[name] = given[place]
            return real(*given)

        monkeypatch.setattr(module, name, watched)

    watch(learned, "learn_checkpoint", 1)
    watch(recover, "recover_checkpoint", 2)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number**2}, halved {number / 2}.\n" for number in range(300)))
    base, out = write_checkpoint(build_tiny(), tmp_path / "base"), tmp_path / "out"
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{number} cubed is {number**3}.\n" for number in range(60)))
    how = ("--ratios", "0.3", "--variants", "faster=500", "--samples", "8", "--sequence-length", "32")
    files = ("--calibration", text, "--heldout", other, "--windows", 30, "--distill", 4000, "--out", out)
    assert learned.main([str(word) for word in (base, *how, *files)]) == 0
    printed = capsys.readouterr().out
    assert printed == (out / "learned.md").read_text()
    assert f" quality on {30 * 31} tokens of 1 " in printed
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:-2]]
    methods = ["obs/uniform/joint", "obs/error/joint", "vib faster/none", "vib faster/joint"]
    assert [row[1] for row in cells[:4]] == methods
    assert [row[4] for row in cells[:4]] == ["0", "0", "512", "512"]
    assert 1 <= len(cells[4:]) <= 2
    for row in cells[4:]:
        before = cells[methods.index(row[1].removesuffix(" + distillation"))]
        assert int(row[4].replace(",", "")) == int(before[4]) + 4096
        assert float(row[7]) < float(before[7])
    assert all(float(row[2].rstrip("%")) == pytest.approx(30, abs=3) for row in cells)
    masks, deciding = rows["learn_checkpoint"], rows["recover_checkpoint"].selection.tolist()
    assert len(deciding) == 32
    assert not [row for row in torch.cat([masks.training, masks.selection]).tolist() if row in deciding]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variants", "slow"], "variant is 'slow'"),
        (["--variants", "faster=many"], "tokens of faster are 'many'"),
        (["--ratios", "half"], "ratios are 'half'"),
        (["--ratios", "0.99"], "ratio is 0.99"),
        (["--ratios", "0.3,0.30"], "ratios are '0.3,0.30'; name each once"),
        (["--variants", "fast,faster,fast"], "variants are 'fast,faster,fast'; name each once"),
        (["/nowhere/model"], "/nowhere/model"),
    ],
)
def test_mistakes_end_before_the_work(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert learned.main(arguments) == 1
    assert said in capsys.readouterr().err
