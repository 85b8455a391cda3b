"""The measures inside the diagnostics, each against what is known exactly."""

import copy
import math
import statistics
from dataclasses import replace

import pytest
import torch

from msmri.diagnostics.adaptation import adapt_prior, held_out_error, keep_aside
from msmri.diagnostics.calibration import (
    interval_coverage,
    local_rms,
    needed_factor,
    normal_coverage,
    pivots,
    rank_correlation,
)
from msmri.diagnostics.choose_w import Adaptive, Spread, interpolate, posterior_image
from msmri.diagnostics.gaussian import GaussianPartial
from msmri.diagnostics.noisy_reference import crossing, excess_error, image_psnr, reference
from msmri.diagnostics.resolution import one_pass
from msmri.diagnostics.score_variance import aggregated_variance, measure, slope
from msmri.diagnostics.subjects import Subject, resample, scaled
from msmri.errors import InputError
from msmri.io import write_scan
from msmri.measurement import Measurement
from msmri.model.denoiser import GaussianDenoiser
from msmri.model.partial import MeasurementPartial
from msmri.model.unet import UNet
from msmri.physics.masks import RandomLines, draw_masks
from msmri.physics.operators import CoilFourier, Identity
from msmri.physics.simulate import coil_maps, phantom, simulate_kspace
from msmri.sampling.aggregate import ImagePartial
from msmri.sampling.schedule import karras
from msmri.tensors import generators, normal_like, spawn
from msmri.testing import phantom_measurement


def normal(shape, seed=0, dtype=torch.complex64):
    return normal_like(torch.zeros(1, *shape, dtype=dtype), generators(seed, 1))[0]


@pytest.fixture(scope="module")
def prior():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MeasurementPartial(UNet(4, 2, (8,), 1, conditions=4, patch=2), wiener_iterations=3,
                                   consistency_iterations=2)  # fmt: skip
        model.spectrum.copy_(torch.linspace(0, 8, 48).neg().exp())
    return model.eval().requires_grad_(False)


# variance of the score


@pytest.mark.parametrize(("w", "share"), [(1, 1.0), (4, 1.0), (1, 0.5), (3, 0.5)])
def test_the_variance_of_an_aggregate_is_that_of_its_mean(w, share):
    """Independent estimates of variance 4 a component: 4 E[1/n | n > 0], n of w masks reaching a place."""
    n, shape = 60, (3, 40, 30)
    masks = torch.rand(n, 1, *shape[1:], generator=torch.Generator().manual_seed(1)) < share
    estimates = torch.where(masks, normal(shape, 9) + 2 * torch.stack([normal(shape, k) for k in range(n)]), 0)
    reach = [math.comb(w, k) * share**k * (1 - share) ** (w - k) for k in range(w + 1)]
    expected = 4 * sum(p / k for k, p in enumerate(reach) if k) / (1 - reach[0])
    assert aggregated_variance(estimates, masks, w) == pytest.approx(expected, rel=0.05)
    assert math.isnan(aggregated_variance(estimates[:1], masks[:1], 1))


def test_masks_that_all_say_the_same_make_no_variance():
    state, masks = normal((2, 8, 10)), draw_masks(RandomLines(2.0), (8, 10), generators(0, 6))
    estimates = torch.where(masks, state, 0)
    assert max(aggregated_variance(estimates, masks, w) for w in (1, 2, 3)) < 1e-12


def test_the_published_form_has_a_variance_that_grows_without_limit():
    """With several coils S E E^H S z is not z: an error that does not vanish with sigma, however good the denoiser."""
    person = scaled(phantom_measurement((24, 20), slices=1))
    exact = GaussianDenoiser(torch.zeros(1, 24, 20, dtype=torch.complex64), torch.full((1, 24, 20), 0.5))
    found = {
        sigma: measure(ImagePartial(exact), person, RandomLines(3.0), sigma, generators(0, 1), masks=6, groups=(1,),
                       within=False)["1"]
        for sigma in (1e-2, 3e-3, 1e-3)
    }  # fmt: skip
    assert slope(found) == pytest.approx(-4, abs=0.05)
    assert slope({s: 7 * s**-1.5 for s in (1.0, 0.1, 0.01, 0.001)}) == pytest.approx(-1.5)


# references of noisy training


