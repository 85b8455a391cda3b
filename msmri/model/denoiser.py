"""Denoisers: one contract, ``denoise(noisy, sigma)``, whatever the network inside predicts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from msmri.tensors import Image, Rng, Sigma, normal_like


@runtime_checkable
class Denoiser(Protocol):
    """Anything that estimates a clean image, in the variance-exploding view."""

    def denoise(self, noisy: Image, sigma: Sigma | float) -> Image:
        """Estimate E[clean | noisy = clean + sigma n], n standard normal in each real component.

        ``sigma`` is a number or a tensor that is one value a sample, shaped to broadcast: (*batch, 1, 1, 1).
        """


def per_sample_sigma(sigma: Sigma | float, noisy: Image) -> Tensor:
    """Give ``sigma`` as (*batch, 1, 1, 1), in the real dtype and on the device of ``noisy`` (*batch, channel, y, x).

    Raises
    ------
    ValueError
        If it is negative, or is not one number a sample: a network is told one noise level for a whole image.
    """
    values = torch.as_tensor(sigma, dtype=noisy.real.dtype, device=noisy.device)
    if values.device.type == "cpu" and bool((values < 0).any()):  # elsewhere the check would wait for the device
        raise ValueError("sigma is a standard deviation and cannot be negative")
    shape = (*noisy.shape[:-3], 1, 1, 1)
    if values.numel() == 1:
        return values.reshape(1, 1, 1).expand(shape)
    if values.ndim > len(shape) or any(n not in (1, m) for n, m in zip(reversed(values.shape), reversed(shape))):
        raise ValueError(
            f"sigma must be a number or of shape {shape} for an image {tuple(noisy.shape)}, got {tuple(values.shape)}"
        )
    return values.expand(shape)


class ComplexChannels(nn.Module):
    """The door between complex images and a real network: complex (b, c, y, x) to real (b, 2c, y, x) and back.

    The real parts of all channels come first, then the imaginary parts.

    Parameters
    ----------
    network
        ``network(real (b, 2c, y, x), condition (b,)) -> real (b, 2d, y, x)``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Image, condition: Tensor) -> Image:
        """Apply the network to a complex image; the output has the dtype of the input, whatever the network's."""
        if not image.is_complex():
            raise ValueError("ComplexChannels takes complex images; give real ones to the network itself")
        out = self.network(torch.cat([image.real, image.imag], dim=-3), condition).to(image.real.dtype)
        if out.shape[-3] % 2:
            raise ValueError(f"{out.shape[-3]} output channels are not pairs of real and imaginary parts")
        return torch.complex(*out.chunk(2, dim=-3))


