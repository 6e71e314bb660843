"""The options of training, and what follows from them: steps, learning rates, the order of the rows."""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch

WARMUP = 0.05  # share of the steps in which the learning rate rises
COPIES = 4  # of each trained weight: itself, its gradient and AdamW's two moments
RATE_TIMES_WIDTH = 0.128  # 5e-4 for a hidden size of 256
FINAL = 0.1  # share of the learning rate at the last step
MEASUREMENTS = 10  # of the selection rows, spread over the steps, besides the one before the first step


@dataclass(frozen=True)
class RecoveryOptions:
    """The options of training.

    Attributes:
        tokens: of the training, rounded to whole steps.
        learning_rate: peak learning rate of AdamW; None: `RATE_TIMES_WIDTH` / H, with H the hidden size, because Adam's
            best rate for hidden weights falls with the width (Yang et al., arXiv 2203.03466).
        batch_size: rows per step.
        micro_batch_size: rows at a time; changes memory and speed, not the result beyond rounding.
        selection_rows: held-back rows for choosing the best step.
        gradient_checkpointing: recompute activations instead of keeping them; same result.
        top_k: number of tokens, the dense model's most probable ones, that are compared one by one; all others are
            compared as one. None: the whole vocabulary.
        hidden_weight: of the term 1 - cos of the hidden states after each layer; 0: no such term.
        train: "all" weights; "lora": adapters of `rank` beside the projections of the layers, merged at the end;
            "blocks": the weights of the `blocks` blocks with the largest loss from pruning.
        seed: of the draw of the rows and of their order, and of the adapters.
    """

    tokens: int = 1_000_000
    learning_rate: float | None = None
    batch_size: int = 8
    micro_batch_size: int = 8
    selection_rows: int = 64
    gradient_checkpointing: bool = True
    top_k: int | None = None
    hidden_weight: float = 0.0
    train: Literal["all", "lora", "blocks"] = "all"
    rank: int = 16
    blocks: int = 4
    seed: int = 0

    def rate(self, hidden_size: int) -> float:
        """Return the peak learning rate of a model of this width."""
        return RATE_TIMES_WIDTH / hidden_size if self.learning_rate is None else self.learning_rate

    def steps(self, length: int) -> int:
        """Return the number of steps with rows of `length` tokens."""
        return max(1, round(self.tokens / (self.batch_size * length)))


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step from 0: linear warm-up, then a cosine down to `FINAL`."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def measured_after(steps: int) -> list[int]:
    """Return the steps after which the selection rows are measured, ascending, including the last step."""
    return sorted({max(1, round(steps * part / MEASUREMENTS)) for part in range(1, MEASUREMENTS + 1)})


class RowOrder:
    """The rows of each step. Every row is used once before any is repeated, in an order given by the seed."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> list[int]:
        """Return the indices of the rows of a step, (batch_size,); they depend only on the step."""
        first = step * self._batch_size
        return [self._at(position) for position in range(first, first + self._batch_size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self._rows)
        if epoch != self._epoch:
            # torch's generator uses only 32 bits of a seed.
            digest = hashlib.sha256(f"{self._seed} {epoch}".encode()).digest()
            draw = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
            self._epoch, self._order = epoch, torch.randperm(self._rows, generator=draw)
        return int(self._order[place])
