"""Sentences on the compute precision, the stored precision, and torch's decoding mode."""

from collections import Counter
from collections.abc import Mapping

from numprune.serving.report import words
from numprune.serving.report.kept import BLOCKS, by_kind, ranges
from numprune.serving.report.models import Dtypes, Quantization, Report, RuntimeSpeed


def computed(report: Report, runtime: str) -> str:
    """One sentence, or "" if the report does not state it."""
    found = report.speed[runtime].dtype if runtime in report.speed else None
    if found is None:
        return ""
    stored = report.sizes.dtype if report.sizes else None
    mode = _mode(report.speed[runtime])
    if stored is None or stored == found:
        return f"{runtime} computes in {named(found)}.{mode}"
    return (
        f"{runtime} computes in {named(found)}, while the weights are stored in {named(stored)}: sizes refer to the "
        f"stored weights; speed and memory do not.{mode}"
    )


def _mode(speed: RuntimeSpeed) -> str:
    """A sentence on the decoding mode, which is the same on both sides."""
    described = speed.runtime.get("candidate")
    if not isinstance(described, Mapping) or "mode" not in described:
        return ""
    if described["mode"] == "compiled":
        return " Decoding is compiled, with a static KV cache; compiling is not timed."
    reason = described.get("not_compiled")
    return f" Decoding is eager: {reason}." if reason else " Decoding is eager."


def quantized(found: Quantization) -> str:
    """One sentence on quantization."""
    groups = f", {found.group_size} channels per scale" if found.group_size else ""
    sizes = found.weight_bytes
    if sizes.baseline == sizes.candidate:
        return "The budget leaves every block in its stored precision: no weight was quantized."
    each = ", ".join(f"{count} block{'' if count == 1 else 's'} in {bits} bits" for bits, count in _counts(found))
    head = " The values of the output matrix are rounded to 4 bits." if found.lm_head_bits == 4 else ""
    to = "the bits chosen for each block" if found.scheme == "mixed" else found.scheme
    return (
        f"After pruning, the weights of the layers were quantized to {to}{groups}, by {found.method}: "
        f"{f'{each}; ' if each else ''}{words.size(sizes.baseline)} → {words.size(sizes.candidate)}.{head}"
    )


def _counts(found: Quantization) -> list[tuple[int, int]]:
    """Bits of weights, largest first, and the number of blocks with them."""
    return sorted(Counter(found.bits.values()).items(), reverse=True)


def bits_by_layer(found: Quantization) -> dict[str, str]:
    """Kind of block -> the bits of its weights in each layer; empty if all blocks have the same."""
    kinds = by_kind({name: (bits, bits) for name, bits in found.bits.items()})
    return {
        BLOCKS[kind]: "; ".join(
            f"{f'layer {first}' if first == last else f'layers {first} to {last}'}: {bits} bits"
            for first, last, (bits, _) in ranges(units)
        )
        for kind, units in kinds.items()
    }


def named(dtypes: Dtypes) -> str:
    if dtypes.baseline == dtypes.candidate:
        return dtypes.candidate
    return f"{dtypes.baseline} (baseline) and {dtypes.candidate} (candidate)"
