"""Linear operators from an image to its measurement: frozen values with a call and an adjoint."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from msmri.physics.fourier import centring_phase
from msmri.tensors import Image, KSpace, Maps, Mask

_CACHED = 2**20  # places of k-space, 8 MB in single precision


def _scaled(made: Tensor, factor: Tensor) -> Tensor:
    """Multiply what nobody else holds: in place where it fits, since new memory costs as much as the product."""
    fits = factor.ndim <= made.ndim and all(n in (1, m) for n, m in zip(factor.shape[::-1], made.shape[::-1]))
    return made.mul_(factor) if fits and torch.result_type(made, factor) == made.dtype else made * factor


class LinearOperator(ABC):
    """A complex-linear map between tensors; a new mask or new maps make a new operator."""

    shared: ClassVar[bool] = False  # whether one such operator serves every sample of a batch

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operator."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the adjoint: ``<A x, y> = <x, A.adjoint(y)>``."""

    def normal(self, x: Tensor) -> Tensor:
        """Apply adjoint(forward); subclasses override it where there is a shortcut."""
        return self.adjoint(self(x))

    def weighted_normal(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply adjoint(weight * forward) for a real diagonal ``weight`` in measurement space."""
        return self.adjoint(weight * self(x))

    def kspace_weight(self, weight: Tensor) -> Tensor:
        """Give the diagonal (*batch, 1, ky, kx) of ``F E^H weight E F^H``: how well each place of k-space is known.

        Without coils each place of measurement space is as much of every place of k-space.
        """
        return weight.mean((-3, -2, -1), keepdim=True)

    def factored(self) -> "tuple[LinearOperator, LinearOperator]":
        """Write the operator as H E: E the encoding of images that priors know, H what is done to the encoded.

        Priors know images as they are, the identity being E, unless a subclass is such an encoding itself.
        """
        return self, Identity()

    def __matmul__(self, inner: "LinearOperator") -> "LinearOperator":
        return Composed(self, inner)


@dataclass(frozen=True)
class Composed(LinearOperator):
    """``outer @ inner``: first ``inner``, then ``outer``."""

    outer: LinearOperator
    inner: LinearOperator

    def __call__(self, x: Tensor) -> Tensor:
        """Apply inner, then outer."""
        return self.outer(self.inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the adjoints in reverse order."""
        return self.inner.adjoint(self.outer.adjoint(y))

    def normal(self, x: Tensor) -> Tensor:
        """Apply adjoint(forward), through the inner operator's shortcut when the outer one only selects."""
        if isinstance(self.outer, Subsample):
            return self.inner.weighted_normal(x, self.outer.mask)
        return self.adjoint(self(x))

    def factored(self) -> tuple[LinearOperator, LinearOperator]:
        """Leave what the inner operator encodes, and put the outer one on top of the rest."""
        degradation, encoding = self.inner.factored()
        return (self.outer if isinstance(degradation, Identity) else self.outer @ degradation), encoding


@dataclass(frozen=True)
class Identity(LinearOperator):
    """The encoding of photographs: measurement space is the image itself."""

    shared: ClassVar[bool] = True

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """Return ``y``."""
        return y

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Return ``y``."""
        return y


@dataclass(frozen=True)
class Subsample(LinearOperator):
    """Keep the entries where ``mask`` is True, zero elsewhere (a NaN outside the mask does not leak)."""

    mask: Mask

    def __call__(self, x: Tensor) -> Tensor:
        """Zero everything outside the mask."""
        return torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def adjoint(self, y: Tensor) -> Tensor:
        """Zero everything outside the mask: a selection is its own adjoint."""
        return self(y)

    def normal(self, x: Tensor) -> Tensor:
        """Zero everything outside the mask: a selection is its own square."""
        return self(x)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Zero everything outside the mask: a selection is its own pseudo-inverse."""
        return self(y)


def selected(mask: Mask, operator: LinearOperator) -> LinearOperator:
    """Give ``Subsample(mask) @ operator`` without what does nothing, an identity or a mask of all places.

    What is left may have a pseudo-inverse, which a composition has not.
    """
    if isinstance(operator, Identity):
        return Subsample(mask)
    return operator if bool(mask.all()) else Subsample(mask) @ operator


@dataclass(frozen=True)
class CoilFourier(LinearOperator):
    """SENSE encoding: weight the image by each coil's sensitivity, transform, add the sets of maps.

    Pruessmann et al. 1999; with two sets of maps, soft-SENSE (Uecker et al. 2014). Of the centring shifts that of
    k-space is a phase on the image side and is folded into the maps once; that of the image is one roll of the
    combined image. Forward and adjoint so are one FFT and one product a coil.

    Parameters
    ----------
    maps
        Complex (*batch, set, coil, y, x). The image has one channel per set.
    """

    maps: Maps

    def __post_init__(self) -> None:
        if self.maps.ndim < 4 or not self.maps.is_complex():
            raise ValueError(f"maps must be complex (..., set, coil, y, x), got {tuple(self.maps.shape)}")

    @cached_property
    def _shifted_maps(self) -> Tensor:
        y, x = self.maps.shape[-2:]
        phase = centring_phase((y, x), dtype=self.maps.dtype, device=self.maps.device)
        return torch.fft.ifftshift(self.maps, dim=(-2, -1)) * phase

    @cached_property
    def _conjugate_maps(self) -> Tensor:
        return self._shifted_maps.conj().resolve_conj()

    @property
    def n_sets(self) -> int:
        """The number of sets of maps, which is the number of channels of the image."""
        return self.maps.shape[-4]

    def _check(self, x: Image) -> None:
        if x.shape[-3] != self.n_sets or x.shape[-2:] != self.maps.shape[-2:]:
            raise ValueError(f"image {tuple(x.shape)} does not fit maps {tuple(self.maps.shape)}")

    def _groups(self, x: Tensor) -> list[slice]:
        """Give the coils in groups: on a CPU so many together that what is made of them stays in its cache."""
        coils, places = self.maps.shape[-3], max(self.maps[..., 0, 0, :, :].numel(), x[..., 0, :, :].numel(), 1)
        together = max(1, _CACHED // places) if x.device.type == "cpu" else coils
        return [slice(first, min(first + together, coils)) for first in range(0, coils, together)]

    def _transform(self, shifted: Image, coils: slice) -> KSpace:
        """Encode an image whose centre is at its first place, as seen by some coils."""
        seen = self._shifted_maps[..., 0, coils, :, :] * shifted[..., :1, :, :]
        for number in range(1, self.n_sets):  # not a matrix product, whose rounding would depend on the batch
            seen = seen + self._shifted_maps[..., number, coils, :, :] * shifted[..., number : number + 1, :, :]
        return torch.fft.fft2(seen, norm="ortho")

    def _combine(self, y: KSpace, coils: slice) -> Image:
        """Combine k-space of some coils into an image whose centre is at its first place."""
        images = torch.fft.ifft2(y, norm="ortho")
        maps = self._conjugate_maps[..., coils, :, :]
        if self.n_sets == 1:
            return _scaled(images, maps[..., 0, :, :, :]).sum(-3, keepdim=True)
        return torch.cat([(maps[..., s, :, :, :] * images).sum(-3, keepdim=True) for s in range(self.n_sets)], dim=-3)

    def __call__(self, x: Image) -> KSpace:
        """Encode an image (*batch, set, y, x) as k-space (*batch, coil, ky, kx)."""
        self._check(x)
        return self._transform(torch.fft.ifftshift(x, dim=(-2, -1)), slice(None))

    def adjoint(self, y: KSpace) -> Image:
        """Combine k-space (*batch, coil, ky, kx) into an image (*batch, set, y, x)."""
        return torch.fft.fftshift(self._combine(y, slice(None)), dim=(-2, -1))

    def weighted_normal(self, x: Image, weight: Tensor) -> Image:
        """Apply adjoint(weight * forward), on the transform as it comes: k-space of all coils is never held."""
        self._check(x)
        shifted = torch.fft.ifftshift(x, dim=(-2, -1))
        by_coil = weight.ndim > 2 and weight.shape[-3] > 1
        image: Tensor | None = None
        for coils in self._groups(x):
            own = weight[..., coils, :, :] if by_coil else weight
            part = self._combine(_scaled(self._transform(shifted, coils), own), coils)
            image = part if image is None else image + part
        assert image is not None
        return torch.fft.fftshift(image, dim=(-2, -1))

    def kspace_weight(self, weight: Tensor) -> Tensor:
        """Give the diagonal (*batch, 1, ky, kx) of ``F E^H weight E F^H``, the same for all sets together.

        Multiplying by a map mixes k-space within the map's own spectrum: the weight is averaged over the energy
        spectrum of the maps.
        """
        wide = weight.expand(*weight.shape[:-2], *self.maps.shape[-2:])
        spread = torch.fft.fft2(self._mixing).conj() * torch.fft.fft2(wide)
        return torch.fft.ifft2(spread).real.clamp_min(0.0)

    @cached_property
    def _mixing(self) -> Tensor:
        n = self.maps.shape[-2] * self.maps.shape[-1]
        return torch.fft.fft2(self.maps[..., 0, :, :, :]).abs().square().sum(-3, keepdim=True) / n**2

    def factored(self) -> tuple[LinearOperator, LinearOperator]:
        """Give the identity and this: priors of scans know all coils' k-space."""
        return Identity(), self

    def normal(self, x: Image) -> Image:
        """Apply adjoint(forward): the Fourier transform cancels and only the maps remain."""
        if self.n_sets == 1:
            return self._power * x
        coils = torch.einsum("...scyx,...syx->...cyx", self.maps, x)
        return torch.einsum("...scyx,...cyx->...syx", self.maps.conj(), coils)

    @cached_property
    def _power(self) -> Tensor:
        return self.maps[..., 0, :, :, :].abs().square().sum(-3, keepdim=True)
