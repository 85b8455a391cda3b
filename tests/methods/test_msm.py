from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.methods import load_method
from msmri.methods.msm import MSM
from msmri.model.denoiser import ComplexChannels, EpsilonVP, GaussianDenoiser, VPSchedule
from msmri.model.partial import CrossValidation
from msmri.physics.masks import RandomLines, centre_width
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.physics.solve import conjugate_gradient
from msmri.sampling.aggregate import ImagePartial, aggregate
from msmri.sampling.likelihood import project, proximal
from msmri.sampling.reverse import Step, reverse_diffusion
from msmri.sampling.schedule import ancestral, karras
from msmri.tensors import generators, normal_like


@dataclass(frozen=True)
class ExactPartial:
    """S E E[x | state on the mask] for pixels N(mean, variance) in each real component, noise by line."""

    mean: Tensor
    variance: float
    iterations: int = 60

    def image(self, state, mask, encoding, sigma):
        weight = torch.where(mask, 1 / sigma.square(), 0.0) * self.variance
        rest = torch.where(mask, state - encoding(self.mean.expand(len(state), *self.mean.shape[-3:])), 0)
        right = encoding.adjoint(weight * rest)

        def normal(x):
            return x + encoding.weighted_normal(x, weight)

        return self.mean + conjugate_gradient(normal, right, iterations=self.iterations, tolerance=1e-6)

    def __call__(self, state, mask, encoding, sigma):
        sigma = sigma.expand(*sigma.shape[:-1], state.shape[-1])
        return Subsample(mask)(encoding(self.image(state, mask, encoding, sigma)))


def normal(shape, seed=0):
    return normal_like(torch.zeros(1, *shape, dtype=torch.complex64), generators(seed, 1))


