"""numprune sweep."""

import argparse
import importlib.util
import os
from functools import partial
from typing import get_args

from numprune.errors import InputError
from numprune.export.imports import uncollected
from numprune.flows.cli.parser import Answer, Subcommands, add_choice, add_recipe, at_least, command
from numprune.flows.names import Objective, Scheduler

_OBJECTIVES = get_args(Objective)


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "sweep",
        sweep,
        "run a recipe with every combination of some values, show the Pareto front, and publish the best candidate",
        "numprune sweep my.toml --grid prune.ratio=0.1,0.2,0.3 --grid quantize.scheme=none,w8a8 --choose fastest",
    )
    parser.add_argument(
        "--grid",
        action="extend",
        nargs="+",
        required=True,
        metavar="SECTION.KEY=VALUE,VALUE",
        help="values of a key of the recipe; may be repeated, and every combination is a candidate",
    )
    parser.add_argument(
        "--choose",
        choices=_OBJECTIVES,
        metavar="OBJECTIVE",
        help=f"publish the best candidate of those that pass the recipe's gates, one of {', '.join(_OBJECTIVES)}; the "
        "gates' bounds allow for the number of candidates (default: publish none)",
    )
    parser.add_argument(
        "--workers",
        type=at_least(1),
        default=1,
        metavar="N",
        help="candidates at a time; a stage uses all cores, so more than one pays only where stages wait for each "
        "other (default: 1)",
    )
    add_choice(
        parser,
        "--runner",
        get_args(Scheduler),
        "threads",
        'what runs the candidates (pip install "numprune[dask]" or "numprune[ray]")',
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="a running cluster of Dask or Ray that shares the workspace (default: a local one of --workers processes)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show which stages are shared and the time")
    add_recipe(parser)


def sweep(args: argparse.Namespace) -> Answer:
    with uncollected():
        from numprune.flows import recipe, stages
        from numprune.flows.sweep import grid, run

    _check_runner(args.runner, args.address)
    path, values = recipe.source_of(args.recipe), grid.parse(args.grid)
    candidates = grid.expand(path, values, args.overrides)
    workspace = stages.workspace_folder(args.workspace)
    if args.dry_run:
        from numprune.flows.sweep import forecast

        planned = forecast.plan(candidates, workspace)
        return Answer(planned, forecast.text(planned))
    from numprune.flows import children, server
    from numprune.serving import gates

    children.warm_up()
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # errors are reported once, by us
    if args.runner != "threads" or server.configured():
        from numprune.flows.sweep import flow

        found = flow.sweep_on(
            args.runner, path, values, args.overrides, workspace, args.choose, args.workers, args.address
        )
    else:
        explore_all = partial(run.in_threads, workers=args.workers)
        found = run.execute_sweep(candidates, path, workspace, args.choose, explore_all)
    code = int(found.errors > 0) if found.outcome is None else gates.EXIT_CODES[found.outcome]
    return Answer(found.to_json(), found.text(), code)


def _check_runner(runner: str, address: str | None) -> None:
    if runner == "threads":
        if address:
            raise InputError(f"--address {address}: threads have no cluster; add --runner dask or ray, or omit it")
    elif importlib.util.find_spec(f"prefect_{runner}") is None:
        raise InputError(f'--runner {runner}: its package is missing; pip install "numprune[{runner}]"')
