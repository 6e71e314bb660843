"""Reorders the words of a command line so that argparse parses them correctly.

argparse gives an option with several values every word up to the next option: in `--text cal.txt MODEL OUT` nothing is
left for MODEL and OUT, and in `--set a=b recipe.toml` the recipe is taken for a second assignment. Here such an option
leaves the command its arguments, and words that cannot be values of the option.
"""

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numprune.errors import InputError

_NEGATIVE_NUMBER = re.compile(r"-(\d+|\d*\.\d+)")


class NeededUnless(argparse._StoreAction):
    """An argument that is required unless the option `unless` is given."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, unless: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", **kwargs)
        self.unless = unless


@dataclass
class _Option:
    """An option as written. `values` are the words after it, with their positions on the command line."""

    word: str
    action: argparse.Action
    values: list[tuple[int, str]] = field(default_factory=list)


def ordered(parser: argparse.ArgumentParser, words: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """The same words: options with their values first, then `--` and the arguments.

    Args:
        renamed: option name of an earlier version -> current name.

    Raises InputError for an unknown option, an extra argument, and values that could also be arguments.
    """
    options, arguments = _read(parser, words, renamed)
    least, most = _limits(parser, {option.word for option in options})
    missing = max(0, least - len(arguments))
    greedy = [option for option in options if option.action.nargs == "+"]
    if missing and most is None and sum(len(option.values) - 1 for option in greedy) > missing:
        name = next(option.word for option in greedy if len(option.values) > 1)
        raise InputError(
            f"{name}: it is unclear where its values end; put the arguments first, or repeat {name} for "
            "each value "
            f"(see {parser.prog} --help)"
        )
    for option in reversed(greedy):
        while missing and len(option.values) > 1:
            arguments.append(option.values.pop())
            missing -= 1
    found = [word for _, word in sorted(arguments)]
    if most is not None and len(found) > most:
        raise InputError(f"unexpected argument {found[most]!r} (see {parser.prog} --help)")
    written = [word for option in options for word in (option.word, *(value for _, value in option.values))]
    return [*written, "--", *found] if found else written


def is_option(word: str) -> bool:
    """Whether a word is an option; `-` and negative numbers are not."""
    return len(word) > 1 and word.startswith("-") and not _NEGATIVE_NUMBER.fullmatch(word)


def _read(
    parser: argparse.ArgumentParser, words: Sequence[str], renamed: Mapping[str, str]
) -> tuple[list[_Option], list[tuple[int, str]]]:
    """The options with all their possible values, and the arguments with their positions."""
    known = {name: action for action in parser._actions for name in action.option_strings}
    options: list[_Option] = []
    arguments: list[tuple[int, str]] = []
    taking: _Option | None = None
    for place, word in enumerate(words):
        if word == "--":
            arguments += enumerate(words[place + 1 :], start=place + 1)
            break
        if is_option(word):
            given, separator, value = word.partition("=")
            name = _full_name(renamed.get(given, given), known, parser.prog)
            options.append(_Option(f"{name}{separator}{value}", known[name]))
            taking = None if separator or known[name].nargs == 0 else options[-1]
        elif taking is None or (taking.values and not _is_value(word, taking.action)):
            arguments.append((place, word))
        else:
            taking.values.append((place, word))
            taking = taking if taking.action.nargs == "+" else None
    return options, arguments


def _limits(parser: argparse.ArgumentParser, given: Collection[str]) -> tuple[int, int | None]:
    """The minimum and maximum number of arguments with the given options."""
    arguments = [action for action in parser._actions if not action.option_strings]
    needed = [
        action.unless not in given if isinstance(action, NeededUnless) else action.nargs != "?" for action in arguments
    ]
    return sum(needed), None if any(action.nargs == "+" for action in arguments) else len(arguments)


def _full_name(given: str, known: Mapping[str, argparse.Action], prog: str) -> str:
    """The full name of an option, which may be abbreviated. Raises InputError."""
    if given in known:
        return given
    longer = [name for name in known if given.startswith("--") and name.startswith(given)]
    if len(longer) == 1:
        return longer[0]
    if longer:
        raise InputError(f"option {given} could be {' or '.join(longer)} (see {prog} --help)")
    from numprune.serving.problems import did_you_mean

    raise InputError(f"unknown option {given}{did_you_mean(given, [*known])} (see {prog} --help)")


def _is_value(word: str, action: argparse.Action) -> bool:
    try:
        value = action.type(word) if callable(action.type) else word
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return action.choices is None or value in action.choices
