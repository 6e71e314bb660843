"""numprune recover in two processes of `accelerate launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from numprune.export import manifest
from tests.conftest import build_tiny, write_checkpoint

pytestmark = pytest.mark.slow

# The optimizer's first moments after a step are a tenth of the gradient.
_PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from numprune.corpus import token_rows
from numprune.documents import Document
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.flows.cli import main
from numprune.recovery import RecoveryOptions, distill, draw_rows
from numprune.recovery.state import TrainingState

inputs, out, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
assert PartialState(cpu=True).num_processes == processes
options = RecoveryOptions(tokens=1, batch_size=4, micro_batch_size=1, selection_rows=3)


def train(state, **changed):  # returns what it was refused for
    (model, tokenizer), (dense, _) = (checkpoint.load(inputs / name) for name in ("pruned", "dense"))
    rows = token_rows([Document("a", (inputs / "train.txt").read_text())], tokenizer, 32)
    asked = replace(options, **changed)
    try:
        drawn, kept = draw_rows([rows], 32, asked), TrainingState(out / state, "x")
        distill(model, dense, drawn, asked, torch.device("cpu"), state=kept)
    except InputError as error:
        return str(error)
    return ""


assert not train("all")
assert not train("lora", train="lora", rank=2, selection_rows=1)  # fewer than processes
if processes > 1:
    assert "2 processes cannot share steps of 3 rows" in train("refused", batch_size=3)
    apart = train("all" if PartialState().is_main_process else "none")  # as on machines without a common file system
    assert "would resume after different steps: 0, 1; they need a file system" in apart

words = ["recover", inputs / "pruned", out / "recovered", "--dense", inputs / "dense", "--text", inputs / "train.txt"]
words += ["--heldout", inputs / "heldout.txt", "--tokens", "640", "--batch-size", "4", "--selection-rows", "5"]
sys.exit(main([*map(str, words), "--sequence-length", "32", "--learning-rate", "1e-3", "--json"]))
"""
# Without --multi_gpu it starts a single process; where there is no GPU, the processes compute on the CPU.
_LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
_REST = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    write_checkpoint(build_tiny(), tmp_path / "dense")
    write_checkpoint(build_tiny(seed=1), tmp_path / "pruned")
    for name, numbers in (("train", range(200)), ("heldout", range(400, 420))):
        (tmp_path / f"{name}.txt").write_text("".join(f"{i} squared is {i * i}, halved {i / 2}.\n" for i in numbers))
    (tmp_path / "program.py").write_text(_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    answers = {}
    for name, processes, launcher in (("one", "1", ()), ("two", "2", (*_LAUNCH, *_REST))):
        command = [sys.executable, *launcher, tmp_path / "program.py", tmp_path, tmp_path / name, processes]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr
        answers[name] = json.loads(done.stdout)  # one process answers
    for trained in ("all", "lora"):
        one, two = (load_file(tmp_path / name / trained / "step-1.safetensors") for name in ("one", "two"))
        gradients = [name for name in one if name.startswith("exp_avg/")]
        assert len(gradients) == len([name for name in one if name.startswith("weights/")])
        for name in gradients:
            assert float((one[name] - two[name]).abs().max()) < 1e-6, (trained, name)
        assert max(float(one[name].abs().max()) for name in gradients) > 1e-3
    for name in ("one", "two"):
        manifest.verify(tmp_path / name / "recovered")
    assert not list(tmp_path.rglob(".training-*"))
    assert answers["two"]["kl_before"] == pytest.approx(answers["one"]["kl_before"], rel=1e-9)
    assert answers["two"]["kl_after"] == pytest.approx(answers["one"]["kl_after"], rel=1e-3)
    assert answers["two"]["kl_after"] < answers["two"]["kl_before"]
    kl = [answers[name]["heldout"]["after"]["kl_nats_per_token"] for name in ("one", "two")]
    assert kl[1] == pytest.approx(kl[0], rel=1e-3)
