"""The training losses of MSM for noisy measurements of known noise level: only noisy, undersampled k-space enters them.

``y = s + rho n`` is what was measured on a slice's own mask, with n standard normal in each real component and s the
clean k-space that no loss sees. Where the diffusion's noise is larger than the measurement's, what is missing is added
and the regression of y, which is all there is, is turned into one of s by Tweedie's formula; that is exact.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.methods.msm_training import LinewiseMSM
from msmri.model.denoiser import VPSchedule
from msmri.physics.operators import LinearOperator, Subsample
from msmri.tensors import KSpace, Mask, Rng, Sigma, normal_like, spawn


def noise_level(batch: Measurement, *, given: float | None = None, least: float = 0.0) -> Sigma:
    """Give the std (b, 1, 1, 1) of each real component's noise: the measurement's own, or ``given``, at ``least``."""
    level = torch.as_tensor(batch.noise_std if given is None else given, dtype=batch.values.real.dtype)
    return level.to(batch.values.device).clamp_min(least).reshape(-1, 1, 1, 1).expand(len(batch.values), 1, 1, 1)


def measured_components(mask: Mask, values: KSpace) -> Tensor:
    """Count the real components (b,) measured of each slice: two for a complex entry, one for a real one."""
    places = mask.expand_as(values.real).flatten(1).sum(1)
    return places * (2 if values.is_complex() else 1)


def sure(
    model: nn.Module,
    values: KSpace,
    mask: Mask,
    encoding: LinearOperator,
    rho: Sigma,
    rng: Rng,
    *,
    step: float = 0.005,
) -> tuple[KSpace, Tensor]:
    """Estimate clean measurements from noisy ones, and the error of that without knowing them.

    Stein's unbiased risk estimate of the partial denoiser ``s_hat`` at level rho, with the divergence by a finite
    difference along one random direction b (Stein 1981; Ramani et al. 2008):
    ``|s_hat - y|^2 / m - rho^2 + (2 rho^2 / (step m)) <b, s_hat(y + step b) - s_hat(y)>``, m being the number of
    measured real components, and b standard normal in each of them.

    Parameters
    ----------
    values
        Noisy k-space y, zero outside the mask.
    rho
        Std of the noise of each real component, (b, 1, 1, 1).
    rng
        One generator a slice.
    step
        Length of the difference, in the units of ``values``.

    Returns
    -------
    estimate
        ``s_hat``, (b, coil, ky, kx), zero outside the mask.
    risk
        (b,): its expectation over noise and b is the mean squared error a measured real component, but for terms of
        the order of ``step``; single values may be negative.
    """
    select = Subsample(mask)
    probe = select(normal_like(values, rng))
    estimate = select(model(values, mask, encoding, rho))
    moved = select(model(values + step * probe, mask, encoding, rho))
    count = measured_components(mask, values)
    misfit = (estimate - values).abs().square().flatten(1).sum(1) / count
    divergence = (probe.conj() * (moved - estimate)).real.flatten(1).sum(1) / (step * count)
    power = rho.flatten().square()
    return estimate, misfit - power + 2 * power * divergence


@dataclass(frozen=True)
class NoisyMSM:
    """The paper's loss with measurement noise rho: residual noise above rho, a pseudo-clean reference below, and SURE.

    Park et al. 2025, the section on noisy measurements, written for sigma, the noise in each real component. With
    weight 1 / sigma^2, as a mean over the measured real components:

    1. sigma > rho: the network sees ``s_t = y + sqrt(sigma^2 - rho^2) n`` and gives D. The rest of y's own noise in s_t
       is ``rho^2 / sigma^2 (s_t - E[s | s_t])``, so y is regressed on ``D + (rho / sigma)^2 (s_t - D)``.
    2. sigma <= rho: no such s_t can be made from y. The network's own estimate at level rho, the pseudo-clean reference
       ``s_hat = D_S(y, rho)``, stands for s: ``s_hat + sigma n`` is denoised to s_hat.
    3. Always: ``sure_weight`` times :func:`sure` at level rho, which makes s_hat the best estimate there is.

    1 and 3 are exact: their minimiser is E[s | s_t]. 2 is not: references are posterior means, whose spread is less
    than that of s, and what is learned is the denoiser of *their* distribution. On a Gaussian prior of variance v it is
    that of variance v^2 / (v + rho^2): what is well above the noise is learned rightly, what is below it is smoothed
    away. If gradients flow through s_hat (``stop_gradient`` false, the released code), 2 is also lowered by references
    that are all alike, and s_hat is no longer the best estimate: with weights of its own for every level, its gain
    v / (v + rho^2) is multiplied by ``sure_weight / (sure_weight + (1 - g)^2)``, g being the gain at sigma.

    Every slice has a sigma, a rho and so a case of its own. The loop tells a loss nothing of the step, and a loss that
    counted its calls would break exact resumption: warming up without 2 and 3, whose reference is worthless at first,
    is therefore a run of its own with ``warm_up``, from whose weights the next one starts (``start`` in its recipe).
    """

    sigma_min: float = 0.01  # smallest sigma, in units of the scaled image
    sigma_max: float = 157.0  # largest sigma, the end of the linear-beta ladder
    sigma_mean: float | None = None  # of log sigma; None: uniform in the step of the ladder
    sigma_spread: float = 1.2  # standard deviation of log sigma
    noise_std: float | None = None  # rho of every slice, in units of the scaled image; None: the measurement's own
    least_noise: float = 1e-3  # floor of rho
    sure_weight: float = 0.05  # of the SURE term
    sure_step: float = 0.005  # length of its finite difference, in units of the scaled image
    stop_gradient: bool = True  # the reference of case 2 is data; False: gradients flow through it, as released
    warm_up: bool = False  # case 1 alone, the first stage: sigma is drawn above rho, and there is no SURE

    def __post_init__(self) -> None:
        positive = (self.sure_step, self.least_noise, self.sigma_spread)
        if not 0 < self.sigma_min <= self.sigma_max or not all(value > 0 for value in positive):
            mend = "give 0 < sigma_min <= sigma_max, and positive sure_step, least_noise and sigma_spread"
            raise InputError(f"noisy msm: no such {self}", mend=mend)

    def draw_sigma(self, rho: Sigma, rng: Rng) -> Sigma:
        """Draw noise levels like ``rho`` (b, 1, 1, 1), uniform in the step of the variance-preserving ladder.

        With ``sigma_mean`` they are log-normal (Karras et al. 2022), cut off at ``sigma_min`` and ``sigma_max``. In
        ``warm_up`` none is below rho.
        """
        ladder = VPSchedule()
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64)
        least = torch.maximum(ends[0], rho.double().cpu()) if self.warm_up else ends[0]
        share = torch.stack([torch.rand((1, 1, 1), generator=generator, dtype=torch.float64) for generator in rng])
        if self.sigma_mean is None:
            low, high = ladder.t(least), ladder.t(ends[1])
            return ladder.sigma(low + (high - low).clamp_min(0) * share).to(rho)
        low, high = ((end.log() - self.sigma_mean) / self.sigma_spread for end in (least, ends[1]))
        low, high = torch.special.ndtr(low), torch.special.ndtr(high)
        drawn = torch.special.ndtri(low + (high - low).clamp_min(0) * share)
        sigma = (self.sigma_mean + self.sigma_spread * drawn).exp()
        return torch.minimum(torch.maximum(sigma, least), ends[1]).to(rho)

    def __call__(self, model: nn.Module, batch: Measurement, rng: Generator) -> Tensor:
        """Return the loss; ``model`` is a partial denoiser, called three times (once in ``warm_up``)."""
        if batch.encoding is None:
            raise InputError("this loss needs coil maps", mend="estimate them first (ESPIRiT)")
        mask, encoding, streams = batch.mask, batch.encoding, spawn(rng, len(batch.values))
        select = Subsample(mask)
        values = select(batch.values)
        rho = noise_level(batch, given=self.noise_std, least=self.least_noise)
        sigma = self.draw_sigma(rho, streams)
        if self.warm_up:
            sigma = torch.maximum(sigma, rho)
            reference, risk = values, torch.zeros_like(rho.flatten())
        else:
            reference, risk = sure(model, values, mask, encoding, rho, streams, step=self.sure_step)
        if self.stop_gradient:
            reference = reference.detach()
        above = (sigma > rho) | self.warm_up
        residual = (sigma.square() - rho.square()).clamp_min(0).sqrt()
        noise = normal_like(values, streams)
        state = select(torch.where(above, values + residual * noise, reference + sigma * noise))
        clean = model(state, mask, encoding, sigma)
        # of the noise in the state, the share that the target has too
        shared = torch.where(above, (rho / sigma).square(), 0.0)
        error = select(torch.where(above, values, reference) - clean - shared * (state - clean))
        squared = error.abs().square().flatten(1).sum(1) / measured_components(mask, values)
        return ((squared + self.sure_weight * risk) / sigma.flatten().square()).mean()


@dataclass(frozen=True)
class NoisyLinewiseMSM(LinewiseMSM):
    """Conditional partial scores from noisy lines, exactly: case 1 of :class:`NoisyMSM` on the hidden lines.

    :class:`LinewiseMSM` takes the measured lines for clean ones: a hidden line carries rho and sigma, and its target
    rho. At large sigma that is harmless, because nothing that the network sees tells the noise of its target; at sigma
    near rho the network learns to keep the noise. Here a hidden line gets ``sqrt(sigma^2 - rho^2)`` only, so that its
    noise is sigma, and the target is regressed on ``D + (rho / sigma)^2 (state - D)``. The observed lines have level
    rho. The minimiser is E[hidden lines | noisy hidden lines, observed lines with their noise] for every sigma >= rho,
    without a reference and in one pass of the network.

    Sigma is never below rho, and below it nothing is learned. There the network only carries on from what it learned at
    rho; a model that keeps data by itself (``MeasurementPartial``) still tends to the state as sigma falls to 0. A
    sampler should end its ladder at rho in scaled units (``MSM.sigma_min``): its last estimate is then the conditional
    mean given lines of noise rho, which has the same mean over samples, and less spread than the posterior.
    """

    noise_std: float | None = None  # rho of every slice, in units of the scaled image; None: the measurement's own

    def __call__(self, model: nn.Module, batch: Measurement, rng: Generator) -> Tensor:
        """Return the squared error on the diffused lines over its expectation."""
        values, mask = batch.values, batch.mask
        n, device = len(values), values.device
        rho = noise_level(batch, given=self.noise_std, least=self.least_noise)
        hidden = self.hide(mask, n, rng)
        sigma = torch.maximum(self.draw_sigma(n, rng, least=rho.cpu()).to(rho), rho)
        residual = (sigma.square() - rho.square()).sqrt()
        shared = (rho / sigma).square()  # of the noise in the state, the share that the target has too
        noise = residual * normal_like(values, spawn(rng, n))
        nothing = torch.zeros((), dtype=values.dtype, device=device)
        state = torch.where(mask, values + torch.where(hidden, noise, nothing), nothing)
        clean = model(state, mask, batch.encoding, torch.where(hidden, sigma, rho))
        error = torch.where(hidden & mask, clean + shared * (state - clean) - values, nothing)
        with torch.no_grad():  # a weight, not a target: the power of this scan's measured lines, ring by ring
            prior = cast(Any, model).scan_variance(values, mask, rho)
        # of a perfect estimate: what it leaves of the signal, over all coils, and the target's own noise
        left = (1 - shared).square() * prior * sigma.square() / (prior + sigma.square())
        signal = torch.where(hidden & mask, left, 0.0).flatten(1).sum(1)
        own = torch.where(hidden & mask, (1 - shared) * rho.square(), 0.0).expand_as(state.real).flatten(1).sum(1)
        loss = error.abs().square().flatten(1).sum(1) / 2 / (signal + own).clamp_min(1e-9)
        return (loss + 1e-4).log().mean() if self.logarithm else loss.mean()
