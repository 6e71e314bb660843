"""What all commands share: their options' shapes and what they answer."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, Protocol

from numprune.documents import BLANK_LINE, WHOLE_FILE, Reading, is_plain, separator
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


def add_choice(
    parser: argparse.ArgumentParser, option: str, choices: Sequence[str], default: str | None, help_text: str
) -> None:
    """Add an option that takes one of `choices`; its help lists them all, and the default."""
    listed = f"{help_text}: {', '.join(choices)}"
    parser.add_argument(
        option,
        choices=choices,
        default=default,
        required=default is None,
        metavar=option.lstrip("-").upper(),
        help=f"{listed} (default: {default})" if default else listed,
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how text files become rows of tokens: see `reading`."""
    parser.add_argument(
        "--split",
        type=_separator,
        default=WHOLE_FILE,
        metavar="SEPARATOR",
        help=f"what separates the documents of a plain text file: {BLANK_LINE}, or a regular expression "
        f"(default: {WHOLE_FILE}, a file is one document)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="a record's \"messages\" are its text, by the model's chat template"
    )
    parser.add_argument(
        "--pack",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="join documents by EOS and cut them as one text, or each by itself (default: join them where full windows "
        "of single documents hold less than half of the tokens)",
    )


def reading(args: argparse.Namespace, files: Iterable[str | Path]) -> Reading:
    """How the text `files` are to be read. Raises InputError."""
    if args.split != WHOLE_FILE and not any(is_plain(Path(file)) for file in files):
        raise InputError(f"--split {args.split}: there is no plain text file to split; leave it out")
    return Reading(args.split, args.chat, args.pack)


def _separator(text: str) -> str:
    try:
        separator(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None
    return text


class _Version(argparse.Action):
    """The distribution is asked only when somebody wants to know."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(f"numprune {metadata.version('numprune')}")
        parser.exit()
