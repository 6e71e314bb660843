"""Masked language models: the NLL of masked tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.corpus import Pack, TokenRows
from numprune.documents import Document
from numprune.errors import InputError
from numprune.tasks import language
from numprune.tasks.reading import encoder_rows
from numprune.tasks.task import Comparison, Predictions, Quality, TaskName, head_of
from numprune.units import LOSS_UNITS

_SHARE = 0.15  # of a row's tokens, as in BERT's training
_SEED = 0


@dataclass(frozen=True)
class Masked:
    """A masked language model (numprune.tasks.Task): 15 % of a row's tokens are masked and scored.

    The choice depends on a fixed seed and the row's position in the text, so it is the same for every model. A masked
    token is always replaced by the mask token; the random and unchanged tokens of BERT's training are not needed here.

    Attributes:
        mask_token: its id.
        special: ids of the tokens that are not masked.
    """

    mask_token: int
    special: tuple[int, ...] = ()

    name: ClassVar[TaskName] = "masked-lm"
    unit: ClassVar[str] = LOSS_UNITS["masked-lm"]
    kl: ClassVar[str] = "kl_nats_per_masked_token"
    generates: ClassVar[bool] = False
    prompted: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    def calibration_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        """Return the rows with their masks applied, so that pruning sees the model's real input."""
        rows = self.heldout_rows(documents, tokenizer, length, pack)
        return replace(rows, rows=[self.masked(index, row) for index, row in enumerate(rows.rows)])

    def heldout_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        return encoder_rows(documents, tokenizer, length, pack)

    def predictions_in(self, length: int) -> int:
        return max(1, round(_SHARE * length))

    def positions(self, index: int, row: Tensor) -> Tensor:
        """Return the masked positions (P,), ascending, of the row (S,) with this index; special tokens come last."""
        order = np.random.default_rng([_SEED, index]).permutation(len(row))
        plain = ~np.isin(row.numpy()[order], self.special)
        first = np.concatenate([order[plain], order[~plain]])[: self.predictions_in(len(row))]
        return torch.from_numpy(np.sort(first))

    def masked(self, index: int, row: Tensor) -> Tensor:
        """Return the row (S,) with this index with its masks applied."""
        return row.index_fill(0, self.positions(index, row), self.mask_token)

    def scored(self, rows: TokenRows) -> np.ndarray:
        found = np.zeros(len(rows.document))
        for index, row in enumerate(rows.rows):
            self.add(found, rows, [index], np.ones((1, self.predictions_in(len(row)))))
        return found.astype(np.int64)

    def targets(self, rows: TokenRows, index: list[int], tokens: Tensor) -> Tensor:
        return torch.stack([row[self.positions(number, row)] for number, row in zip(index, tokens, strict=True)])

    def add(self, sums: np.ndarray, rows: TokenRows, index: list[int], values: np.ndarray) -> None:
        rows.add_at(sums, index, [self.positions(number, rows.rows[number]).numpy() for number in index], values)

    def has_loss(self, rows: TokenRows) -> bool:
        return True

    def predictions(self, model: PreTrainedModel) -> Predictions:
        def states(index: list[int], tokens: Tensor) -> Tensor:
            fed = torch.stack([self.masked(number, row) for number, row in zip(index, tokens, strict=True)])
            found: Tensor = model.base_model(input_ids=fed.to(model.device)).last_hidden_state
            chosen = [self.positions(number, row) for number, row in zip(index, tokens, strict=True)]
            return torch.stack([row[some] for row, some in zip(found, chosen, strict=True)]).to(model.device)

        return Predictions(states, head_of(model), model.config.vocab_size)

    def evaluate(
        self,
        model: Predictions,
        rows: TokenRows,
        batch_size: int,
        keep: Callable[[list[int], Tensor], None] | None = None,
    ) -> Quality:
        return language.evaluate(self, model, rows, batch_size, keep)

    def compare(
        self, model: Predictions, baseline: Predictions, rows: TokenRows, batch_size: int, seed: int
    ) -> Comparison:
        return language.compare(self, model, baseline, rows, batch_size, seed)

    def output(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, attention_mask=mask).logits
        return logits

    def divergence(self, output: Tensor, dense: Tensor, rows: Tensor) -> Tensor:
        masked = rows == self.mask_token
        return language.logits_divergence(output[masked], dense[masked])

    def losses_in(self, rows: Tensor) -> int:
        count = int((rows == self.mask_token).sum())
        if not count:
            raise InputError("no token of the calibration rows is masked; make them with Masked.calibration_rows")
        return count

    def loss(self, output: Tensor, rows: Tensor, draw: torch.Generator) -> Tensor:
        """The NLL of tokens drawn from the model's own distributions at the masks: E[g g^T] is its Fisher matrix."""
        return language.drawn_nll(output[rows == self.mask_token], draw)

    def skip(self, rows: Tensor, hidden_size: int, draw: torch.Generator) -> None:
        language.skip_labels(int((rows == self.mask_token).sum()), draw)


def masked_lm(tokenizer: PreTrainedTokenizerBase) -> Masked:
    """Return the task of a masked language model with this tokenizer. Raises InputError if it has no mask token."""
    if tokenizer.mask_token_id is None:
        raise InputError('the tokenizer has no mask token; set it in tokenizer_config.json ("mask_token")')
    return Masked(tokenizer.mask_token_id, tuple(sorted(tokenizer.all_special_ids)))
