"""How a checkpoint folder is quantized; the format itself is in numprune.quantization.compressed_tensors."""

from pathlib import Path

from numprune.errors import InputError
from numprune.export import files
from numprune.quantization.compressed_tensors import QuantizationConfig, read_quantization


def quantization_in(folder: Path) -> QuantizationConfig | None:
    """Return how the checkpoint in `folder` is quantized, or None. Raises InputError that names the file and field."""
    path = folder / files.CONFIG
    content = files.read_object(path)
    try:
        return read_quantization(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def refuse_quantized(folder: Path, use: str) -> None:
    """Refuse a quantized checkpoint for a `use` that needs the full weights. Raises InputError."""
    if found := quantization_in(folder):
        raise InputError(f"{folder}: the checkpoint is quantized ({found}); {use} needs the unquantized one")
