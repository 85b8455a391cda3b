import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.methods.msm_noisy import NoisyLinewiseMSM, NoisyMSM, measured_components, noise_level, sure
from msmri.methods.msm_training import LinewiseMSM, NoiselessMSM
from msmri.model.denoiser import VPSchedule
from msmri.model.partial import MeasurementPartial
from msmri.model.unet import UNet
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.sampling.aggregate import ImagePartial
from msmri.tensors import generators, normal_like
from msmri.testing import phantom_measurement

NAN = float("nan")
RHO = 0.6
ABOVE = [0.75, 1.2, 3.0]
BELOW = [0.2, 0.45]


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


# A Gaussian prior along the rows of an image: every row of k-space is an independent draw of a one-dimensional problem.
# For linear denoisers the losses are of second order in all that is random, so that with draws whose second moments are
# exactly those of the law, few of them give the expectation itself, and the minimiser to machine precision.


def covariance(n, dtype, *, seed=5):
    """A covariance (n, n) of each real component, with eigenvalues above and below RHO^2."""
    basis = torch.linalg.qr(normal_like(torch.zeros(n, n, dtype=dtype), generators(seed, n)))[0]
    return (basis * torch.logspace(-1, 0.5, n, dtype=torch.float64)) @ basis.mH


def moments(draws, *sizes, dtype, seed=0):
    """Draw standard normal arrays (draws, size) whose second moments, joint ones too, are exactly those of the law."""
    raw = normal_like(torch.zeros(1, draws, sum(sizes), dtype=dtype), generators(seed, 1))[0]
    root = torch.linalg.cholesky(raw.T @ raw.conj() / draws / (2 if dtype.is_complex else 1))
    return torch.linalg.solve_triangular(root, raw.T, upper=False).T.split(sizes, 1)


class Problem:
    """Rows of images with a known covariance, their encoding, and the matrix A of one row."""

    def __init__(self, kind, *, n=5, rows=20, batch=3, rho=RHO):
        self.dtype, self.rho = torch.float64 if kind == "real" else torch.complex128, rho
        mask = torch.ones(1, 1, 1, n, dtype=torch.bool)
        mask[..., 1] = False
        self.covariance = covariance(n, self.dtype)
        if kind == "coils":
            maps = normal_like(torch.zeros(1, 1, 2, 1, n, dtype=self.dtype), generators(1, 1))
            maps = maps / maps.abs().square().sum(2, keepdim=True).sqrt()
            self.encoding, row = CoilFourier(maps.expand(batch, 1, 2, rows, n)), CoilFourier(maps)
        else:
            self.encoding, row = Identity(), Identity()
        basis = torch.eye(n, dtype=self.dtype)[:, None, None]
        self.matrix = Subsample(mask)(row(basis)).flatten(1).T  # (coil * kx, x)
        values, basis = torch.linalg.eigh(self.matrix.mH @ self.matrix)
        root = torch.where(values > 1e-9, values.clamp_min(1e-9).rsqrt(), 0.0)
        self.root = (basis * root) @ basis.mH  # A root has orthonormal columns
        m = len(self.matrix)
        images, noise, *further = moments(batch * rows, n, m, m, m, dtype=self.dtype)
        clean = images @ torch.linalg.cholesky(self.covariance).T @ self.matrix.T
        values, *self.further = (
            part.reshape(batch, rows, -1, n).movedim(2, 1) for part in (clean + rho * noise, *further)
        )
        level = torch.full((batch, 1, 1, 1), rho, dtype=torch.float64)
        mask = mask.expand(batch, 1, 1, n)
        self.batch = Measurement(Subsample(mask)(values), mask, self.encoding, noise_std=level)

    def instead_of_draws(self, monkeypatch, *, calls=2):
        """Give the losses these arrays where they draw noise, ``calls`` times each."""
        arrays = itertools.cycle(self.further[:calls])
        monkeypatch.setattr("msmri.methods.msm_noisy.normal_like", lambda values, rng: next(arrays))

    def measured(self):
        """The covariance of a row of clean measurements."""
        return self.matrix @ self.covariance @ self.matrix.mH

    def posterior_mean(self, sigma, of=None):
        """The matrix of E[s | s + sigma n] for a row of measurements, ``of`` being the covariance of s."""
        of = self.measured() if of is None else of
        return of @ torch.linalg.inv(of + sigma**2 * torch.eye(len(of), dtype=of.dtype))

    def of_references(self):
        """The covariance of the posterior means at the noise of the data."""
        gain = self.posterior_mean(self.rho)
        return gain @ (self.measured() + self.rho**2 * torch.eye(len(gain), dtype=gain.dtype)) @ gain.mH

    def as_matrix(self, weight):
        """What a weight of ``Linear`` does to a row of measurements."""
        half = self.matrix @ self.root
        return half @ weight.detach() @ half.mH

    def as_weight(self, gain):
        """The weight that does ``gain``."""
        half = self.matrix @ self.root
        return half.mH @ gain @ half


