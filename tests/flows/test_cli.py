import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from numprune.export import manifest
from numprune.flows.cli import COMMANDS as MODULES
from numprune.flows.cli.parser import Parser, build, parse
from tests.conftest import build_tiny, byte_tokenizer
from tests.flows.conftest import Answered, shell

Command = Callable[..., Answered]


@pytest.fixture(scope="module")
def pruned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answered]:
    """A pruned checkpoint and the command's output, from a process of its own as in a script."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    command = ["prune", tiny / "base", out, "--ratio", 0.3, "--text", tiny / "train.txt", tiny / "heldout.jsonl"]
    return out, shell(*command, "--samples", 8, "--sequence-length", 64, "--json")


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["help", "optimize"],
        ["--version"],
        ["completion", "bash"],
        ["gate", "none.json", "--policy", "no"],
    ],
)
def test_help_imports_no_heavy_library(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from numprune.flows.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'transformers', 'prefect', 'mlflow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [["--help"], ["help"], ["--help", "prune"], ["prune", "-h"], ["help", "prune"], ["help", "registry", "list"]],
)
def test_help(numprune: Command, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        numprune(*words)
    shown = capfd.readouterr()
    assert (left.value.code, shown.err) == (0, "")
    command = [] if words[0] == "--help" else [word for word in words if word not in ("help", "-h")]
    assert shown.out.startswith(" ".join(["usage: numprune", *command, ""]))


@pytest.mark.parametrize("words", [[], ["registry"], ["runs"]])
def test_without_a_command_help_is_printed_with_exit_code_1(
    numprune: Command, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        numprune(*words)
    shown = capfd.readouterr()
    assert (left.value.code, shown.err) == (1, "")
    assert "list" in shown.out or "optimize" in shown.out


def parsers(parser: Parser) -> Iterator[Parser]:
    yield parser
    for below in parser.commands.values():
        yield from parsers(below)


def test_every_help_has_an_example_that_parses() -> None:
    for parser in parsers(build(MODULES)):
        example = parser.format_help().partition("Example:")[2].strip().splitlines()[0]
        words = shlex.split(example.partition(" > ")[0])
        assert words[: len(parser.prog.split())] == parser.prog.split()
        parse(build(MODULES), words[1:])


def test_help_lists_the_choices_of_every_option_and_its_default() -> None:
    from numprune.flows.studies.compare.command import _parser as compare
    from numprune.flows.studies.speed.command import _parser as speed

    seen = set()
    for parser in [*parsers(build(MODULES)), compare(), speed()]:
        for action in parser._actions:
            if not action.option_strings or isinstance(action, argparse._HelpAction | argparse._VersionAction):
                continue
            shown = " ".join(str(action.help).split())
            assert shown, action
            if action.choices:
                seen.add(action.option_strings[0])
                assert [choice for choice in action.choices if str(choice) not in shown] == [], shown
                assert action.default is None or f"default: {action.default}" in shown, shown
            if action.nargs != 0 and not action.required:  # a flag that is not given is no
                assert "default" in shown, f"{parser.prog} {action.option_strings}: {shown}"
    assert seen >= {"--criterion", "--allocation", "--compensation", "--to", "--runtime", "--device", "--log-format"}


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(numprune: Command, capfd: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit) as left:
        numprune(option)
    assert (left.value.code or 0) == 0
    assert capfd.readouterr().out.startswith("numprune ")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["prune", "m", "o", "--text", "t"],
            "arguments are required: --ratio, --budget, --hidden-size, --window or --plan",
        ),
        (["prune", "m", "--ratio", "0.3", "--text", "t"], "the following arguments are required: OUT"),
        (["prune", "m", "o", "--text", "t", "--ratio", "much"], "invalid float value: 'much'"),
        (["prune", "m", "o", "--text", "t", "--ratio", "0.3", "--allocation", "best"], "invalid choice: 'best'"),
        (
            ["prune", "m", "o", "--text", "t", "--ratio", "0.3", "--samples", "0"],
            "argument --samples: 0 must be at least 1",
        ),
        (
            ["evaluate", "m", "--text", "t", "--sequence-length", "1"],
            "argument --sequence-length: 1 must be at least 2",
        ),
        (["evaluate", "m", "--text", "t", "--split", "("], 'argument --split: \'(\' must be "file", "blank-line" or'),
        (["prune", "m", "o", "--ratio", "0.1", "--text", "t", "--axes", "heads"], "argument --axes: invalid choice"),
        (
            ["prune", "m", "o", "--ratio", "0.1", "--text", "t", "--floor", "mlp"],
            "argument --floor: 'mlp' must be KIND=SHARE, like attention=0.5",
        ),
        (["benchmark", "c", "--baseline", "b", "--runtime", "tgi"], "invalid choice: 'tgi'"),
        (
            ["benchmark", "c", "--baseline", "b", "--runtime", "torch", "--no-pack"],
            "--split, --chat and --pack need --text",
        ),
        (["serve", "m", "--vllm", "./none"], "none: no virtual environment there"),
        (["optimize", "none.toml"], "recipe none.toml: no such file"),
        (["inspect", "./none"], "none: no such folder"),
        (["gate", "none.json", "--policy", "none.toml"], "policy none.toml: no such file"),
    ],
)
def test_usage_errors_are_one_line_with_exit_code_1(numprune: Command, argv: list[str], said: str) -> None:
    answered = numprune(*argv)
    assert (answered.code, answered.out) == (1, "")
    assert answered.err.startswith("numprune: error: ")
    assert answered.err.count("\n") == 1
    assert said in answered.err


def test_with_json_a_failure_is_an_object(
    numprune: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, said in (
        (["inspect", tmp_path / "none", "--json"], f"{tmp_path}/none: no such folder"),
        (["inspect", "--json"], "the following arguments are required: MODEL (see numprune inspect --help)"),
        (["inspct", "--json"], "unknown command 'inspct'; did you mean 'inspect'? (see numprune --help)"),
    ):
        failed = numprune(*words)
        assert (failed.code, failed.json) == (1, {"error": said, "exit_code": 1})
        assert failed.err == f"numprune: error: {said}\n"
    assert numprune("rollback", "m", "--vllm", "./none", "--", "--json").out == ""

    def fails(_args: argparse.Namespace) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("numprune.flows.cli.model.inspect", fails)
    capfd.readouterr()
    with pytest.raises(ZeroDivisionError):
        numprune("inspect", "m", "--json")
    assert json.loads(capfd.readouterr().out) == {"error": "ZeroDivisionError: ours", "exit_code": 1}


def test_inspect(numprune: Command, tiny: Path) -> None:
    found = numprune("inspect", tiny / "base", "--json").json
    assert (found["family"], found["layers"], found["uniform"], found["plan"]) == ("llama", 2, True, None)
    assert found["prunable_parameters"] == sum(b["units"] * b["parameters_per_unit"] for b in found["blocks"])
    text = numprune("inspect", tiny / "base").out
    assert f"{found['parameters']:,}" in text
    assert f"{found['weight_bytes'] / 1024:.1f} KiB ({found['weight_bytes']:,} bytes)" in text
    heads, groups = ([block[part] for block in found["blocks"][::2]] for part in ("members", "units"))
    query_heads = [members * units for members, units in zip(heads, groups, strict=True)]
    for what, counts in (("query heads", query_heads), ("KV groups", groups)):
        assert re.search(rf"attention: {what} by layer +{', '.join(map(str, counts))}\n", text)
    attention, mlp = found["blocks"][:2]
    head = 2 * found["hidden_size"] * found["head_dim"]  # rows of the query projection, columns of the output's
    for key, units, members, parameters, line in (
        ("query-heads", 0, 1, attention["units"] * head, "attention: 1 head of every group"),
        ("attention", 1, 0, attention["parameters_per_unit"], "attention: 1 KV group of every layer"),
        ("mlp", 8, 0, 8 * mlp["parameters_per_unit"], "mlp: 8 channels of every layer"),
    ):
        share = parameters / found["prunable_parameters"]
        step = {"units": units, "members": members, "every_layer": 2 * share, "one_layer": share}
        assert found["granularity"][key] == pytest.approx(step)
        assert re.search(
            rf"{re.escape(line)} +{2 * share:.2%} of the prunable parameters, {share:.3%} in one layer", text
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "layers.0", "layers.9.mlp"], "keep: 'layers.9.mlp' is unknown; the model has layers.0 to layers.1"),
        (["--keep", "layers.0"], "keep: uniform allocation gives every layer the same size"),
        (["--floor", "attention=0.5", "--floor", "mlp=2"], "floors: mlp is 2.0; it must be between 0 and 1"),
        (["--floor", "mlp=0.9", "--floor", "attention=1"], "at most 0.0"),
        (["--axes", "query-heads", "--allocation", "global"], "axes: allocation global sorts whole units"),
    ],
)
def test_impossible_protection_is_refused_before_any_work(
    numprune: Command, tiny: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    text = ["--text", tiny / "train.txt"]
    answered = numprune("prune", tiny / "base", tmp_path / "out", "--ratio", "0.3", *text, *options)
    assert (answered.code, answered.out) == (1, "")
    assert said in answered.err
    assert not (tmp_path / "out").exists()


def test_unsupported_architecture_is_refused_by_name(numprune: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    answered = numprune("inspect", tmp_path)
    assert answered.code == 1
    assert "'mamba' (MambaForCausalLM) is not supported; supported are llama, mistral, qwen2, qwen3" in answered.err


def test_prune(pruned: tuple[Path, Answered], numprune: Command, tiny: Path) -> None:
    out, answered = pruned
    assert answered.code == 0, answered.err
    found = answered.json
    assert manifest.verify(out).digest == found["digest"]
    assert manifest.read(out).kind == "checkpoint"
    before, after = (numprune("inspect", model, "--json").json for model in (tiny / "base", out))
    assert (found["parameters_before"], found["parameters_after"]) == (before["parameters"], after["parameters"])
    removed = 1 - after["prunable_parameters"] / before["prunable_parameters"]
    assert found["prunable_ratio_removed"] == pytest.approx(removed)
    assert 0.2 < removed < 0.4
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 100 << 20
    assert after["plan"]["criterion"] == "obs"
    text = numprune("inspect", out).out
    for number, split in enumerate(after["plan"]["splits"]):
        heads = f" of {split['query_heads']} query heads" if split["query_heads"] > 1 else ""
        sizes = f"{split['kv_groups']} KV groups?{heads} and {split['mlp_channels']} channels per layer"
        assert re.search(rf"{'other' if number else 'chosen'} split +{sizes}, priced at \d", text)
    (attention, mlp), chosen = after["blocks"][:2], after["plan"]["splits"][0]
    assert (attention["units"], attention["members"]) == (chosen["kv_groups"], chosen["query_heads"])
    assert mlp["units"] == chosen["mlp_channels"]

    again = numprune("prune", tiny / "base", out, "--ratio", "0.1", "--text", tiny / "train.txt")
    assert (again.code, again.out) == (1, "")
    assert "already exists" in again.err
    assert manifest.verify(out).digest == found["digest"]


def test_streamed_pruning_gives_the_same_result_and_sweeps_first(
    pruned: tuple[Path, Answered], numprune: Command, tiny: Path, tmp_path: Path
) -> None:
    left = tmp_path / ".out.0123456789abcdef.partial"
    left.mkdir()
    (left / "lock").touch()
    command = ["prune", tiny / "base", tmp_path / "out", "--ratio", 0.3]
    text = ["--text", tiny / "train.txt", tiny / "heldout.jsonl", "--samples", 8, "--sequence-length", 64]
    found = numprune(*command, *text, "--stream", "--json").json
    in_memory, answered = pruned
    same = ("parameters_before", "parameters_after", "prunable_ratio_removed", "weight_bytes_after")
    assert {name: found[name] for name in same} == {name: answered.json[name] for name in same}
    assert manifest.verify(tmp_path / "out").facts == manifest.read(in_memory).facts
    assert not left.exists()


def test_compensation_with_a_bias(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    command = ["--ratio", 0.3, "--compensation", "bias", "--criterion", "flap", "--text", tiny / "train.txt"]
    done = numprune("prune", tiny / "base", tmp_path / "out", *command, "--samples", 8, "--sequence-length", 64)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)
    build_tiny("mistral").save_pretrained(tmp_path / "mistral")
    byte_tokenizer().save_pretrained(tmp_path / "mistral")
    refused = numprune("prune", tmp_path / "mistral", tmp_path / "none", *command)
    assert (refused.code, refused.err) == (
        1,
        "numprune: error: compensation bias: the projections of mistral cannot have a bias; use another compensation\n",
    )


def test_prune_refuses_invalid_options_before_any_work(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    common = ["prune", tiny / "base", tmp_path / "out", "--sequence-length", 64]
    short = numprune(*common, "--text", tiny / "train.txt", "--ratio", 0.3, "--samples", 1000)
    assert "--samples: the calibration text gives 70 windows of 64 tokens, but 1000 samples were" in short.err
    ratio = numprune(*common, "--text", tiny / "train.txt", "--ratio", 1.5, "--samples", 4)
    assert "ratio is 1.5" in ratio.err
    text = numprune(*common, "--text", tiny / "none.txt", "--ratio", 0.3)
    assert "none.txt' does not exist" in text.err
    assert [short.code, ratio.code, text.code] == [1, 1, 1]
    assert not (tmp_path / "out").exists()


def test_evaluate_honours_the_text_options(numprune: Command, tiny: Path, tmp_path: Path) -> None:
    """A chat file, and one file of many documents: packed, unpacked, split."""
    shutil.copytree(tiny / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    talk = [{"role": "user", "content": "How many sheep?"}, {"role": "assistant", "content": "Seven."}]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for _ in range(6)))
    command = ["evaluate", tmp_path / "base", "--sequence-length", 32, "--json", "--text"]

    refused = numprune(*command, tmp_path / "chat.jsonl")
    assert 'line 1 must be an object with a string field "text"; it has messages: --chat, or data.chat' in refused.err
    chat = numprune(*command, tmp_path / "chat.jsonl", "--chat").json
    tokens = 6 * len("How many sheep?.Seven..")  # an EOS after each message
    assert (chat["documents"], chat["packed"], chat["tokens"]) == (6, True, tokens - -(-tokens // 32))
    apart = numprune(*command, tmp_path / "chat.jsonl", "--chat", "--no-pack").json
    assert (apart["documents"], apart["packed"], apart["tokens"]) == (6, False, tokens - 6)

    lines = (tiny / "heldout.jsonl").read_text().splitlines()
    (tmp_path / "one.txt").write_text("\n\n".join(json.loads(line)["text"] for line in lines))
    split = numprune(*command, tmp_path / "one.txt", "--split", "blank-line").json
    records = numprune(*command, tiny / "heldout.jsonl").json
    assert {**split, "model": ""} == {**records, "model": ""}
    assert split["documents"] == 24
    dead = numprune(*command, tiny / "heldout.jsonl", "--split", "blank-line")
    assert dead.err == "numprune: error: --split blank-line: there is no plain text file to split; omit it\n"
    found = numprune(*command, tmp_path / "one.txt", "--baseline", tmp_path / "base")
    assert found.json["nll_delta_nats_per_token"]["sampling_unit"] == "window"
    assert "the held-out text has 1 document, so intervals are over its" in found.err


def test_evaluate(pruned: tuple[Path, Answered], numprune: Command, tiny: Path) -> None:
    text = ["--text", tiny / "heldout.jsonl", "--sequence-length", 32, "--json"]
    alone = numprune("evaluate", pruned[0], *text).json
    assert set(alone) == {"model", "nll_nats_per_token", "perplexity", "tokens", "documents", "packed"}
    both = numprune("evaluate", pruned[0], "--baseline", tiny / "base", *text).json
    assert both["nll_nats_per_token"] == pytest.approx(alone["nll_nats_per_token"], rel=1e-6)
    assert both["tokens"] == alone["tokens"]
    delta = both["nll_delta_nats_per_token"]
    assert delta["value"] == pytest.approx(both["nll_nats_per_token"] - both["baseline"]["nll_nats_per_token"])
    assert delta["interval95"][0] <= delta["value"] <= delta["interval95"][1]
    assert (delta["samples"], delta["sampling_unit"]) == (24, "document")
    assert 0 <= both["top1_agreement"] <= 1
    assert both["kl_nats_per_token"] > 0


@pytest.mark.parametrize("target", ["onnx", "onnxruntime", "vllm"])
def test_export_is_proved(pruned: tuple[Path, Answered], numprune: Command, tmp_path: Path, target: str) -> None:
    answered = numprune("export", pruned[0], tmp_path / "out", "--to", target, "--json")
    assert answered.code == 0, answered.err
    assert manifest.verify(tmp_path / "out").digest == answered.json["digest"]
    assert answered.json["parity"]["logit_error_max"] < answered.json["parity"]["tolerance"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_benchmark_then_gate(pruned: tuple[Path, Answered], numprune: Command, tiny: Path, tmp_path: Path) -> None:
    arguments = ["--baseline", tiny / "base", "--runtime", "onnxruntime", "--text", tiny / "heldout.jsonl", "--json"]
    measured = shell("benchmark", pruned[0], *arguments)
    assert measured.code == 0, measured.err
    assert "exporting the candidate to a temporary folder" in measured.err
    report = measured.json
    assert report["verdict"] is None
    assert report["speed"]["onnxruntime"]["decode_tokens_per_s"]["ratio"]["samples"] > 1
    assert report["quality"]["documents"] == 24
    # How busy this machine is just now is not what is tested here.
    report["environment"] |= {"valid": True, "reasons": []}
    (tmp_path / "report.json").write_text(json.dumps(report))

    policy = tmp_path / "policy.toml"
    gate = '[[gates]]\nmetric = "{}"\nbound = "{}"\n{}\n'
    for gates, code in [
        (gate.format("sizes.parameters.ratio", "point", "max = 0.9"), 0),
        (gate.format("sizes.parameters.ratio", "point", "max = 0.1"), 2),
        (gate.format("quality.loss_delta", "ci95_upper", f"max = {middle(report)}"), 3),
        (gate.format("speed.torch.ttft.ratio", "point", "max = 9.0"), 2),
    ]:
        policy.write_text(gates)
        judged = numprune("gate", tmp_path / "report.json", "--policy", policy, "--json")
        assert judged.code == code, judged.out
        metric = tomllib.loads(gates)["gates"][0]["metric"]
        text = numprune("gate", tmp_path / "report.json", "--policy", policy)
        assert text.code == code
        assert f"{judged.json['gates'][0]['outcome']}  " in text.out
        assert metric in text.out

    report["environment"] |= {"valid": False, "reasons": ["the fan is off"]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert numprune("gate", tmp_path / "report.json", "--policy", policy).code == 4


def middle(report: dict[str, dict[str, dict[str, float]]]) -> float:
    """A limit inside the interval."""
    delta = report["quality"]["loss_delta"]
    return (delta["value"] + delta["ci95_upper"]) / 2


def test_stdout_is_one_json_object_and_nothing_else(tiny: Path) -> None:
    done = shell("inspect", str(tiny / "base"), "--json")
    assert done.code == 0
    assert done.json["family"] == "llama"
    assert done.err == ""


def test_a_closed_pipe_is_not_an_error(tiny: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "numprune.flows.cli", "inspect", str(tiny / "base")]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_prints_no_traceback(tmp_path: Path) -> None:
    fifo = tmp_path / "policy.toml"
    os.mkfifo(fifo)
    program = "import sys; from numprune.flows.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "gate", "r.json", "--policy", str(fifo)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        writer = None
        while writer is None and process.poll() is None:
            try:  # which succeeds once the command reads the policy; then it waits for text that never comes
                writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "numprune: interrupted\n")
    assert writer is not None
    os.close(writer)
