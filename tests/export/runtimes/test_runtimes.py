"""The contract of every runtime: cached = uncached, padded = unpadded, wrong calls refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from numprune.errors import InputError, IntegrityError, MissingRuntime
from numprune.export import checkpoint, onnx
from numprune.export.runtimes import Runtime, open_runtime

VOCABULARY = 259


@pytest.fixture(params=["torch", "onnxruntime"])
def opened(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Runtime, Any]:
    """A runtime, and the model it should compute."""
    folder = tiny_checkpoint()
    model, _ = checkpoint.load(folder)
    if request.param == "onnxruntime":
        onnx.export(folder, tmp_path / "onnx")
        folder = tmp_path / "onnx"
    return open_runtime(request.param, folder, device="cpu", threads=1), model


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() < 1e-4)


def test_decode_continues_after_prefill(opened: tuple[Runtime, Any]) -> None:
    runtime, model = opened
    assert runtime.vocabulary == VOCABULARY
    for rows in (3, 1):  # a second prefill starts afresh
        tokens = random_tokens(rows, 12)
        expected = model(tokens).logits.detach()
        assert close(runtime.prefill(tokens[:, :7]), expected[:, :7])
        for position in range(7, 12):
            assert close(runtime.decode(tokens[:, position : position + 1]), expected[:, position])


def test_last_only(opened: tuple[Runtime, Any]) -> None:
    runtime, model = opened
    tokens = random_tokens(2, 9)
    assert close(runtime.prefill(tokens[:, :8], last_only=True), model(tokens).logits[:, 7:8].detach())
    assert close(runtime.decode(tokens[:, 8:]), model(tokens).logits[:, 8].detach())


def test_padded_rows_match_unpadded_rows(opened: tuple[Runtime, Any]) -> None:
    runtime, model = opened
    tokens = random_tokens(3, 12)
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, :5] = 0
    mask[2, :7] = 0
    found = torch.cat(
        [runtime.prefill(tokens[:, :8], mask), *(runtime.decode(tokens[:, 8 + i : 9 + i])[:, None] for i in range(4))],
        1,
    )
    for row, start in enumerate((0, 5, 7)):
        assert close(found[row, start:], model(tokens[row : row + 1, start:]).logits[0].detach())


def test_describe(opened: tuple[Runtime, Any]) -> None:
    runtime, model = opened
    found = runtime.describe()
    assert found["runtime"] == runtime.name
    assert found["device"] == "cpu"
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head dimension, bytes
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 4 * parameters <= found["weight_bytes"] < 4 * parameters + 100_000


MALFORMED = [
    (torch.zeros(2, 4), None),
    (torch.zeros(4, dtype=torch.int64), None),
    (torch.zeros(0, 4, dtype=torch.int64), None),
    (torch.tensor([[1, VOCABULARY]]), None),
    (torch.tensor([[1, -1]]), None),
    (torch.tensor([[1, 1]]), torch.tensor([[1]])),
    (torch.tensor([[1, 1]]), torch.tensor([[1, 0]])),  # padded on the right
    (torch.tensor([[1, 1]]), torch.tensor([[0, 0]])),
    (torch.tensor([[1, 1]]), torch.tensor([[0, 2]])),
    (torch.tensor([[1, 1, 1, 1]]), torch.tensor([[1, 0, 1, 1]])),
]


def test_a_malformed_prompt_is_refused(opened: tuple[Runtime, Any]) -> None:
    for tokens, mask in MALFORMED:
        with pytest.raises(ValueError):
            opened[0].prefill(tokens, mask)


def test_a_malformed_step_is_refused(opened: tuple[Runtime, Any]) -> None:
    runtime, _ = opened
    with pytest.raises(ValueError, match="prefill"):
        runtime.decode(torch.tensor([[1]]))
    runtime.prefill(torch.tensor([[1, 2], [3, 4]]))
    for tokens in (torch.tensor([[1]]), torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1], [VOCABULARY]])):
        with pytest.raises(ValueError):
            runtime.decode(tokens)


def test_unknown_names_and_devices(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch, onnxruntime, tensorrt"):
        open_runtime("openvino", tmp_path)
    with pytest.raises(InputError, match="auto, cpu, cuda"):
        open_runtime("torch", tmp_path, device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_missing_device_is_an_error_instead_of_falling_back_to_the_cpu(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = tiny_checkpoint()
    if name == "onnxruntime":
        onnx.export(folder, tmp_path / "onnx")
        folder = tmp_path / "onnx"
    with pytest.raises(MissingRuntime, match="device=cpu"):
        open_runtime(name, folder, device="cuda")


def test_onnxruntime_needs_a_complete_onnx_export(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    with pytest.raises(IntegrityError, match=r"manifest\.json: missing"):
        open_runtime("onnxruntime", folder)
    onnx.export(folder, tmp_path / "onnx")
    (tmp_path / "onnx" / onnx.MODEL_FILE).write_bytes(b"not protobuf")
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        open_runtime("onnxruntime", tmp_path / "onnx")