def test_the_reference_of_a_known_gaussian_has_its_posterior_error():
    v, rho, shape = 0.3, 0.4, (1, 150, 140)
    clean = v**0.5 * normal(shape)[None]
    person = Measurement(clean, torch.ones(1, 1, 1, 140, dtype=torch.bool), Identity())
    partial = ImagePartial(GaussianDenoiser(torch.zeros(shape, dtype=torch.complex64), torch.full(shape, v)))
    noisy, found = reference(partial, person, rho, generators(3, 1))
    peak = 10 * math.log10(float(clean.abs().max()) ** 2)
    assert image_psnr(clean, noisy) == pytest.approx(peak - 10 * math.log10(2 * rho**2), abs=0.1)
    error = v * rho**2 / (v + rho**2)
    assert image_psnr(clean, found) == pytest.approx(peak - 10 * math.log10(2 * error), abs=0.1)


def test_the_cost_of_learning_from_references_is_that_of_learning_from_them():
    v, rho, sigma, n = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64), 0.3, 0.1, 400_000
    rng = torch.Generator().manual_seed(0)
    clean, noise, more = (torch.randn(n, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    clean = clean * v.sqrt()
    made = v / (v + rho**2) * (clean + rho * noise)  # pseudo-clean: the posterior mean
    state = made + sigma * more
    learned = (made * state).sum(0) / state.square().sum(0)  # regression of the reference on its noisy self
    error = (learned * (clean + sigma * more) - clean).square().mean(0).sum()
    least = (v * sigma**2 / (v + sigma**2)).sum()
    assert excess_error(v, rho, sigma) == pytest.approx(10 * math.log10(float(error / least)), abs=0.05)
    assert excess_error(v, 1e-6, sigma) == pytest.approx(0, abs=1e-6)


def test_a_crossing_is_found_on_a_logarithmic_axis():
    rows = [{"rho": 0.1, "reference dB": 30.0}, {"rho": 0.4, "reference dB": 20.0}, {"rho": 0.8, "reference dB": 10.0}]
    assert crossing(rows, 25.0) == pytest.approx(0.2)
    assert crossing(rows, 35.0) is None and crossing(rows, 5.0) is None


# how many masks


def test_the_spread_is_that_of_the_estimates_where_masks_meet():
    shape, masks = (2, 6, 30), draw_masks(RandomLines(2.0), (6, 30), generators(0, 7))
    ignored = torch.zeros(1, 1, 1, 30, dtype=torch.bool)
    ignored[..., :10] = True
    estimates = torch.where(masks, torch.stack([normal(shape, k) for k in range(7)]) + 50, 0)
    spread = Spread(estimates[:1], ignored)
    for estimate, mask in zip(estimates, masks):
        spread.add(torch.where(mask, estimate, torch.nan)[None], mask[None])
    values, means = [], spread.mean(torch.full((1, *shape), 9.0 + 0j))
    for column in range(30):
        seen = estimates[masks[:, 0, 0, column]][..., column]
        if len(seen) == 0:
            assert bool((means[..., column] == 9).all())
            continue
        torch.testing.assert_close(means[0, ..., column], seen.mean(0), rtol=1e-5, atol=1e-4)
        if len(seen) > 1 and column >= 10:
            values.append(torch.view_as_real(seen).var(0).flatten())
    assert spread.variance() == pytest.approx(float(torch.cat(values).mean()), rel=1e-3)
    assert Spread(estimates[:1], ignored).variance() is None


def test_the_rule_asks_for_the_masks_that_its_tolerance_needs():
    rule = Adaptive(0.5, most=8)
    assert [rule.wanted(v, 1.0) for v in (0.0, 0.5, 0.51, 1.0, 1.01, 100.0)] == [2, 2, 3, 4, 5, 8]
    assert rule.wanted(4.0, 2.0) == rule.wanted(1.0, 1.0) and rule.wanted(None, 1.0) == 3
    curve = [(4.0, 10.0), (1.0, 0.0), (16.0, 10.0)]
    assert [interpolate(curve, at) for at in (0.5, 1.0, 2.0, 8.0, 99.0)] == pytest.approx([0, 0, 5, 10, 10])


@pytest.mark.parametrize("choose", [1, Adaptive(0.5)])
def test_images_are_drawn_from_the_posterior(choose):
    """Lines of a known Gaussian, some measured: mean and covariance of the others are those of the conditional law."""
    root = normal((5, 5), 3, torch.float64)
    cov = root @ root.mT / 5 + 0.1 * torch.eye(5, dtype=torch.float64)
    measured = torch.tensor([True, True, False, False, False])
    values = torch.tensor([1.0, -0.5, 0, 0, 0], dtype=torch.float64).reshape(1, 1, 1, 5)
    case = Measurement(values, measured.reshape(1, 1, 1, 5), Identity(), noise_std=torch.tensor(0.1).double())
    n, drawn, taken = (200 if choose == 1 else 20), [], []
    for rng in generators(0, n):
        image, counts = posterior_image(
            GaussianPartial(cov), case, RandomLines(1.0), rng, karras(4.0, 0.02, 20), choose
        )
        drawn.append(image[0])
        taken += counts
    assert set(taken) == ({1} if choose == 1 else {2})  # all masks agree: nothing more is wanted
    found = torch.stack(drawn)
    gain = cov[:, :2] @ torch.linalg.inv(cov[:2, :2] + 0.01 * torch.eye(2, dtype=torch.float64))
    mean, expected = gain @ values[0, 0, 0, :2], cov - gain @ cov[:2]
    free = slice(2, 5)
    error = found[:, free].std(0) / n**0.5
    assert float(((found.mean(0) - mean)[free] / error).abs().max()) < 4
    if choose == 1:
        spread = torch.cov(found.mT)[free, free]
        torch.testing.assert_close(spread, expected[free, free], rtol=0, atol=0.3 * float(expected[free, free].max()))


# calibration


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_normal_intervals_hold_their_share_when_the_std_is_right(factor):
    rng = torch.Generator().manual_seed(0)
    std = 0.1 + torch.rand(200_000, generator=rng, dtype=torch.float64)
    error = factor * std * torch.randn(200_000, generator=rng, dtype=torch.float64)
    found = normal_coverage(error, std, (0.3, 0.9))
    expected = [math.erf(statistics.NormalDist().inv_cdf(0.5 + p / 2) / factor / 2**0.5) for p in (0.3, 0.9)]
    assert found == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_one_more_draw_of_the_same_law_is_covered_as_stated(n):
    values = 0.3 + 0.7 * torch.randn(n + 1, 200_000, generator=torch.Generator().manual_seed(n))
    pivot = pivots(values[:n], values[n])
    levels = (0.2, 0.5, 0.9)
    assert interval_coverage(pivot, n, levels) == pytest.approx(list(levels), abs=0.006)
    assert needed_factor(pivot, n) == pytest.approx(1, abs=0.02)
    narrow = pivots(0.3 + 0.5 * (values[:n] - 0.3), 0.3 + (values[n] - 0.3) * 0 + (values[n] - 0.3))
    assert interval_coverage(narrow, n, (0.9,))[0] < 0.85 and needed_factor(narrow, n) > 1.4


def test_rank_correlation_is_that_of_scipy():
    from scipy.stats import spearmanr

    a, b = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(a, a**3 + b) == pytest.approx(float(spearmanr(a, a**3 + b).statistic), abs=1e-6)


def test_the_local_rms_is_that_of_the_pixels_around():
    image = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    found = local_rms(image, 5)
    assert float(found[4, 4]) == pytest.approx(float(image[2:7, 2:7].square().mean().sqrt()))
    assert float(found[0, 7]) == pytest.approx(float(image[:3, 5:].square().mean().sqrt()))


# people, one pass


def test_people_are_clean_of_one_field_of_view_and_known_exactly():
    subject = Subject()
    small, large = (subject.people(1, size)[0] for size in (40, 80))
    for person, size in ((small, 40), (large, 80)):
        assert person.values.shape == (1, 6, size, size) and bool(person.mask.all())
        image = person.encoding.adjoint(person.values)[0, 0].abs()
        torch.testing.assert_close(image, person.target[0], rtol=0, atol=1e-5)
        assert float(torch.quantile(person.target, 0.99)) == pytest.approx(1, abs=1e-4)
    down = resample(large.target[0], 40)
    assert float(torch.corrcoef(torch.stack([down.flatten(), small.target.flatten()]))[0, 1]) > 0.999  # the same image
    torch.testing.assert_close(subject.people(1, 40)[0].values, small.values)
    cut = subject.measure(small)
    assert float(cut.acceleration) > 2 and torch.equal(subject.measure(small).mask, cut.mask)
    twice = subject.people(3, 16)  # the demo scan has two slices
    assert not torch.allclose(twice[0].target, twice[1].target) and twice[2].source != twice[0].source


def test_the_noise_floor_is_taken_off_the_images_of_people(tmp_path):
    rng, coils, std = torch.Generator().manual_seed(0), 8, 0.1
    clean = phantom((64, 64), rng)
    kspace, _ = simulate_kspace(clean[None], coil_maps((64, 64), coils, rng), rng, noise_std=std)
    write_scan(tmp_path / "noisy.h5", kspace)
    ((name, found),) = Subject([tmp_path / "noisy.h5"]).magnitudes(1)
    excess = (found.square() - clean.square())[clean > 0.2].mean()
    assert name == "noisy.h5#0" and abs(float(excess)) < 0.15 * (2 * coils * std**2)


def test_resampling_keeps_brightness_and_finds_its_way_back():
    down, across = ((torch.arange(n) - n // 2) / 8 for n in (50, 60))
    image = torch.exp(-(down[:, None] ** 2) - across**2)
    fine = resample(image, 91)
    assert float(fine.max()) == pytest.approx(1, abs=2e-3) and fine.shape == (91, 91)
    square = resample(image, 60)  # one axis is widened only
    torch.testing.assert_close(square.max(0).values, image.max(0).values, rtol=0, atol=1e-3)
    torch.testing.assert_close(resample(fine, 60), square, rtol=0, atol=1e-3)


def test_one_pass_is_the_priors_own_estimate(prior):
    case = scaled(phantom_measurement((32, 24), slices=1))
    both = one_pass(prior, case)
    first, last = prior.estimates(
        case.values, torch.ones_like(case.mask), case.encoding, torch.where(case.mask, case.noise_std, 100.0)
    )
    torch.testing.assert_close(both["prior"], last[0, 0].abs())
    torch.testing.assert_close(both["without networks"], first[0, 0].abs())


# adaptation


def test_lines_kept_aside_are_measured_ones_outside_the_centre():
    mask = draw_masks(RandomLines(3.0), (16, 64), generators(0, 3))
    aside = keep_aside(mask, 0.3, torch.Generator().manual_seed(0))
    assert bool((mask | ~aside).all()) and not bool(aside[..., 30:34].any())
    outer = mask.clone()
    outer[..., 64 // 2 - 2 : 64 // 2 + 3] = False
    assert bool((aside.sum((1, 2, 3)) >= 1).all()) and int(aside.sum()) < 0.5 * int(outer.sum())


def scan_of(slices=2):
    made = scaled(phantom_measurement((32, 40), slices=slices))
    return Measurement(made.values, made.mask, CoilFourier(made.encoding.maps), noise_std=made.noise_std)


def test_adaptation_keeps_what_predicts_lines_best_and_sees_nothing_unmeasured(prior):
    scan = scan_of()
    prior = copy.deepcopy(prior)
    torch.nn.init.normal_(prior.network.network.network.conv_out.weight, std=0.1, generator=torch.Generator())
    checks = list(
        adapt_prior(prior, scan, torch.Generator().manual_seed(0), steps=12, learning_rate=3e-3, check_every=4)
    )
    held = {check.step: check.held_out for check in checks if not math.isnan(check.held_out)}
    assert list(held) == [0, 4, 8, 12] and min(held.values()) < held[0]
    best = checks[-1].model
    assert best is not prior and not best.training and not any(p.requires_grad for p in best.parameters())
    poisoned = Measurement(torch.where(scan.mask, scan.values, torch.nan), scan.mask, scan.encoding,
                           noise_std=scan.noise_std, target=torch.full((2, 32, 40), torch.nan))  # fmt: skip
    again = list(
        adapt_prior(prior, poisoned, torch.Generator().manual_seed(0), steps=4, learning_rate=3e-3, check_every=4)
    )
    assert again[-1].held_out == pytest.approx(held[4], abs=1e-4)
    aside = keep_aside(scan.mask, 0.1, torch.Generator().manual_seed(9))
    hidden = Measurement(torch.where(aside, torch.nan, scan.values), scan.mask, scan.encoding, noise_std=scan.noise_std)
    assert math.isnan(held_out_error(prior, hidden, aside)) and math.isfinite(held_out_error(prior, scan, aside))


def test_lines_kept_aside_are_not_trained_on(prior):
    scan, share = scan_of(1), 0.2
    aside = keep_aside(scan.mask, share, spawn(torch.Generator().manual_seed(0), 1)[0])  # those that will be chosen
    poisoned = replace(scan, values=torch.where(aside, torch.nan, scan.values))
    rng = torch.Generator().manual_seed(0)
    first, *steps = adapt_prior(prior, poisoned, rng, steps=4, share=share, check_every=100)
    assert math.isnan(first.held_out) and all(math.isfinite(check.loss) for check in steps)


def test_adaptation_that_only_harms_gives_the_prior_back(prior):
    checks = list(adapt_prior(prior, scan_of(1), torch.Generator().manual_seed(0), steps=3, learning_rate=3.0))
    assert checks[-1].held_out > checks[0].held_out and checks[-1].model is prior


def test_a_prior_of_one_noise_level_is_refused():
    with pytest.raises(InputError, match="cannot be fine-tuned"):
        next(iter(adapt_prior(torch.nn.Identity(), scan_of(1), torch.Generator())))
