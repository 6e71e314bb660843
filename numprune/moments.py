"""First and second moments of a block's inputs, accumulated batch by batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from numprune.errors import InputError
from numprune.processes import Processes

# Columns of the Gram matrix per strip, by kind of device: wide enough for the product to run at full speed, narrow
# enough that little of the other half is computed. On a CPU, 128 to 512 performed about the same.
_STRIP = {"cpu": 256, "cuda": 1024}
_TOKENS = 4096  # their products are summed in float32
_SUMS = ("gram", "sum", "cross", "target_sum")
# Some solves are in float32, on sums of products of weights and moments.
_LARGEST = torch.finfo(torch.float32).max / 1e6


@dataclass
class Moments:
    """Moments of consumer inputs x (D,) and, if requested, of the outputs y (out,) that they should reproduce.

    Sums are kept in float64: the Gram matrices of trained models are so ill-conditioned that float32 sums would lose
    directions. Products of a few thousand tokens are computed in float32 (float64 takes twice the time on a CPU, up to
    64 times on a GPU) and added up in float64; TF32, which drops 13 bits of the factors, must be off. Inputs in float64
    stay in float64.

    A Gram matrix is symmetric: only its lower half is summed, strip by strip, in little over half the multiplications.

    Attributes:
        channels: D.
        outputs: rows of y, or 0 if no targets are collected.
    """

    channels: int
    outputs: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    count: int = 0

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
            raise ValueError("moments need float32 products: set torch.set_float32_matmul_precision('highest')")
        double = {"dtype": torch.float64, "device": self.device}
        self._gram = torch.zeros(self.channels, self.channels, **double)  # type: ignore[call-overload]
        self._sum = torch.zeros(self.channels, **double)  # type: ignore[call-overload]
        self._cross = torch.zeros(self.outputs, self.channels, **double)  # type: ignore[call-overload]
        self._target_sum = torch.zeros(self.outputs, **double)  # type: ignore[call-overload]

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add a batch of inputs (…, D) and targets (…, out)."""
        x = _product_dtype(x.reshape(-1, self.channels))
        if self.outputs:
            if y is None:
                raise ValueError("these moments collect targets: y is missing")
            y = _product_dtype(y.reshape(-1, self.outputs))
        self.count += x.shape[0]
        for start in range(0, x.shape[0], _TOKENS):
            tokens = slice(start, start + _TOKENS)
            self._add_products(x[tokens], y[tokens] if self.outputs and y is not None else None)

    def add_zeros(self, count: int) -> None:
        """Add `count` inputs, and targets, that are zero."""
        self.count += count

    def _add_products(self, x: Tensor, y: Tensor | None) -> None:
        strip = _STRIP[self.device.type]
        for start in range(0, self.channels, strip):
            stop = min(start + strip, self.channels)
            _add_product(self._gram[start:stop, :stop], x[:, start:stop].T, x[:, :stop])
        self._sum += x.sum(0, dtype=torch.float64)
        if y is not None:
            _add_product(self._cross, y.T, x)
            self._target_sum += y.sum(0, dtype=torch.float64)

    def absorb(self, part: "Moments") -> None:
        """Add everything that was added to `part`."""
        self.count += part.count
        for name in _SUMS:
            getattr(self, f"_{name}").add_(getattr(part, f"_{name}"))

    def add_up(self, processes: Processes) -> None:
        """Add everything that the other processes have added to theirs. Raises ProcessError."""
        strip = _STRIP[self.device.type]
        for start in range(0, self.channels, strip):
            stop = min(start + strip, self.channels)
            processes.add_up(self._gram[start:stop, :stop])
        count = torch.tensor(self.count)
        processes.add_up(self._sum, self._cross, self._target_sum, count)
        self.count = int(count)

    def without(self, part: "Moments") -> "Moments":
        """Return the moments without `part`, which must be a part of these."""
        rest = Moments(self.channels, self.outputs, self.device, self.count - part.count)
        for name in _SUMS:
            setattr(rest, f"_{name}", getattr(self, f"_{name}") - getattr(part, f"_{name}"))
        return rest

    def of(self, channels: Tensor) -> "Moments":
        """Return the moments of only these input channels, (K,) ascending."""
        some = Moments(len(channels), self.outputs, self.device, self.count)
        some._gram = self._gram[channels[:, None], channels]  # ascending, so the lower half comes from the lower half
        some._sum = self._sum[channels]
        some._cross = self._cross[:, channels]
        some._target_sum = self._target_sum.clone()
        return some

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums so far, for `restored`; of the Gram matrix, only the lower half is valid."""
        count = torch.tensor(self.count, dtype=torch.int64)
        return {
            "gram": self._gram,
            "sum": self._sum,
            "cross": self._cross,
            "target_sum": self._target_sum,
            "count": count,
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "Moments":
        """Return the moments with these `tensors`, on `device`."""
        outputs, channels = tensors["cross"].shape
        moments = cls(channels, outputs, device, int(tensors["count"]))
        for name in _SUMS:
            setattr(moments, f"_{name}", tensors[name].to(device))
        return moments

    def require_finite(self, where: str) -> None:
        """Raise InputError like `require_in_range` if the moments of the module `where` are too large."""
        sums = (self._gram.diagonal(), self._cross)  # no product of two channels is larger than both squares
        require_in_range(where, "activations", *sums, count=self._positive_count())

    @property
    def gram(self) -> Tensor:
        """E[x x^T], (D, D) float64."""
        gram = self._gram / self._positive_count()
        strip = _STRIP[self.device.type]
        for start in range(0, self.channels, strip):  # in place, to save memory
            stop = min(start + strip, self.channels)
            square = gram[start:stop, start:stop]
            square.copy_(square.tril() + square.tril(-1).T)
            gram[start:stop, stop:] = gram[stop:, start:stop].T
        return gram

    @property
    def mean(self) -> Tensor:
        """E[x], (D,) float64."""
        return self._sum / self._positive_count()

    @property
    def cross(self) -> Tensor:
        """E[y x^T], (out, D) float64."""
        return self._cross / self._positive_count()

    @property
    def target_mean(self) -> Tensor:
        """E[y], (out,) float64."""
        return self._target_sum / self._positive_count()

    def _positive_count(self) -> int:
        if not self.count:
            raise ValueError("no inputs were added")
        return self.count


def require_in_range(where: str, what: str, *sums: Tensor, count: int = 1) -> None:
    """Refuse sums of `count` values whose average is too large for float32, or not finite.

    Args:
        where: the module, for the message.
        what: the values, in the plural, for the message.

    Raises:
        InputError: names the place and what to do.
    """
    limit = _LARGEST * count
    extremes = (extreme for values in sums if values.numel() for extreme in values.aminmax())
    if not all(abs(float(extreme)) <= limit for extreme in extremes):  # also false for NaN
        raise InputError(
            f"{where}: {what} overflow float32 on the calibration text. Check the model on it with numprune evaluate: "
            "if its NLL is usual, calibrate on other text; if not, its weights are damaged"
        )


def _product_dtype(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
