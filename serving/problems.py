"""What is wrong with data from outside, all of it, in words."""

from pydantic import ValidationError

_SHOWN = 12  # a file of another kind has thousands


def problems(error: ValidationError) -> str:
    """`field: what is allowed (given: value)` for each problem, joined by `; `."""
    found = error.errors(include_url=False, include_context=False)
    lines = []
    for problem in found[:_SHOWN]:
        where = ".".join(str(part)[:80] for part in problem["loc"]) or "as a whole"
        given = "" if problem["type"] == "missing" else f" (given: {short(problem['input'])})"
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
