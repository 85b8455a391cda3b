import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from msmri.measurement import Measurement
from msmri.methods.msm_training import LinewiseMSM, NoiselessMSM
from msmri.model.denoiser import VPSchedule
from msmri.model.partial import MeasurementPartial
from msmri.model.unet import UNet
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.physics.simulate import coil_maps
from msmri.tensors import generators, normal_like
from msmri.testing import phantom_measurement

NAN = float("nan")


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(n=4, shape=(16, 40), *, coils=2, variance=1.0, step=2, noise=0.01, seed=0):
    """Measured lines whose entries are Gaussian with ``variance / coils`` in each real component."""
    mask = torch.zeros(n, 1, 1, shape[1], dtype=torch.bool)
    mask[..., ::step] = True
    mask[..., shape[1] // 2 - 2 : shape[1] // 2 + 2] = True
    zeros = torch.zeros(n, coils, *shape, dtype=torch.complex64)
    values = Subsample(mask)((variance / coils) ** 0.5 * normal_like(zeros, generators(seed, n)))
    return Measurement(values, mask, Identity(), noise_std=torch.full((n, 1, 1, 1), noise))


class Recorder(nn.Module):
    """A stand-in for the model: returns what it is told to, and keeps what it was shown."""

    def __init__(self, answer, variance=1.0):
        super().__init__()
        self.answer, self.variance, self.seen = answer, variance, []

    def scan_variance(self, state, mask, sigma):
        assert bool((state[~mask.expand_as(state)] == 0).all())
        return torch.full((len(state), 1, *state.shape[-2:]), self.variance)

    def forward(self, state, mask, encoding, sigma):
        self.seen.append((state, mask, sigma))
        return self.answer(state, mask, sigma) if callable(self.answer) else self.answer


def zeros(state, mask, sigma):
    return torch.zeros_like(state)


def hidden_of(model, batch, *, call=-1):
    """The lines (b, 1, 1, kx) that were diffused, from the noise levels shown to the model."""
    state, mask, sigma = model.seen[call]
    hidden = mask & (sigma != batch.noise_std.clamp_min(1e-3))
    changed = (state != batch.values).any(-2, keepdim=True).any(-3, keepdim=True)
    assert torch.equal(hidden, changed)
    return hidden


def centre_of(width):
    n = max(4, round(width * 20 / 256))
    centre = torch.zeros(width, dtype=torch.bool)
    centre[width // 2 - n // 2 : width // 2 - n // 2 + n] = True
    return centre


# LinewiseMSM


def test_only_hidden_lines_count():
    batch, loss = gaussian(), LinewiseMSM()
    model = Recorder(0.5 * batch.values)
    first = loss(model, batch, stream())
    hidden = hidden_of(model, batch)
    assert 0 < int(hidden.sum()) < int(batch.mask.sum())
    # a fixed answer, wrong by any amount on the observed lines: the same loss
    for answer in (torch.where(hidden, model.answer, 100.0), torch.where(hidden, model.answer, NAN)):
        assert torch.equal(loss(Recorder(answer), batch, stream()), first)
    # other values on the observed lines, under the same answer of the model: the same loss
    other = replace(batch, values=torch.where(batch.mask & ~hidden, 7 * batch.values + 3, batch.values))
    again = Recorder(model.answer)
    assert torch.equal(loss(again, other, stream()), first)
    assert not torch.equal(again.seen[0][0], model.seen[0][0])  # but the model sees them
    elsewhere = replace(batch, values=torch.where(hidden, batch.values + 1, batch.values))
    assert not torch.equal(loss(Recorder(model.answer), elsewhere, stream()), first)


def test_oracle_has_no_loss_and_zeros_the_expected_one():
    batch = gaussian(256, variance=2.0)
    assert float(LinewiseMSM()(Recorder(batch.values), batch, stream())) == 0
    half = LinewiseMSM(hidden_min=0.5, hidden_max=0.5)
    far = replace(half, sigma_min=50.0, sigma_max=50.0)
    assert float(far(Recorder(zeros, variance=2.0), batch, stream())) == pytest.approx(1, rel=0.02)
    # returning the noisy lines costs coils sigma^2 where v sigma^2 / (v + sigma^2) would be expected
    level = 0.5
    near = replace(half, sigma_min=level, sigma_max=level)
    expected = 2 * level**2 / (2 * level**2 / (2 + level**2) + 2 * 0.01**2)
    got = float(near(Recorder(lambda state, mask, sigma: state, variance=2.0), batch, stream()))
    assert got == pytest.approx(expected, rel=0.02)


def test_logarithm_is_the_mean_of_each_items_logarithm():
    batch = gaussian(3)
    plain = LinewiseMSM(hidden_min=0.5, hidden_max=0.5)
    parts = []
    for i in range(3):  # errors of items ten times apart; the others are answered without error

        def answer(state, mask, sigma, i=i):
            return torch.cat([batch.values[:i], batch.values[i : i + 1] + 0.1 * 10**i, batch.values[i + 1 :]])

        parts.append(3 * float(plain(Recorder(answer), batch, stream())))
    everything = Recorder(batch.values + 0.1 * 10 ** torch.arange(3.0).reshape(3, 1, 1, 1))
    got = float(replace(plain, logarithm=True)(everything, batch, stream()))
    assert got == pytest.approx(sum(math.log(part + 1e-4) for part in parts) / 3, rel=1e-4)
    assert parts[2] > 50 * parts[1] > 2000 * parts[0] / 10


def test_exact_estimate_of_one_coil_has_loss_one():
    batch = gaussian(256, coils=1, variance=2.0, noise=1e-3)

    def wiener(state, mask, sigma):
        return state * 2 / (2 + sigma.square())

    for level in (0.1, 1.0, 10.0):
        loss = LinewiseMSM(hidden_min=0.5, hidden_max=0.5, sigma_min=level, sigma_max=level)
        assert float(loss(Recorder(wiener, variance=2.0), batch, stream())) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("least", "most"), [(0.0, 0.0), (0.3, 0.3), (0.1, 0.9), (1.0, 1.0)])
def test_share_of_hidden_outer_lines(least, most):
    batch = gaussian(2000, (1, 64), coils=1, step=1)
    model = Recorder(zeros)
    loss = LinewiseMSM(hidden_min=least, hidden_max=most, everything=0.0)(model, batch, stream())
    hidden = hidden_of(model, batch)[:, 0, 0]
    centre = centre_of(64)
    assert not bool(hidden[:, centre].any())
    share = hidden[:, ~centre].double().mean(1)
    assert float(share.mean()) == pytest.approx((least + most) / 2, abs=0.02)
    n = int((~centre).sum())
    binomial = ((least + most) / 2 - (least**2 + least * most + most**2) / 3) / n
    assert float(share.var()) == pytest.approx(binomial + (most - least) ** 2 / 12, rel=0.15, abs=1e-9)
    assert bool(loss.isfinite()) and (most > 0 or float(loss) == 0)


def test_share_of_items_in_which_everything_is_hidden():
    batch = gaussian(3000, (1, 64), coils=1)
    model = Recorder(zeros)
    LinewiseMSM(everything=0.25)(model, batch, stream())
    hidden = hidden_of(model, batch)
    whole = (hidden == batch.mask).flatten(1).all(1)
    assert float(whole.double().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(hidden[..., centre_of(64)].flatten(1).any(1), whole)
    LinewiseMSM(everything=1.0)(model, batch, stream())
    assert torch.equal(hidden_of(model, batch), batch.mask)


def test_noise_levels():
    batch = gaussian(3000, (1, 16), coils=1)
    model = Recorder(zeros)
    LinewiseMSM(everything=1.0, sigma_min=0.02, sigma_max=4.0, blind=0.3)(model, batch, stream())
    state, mask, sigma = model.seen[0]
    level = sigma.amax(-1).flatten()
    assert float(level.min()) >= 0.02 and float(level.max()) == pytest.approx(4)
    blind = level > 3.9999
    assert float(blind.double().mean()) == pytest.approx(0.3, abs=0.03)
    rest = level[~blind].double().log()
    assert float(rest.mean()) == pytest.approx((math.log(0.02) + math.log(4)) / 2, abs=0.1)
    assert float(rest.std()) == pytest.approx(math.log(200) / math.sqrt(12), rel=0.05)
    noise = torch.where(mask, (state - batch.values) / level.reshape(-1, 1, 1, 1), 0)
    assert float(noise.abs().square().sum() / mask.sum()) == pytest.approx(2, rel=0.03)  # 1 a real component


def test_observed_lines_carry_the_scanners_noise_level():
    batch = gaussian(3, noise=0.2)
    batch = replace(batch, noise_std=torch.tensor([0.2, 0.0, 0.05]).reshape(3, 1, 1, 1))
    model = Recorder(zeros)
    LinewiseMSM(everything=0.0, least_noise=0.003)(model, batch, stream())
    centre = model.seen[0][2][..., 20].flatten()
    torch.testing.assert_close(centre, torch.tensor([0.2, 0.003, 0.05]))
    plain = Recorder(zeros)
    LinewiseMSM(everything=0.0)(plain, replace(batch, noise_std=0.0), stream())
    assert float(plain.seen[0][2][..., 20].max()) == pytest.approx(1e-3)


def test_two_dimensional_masks():
    batch = gaussian(3)
    mask = torch.rand(3, 1, 16, 40, generator=stream()) < 0.5
    batch = replace(batch, mask=mask, values=Subsample(mask)(torch.ones(3, 2, 16, 40, dtype=torch.complex64)))
    model = Recorder(zeros)
    first = LinewiseMSM()(model, batch, stream())
    assert bool(first.isfinite()) and model.seen[0][0].shape == batch.values.shape
    hidden = mask & (model.seen[0][2] != 0.01)
    assert torch.equal(hidden.any(-2), (mask & (model.seen[0][0] != batch.values).any(1, keepdim=True)).any(-2))


# both losses on the real model


def real_problem(model_seed=0):
    rng = stream(model_seed)
    batch = phantom_measurement((24, 20), coils=3)
    batch = batch.scaled(batch.centre_scale())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MeasurementPartial(
            UNet(in_channels=4, channels=(8, 16), blocks_per_level=1), wiener_iterations=4, consistency_iterations=3
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=rng))
    return model, batch


def step(loss, model, batch, seed=0):
    model.zero_grad(set_to_none=True)
    value = loss(model, batch, stream(seed))
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss", [LinewiseMSM(), LinewiseMSM(everything=1.0), NoiselessMSM()])
@pytest.mark.parametrize("poison", [NAN, float("inf"), 1e6])
def test_unmeasured_kspace_and_target_never_enter(loss, poison):
    model, batch = real_problem()
    value, gradient = step(loss, model, batch)
    assert bool(value.isfinite()) and all(bool(g.isfinite().all()) for g in gradient.values())
    assert any(bool(g.any()) for g in gradient.values())
    poisoned = replace(
        batch,
        values=torch.where(batch.mask, batch.values, torch.full_like(batch.values, poison)),
        target=torch.full_like(batch.target, poison),
    )
    got, got_gradient = step(loss, model, poisoned)
    assert torch.equal(got, value)
    for name, each in gradient.items():
        assert torch.equal(got_gradient[name], each), name


@pytest.mark.parametrize("loss", [LinewiseMSM(), NoiselessMSM()])
def test_draws_come_from_the_given_stream_alone(loss):
    model, batch = real_problem()
    before = torch.get_rng_state()
    first, again, other = (step(loss, model, batch, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_measured_kspace_does_enter():
    model, batch = real_problem()
    other = replace(batch, values=1.1 * batch.values)
    for loss in (LinewiseMSM(), NoiselessMSM()):
        assert not torch.equal(step(loss, model, batch)[0], step(loss, model, other)[0])


# NoiselessMSM


class Shrink(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(gain), dtype=torch.float64))

    def forward(self, state, mask, encoding, sigma):
        return self.gain * state


def minimiser(loss, batch):
    """The loss is a parabola in the gain: its lowest point from three values."""
    low, middle, high = (float(loss(Shrink(gain), batch, stream()).detach()) for gain in (0.0, 0.5, 1.0))
    return (3 * low - 4 * middle + high) / (4 * (low - 2 * middle + high))


@pytest.mark.parametrize("level", [0.1, 1.0, 4.0])
def test_best_linear_denoiser_is_wieners(level):
    batch = gaussian(512, coils=1, variance=1.7)
    got = minimiser(NoiselessMSM(sigma_min=level, sigma_max=level), batch)
    assert got == pytest.approx(1.7 / (1.7 + level**2), rel=0.02)


def test_sigma_follows_the_ladder_weighted_by_its_inverse_square():
    batch = gaussian(4000, (4, 8), coils=1, variance=1.0)
    low, high = 0.1, 20.0
    sigmas = VPSchedule().sigmas
    inverse = sigmas[(sigmas >= low) & (sigmas <= high)].square().reciprocal().mean()
    assert minimiser(NoiselessMSM(low, high), batch) == pytest.approx(float(inverse / (inverse + 1)), rel=0.03)


def test_default_levels_are_the_ends_of_the_ladder():
    sigmas = VPSchedule().sigmas
    assert NoiselessMSM().sigma_min == pytest.approx(float(sigmas[0]), rel=0.01)
    assert NoiselessMSM().sigma_max == pytest.approx(float(sigmas[-1]), rel=0.01)


def test_levels_may_be_log_normal():
    loss = NoiselessMSM(sigma_min=0.02, sigma_max=4.0, sigma_mean=-1.0, sigma_spread=1.5)
    drawn = loss.draw_sigma(20000, stream())
    assert drawn.shape == (20000, 1, 1, 1) and float(drawn.min()) == pytest.approx(0.02)
    assert float(drawn.max()) == pytest.approx(4.0)
    at = drawn.flatten().log().quantile(torch.tensor([0.1587, 0.5, 0.8413]))  # one standard deviation below and above
    torch.testing.assert_close(at, torch.tensor([-2.5, -1.0, 0.5]), atol=0.05, rtol=0)
    batch = gaussian(4000, (4, 8), coils=1, variance=1.0)
    inverse = drawn.square().reciprocal().mean()
    assert minimiser(loss, batch) == pytest.approx(float(inverse / (inverse + 1)), rel=0.03)


def test_noiseless_loss_is_per_measured_component():
    for coils, every in ((1, 2), (3, 4)):
        batch = gaussian(64, coils=coils, variance=coils, step=every)
        loss = NoiselessMSM(sigma_min=2.0, sigma_max=2.0)
        zero = float(loss(Shrink(0.0), batch, stream()).detach())
        assert zero == pytest.approx(1 / 4, rel=0.02)
        assert float(loss(Shrink(1.0), batch, stream()).detach()) == pytest.approx(1, rel=0.02)


def test_gradient_of_the_parameter_vanishes_at_the_best():
    rng = stream(4)
    maps = coil_maps((12, 16), 3, rng)
    batch = replace(gaussian(16, (12, 16), coils=3), encoding=CoilFourier(maps.expand(16, -1, -1, -1, -1)))
    loss = NoiselessMSM(sigma_min=1.0, sigma_max=1.0)
    model = Shrink(minimiser(loss, batch))
    loss(model, batch, stream()).backward()
    assert abs(float(model.gain.grad)) < 1e-4
