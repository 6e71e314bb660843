"""What is wrong with data from outside, all of it, in words."""

from collections.abc import Container

from pydantic import ValidationError

_SHOWN = 12  # a file of another kind has thousands


def problems(error: ValidationError, secret: Container[str] = ()) -> str:
    """`field: what is allowed (given: value)` for each problem, joined by `; `.

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
    """A value as it was given, or its beginning."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in lists
        return f"a value of {type(value).__name__} that is too large to print"
    return text if len(text) <= 80 else f"{text[:77]}..."
