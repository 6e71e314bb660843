"""The saved state of a training: weights, optimizer moments and the best weights so far."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

_INDEX = "state.json"  # names the complete file


@dataclass
class Position:
    """The progress of a training.

    Attributes:
        step: number of finished steps.
        seconds: their duration.
        best_step: the step with the lowest divergence on the selection rows.
        curve: (steps done, nats per token on the selection rows), the first before any step.
    """

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingState:
    """A folder with the state of a training; `identity` is the digest of everything that determines its result.

    A file of tensors is written under a new name before the index names it, with its digest, so an interruption leaves
    either the old or the new state. A training that draws random numbers saves its generator among the tensors.
    """

    folder: Path
    identity: str

    def save(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Save position and tensors, replacing the previous state."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{position.step}.safetensors"
        replace_file(self.folder / name, lambda path: save_file(dict(tensors), path))
        with (self.folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        index = {"identity": self.identity, "file": name, "sha256": digest, "position": asdict(position)}
        replace_file(self.folder / _INDEX, lambda path: path.write_text(json.dumps(index), encoding="utf-8"))
        for path in self.folder.glob("step-*"):
            if path.name != name:
                path.unlink()

    def load(self) -> tuple[Position, dict[str, Tensor]] | None:
        """Return the saved state; None if there is none, or it is damaged or belongs to another training."""
        try:
            index = json.loads((self.folder / _INDEX).read_bytes())
            if index["identity"] != self.identity:
                return None
            path = self.folder / str(index["file"])
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != index["sha256"]:
                    raise ValueError("its digest differs")
            found = index["position"]
            curve = [(int(step), float(value)) for step, value in found.pop("curve")]
            return Position(**found, curve=curve), load_file(path)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            logger.warning("%s: the saved state of the training is damaged (%s); starting again", self.folder, error)
            return None


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` create a file beside `path`, flush it to the disk, and rename it to `path`."""
    beside = path.with_name(f"{path.name}.partial")
    write(beside)
    for written in (beside, path.parent):
        handle = os.open(written, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    os.replace(beside, path)
