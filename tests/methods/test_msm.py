from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.methods import load_method
from msmri.methods.msm import MSM, ImagePartial, aggregate
from msmri.model.denoiser import ComplexChannels, EpsilonVP, GaussianDenoiser, VPSchedule
from msmri.physics.masks import RandomLines
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.physics.solve import conjugate_gradient
from msmri.sampling.reverse import Step, reverse_diffusion
from msmri.sampling.schedule import ancestral, karras
from msmri.tensors import generators, normal_like


@dataclass(frozen=True)
class ExactPartial:
    """S E E[x | state on the mask] for pixels N(mean, variance) in each real component, noise by line."""

    mean: Tensor
    variance: float
    iterations: int = 60

    def image(self, state, mask, encoding, sigma):
        weight = torch.where(mask, 1 / sigma.square(), 0.0) * self.variance
        rest = torch.where(mask, state - encoding(self.mean.expand(len(state), *self.mean.shape[-3:])), 0)
        right = encoding.adjoint(weight * rest)

        def normal(x):
            return x + encoding.weighted_normal(x, weight)

        return self.mean + conjugate_gradient(normal, right, iterations=self.iterations, tolerance=1e-6)

    def __call__(self, state, mask, encoding, sigma):
        sigma = sigma.expand(*sigma.shape[:-1], state.shape[-1])
        return Subsample(mask)(encoding(self.image(state, mask, encoding, sigma)))


def normal(shape, seed=0):
    return normal_like(torch.zeros(1, *shape, dtype=torch.complex64), generators(seed, 1))


def columns(width, step=3, centre=2):
    mask = torch.zeros(1, 1, 1, width, dtype=torch.bool)
    mask[..., ::step] = True
    mask[..., width // 2 - centre // 2 : width // 2 + (centre + 1) // 2] = True
    return mask


def problem(encoding, *, shape=(6, 10), channels=1, variance=1.0, noise=0.1, step=3, seed=3):
    """A measurement of an image from the prior, the prior in scaled units, and the mean in the file's units."""
    mean = 0.5 * normal((channels, *shape), seed)
    image = mean + variance**0.5 * normal((channels, *shape), seed + 1)
    mask = columns(shape[1], step)
    full = encoding(image)
    values = Subsample(mask)(full + noise * normal(full.shape[1:], seed + 2))
    measurement = Measurement(values, mask, encoding, noise)
    scale = float(measurement.centre_scale())
    return measurement, ExactPartial(mean / scale, variance / scale**2), mean


def coils(shape=(6, 10), n=3, seed=1):
    maps = normal((1, n, *shape), seed)
    return CoilFourier(maps / maps.abs().square().sum(2, keepdim=True).sqrt())


def closed_form(measurement, mean, variance):
    """Posterior mean and standard deviation of each real component, by dense matrices."""
    n = mean.numel()
    unit = torch.eye(n, dtype=mean.dtype).reshape(n, *mean.shape[1:])
    matrix = measurement.operator(unit).flatten(1).mT.to(torch.complex128)
    power = measurement.noise_std**2
    covariance = torch.linalg.inv(matrix.mH @ matrix / power + torch.eye(n) / variance)
    right = matrix.mH @ measurement.values.flatten().to(torch.complex128) / power + mean.flatten() / variance
    return (covariance @ right).reshape(mean.shape[-2:]), covariance.diagonal().real.sqrt().reshape(mean.shape[-2:])


def spread(samples):
    """Standard deviation of each real component over samples."""
    return torch.view_as_real(samples).var(1).mean(-1).sqrt()


EXACT = {"acceleration": 1.0, "masks_per_step": 1, "steps": 100, "sigma_max": 20.0, "sigma_min": 0.003, "start": "noise"}
