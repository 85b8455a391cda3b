"""Posterior sampling of real images through restoration operators: MSM, A-DPS and its kin, classical restorers."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.methods import load_method
from msmri.methods.adps import AALD, ADPS, AOS, DDNM, DPS, DiffPIR
from msmri.methods.images import Bicubic, Biharmonic, TVImage
from msmri.methods.msm import MSM
from msmri.model.denoiser import GaussianDenoiser
from msmri.physics.masks import RandomLines
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.physics.restoration import BlockAverage, Blur, SignedHadamard
from msmri.physics.tiles import FurtherTiles, RandomPixels, RandomTiles, box_mask
from msmri.sampling.schedule import ancestral, karras
from msmri.tensors import generators, normal_like

SHAPE = (8, 16)
NOISE, POWER = 0.1, 0.49


def normal(*shape, seed=0, dtype=torch.float32):
    return normal_like(torch.zeros(*shape, dtype=dtype), generators(seed, shape[0]))


def operators(shape=SHAPE):
    rng = torch.Generator().manual_seed(1)
    return {
        "box": (Identity(), box_mask(shape, (4, 5))[None]),
        "pixels": (Identity(), RandomPixels().draw(shape, rng)[None]),
        "blocks": (BlockAverage(4), None),
        "sums": (SignedHadamard.draw(shape, 50, rng), None),
        "blur": (Blur.gaussian(0.7), None),
        "some averages": (BlockAverage(2), RandomPixels().draw((shape[0] // 2, shape[1] // 2), rng)[None]),
    }


def problem(name, batch=1, seed=3, *, scale=1.0, full_scale=1.0):
    """Images of three colours from a white Gaussian prior, measured through an operator with noise; and the prior."""
    encoding, mask = operators()[name]
    mean = 0.3 * normal(1, 3, *SHAPE, seed=seed)
    full = encoding(mean + POWER**0.5 * normal(batch, 3, *SHAPE, seed=seed + 1))
    mask = torch.ones(1, 1, *full.shape[-2:], dtype=torch.bool) if mask is None else mask
    noisy = full + NOISE * normal(*full.shape, seed=seed + 2)
    values = torch.where(mask, noisy, torch.nan) * scale  # nothing outside the mask may be read
    units = torch.full((batch, 1, 1, 1), 1 / scale)
    one = Measurement(values, mask, encoding, NOISE * scale, units, full_scale=full_scale)
    return one, GaussianDenoiser(mean[0], torch.tensor(POWER)), mean[0]


def closed_form(measurement, mean, index=0):
    """Posterior mean and standard deviation (3, y, x), by dense matrices."""
    n = SHAPE[0] * SHAPE[1]
    operator = Subsample(measurement.mask) @ measurement.encoding
    matrix = operator(torch.eye(n).reshape(n, 1, *SHAPE)).flatten(1).mT.double()
    covariance = torch.linalg.inv(matrix.mT @ matrix / NOISE**2 + torch.eye(n) / POWER)
    values = Subsample(measurement.mask)(measurement.values * measurement.scale)[index].flatten(1).double()
    right = values @ matrix / NOISE**2 + mean.flatten(1).double() / POWER
    return (right @ covariance).reshape(3, *SHAPE), covariance.diagonal().sqrt().reshape(1, *SHAPE).expand(3, -1, -1)


def recursion(measurement, mean, sigmas):
    """Mean and standard deviation (3, y, x) that the sampler must end with after these steps, from pure noise.

    In the basis of the eigenvectors of A^T A the state is linear in itself, the data and fresh noise.
    """
    n = SHAPE[0] * SHAPE[1]
    operator = Subsample(measurement.mask) @ measurement.encoding
    matrix = operator(torch.eye(n).reshape(n, 1, *SHAPE)).flatten(1).mT.double()
    level, basis = torch.linalg.eigh(matrix.mT @ matrix)
    values = Subsample(measurement.mask)(measurement.values * measurement.scale)[0].flatten(1).double()
    right = (values @ matrix - mean.flatten(1).double() @ matrix.mT @ matrix) @ basis  # of the deviation from the mean
    state, variance = -mean.flatten(1).double() @ basis, torch.full((n,), float(sigmas[0]) ** 2).double()
    for sigma, after, share in zip(sigmas, [*sigmas[1:], torch.tensor(0.0)], ancestral(sigmas), strict=True):
        mu = NOISE**2 * (1 / sigma**2 + 1 / POWER)
        gain = mu / (level + mu) * POWER / (POWER + sigma**2)
        kept = after / sigma * (1 - share**2).sqrt()
        clean = gain * state + right / (level + mu)
        state = clean + kept * (state - clean)
        variance = (gain + kept * (1 - gain)).square() * variance + (after * share) ** 2
    return mean + (state @ basis.mT).reshape(3, *SHAPE), (basis.square() @ variance).sqrt().reshape(1, *SHAPE)


EXACT = {"law": RandomTiles(), "sigma_max": 10.0, "sigma_min": 0.01, "data_weight": "noise", "iterations": 30}
EXACT |= {"signal_std": POWER**0.5, "relaxation": 1.0, "schedule": "karras", "renewal": "ancestral"}


@pytest.mark.parametrize("name", operators())
def test_msm_gives_the_exact_posterior_through_an_operator(name):
    """Two masks of tiles reach all of an image, so that the exact white prior leaves but the error of finite steps."""
    measurement, prior, mean = problem(name)
    n, exact, std = 40, *closed_form(measurement, mean)
    method = MSM.preset("restoration", prior=prior, samples=n, batch=n, steps=20, **EXACT)
    found = method(measurement, generators(0, 1))
    assert found.samples.shape == (1, n, 3, *SHAPE) and not found.samples.is_complex()
    expected, spread = recursion(measurement, mean, karras(10.0, 0.01, 20))
    assert float(((found.image[0] - expected) / spread).square().mean().sqrt()) < 1.15 / n**0.5
    ratio = (found.std[0] / spread).square()
    told = (std < 0.8 * POWER**0.5).expand_as(std)  # each kind of place by itself, not only on average
    assert all(abs(float(part.mean()) - 1) < 0.06 for part in (ratio[told], ratio[~told]) if len(part))
    # and fine steps of that lead to the posterior
    fine, narrow = recursion(measurement, mean, karras(40.0, 0.001, 2000))
    torch.testing.assert_close(fine, exact, atol=0.003, rtol=0)
    torch.testing.assert_close(narrow.expand_as(std), std, rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["box", "pixels"])
def test_measured_pixels_may_join_the_masks(name):
    """Where data are pixels of the image they can enter the prior's masks with their own noise, as in scans."""

    @dataclass(frozen=True)
    class ByPixel:  # told the noise of every pixel
        prior: GaussianDenoiser

        def __call__(self, state, mask, encoding, sigma):
            assert not bool(torch.isnan(state).any())
            return torch.where(mask, self.prior.denoise(state, sigma.expand(state[:, :1].shape)), 0)

    measurement, prior, mean = problem(name)
    expected, std = closed_form(measurement, mean)
    n = 40
    options = {**EXACT, "steps": 100, "include_measured": True, "likelihood": "none", "data_weight": None}
    found = MSM.preset("restoration", prior=ByPixel(prior), samples=n, batch=n, **options)(
        measurement, generators(0, 1)
    )
    measured = measurement.mask[0].expand(3, *SHAPE)
    torch.testing.assert_close(found.image[0][measured], expected[measured].float(), atol=2e-3, rtol=0)
    error = ((found.image[0] - expected) / std)[~measured]
    assert float(error.square().mean().sqrt()) < 1.5 / n**0.5
    assert 0.92 < float((found.std[0] / std)[~measured].square().mean().sqrt()) < 1.0


