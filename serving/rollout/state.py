"""What runs for a name, as an atomically written file, and its lock."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from numprune.errors import IntegrityError, NumpruneError
from numprune.export import locks
from numprune.serving.problems import problems
from numprune.serving.registry.model_reference import check_name
from numprune.serving.vllm.process import Process


class RolloutFailed(NumpruneError):
    """The new version does not serve; the previous one still does."""

    exit_code = 2


class RolloutBusy(NumpruneError):
    """Another rollout of the same name is in progress."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Started(_Model):
    """A process as plain values: see `Process`."""

    pid: int
    tag: str
    log: str

    @staticmethod
    def of(process: Process) -> "Started":
        return Started(pid=process.pid, tag=process.tag, log=str(process.log))

    @property
    def process(self) -> Process:
        return Process(self.pid, self.tag, Path(self.log))


class Backend(_Model):
    """A server that has passed its check.

    `dtype` and `options` are the requested ones, which a rollback requests again.
    """

    reference: str
    digest: str
    url: str
    dtype: str
    options: list[str]
    started: Started


class Router(_Model):
    """The router: `url` is what clients use."""

    host: str
    port: int
    url: str
    started: Started


class State(_Model):
    """`current` serves, or an ongoing switch leads to it; `retiring` is what it replaces, until that is gone.

    `guarded`: by an API key, which is not stored.
    """

    schema_: Literal["numprune/rollout/1"] = Field(default="numprune/rollout/1", alias="schema")
    name: str
    router: Router | None = None
    current: Backend | None = None
    retiring: Backend | None = None
    guarded: bool = False

    def tags(self) -> set[str]:
        """Tags of all known processes."""
        parts = (self.router, self.current, self.retiring)
        return {part.started.tag for part in parts if part is not None}


class Place:
    """Where the state of a name is stored, and the tags of its processes."""

    def __init__(self, workspace: Path, name: str) -> None:
        self.name = check_name(name)
        self.workspace = workspace.absolute()
        self.folder = self.workspace / "rollouts" / name
        self._file = self.folder / "state.json"
        where = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
        self.tag_prefix = f"rollout:{where}:"

    def read(self) -> State:
        """The state; empty if nothing was ever rolled out. Raises IntegrityError."""
        try:
            return State.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return State(name=self.name)
        except ValidationError as error:
            raise IntegrityError(
                f"{self._file}: {problems(error)}; `numprune rollout {self.name} --stop` stops all servers and removes "
                "the file"
            ) from None

    def write(self, state: State) -> State:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(state.model_dump(mode="json", by_alias=True), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._file)
        return state

    def forget(self) -> None:
        self._file.unlink(missing_ok=True)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock on changes; the kernel releases it with this process. Raises RolloutBusy."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "lock"
        handle = locks.open_file(path)
        try:
            try:
                locks.acquire(handle, path, wait=False)
            except locks.Held:
                holder = os.read(handle, 32).decode() or "unknown"
                raise RolloutBusy(
                    f"{self.name}: another rollout is in progress (process {holder}); wait until it ends"
                ) from None
            with suppress(OSError):  # another user's file, which can be locked but not written
                os.truncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(handle)
