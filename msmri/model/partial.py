"""The measurement-domain partial denoiser: a Wiener estimate through coils, what a network adds, data consistency."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from msmri.model.denoiser import ComplexChannels
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.operators import LinearOperator
from msmri.physics.solve import conjugate_gradient
from msmri.tensors import Image, KSpace, Mask, Sigma

_REACH = 1.5  # the spectrum's table ends at this multiple of the Nyquist frequency, beyond the corners
_RINGS = 24  # rings of k-space in which the spectrum follows the scan at hand
_TRUST = 16.0  # places that the training data count for in each ring


def radial_frequency(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Give the distance from the centre of k-space (ky, kx) in units of the Nyquist frequency of each axis, 0..1.41."""
    axes = [(torch.arange(n, device=device) - n // 2) / (n / 2) for n in shape]
    return (axes[0][:, None] ** 2 + axes[1][None, :] ** 2).sqrt()


def _interpolate(table: Tensor, position: Tensor) -> Tensor:
    """Read a table (n,) at real positions 0..n - 1, linearly."""
    low = position.floor().long().clamp(0, len(table) - 2)
    return table[low] + (position - low) * (table[low + 1] - table[low])


class MeasurementPartial(nn.Module):
    """Estimate the clean measurement on a mask from a noisy one, with a noise level for every line.

    Three steps, each acting where its knowledge is. (1) The exact posterior mean for a stationary Gaussian prior of
    the learned power spectrum, given coils, mask and the noise of every line: ``x0``, by a few conjugate gradients.
    (2) A network adds what is not Gaussian, ``x1 = x0 + c_out F(x0, rest of the data)``. (3) Data consistency,
    ``argmin_x sum_k |E x - s|^2 / sigma_k^2 + |x - x1|^2 / tau^2``, by a few more conjugate gradients.
    ``D_S = S E x`` then tends to ``s`` as sigma falls, even where many coils make ``A A^H s`` differ from ``s``.

    Lines may carry different noise: those already measured the scanner's, those being generated the diffusion's.
    At infinite noise a line says nothing, and the result is the estimate from the other lines.

    Parameters
    ----------
    network
        Backbone: (b, 4, y, x) real and a condition (b, 4) to (b, 2, y, x).
    spectrum
        Variance of each real component of image k-space (coils combined) on a uniform grid of radial frequency
        0..1.5, measured on the training data, in scaled units.
    wiener_iterations, consistency_iterations
        Conjugate-gradient steps of (1) and (3).
    bfloat16
        Whether the network alone computes in bfloat16.
    """

    spectrum: Tensor
    keeps_data = True  # the estimate is consistent with low-noise lines: sampling need not correct it

    def __init__(
        self,
        network: nn.Module,
        spectrum: Tensor | None = None,
        *,
        wiener_iterations: int = 8,
        consistency_iterations: int = 5,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.network = ComplexChannels(network)
        self.register_buffer("spectrum", torch.ones(48) if spectrum is None else spectrum.float().clone())
        self.wiener_iterations = wiener_iterations
        self.consistency_iterations = consistency_iterations
        self.reduced = bfloat16  # nn.Module has a method called bfloat16
        self.log_tau = nn.Parameter(torch.tensor([-1.0, 0.0]))

    def prior_variance(self, shape: tuple[int, int]) -> Tensor:
        """Interpolate the power spectrum of the training data on a k-space grid (ky, kx)."""
        position = radial_frequency(shape, self.spectrum.device) / _REACH * (len(self.spectrum) - 1)
        return _interpolate(self.spectrum.log(), position).exp()

    def scan_variance(self, state: KSpace, mask: Mask, sigma: Sigma) -> Tensor:
        """Adapt the power spectrum (b, 1, ky, kx) to the scan at hand, from its own lines less their noise.

        In each ring of k-space the spectrum is multiplied by the mean ratio of observed to expected energy. Places
        count by how far the expected signal stands above their noise, and the training data count as ``_TRUST``
        places, so that pure noise changes nothing.
        """
        shape = (state.shape[-2], state.shape[-1])
        prior = self.prior_variance(shape)
        noise = state.shape[-3] * sigma.square()
        trust = torch.where(mask, (prior / (prior + noise)).square(), 0.0).expand(len(state), 1, *shape)
        energy = state.abs().square().sum(-3, keepdim=True) / 2 - noise
        excess = torch.where(trust > 1e-6, trust * energy / prior, torch.zeros_like(trust))
        position = radial_frequency(shape, prior.device) / _REACH * (_RINGS - 1)
        ring = position.round().long().clamp(max=_RINGS - 1).flatten()
        total = prior.new_zeros(len(state), _RINGS).index_add_(1, ring, excess.flatten(1))
        count = prior.new_zeros(len(state), _RINGS).index_add_(1, ring, trust.flatten(1))
        gain = ((total + _TRUST) / (count + _TRUST)).clamp(0.02, 50.0).log()
        sides = nn.functional.pad(gain[:, None], (1, 1), mode="replicate")[:, 0]
        gain = 0.25 * sides[:, :-2] + 0.5 * gain + 0.25 * sides[:, 2:]
        return prior * torch.stack([_interpolate(each, position) for each in gain])[:, None].exp()

    def solve(
        self, right: Image, encoding: LinearOperator, weight: Tensor, precision: Tensor, *, iterations: int
    ) -> Image:
        """Solve ``(E^H weight E + F^H precision F) x = right`` by conjugate gradients, preconditioned in k-space.

        The preconditioner is the diagonal in k-space, with a tenth of the largest weight added: places of k-space
        that no line informs would otherwise amplify what the coils spread far.
        """
        largest = weight.amax((-3, -2, -1), keepdim=True)
        amplitude = (encoding.kspace_weight(weight) + 0.1 * largest + precision).rsqrt()

        def normal(z: Tensor) -> Tensor:
            kspace = amplitude * z
            return amplitude * (fft2c(encoding.weighted_normal(ifft2c(kspace), weight)) + precision * kspace)

        return ifft2c(amplitude * conjugate_gradient(normal, amplitude * fft2c(right), iterations=iterations))

    def wiener(self, state: KSpace, weight: Tensor, encoding: LinearOperator, variance: Tensor) -> Image:
        """Posterior mean of the image under a stationary Gaussian prior, ``weight`` being 1 / sigma^2 on the mask."""
        right = encoding.adjoint(weight * state)
        return self.solve(right, encoding, weight, 1 / variance, iterations=self.wiener_iterations)

    def estimate(self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma) -> Image:
        """Estimate the clean image (b, set, y, x) from noisy k-space on the mask."""
        sigma = sigma.to(state.real.dtype).expand(len(state), *sigma.shape[1:])
        mask, sigma = torch.broadcast_tensors(mask, sigma)
        state = torch.where(mask, state, torch.zeros((), dtype=state.dtype, device=state.device))
        weight = torch.where(mask, sigma.square().reciprocal(), 0.0)
        with torch.no_grad():
            variance = self.scan_variance(state, mask, sigma)
            first = self.wiener(state, weight, encoding, variance)
            # expected error if every place were estimated by itself: the scale of what the network may change
            alone = torch.where(mask, variance * sigma.square() / (variance + sigma.square()), variance)
            scale = alone.mean((-2, -1), keepdim=True).sqrt()
            lowest = torch.where(mask, sigma, torch.inf).amin((-3, -2, -1))
            highest = torch.where(mask, sigma, 0.0).amax((-3, -2, -1))
            fraction = mask.float().mean((-3, -2, -1))
            levels = [scale.flatten().log(), lowest.log(), highest.clamp(max=30.0).log(), 4 * fraction - 2]
            condition = torch.stack(levels, 1).repeat_interleave(first.shape[-3], 0)
            brightness = variance.mean((-2, -1), keepdim=True).sqrt()
            # what the first estimate leaves of the data, each place trusted by its signal-to-noise ratio
            trust = torch.where(mask, variance / (variance + sigma.square()), 0.0)
            rest = encoding.adjoint(trust * (state - encoding(first)))
            seen = torch.stack([first / brightness, rest / brightness], 2).flatten(0, 1)
        cast = torch.autocast(state.device.type, torch.bfloat16) if self.reduced else nullcontext()
        with cast:  # each set of maps is an image of its own to the network
            change = self.network(seen, condition)
        second = first + scale * change.reshape(first.shape)
        tau = scale * (self.log_tau[0] + self.log_tau[1] * scale.log()).exp()
        precision = tau.square().reciprocal()
        residual = encoding.adjoint(weight * (state - encoding(second)))
        return second + self.solve(residual, encoding, weight, precision, iterations=self.consistency_iterations)

    def forward(self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma) -> KSpace:
        """Estimate the clean measurement ``D_S(s, sigma)`` on the mask, zero elsewhere."""
        measured = encoding(self.estimate(state, mask, encoding, sigma))
        return torch.where(mask, measured, torch.zeros((), dtype=measured.dtype, device=measured.device))
