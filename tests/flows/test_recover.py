"""numprune recover: its results, messages and refusals."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from numprune.corpus import TokenRows
from numprune.errors import InputError
from numprune.export import manifest
from numprune.flows.cli import COMMANDS
from numprune.flows.cli.parser import build, parse
from numprune.flows.cli.recover import _OF_TRAINED, options_of_arguments
from numprune.flows.sections import Recover
from numprune.flows.steps import recover
from numprune.flows.steps.generate import read_prompts
from numprune.flows.steps.recover import options_of
from numprune.recovery import RecoveryOptions, RecoveryRows, draw_rows
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.conftest import Answered

Command = Callable[..., Answered]
SHORT = ("--tokens", "1e3", "--batch-size", 4, "--selection-rows", 4, "--sequence-length", 32, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dense`, `pruned` and texts; not to be written to."""
    from numprune.flows.cli import main

    folder = tmp_path_factory.mktemp("recover")
    write_checkpoint(build_tiny(), folder / "dense")
    for name, numbers in (("train", range(400)), ("heldout", range(400, 460))):
        (folder / f"{name}.txt").write_text("".join(f"{i} squared is {i * i}, halved {i / 2}.\n" for i in numbers))
    words = ("prune", folder / "dense", folder / "pruned", "--ratio", 0.5, "--compensation", "none")
    sampled = ("--text", folder / "train.txt", "--samples", 8, "--sequence-length", 32)
    assert main([*map(str, words), *map(str, sampled)]) == 0
    return folder


def test_the_defaults_are_those_of_recipes_and_of_the_core() -> None:
    parsed = parse(build(COMMANDS), ["recover", "pruned", "out", "--dense", "dense", "--text", "a.txt"])
    defaults = RecoveryOptions()
    assert options_of(Recover()) == defaults
    assert options_of_arguments(parsed) == defaults
    shown = {name: value for name, value, _ in _OF_TRAINED}
    assert shown == {"rank": defaults.rank, "blocks": defaults.blocks}


