"""The whole pipeline on a tiny model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from numprune.export import manifest
from numprune.flows.recipe import Recipe
from numprune.serving import report as reports
from tests.flows.collector import Collector, attributes
from tests.flows.conftest import Answered, shell

Command = Callable[..., Answered]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests of this file, which reuse each other's stages."""
    return tmp_path_factory.mktemp("workspace") / "w"


def optimize(numprune: Command, tiny: Path, workspace: Path, *overrides: str) -> Answered:
    """Run the recipe, repeatedly if the machine is too busy to measure."""
    arguments = [argument for override in overrides for argument in ("--set", override)]
    for _ in range(3):
        answered = numprune("optimize", tiny / "recipe.toml", "--workspace", workspace, "--json", *arguments)
        if answered.code != 4:
            return answered
        assert answered.json["reasons"]
        assert answered.json["release"] is None
    pytest.skip(f"nothing can be measured on this machine now: {answered.json['reasons']}")


def test_a_passing_release_is_published(numprune: Command, tiny: Path, workspace: Path) -> None:
    answered = optimize(numprune, tiny, workspace)
    assert answered.code == 0, answered.err
    found = answered.json
    assert (found["outcome"], found["version"]) == ("pass", "tiny/1")

    release = Path(found["release"])
    whole = manifest.verify(release)
    assert whole.kind == "release"
    assert release.parent == workspace / "releases"
    assert 'name="numprune.gates" package="numprune"' in Path(found["junit"]).read_text()
    files = {
        "report.json",
        "report.md",
        "report.html",
        "reference-answers.json",
        "recipe.toml",
        "plan.json",
        "manifest.json",
    }
    assert {path.name for path in release.iterdir()} == {"checkpoint", "onnx", *files}
    resolved = Recipe.model_validate(tomllib.loads((release / "recipe.toml").read_text()))
    report = reports.read(release / "report.json")
    assert report.identity.recipe == resolved.digest
    assert report.identity.candidate == manifest.read(release / "checkpoint").digest
    assert report.identity.exports["onnx"] == manifest.read(release / "onnx").digest
    assert report.identity.base == manifest.folder_digest(tiny / "base")
    assert {"vllm", "onnxruntime"} == set(report.parity)
    assert report.quality is not None
    assert report.quality.documents == 24
    assert report.pruning is not None
    assert report.pruning.ratio_removed.prunable == pytest.approx(0.25, abs=0.1)
    assert report.sizes is not None
    assert report.sizes.parameters is not None
    assert (
        report.sizes.parameters.candidate
        == json.loads(numprune("inspect", release / "checkpoint", "--json").out)["parameters"]
    )

    stages = {stage["name"]: stage for stage in found["stages"]}
    assert {
        "calibration",
        "heldout",
        "prune",
        "reference-answers",
        "quality",
        "benchmark onnxruntime",
        "report",
    } <= set(stages)
    assert all(stage["seconds"] > 0 for stage in stages.values())


def test_the_same_recipe_again_reuses_every_stage_and_publishes_nothing_new(
    numprune: Command, tiny: Path, workspace: Path
) -> None:
    first, second = (optimize(numprune, tiny, workspace) for _ in range(2))
    assert second.code == 0
    assert second.json["version"] == first.json["version"] == "tiny/1"
    assert second.json["release"] == first.json["release"]
    assert all(stage["reused"] for stage in second.json["stages"])
    planned = numprune("plan", tiny / "recipe.toml", "--workspace", workspace, "--json").json
    assert [stage["name"] for stage in planned["stages"]] == [stage["name"] for stage in second.json["stages"]]
    assert all(stage["reused"] for stage in planned["stages"])


