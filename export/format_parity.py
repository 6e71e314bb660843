"""Proof that the export of a quantized checkpoint stores identical values."""

from pathlib import Path
from typing import Any

from numprune.errors import ParityError
from numprune.export import checkpoint
from numprune.export.weights import slabs, stored_parts


def check_format(reference: Path, candidate: Path) -> dict[str, Any]:
    """Compare two stored checkpoints bit for bit: grid values, scales and all unquantized tensors.

    Returns:
        Plain JSON: `scheme`, how many `matrices` are quantized, how many `tensors` were compared.

    Raises:
        ParityError: names the first tensor that differs.
        InputError, IntegrityError: as `checkpoint.audit`.
    """
    headers = checkpoint.audit(reference)
    ours, theirs = stored_parts(headers), stored_parts(checkpoint.audit(candidate))
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            raise ParityError(f"{candidate}: {name} is stored in only one of it and {reference}; export it again")
        one, other = ours[name], theirs[name]
        alike = one.dtype == other.dtype and one.shape == other.shape
        if not alike or not all(a.equal(b) for a, b in zip(slabs(one), slabs(other), strict=True)):
            raise ParityError(f"{other.file}: {name} differs from that in {one.file}; export it again")
    schemes = checkpoint.quantized(headers)
    return {
        "scheme": ", ".join(sorted({str(scheme) for scheme in schemes.values()})),
        "matrices": len(schemes),
        "tensors": len(ours),
    }
