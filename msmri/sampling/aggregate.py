"""Partial denoisers, what a diffusion over measurements learns, and the mean of their estimates on several masks."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.physics.operators import CoilFourier, Composed, LinearOperator, Subsample
from msmri.sampling.reverse import Step
from msmri.tensors import KSpace, Mask, Rng, Sigma, normal_like

if TYPE_CHECKING:
    from msmri.model.denoiser import Denoiser


class PartialDenoiser(Protocol):
    """What MSM learns: an estimate of the clean measurement from a noisy part of it."""

    def __call__(self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma) -> KSpace:
        """Estimate E[clean measurement | state on the mask], on the mask and zero elsewhere.

        ``sigma`` is the std of each real component, (batch, 1, 1 or ky, 1 or kx). It may vary by line: measured lines
        carry the scanner's noise while those being generated carry the diffusion's. Outside the mask nothing is read.
        """
        ...


@dataclass(frozen=True)
class ImagePartial:
    """The partial denoiser around an image denoiser, ``D_S(z, sigma) = S E D(E^H S z, sigma)``. Park et al. 2025.

    What the published weights need. A network with one noise level is told the highest on the mask.
    """

    denoiser: "Denoiser"  # E[image | noisy image], such as EpsilonVP around the published network

    def __call__(self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma) -> KSpace:
        """Apply the equation above."""
        select = Subsample(mask)
        highest = torch.where(mask, sigma, torch.zeros_like(sigma)).amax((-3, -2, -1), keepdim=True)
        return select(encoding(self.denoiser.denoise(encoding.adjoint(select(state)), highest)))


def aggregate(
    partial: PartialDenoiser,
    step: Step,
    masks: Tensor,
    encoding: LinearOperator,
    sigma: Sigma,
    mode: Literal["parallel", "sequential"] = "parallel",
    *,
    rng: Rng | None = None,
    eta: float | Tensor = 1.0,
    repeated: LinearOperator | None = None,
    halves: Tensor | None = None,
    extrapolate: float = 0.0,
) -> KSpace:
    """Average partial estimates where their masks overlap: ``W sum_i S_i^T D_{S_i}(z)``. Park et al. 2025, Algorithm 1.

    W = 1 / max(sum_i S_i, 1). Places that no mask reached keep ``step.estimate``.

    Parameters
    ----------
    masks
        Bool (w, batch, 1, 1 or ky, kx).
    sigma
        Noise of ``step.state``, (batch or 1, 1, 1 or ky, 1 or kx).
    mode
        "parallel": all masks see the same state, as one batch of w times as many samples. "sequential": one after
        another, each noising what it estimated anew, to the same level, before the next looks at it, by the rule of
        :func:`reverse_diffusion` with ``rng`` and ``eta``; without ``rng``, or with eta = 0, both modes agree.
    eta
        Share of fresh noise; a tensor broadcast against the state may spare lines that are known.
    repeated
        ``encoding`` for w copies of the batch one after another, where the caller keeps it; made here without.
    halves
        Bool (2, w, batch, 1, 1 or ky, kx), the two halves of each mask; without them nothing is extrapolated.
    extrapolate
        g: how far an estimate is carried beyond the halves' own, see :func:`extrapolated`. Needs ``halves``.
    """
    w, batch = masks.shape[:2]
    sigma = sigma.expand(batch, *sigma.shape[-3:])
    if mode == "parallel":
        wide = take(encoding, torch.arange(batch).repeat(w)) if repeated is None else repeated
        state = step.state.repeat(w, 1, 1, 1)
        split = None if halves is None else halves.flatten(1, 2)
        estimates = extrapolated(
            partial, state, masks.flatten(0, 1), wide, sigma.repeat(w, 1, 1, 1), split, extrapolate
        )
        total = Subsample(masks)(estimates.reshape(w, *step.state.shape)).sum(0)
    else:
        state, total = step.state, torch.zeros_like(step.state)
        fresh = torch.as_tensor(eta, dtype=sigma.dtype, device=sigma.device)
        for i, mask in enumerate(masks):
            split = None if halves is None else halves[:, i]
            estimate = Subsample(mask)(extrapolated(partial, state, mask, encoding, sigma, split, extrapolate))
            total = total + estimate
            if i + 1 < w and rng is not None:
                kept = (1 - fresh.square()).sqrt() * (state - estimate)
                state = torch.where(mask, estimate + kept + fresh * sigma * normal_like(state, rng), state)
    count = masks.sum(0)
    return torch.where(count > 0, total / count.clamp_min(1), step.estimate)


def extrapolated(
    partial: PartialDenoiser,
    state: KSpace,
    mask: Mask,
    encoding: LinearOperator,
    sigma: Sigma,
    halves: Tensor | None,
    weight: float,
) -> KSpace:
    """Carry an estimate on beyond what it gains over those of the mask's halves: ``D_S + g (D_S - mean D_H)``.

    The mean of estimates that each saw a part of k-space takes for noise what only all parts together tell from it, so
    that samples are too narrow. How an estimate grows from half a mask to a whole one says where it goes on to. While
    evidence is weak it adds up line by line, and g = 2 (R - 1) gives the estimate from all lines; where it saturates
    less is right, and more draws too much. This project's own, not in the paper. With g = 0 or without halves, ``D_S``.

    Parameters
    ----------
    halves
        Bool (2, batch, 1, 1 or ky, kx); a place in both gets the mean of both estimates.
    weight
        g, by which the gain is weighted. With halves there are three network passes in place of one.
    """
    whole = partial(state, mask, encoding, sigma)
    if halves is None:
        return whole
    parts = [Subsample(half)(partial(state, half, encoding, sigma)) for half in halves]
    less = (parts[0] + parts[1]) / halves.sum(0).clamp_min(1)
    return Subsample(mask)(whole + weight * (whole - less))


def take(operator: LinearOperator, index: Tensor) -> LinearOperator:
    """Give the operator for the samples at ``index`` of its batch; one that all samples share stays as it is."""
    if isinstance(operator, Composed):
        return Composed(take(operator.outer, index), take(operator.inner, index))
    if isinstance(operator, CoilFourier):
        return replace(operator, maps=_rows(operator.maps, 5, index))
    if isinstance(operator, Subsample):
        return replace(operator, mask=_rows(operator.mask, 4, index))
    if operator.shared or bool((index == 0).all()):
        return operator
    raise InputError(f"msm cannot split a batch of {type(operator).__name__}", mend="give one slice at a time")


def _rows(values: Tensor, ndim: int, index: Tensor) -> Tensor:
    """Take rows of the first of ``ndim`` axes; one row that serves all stays one."""
    if values.ndim < ndim or values.shape[0] == 1:
        return values
    return values[index[:1]] if bool((index == index[0]).all()) else values[index.to(values.device)]
