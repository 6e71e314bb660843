"""Masked language models: which tokens are masked, and figures by definition."""

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from numprune.documents import Document
from numprune.errors import InputError
from numprune.quality import compare, evaluate
from numprune.tasks.masked import masked_lm
from tests.conftest import build_tiny, byte_tokenizer, encoder_tokenizer

TOKENIZER = encoder_tokenizer()
TASK = masked_lm(TOKENIZER)
DOCUMENTS = [Document(str(i), f"document {i}: " + "lorem ipsum dolor " * (i % 4 + 1)) for i in range(12)]
CLS, SEP, MASK = 256, 257, 258


def log_probabilities(model, rows, index):
    """(P, V) at the row's masked positions, and the tokens that are there."""
    row = rows.rows[index]
    positions = TASK.positions(index, row)
    fed = row.clone()
    fed[positions] = MASK
    with torch.no_grad():
        return model(input_ids=fed[None]).logits[0, positions].log_softmax(-1), row[positions]


def test_figures_match_their_definition():
    candidate, baseline = build_tiny("bert", seed=1), build_tiny("bert")
    rows = TASK.heldout_rows(DOCUMENTS, TOKENIZER, 32)
    nll, baseline_nll, kl, agree, count = 0.0, 0.0, 0.0, 0, 0
    for index in range(len(rows.rows)):
        (ours, targets), (theirs, _) = (log_probabilities(model, rows, index) for model in (candidate, baseline))
        nll -= float(ours.gather(1, targets[:, None]).sum())
        baseline_nll -= float(theirs.gather(1, targets[:, None]).sum())
        kl += float(kl_div(ours, theirs, log_target=True, reduction="sum"))
        agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        count += len(targets)
    alone = evaluate(candidate, rows, TASK, batch_size=3)
    found = compare(candidate, baseline, rows, TASK, batch_size=4)
    assert alone.count == found.candidate.count == count
    assert alone.mean_nll == pytest.approx(nll / count, rel=1e-5)
    assert found.loss_delta.value == pytest.approx((nll - baseline_nll) / count, abs=1e-5)
    assert found.metrics == pytest.approx(
        {"kl_nats_per_masked_token": kl / count, "top1_agreement": agree / count}, rel=1e-4
    )
    assert (found.unit, found.loss_delta.samples) == ("nats/masked token", 12)


def test_15_percent_of_a_row_is_masked_without_special_tokens():
    rows = TASK.heldout_rows(DOCUMENTS, TOKENIZER, 40)
    masked = TASK.calibration_rows(DOCUMENTS, TOKENIZER, 40)
    assert len({tuple(TASK.positions(index, rows.rows[0]).tolist()) for index in range(20)}) > 15
    for index, (row, fed) in enumerate(zip(rows.rows, masked.rows, strict=True)):
        positions = TASK.positions(index, row)
        assert len(positions) == max(1, round(0.15 * len(row)))
        assert not torch.isin(row[positions], torch.tensor([CLS, SEP, MASK])).any()
        assert torch.equal((fed == MASK).nonzero()[:, 0], positions)
        assert torch.equal(fed[fed != MASK], row[fed != MASK])


def test_packed_rows_are_scored_document_by_document():
    texts = [Document(str(i), "lorem ipsum dolor"[: 3 + 2 * (i % 5)]) for i in range(12)]
    rows = TASK.heldout_rows(texts, TOKENIZER, 32, pack=True)
    assert all((row[0], row[-1]) == (CLS, SEP) for row in rows.rows)
    owner = [index for index, text in enumerate(texts) for _ in [*text.text, "[SEP]"]][:-1]
    expected = np.zeros(len(texts))
    start = 0
    for index, row in enumerate(rows.rows):
        inside = owner[start : start + len(row) - 2]
        of_row = [inside[0], *inside, inside[-1]]
        for position in TASK.positions(index, row).tolist():
            expected[of_row[position]] += 1
        start += len(inside)
    np.testing.assert_array_equal(np.bincount(rows.document, TASK.scored(rows)), expected)


def test_calibration_rows_without_masks_are_refused():
    rows = TASK.heldout_rows(DOCUMENTS, TOKENIZER, 16)
    with pytest.raises(InputError, match="no token of the calibration rows is masked"):
        TASK.losses_in(rows.rows[0][None])


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(InputError, match="no mask token"):
        masked_lm(byte_tokenizer())