def columns(width, step=3, centre=2):
    mask = torch.zeros(1, 1, 1, width, dtype=torch.bool)
    mask[..., ::step] = True
    mask[..., width // 2 - centre // 2 : width // 2 + (centre + 1) // 2] = True
    return mask


def problem(encoding, *, shape=(6, 10), channels=1, variance=1.0, noise=0.1, step=3, seed=3):
    """A measurement of an image from the prior, the prior in scaled units, and the mean in the file's units."""
    mean = 0.5 * normal((channels, *shape), seed)
    image = mean + variance**0.5 * normal((channels, *shape), seed + 1)
    mask = columns(shape[1], step)
    full = encoding(image)
    values = Subsample(mask)(full + noise * normal(full.shape[1:], seed + 2))
    measurement = Measurement(values, mask, encoding, noise)
    scale = float(measurement.centre_scale())
    return measurement, ExactPartial(mean / scale, variance / scale**2), mean


def coils(shape=(6, 10), n=3, seed=1):
    maps = normal((1, n, *shape), seed)
    return CoilFourier(maps / maps.abs().square().sum(2, keepdim=True).sqrt())


def closed_form(measurement, mean, variance):
    """Posterior mean and standard deviation of each real component, by dense matrices."""
    n = mean.numel()
    unit = torch.eye(n, dtype=mean.dtype).reshape(n, *mean.shape[1:])
    matrix = measurement.operator(unit).flatten(1).mT.to(torch.complex128)
    power = measurement.noise_std**2
    covariance = torch.linalg.inv(matrix.mH @ matrix / power + torch.eye(n) / variance)
    right = matrix.mH @ measurement.values.flatten().to(torch.complex128) / power + mean.flatten() / variance
    return (covariance @ right).reshape(mean.shape[-2:]), covariance.diagonal().real.sqrt().reshape(mean.shape[-2:])


def spread(samples):
    """Standard deviation of each real component over samples."""
    return torch.view_as_real(samples).var(1).mean(-1).sqrt()


EXACT = {
    "acceleration": 1.0,
    "masks_per_step": 1,
    "steps": 100,
    "sigma_max": 20.0,
    "sigma_min": 0.003,
    "start": "noise",
}


# --- the equations -------------------------------------------------------------------------------------------------


def test_image_partial_is_the_written_out_equation():
    encoding, variance, sigma = coils(), 0.7, 0.4
    state, mask = normal((3, 6, 10), 5), columns(10)
    partial = ImagePartial(GaussianDenoiser(torch.zeros(1, 6, 10, dtype=torch.complex64), torch.tensor(variance)))
    aliased = encoding.adjoint(torch.where(mask, state, 0))
    expected = torch.where(mask, encoding(aliased * variance / (variance + sigma**2)), 0)
    torch.testing.assert_close(partial(state, mask, encoding, torch.full((1, 1, 1, 1), sigma)), expected)
    by_line = torch.where(mask, sigma, 9.0)  # a level outside the mask does not count, the highest inside does
    by_line[..., 0] = 0.1
    poisoned = torch.where(mask, state, torch.nan)
    torch.testing.assert_close(partial(poisoned, mask, encoding, by_line), expected)


def test_aggregate_averages_overlaps_and_keeps_the_rest():
    masks = torch.zeros(2, 1, 1, 1, 4, dtype=torch.bool)
    masks[0, ..., :2], masks[1, ..., 1:3] = True, True
    step = Step(torch.ones(1, 2, 3, 4), torch.full((1, 2, 3, 4), 7.0), torch.tensor(1.0))
    calls = []

    def partial(state, mask, encoding, sigma):
        calls.append(mask)
        return torch.where(mask, torch.arange(1.0, len(state) + 1).reshape(-1, 1, 1, 1), 0).expand(state.shape)

    found = aggregate(partial, step, masks, Identity(), torch.ones(1, 1, 1, 1))
    assert len(calls) == 1 and calls[0].shape[0] == 2
    assert found[0, 0, 0].tolist() == [1.0, 1.5, 2.0, 7.0]


@pytest.mark.parametrize("encoding", [Identity(), coils()], ids=["pixels", "coils"])
def test_sequential_is_parallel_without_fresh_noise(encoding):
    measurement, partial, _ = problem(encoding)
    options = {
        **EXACT,
        "steps": 5,
        "acceleration": 3.0,
        "masks_per_step": 3,
        "prior": partial,
        "samples": 2,
        "likelihood": "none",
    }
    parallel = MSM(**options, eta=0.0)(measurement, generators(0, 1)).samples
    sequential = MSM(**options, eta=0.0, aggregate="sequential")(measurement, generators(0, 1)).samples
    torch.testing.assert_close(sequential, parallel, rtol=1e-3, atol=1e-4)
    noisy = MSM(**options, aggregate="sequential")(measurement, generators(0, 1)).samples
    assert not torch.allclose(noisy, parallel, atol=1e-2)


def test_sequential_renoises_to_the_same_level():
    seen = []

    def partial(state, mask, encoding, sigma):
        seen.append(state)
        return torch.where(mask, 3.0, 0.0).expand(state.shape).to(state.dtype)

    masks = torch.zeros(2, 1, 1, 1, 500, dtype=torch.bool)
    masks[..., :250] = True
    start = torch.zeros(1, 1, 40, 500)
    step = Step(start, start, torch.tensor(0.5))
    aggregate(partial, step, masks, Identity(), torch.full((1, 1, 1, 1), 0.5), "sequential", rng=generators(0, 1))
    assert seen[1][..., 250:].abs().max() == 0
    assert float(seen[1][..., :250].mean()) == pytest.approx(3, abs=0.03)
    assert float(seen[1][..., :250].std()) == pytest.approx(0.5, rel=0.03)


# --- exactness on a Gaussian ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks_per_step", [1, 3])
def test_unconditional_spread_is_the_priors_and_needs_the_carried_estimate(masks_per_step):
    partial = ExactPartial(torch.zeros(1, 1, 1, dtype=torch.complex64), 1.0)
    law, sigmas = RandomLines(3.0, centre_fraction=0.0), karras(20, 0.01, 400)
    start = torch.zeros(4, 1, 20, 60, dtype=torch.complex64)

    def sample(forget):
        rng = generators(0, 4)

        def estimate(step):
            masks = [torch.stack([law.draw((20, 60), g) for g in rng]) for _ in range(masks_per_step)]
            kept = step._replace(estimate=torch.zeros_like(start)) if forget else step
            return aggregate(partial, kept, torch.stack(masks), Identity(), step.sigma.reshape(1, 1, 1, 1))

        begin = start + float(sigmas[0]) * normal_like(start, rng)
        *_, last = reverse_diffusion(estimate, begin, sigmas, rng=rng, eta=ancestral(sigmas))
        return float(torch.view_as_real(last.estimate).std())

    assert sample(forget=False) == pytest.approx(0.965, abs=0.03)
    assert not 0.85 < sample(forget=True) < 1.15


@pytest.mark.parametrize("encoding", [Identity(), coils()], ids=["pixels", "coils"])
def test_measured_lines_included_give_the_exact_posterior(encoding):
    measurement, partial, mean = problem(encoding)
    expected, std = closed_form(measurement, mean, 1.0)
    n = 200
    method = MSM(prior=partial, samples=n, batch=n, likelihood="none", **EXACT)
    found = method(measurement, generators(0, 1))
    error = torch.view_as_real(((found.image[0] - expected) / std).to(torch.complex64))
    if isinstance(encoding, Identity):  # a measured pixel comes back as its posterior mean
        measured = measurement.mask[0, 0].expand(6, 10)
        assert float(error[measured].abs().max()) < 1e-2
        assert float(spread(found.samples)[0][measured].max()) < 1e-3
        error, ratio = error[~measured], (spread(found.samples)[0] / std)[~measured]
    else:
        ratio = spread(found.samples)[0] / std
    assert float(error.square().mean().sqrt()) < 1.5 / n**0.5
    assert 0.92 < float(ratio.square().mean().sqrt()) < 1.0


@pytest.mark.parametrize("encoding", [Identity(), coils()], ids=["pixels", "coils"])
def test_proximal_weight_from_the_noise_gives_the_posterior(encoding):
    measurement, partial, mean = problem(encoding)
    expected, std = closed_form(measurement, mean, 1.0)
    n = 200
    method = MSM(prior=partial, samples=n, batch=n, data_weight="noise", **EXACT, include_measured=False)
    found = method(measurement, generators(0, 1))
    error = torch.view_as_real(((found.image[0] - expected) / std).to(torch.complex64))
    assert float(error.square().mean().sqrt()) < 1.5 / n**0.5
    assert 0.9 < float((spread(found.samples)[0] / std).square().mean().sqrt()) < 1.0


def test_fixed_weights_return_the_data():
    measurement, partial, _ = problem(Identity())
    measured = measurement.mask.expand_as(measurement.values)
    for options in ({"likelihood": "gradient", "data_weight": 1.0}, {"data_weight": 1e4}):
        method = MSM(prior=partial, **EXACT, include_measured=False, **options)
        samples = method(measurement, generators(0, 1)).samples
        error = (samples - measurement.values[:, 0, None])[measured.expand_as(samples)]
        assert float(error.abs().max()) < 1e-3


@pytest.mark.parametrize(("noise", "weight"), [(0.01, 3.0), (0.3, 0.01)])
def test_data_noisier_than_the_estimate_pull_less(noise, weight):
    measurement, partial, _ = problem(coils())
    measurement = replace(measurement, noise_std=noise * float(measurement.working_scale().flatten()[0]))
    settings = {"prior": partial, "samples": 2, "steps": 3}
    given, other = (MSM(**settings, data_weight=w)(measurement, generators(0, 1)).image for w in (weight, 2 * weight))
    found = MSM(**settings)(measurement, generators(0, 1)).image
    assert float((found - given).norm()) < 1e-6 * float(found.norm())
    assert float((found - other).norm()) > 1e-4 * float(found.norm())
    fixed = MSM(**settings, include_measured=False)(measurement, generators(0, 1)).image  # the prior has no such lines
    three = MSM(**settings, include_measured=False, data_weight=3.0)(measurement, generators(0, 1)).image
    assert torch.equal(fixed, three)


def test_random_masks_stay_close_to_the_posterior_mean():
    measurement, partial, mean = problem(coils(), step=4)
    expected, std = closed_form(measurement, mean, 1.0)
    options = {**EXACT, "acceleration": 4.0, "masks_per_step": 3, "steps": 40, "likelihood": "none"}
    found = MSM(prior=partial, samples=50, batch=50, **options)(measurement, generators(0, 1))
    assert float(((found.image[0] - expected).abs() / std).square().mean().sqrt()) < 0.3


# --- rounds of completion ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointGaussian:
    """E[x | state on the mask] for rows of pixels of a covariance, noise by column."""

    covariance: Tensor  # (x, x), of each real component

    def __call__(self, state, mask, encoding, sigma):
        shown = mask[:, 0, 0].to(state.dtype)  # (b, x)
        power = (sigma.square().expand(len(state), 1, 1, state.shape[-1])[:, 0, 0]).to(state.dtype)
        c = self.covariance.to(state.dtype)
        seen = shown[:, :, None] * c * shown[:, None] + torch.diag_embed(shown * power + 1 - shown)
        gain = shown[:, :, None] * c * shown[:, None] @ torch.linalg.inv(seen)
        return (gain[:, None, None] @ state[..., None])[..., 0]


def test_rounds_of_completion_find_what_no_mask_showed():
    """Expectation maximisation: samples of each slice's posterior in place of clean slices, and the law they tell."""
    n, width, noise = 300, 6, 0.1
    place = torch.arange(width, dtype=torch.float32)
    truth = 0.7 ** (place[:, None] - place).abs()
    rows = normal((n, 1, width))[0][:, None] @ torch.linalg.cholesky(truth).mT.to(torch.complex64)  # (n, 1, 1, x)
    law, rng = RandomLines(2.0, centre_fraction=0.0), generators(1, n)
    masks = torch.stack([law.draw((1, width), generator) for generator in rng])
    values = Subsample(masks)(rows + noise * normal_like(rows, rng))
    data = Measurement(values, masks, Identity(), noise, full_scale=1.0)
    settings = {"samples": 1, "steps": 40, "sigma_max": 10.0, "batch": n, "likelihood": "none", "law": RandomLines(1.0)}

    def rounds(complete):
        found = [torch.eye(width)]
        for k in range(8):
            images = complete(JointGaussian(found[-1]), generators(10 + k, n))
            found.append((images.mT @ images.conj()).real / (2 * n))
        return found

    def sampled(prior, streams):
        return MSM(prior=prior, start="noise", **settings)(data, streams).image[:, 0]

    def averaged(prior, _):
        sigma = torch.where(masks, noise, 1e3)
        return prior(values, torch.ones_like(masks), Identity(), sigma)[:, 0, 0]

    found = rounds(sampled)
    errors = [float((one - truth).norm() / truth.norm()) for one in found]
    assert errors[0] > 0.5 and errors[1] > 0.2 > 0.15 > errors[-1]
    assert 0.9 < float(found[-1].diagonal().mean()) < 1.05
    assert float(rounds(averaged)[-1].diagonal().mean()) < 0.9  # means are too smooth to stand for images


# --- the contract --------------------------------------------------------------------------------------------------


def stack(*measurements):
    maps = [m.encoding.maps for m in measurements]
    return Measurement(
        torch.cat([m.values for m in measurements]),
        torch.cat([m.mask for m in measurements]),
        CoilFourier(torch.cat(maps)),
        0.1,
    )


@dataclass(frozen=True)
class Shrink:
    """A cheap partial denoiser that knows no scale."""

    def __call__(self, state, mask, encoding, sigma):
        image = encoding.adjoint(torch.where(mask, state / (1 + sigma.square()), 0))
        return Subsample(mask)(encoding(image / (1 + image.abs())))


QUICK = {"prior": Shrink(), "steps": 4, "masks_per_step": 3, "sigma_max": 1.0}


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_batches_never_change_a_result(mode):
    first, *_ = problem(coils())
    second, *_ = problem(coils(seed=9), seed=11, step=2)
    both = stack(first, second)
    method = MSM(**QUICK, samples=8, batch=8, aggregate=mode)
    found = method(both, generators(0, 2)).samples
    assert found.shape == (2, 8, 6, 10)
    for size in (4, 3, 16):  # 3 and 16 put samples of both slices into one group
        torch.testing.assert_close(replace(method, batch=size)(both, generators(0, 2)).samples, found)
    alone = method(second, generators(0, 1, first=1)).samples
    torch.testing.assert_close(alone[0], found[1])
    fewer = replace(method, samples=3)(both, generators(0, 2)).samples
    torch.testing.assert_close(fewer, found[:, :3])


def test_seeds():
    measurement, *_ = problem(coils())
    state = torch.get_rng_state()
    found = [MSM(**QUICK)(measurement, generators(seed, 1)).samples for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-3)
    assert float((found[0][:, 0] - found[0][:, 1]).abs().max()) > 1e-3
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("likelihood", ["proximal", "gradient", "none"])
def test_units_of_the_file_do_not_matter(likelihood):
    measurement, *_ = problem(coils())
    method = MSM(**QUICK, likelihood=likelihood)
    found = method(measurement, generators(0, 1)).samples
    small = replace(measurement, values=measurement.values * 1e-6, noise_std=measurement.noise_std * 1e-6)
    torch.testing.assert_close(method(small, generators(0, 1)).samples * 1e6, found, rtol=1e-4, atol=1e-4)
    scaled = measurement.scaled(torch.full((1, 1, 1, 1), 5.0))
    torch.testing.assert_close(method(scaled, generators(0, 1)).samples, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.1, torch.tensor([0.1])], ids=["unknown", "number", "by slice"])
