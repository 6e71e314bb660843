"""The grid of a sweep: keys of the recipe with their values, and one recipe for each combination."""

import itertools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numprune.counted import counted
from numprune.errors import InputError
from numprune.flows import recipe
from numprune.flows.recipe import Recipe
from numprune.serving.problems import listed

Grid = Mapping[str, Sequence[Any]]

MAXIMUM = 64
# Everything else decides how candidates are measured, and what is measured differently cannot be compared.
_SECTIONS = ("learn", "prune", "timings", "recover", "quantize", "target")
_DATA = ("calibration", "samples", "seed")


@dataclass(frozen=True)
class Candidate:
    """`number` counts from 1; `settings`: its values of the grid's keys."""

    number: int
    settings: dict[str, Any]
    recipe: Recipe

    @property
    def label(self) -> str:
        return _label(self.settings)


def shown(value: Any) -> str:
    """A value as it may be given on the command line."""
    return value if isinstance(value, str) else recipe.to_text(value)


def parse(words: Sequence[str]) -> dict[str, list[Any]]:
    """Read `section.key=value,value` words: TOML values, or plain strings without commas. Raises InputError."""
    found: dict[str, list[Any]] = {}
    problems = []
    for word in words:
        key, separator, text = (part.strip() for part in word.partition("="))
        if not separator or not text:
            problems.append(f"--grid {word}: must be section.key=value,value")
        elif key in found:
            problems.append(f"--grid {key}: given twice; list all of its values in one")
        else:
            found[key] = _values(text)
    if problems:
        raise InputError("\n".join(problems))
    return found


def expand(path: Path, grid: Grid, overrides: Sequence[str] = ()) -> list[Candidate]:
    """The candidates, the last key varying fastest.

    Args:
        path: of the recipe.
        grid: "section.key" -> its values.
        overrides: of all candidates, `section.key=value` each.

    Raises InputError with every problem: of the grid, or of the recipe with some of its values.
    """
    if problems := _problems(grid, {override.partition("=")[0].strip() for override in overrides}):
        raise InputError(listed("the grid", problems))
    made: list[Candidate] = []
    refused: dict[str, list[str]] = {}  # by what is wrong
    same: dict[str, int] = {}
    for number, values in enumerate(itertools.product(*grid.values()), start=1):
        settings = dict(zip(grid, values, strict=True))
        assignments = [recipe.assignment(key, value) for key, value in settings.items()]
        try:
            candidate = Candidate(number, settings, recipe.load(path, [*overrides, *assignments]))
        except InputError as error:
            refused.setdefault(str(error), []).append(_label(settings))
            continue
        if (earlier := same.setdefault(candidate.recipe.digest, number)) != number:
            raise InputError(
                f"--grid {candidate.label}: the same recipe as candidate {earlier}; omit one of the values"
            )
        made.append(candidate)
    refuse(refused)
    return made


def refuse(refused: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError if candidates were refused.

    Args:
        refused: by the message, the settings of the candidates.
    """
    if refused:
        told = [f"{_those(labels)}: {message}" for message, labels in refused.items()]
        raise InputError("\n".join(told))


def _label(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in settings.items())


def _those(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"


def _values(text: str) -> list[Any]:
    try:
        return list(tomllib.loads(f"values = [{text}]")["values"])
    except (ValueError, RecursionError):  # TOML's own errors are ValueErrors
        return [recipe.value_of(part.strip()) for part in text.split(",")]


def _problems(grid: Grid, overridden: set[str]) -> list[str]:
    problems = []
    for key, values in grid.items():
        section, _, name = key.partition(".")
        if not name or "." in name:
            problems.append(f"{key}: must be section.key, like prune.ratio")
        elif section not in _SECTIONS and not (section == "data" and name in _DATA):
            if section in Recipe.model_fields:
                problems.append(
                    f"{key}: candidates that are measured differently cannot be compared; set it for all of them in "
                    f"the recipe or by --set. The sections {', '.join(_SECTIONS)} and the keys "
                    f"{', '.join(f'data.{one}' for one in _DATA)} may differ"
                )
            else:
                problems.append(f"{key}: the recipe has no section {section!r}")
        if key in overridden:
            problems.append(f"{key}: also given by --set; omit one of the two")
        if isinstance(values, str):
            problems.append(f"{key}: {values!r} must be a list of values")
            continue
        try:
            texts = [recipe.to_text(value) for value in values]
        except TypeError:  # a date of TOML; in Python, anything
            problems.append(f"{key}: the values must be text, numbers, true or false, or lists of these")
            continue
        problems += [f"{key}: {text} is given twice" for text in dict.fromkeys(texts) if texts.count(text) > 1]
        if not values:
            problems.append(f"{key}: has no values")
    count = math.prod(map(len, grid.values()))
    if not problems and not 2 <= count <= MAXIMUM:
        remedy = "give at least two" if count < 2 else f"at most {MAXIMUM} are compared; give fewer values"
        problems.append(f"{counted(count, 'combination')}; {remedy}")
    return problems
