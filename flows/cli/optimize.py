"""numprune optimize and plan."""

import argparse
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from numprune.flows.cli.parser import Answer, Subcommands, add_workspace, command

logger = logging.getLogger(__name__)


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "optimize",
        run,
        "run a recipe: prune, export, prove, evaluate, benchmark, gate and publish",
        "numprune optimize my.toml --set prune.ratio=0.2 --workspace /data/numprune",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what the run would do, like numprune plan")
    _add_recipe(parser)

    parser = command(
        commands,
        "plan",
        plan,
        "show what a run of a recipe would do, and run nothing",
        "numprune plan my.toml --set prune.ratio=0.2 --workspace /data/numprune",
    )
    _add_recipe(parser)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a TOML file (default: the small embedded model)")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        dest="overrides",
        type=_assignment,
        metavar="SECTION.KEY=VALUE",
        help="change keys of the recipe, as prune.ratio=0.2; may be repeated (default: the recipe as it is)",
    )
    add_workspace(parser)


def _assignment(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} must be section.key=value")
    return text


def plan(args: argparse.Namespace) -> Answer:
    from numprune.flows import recipe, stages

    asked = recipe.load(Path(args.recipe) if args.recipe else recipe.EMBEDDED_RECIPE, args.overrides)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from numprune.flows import forecast

    found = forecast.forecast(asked, stages.workspace_folder(args.workspace))
    return Answer(found, forecast.text(found))


def run(args: argparse.Namespace) -> Answer:
    from numprune.flows import children, recipe, stages, summary
    from numprune.flows.run import prepare
    from numprune.serving import gates

    if args.dry_run:
        return plan(args)
    started = time.perf_counter()
    path = Path(args.recipe) if args.recipe else recipe.EMBEDDED_RECIPE
    asked = recipe.load(path, args.overrides)
    workspace = stages.workspace_folder(args.workspace)
    logger.info("recipe %s, workspace %s", path, workspace)
    children.warm_up()
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # what goes wrong is said once, by us
    from numprune.flows import server

    errors: list[Exception] = []
    starting = threading.Thread(target=_start_server, args=(errors,), daemon=True)
    with server.reaching():
        from numprune.flows.optimize import optimize

        starting.start()  # beside the checks, whose complaints come first
        children.call(prepare, asked, workspace)
        starting.join()
        if errors:
            raise errors[0]
        state = optimize(args.recipe, args.overrides, str(workspace), return_state=True)
    found: Any = state.result(raise_on_failure=False)
    if isinstance(found, BaseException):
        raise found
    found = {**found, "seconds": round(time.perf_counter() - started, 3)}
    return Answer(found, summary.text(found), gates.EXIT_CODES[found["outcome"]])


def _start_server(errors: list[Exception]) -> None:
    from numprune.flows import server

    try:
        server.start()
    except Exception as error:
        errors.append(error)
