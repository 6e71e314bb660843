"""Estimated latencies of a model's blocks, where there is no target to measure on.

By the roofline model (Williams, Waterman and Patterson, CACM 52(4), 2009), a block takes

    max(FLOPs / (0.6 * peak), bytes / (0.8 * bandwidth))

The shares of the peaks are what matrix products and copies usually reach, not measured ones. A matrix product counts
with its outputs rounded up to whole tiles, an attention with the keys that its tokens see. The bytes are the weights,
quantized ones with their scales, read once, the keys and values, and what goes into and out of the block. Products of
8-bit weights with 8-bit inputs have the peak of 8 bits. Devices that share a layer take as long as one of them with its
part of the units. Starts of kernels and communication between devices are not counted, so small batches take longer
than this says. No tensor library is needed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from numprune.blocks import Anatomy, Block
from numprune.dtypes import BYTES
from numprune.errors import InputError
from numprune.quantization.linears import bytes_saved_in
from numprune.scenario import Scenario
from numprune.served import AS_STORED, Served
from numprune.slices import Size, Slice
from numprune.timings import BlockTime, ScenarioTimes, Time

_COMPUTE_SHARE, _BANDWIDTH_SHARE = 0.6, 0.8
_TILE = 128  # outputs of a matrix product that are computed together


@dataclass(frozen=True)
class Peaks:
    """A device's peak rates.

    Attributes:
        name: of the device.
        tflops: 10^12 dense FLOP/s by bytes of a value: 4 (float32), 2 (bfloat16 and float16, tensor cores) or 1.
        bandwidth_gb_s: of its memory, in 10^9 bytes per second.
        fp8: it multiplies FP8 numbers, not only integers of 8 bits.
    """

    name: str
    tflops: Mapping[int, float]
    bandwidth_gb_s: float
    fp8: bool = True


# From NVIDIA's data sheets, without sparsity.
DEVICES: Mapping[str, Peaks] = MappingProxyType(
    {
        "h200": Peaks("H200 SXM", {4: 67, 2: 989, 1: 1979}, 4800),
        "h100-sxm": Peaks("H100 SXM", {4: 67, 2: 989, 1: 1979}, 3350),
        "h100-pcie": Peaks("H100 PCIe", {4: 51, 2: 756, 1: 1513}, 2000),
        "a100-80g": Peaks("A100 SXM 80 GB", {4: 19.5, 2: 312, 1: 624}, 2039, fp8=False),
        "l40s": Peaks("L40S", {4: 91.6, 2: 362, 1: 733}, 864),
        "l4": Peaks("L4", {4: 30.3, 2: 121, 1: 242}, 300),
    }
)


def peaks_of(device: str, tflops: float, bandwidth_gb_s: float) -> Peaks:
    """Return the peaks of a device, or of one with these rates.

    Args:
        device: a key of DEVICES, or empty for other devices.
        tflops: in the precision of the model, like `Peaks.tflops`; 0 with a device of DEVICES.
        bandwidth_gb_s: as in `Peaks`; 0 with a device of DEVICES.

    Raises:
        InputError: the device is not known, or not exactly one of them is described.
    """
    if device and (tflops or bandwidth_gb_s):
        raise InputError(f"timings: device {device} has the rates of its data sheet; leave out either it or the rates")
    if not device and not (tflops > 0 and bandwidth_gb_s > 0):
        raise InputError("timings: an estimate needs a device, or both its peak TFLOP/s and its bandwidth in GB/s")
    if not device:
        name = f"a device of {tflops:g} TFLOP/s and {bandwidth_gb_s:g} GB/s"
        return Peaks(name, {4: tflops, 2: tflops, 1: tflops}, bandwidth_gb_s)
    if device not in DEVICES:
        raise InputError(
            f"timings: device {device[:80]!r} is not known; known are {', '.join(DEVICES)}; give the peak TFLOP/s and "
            "bandwidth of another"
        )
    return DEVICES[device]


def estimated(
    anatomy: Anatomy,
    sizes: Mapping[str, list[Size]],
    scenario: Scenario,
    peaks: Peaks,
    dtype: str,
    served: Served = AS_STORED,
) -> ScenarioTimes:
    """Return the estimated times of a scenario.

    Args:
        sizes: to estimate, by what blocks are timed as, as `timings.sizes_to_time` returns them.
        dtype: of weights that are not quantized, activations, and keys and values.

    Raises:
        InputError: the device does not have the precision or the scheme, or its data sheet has no peak for it.
    """
    if BYTES[dtype] not in peaks.tflops:
        raise InputError(f"timings: {peaks.name} has no peak for values of {BYTES[dtype]} bytes; give its rates")
    if served.scheme and served.scheme.is_float and not peaks.fp8:
        raise InputError(f"timings: {peaks.name} does not multiply FP8 numbers; choose w8a8 or w4a16")
    rooflines = [(_Roofline(anatomy, step, peaks, dtype, served), count) for step, count in scenario.steps()]
    blocks: dict[str, list[BlockTime]] = {}
    for kind, of_kind in sizes.items():
        block = _largest(anatomy, kind)
        for size in of_kind:
            of_device = block.resized(_on_each(block, size, served.tensor_parallel))
            ms = sum(count * roofline.block(of_device) for roofline, count in rooflines)
            time = BlockTime(ms=ms, interval95=(ms, ms), units=size.units, members=size.members)
            blocks.setdefault(kind, []).append(time)
    ms = sum(count * roofline.around() for roofline, count in rooflines)
    around = Time(ms=ms, interval95=(ms, ms))  # an estimate has no interval
    return ScenarioTimes(scenario=str(scenario), around=around, blocks=blocks, estimated_for=peaks.name)


def _largest(anatomy: Anatomy, kind: str) -> Block:
    blocks = (block for block in anatomy.blocks if block.timed_as == kind)
    return max(blocks, key=lambda block: block.parameters(block.size))


def _on_each(block: Block, size: Size, devices: int) -> Size:
    """Return the part of a block of this size that each of the devices has which share it evenly."""
    if block.routing is not None:
        return Size(size.units, size.members // devices)
    if block.kind == "attention" and size.units < devices:  # each has a copy of a KV head
        return Size(1, size.units * size.members // devices)
    return Size(size.units // devices, size.members)


@dataclass(frozen=True)
class _Roofline:
    anatomy: Anatomy
    scenario: Scenario
    peaks: Peaks
    dtype: str
    served: Served

    @property
    def tokens_per_row(self) -> int:
        """Tokens that go through the blocks in one step."""
        return 1 if self.scenario.phase == "decode" else self.length

    @property
    def length(self) -> int:
        return self.anatomy.context if self.scenario.tokens is None else self.scenario.tokens

    @property
    def tokens(self) -> int:
        return self.scenario.batch * self.tokens_per_row

    def block(self, block: Block) -> float:
        """Return the milliseconds of a block."""
        values = 2.0 * self.tokens * self.anatomy.hidden_size  # read from the residual stream, and written to it
        if block.routing is not None:
            flops, weights = self._experts(block)
            return self._ms(flops, weights + values + 2.0 * self.tokens * block.routing.top_k * block.members)
        products = 2.0 * self.tokens * sum(_tiled(part, block) for part in block.slices if part.width is not None)
        flops, weights = 0.0, float(block.parameters(block.size))
        values += 2.0 * self.tokens * block.channels
        if block.kind == "attention":
            keys = self._keys(block)
            flops = 4.0 * self.tokens * block.channels * keys
            cached = self.length + 1 if self.scenario.phase == "decode" else self.length
            values += 2.0 * self.scenario.batch * self._seen(block, cached) * block.units * self.anatomy.head_dim
        scheme = self.served.scheme
        saved = bytes_saved_in(block, scheme, self.dtype) if scheme else 0
        return self._ms(flops, weights + values, saved, products)

    def _experts(self, block: Block) -> tuple[float, float]:
        """Return the FLOPs of a block of experts and the weights that it reads; routing prefers no expert."""
        assert block.routing is not None
        one = block.resized(Size(1, block.members))
        parts = [part for part in one.slices if part.width is not None]
        routers = [part for part in parts if part.tensor.startswith(f"{block.routing.router}.")]
        of_expert = sum(_tiled(part, one) for part in parts if part not in routers)
        routed = 2.0 * self.tokens * block.routing.top_k * of_expert
        unused = (1 - block.routing.top_k / block.units) ** self.tokens  # probability that no token uses an expert
        flops = routed + 2.0 * self.tokens * sum(_tiled(part, block) for part in routers)
        return flops, (1 - unused) * block.parameters(block.size)

    def _keys(self, block: Block) -> float:
        """Return the mean number of keys that a token sees."""
        if self.scenario.phase == "decode":
            return self._seen(block, self.length + 1)
        if self.anatomy.task != "causal-lm":
            return self.length
        window = self._seen(block, self.length)
        # The first tokens see those before them, the others the whole window.
        return window - window * (window - 1) / (2 * self.length)

    def _seen(self, block: Block, positions: int) -> int:
        window = self.anatomy.window_of(block)
        return positions if window is None else min(positions, window)

    def around(self) -> float:
        """Return the milliseconds of embeddings and head."""
        rows = self.tokens if self.anatomy.task == "masked-lm" else self.scenario.batch  # that have logits
        head, hidden = self.anatomy.output_parameters / self.served.tensor_parallel, self.anatomy.hidden_size
        read = head + self.tokens * hidden + rows * self.anatomy.predicted
        return self._ms(2.0 * rows * head, float(read))

    def _ms(self, flops: float, values: float, saved: int = 0, products: float = 0.0) -> float:
        """Return the milliseconds for `flops`, `products` with quantized weights, and `values`, less `saved` bytes."""
        scheme, width = self.served.scheme, BYTES[self.dtype]
        of_products = self.peaks.tflops[1 if scheme and scheme.rounds_inputs else width]
        computing = (flops / self.peaks.tflops[width] + products / of_products) / (_COMPUTE_SHARE * 1e12)
        reading = (values * width - saved) / (_BANDWIDTH_SHARE * self.peaks.bandwidth_gb_s * 1e9)
        return 1e3 * max(computing, reading)


def _tiled(part: Slice, block: Block) -> int:
    """Return the parameters of a matrix with its units rounded up to whole tiles."""
    assert part.width is not None
    outputs = part.entries_per_unit(block.members) * block.units
    return math.ceil(outputs / _TILE) * _TILE * part.width
