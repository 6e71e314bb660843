"""Generated text: the model's own distribution, identical after a kill, and never more than requested."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from numprune.corpus import token_rows
from numprune.documents import Document
from numprune.errors import InputError
from numprune.recovery import generated
from numprune.recovery.generated import BATCH_SIZE, KeptAnswers, Prompts, generate_rows
from numprune.recovery.options import RecoveryOptions
from numprune.recovery.rows import draw_rows, window_digests
from tests.conftest import build_tiny, byte_tokenizer

PROMPTS = Prompts([[5, 6, 7], [8]], ends=[2], separator=2)
LENGTH = 24
DRAWS = 1000


def test_rows_hold_prompts_and_answers_in_turn() -> None:
    found = generate_rows(build_tiny(), PROMPTS, 60, LENGTH, seed=0)
    assert [len(row) for row in found.rows.rows] == [LENGTH] * 60
    text = torch.cat(found.rows.rows).tolist()
    pieces, piece = [], []
    for token in text:
        piece.append(token)
        if token == 2:
            pieces.append(piece)
            piece = []
    assert all(one[: len(PROMPTS.tokens[place % 2])] == PROMPTS.tokens[place % 2] for place, one in enumerate(pieces))
    assert max(map(len, pieces)) <= LENGTH + 1
    assert found.answers % BATCH_SIZE == 0
    assert 0 < 60 * LENGTH - 3 * found.answers < found.tokens


def test_answers_are_drawn_from_the_models_distribution() -> None:
    model = build_tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # so that some tokens are much more likely
        expected = model(torch.tensor([[8]])).logits[0, -1].softmax(-1)
    prompts = Prompts([[8]], ends=[], separator=None)
    found = generate_rows(model, prompts, DRAWS, 2, seed=1)
    drawn = Counter(int(row[1]) for row in found.rows.rows)
    for token in expected.topk(3).indices.tolist():
        chance = float(expected[token])
        assert abs(drawn[token] / DRAWS - chance) < 4 * (chance * (1 - chance) / DRAWS) ** 0.5


def test_the_seed_decides_and_the_answers_of_a_killed_process_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = build_tiny(), KeptAnswers(tmp_path, "x")
    wanted = generate_rows(model, PROMPTS, 80, LENGTH, seed=0)
    assert generate_rows(model, PROMPTS, 80, LENGTH, seed=3).rows.digest != wanted.rows.digest
    batches: list[int] = []
    real: Any = generated.continuations

    def counted(*args: Any, **options: Any) -> Any:
        batches.append(len(batches))
        return real(*args, **options)

    monkeypatch.setattr(generated, "continuations", counted)
    assert generate_rows(model, PROMPTS, 20, LENGTH, seed=0, kept=kept).rows.rows
    first = len(batches)
    found = generate_rows(model, PROMPTS, 80, LENGTH, seed=0, kept=kept)
    assert found.rows.digest == wanted.rows.digest
    assert (found.answers, found.tokens) == (wanted.answers, wanted.tokens)
    assert 0 < first < len(batches) == found.answers // BATCH_SIZE
    answers = tmp_path / "answers-0"
    answers.write_text(answers.read_text().replace("[", "[3, ", 1))
    assert generate_rows(model, PROMPTS, 80, LENGTH, seed=0, kept=kept).rows.digest == wanted.rows.digest
    other = KeptAnswers(tmp_path, "y")
    assert generate_rows(model, PROMPTS, 80, LENGTH, seed=0, kept=other).rows.digest == wanted.rows.digest
    assert len(batches) == 2 * found.answers // BATCH_SIZE + 1


def test_prompts_that_leave_no_room_are_refused() -> None:
    with pytest.raises(InputError, match=r"a prompt has 24 tokens, which leaves no room in rows of 24"):
        generate_rows(build_tiny(), Prompts([[5], [5] * 24], [2], 2), 1, LENGTH, seed=0)


def test_all_generated_rows_are_drawn_but_those_of_the_judged_text() -> None:
    options = RecoveryOptions(tokens=10 * LENGTH, batch_size=5, selection_rows=4)
    text = token_rows([Document("a", "".join(f"{n} sheep, " for n in range(200)))], byte_tokenizer(), LENGTH)
    made = generate_rows(build_tiny(), PROMPTS, 6, LENGTH, seed=0).rows
    found = draw_rows([made, text], LENGTH, options)
    assert (len(found.training), len(found.selection)) == (10, 4)
    drawn, theirs = window_digests([*found.training, *found.selection]), window_digests(made.rows)
    assert theirs < drawn
    assert drawn - theirs < window_digests(text.rows)
    left = draw_rows([made, text], LENGTH, options, [made.part(slice(0, 2))])
    drawn = window_digests([*left.training, *left.selection])
    assert len(drawn & theirs) == 4
    assert len(drawn) == 14