class Linear(nn.Module):
    """A denoiser that multiplies the rows of the image by a matrix, one for each noise level."""

    def __init__(self, levels, problem):
        super().__init__()
        self.levels, self.root = torch.tensor(levels, dtype=torch.float64), problem.root
        self.weight = nn.Parameter(torch.zeros(len(levels), *self.root.shape, dtype=problem.dtype))
        self.partial = ImagePartial(self)

    def denoise(self, noisy, sigma):
        near = (sigma.flatten()[:, None] / self.levels).log().abs()
        assert float(near.amin(1).max()) < 1e-6
        matrix = self.root @ self.weight @ self.root
        return torch.einsum("bcyx,bzx->bcyz", noisy, matrix[near.argmin(1)])

    def forward(self, state, mask, encoding, sigma):
        return self.partial(state, mask, encoding, sigma)


def minimise(loss, model, batch, *, free=None):
    """Go to the lowest loss; ``free`` are the levels that move."""
    optimiser = torch.optim.LBFGS(
        [model.weight], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-16
    )

    def closure():
        optimiser.zero_grad()
        value = loss(model, batch, stream())
        value.backward()
        if free is not None:
            kept = torch.zeros_like(model.weight)
            kept[free] = 1
            model.weight.grad.mul_(kept)
        return value

    optimiser.step(closure)
    return model


def distance(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["real", "complex", "coils"])
@pytest.mark.parametrize("sigma", ABOVE)
def test_above_the_noise_the_best_linear_denoiser_is_the_posterior_mean(kind, sigma, monkeypatch):
    problem = Problem(kind)
    problem.instead_of_draws(monkeypatch)
    model = Linear([RHO, sigma], problem)
    minimise(NoisyMSM(sigma_min=sigma, sigma_max=sigma), model, problem.batch)
    for level, weight in zip((RHO, sigma), model.weight):  # at RHO by SURE, at sigma by case 1
        assert distance(problem.as_matrix(weight), problem.posterior_mean(level)) < 1e-5
    problem.instead_of_draws(monkeypatch, calls=1)
    warm = Linear([sigma], problem)
    minimise(NoisyMSM(sigma_min=sigma, sigma_max=sigma, warm_up=True), warm, problem.batch)
    assert distance(problem.as_matrix(warm.weight[0]), problem.posterior_mean(sigma)) < 1e-5


@pytest.mark.parametrize("kind", ["real", "complex", "coils"])
@pytest.mark.parametrize("sigma", BELOW)
def test_below_the_noise_it_is_the_posterior_mean_of_the_references(kind, sigma, monkeypatch):
    problem = Problem(kind)
    problem.instead_of_draws(monkeypatch)
    model = Linear([RHO, sigma], problem)
    model.weight.data[0] = problem.as_weight(problem.posterior_mean(RHO))
    loss = NoisyMSM(sigma_min=sigma, sigma_max=sigma)
    minimise(loss, model, problem.batch, free=1)
    got = problem.as_matrix(model.weight[1])
    assert distance(got, problem.posterior_mean(sigma, problem.of_references())) < 1e-5
    model.zero_grad()
    loss(model, problem.batch, stream()).backward()  # and the reference itself stays the best estimate
    assert float(model.weight.grad[0].norm()) < 1e-6
    assert distance(got, problem.posterior_mean(sigma)) > 0.08  # the price of the references


