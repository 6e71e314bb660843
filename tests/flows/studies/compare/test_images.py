"""The command on an image classifier."""

import csv
import shutil
from pathlib import Path

import pytest

from numprune.flows.studies.compare.command import main
from tests.conftest import build_tiny, write_checkpoint, write_images

CLASSES = ("LABEL_0", "LABEL_1")


def test_image_classifiers_are_compared_by_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_checkpoint(build_tiny("vit", num_hidden_layers=1), tmp_path / "base")
    train, heldout = (
        write_images(tmp_path / name, 24, CLASSES, seed) for seed, name in enumerate(("train", "heldout"))
    )
    asked = [
        "--text",
        str(train),
        "--samples",
        "16",
        "--ratios",
        "0.3",
        "--axes",
        "channels",
        "--align",
        "1",
        "--device",
        "cpu",
    ]
    asked += ["--methods", "dimap/uniform/none,obs/error/joint", "--out", str(tmp_path / "out")]
    assert main([str(base), *asked, "--heldout", str(heldout)]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["dimap/uniform/none", "obs/error/joint"]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert float(rows[1]["kl_nats_per_image"]) < float(rows[0]["kl_nats_per_image"])
    assert {row["axes"] for row in rows} == {"channels"}
    assert "evaluated on 24 held-out images. Only channels may be pruned." in capsys.readouterr().out


def test_unknown_axes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_checkpoint(build_tiny("vit", num_hidden_layers=1), tmp_path / "base")
    asked = ["--text", str(tmp_path), "--heldout", str(tmp_path), "--axes", "channel", "--out", str(tmp_path / "out")]
    assert main([str(base), *asked]) == 1
    assert "error: axes: 'channel' is unknown; choose from kv-groups," in capsys.readouterr().err


def test_images_to_compare_by_are_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_checkpoint(build_tiny("vit", num_hidden_layers=1), tmp_path / "base")
    assert main([str(base), "--out", str(tmp_path / "out")]) == 1
    assert (
        "image classifiers are compared on images: give --text and --heldout, folders of images"
        in capsys.readouterr().err
    )


def test_an_image_that_is_calibrated_on_is_not_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_checkpoint(build_tiny("vit", num_hidden_layers=1), tmp_path / "base")
    train, heldout = (write_images(tmp_path / name, 4, CLASSES, seed) for seed, name in enumerate(("train", "heldout")))
    shutil.copy(train / "LABEL_0" / "000.png", heldout / "LABEL_1" / "copy.png")
    asked = ["--text", str(train), "--heldout", str(heldout), "--samples", "2", "--out", str(tmp_path / "out")]
    assert main([str(base), *asked]) == 1
    assert "--heldout: 1 file also in --text, so not held out" in capsys.readouterr().err
