"""What all commands share: their options' shapes and what they answer."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NoReturn, Protocol

from numprune.errors import InputError
from numprune.flows import logs

Subcommands = Any  # argparse's own type is private

_PASSING_ON = ("serve", "rollout", "rollback")  # commands with options for vLLM


@dataclass(frozen=True)
class Answer:
    """What a command found, as one JSON object and as text for people.

    `then` is what remains to be done once the answer is printed, and gives the exit code: a server goes on serving.
    """

    data: dict[str, Any]
    text: str
    exit_code: int = 0
    then: Callable[[], int] | None = None


class Commands(Protocol):
    """A module with commands."""

    def add(self, commands: Subcommands) -> None:
        """Add the module's commands."""


class Parser(argparse.ArgumentParser):
    """Errors in the arguments are errors like others: argparse's exit code 2 means a failed gate here."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def build(modules: Iterable[Commands]) -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="numprune",
        description="From a transformer and a recipe to a pruned, exported, benchmarked, gated and published artifact.",
        epilog="Example: numprune optimize\n\nExit codes: 0 pass or done, 1 error, 2 gate failed, 3 inconclusive, "
        "4 invalid environment.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for module in modules:
        module.add(commands)
    return parser


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """The arguments. For commands that start servers, what follows a `--` is `vllm_options`, None without."""
    if not words or words[0] not in _PASSING_ON:
        return parser.parse_args(words)
    if "--" not in words:
        return parser.parse_args(words, argparse.Namespace(vllm_options=None))
    mark = words.index("--")
    return parser.parse_args(words[:mark], argparse.Namespace(vllm_options=[*words[mark + 1 :]]))


def command(
    commands: Subcommands, name: str, run: Callable[[argparse.Namespace], Answer], help_text: str, example: str
) -> Parser:
    """Add one command, with its example and `--json`; `run` gets the arguments."""
    parser: Parser = commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=f"Example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        help=f"of our lines on stderr; json: an object a line with run and stage (default: ${logs.VARIABLE}, or human)",
    )
    parser.set_defaults(run=run)
    return parser


def at_least(minimum: int) -> Callable[[str], int]:
    """An argument type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is under {minimum}")
        return value

    parse.__name__ = "int"  # argparse's "invalid int value"
    return parse


class _Version(argparse.Action):
    """The distribution is asked only when somebody wants to know."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(f"numprune {metadata.version('numprune')}")
        parser.exit()