def test_where_the_signal_is_above_the_noise_references_serve_as_clean(monkeypatch):
    problem = Problem("complex", rho=0.05)
    problem.instead_of_draws(monkeypatch)
    model = Linear([0.05, 0.04], problem)
    model.weight.data[0] = problem.as_weight(problem.posterior_mean(0.05))
    minimise(NoisyMSM(sigma_min=0.04, sigma_max=0.04), model, problem.batch, free=1)
    assert distance(problem.as_matrix(model.weight[1]), problem.posterior_mean(0.04)) < 0.01


@pytest.mark.parametrize(("stop", "weight"), [(True, 0.05), (False, 0.05), (False, 0.4)])
def test_gradients_through_the_reference(stop, weight, monkeypatch):
    """With a prior of one variance, both gains have a closed form; without stopping they pull each other down."""
    variance, sigma = 2.0, 0.45
    clean, noise, probe, diffusion = (a.reshape(1, 1, -1, 1) for a in moments(8, 1, 1, 1, 1, dtype=torch.float64))
    values = variance**0.5 * clean + RHO * noise
    batch = Measurement(values, torch.ones(1, 1, 1, 1, dtype=torch.bool), Identity(), noise_std=RHO)
    arrays = itertools.cycle([probe, diffusion])
    monkeypatch.setattr("msmri.methods.msm_noisy.normal_like", lambda values, rng: next(arrays))
    first = gain = variance / (variance + RHO**2)
    for _ in range(300):
        of_references = first**2 * (variance + RHO**2)
        second = of_references / (of_references + sigma**2)
        if not stop:
            first = gain * weight / (weight + (1 - second) ** 2)
    model = Gains({RHO: first, sigma: second})
    loss = NoisyMSM(sigma_min=sigma, sigma_max=sigma, sure_weight=weight, stop_gradient=stop)
    loss(model, batch, stream()).backward()
    assert float(model.gains.grad.abs().max()) < 1e-6
    assert stop or first < 0.97 * gain


# a white prior: everything by one number


def white(variance, *, batch=3, rows=500, rho=RHO, kind=torch.complex128, coils=1, width=10, seed=0):
    mask = torch.ones(batch, 1, 1, width, dtype=torch.bool)
    mask[..., 1], mask[..., width - 2] = False, False
    clean, noise = (
        normal_like(torch.zeros(batch, coils, rows, width, dtype=kind), generators(s, batch)) for s in (seed, seed + 1)
    )
    rho = torch.as_tensor(rho, dtype=torch.float64).reshape(-1, 1, 1, 1).expand(batch, 1, 1, 1)
    return Measurement(Subsample(mask)(variance**0.5 * clean + rho * noise), mask, Identity(), noise_std=rho)


class Gains(nn.Module):
    """A gain for each noise level."""

    def __init__(self, gains):
        super().__init__()
        self.levels = torch.tensor(list(gains), dtype=torch.float64)
        self.gains = nn.Parameter(torch.tensor(list(gains.values()), dtype=torch.float64))

    def forward(self, state, mask, encoding, sigma):
        near = (sigma.flatten()[:, None] / self.levels).log().abs().argmin(1)
        return self.gains[near].reshape(-1, 1, 1, 1) * state


class Recorder(nn.Module):
    """Returns what it is told to, and keeps what it was shown."""

    def __init__(self, answer, variance=1.0):
        super().__init__()
        self.answer, self.variance, self.seen = answer, variance, []

    def scan_variance(self, state, mask, sigma):
        self.asked = sigma
        return torch.full((len(state), 1, *state.shape[-2:]), self.variance, dtype=state.real.dtype)

    def forward(self, state, mask, encoding, sigma):
        self.seen.append((state, sigma))
        return self.answer(state, sigma) if callable(self.answer) else self.answer


def shrink(gain):
    return Recorder(lambda state, sigma: gain * state)


