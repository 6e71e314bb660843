"""From the registry to a folder that may be served: anything but the published release is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.errors import InputError, IntegrityError
from numprune.export import manifest
from numprune.serving import deployment, registry
from numprune.serving.deployment import Deployment, choose_dtype, prepare
from numprune.serving.vllm import server
from numprune.serving.vllm.environment import TESTED, Environment
from tests.serving.releases import make_release, publish, write_checkpoint
from tests.serving.workspaces import stored

NAME = "tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    return make_release(write_checkpoint(folder / "model"), folder / "release")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same sizes, with other weights."""
    folder = tmp_path_factory.mktemp("other")
    return make_release(write_checkpoint(folder / "model", seed=1), folder / "release")


@pytest.fixture(scope="module")
def _published(tmp_path_factory: pytest.TempPathFactory, release: Path) -> Path:
    """MLflow takes seconds to make its tables: once, then a copy for each test."""
    workspace = tmp_path_factory.mktemp("published")
    publish(release, workspace, NAME)
    return workspace


@pytest.fixture
def workspace(tmp_path: Path, _published: Path) -> Path:
    """With the release in production."""
    shutil.copytree(_published, tmp_path / "w")
    return tmp_path / "w"


def get(workspace: Path, reference: str = NAME) -> Deployment:
    return prepare(registry.open_registry(None, workspace), reference, workspace)


def test_a_release_is_fetched_and_verified_once(workspace: Path, release: Path) -> None:
    found = get(workspace)
    assert (found.reference, found.name, found.version, found.dtype) == ("tiny/1", NAME, 1, "float32")
    assert manifest.verify(found.folder).digest == found.digest == manifest.read(release).digest
    assert (found.checkpoint / WEIGHTS).is_file()
    before = (found.checkpoint / WEIGHTS).stat()
    assert get(workspace, f"{NAME}/1") == found
    assert (found.checkpoint / WEIGHTS).stat().st_ino == before.st_ino  # not copied again


def test_a_damaged_copy_is_fetched_again(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = get(workspace).folder
    (folder / "checkpoint" / "config.json").write_text("{}")
    assert manifest.verify(get(workspace).folder).kind == "release"
    assert "config.json" in caplog.text
    assert "fetched again" in caplog.text


def truncate(stored_release: Path, _other: Path) -> None:
    path = stored_release / "checkpoint" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def edit_config(stored_release: Path, _other: Path) -> None:
    path = stored_release / "checkpoint" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def another_tokenizer(stored_release: Path, _other: Path) -> None:
    path = stored_release / "checkpoint" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))


def another_shard(stored_release: Path, other_release: Path) -> None:
    shutil.copyfile(other_release / "checkpoint" / WEIGHTS, stored_release / "checkpoint" / WEIGHTS)


def another_checkpoint_whole(stored_release: Path, other_release: Path) -> None:
    """With its own manifest: only the release's says that it does not belong there."""
    shutil.rmtree(stored_release / "checkpoint")
    shutil.copytree(other_release / "checkpoint", stored_release / "checkpoint")


def another_release_whole(stored_release: Path, other_release: Path) -> None:
    shutil.rmtree(stored_release)
    shutil.copytree(other_release, stored_release)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, WEIGHTS),
        (edit_config, "config.json"),
        (another_tokenizer, "tokenizer.json"),
        (another_shard, WEIGHTS),
        (another_checkpoint_whole, "checkpoint/"),
        (another_release_whole, "was published"),
    ],
)
def test_files_changed_after_publication_are_refused(
    workspace: Path, other: Path, damage: Callable[[Path, Path], None], named: str
) -> None:
    damage(stored(workspace, registry.verify(registry.open_registry(None, workspace), NAME)), other)
    with pytest.raises(IntegrityError, match=named):
        get(workspace)
    assert [path for path in (workspace / "served").iterdir() if not path.name.endswith(".lock")] == []


def dense_weights(workspace: Path) -> Callable[[Path], None]:
    """Weights of a wider model beside the configuration: vLLM would cut them to size without a word."""

    def change(checkpoint: Path) -> None:
        wide = write_checkpoint(workspace / "wide", intermediate_size=128)
        shutil.copyfile(wide / WEIGHTS, checkpoint / WEIGHTS)

    return change


