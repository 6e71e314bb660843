"""Dense solves for symmetric matrices that are positive definite after damping, in float64."""

import torch
from torch import Tensor


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return `matrix` (..., n, n) + damping * mean(diag) * I; for an all-zero matrix, + damping * I."""
    result = matrix.clone()
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(-1, keepdim=True)
    diagonal.add_(damping * torch.where(scale > 0, scale, 1.0))
    return result


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a symmetric matrix (..., n, n) that is positive up to rounding.

    A rank-deficient Gram matrix (fewer calibration tokens than channels, dead channels) can have eigenvalues of about
    -1e-16 times the largest one. The diagonal is then raised, starting at 1e-14 and tenfold each time, until the factor
    exists.

    Raises:
        ValueError: the matrix is not finite, or not positive even with 1e-4 of its mean diagonal added.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError("matrix has values that are not finite")
    factor, info = torch.linalg.cholesky_ex(matrix)
    jitter = 1e-14
    while info.any() and jitter <= 1e-4:
        factor, info = torch.linalg.cholesky_ex(damped(matrix, jitter))
        jitter *= 10
    if info.any():
        raise ValueError("matrix is not positive definite")
    return factor


def spd_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return matrix^-1 right for a symmetric positive matrix (n, n) and right (n, m)."""
    return torch.cholesky_solve(right, cholesky(matrix))


def spd_inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of a symmetric positive matrix (n, n). Only the OBS update needs one explicitly."""
    return torch.cholesky_inverse(cholesky(matrix))
