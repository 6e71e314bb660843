"""numprune push: pushes a release to a model hub."""

import argparse
import dataclasses
from pathlib import Path

from numprune.counted import counted
from numprune.flows.amounts import size
from numprune.flows.cli.parser import Answer, Subcommands, command


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "push",
        push,
        "push a release to a Hugging Face repository, with its figures in the model card",
        "numprune push numprune-workspace/releases/my-model-0123456789abcdef my-team/my-model-pruned --private",
    )
    parser.add_argument("release", metavar="RELEASE", type=Path, help="a release folder, as written by optimize")
    parser.add_argument("repository", metavar="REPO", help="OWNER/NAME; created if missing")
    parser.add_argument(
        "--private",
        action="store_true",
        help="create a private repository; an existing one is unchanged (default: public)",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")


def push(args: argparse.Namespace) -> Answer:
    from numprune.flows import children
    from numprune.flows.steps.publish import audit
    from numprune.serving import hub

    children.call(audit, args.release)
    pushed = hub.push(args.release, args.repository, private=args.private, revision=args.revision)
    text = f"{pushed.url}: {counted(pushed.files, 'file')}, {size(pushed.bytes)}, commit {pushed.commit[:12]}"
    return Answer(dataclasses.asdict(pushed), text)
