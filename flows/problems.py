"""What is wrong with a recipe, in words: field, value given, what is allowed, and what was perhaps meant."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from numprune.serving.problems import short


def listed(what: str, problems: Sequence[str]) -> str:
    """Return one message for all `problems`, a line each."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{what}: {count}", *(f"  {problem}" for problem in problems)])


def described(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return a line for each problem that `model` found."""
    return [_describe(problem, model) for problem in error.errors(include_url=False)]


def _describe(problem: ErrorDetails, model: type[BaseModel]) -> str:
    path = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    match problem["type"]:
        case "missing":
            return f"{path}: missing"
        case "extra_forbidden":
            known = _keys(model, problem["loc"][:-1])
            return f"{path}: unknown; known are {', '.join(known)}{did_you_mean(problem['loc'][-1], known)}"
        case "literal_error":
            allowed = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return f"{path} = {short(problem['input'])}: {message}{did_you_mean(problem['input'], allowed)}"
    return f"{path} = {short(problem['input'])}: {message}"


def _keys(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The keys of the section at `path`; a step into a list leads to the model of its items."""
    for part in path:
        if isinstance(part, str):
            model = next(models_in(model.model_fields[part].annotation))
    return list(model.model_fields)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def did_you_mean(given: object, known: Sequence[str]) -> str:
    """A hint to append to a message, empty when nothing is near."""
    near = difflib.get_close_matches(given, known, n=1) if isinstance(given, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
