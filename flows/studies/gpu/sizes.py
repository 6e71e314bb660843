"""The measured sizes: a Llama-3-8B, or a miniature that any machine runs in seconds."""

from dataclasses import dataclass

from numprune.flows.studies.speed.layer import Size

RATIOS = (0.2, 0.3, 0.5)
BATCHES = (1, 32)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measurements.


    Attributes:
        layer: a decoder layer.
        head_dim: channels of a head.
        layers: of the model that generates.
        vocabulary: its tokens.
        align: an aligned intermediate size is a multiple of this.
        prompt: tokens of a row at prefill.
        new: tokens of a row that are decoded in one measurement.
        tokens: of the calibration for which pruning times are stated.
        measured_tokens: how many of them are run. Every number is a separate measurement, the quickest first.
        sequence_length: tokens of a calibration row.
        repeats: of every measurement; medians are reported.
        matrix: rows and columns of the matrices for measuring the compute rate.
        copied_bytes: of the copy for measuring the memory rate.
    """

    layer: Size
    head_dim: int
    layers: int
    vocabulary: int
    align: int
    prompt: int
    new: int
    tokens: int
    measured_tokens: tuple[int, ...]
    sequence_length: int
    repeats: int
    matrix: int
    copied_bytes: int


LLAMA_3_8B = Sizes(
    layer=Size(hidden=4096, intermediate=14336, heads=32, kv_heads=8),
    head_dim=128,
    layers=32,
    vocabulary=128256,
    align=128,
    prompt=512,
    new=64,
    tokens=128 * 2048,
    measured_tokens=(8192, 65536),
    sequence_length=2048,
    repeats=3,
    matrix=8192,
    copied_bytes=1 << 30,
)
MINIATURE = Sizes(
    layer=Size(hidden=64, intermediate=192, heads=8, kv_heads=4),
    head_dim=8,
    layers=2,
    vocabulary=96,
    align=16,
    prompt=16,
    new=4,
    tokens=256,
    measured_tokens=(64, 128),
    sequence_length=32,
    repeats=2,
    matrix=128,
    copied_bytes=1 << 20,
)


@dataclass(frozen=True)
class Width:
    """The width of every layer: `kv_heads` KV heads, unchanged query heads per KV head, `intermediate` channels.

    `removed`: the removed share of the layer's parameters.
    """

    name: str
    kv_heads: int
    intermediate: int
    removed: float


def widths(sizes: Sizes) -> list[Width]:
    """Return the dense width and, for each of RATIOS, an aligned and an odd intermediate size.

    KV heads are removed first, rounded to whole heads, and channels make up the rest.
    """
    layer = sizes.layer
    group = 2 * (layer.heads // layer.kv_heads + 1) * layer.hidden * sizes.head_dim  # parameters
    channel = 3 * layer.hidden
    whole = layer.kv_heads * group + layer.intermediate * channel

    def width(name: str, kv_heads: int, intermediate: int) -> Width:
        return Width(name, kv_heads, intermediate, 1 - (kv_heads * group + intermediate * channel) / whole)

    found = [width("dense", layer.kv_heads, layer.intermediate)]
    for ratio in RATIOS:
        kv_heads = max(1, round((1 - ratio) * layer.kv_heads))
        exact = ((1 - ratio) * whole - kv_heads * group) / channel
        aligned = round(exact / sizes.align) * sizes.align
        odd = 2 * round((exact - 1) / 2) + 1
        found += [width(f"{ratio:.0%} aligned", kv_heads, aligned), width(f"{ratio:.0%} unaligned", kv_heads, odd)]
    return found