def test_the_dense_model_answers_prompts_to_train_on(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("7 squared is\n\n8 halved\n")
    words = ("recover", inputs / "pruned", tmp_path / "out", "--dense", inputs / "dense", *SHORT, "--json")
    asked = (*words, "--text", inputs / "train.txt", "--generate-from", prompts, "--generated-share")
    drawn: list[TokenRows] = []

    def drawing(texts: list[TokenRows], *args: Any) -> RecoveryRows:
        drawn[:] = texts
        return draw_rows(texts, *args)

    def broken(*_: object, **__: object) -> None:
        raise InputError("killed")

    monkeypatch.setattr(recover, "draw_rows", drawing)
    with monkeypatch.context() as patch:
        patch.setattr(recover, "distill", broken)
        assert numprune(*asked, 0.5).code == 1
    [kept] = tmp_path.glob(".training-*")  # the answers of the interrupted training
    assert [path.name for path in kept.iterdir()][:1]
    answered = numprune(*asked, 0.5)
    assert answered.code == 0, answered.err
    assert answered.json["generated"]["answers"] == 32
    assert (len(drawn), len(drawn[0].rows)) == (2, 18)  # half of 32 to train on and 4 to choose by
    assert not list(tmp_path.glob(".training-*"))
    found = numprune(*words[:2], tmp_path / "alone", *words[3:], *asked[-5:], 1)
    assert found.code == 0, found.err
    assert [len(text.rows) for text in drawn] == [36]
    assert found.json["kl_after"] < found.json["kl_before"]


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ("\n", (), r"'prompts\.txt' is empty"),
        ("x" * 40, (), r"prompts\.txt:1: prompt 'x+': 40 tokens; .* context of 32"),
        (None, ("--generated-share", 0.5), "--generated-share has an effect only with --generate-from"),
        ("heldout", ("--heldout", "p"), r"--heldout: 1 of its documents is in the training text \(p\)"),
    ],
)
def test_unusable_prompts_are_refused_before_any_work(
    numprune: Command,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompts: str | None,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p").write_text("heldout")
    given: tuple[object, ...] = ()
    if prompts is not None:
        Path("prompts.txt").write_text(prompts)
        given = ("--generate-from", "prompts.txt")
    asked = ("recover", inputs / "pruned", "out", "--dense", inputs / "dense", "--text", inputs / "train.txt", *SHORT)
    answered = numprune(*asked, *given, *arguments)
    assert answered.code == 1
    assert re.search(message, answered.err), answered.err


def test_records_without_a_prompt_are_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": " "}\n{"text": "What?"}\n')
    assert [document.text for document in read_prompts([prompts])] == ["What?"]
    prompts.write_text('{"text": " "}\n')
    with pytest.raises(InputError, match=r"there is no prompt in .*prompts\.jsonl; give at least one"):
        read_prompts([prompts])


def test_an_encoder_is_trained_on_its_own_task(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    write_checkpoint(build_tiny("bert"), tmp_path / "dense")
    texts = ("--text", inputs / "train.txt")
    pruning = ("--ratio", 0.3, "--compensation", "none", "--samples", 8, "--sequence-length", 32)
    assert numprune("prune", tmp_path / "dense", tmp_path / "pruned", *pruning, *texts).code == 0
    words = ("recover", tmp_path / "pruned", tmp_path / "out", "--dense", tmp_path / "dense", *texts, *SHORT)
    answered = numprune(*words, "--heldout", inputs / "heldout.txt", "--json")
    assert answered.code == 0, answered.err
    assert answered.json["unit"] == "nats/masked token"
    assert answered.json["kl_after"] < answered.json["kl_before"]
    before, after = (answered.json["heldout"][side]["metrics"] for side in ("before", "after"))
    assert after["kl_nats_per_masked_token"] < before["kl_nats_per_masked_token"]
    refused = numprune(*words[:2], tmp_path / "again", *words[3:], "--generate-from", inputs / "train.txt")
    assert "does not continue text; leave it out" in refused.err


@pytest.mark.parametrize("train", ["all", "lora", "blocks"])
def test_the_trained_checkpoint_is_nearer_to_the_dense_one(
    numprune: Command, inputs: Path, tmp_path: Path, train: str
) -> None:
    out = tmp_path / "recovered"
    texts = ("--text", inputs / "train.txt", "--heldout", inputs / "heldout.txt")
    terms = ("--top-k", 50, "--hidden-weight", 0.5) if train == "lora" else ()
    answered = numprune(
        *("recover", inputs / "pruned", out, "--dense", inputs / "dense", *texts, *SHORT),
        *("--train", train, *terms, "--json"),
    )
    assert answered.code == 0, answered.err
    found = answered.json
    assert (found["tokens"], found["steps"]) == (1024, 8)
    assert found["kl_after"] < found["kl_before"]
    before, after = (found["heldout"][side]["kl_nats_per_token"] for side in ("before", "after"))
    assert after < before
    made = manifest.verify(out)
    assert made.parents == {
        "base": manifest.folder_digest(inputs / "pruned"),
        "dense": manifest.folder_digest(inputs / "dense"),
    }
    facts = made.facts["recovery"]
    assert isinstance(facts, dict)
    assert (facts["train"], facts["tokens"], facts["seed"]) == (train, 1024, 0)
    assert (facts["top_k"], facts["hidden_weight"]) == ((50, 0.5) if terms else (None, 0.0))
    assert facts["best_step"] == found["best_step"]
    assert not list(tmp_path.glob(".training-*"))
    evaluated = numprune(
        *("evaluate", out, "--baseline", inputs / "dense", "--text", inputs / "heldout.txt"),
        *("--sequence-length", 32, "--json"),
    )
    assert evaluated.json["kl_nats_per_token"] == pytest.approx(after, rel=1e-6)


def test_a_learning_rate_of_zero_writes_the_same_weights(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "same"
    words = ("--dense", inputs / "dense", "--text", inputs / "train.txt", *SHORT, "--learning-rate", 0)
    answered = numprune("recover", inputs / "pruned", out, *words)
    assert answered.code == 0, answered.err
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs / "pruned", out))
    assert before.keys() == after.keys()
    assert all(before[name].equal(tensor) for name, tensor in after.items())
    assert "no step improved on the pruned weights, which were kept" in (out / "README.md").read_text()


def test_held_out_text_is_not_trained_on(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    text = (inputs / "train.txt").read_text()
    for name, part, problem in (
        ("copied", text, "--heldout: 1 of its documents is in the training text (copied.txt)"),
        (
            "shifted",
            text[1:],
            "--text: the text has 1 different window of 32 tokens that the held-out text does not have",
        ),
        ("part", text[1:4000], ""),
    ):
        heldout, out = tmp_path / f"{name}.txt", tmp_path / name
        heldout.write_text(part)
        answered = numprune(
            *("recover", inputs / "pruned", out, "--dense", inputs / "dense", "--text", inputs / "train.txt"),
            *("--heldout", heldout, *SHORT),
        )
        assert answered.is_error == bool(problem), answered.err
        assert (problem or "windows of the training text: the held-out text has more than half of each") in answered.err
        assert out.exists() == (not problem)


def test_impossible_trainings_are_refused_before_any_work(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    write_checkpoint(build_tiny("bert"), tmp_path / "bert")
    quantized, dense, text = tmp_path / "quantized", inputs / "dense", ("--text", inputs / "train.txt")
    assert numprune("quantize", dense, quantized, "--scheme", "w8a8", "--method", "rtn").code == 0
    other = write_checkpoint(build_tiny(), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    pruned, padded = inputs / "pruned", write_checkpoint(build_tiny(vocab_size=320), tmp_path / "padded")
    for source, teacher, more, problem in (
        (tmp_path / "bert", dense, (), "their tokenizers differ"),
        (quantized, dense, (), "quantized"),
        (pruned, quantized, (), "quantized"),
        (pruned, other, (), "their tokenizers differ; the dense model must be the one that was pruned"),
        (pruned, padded, (), "vocab_size is 259 and 320; the dense model must be the one that was pruned"),
        (pruned, dense, ("--rank", 3), "--rank has an effect only with --train lora; leave it out"),
        (pruned, dense, ("--train", "lora", "--blocks", 3), "--blocks has an effect only with --train blocks"),
        (pruned, dense, ("--selection-rows", 10_000), "--text: the text has"),
        (pruned, dense, ("--tokens", "1.5"), "--tokens: 1.5 must be a whole number"),
        (pruned, dense, ("--learning-rate", "nan"), "--learning-rate: nan must be at least 0, and finite"),
        (pruned, dense, ("--tokens", "inf"), "--tokens: inf must be a whole number"),
        (pruned, dense, ("--tokens", "many"), "--tokens: invalid int value: 'many'"),
    ):
        answered = numprune("recover", source, tmp_path / "out", "--dense", teacher, *text, *SHORT, *more)
        assert answered.is_error
        assert problem in answered.err
    assert not (tmp_path / "out").exists()


def test_a_diverging_training_leaves_nothing(numprune: Command, inputs: Path, tmp_path: Path) -> None:
    words = ("--dense", inputs / "dense", "--text", inputs / "train.txt", *SHORT, "--learning-rate", "1e30")
    answered = numprune("recover", inputs / "pruned", tmp_path / "out", *words)
    assert answered.is_error
    assert "choose a learning rate below 1e+30" in answered.err
    assert not list(tmp_path.iterdir())


def test_a_concurrent_training_is_refused(
    numprune: Command, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numprune.flows.steps import recover

    def meanwhile(*_: object, **__: object) -> None:
        answered.append(numprune("recover", inputs / "pruned", tmp_path / "b", *words))
        raise InputError("the first one ends here")

    answered: list[Answered] = []
    words = ("--dense", inputs / "dense", "--text", inputs / "train.txt", *SHORT)
    monkeypatch.setattr(recover, "distill", meanwhile)
    numprune("recover", inputs / "pruned", tmp_path / "a", *words)
    (second,) = answered
    assert second.is_error
    assert "another process is running the same training" in second.err
