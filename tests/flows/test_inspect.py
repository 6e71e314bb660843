"""numprune inspect does not import torch, which takes most of the time, and reports the same as with it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from numprune.anatomy import PER_LAYER_PREFIX
from numprune.families import FAMILIES
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.quantization import Scheme
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.conftest import Answered

_PROGRAM = """\
import json, sys
from numprune.export.imports import leave_out_torch
leave_out_torch()
from numprune.flows.cli import main
for folder in sys.argv[1:]:
    assert main(["inspect", folder, "--json"]) == 0
assert sys.modules["torch"] is None
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of every family and task, one whose layers differ, one with heads that no stock Llama has, quantized ones."""
    folder = tmp_path_factory.mktemp("checkpoints")
    models = {
        f"{name}-{task}": build_tiny(name, task=task) for name, family in FAMILIES.items() for task in family.tasks
    }
    layers = {0: {"num_attention_heads": 2, "num_key_value_heads": 1}, 1: {"skip": ["mlp"]}}
    models["per-layer"] = build_tiny(f"{PER_LAYER_PREFIX}llama", per_layer_config=layers)
    models["mistral-3-heads"] = build_tiny("mistral", num_attention_heads=3, num_key_value_heads=3)
    written = [write_checkpoint(model, folder / name) for name, model in models.items()]
    config = folder / "mistral-3-heads" / "config.json"
    fields = json.loads(config.read_text()) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config.write_text(json.dumps(fields))
    for scheme in (Scheme("w4a16", 32), Scheme("fp8")):
        out = folder / scheme.name
        quantize_checkpoint(folder / "llama-causal-lm", scheme, out, torch.device("cpu"))
        written.append(out)
    return written


def test_inspect_says_the_same_without_torch(checkpoints: list[Path], numprune: Callable[..., Answered]) -> None:
    command = [sys.executable, "-c", _PROGRAM, *map(str, checkpoints)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr  # transformers would say that there is none
    found, text, decoder = [], done.stdout.strip(), json.JSONDecoder()
    while text:
        one, end = decoder.raw_decode(text)
        found.append(one)
        text = text[end:].strip()
    assert found == [numprune("inspect", folder, "--json").json for folder in checkpoints]


def test_the_command_imports_no_torch(checkpoints: list[Path]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "numprune.flows.cli", "inspect", str(checkpoints[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"transformers", "safetensors"} <= imported
    assert not {"torch", "transformers.modeling_utils"} & imported
    assert str(checkpoints[0]) in done.stdout
