"""Diffusion posterior sampling: steps down the probability flow, pulled towards the data."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from msmri.physics.operators import LinearOperator
from msmri.sampling.reverse import Step
from msmri.tensors import Image


def guided_euler(
    denoise: Callable[[Image, float], Image],
    values: Tensor,
    operator: LinearOperator,
    start: Image,
    sigmas: Tensor,
    *,
    step: float,
    at: Literal["estimate", "state"] = "estimate",
) -> Iterator[Step]:
    """Go down the probability flow by Euler steps, each pulled towards the data. Chung et al. 2023; Aali et al. 2024.

    ``next = x + (sigma_next - sigma) (x - x0) / sigma - step grad_x r^2 / r``, x0 the estimate at x and r the norm
    ``||y - A x0||`` of each sample's residual. The pull is 2 ``step`` long at most, whatever the noise
    level, where neither A nor the network amplifies.

    Parameters
    ----------
    at
        Where the residual is taken: at the estimate, with the gradient going back through the network (DPS), or at the
        noisy image itself, ``||y - A x||``, without (annealed Langevin dynamics of Jalal et al. 2021).
    """
    state = start
    for sigma, following in pairwise([*sigmas.tolist(), 0.0]):
        if at == "estimate":
            with torch.enable_grad():
                leaf = state.detach().requires_grad_()
                clean = denoise(leaf, sigma)
                rest = values - operator(clean)
                (gradient,) = torch.autograd.grad(rest.abs().square().sum(), leaf)
        else:
            with torch.no_grad():
                clean, rest = denoise(state, sigma), values - operator(state)
                gradient = -2 * operator.adjoint(rest)
        clean, norm = clean.detach(), torch.linalg.vector_norm(rest.detach(), dim=(-3, -2, -1), keepdim=True)
        pull = step * gradient / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        state = state + (following - sigma) * (state - clean) / sigma - pull
        yield Step(state, clean, state.real.new_tensor(following))
