"""The classifier of digits: trained here, pruned, and better than by magnitude."""

import sys
from pathlib import Path

import pytest
import torch

import numprune
from numprune.flows.embedded import digits
from numprune.pictures import read_pictures


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["digits", str(out), "--epochs", "6"])
        assert digits.main() == 0
    return out


def test_images_and_model_are_those_of_the_digits(trained: Path) -> None:
    train, heldout = (read_pictures([trained / part]) for part in ("train", "heldout"))
    assert (len(train), len(heldout)) == (1297, 500)
    assert {one.label for one in heldout} == set("0123456789")
    model = numprune.load(trained / "model", device="cpu")
    assert model.budget.parameters == 202_186
    found = numprune.evaluate(model, trained / "heldout")
    assert found.accuracy is not None
    assert found.accuracy > 0.8


def test_another_architecture_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["digits", str(tmp_path / "out"), "--architecture", "swin", "--epochs", "1"])
    assert digits.main() == 0
    model = numprune.load(tmp_path / "out" / "model", device="cpu")
    assert (model.anatomy.family, model.budget.parameters) == ("swin", 300_700)


def test_a_folder_that_exists_is_not_touched(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for asked, said in (([], "already exists; choose another folder"), (["--epochs", "0"], "--epochs 0, --seed 0")):
        out = trained / "new" if asked else trained
        monkeypatch.setattr(sys, "argv", ["digits", str(out), *asked])
        assert digits.main() == 1
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in trained.iterdir()) == ["heldout", "model", "train"]
    assert [path.name for path in trained.parent.iterdir()] == ["digits"]


def test_refitted_channels_lose_less_than_the_largest_ones(trained: Path) -> None:
    model = numprune.load(trained / "model", device="cpu")
    rows = numprune.calibration_rows(trained / "train", model, samples=256)
    anatomy = model.anatomy
    mlp = sum(block.parameters(block.size) for block in anatomy.of_kind("mlp"))
    ratio = 0.75 * mlp / model.budget.prunable_parameters
    kl = {}
    for criterion, compensation in (("obs", "joint"), ("magnitude", "none"), ("dimap", "none")):
        options = numprune.PruneOptions(ratio, criterion, compensation=compensation, axes=["channels"])
        found = numprune.evaluate(numprune.prune(model, rows, options), trained / "heldout", baseline=model)
        kl[criterion] = found.metrics["kl_nats_per_image"]
    assert kl["obs"] < 0.5 * min(kl["magnitude"], kl["dimap"])


def test_training_uses_one_thread() -> None:
    before, used = torch.get_num_threads(), set()
    model = digits.build_vit(hidden_size=16, layers=1)
    model.register_forward_hook(lambda *_: used.add(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        digits.train(model, torch.zeros(160, 1, 8, 8), torch.zeros(160, dtype=torch.long), epochs=1, seed=0)
        assert (used, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)
