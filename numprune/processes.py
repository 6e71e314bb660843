"""Several processes that share the calibration rows: each measures its own rows, and sums are added up over all.

Every process has the whole model. Where a sum over rows is complete, it is all-reduced, so that all processes go on
with the same numbers and choose and compute the same. Shares consist of whole batches, so a batch's products are those
of a single process, and float64 sums of them differ by rounding only.

accelerate joins the processes that a launcher like torchrun starts. It is an optional package, imported on use.
"""

import hashlib
import importlib.util
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from numprune import launcher
from numprune.errors import InputError, ProcessError

if TYPE_CHECKING:
    from numprune.options import PruneOptions

_PATIENCE = timedelta(hours=12)  # for processes that compute or write; one that ended is noticed at once
_START = "start numprune without torchrun or accelerate launch"


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as seen by one of them.

    Attributes:
        index: of this process, from 0.
        count: number of processes.
        device: of tensors that are exchanged.
        group: for the exchange; None: there is only one process.
    """

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and answers for all."""
        return self.index == 0

    def share(self, rows: int, batch_size: int) -> slice:
        """Return which of `rows` rows are this process's: consecutive batches, or rows if there are too few batches.

        With fewer rows than processes, some have none.
        """
        unit = batch_size if -(-rows // batch_size) >= self.count else 1
        units = -(-rows // unit)
        start, stop = (min(rows, unit * (units * index // self.count)) for index in (self.index, self.index + 1))
        return slice(start, stop)

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor, in place, by the sum of those of all processes.

        Raises:
            ProcessError: another process has ended.
        """
        for tensor in tensors:
            self._reduce(tensor, distributed.ReduceOp.SUM)

    def require_same(self, what: str, content: str) -> None:
        """Refuse to go on if processes have different `content`; `what` it is, in the plural.

        Raises:
            InputError: on every process.
            ProcessError: another process has ended.
        """
        if self.group is None:
            return
        digest = bytearray(hashlib.sha256(content.encode()).digest())
        lowest, highest = (torch.frombuffer(digest, dtype=torch.int64).clone() for _ in range(2))
        self._reduce(lowest, distributed.ReduceOp.MIN)
        self._reduce(highest, distributed.ReduceOp.MAX)
        if not torch.equal(lowest, highest):
            raise InputError(
                f"the {what} differ between the {self.count} processes; give all of them the same files and options, "
                "and the same kind of device"
            )

    def wait(self) -> None:
        """Wait until every process is here. Raises ProcessError if another one has ended."""
        self.add_up(torch.zeros(1))

    def _reduce(self, tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> None:
        if self.group is None:
            return
        total = tensor.to(self.device).contiguous()
        options = distributed.AllreduceOptions()
        options.reduceOp = operation  # type: ignore[assignment]
        try:
            self.group.allreduce([total], options).wait()
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.index} of {self.count}: another process has ended or cannot be reached, so this one "
                "cannot go on; the reason is in the output of that process"
            ) from error
        if total is not tensor:
            tensor.copy_(total)


ALONE = Processes()


def check_shareable(options: "PruneOptions", rows: int, processes: Processes, *, planned: bool = False) -> None:
    """Refuse what several processes cannot compute together; `planned`: what to keep is known.

    Raises:
        InputError: names the option, and what to do.
    """
    if processes.count == 1:
        return
    for problem, refused, remedy in (
        ("refine search", options.refine != "none", "leave it out"),
        ("several shapes", bool(options.shapes), "give one hidden_size and one drop_layers"),
        ("a budget of time", options.time_budget is not None and not planned, "give a ratio or bytes"),
    ):
        if refused:
            raise InputError(f"{processes.count} processes cannot share the work for {problem}; {remedy}, or {_START}")
    if rows < processes.count:
        raise InputError(
            f"{processes.count} processes cannot share {rows} calibration rows; start at most {rows}, or calibrate on "
            "more rows"
        )


def join(device: torch.device) -> Processes:
    """Return the processes of the launcher, on GPUs of their own if `device` is one. Blocks until all have joined.

    Raises InputError if accelerate is not installed.
    """
    if launcher.count() == 1:
        return Processes(device=device)
    if importlib.util.find_spec("accelerate") is None:
        raise InputError(f'several processes need the package accelerate: pip install "numprune[learn]", or {_START}')
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes, state.device, distributed.group.WORLD)
