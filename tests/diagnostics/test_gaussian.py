import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from msmri.diagnostics.gaussian import GaussianPartial, LineModel, gaussian_kl
from msmri.physics.operators import Identity
from msmri.sampling.aggregate import aggregate
from msmri.sampling.reverse import reverse_diffusion
from msmri.sampling.schedule import ancestral, karras
from msmri.tensors import generators, normal_like


def covariance(n, seed=0):
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / n**0.5
    return root @ root.mT + 0.2 * torch.eye(n, dtype=torch.float64)


def model(n=4, *, steps=12, probability=0.4, seed=0):
    return LineModel(covariance(n, seed), probability, karras(8.0, 0.05, steps))


def test_the_partial_denoiser_is_the_conditional_mean_of_the_lines_shown():
    prior, sigma = GaussianPartial(covariance(5)), torch.tensor([0.3, 0.7, 0.1, 2.0, 0.5], dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False])
    state = torch.randn(1, 1, 1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shown = mask.nonzero().flatten()
    part = prior.covariance[shown][:, shown]
    expected = torch.zeros(5, dtype=torch.float64)
    expected[shown] = part @ torch.linalg.inv(part + torch.diag(sigma[shown] ** 2)) @ state[0, 0, 0, shown]
    found = prior(state, mask[None, None, None], Identity(), sigma[None, None, None])
    torch.testing.assert_close(found[0, 0, 0], expected)
    poisoned = torch.where(mask, state, torch.nan)
    torch.testing.assert_close(prior(poisoned, mask[None, None, None], Identity(), sigma[None, None, None]), found)


def test_the_divergence_of_gaussians_is_that_of_torch():
    p, q = covariance(4, 1), covariance(4, 2)
    zero = torch.zeros(4, dtype=torch.float64)
    expected = kl_divergence(MultivariateNormal(zero, p), MultivariateNormal(zero, q))
    assert gaussian_kl(p, q) == pytest.approx(float(expected), rel=1e-10) and gaussian_kl(p, p) == pytest.approx(0)


def test_moments_and_bound_are_those_of_simulated_steps():
    """One step from the ideal law by brute force: the mean, the variance and its cost, for every step of a ladder."""
    lines, n = model(3, steps=5), 100_000
    rng = torch.Generator().manual_seed(0)
    levels = lines.sigmas.tolist()
    for number, (sigma, after) in enumerate(pairwise(levels)):
        z = torch.randn(n, 3, generator=rng, dtype=torch.float64) @ torch.linalg.cholesky(lines.ideal[number]).mT
        masks = torch.rand(n, 3, generator=rng) < lines.probability
        estimate = (lines.partial.matrix(masks, sigma) @ z[..., None])[..., 0]
        score = torch.where(masks, estimate - z, 0) / sigma**2 / lines.probability
        mean = (z @ lines.means[number].mT - z) / sigma**2
        bias = (score - mean).mean(0) / ((score - mean).std(0) / n**0.5)
        assert float(bias.abs().max()) < 4.5
        squared = (score - mean).square().sum(1)
        error = float(squared.std()) / n**0.5
        assert float(lines.variances[number]) == pytest.approx(float(squared.mean()), abs=4.5 * error)
        # what the sampler's own step makes of it: eta^2 = 1 - (after / sigma)^2
        eta = math.sqrt(1 - after**2 / sigma**2)
        kept = after * math.sqrt(1 - eta**2) / sigma
        moved = (1 - kept) * sigma**2 * (score - mean)
        cost = float(moved.square().sum(1).mean()) / (2 * (after * eta) ** 2)
        assert float(lines.weights[number] * lines.variances[number]) == pytest.approx(cost, rel=0.05)
    assert lines.bound(1) == pytest.approx(float((lines.weights * lines.variances).sum()))


@pytest.mark.parametrize("w", [1, 3])
def test_the_exact_covariance_is_that_of_sequences_of_masks(w):
    lines = model(3)
    found = lines.divergence(w, torch.Generator().manual_seed(w), trials=4000)
    expected = float(lines.moments(w).trace() / lines.ideal[-1].trace())
    assert expected > 1.01 and found["spread"] == pytest.approx(expected, abs=0.1 * (expected - 1))
    assert found["kl moments"] == pytest.approx(gaussian_kl(lines.ideal[-1], lines.moments(w)), rel=0.25)


@pytest.mark.parametrize("w", [1, 2])
def test_the_sampler_as_run_is_the_packages_own(w):
    """Covariance of samples drawn by ``aggregate`` and ``reverse_diffusion`` against the recursion."""
    lines, n = model(3, steps=8, probability=0.5), 4000
    rng = generators(0, n)
    start = float(lines.sigmas[0]) * normal_like(torch.zeros(n, 1, 1, 3, dtype=torch.float64), rng)

    def estimate(step):
        draw = [torch.rand(w, 1, 1, 3, generator=g) < lines.probability for g in rng]
        level = step.sigma.reshape(1, 1, 1, 1).double()
        return aggregate(lines.partial, step, torch.stack(draw, 1), Identity(), level)

    steps = list(reverse_diffusion(estimate, start, lines.sigmas, rng=rng, eta=ancestral(lines.sigmas)))
    state = steps[-2].state[:, 0, 0]  # at the lowest noise level
    assert float(steps[-2].sigma) == pytest.approx(float(lines.sigmas[-1]))
    drawn = state.mT @ state / n
    found = lines.divergence(w, torch.Generator().manual_seed(1), trials=4000, unbiased=False)
    assert found["spread"] == pytest.approx(float(drawn.trace() / lines.ideal[-1].trace()), rel=0.06)
    assert found["kl moments"] == pytest.approx(gaussian_kl(lines.ideal[-1], drawn), rel=0.4, abs=0.003)


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_and_falls_as_one_over_w(seed):
    lines = model(4, steps=15, probability=0.3 + 0.15 * seed, seed=seed)
    exact = [gaussian_kl(lines.ideal[-1], lines.moments(w)) for w in (1, 2, 4, 8)]
    assert all(lines.bound(w, largest=True) >= lines.bound(w) > found for w, found in zip((1, 2, 4, 8), exact))
    assert lines.bound(4) == pytest.approx(lines.bound(1) / 4)
    assert all(a > 2.5 * b for a, b in pairwise(exact))  # the divergence itself falls faster: by 4 in the end
    assert lines.divergence(2, torch.Generator(), trials=400)["kl"] < lines.bound(2)


def test_the_variance_stays_bounded_on_gaussian_lines():
    lines = replace(model(), sigmas=karras(8.0, 1e-3, 40))
    low = lines.variances[lines.sigmas[:-1] < 0.01]
    assert len(low) > 4 and float(low.max() / low.min()) < 1.02


def test_infinitely_many_masks_miss_what_no_mask_shows():
    fine = karras(20.0, 0.02, 300)
    alone = LineModel(torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)), 0.3, fine)
    assert alone.floor() < 2e-3  # independent lines: what a mask hides says nothing
    correlated = LineModel(covariance(3) + 1.0, 0.3, fine)
    assert correlated.floor() > 0.02
    assert replace(correlated, probability=0.9).floor() < correlated.floor() / 2


