"""Quality on held-out text: NLL and perplexity, and what pruning changed, with an interval over documents.

Perplexity: the text's tokens in consecutive windows of the sequence length, no overlap, the first token of a window not
scored; exp of the mean NLL.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from numprune.corpus import TokenRows
from numprune.errors import InputError, IntegrityError
from numprune.progress import Progress

# Logits are computed for a few positions at a time, so that memory depends neither on the batch nor on the vocabulary:
# 2^23 of them are 32 MiB. A batch of 8 rows of 512 tokens has 805 MB of them where there are 49,152 words.
_LOGITS = 1 << 23

# Fewer documents bound nothing that is of use. Windows take their place, which say something of this text alone: those
# of one document are alike.
MINIMUM_DOCUMENTS = 5
_DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    Attributes:
        value: the estimate.
        ci95_lower, ci95_upper: one-sided 95 % confidence bounds.
        interval95: the two-sided 95 % interval.
        samples: how many sampling units it rests on.
        sampling_unit: "document", or "window" where there are too few documents.
    """

    value: float
    ci95_lower: float
    ci95_upper: float
    interval95: tuple[float, float]
    samples: int
    sampling_unit: str


@dataclass(frozen=True)
class Distributions:
    """The next-token distributions of a model on token rows, as what they are computed from.

    Attributes:
        hidden: row indices (n,) and their tokens (n, S) to what enters the head, (n, S-1, H).
        head: hidden states (p, H) to logits (p, V).
        vocabulary: V.
    """

    hidden: Callable[[list[int], Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    vocabulary: int

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return (p, V) in float32 of hidden states (p, H)."""
        return self.head(hidden).float().log_softmax(-1)


@dataclass(frozen=True)
class Quality:
    """NLL of one model, by span: what a row has of one document (a window, where rows are not packed).

    Attributes:
        nll: (spans,) summed NLL in nats, float64.
        scored: (spans,) tokens scored.
    """

    nll: np.ndarray
    scored: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.scored.sum())

    @property
    def nll_nats_per_token(self) -> float:
        return float(self.nll.sum() / self.scored.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll_nats_per_token)


@dataclass(frozen=True)
class Comparison:
    """A candidate against its baseline on the same tokens.

    Attributes:
        documents: how many the text has.
        kl_nats_per_token: mean KL(baseline || candidate) of the next-token distributions.
        top1_agreement: share of positions where both put the same token first.
        nll_delta_nats_per_token: mean NLL(candidate) - NLL(baseline), paired by token.
    """

    candidate: Quality
    baseline: Quality
    documents: int
    kl_nats_per_token: float
    top1_agreement: float
    nll_delta_nats_per_token: Estimate

    @property
    def perplexity_ratio(self) -> Estimate:
        """exp of the NLL difference, its bounds too: exp is monotone."""
        delta = self.nll_delta_nats_per_token
        low, high = delta.interval95
        return Estimate(
            math.exp(delta.value),
            math.exp(delta.ci95_lower),
            math.exp(delta.ci95_upper),
            (math.exp(low), math.exp(high)),
            delta.samples,
            delta.sampling_unit,
        )


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    rows: TokenRows,
    batch_size: int = 8,
    keep: Callable[[list[int], Tensor], None] | None = None,
) -> Quality:
    """Return the NLL of `model` on `rows`.

    Args:
        keep: is called with each batch's row indices and hidden states, which `Distributions.hidden` can give back.

    Raises:
        InputError: a token is outside the vocabulary, or a row longer than the model's context.
        IntegrityError: the model gives logits that are not finite.
    """
    check_rows_fit(model, rows)
    found = distributions(model)
    nll = np.zeros(len(rows.document))
    for index, tokens in batches(rows, batch_size, "evaluate"):
        hidden = found.hidden(index, tokens)
        if keep is not None:
            keep(index, hidden)
        parts = _parts(found.vocabulary, hidden, tokens[:, 1:].to(hidden.device))
        by_token = torch.cat([_token_nll(found.log_probabilities(states), targets) for states, targets in parts])
        rows.add(nll, index, by_token.view(len(index), -1).cpu().numpy())
    return Quality(nll, rows.scored)


def compare(
    model: PreTrainedModel, baseline: PreTrainedModel, rows: TokenRows, *, batch_size: int = 8, seed: int = 0
) -> Comparison:
    """Return how `model` differs from `baseline` on `rows`; raises as `evaluate` does."""
    check_rows_fit(baseline, rows)
    return compare_with(model, distributions(baseline), rows, batch_size=batch_size, seed=seed)


@torch.inference_mode()
def compare_with(
    model: PreTrainedModel, baseline: Distributions, rows: TokenRows, *, batch_size: int = 8, seed: int = 0
) -> Comparison:
    """`compare` with a baseline whose hidden states on `rows` are known already."""
    check_rows_fit(model, rows)
    candidate = distributions(model)
    if candidate.vocabulary != baseline.vocabulary:
        raise InputError(f"vocabularies differ: {candidate.vocabulary} and {baseline.vocabulary} (baseline)")
    nll, baseline_nll, kl, agree = sums = np.zeros((4, len(rows.document)))
    for index, tokens in batches(rows, batch_size, "compare"):
        ours, theirs = candidate.hidden(index, tokens), baseline.hidden(index, tokens)
        parts = _parts(baseline.vocabulary, ours, theirs, tokens[:, 1:].to(ours.device))
        by_token = torch.cat(
            [
                _differences(candidate.log_probabilities(one), baseline.log_probabilities(other), targets)
                for one, other, targets in parts
            ],
            dim=1,
        )
        for total, values in zip(sums, by_token.view(4, len(index), -1).cpu().numpy(), strict=True):
            rows.add(total, index, values)
    scored, delta = rows.scored, nll - baseline_nll
    unit = "document" if rows.documents >= MINIMUM_DOCUMENTS else "window"
    units = rows.document if unit == "document" else rows.row
    of_units, counts = np.bincount(units, delta), np.bincount(units, scored)
    return Comparison(
        candidate=Quality(nll, scored),
        baseline=Quality(baseline_nll, scored),
        documents=rows.documents,
        kl_nats_per_token=float(kl.sum() / scored.sum()),
        top1_agreement=float(agree.sum() / scored.sum()),
        nll_delta_nats_per_token=bootstrap_mean(of_units[counts > 0], counts[counts > 0], unit, seed),
    )


def bootstrap_mean(sums: np.ndarray, counts: np.ndarray, unit: str, seed: int = 0) -> Estimate:
    """Return sum(sums) / sum(counts) with confidence bounds over the sampling units.

    A unit's weight is its length, so a few long documents can decide, and differences of documents are skewed: to what
    gets worse there is no end. The percentile bootstrap minds neither: over 20 documents like those of the embedded
    text its one-sided 95 % bound is below the truth more than one time in ten (counted by
    `python -m numprune.flows.studies.error_rates`). So the bound is studentized,

        value + max(-q, t(n - 1)) * t(f) / t(n - 1) * s

    with s and f as in `_spread` (what few long units are worth), t(f) Student's quantile of f degrees of freedom, and q
    the opposite quantile of (resampled mean - value) / its own standard error over 10,000 draws of the units, which is
    how skewed they are (the bootstrap-t: Efron and Tibshirani, An Introduction to the Bootstrap, 12.5; to second order
    correct). The lower bounds mirror it. With many units of about one length it is the percentile interval again.

    Args:
        sums: (n,) of the quantity in each unit.
        counts: (n,) tokens in each unit, positive.
        unit: what a unit is, for the record.
        seed: of the draws.

    With a single unit nothing is known of the spread: the bounds are infinite, and no gate on them can pass.
    """
    n = len(sums)
    value = float(sums.sum() / counts.sum())
    if n < 2:
        return Estimate(value, -math.inf, math.inf, (-math.inf, math.inf), n, unit)
    lengths = counts / counts.mean()
    residuals = sums / counts.mean() - value * lengths  # (n,) zero in all, and where a unit is like the mean
    spread, freedom = _spread(residuals, lengths)
    drawn = _studentized(residuals, lengths, seed)

    def distance(probability: float, quantile: float) -> float:
        student = special.stdtrit(n - 1, probability)
        return float(max(quantile, student) * special.stdtrit(freedom, probability) / student * spread)

    low, lower, upper, high = np.quantile(drawn, [0.025, 0.05, 0.95, 0.975]).tolist() if len(drawn) else [0.0] * 4
    return Estimate(
        value,
        value - distance(0.95, upper),
        value + distance(0.95, -lower),
        (value - distance(0.975, high), value + distance(0.975, -low)),
        n,
        unit,
    )


def _spread(residuals: np.ndarray, lengths: np.ndarray) -> tuple[float, float]:
    """Return the standard error of a mean weighted by length, and its degrees of freedom.

    The sandwich estimator made unbiased, and Satterthwaite's degrees of freedom, where a unit's sum has a variance
    proportional to its squared length, as when each document differs by an amount of its own (Bell and McCaffrey,
    Survey Methodology 28, 2002). With equal lengths they are the usual s / sqrt(n) and n - 1.

    Args:
        residuals: (n,) sum - mean * length, of each unit.
        lengths: (n,) positive, of mean 1.
    """
    n = len(lengths)
    h = lengths / n  # share of each unit
    v = h * h
    total = v.sum()
    # E[residual_i residual_j] is [i = j] v_i + o_ij with o_ij = h_i h_j total - v_i h_j - h_i v_j.
    own = total * v - 2 * v * h
    a = v / (v + own)
    spread = math.sqrt((a * residuals**2).sum()) / n
    vv, vh, hh = (a * v * v).sum(), (a * v * h).sum(), (a * v).sum()
    crossed = 2 * vv * hh + 2 * vh * vh + (hh * total) ** 2 - 4 * vh * hh * total  # sum over i, j of a_i a_j o_ij^2
    squared = crossed + (v * v - (a * own) ** 2).sum()
    return spread, max(total * total / squared, 1.0)


def _studentized(residuals: np.ndarray, lengths: np.ndarray, seed: int) -> np.ndarray:
    """Return (resampled mean - mean) / its standard error, of each draw that has one."""
    n = len(lengths)
    generator = np.random.default_rng(seed)
    columns = np.stack([residuals, lengths, residuals**2, residuals * lengths, lengths**2], axis=1)
    chunk = max(1, 2_000_000 // n)
    drawn = []
    for start in range(0, _DRAWS, chunk):
        rows = min(chunk, _DRAWS - start)
        units = generator.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(units.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        e, c, ee, ec, cc = (times @ columns).T
        shift = e / c
        squared = (ee - 2 * shift * ec + shift**2 * cc) * n / (n - 1)
        sound = squared > 1e-12 * ee  # else one unit was drawn over and over
        drawn.append(shift[sound] * c[sound] / np.sqrt(squared[sound]))
    return np.concatenate(drawn)


def check_rows_fit(model: PreTrainedModel, rows: TokenRows) -> None:
    """Raises InputError where the tokens cannot be this model's, or a row is longer than its context."""
    largest = max(int(row.max()) for row in rows.rows)
    if largest >= model.config.vocab_size:
        raise InputError(
            f"token {largest} is outside the model's vocabulary of {model.config.vocab_size}: "
            "the tokenizer is not this model's"
        )
    longest = max(map(len, rows.rows))
    if longest > model.config.max_position_embeddings:
        raise InputError(
            f"sequence length {longest} is over the model's context of {model.config.max_position_embeddings}; "
            "give a shorter one"
        )


def batches(rows: TokenRows, batch_size: int, title: str) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (window indices, tokens (n, S)), rows of one length together so that none is padded."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows.rows):
        by_length.setdefault(len(row), []).append(index)
    with Progress(len(rows.rows), title, "window") as bar:
        for length in sorted(by_length, reverse=True):
            indices = by_length[length]
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                yield batch, torch.stack([rows.rows[index] for index in batch])
                bar.update(len(batch))


def distributions(model: PreTrainedModel) -> Distributions:
    """The distributions of a model in memory."""

    def hidden(_: list[int], tokens: Tensor) -> Tensor:
        states: Tensor = model.base_model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state
        return states[:, :-1]

    return Distributions(hidden, head_of(model), model.config.vocab_size)


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What `model` does with its last hidden states, without the rest of it: (p, H) to logits (p, V).

    It is the model's own forward with a decoder that passes on what it is given. So whatever a family does beside the
    product with the output matrix (scale the logits, cap them) is done, too.
    """
    head = copy.copy(model)  # of the module alone: its parts are shared
    head._modules = {**model._modules, model.base_model_prefix: _Passing()}

    def logits(hidden: Tensor) -> Tensor:
        found: Tensor = head(inputs_embeds=hidden[None], use_cache=False).logits
        return found[0]

    return logits


class _Passing(nn.Module):
    """Stands for a decoder whose last hidden states are known."""

    @property
    def decoder(self) -> nn.Module:
        """Itself: some models call the decoder inside their base model."""
        return self

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def _parts(vocabulary: int, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield `values`, (n, S-1, …) each, as parts (p, …) whose logits fit into memory."""
    positions = max(1, _LOGITS // vocabulary)
    return zip(*(value.flatten(0, 1).split(positions) for value in values), strict=True)


def _token_nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the NLL of each target, (p,) in nats, float64 so that long sums stay exact.

    One logit that is NaN or infinite makes every probability of its position NaN, or the right token's zero; either way
    its NLL is not finite, and looking at that is cheaper than looking at all logits.
    """
    nll = -log_probabilities.gather(-1, targets[:, None])[:, 0].double()
    if not torch.isfinite(nll).all():
        raise IntegrityError("the model's probabilities are not finite; its weights are damaged or overflow")
    return nll


def _differences(ours: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
    """Return (4, p) float64 of log-probabilities (p, V): NLL of ours, of theirs, KL(theirs || ours), same top token."""
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    agree = ours.argmax(-1) == theirs.argmax(-1)
    return torch.stack([_token_nll(ours, targets), _token_nll(theirs, targets), kl.double(), agree.double()])
