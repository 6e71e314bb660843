"""The callback in two processes: scores are those of all rows, and both remove the same units."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

_PROGRAM = """
import os
import sys

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from numprune.schedules import GradualPruning
from numprune.target import Target
from tests.conftest import build_tiny

folder, processes = sys.argv[1], int(sys.argv[2])
rows = torch.randint(0, 256, (32, 12), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row} for row in rows]
found = {}


class Watch(TrainerCallback):
    def __init__(self, pruning):
        self.pruning = pruning

    def on_step_end(self, args, state, control, **kwargs):
        run = self.pruning._run
        for name, value in (run.units.state() | run.scores.state()).items():
            found[f"{run.options.criterion} {state.global_step} {name}"] = value.clone()


args = TrainingArguments(
    folder, max_steps=10, per_device_train_batch_size=4 // processes, use_cpu=True, save_strategy="no", report_to=[]
)
assert args.world_size == processes
for criterion in ("movement", "vib"):
    pruning = GradualPruning(0.4, criterion, every=2, tolerance=1.0, target=Target(align=1))
    model = build_tiny(num_key_value_heads=4)
    Trainer(model, args, train_dataset=data, callbacks=[pruning, Watch(pruning)]).train()
    assert pruning.plan.ratio == 0.4
save_file(found, f"{folder}/{processes}-{args.process_index}.safetensors")
"""
# Without --multi_gpu it starts a single process; where there is no GPU, the processes compute on the CPU.
_LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
_REST = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def test_two_processes_remove_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for processes, launcher in (("1", ()), ("2", (*_LAUNCH, *_REST))):
        command = [sys.executable, *launcher, tmp_path / "program.py", tmp_path, processes]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    movement = one["movement 3 movement"]
    torch.testing.assert_close(first["movement 3 movement"], movement, rtol=1e-3, atol=1e-6)
    assert (movement != 0).all()
    for name in ("mean", "log_variance"):
        torch.testing.assert_close(first[f"vib 3 {name}"], one[f"vib 3 {name}"], rtol=1e-3, atol=1e-3)
    for criterion in ("movement", "vib"):
        assert torch.equal(first[f"{criterion} 10 kept"], one[f"{criterion} 10 kept"])
        assert not one[f"{criterion} 10 kept"].all()
