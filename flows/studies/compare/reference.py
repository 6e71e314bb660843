"""The dense model's distributions on held-out rows, kept for all that are compared with it.

What is kept is the last hidden states, float32: hidden size instead of vocabulary numbers per token. One product with
the output matrix makes the logits of them again, bit by bit those of the whole model.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.corpus import TokenRows
from numprune.quality import Quality, batches, evaluate

_FILE = "hidden.npy"


class Reference:
    """The distributions, as `quality.compare_with` takes them.

    Args:
        folder: where `write_reference` wrote.
        rows: the same as there.
        head: (V, H) the dense model's output matrix, float32.
    """

    def __init__(self, folder: Path, rows: TokenRows, head: Tensor) -> None:
        self._hidden = np.load(folder / _FILE, mmap_mode="r")
        self._starts = _starts(rows)
        self._head = head

    @torch.inference_mode()
    def __call__(self, index: list[int], tokens: Tensor) -> Tensor:
        """Return the log-probabilities (n, S-1, V) of the token after each of windows `index`, tokens (n, S)."""
        scored = tokens.shape[1] - 1
        hidden = np.stack([self._hidden[self._starts[i] : self._starts[i] + scored] for i in index])
        logits = torch.from_numpy(hidden).to(self._head.device) @ self._head.T
        return logits.log_softmax(-1)


@torch.inference_mode()
def write_reference(folder: Path, model: PreTrainedModel, rows: TokenRows) -> Quality:
    """Write the last hidden states of `model` on `rows` into `folder`, and return its NLL.

    Raises InputError, IntegrityError as `quality.evaluate` does.
    """
    starts = _starts(rows)
    size = (int(starts[-1]), model.config.hidden_size)
    kept = np.lib.format.open_memmap(folder / _FILE, mode="w+", dtype=np.float32, shape=size)
    for index, tokens in batches(rows, 8, "evaluate"):
        hidden = model.model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state[:, :-1]
        for i, states in zip(index, hidden.float().cpu().numpy(), strict=True):
            kept[starts[i] : starts[i] + len(states)] = states
    kept.flush()
    return evaluate(model, rows)


def _starts(rows: TokenRows) -> Any:
    """(windows + 1,) where each window's scored tokens begin."""
    return np.cumsum([0, *(len(row) - 1 for row in rows.rows)])
