"""Models and their versions in MLflow."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from numprune.errors import InputError, IntegrityError
from numprune.serving.registry.connection import Registry
from numprune.serving.registry.errors import RegistryError, error_code
from numprune.serving.registry.model_reference import ModelReference, check_name

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MARK = "numprune"  # the tag of models published by numprune
RELEASE = "numprune.release"  # digest of the release's manifest
VERDICT = "numprune.verdict"


@dataclass(frozen=True)
class Version:
    """One published release."""

    name: str
    version: int
    created: datetime
    digest: str  # of the release's manifest
    verdict: str
    aliases: tuple[str, ...]
    run_id: str  # of MLflow
    tags: Mapping[str, str]

    @property
    def reference(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True)
class Model:
    """A model name, and the versions of its aliases."""

    name: str
    aliases: Mapping[str, int]


def list_models(registry: Registry) -> list[Model]:
    """All models that numprune published to, by name."""
    with registry.speaking():
        pages = _pages(lambda token: registry.client.search_registered_models(page_token=token))
        models = [Model(model.name, _aliases(model)) for model in pages if MARK in (model.tags or {})]
        return sorted(models, key=lambda model: model.name)


def list_versions(registry: Registry, name: str) -> list[Version]:
    """The versions of a model that numprune published, oldest first. Raises InputError for an unknown name."""
    with registry.speaking():
        return find_versions(registry, name, "")


def published_digests(registry: Registry, name: str) -> frozenset[str]:
    """Digests of all published releases of all models, for decisions that depend on completeness.

    An empty search result is not proof: servers before MLflow 2.21, and those that hide models from a user, return an
    empty list. So `name`, and the targets of each model's aliases, are also looked up individually.

    Raises RegistryError if the search misses one of them.
    """
    with registry.speaking():
        names = [listed.name for listed in list_models(registry)]
        if name not in names and MARK in _tags(registry, name):
            raise RegistryError(f"registry {registry.uri}: has the model {name}, but does not list it")
        found: set[str] = set()
        for listed in names:
            found |= {version.digest for version in find_versions(registry, listed, "")}
            for alias, number in model(registry, listed).aliases.items():
                tags = registry.client.get_model_version(listed, str(number)).tags or {}
                if tags.get(RELEASE, "") not in {"", *found}:
                    raise RegistryError(
                        f"registry {registry.uri}: has the version {listed}/{number} ({alias}), but does not list it"
                    )
        return frozenset(found)


def find_versions(registry: Registry, name: str, condition: str) -> list[Version]:
    """Versions that also meet a condition in MLflow's search language, oldest first."""
    aliases = model(registry, name).aliases
    query = f"name = '{check_name(name)}'" + (f" and {condition}" if condition else "")
    pages = _pages(lambda token: registry.client.search_model_versions(query, page_token=token))
    found = [_version(item, aliases) for item in pages if RELEASE in (item.tags or {})]
    return sorted(found, key=lambda version: version.version)


def model(registry: Registry, name: str) -> Model:
    """Return one model. Raises InputError if no model has that name."""
    try:
        return Model(name, _aliases(registry.client.get_registered_model(check_name(name))))
    except Exception as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
    near = difflib.get_close_matches(name, [known.name for known in list_models(registry)], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; `numprune registry list` shows all models"
    raise InputError(f"{name}: no such model in the registry{hint}")


def _tags(registry: Registry, name: str) -> Mapping[str, str]:
    """Tags of a model; empty if there is no such model."""
    try:
        return registry.client.get_registered_model(check_name(name)).tags or {}
    except Exception as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
    return {}


def resolve(registry: Registry, reference: ModelReference) -> Version:
    """Resolve a reference. Raises InputError (not found), IntegrityError (not published by numprune)."""
    aliases = model(registry, reference.name).aliases
    number = reference.version if reference.alias is None else aliases.get(reference.alias)
    if number is None:
        known = ", ".join(f"{alias} ({version})" for alias, version in sorted(aliases.items())) or "none"
        raise InputError(f"{reference}: {reference.name} has no alias {reference.alias!r}; its aliases: {known}")
    try:
        found = registry.client.get_model_version(reference.name, str(number))
    except Exception as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise InputError(f"{reference.name}/{number}: no such version; it may have been deleted in MLflow") from None
    if found.status != "READY":
        raise IntegrityError(f"{reference.name}/{number}: its status in MLflow is {found.status}, not READY")
    if RELEASE not in (found.tags or {}) or not found.run_id:
        raise IntegrityError(f"{reference.name}/{number}: not published by numprune (no tag {RELEASE})")
    return _version(found, aliases)


def _version(found: "ModelVersion", aliases: Mapping[str, int]) -> Version:
    number = int(found.version)  # an int from SQLite, text from a server
    tags = dict(found.tags)
    return Version(
        name=found.name,
        version=number,
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        digest=tags[RELEASE],
        verdict=tags.get(VERDICT, ""),
        aliases=tuple(sorted(alias for alias, target in aliases.items() if target == number)),
        run_id=found.run_id or "",
        tags=tags,
    )


def _aliases(found: Any) -> dict[str, int]:
    return {alias: int(version) for alias, version in (found.aliases or {}).items()}


def _pages(search: Any) -> Iterator[Any]:
    """All items of a paged search."""
    token: str | None = None
    while True:
        page: Iterable[Any] = search(token)
        yield from page
        token = getattr(page, "token", None)
        if not token:
            return
