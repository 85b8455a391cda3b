"""Degradations of an image as operators: averaged blocks, circular blur, random signs and Hadamard measurements.

Inpainting is ``Subsample`` with a mask of :mod:`msmri.physics.tiles`. All act on each channel (*batch, channel, y, x)
by itself, real or complex, so that they serve photographs and coil-combined images alike; before an encoding, as in
``encoding @ blur``, they degrade what was encoded.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor

from msmri.errors import InputError
from msmri.physics.operators import LinearOperator
from msmri.physics.solve import conjugate_gradient
from msmri.tensors import Image


@dataclass(frozen=True)
class BlockAverage(LinearOperator):
    """Average blocks of pixels: the measurement of super-resolution."""

    factor: int = 4  # pixels along each axis of a block

    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise InputError(f"blocks of {self.factor} pixels cannot be averaged", mend="give 1 or more")

    def __call__(self, x: Image) -> Image:
        """Average (*batch, channel, y, x) to (*batch, channel, y / factor, x / factor).

        Raises
        ------
        ValueError
            If the factor does not divide the image.
        """
        y, x_size = x.shape[-2:]
        if y % self.factor or x_size % self.factor:
            raise ValueError(f"blocks of {self.factor} do not fill an image of {y} x {x_size}")
        blocks = x.reshape(*x.shape[:-2], y // self.factor, self.factor, x_size // self.factor, self.factor)
        return blocks.mean((-3, -1))

    def adjoint(self, y: Image) -> Image:
        """Spread every value evenly over its block."""
        return self.pseudo_inverse(y) / self.factor**2

    def pseudo_inverse(self, y: Image) -> Image:
        """Give the smallest image with these averages: blocks of one value. As A A^H = 1 / factor^2."""
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)


@dataclass(frozen=True)
class Blur(LinearOperator):
    """Convolve every channel with a kernel, around the edges of the image.

    Parameters
    ----------
    kernel
        Real (y, x), of any size; its entry (y // 2, x // 2) is what falls on the pixel itself.
    cutoff
        Frequencies that the blur leaves less of than this share of its strongest do not come back by
        ``pseudo_inverse``: they are as good as lost.
    """

    kernel: Tensor
    cutoff: float = 1e-3

    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kernel.ndim != 2 or self.kernel.is_complex() or not self.kernel.numel():
            raise InputError(f"a kernel of shape {tuple(self.kernel.shape)} cannot blur", mend="give a real (y, x)")

    @classmethod
    def gaussian(cls, std: float, *, reach: float = 4.0, cutoff: float = 1e-3) -> Self:
        """Make the blur by a Gaussian of ``std`` pixels, cut off at ``reach`` standard deviations, of sum 1."""
        if not (std > 0 and reach > 0):
            raise InputError(f"no Gaussian has std {std} and reach {reach}", mend="give positive numbers")
        radius = math.ceil(reach * std)
        profile = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * std**2))
        kernel = profile[:, None] * profile
        return cls(kernel / kernel.sum(), cutoff)

    def response(self, shape: tuple[int, int]) -> Tensor:
        """Give the eigenvalues complex128 (y, x), by frequency as ``torch.fft.fft2`` orders it.

        A kernel wider than the image is wrapped around it.
        """
        wrapped = torch.zeros(shape, dtype=torch.float64, device=self.kernel.device)
        rows, columns = (
            (torch.arange(n, device=self.kernel.device) - n // 2) % size
            for n, size in zip(self.kernel.shape, shape, strict=True)
        )
        place = (rows[:, None] * shape[1] + columns).flatten()
        wrapped.view(-1).index_add_(0, place, self.kernel.double().flatten())
        return torch.fft.fft2(wrapped)

    def __call__(self, x: Image) -> Image:
        """Blur."""
        return _filtered(x, self.response(_size(x)))

    def adjoint(self, y: Image) -> Image:
        """Correlate with the kernel."""
        return _filtered(y, self.response(_size(y)).conj())

    def normal(self, x: Image) -> Image:
        """Apply adjoint(forward), by one pair of transforms."""
        return _filtered(x, self.response(_size(x)).abs().square())

    def pseudo_inverse(self, y: Image) -> Image:
        """Divide by the response wherever it is above the cutoff; give nothing of the other frequencies."""
        response = self.response(_size(y))
        strength = response.abs()
        kept = strength > self.cutoff * strength.max()
        inverse = torch.where(kept, response.conj() / torch.where(kept, strength.square(), 1.0), 0.0)
        return _filtered(y, inverse)


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def _filtered(x: Image, response: Tensor) -> Image:
    """Multiply the spectrum of an image by a response that maps real images to real ones."""
    spectrum = torch.fft.fft2(x)
    image = torch.fft.ifft2(spectrum * response.to(spectrum))
    return image if x.is_complex() else image.real


def walsh_hadamard(x: Tensor) -> Tensor:
    """Apply the orthonormal Walsh-Hadamard transform, its own inverse, along the last axis in natural order.

    Raises
    ------
    ValueError
        If the axis is not a power of two long.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Walsh-Hadamard transform needs a power of two, not {n}")
    half = 1
    while half < n:
        even, odd = x.reshape(*x.shape[:-1], n // (2 * half), 2, half).unbind(-2)
        x = torch.stack([even + odd, even - odd], -2).flatten(-3)
        half *= 2
    return x / math.sqrt(n)


@dataclass(frozen=True)
class SignedHadamard(LinearOperator):
    """Compressed sensing: flip random signs, mix all pixels of a channel by a Hadamard matrix, keep some results.

    ``A = R H P D`` with D the signs, P zeros up to a power of two of pixels, H the orthonormal Walsh-Hadamard
    transform and R a random choice of rows: every measurement is a sum of all pixels with random signs, as of a random
    sign matrix, in n log n operations. Where the number of pixels is a power of two the rows are orthonormal.

    Parameters
    ----------
    signs
        Real (y, x), each 1 or -1; its shape is that of the images.
    rows
        Indices (m,) into the transform, no two alike.
    """

    signs: Tensor
    rows: Tensor

    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.signs.ndim != 2 or self.rows.ndim != 1 or not len(self.rows):
            raise InputError(
                f"signs {tuple(self.signs.shape)} and rows {tuple(self.rows.shape)} make no operator",
                mend="give (y, x) and (m,)",
            )

    @classmethod
    def draw(cls, shape: tuple[int, int], measurements: int, rng: Generator) -> Self:
        """Draw signs and rows for images of ``shape`` and so many measurements a channel.

        Raises
        ------
        InputError
            If there are more measurements than pixels, or none.
        """
        pixels = shape[0] * shape[1]
        if not 1 <= measurements <= pixels:
            raise InputError(
                f"{measurements} measurements of an image of {pixels} pixels", mend=f"give 1 to {pixels} of them"
            )
        signs = 1.0 - 2.0 * torch.randint(0, 2, shape, generator=rng)
        return cls(signs, torch.randperm(_padded(pixels), generator=rng)[:measurements])

    def __call__(self, x: Image) -> Tensor:
        """Measure (*batch, channel, y, x): (*batch, channel, 1, m), a k-space of one row."""
        if x.shape[-2:] != self.signs.shape:
            raise ValueError(f"an image {tuple(x.shape)} does not fit signs {tuple(self.signs.shape)}")
        signed = (x * self.signs.to(x.real.dtype)).flatten(-2)
        padded = torch.nn.functional.pad(signed, (0, _padded(signed.shape[-1]) - signed.shape[-1]))
        return walsh_hadamard(padded)[..., self.rows].unsqueeze(-2)

    def adjoint(self, y: Tensor) -> Image:
        """Apply the transpose: (*batch, channel, 1, m) to (*batch, channel, y, x)."""
        pixels = self.signs.numel()
        spread = y.new_zeros(*y.shape[:-2], _padded(pixels)).index_copy(-1, self.rows, y.squeeze(-2))
        return walsh_hadamard(spread)[..., :pixels].unflatten(-1, self.signs.shape) * self.signs.to(y.real.dtype)

    def pseudo_inverse(self, y: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Image:
        """Give the smallest image with these measurements, ``A^H (A A^H)^-1 y``, by conjugate gradients.

        For a power of two of pixels A A^H is the identity and one iteration is exact.
        """

        def gram(v: Tensor) -> Tensor:
            return self(self.adjoint(v))

        flat = y.reshape(-1, *y.shape[-3:])
        weights = conjugate_gradient(gram, flat, iterations=iterations, tolerance=tolerance)
        return self.adjoint(weights.reshape(y.shape))


def _padded(n: int) -> int:
    """Give the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
