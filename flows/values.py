"""The types of values in a recipe, and how each is checked."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator

from numprune.budget_texts import parse_budgets
from numprune.documents import separator
from numprune.errors import InputError
from numprune.flows.names import ALL_ITEMS, BUILT_IN, EMBEDDED, TASKS_OWN
from numprune.serving.benchmark.load import REPEATS_RULE, are_repeats
from numprune.serving.report import CORPUS_NAME, MAXIMUM_PROMPTS

NO_BUDGET = "none"
_MOST_EXAMPLES = 100


def _text(value: Any) -> Any:
    return value if value == EMBEDDED else _files(value, 'must be "embedded" or a list of text files')


def _files(value: Any, rule: str = "must be a list of text files") -> Any:
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not files or not all(isinstance(file, str) and file for file in files):
        raise ValueError(rule)
    return files


def _heldout(value: Any) -> Any:
    if not isinstance(value, dict):
        return _text(value)
    if not value:
        raise ValueError("must name at least one corpus")
    if unusable := [name for name in value if not re.fullmatch(CORPUS_NAME, name)]:
        raise ValueError(f"{unusable[0]!r} cannot name a corpus; use lower-case letters, digits, - and _")
    return {name: _text(text) for name, text in value.items()}


def _prompt_files(value: Any) -> Any:
    return [] if value == [] else _files(value)


def _prompts(value: Any) -> Any:
    if value == BUILT_IN:
        return value
    if not isinstance(value, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in value):
        raise ValueError(f'must be "{BUILT_IN}" or a list of texts that are not empty')
    if len(value) > MAXIMUM_PROMPTS:
        raise ValueError(f"must have at most {MAXIMUM_PROMPTS} prompts")
    return value


def distinct(value: list[Any]) -> list[Any]:
    """Return the list. Raises ValueError if it contains duplicates."""
    if len(set(value)) != len(value):
        raise ValueError("must not contain duplicates")
    return value


def _separator(value: str) -> str:
    try:
        separator(value)
    except InputError as error:
        raise ValueError(str(error)) from None
    return value


def _budget(value: Any) -> Any:
    limits = [value] if isinstance(value, str) else value
    if not isinstance(limits, list) or not limits or not all(isinstance(limit, str) for limit in limits):
        raise ValueError('must be "none", a limit like "6GiB", or a list of limits')
    try:
        if value != NO_BUDGET:
            parse_budgets(limits)
    except InputError as error:
        raise ValueError(str(error)) from None
    return value


def _candidates(value: Any) -> Any:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise ValueError("must be a number of at least 0, or a list of them")
    return distinct(value) if isinstance(value, list) else value


def _repeats(value: int) -> int:
    if not are_repeats(value):
        raise ValueError(REPEATS_RULE)
    return value


def _pack(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError('must be "auto", true or false')
    return value


def _few_shot(value: Any) -> Any:
    if value != TASKS_OWN and not (type(value) is int and 0 <= value <= _MOST_EXAMPLES):
        raise ValueError(f'must be "{TASKS_OWN}" or a number from 0 to {_MOST_EXAMPLES}')
    return value


def _limit(value: Any) -> Any:
    if value != ALL_ITEMS and not (type(value) is int and 1 <= value < 2**31):
        raise ValueError(f'must be "{ALL_ITEMS}" or a number of items, at least 1')
    return value


Text = Annotated[str | list[str], PlainValidator(_text)]
Heldout = Annotated[str | list[str] | dict[str, str | list[str]], PlainValidator(_heldout)]
PromptFiles = Annotated[list[str], PlainValidator(_prompt_files)]
Prompts = Annotated[str | list[str], PlainValidator(_prompts)]
FewShot = Annotated[int | Literal["task"], PlainValidator(_few_shot)]
Limit = Annotated[int | Literal["all"], PlainValidator(_limit)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Candidates = Annotated[int | list[int], PlainValidator(_candidates)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Separator = Annotated[str, AfterValidator(_separator)]
Pack = Annotated[bool | Literal["auto"], PlainValidator(_pack)]
Budget = Annotated[str | list[str], PlainValidator(_budget)]
Repeats = Annotated[int, Field(lt=2**31), AfterValidator(_repeats)]
