"""The training losses of MSM: only measured k-space enters them."""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Generator, Tensor, nn

from msmri.measurement import Measurement
from msmri.model.denoiser import VPSchedule, log_normal_sigma
from msmri.tensors import Mask, Sigma, normal_like, spawn


class Loss(Protocol):
    """What a method asks of the training loop."""

    def __call__(self, model: nn.Module, batch: Measurement, rng: Generator) -> Tensor:
        """Return a scalar loss; every random draw comes from ``rng``."""


@dataclass(frozen=True)
class NoiselessMSM:
    """The paper's loss without measurement noise: w(t) || s - S E x0 ||^2 on the slice's own mask.

    Park et al. 2025, eq. for rho = 0: all measured lines s are diffused to s + sigma n and predicted by the partial
    denoiser; w = 1 / sigma^2. Sigma is drawn from the variance-preserving ladder, uniformly in its step, which seldom
    is low noise; with ``sigma_mean`` it is log-normal (Karras et al. 2022).
    """

    sigma_min: float = 0.01  # smallest sigma, in units of the scaled image
    sigma_max: float = 157.0  # largest sigma, the end of the linear-beta ladder
    sigma_mean: float | None = None  # of log sigma; None: the ladder
    sigma_spread: float = 1.2  # standard deviation of log sigma

    def draw_sigma(self, n: int, rng: Generator) -> Sigma:
        """Draw noise levels (n, 1, 1, 1) between ``sigma_min`` and ``sigma_max``."""
        if self.sigma_mean is None:
            ladder = VPSchedule()
            low, high = ladder.t(self.sigma_min), ladder.t(self.sigma_max)
            return ladder.sigma(low + (high - low) * torch.rand(n, generator=rng)).reshape(-1, 1, 1, 1)
        drawn = log_normal_sigma(n, self.sigma_mean, self.sigma_spread, self.sigma_min, rng)
        return drawn.clamp_max(self.sigma_max)

    def __call__(self, model: nn.Module, batch: Measurement, rng: Generator) -> Tensor:
        """Return the weighted squared error per measured real component."""
        n = len(batch.values)
        sigma = self.draw_sigma(n, rng).to(batch.values.device)
        state = batch.values + sigma * normal_like(batch.values, spawn(rng, n))
        state = torch.where(batch.mask, state, torch.zeros((), dtype=state.dtype, device=state.device))
        error = torch.where(batch.mask, model(state, batch.mask, batch.encoding, sigma) - batch.values, 0)
        count = batch.mask.expand_as(error.real).flatten(1).sum(1) * (2 if error.is_complex() else 1)
        return (error.abs().square().flatten(1).sum(1) / count / sigma.flatten().square()).mean()


@dataclass(frozen=True)
class LinewiseMSM:
    """Conditional partial scores: some measured lines stay as they are, the others are diffused and predicted.

    Of the lines of a slice's own mask a random part is called observed and keeps the scanner's noise; the rest carries
    diffusion noise sigma, and the loss asks only for them. The network so learns E[unknown lines | noisy unknown
    lines, clean known lines], the conditional score that posterior sampling needs, from R-fold undersampled data alone.
    At large sigma this is self-supervision by data splitting (Yaman et al. 2020), at small sigma denoising.
    Every item is weighted by the inverse of its expected error under the stationary Gaussian prior, known beforehand;
    with ``logarithm``, by that of its own present error: the mean logarithm of the error, which is what PSNR measures.
    Without it, slices far easier than a Gaussian prior expects would hardly count. The weight is one number for the
    thousands of hidden places of a slice, which leaves the best estimate of each its conditional mean but for terms of
    the order of one over their number.
    """

    hidden_min: float = 0.05  # smallest share of the outer lines that is diffused
    hidden_max: float = 0.6  # largest
    everything: float = 0.1  # share of items in which all lines are diffused, the centre too, as for generation
    blind: float = 0.4  # share of items at the largest sigma: the one-step estimate from the observed lines
    sigma_min: float = 0.005  # in units of the scaled image
    sigma_max: float = 10.0  # the largest, at which a line says nothing
    least_noise: float = 1e-3  # floor of the scanner noise level
    logarithm: bool = False  # the logarithm of every item's error

    def hide(self, mask: Mask, n: int, rng: Generator) -> Mask:
        """Draw the lines (n, 1, 1, kx) of ``mask`` that are diffused."""
        lines = mask.any(-2, keepdim=True)  # (b, 1, 1, kx)
        width = lines.shape[-1]
        centre = torch.zeros(width, dtype=torch.bool)
        n_centre = max(4, round(width * 20 / 256))
        centre[width // 2 - n_centre // 2 : width // 2 - n_centre // 2 + n_centre] = True
        share = self.hidden_min + (self.hidden_max - self.hidden_min) * torch.rand(n, 1, 1, 1, generator=rng)
        hidden = (torch.rand(n, 1, 1, width, generator=rng) < share) & ~centre
        hidden |= torch.rand(n, 1, 1, 1, generator=rng) < self.everything
        return hidden.to(mask.device) & lines

    def draw_sigma(self, n: int, rng: Generator, *, least: Tensor | float = 0.0) -> Tensor:
        """Draw the noise level (n, 1, 1, 1) of the diffused lines, on the CPU; ``least`` raises the smallest."""
        low, high = torch.tensor(self.sigma_min).clamp_min(least).log(), torch.tensor(self.sigma_max).log()
        sigma = (low + torch.rand(n, 1, 1, 1, generator=rng) * (high - low)).exp()
        return torch.where(torch.rand(n, 1, 1, 1, generator=rng) < self.blind, high.exp(), sigma)

    def __call__(self, model: nn.Module, batch: Measurement, rng: Generator) -> Tensor:
        """Return the squared error on the diffused lines over its expectation."""
        values, mask = batch.values, batch.mask
        n, device = len(values), values.device
        hidden = self.hide(mask, n, rng)
        sigma = self.draw_sigma(n, rng).to(device)
        scanner = torch.as_tensor(batch.noise_std, device=device).clamp_min(self.least_noise).expand(n, 1, 1, 1)
        noise = sigma * normal_like(values, spawn(rng, n))
        nothing = torch.zeros((), dtype=values.dtype, device=device)
        state = torch.where(mask, values + torch.where(hidden, noise, nothing), nothing)
        line_sigma = torch.where(hidden, sigma, scanner)
        error = torch.where(hidden & mask, model(state, mask, batch.encoding, line_sigma) - values, nothing)
        with torch.no_grad():  # a weight, not a target: the power of this scan's measured lines, ring by ring
            prior = cast(Any, model).scan_variance(values, mask, scanner)
        expected = prior * sigma.square() / (prior + sigma.square())
        # energy is shared among the coils: the expectation is that of the sum over coils
        expected = torch.where(hidden & mask, expected, 0.0).flatten(1).sum(1)
        floor = torch.where(hidden & mask, scanner.square(), 0.0).expand_as(state.real).flatten(1).sum(1)
        loss = error.abs().square().flatten(1).sum(1) / 2 / (expected + floor).clamp_min(1e-9)
        return (loss + 1e-4).log().mean() if self.logarithm else loss.mean()
