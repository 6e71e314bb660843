"""Estimates the table of block latencies from a device's data sheet, where there is no target to measure on."""

from pathlib import Path

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint, compressed_tensors, precision
from numprune.flows.names import ROOFLINE
from numprune.flows.steps.served import check_divisible
from numprune.hidden import Width
from numprune.roofline import Peaks, estimated
from numprune.scenario import Scenario, check_scenario
from numprune.served import AS_STORED, Served
from numprune.target import Target
from numprune.timings import Key, TimingTable, anatomy_at, shape_of, sizes_to_time


def estimate(
    base: Path,
    scenarios: list[Scenario],
    target: Target,
    sizes: int,
    peaks: Peaks,
    served: Served = AS_STORED,
    width: Width | None = None,
) -> TimingTable:
    """Return the estimated table of the model in `base`; arguments are those of `timings.Request`.

    Raises:
        InputError: the model is quantized, cannot be, or does not run the scenario, or as `estimated`.
    """
    compressed_tensors.refuse_quantized(base, "timing of blocks")
    anatomy = anatomy_at(read_anatomy(checkpoint.read_config(base)), width, target)
    key = estimate_key(base, peaks.name, served).model_copy(update={"shape": shape_of(anatomy)})
    check_divisible(anatomy, served)
    if served.lm_head_bits != 8:
        raise InputError("lm_head_bits is 4, which only the export onnxruntime stores; estimates are of 8")
    for scenario in scenarios:
        check_scenario(
            scenario, anatomy, max((step.tokens or 0) + (step.phase == "decode") for step, _ in scenario.steps())
        )
    of_kinds = sizes_to_time(anatomy, target, sizes)
    return TimingTable(
        key=key,
        estimate=True,
        copies={},
        visits=0,
        drift={},
        routing="uniform" if anatomy.of_kind("experts") else None,
        scenarios=[estimated(anatomy, of_kinds, scenario, peaks, key.dtype, served) for scenario in scenarios],
    )


def estimate_key(base: Path, device: str, served: Served = AS_STORED) -> Key:
    """Return what an estimate at the own hidden size of the model in `base` is valid for, on whichever machine.

    The precision is by default that of the stored weights. Raises InputError.
    """
    dtype = precision.stored(base) if served.dtype == precision.AUTO else served.dtype
    if dtype not in precision.DTYPES:
        raise InputError(f"timings: {base} is stored in {dtype}; estimates are of {', '.join(precision.DTYPES)}")
    return Key(
        runtime=ROOFLINE,
        versions={},
        device=device,
        threads=0,
        dtype=dtype,
        quantization=served.quantization,
        tensor_parallel=served.tensor_parallel,
        shape=shape_of(read_anatomy(checkpoint.read_config(base))),
    )
