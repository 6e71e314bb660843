"""Sentence embeddings: pooling, distance from the baseline, and the price of an error."""

import itertools

import pytest
import torch
from scipy import stats
from torch.nn.functional import cosine_similarity, normalize

from numprune.documents import Document
from numprune.errors import InputError, IntegrityError
from numprune.pooling import POOLINGS
from numprune.quality import compare, evaluate
from numprune.tasks.embedding import Embedding, pool
from tests.conftest import build_tiny, encoder_tokenizer

TASK = Embedding(normalized=True)
TOKENIZER = encoder_tokenizer()
DOCUMENTS = [Document(str(i), f"text {i}: " + "lorem ipsum " * (i % 4 + 1)) for i in range(9)]


def tiny(seed=0):
    return build_tiny("bert", seed=seed, task="embedding")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_ignores_padding(pooling):
    hidden = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    expected = {
        "mean": lambda tokens: tokens.mean(0),
        "cls": lambda tokens: tokens[0],
        "last": lambda tokens: tokens[-1],
        "max": lambda tokens: tokens.amax(0),
        "mean_sqrt_len": lambda tokens: tokens.sum(0) / len(tokens) ** 0.5,
    }[pooling]
    found = pool(hidden, mask, pooling)
    torch.testing.assert_close(found, torch.stack([expected(hidden[0, 2:]), expected(hidden[1, :3])]))


def test_figures_match_their_definition():
    candidate, baseline, rows = tiny(1), tiny(), TASK.heldout_rows(DOCUMENTS, TOKENIZER, 64)
    assert evaluate(candidate, rows, TASK) is None
    with torch.no_grad():
        ours, theirs = (
            torch.cat([model(input_ids=row[None]).last_hidden_state.mean(1) for row in rows.rows])
            for model in (candidate, baseline)
        )
    pairs = list(itertools.combinations(range(len(ours)), 2))
    similar = [[float(cosine_similarity(some[a], some[b], 0)) for a, b in pairs] for some in (ours, theirs)]
    found = compare(candidate, baseline, rows, TASK, batch_size=4)
    assert found.loss_delta.value == pytest.approx(float(1 - cosine_similarity(ours, theirs).mean()), abs=1e-5)
    assert found.metrics == pytest.approx({"similarity_spearman": stats.spearmanr(*similar).statistic}, abs=1e-6)
    assert (found.unit, found.loss_delta.samples, found.candidate) == ("1 - cosine", 9, None)
    same = compare(baseline, tiny(), rows, TASK)
    assert same.loss_delta.value == pytest.approx(0, abs=1e-6)
    assert same.metrics["similarity_spearman"] == pytest.approx(1)


def test_the_loss_prices_an_error_at_what_it_costs_in_cosine():
    """E[(g . dy)^2] / 2 is 1 - cosine, to second order."""
    generator = torch.Generator().manual_seed(0)
    one, error = torch.randn(2, 12, generator=generator)
    error = 0.01 * error
    output = one.expand(4_000, 12).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(TASK.loss(output, torch.zeros(4_000, 4), generator), output)
    cost = 1 - cosine_similarity(one.double(), (one + error).double(), 0)
    assert float((gradient @ error).square().mean()) / 2 == pytest.approx(float(cost), rel=0.09)  # four standard errors


def test_embeddings_that_are_not_finite_are_refused():
    model, rows = tiny(), TASK.heldout_rows(DOCUMENTS, TOKENIZER, 64)
    model.embeddings.LayerNorm.bias.data[0] = torch.inf
    with pytest.raises(IntegrityError, match="zero or not finite"):
        compare(model, tiny(), rows, TASK)


def test_normalized_embeddings_have_length_1():
    tokens = TASK.heldout_rows(DOCUMENTS, TOKENIZER, 64).rows[0][None]
    with torch.no_grad():
        raw, unit = (
            task.output(tiny(), tokens, torch.ones_like(tokens)) for task in (Embedding(), Embedding(normalized=True))
        )
    torch.testing.assert_close(normalize(raw, dim=-1), unit)


def test_texts_are_not_joined():
    with pytest.raises(InputError, match="texts cannot be joined"):
        TASK.heldout_rows(DOCUMENTS, TOKENIZER, 64, pack=True)
