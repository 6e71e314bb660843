"""The version in production, and the history of earlier ones.

MLflow's aliases have no history and no compare-and-set. The history is a journal in a tag of the model: the intended
history is written first, then the alias moves, then the history is confirmed. A process killed in between leaves enough
to tell whether the alias has moved.
"""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from numprune.errors import InputError, IntegrityError
from numprune.serving.problems import problems
from numprune.serving.registry.connection import Registry
from numprune.serving.registry.errors import lost_race
from numprune.serving.registry.model_reference import CANDIDATE, PRODUCTION, ModelReference, check_name, parse
from numprune.serving.registry.releases import verify_version
from numprune.serving.registry.versions import VERDICT, Version, model, resolve

_JOURNAL = "numprune.production"
_KEPT = 100  # versions of history: a tag holds 5,000 characters


class _Journal(BaseModel):
    """`history`: versions that were in production, the current one last; `next`: the history after an ongoing move."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    history: list[int]
    next: list[int] | None = Field(default=None, min_length=1)


def promote(registry: Registry, reference: str) -> Version:
    """Verify a version, then move `production` to it; a bare name means its candidate.

    Raises InputError, IntegrityError (damaged, or its verdict is not `pass`; production does not move).
    """
    wanted = parse(reference, default_alias=CANDIDATE)
    with registry.exclusive():
        version = resolve(registry, wanted)
        _require_passed(registry, version)
        history = _recover(registry, version.name)
        if _current(registry, version.name) != version.version:
            _move(registry, version.name, history, [*history, version.version])
        return resolve(registry, ModelReference(version.name, PRODUCTION, None))


def rollback(registry: Registry, name: str) -> Version:
    """Move `production` back to the previous version; repeated calls go further back.

    Raises InputError (nothing in production, or no previous version), IntegrityError (the previous version is damaged;
    production does not move).
    """
    with registry.exclusive():
        return _roll_back(registry, name)


def take_back(registry: Registry, reference: str) -> Version | None:
    """Undo the promotion of a version: `production` returns to where it was, or is removed if there was none.

    Raises InputError, IntegrityError (production has moved since, or the previous version is damaged).
    """
    with registry.exclusive():
        version = resolve(registry, parse(reference))
        history = _recover(registry, version.name)
        if _current(registry, version.name) != version.version:
            raise IntegrityError(f"{version.reference}: no longer in production; the alias was moved in the meantime")
        if len(history) > 1:
            return _roll_back(registry, version.name)
        registry.client.delete_registered_model_alias(version.name, PRODUCTION)
        _write(registry, version.name, _Journal(history=[]))
        return None


def before_production(registry: Registry, name: str) -> Version:
    """The version that `rollback` would put into production, not verified here. Raises InputError."""
    with registry.exclusive():
        return resolve(registry, ModelReference(name, None, _history_to_leave(registry, name)[-2]))


def _roll_back(registry: Registry, name: str) -> Version:
    history = _history_to_leave(registry, name)
    version = resolve(registry, ModelReference(name, None, history[-2]))
    _require_passed(registry, version)
    _move(registry, name, history, history[:-1])
    return resolve(registry, ModelReference(name, PRODUCTION, None))


def _history_to_leave(registry: Registry, name: str) -> list[int]:
    """The history of at least two versions, the last of which is in production. Raises InputError."""
    history = _recover(registry, check_name(name))
    if _current(registry, name) is None:
        past = ", ".join(str(version) for version in reversed(history)) or "none"
        raise InputError(
            f"{name}: nothing is in production; promote {name}/VERSION (earlier production versions: {past})"
        )
    if len(history) < 2:
        raise InputError(f"{name}: no version was in production before {name}/{history[-1]}")
    return history


def _require_passed(registry: Registry, version: Version) -> None:
    """The tag can be edited manually, so the report, whose digest is verified, must agree."""
    report = verify_version(registry, version)
    outcome = None if report.verdict is None else report.verdict.outcome
    if version.verdict != "pass" or outcome != "pass":
        raise IntegrityError(
            f"{version.reference}: its verdict is {outcome!r} in the report and {version.verdict!r} in the tag "
            f"{VERDICT}; only a passing release can go into production"
        )


def _current(registry: Registry, name: str) -> int | None:
    return model(registry, name).aliases.get(PRODUCTION)


def _move(registry: Registry, name: str, history: list[int], following: list[int]) -> None:
    following = following[-_KEPT:]
    somebody = IntegrityError(f"{name}: another user moved {PRODUCTION} at the same time; check it and try again")
    try:
        _write(registry, name, _Journal(history=history, next=following))
        registry.client.set_registered_model_alias(name, PRODUCTION, str(following[-1]))
        _write(registry, name, _Journal(history=following))
    except Exception as error:
        if not lost_race(error):
            raise
        raise somebody from None
    if _current(registry, name) != following[-1]:
        raise somebody


def _recover(registry: Registry, name: str) -> list[int]:
    """The actual history: an interrupted move is completed or dropped, a move by other tools is adopted."""
    current = _current(registry, name)
    journal = _read(registry, name)
    history = journal.history
    if journal.next is not None and journal.next[-1] == current:
        history = journal.next
    if current is not None and (not history or history[-1] != current):
        history = [*history, current][-_KEPT:]
    return history


def _read(registry: Registry, name: str) -> _Journal:
    text: Any = registry.client.get_registered_model(name).tags.get(_JOURNAL)
    if text is None:
        return _Journal(history=[])
    try:
        return _Journal.model_validate(json.loads(text))
    except ValidationError as error:
        raise IntegrityError(f"{name}: the tag {_JOURNAL} is damaged: {problems(error)}") from None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name}: the tag {_JOURNAL} is damaged: {error}") from None


def _write(registry: Registry, name: str, journal: _Journal) -> None:
    registry.client.set_registered_model_tag(name, _JOURNAL, journal.model_dump_json(exclude_none=True))