def test_a_run_is_recorded_logged_and_traced(
    numprune: Command, tiny: Path, workspace: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMPRUNE_LOG_FORMAT", "json")
    answered = numprune("optimize", tiny / "recipe.toml", "--workspace", workspace, "--json")
    assert answered.code in (0, 4), answered.err  # on a busy machine, too, there is a run
    found = answered.json
    names = [stage["name"] for stage in found["stages"]]
    lines = [json.loads(line) for line in answered.err.splitlines() if line.startswith("{")]
    stages = [line for line in lines if line["logger"] == "numprune.flows.run"]
    assert [line["stage"] for line in stages] == names
    assert {line["run"] for line in lines if line["stage"]} == {found["run"]}

    shown = numprune("runs", "show", found["run"], "--workspace", workspace, "--json").json
    assert (shown["state"], shown["version"], shown["name"]) == (found["outcome"], found["version"], "tiny")
    assert [stage["name"] for stage in shown["stages"]] == names
    assert [stage["seconds"] for stage in shown["stages"]] == [stage["seconds"] for stage in found["stages"]]
    assert all(stage["peak_memory_bytes"] > 1 << 20 for stage in shown["stages"])
    assert shown["release"] == (found["release"] and f"releases/{Path(found['release']).name}")
    told = [json.loads(line) for line in shown["log"]]
    assert [line for line in told if line["logger"] == "numprune.flows.run"] == stages

    spans = collector.spans()
    assert set(spans) == {"optimize", *names}
    assert attributes(spans["optimize"])["numprune.outcome"] == found["outcome"]
    for stage in shown["stages"]:
        span = spans[stage["name"]]
        assert span.parent_span_id == spans["optimize"].span_id
        assert attributes(span)["numprune.run"] == found["run"]
        assert attributes(span)["numprune.digest"] == stage["digest"]
    assert numprune("runs", "clean", "--workspace", workspace, "--json").json["goes"] == []


def test_a_failed_gate_is_named_and_publishes_nothing(numprune: Command, tiny: Path, workspace: Path) -> None:
    optimize(numprune, tiny, workspace)
    size, tokens = "sizes.parameters.ratio", "quality.tokens"
    gate = f'gates=[{{metric="{size}", bound="point", max=0.1}}, {{metric="{tokens}", bound="point", min=1}}]'
    releases = sorted((workspace / "releases").iterdir())
    answered = optimize(numprune, tiny, workspace, gate)
    assert answered.code == 2
    found = answered.json
    assert (found["outcome"], found["release"], found["version"]) == ("fail", None, None)
    assert [gate["outcome"] for gate in found["gates"]] == ["fail", "pass"]
    assert sorted((workspace / "releases").iterdir()) == releases
    versions = numprune("registry", "list", "tiny", "--workspace", workspace, "--json").json["versions"]
    assert [version["version"] for version in versions] == [1]
    assert not any(stage["reused"] for stage in found["stages"] if stage["name"] == "report")
    assert all(stage["reused"] for stage in found["stages"] if stage["name"] != "report")

    price = "benchmark.price_per_hour=3.6"  # for the report alone: nothing is measured again
    text = numprune("optimize", tiny / "recipe.toml", "--workspace", workspace, "--set", gate, price)
    assert text.code == 2
    assert "per million decoded tokens" in text.out
    assert re.search(r"benchmark onnxruntime .*reused", text.out)
    assert "fail, nothing was published: sizes.parameters.ratio fail: beyond the limit" in text.out


def test_an_inconclusive_run_adds_repeats_when_run_again(
    numprune: Command, tiny: Path, workspace: Path, tmp_path: Path
) -> None:
    metric = "speed.onnxruntime.prefill_tokens_per_s.ratio"

    def speed(found: Answered) -> Any:
        return json.loads(Path(found.json["report"]).read_text())["speed"]["onnxruntime"]

    def at_the_limit(found: Answered) -> str:
        """A gate whose limit is the measured value, so that it is inconclusive on any machine."""
        limit = speed(found)["prefill_tokens_per_s"]["ratio"]["value"]
        return f'gates=[{{metric="{metric}", bound="ci95_lower", min={limit}}}]'

    def reused(found: Answered) -> dict[str, bool]:
        return {stage["name"]: stage["reused"] for stage in found.json["stages"] if "benchmark" in stage["name"]}

    settled = optimize(numprune, tiny, workspace)
    shutil.copytree(workspace / "stages", tmp_path / "w" / "stages")  # what is measured here is for no other test
    workspace = tmp_path / "w"
    gate = at_the_limit(settled)
    first = optimize(numprune, tiny, workspace, gate)  # another policy alone measures nothing
    assert (first.code, first.json["next_look"]) == (3, ["onnxruntime"])
    assert reused(first) == {"benchmark onnxruntime": True}
    assert speed(first) == speed(settled)

    second = optimize(numprune, tiny, workspace, gate)  # the same once more: another look
    assert set(reused(second)) == {"benchmark onnxruntime", "benchmark onnxruntime look 2"}
    assert reused(second)["benchmark onnxruntime"]
    before, after = speed(first), speed(second)
    assert (before["looks"], after["looks"]) == (1, 2)
    repeats = before["repeats"]
    assert after["repeats"] == after["prefill_tokens_per_s"]["ratio"]["samples"] == 2 * repeats
    assert after["baseline"]["by_repeat"]["ttft"][:repeats] == before["baseline"]["by_repeat"]["ttft"]
    assert "look 2 of 3, judged by 97.5 % bounds" in second.json["gates"][0]["reason"]

    third = optimize(numprune, tiny, workspace, at_the_limit(second))
    assert speed(third) == after  # nothing again, and nothing left out
    assert third.code == 3


def test_registry_commands_from_the_command_line(
    numprune: Command, tiny: Path, workspace: Path, tmp_path: Path
) -> None:
    release = optimize(numprune, tiny, workspace).json["release"]
    where = ["--workspace", workspace, "--json"]
    assert numprune("registry", "list", *where).json == {"models": [{"name": "tiny", "aliases": {"candidate": 1}}]}
    assert numprune("registry", "publish", release, "tiny", *where).json["reference"] == "tiny/1"
    assert numprune("registry", "show", "tiny@candidate", *where).json["report"]["verdict"]["outcome"] == "pass"
    assert numprune("registry", "verify", "tiny/1", *where).code == 0
    assert numprune("registry", "promote", "tiny", *where).json["aliases"] == ["candidate", "production"]
    assert numprune("registry", "fetch", "tiny", tmp_path / "out", *where).code == 0
    assert manifest.verify(tmp_path / "out").digest == manifest.read(Path(release)).digest
    refused = numprune("registry", "rollback", "tiny", *where)
    assert refused.is_error
    assert refused.err.startswith("numprune: error: tiny: no version was in production before tiny/1")


def test_all_problems_of_a_recipe_are_reported_before_any_work(tiny: Path, tmp_path: Path) -> None:
    overrides = [
        "prune.ratio=0.999",
        "data.calibration=['nothing.txt']",
        "data.sequence_length=1000",
        "benchmark.prompt_length=300",
        "benchmark.runtimes=['onnxruntime', 'tensorrt']",
        "gates=[{metric='speed.torch.ttft.ratio', bound='point', max=1},"
        "{metric='quality.los_delta', bound='point', max=1}, {metric='qualty.tokens', bound='point', min=1}]",
        "registry.uri=ftp://nowhere",
        "target.vllm=0.1.0",
        "target.device=cpu",
    ]
    arguments = [argument for override in overrides for argument in ("--set", override)]
    answered = shell("optimize", tiny / "recipe.toml", "--workspace", tmp_path / "w", *arguments)
    assert (answered.code, answered.out) == (1, "")
    for expected in [
        "prune: ratio is 0.999, but with the minimum that every block must keep",
        "data.calibration: text file ",
        "data.sequence_length = 1000: the model takes at most 256 tokens",
        "benchmark.prompt_length + output_length = 332",
        "benchmark.runtimes: tensorrt runs the export 'tensorrt'; add it to export.targets",
        "gates.0.metric = 'speed.torch.ttft.ratio': 'torch' is not benchmarked",
        "gates.1.metric = 'quality.los_delta': the report has no such figure; did you mean 'loss_delta'?",
        "gates.2.metric = 'qualty.tokens': the report has no section 'qualty'; did you mean 'quality'?",
        "target.vllm = '0.1.0': the tested versions are 0.32.0",
        "target.device = 'cpu': vLLM's CPU kernels support head sizes 32, 64",
        "registry.uri: 'ftp://nowhere': not an MLflow server's address",
    ]:
        assert expected in answered.err
    assert "Traceback" not in answered.err
    assert not (tmp_path / "w").exists()


def test_the_onnxruntime_export_is_proved_timed_and_released(numprune: Command, tiny: Path, workspace: Path) -> None:
    targets = "export.targets=['vllm', 'onnx', 'onnxruntime']"
    answered = optimize(numprune, tiny, workspace, targets, "registry.name=fused")
    assert (answered.code, answered.json["version"]) == (0, "fused/1"), answered.err
    release = Path(answered.json["release"])
    assert {"checkpoint", "onnx", "onnxruntime"} <= {path.name for path in release.iterdir()}
    report = reports.read(release / "report.json")
    assert report.identity.exports["onnxruntime"] == manifest.read(release / "onnxruntime").digest
    assert set(report.parity) == {"vllm", "onnx", "onnxruntime"}
    flavours = {name: found["candidate"]["flavour"] for name, found in report.parity.items() if name != "vllm"}
    assert flavours == {"onnx": "standard-operators", "onnxruntime": "onnxruntime"}
    timed = report.speed["onnxruntime"].runtime
    assert {timed[side]["flavour"] for side in ("baseline", "candidate")} == {"onnxruntime"}


def test_a_killed_run_is_resumed(tiny: Path, tmp_path: Path) -> None:
    """kill -9 of the run: what was finished is reused, nothing half-made is used, no process stays behind."""
    command = [sys.executable, "-m", "numprune.flows.cli", "optimize", str(tiny / "recipe.toml"), "--json"]
    command += ["--workspace", str(tmp_path / "w"), "--set", "export.targets=['onnx']"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    stages = tmp_path / "w" / "stages"
    wait_until(lambda: any(stages.glob(".parity-*.partial")))
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 1
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    finished = {path.name for path in stages.glob("[a-z]*")}
    assert {name.partition("-")[0] for name in finished} >= {"calibration", "heldout", "prune", "export"}

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 4), done.stderr
    found = json.loads(done.stdout)
    reused = {stage["name"].split()[0] for stage in found["stages"] if stage["reused"]}
    assert {"calibration", "heldout", "prune"} <= reused
    assert not any(stage["reused"] for stage in found["stages"] if stage["name"].startswith("parity"))
    assert not list(stages.glob(".*.partial"))


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)
