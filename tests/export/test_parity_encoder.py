"""Parity of encoders passes correct exports and refuses wrong ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from numprune.errors import ParityError
from numprune.export import parity_encoder
from numprune.export.runtimes.encoder import open_encoder
from tests.conftest import build_tiny, write_checkpoint

TASKS = ("masked-lm", "classification", "embedding")


def spoil(folder: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    path = folder / "model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if name.endswith(tensor))
    save_file({**stored, name: change(stored[name])}, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_encodings_are_the_same_alone_and_in_a_padded_batch(tmp_path: Path, family: str, task: Any) -> None:
    folder = write_checkpoint(build_tiny(family, task=task), tmp_path / "base")
    found = parity_encoder.check(folder, folder, "torch", device="cpu", threads=1)
    assert found["output_error_max"] < 1e-4 < found["tolerance"]
    assert [text["text"] for text in found["texts"]][-1] == "random tokens"
    assert {text["yardstick"] for text in found["texts"]} == {"floor"}


def test_different_weights_are_detected_and_named(tmp_path: Path) -> None:
    good, wrong = (write_checkpoint(build_tiny("bert", task="embedding"), tmp_path / name) for name in ("a", "b"))
    spoil(wrong, "layer.1.output.dense.bias", lambda bias: bias + torch.linspace(0, 0.02, len(bias)))
    with pytest.raises(
        ParityError, match=r"b in torch does not compute what .*a does: .*entry \d+: reference"
    ) as caught:
        parity_encoder.check(good, wrong, "torch", device="cpu", threads=1)
    assert "8 times PyTorch's own float32 error there" in str(caught.value)


def test_constant_encodings_prove_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(build_tiny("bert", task="classification"), tmp_path / "base")
    spoil(folder, "classifier.weight", torch.zeros_like)
    with pytest.raises(ParityError, match=r"outputs for different inputs differ by .* would prove nothing"):
        parity_encoder.check(folder, folder, "torch", device="cpu", threads=1)


@pytest.mark.parametrize(
    ("tokens", "mask", "said"),
    [
        ([[1, 2, 3]], [[0, 1, 1]], "padding.* on the right"),
        ([[1, 2, 3]], [[1, 1]], "mask has shape"),
        ([[1, 2, 259]], None, "outside the range 0 … 258"),
    ],
)
def test_an_error_in_a_batch_is_detected(tmp_path: Path, tokens: Any, mask: Any, said: str) -> None:
    encoder = open_encoder("torch", write_checkpoint(build_tiny("bert"), tmp_path / "base"), device="cpu")
    with pytest.raises(ValueError, match=said):
        encoder.forward(torch.tensor(tokens), None if mask is None else torch.tensor(mask))