def expected_loss(gain, variance, sigma, rho, weight):
    power = variance + rho**2
    risk = (gain - 1) ** 2 * power - rho**2 + 2 * rho**2 * gain
    if sigma > rho:
        whole = gain + (rho / sigma) ** 2 * (1 - gain)
        squared = (1 - whole) ** 2 * power + whole**2 * (sigma**2 - rho**2)
    else:
        squared = gain**2 * ((1 - gain) ** 2 * power + sigma**2)
    return (squared + weight * risk) / sigma**2


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("sigma", [0.3, 0.9])
@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0])
def test_value_of_the_loss(kind, sigma, gain):
    rhos = [0.6, 0.2, 1.1]
    batch = white(1.3, rows=1000, rho=rhos, kind=kind, coils=2)
    for weight in (0.0, 0.7):
        got = NoisyMSM(sigma_min=sigma, sigma_max=sigma, sure_weight=weight)(shrink(gain), batch, stream())
        expected = sum(expected_loss(gain, 1.3, sigma, rho, weight) for rho in rhos) / 3
        assert float(got) == pytest.approx(expected, rel=0.02)
    default = NoisyMSM(sigma_min=sigma, sigma_max=sigma)(shrink(gain), batch, stream())
    small = NoisyMSM(sigma_min=sigma, sigma_max=sigma, sure_weight=0.05)(shrink(gain), batch, stream())
    assert torch.equal(default, small)


def test_what_the_network_is_shown():
    batch = white(1.0, rho=[0.6, 0.2, 1.1], rows=800)
    model = shrink(0.5)
    NoisyMSM(sigma_min=0.9, sigma_max=0.9)(model, batch, stream())
    (first, low), (moved, low_again), (state, high) = model.seen
    assert torch.equal(first, batch.values) and torch.equal(low, batch.noise_std) and torch.equal(low, low_again)
    torch.testing.assert_close(high, torch.full_like(high, 0.9), rtol=1e-6, atol=0)
    where = batch.mask.expand_as(state)
    assert all(bool((seen[~where] == 0).all()) for seen in (first, moved, state))
    step = (moved - first)[where]
    for part in (step.real, step.imag):
        assert float(part.std()) == pytest.approx(0.005, rel=0.02)
    wider = shrink(0.5)
    NoisyMSM(sigma_min=0.9, sigma_max=0.9, sure_step=0.02)(wider, batch, stream())
    torch.testing.assert_close(wider.seen[1][0] - wider.seen[0][0], 4 * (moved - first))
    base = torch.cat([batch.values[:2], 0.5 * batch.values[2:]])  # the third is below its own noise: its reference
    for index, level in enumerate([math.sqrt(0.9**2 - 0.6**2), math.sqrt(0.9**2 - 0.2**2), 0.9]):
        added = (state - base)[index][where[index]]
        for part in (added.real, added.imag):
            assert float(part.std()) == pytest.approx(level, rel=0.03)


def test_warm_up_stays_above_the_noise_and_passes_once():
    batch = white(1.0, batch=400, rows=2, rho=torch.linspace(0.02, 5, 400))
    model = shrink(0.5)
    NoisyMSM(warm_up=True)(model, batch, stream())
    ((_, sigma),) = model.seen
    assert bool((sigma >= batch.noise_std).all()) and float(sigma.max()) > 100
    ladder = VPSchedule()
    lowest = ladder.t(batch.noise_std)
    share = ((ladder.t(sigma) - lowest) / (999 - lowest)).flatten()
    assert float(share.mean()) == pytest.approx(0.5, abs=0.04) and float(share.std()) == pytest.approx(0.289, rel=0.1)
    above = replace(batch, noise_std=torch.tensor(200.0))  # no level is above such noise: nothing to learn, and no NaN
    assert float(NoisyMSM(warm_up=True)(shrink(0.5), above, stream())) == 0


def test_levels_are_uniform_in_the_step_of_the_ladder():
    rho = torch.full((2000, 1, 1, 1), 0.1)
    sigma = NoisyMSM(sigma_min=0.05, sigma_max=20.0).draw_sigma(rho, generators(0, 2000))
    assert sigma.shape == rho.shape and 0.05 <= float(sigma.min()) < 0.06 and 19 < float(sigma.max()) <= 20.01
    t = VPSchedule().t(sigma).flatten()
    low, high = VPSchedule().t(0.05), VPSchedule().t(20.0)
    assert float(t.mean()) == pytest.approx(float(low + high) / 2, rel=0.03)
    assert float(t.std()) == pytest.approx(float(high - low) / math.sqrt(12), rel=0.05)
    ends = VPSchedule().sigmas
    assert NoisyMSM().sigma_min == pytest.approx(float(ends[0]), rel=0.01)
    assert NoisyMSM().sigma_max == pytest.approx(float(ends[-1]), rel=0.01)


