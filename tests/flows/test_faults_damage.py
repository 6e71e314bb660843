"""A flipped bit in any stage, in a release or in a judged report is never used and never a `pass`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.export import manifest
from numprune.flows import stages
from numprune.flows.stages import Stage
from numprune.flows.steps.results import Timings
from tests.flows.conftest import Answered
from tests.flows.faults import STAGES, command, digests, flip_a_bit, stage

Command = Callable[..., Answered]

pytestmark = pytest.mark.slow


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_bit_flips_in_every_finished_stage(numprune: Command, workspace: Path, finished: Path, tiny: Path) -> None:
    """Each is detected and made again, with the same results as before."""
    damaged = [stage(workspace, name) for name in STAGES if not name.startswith("benchmark")]
    for folder in damaged:
        flip_a_bit(largest(folder))
    answered = numprune(*command(tiny / "recipe.toml", workspace))
    assert answered.code == 0, answered.err
    made = {"-".join(found["name"].split()[:2]) for found in answered.json["stages"] if not found["reused"]}
    assert made == {folder.name.rpartition("-")[0] for folder in damaged}
    assert digests(workspace) == digests(finished)
    assert all(manifest.verify(folder).kind == "stage" for folder in damaged)


def test_a_bit_flips_in_the_release(numprune: Command, workspace: Path, tiny: Path) -> None:
    (release,) = (workspace / "releases").glob("tiny-*")
    flip_a_bit(release / "report.json")
    refused = numprune("registry", "publish", release, "tiny", "--workspace", workspace)
    assert refused.code == 1
    assert f"{release / 'report.json'}: its SHA-256 is " in refused.err
    answered = numprune(*command(tiny / "recipe.toml", workspace))
    assert (answered.code, answered.json["version"]) == (0, "tiny/1")
    assert f"stage {release.name} is damaged" in answered.err
    assert manifest.verify(release).kind == "release"


def test_a_bit_flips_in_the_published_report(numprune: Command, workspace: Path) -> None:
    (stored,) = (workspace / "registry").glob("artifacts/*/artifacts/release")
    flip_a_bit(stored / "report.json")
    for asked in ("promote", "verify", "show"):
        refused = numprune("registry", asked, "tiny@candidate", "--workspace", workspace)
        assert (refused.code, refused.out) == (1, "")
        assert str(stored / "report.json") in refused.err
    aliases = numprune("registry", "list", "--workspace", workspace, "--json").json["models"][0]["aliases"]
    assert aliases == {"candidate": 1}


@pytest.mark.parametrize("damaged", ["report.json", "reference-answers.json", "model.safetensors"])
def test_a_bit_flips_between_a_stage_and_its_release(workspace: Path, tiny: Path, damaged: str) -> None:
    """After the stage was verified: its copy would get its own manifest, and the damage would go unnoticed."""
    from numprune.errors import IntegrityError
    from numprune.flows import bundle, recipe

    shutil.rmtree(workspace / "releases")
    report, answers, exported = (stage(workspace, name) for name in ("report", "reference-answers", "export-vllm"))
    (source,) = [path for folder in (report, answers, exported) for path in folder.rglob(damaged)]
    flip_a_bit(source)
    with pytest.raises(IntegrityError, match=r"damaged since this run verified it; .* again.*" + damaged):
        bundle.make_release(
            workspace, recipe.load(tiny / "recipe.toml"), {"checkpoint": exported / "checkpoint"}, report, answers
        )
    assert not list((workspace / "releases").glob("tiny-*"))


def test_a_verdict_altered_with_its_manifests(numprune: Command, workspace: Path, tmp_path: Path) -> None:
    """Forged: every digest fits, but the gates, judged again, give another verdict."""
    (release,) = (workspace / "releases").glob("tiny-*")
    forged = tmp_path / "forged"
    whole = manifest.read(release)
    with manifest.creating(forged, kind=whole.kind, parents=whole.parents, facts=whole.facts) as content:
        shutil.copytree(release, content, dirs_exist_ok=True)
        (content / "manifest.json").unlink()
        report = json.loads((content / "report.json").read_text())
        report["verdict"]["gates"][1]["max"] = 0.1
        (content / "report.json").write_text(json.dumps(report))
    refused = numprune("registry", "publish", forged, "other", "--workspace", workspace)
    assert refused.code == 1
    assert "sizes.parameters.ratio" in refused.err


def test_only_a_disturbed_look_is_discarded(tmp_path: Path) -> None:
    from numprune.flows.execute import _discard_disturbed

    def look(out: Path, *, number: int, valid: bool) -> Timings:
        return Timings(speed={}, memory={}, environment={"valid": valid}, samples={})

    asked = [
        Stage.of(f"benchmark-{runtime}", "serving", look, number=number, valid=valid)
        for runtime, number, valid in (("torch", 1, True), ("torch", 2, False), ("onnxruntime", 1, True))
    ]
    made = [stages.run_stage(tmp_path, stage) for stage in asked]
    _discard_disturbed([made[:2], made[2:]])
    assert [stages.find(tmp_path, stage) is not None for stage in asked] == [True, False, True]


def test_a_benchmark_repeated_by_another_run_is_not_discarded(tmp_path: Path) -> None:
    """Two runs share an inconclusive measurement; one has measured again when the other discards it."""

    def measure(value: int) -> stages.StageResult[dict[str, int]]:
        return stages.run_stage(tmp_path, Stage.of("benchmark", "serving", lambda out: {"value": value}))

    first = measure(1)
    stages.discard(first)
    second = measure(2)
    stages.discard(first)
    assert measure(3).digest == second.digest
