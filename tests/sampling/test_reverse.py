import pytest
import torch

from msmri.model.denoiser import GaussianDenoiser
from msmri.sampling.reverse import reverse_diffusion
from msmri.sampling.schedule import ancestral, geometric, karras
from msmri.tensors import generators, normal_like


def sample(prior, sigmas, eta, *, n=4, seed=0, dtype=torch.complex64):
    rng = generators(seed, n)
    start = float(sigmas[0]) * normal_like(torch.zeros(n, *prior.mean.shape, dtype=dtype), rng)
    steps = reverse_diffusion(lambda step: prior.denoise(step.state, step.sigma), start, sigmas, rng=rng, eta=eta)
    return list(steps)


PRIOR = GaussianDenoiser(
    torch.tensor([1.0, -2.0, 0.5]).expand(1, 5000, 3).to(torch.complex64),
    torch.tensor([0.25, 1.0, 4.0]).expand(1, 5000, 3),
)


@pytest.mark.parametrize("kind", ["deterministic", "ancestral"])
def test_an_exact_denoiser_reproduces_the_prior(kind):
    sigmas = karras(50.0, 0.01, 300)
    last = sample(PRIOR, sigmas, 0.0 if kind == "deterministic" else ancestral(sigmas))[-1]
    found = torch.view_as_real(last.estimate - PRIOR.mean)
    expected = torch.tensor([0.5, 1.0, 2.0])
    assert bool(((found.std((0, 1, 2, 4)) / expected - 1).abs() < 0.03).all())
    bias = (last.estimate.mean((0, 1, 2)) - PRIOR.mean[0, 0]) / expected
    assert float(torch.view_as_real(bias).abs().max()) < 0.05


@pytest.mark.parametrize("eta", [1.0, 0.85, 0.5])
def test_a_constant_share_of_fresh_noise_narrows_the_spread_as_stated(eta):
    last = sample(PRIOR, geometric(20.0, 0.005, 600), eta, n=2)[-1]
    found = torch.view_as_real(last.estimate - PRIOR.mean)[..., 1, :].std()
    assert float(found) == pytest.approx(((1 + (1 - eta**2) ** 0.5) / 2) ** 0.5, rel=0.02)


def test_one_step_is_the_written_out_rule():
    start, sigmas, eta = torch.tensor([[3.0, -1.0]]), torch.tensor([2.0, 0.5]), 0.6
    first, last = reverse_diffusion(
        lambda step: step.state / 4 + step.sigma, start, sigmas, rng=generators(3, 1), eta=eta
    )
    clean = start / 4 + 2
    noise = normal_like(start, generators(3, 1))
    expected = clean + 0.5 * (eta * noise + 0.8 * (start - clean) / 2)
    torch.testing.assert_close(first.state, expected)
    torch.testing.assert_close(first.estimate, clean)
    torch.testing.assert_close(last.estimate, expected / 4 + 0.5)
    assert (float(first.sigma), float(last.sigma)) == (0.5, 0.0)
    assert torch.equal(last.state, last.estimate)


def test_the_estimate_is_carried():
    start, seen = torch.zeros(1, 3), []

    def keep(step):
        seen.append(step.estimate)
        return step.estimate

    first = torch.tensor([[1.0, 2.0, 3.0]])
    *_, last = reverse_diffusion(keep, start, torch.tensor([2.0, 1.0]), rng=generators(0, 1), first_estimate=first)
    assert torch.equal(last.estimate, first) and len(seen) == 2
    *_, last = reverse_diffusion(keep, start, torch.tensor([2.0, 1.0]), rng=generators(0, 1))
    assert not bool(last.estimate.any())


def test_a_step_without_a_new_estimate_joins_the_next():
    prior, start = PRIOR, torch.full((1, 1, 5000, 3), 1 + 2j)

    def run(sigmas, skip):
        def estimate(step):
            return step.estimate if float(step.sigma) == skip else prior.denoise(step.state, step.sigma)

        *_, last = reverse_diffusion(estimate, start, torch.tensor(sigmas), rng=generators(0, 1), eta=0.0)
        return last.estimate

    torch.testing.assert_close(run([4.0, 2.0, 1.0], skip=2.0), run([4.0, 1.0], skip=0))


def test_batches_never_change_a_sample():
    sigmas = karras(5.0, 0.1, 6)
    whole = sample(PRIOR, sigmas, 1.0, n=4)[-1].estimate
    part = sample(PRIOR, sigmas, 1.0, n=2)[-1].estimate
    assert torch.equal(whole[:2], part)


@pytest.mark.parametrize(
    ("sigmas", "eta"),
    [([1.0, 2.0], 1.0), ([1.0, 0.0], 1.0), ([], 1.0), ([[1.0]], 1.0), ([1.0], 1.1), ([1.0], -0.1), ([1.0, 1.0], 0.0)],
)
def test_impossible_settings_are_refused(sigmas, eta):
    with pytest.raises(ValueError, match=r"sigmas|eta"):
        next(
            reverse_diffusion(lambda s: s.state, torch.zeros(1, 1), torch.tensor(sigmas), rng=generators(0, 1), eta=eta)
        )