@pytest.mark.parametrize("name", ["box", "blocks", "sums", "blur"])
def test_the_published_step_of_size_one_puts_the_data_in_place(name):
    measurement, prior, _ = problem(name)
    options = {"steps": 200, "data_weight": 1.0, "likelihood": "gradient", "law": RandomTiles(), "samples": 2}
    method = MSM.preset("paper-restoration", prior=prior, **options)
    assert (method.masks_per_step, method.eta, method.start) == (2, 0.85, "noise")
    found = replace(method, steps=20, covering=True)(measurement, generators(0, 1)).samples[0]
    left = Subsample(measurement.mask)(measurement.encoding(found)) - Subsample(measurement.mask)(measurement.values)
    assert float(left.abs().max()) < 1e-4
    assert MSM.preset("paper-restoration").data_weight == 1.75  # the published value


def test_past_the_proximal_solution():
    measurement, prior, _ = problem("blur")
    method = MSM.preset("restoration", prior=prior, law=RandomTiles(), steps=1, samples=1, iterations=30)
    assert (method.relaxation, method.data_weight, method.likelihood) == (1.75, "noise", "proximal")
    (plain,) = replace(method, likelihood="none", data_weight=None).iterate(measurement, generators(0, 1))
    (exact,) = replace(method, relaxation=1.0).iterate(measurement, generators(0, 1))
    (past,) = method.iterate(measurement, generators(0, 1))
    torch.testing.assert_close(past.estimate, plain.estimate + 1.75 * (exact.estimate - plain.estimate))
    n = SHAPE[0] * SHAPE[1]
    matrix = measurement.encoding(torch.eye(n).reshape(n, 1, *SHAPE)).flatten(1).mT.double()
    mu = NOISE**2 * (1 / float(method._ladder(prior)[0]) ** 2 + 1 / 0.5**2)
    right = measurement.values[0].flatten(1).double() @ matrix + mu * plain.estimate[0].flatten(1)
    expected = torch.linalg.solve(matrix.mT @ matrix + mu * torch.eye(n), right.mT).mT.reshape(3, *SHAPE)
    torch.testing.assert_close(exact.estimate[0].double(), expected, rtol=1e-3, atol=1e-3)


