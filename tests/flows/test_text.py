"""The description of calibration rows matches the rows; held-out rows are read back unchanged."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from numprune.corpus import rows_digest
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export.checkpoint import load_tokenizer
from numprune.flows.names import CHECKPOINT
from numprune.flows.sections import Prune
from numprune.flows.stages import Artifact, Text
from numprune.flows.steps.bodies.candidate import make_pruned
from numprune.flows.steps.bodies.rows import make_calibration, make_heldout
from numprune.flows.steps.results import HeldoutRows
from numprune.flows.steps.text import (
    calibration_rows,
    heldout_rows,
    load_heldout,
    text_digest,
)
from numprune.plans import PLAN_FILE, Draw, read_plan
from numprune.target import Target


def test_a_plan_records_text_and_seed_to_redraw_its_rows(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    text = [tmp_path / "some" / "train.txt", tmp_path / "more.txt"]
    text[0].parent.mkdir()
    for number, file in enumerate(text):
        file.write_text("\n\n".join(str(number * value) for value in range(900)))
    names = [str(file) for file in text]
    for folder in ("rows", "pruned"):
        (tmp_path / folder).mkdir()
    reading = Reading(split="blank-line", pack=True)
    model, rows = Artifact(base, ""), Artifact(tmp_path / "rows", "")
    asked = {"text": Text(names, ""), "samples": 20, "sequence_length": 32, "reading": reading}
    facts = make_calibration(rows.path, model=model, **asked, seed=5)
    make_pruned(
        tmp_path / "pruned",
        base=model,
        origin=model,
        rows=rows,
        learned=None,
        asked=Prune(ratio=0.3),
        target=Target(align=8),
        scheme="none",
        device="cpu",
    )

    calibration = read_plan(tmp_path / "pruned" / CHECKPOINT / PLAN_FILE).calibration
    assert calibration.draw == Draw(text=["train.txt", "more.txt"], seed=5, split="blank-line", packed=True)
    assert (calibration.rows, calibration.sequence_length, calibration.digest) == (20, 32, facts.digest)
    again, draw = calibration_rows(names, load_tokenizer(base), 20, 32, calibration.draw.seed, reading)
    assert (rows_digest(again), draw) == (calibration.digest, calibration.draw)
    for seed, other in ((6, reading), (5, replace(reading, split=r"[05]\n+"))):
        assert rows_digest(calibration_rows(names, load_tokenizer(base), 20, 32, seed, other)[0]) != calibration.digest


def test_the_embedded_text_is_recorded_with_its_split(tiny):
    rows, draw = calibration_rows("embedded", load_tokenizer(tiny / "base"), 2, 32, 1, Reading())
    assert draw == Draw(text=["embedded:train"], seed=1)
    assert rows.shape == (2, 32)


@pytest.mark.parametrize("pack", [True, False])
def test_heldout_rows_round_trip(tiny, tmp_path, pack):
    reading = Reading(pack=pack)
    text = [str(tiny / "heldout.jsonl")]
    base = Artifact(tiny / "base", "")
    facts = make_heldout(tmp_path, model=base, text=Text(text, ""), sequence_length=32, reading=reading)
    rows = heldout_rows([tiny / "heldout.jsonl"], 32, [tiny / "base"], reading)
    found = load_heldout(tmp_path, facts.digest)
    assert all(torch.equal(one, other) for one, other in zip(found.rows, rows.rows, strict=True))
    assert replace(found, rows=[]) == replace(rows, rows=[])
    assert facts == HeldoutRows(rows.digest, len(rows.rows), rows.tokens, documents=24, packed=pack)


def test_few_documents_give_intervals_over_windows_and_a_warning(tiny, caplog):
    caplog.set_level(logging.WARNING, "numprune")
    base, long, short = tiny / "base", tiny / "train.txt", tiny / "heldout.jsonl"
    heldout_rows([short], 32, [base], Reading(), baseline=base)
    heldout_rows([long], 32, [base], Reading())  # nothing is compared
    assert not caplog.messages
    heldout_rows([long], 32, [base], Reading(), baseline=base)
    assert caplog.messages == [
        "the held-out text has 1 document, so intervals are over its 141 windows: they are similar and say little "
        "about other text; separate its documents (--split: blank-line, or a regular expression) or give at least 5"
    ]


def test_too_few_samples_name_the_option(tiny, tmp_path):
    text, tokenizer = [str(tiny / "train.txt")], load_tokenizer(tiny / "base")
    with pytest.raises(InputError, match=r"^--samples: the calibration text gives 140 windows of 32 tokens, but 999"):
        calibration_rows(text, tokenizer, 999, 32, 0, Reading())
    asked = {"text": Text(text, ""), "samples": 999, "sequence_length": 32, "seed": 0}
    with pytest.raises(InputError, match=r"^data\.samples: the calibration text gives 140 windows"):
        make_calibration(tmp_path, model=Artifact(tiny / "base", ""), **asked, reading=Reading())


def test_a_text_is_identified_by_file_names_and_content(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (folder / "data.arrow").write_bytes(b"one")
    texts = [[str(tmp_path / "a.txt")], [str(tmp_path / "b.txt")], [str(folder)]]
    before = [text_digest(text, "train") for text in texts]
    (folder / "data.arrow").write_bytes(b"two")
    assert len({*before, text_digest([str(folder)], "train")}) == 4
