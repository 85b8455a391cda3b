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
    """Give the phase (y, x) that moves the centre of k-space: ``fft2c(x) = fft2(phase * ifftshift(x))``.

    A shift of k-space by c = n // 2 is the phase ``exp(2i pi c n / N)`` in the image, for even and odd sizes alike;
    the inverse is ``ifft2c(y) = fftshift(phase.conj() * ifft2(y))``.
    """
    axes = []
    for n in shape:
        turns = torch.remainder(n // 2 * torch.arange(n, dtype=torch.float64), n) / n  # exact for long axes
        axes.append(torch.polar(torch.ones(n, dtype=torch.float64), 2 * math.pi * turns))
    return (axes[0][:, None] * axes[1][None, :]).to(dtype=dtype, device=device)
