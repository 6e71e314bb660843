"""Released models, their versions, and the one in production, on top of the MLflow Model Registry.

    registry = open_registry(None, workspace)                # embedded: SQLite and a folder, no server
    registry = open_registry("https://mlflow…", workspace)   # any MLflow server
    version = publish(registry, release_folder, "my-model")  # alias `candidate`; only after a passed gate
    promote(registry, "my-model")                            # verifies, then moves `production`
    rollback(registry, "my-model")                           # to the previous production version
    fetch(registry, "my-model@production", out)              # a verified copy

A *reference* is NAME, NAME@ALIAS or NAME/VERSION. MLflow keeps no checksums, so the digest of a release's manifest is
stored in the version's tags and checked on every use.
"""

from numprune.serving.registry.connection import Registry, open_registry
from numprune.serving.registry.errors import RefusedReleaseError, RegistryError
from numprune.serving.registry.model_reference import CANDIDATE, PRODUCTION, ModelReference, parse
from numprune.serving.registry.production import before_production, promote, rollback, take_back
from numprune.serving.registry.publishing import publish
from numprune.serving.registry.releases import Shown, fetch, show, verify
from numprune.serving.registry.versions import Model, Version, list_models, list_versions, published_digests

__all__ = [
    "CANDIDATE",
    "PRODUCTION",
    "Model",
    "ModelReference",
    "RefusedReleaseError",
    "Registry",
    "RegistryError",
    "Shown",
    "Version",
    "before_production",
    "fetch",
    "list_models",
    "list_versions",
    "open_registry",
    "parse",
    "promote",
    "publish",
    "published_digests",
    "rollback",
    "show",
    "take_back",
    "verify",
]