def test_levels_may_be_log_normal():
    rho, quantiles = torch.full((8000, 1, 1, 1), 0.1), torch.tensor([0.1587, 0.5, 0.8413])  # one deviation to each side
    levels = {"sigma_min": 0.001, "sigma_max": 100.0, "sigma_mean": -1.0, "sigma_spread": 1.5}
    drawn = NoisyMSM(**levels).draw_sigma(rho, generators(0, 8000))
    assert drawn.shape == rho.shape and drawn.dtype == rho.dtype
    at = drawn.flatten().log().quantile(quantiles)
    torch.testing.assert_close(at, torch.tensor([-2.5, -1.0, 0.5]), atol=0.06, rtol=0)
    cut = NoisyMSM(**{**levels, "sigma_min": 0.05, "sigma_max": 2.0}).draw_sigma(rho, generators(1, 8000))
    inside = drawn[(drawn >= 0.05) & (drawn <= 2.0)]  # the law cut off, not heaped on its ends
    assert float(cut.min()) >= 0.05 and float(cut.max()) <= 2.0 and float((cut < 0.0501).float().mean()) < 0.01
    torch.testing.assert_close(
        cut.flatten().log().quantile(quantiles), inside.log().quantile(quantiles), atol=0.08, rtol=0
    )
    warm = NoisyMSM(**levels, warm_up=True).draw_sigma(rho, generators(2, 8000))
    above = drawn[drawn >= 0.1]
    assert float(warm.min()) >= 0.1 and float((warm < 0.1001).float().mean()) < 0.01
    torch.testing.assert_close(
        warm.flatten().log().quantile(quantiles), above.log().quantile(quantiles), atol=0.08, rtol=0
    )
    far = NoisyMSM(**levels, warm_up=True).draw_sigma(torch.full((3, 1, 1, 1), 500.0), generators(0, 3))
    assert far.flatten().tolist() == [100.0] * 3  # the loss raises them to the noise
    with pytest.raises(InputError, match="sigma_spread"):
        NoisyMSM(sigma_mean=0.0, sigma_spread=0.0)


def test_without_noise_it_is_the_noiseless_loss():
    batch = white(1.3, rows=1500, rho=0.0)
    sigma = 0.8
    for gain in (0.2, 0.7):
        got = NoisyMSM(sigma_min=sigma, sigma_max=sigma, sure_weight=0.0)(shrink(gain), batch, stream())
        plain = NoiselessMSM(sigma_min=sigma, sigma_max=sigma)(shrink(gain), batch, stream())
        assert float(got) == pytest.approx(float(plain), rel=0.01)


def test_source_of_the_noise_level():
    batch = white(1.0, rho=[0.6, 0.0, 2.0])
    assert noise_level(batch).flatten().tolist() == [0.6, 0.0, 2.0]
    assert noise_level(batch, least=1e-3).flatten().tolist() == [0.6, 1e-3, 2.0]
    assert noise_level(replace(batch, noise_std=0.3)).flatten().tolist() == [0.3] * 3
    assert noise_level(batch, given=0.4).shape == (3, 1, 1, 1)
    for loss in (NoisyMSM(noise_std=0.4), NoisyLinewiseMSM(noise_std=0.4, everything=0.0)):
        model = Recorder(torch.zeros_like(batch.values))
        loss(model, batch, stream())
        assert float(model.seen[0][1].min()) == pytest.approx(0.4)
    assert NoisyMSM().least_noise == NoisyLinewiseMSM().least_noise == 1e-3
    for loss in (NoisyMSM(least_noise=0.02), NoisyLinewiseMSM(least_noise=0.02, everything=0.0)):
        model = Recorder(torch.zeros_like(batch.values))
        loss(model, batch, stream())
        assert model.seen[0][1].amin((1, 2, 3)).tolist() == pytest.approx([0.6, 0.02, 2.0])


