"""The measurement-domain partial denoiser: a Wiener estimate through the coils, what a network adds, data consistency."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from msmri.model.denoiser import ComplexChannels
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.operators import LinearOperator
from msmri.physics.solve import conjugate_gradient
from msmri.tensors import Image, KSpace, Mask, Sigma


def radial_frequency(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Give the distance from the centre of k-space (ky, kx) in units of the Nyquist frequency of each axis, 0..1.41."""
    axes = [(torch.arange(n, device=device) - n // 2) / (n / 2) for n in shape]
    return (axes[0][:, None] ** 2 + axes[1][None, :] ** 2).sqrt()


class MeasurementPartial(nn.Module):
    """Estimate the clean measurement on a mask from a noisy one, with a noise level for every line.

    Three steps, each acting where its knowledge is. (1) The exact posterior mean for a stationary Gaussian prior of
    the learned power spectrum, given coils, mask and the noise of every line: ``x0``, by conjugate gradients in the
    whitened image. (2) A network adds what is not Gaussian: ``x1 = x0 + c_out F(x0)``. (3) Data consistency,
    ``argmin_x sum_k |E x - s|^2 / sigma_k^2 + |x - x1|^2 / tau^2``, by a few more conjugate gradients.
    ``D_S = S E x`` then tends to ``s`` as sigma falls, even where many coils make ``A A^H s`` differ from ``s``.

    Lines may carry different noise: those already measured the scanner's, those being generated the diffusion's.
    At infinite noise a line says nothing, and the result is the estimate from the other lines.

    Parameters
    ----------
    network
        Backbone: (b, 2, y, x) real and a condition (b, 4) to (b, 2, y, x).
    spectrum
        Variance of each real component of image k-space (coils combined) on a uniform grid of radial frequency
        0..1.5, measured on the training data, in scaled units.
    wiener_iterations, consistency_iterations
        Conjugate-gradient steps of (1) and (3).
    """

    spectrum: Tensor

    def __init__(
        self,
        network: nn.Module,
        spectrum: Tensor | None = None,
        *,
        wiener_iterations: int = 10,
        consistency_iterations: int = 6,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.network = ComplexChannels(network)
        self.register_buffer("spectrum", torch.ones(48) if spectrum is None else spectrum.float().clone())
        self.wiener_iterations = wiener_iterations
        self.consistency_iterations = consistency_iterations
        self.bfloat16 = bfloat16
        self.log_tau = nn.Parameter(torch.tensor([-1.0, 0.0]))

    def prior_variance(self, shape: tuple[int, int]) -> Tensor:
        """Interpolate the power spectrum on a k-space grid (ky, kx)."""
        position = radial_frequency(shape, self.spectrum.device) / 1.5 * (len(self.spectrum) - 1)
        low = position.floor().long().clamp(max=len(self.spectrum) - 2)
        log = self.spectrum.log()
        return (log[low] + (position - low) * (log[low + 1] - log[low])).exp()

    def uncertainty(self, mask: Mask, sigma: Sigma) -> Tensor:
        """Expected error (b, 1, 1, 1) per real component if each place were estimated alone: the network's scale."""
        prior = self.prior_variance((mask.shape[-2] if mask.shape[-2] > 1 else self._height, mask.shape[-1]))
        noise = sigma.square()
        known = prior * noise / (prior + noise)
        return torch.where(mask, known, prior.expand_as(known)).mean((-2, -1), keepdim=True).sqrt()

    def wiener(self, state: KSpace, weight: Tensor, encoding: LinearOperator) -> Image:
        """Posterior mean of the image under the stationary Gaussian prior, ``weight`` being 1 / sigma^2 on the mask."""
        amplitude = self.prior_variance((state.shape[-2], state.shape[-1])).sqrt()

        def whitened_normal(z: Tensor) -> Tensor:
            image = ifft2c(amplitude * z)
            return z + amplitude * fft2c(encoding.weighted_normal(image, weight))

        right = amplitude * fft2c(encoding.adjoint(weight * state))
        return ifft2c(amplitude * conjugate_gradient(whitened_normal, right, iterations=self.wiener_iterations))

    def estimate(self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma) -> Image:
        """Estimate the clean image (b, set, y, x) from noisy k-space on the mask."""
        self._height = state.shape[-2]
        sigma = sigma.to(state.real.dtype)
        mask, sigma = torch.broadcast_tensors(mask, sigma.expand(len(state), *sigma.shape[1:]))
        state = torch.where(mask, state, torch.zeros((), dtype=state.dtype, device=state.device))
        weight = torch.where(mask, sigma.square().reciprocal(), 0.0)
        with torch.no_grad():
            first = self.wiener(state, weight, encoding)
            scale = self.uncertainty(mask, sigma)
            lowest = torch.where(mask, sigma, torch.inf).amin((-3, -2, -1))
            highest = torch.where(mask, sigma, 0.0).amax((-3, -2, -1))
            fraction = mask.float().mean((-3, -2, -1))
            condition = torch.stack(
                [scale.flatten().log(), lowest.log(), highest.clamp(max=30.0).log(), 4 * fraction - 2], 1
            )
            brightness = self.prior_variance((state.shape[-2], state.shape[-1])).mean().sqrt()
        sets = first.shape[-3]
        folded = first.reshape(-1, 1, *first.shape[-2:])  # each set of maps is an image of its own to the network
        condition = condition.repeat_interleave(sets, 0)
        precision = torch.autocast(state.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()
        with precision:
            change = self.network(folded / brightness, condition)
        second = first + scale * change.reshape(first.shape)
        tau = scale * (self.log_tau[0] + self.log_tau[1] * scale.log()).exp()
        if self.consistency_iterations == 0:
            return second
        weight = tau.square() * weight

        def normal(x: Tensor) -> Tensor:
            return x + encoding.weighted_normal(x, weight)

        residual = encoding.adjoint(weight * (state - encoding(second)))
        return second + conjugate_gradient(normal, residual, iterations=self.consistency_iterations)

    def forward(self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma) -> KSpace:
        """Estimate the clean measurement ``D_S(s, sigma)`` on the mask, zero elsewhere."""
        measured = encoding(self.estimate(state, mask, encoding, sigma))
        return torch.where(mask, measured, torch.zeros((), dtype=measured.dtype, device=measured.device))