def test_nothing_unmeasured_is_read(noise):
    measurement, *_ = problem(coils())
    measurement = replace(measurement, noise_std=noise)
    poisoned = replace(
        measurement,
        values=torch.where(measurement.mask, measurement.values, torch.nan),
        target=torch.full((1, 6, 10), torch.nan),
    )
    for options in ({}, {"likelihood": "gradient", "start": "noise"}, {"include_measured": False, "covering": False}):
        method = MSM(**QUICK, **options)
        found = method(poisoned, generators(0, 1)).samples
        torch.testing.assert_close(found, method(measurement, generators(0, 1)).samples)
        assert bool(torch.isfinite(found.abs()).all())


def test_measured_lines_reach_every_mask_with_their_own_noise():
    measurement, *_ = problem(coils())
    scale, seen = measurement.centre_scale(), []

    def spy(state, mask, encoding, sigma):
        seen.append((state, mask, sigma))
        return Subsample(mask)(state)

    MSM(prior=spy, steps=3, samples=2, masks_per_step=3)(measurement, generators(0, 1))
    measured = measurement.mask[0, 0, 0]
    assert len(seen) == 3
    for state, mask, sigma in seen:
        assert state.shape[0] == mask.shape[0] == 6  # two samples, three masks
        assert bool(mask[..., measured].all()) and not bool(mask.all())
        assert torch.allclose(state[..., measured], (measurement.values / scale)[..., measured].expand(6, -1, -1, -1))
        assert torch.allclose(sigma[..., measured], 0.1 / scale)
    assert [float(sigma[..., ~measured].max()) for *_, sigma in seen] == pytest.approx(karras(0.5, 0.01, 3).tolist())
    seen.clear()
    MSM(prior=spy, steps=1, samples=1, include_measured=False)(measurement, generators(0, 1))
    assert not bool(seen[0][1][..., measured].all()) and float(seen[0][2].min()) == 0.5