class _NetworkDenoiser(nn.Module):
    """A network seen as a denoiser; subclasses say how with ``_denoise`` on one batch axis."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def _denoise(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def denoise(self, noisy: Image, sigma: Sigma | float) -> Image:
        """Estimate the clean image (*batch, channel, y, x); ``sigma`` a number or (*batch, 1, 1, 1)."""
        levels = per_sample_sigma(sigma, noisy)
        image = noisy.shape[-3:]
        return self._denoise(noisy.reshape(-1, *image), levels.reshape(-1, 1, 1, 1)).reshape(noisy.shape)

    def forward(self, noisy: Image, sigma: Sigma | float) -> Image:
        """Do what ``denoise`` does, as a module call (for compilation and distributed training)."""
        return self.denoise(noisy, sigma)


def log_normal_sigma(n: int, mean: float, spread: float, least: float, rng: Generator) -> Sigma:
    """Draw noise levels (n, 1, 1, 1), normal in their logarithm. Karras et al. 2022, table 1."""
    return (mean + spread * torch.randn(n, 1, 1, 1, generator=rng)).exp().clamp_min(least)


@dataclass(frozen=True)
class VPSchedule:
    """The linear variance-preserving schedule. Ho et al. 2020, section 2.

    Steps t = 0 .. n_steps - 1; u_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) n is the variance-exploding
    x + sigma n scaled by sqrt(alpha_bar), with sigma = sqrt((1 - alpha_bar) / alpha_bar).
    """

    n_steps: int = 1000  # number of training steps T
    beta_min: float = 1e-4  # beta at t = 0
    beta_max: float = 0.02  # beta at t = n_steps - 1

    def __post_init__(self) -> None:
        if self.n_steps < 2 or not 0 < self.beta_min <= self.beta_max < 1:
            raise ValueError(f"need n_steps > 1 and 0 < beta_min <= beta_max < 1, got {self}")

    @cached_property
    def alpha_bar(self) -> Tensor:
        """The product of (1 - beta) up to each step: float64 (n_steps,), falling."""
        beta = torch.linspace(self.beta_min, self.beta_max, self.n_steps, dtype=torch.float64)
        return torch.cumprod(1 - beta, 0)

    @cached_property
    def sigmas(self) -> Tensor:
        """The noise level of each step in the variance-exploding view: float64 (n_steps,), rising with t."""
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    def sigma(self, t: Tensor | float) -> Tensor:
        """Give the noise level at a time, linear in log sigma between steps, held at the ends."""
        time = torch.as_tensor(t)
        place = time.to("cpu", torch.float64).clamp(0, self.n_steps - 1)
        left = place.floor().long().clamp(max=self.n_steps - 2)
        log = self.sigmas.log()
        value = torch.lerp(log[left], log[left + 1], place - left).exp()
        return value.to(time) if time.is_floating_point() else value.to(time.device)

    def t(self, sigma: Tensor | float) -> Tensor:
        """Give the time at which the noise level is ``sigma``: the inverse of ``sigma(t)``, within 0 .. n_steps - 1."""
        level = torch.as_tensor(sigma)
        log = self.sigmas.log()
        target = level.to("cpu", torch.float64).log().clamp(log[0], log[-1]).contiguous()
        left = (torch.searchsorted(log, target, right=True) - 1).clamp(0, self.n_steps - 2)
        time = left + (target - log[left]) / (log[left + 1] - log[left])
        return time.to(level) if level.is_floating_point() else time.to(level.device)


class EpsilonVP(_NetworkDenoiser):
    """A network that predicts the noise of a variance-preserving diffusion, seen as a denoiser.

    The network sees u = noisy / sqrt(1 + sigma^2) = sqrt(alpha_bar) noisy and the time; the clean image is
    (u - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar). Ho et al. 2020, eq. 11. Only the time is looked up in the
    schedule: the scaling uses sigma itself, so that the estimate tends to ``noisy`` as sigma goes to 0.

    Parameters
    ----------
    network
        ``network(u, t) -> eps`` of the shape and dtype of u (wrap a real network in ``ComplexChannels`` for complex
        images); t is (b,), real, 0 .. n_steps - 1.
    schedule
        The schedule the network was trained with.
    nearest
        Round the time to a whole step, as in training, instead of interpolating between steps.
    """

    def __init__(self, network: nn.Module, schedule: VPSchedule | None = None, *, nearest: bool = False) -> None:
        super().__init__(network)
        self.schedule = schedule if schedule is not None else VPSchedule()
        self.nearest = nearest

    @property
    def sigmas(self) -> Tensor:
        """The noise levels the network was trained on: float64 (n_steps,), rising."""
        return self.schedule.sigmas

    def _denoise(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        t = self.schedule.t(sigma.flatten())
        eps = self.network(noisy / (1 + sigma.square()).sqrt(), t.round() if self.nearest else t)
        return noisy - sigma * eps


class Preconditioning(NamedTuple):
    """The factors of ``c_skip noisy + c_out network(c_in noisy, c_noise)``, each shaped like sigma."""

    skip: Tensor
    out: Tensor
    scale: Tensor
    noise: Tensor


class Preconditioned(_NetworkDenoiser):
    """A network scaled to unit variance at its input and target at every noise level. Karras et al. 2022, eq. 7.

    Parameters
    ----------
    network
        ``network(image, noise_condition (b,))`` of the shape and dtype of the image.
    sigma_data
        Standard deviation of each real component of clean images.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__(network)
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def factors(self, sigma: Tensor) -> Preconditioning:
        """Give c_skip, c_out, c_in and c_noise. Karras et al. 2022, table 1."""
        total = sigma.square() + self.sigma_data**2
        return Preconditioning(
            skip=self.sigma_data**2 / total,
            out=sigma * self.sigma_data / total.sqrt(),
            scale=1 / total.sqrt(),
            noise=sigma.clamp_min(torch.finfo(sigma.dtype).tiny).log() / 4,
        )

    def weight(self, sigma: Tensor) -> Tensor:
        """Give the loss weight 1 / c_out^2 that makes every noise level count alike. Karras et al. 2022, table 1."""
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def _denoise(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        c = self.factors(sigma)
        return c.skip * noisy + c.out * self.network(c.scale * noisy, c.noise.flatten())


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class GaussianDenoiser:
    """The exact posterior mean of a Gaussian prior, whose covariance is diagonal in an orthonormal basis.

    With v the variance of each real component of the coefficients, E[x | x + sigma n] = mean + B v / (v + sigma^2)
    B^H (noisy - mean), elementwise. A complex prior is circular: E[(x - m)(x - m)^H] = 2 B v B^H, because each real
    component has variance v.

    Parameters
    ----------
    mean
        Image (channel, y, x), or anything that broadcasts against images; its dtype is the prior's.
    variance
        Variance of each real component of the coefficients, broadcast against images.
    analysis, synthesis
        B^H and B, unitary maps from images to coefficients of the same shape and back: ``fft2c`` and ``ifft2c`` make
        a stationary prior. Pixels are the coefficients without them.
    """

    mean: Tensor
    variance: Tensor
    analysis: Callable[[Tensor], Tensor] = _unchanged
    synthesis: Callable[[Tensor], Tensor] = _unchanged

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor) -> "GaussianDenoiser":
        """Make the prior with any covariance between pixels.

        Parameters
        ----------
        mean
            Image (channel, y, x).
        covariance
            Symmetric or Hermitian (n, n), n = channel * y * x: E[(x - m)(x - m)^H] for real images and half of it for
            complex ones, so that its diagonal is the variance of each real component in both cases.
        """
        n = math.prod(mean.shape[-3:])
        if covariance.shape != (n, n):
            raise ValueError(f"covariance of images {tuple(mean.shape[-3:])} must be {(n, n)}, got {covariance.shape}")
        if covariance.is_complex() and not mean.is_complex():
            raise ValueError("a complex covariance needs a complex mean")
        variance, basis = torch.linalg.eigh(covariance)
        if bool(variance[0] < -1e-5 * variance[-1].abs()):
            raise ValueError("covariance has a negative eigenvalue")

        def analysis(image: Tensor) -> Tensor:
            return (image.flatten(-3) @ basis.to(image).conj()).reshape(image.shape)

        def synthesis(coefficients: Tensor) -> Tensor:
            return (coefficients.flatten(-3) @ basis.to(coefficients).mT).reshape(coefficients.shape)

        return cls(mean, variance.clamp_min(0).reshape(mean.shape[-3:]), analysis, synthesis)

    def _back(self, coefficients: Tensor, like: Tensor) -> Tensor:
        image = self.synthesis(coefficients)
        return image if like.is_complex() else image.real

    def denoise(self, noisy: Image, sigma: Sigma | float) -> Image:
        """Give E[x | noisy] exactly; ``sigma`` may vary between pixels where pixels are the coefficients."""
        levels = torch.as_tensor(sigma, device=noisy.device)
        if self.analysis is not _unchanged or 0 < levels.ndim < 3:
            levels = per_sample_sigma(levels, noisy)
        power = levels.square()
        variance = self.variance.to(noisy.device)
        # v / (v + sigma^2), and 0 where both vanish
        gain = variance / (variance + power).clamp_min(torch.finfo(variance.dtype).tiny)
        mean = self.mean.to(noisy.device)
        return mean + self._back(gain * self.analysis(noisy - mean), noisy)

    def sample(self, rng: Rng) -> Image:
        """Draw one image a generator from the prior: (len(rng), channel, y, x)."""
        shape = torch.broadcast_shapes(self.mean.shape[-3:], self.variance.shape[-3:])
        noise = normal_like(self.mean.new_zeros((len(rng), *shape)), rng)
        return self.mean + self._back(self.variance.sqrt() * self.analysis(noise), self.mean)
