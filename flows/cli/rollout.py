"""numprune rollout and rollback: blue/green deployment behind a router."""

import argparse
from typing import TYPE_CHECKING, Any

from numprune.flows.cli.parser import MODEL_REFERENCE, Answer, Parser, Subcommands, at_least, command
from numprune.flows.cli.serve import add_server_options, vllm_options

if TYPE_CHECKING:
    from numprune.serving.rollout import Settings


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "rollout",
        run,
        "roll out a release behind a router: start it, check it, switch to it, drain the old server",
        "numprune rollout my-model --port 8000 -- --gpu-memory-utilization 0.45",
    )
    parser.add_argument("reference", metavar="REFERENCE", help=MODEL_REFERENCE)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="only show what runs; exit code 1 if nothing serves")
    what.add_argument("--stop", action="store_true", help="stop the router and the servers of NAME")
    _add_options(parser)

    parser = command(
        commands,
        "rollback",
        run_back,
        "serve the previous version again and make it production; `numprune registry rollback` does only the latter",
        "numprune rollback my-model",
    )
    parser.add_argument("name", metavar="NAME", help="the model's name in the registry")
    _add_options(parser)


def _add_options(parser: Parser) -> None:
    parser.add_argument(
        "--port", type=at_least(1), metavar="P", help="port of the router (default: unchanged, or 8000)"
    )
    parser.add_argument("--host", help="address of the router (default: unchanged, or 127.0.0.1)")
    parser.add_argument(
        "--drain-timeout",
        type=at_least(0),
        default=300,
        metavar="S",
        help="seconds for the old server to finish its requests (default: 300)",
    )
    add_server_options(parser, dtype=None)


def run(args: argparse.Namespace) -> Answer:
    from numprune.flows import deploy, stages

    workspace = stages.workspace_folder(args.workspace)
    if args.status:
        return _status(args.reference, workspace)
    if args.stop:
        return _stop(args.reference, workspace)
    found = deploy.roll_out(workspace, args.uri, args.reference, _settings(args))
    return Answer(found, _text(found))


def run_back(args: argparse.Namespace) -> Answer:
    from numprune.flows import deploy, stages

    found = deploy.roll_back(stages.workspace_folder(args.workspace), args.uri, args.name, _settings(args))
    return Answer(found, f"{_text(found)}; it is in production again")


def _settings(args: argparse.Namespace) -> "Settings":
    from numprune.serving.rollout import Settings
    from numprune.serving.vllm import api_key, environment

    return Settings(
        environment=environment.find(args.vllm, untested=args.untested_vllm),
        host=args.host,
        port=args.port,
        dtype=args.dtype,
        options=vllm_options(args) if args.max_model_len or args.vllm_options is not None else None,
        api_key=api_key.read(args.api_key_file),
        startup_timeout_s=args.startup_timeout,
        drain_timeout_s=args.drain_timeout,
    )


def _status(reference: str, workspace: Any) -> Answer:
    from numprune.serving import registry, rollout

    found = rollout.status(registry.parse(reference).name, workspace)
    current = found["current"]
    text = (
        f"{found['name']}: {current['reference']} serves at {found['url']}/v1"
        if found["serving"]
        else f"{found['name']}: nothing serves"
    )
    return Answer(found, text, exit_code=0 if found["serving"] else 1)


def _stop(reference: str, workspace: Any) -> Answer:
    from numprune.serving import registry, rollout

    found = rollout.stop(registry.parse(reference).name, workspace)
    return Answer(found, f"{found['name']}: stopped {', '.join(found['stopped']) or 'nothing'}")


def _text(found: dict[str, Any]) -> str:
    if not found["changed"]:
        return f"{found['reference']} serves at {found['url']}/v1 already"
    instead = f" instead of {found['previous']}" if found["previous"] else ""
    return f"{found['reference']} serves at {found['url']}/v1{instead}"
