import math

import pytest
import torch
from torch import Tensor, nn

from msmri.model.partial import MeasurementPartial, image_divergence, image_gradient, radial_frequency
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.operators import CoilFourier, Subsample
from msmri.physics.simulate import coil_maps
from msmri.tensors import generators, normal_like

SPECTRUM = torch.linspace(1.0, -4.0, 48).exp()


class Zeros(nn.Module):
    def forward(self, channels: Tensor, condition: Tensor) -> Tensor:
        return torch.zeros_like(channels[:, :2])


class Mixing(nn.Module):
    """Depends on the real and imaginary parts it sees, and on the whole condition."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.3, 0.02, 0.03, 0.05, 0.07]))

    def forward(self, channels: Tensor, condition: Tensor) -> Tensor:
        assert condition.shape == (len(channels), 4)
        shift = (condition * self.gain[1:]).sum(1)[:, None, None, None]
        real, imaginary = (
            part.mul(torch.arange(1, part.shape[1] + 1)[:, None, None]).sum(1) for part in channels.chunk(2, 1)
        )
        return self.gain[0] * torch.stack([real, imaginary], 1).tanh() + shift


def encoding(shape, n_coils=3, *, batch=1, sets=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    maps = [torch.cat([coil_maps(shape, n_coils, rng) for _ in range(sets)], 1) for _ in range(batch)]
    return CoilFourier(torch.cat(maps).to(torch.complex128) / math.sqrt(sets))


def normal(*shape, seed=0):
    return normal_like(torch.zeros(shape, dtype=torch.complex128), generators(seed, shape[0]))


def prior_sample(model, shape, *, batch=1, sets=1, seed=0):
    return ifft2c(model.prior_variance(shape).sqrt() * normal(batch, sets, *shape, seed=seed))


def lines(width, seed=0, *, batch=1, share=0.5):
    mask = torch.rand(batch, 1, 1, width, generator=torch.Generator().manual_seed(seed)) < share
    mask[..., width // 2 - 1 : width // 2 + 1] = True
    return mask


def partial(network=None, *, wiener=200, consistency=0, spectrum=SPECTRUM, map_error=0.0):
    model = MeasurementPartial(
        network or Zeros(),
        spectrum,
        wiener_iterations=wiener,
        consistency_iterations=consistency,
        map_error=map_error,
    )
    return model.double().requires_grad_(False)


def close(a, b, tolerance):
    error = float((a - b).norm() / b.norm())
    assert error <= tolerance, error


def linewise(mask, levels, seed=4):
    pick = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return levels[0] * (levels[1] / levels[0]) ** pick


def test_radius_is_one_at_nyquist():
    radius = radial_frequency((8, 6), torch.device("cpu"))
    assert float(radius[4, 3]) == 0 and float(radius[0, 3]) == 1 and float(radius[4, 0]) == 1
    assert float(radius[0, 0]) == pytest.approx(math.sqrt(2))
    odd = radial_frequency((7, 5), torch.device("cpu"))
    assert float(odd[3, 2]) == 0 and torch.equal(odd, odd.flip(0, 1))


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (6, 11)])
def test_prior_variance_interpolates_the_logarithm(shape):
    got = partial().prior_variance(shape)
    y, x = (2 * (torch.arange(n, dtype=torch.float64) - n // 2) / n for n in shape)
    expected = torch.exp(1 - 5 * (y[:, None] ** 2 + x**2).sqrt() / 1.5)  # log-linear table: exact in between
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (9, 6)])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("tau", ["no consistency", "tau to 0"])
@pytest.mark.parametrize("map_error", [0.0, 0.3])
def test_equals_the_closed_form_gaussian_posterior(shape, sets, tau, map_error):
    model = partial(consistency=0 if tau == "no consistency" else 20, map_error=map_error)
    model.log_tau.copy_(torch.tensor([-40.0, 0.0]))
    coils = encoding(shape, sets=sets)
    mask = lines(shape[1])
    sigma = linewise(mask, (0.05, 3.0))
    clean = coils(prior_sample(model, shape, sets=sets, seed=1))
    state = Subsample(mask)(clean + sigma * normal(*clean.shape, seed=2))
    got = model.estimate(state, mask, coils, sigma)

    variance = model.scan_variance(state, mask, sigma)[0, 0]
    n, pixels = sets * shape[0] * shape[1], shape[0] * shape[1]
    basis = torch.eye(n, dtype=torch.complex128).reshape(n, sets, *shape)
    matrix = torch.stack([coils(each[None])[0] for each in basis]).reshape(n, -1).mT
    kept = mask.expand(1, 3, *shape).flatten()
    matrix = matrix[kept]
    single = torch.eye(pixels, dtype=torch.complex128).reshape(pixels, *shape)
    transform = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(single, dim=(1, 2)), norm="ortho"), dim=(1, 2))
    transform = transform.reshape(pixels, pixels).mT
    one = transform.mH @ torch.diag(variance.flatten().to(torch.complex128)) @ transform
    covariance = torch.block_diag(*[one] * sets)
    noise = sigma.square() + map_error**2 * variance / 3  # errors of the maps are noise of each of the three coils
    noise = noise.expand(1, 3, *shape).flatten()[kept].to(torch.complex128)
    inner = matrix @ covariance @ matrix.mH + torch.diag(noise)
    mean = covariance @ matrix.mH @ torch.linalg.solve(inner, state.flatten()[kept])
    close(got.flatten(), mean, 1e-6)


def test_maps_are_taken_to_be_half_a_percent_wrong():
    """One even coil and all lines: the posterior mean is ``v / (v + sigma^2 + (0.005)^2 v)`` of each place."""
    model = MeasurementPartial(Zeros(), SPECTRUM, wiener_iterations=200, consistency_iterations=0).double()
    coils = CoilFourier(torch.ones(1, 1, 1, 9, 12, dtype=torch.complex128))
    mask, sigma = torch.ones(1, 1, 1, 12, dtype=torch.bool), torch.full((1, 1, 1, 1), 1e-3, dtype=torch.float64)
    state = coils(prior_sample(model, (9, 12))).detach()
    with torch.no_grad():
        variance, got = model.scan_variance(state, mask, sigma), model(state, mask, coils, sigma)
    left = (state / got - 1).real
    torch.testing.assert_close(left, 0.005**2 + sigma.square() / variance, rtol=1e-4, atol=0)


def test_consistency_solves_its_own_equation():
    shape = (7, 10)
    model = partial(Mixing(), consistency=100)
    model.log_tau.copy_(torch.tensor([0.3, 0.4]))
    before = partial(Mixing(), consistency=0)
    coils, mask = encoding(shape), lines(10)
    sigma = linewise(mask, (0.2, 2.0))
    state = Subsample(mask)(coils(prior_sample(model, shape)) + sigma * normal(1, 3, *shape, seed=5))
    x, second = (m.estimate(state, mask, coils, sigma) for m in (model, before))
    variance = model.scan_variance(state, mask, sigma)
    alone = torch.where(mask, 1 / (1 / variance + 1 / sigma.square()), variance)
    scale = alone.mean((-2, -1), keepdim=True).sqrt()
    tau = math.exp(0.3) * scale**1.4
    gradient = coils.adjoint(torch.where(mask, (coils(x) - state) / sigma.square(), 0)) + (x - second) / tau.square()
    assert float(gradient.norm()) < 1e-6 * float((x / tau.square()).norm())
    assert float((x - second).norm()) > 1e-2 * float(x.norm())


@pytest.mark.parametrize("shape", [(12, 16), (13, 11)])
def test_tends_to_a_consistent_measurement_as_sigma_falls(shape):
    model = partial(Mixing(), wiener=100, consistency=300)
    coils, mask = encoding(shape), lines(shape[1])
    state = Subsample(mask)(coils(prior_sample(model, shape, seed=3)))
    errors = []
    for level in (1.0, 0.1, 0.01, 0.001):
        sigma = torch.full((1, 1, 1, shape[1]), level, dtype=torch.float64)
        errors.append(float((model(state, mask, coils, sigma) - state).norm() / state.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4


def test_lines_at_the_largest_sigma_say_nothing():
    shape = (12, 16)
    model = partial(Mixing(), wiener=30, consistency=10)
    coils, mask = encoding(shape), lines(16, share=0.8)
    hidden = mask & lines(16, seed=9, share=0.4)
    hidden[..., 7:9] = False
    assert 2 <= int(hidden.sum()) < int(mask.sum()) - 2
    sigma = torch.where(hidden, 1e8, 0.1)
    state = Subsample(mask)(coils(prior_sample(model, shape)))
    other = torch.where(hidden, 50 * normal(1, 3, *shape), state)
    close(model.estimate(other, mask, coils, sigma), model.estimate(state, mask, coils, sigma), 1e-9)
    # and to a network that is not told, it is as if they had not been measured
    plain = partial(wiener=30, consistency=10)
    close(plain.estimate(other, mask, coils, sigma), plain.estimate(state, mask & ~hidden, coils, sigma), 1e-9)
    close(model(other, mask, coils, sigma), Subsample(mask)(coils(model.estimate(state, mask, coils, sigma))), 1e-9)


@pytest.mark.parametrize("sets", [1, 2])
def test_samples_of_a_batch_do_not_mix(sets):
    shape = (11, 14)
    model = partial(Mixing(), wiener=10, consistency=6)
    coils, mask = encoding(shape, batch=3, sets=sets), lines(14, batch=3)
    sigma = linewise(mask, (0.05, 1.0)) * torch.tensor([1.0, 0.1, 5.0]).reshape(3, 1, 1, 1)
    state = Subsample(mask)(coils(prior_sample(model, shape, batch=3, sets=sets)) + sigma * normal(3, 3, *shape))
    together = model(state, mask, coils, sigma)
    for i in range(3):
        one = slice(i, i + 1)
        alone = model(state[one], mask[one], CoilFourier(coils.maps[one]), sigma[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-9, atol=1e-9)


def test_an_empty_second_set_of_maps_changes_nothing_but_its_own_image():
    shape = (10, 12)
    model = partial(wiener=40)
    one, mask = encoding(shape), lines(12)
    two = CoilFourier(torch.cat([one.maps, torch.zeros_like(one.maps)], 1))
    sigma = linewise(mask, (0.05, 1.0))
    state = Subsample(mask)(one(prior_sample(model, shape)))
    got, expected = (model.estimate(state, mask, coils, sigma) for coils in (two, one))
    torch.testing.assert_close(got[:, :1], expected, rtol=1e-9, atol=1e-9)
    assert got.shape == (1, 2, *shape) and float(got[:, 1].norm()) == 0


def test_zero_off_the_mask_and_blind_to_what_is_there():
    shape = (9, 12)
    model = partial(Mixing(), wiener=10, consistency=6)
    coils, mask = encoding(shape), lines(12)
    sigma = torch.full((1, 1, 1, 12), 0.1, dtype=torch.float64)
    state = Subsample(mask)(coils(prior_sample(model, shape)))
    expected = model(state, mask, coils, sigma)
    assert not bool(expected[(~mask).expand_as(expected)].any())
    poisoned = torch.where(mask, state, torch.tensor(float("nan"), dtype=state.dtype))
    assert torch.equal(model(poisoned, mask, coils, sigma), expected)


def test_two_dimensional_masks():
    shape = (10, 12)
    model = partial(wiener=200)
    coils = encoding(shape)
    mask = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)) < 0.6
    sigma = torch.full((1, 1, 1, 1), 1e-3, dtype=torch.float64)
    state = Subsample(mask)(coils(prior_sample(model, shape)))
    close(model(state, mask, coils, sigma), state, 1e-3)


def test_scan_variance_is_the_prior_when_all_is_noise():
    shape, model = (24, 20), partial()
    mask = lines(20)
    for level in (300.0, 1e6):
        sigma = torch.full((1, 1, 1, 20), level, dtype=torch.float64)
        state = level * normal(1, 3, *shape)
        got = model.scan_variance(state, mask, sigma)
        torch.testing.assert_close(got[0, 0], model.prior_variance(shape), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("power", "least", "most"), [(4, 3.6, 4), (0.25, 0.25, 0.35), (1e4, 50, 50), (1e-6, 0.02, 0.15)]
)
def test_scan_variance_follows_a_clean_scan(power, least, most):
    shape, model = (64, 60), partial()
    mask = torch.ones(1, 1, 1, 60, dtype=torch.bool)
    sigma = torch.full((1, 1, 1, 60), 1e-5, dtype=torch.float64)
    prior = model.prior_variance(shape)
    # the expected energy, times power, at every place, shared by three coils
    state = (power * 2 * prior / 3).sqrt().to(torch.complex128).expand(1, 3, *shape)
    ratio = model.scan_variance(state, mask, sigma)[0, 0] / prior
    middle = (radial_frequency(shape, prior.device) - 0.5).abs() < 0.2
    assert least * 0.9999 <= float(ratio[middle].min()) and float(ratio[middle].max()) <= most * 1.0001


def test_scan_variance_counts_places_ring_by_ring():
    shape, model = (20, 24), partial(spectrum=torch.full((48,), 2.0))
    mask, sigma = lines(24), linewise(lines(24), (0.3, 2.0))
    state = Subsample(mask)(3 * normal(1, 3, *shape))
    total, count = [16.0] * 24, [16.0] * 24
    radius = [[math.hypot((y - 10) / 10, (x - 12) / 12) / 1.5 * 23 for x in range(24)] for y in range(20)]  # in rings
    for y in range(20):
        for x in range(24):
            if bool(mask[0, 0, 0, x]):
                noise = 3 * float(sigma[0, 0, 0, x]) ** 2
                trust = (2 / (2 + noise)) ** 2
                energy = float(state[0, :, y, x].abs().square().sum()) / 2 - noise
                total[round(radius[y][x])] += trust * energy / 2
                count[round(radius[y][x])] += trust
    log = [math.log(min(max(t / c, 0.02), 50)) for t, c in zip(total, count)]
    smooth = [(log[max(i - 1, 0)] + 2 * log[i] + log[min(i + 1, 23)]) / 4 for i in range(24)]
    got = model.scan_variance(state, mask, sigma)[0, 0]
    for y, x in [(10, 12), (10, 15), (3, 20), (0, 0), (12, 7), (19, 23)]:
        low = min(int(radius[y][x]), 22)
        part = radius[y][x] - low
        expected = 2 * math.exp((1 - part) * smooth[low] + part * smooth[low + 1])
        assert float(got[y, x]) == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_the_network_and_tau_alone():
    shape = (10, 12)
    model = partial(Mixing(), wiener=10, consistency=6).requires_grad_(True)
    coils, mask = encoding(shape), lines(12)
    sigma = linewise(mask, (0.05, 1.0))
    state = Subsample(mask)(coils(prior_sample(model, shape).detach()))
    model(state, mask, coils, sigma).abs().square().sum().backward()
    assert {name for name, _ in model.named_parameters()} == {"log_tau", "network.network.gain"}
    assert all(bool(p.grad.isfinite().all()) and bool((p.grad != 0).all()) for p in model.parameters())
    assert "spectrum" in model.state_dict()


def test_single_precision_and_bfloat16_agree():
    shape = (16, 20)
    coils, mask = encoding(shape), lines(20)
    exact = partial(Mixing(), wiener=10, consistency=6)
    state = Subsample(mask)(coils(prior_sample(exact, shape)))
    sigma = linewise(mask, (0.05, 1.0))
    expected = exact(state, mask, coils, sigma)
    single = CoilFourier(coils.maps.to(torch.complex64))
    for reduced, tolerance in ((False, 1e-4), (True, 2e-2)):
        steps = {"wiener_iterations": 10, "consistency_iterations": 6}
        model = MeasurementPartial(Mixing(), SPECTRUM, bfloat16=reduced, **steps).requires_grad_(False)
        got = model(state.to(torch.complex64), mask, single, sigma.float())
        assert got.dtype == torch.complex64
        close(got.to(torch.complex128), expected, tolerance)


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 7, 4)])
def test_divergence_is_the_adjoint_of_the_gradient(shape):
    image, field = normal(3, *shape), torch.stack([normal(3, *shape, seed=1), normal(3, *shape, seed=2)])
    gradient = image_gradient(image)
    assert torch.equal(gradient[1][..., 0], image[..., 1] - image[..., 0])
    assert torch.equal(gradient[0][..., -1, :], image[..., 0, :] - image[..., -1, :])
    left, right = (
        torch.vdot(gradient.flatten(), field.flatten()),
        torch.vdot(image.flatten(), image_divergence(field).flatten()),
    )
    assert abs(left - right) < 1e-12 * abs(left) + 1e-12


@pytest.mark.parametrize(("shape", "sets"), [((12, 16), 1), ((13, 11), 2)])
@pytest.mark.parametrize("level", [0.004, 0.04, 0.16])
def test_sharpening_ends_where_the_gradient_of_its_objective_is_zero(shape, sets, level):
    model = partial()
    coils, mask = encoding(shape, sets=sets), lines(shape[1])
    sigma = torch.full((1, 1, 1, shape[1]), 3 * level, dtype=torch.float64)
    sigma[lines(shape[1], seed=7) & mask] = level
    clean = torch.zeros(1, sets, *shape, dtype=torch.complex128)
    clean[..., 3:8, 4:9] = 1 + 0.5j
    state = Subsample(mask)(coils(clean) + sigma * normal(1, 3, *shape, seed=2))
    weight = torch.where(mask, 1 / sigma.square(), 0.0)
    lowest = torch.tensor([level], dtype=torch.float64)
    start = model.wiener(state, weight, coils, model.scan_variance(state, mask, sigma))
    often = {"reweightings": 150, "iterations": 60}
    x = model.sharpen(start, state, coils, weight, lowest, **often).requires_grad_(True)

    def objective(x):
        misfit = (weight * (coils(x) - state).abs().square()).sum() / 2
        edges = sum((x.roll(-1, axis) - x).abs().square().sum(1) for axis in (-2, -1))
        strength = 5e-4 / min(level, 0.01) ** 2 * min(0.08 / level, 1)
        return misfit, strength / 0.7 * ((edges + 0.01**2) ** 0.35).sum()

    misfit, prior = objective(x)
    sizes = [torch.autograd.grad(part, x, retain_graph=True)[0] for part in (misfit, prior)]
    assert float((sizes[0] + sizes[1]).norm()) < 2e-3 * float(sizes[1].norm())
    with torch.no_grad():
        assert float(sum(objective(x))) < float(sum(objective(start)))


def test_sharp_edges_survive_undersampling_better():
    shape = (32, 32)
    coils, mask = encoding(shape), lines(32, share=0.35)
    clean = torch.zeros(1, 1, *shape, dtype=torch.complex128)
    clean[..., 6:24, 8:26] = 1
    clean[..., 12:17, 10:20] = 0.4 + 0.3j
    sigma = torch.full((1, 1, 1, 32), 0.01, dtype=torch.float64)
    state = Subsample(mask)(coils(clean) + sigma * normal(1, 3, *shape))
    spectrum = torch.linspace(3.0, -6.0, 48).exp()
    smooth, sharp = partial(spectrum=spectrum), partial(spectrum=spectrum)
    sharp.reweightings = 8
    errors = [float((model.estimate(state, mask, coils, sigma) - clean).norm()) for model in (smooth, sharp)]
    assert errors[1] < 0.5 * errors[0]


def following_case(model, batch=1):
    """Give the arguments of two estimates in a row: unmeasured lines at a high noise level, then at one half of it."""
    shape = (24, 20)
    coils, mask = encoding(shape, batch=batch), lines(20, share=0.4)
    clean = torch.zeros(batch, 1, *shape, dtype=torch.complex128)
    clean[..., 5:18, 4:15] = 1
    clean[..., 9:13, 7:11] = 0.4 + 0.3j
    clean[-1] *= 0.7
    everywhere = torch.ones_like(mask)
    noise = normal(batch, 3, *shape, seed=4)
    runs = []
    for level in (0.2, 0.1):
        sigma = torch.where(mask, 0.01, torch.tensor(level, dtype=torch.float64)).expand(batch, 1, 1, 20)
        runs.append((coils(clean) + sigma * noise, everywhere.expand(batch, 1, 1, 20), coils, sigma))
    return clean, runs


def edgy(network=None, **settings):
    model = MeasurementPartial(network or Zeros(), torch.linspace(3.0, -6.0, 48).exp(), **settings).double()
    model.reweightings, model.reweighted_iterations = 12, 20
    return model


def test_following_begins_where_the_step_before_ended():
    model = edgy()
    clean, (early, late) = following_case(model)
    follow = model.following()
    close(follow(*early), model(*early), 1e-12)  # nothing to begin from: the whole estimate
    begun, _ = model.estimates(*early)
    fast, slow = follow(*late), model(*late)
    close(fast, late[2](model.estimates(*late, begun)[1]), 1e-12)
    close(fast, slow, 0.03)
    assert float((fast - late[2](clean)).norm()) < 1.05 * float((slow - late[2](clean)).norm())
    fewer = edgy()  # as few iterations that begin at nothing are far from it
    fewer.reweightings, fewer.reweighted_iterations, fewer.wiener_iterations = 2, 8, 1
    assert float((fewer(*late) - slow).norm()) > 2 * float((fast - slow).norm())


def test_every_run_follows_itself_alone():
    model = edgy(Mixing())
    _, (early, late) = following_case(model, batch=2)
    together, again = model.following(), model.following()
    together(*early)
    found = together(*late)
    again(*early)
    assert torch.equal(again(*late), found) and not torch.equal(model(*late), found)
    for row in (0, 1):  # neighbours in a batch never matter
        alone = model.following()
        for run, seen in ((early, None), (late, found)):
            state, mask, coils, sigma = run
            one = CoilFourier(coils.maps[row : row + 1])
            result = alone(state[row : row + 1], mask[:1], one, sigma[:1])
            if seen is not None:
                close(result, seen[row : row + 1], 1e-9)


def test_following_serves_masks_in_a_row_and_weighs_networks():
    model = edgy(Mixing())
    _, (early, late) = following_case(model, batch=2)
    gain = torch.tensor([0.0, 0.3], dtype=torch.float64).reshape(2, 1, 1, 1)
    follow = model.following(gain)
    close(follow(*early), model(*early, gain), 1e-12)
    state, mask, coils, sigma = late
    twice = CoilFourier(coils.maps.repeat(2, *[1] * (coils.maps.ndim - 1)))
    wide = follow(state.repeat(2, 1, 1, 1), mask.repeat(2, 1, 1, 1), twice, sigma.repeat(2, 1, 1, 1))
    narrow = model.following(gain)
    narrow(*early)
    expected = narrow(*late)
    close(wide[:2], expected, 1e-9)
    close(wide[2:], expected, 1e-9)


def test_following_a_gaussian_prior_is_exact():
    model = partial(Mixing(), wiener=10, consistency=6)
    _, (early, late) = following_case(model)
    follow = model.following()
    assert torch.equal(follow(*early), model(*early)) and torch.equal(follow(*late), model(*late))


def test_each_cascade_has_a_network_of_its_own():
    shape = (10, 12)
    settings = {"wiener_iterations": 10, "consistency_iterations": 6}
    model = MeasurementPartial(Mixing(), SPECTRUM, cascades=3, **settings).double()
    coils, mask = encoding(shape), lines(12)
    sigma = linewise(mask, (0.05, 1.0))
    state = Subsample(mask)(coils(prior_sample(model, shape).detach()))
    model(state, mask, coils, sigma).abs().square().sum().backward()
    gains = [dict(model.named_parameters())[f"{name}.network.gain"] for name in ("network", "later.0", "later.1")]
    assert all(bool((gain.grad != 0).all()) for gain in gains) and not torch.equal(gains[0].grad, gains[1].grad)
    assert model.log_tau.shape == (6,) and bool((model.log_tau.grad != 0).all())
    # one cascade, and then its correction by a second that adds nothing and leaves the image alone
    one = MeasurementPartial(Mixing(), SPECTRUM, **settings).double()
    two = MeasurementPartial(Mixing(), SPECTRUM, cascades=2, **settings).double()
    with torch.no_grad():
        two.later[0].network.gain.zero_()
        two.log_tau[2:] = torch.tensor([-20.0, 0.0])
    with torch.no_grad():
        close(two(state, mask, coils, sigma), one(state, mask, coils, sigma), 1e-6)


class Told(MeasurementPartial):
    """Its networks add ``factor`` times what is missing in a first estimate that lacks ``missing``."""

    def __init__(self, truth, missing, factor):
        super().__init__(Zeros(), SPECTRUM)
        self.truth, self.missing, self.factor, self.seen = truth, missing, factor, None
        self.to(truth.real.dtype)

    def estimates(self, state, mask, encoding, sigma, centre=None):
        self.seen, self.centre = (state, mask, sigma), centre
        first = self.truth - self.missing
        return first.expand(len(state), -1, -1, -1), first + self.factor * self.missing


@pytest.mark.parametrize("noisy", [False, True])
def test_the_error_to_expect_is_what_hidden_lines_are_missing(noisy):
    shape = (60, 80)
    coils, mask = encoding(shape), lines(80)
    rng = torch.Generator().manual_seed(3)
    truth, missing = (
        torch.view_as_complex(torch.randn(1, 1, *shape, 2, generator=rng, dtype=torch.float64)) for _ in "ab"
    )
    noise = torch.full((1, 1, 1, 1), 2.0 if noisy else 0.01, dtype=torch.float64)
    model = Told(truth, missing, 0.0)  # white error, of 1 in each real component of every pixel
    clean = coils(truth)
    values = clean + noise * torch.view_as_complex(torch.randn(*clean.shape, 2, generator=rng, dtype=torch.float64))
    poisoned = torch.where(mask, values, torch.tensor(float("nan"), dtype=values.dtype))
    found = model.cross_validate(poisoned, mask, coils, noise, torch.Generator().manual_seed(0))
    share = float(mask.double().mean())
    expected = (1 - share) + share * float(noise.square())
    assert found.error.shape == (1,) and float(found.error) == pytest.approx(expected, rel=0.1)
    exact = Told(truth, missing, 1.0)
    found = exact.cross_validate(poisoned, mask, coils, noise, torch.Generator().manual_seed(0))
    # how far chance takes hidden noise above its expectation in some rings and below it, to 0, in others
    assert float(found.error) == pytest.approx(share * float(noise.square()), rel=0.1, abs=0.15 * float(noise.square()))


def test_correction_is_the_posterior_mean_of_a_stationary_gaussian_error():
    shape, model = (9, 14), partial().double()
    one = CoilFourier(torch.ones(1, 1, 1, *shape, dtype=torch.complex128))
    rng = torch.Generator().manual_seed(4)
    image, data = (
        torch.view_as_complex(torch.randn(2, 1, *shape, 2, generator=rng, dtype=torch.float64)) for _ in "ab"
    )
    variance = torch.rand(*shape, generator=rng, dtype=torch.float64) + 0.1
    weight = (torch.rand(2, 1, *shape, generator=rng, dtype=torch.float64) + 0.2) * lines(14)
    got = model.correct(image, data, one, weight, variance)
    prior = fft2c(image)
    expected = ifft2c((weight * data + prior / variance) / (weight + 1 / variance))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_hidden_lines_choose_the_share_of_the_networks_in_the_image(factor):
    shape = (20, 52)
    coils, mask = encoding(shape), lines(52)
    model = Told(prior_sample(partial(), shape), prior_sample(partial(), shape, seed=5), factor)
    values = torch.where(mask, coils(model.truth), torch.tensor(float("nan"), dtype=torch.complex128))
    noise = torch.full((1, 1, 1, 1), 1e-3, dtype=torch.float64)
    found = model.cross_validate(values, mask, coils, noise, torch.Generator().manual_seed(0))
    # all, or half, of what they add is the truth; nothing that was not measured is read
    torch.testing.assert_close(found.image, model.truth, rtol=0, atol=1e-6)


def test_image_of_cross_validation_is_nearer_to_the_data_than_the_estimate():
    shape = (40, 52)
    coils, mask = encoding(shape), lines(52)
    rng = torch.Generator().manual_seed(3)
    truth, missing = (
        torch.view_as_complex(torch.randn(1, 1, *shape, 2, generator=rng, dtype=torch.float64)) for _ in "ab"
    )
    model = Told(truth, missing, 0.0)  # white error, and networks that add nothing
    model.map_error = 0.0
    values = Subsample(mask)(coils(truth))
    noise = torch.full((1, 1, 1, 1), 0.1, dtype=torch.float64)
    found = model.cross_validate(values, mask, coils, noise, torch.Generator().manual_seed(0))
    before, after = (Subsample(mask)(coils(x - truth)).norm() for x in (truth - missing, found.image))
    assert float(after) < 0.2 * float(before)
    assert float((found.image - truth).norm()) < 0.95 * float(missing.norm())
    # only the centre, which is never hidden: there is nothing to choose by
    few = torch.zeros_like(mask)
    few[..., 26] = True
    assert model.cross_validate(values, few, coils, noise, torch.Generator().manual_seed(0)).image is None


@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize(
    ("factor", "gain"), [(1.0, 1.0), (4.0, 1.0), (8.0, 0.5), (16.0, 0.25), (0.5, 1.0), (-1.0, 0.0), (0.0, 1.0)]
)
def test_network_gain_is_the_share_that_explains_hidden_lines(factor, gain, places):
    shape = (20, 52)
    coils, mask = encoding(shape), lines(52)
    if places:
        mask = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(1)) < 0.6
    model = Told(prior_sample(partial(), shape), prior_sample(partial(), shape, seed=5), factor)
    values = Subsample(mask)(coils(model.truth))
    poisoned = torch.where(mask, values, torch.tensor(float("nan"), dtype=values.dtype))
    noise = torch.full((1, 1, 1, 1), 0.1, dtype=torch.float64)
    found = model.cross_validate(poisoned, mask, coils, noise, torch.Generator().manual_seed(0), image=False)
    assert found.image is None
    assert found.gain.shape == (1, 1, 1, 1) and float(found.gain) == pytest.approx(gain, abs=1e-6)
    assert model.centre is None
    told = torch.tensor(6.0)
    model.cross_validate(poisoned, mask, coils, noise, torch.Generator().manual_seed(0), centre=told, image=False)
    assert model.centre is told
    state, everywhere, sigma = model.seen
    hidden = mask & (sigma == 100)
    assert bool(everywhere.all()) and len(state) == 4
    times = hidden.sum(0)[0]  # every measured line is hidden once, but for the centre
    centre = (torch.arange(52) - 26).abs() <= 1
    if places:
        centre = centre[None, :] & ((torch.arange(20) - 10).abs() <= 0)[:, None]
    assert torch.equal(times, (mask[0, 0] & ~centre).long())
    assert not bool(state[hidden.expand_as(state)].any()) and bool((sigma[mask & ~hidden] == 0.1).all())
    kept = (mask & ~hidden).expand_as(state)
    assert torch.equal(state[kept], values.expand_as(state)[kept])


def test_gain_weighs_what_the_networks_add():
    shape = (10, 12)
    model = partial(Mixing(), wiener=10, consistency=6)
    coils, mask = encoding(shape, batch=2), lines(12, batch=2)
    sigma = linewise(mask, (0.05, 1.0))
    state = Subsample(mask)(coils(prior_sample(model, shape, batch=2)))
    first, last = model.estimates(state, mask, coils, sigma)
    assert float((last - first).norm()) > 0.01 * float(first.norm())
    gain = torch.tensor([0.0, 0.3], dtype=torch.float64).reshape(2, 1, 1, 1)
    expected = torch.cat([first[:1], first[1:] + 0.3 * (last - first)[1:]])
    close(model.estimate(state, mask, coils, sigma, gain), expected, 1e-9)
    assert torch.equal(model.estimate(state, mask, coils, sigma), last)
    close(model(state, mask, coils, sigma, gain), Subsample(mask)(coils(expected)), 1e-9)


def test_maps_from_few_lines_are_taken_to_be_worse():
    model = partial(Mixing())
    model.map_error = 0.01
    assert model.wrong(None) == 0.01
    lines_ = torch.tensor([0.0, 2.0, 4.0, 6.5, 13.0, 24.0]).reshape(-1, 1, 1, 1)
    expected = 0.01 * torch.tensor([1.0, 10.5625, 10.5625, 4.0, 1.0, 1.0])
    torch.testing.assert_close(model.wrong(lines_).flatten(), expected)


def test_every_item_of_a_run_has_maps_of_its_own_lines():
    shape = (10, 12)
    model = partial(Mixing(), wiener=10, consistency=6)
    model.map_error = 0.1
    coils, mask = encoding(shape, batch=2), lines(12, batch=2)
    sigma = linewise(mask, (0.05, 1.0))
    state = Subsample(mask)(coils(prior_sample(model, shape, batch=2)))
    centre = torch.tensor([6.0, 20.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    wide = model.estimates(state, mask, coils, sigma)[1]
    worse = partial(Mixing(), wiener=10, consistency=6)
    worse.map_error = model.map_error * (13 / 6) ** 2
    narrow = worse.estimates(state, mask, coils, sigma)[1]
    assert float((wide - narrow)[0].norm()) > 1e-6 * float(wide[0].norm())
    expected = coils(torch.cat([narrow[:1], wide[1:]]))
    close(model.following(None, centre)(state, mask, coils, sigma), Subsample(mask)(expected), 1e-9)
    twice = CoilFourier(coils.maps.repeat(2, 1, 1, 1, 1))  # two masks of each, in a row
    both = model.following(None, centre)(
        state.repeat(2, 1, 1, 1), mask.repeat(2, 1, 1, 1), twice, sigma.repeat(2, 1, 1, 1)
    )
    close(both, Subsample(mask)(expected).repeat(2, 1, 1, 1), 1e-9)


def test_a_prior_in_one_run_tells_the_law_it_was_trained_on():
    model = partial(Mixing())
    assert model.following().law is None
    model.law = "the law"
    assert model.following().law == "the law"
