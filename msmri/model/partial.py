"""The measurement-domain partial denoiser: a Wiener estimate through coils, what a network adds, data consistency."""

import copy
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from msmri.model.denoiser import ComplexChannels
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.operators import LinearOperator
from msmri.physics.solve import conjugate_gradient
from msmri.tensors import Image, KSpace, Mask, Sigma

_REACH = 1.5  # the spectrum's table ends at this multiple of the Nyquist frequency, beyond the corners
_RINGS = 24  # rings of k-space in which the spectrum follows the scan at hand
_TRUST = 16.0  # places that the training data count for in each ring
_POWER = 0.7  # exponent of the hyper-Laplacian law of image gradients
_SPARSITY = 5e-4  # its weight against |data misfit|^2, in scaled units
_SMOOTHING = 0.01  # gradients below this count as noise
_KEPT_CENTRE = 6 / 256  # share of the axes, around the centre, that is never hidden when networks are judged
_ENOUGH = 13  # lines of the centre from which on maps are as good as ``map_error`` says
_FULL_GAIN = 0.25  # share of what networks add that, if it explains hidden lines best, makes them count fully
_SHARES = (0.0, 0.5, 1.0)  # of what networks add, tried on hidden lines where data correct the estimate afterwards
_PULLS = (0.03, 0.1, 0.3, 1.0)  # strengths of that correction, 1 being that of the error that hidden lines tell
_CORRECTION = 12  # its conjugate-gradient steps
BLANK = 100.0  # noise level, in scaled units, at which a line says nothing
_USUAL_SIDE = 160  # matrix (root of its area) that the number of iterations for sparse edges is meant for
_FOLLOWING = (2, 8)  # reweightings and iterations of sparse edges that begin at those of the step before
_LARGEST_NOISE = 0.01  # below this noise level of the best lines, the weight is a constant share of that of the data
_GREATEST_NOISE = 0.08  # from there to this level it is a constant, and its share grows with the square of the noise;
# above, with the noise


