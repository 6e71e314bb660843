"""What a killed training resumes from: weights, moments of the optimizer and the best weights so far, on the disk."""

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

_INDEX = "state.json"  # names the file that is whole


@dataclass
class Position:
    """How far a training is.

    Attributes:
        step: steps that are done.
        seconds: that they took.
        best_step: after how many steps the selection rows' divergence was lowest.
        curve: (steps done, nats per token on the selection rows), the first before any step.
    """

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingState:
    """A folder with the state of the training that `identity` stands for: digest of all that decides its result.

    A file of tensors is written under a new name before the index names it, with its digest: whoever is killed leaves
    the state before or the one after. Nothing is drawn while training, so there is no generator to save.
    """

    folder: Path
    identity: str

    def save(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Put position and tensors on the disk; what was there before goes."""
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
        """Return what was saved last; None where there is nothing, or it is damaged or of another training."""
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
    """Have `write` make a file beside `path`, put it on the disk, and give it that name."""
    beside = path.with_name(f"{path.name}.partial")
    write(beside)
    for written in (beside, path.parent):
        handle = os.open(written, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    os.replace(beside, path)
