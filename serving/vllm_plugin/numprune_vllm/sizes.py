"""Each layer's sizes, every stored tensor's shape and data type, and valid splits, from the configuration alone.

vLLM is not needed. Shapes are those of the checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from numprune.anatomy import family_of, read_anatomy
from numprune.errors import InputError
from numprune.quantization import check_quantizable, quantized_tensors, schemes_by_block
from numprune.quantization.compressed_tensors import (
    CONFIG_FIELD,
    QuantizationConfig,
    dtypes_of,
    read_quantization,
    shapes_of,
)
from numprune.target import not_split
from numprune.tensors import tensor_table

Shapes = dict[str, tuple[int, ...]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # vLLM casts each to its own precision


@dataclass(frozen=True)
class Expected:
    """The tensors of a checkpoint.

    Attributes:
        shapes: of every tensor by name, including tied ones.
        dtypes: name -> the allowed data types; `FLOATS` for all other tensors.
        tied: name of a tensor that need not be stored -> the one that it equals.
        computed: name suffixes of tensors that may be stored but are not read.
    """

    shapes: Shapes
    tied: Mapping[str, str] = field(default_factory=dict)
    computed: tuple[str, ...] = ("rotary_emb.inv_freq",)
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)

    def ignores(self, name: str) -> bool:
        """Whether older versions of transformers stored this tensor and newer ones compute it."""
        return name not in self.shapes and name.endswith(self.computed)


def check_settings(config: Any) -> None:
    """Raises ValueError for settings that neither vLLM's own class nor its transformers backend supports."""
    vllm = family_of(config).vllm
    refused = vllm.refused(config)
    if refused and not vllm.backend:
        raise ValueError(f"{config.model_type}: vLLM does not run it with {' and '.join(refused)}")


def check_layers(config: Any) -> None:
    """Raises ValueError if the layers of a per-layer model differ in settings that must be equal."""
    family = family_of(config)
    may_differ = {family.heads, family.kv_heads, family.width}
    strange = set(config.per_layer_attributes or ()) - may_differ
    if strange:
        raise ValueError(
            f"config.json: per_layer_config sets {', '.join(sorted(strange))}; only "
            f"{', '.join(sorted(filter(None, may_differ)))} and skip may differ between layers"
        )
    if getattr(config, "head_dim", None) is None:
        raise ValueError("config.json: head_dim is missing and cannot be derived from the layers' heads")


def check_parallel(config: Any, size: int) -> None:
    """Raises ValueError, naming every layer and value at fault, unless each layer splits over `size` ranks.

    Query heads and widths must divide. KV heads must divide too or, if there are fewer than ranks, the number of ranks
    must be a multiple of them: each is then replicated.
    """
    if faults := not_split(read_anatomy(config), size):
        raise ValueError(
            f"tensor_parallel_size={size} does not divide {'; '.join(faults)}. Serve with a smaller "
            f"--tensor-parallel-size, or prune again for this one ([target] tensor_parallel = {size})"
        )


def check_quantization(config: Any, size: int) -> None:
    """Raises ValueError if the quantization is not supported, or groups do not split over `size`."""
    try:
        if quantized := _quantization(config):
            anatomy = read_anatomy(config)
            check_quantizable(anatomy, schemes_by_block(anatomy, quantized), size)
    except InputError as error:
        raise ValueError(str(error)) from None


def _quantization(config: Any) -> QuantizationConfig | None:
    """Raises InputError."""
    return read_quantization({CONFIG_FIELD: getattr(config, CONFIG_FIELD, None)})


def expected_tensors(config: Any) -> Expected:
    """The tensors that the checkpoint of a model must contain; for quantized weights, their values and scales.

    Raises InputError if the architecture or the quantization is not supported, or the family cannot be quantized.
    """
    table = tensor_table(config)
    shapes = dict(table.shapes)
    dtypes: dict[str, tuple[torch.dtype, ...]] = {}
    if quantized := _quantization(config):
        anatomy = read_anatomy(config)
        check_quantizable(anatomy, schemes_by_block(anatomy, quantized))
        for name in quantized_tensors(anatomy):
            if scheme := quantized.scheme(name.removesuffix(".weight")):
                shapes |= shapes_of(name, scheme, shapes.pop(name))
                parts = {part: getattr(torch, dtype) for part, dtype in dtypes_of(name, scheme, "float32").items()}
                dtypes |= {part: (dtype,) for part, dtype in parts.items() if dtype not in FLOATS}
    return Expected(shapes, table.tied, family_of(config).computed, dtypes)
