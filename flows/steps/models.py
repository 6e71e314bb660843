"""The model that a recipe or a study asks for."""

from pathlib import Path

from numprune.export.checkpoint import resolve
from numprune.flows.names import EMBEDDED
from numprune.flows.recipe import EMBEDDED_FOLDER


def model_folder(path: str) -> Path:
    """The folder of a recipe's model. Raises InputError."""
    return EMBEDDED_FOLDER / "model" if path == EMBEDDED else resolve(path)


def model_name(path: str) -> str:
    """The last part of a folder's path; a hub id, or EMBEDDED, as it is."""
    return Path(path).resolve().name if Path(path).is_dir() else path
