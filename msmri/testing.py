"""Public contract checks: what a plug-in's operator, mask law, denoiser or reconstruction method must pass."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Generator, Tensor

from msmri.measurement import Measurement, Reconstruction
from msmri.methods import Reconstructor
from msmri.model.denoiser import Denoiser
from msmri.physics.masks import MaskLaw, RandomLines, draw_masks
from msmri.physics.operators import CoilFourier, LinearOperator, Subsample
from msmri.physics.simulate import coil_maps, phantom, simulate_kspace
from msmri.tensors import generators, normal_like


def check_adjoint(
    operator: LinearOperator,
    domain_shape: Sequence[int],
    range_shape: Sequence[int],
    *,
    rng: Generator | None = None,
    dtype: torch.dtype = torch.complex64,
    tolerance: float = 1e-5,
) -> float:
    """Check an operator: adjoint, complex linearity, normal operators, gradient; none may change its input.

    The shapes should be odd, oblong and batched: swapped shifts pass on even squares.

    Parameters
    ----------
    operator
        The operator.
    domain_shape, range_shape
        Shapes of its input and output.
    rng
        Where the random fields come from; a fixed seed without it.
    dtype
        Of input and output, real or complex.
    tolerance
        Largest relative error of any of the identities, about 50 machine epsilons.

    Returns
    -------
    float
        ``|<A x, y> - <x, A^H y>|`` relative to the norms of both sides.

    Raises
    ------
    AssertionError
        If an identity does not hold; the message says which.
    """
    rng = rng if rng is not None else torch.Generator().manual_seed(0)
    x, x2 = (_field(domain_shape, dtype, rng) for _ in range(2))
    y, y2 = (_field(range_shape, dtype, rng) for _ in range(2))
    kept = x.clone(), y.clone()
    image, back = operator(x), operator.adjoint(y)
    _require(image.shape == y.shape, f"the operator gives {tuple(image.shape)}, not {tuple(y.shape)}")
    _require(back.shape == x.shape, f"the adjoint gives {tuple(back.shape)}, not {tuple(x.shape)}")
    _require(image.dtype == dtype and back.dtype == dtype, f"dtypes are {image.dtype} and {back.dtype}, not {dtype}")
    _require(torch.equal(x, kept[0]) and torch.equal(y, kept[1]), "the operator changes its input")
    _require(torch.equal(operator(x), image), "the operator gives another result the second time")

    bound = max(float(image.norm() * y.norm()), float(x.norm() * back.norm()))
    difference = torch.vdot(image.flatten(), y.flatten()) - torch.vdot(x.flatten(), back.flatten())
    error = float(difference.abs()) / max(bound, torch.finfo(dtype).tiny)
    _require(error <= tolerance, f"<A x, y> and <x, A^H y> differ by {error:.1e} of the norms")

    a, b = (0.7 - 1.3j, -0.4 + 0.9j) if dtype.is_complex else (0.7, -1.3)
    _close(operator(a * x + b * x2), a * image + b * operator(x2), tolerance, "the operator is not linear")
    _close(
        operator.adjoint(a * y + b * y2), a * back + b * operator.adjoint(y2), tolerance, "the adjoint is not linear"
    )
    _close(operator.normal(x), operator.adjoint(image), tolerance, "normal(x) is not adjoint(forward(x))")
    weight = torch.rand(tuple(range_shape), generator=rng, dtype=x.real.dtype)
    weighted = operator.adjoint(weight * image)
    _close(operator.weighted_normal(x, weight), weighted, tolerance, "weighted_normal is not adjoint(weight * forward)")

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(operator(leaf), leaf, grad_outputs=y)
    _close(gradient, back, tolerance, "the gradient of the operator is not its adjoint")
    leaf = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(operator.adjoint(leaf), leaf, grad_outputs=x)
    _close(gradient, image, tolerance, "the gradient of the adjoint is not the operator")
    return error


def check_mask_law(
    law: MaskLaw, *, shape: tuple[int, int] = (24, 41), draws: int = 400, seed: int = 0, slack: float = 0.0
) -> None:
    """Check a mask law: bool, seeded, the stated centre always, and every place as often as stated.

    Parameters
    ----------
    law
        The law.
    shape
        Matrix (ky, kx) to draw for.
    draws
        How many masks to draw.
    seed
        Of the draws.
    slack
        Error that the stated probabilities themselves may have, where they are estimates.

    Raises
    ------
    AssertionError
        If a draw, or the frequency of some place over all draws (5 standard errors), is not what the law states.
    """
    probability = law.inclusion_probability(shape)
    _require(
        tuple(probability.shape) in {(1, 1, shape[1]), (1, *shape)}, f"probabilities are {tuple(probability.shape)}"
    )
    _require(bool(((probability >= 0) & (probability <= 1)).all()), "a probability lies outside 0..1")
    before = _global_random_state()
    masks = draw_masks(law, shape, generators(seed, draws))
    _require(_global_random_state() == before, "the law draws from a global random generator")
    _require(masks.dtype == torch.bool, f"masks are {masks.dtype}, not bool")
    _require(masks.shape[1:] == probability.shape, f"masks are {tuple(masks.shape[1:])} each, probabilities not")
    _require(torch.equal(masks, draw_masks(law, shape, generators(seed, draws))), "the same seeds give other masks")
    _require(bool((masks != masks[:1]).any()) or bool((probability >= 1).all()), "all seeds give one mask")
    rows, columns = law.centre_size(shape)
    top, left = shape[0] // 2 - rows // 2, shape[1] // 2 - columns // 2
    full = masks.expand(-1, -1, *shape)
    if rows * columns:
        # fastMRI's centre begins half a column later than the others for odd numbers of columns
        block = [full[..., top : top + rows, i : i + columns].all() for i in (left, (shape[1] - columns + 1) // 2)]
        _require(bool(torch.stack(block).any()), f"some mask lacks a part of its {rows} x {columns} centre")
    frequency = masks.double().mean(0)
    allowed = 5 * (probability * (1 - probability) / draws).sqrt() + slack
    # a law that is an exact mixture never misses a certain place nor takes an impossible one
    wrong = (frequency - probability).abs() > allowed + 1 / draws * ((probability > 0) & (probability < 1))
    worst = float(((frequency - probability).abs()).max())
    _require(not bool(wrong.any()), f"{int(wrong.sum())} places are not as frequent as stated, by up to {worst:.3f}")
    total, expected = float(masks.double().mean()), float(probability.mean())
    spread = float(masks.double().mean(dim=(1, 2, 3)).std()) / draws**0.5
    _require(
        abs(total - expected) <= 5 * spread + slack + 1e-9, f"masks hold {total:.4f} of k-space, not {expected:.4f}"
    )


def check_denoiser(
    denoiser: Denoiser,
    *,
    shapes: Sequence[tuple[int, int, int]] = ((1, 16, 16), (1, 17, 22)),
    dtype: torch.dtype = torch.complex64,
    seed: int = 0,
    clean: Tensor | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Check a denoiser: shape, dtype, odd sizes, number or tensor as sigma, and independence within a batch.

    Parameters
    ----------
    denoiser
        The denoiser.
    shapes
        Images (channel, y, x) to try; odd and oblong ones should be among them.
    dtype
        Of the images.
    seed
        Of the noise.
    clean
        Images (batch, channel, y, x) of the kind it was made for: noise of three levels must then be reduced.
    tolerance
        Largest relative difference where two results should be equal.

    Raises
    ------
    AssertionError
        If one of these does not hold.
    """
    for shape in shapes:
        noisy = normal_like(torch.zeros(3, *shape, dtype=dtype), generators(seed, 3))
        levels = torch.tensor([0.1, 0.5, 2.0])[:, None, None, None]
        kept = noisy.clone()
        with torch.no_grad():
            together = denoiser.denoise(noisy, levels)
            alone = [denoiser.denoise(noisy[i : i + 1], float(levels[i])) for i in range(3)]
        _require(together.shape == noisy.shape, f"an image {shape} becomes {tuple(together.shape[1:])}")
        _require(together.dtype == dtype, f"{dtype} becomes {together.dtype}")
        _require(bool(torch.isfinite(together).all()), f"the estimate of an image {shape} is not finite")
        _require(torch.equal(noisy, kept), "the denoiser changes its input")
        _close(together, torch.cat(alone), tolerance, "a batch, or sigma as a tensor, changes the estimate")
    if clean is not None:
        noise = normal_like(clean, generators(seed, len(clean)))
        for sigma in (float(clean.abs().max()) * level for level in (0.05, 0.2, 1.0)):
            with torch.no_grad():
                left = float((denoiser.denoise(clean + sigma * noise, sigma) - clean).norm() / (sigma * noise).norm())
            _require(left < 1, f"at sigma {sigma:.3g} the estimate is {left:.2f} times as far from clean as the input")


