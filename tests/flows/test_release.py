"""The release flow without a server; test_schedule.py tests approvals on a server."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.errors import InputError
from numprune.flows.release import release
from numprune.flows.steps import deploy
from numprune.serving import registry as registries
from numprune.serving.registry import Registry, Version
from tests.serving.conftest import (  # noqa: F401 - fixtures
    _empty_registry,
    make_release,
    registry,
    report_json,
    workspace,
)

pytestmark = pytest.mark.slow

NAME = "tiny-llama"


def production(registry: Registry) -> list[int]:  # noqa: F811
    return [one.version for one in registries.list_versions(registry, NAME) if "production" in one.aliases]


@pytest.mark.vllm
def test_production_returns_to_the_previous_version_when_a_rollout_fails(
    registry: Registry,  # noqa: F811
    workspace: Path,  # noqa: F811
    make_release: Callable[..., Path],  # noqa: F811
) -> None:
    registries.publish(registry, make_release("a"), NAME)
    registries.promote(registry, NAME)
    registries.publish(registry, make_release("b"), NAME)  # whose weights are none
    state = release(NAME, str(workspace), approval=False, return_state=True)
    assert state.is_failed()
    assert state.message.startswith(f"{NAME}/2: {NAME}: ")
    assert state.message.endswith(f"nothing serves; {NAME}/1 is in production")
    assert production(registry) == [1]


KILLED = """
import os, signal, sys
from pathlib import Path
from numprune.flows.steps import deploy
workspace, reference, digest = sys.argv[1:]
deploy.promote(Path(workspace), None, reference, digest, to_serve=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def promote_and_be_killed(workspace: Path, version: Version) -> None:  # noqa: F811
    """Like a run that is killed before the rollout."""
    command = [sys.executable, "-c", KILLED, str(workspace), version.reference, version.digest]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_version_promoted_by_a_killed_run_and_never_served_is_undone(
    registry: Registry,  # noqa: F811
    workspace: Path,  # noqa: F811
    make_release: Callable[..., Path],  # noqa: F811
) -> None:
    one, two, three = (registries.publish(registry, make_release(content), NAME) for content in "abc")
    deploy.promote(workspace, None, one.reference, one.digest, to_serve=True)
    deploy.serves(workspace, one.reference)
    promote_and_be_killed(workspace, two)
    assert production(registry) == [2]

    # Run again, it cannot be served: not even what was in production when that run began ever was.
    previous = deploy.promote(workspace, None, two.reference, two.digest, to_serve=True)
    deploy.take_back(workspace, None, two.reference, previous)
    assert (previous, production(registry)) == (one.reference, [1])

    # Nor after two of them, one upon the other. (A process that ended then would have done as little.)
    deploy.promote(workspace, None, two.reference, two.digest, to_serve=True)
    deploy.promote(workspace, None, three.reference, three.digest, to_serve=True)
    previous = deploy.promote(workspace, None, three.reference, three.digest, to_serve=True)
    deploy.take_back(workspace, None, three.reference, previous)
    assert (previous, production(registry)) == (one.reference, [1])

    # What served before, and only does not come up again, stays.
    previous = deploy.promote(workspace, None, one.reference, one.digest, to_serve=True)
    deploy.take_back(workspace, None, one.reference, previous)
    assert production(registry) == [1]


@pytest.mark.vllm
def test_a_run_after_a_killed_one_returns_production_to_the_serving_version(
    registry: Registry,  # noqa: F811
    workspace: Path,  # noqa: F811
    make_release: Callable[..., Path],  # noqa: F811
) -> None:
    registries.publish(registry, make_release("a"), NAME)
    registries.promote(registry, NAME)
    promote_and_be_killed(workspace, registries.publish(registry, make_release("b"), NAME))
    state = release(NAME, str(workspace), return_state=True)  # in production already: nobody is asked
    assert state.is_failed()
    assert state.message.endswith(f"; {NAME}/1 is in production")
    assert production(registry) == [1]


def test_approval_needs_a_deployment(
    registry: Registry,  # noqa: F811
    workspace: Path,  # noqa: F811
    make_release: Callable[..., Path],  # noqa: F811
) -> None:
    registries.publish(registry, make_release("a"), NAME)
    with pytest.raises(InputError, match="or set approval=false"):
        release(NAME, str(workspace), rollout=False)
    assert production(registry) == []

    registries.promote(registry, NAME)  # what is in production already needs nobody's word
    state = release(NAME, str(workspace), rollout=False, return_state=True)
    assert (state.is_completed(), state.message) == (True, f"{NAME}/1 is in production")
