"""What ambient diffusion learns: estimates from a further-masked, noisy image, and its twin that saw clean images."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from msmri.errors import InputError
from msmri.model.denoiser import Preconditioned, Preconditioning, per_sample_sigma
from msmri.physics.operators import LinearOperator, Subsample
from msmri.physics.solve import conjugate_gradient
from msmri.tensors import Image, Mask, Sigma

CENTRE_FRACTION = 20 / 256  # of the columns: the calibration lines of msmri's masks


class FurtherMask(Protocol):
    """A law that takes places away from a mask, so that the network learns to fill in what it is not shown."""

    def __call__(self, mask: Mask, rng: Generator) -> Mask:
        """Draw a part of ``mask`` (1, 1 or ky, kx): a subset, of the same shape."""
        ...


@dataclass(frozen=True)
class FurtherLines:
    """Take random lines outside the centre away from a mask, so that R-fold undersampling becomes about (R + 1)-fold.

    For W columns, ``floor(W / R) - floor(W / (R + 1))`` lines go, or all there are outside the centre if fewer. For
    W = 320 and R = 2, 4, 6, 8 these are 54, 16, 8 and 5, the numbers of Aali et al. 2024.
    """

    acceleration: float = 4.0  # R, nominal, of the masks it is applied to
    centre_fraction: float = CENTRE_FRACTION  # of the columns; their lines always stay
    varied: bool = False  # take any number of lines from 1 to that one, so that the network knows masks in between too

    def __post_init__(self) -> None:
        if not 1 <= self.acceleration < math.inf or not 0 <= self.centre_fraction <= 1:
            raise InputError(f"further lines: no such {self}", mend="give acceleration >= 1, centre_fraction 0 .. 1")

    def count(self, width: int) -> int:
        """Give the number of lines to take away from a matrix so wide."""
        return math.floor(width / self.acceleration) - math.floor(width / (self.acceleration + 1))

    def __call__(self, mask: Mask, rng: Generator) -> Mask:
        """Draw a part of the mask: every outer line is as likely to go as every other."""
        width = mask.shape[-1]
        centre = round(self.centre_fraction * width)
        first = width // 2 - centre // 2
        outer = mask.reshape(-1, width).any(0).cpu()
        outer[first : first + centre] = False
        columns = outer.nonzero().flatten()
        count = self.count(width)
        if self.varied and count > 1:
            count = int(torch.randint(1, count + 1, (), generator=rng))
        gone = torch.zeros(width, dtype=torch.bool)
        gone[columns[torch.randperm(len(columns), generator=rng)[:count]]] = True
        return mask & ~gone.to(mask.device)


@dataclass(frozen=True)
class FurtherPixels:
    """Take every place away with one probability: random inpainting. Daras et al. 2023, section 3."""

    delta: float = 0.1  # probability

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 1:
            raise InputError(f"further pixels: delta {self.delta} is no probability below 1", mend="give 0 .. 1")

    def __call__(self, mask: Mask, rng: Generator) -> Mask:
        """Draw a part of the mask."""
        stays = torch.rand(tuple(mask.shape), generator=rng) >= self.delta
        return mask & stays.to(mask.device)


def _apply(network: nn.Module, image: Image, planes: Tensor, condition: Tensor, *, bfloat16: bool) -> Image:
    """Show a real network an image and further real planes (b, p, y, x); give its answer as an image."""
    parts = [image.real, image.imag] if image.is_complex() else [image]
    with torch.autocast(image.device.type, torch.bfloat16) if bfloat16 else nullcontext():
        out = network(torch.cat([*parts, planes], 1), condition)
    out = out.to(parts[0].dtype)
    return torch.complex(*out.chunk(2, 1)) if image.is_complex() else out


class AmbientDenoiser(nn.Module):
    """Estimate E[x0 | u, P~] from ``u = A~^H A~ (x0 + sigma n)``, A~ being the encoding on a further mask P~.

    The preconditioning is that of Karras et al. 2022, as in Aali et al. 2024: ``h = c_skip u + c_out F(c_in [u, P~, 1],
    c_noise)``, with two departures. (1) ``c_out^2`` also holds ``(c_skip aliasing)^2``: at low noise what is wrong with
    u is not the noise but the aliasing, which the network would have to predict at aliasing / sigma of its unit, under
    a weight 1 / c_out^2 that makes these samples dominate. With as much aliasing as the loss can see, doing nothing at
    low noise costs about 1. ``aliasing = 0`` is the original. (2) Levels below ``sigma_min``, which training hardly
    ever draws, are taken for it.

    A third is there to be chosen: with ``iterations`` the image ``(A~^H A~ + damping)^-1 u`` of so many steps of
    conjugate gradients stands in place of u in all that, so that the network need not learn to invert the coils. What
    is estimated stays the same, E[x0 | u, P~]: the one image can be computed from the other.

    Parameters
    ----------
    network
        (b, image + 2, y, x) real and a condition (b, 1) to (b, image, y, x), where ``image`` is 2 for the real and
        imaginary part of a complex image and the number of channels of a real one; then come P~ and a plane of ones.
    sigma_data
        Standard deviation of each real component of clean images, in scaled units.
    aliasing
        Root of the mean square of each real component of ``A^H (P - P~) s`` over the share of k-space in P, s being the
        measured k-space in scaled units: the default is that of simulated brain scans at R = 4.
    sigma_min
        Lowest noise level.
    iterations
        Conjugate-gradient steps towards ``(A~^H A~ + damping)^-1 u``; 0, the original: u as it is.
    damping
        Added to the eigenvalues of ``A~^H A~``, which are 0 to 1.
    bfloat16
        Whether the network alone computes in bfloat16.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float = 0.5,
        *,
        aliasing: float = 0.03,
        sigma_min: float = 0.01,
        iterations: int = 0,
        damping: float = 0.02,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        if not (sigma_data > 0 and aliasing >= 0 and sigma_min > 0):
            raise InputError(
                f"no such standard deviations: sigma_data={sigma_data}, aliasing={aliasing}, sigma_min={sigma_min}",
                mend="give positive numbers; aliasing may be 0",
            )
        if not (iterations >= 0 and damping >= 0):
            raise InputError(
                f"no such solve: iterations={iterations}, damping={damping}", mend="give 0 or more of both"
            )
        self.network = network
        self.sigma_data, self.aliasing, self.sigma_min = sigma_data, aliasing, sigma_min
        self.iterations, self.damping = iterations, damping
        self.reduced = bfloat16  # nn.Module has a method called bfloat16

    def factors(self, sigma: Tensor) -> Preconditioning:
        """Give c_skip, c_out, c_in and c_noise, each shaped like sigma."""
        sigma = sigma.clamp_min(self.sigma_min)
        total = sigma.square() + self.sigma_data**2
        skip = self.sigma_data**2 / total
        out = (sigma.square() * skip + (skip * self.aliasing).square()).sqrt()
        return Preconditioning(skip, out, total.rsqrt(), sigma.log() / 4)

    def weight(self, sigma: Tensor) -> Tensor:
        """Give the loss weight lambda = 1 / c_out^2, at most 1 / aliasing^2."""
        return self.factors(sigma).out.square().reciprocal()

    def begin(self, aliased: Image, mask: Mask, encoding: LinearOperator) -> Image:
        """Give the image the network sees and skips: u, or what ``iterations`` make of it (b, channel, y, x)."""
        if not self.iterations:
            return aliased
        known = Subsample(mask) @ encoding
        return conjugate_gradient(lambda x: known.normal(x) + self.damping * x, aliased, iterations=self.iterations)

    def idle(self, aliased: Image, mask: Mask, sigma: Sigma | float, encoding: LinearOperator) -> Image:
        """Estimate the clean image with a network that says nothing."""
        return self.factors(per_sample_sigma(sigma, aliased)).skip * self.begin(aliased, mask, encoding)

    def forward(self, aliased: Image, mask: Mask, sigma: Sigma | float, encoding: LinearOperator) -> Image:
        """Estimate the clean image (b, channel, y, x).

        Parameters
        ----------
        aliased
            u (b, channel, y, x). The channels of a complex image, sets of maps, are images of their own to the network.
        mask
            P~ (b or 1, 1, 1 or y, x).
        sigma
            A number or (b, 1, 1, 1).
        encoding
            E, of which A~ is ``P~ E``.
        """
        c = self.factors(per_sample_sigma(sigma, aliased))
        aliased = self.begin(aliased, mask, encoding)
        each = aliased.shape[1] if aliased.is_complex() else 1
        seen, wide = (
            aliased.reshape(len(aliased) * each, -1, *aliased.shape[-2:]),
            c._replace(**{name: value.repeat_interleave(each, 0) for name, value in c._asdict().items()}),
        )
        plane = mask.to(seen.real.dtype).expand(len(aliased), 1, *aliased.shape[-2:]).repeat_interleave(each, 0)
        planes = wide.scale * torch.cat([plane, torch.ones_like(plane)], 1)
        change = _apply(self.network, wide.scale * seen, planes, wide.noise.reshape(-1, 1), bfloat16=self.reduced)
        return c.skip * aliased + c.out * change.reshape(aliased.shape)


class ImageDenoiser(Preconditioned):
    """The oracle's twin of ``AmbientDenoiser``: E[x0 | x0 + sigma n], trained on clean images. Karras et al. 2022.

    Parameters
    ----------
    network
        (b, image, y, x) real and a condition (b, 1) to the same, ``image`` as for ``AmbientDenoiser``.
    sigma_data
        Standard deviation of each real component of clean images, in scaled units.
    bfloat16
        Whether the network alone computes in bfloat16.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5, *, bfloat16: bool = False) -> None:
        super().__init__(network, sigma_data)
        self.reduced = bfloat16

    def _denoise(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        c = self.factors(sigma)
        each = noisy.shape[1] if noisy.is_complex() else 1
        seen = (c.scale * noisy).reshape(len(noisy) * each, -1, *noisy.shape[-2:])
        condition = c.noise.reshape(-1, 1).repeat_interleave(each, 0)
        change = _apply(self.network, seen, seen.real[:, :0], condition, bfloat16=self.reduced)
        return c.skip * noisy + c.out * change.reshape(noisy.shape)