@pytest.mark.parametrize("wrong", [{"sigma_min": 0.0}, {"sigma_max": 0.001}, {"sure_step": 0.0}, {"least_noise": 0.0}])
def test_refuses_settings_that_make_no_sense(wrong):
    with pytest.raises(InputError, match="noisy msm: no such"):
        NoisyMSM(**wrong)


def test_needs_an_encoding():
    with pytest.raises(InputError, match="needs coil maps"):
        NoisyMSM()(shrink(1.0), replace(white(1.0), encoding=None), stream())


# SURE


def bend(state, sigma):
    """A shrinkage that is neither linear nor complex-differentiable."""
    return state * (state.abs().square() + 0.3 * state.real.square()) / (state.abs().square() + sigma.square())


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_sure_is_the_true_error(kind, rho):
    n, shape = 6, (2, 300, 20)
    mask = torch.stack([torch.arange(20) % (2 + i % 2) == 0 for i in range(n)]).reshape(n, 1, 1, 20)
    clean, noise = (normal_like(torch.zeros(n, *shape, dtype=kind), generators(s, n)) for s in (2, 3))
    levels = torch.linspace(0.5, 1.5, n, dtype=torch.float64).reshape(-1, 1, 1, 1) * rho
    values = Subsample(mask)(clean + levels * noise)
    estimate, risk = sure(Recorder(bend), values, mask, Identity(), levels, generators(4, n))
    torch.testing.assert_close(estimate, Subsample(mask)(bend(values, levels)))
    count = mask.flatten(1).sum(1) * 2 * 300 * (2 if kind == torch.complex128 else 1)
    assert torch.equal(measured_components(mask, values), count)
    error = Subsample(mask)(estimate - clean).abs().square().flatten(1).sum(1) / count
    assert float(risk.sum()) == pytest.approx(float(error.sum()), rel=0.02)
    assert float((risk / error - 1).abs().max()) < 0.1


def test_a_larger_step_of_sure_is_taken():
    values, mask = torch.ones(1, 1, 4, 4, dtype=torch.complex128), torch.ones(1, 1, 1, 4, dtype=torch.bool)
    model = shrink(1.0)
    sure(model, values, mask, Identity(), torch.ones(1, 1, 1, 1), generators(0, 1), step=0.3)
    assert float((model.seen[1][0] - model.seen[0][0]).abs().max()) > 0.1


# the line-wise loss


