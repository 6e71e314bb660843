"""PyTorch as deployed: compiled decoding over a static KV cache; on a GPU, one CUDA graph per step.

Eager decoding launches each kernel from Python, so on a GPU the timing of a small model is that of its launches. Here,
a step is one compiled function of tensors at fixed addresses. The prompt is run eagerly, as in transformers'
`generate`: its length varies, and the device is the bottleneck. `TorchRuntime` stays the reference; the compiled step
is used only if it computes the same.
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
from numprune.placement import is_spread

_STEPS = 4  # compared with eager decoding: one to compile, one to record a CUDA graph, one to replay it
_PROMPT = 8  # prompt tokens before them
# Mean |Δlogp| in nats at the worst position, between two orders of summation. Measured on a CPU, on the embedded Llama:
# up to 3e-6 in float32, 0.045 in bfloat16, 4e-3 in float16. Positions that are off by one give 0.3 to 1.1 in each.
_ALIKE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.02}


class CompiledRuntime:
    """The model of a `TorchRuntime`, decoding batches of up to `rows` sequences of up to `positions` tokens.

    Raises MissingRuntime, with the reason, if it cannot be compiled: no compiler, an operation that cannot be traced,
    or different logits.
    """

    name = "torch"

    def __init__(self, eager: TorchRuntime, rows: int, positions: int) -> None:
        if is_spread(eager.model):
            raise MissingRuntime("the model is spread over several GPUs, and a CUDA graph runs on one")
        self.eager = eager
        self.vocabulary = eager.vocabulary
        self._rows, self._positions = rows, positions
        self._device = eager.device
        self._cache = self._new_cache()
        self._mask: Tensor | None = None  # (B, T), on the CPU
        self._seen: Tensor | None = None  # (B, positions), on the device: 0 at padding
        mode = "reduce-overhead" if self._device.type == "cuda" else "default"
        self._step = torch.compile(self._forward, mode=mode, fullgraph=True, dynamic=False)
        try:
            with _silence():
                self._compare(rows)
        except MissingRuntime:
            raise
        except Exception as error:  # from dynamo, inductor, triton or a C++ compiler, without a common base class
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
        with torch.no_grad():  # not inference mode: CUDA graphs cannot write to its tensors
            torch.compiler.cudagraph_mark_step_begin()
            # Other strides would trigger a recompilation, and `contiguous` does not change those of a single row.
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
        # All positions, even with a sliding window: transformers' static sliding-window cache counts its steps in
        # Python, and each step would be recompiled. The mask applies the window.
        layers = self.eager.model.config.num_hidden_layers
        return Cache(layers=[StaticLayer(max_cache_len=self._positions) for _ in range(layers)])

    def _require_room(self, length: int) -> None:
        if length > self._positions:
            raise ValueError(f"{length} positions: the KV cache was made for {self._positions}")

    def _compare(self, rows: int) -> None:
        """Compile, and compare a few steps with eager decoding. Raises MissingRuntime if they differ."""
        generator = torch.Generator().manual_seed(0)
        length = min(_PROMPT, self._positions - 1)
        steps = min(_STEPS, self._positions - length)
        tokens = torch.randint(self.vocabulary, (rows, length + steps), generator=generator)
        outputs = []
        for runtime in (self.eager, self):
            found = [runtime.prefill(tokens[:, :length], last_only=True)[:, -1]]
            found.append(runtime.decode(tokens[:, length : length + 1]))
            with torch._dynamo.config.patch(error_on_recompile=True):  # the step must not be recompiled later
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
    """Suppress the compilers' warnings and output about themselves."""
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
