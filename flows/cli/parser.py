"""Common parts of all commands: option types and results."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Protocol, get_args

from numprune.documents import BLANK_LINE, WHOLE_FILE, Reading, is_plain, separator
from numprune.errors import InputError
from numprune.export.disk import require_writable
from numprune.flows import logs, names
from numprune.flows.cli.arguments import is_option, ordered

Subcommands = Any  # argparse's own type is private

MODEL = "a Hugging Face folder, or a hub id if a hub can be reached"
MODEL_REFERENCE = "NAME (its version in production), NAME@ALIAS or NAME/VERSION"

_PASSING_ON = ("serve", "rollout", "rollback")  # commands with options for vLLM


@dataclass(frozen=True)
class Answer:
    """The result of a command, as one JSON object and as text.

    `quiet`: nothing is printed; another process of the same command answers. `then` runs after the result is printed,
    for example a server, and returns the exit code.
    """

    data: dict[str, Any]
    text: str
    exit_code: int = 0
    quiet: bool = False
    then: Callable[[], int] | None = None


class Commands(Protocol):
    """A module with commands."""

    def add(self, commands: Subcommands) -> None:
        """Add the module's commands."""


class Parser(argparse.ArgumentParser):
    """Accepts options and arguments in any order; errors are InputError, because exit code 2 means a failed gate."""

    commands: Mapping[str, "Parser"] = MappingProxyType({})  # of a parser that expects a command name first
    renamed: Mapping[str, str] = MappingProxyType({})  # option names of earlier versions, not shown in help

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the arguments of a command. Raises InputError."""
        return super().parse_args(ordered(self, sys.argv[1:] if args is None else args, self.renamed), namespace)

    def add_commands(self) -> Subcommands:
        """Create the group that commands are added to."""
        added = self.add_subparsers(metavar="COMMAND", parser_class=Parser)
        self.commands = added.choices
        return added

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def build(modules: Iterable[Commands]) -> Parser:
    """Create the parser of all commands."""
    parser = Parser(
        prog="numprune",
        description="Prunes, quantizes, exports, benchmarks, gates, publishes and serves transformers.",
        epilog="Example: numprune optimize\n\n`numprune help COMMAND` shows a command's options and an example.\n\n"
        "Exit codes: 0 pass or done, 1 error, 2 gate failed, 3 inconclusive, 4 invalid environment.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_commands()
    for module in modules:
        module.add(commands)
    return parser


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. For commands that start servers, words after `--` are `vllm_options`, or None.

    Raises InputError. Help and version end the process; so does a missing command, with the help and exit code 1.
    """
    if words and words[0] == "help":
        words = [*words[1:], "--help"]
    rest = list(words)
    while parser.commands:
        if not rest:
            parser.print_help()
            parser.exit(1)
        word = rest.pop(0)
        if is_option(word):
            if rest and word not in parser._option_string_actions:
                raise InputError(f"{word}: options follow the command: {parser.prog} COMMAND {word} …")
            parser.parse_args([word])
        if word not in parser.commands:
            from numprune.serving.problems import did_you_mean

            near = did_you_mean(word, [*parser.commands])
            raise InputError(f"unknown command {word!r}{near} (see {parser.prog} --help)")
        parser = parser.commands[word]
    if words[0] not in _PASSING_ON:
        return parser.parse_args(rest)
    mark = rest.index("--") if "--" in rest else len(rest)
    vllm_options = rest[mark + 1 :] if mark < len(rest) else None
    return parser.parse_args(rest[:mark], argparse.Namespace(vllm_options=vllm_options))


def group(commands: Subcommands, name: str, help_text: str, example: str) -> Subcommands:
    """Add a command with subcommands, and return their group."""
    return _add(commands, name, help_text, example).add_commands()


def command(
    commands: Subcommands,
    name: str,
    run: Callable[[argparse.Namespace], Answer],
    help_text: str,
    example: str,
    *,
    needs_torch: bool = True,
    shareable: bool = False,
) -> Parser:
    """Add one command with its example and `--json`; `run` receives the arguments.

    `needs_torch`: False where it must also run in a process in which torch cannot be imported. `shareable`: several
    processes of torchrun can do it together.
    """
    parser = _add(commands, name, help_text, example)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, even on failure")
    parser.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        help=f"format of log lines on stderr; one of {', '.join(logs.FORMATS)} (default: ${logs.VARIABLE}, or human)",
        metavar="FORMAT",
    )
    parser.set_defaults(run=run, needs_torch=needs_torch, shareable=shareable)
    return parser


def _add(commands: Subcommands, name: str, help_text: str, example: str) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=f"Example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def at_least(minimum: int) -> Callable[[str], int]:
    """Argument type for integers of at least `minimum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} must be at least {minimum}")
        return value

    parse.__name__ = "int"  # argparse's "invalid int value"
    return parse


def rate(text: str) -> float:
    """Argument type for learning rates and weights of losses."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0, and finite")
    return value