class Rows(nn.Module):
    """A matrix that acts along the rows of k-space."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, n, dtype=torch.complex128))

    def scan_variance(self, state, mask, sigma):
        return torch.ones(len(state), 1, *state.shape[-2:], dtype=torch.float64)

    def forward(self, state, mask, encoding, sigma):
        self.sigma = sigma
        return state @ self.weight.T


@pytest.mark.parametrize("sigma", [0.62, 0.8, 1.5, 10.0])
@pytest.mark.parametrize("everything", [0.0, 1.0])
def test_linewise_best_linear_estimate_is_the_conditional_mean(sigma, everything, monkeypatch):
    n, rows, batch = 8, 20, 3
    prior = covariance(n, torch.complex128)
    mask = torch.ones(batch, 1, 1, n, dtype=torch.bool)
    mask[..., 1] = False
    arrays = moments(batch * rows, n, n, n, dtype=torch.complex128)
    clean, noise, diffusion = (array.reshape(batch, 1, rows, n) for array in arrays)
    monkeypatch.setattr("msmri.methods.msm_noisy.normal_like", lambda values, rng: diffusion)
    values = Subsample(mask)(clean @ torch.linalg.cholesky(prior).T + RHO * noise)
    problem = Measurement(values, mask, Identity(), noise_std=torch.full((batch, 1, 1, 1), RHO, dtype=torch.float64))
    loss = NoisyLinewiseMSM(hidden_min=1.0, hidden_max=1.0, everything=everything, sigma_min=sigma, sigma_max=sigma)
    model = minimise(loss, Rows(n), problem)
    levels = model.sigma[0].flatten()
    hidden = levels > 0.61
    assert hidden.tolist() == [(everything == 1.0 or not 2 <= k < 6) and k != 1 for k in range(n)]
    seen = mask[0].flatten()
    inverse = torch.linalg.inv(prior[seen][:, seen] + torch.diag(levels[seen].square()).to(prior))
    got = model.weight.detach()[hidden][:, seen]
    assert distance(got, prior[hidden][:, seen] @ inverse) < 1e-5


@pytest.mark.parametrize("sigma", [0.602, 0.7, 1.5, 10.0])
@pytest.mark.parametrize("everything", [0.0, 1.0])
def test_linewise_exact_estimate_of_one_coil_has_loss_one(sigma, everything):
    batch = white(2.0, batch=4, rows=2000)
    loss = NoisyLinewiseMSM(hidden_min=1.0, hidden_max=1.0, everything=everything, sigma_min=sigma, sigma_max=sigma)
    wiener = Recorder(lambda state, level: state * 2 / (2 + level.square()), variance=2.0)
    assert float(loss(wiener, batch, stream())) == pytest.approx(1, rel=0.02)
    logarithm = replace(loss, logarithm=True)
    assert float(logarithm(wiener, batch, stream())) == pytest.approx(0, abs=0.02)


def test_linewise_target_keeps_its_own_noise_in_every_coil():
    clean = torch.zeros(4, 3, 800, 10, dtype=torch.complex128)
    batch = white(0.0, batch=4, rows=800, coils=3)
    loss = NoisyLinewiseMSM(sigma_min=0.9, sigma_max=0.9, everything=1.0)
    assert float(loss(Recorder(clean, variance=1e-12), batch, stream())) == pytest.approx(1, rel=0.02)


def test_linewise_shows_levels_that_are_true():
    rhos = torch.tensor([0.05, 0.6, 3.0], dtype=torch.float64)
    batch = white(0.0, rows=3000, rho=rhos)
    model = Recorder(torch.zeros_like(batch.values))
    NoisyLinewiseMSM(hidden_min=1.0, hidden_max=1.0, everything=0.0, blind=0.0, sigma_min=0.5)(model, batch, stream())
    state, sigma = model.seen[0]
    assert torch.equal(model.asked, batch.noise_std)
    for index, rho in enumerate(rhos):
        levels = sigma[index].flatten()
        torch.testing.assert_close(levels[3:7], rho.expand(4))  # the centre stays as it was measured
        assert torch.equal(state[index][..., 3:7], batch.values[index][..., 3:7])
        assert float(levels.min()) == pytest.approx(float(rho)) and float(levels.max()) >= max(0.5, float(rho))
        for column in (0, 2, 4, 7, 9):
            part = state[index][..., column]
            for component in (part.real, part.imag):
                assert float(component.std()) == pytest.approx(float(levels[column]), rel=0.06)


def test_linewise_state_is_zero_where_nothing_was_measured():
    batch = white(1.0)
    poisoned = replace(batch, values=torch.where(batch.mask, batch.values, NAN))
    model = Recorder(batch.values)
    assert float(NoisyLinewiseMSM()(model, poisoned, stream())) == float(NoisyLinewiseMSM()(model, batch, stream()))
    assert bool((model.seen[0][0][~batch.mask.expand_as(batch.values)] == 0).all())


def test_linewise_sigma_starts_at_the_noise():
    rho = torch.full((4000, 1, 1, 1), 0.5)
    sigma = NoisyLinewiseMSM(sigma_min=0.01, sigma_max=8.0, blind=0.0).draw_sigma(4000, stream(), least=rho).log()
    assert float(sigma.min()) == pytest.approx(math.log(0.5), abs=0.01)
    assert float(sigma.mean()) == pytest.approx((math.log(0.5) + math.log(8)) / 2, abs=0.03)
    model, batch = shrink(0.5), white(1.0, batch=500, rows=2, rho=0.5)
    NoisyLinewiseMSM(sigma_min=0.01, sigma_max=8.0, blind=0.0, everything=1.0)(model, batch, stream())
    levels = model.seen[0][1].amax((1, 2, 3)).log()  # spread over the range, not heaped on its lower end
    assert float(levels.mean()) == pytest.approx((math.log(0.5) + math.log(8)) / 2, abs=0.12)
    batch = white(1.0, batch=50, rows=2, rho=20.0)  # noise beyond the largest level: nothing to learn, and no NaN
    model = Recorder(torch.zeros_like(batch.values))
    assert float(NoisyLinewiseMSM(everything=1.0)(model, batch, stream())) == 0
    assert float(model.seen[0][1].min()) == 20.0


def test_linewise_without_noise_is_the_noiseless_loss():
    batch = white(1.3, rows=50, rho=1e-4)
    for everything in (0.0, 1.0):
        settings = {"sigma_min": 0.3, "everything": everything, "least_noise": 1e-4}
        got, plain = (cls(**settings)(shrink(0.4), batch, stream()) for cls in (NoisyLinewiseMSM, LinewiseMSM))
        assert float(got) == pytest.approx(float(plain), rel=1e-5)


# all of them, on the real model


LOSSES = [
    NoisyMSM(sigma_min=0.005, sigma_max=0.5),
    NoisyMSM(sigma_min=0.005, sigma_max=0.5, stop_gradient=False),
    NoisyMSM(warm_up=True),
    NoisyLinewiseMSM(),
    NoisyLinewiseMSM(logarithm=True, everything=1.0),
]


@pytest.fixture(scope="module")
def real_problem():
    batch = phantom_measurement((20, 24), coils=3, noise_std=0.05)
    batch = batch.scaled(batch.centre_scale())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(in_channels=4, channels=(8, 16), blocks_per_level=1)
        model = MeasurementPartial(network, wiener_iterations=4, consistency_iterations=3)
    rng = stream()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=rng))
    return model, batch


def step(loss, model, batch, seed=0):
    model.zero_grad(set_to_none=True)
    value = loss(model, batch, stream(seed))
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss", LOSSES)
def test_unmeasured_kspace_and_target_never_enter(loss, real_problem):
    model, batch = real_problem
    value, gradient = step(loss, model, batch)
    assert bool(value.isfinite()) and all(bool(g.isfinite().all()) for g in gradient.values())
    assert any(bool(g.any()) for g in gradient.values())
    poisoned = replace(
        batch,
        values=torch.where(batch.mask, batch.values, torch.full_like(batch.values, NAN)),
        target=torch.full_like(batch.target, NAN),
    )
    got, got_gradient = step(loss, model, poisoned)
    assert torch.equal(got, value)
    for name, each in gradient.items():
        assert torch.equal(got_gradient[name], each), name
    assert not torch.equal(step(loss, model, replace(batch, values=1.1 * batch.values))[0], value)


@pytest.mark.parametrize("loss", LOSSES)
def test_draws_come_from_the_given_stream_alone(loss, real_problem):
    model, batch = real_problem
    before = torch.get_rng_state()
    first, again, other = (step(loss, model, batch, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def take(batch, *index):
    index = list(index)
    return replace(batch, values=batch.values[index], mask=batch.mask[index], noise_std=batch.noise_std[index])


@pytest.mark.parametrize("sigma", [0.3, 0.9])
@pytest.mark.parametrize("stop", [True, False])
def test_slices_do_not_know_of_one_another(sigma, stop):
    batch = white(1.0, batch=4, rho=[0.2, 0.6, 0.5, 1.1], rows=4)
    loss = NoisyMSM(sigma_min=sigma, sigma_max=2 * sigma, stop_gradient=stop)

    def total(*index):
        return len(index) * float(loss(shrink(0.6), take(batch, *index), stream(3)))

    second = total(0, 1) - total(0)  # the same slice in the same place behind others, and before others
    assert total(2, 1) - total(2) == pytest.approx(second, rel=1e-9)
    assert total(0, 1, 2) - total(0, 3, 2) == pytest.approx(second - (total(2, 3) - total(2)), rel=1e-9)


def test_linewise_slices_do_not_know_of_one_another():
    batch = white(1.0, batch=4, rho=[0.2, 0.6, 0.5, 1.1], rows=4)

    def total(*index):
        return float(NoisyLinewiseMSM()(shrink(0.6), take(batch, *index), stream(3)))

    assert total(0, 1) - total(0, 3) == pytest.approx(total(2, 1) - total(2, 3), rel=1e-9)