@pytest.mark.parametrize("places", [False, True])
def test_starts_from_the_estimate_of_blank_lines(places):
    measurement, *_ = problem(coils())
    if places:
        measurement = replace(measurement, mask=measurement.mask.expand(1, 1, 6, 10))
    scale, seen = measurement.centre_scale(), []

    class Spy:
        keeps_data = True

        def __call__(self, state, mask, encoding, sigma):
            seen.append((state, mask, sigma.expand(len(state), 1, *mask.shape[-2:])))
            return torch.where(mask, torch.full_like(state, 2.0), 0)

    method = MSM(prior=Spy(), steps=3, samples=1, sigma_max=0.02, likelihood="none")
    steps = list(method.iterate(measurement, generators(0, 1)))
    state, mask, sigma = seen[0]
    measured = measurement.mask
    assert len(seen) == 4 and bool(mask.all()) and mask.shape == measured.shape
    assert torch.equal(state, Subsample(measured)(measurement.values / scale))
    torch.testing.assert_close(sigma[measured], (0.1 / scale).flatten().expand(int(measured.sum())))
    assert bool((sigma[~measured] == 100).all())
    # the first step begins from what the start says plus noise of the first level
    begin = seen[1][0][(~measured).expand_as(state)] - 2
    assert 0.015 < float(begin.real.std()) < 0.025 and float(begin.abs().max()) < 0.15
    torch.testing.assert_close(steps[0].estimate, torch.full_like(state, 2.0))
    assert MSM(prior=Spy(), steps=3, samples=2)(measurement, generators(0, 1)).details["NFE"] == 4
    seen.clear()
    list(MSM(prior=Spy(), steps=3, samples=1, start="warm").iterate(measurement, generators(0, 1)))
    assert len(seen) == 3


