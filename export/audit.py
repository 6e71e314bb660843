"""Audit a checkpoint: it must contain exactly the tensors that its configuration describes. torch is not needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numprune.anatomy import family_of, read_anatomy
from numprune.errors import IntegrityError
from numprune.export.compressed_tensors import quantization_in
from numprune.export.config import declared_config, set_dtype
from numprune.export.headers import QuantizedHeader, TensorHeader, equal, read_headers
from numprune.quantization import Scheme, quantized_tensors
from numprune.tensors import TensorTable, tensor_table


def audit(folder: Path) -> dict[str, TensorHeader]:
    """Compare every stored tensor with the configuration: nothing missing, extra, larger or smaller.

    A tensor larger than the configuration says is the most dangerous case: vLLM silently truncates it. Tied weights may
    be stored once, or twice and equal.

    Returns:
        The headers of the stored tensors, by name.

    Raises:
        InputError: config.json or the weights are missing, or the architecture is not supported.
        IntegrityError: names the tensor or the file.
    """
    return read_audited(folder)[1]


def read_audited(folder: Path) -> tuple[Any, dict[str, TensorHeader]]:
    """Return the configuration, as `read_config` does, and the headers that `audit` returns. Raises as both do."""
    config = declared_config(folder)
    table = tensor_table(config)
    expected, tied = table.shapes, table.tied
    stored = _with_base(read_headers(folder), table)
    set_dtype(config, stored)
    computed = family_of(config).computed
    for name in sorted(expected.keys() | stored.keys()):
        if name not in expected:
            if not name.endswith(computed):
                raise IntegrityError(
                    f"{stored[name].file}: {name} is stored, but the model that config.json describes has no such "
                    "tensor"
                )
            del stored[name]
        elif name not in stored:
            if tied.get(name) not in stored:
                raise IntegrityError(f"{folder}: {name} {list(expected[name])} is missing, but config.json needs it")
        elif stored[name].shape != expected[name]:
            raise IntegrityError(
                f"{stored[name].file}: {name} has shape {list(stored[name].shape)}, but config.json implies "
                f"{list(expected[name])}"
            )
    _require_quantized(folder, config, stored)
    _require_linear(table, stored)
    for name, source in tied.items():
        if name in stored and source in stored and not equal(stored[name], stored[source]):
            raise IntegrityError(
                f"{stored[name].file}: {name} differs from {source}, but config.json ties them; "
                'set "tie_word_embeddings": false there if both are intended, or remove the stale one'
            )
    return config, stored


def _require_quantized(folder: Path, config: Any, stored: Mapping[str, TensorHeader]) -> None:
    """Raise IntegrityError if config.json declares a weight as quantized that is stored unquantized."""
    said = quantization_in(folder)
    if said is None:
        return
    for name in quantized_tensors(read_anatomy(config)):
        scheme = said.scheme(name.removesuffix(".weight"))
        full = name in stored and not isinstance(stored[name], QuantizedHeader)
        if full and scheme is not None:
            raise IntegrityError(
                f"{stored[name].file}: {name} is not quantized, but quantization_config in config.json says {scheme}; "
                "they do not belong together"
            )


def _require_linear(table: TensorTable, stored: Mapping[str, TensorHeader]) -> None:
    """Raise IntegrityError if a quantized tensor is not the weight of a Linear layer."""
    for name in quantized(stored):
        if name not in table.linear:
            raise IntegrityError(
                f"{stored[name].file}: {name} is quantized, but it is not the weight of a Linear layer; "
                "quantize the unquantized checkpoint with numprune quantize"
            )


def _with_base(stored: dict[str, TensorHeader], table: TensorTable) -> dict[str, TensorHeader]:
    """Convert names stored by the model without a head to those of the whole model."""
    base, expected = table.base, table.shapes
    if any(name.startswith(base) for name in stored):
        return stored
    return {base + name if base + name in expected else name: header for name, header in stored.items()}


def quantized(stored: Mapping[str, TensorHeader]) -> dict[str, Scheme]:
    """Return the quantized weights among the stored ones, with their schemes."""
    return {name: header.scheme for name, header in stored.items() if isinstance(header, QuantizedHeader)}