def phantom_measurement(
    shape: tuple[int, int] = (48, 40), *, slices: int = 2, coils: int = 4, noise_std: float = 0.01, seed: int = 0
) -> Measurement:
    """Make a measurement of random head phantoms, every slice with its own mask at nominal R = 3, with targets."""
    rng = torch.Generator().manual_seed(seed)
    maps = coil_maps(shape, coils, rng)
    images = torch.stack([phantom(shape, rng) for _ in range(slices)])
    kspace, _ = simulate_kspace(images, maps, rng, noise_std=noise_std)
    mask = draw_masks(RandomLines(acceleration=3, centre_fraction=0.2), shape, generators(seed, slices))
    return Measurement(
        Subsample(mask)(kspace),
        mask,
        CoilFourier(maps.expand(slices, -1, -1, -1, -1).contiguous()),
        noise_std=noise_std,
        source=tuple(f"phantom-{seed}#{i}" for i in range(slices)),
        target=images,
    )


def check_reconstructor(
    method: Reconstructor,
    *,
    measurement: Measurement | None = None,
    seed: int = 0,
    margin: float = 3.0,
    tolerance: float = 1e-3,
) -> float:
    """Check a method: seeded, blind to the target and to what was not measured, free of units, better than noise.

    Parameters
    ----------
    method
        The method.
    measurement
        MRI with target and coil maps, two slices or more; random phantoms without it.
    seed
        Of the method.
    margin
        By how many dB its PSNR must exceed that of noise of the measurement's energy, zero-filled.
    tolerance
        Largest relative difference where two results should be equal.

    Returns
    -------
    float
        Mean PSNR of the reconstruction in dB, peak of the target as data range.

    Raises
    ------
    AssertionError
        If one of these does not hold.
    """
    given = measurement if measurement is not None else phantom_measurement()
    assert given.target is not None and given.encoding is not None
    batch = len(given.values)
    before = _global_random_state()

    def run(case: Measurement) -> Reconstruction:
        return method(case, generators(seed, len(case.values)))

    result = run(given)
    samples = result.samples
    _require(_global_random_state() == before, "the method draws from a global random generator")
    _require(samples.is_complex(), f"samples are {samples.dtype}, not complex")
    size = given.values.shape[-2:]
    _require(
        samples.ndim == 4 and len(samples) == batch, f"samples are {tuple(samples.shape)}, not (batch, sample, y, x)"
    )
    _require(samples.shape[-2:] == size, f"images are {tuple(samples.shape[-2:])}, not {tuple(size)}")
    _require(bool(torch.isfinite(samples).all()), "the images are not finite")
    _require(torch.equal(run(given).samples, samples), "the same seed gives another result")

    nan = float("nan")
    blind = run(replace(given, target=torch.full_like(given.target, nan))).samples
    _require(torch.equal(blind, samples), "the result depends on the target")
    poisoned = torch.where(given.mask, given.values, torch.full_like(given.values, nan))
    _close(run(replace(given, values=poisoned)).samples, samples, tolerance, "the result depends on unmeasured k-space")
    factor = torch.full((batch, 1, 1, 1), 250.0)
    _close(run(given.scaled(factor)).samples, samples, tolerance, "the result depends on the units of k-space")

    select = Subsample(given.mask)
    noise = select(normal_like(given.values, generators(seed, batch)))
    energy, chance_energy = (select(v).abs().square().sum((1, 2, 3)) for v in (given.values, noise))
    ratio = (energy / chance_energy).sqrt()[:, None, None]
    zero_filled = torch.linalg.vector_norm(given.operator.adjoint(noise), dim=1) * ratio
    quality, chance = _psnr(given.target, result.magnitude), _psnr(given.target, zero_filled)
    _require(quality > chance + margin, f"PSNR is {quality:.1f} dB, noise alone reaches {chance:.1f} dB")
    return quality


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _close(a: Tensor, b: Tensor, tolerance: float, message: str) -> None:
    error = float((a - b).norm()) / max(float(b.norm()), torch.finfo(b.dtype).tiny)
    _require(error <= tolerance, f"{message} (relative error {error:.1e})")  # a NaN fails as well


def _field(shape: Sequence[int], dtype: torch.dtype, rng: Generator) -> Tensor:
    return normal_like(torch.empty(1, *shape, dtype=dtype), [rng])[0]


def _psnr(target: Tensor, image: Tensor) -> float:
    error = (target - image).square().mean(dim=(-2, -1))
    return float((10 * torch.log10(target.amax(dim=(-2, -1)).square() / error)).mean())


def _global_random_state() -> tuple[bytes, str, str]:
    numpy_state: Callable = np.random.get_state  # reads only, to prove that nothing else touched it
    return torch.get_rng_state().numpy().tobytes(), repr(numpy_state()), repr(random.getstate())