def test_each_slice_has_a_gain_of_its_own():
    one, *_ = problem(coils())
    batch = replace(one, values=torch.cat([one.values, 2j * one.values, one.values]), mask=one.mask.expand(3, 1, 1, 10))
    asked, gains = [], []

    class Spy:
        def cross_validate(self, values, mask, encoding, noise, rng, *, centre, image):
            asked.append((values, noise, float(torch.rand((), generator=rng))))
            assert centre.shape == (1, 1, 1, 1) and float(centre) == centre_width(mask)
            return CrossValidation(torch.full((1, 1, 1, 1), 0.1 * len(asked)), torch.full((1,), 0.04 * len(asked) ** 2))

        def __call__(self, state, mask, encoding, sigma, gain=None):
            gains.append(None if gain is None else gain.flatten().tolist())
            return torch.where(mask, torch.ones_like(state), 0)

    method = MSM(prior=Spy(), steps=1, samples=2, masks_per_step=2, batch=3)
    result = method(batch, generators(0, 3))
    found = result.samples
    expected = torch.tensor([0.2, 0.4, 0.6]) * batch.centre_scale().flatten()
    torch.testing.assert_close(result.expected_error, expected)
    assert result.details["expected_error"] == pytest.approx(expected.tolist())
    torch.testing.assert_close(result.std.square().flatten(1).mean(1).sqrt(), expected)
    assert replace(method, calibrate=False)(batch, generators(0, 3)).expected_error is None
    del asked[3:], gains[2:]
    assert len(asked) == 3 and asked[0][2] != asked[1][2]
    torch.testing.assert_close(asked[1][0][0], 2j * batch.values[0] / batch.centre_scale()[1])
    assert gains == [pytest.approx([0.1, 0.1, 0.2] * 2), pytest.approx([0.2, 0.3, 0.3] * 2)]
    gains.clear()
    replace(method, adapt=False)(batch, generators(0, 3))
    assert len(asked) == 3 and gains == [None, None] and found.shape == (3, 2, 6, 10)


