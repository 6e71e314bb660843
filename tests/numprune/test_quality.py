import gc
import math
import weakref

import numpy as np
import pytest
import torch
from scipy import stats

from numprune.anatomy import FAMILIES
from numprune.bootstrap import _spread, bootstrap_mean
from numprune.corpus import TokenRows, token_rows
from numprune.documents import Document
from numprune.errors import InputError, IntegrityError
from numprune.quality import compare, evaluate
from numprune.tasks import CAUSAL, task
from numprune.tasks.task import head_of
from tests.conftest import build_tiny, byte_tokenizer


def text_rows(documents=25, length=32):
    texts = [Document(str(i), f"document {i}: " + "lorem ipsum dolor " * (i % 5 + 1)) for i in range(documents)]
    return token_rows(texts, byte_tokenizer(), length)


def test_perplexity_matches_its_definition():
    model, rows = build_tiny(), text_rows(4)
    total, count = 0.0, 0
    for row in rows.rows:
        logits = model(row[None]).logits[0].detach()
        for position in range(1, len(row)):
            total -= float(logits[position - 1].log_softmax(-1)[row[position]])
            count += 1
    found = evaluate(model, rows, batch_size=3)
    assert found.count == count
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_model_against_itself_has_no_difference():
    rows = text_rows()
    result = compare(build_tiny(), build_tiny(), rows)
    assert result.metrics["kl_nats_per_token"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["top1_agreement"] == 1
    delta = result.loss_delta
    assert (delta.value, delta.ci95_upper, delta.samples, delta.sampling_unit) == (0, 0, 25, "document")


def test_comparison_agrees_with_two_evaluations_and_a_direct_kl():
    candidate, baseline, rows = build_tiny(seed=1), build_tiny(), text_rows()
    result = compare(candidate, baseline, rows, batch_size=4)
    delta = evaluate(candidate, rows).mean_nll - evaluate(baseline, rows).mean_nll
    assert result.loss_delta.value == pytest.approx(delta, abs=1e-6)
    assert result.loss_delta.exponential.value == pytest.approx(math.exp(delta), rel=1e-5)
    assert result.loss_delta.interval95[0] < delta < result.loss_delta.interval95[1]
    kl, agree, count = 0.0, 0, 0
    for row in rows.rows:
        with torch.no_grad():
            p, q = (model(row[None]).logits[0, :-1].log_softmax(-1) for model in (baseline, candidate))
        kl += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(row) - 1
    assert result.metrics["kl_nats_per_token"] == pytest.approx(kl / count, rel=1e-4)
    assert result.metrics["top1_agreement"] == pytest.approx(agree / count)


@pytest.mark.parametrize("positions", [1, 7, 10_000])
def test_figures_do_not_depend_on_the_logit_chunk_size(monkeypatch, positions):
    candidate, baseline, rows = build_tiny("qwen2", seed=1), build_tiny("qwen2"), text_rows(6)
    whole = compare(candidate, baseline, rows)
    sizes = []
    for model in (candidate, baseline):
        model.lm_head.register_forward_hook(lambda _, __, logits: sizes.append(logits.numel()))
    monkeypatch.setattr(task, "MAXIMUM_VALUES", 259 * positions)
    parts = compare(candidate, baseline, rows)
    np.testing.assert_allclose(parts.candidate.nll, whole.candidate.nll, rtol=1e-6)
    np.testing.assert_allclose(parts.baseline.nll, whole.baseline.nll, rtol=1e-6)
    assert parts.metrics["kl_nats_per_token"] == pytest.approx(whole.metrics["kl_nats_per_token"], rel=1e-5)
    assert parts.metrics["top1_agreement"] == whole.metrics["top1_agreement"]
    np.testing.assert_allclose(evaluate(candidate, rows).nll, whole.candidate.nll, rtol=1e-6)
    assert max(sizes) <= 259 * positions


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *(
            (family, {"tie_word_embeddings": tied})
            for family, one in FAMILIES.items()
            if not one.patches
            for tied in one.requires.get("tie_word_embeddings", (False, True))
        ),
        ("granite", {"logits_scaling": 7.0}),  # the logits are divided
        ("gemma2", {"final_logit_softcapping": 2.0, "sliding_window": 8}),  # and capped
    ],
)
@torch.no_grad()
def test_the_head_matches_the_model_s_own_forward_pass(family, overrides):
    model, tokens = build_tiny(family, **overrides), torch.arange(20).view(2, 10)
    found = CAUSAL.predictions(model)
    hidden = found.states([0, 1], tokens)
    assert hidden.shape == (2, 9, 64)
    torch.testing.assert_close(found.head(hidden.flatten(0, 1)), model(tokens).logits[:, :-1].flatten(0, 1))


def test_a_head_keeps_no_other_part_of_its_model_alive():
    model = build_tiny()
    layer = weakref.ref(model.model.layers[0])
    head = head_of(model)
    del model
    gc.collect()
    assert layer() is None
    assert head(torch.zeros(3, 64)).shape == (3, 259)


def test_documents_are_the_sampling_unit_only_if_there_are_enough():
    few = compare(build_tiny(seed=1), build_tiny(), text_rows(4)).loss_delta
    assert few.sampling_unit == "window"
    assert few.samples == len(text_rows(4).rows)