rate.__name__ = "float"  # argparse's "invalid float value"


def add_choice(
    parser: argparse.ArgumentParser, option: str, choices: Sequence[str], default: str | None, help_text: str
) -> None:
    """Add an option with `choices`, all listed in its help with the default."""
    listed = f"{help_text}; one of {', '.join(choices)}"
    parser.add_argument(
        option,
        choices=choices,
        default=default,
        required=default is None,
        metavar=option.lstrip("-").upper(),
        help=f"{listed} (default: {default})" if default else listed,
    )


def add_group_size(parser: argparse.ArgumentParser, otherwise: str = "") -> None:
    """Add `--group-size`; `otherwise`: the default without w4a16, in words."""
    parser.add_argument(
        "--group-size",
        type=int,
        choices=names.GROUP_SIZES,
        metavar="N",
        help=f"channels that share a scale, with --scheme w4a16: {', '.join(map(str, names.GROUP_SIZES))} "
        f"(default: {names.GROUP_SIZE}{otherwise})",
    )


def add_lm_head_bits(parser: argparse.ArgumentParser, help_text: str, default: int | None = 8) -> None:
    """Add `--lm-head-bits`."""
    parser.add_argument(
        "--lm-head-bits",
        type=int,
        choices=names.LM_HEAD_BITS,
        default=default,
        metavar="N",
        help=f"{help_text}: {' or '.join(map(str, names.LM_HEAD_BITS))} (default: 8)",
    )


def add_dtype(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add `--dtype`, which is None if it is not given."""
    choices = get_args(names.Dtype)
    parser.add_argument(
        "--dtype", choices=choices, metavar="DTYPE", help=f"{help_text}; one of {', '.join(choices)} (default: auto)"
    )


def add_checkpoint_and_out(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint that something is made of, and the folder to write."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=MODEL)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; must not exist")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add `--seed`."""
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed of every random draw (default: 0)"
    )


def add_workspace(parser: argparse.ArgumentParser) -> None:
    """Add `--workspace`."""
    parser.add_argument(
        "--workspace",
        metavar="DIR",
        help="folder of stages, releases and the registry (default: $NUMPRUNE_WORKSPACE, or ./numprune-workspace)",
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, `--set` and `--workspace`."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a TOML file (default: the small embedded model)")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        dest="overrides",
        type=_assignment,
        metavar="SECTION.KEY=VALUE",
        help="override keys of the recipe, like prune.ratio=0.2; may be repeated (default: none)",
    )
    add_workspace(parser)


def _assignment(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} must be section.key=value")
    return text


def add_registry(parser: argparse.ArgumentParser) -> None:
    """Add `--workspace` and `--uri`."""
    add_workspace(parser)
    parser.add_argument("--uri", metavar="URI", help="an MLflow server (default: the registry in the workspace)")


def add_text(parser: argparse.ArgumentParser, help_text: str, *, required: bool = True) -> None:
    """Add --text and the options for reading it; `help_text`: its purpose."""
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        required=required,
        type=Path,
        metavar="FILE",
        help=f"{help_text}: .jsonl, .json and .parquet files and saved datasets hold a document per record (its field "
        f'"text"), any other file is plain text; for a model that reads images: folders of them, or .parquet files'
        f"{'' if required else ' (default: none)'}",
    )
    add_reading(parser)
    parser.add_argument(
        "--sequence-length",
        type=at_least(2),
        metavar="L",
        help=f"tokens per window (default: {names.SEQUENCE_LENGTH}, or the model's context if shorter)",
    )


def check_out(out: Path) -> None:
    """Raises InputError if the path exists, DiskError if it cannot be created."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: already exists; choose another folder or remove it")
    require_writable(out.parent)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options for turning text files into rows of tokens: see `reading`."""
    parser.add_argument(
        "--split",
        type=_separator,
        default=WHOLE_FILE,
        metavar="SEPARATOR",
        help=f"separator of documents in a plain text file: {BLANK_LINE}, or a regular expression "
        f"(default: {WHOLE_FILE}, one document per file)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help='render each record\'s "messages" with the model\'s chat template (default: read its "text")',
    )
    parser.add_argument(
        "--pack",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="join documents by EOS and cut them as one text, or cut each separately (default: join if full windows of "
        "single documents hold less than half of the tokens)",
    )


def reading(args: argparse.Namespace, files: Iterable[str | Path]) -> Reading:
    """How to read the text `files`. Raises InputError."""
    if args.split != WHOLE_FILE and not any(is_plain(Path(file)) for file in files):
        raise InputError(f"--split {args.split}: there is no plain text file to split; omit it")
    return Reading(args.split, args.chat, args.pack)


def _separator(text: str) -> str:
    try:
        separator(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None
    return text


class _Version(argparse.Action):
    """Looks up the distribution only on demand."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(f"numprune {metadata.version('numprune')}")
        parser.exit()
