"""numprune inspect, prune and evaluate on an encoder checkpoint of each task."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.tasks import TaskName
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.conftest import Answered

Command = Callable[..., Answered]

UNITS = {"masked-lm": "nats/masked token", "classification": "nats/text", "embedding": "1 - cosine"}


@pytest.mark.parametrize(
    ("family", "task"), [("roberta", "masked-lm"), ("distilbert", "classification"), ("bert", "embedding")]
)
def test_an_encoder_is_inspected_pruned_and_evaluated(
    family: str, task: TaskName, numprune: Command, tiny: Path, tmp_path: Path
) -> None:
    base, out = write_checkpoint(build_tiny(family, task=task), tmp_path / "base"), tmp_path / "out"
    found = numprune("inspect", base, "--json").json
    assert (found["task"], found["kv_bytes_per_token"]) == (task, 0)
    assert ("pooling" in found) == (task == "embedding")

    calibration = ["--text", tiny / "train.txt", "--samples", 16, "--sequence-length", 24]
    made = numprune("prune", base, out, "--ratio", 0.2, "--allocation", "error", *calibration, "--json").json
    assert made["prunable_ratio_removed"] == pytest.approx(0.2, abs=0.03)

    text = ["--text", tiny / "heldout.jsonl", "--sequence-length", 64]
    changed = numprune("evaluate", out, "--baseline", base, *text, "--json").json
    assert (changed["task"], changed["documents"]) == (task, 24)
    assert changed["loss_delta"]["unit"] == UNITS[task]
    assert changed["loss_delta"]["interval95"][0] < changed["loss_delta"]["value"]
    assert UNITS[task] in numprune("evaluate", out, "--baseline", base, *text).out

    alone = numprune("evaluate", out, *text)
    if task == "masked-lm":
        assert "NLL, nats/masked token" in alone.out
    else:
        assert alone.code == 1
        assert f"the model has no loss of its own on this text ({task}); give" in alone.err


def test_a_classifier_is_evaluated_by_labels(numprune: Command, tmp_path: Path) -> None:
    base = write_checkpoint(build_tiny("bert", task="classification"), tmp_path / "base")
    text = tmp_path / "labelled.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(8)))
    found = numprune("evaluate", base, "--text", text, "--json").json
    assert set(found["metrics"]) == {"nll_nats_per_text", "accuracy"}
    text.write_text(json.dumps({"text": "text", "label": "fair"}))
    assert "label 'fair' is not a class of the model" in numprune("evaluate", base, "--text", text).err


def test_models_for_different_tasks_are_not_compared(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    one, other = (
        write_checkpoint(build_tiny("bert", task=task), tmp_path / task) for task in ("classification", "embedding")
    )
    found = numprune("evaluate", one, "--baseline", other, "--text", tiny / "heldout.jsonl")
    assert (found.code, "they have different tasks, classes" in found.err) == (1, True)
