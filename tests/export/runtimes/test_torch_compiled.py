"""Compiled decoding computes the same as eager decoding, or the reason for not using it is given."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from numprune.errors import MissingRuntime
from numprune.export.runtimes import torch_compiled
from numprune.export.runtimes.torch_compiled import CompiledRuntime
from numprune.export.runtimes.torch_eager import TorchRuntime

Checkpoint = Callable[..., Path]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.slow
def test_compiled_decoding_matches_eager_decoding(tiny_checkpoint: Checkpoint) -> None:
    """A window slides past what is cached: every step must be the same compiled function."""
    base = tiny_checkpoint("mistral", num_hidden_layers=1, sliding_window=5)
    eager = TorchRuntime(base, device="cpu", threads=1)
    runtime = CompiledRuntime(eager, rows=2, positions=20)
    assert runtime.describe() == {**eager.describe(), "mode": "compiled"}
    tokens = torch.randint(259, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    for padding in (None, mask):  # one cache after the other
        for one in (eager, runtime):
            one.prefill(tokens[:, :12], padding)
        for position in range(12, 20):
            step = tokens[:, position : position + 1]
            with torch._dynamo.config.patch(error_on_recompile=True):
                assert torch.allclose(runtime.decode(step), eager.decode(step), atol=1e-4)
    with pytest.raises(ValueError, match="21 positions: the KV cache was made for 20"):
        runtime.decode(tokens[:, :1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_the_compared_step_is_the_timed_step(tiny_checkpoint: Checkpoint) -> None:
    """One row: a column cut out of a longer prompt and the token that argmax found differ in strides alone."""
    eager = TorchRuntime(tiny_checkpoint(num_hidden_layers=1), device="cpu", threads=1)
    runtime = CompiledRuntime(eager, rows=1, positions=20)
    token = runtime.prefill(torch.tensor([[1, 2, 3]]), last_only=True)[:, -1].argmax(-1, keepdim=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (token, torch.zeros(1, 12, dtype=torch.int64)[:, :1]):
            assert runtime.decode(step).shape == (1, 259)


def test_a_compiled_step_that_differs_is_not_used(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself the decoder is not traced here: that its logits are compared does not depend on the compiler."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: lambda *inputs: step(*inputs).roll(1, dims=-1))
    eager = TorchRuntime(tiny_checkpoint(num_hidden_layers=1), device="cpu", threads=1)
    with pytest.raises(MissingRuntime, match="compiled decoding differs from eager decoding in log-probabilities by"):
        torch_compiled.CompiledRuntime(eager, rows=1, positions=20)


def test_an_untraceable_network_gives_the_reason(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = TorchRuntime(tiny_checkpoint(num_hidden_layers=1), device="cpu", threads=1)

    def untraceable(*_: object, **__: object) -> None:
        torch._dynamo.graph_break()

    monkeypatch.setattr(CompiledRuntime, "_forward", untraceable)
    with pytest.raises(MissingRuntime, match=r"^torch\.compile failed: "):
        CompiledRuntime(eager, rows=1, positions=20)
