"""numprune registry: names without an alias, and what its rollback leaves alone."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.serving.rollout.state import Backend, Place, Started, State
from numprune.serving.vllm.process import TAG
from tests.flows.conftest import Answered
from tests.serving.releases import make_release, publish, write_checkpoint

Command = Callable[..., Answered]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two versions of `tiny`, both of which were in production; not to be changed but by the last test."""
    folder = tmp_path_factory.mktemp("registry")
    for seed in (1, 2):
        release = make_release(write_checkpoint(folder / f"base-{seed}", seed), folder / f"release-{seed}")
        publish(release, folder / "workspace", "tiny")
    return folder / "workspace"


def test_a_name_alone_means_production(workspace: Path, numprune: Command) -> None:
    where = ["--workspace", workspace]
    assert numprune("registry", "show", "tiny", "--json", *where).json["reference"] == "tiny/2"
    promoted = numprune("registry", "promote", "tiny", "--json", *where)
    assert promoted.json["aliases"] == ["candidate", "production"]
    warning = "promoting tiny@candidate; write it out, because NAME alone means the production version elsewhere\n"
    assert warning in promoted.err
    assert warning not in numprune("registry", "promote", "tiny@candidate", *where).err
    assert warning not in numprune("registry", "promote", "tiny/2", *where).err


def test_a_registry_rollback_names_the_version_that_still_serves(workspace: Path, numprune: Command) -> None:
    place = Place(workspace, "tiny")
    server = subprocess.Popen(["sleep", "600"], env={**os.environ, TAG: "a-tag"})
    try:
        started = Started(pid=server.pid, tag="a-tag", log="server.log")
        backend = {"reference": "tiny/2", "digest": "0" * 64, "url": "http://127.0.0.1:9", "dtype": "auto"}
        place.write(State(name="tiny", current=Backend(**backend, options=[], started=started)))
        found = numprune("registry", "rollback", "tiny", "--workspace", workspace)
        assert found.out == "tiny/1 is in production again; tiny/2 still serves: `numprune rollout tiny` changes that\n"
    finally:
        server.kill()
        server.wait()
    publish_again = numprune("registry", "promote", "tiny/2", "--workspace", workspace)
    assert publish_again.code == 0
    found = numprune("registry", "rollback", "tiny", "--workspace", workspace)
    assert found.out == "tiny/1 is in production again\n"
