"""Whether a checkpoint's folder is quantized; the format is numprune.quantization.compressed_tensors."""

from pathlib import Path

from numprune.errors import InputError
from numprune.export import files
from numprune.quantization import Scheme
from numprune.quantization.compressed_tensors import scheme_of


def scheme_in(folder: Path) -> Scheme | None:
    """Return the scheme of the checkpoint in `folder`; None: it is not quantized. Raises InputError as `scheme_of`."""
    return scheme_of(files.read_object(folder / files.CONFIG))


def refuse_quantized(folder: Path, use: str) -> None:
    """Refuse a checkpoint that is quantized, for a `use` that needs full weights. Raises InputError."""
    if scheme := scheme_in(folder):
        raise InputError(f"{folder}: the checkpoint is quantized ({scheme}); {use} needs the unquantized one")
