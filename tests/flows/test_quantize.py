"""numprune quantize, and other commands on a quantized checkpoint."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from numprune.byte_budget import LEVELS
from numprune.export import checkpoint, manifest
from numprune.flows import names
from numprune.flows.cli import main
from numprune.quantization import GROUP_SIZES, SCHEMES, Method, Scheme, SchemeName
from numprune.quantization.lm_head import LmHeadBits
from tests.flows.faults import wait_until

Checkpoint = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} squared is {number**2}, halved {number / 2}.\n" for number in range(400)))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_names_match_the_core() -> None:
    assert (names.Scheme, names.QuantizationMethod, names.GROUP_SIZES) == (SchemeName, Method, GROUP_SIZES)
    assert set(get_args(names.QuantizedTo)) == set(LEVELS)
    assert get_args(LmHeadBits) == names.LM_HEAD_BITS


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_then_evaluate_inspect_and_export(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Checkpoint, tmp_path: Path, text: Path, scheme: str
) -> None:
    base, out = tiny_checkpoint(), tmp_path / "quantized"
    group = ("--group-size", 32) if scheme == "w4a16" else ()
    sampled = ("--text", text, "--samples", 8, "--sequence-length", 32)
    code, made = run(capsys, "quantize", base, out, "--scheme", scheme, *group, *sampled)
    assert code == 0
    assert made["scheme"] == scheme
    assert made["weight_bytes_after"] < 0.6 * made["weight_bytes_before"]
    assert made["seconds"] > 0
    assert made["peak_memory_bytes"] > 0
    facts = manifest.verify(out)
    assert facts.parents == {"base": manifest.folder_digest(base)}
    assert facts.facts["quantization"]["method"] == "gptq"

    code, found = run(capsys, "evaluate", out, "--baseline", base, "--text", text, "--sequence-length", 32)
    assert code == 0
    assert 0 < found["kl_nats_per_token"] < 0.2
    assert run(capsys, "inspect", out)[1]["quantization"] == str(Scheme(scheme, made["group_size"]))
    assert run(capsys, "inspect", base)[1]["quantization"] is None

    code, exported_as = run(capsys, "export", out, tmp_path / "vllm", "--to", "vllm")
    assert code == 0, exported_as
    assert exported_as["parity"]["format"]["matrices"] == 14
    assert (tmp_path / "vllm" / "config.json").read_bytes() == (out / "config.json").read_bytes()
    ours, exported = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "vllm"))
    assert ours.keys() == exported.keys()
    assert all(torch.equal(tensor.view(torch.uint8), exported[name].view(torch.uint8)) for name, tensor in ours.items())


def test_a_pruned_model_is_quantized_against_the_dense_model(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    base, pruned = tiny_checkpoint(), tmp_path / "pruned"
    sampled = ("--text", text, "--samples", 8, "--sequence-length", 32)
    targets = ("--align", 32, "--quantization-group", 32)
    assert main(list(map(str, ("prune", base, pruned, "--ratio", 0.3, *targets, *sampled)))) == 0
    capsys.readouterr()
    out = tmp_path / "quantized"
    code, _ = run(capsys, "quantize", pruned, out, "--scheme", "w4a16", "--group-size", 32, "--dense", base, *sampled)
    assert code == 0
    assert (out / "numprune_plan.json").read_bytes() == (pruned / "numprune_plan.json").read_bytes()
    assert manifest.verify(out).parents.keys() == {"base", "dense"}
    row = "| quantization | weights of the layers: w4a16, groups of 32, in the format compressed-tensors |"
    assert (out / "README.md").read_text().count(row) == 1
    needed = (
        "\n## Use\n\nFor the quantized weights, transformers needs `pip install compressed-tensors`. This is a stock"
    )
    assert needed in (out / "README.md").read_text()
    for told in ("| quantization |", "pip install compressed-tensors"):
        assert told not in (pruned / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--scheme", "w8a8"), "required: --text, or --method rtn"),
        (("--scheme", "w8a8", "--method", "rtn", "--text", "t"), "omit --text"),
        (("--scheme", "w8a8", "--method", "rtn", "--group-size", "64"), "w8a8 has one scale per row"),
        (("--scheme", "w4a16", "--method", "rtn"), "choose a group size of 32, or choose another scheme"),
        (
            ("--scheme", "w8a8", "--method", "rtn", "--tensor-parallel", 64),
            "parallel 64 does not divide layer 0",
        ),
        (("--scheme", "int4", "--method", "rtn"), "fp8"),
        (("--scheme", "fp8", "--method", "rtn", "--lm-head-bits", 4), "lm_head_bits is 4, which only the export"),
    ],
)
def test_impossible_requests_are_refused_before_any_reading(
    capsys: pytest.CaptureFixture[str],
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    words: tuple[str, ...],
    says: str,
) -> None:
    code, found = run(capsys, "quantize", tiny_checkpoint(), tmp_path / "out", *words)
    assert code == 1
    assert says in found["error"]
    assert not (tmp_path / "out").exists()


def test_commands_that_need_unquantized_weights_refuse_a_quantized_model(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    base, out = tiny_checkpoint(), tmp_path / "quantized"
    assert run(capsys, "quantize", base, out, "--scheme", "w8a8", "--method", "rtn")[0] == 0
    for words in (
        ("prune", out, tmp_path / "a", "--ratio", "0.2", "--text", text),
        ("prune", out, "--plan-only", "--ratio", "0.2", "--text", text),
        ("quantize", out, tmp_path / "a", "--scheme", "fp8", "--method", "rtn"),
        ("export", out, tmp_path / "a", "--to", "onnx"),
    ):
        code, found = run(capsys, *words)
        assert code == 1
        assert "the checkpoint is quantized (w8a8)" in found["error"]


def test_four_bit_weights_are_exported_to_onnx_dequantized(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out, how = tmp_path / "quantized", ("--scheme", "w4a16", "--group-size", 32, "--method", "rtn")
    assert run(capsys, "quantize", tiny_checkpoint(), out, *how)[0] == 0
    code, found = run(capsys, "export", out, tmp_path / "onnx", "--to", "onnx")
    assert code == 0, found
    assert found["parity"]["logit_error_max"] < 1e-3


# The command, which is stopped when all is written and about to get its name.
_STOPPING = """
    import os, signal, sys, time
    from numprune.flows.cli import main

    def stop(event, args):
        if event == "os.rename" and os.path.basename(str(args[1])) == "out":
            if "killed" in sys.argv:
                os.kill(os.getpid(), signal.SIGKILL)
            open(sys.argv[1] + "/waiting", "w").close()
            while not os.path.exists(sys.argv[1] + "/go"):
                time.sleep(0.01)

    sys.addaudithook(stop)
    sys.exit(main(["quantize", *sys.argv[3:]]))
