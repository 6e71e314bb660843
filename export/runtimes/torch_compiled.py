"""PyTorch as one would deploy it: decoding compiled, over a KV cache of fixed size; on a GPU as one CUDA graph a step.

Eager decoding launches each kernel from Python, so on a GPU a small model is timed by its launches. Here a step is one
compiled function of tensors whose addresses do not change. The prompt is run eagerly, as transformers' `generate` does:
its length changes, and one pass over it is bound by the device. `TorchRuntime` stays the reference; a compiled step is
taken only where it computes the same.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from numprune.errors import MissingRuntime
from numprune.export.runtimes.batch import extended_mask, prompt_mask
from numprune.export.runtimes.torch_eager import TorchRuntime

_STEPS = 4  # that are compared with eager decoding: compiling, recording a CUDA graph, and replaying it
_PROMPT = 8  # tokens before them
# Mean |Δlogp| in nats at the worst position, between two orders of summation. Measured on a CPU, on the embedded Llama:
# up to 3e-6 in float32, 0.045 in bfloat16, 4e-3 in float16. Positions that are off by one give 0.3 to 1.1 in each.
_ALIKE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.02}


class CompiledRuntime:
    """The model of a `TorchRuntime`, decoding batches of up to `rows` sequences of up to `positions` tokens.

    Raises MissingRuntime where it cannot be compiled (no compiler, an operation that cannot be traced, or not the same
    logits): says why.
    """

    name = "torch"

    def __init__(self, eager: TorchRuntime, rows: int, positions: int) -> None:
        self.eager = eager
        self.vocabulary = eager.vocabulary
        self._rows, self._positions = rows, positions
        self._device = eager.device
        self._cache = self._new_cache()
        self._mask: Tensor | None = None  # (B, T), on the CPU
        self._seen: Tensor | None = None  # (B, positions), on the device: 0 where there is padding
        mode = "reduce-overhead" if self._device.type == "cuda" else "default"
        self._step = torch.compile(self._forward, mode=mode, fullgraph=True, dynamic=False)
        try:
            with _silence():
                self._compare(rows)
        except MissingRuntime:
            raise
        except Exception as error:  # of dynamo, inductor, triton, a C++ compiler: they share no base
            raise MissingRuntime(f"torch.compile failed: {_first_line(error)}") from error

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        self._mask = prompt_mask(tokens, mask, self.vocabulary)
        rows, length = tokens.shape
        self._require_room(length)
        if rows == self._rows:
            self._cache.reset()
        else:
            self._cache = self._new_cache()
            self._rows = rows
        seen = torch.ones(rows, self._positions, dtype=torch.bool)
        seen[:, :length] = self._mask.bool()
        self._seen = seen.to(self._device)
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            output = self.eager.model(
                input_ids=tokens.to(self._device),
                attention_mask=None if seen.all() else self._seen,
                position_ids=positions.to(self._device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if last_only else 0,
            )
        logits: Tensor = output.logits
        return logits.to("cpu").float()

    def decode(self, tokens: Tensor) -> Tensor:
        self._mask = extended_mask(self._mask, tokens, self.vocabulary)
        assert self._seen is not None  # since the prefill
        self._require_room(self._mask.shape[1])
        positions = self._mask.sum(dim=1, keepdim=True) - 1  # (B, 1)
        with torch.no_grad():  # and not inference mode, whose tensors no CUDA graph may write to
            torch.compiler.cudagraph_mark_step_begin()
            # Other strides would compile it again, and `contiguous` leaves those of a single row as they are.
            step = tokens.to(self._device).clone(memory_format=torch.contiguous_format)
            logits: Tensor = self._step(step, positions.to(self._device), self._seen)
            return logits.to("cpu").float()

    def describe(self) -> dict[str, Any]:
        return {**self.eager.describe(), "mode": "compiled"}

    def _forward(self, tokens: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        output = self.eager.model(
            input_ids=tokens,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits
        return logits[:, -1]

    def _new_cache(self) -> Cache:
        # Whole positions also where a window slides: transformers' static cache of a window counts its steps in Python,
        # and each would be compiled anew. The mask has the window.
        layers = self.eager.model.config.num_hidden_layers
        return Cache(layers=[StaticLayer(max_cache_len=self._positions) for _ in range(layers)])

    def _require_room(self, length: int) -> None:
        if length > self._positions:
            raise ValueError(f"{length} positions: the KV cache was made for {self._positions}")

    def _compare(self, rows: int) -> None:
        """Compile, and compare a few steps with eager decoding. Raises MissingRuntime where they differ."""
        generator = torch.Generator().manual_seed(0)
        length = min(_PROMPT, self._positions - 1)
        steps = min(_STEPS, self._positions - length)
        tokens = torch.randint(self.vocabulary, (rows, length + steps), generator=generator)
        outputs = []
        for runtime in (self.eager, self):
            found = [runtime.prefill(tokens[:, :length], last_only=True)[:, -1]]
            found.append(runtime.decode(tokens[:, length : length + 1]))
            with torch._dynamo.config.patch(error_on_recompile=True):  # one step must do for all that follow
                found += [runtime.decode(tokens[:, index : index + 1]) for index in range(length + 1, length + steps)]
            outputs.append(found)
        eager, compiled = (torch.cat(logits).log_softmax(-1) for logits in outputs)
        error = float((compiled - eager).abs().mean(-1).max())
        dtype = str(self.eager.describe()["dtype"])
        if not error <= _ALIKE[dtype]:
            raise MissingRuntime(
                f"compiled decoding differs from eager decoding in log-probabilities by {error:.2g} on average at one "
                f"position; allowed is {_ALIKE[dtype]:g} in {dtype}"
            )


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the compiler's warnings and its compiler's output, which are about itself, from the user."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
