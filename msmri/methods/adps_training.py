"""The training losses of A-DPS, from undersampled measurements alone, and of its oracle, from fully sampled ones."""

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Generator, Tensor, nn

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.model.ambient import FurtherLines, FurtherMask
from msmri.model.denoiser import log_normal_sigma
from msmri.physics.masks import slice_seed
from msmri.physics.operators import Subsample
from msmri.tensors import Mask, Rng, normal_like, spawn


@dataclass(frozen=True)
class AmbientLoss:
    """Ambient diffusion: hide more of what was measured, add noise, ask for all that was measured.

    Daras et al. 2023 in principle, Aali et al. 2024 for MRI: with s the measured k-space on its own mask P, A = P E, P~
    a part of P and A~ = P~ E, the network sees ``u = A~^H (P~ s + A~ sigma n)``, which is A~^H A~ (x + sigma n) made
    of measured data only, and the loss is ``lambda(sigma) ||A^H (A h(u, P~, sigma) - s)||^2``. As every line of P has a
    chance to be outside P~, the best h is E[x | u, P~]. With "edm" the loss is divided by the real components of the
    image and by the share of k-space in P; the original is the sum over the image. With "relative" it is divided by
    what the estimate without the network would cost, ``h = c_skip u``: one number for the thousands of places of a
    slice, which leaves the best estimate of each its conditional mean but for terms of the order of one over their
    number.
    """

    further: FurtherMask = field(default_factory=FurtherLines)  # the law of P~ given P
    redraw: bool = True  # a new P~ in every step; False, the original: one P~ a slice for ever, by the slice's name.
    # P is the data's own and is never drawn. Few slices and one mask each would leave the network little to learn from
    error: Literal["normal", "kspace"] = "normal"  # the norm of A^H (A h - s) as published, or that of A h - s
    weighting: Literal["edm", "relative"] = "edm"  # lambda = 1 / c_out^2 as published, or the inverse of the error of
    # h = c_skip u, known beforehand: every slice and noise level then counts alike
    sigma_mean: float = -1.2  # of log sigma
    sigma_spread: float = 1.2  # standard deviation of log sigma
    sigma_min: float = 0.01  # lower levels, less than 1 in 400, are raised to this one (not in the original)

    def __post_init__(self) -> None:
        if self.error not in ("normal", "kspace"):
            raise InputError(f"ambient loss: unknown error '{self.error}'", mend="'normal' or 'kspace'")
        if self.weighting not in ("edm", "relative"):
            raise InputError(f"ambient loss: unknown weighting '{self.weighting}'", mend="'edm' or 'relative'")

    def further_masks(self, batch: Measurement, rng: Rng) -> Mask:
        """Draw P~ (b, 1, 1 or ky, kx), one generator a slice; by the slices' names where it is fixed."""
        if not self.redraw:
            if len(batch.source) != len(batch.values):
                raise InputError("masks that stay need the names of the slices", mend="set redraw: true")
            rng = [torch.Generator().manual_seed(slice_seed(name, 0)) for name in batch.source]
        masks = batch.mask.expand(len(batch.values), *batch.mask.shape[1:])
        return torch.stack([self.further(mask, generator) for mask, generator in zip(masks, rng, strict=True)])

    def __call__(self, model: nn.Module, batch: Measurement, rng: Generator) -> Tensor:
        """Return the weighted squared error; ``model`` is an ``AmbientDenoiser`` or has its call and its weight."""
        if batch.encoding is None:
            raise InputError("this loss needs coil maps", mend="estimate them first (ESPIRiT)")
        n, encoding, measured = len(batch.values), batch.encoding, Subsample(batch.mask)
        values = measured(batch.values)
        shown = Subsample(self.further_masks(batch, spawn(rng, n)))
        sigma = log_normal_sigma(n, self.sigma_mean, self.sigma_spread, self.sigma_min, rng).to(values.device)
        noise = sigma * normal_like(encoding.adjoint(torch.zeros_like(values)), spawn(rng, n))
        aliased = encoding.adjoint(shown(values + encoding(noise)))

        def squared_error(image: Tensor) -> Tensor:
            error = measured(encoding(image)) - values
            if self.error == "normal":
                error = encoding.adjoint(error)
            return error.abs().square().flatten(1).sum(1)

        squared = squared_error(model(aliased, shown.mask, sigma, encoding))
        if self.weighting == "relative":
            with torch.no_grad():
                idle = squared_error(cast(Any, model).idle(aliased, shown.mask, sigma, encoding))
            return (squared / idle.clamp_min(torch.finfo(idle.dtype).tiny)).mean()
        components = noise[0].numel() * (2 if noise.is_complex() else 1)
        count = components * batch.mask.float().mean((-3, -2, -1)).clamp_min(1e-6)
        return (cast(Any, model).weight(sigma).flatten() * squared / count).mean()


def _has_gaps(mask: Mask) -> bool:
    """Tell whether some row or column of a mask is more than one block."""
    return any(
        bool((torch.nn.functional.pad(lines.int(), (1, 1)).diff(dim=-1).abs().sum(-1) > 2).any())
        for lines in (mask, mask.mT, mask.any(-2))
    )


@dataclass(frozen=True)
class CleanLoss:
    """Denoising of clean images, the oracle's: ``lambda(sigma) ||D(x + sigma n, sigma) - x||^2``. Karras et al. 2022.

    The clean image is ``E^H s`` of fully sampled k-space, whose margins may be empty.
    """

    sigma_mean: float = -1.2  # of log sigma
    sigma_spread: float = 1.2  # standard deviation of log sigma
    sigma_min: float = 0.002  # lower levels are raised to this one

    def __call__(self, model: nn.Module, batch: Measurement, rng: Generator) -> Tensor:
        """Return the weighted squared error per real component; ``model`` is an ``ImageDenoiser``.

        Raises
        ------
        InputError
            If a slice is undersampled, or has no coil maps.
        """
        where = batch.source[0] if batch.source else None
        if batch.encoding is None:
            raise InputError("this loss needs coil maps", mend="estimate them first (ESPIRiT)", path=where)
        if _has_gaps(batch.mask):
            raise InputError("the oracle learns from fully sampled scans", mend="give some", path=where)
        clean = batch.encoding.adjoint(batch.values)
        n = len(clean)
        sigma = log_normal_sigma(n, self.sigma_mean, self.sigma_spread, self.sigma_min, rng).to(clean.device)
        noisy = clean + sigma * normal_like(clean, spawn(rng, n))
        squared = (model(noisy, sigma) - clean).abs().square().flatten(1).mean(1) / (2 if clean.is_complex() else 1)
        return (cast(Any, model).weight(sigma).flatten() * squared).mean()