def test_samples_are_moved_to_the_prior_s_own_estimate():
    one, *_ = problem(coils())
    batch = replace(one, values=torch.cat([one.values, 2 * one.values]), mask=one.mask.expand(2, 1, 1, 10))
    image = torch.arange(60.0).reshape(1, 1, 6, 10) + 1j

    class Told:
        answer = image

        def cross_validate(self, values, mask, encoding, noise, rng, *, centre, image):
            return CrossValidation(torch.ones(1, 1, 1, 1), torch.ones(1), self.answer if image else None)

        def __call__(self, state, mask, encoding, sigma, gain=None):
            return torch.where(mask, state, 0)

    method = MSM(prior=Told(), steps=2, samples=3, conditional_mean=0.0)
    plain = method(batch, generators(0, 2)).samples
    for share in (0.25, 1.0):
        moved = replace(method, conditional_mean=share)(batch, generators(0, 2)).samples
        torch.testing.assert_close(moved - moved.mean(1, keepdim=True), plain - plain.mean(1, keepdim=True))
        own = image[0] * batch.centre_scale().reshape(2, 1, 1)
        torch.testing.assert_close(moved.mean(1), (1 - share) * plain.mean(1) + share * own)
    unasked = replace(method, adapt=False)
    torch.testing.assert_close(
        replace(unasked, conditional_mean=1.0)(batch, generators(0, 2)).samples,
        unasked(batch, generators(0, 2)).samples,
    )
    Told.answer = None  # a prior that cannot tell
    torch.testing.assert_close(replace(method, conditional_mean=1.0)(batch, generators(0, 2)).samples, plain)
    with pytest.raises(InputError, match=r"conditional_mean=1\.5"):
        MSM(conditional_mean=1.5)


def test_iterate_yields_what_a_call_does():
    measurement, *_ = problem(coils())
    method = MSM(**QUICK, samples=3, batch=2)
    steps = list(method.iterate(measurement, generators(0, 1)))
    assert [len(step.state) for step in steps] == [2] * 4 + [1] * 4
    found = method(measurement, generators(0, 1))
    image = measurement.encoding.adjoint(steps[3].estimate) * measurement.centre_scale()
    torch.testing.assert_close(image[:, 0], found.samples[0, :2])
    assert found.details["NFE"] == 12 and found.details["steps"] == 4 and found.std is not None
    assert torch.is_inference_mode_enabled() is False


