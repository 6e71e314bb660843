"""Records a promotion that is not served yet in a file, so that the next run can undo it after a kill."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from numprune.errors import IntegrityError
from numprune.serving.problems import problems
from numprune.serving.rollout.state import Place


class Promotion(BaseModel):
    """`reference` went into production; `before` is the previous version, or None."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    reference: str
    before: str | None


def begin(place: Place, reference: str, before: str | None) -> str | None:
    """Call before the alias moves from `before` to `reference`; returns where it must go if that does not serve.

    That is `before`, unless `before` itself was promoted by a killed run and never served.
    """
    unserved = _read(place)
    if unserved is not None and unserved.reference == before and not _serves(place, before):
        before = unserved.before
    if before != reference:
        _write(place, Promotion(reference=reference, before=before))
    return before


def end(place: Place) -> None:
    """The promotion is complete: it serves, or was undone."""
    _file(place).unlink(missing_ok=True)


def _serves(place: Place, reference: str) -> bool:
    current = place.read().current
    return current is not None and current.reference == reference


def _file(place: Place) -> Path:
    return place.folder / "promotion.json"


def _read(place: Place) -> Promotion | None:
    try:
        return Promotion.model_validate_json(_file(place).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise IntegrityError(
            f"{_file(place)}: {problems(error)}; check which version is in production, then remove the file"
        ) from None


def _write(place: Place, promotion: Promotion) -> None:
    place.folder.mkdir(parents=True, exist_ok=True)
    partial = _file(place).with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(promotion.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(_file(place))
