"""numprune optimize and plan."""

import argparse
import logging
import os
import time
from pathlib import Path
from typing import Any

from numprune.export.imports import uncollected
from numprune.flows.cli.parser import Answer, Subcommands, add_recipe, command

logger = logging.getLogger(__name__)


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "optimize",
        run,
        "run a recipe: prune, export, verify parity, evaluate, benchmark, gate and publish",
        "numprune optimize my.toml --set prune.ratio=0.2 --workspace /data/numprune",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what the run would do, like `numprune plan`")
    add_recipe(parser)

    parser = command(
        commands,
        "plan",
        plan,
        "show what a run of a recipe would do, without running it",
        "numprune plan my.toml --set prune.ratio=0.2 --workspace /data/numprune",
    )
    add_recipe(parser)


def plan(args: argparse.Namespace) -> Answer:
    with uncollected():
        from numprune.flows import forecast, recipe, stages

    asked = recipe.load(recipe.source_of(args.recipe), args.overrides)
    found = forecast.forecast(asked, stages.workspace_folder(args.workspace))
    return Answer(found, forecast.text(found))


def run(args: argparse.Namespace) -> Answer:
    from numprune.flows import children, execute, recipe, server, stages, summary
    from numprune.flows.run import prepare
    from numprune.serving import gates

    if args.dry_run:
        return plan(args)
    started = time.perf_counter()
    path = recipe.source_of(args.recipe)
    asked = recipe.load(path, args.overrides)
    workspace = stages.workspace_folder(args.workspace)
    logger.info("recipe %s, workspace %s", path, workspace)
    children.warm_up()
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # errors are reported once, by us
    if url := server.configured():
        found = _scheduled(url, args, workspace)
    else:
        found = execute.execute(children.call(prepare, asked, workspace), path)
    found = {**found, "seconds": round(time.perf_counter() - started, 3)}
    return Answer(found, summary.text(found), gates.EXIT_CODES[found["outcome"]])


def _scheduled(url: str, args: argparse.Namespace, workspace: Path) -> dict[str, Any]:
    """Like `execute`, but as a flow on the configured Prefect server, where the team sees the run."""
    from numprune.flows import server

    with server.reaching(url):
        server.check(url)
        from numprune.flows.optimize import optimize

        state = optimize(args.recipe, args.overrides, str(workspace), return_state=True)
    found: Any = state.result(raise_on_failure=False)
    if isinstance(found, BaseException):
        raise found
    return dict(found)