def test_packed_rows_are_compared_document_by_document():
    """A row of several documents: what each adds to the sums is its own tokens, counted here one by one."""
    texts = [Document(str(i), "lorem ipsum dolor"[: 3 + 2 * (i % 5)]) for i in range(12)]
    rows = token_rows(texts, byte_tokenizer(), 32)
    assert rows.packed
    assert len(rows.rows) < len(texts)
    candidate, baseline = build_tiny(seed=1), build_tiny()
    sums, counts = np.zeros(len(texts)), np.zeros(len(texts))
    stream = [index for index, text in enumerate(texts) for _ in [*text.text, "eos"]][:-1]
    for number, row in enumerate(rows.rows):
        with torch.no_grad():
            ours, theirs = (model(row[None]).logits[0].log_softmax(-1) for model in (candidate, baseline))
        for position in range(1, len(row)):
            document = stream[32 * number + position]
            sums[document] += float(theirs[position - 1, row[position]] - ours[position - 1, row[position]])
            counts[document] += 1
    result = compare(candidate, baseline, rows, batch_size=2)
    expected = bootstrap_mean(sums, counts, "document")
    delta = result.loss_delta
    assert (delta.samples, delta.sampling_unit, result.documents) == (12, "document", 12)
    assert result.candidate.count == counts.sum() == len(stream) - len(rows.rows)
    assert delta.value == pytest.approx(expected.value, abs=1e-5)
    assert delta.interval95 == pytest.approx(expected.interval95, abs=1e-5)
    assert evaluate(candidate, rows).nll.sum() == pytest.approx(result.candidate.nll.sum())

    few = token_rows(texts[:4], byte_tokenizer(), 8)
    delta = compare(candidate, baseline, few).loss_delta
    assert (delta.sampling_unit, delta.samples) == ("window", len(few.rows))


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


def test_bounds_over_few_units_are_studentized_and_wider_for_skewed_units():
    generator = np.random.default_rng(1)
    counts = np.full(8, 10)
    x = generator.normal(0.0, 1.0, 8)
    x = np.concatenate([x, -x])  # as symmetric as can be
    low, high = stats.t.interval(0.90, 15, loc=0, scale=stats.sem(x))
    symmetric = bootstrap_mean(10 * x, np.full(16, 10), "document")
    assert symmetric.ci95_lower == pytest.approx(low, rel=0.15)
    assert symmetric.ci95_upper == pytest.approx(high, rel=0.15)
    assert symmetric.ci95_upper - symmetric.ci95_lower >= 0.999 * (high - low)  # never narrower

    skewed = bootstrap_mean(10 * x[:8] ** 4, counts, "document")
    assert skewed.ci95_upper - skewed.value > 1.3 * (skewed.value - skewed.ci95_lower)
    mirrored = bootstrap_mean(-10 * x[:8] ** 4, counts, "document")
    assert mirrored.ci95_lower == pytest.approx(-skewed.ci95_upper)
    assert mirrored.interval95[0] == pytest.approx(-skewed.interval95[1])


@pytest.mark.slow
def test_one_long_document_dominates_the_mean_but_not_the_certainty():
    """One document with nine tenths of the tokens: the mean rests on little more than one sample."""
    generator = np.random.default_rng(2)
    counts = np.array([5000, *[80] * 7])
    missed = 0
    for _ in range(600):
        deltas = generator.normal(0, 0.05, 8)  # the truth is 0
        missed += bootstrap_mean(deltas * counts, counts, "document").ci95_upper < 0
    assert missed <= 0.05 * 600


def test_spread_is_unbiased_with_satterthwaite_degrees_of_freedom():
    generator = np.random.default_rng(3)
    n, draws = 12, 200_000
    lengths = np.exp(generator.normal(size=n))
    lengths /= lengths.mean()
    sums = generator.normal(size=(draws, n)) * lengths  # each document differs by an amount of its own, of sd 1
    value = sums.sum(1) / n
    squared = np.array([_spread(row, lengths) for row in (sums - value[:, None] * lengths)[:5000]])
    variance = (lengths**2).sum() / n**2
    assert (squared[:, 0] ** 2).mean() == pytest.approx(variance, rel=0.05)
    # Var[s^2] = 2 variance^2 / f defines f.
    assert 2 * variance**2 / (squared[:, 0] ** 2).var() == pytest.approx(squared[0, 1], rel=0.1)
    assert squared[0, 1] < n - 1
    assert _spread(sums[0], np.ones(n))[1] == pytest.approx(n - 1)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_very_few_units_give_wide_bounds(n):
    estimate = bootstrap_mean(np.arange(1.0, n + 1), np.full(n, 2), "document")
    spread = np.arange(1.0, n + 1).std(ddof=1) / 2 / math.sqrt(n)
    assert spread * stats.t.ppf(0.95, n - 1) * 0.999 <= estimate.ci95_upper - estimate.value < math.inf


def test_a_single_window_gives_no_bounds():
    estimate = bootstrap_mean(np.array([1.0]), np.array([4]), "window")
    assert estimate.value == 0.25
    assert estimate.ci95_upper == math.inf


def test_unscorable_input_is_refused():
    model = build_tiny()
    with pytest.raises(InputError, match="token 400 is outside the model's vocabulary of 259"):
        evaluate(model, TokenRows([torch.tensor([1, 400])], [0], ["a"], ""))
    with pytest.raises(InputError, match="sequence length 300 exceeds the model's context of 256"):
        evaluate(model, TokenRows([torch.zeros(300, dtype=torch.long)], [0], ["a"], ""))
    with pytest.raises(InputError, match="vocabularies differ"):
        compare(model, build_tiny(vocab_size=300), text_rows(2))


def test_a_nan_model_is_an_error():
    model = build_tiny()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(IntegrityError, match="not finite"):
        evaluate(model, text_rows(2))
