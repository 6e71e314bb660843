"""The pipeline as a Prefect flow on a real server: the same as without a server, and visible to a team."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import Answered, shell
from tests.flows.faults import command

Command = Callable[..., Answered]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """A Prefect server that is configured in this process, though not in others."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=None):
        yield


def told(answered: Answered) -> tuple[dict[str, Any], list[str]]:
    """The answer and output of a run, without its id and times."""
    found = answered.json
    del found["run"], found["seconds"]
    for stage in found["stages"]:
        del stage["seconds"], stage["peak_memory_bytes"]
    return found, [re.sub(r" +[\d.]+ s", "", line) for line in answered.err.splitlines()]


def recorded(numprune: Command, workspace: Path, run: str) -> dict[str, Any]:
    """The output of `runs show`, without the run's id and times."""
    shown = numprune("runs", "show", run, "--workspace", workspace, "--json").json
    stages = [{key: stage[key] for key in ("name", "folder", "digest", "reused", "bytes")} for stage in shown["stages"]]
    return {**{key: shown[key] for key in ("name", "state", "report", "release", "version")}, "stages": stages}


def test_a_run_on_a_server_ends_as_one_without(server: None, numprune: Command, tiny: Path, workspace: Path) -> None:
    from prefect.client.orchestration import get_client

    gate = '--set=gates=[{metric="sizes.parameters.ratio", bound="point", max=0.1}]'
    words = command(tiny / "recipe.toml", workspace)
    alone, seen = shell(*words), numprune(*words)
    assert seen.code == alone.code == 0
    assert told(seen) == told(alone)
    assert all(stage["reused"] for stage in seen.json["stages"])
    of_server, of_none = (recorded(numprune, workspace, answered.json["run"]) for answered in (seen, alone))
    assert of_server == of_none

    failed, failed_alone = numprune(*words, gate), shell(*words, gate)
    assert failed.code == failed_alone.code == 2
    for key in ("outcome", "headline", "gates", "report", "release", "version", "next"):
        assert failed.json[key] == failed_alone.json[key]

    with get_client(sync_client=True) as client:
        flow_runs = client.read_flow_runs()
        artifacts = client.read_artifacts()
    assert [run.parameters["workspace"] for run in flow_runs] == 2 * [str(workspace)]  # and none of the other two
    states = {run.id: run.state for run in flow_runs if run.state}
    (completed,) = [run for run, state in states.items() if state.is_completed()]
    (refused,) = [run for run, state in states.items() if state.is_failed()]
    assert states[completed].message == "published tiny/1"
    assert "sizes.parameters.ratio" in (states[refused].message or "")
    for run in (completed, refused):
        keys = {artifact.key for artifact in artifacts if artifact.flow_run_id == run}
        assert {"numprune-summary", "numprune-report", "numprune-report-link"} <= keys


def test_a_sweep_on_a_server_is_a_flow_with_a_task_for_each_candidate(
    server: None, numprune: Command, tiny: Path, workspace: Path
) -> None:
    from prefect.client.orchestration import get_client

    _, *words = command(tiny / "recipe.toml", workspace)
    grid = ["--grid", "quantize.group_size=32,64", "--choose", "smallest", "--workers", "2"]
    answered = numprune("sweep", *grid, *words)
    assert answered.code in (0, 4), answered.err
    with get_client(sync_client=True) as client:
        (flow_run,) = [run for run in client.read_flow_runs() if run.name and run.parameters.get("grid")]
        tasks = [run.name for run in client.read_task_runs() if run.flow_run_id == flow_run.id]
    assert flow_run.parameters["grid"] == {"quantize.group_size": [32, 64]}
    assert flow_run.state is not None
    assert flow_run.state.is_completed() == (answered.code == 0)
    assert sum(name.startswith("candidate-") for name in tasks) == 2
    assert sum(name.startswith("calibration-") for name in tasks) >= 2
    assert answered.json["candidates"][0]["outcome"] != "error"


def test_a_recipe_that_cannot_be_done_is_refused_in_the_same_words(
    server: None, numprune: Command, tiny: Path, tmp_path: Path
) -> None:
    words = command(tiny / "recipe.toml", tmp_path / "w", "prune.ratio=0.999")
    seen, alone = numprune(*words), shell(*words)
    assert seen.code == alone.code == 1
    assert "prune: ratio is 0.999" in seen.err
    assert seen.json == alone.json
    assert not (tmp_path / "w").exists()


def test_the_deployment_entrypoint() -> None:
    """Prefect's way of importing an entrypoint hides errors until the flow runs."""
    from prefect.flows import load_flow_from_entrypoint

    import numprune

    path = (Path(numprune.__file__).parent / "flows" / "optimize.py").resolve()
    loaded: Any = load_flow_from_entrypoint(f"{path}:optimize")
    assert loaded.name == "numprune-optimize"
    assert set(loaded.parameters.properties) == {"recipe_path", "overrides", "workspace"}


def test_one_gpu_job_at_a_time(server: None) -> None:
    """The slot is Prefect's own limit, which also applies without a GPU."""
    from prefect.client.orchestration import get_client
    from prefect.concurrency.sync import concurrency

    from numprune.flows.optimize import GPU_LIMIT, gpu_slot

    with get_client(sync_client=True) as client:
        for _ in range(2):  # the second time the limit is there already
            with gpu_slot():
                limit = client.read_global_concurrency_limit_by_name(GPU_LIMIT)
                assert (limit.limit, limit.active_slots) == (1, 1)
                with pytest.raises(TimeoutError), concurrency(GPU_LIMIT, timeout_seconds=1, strict=True):
                    pytest.fail("two had the only slot")
            assert client.read_global_concurrency_limit_by_name(GPU_LIMIT).active_slots == 0