def test_gradient_uses_the_adjoint_where_there_is_no_pseudo_inverse():
    measurement, prior, _ = problem("some averages")
    options = {"prior": prior, "law": RandomTiles(), "steps": 1, "likelihood": "gradient", "data_weight": 0.5}
    (step,) = MSM.preset("restoration", samples=1, **options).iterate(measurement, generators(0, 1))
    other = {**options, "likelihood": "none", "data_weight": None}
    (plain,) = MSM.preset("restoration", samples=1, **other).iterate(measurement, generators(0, 1))
    operator = measurement.operator
    rest = operator(plain.estimate) - Subsample(measurement.mask)(measurement.values)
    torch.testing.assert_close(step.estimate, plain.estimate - 0.5 * operator.adjoint(rest))


@pytest.mark.parametrize("name", ["pixels", "sums"])
def test_neither_batch_nor_units_change_a_result(name):
    measurement, prior, _ = problem(name, batch=3)
    if name == "pixels":  # a mask of its own for every image
        masks = torch.cat([operators()["pixels"][1].roll(k, -1) for k in range(3)])
        measurement = replace(measurement, values=measurement.values.nan_to_num(0.2), mask=masks)
    method = MSM.preset("restoration", prior=prior, law=RandomTiles(), steps=5, samples=3, batch=9)
    found = method(measurement, generators(0, 3)).samples
    for size in (2, 4):
        again = replace(method, batch=size)(measurement, generators(0, 3)).samples
        torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-5)
    last = replace(measurement, values=measurement.values[2:], mask=measurement.mask[-1:], scale=torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(method(last, generators(0, 3)[2:]).samples[0], found[2], rtol=1e-4, atol=1e-5)
    scaled = measurement.scaled(torch.full((3, 1, 1, 1), 50.0))
    torch.testing.assert_close(method(scaled, generators(0, 3)).samples, found, rtol=1e-4, atol=1e-4)


def test_the_law_of_the_masks_is_the_priors_own_unless_one_is_given():
    measurement, _, _ = problem("blocks")
    seen = []

    class Spy:
        law = RandomTiles.dropping(0.75)

        def __call__(self, state, mask, encoding, sigma):
            seen.append(mask)
            return torch.where(mask, state, 0)

    method = MSM.preset("restoration", prior=Spy(), steps=1, samples=1, masks_per_step=4)
    method(measurement, generators(0, 1))
    assert float(seen[-1].float().mean()) == 0.25 and bool(seen[-1].any(0).all())  # dealt out
    replace(method, law=RandomTiles())(measurement, generators(0, 1))
    assert float(seen[-1].float().mean()) == 10 / 16
    Spy.law = None
    replace(method, acceleration=1.0)(measurement, generators(0, 1))
    assert bool(seen[-1].all())  # random lines, of one dimension
    Spy.law = RandomLines(1.0)
    assert method._law(Spy()) == RandomLines(1.0)


def test_a_start_that_needs_a_part_of_the_image_is_refused_elsewhere():
    measurement, prior, _ = problem("blocks")
    with pytest.raises(InputError, match="part of a full measurement"):
        MSM(prior=prior, start="mean", steps=1)(measurement, generators(0, 1))
    found = MSM(prior=prior, law=RandomTiles(), steps=3, samples=2, sigma_max=2.0)(measurement, generators(0, 1))
    assert found.samples.shape == (1, 2, 3, *SHAPE) and bool(torch.isfinite(found.samples).all())  # warm


def test_operators_tell_what_priors_know():
    maps = normal(1, 1, 3, *SHAPE, dtype=torch.complex64)
    coils, blocks, mask = CoilFourier(maps), BlockAverage(2), Subsample(box_mask(SHAPE, (2, 2)))
    for operator in (
        coils,
        Identity(),
        blocks,
        mask @ coils,
        blocks @ coils,
        coils @ Blur.gaussian(1.0),
        mask @ blocks,
    ):
        degradation, encoding = operator.factored()
        image = normal(1, 1, *SHAPE, seed=4, dtype=torch.complex64)
        if operator.__class__.__name__ == "Composed" and operator.inner is blocks:
            image = normal(1, 1, 2 * SHAPE[0], 2 * SHAPE[1], seed=4, dtype=torch.complex64)
        torch.testing.assert_close(degradation(encoding(image)), operator(image))
    assert coils.factored() == (Identity(), coils) and blocks.factored() == (blocks, Identity())
    assert (blocks @ coils).factored() == (blocks, coils)


# --- A-DPS and priors of clean images ------------------------------------------------------------------------------


class ExactAmbient:
    """E[x0 | what is shown of x0 + sigma n] for a white Gaussian prior."""

    law = RandomTiles()
    further = staticmethod(lambda mask, rng: mask & (torch.arange(SHAPE[1]) != 5))

    def __init__(self, prior):
        self.prior, self.masks = prior, []

    def __call__(self, aliased, mask, sigma, encoding):
        self.masks.append(mask)
        return torch.where(mask, self.prior.denoise(aliased, sigma), self.prior.mean)


@pytest.mark.parametrize("kind", [ADPS, AALD, DPS, DDNM, DiffPIR])
@pytest.mark.parametrize("name", ["box", "blocks", "sums"])
def test_priors_of_ambient_and_clean_images_restore_batches(kind, name):
    measurement, prior, mean = problem(name, batch=2)
    weights = ExactAmbient(prior) if issubclass(kind, ADPS) else prior
    more = {ADPS: {"likelihood_step": 1.0}, DPS: {"likelihood_step": 1.0}, DiffPIR: {"regularisation": 1.0}}
    more[AALD] = {"likelihood_step": 0.3}
    method = kind(weights=weights, samples=16, batch=16, steps=50, sigma_max=5.0, **more.get(kind, {}))
    found = method(measurement, generators(0, 2))
    assert found.samples.shape == (2, 16, 3, *SHAPE) and not found.samples.is_complex()
    for index in range(2):
        expected, _ = closed_form(measurement, mean, index)
        seen = Subsample(measurement.mask)(
            measurement.encoding(torch.stack([found.image[index] - expected, mean - expected]))
        )
        error, idle = seen.square().mean((1, 2, 3)).sqrt()  # of what the data tell
        assert float(error) < 0.5 * float(idle)
    alone = replace(measurement, values=measurement.values[1:], scale=torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(method(alone, generators(0, 2)[1:]).samples[0], found.samples[1], rtol=1e-3, atol=1e-4)


def test_a_dps_shows_the_prior_masks_of_its_own_training():
    measurement, prior, _ = problem("blocks")
    weights = ExactAmbient(prior)
    ADPS(weights=weights, steps=2, samples=3)(measurement, generators(0, 1))
    (shown,) = {mask.shape for mask in weights.masks}
    assert shown == (3, 1, *SHAPE)  # of the image, not of the averages that were measured
    first = weights.masks[0]
    assert not bool(first[..., 5].any()) and bool(first[..., :5].any()) and 0.5 < float(first.float().mean()) < 10 / 16
    ADPS(weights=weights, law=RandomTiles.dropping(0.0), further=FurtherTiles(), steps=1)(measurement, generators(0, 1))
    assert float(weights.masks[-1].float().mean()) == pytest.approx(15 / 16)


def test_one_step_needs_pixels_of_the_image():
    measurement, prior, _ = problem("box", batch=2)
    found = AOS(weights=ExactAmbient(prior))(measurement, generators(0, 2)).samples
    assert found.shape == (2, 1, 3, *SHAPE) and bool(torch.isfinite(found).all())
    with pytest.raises(InputError, match="part of a full measurement"):
        AOS(weights=ExactAmbient(prior))(problem("blocks")[0], generators(0, 1))


# --- classical ------------------------------------------------------------------------------------------------------


def smooth(shape=(16, 24)):
    rows, columns = (torch.linspace(-1, 1, n) for n in shape)
    waves = [torch.sin((2 + k) * rows)[:, None] * torch.cos((3 - k) * columns) for k in range(3)]
    return torch.stack(waves)[None] * 0.8


def measured(image, encoding, mask=None, noise=0.0):
    full = encoding(image) + noise * normal(1, *encoding(image).shape[1:], seed=9)
    mask = torch.ones(1, 1, *full.shape[-2:], dtype=torch.bool) if mask is None else mask[None]
    return Measurement(torch.where(mask, full, torch.nan), mask, encoding, 0.01, torch.ones(1, 1, 1, 1), full_scale=1.0)


def error(found, image):
    return float((found.image - image).square().mean().sqrt())


def test_classical_restorers_restore_smooth_images():
    image = smooth()
    holes = measured(image, Identity(), RandomPixels().draw((16, 24), torch.Generator().manual_seed(0)))
    empty = float(torch.where(holes.mask, 0, image).square().mean().sqrt())
    found = Biharmonic()(holes, generators(0, 1))
    assert found.samples.shape == (1, 1, 3, 16, 24) and error(found, image) < 0.05 * empty
    torch.testing.assert_close(found.image[holes.mask.expand_as(image)], image[holes.mask.expand_as(image)])
    assert error(TVImage(1e-3)(holes, generators(0, 1)), image) < 0.25 * empty
    small = measured(image, BlockAverage(2))
    nearest = float((BlockAverage(2).pseudo_inverse(small.values) - image).square().mean().sqrt())
    assert error(Bicubic()(small, generators(0, 1)), image) < 0.35 * nearest
    sums = measured(image, SignedHadamard.draw((16, 24), 200, torch.Generator().manual_seed(0)))
    adjoint = float((sums.encoding.adjoint(sums.values) - image).square().mean().sqrt())
    assert error(TVImage(1e-3)(sums, generators(0, 1)), image) < 0.25 * adjoint


@pytest.mark.parametrize(("encoding", "weight"), [(Blur.gaussian(0.7), 0.05), (BlockAverage(2), 0.02)])
def test_total_variation_solves_its_problem(encoding, weight):
    """No small step from the solution lowers the objective of skimage's isotropic total variation."""
    one = measured(smooth((8, 8)), encoding, noise=0.1)
    found = TVImage(weight, iterations=300)(one, generators(0, 1)).image.double()

    def objective(x):
        down, right = torch.zeros_like(x), torch.zeros_like(x)
        down[..., :-1, :], right[..., :-1] = x.diff(dim=-2), x.diff(dim=-1)
        total = (down.square() + right.square()).sqrt().sum()
        return float((one.encoding(x) - one.values).square().sum() / 2 + weight * total)

    best = objective(found)
    assert best < objective(encoding.pseudo_inverse(one.values).double()) and best < objective(smooth((8, 8)).double())
    for seed in range(8):
        step = 0.01 * normal(1, 3, 8, 8, seed=seed, dtype=torch.float64)
        assert objective(found + step) > best and objective(0.98 * found) > best and objective(1.02 * found) > best


@pytest.mark.parametrize("name", ["biharmonic", "bicubic", "tv-image"])
def test_classical_restorers_go_by_the_contract(name):
    image = smooth()
    one = (
        measured(image, BlockAverage(2))
        if name == "bicubic"
        else measured(image, Identity(), box_mask((16, 24), (5, 7)))
    )
    method = load_method(name)
    assert method.name == name and method.reference.startswith("@article")
    found = method(one, generators(0, 1)).samples
    scaled = method(one.scaled(torch.full((1, 1, 1, 1), 40.0)), generators(0, 1)).samples
    torch.testing.assert_close(scaled, found, rtol=1e-3, atol=1e-4)
    two = replace(one, values=torch.cat([one.values, 0.5 * one.values]), scale=torch.ones(2, 1, 1, 1))
    torch.testing.assert_close(method(two, generators(0, 2)).samples[:1], found, rtol=1e-4, atol=1e-5)
    other = measured(image, SignedHadamard.draw((16, 24), 99, torch.Generator().manual_seed(0)))
    if name != "tv-image":
        with pytest.raises(InputError, match="alone"):
            method(other, generators(0, 1))
    with pytest.raises(InputError, match="real images"):
        method(replace(one, values=one.values.to(torch.complex64)), generators(0, 1))
    with pytest.raises(InputError, match="NaN"):
        method(replace(one, values=one.values * np.inf), generators(0, 1))


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"iterations": 0}])
def test_refused_options(options):
    with pytest.raises(InputError):
        TVImage(**options)