def narrower_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


@pytest.mark.parametrize("kind", ["dense weights", "narrower config"])
def test_oversized_weights_are_refused_despite_valid_digests(tmp_path: Path, workspace: Path, kind: str) -> None:
    change = dense_weights(tmp_path) if kind == "dense weights" else narrower_config
    spoiled = make_release(write_checkpoint(tmp_path / "model"), tmp_path / "release", change)
    publish(spoiled, workspace, NAME)
    with pytest.raises(
        IntegrityError, match=r"model\.layers\.0\.mlp\.\w+\.weight has shape \[.*\], but config.json implies"
    ):
        get(workspace)


def test_a_release_without_reference_answers_is_refused(tmp_path: Path, workspace: Path, release: Path) -> None:
    found = manifest.read(release)
    with manifest.creating(tmp_path / "old", kind=found.kind, parents=found.parents, facts=found.facts) as folder:
        shutil.copytree(release, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("reference-answers.json"))
        (folder / manifest.FILE_NAME).unlink()
    publish(tmp_path / "old", workspace, NAME)
    with pytest.raises(IntegrityError, match=r"reference-answers\.json: missing"):
        get(workspace)


@pytest.mark.parametrize("reference", ["nothing", "tiny@candidat", "tiny/7"])
def test_missing_versions_are_reported(workspace: Path, reference: str) -> None:
    with pytest.raises(InputError, match=r"no such|no alias"):
        get(workspace, reference)


def test_auto_uses_the_precision_of_the_weights(tmp_path: Path) -> None:
    def of(dtype: str) -> Deployment:
        return Deployment("tiny/1", "tiny", 1, "0" * 64, tmp_path, dtype)

    assert choose_dtype(of("float32"), "auto") == "float32"
    assert choose_dtype(of("bfloat16"), "auto") == "bfloat16"
    assert choose_dtype(of("bfloat16"), "float32") == "float32"
    with pytest.raises(InputError, match=r"--dtype auto \(float8_e4m3fn\)"):
        choose_dtype(of("float8_e4m3fn"), "auto")


def test_every_server_has_its_own_log_and_old_logs_are_removed(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    of_others = ["serve-tiny-2-20250101T000000-7.log", "serve-tin-20250101T000000-7.log", "serve-tiny-router.log"]
    old = [f"serve-tiny-20250101T0000{second:02}-7.log" for second in range(25)]
    for name in [*of_others, *old]:
        (logs / name).touch()
    made = deployment.log_file(tmp_path, "serve-tiny")
    assert made.parent == logs
    assert made.name.startswith("serve-tiny-")
    assert not made.exists()
    assert sorted(path.name for path in logs.iterdir()) == sorted([*of_others, *old[6:]])


def test_unneeded_copies_are_removed(tmp_path: Path) -> None:
    served = tmp_path / "served"
    digests = {what: what[0] * 64 for what in ("a current", "b before", "c running", "d prepared", "e old")}
    others = [served / f"{NAME}-2-{'e' * 16}", served / f"other-{'e' * 16}"]
    for folder in [*(served / f"{NAME}-{digest[:16]}" for digest in digests.values()), *others]:
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "checkpoint" / "config.json").write_text('{"model_type": "llama"}')
        if folder.name != f"{NAME}-{'d' * 16}":
            os.utime(folder, (0, 0))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 300\n")
    python.chmod(0o755)
    running = server.start(
        Environment(python, TESTED[-1], True, None, None),
        served / f"{NAME}-{'c' * 16}" / "checkpoint",
        name=NAME,
        port=0,
        host="127.0.0.1",
        options=[],
        dtype="auto",
        tag=f"test-{os.getpid()}:copies",
        log=tmp_path / "log",
        detached=True,
    )
    try:
        deployment.remove_copies(tmp_path, NAME, keep=[digests["a current"], digests["b before"]])
    finally:
        running.stop(grace_s=0)
    kept = {f"{NAME}-{letter * 16}" for letter in "abcd"} | {folder.name for folder in others}
    assert {path.name for path in served.iterdir()} == kept