def test_two_sets_of_maps_and_a_mask_of_single_places():
    maps = normal((2, 3, 6, 10), 2)
    maps, _ = torch.linalg.qr(maps[0].permute(2, 3, 1, 0))  # orthonormal sets at every pixel
    measurement, *_ = problem(CoilFourier(maps.permute(3, 2, 0, 1)[None].contiguous()), channels=2)
    places = measurement.mask.expand(1, 1, 6, 10).clone()
    places[..., 0, 0] = False
    found = MSM(**QUICK)(replace(measurement, mask=places), generators(0, 1)).samples
    assert found.shape == (1, 4, 6, 10) and bool(torch.isfinite(found.abs()).all())


def test_paper_preset_runs_with_an_image_network():
    from msmri.model.adm import ADMConfig, ADMUNet

    torch.manual_seed(0)
    network = ADMUNet(ADMConfig(16, 2, 2, 32, 1, (1, 2), (8,), head_channels=16))
    prior = EpsilonVP(ComplexChannels(network.eval()))
    measurement, *_ = problem(coils((16, 20)), shape=(16, 20))
    method = MSM.preset("paper", prior=prior)
    assert (method.steps, method.masks_per_step, method.eta, method.data_weight) == (200, 3, 0.85, 2.0)
    assert (method.schedule, method.start, method.include_measured, method.covering) == ("vp", "noise", False, False)
    assert (method.likelihood, method.samples, method.conditional_mean) == ("gradient", 1, 0.0)
    levels = [float(step.sigma) for step in replace(method, steps=4).iterate(measurement, generators(0, 1))]
    assert levels == pytest.approx([*VPSchedule().sigmas[[500, 250, 0]].tolist(), 0.0], rel=1e-5)
    found = replace(method, steps=8)(measurement, generators(0, 1))
    assert found.samples.shape == (1, 1, 16, 20) and found.details["NFE"] == 24
    assert bool(torch.isfinite(found.samples.abs()).all())


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 0},
        {"likelihood": "magic"},
        {"eta": 1.5},
        {"sigma_min": 5.0},
        {"data_weight": -1.0},
        {"acceleration": 0.5},
        {"likelihood": "gradient", "data_weight": "noise"},
        {"sigma_max": float("inf")},
    ],
)
def test_refused_options(options):
    with pytest.raises(InputError):
        load_method("msm", **options)


def test_refused_measurements():
    measurement, *_ = problem(coils())
    with pytest.raises(InputError, match="coil maps"):
        MSM(**QUICK)(replace(measurement, encoding=None), generators(0, 1))
    with pytest.raises(InputError, match="NaN"):
        MSM(**QUICK)(replace(measurement, values=measurement.values * torch.nan), generators(0, 1))
    with pytest.raises(InputError, match="preset"):
        MSM.preset("fast")
    with pytest.raises(ValueError, match="generators"):
        MSM(**QUICK)(measurement, generators(0, 2))


def test_likelihoods_and_their_default_weights():
    measurement, *_ = problem(coils(), step=2)
    values, measured = measurement.values / measurement.centre_scale(), measurement.mask
    masks = []

    def ones(state, mask, encoding, sigma):
        masks.append(mask)
        return torch.where(mask, torch.ones_like(state), 0)

    method = MSM(prior=ones, steps=1, samples=1, masks_per_step=1, start="noise", include_measured=False)
    (step,) = replace(method, likelihood="gradient").iterate(measurement, generators(0, 1))
    expected = torch.where(masks[-1], torch.where(measured, 2 * values - 1, 1), 0)  # only where a mask reached
    torch.testing.assert_close(step.estimate, expected)
    assert bool((measured & ~masks[-1]).any()) and bool((measured & masks[-1]).any())

    (step,) = method.iterate(measurement, generators(0, 1))
    plain = torch.where(masks[-1], torch.ones_like(values), 0)
    expected, _ = proximal(plain, values, measured, measurement.encoding, weight=1 / 3, iterations=6)
    torch.testing.assert_close(step.estimate, expected, rtol=1e-4, atol=1e-5)

    (step,) = replace(method, likelihood="none", project=True).iterate(measurement, generators(0, 1))
    torch.testing.assert_close(step.estimate, project(plain, measurement.encoding), rtol=1e-4, atol=1e-5)
