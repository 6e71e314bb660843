"""numprune kubernetes, from a registry to a file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from numprune.export import manifest, vllm
from numprune.flows.cli import COMMANDS, main
from numprune.flows.cli.parser import build, parse
from numprune.serving import registry as registries
from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.report import Report, write

ARGUMENTS = ["--image", "registry.example/numprune:0.1.0", "--registry-uri", "http://mlflow.example:5000"]


@pytest.fixture
def workspace(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    """With a release called `served`, published and promoted."""
    part = vllm.export(tiny_checkpoint(head_dim=32), tmp_path / "part")
    report = Report.model_validate(
        {
            "created": "2026-11-20T12:00:00Z",
            "run_id": "a-run",
            "identity": {"base": "a" * 64, "candidate": part.digest},
            "environment": {"cpu": "A CPU", "cores": 2, "memory_bytes": 1 << 30, "platform": "Linux", "valid": True},
            "sizes": {"parameters": {"baseline": 2, "candidate": 1}},
        }
    )
    policy = Policy(gates=(Gate(metric="sizes.parameters.ratio", bound="point", max=0.9),))
    with manifest.creating(tmp_path / "release", kind="release") as folder:
        shutil.copytree(tmp_path / "part", folder / "checkpoint")
        (folder / "reference-answers.json").write_text("{}")
        write(report.judged(judge(report, policy)), folder / "report.json")
    registry = registries.open_registry(None, tmp_path / "workspace")
    registries.publish(registry, tmp_path / "release", "served")
    registries.promote(registry, "served")
    return tmp_path / "workspace"


def test_manifests_of_the_version_in_production(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "served.yaml"
    asked = ["kubernetes", "served", *ARGUMENTS, "--workspace", str(workspace), "--out", str(out)]

    assert main([*asked, "--format", "deployment", "--namespace", "llm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == "served/1"
    assert found["digest"] == manifest.read(tmp_path / "release").digest
    documents = list(yaml.safe_load_all(out.read_text(encoding="utf-8")))
    assert documents == found["documents"]
    assert [document["kind"] for document in documents] == ["Deployment", "Service"]
    assert documents[0]["metadata"]["namespace"] == "llm"

    values = tmp_path / "values.yaml"
    values.write_text("nodeSelector: {pool: llm}\nsecurityContext: {runAsUser: 1000}\n")
    assert main([*asked, "--format", "deployment", "--values", str(values), "--api-key-secret", "keys"]) == 0
    pod = next(yaml.safe_load_all(out.read_text(encoding="utf-8")))["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "llm"}
    assert "secretKeyRef" in str(pod["containers"])
    assert "runAsUser" not in capsys.readouterr().out

    assert main([*asked, "--format", "kserve"]) == 0
    told = capsys.readouterr().out
    assert "InferenceService for served/1" in told
    assert "set securityContext.runAsUser with --values" in told

    written = out.read_text(encoding="utf-8")
    assert main([*asked, "--format", "deployment", "--namespace", "no such: namespace"]) == 1
    assert "--namespace" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == written


def test_the_containers_run_valid_commands(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "served.yaml"
    asked = ["kubernetes", "served@production", *ARGUMENTS, "--workspace", str(workspace), "--out", str(out)]
    assert main([*asked, "--format", "deployment"]) == 0
    spec = next(yaml.safe_load_all(out.read_text(encoding="utf-8")))["spec"]["template"]["spec"]

    fetch = spec["initContainers"][0]["args"]
    assert parse(build(COMMANDS), fetch).uri == "http://mlflow.example:5000"
    # The same from the registry that there is, and again, as when a pod's init containers are run once more.
    content = f"/release/{manifest.read(tmp_path / 'release').digest[:16]}"
    here = {content: str(tmp_path / "content"), "/tmp/numprune": str(workspace)}
    uri = fetch.index("--uri")
    for _ in range(2):
        assert main([here.get(word, word) for word in fetch[:uri] + fetch[uri + 2 :]]) == 0
        assert manifest.verify(tmp_path / "content").digest == manifest.read(tmp_path / "release").digest

    example = yaml.safe_load((Path(__file__).resolve().parents[2] / "examples" / "onnx-kserve.yaml").read_text())
    pod = example["spec"]["predictor"]
    fetched = parse(build(COMMANDS), pod["initContainers"][0]["args"])
    assert Path(fetched.out) == Path("/release") / pod["containers"][0]["volumeMounts"][0]["subPath"].removesuffix(
        "/onnx"
    )

    checked = parse(build(COMMANDS), spec["containers"][1]["args"])
    assert (str(checked.release), checked.dtype) == (content, "float32")
