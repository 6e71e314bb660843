"""The comparison with onnxruntime-genai: its table, a miniature of it, and errors reported before any work."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.errors import InputError
from numprune.flows.studies.genai import command
from numprune.flows.studies.genai.contenders import BUILDER, CONTENDERS, TORCH, Contender


def test_ratios_are_of_pytorch_and_of_the_fastest_that_the_builder_made_as_precise() -> None:
    slow, fast = (("block_size", "32"),), (("block_size", "128"),)
    results = [
        command.Result(Contender(TORCH, "float32", "torch"), [10.0, 11.0], 3.0, 11.0),
        command.Result(Contender("numprune", "int4", "onnxruntime"), [40.0, 44.0], 3.1, 8.0),
        command.Result(Contender(BUILDER, "int4", "onnxruntime-genai", slow), [20.0, 22.0], 3.2, 4.0),
        command.Result(Contender(BUILDER, "int4", "onnxruntime-genai", fast), [50.0, 55.0], 3.3, 3.0),
        command.Result(Contender(BUILDER, "float32", "onnxruntime-genai"), [90.0, 99.0], 3.0, 11.0),
    ]
    lines = command.markdown(results, "conditions").splitlines()
    assert lines[2] == "| PyTorch, eager, float32 | 11.0 | 10.5 | 1 | 0.11 [0.11, 0.11] | 3.0000 |"
    ours = "| numprune, int4, in onnxruntime | 8.0 | 42.0 | 4.00 [4.00, 4.00] | 0.80 [0.80, 0.80] | 3.1000 |"
    assert lines[3] == ours
    assert lines[4].split(" | ")[4] == "0.40 [0.40, 0.40]"
    assert lines[5].split(" | ")[:1] == ["| genai's builder, int4, block_size=128"]
    assert lines[5].split(" | ")[4] == "1"
    assert lines[-1] == "conditions"


def test_no_two_contenders_have_one_name() -> None:
    assert len({one.name for one in CONTENDERS}) == len(CONTENDERS)


def test_contenders_are_chosen_by_a_part_of_the_name_and_pytorch_is_always_there() -> None:
    chosen = command._chosen(["in onnxruntime-genai"])
    assert {one.maker for one in chosen} == {TORCH, "numprune"}
    with pytest.raises(InputError, match=r"'int3' matches no name; available: PyTorch, eager, float32; "):
        command._chosen(["int4", "int3"])


@pytest.mark.slow
def test_a_miniature(tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime_genai")
    base = tiny_checkpoint(tie_word_embeddings=True, intermediate_size=128)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number**2}, halved {number / 2}.\n" for number in range(400)))
    sizes = {"samples": 4, "sequence-length": 64, "windows": 1, "prompt-length": 8, "steps": 4, "repeats": 2}
    words = [base, "--calibration", text, "--heldout", text, "--threads", 1, "--out", tmp_path / "out"]
    words += [word for name, value in sizes.items() for word in (f"--{name}", value)]
    ours = [f"numprune, {precision}, in onnxruntime-genai" for precision in ("float32", "int4")]
    words += ["--contenders", *ours, "int4, default"]
    assert command.main([*map(str, words)]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "genai.md").read_text()
    record = json.loads((tmp_path / "out" / "genai.json").read_text())
    nll = {one["name"]: one["nll_nats_per_token"] for one in record["results"]}
    dense = nll["PyTorch, eager, float32"]
    assert set(nll) == {"PyTorch, eager, float32", *ours, "genai's builder, int4, default settings"}
    assert nll[ours[0]] == pytest.approx(dense, abs=1e-4)  # the same tokens and positions in each program
    assert all(abs(value - dense) < 0.3 for value in nll.values())
    assert all(len(one["tokens_per_s"]) == 2 for one in record["results"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "1"], "--repeats is 1"),
        (["--steps", "0"], "--steps"),
        (
            ["--prompt-length", "100", "--steps", "925"],
            "--prompt-length + --steps is 1025; the model takes at most 1024",
        ),
        (["--sequence-length", "1025"], "--sequence-length is 1025; the model takes at most 1024"),
        (["/nowhere/model"], "/nowhere/model"),
        (["--contenders", "llama.cpp"], "'llama.cpp' matches no name"),
    ],
)
def test_errors_are_reported_before_any_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 1
    assert said in capsys.readouterr().err
