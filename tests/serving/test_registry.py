"""The registry on MLflow's real store: releases are complete, passed and published once, and fetched unchanged."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from numprune.errors import InputError, IntegrityError
from numprune.export import manifest
from numprune.serving import registry as registries
from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.registry import RefusedReleaseError, Registry, RegistryError
from numprune.serving.report import Report
from tests.serving.conftest import Json
from tests.serving.workspaces import NAME, WEIGHTS, MakeRelease, artifact_folders, contents, flip_bit, run_child, stored

# --- publish ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_passed_release_becomes_the_candidate(registry: Registry, workspace: Path, make_release: MakeRelease) -> None:
    release = make_release()
    version = registries.publish(registry, release, NAME)
    whole = manifest.read(release)
    assert (version.reference, version.aliases, version.verdict) == ("tiny-llama/1", ("candidate",), "pass")
    assert version.digest == whole.digest
    assert version.tags["numprune.checkpoint"] == whole.parents["checkpoint"]
    assert version.tags["numprune.report"] == whole.files["report.json"].sha256
    assert contents(stored(workspace, version)) == contents(release)
    assert registries.list_versions(registry, NAME) == [version]
    assert registries.list_models(registry) == [registries.Model(NAME, {"candidate": 1})]
    shown = registries.show(registry, f"{NAME}@candidate")
    assert shown.version == version
    assert shown.report.verdict is not None
    assert shown.files[WEIGHTS] == 1000


def test_the_same_release_is_published_once(registry: Registry, workspace: Path, make_release: MakeRelease) -> None:
    first, second = make_release("a"), make_release("b")
    one = registries.publish(registry, first, NAME)
    assert registries.publish(registry, first, NAME) == one
    two = registries.publish(registry, second, NAME)
    assert (two.version, two.aliases) == (2, ("candidate",))
    again = registries.publish(registry, first, NAME)
    assert (again.version, again.aliases) == (1, ())  # the candidate does not go back
    assert registries.publish(registry, first, "other").reference == "other/1"
    assert len(artifact_folders(workspace)) == 3


NLL_GATE = {"metric": "quality.loss_delta", "bound": "ci95_upper"}


@pytest.mark.parametrize(
    ("limit", "valid", "outcome", "code", "named"),
    [
        (0.01, True, "fail", 2, "quality.loss_delta"),
        (0.05, True, "inconclusive", 3, "quality.loss_delta"),
        (0.1, False, "invalid environment", 4, "the GPU is throttled"),
    ],
)
def test_a_release_that_did_not_pass_is_not_published(
    registry: Registry,
    workspace: Path,
    make_release: MakeRelease,
    report_json: Json,
    limit: float,
    valid: bool,
    outcome: str,
    code: int,
    named: str,
) -> None:
    if not valid:
        report_json["environment"] |= {"valid": False, "reasons": ["the GPU is throttled"]}
    unjudged = Report.model_validate(report_json)
    verdict = judge(unjudged, Policy(gates=(Gate(max=limit, **NLL_GATE),)))
    release = make_release(limit=0, **unjudged.judged(verdict).to_json() | {"identity": report_json["identity"]})
    with pytest.raises(RefusedReleaseError, match=named) as refused:
        registries.publish(registry, release, NAME)
    assert outcome in str(refused.value)
    assert (refused.value.exit_code, refused.value.verdict.outcome) == (code, outcome)
    assert registries.list_models(registry) == []
    assert registry.client.search_registered_models() == []
    assert artifact_folders(workspace) == []


def _break_nested(partial: Path) -> None:
    (partial / WEIGHTS).write_bytes(b"other weights")


def _add_part(partial: Path) -> None:
    with manifest.creating(partial / "tensorrt", kind="tensorrt") as engine:
        (engine / "engine").write_bytes(b"never measured")


def _replace_checkpoint(partial: Path) -> None:
    shutil.rmtree(partial / "checkpoint")
    with manifest.creating(partial / "checkpoint", kind="checkpoint") as other:
        (other / "model.safetensors").write_bytes(b"another model")


def _cheat(partial: Path) -> None:
    """Turn a failed verdict into a passed one, consistently."""
    text = (partial / "report.json").read_text()
    (partial / "report.json").write_text(text.replace('"outcome": "fail"', '"outcome": "pass"'))


@pytest.mark.parametrize(
    ("change", "limit", "message"),
    [
        (lambda partial: (partial / "report.json").unlink(), 0.8, "report.json: missing"),
        (lambda partial: shutil.rmtree(partial / "checkpoint"), 0.8, "checkpoint"),
        (lambda partial: (partial / "checkpoint/manifest.json").unlink(), 0.8, "checkpoint/manifest.json: missing"),
        (lambda partial: (partial / "checkpoint/extra.txt").write_text("x"), 0.8, "checkpoint: its files"),
        (lambda partial: (partial / "report.json").write_text("{}"), 0.8, "report.json: schema"),
        (_break_nested, 0.8, "checkpoint: its files"),
        (_replace_checkpoint, 0.8, "checkpoint: its digest is .*, but the report is about"),
        (_add_part, 0.8, "tensorrt: .*no such part"),
        (_cheat, 0.7, "verdict says pass for sizes.parameters.ratio, but .* fail"),
        (lambda _: None, 0, "not judged"),
    ],
)
def test_an_altered_release_is_not_published(
    registry: Registry, make_release: MakeRelease, change: Any, limit: float, message: str
) -> None:
    release = make_release(change=change, limit=limit)
    with pytest.raises((IntegrityError, InputError), match=message):
        registries.publish(registry, release, NAME)
    assert registry.client.search_registered_models() == []


def test_a_damaged_or_foreign_folder_is_not_published(
    registry: Registry, make_release: MakeRelease, tmp_path: Path
) -> None:
    release = make_release()
    with pytest.raises(InputError, match="contains a checkpoint"):
        registries.publish(registry, release.parent / "checkpoint", NAME)
    with pytest.raises(InputError, match="no such folder"):
        registries.publish(registry, tmp_path / "nowhere", NAME)
    flip_bit(release / WEIGHTS)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        registries.publish(registry, release, NAME)
    assert registry.client.search_registered_models() == []


def test_a_foreign_version_is_not_ours(registry: Registry, make_release: MakeRelease) -> None:
    version = registries.publish(registry, make_release(), NAME)
    registry.client.create_model_version(NAME, source="file:///tmp/x")
    registry.client.create_registered_model("somebody-elses")
    with pytest.raises(IntegrityError, match="not published by numprune"):
        registries.promote(registry, f"{NAME}/2")
    assert registries.list_versions(registry, NAME) == [version]
    assert [model.name for model in registries.list_models(registry)] == [NAME]


# --- damage ----------------------------------------------------------------------------------------


def _rewrite_with_its_manifest(folder: Path) -> None:
    """Other weights under a manifest that agrees with them."""
    (folder / WEIGHTS).write_bytes(b"other weights")
    found = manifest.read(folder)
    changed = folder.with_name("changed")
    shutil.copytree(folder, changed, ignore=shutil.ignore_patterns("manifest.json"))
    shutil.rmtree(folder)
    with manifest.creating(folder, kind=found.kind, parents=found.parents) as partial:
        shutil.copytree(changed, partial, dirs_exist_ok=True)
    shutil.rmtree(changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: flip_bit(folder / WEIGHTS), WEIGHTS),
        (lambda folder: flip_bit(folder / "report.json"), "report.json"),
        (lambda folder: flip_bit(folder / "manifest.json"), "manifest.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
        (lambda folder: (folder / "surplus.bin").write_bytes(b"x"), "surplus.bin"),
        (lambda folder: shutil.rmtree(folder), "release: missing"),
        (_rewrite_with_its_manifest, "manifest.json has the digest"),
    ],
)
def test_damage_is_named_blocks_everything_and_is_repaired_by_publishing_again(
    registry: Registry, workspace: Path, make_release: MakeRelease, tmp_path: Path, damage: Any, named: str
) -> None:
    first, second = make_release("a"), make_release("b")
    one = registries.publish(registry, first, NAME)
    registries.promote(registry, NAME)
    registries.publish(registry, second, NAME)
    registries.promote(registry, NAME)
    assert registries.verify(registry, f"{NAME}/1").version == 1

    damage(stored(workspace, one))
    with pytest.raises(IntegrityError, match=named):
        registries.verify(registry, f"{NAME}/1")
    with pytest.raises(IntegrityError, match=named):
        registries.fetch(registry, f"{NAME}/1", tmp_path / "out")
    with pytest.raises(IntegrityError, match=named):
        registries.promote(registry, f"{NAME}/1")
    with pytest.raises(IntegrityError, match=named):
        registries.rollback(registry, NAME)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]
    assert registries.verify(registry, NAME).version == 2  # production stands, and is whole

    assert registries.publish(registry, first, NAME).version == 1
    assert registries.rollback(registry, NAME).version == 1


def test_a_verdict_in_the_tags_alone_is_not_enough(
    registry: Registry, workspace: Path, make_release: MakeRelease
) -> None:
    version = registries.publish(registry, make_release(), NAME)
    registry.client.set_model_version_tag(NAME, "1", "numprune.verdict", "fail")
    with pytest.raises(IntegrityError, match="only a passing release"):
        registries.promote(registry, NAME)
    failed = make_release("failed", limit=0.7)
    shutil.rmtree(stored(workspace, version))
    registry.artifacts.put(version.run_id, failed)
    registry.client.set_model_version_tag(NAME, "1", "numprune.verdict", "pass")
    registry.client.set_model_version_tag(NAME, "1", "numprune.release", manifest.read(failed).digest)
    with pytest.raises(IntegrityError, match="'fail' in the report"):
        registries.promote(registry, NAME)


# --- production ------------------------------------------------------------------------------------


def test_promotion_and_rollback_follow_the_history(registry: Registry, make_release: MakeRelease) -> None:
    for content in "abc":
        registries.publish(registry, make_release(content), NAME)
    with pytest.raises(InputError, match="nothing is in production"):
        registries.rollback(registry, NAME)
    with pytest.raises(InputError, match=r"no alias 'production'; its aliases: candidate \(3\)"):
        registries.verify(registry, NAME)
    assert registries.promote(registry, f"{NAME}/1").aliases == ("production",)
    assert registries.promote(registry, f"{NAME}/2").version == 2
    assert registries.promote(registry, f"{NAME}/2").version == 2  # again: no second entry
    assert registries.promote(registry, f"{NAME}@candidate").aliases == ("candidate", "production")
    assert [registries.rollback(registry, NAME).version for _ in range(2)] == [2, 1]
    with pytest.raises(InputError, match="no version was in production before tiny-llama/1"):
        registries.rollback(registry, NAME)
    assert registries.verify(registry, NAME).version == 1
    assert registries.promote(registry, NAME).version == 3
    assert registries.rollback(registry, NAME).version == 1


def test_an_undone_promotion_leaves_no_trace(registry: Registry, make_release: MakeRelease) -> None:
    for content in "ab":
        registries.publish(registry, make_release(content), NAME)
    registries.promote(registry, f"{NAME}/1")
    with pytest.raises(IntegrityError, match="tiny-llama/2: no longer in production"):
        registries.take_back(registry, f"{NAME}/2")
    assert registries.take_back(registry, f"{NAME}/1") is None  # nothing was before
    with pytest.raises(InputError, match=r"nothing is in production; .*versions: none"):
        registries.rollback(registry, NAME)
    registries.promote(registry, f"{NAME}/1")
    registries.promote(registry, f"{NAME}/2")
    taken_back = registries.take_back(registry, f"{NAME}/2")
    assert taken_back is not None
    assert taken_back.version == 1
    with pytest.raises(InputError, match="no version was in production before"):
        registries.rollback(registry, NAME)


def test_moves_made_in_mlflow_are_part_of_the_history(registry: Registry, make_release: MakeRelease) -> None:
    for content in "abc":
        registries.publish(registry, make_release(content), NAME)
    registries.promote(registry, f"{NAME}/1")
    registry.client.set_registered_model_alias(NAME, "production", "2")
    registries.promote(registry, f"{NAME}/3")
    assert [registries.rollback(registry, NAME).version for _ in range(2)] == [2, 1]
    registries.promote(registry, f"{NAME}/2")
    registry.client.delete_model_version(NAME, "2")  # its alias goes with it
    with pytest.raises(InputError, match=r"nothing is in production; .*\(earlier production versions: 2, 1\)"):
        registries.rollback(registry, NAME)
    assert registries.promote(registry, f"{NAME}/1").version == 1


def test_a_deleted_version_cannot_be_rolled_back_to(registry: Registry, make_release: MakeRelease) -> None:
    for content in "ab":
        registries.publish(registry, make_release(content), NAME)
        registries.promote(registry, NAME)
    registry.client.delete_model_version(NAME, "1")
    with pytest.raises(InputError, match="tiny-llama/1: no such version"):
        registries.rollback(registry, NAME)
    assert registries.verify(registry, NAME).version == 2


@pytest.mark.parametrize(
    "text", ["{", '{"history": "1"}', '{"history": [], "more": 1}', '{"history": [1], "next": []}']
)
def test_a_damaged_history_is_reported(registry: Registry, make_release: MakeRelease, text: str) -> None:
    registries.publish(registry, make_release(), NAME)
    registry.client.set_registered_model_tag(NAME, "numprune.production", text)
    with pytest.raises(IntegrityError, match=r"tag numprune\.production is damaged"):
        registries.promote(registry, NAME)


# --- fetch and references ----------------------------------------------------------------------------


def test_a_fetched_release_is_the_published_one(registry: Registry, make_release: MakeRelease, tmp_path: Path) -> None:
    release = make_release()
    registries.publish(registry, release, NAME)
    out = tmp_path / "ge holt" / "release"
    assert registries.fetch(registry, f"{NAME}@candidate", out).version == 1
    assert contents(out) == contents(release)
    assert os.listdir(out.parent) == ["release"]
    (out / WEIGHTS).write_bytes(b"x")  # the copy is the caller's: the store does not follow
    assert registries.verify(registry, f"{NAME}/1").version == 1
    with pytest.raises(InputError, match="already exists"):
        registries.fetch(registry, f"{NAME}@candidate", out)


def test_a_workspace_may_move(registry: Registry, workspace: Path, make_release: MakeRelease, tmp_path: Path) -> None:
    registries.publish(registry, make_release("a"), NAME)
    moved = registries.open_registry(None, shutil.move(workspace, tmp_path / "elsewhere"))
    assert registries.verify(moved, f"{NAME}/1").version == 1
    assert registries.publish(moved, make_release("b"), NAME).version == 2
    assert registries.promote(moved, NAME).version == 2
    assert not workspace.exists()


@pytest.mark.parametrize(
    "text", ["", "a@", "a/", "a/0", "a/x", "a/1/2", "@b", "a b", "../a", "a@b@c", "a/-1", "a'", "a/01"]
)
def test_invalid_references_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"not a (reference|valid model name)"):
        registries.parse(text)


def test_references_are_parsed() -> None:
    assert registries.parse("größe-1.5") == registries.ModelReference("größe-1.5", "production", None)
    assert registries.parse("a", "candidate").alias == "candidate"
    assert registries.parse("a@b").alias == "b"
    assert registries.parse("a/12").version == 12
    assert [str(registries.parse(text)) for text in ("a", "a@b", "a/12")] == ["a@production", "a@b", "a/12"]


def test_unknown_names_versions_and_aliases_are_named(registry: Registry, make_release: MakeRelease) -> None:
    registries.publish(registry, make_release(), NAME)
    for ask in (registries.list_versions, registries.rollback, registries.verify, registries.promote):
        with pytest.raises(InputError, match=r"tiny-lama: no such model .*did you mean tiny-llama\?"):
            ask(registry, "tiny-lama")
    with pytest.raises(InputError, match="tiny-llama/7: no such version"):
        registries.show(registry, f"{NAME}/7")
    with pytest.raises(InputError, match="not a valid model name"):
        registries.publish(registry, make_release("b"), "a/b")


def test_an_unusable_registry_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "registry").write_text("a file where the folder should be")
    with pytest.raises(RegistryError, match="registry"):
        registries.open_registry(None, tmp_path)
    (tmp_path / "broken" / "registry").mkdir(parents=True)
    (tmp_path / "broken" / "registry" / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(RegistryError, match="not a database"):
        registries.open_registry(None, tmp_path / "broken")
    for name in ("what?", "100%", "a#b"):
        with pytest.raises(RegistryError, match="choose another workspace"):
            registries.open_registry(None, tmp_path / name)


def test_importing_the_registry_does_not_import_mlflow() -> None:
    child = run_child("print('mlflow' in sys.modules)")
    assert child.communicate(timeout=60) == ("False\n", "")