def radial_frequency(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Give the distance from the centre of k-space (ky, kx) in units of the Nyquist frequency of each axis, 0..1.41."""
    axes = [(torch.arange(n, device=device) - n // 2) / (n / 2) for n in shape]
    return (axes[0][:, None] ** 2 + axes[1][None, :] ** 2).sqrt()


def image_gradient(image: Image) -> Tensor:
    """Give the forward differences (2, *image.shape) along y and x, around the edges."""
    return torch.stack([torch.roll(image, -1, -2) - image, torch.roll(image, -1, -1) - image])


def image_divergence(gradient: Tensor) -> Image:
    """Apply the adjoint of :func:`image_gradient` to (2, *image.shape)."""
    down, right = gradient
    return torch.roll(down, 1, -2) - down + torch.roll(right, 1, -1) - right


def _interpolate(table: Tensor, position: Tensor) -> Tensor:
    """Read a table (n,) at real positions 0..n - 1, linearly."""
    low = position.floor().long().clamp(0, len(table) - 2)
    return table[low] + (position - low) * (table[low + 1] - table[low])


def _among_rings(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Tell where places of k-space (ky, kx) lie among the rings, as a real number from the centre outwards."""
    return radial_frequency(shape, device) / _REACH * (_RINGS - 1)


def _ring(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Number the rings of k-space (ky, kx) from the centre outwards, 0.._RINGS - 1."""
    return _among_rings(shape, device).round().long().clamp(max=_RINGS - 1)


def _by_ring(values: Tensor, where: Mask) -> Tensor:
    """Sum (n, 1, ky, kx) over the places of ``where`` in each ring of k-space."""
    where = where.expand(*where.shape[:-2], *values.shape[-2:])
    places = _ring((values.shape[-2], values.shape[-1]), values.device).expand_as(where)[where]
    return values.new_zeros(_RINGS).index_add_(0, places, values.expand_as(where)[where])


def _left_by_ring(left: Tensor, hidden: Mask) -> Tensor | None:
    """Give the mean of what is left of hidden places (n, 1, ky, kx) in each ring; None if nothing was hidden.

    Rings in which nothing was hidden take that of the nearest ring inside them, or the first one outside.
    """
    count = _by_ring(torch.ones_like(left), hidden)
    known = torch.nonzero(count).flatten()
    if len(known) == 0:
        return None
    nearest = (torch.searchsorted(known, torch.arange(_RINGS, device=left.device), right=True) - 1).clamp_min(0)
    return (_by_ring(left, hidden) / count.clamp_min(1))[known[nearest]]


def _expected_error(left: Tensor, hidden: Mask, mask: Mask, noise: Sigma, *, coils: int) -> Tensor:
    """Give the mean square error of a pixel's magnitude to expect from what is left of hidden lines (n, 1, ky, kx)."""
    shape = (left.shape[-2], left.shape[-1])
    missing, measured = (m.expand(-1, 1, *shape) for m in (~mask, mask))
    rings = _left_by_ring(left, hidden)
    if rings is None:
        return left.new_zeros(())
    mean = (rings - 2 * coils * noise.square().flatten()).clamp_min(0)
    total = (mean * _by_ring(left.new_ones(1, 1, *shape), missing)).sum() + 2 * noise.square().sum() * measured.sum()
    return total / 2 / math.prod(shape)


class CrossValidation(NamedTuple):
    """What the hidden lines of one scan say of a prior's estimates."""

    gain: Tensor  # (1, 1, 1, 1): how far the networks can be trusted, 0..1
    error: Tensor  # (1,): expected mean square error of a pixel's magnitude, in scaled units
    image: Tensor | None = None  # (1, set, y, x): the estimate from all lines that hidden lines speak for


class MeasurementPartial(nn.Module):
    """Estimate the clean measurement on a mask from a noisy one, with a noise level for every line.

    Three steps, each acting where its knowledge is. (1) The exact posterior mean for a stationary Gaussian prior of
    the learned power spectrum, given coils, mask and the noise of every line: ``x0``, by a few conjugate gradients;
    with ``reweightings``, then the estimate for sparse edges (hyper-Laplacian gradients) that starts from it.
    (2) A network adds what is not Gaussian, ``x1 = x0 + c_out F(x0, rest of the data)``. (3) Data consistency,
    ``argmin_x sum_k |E x - s|^2 / sigma_k^2 + |x - x1|^2 / tau^2``, by a few more conjugate gradients.
    ``D_S = S E x`` then tends to ``s`` as sigma falls, even where many coils make ``A A^H s`` differ from ``s``.
    Steps (2) and (3) may be repeated with a network of their own each: an unrolled reconstruction (Aggarwal et al.
    2019) as the partial denoiser.

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
    reweightings, reweighted_iterations
        How often the edges of ``x0`` are weighted anew, and conjugate-gradient steps each time (in proportion more on a
        matrix larger than 160 x 160, where what coils and edges tell has farther to go); 0: Gaussian only.
    cascades
        How often (2) and (3) are done; each time has its own copy of ``network``.
    map_error
        How far measured k-space is from what the coil maps can say, as a share of the expected signal at each place:
        it counts as noise. Without it lines beside the centre, a thousand times brighter than their noise, make the
        lines missing between them take up what the maps have wrong. 0: the maps are exact. It is meant for maps from
        13 lines of the centre or more; with fewer it grows, see :meth:`wrong`.
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
        reweightings: int = 0,
        reweighted_iterations: int = 10,
        cascades: int = 1,
        map_error: float = 0.005,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.network = ComplexChannels(network)
        self.later = nn.ModuleList(ComplexChannels(copy.deepcopy(network)) for _ in range(cascades - 1))
        self.register_buffer("spectrum", torch.ones(48) if spectrum is None else spectrum.float().clone())
        self.wiener_iterations = wiener_iterations
        self.consistency_iterations = consistency_iterations
        self.reweightings = reweightings
        self.reweighted_iterations = reweighted_iterations
        self.map_error = map_error
        self.reduced = bfloat16  # nn.Module has a method called bfloat16
        self.log_tau = nn.Parameter(torch.tensor([-1.0, 0.0]).repeat(cascades))

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
        position = _among_rings(shape, prior.device)
        ring = _ring(shape, prior.device).flatten()
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

    def sharpen(
        self,
        image: Image,
        state: KSpace,
        encoding: LinearOperator,
        weight: Tensor,
        lowest: Tensor,
        *,
        reweightings: int,
        iterations: int,
    ) -> Image:
        """Find the image of sparse edges: ``argmin_x |weight^1/2 (E x - s)|^2 / 2 + lambda / p |grad x|^p``, p = 0.7.

        By iteratively reweighted least squares from ``image`` (Krishnan and Fergus 2009 for the law of gradients,
        Daubechies et al. 2010 for the iteration). The sets of a soft-SENSE image share their edges. ``lowest`` (b,) is
        the noise of the best lines: lambda is ``_SPARSITY`` over its square, a constant share of the data's weight, as
        long as that is small.
        """
        rows, columns = (2 - 2 * torch.cos(2 * torch.pi * (torch.arange(n) - n // 2) / n) for n in image.shape[-2:])
        laplace = (rows[:, None] + columns[None, :]).to(weight.device)
        level = lowest.clamp(max=BLANK)[:, None, None, None]
        strength = _SPARSITY / level.clamp(max=_LARGEST_NOISE).square() * (_GREATEST_NOISE / level).clamp(max=1.0)
        floor = encoding.kspace_weight(weight) + 0.1 * weight.amax((-3, -2, -1), keepdim=True)
        right = encoding.adjoint(weight * state)
        side = math.sqrt(image.shape[-2] * image.shape[-1])
        iterations = round(iterations * max(1.0, side / _USUAL_SIDE))
        for _ in range(reweightings):
            edges = image_gradient(image).abs().square().sum(0).sum(-3, keepdim=True)
            pull = strength * (edges + _SMOOTHING**2) ** (_POWER / 2 - 1)
            amplitude = (floor + pull.mean((-2, -1), keepdim=True) * laplace).rsqrt()

            def normal(x: Image, pull: Tensor = pull) -> Image:
                return encoding.weighted_normal(x, weight) + image_divergence(pull * image_gradient(x))

            def preconditioned(z: Tensor, amplitude: Tensor = amplitude) -> Tensor:
                return amplitude * fft2c(normal(ifft2c(amplitude * z)))

            residual = amplitude * fft2c(right - normal(image))
            change = conjugate_gradient(preconditioned, residual, iterations=iterations)
            image = image + ifft2c(amplitude * change)
        return image

    def estimate(
        self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma, gain: Tensor | None = None
    ) -> Image:
        """Estimate the clean image (b, set, y, x) from noisy k-space on the mask.

        ``gain`` (b, 1, 1, 1), as of :meth:`cross_validate`, is the share of what the networks add; all without it.
        """
        first, last = self.estimates(state, mask, encoding, sigma)
        return last if gain is None else first + gain * (last - first)

    def cross_validate(
        self,
        values: KSpace,
        mask: Mask,
        encoding: LinearOperator,
        noise: Sigma,
        rng: Generator,
        *,
        splits: int = 4,
        centre: Tensor | None = None,
        image: bool = True,
    ) -> CrossValidation:
        """Find how far the networks can be trusted on one scan, and what error to expect, from measured lines alone.

        The measured lines, but for the very centre, are dealt into ``splits`` groups. Each group in turn is hidden and
        estimated from the rest, and the share of what the networks add is found that best explains what was hidden:
        cross-validation of the prior on the scan, as zero-shot self-supervision does for training (Yaman et al. 2022).
        Unlike the training data, a scan may be one where the networks do harm; they then count little.

        With lines hidden there are fewer than the scan has, and what networks make of those tells too little of what
        they are worth: on 26 validation scans the share was about 0.7 on average where 1 was the best of all, and
        about 0 where 0 was. The gain is four times the share, and 1 at most.

        What is left of the hidden lines, less their noise, is the error to expect of lines as far from the centre that
        were not measured; the measured ones keep their noise at most. Half of it is error of the magnitude, the other
        half of the phase. It was made with fewer lines than there are, so that it is rather too large than too small.

        Parameters
        ----------
        values, mask, noise
            Scaled k-space (1, coil, ky, kx), its mask and the std of its noise (1, 1, 1, 1).
        centre
            Number of lines that the maps were found from (1, 1, 1, 1), as of :meth:`wrong`.
        image
            Whether to make the image, too.
        """
        group = torch.randint(0, splits, mask.shape, generator=rng)
        innermost = torch.ones(mask.shape[-2:], dtype=torch.bool)
        for axis, n in enumerate(mask.shape[-2:]):
            inside = (torch.arange(n) - n // 2).abs() <= round(n * _KEPT_CENTRE / 2)
            innermost &= inside[:, None] if axis == 0 else inside[None, :]
        group = torch.where(innermost, -1, group).to(mask.device)
        hidden = (group == torch.arange(splits, device=mask.device).reshape(-1, 1, 1, 1)) & mask
        state = torch.where(mask & ~hidden, values, torch.zeros((), dtype=values.dtype, device=values.device))
        sigma = torch.where(mask & ~hidden, noise, BLANK)
        first, last = self.estimates(state, torch.ones_like(hidden), encoding, sigma, centre=centre)
        added = torch.where(hidden, encoding(last - first), 0)
        missing = torch.where(hidden, values - encoding(first), 0)
        energy = added.abs().square().sum()
        gain = (added.conj() * missing).real.sum() / energy.clamp_min(1e-30)
        gain = torch.where(energy > 0, (gain / _FULL_GAIN).clamp(0.0, 1.0), 1.0).reshape(1, 1, 1, 1)
        left = (missing - gain * added).abs().square().sum(-3, keepdim=True)
        error = _expected_error(left, hidden, mask, noise, coils=values.shape[-3]).reshape(1)
        best = self._best((first, last), values, hidden, mask, encoding, noise, centre=centre) if image else None
        return CrossValidation(gain, error, best)

    def _best(
        self,
        parts: tuple[Image, Image],
        values: KSpace,
        hidden: Mask,
        mask: Mask,
        encoding: LinearOperator,
        noise: Sigma,
        *,
        centre: Tensor | None,
    ) -> Image | None:
        """Choose how far networks and data count by hidden lines; give the estimate from all lines made in that way.

        ``parts`` are the estimates (group, set, y, x) without the networks and with them where each group of lines in
        turn is ``hidden`` (group, 1, ky or 1, kx). None if no line was hidden.
        """
        shape, coils = (values.shape[-2], values.shape[-1]), values.shape[-3]
        nothing = torch.zeros((), dtype=values.dtype, device=values.device)
        values = torch.where(mask, values, nothing)
        wrong = self.wrong(centre) ** 2 * self.scan_variance(values, mask, noise.expand_as(mask)) / coils
        weight = torch.where(mask, 1 / (noise.square() + wrong), 0.0)
        kept = torch.where(hidden, 0.0, weight)
        position = _among_rings(shape, values.device)

        def left(image: Image) -> Tensor:
            return torch.where(hidden, values - encoding(image), nothing).abs().square().sum(-3, keepdim=True)

        tried = []
        for share in _SHARES:
            image = parts[0] + share * (parts[1] - parts[0])
            rings = _left_by_ring(left(image), hidden)
            if rings is None:
                return None
            chance = coils * noise.square().flatten()
            variance = _interpolate((rings / 2 - chance).maximum(0.05 * chance).log(), position).exp()
            for pull in (0.0, *_PULLS):
                corrected = self.correct(image, values, encoding, kept, pull * variance) if pull > 0 else image
                tried.append((float(left(corrected).sum()), share, pull, variance))
        _, share, pull, variance = min(tried, key=lambda one: one[0])
        blank = torch.where(mask, noise, BLANK)
        first, last = self.estimates(values, torch.ones_like(mask), encoding, blank, centre=centre)
        image = first + share * (last - first)
        return self.correct(image, values, encoding, weight, pull * variance) if pull > 0 else image

    def correct(
        self, image: Image, values: KSpace, encoding: LinearOperator, weight: Tensor, variance: Tensor
    ) -> Image:
        """Fit an estimate to the data: ``argmin_x sum_k weight |E x - s|^2 + |F (x - image)|^2 / variance``.

        The posterior mean if the estimate is wrong by a stationary Gaussian error of ``variance`` (ky, kx) in each
        real component of k-space and the data, ``weight`` being one over their variance on the mask, by theirs.
        """
        residual = encoding.adjoint(weight * (values - encoding(image)))
        precision = (1 / variance).expand(len(image), 1, *variance.shape[-2:])
        return image + self.solve(residual, encoding, weight, precision, iterations=_CORRECTION)

    def wrong(self, centre: Tensor | None) -> Tensor | float:
        """Tell how far coil maps are wrong that were found from so many lines of the centre, (b, 1, 1, 1).

        The share ``map_error`` times the square of 13 over that number, where it is smaller; 0 lines are none that
        maps were found from. The rule was read off validation scans of 12 coils and 6 lines, where maps two per cent
        wrong were the best guess, and of 12 lines, where it hardly mattered.
        """
        if centre is None:
            return self.map_error
        few = torch.where(centre > 0, _ENOUGH / centre.clamp_min(4), 1.0).clamp_min(1.0)
        return self.map_error * few.square()

    def estimates(
        self,
        state: KSpace,
        mask: Mask,
        encoding: LinearOperator,
        sigma: Sigma,
        start: Image | None = None,
        centre: Tensor | None = None,
    ) -> tuple[Image, Image]:
        """Estimate the clean image without the networks, and with them, both (b, set, y, x).

        ``start`` is the image without the networks of a state much like this one: sparse edges then begin there and
        need a few iterations only. Without sparse edges (``reweightings = 0``) it is not read. ``centre`` is the number
        of lines that the maps were found from, as of :meth:`wrong`.
        """
        sigma = sigma.to(state.real.dtype).expand(len(state), *sigma.shape[1:])
        mask, sigma = torch.broadcast_tensors(mask, sigma)
        state = torch.where(mask, state, torch.zeros((), dtype=state.dtype, device=state.device))
        with torch.no_grad():
            variance = self.scan_variance(state, mask, sigma)
            wrong = self.wrong(centre) ** 2 * variance / state.shape[-3]  # of one coil, as the maps have it
            weight = torch.where(mask, 1 / (sigma.square() + wrong), 0.0)
            lowest = torch.where(mask, sigma, torch.inf).amin((-3, -2, -1))
            if start is None or self.reweightings == 0:
                start, often, iterations = None, self.reweightings, self.reweighted_iterations
            else:
                often, iterations = _FOLLOWING
            first = self.wiener(state, weight, encoding, variance) if start is None else start
            first = self.sharpen(first, state, encoding, weight, lowest, reweightings=often, iterations=iterations)
            # expected error if every place were estimated by itself: the scale of what the network may change
            alone = torch.where(mask, variance * sigma.square() / (variance + sigma.square()), variance)
            scale = alone.mean((-2, -1), keepdim=True).sqrt()
            highest = torch.where(mask, sigma, 0.0).amax((-3, -2, -1))
            fraction = mask.float().mean((-3, -2, -1))
            levels = [scale.flatten().log(), lowest.log(), highest.clamp(max=30.0).log(), 4 * fraction - 2]
            condition = torch.stack(levels, 1).repeat_interleave(first.shape[-3], 0)
            brightness = variance.mean((-2, -1), keepdim=True).sqrt()
            # what an estimate leaves of the data, each place trusted by its signal-to-noise ratio
            trust = torch.where(mask, variance / (variance + sigma.square()), 0.0)
        image = first
        for number, network in enumerate([self.network, *self.later]):
            rest = encoding.adjoint(trust * (state - encoding(image)))
            seen = torch.stack([image / brightness, rest / brightness], 2).flatten(0, 1)
            cast = torch.autocast(state.device.type, torch.bfloat16) if self.reduced else nullcontext()
            with cast:  # each set of maps is an image of its own to the network
                change = network(seen, condition)
            image = image + scale * change.reshape(image.shape)
            base, slope = self.log_tau[2 * number : 2 * number + 2]
            precision = (base + slope * scale.log()).exp().mul(scale).square().reciprocal()
            residual = encoding.adjoint(weight * (state - encoding(image)))
            image = image + self.solve(residual, encoding, weight, precision, iterations=self.consistency_iterations)
        return first, image

    def following(self, gain: Tensor | None = None, centre: Tensor | None = None) -> "Following":
        """Give this prior for one run of sampling, in which each estimate begins where the last one ended."""
        return Following(self, gain, centre)

    def forward(
        self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma, gain: Tensor | None = None
    ) -> KSpace:
        """Estimate the clean measurement ``D_S(s, sigma)`` on the mask, zero elsewhere; ``gain`` as in estimate."""
        measured = encoding(self.estimate(state, mask, encoding, sigma, gain))
        return torch.where(mask, measured, torch.zeros((), dtype=measured.dtype, device=measured.device))


class Following:
    """A prior in one run of sampling, whose sparse edges begin where they ended at the step before.

    From one noise level to the next the state changes little, and so do the edges, so that few iterations will do.
    Every run needs one of its own (:meth:`MeasurementPartial.following`).

    Parameters
    ----------
    prior
        What estimates.
    gain
        (batch, 1, 1, 1), what networks count, for one batch or several batches in a row; all without it.
    centre
        (batch, 1, 1, 1), as of :meth:`MeasurementPartial.wrong`, for one batch or several in a row.
    """

    keeps_data = True

    def __init__(self, prior: MeasurementPartial, gain: Tensor | None = None, centre: Tensor | None = None) -> None:
        self.prior, self.gain, self.centre = prior, gain, centre
        self.first: Image | None = None

    @property
    def law(self) -> Any:
        """The law of the masks of the prior's training data, where its weights tell it."""
        return getattr(self.prior, "law", None)

    def __call__(self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma) -> KSpace:
        """Estimate the clean measurement on the mask, zero elsewhere, as the prior does."""
        start = self.first
        if start is not None and len(start) != len(state):  # the masks of a step begin at what they have in common
            start = start.repeat(len(state) // len(start), 1, 1, 1) if len(state) % len(start) == 0 else None
        centre = None if self.centre is None else self.centre.repeat(len(state) // len(self.centre), 1, 1, 1)
        self.first, last = self.prior.estimates(state, mask, encoding, sigma, start, centre)
        if self.gain is not None:
            gain = self.gain.repeat(len(state) // len(self.gain), 1, 1, 1)
            last = self.first + gain * (last - self.first)
        measured = encoding(last)
        return torch.where(mask, measured, torch.zeros((), dtype=measured.dtype, device=measured.device))
