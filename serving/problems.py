"""Messages about invalid data: field, value given, allowed values, and a suggestion.

`problems` reports errors in machine-written files in one line; `described` and `listed` report those in hand-written
files, one line each.
"""

import difflib
import re
from collections.abc import Container, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from numprune.counted import counted

_SHOWN = 12  # a file of the wrong kind has thousands


def problems(error: ValidationError, secret: Container[str] = ()) -> str:
    """`field: allowed values (given: value)` for each problem, joined by `; `.

    Args:
        secret: fields whose values are not repeated.
    """
    found = error.errors(include_url=False, include_context=False)
    lines = []
    for problem in found[:_SHOWN]:
        where = ".".join(str(part)[:80] for part in problem["loc"]) or "as a whole"
        silent = problem["type"] == "missing" or (problem["loc"] and problem["loc"][0] in secret)
        given = "" if silent else f" (given: {short(problem['input'])})"
        lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}{given}")
    if len(found) > _SHOWN:
        lines.append(f"and {len(found) - _SHOWN} more")
    return "; ".join(lines)


def short(value: object) -> str:
    """A value as given, or its beginning."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deeply nested lists
        return f"a value of {type(value).__name__} that is too large to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(what: str, problems: Sequence[str]) -> str:
    """Return one message for all `problems`, a line each."""
    count = counted(len(problems), "problem")
    return "\n".join([f"{what}: {count}", *(f"  {problem}" for problem in problems)])


def described(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one line per problem that `model` found."""
    return [_describe(problem, model) for problem in error.errors(include_url=False)]


def _describe(problem: ErrorDetails, model: type[BaseModel]) -> str:
    path = ".".join(map(str, problem["loc"]))
    message = re.sub(r"^(Input|String|List) should ", "must ", problem["msg"].removeprefix("Value error, "))
    message = message.removesuffix(" after validation, not 0")
    match problem["type"]:
        case "missing":
            choices = get_args(_field(model, problem["loc"]).annotation)
            words = [choice for choice in choices if isinstance(choice, str)]
            return f"{path}: missing" + (f"; must be one of {', '.join(words)}" if words else "")
        case "string_pattern_mismatch" if meant := _field(model, problem["loc"]).description:
            return f"{path} = {short(problem['input'])}: must be {meant}"
        case "extra_forbidden":
            known = list(_section(model, problem["loc"][:-1]).model_fields)
            return f"{path}: unknown; the valid ones are {', '.join(known)}{did_you_mean(problem['loc'][-1], known)}"
        case "literal_error":
            allowed = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return f"{path} = {short(problem['input'])}: {message}{did_you_mean(problem['input'], allowed)}"
        case "value_error" if isinstance(problem["input"], dict) and len(problem["loc"]) < 2:
            # Of a section or the whole, the message names the fields.
            return f"{path}: {message}" if path else message
    return f"{path} = {short(problem['input'])}: {message}"


def _field(model: type[BaseModel], path: Sequence[int | str]) -> FieldInfo:
    return _section(model, path[:-1]).model_fields[str(path[-1])]


def _section(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """The model of the section at `path`; an index into a list leads to the model of its items."""
    for part in path:
        if isinstance(part, str):
            model = next(models_in(model.model_fields[part].annotation))
    return model


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def did_you_mean(given: object, known: Sequence[str]) -> str:
    """A hint to append to a message; empty if nothing is close."""
    near = difflib.get_close_matches(given, known, n=1) if isinstance(given, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
