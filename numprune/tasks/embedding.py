"""Sentence embeddings: their distance from the dense model's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.corpus import Pack, TokenRows
from numprune.documents import Document
from numprune.errors import InputError, IntegrityError
from numprune.pooling import Pooling
from numprune.tasks.reading import encoder_rows, text_rows
from numprune.tasks.task import Comparison, Predictions, TaskName, batches, compared, of_inputs
from numprune.units import LOSS_UNITS

_COMPARED = 2_000  # texts whose pairs are ranked: 2 million pairs


@dataclass(frozen=True)
class Embedding:
    """A sentence embedding model (numprune.tasks.Task).

    Attributes:
        pooling: how token states become a text's embedding, by the names of sentence-transformers.
        normalized: embeddings are scaled to length 1.
        declared: the checkpoint declares the pooling; otherwise mean pooling is assumed.
    """

    pooling: Pooling = "mean"
    normalized: bool = False
    declared: bool = False

    name: ClassVar[TaskName] = "embedding"
    unit: ClassVar[str] = LOSS_UNITS["embedding"]
    generates: ClassVar[bool] = False
    prompted: ClassVar[bool] = False
    pooled: ClassVar[bool] = True

    def calibration_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        return encoder_rows(documents, tokenizer, length, pack)

    def heldout_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        return text_rows(documents, tokenizer, length, pack)

    def predictions_in(self, length: int) -> int:
        return 1

    def scored(self, rows: TokenRows) -> np.ndarray:
        return np.ones(len(rows.rows), dtype=np.int64)

    def has_loss(self, rows: TokenRows) -> bool:
        return False

    def predictions(self, model: PreTrainedModel) -> Predictions:
        return of_inputs(self, model, model.config.hidden_size)

    def evaluate(
        self,
        model: Predictions,
        rows: TokenRows,
        batch_size: int,
        keep: Callable[[list[int], Tensor], None] | None = None,
    ) -> None:
        for index, tokens in batches(rows, batch_size, "evaluate"):
            states = model.states(index, tokens)
            if keep is not None:
                keep(index, states)

    def compare(
        self, model: Predictions, baseline: Predictions, rows: TokenRows, batch_size: int, seed: int
    ) -> Comparison:
        if model.size != baseline.size:
            raise InputError(f"embeddings differ in size: {model.size} and {baseline.size} (baseline)")
        ours, theirs = np.zeros((2, len(rows.rows), model.size), dtype=np.float32)
        for index, tokens in batches(rows, batch_size, "compare"):
            for found, predictions in ((ours, model), (theirs, baseline)):
                found[index] = predictions.states(index, tokens)[:, 0].float().cpu().numpy()
        ours, theirs = _unit(ours), _unit(theirs)
        distance = 1 - (ours * theirs).sum(1)
        metrics = {"similarity_spearman": rank_correlation(ours, theirs)} if len(rows.rows) > 2 else {}
        return compared(self, rows, distance, metrics, seed)

    def output(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.embeddings(model(input_ids=tokens, attention_mask=mask).last_hidden_state, mask)

    def embeddings(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the embeddings (n, H) of the last layer's output (n, S, H)."""
        pooled = pool(hidden, mask, self.pooling)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalized else pooled

    def divergence(self, output: Tensor, dense: Tensor, rows: Tensor) -> Tensor:
        return 1 - torch.nn.functional.cosine_similarity(output.double(), dense.double(), dim=-1)

    def losses_in(self, rows: Tensor) -> int:
        return len(rows)

    def loss(self, output: Tensor, rows: Tensor, draw: torch.Generator) -> Tensor:
        """A random projection of the unit embeddings e: E[g g^T] is J^T J, and 1/2 |J dy|^2 is 1 - cosine.

        J is de/dy; de is orthogonal to e, so that 1 - cos(e, e + de) = |de|^2 / 2 to second order.
        """
        direction = torch.randn(output.shape, generator=draw).to(output.device)
        return (torch.nn.functional.normalize(output.float(), dim=-1) * direction).sum()

    def skip(self, rows: Tensor, hidden_size: int, draw: torch.Generator) -> None:
        for _ in rows:
            torch.randn(1, hidden_size, generator=draw)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return the embeddings (n, H) of token states (n, S, H); `mask` (n, S) marks tokens."""
    kept = mask[..., None].to(hidden.dtype)
    if pooling == "cls":
        return hidden[torch.arange(mask.shape[0]), mask.argmax(1)]  # the first token: padding may come before it
    if pooling == "last":
        return hidden[torch.arange(mask.shape[0]), mask.shape[1] - 1 - mask.flip(1).argmax(1)]
    if pooling == "max":
        return hidden.masked_fill(kept == 0, -torch.inf).amax(1)
    total, count = (hidden * kept).sum(1), kept.sum(1)
    return total / (count if pooling == "mean" else count.sqrt())


def rank_correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return Spearman's correlation of all pairs' cosines, of unit embeddings (n, V) of the same n > 2 texts.

    If there are more than 2,000 texts, 2,000 evenly spread ones are used.
    """
    from scipy import stats  # here: the import takes half a second

    chosen = np.unique(np.linspace(0, len(ours) - 1, min(len(ours), _COMPARED)).astype(int))
    pairs = np.triu_indices(len(chosen), 1)
    similarities = [(one[chosen] @ one[chosen].T)[pairs] for one in (ours, theirs)]
    return float(stats.spearmanr(*similarities).statistic)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    """Return the embeddings (n, V) in float64, scaled to length 1. Raises IntegrityError if one is not finite."""
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not (lengths > 0).all():
        raise IntegrityError("the model's embeddings are zero or not finite; its weights are damaged or overflow")
    return embeddings / lengths
