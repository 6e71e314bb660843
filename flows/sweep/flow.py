"""A sweep as a Prefect flow: each candidate is a task with its stages in it, on threads, Dask or Ray.

On a cluster of Dask or Ray, candidates run on other machines, which need the same workspace on a shared file system.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed, State
from prefect.task_runners import TaskRunner

from numprune.flows import optimize, server
from numprune.flows.names import Objective, Scheduler
from numprune.flows.run import Run
from numprune.flows.sweep import grid as grids
from numprune.flows.sweep.grid import Grid
from numprune.flows.sweep.results import Explored, Sweep
from numprune.flows.sweep.run import Ended, execute_sweep, explore, in_threads


def sweep_on(
    scheduler: Scheduler,
    source: Path,
    grid: Grid,
    overrides: Sequence[str],
    workspace: Path,
    choose: Objective | None,
    workers: int,
    address: str | None = None,
) -> Sweep:
    """As of `numprune.flows.sweep.sweep`, as a flow on the configured Prefect server, or else on a temporary one.

    Args:
        workers: threads, or processes of a local cluster.
        address: of a running cluster of Dask or Ray.

    Raises ServerError.
    """
    run, threads = _sweep, workers
    if scheduler != "threads":
        run, threads = _sweep.with_options(task_runner=_task_runner(scheduler, workers, address)), 0
    with _reaching_server():
        values = {key: list(given) for key, given in grid.items()}
        state = run(str(source), values, list(overrides), str(workspace), choose, threads, return_state=True)
    found: Any = state.result(raise_on_failure=False)
    if not isinstance(found, Sweep):
        raise found
    return found


@flow(name="numprune-sweep", persist_result=False)
def _sweep(
    recipe_path: str,
    grid: dict[str, list[Any]],
    overrides: list[str],
    workspace: str,
    choose: Objective | None,
    threads: int,
) -> State[Sweep]:
    """`threads`: that run the candidates; 0: the flow's task runner does."""
    server.bind_to_this_process()
    source = Path(recipe_path)
    candidates = grids.expand(source, grid, overrides)
    explore_all = partial(in_threads, workers=threads, make=optimize.make, explore=_candidate) if threads else _in_tasks
    found = execute_sweep(candidates, source, Path(workspace), choose, explore_all, optimize.publish, optimize.make)
    create_markdown_artifact(markdown=found.markdown(), key="numprune-sweep", description="The candidates")
    create_link_artifact(link=found.page.absolute().as_uri(), link_text="sweep.html", key="numprune-sweep-link")
    end = Completed if found.outcome in (None, "pass") else Failed
    return end(message=found.headline(), data=found)


_candidate = task(name="candidate", cache_policy=NO_CACHE, persist_result=False)(explore)


def _in_tasks(runs: Sequence[Run], source: Path) -> Ended:
    """Explore the runs as tasks of the flow's task runner."""
    submitted = {_candidate.submit(run, source, optimize.make): index for index, run in enumerate(runs)}
    for future in as_completed(list(submitted)):
        found = future.result(raise_on_failure=False)
        if not isinstance(found, Explored):  # its process died, or the cluster
            found = Explored("error", f"{type(found).__name__}: {found}")
        yield submitted[future], found


def _task_runner(scheduler: Scheduler, workers: int, address: str | None) -> TaskRunner[Any]:
    if scheduler == "ray":
        from prefect_ray import RayTaskRunner

        return RayTaskRunner(address=address) if address else RayTaskRunner(init_kwargs={"num_cpus": workers})
    import dask
    from prefect_dask import DaskTaskRunner

    if address:
        return DaskTaskRunner(address=address)
    dask.config.set({"distributed.worker.daemon": False})  # a daemon cannot have children, which stages are
    # What takes memory are the stages, which Dask does not limit.
    local = {"n_workers": workers, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=local)


@contextmanager
def _reaching_server() -> Iterator[None]:
    """The configured Prefect server, or a temporary one whose address the workers get, too."""
    if url := server.configured():
        with server.reaching(url):
            server.check(url)
            yield
        return
    with SubprocessASGIServer() as temporary:
        url = temporary.api_url
        with temporary_settings({PREFECT_API_URL: url}), server.reaching(url):
            yield