"""


def stopping(folder: Path, how: str, words: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(_STOPPING), str(folder), how, *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_killed_command_leaves_no_checkpoint_and_is_repeated(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base, folder = tiny_checkpoint(), tmp_path / "folder"
    words = [str(base), str(folder / "out"), "--scheme", "w8a8", "--method", "rtn"]
    with stopping(tmp_path, "killed", words) as process:
        assert process.wait() == -signal.SIGKILL, process.communicate()[1]
    assert [path.name.startswith(".out.") for path in folder.iterdir()] == [True]
    code, made = run(capsys, "quantize", *words)
    assert code == 0
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert manifest.verify(folder / "out").digest == made["digest"]


def test_of_two_commands_with_one_target_the_slower_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base, out = tiny_checkpoint(), tmp_path / "folder" / "out"
    words = [str(base), str(out), "--method", "rtn", "--scheme"]
    with stopping(tmp_path, "waits", [*words, "fp8"]) as slower:
        wait_until((tmp_path / "waiting").exists)
        code, made = run(capsys, "quantize", *words, "w8a8")
        assert code == 0
        (tmp_path / "go").touch()
        _, said = slower.communicate()
    assert slower.returncode == 1
    assert said.strip().endswith(f"{out}: another process created it in the meantime")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert manifest.verify(out).digest == made["digest"]
    assert str(checkpoint.quantized(checkpoint.audit(out))["model.layers.0.mlp.up_proj.weight"]) == "w8a8"
