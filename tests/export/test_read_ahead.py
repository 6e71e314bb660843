"""The layer after the one in use is read in a thread, and no other."""

import threading
import time

import pytest

from numprune.errors import IntegrityError
from numprune.export.read_ahead import ReadAhead

LAYERS = 5


class Disk:
    """Two tensors a layer; notes which were read, and by which thread."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.by: dict[str, str] = {}
        self.damaged: set[str] = set()

    def __call__(self, name: str) -> str:
        self.read.append(name)
        self.by[name] = threading.current_thread().name
        if name in self.damaged:
            raise IntegrityError(f"{name} is damaged")
        return f"value of {name}"


def names(index: int) -> list[str]:
    return [f"{index}.a", f"{index}.b"]


def settled(expected: int, disk: Disk) -> list[str]:
    """The names read, after the thread has had time to read more than it may."""
    deadline = time.monotonic() + 20
    while len(disk.read) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    return disk.read


@pytest.mark.parametrize(
    ("walk", "alone"),
    [
        ([0, 1, 2, 3, 4], [0]),
        ([0, 1, 2, 3, 4, 4, 3, 2, 1, 0], [0, 4]),  # forwards and backwards, as for gradients
        ([0, 1, 2, 3, 4, 0, 1], [0, 0]),
        ([0, 1, 3, 4], [0, 3]),  # without a dropped layer
        ([0, 1, 1, 2], [0, 1]),  # a layer that is used twice
    ],
)
def test_only_the_first_layer_of_a_walk_is_waited_for(walk, alone) -> None:
    disk, waited = Disk(), []
    ahead = ReadAhead(LAYERS, names, disk)
    for index in walk:
        disk.by.clear()
        assert ahead.take(index) == {name: f"value of {name}" for name in names(index)}
        waited += [index] if disk.by.get(f"{index}.a") == threading.current_thread().name else []
    assert waited == alone
    ahead.stop()


def test_no_more_than_one_layer_is_read_ahead() -> None:
    disk = Disk()
    ahead = ReadAhead(LAYERS, names, disk)
    ahead.take(0)
    assert settled(4, disk) == [*names(0), *names(1)]
    ahead.take(1)
    assert settled(6, disk) == [*names(0), *names(1), *names(2)]
    ahead.stop()


def test_an_error_of_the_thread_is_raised_at_its_layer() -> None:
    disk = Disk()
    disk.damaged = {"2.b"}
    ahead = ReadAhead(LAYERS, names, disk)
    ahead.take(0)
    ahead.take(1)
    assert settled(6, disk)[-1] == "2.b"
    with pytest.raises(IntegrityError, match=r"2\.b is damaged"):
        ahead.take(2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read layer")]


def test_the_error_of_a_layer_that_is_never_used_is_not_raised() -> None:
    disk = Disk()
    disk.damaged = {"1.a"}
    ahead = ReadAhead(LAYERS, names, disk)
    ahead.take(0)
    assert ahead.take(3) == {name: f"value of {name}" for name in names(3)}
    ahead.stop()


def test_stopping_ends_the_thread_after_the_tensor_that_it_reads() -> None:
    reading, allowed = threading.Event(), threading.Event()

    def read(name: str) -> str:
        if name == "1.a":
            reading.set()
            assert allowed.wait(20)
        return name

    ahead = ReadAhead(LAYERS, names, read)
    ahead.take(0)
    assert reading.wait(20)
    threading.Timer(0.1, allowed.set).start()
    ahead.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read layer")]
