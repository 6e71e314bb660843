import math

import numpy as np
import pytest
import torch

from numprune.corpus import Document, TokenRows, token_rows
from numprune.errors import InputError, IntegrityError
from numprune.quality import bootstrap_mean, compare, evaluate
from tests.conftest import build_tiny, byte_tokenizer


def text_rows(documents=25, length=32):
    texts = [Document(str(i), f"document {i}: " + "lorem ipsum dolor " * (i % 5 + 1)) for i in range(documents)]
    return token_rows(texts, byte_tokenizer(), length)


def test_perplexity_is_that_of_the_definition():
    model, rows = build_tiny(), text_rows(4)
    total, count = 0.0, 0
    for row in rows.rows:
        logits = model(row[None]).logits[0].detach()
        for position in range(1, len(row)):
            total -= float(logits[position - 1].log_softmax(-1)[row[position]])
            count += 1
    quality = evaluate(model, rows, batch_size=3)
    assert quality.tokens == count
    assert quality.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_model_against_itself_differs_in_nothing():
    rows = text_rows()
    result = compare(build_tiny(), build_tiny(), rows)
    assert result.kl_nats_per_token == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1
    delta = result.nll_delta_nats_per_token
    assert (delta.value, delta.ci95_upper, delta.samples, delta.sampling_unit) == (0, 0, 25, "document")


def test_comparison_agrees_with_two_evaluations_and_a_direct_kl():
    candidate, baseline, rows = build_tiny(seed=1), build_tiny(), text_rows()
    result = compare(candidate, baseline, rows, batch_size=4)
    delta = evaluate(candidate, rows).nll_nats_per_token - evaluate(baseline, rows).nll_nats_per_token
    assert result.nll_delta_nats_per_token.value == pytest.approx(delta, abs=1e-6)
    assert result.perplexity_ratio.value == pytest.approx(math.exp(delta), rel=1e-5)
    assert result.nll_delta_nats_per_token.interval95[0] < delta < result.nll_delta_nats_per_token.interval95[1]
    kl, agree, count = 0.0, 0, 0
    for row in rows.rows:
        with torch.no_grad():
            p, q = (model(row[None]).logits[0, :-1].log_softmax(-1) for model in (baseline, candidate))
        kl += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(row) - 1
    assert result.kl_nats_per_token == pytest.approx(kl / count, rel=1e-4)
    assert result.top1_agreement == pytest.approx(agree / count)


def test_documents_are_the_sampling_unit_only_when_there_are_enough():
    few = compare(build_tiny(seed=1), build_tiny(), text_rows(19)).nll_delta_nats_per_token
    assert few.sampling_unit == "window"
    assert few.samples == len(text_rows(19).rows)


def test_bootstrap_is_close_to_the_normal_interval_and_seeded():
    generator = np.random.default_rng(0)
    counts = np.full(400, 10)
    sums = generator.normal(1.0, 2.0, 400)
    estimate = bootstrap_mean(sums, counts, "document", seed=3)
    spread = sums.std() / 10 / math.sqrt(400)
    assert estimate.value == pytest.approx(sums.mean() / 10)
    assert estimate.ci95_upper == pytest.approx(estimate.value + 1.645 * spread, abs=0.15 * spread)
    assert estimate.ci95_lower == pytest.approx(estimate.value - 1.645 * spread, abs=0.15 * spread)
    assert estimate.interval95[1] == pytest.approx(estimate.value + 1.96 * spread, abs=0.15 * spread)
    assert estimate == bootstrap_mean(sums, counts, "document", seed=3)


def test_one_document_of_one_window_bounds_nothing():
    estimate = bootstrap_mean(np.array([1.0]), np.array([4]), "window")
    assert estimate.value == 0.25
    assert estimate.ci95_upper == math.inf


def test_what_cannot_be_scored_is_refused():
    model = build_tiny()
    with pytest.raises(InputError, match="token 400 is outside the model's vocabulary of 259"):
        evaluate(model, TokenRows([torch.tensor([1, 400])], [0], ["a"], ""))
    with pytest.raises(InputError, match="sequence length 300 is over the model's context of 256"):
        evaluate(model, TokenRows([torch.zeros(300, dtype=torch.long)], [0], ["a"], ""))
    with pytest.raises(InputError, match="vocabularies differ"):
        compare(model, build_tiny(vocab_size=300), text_rows(2))


def test_a_model_of_nan_is_an_error_not_a_figure():
    model = build_tiny()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(IntegrityError, match="not finite"):
        evaluate(model, text_rows(2))
