"""Iterative solvers on batches: conjugate gradients and the largest eigenvalue."""

from collections.abc import Callable

import torch
from torch import Tensor

from msmri.tensors import Rng, normal_like


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Real part of ``<a, b>`` for each sample of a batch (first axis), shaped to broadcast against ``a``."""
    product = (a.conj() * b).real if a.is_complex() else a * b
    return product.flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def conjugate_gradient(
    normal: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    start: Tensor | None = None,
    iterations: int = 10,
    tolerance: float = 0.0,
) -> Tensor:
    """Solve ``normal(x) = right`` for a Hermitian positive definite ``normal``, each sample of the batch by itself.

    A sample whose residual has fallen below ``tolerance`` times the norm of its right side stops changing, so that
    its neighbours in the batch never alter it. Hestenes and Stiefel 1952.

    Parameters
    ----------
    normal
        The operator, acting on tensors of the shape of ``right``.
    right
        (batch, ...), real or complex.
    start
        First guess; zero without one.
    iterations, tolerance
        Stop after so many iterations, or when every sample's relative residual is below the tolerance.
    """
    x = torch.zeros_like(right) if start is None else start
    residual = right if start is None else right - normal(x)
    direction = residual
    power = inner_product(residual, residual)
    bound = tolerance**2 * inner_product(right, right)
    tiny = torch.finfo(power.dtype).tiny
    for _ in range(iterations):
        active = power > bound
        if not bool(active.any()):
            break
        image = normal(direction)
        curvature = inner_product(direction, image)
        step = torch.where(active & (curvature > tiny), power / curvature.clamp_min(tiny), 0.0)
        x = x + step * direction
        residual = residual - step * image
        new_power = inner_product(residual, residual)
        direction = residual + torch.where(active, new_power / power.clamp_min(tiny), 0.0) * direction
        power = torch.where(active, new_power, power)
    return x


def largest_eigenvalue(
    normal: Callable[[Tensor], Tensor], like: Tensor, rng: Rng, *, iterations: int = 50, tolerance: float = 1e-4
) -> Tensor:
    """Estimate the largest eigenvalue of a Hermitian positive ``normal`` for each sample by power iteration.

    Returns
    -------
    Tensor
        Real, shape (batch,); a lower bound that converges from below.
    """
    x = normal_like(like, rng)
    value = torch.zeros(like.shape[0], dtype=x.real.dtype, device=x.device)
    for _ in range(iterations):
        x = x / inner_product(x, x).sqrt().clamp_min(torch.finfo(value.dtype).tiny)
        image = normal(x)
        new = inner_product(x, image).flatten()
        converged = (new - value).abs() <= tolerance * new
        value, x = new, image
        if bool(converged.all()):
            break
    return value
