"""The one sampling loop, in the variance-exploding view: state = clean + sigma * noise."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from msmri.tensors import Rng, normal_like


class Step(NamedTuple):
    """Where a reverse diffusion stands: all of its state."""

    state: Tensor  # (batch, ...), the clean signal plus noise of standard deviation sigma in each real component
    estimate: Tensor  # (batch, ...), the last estimate of the clean signal
    sigma: Tensor  # real scalar, the noise level of ``state``; 0 when finished


def reverse_diffusion(
    estimate: Callable[[Step], Tensor],
    start: Tensor,
    sigmas: Tensor,
    *,
    rng: Rng,
    eta: float | Tensor = 1.0,
    first_estimate: Tensor | None = None,
) -> Iterator[Step]:
    """Go down a ladder of noise levels and yield the step reached after each; the last ``estimate`` is the result.

    Each step estimates the clean signal and adds noise of the next level to it, a part of it fresh and the rest the
    noise that the state holds by that estimate. In the variance-exploding view of Song et al. 2021, eq. 12:
    ``next = estimate + sigma_next (eta n + sqrt(1 - eta^2) (state - estimate) / sigma)``.

    Parameters
    ----------
    estimate
        Gives the clean signal from where the loop stands. Plain diffusion: ``denoise(step.state, step.sigma)``. It may
        keep ``step.estimate`` wherever it has nothing new to say: the step then acts as one with the next.
    start
        State (batch, ...) at noise level ``sigmas[0]``.
    sigmas
        1-D, falling, all positive; 0 follows its last entry.
    rng
        One generator a sample.
    eta
        Share of fresh noise, 0 .. 1, a number or one a step (1-D). 0 is the deterministic sampler. A constant share,
        as in the released code of MSM, makes samples too narrow as steps become finer;
        :func:`msmri.sampling.schedule.ancestral` gives shares that do not.
    first_estimate
        Estimate before the first step; zero without one.

    Raises
    ------
    ValueError
        If the ladder does not fall to a positive level or eta is outside 0 .. 1.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    shares = torch.as_tensor(eta, dtype=torch.float64).expand(levels.shape)
    if levels.ndim != 1 or len(levels) == 0 or not bool((levels > 0).all()) or not bool((levels.diff() < 0).all()):
        raise ValueError("sigmas must be one falling ladder of positive noise levels, without the final 0")
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ValueError("eta must be within 0 .. 1")
    ladder = [*levels.tolist(), 0.0]
    step = Step(
        start, torch.zeros_like(start) if first_estimate is None else first_estimate, start.real.new_tensor(ladder[0])
    )
    for sigma, following, share in zip(ladder[:-1], ladder[1:], shares.tolist(), strict=True):
        clean = estimate(step)
        state = clean
        if following > 0:
            kept = following * (1 - share**2) ** 0.5 / sigma
            if kept > 0:
                state = state + kept * (step.state - clean)
            if share > 0:
                state = state + following * share * normal_like(clean, rng)
        step = Step(state, clean, start.real.new_tensor(following))
        yield step
