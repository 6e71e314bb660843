"""numprune completion: shell completion of commands, options and their values."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from numprune.flows.cli.parser import Answer, Parser, Subcommands, command

_SHELLS = ("bash", "zsh")
_PATHS = ("MODEL", "BASELINE", "CANDIDATE", "CHECKPOINT", "RECIPE", "DIR", "ENV")  # may be files or folders


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "completion",
        completion,
        "print a completion script for a shell",
        "numprune completion bash > ~/.local/share/bash-completion/completions/numprune",
    )
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=f"shell: {', '.join(_SHELLS)}")


def completion(args: argparse.Namespace) -> Answer:
    import shtab

    from numprune.flows.cli import COMMANDS
    from numprune.flows.cli.parser import build

    parser = build(COMMANDS)
    for below in _all(parser):
        for action in below._actions:
            if action.type is Path or action.metavar in _PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(parser, shell=args.shell)
    return Answer({"shell": args.shell, "script": script}, script)


def _all(parser: Parser) -> Iterator[Parser]:
    yield parser
    for below in parser.commands.values():
        yield from _all(below)
