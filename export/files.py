"""The files of a model folder other than weights: which ones pruning copies unchanged, and their size limits."""

import json
import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from numprune.errors import InputError
from numprune.plans import PLAN_FILE

CONFIG = "config.json"
CARD = "README.md"
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
SENTENCE_MODULES = "[0-9]_*/*.json"  # sentence-transformers' settings, such as pooling

# Checked before a file is parsed or copied.
MAXIMUM_CONFIG_BYTES = 16 << 20
MAXIMUM_FILE_BYTES = 512 << 20

# Tokenizer, chat templates, generation settings, licence; matched in lower case. The base model's card is not copied,
# because its figures are the dense model's (see card.py), and neither is code, because numprune runs none of it.
_CARRIED = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "tokenizer*",
    "merges.txt",
    "vocab.txt",
    "licen[sc]e*",
    "notice*",
    "copying*",
    "*policy*",
)
_NOT_CARRIED = (CONFIG, PLAN_FILE, "*.index.json", "manifest.json", "params.json")  # contain sizes, or written anew

# The files to request from a hub.
DOWNLOADED = [
    *("*.json", "*.safetensors", "tokenizer*", "*.model", "*.tiktoken", "*.txt", "*.jinja"),
    *("LICENSE*", "NOTICE*", "*POLICY*", CARD),
]


def resolve(model: str | Path) -> Path:
    """The local folder of a model: itself, or a hub id's files, downloaded (no code, safetensors only).

    Raises InputError when there is no such folder and the hub does not give it either.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)):
        raise InputError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(model), allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{model}: no such folder, and not available from the hub ({first})") from None


def require_size(path: Path, maximum: int) -> None:
    """Raise InputError unless `path` is a regular file, or a link to one, of at most `maximum` bytes."""
    if not path.is_file():  # a device can be read forever
        raise InputError(f"{path}: not a regular file")
    if path.stat().st_size > maximum:
        raise InputError(f"{path}: exceeds the {maximum:,}-byte limit")


def read_object(path: Path, maximum: int = MAXIMUM_CONFIG_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file. Raises InputError."""
    found = _read_json(path, maximum)
    if not isinstance(found, dict):
        raise InputError(f"{path}: must contain a JSON object")
    return found


def read_array(path: Path, maximum: int = MAXIMUM_CONFIG_BYTES) -> list[Any]:
    """Return the JSON array in a file. Raises InputError."""
    found = _read_json(path, maximum)
    if not isinstance(found, list):
        raise InputError(f"{path}: must contain a JSON array")
    return found


def _read_json(path: Path, maximum: int) -> Any:
    require_size(path, maximum)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {str(error)[:200]}") from None


def write_object(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def carried(folder: Path) -> Iterator[Path]:
    """Return the files of a model folder that a pruned model keeps unchanged, sorted. Raises InputError."""
    inside = (*(folder / MORE_TEMPLATES).glob("*.jinja"), *folder.glob(SENTENCE_MODULES))
    for path in sorted([*folder.iterdir(), *inside]):
        name = path.name.lower()
        apart = path.parent == folder and any(fnmatchcase(name, pattern) for pattern in _NOT_CARRIED)
        if path.is_dir() or apart:
            continue
        if any(fnmatchcase(name, pattern) for pattern in _CARRIED):
            require_size(path, MAXIMUM_FILE_BYTES)
            yield path


def carry(source: Path, target: Path) -> None:
    """Copy the files of the folder `source` that a pruned model keeps unchanged into `target`, byte for byte.

    The one exception is `auto_map` in tokenizer_config.json, which names code that is not copied: it is left out.
    Raises InputError.
    """
    for path in carried(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        if path.name == "tokenizer_config.json":
            copy_without_code(path, copy)
        else:
            shutil.copyfile(path, copy)


def copy_without_code(source: Path, target: Path) -> None:
    """Copy a JSON file, without `auto_map` if it names code, otherwise byte for byte. Raises InputError."""
    content = read_object(source)
    if content.pop("auto_map", None) is None:
        shutil.copyfile(source, target)
    else:
        write_object(target, content)
