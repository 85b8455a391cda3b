"""Centred orthonormal two-dimensional Fourier transform over the last two axes."""

import math

import torch
from torch import Tensor


def fft2c(image: Tensor) -> Tensor:
    """Transform images (..., y, x) to k-space (..., ky, kx); zero frequency at index ``n // 2``, norm preserved."""
    shifted = torch.fft.ifftshift(image, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.fft2(shifted, norm="ortho"), dim=(-2, -1))


def ifft2c(kspace: Tensor) -> Tensor:
    """Transform k-space (..., ky, kx) to images (..., y, x); the inverse and the adjoint of :func:`fft2c`."""
    shifted = torch.fft.ifftshift(kspace, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.ifft2(shifted, norm="ortho"), dim=(-2, -1))


def centring_phase(shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give the phase (y, x) that turns an uncentred transform into a centred one, for even and odd sizes alike.

    With c = n // 2 per axis, the centred transform is ``fft2c(x) = p * fft2(p * x)`` for
    ``p[n] = exp(2i pi c (n - c / 2) / N)``: the shifts of both domains become one product each, and cancel
    altogether in ``adjoint(weight * forward)``.
    """
    axes = []
    for n in shape:
        centre = n // 2
        index = torch.arange(n, dtype=torch.float64)
        # integer arithmetic modulo 2N keeps the angle exact for long axes
        turns = torch.remainder(centre * (2 * index - centre), 2 * n) / (2 * n)
        axes.append(torch.polar(torch.ones(n, dtype=torch.float64), 2 * math.pi * turns))
    return (axes[0][:, None] * axes[1][None, :]).to(dtype=dtype, device=device)
