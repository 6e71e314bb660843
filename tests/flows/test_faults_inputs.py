"""Damaged models, tokenizers and texts; unusual paths; clocks that go back."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from tests.conftest import build_tiny, byte_tokenizer
from tests.flows.conftest import RECIPE, Answered
from tests.flows.faults import command, digests, finish, stage, wait_until

Command = Callable[..., Answered]

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny / "base", tmp_path / "model"))


def refused(answered: Answered, *words: str) -> None:
    """Exit code 1, nothing on stdout, no traceback, and every word in the message."""
    assert answered.is_error
    assert "Traceback" not in answered.err
    assert "numprune: error: " in answered.err
    for word in words:
        assert word in answered.err


def remove(model: Path) -> str:
    (model / WEIGHTS).unlink()
    return f"neither {WEIGHTS} nor"


def truncate(model: Path) -> str:
    os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size // 2)
    return f"{WEIGHTS}: not a complete safetensors file"


def nan(model: Path) -> str:
    weights = load_file(model / WEIGHTS)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    return "model.layers.1.mlp.up_proj.weight has values that are NaN or infinite"


def adapter(model: Path) -> str:
    """It would be ignored without peft, and with peft applied by some commands only."""
    (model / "adapter_config.json").write_text("{}")
    return "adapter_config.json: the folder contains an adapter, which would be ignored; merge the adapter first"


SAMPLED = ["--samples", "4", "--sequence-length", "64", "--text", "TEXT"]
PRUNE = ["prune", "MODEL", "OUT", "--ratio", "0.2", *SAMPLED]
READERS: dict[str, list[str]] = {
    "inspect": ["inspect", "MODEL"],
    "prune": PRUNE,
    "stream": [*PRUNE, "--stream"],
    "rtn": ["quantize", "MODEL", "OUT", "--scheme", "w8a8", "--method", "rtn"],
    "gptq": ["quantize", "MODEL", "OUT", "--scheme", "w8a8", *SAMPLED],
    "dense": ["quantize", "GOOD", "OUT", "--scheme", "w8a8", "--dense", "MODEL", *SAMPLED],
    "evaluate": ["evaluate", "MODEL", "--text", "TEXT"],
    "baseline": ["evaluate", "GOOD", "--baseline", "MODEL", "--text", "TEXT"],
    "vllm": ["export", "MODEL", "OUT", "--to", "vllm"],
    "onnx": ["export", "MODEL", "OUT", "--to", "onnx"],
    "candidate": ["benchmark", "MODEL", "--baseline", "GOOD", "--runtime", "torch"],
    "reference": ["benchmark", "GOOD", "--baseline", "MODEL", "--runtime", "onnxruntime"],
}


@pytest.mark.parametrize("damage", [remove, truncate, nan, adapter])
@pytest.mark.parametrize("reader", READERS)
def test_damaged_weights_are_refused_by_every_command_that_reads_them(
    numprune: Command, tiny: Path, model: Path, tmp_path: Path, reader: str, damage: Callable[[Path], str]
) -> None:
    if (reader, damage) == ("inspect", nan):
        pytest.skip("inspect reads headers, whatever the model's size")
    reason = damage(model)
    places = {"MODEL": model, "OUT": tmp_path / "out", "GOOD": tiny / "base", "TEXT": tiny / "train.txt"}
    refused(numprune(*(places.get(word, word) for word in READERS[reader])), str(model), reason)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [remove, truncate, nan])
def test_damaged_weights_end_a_run(
    numprune: Command, tiny: Path, model: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    reason = damage(model)
    answered = numprune(*command(tiny / "recipe.toml", tmp_path / "w", f"model.path={model}"))
    refused(answered, str(model), reason)
    assert not (tmp_path / "w" / "releases").exists()


# --- tokenizers -----------------------------------------------------------------------------------


def labelled_llama(model: Path) -> None:
    """A byte-level tokenizer of that class, as in R1-distilled models."""
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))


def test_a_tokenizer_that_vllm_would_read_differently(
    numprune: Command, tiny: Path, model: Path, tmp_path: Path
) -> None:
    """Its own tokens are used for pruning and scoring; an export that would be served with others is refused."""
    text = ["--text", tiny / "train.txt", "--sequence-length", "64"]
    before = numprune("evaluate", model, *text, "--json").json
    labelled_llama(model)
    assert numprune("evaluate", model, "--baseline", tiny / "base", *text, "--json").json["kl_nats_per_token"] == 0
    assert numprune("evaluate", model, *text, "--json").json == before
    remedy = 'set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
    pruned = numprune("prune", model, tmp_path / "out", "--ratio", "0.2", "--samples", "4", *text)
    assert (pruned.code, remedy in pruned.err) == (0, True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    refused(numprune("export", model, tmp_path / "served", "--to", "vllm"), remedy)
    answered = numprune(*command(tiny / "recipe.toml", tmp_path / "w", f"model.path={model}"))
    refused(answered, "model.path: ", remedy)
    assert not (tmp_path / "w").exists()


def with_more_tokens(model: Path) -> None:
    """One word of the text is a token without an embedding in the model."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("fox", special=False)])
    tokenizer.save_pretrained(model)


