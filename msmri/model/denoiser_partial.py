"""The paper's partial denoiser as a module to train, around any image denoiser that is one itself."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from msmri.tensors import KSpace, Mask, Sigma

if TYPE_CHECKING:
    from msmri.physics.operators import LinearOperator


class DenoiserPartial(nn.Module):
    """``D_S(z, sigma) = S E D(E^H S z, sigma)``, with D trained for it. Park et al. 2025.

    Parameters
    ----------
    denoiser
        A module with ``denoise(image, sigma)``, such as ``ImageDenoiser`` or ``EpsilonVP``; it sees nothing of the
        mask but that the image is aliased, or has holes.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, state: KSpace, mask: Mask, encoding: "LinearOperator", sigma: Sigma) -> KSpace:
        """Estimate the clean measurement on the mask, zero elsewhere; the network is told the highest noise on it."""
        nothing = torch.zeros((), dtype=state.dtype, device=state.device)
        highest = torch.where(mask, sigma, torch.zeros_like(sigma)).amax((-3, -2, -1), keepdim=True)
        image = self.denoiser(encoding.adjoint(torch.where(mask, state, nothing)), highest)
        return torch.where(mask, encoding(image), nothing)