def test_passes_are_shared_out_by_the_spread_of_estimates():
    lines, step, n = model(3, steps=6), 3, 60_000
    rng, sigma = torch.Generator().manual_seed(0), float(lines.sigmas[step])
    z = torch.randn(n, 3, generator=rng, dtype=torch.float64) @ torch.linalg.cholesky(lines.ideal[step]).mT
    masks = torch.rand(n, 3, generator=rng) < lines.probability
    rest = (lines.partial.matrix(masks, sigma) @ z[..., None])[..., 0] - z @ lines.means[step].mT
    expected = torch.stack([rest[masks[:, k], k].square().mean() for k in range(3)]).mean()
    assert float(lines.spreads[step]) == pytest.approx(float(expected), rel=0.05)
    plan = lines.share_out(400, rule="spread")
    fresh = torch.tensor([b**2 * (1 - b**2 / a**2) for a, b in pairwise(lines.sigmas.tolist())])
    wish = lines.spreads / fresh
    several = [k for k in range(5) if plan[k] > 20]
    shares = torch.tensor([plan[k] for k in several]) / wish[several]
    assert sum(plan) == 400 and len(several) > 1 and float(shares.max() / shares.min()) < 1.06


@pytest.mark.parametrize("total", [11, 40, 200])
def test_passes_are_shared_out_such_that_the_bound_is_least(total):
    lines = model(steps=12)
    plan = lines.share_out(total)
    assert sum(plan) == total and min(plan) >= 1 and len(plan) == 11
    least = lines.bound(plan)
    assert least <= lines.bound(total / 11) + 1e-12 or total == 11
    for give in range(11):  # no single pass is better spent elsewhere, but for rounding
        for take in range(11):
            if give != take and plan[give] > 1:
                other = list(plan)
                other[give], other[take] = other[give] - 1, other[take] + 1
                assert lines.bound(other) > least * (1 - 0.01)
