"""The command on a tiny model: its figures against pruning and evaluating by hand, and what a second run repeats."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from numprune.corpus import sample_rows, token_rows
from numprune.documents import read_documents
from numprune.export import locks
from numprune.export.checkpoint import load
from numprune.flows.studies.compare import methods
from numprune.flows.studies.compare.command import main
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.quality import compare
from numprune.target import Target
from tests.conftest import build_tiny, byte_tokenizer

METHODS = "magnitude/uniform/none,obs/error/oneshot,taylor/uniform/none,slicegpt"


@pytest.fixture
def command(tiny: Path, tmp_path: Path):
    def arguments(*more: str) -> list[str]:
        text = ["--text", str(tiny / "train.txt"), "--heldout", str(tiny / "heldout.jsonl")]
        sizes = ["--sequence-length", "32", "--samples", "12", "--device", "cpu", "--align", "1"]
        return [str(tiny / "base"), *text, *sizes, "--out", str(tmp_path / "out"), *more]

    return arguments


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "compare.csv").read_text().splitlines()))


def test_figures_match_pruning_and_evaluating_by_hand(command, tiny, tmp_path, capsys):
    assert main(command("--methods", METHODS, "--ratios", "0.4,0.2", "--samples", "6,12")) == 0
    printed, said = capsys.readouterr()

    rows = rows_of(tmp_path / "out")
    assert [(row["ratio"], row["samples"], row["method"]) for row in rows] == [
        (ratio, samples, method) for ratio in ("0.2", "0.4") for samples in ("6", "12") for method in METHODS.split(",")
    ]
    assert (tmp_path / "out" / "compare.md").read_text() == printed
    assert printed.count("\n| ") == 1 + 1 + len(rows)  # the rule, dense, and all others
    assert "obs/error/oneshot, 6 rows" in (tmp_path / "out" / "compare.svg").read_text()
    assert "[16/16] 0.4 slicegpt, 12 rows: +" in said

    dense, tokenizer = load(tiny / "base")
    heldout = token_rows(read_documents([tiny / "heldout.jsonl"]), tokenizer, 32)
    windows = token_rows(read_documents([tiny / "train.txt"]), tokenizer, 32)
    options = PruneOptions(0.4, "obs", "error", "oneshot", target=Target(align=1))
    pruned = prune(load(tiny / "base")[0], sample_rows(windows, 12, 32, seed=0), options)
    expected = compare(pruned.model, dense, heldout)
    row = next(row for row in rows if (row["ratio"], row["samples"], row["method"][:3]) == ("0.4", "12", "obs"))
    assert float(row["nll_increase"]) == pytest.approx(expected.loss_delta.value, abs=1e-6)
    assert float(row["ci95_upper"]) == pytest.approx(expected.loss_delta.ci95_upper, abs=1e-6)
    assert float(row["kl_nats_per_token"]) == pytest.approx(expected.metrics["kl_nats_per_token"], rel=1e-5)
    assert float(row["top1_agreement"]) == expected.metrics["top1_agreement"]
    assert float(row["dense_nll_nats_per_token"]) == pytest.approx(expected.baseline.mean_nll)
    assert int(row["parameters"]) == pruned.after.parameters
    assert float(row["prunable_ratio_removed"]) == pruned.prunable_ratio_removed
    # Counted as `evaluate` counts: tokens that are scored, documents that have some.
    assert f"evaluated on {expected.candidate.count:,} tokens of {expected.documents} held-out documents" in printed
    assert float(row["seconds"]) > 0
    assert float(row["forward_passes"]) > 0
    assert int(row["peak_bytes"]) > sum(parameter.numel() * 4 for parameter in dense.parameters())


def test_a_second_run_computes_only_what_is_missing(command, tmp_path, capsys):
    main(command("--methods", "magnitude/uniform/none", "--ratios", "0.2"))
    before = rows_of(tmp_path / "out")
    capsys.readouterr()

    main(command("--methods", "magnitude/uniform/none,wanda/uniform/none", "--ratios", "0.2"))
    said = capsys.readouterr().err.splitlines()
    assert ", reused" in next(line for line in said if line.startswith("[1/2]"))
    assert "reused" not in next(line for line in said if "wanda" in line)
    assert rows_of(tmp_path / "out")[0] == before[0]  # its seconds too: not measured again

    main(command("--methods", "magnitude/uniform/none", "--ratios", "0.2", "--seed", "1"))
    assert "reused" not in capsys.readouterr().err  # other calibration rows


def test_a_killed_run_resumes_where_it_stopped(command, tmp_path, capsys):
    methods = ["random/uniform/none", "magnitude/uniform/none", "wanda/uniform/none"]
    arguments = command("--methods", ",".join(methods), "--ratios", "0.2")
    killed = subprocess.Popen(
        [sys.executable, "-m", "numprune.compare", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith(b"[1/3]"):
            break
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    finished = len(list((tmp_path / "out" / "stages").glob("method-*")))
    assert finished >= 1

    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert said.count("reused") == finished
    assert [row["method"] for row in rows_of(tmp_path / "out")] == methods
    assert not list((tmp_path / "out" / "stages").glob(".*partial"))


def test_a_second_run_in_the_same_folder_is_refused(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with locks.held(tmp_path / "out" / ".lock"):
        assert main(command("--methods", "magnitude/uniform/none")) == 1
    assert f"another comparison is running in {tmp_path / 'out'}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_without_heldout_text_the_end_of_the_calibration_text_is_held_out_and_one_failure_does_not_stop_the_rest(
    tmp_path, capsys, monkeypatch
):
    """Of a model whose layers look at different things none can go; here it is found out in the middle of the run."""
    monkeypatch.setattr(methods, "check_rival", lambda *_: None)  # not in the method's own process
    windows = {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}
    build_tiny("qwen2", **windows).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    texts = [f"Number {i} of the documents, and its square is {i * i}; neither is held out twice." for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    out = tmp_path / "out"

    arguments = [str(tmp_path / "base"), "--text", str(tmp_path / "text.jsonl"), "--out", str(out), "--samples", "5"]
    code = main([*arguments, "--sequence-length", "32", "--methods", "shortgpt,wanda/uniform/none"])

    assert code == 1
    assert "shortgpt: a model with sliding windows in some layers only" in capsys.readouterr().err
    assert [row["method"] for row in rows_of(out)] == ["wanda/uniform/none"]
    (text,) = (out / "stages").glob("text-*")
    facts = json.loads((text / "result.json").read_text())
    rows = token_rows(read_documents([tmp_path / "text.jsonl"]), byte_tokenizer(), 32)
    held = rows.rows[len(rows.rows) * 4 // 5 :]
    assert facts["heldout"]["tokens"] == sum(len(row) - 1 for row in held)
    from numprune.flows.studies.compare.steps import load_rows

    drawn = load_rows(text, 5)
    assert not [row for row in drawn for other in held if torch.equal(row, other)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "obs/uniform"], "'obs/uniform' is not a method"),
        (["--methods", "obs/uniform/bias", "--ratios", "0.99"], "--methods: obs/uniform/bias: ratio is 0.99"),
        (["--samples", "100000"], "100000 samples were requested"),
        (["--samples", "0"], "argument --samples: '0': each must be a whole number, at least 1"),
        (["--sequence-length", "1"], "argument --sequence-length: 1 must be at least 2"),
        (["--sequence-length", "300"], "--sequence-length 300: the model takes at most 256 tokens"),
        (["--split", "zebra"], "split 'zebra' separates nothing in"),
    ],
)
def test_invalid_requests_are_refused(command, capsys, arguments, said):
    assert main(command(*arguments)) == 1
    assert said in capsys.readouterr().err


def test_calibration_text_cannot_be_held_out(tiny, tmp_path, capsys):
    (tmp_path / "copy.txt").write_text((tiny / "train.txt").read_text())
    text = ["--text", str(tiny / "train.txt"), "--heldout", str(tmp_path / "copy.txt")]
    assert main([str(tiny / "base"), *text, "--out", str(tmp_path / "out")]) == 1
    assert "--heldout: 1 file also in --text, so not held out" in capsys.readouterr().err
