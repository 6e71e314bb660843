"""Writes the command-line reference when the documentation is built, from the parsers themselves."""

import argparse
from typing import Any

from mkdocs.structure.files import File, Files

from numprune.flows.cli import COMMANDS
from numprune.flows.cli.parser import build


def on_files(files: Files, config: Any) -> Files:
    """Add commands.md: the help of every command."""
    files.append(File.generated(config, "commands.md", content=reference()))
    return files


def reference() -> str:
    """The help of numprune and of each of its commands, as Markdown."""
    parts = [
        "# Commands",
        "Every command takes `--json` (one JSON object on stdout; progress and logs on stderr) and `--help`. Where it "
        'fails, the object is `{"error": …, "exit_code": …}`; the message is on stderr, too.',
        "Options may stand before, between and after the arguments. An option with several values may be repeated "
        "(`--text a.txt --text b.txt`) or take them at once (`--text a.txt b.txt`), and leaves to the command the "
        "arguments that it needs. `--` ends the options.",
    ]
    parts += _sections(build(COMMANDS), 1)
    return "\n\n".join(parts) + "\n"


def _sections(parser: argparse.ArgumentParser, depth: int) -> list[str]:
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100, max_help_position=28)
    found = [f"```\n{parser.format_help().strip()}\n```"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                found += [
                    f"{'#' * (depth + 1)} {parser.prog.removeprefix('numprune').strip()} {name}".replace("  ", " ")
                ]
                found += _sections(child, depth + 1)
    return found
