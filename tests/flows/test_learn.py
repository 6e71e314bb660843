"""numprune learn, and numprune prune with its plan."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from numprune import learning
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint, manifest
from numprune.export.tasks import load_task
from numprune.flows import names
from numprune.flows.cli import main
from numprune.flows.steps.learn import training_rows
from numprune.flows.steps.text import heldout_rows
from numprune.plans import PLAN_FILE, read_plan
from numprune.tasks.masked import Masked

Checkpoint = Callable[..., Path]
TRAINING = ("--tokens", 2_000, "--sequence-length", 32, "--align", 8)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} squared is {number**2}, halved {number / 2}.\n" for number in range(400)))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    def run(*words: object) -> tuple[int, dict[str, Any]]:
        code = main([*map(str, words), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_names_and_defaults_are_those_of_the_core() -> None:
    assert names.LearningVariant == learning.Variant
    assert names.LearningConstraint == learning.Counted
    assert names.LEARNING_RATE == learning.LEARNING_RATE
    assert tuple(names.LEARNING_TOKENS) == get_args(names.LearningVariant)


@pytest.mark.parametrize("variant", get_args(names.LearningVariant))
def test_prune_follows_the_plan_of_the_masks(
    run: Callable[..., Any], tiny_checkpoint: Checkpoint, tmp_path: Path, text: Path, variant: str
) -> None:
    base, out, pruned = tiny_checkpoint(), tmp_path / "learned", tmp_path / "pruned"
    before = manifest.folder_digest(base)
    code, made = run("learn", base, out, "--ratio", 0.3, "--variant", variant, "--text", text, *TRAINING)
    assert code == 0, made
    assert made["removed"] >= 0.3
    assert (made["tokens"], made["steps"]) == (2_048, 4)
    assert made["unit"] == "nats/token"
    assert manifest.folder_digest(base) == before
    assert manifest.verify(out).parents == {"base": before}
    model = base if variant == "faster" else out / "model"
    assert Path(made["model"]) == model
    plan = read_plan(out / "plan.json")
    assert (plan.criterion, plan.base) == ("vib", manifest.folder_digest(model))
    assert plan.calibration.draw is not None
    assert plan.calibration.draw.text == ["text.txt"]

    how = ("--plan", out / "plan.json", "--text", text, "--samples", 16)
    code, found = run("prune", model, pruned, *how)
    assert code == 0, found
    assert found["prunable_ratio_removed"] == pytest.approx(made["removed"])
    followed = read_plan(pruned / PLAN_FILE)
    assert {name: block.kept for name, block in followed.blocks.items()} == {
        name: block.kept for name, block in plan.blocks.items()
    }
    assert run("inspect", pruned)[0] == 0
    if variant == "fast":  # the plan is for the trained weights
        code, refused = run("prune", base, tmp_path / "other", *how)
        assert code == 1
        assert "the plan was made for a model with digest" in refused["error"]


def test_masks_meet_a_budget_of_bytes(
    run: Callable[..., Any], tiny_checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    base, out, pruned = tiny_checkpoint(), tmp_path / "learned", tmp_path / "pruned"
    allowed = checkpoint.weight_bytes(base) * 4 // 5
    code, made = run("learn", base, out, "--budget", f"{allowed}B", "--text", text, *TRAINING)
    assert code == 0, made
    assert made["constraint"] == "bytes"
    code, found = run("prune", base, pruned, "--plan", out / "plan.json", "--text", text, "--samples", 16)
    assert code == 0, found
    assert 0.95 * allowed < found["weight_bytes_after"] <= allowed


def test_uniform_masks_give_a_stock_architecture(
    run: Callable[..., Any], tiny_checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    base, out, pruned = tiny_checkpoint(), tmp_path / "learned", tmp_path / "pruned"
    more = ("--allocation", "uniform", "--compensation", "none")
    code, made = run("learn", base, out, "--ratio", 0.3, "--variant", "faster", "--text", text, *TRAINING, *more)
    assert code == 0, made
    assert run("prune", base, pruned, "--plan", out / "plan.json", "--text", text)[0] == 0
    assert json.loads((pruned / "config.json").read_text())["model_type"] == "llama"


def test_the_hidden_size_is_learned_and_cut(
    run: Callable[..., Any],
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, out = tiny_checkpoint(tie_word_embeddings=True), tmp_path / "learned"
    more = ("--axes", "channels", "hidden-size", "--allocation", "uniform")
    code, made = run("learn", base, out, "--ratio", 0.6, "--text", text, *TRAINING, *more)
    assert code == 0, made
    kept, of = made["hidden_size"]
    assert (kept < of, of, kept % 8) == (True, 64, 0)
    how = ("--plan", out / "plan.json", "--text", text, "--samples", 16)
    for name, stream in (("memory", ()), ("streamed", ("--stream",))):
        code, found = run("prune", base, tmp_path / name, *how, *stream)
        assert code == 0, found
        assert found["hidden_size"] == [kept, of]
        assert found["prunable_ratio_removed"] == pytest.approx(made["removed"])
    code, inspected = run("inspect", tmp_path / "streamed")
    assert (inspected["hidden_size"], inspected["uniform"]) == (kept, True)
    assert inspected["plan"]["hidden"] == {"size": 64, "basis": "coordinates"}
    for words, said in (
        (("inspect", tmp_path / "memory"), r"hidden size before +64"),
        (("prune", base, tmp_path / "again", *how), rf"removed, hidden size 64 -> {kept}; weights"),
    ):
        assert main([*map(str, words)]) == 0
        assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--learning-rate", 1e-3), "--learning-rate is that of the weights, which faster does not train"),
        (("--variant", "fast", "--learning-rate", -1), "--learning-rate: -1 must be at least 0, and finite"),
        (("--variant", "fast", "--learning-rate", "nan"), "--learning-rate: nan must be at least 0, and finite"),
        (("--budget", "1KB"), "ratio is 0.3, and a budget is given"),
        (("--constraint", "bytes"), "constraint bytes: they are limited by a budget, like 6GiB; give one in place of"),
        (("--ratio", 0.99), "ratio is 0.99, but with the minimum"),
        (("--keep", "attention", "mlp", "--ratio", 0), "leave every block a single size"),
        (("--sequence-length", 250), "16 selection rows leave none to train on; give more text"),
        (("--axes", "layers"), "invalid choice: 'layers'"),
    ],
)
def test_what_cannot_work_is_refused(
    run: Callable[..., Any], tiny_checkpoint: Checkpoint, tmp_path: Path, more: tuple[object, ...], said: str
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Nothing is said here twice: 0 1 2 3 4 5 6 7 8 9.\n" * 50)
    out = tmp_path / "out"
    how = ("--ratio", 0.3, "--variant", "faster", "--text", short, "--sequence-length", 32)
    code, refused = run("learn", tiny_checkpoint(), out, *how, *more)
    assert code == 1
    assert said in refused["error"]
    assert not out.exists()


def test_a_training_that_diverges_ends_with_its_remedy(
    run: Callable[..., Any], tiny_checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    how = ("--ratio", 0.3, "--variant", "fast", "--learning-rate", 1e30, "--text", text, *TRAINING)
    code, refused = run("learn", tiny_checkpoint(), tmp_path / "out", *how)
    assert code == 1
    assert "the loss is not finite; choose a learning rate below 1e+30" in refused["error"]
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_neither_masks_nor_special_tokens_hide_held_out_text(tiny_checkpoint: Checkpoint, text: Path) -> None:
    base, reading = tiny_checkpoint("bert", task="masked-lm"), Reading(pack=False)
    task, copied = load_task(base), text.with_name("copied.txt")
    copied.write_text(text.read_text()[7:])
    assert isinstance(task, Masked)
    rows, _ = training_rows([text], base, 48, 480, 0, reading, "--text")
    for part in (rows.training, rows.selection):
        assert {int((row == task.mask_token).sum()) for row in part} == {task.predictions_in(48)}
    judged = heldout_rows([copied], 48, [base], reading)
    with pytest.raises(InputError, match=r"--text: the text has .* that the held-out text does not have"):
        training_rows([text], base, 48, 480, 0, reading, "--text", [judged])


def test_a_quantized_checkpoint_is_refused(
    run: Callable[..., Any], tiny_checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    base, quantized = tiny_checkpoint(), tmp_path / "quantized"
    assert run("quantize", base, quantized, "--scheme", "w8a8", "--method", "rtn")[0] == 0
    code, refused = run("learn", quantized, tmp_path / "out", "--ratio", 0.3, "--text", text)
    assert code == 1
    assert "quantized" in refused["error"]
