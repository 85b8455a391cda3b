"""Diffusion from corrupted images by the generalised SURE: a denoiser of whole images that sees what was measured."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.model.denoiser import log_normal_sigma
from msmri.physics.operators import Identity, Subsample
from msmri.tensors import normal_like, spawn


@dataclass(frozen=True)
class GSURELoss:
    """The ensemble generalised SURE of a denoiser that is never told what was lost.

    Kawar et al. 2023, for images measured place by place: ``y = P (x + rho z)``, with P the places of an image that
    were measured, the image's own and drawn anew for every image, and z standard normal. The network sees
    ``u = y + e``, where e fills the noise up to sigma: ``sqrt(sigma^2 - rho^2)`` on measured places, sigma alone where
    there is nothing. It is asked for the measured places only, and

        lambda(sigma) ( |P (D(u, sigma) - y)|^2 + 2 rho^2 div_u P D(u, sigma) - rho^2 m ) / m

    with m measured real components has the mean ``lambda |P (D(u, sigma) - x)|^2 / m`` over the noise, without x. The
    divergence is a finite difference along one random direction (Stein 1981; Ramani et al. 2008); without noise it is
    not needed. Written for sigma, the noise in each real component, in place of a variance-preserving ladder.

    What is learned is E[x | u] of images with holes full of noise, on their measured places; drawing and restoring then
    show D images without holes, which it never saw, and nothing here makes sure that it is as good on those. Every
    place has to be as likely to be measured as any other; else errors should be weighted by the inverse of that, which
    is not done here.
    """

    sigma_mean: float = -1.2  # of log sigma
    sigma_spread: float = 1.2  # standard deviation of log sigma
    sigma_min: float = 0.002  # lower levels are raised to this one, and to rho
    noise_std: float | None = None  # rho of every image, in units of the scaled image; None: the measurement's own
    step: float = 0.005  # length of the finite difference, in units of the scaled image

    def __post_init__(self) -> None:
        if not (self.sigma_spread > 0 and self.sigma_min > 0 and self.step > 0) or (self.noise_std or 0) < 0:
            mend = "give positive sigma_spread, sigma_min and step, and noise_std of 0 or more"
            raise InputError(f"gsure: no such {self}", mend=mend)

    def __call__(self, model: nn.Module, batch: Measurement, rng: Generator) -> Tensor:
        """Return the weighted risk per measured real component; ``model`` is an ``ImageDenoiser`` or acts as one.

        Raises
        ------
        InputError
            If what is measured is not the image itself: holes in k-space are no places of an image.
        """
        if not isinstance(batch.encoding, Identity):
            raise InputError("this loss needs images measured place by place", mend="give no coils and no k-space")
        select = Subsample(batch.mask)
        values = select(batch.values)
        n = len(values)
        level = batch.noise_std if self.noise_std is None else self.noise_std
        rho = torch.as_tensor(level, dtype=values.real.dtype, device=values.device).reshape(-1, 1, 1, 1)
        drawn = log_normal_sigma(n, self.sigma_mean, self.sigma_spread, self.sigma_min, rng).to(values.device)
        sigma = torch.maximum(drawn, rho)
        missing = torch.where(batch.mask, (sigma.square() - rho.square()).clamp_min(0).sqrt(), sigma)
        state = values + missing * normal_like(values, spawn(rng, n))
        estimate = model(state, sigma)
        count = select(torch.ones_like(values)).real.flatten(1).sum(1) * (2 if values.is_complex() else 1)
        risk = select(estimate - values).abs().square().flatten(1).sum(1)
        if bool((rho > 0).any()):
            probe = select(normal_like(values, spawn(rng, n)))
            moved = model(state + self.step * probe, sigma) - estimate
            divergence = (probe.conj() * moved).real.flatten(1).sum(1) / self.step
            power = rho.square().expand(n, 1, 1, 1).flatten()
            risk = risk + power * (2 * divergence - count)
        return (cast(Any, model).weight(sigma).flatten() * risk / count.clamp_min(1)).mean()
