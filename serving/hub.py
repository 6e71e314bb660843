"""Pushes a release to a repository on the Hugging Face hub, or on a server that speaks its API.

The checkpoint's files are at the top, where `from_pretrained` and `vllm serve` look for them; the model card has the
figures of the report; exports are in their own folders, and the release's report and manifest in `numprune/`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from numprune.errors import IntegrityError, NumpruneError
from numprune.export import card_changes, manifest
from numprune.export.files import CARD
from numprune.serving.registry.publishing import check_release
from numprune.serving.registry.releases import CHECKPOINT
from numprune.serving.report import quality_section

FOLDER = "numprune"


class HubError(NumpruneError):
    """The hub cannot be reached, or refuses the repository or the files."""


@dataclass(frozen=True)
class Pushed:
    """A commit in a repository, with its number of `files` and their `bytes`."""

    repository: str
    url: str
    commit: str
    digest: str
    files: int
    bytes: int


def push(release: Path, repository: str, *, private: bool = False, revision: str | None = None) -> Pushed:
    """Upload a release that passed its gates to the repository `repository` (OWNER/NAME), created if missing.

    All files come in one commit. The hub is that of $HF_ENDPOINT (default: huggingface.co), the token that of $HF_TOKEN
    or of `hf auth login`.

    Args:
        private: create it private; an existing repository stays as it is.
        revision: the branch; main without it.

    Raises:
        RefusedReleaseError, IntegrityError, InputError: as `registry.publish`.
        HubError: the hub's message, and the remedy.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
    )  # HTTPError: its client's

    whole, report = check_release(release)
    text = _card(release, quality_section(report))
    operations = [CommitOperationAdd(CARD, text.encode())]
    operations += [CommitOperationAdd(there, here) for here, there in _places(release, whole)]
    hub = HfApi(library_name="numprune")
    try:
        made = hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.create_commit(
            made.repo_id, operations, commit_message=f"numprune release {whole.digest[:12]}", revision=revision
        )
    except (HTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise HubError(f"{repository}: {_reason(error)}") from None
    return Pushed(
        repository=made.repo_id,
        url=made.url,
        commit=commit.oid,
        digest=whole.digest,
        files=len(operations),
        bytes=sum(operation.upload_info.size for operation in operations),
    )


def _card(release: Path, quality: str) -> str:
    path = release / CHECKPOINT / CARD
    if not path.is_file():
        raise IntegrityError(
            f"{path}: missing; releases of numprune 0.1 have no model card: run `numprune optimize` again"
        )
    text = path.read_text(encoding="utf-8")
    return card_changes.with_quality(text, quality) if quality else text


def _places(release: Path, whole: manifest.Manifest) -> Iterator[tuple[Path, str]]:
    """Map the release's files to their paths in the repository.

    The checkpoint's manifest is left out: it covers the card as it was before quality was measured.
    """
    for name in [*whole.files, manifest.FILE_NAME]:
        part, _, inside = name.partition("/")
        if part == CHECKPOINT:
            if inside not in (CARD, manifest.FILE_NAME):
                yield release / name, inside
        else:
            yield release / name, name if inside else f"{FOLDER}/{name}"


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if status in (401, 403):
        return f"{said}; give a token with write access: set $HF_TOKEN or run `hf auth login`"
    if status is None:
        return f"{said}; check the name, the network and $HF_ENDPOINT"
    return said
