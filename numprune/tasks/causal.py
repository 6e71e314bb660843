"""Causal language models: the NLL of each token given the preceding ones."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.anatomy import predicted_tokens
from numprune.corpus import Pack, TokenRows, token_rows
from numprune.documents import Document
from numprune.tasks import language
from numprune.tasks.task import Comparison, Predictions, Quality, TaskName, head_of
from numprune.units import LOSS_UNITS


class Causal:
    """A causal language model (numprune.tasks.Task). All tokens of a row except the first are scored."""

    name: ClassVar[TaskName] = "causal-lm"
    unit: ClassVar[str] = LOSS_UNITS["causal-lm"]
    kl: ClassVar[str] = "kl_nats_per_token"
    generates: ClassVar[bool] = True
    prompted: ClassVar[bool] = True
    pooled: ClassVar[bool] = False

    def calibration_rows(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack = "auto"
    ) -> TokenRows:
        return token_rows(documents, tokenizer, length, pack)

    heldout_rows = calibration_rows

    def predictions_in(self, length: int) -> int:
        return length - 1

    def scored(self, rows: TokenRows) -> np.ndarray:
        return rows.scored

    def targets(self, rows: TokenRows, index: list[int], tokens: Tensor) -> Tensor:
        return tokens[:, 1:]

    def add(self, sums: np.ndarray, rows: TokenRows, index: list[int], values: np.ndarray) -> None:
        rows.add(sums, index, values)

    def has_loss(self, rows: TokenRows) -> bool:
        return True

    def predictions(self, model: PreTrainedModel) -> Predictions:
        def states(_: list[int], tokens: Tensor) -> Tensor:
            found: Tensor = model.base_model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state
            return found[:, :-1].to(model.device)

        return Predictions(states, head_of(model), predicted_tokens(model.config))

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
        logits: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return logits

    def divergence(self, output: Tensor, dense: Tensor, rows: Tensor) -> Tensor:
        return language.logits_divergence(output[:, :-1], dense[:, :-1])

    def losses_in(self, rows: Tensor) -> int:
        return rows.numel()

    def loss(self, output: Tensor, rows: Tensor, draw: torch.Generator) -> Tensor:
        """The NLL of the text itself."""
        logits, targets = output[:, :-1].float(), rows[:, 1:].to(output.device)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def skip(self, rows: Tensor, hidden_size: int, draw: torch.Generator) -> None:
        """Nothing is drawn."""


CAUSAL = Causal()