def with_other_tokens(model: Path) -> None:
    """The same number of tokens in another order."""
    saved = json.loads((model / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(saved))


def test_a_text_with_token_ids_beyond_the_vocabulary(
    numprune: Command, tiny: Path, model: Path, tmp_path: Path
) -> None:
    with_more_tokens(model)
    text = ["--sequence-length", "64", "--text", tiny / "train.txt"]
    prune = ["prune", model, tmp_path / "out", "--ratio", "0.2", "--samples", "4", *text]
    for arguments in (["evaluate", model, *text], prune, [*prune, "--stream"]):
        refused(numprune(*arguments), "token 259 is outside the model's vocabulary of 259", "tokenizer")
    answered = numprune(*command(tiny / "recipe.toml", tmp_path / "w", f"model.path={model}"))
    refused(answered, "token 259 is outside the model's vocabulary of 259")


def test_a_tokenizer_larger_than_the_vocabulary(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    build_tiny(vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=3).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    answered = numprune(*command(tiny / "recipe.toml", tmp_path / "w", f"model.path={tmp_path / 'model'}"))
    refused(answered, "model.path: ", "the tokenizer has 259 tokens, but config.json says vocab_size=200")
    assert not (tmp_path / "w").exists()


def test_candidate_and_baseline_with_different_tokenizers(numprune: Command, tiny: Path, model: Path) -> None:
    """The same sizes: only the tokens themselves differ."""
    with_other_tokens(model)
    for one, other in ((model, tiny / "base"), (tiny / "base", model)):
        for arguments in (
            ["evaluate", one, "--baseline", other, "--text", tiny / "train.txt"],
            ["benchmark", one, "--baseline", other, "--runtime", "torch", "--text", tiny / "train.txt"],
        ):
            refused(numprune(*arguments), f"{one} and {other}: their tokenizers give different tokens for the text")


# --- texts ----------------------------------------------------------------------------------------


def documents(path: Path, *texts: str) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def test_texts_too_short_or_empty(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.txt").write_text(" \n")
    documents(tmp_path / "hollow.jsonl", "", "", "x")
    for name, reason in (
        ("short.txt", "give more text, fewer samples or a shorter sequence length"),
        ("empty.txt", "is empty"),
        ("hollow.jsonl", "the text has no document of at least two tokens"),
    ):
        text = tmp_path / name
        prune = ["prune", tiny / "base", tmp_path / "out", "--ratio", "0.2", "--text", text]
        refused(numprune(*prune), reason)
        answered = numprune(*command(tiny / "recipe.toml", tmp_path / "w", f"data.calibration={[str(text)]}"))
        refused(answered, reason)
        if name != "short.txt":
            refused(numprune("evaluate", tiny / "base", "--text", text), reason)
            answered = numprune(*command(tiny / "recipe.toml", tmp_path / "w", f"data.heldout={[str(text)]}"))
            refused(answered, reason)
    assert not (tmp_path / "out").exists()


def test_texts_in_other_formats_are_refused_by_name(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("text\nwords")
    (tmp_path / "records.txt").write_text(json.dumps({"text": "words"}))
    (tmp_path / "folder").mkdir()
    texts = [tmp_path / "table.csv", tmp_path / "records.txt", tmp_path / "folder"]
    said = [
        f"text file '{texts[0]}' is a table, not text; write its text column as .jsonl, a line",
        f"text file '{texts[1]}' contains JSON; rename it to .jsonl (a record per line) or .json",
        f"{texts[2]}: is a folder, but not one that `Dataset.save_to_disk` wrote; give the text files in it",
    ]
    prune = ["prune", tiny / "base", tmp_path / "out", "--ratio", "0.2", "--text", *texts]
    refused(numprune(*prune), *said)
    refused(numprune("evaluate", tiny / "base", "--text", *texts), *said)
    data = [f"data.{part}={list(map(str, texts))}" for part in ("calibration", "heldout")]
    answered = numprune(*command(tiny / "recipe.toml", tmp_path / "w", *data))
    refused(answered, "data.calibration: ", "data.heldout: ", *said)
    answered = numprune(
        *command(tiny / "recipe.toml", tmp_path / "w", "data.calibration=embedded", "data.split=blank-line")
    )
    refused(answered, "data.split = 'blank-line': there is no plain text file to split; omit it")
    assert not (tmp_path / "w").exists()


def test_empty_documents_change_nothing(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    texts = [f"Document {number} is about {number} sheep." for number in range(24)]
    plain = documents(tmp_path / "plain.jsonl", *texts)
    hollow = documents(tmp_path / "hollow.jsonl", "", *texts[:12], "", " ", *texts[12:], "")
    found = [numprune("evaluate", tiny / "base", "--text", text, "--json").json for text in (plain, hollow)]
    assert found[0] == found[1]


def test_a_ratio_below_the_floor(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    prune = ["prune", tiny / "base", tmp_path / "out", "--ratio", "0.99", "--text", tiny / "train.txt"]
    refused(numprune(*prune), "ratio is 0.99, but with the minimum that every block must keep")
    answered = numprune(*command(tiny / "recipe.toml", tmp_path / "w", "prune.ratio=0.99"))
    refused(answered, "prune: ratio is 0.99, but with the minimum that every block must keep")
    assert not (tmp_path / "w").exists()


# --- paths ----------------------------------------------------------------------------------------

ODD = "Größe & 'Maß' 模型 🙂"


@pytest.mark.slow
def test_paths_with_spaces_and_non_latin_scripts(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    """Model, texts, recipe, workspace, release and registry, under a locale without their characters."""
    here = tmp_path / ODD
    shutil.copytree(tiny, here)
    (here / "base").rename(here / f"base {ODD}")
    (here / "train.txt").rename(here / f"train {ODD}.txt")
    recipe = here / f"recipe {ODD}.toml"
    recipe.write_text(RECIPE.replace('"base"', f'"base {ODD}"').replace('"train.txt"', f'"train {ODD}.txt"'))
    workspace = here / f"work {ODD}"
    assert finish(recipe, workspace)["version"] == "tiny/1"
    where = ["--workspace", str(workspace)]
    assert numprune("registry", "promote", "tiny", *where).code == 0
    assert numprune("registry", "fetch", "tiny", here / f"out {ODD}", *where).code == 0
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    done = subprocess.run(
        [sys.executable, "-m", "numprune.flows.cli", "inspect", str(here / f"out {ODD}" / "checkpoint")],
        capture_output=True,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, b"")


# --- clocks ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_from_the_future_are_used_normally(numprune: Command, workspace: Path, tiny: Path) -> None:
    """As after the clock was set back: all times are in the future."""
    before = digests(workspace)
    for path in (workspace, *workspace.rglob("*")):
        os.utime(path, (2**31 - 1, 2**31 - 1))
    answered = numprune(*command(tiny / "recipe.toml", workspace))
    assert (answered.code, answered.json["version"]) == (0, "tiny/1")
    assert all(one["reused"] for one in answered.json["stages"])
    assert digests(workspace) == before


def test_a_publisher_counts_as_alive_whatever_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's boot time moves with the clock; a publisher taken for dead would lose its files."""
    from numprune.serving.registry import publishing

    us = publishing._this_process()
    for name in ("self", str(os.getpid())):
        (tmp_path / name).symlink_to(Path("/proc") / name)
    clock = re.sub(r"btime (\d+)", lambda found: f"btime {int(found[1]) - 864_000}", Path("/proc/stat").read_text())
    (tmp_path / "stat").write_text(clock)
    before = psutil.Process().create_time()
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert before - psutil.Process().create_time() == pytest.approx(864_000)  # that is what a step of the clock does
    assert not publishing._is_dead(us)


# In front of the C library: the clock of the day is as many seconds off as a file says; others are left alone.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long long offset(void) {
    long long seconds = 0;
    FILE *file = fopen(getenv("FAULTS_CLOCK"), "r");
    if (!file) return 0;
    if (fscanf(file, "%lld", &seconds) != 1) seconds = 0;
    fclose(file);
    return seconds;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (!code && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (out) *out = precise.tv_sec;
    return precise.tv_sec;
}
"""


@pytest.mark.slow
def test_the_clock_goes_back_during_a_run(workspace: Path, tiny: Path, finished: Path, tmp_path: Path) -> None:
    """By ten days, between two stages, for the run and all its processes.

    Not with libfaketime: that breaks sleeping where it leaves the monotonic clock alone, as a real clock does.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to build the clock with")
    library, clock = tmp_path / "clock.so", tmp_path / "clock"
    (tmp_path / "clock.c").write_text(CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    for name in ("calibration", "prune", "reference-answers", "quality", "report"):
        shutil.rmtree(stage(workspace, name))
    clock.write_text("864000")
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAULTS_CLOCK": str(clock)}
    process = subprocess.Popen(
        [sys.executable, "-m", "numprune.flows.cli", *command(tiny / "recipe.toml", workspace)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    wait_until(lambda: list((workspace / "stages").glob("calibration-*")) or process.poll() is not None)
    clock.write_text("0")
    out, err = process.communicate()
    assert process.returncode == 0, err
    found = json.loads(out)
    assert all(0 <= one["seconds"] < 300 for one in found["stages"])
    assert {one["name"] for one in found["stages"] if not one["reused"]} >= {"calibration", "prune", "report"}
    assert digests(workspace) == digests(finished)
