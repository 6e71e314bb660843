"""What is said of calibration rows is what they were drawn from."""

from numprune.corpus import rows_digest
from numprune.export.checkpoint import PLAN, load_tokenizer
from numprune.flows.bundle import CHECKPOINT
from numprune.flows.steps.prune import make_pruned
from numprune.flows.steps.text import calibration_rows, draw_of, make_calibration
from numprune.plan import Draw, read_plan


def test_a_plan_names_text_and_seed_from_which_its_rows_can_be_drawn_again(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    text = [tmp_path / "some" / "train.txt", tmp_path / "more.txt"]
    text[0].parent.mkdir()
    for number, file in enumerate(text):
        file.write_text(" ".join(str(number * value) for value in range(900)))
    names = [str(file) for file in text]
    for folder in ("rows", "pruned"):
        (tmp_path / folder).mkdir()
    facts = make_calibration(tmp_path / "rows", model=base, text=names, samples=20, sequence_length=32, seed=5)
    make_pruned(
        tmp_path / "pruned",
        base=base,
        rows=tmp_path / "rows",
        options={"ratio": 0.3},
        target={"align": 8},
        device="cpu",
        stream=False,
    )

    calibration = read_plan(tmp_path / "pruned" / CHECKPOINT / PLAN).calibration
    assert calibration.draw == Draw(text=["train.txt", "more.txt"], seed=5)
    assert (calibration.rows, calibration.sequence_length, calibration.digest) == (20, 32, facts["digest"])
    again = calibration_rows(names, load_tokenizer(base), 20, 32, calibration.draw.seed)
    assert rows_digest(again) == calibration.digest
    other = calibration_rows(names, load_tokenizer(base), 20, 32, 6)
    assert rows_digest(other) != calibration.digest


def test_the_embedded_text_is_named_with_its_split():
    assert draw_of("embedded", 1) == Draw(text=["embedded:train"], seed=1)
