"""Ladders of noise levels: falling 1-D float64 tensors of sigma, after whose last entry a sampler goes to 0.

A ladder never holds the final 0 itself. ``steps`` entries are ``steps`` evaluations of the denoiser, the last of which
turns the state at the lowest sigma into the result.
"""

import math

import torch
from torch import Tensor


def karras(sigma_max: float, sigma_min: float, steps: int, rho: float = 7.0) -> Tensor:
    """Space ``sigma ** (1 / rho)`` evenly: the larger rho, the more steps at low noise. Karras et al. 2022, eq. 5.

    Raises
    ------
    ValueError
        Unless 0 < sigma_min <= sigma_max < infinity and steps >= 1.
    """
    _check(sigma_max, sigma_min, steps)
    return torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64) ** rho


def geometric(sigma_max: float, sigma_min: float, steps: int) -> Tensor:
    """Space ``log sigma`` evenly: every step divides the noise by the same factor. Song and Ermon 2019.

    Raises
    ------
    ValueError
        Unless 0 < sigma_min <= sigma_max < infinity and steps >= 1.
    """
    _check(sigma_max, sigma_min, steps)
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp()


def vp(steps: int, trained: Tensor) -> Tensor:
    """Take every (T / steps)-th of the levels a network was trained on, from high to low. Song et al. 2021 (DDIM).

    With T = 1000 and 200 steps the times are 995, 990, .., 5, 0.

    Parameters
    ----------
    steps
        Number of entries, at most T.
    trained
        All T levels, rising with time, such as ``VPSchedule().sigmas``.
    """
    n = len(trained)
    if not 1 <= steps <= n:
        raise ValueError(f"a ladder of 1 to {n} steps can be taken from {n} trained levels, got {steps}")
    times = torch.arange(steps, dtype=torch.int64) * n // steps
    return trained[times].flip(0)


def ancestral(sigmas: Tensor, eta: float = 1.0) -> Tensor:
    """Give the share of fresh noise of every step that keeps the spread of samples exact. Song et al. 2021, eq. 16.

    ``eta * sqrt(1 - (sigma_next / sigma) ** 2)``, 1-D like ``sigmas``, for use as the ``eta`` of
    :func:`msmri.sampling.reverse.reverse_diffusion`. As the steps become finer the share falls to 0, which a constant
    share does not: on a Gaussian prior, fine steps of constant share eta end with sqrt((1 + sqrt(1 - eta^2)) / 2) times
    the true spread, 0.71 for eta = 1 and 0.87 for 0.85.
    """
    following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
    return eta * (1 - (following / sigmas).square()).clamp_min(0).sqrt()


def _check(sigma_max: float, sigma_min: float, steps: int) -> None:
    if not 0 < sigma_min <= sigma_max < math.inf or steps < 1:
        raise ValueError(f"need 0 < sigma_min <= sigma_max and steps >= 1, got {sigma_min}, {sigma_max}, {steps}")
