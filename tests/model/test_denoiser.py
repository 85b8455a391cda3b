import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from msmri.model.denoiser import (
    ComplexChannels,
    Denoiser,
    EpsilonVP,
    GaussianDenoiser,
    Preconditioned,
    VPSchedule,
    per_sample_sigma,
)
from msmri.tensors import generators, normal_like


def draw(shape, dtype=torch.complex128, seed=0):
    return normal_like(torch.zeros(shape, dtype=dtype), generators(seed, shape[0]))


class Function(nn.Module):
    """A network given by a function, that remembers what it was shown."""

    def __init__(self, function):
        super().__init__()
        self.function, self.seen = function, []

    def forward(self, image, condition):
        self.seen.append((image, condition))
        return self.function(image, condition)


# ---------------------------------------------------------------------------------------------------- noise levels


def test_sigma_is_one_number_a_sample():
    noisy = torch.zeros(2, 3, 4, 5)
    assert per_sample_sigma(0.5, noisy).shape == (2, 1, 1, 1)
    assert per_sample_sigma(torch.tensor([0.5, 1.0]).reshape(2, 1, 1, 1), noisy)[1].item() == 1.0
    assert per_sample_sigma(torch.ones(1, 1, 1), noisy.expand(7, 2, 3, 4, 5)).shape == (7, 2, 1, 1, 1)
    for wrong in (
        torch.ones(2),
        torch.ones(5),
        torch.ones(3, 1, 1, 1),
        torch.ones(2, 1, 1, 5),
        torch.ones(1, 2, 1, 1, 1),
    ):
        with pytest.raises(ValueError, match="sigma must be"):
            per_sample_sigma(wrong, noisy)
    with pytest.raises(ValueError, match="negative"):
        per_sample_sigma(-0.1, noisy)


# -------------------------------------------------------------------------------------------------- complex channels


def test_complex_channels_are_real_parts_then_imaginary_parts():
    image = draw((2, 3, 4, 5))
    network = Function(lambda x, _: x)
    out = ComplexChannels(network)(image, torch.zeros(2))
    seen = network.seen[0][0]
    assert seen.shape == (2, 6, 4, 5) and not seen.is_complex()
    assert torch.equal(seen[:, :3], image.real) and torch.equal(seen[:, 3:], image.imag)
    assert torch.equal(out, image)


def test_complex_channels_keeps_the_dtype_of_the_image_and_refuses_nonsense():
    image = draw((2, 1, 4, 5), torch.complex64)
    half = ComplexChannels(Function(lambda x, _: x.bfloat16()))
    assert half(image, torch.zeros(2)).dtype == torch.complex64
    with pytest.raises(ValueError, match="complex images"):
        half(image.real, torch.zeros(2))
    with pytest.raises(ValueError, match="pairs"):
        ComplexChannels(Function(lambda x, _: x[:, :1]))(image, torch.zeros(2))


# ----------------------------------------------------------------------------------------------------------- VP


def test_schedule_is_the_linear_one_of_diffusers():
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(VPSchedule().alpha_bar.float(), reference.alphas_cumprod, rtol=1e-4, atol=0)


def test_schedule_spans_the_known_levels():
    sigmas = VPSchedule().sigmas
    assert sigmas[0].item() == pytest.approx(math.sqrt(1e-4 / (1 - 1e-4)), rel=1e-12)
    assert sigmas[-1].item() == pytest.approx(157.407, rel=1e-4)
    assert bool((sigmas.diff() > 0).all()) and sigmas.dtype == torch.float64


@settings(max_examples=40, deadline=None)
@given(t=st.floats(0, 999), steps=st.sampled_from([10, 1000]))
def test_time_and_level_are_inverse(t, steps):
    schedule = VPSchedule(n_steps=steps)
    t = torch.tensor(min(t, steps - 1.0), dtype=torch.float64)
    assert schedule.t(schedule.sigma(t)).item() == pytest.approx(t.item(), abs=1e-8)


def test_levels_between_steps_are_geometric_and_held_at_the_ends():
    schedule = VPSchedule()
    between = schedule.sigma(torch.tensor([7.5], dtype=torch.float64))
    assert between.item() == pytest.approx(math.sqrt(schedule.sigmas[7] * schedule.sigmas[8]), rel=1e-12)
    assert schedule.t(torch.tensor([0.0, 1e-6, 1e6])).tolist() == [0, 0, 999]
    assert schedule.sigma(torch.tensor([-3.0, 1200.0])).tolist() == pytest.approx(schedule.sigmas[[0, -1]].tolist())
    torch.testing.assert_close(schedule.t(schedule.sigmas), torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("wrong", [{"n_steps": 1}, {"beta_min": 0.0}, {"beta_min": 0.03}, {"beta_max": 1.0}])
def test_schedule_refuses_nonsense(wrong):
    with pytest.raises(ValueError, match="need n_steps"):
        VPSchedule(**wrong)


def exact_epsilon(mean, variance):
    """E[n | u] of a Gaussian image prior, in the network's own view, from an independent table of alpha_bar."""
    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))

    def epsilon(u, t):
        ab = alpha_bar[t.round().long()].reshape(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (u - ab.sqrt() * mean) / (ab * variance + 1 - ab)

    return Function(epsilon)


@pytest.mark.parametrize("is_complex", [True, False])
def test_epsilon_vp_with_the_exact_epsilon_is_the_posterior_mean(is_complex):
    dtype = torch.complex128 if is_complex else torch.float64
    mean, noisy = draw((1, 1, 5, 7), dtype)[0], 2 * draw((3, 1, 5, 7), dtype, seed=1)
    variance = torch.rand(1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    steps = torch.tensor([0, 400, 999])
    sigma = VPSchedule().sigmas[steps].reshape(3, 1, 1, 1)
    channels = torch.cat([mean.real, mean.imag]) if is_complex else mean
    network = exact_epsilon(channels, variance)
    denoiser = EpsilonVP(ComplexChannels(network) if is_complex else network)

    expected = (mean * sigma**2 + noisy * variance) / (variance + sigma**2)
    torch.testing.assert_close(denoiser.denoise(noisy, sigma), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(GaussianDenoiser(mean, variance).denoise(noisy, sigma), expected)
    seen, t = network.seen[-1]
    torch.testing.assert_close(t, steps.double(), rtol=0, atol=1e-7)
    first = noisy.real if is_complex else noisy
    torch.testing.assert_close(seen[:, :1], first / (1 + sigma**2).sqrt())

    stacked = denoiser(noisy[:, None].expand(3, 2, 1, 5, 7), sigma[:, None])  # two batch axes, as a module call
    torch.testing.assert_close(stacked[:, 1], expected, rtol=1e-9, atol=1e-9)
    one_by_one = torch.cat([denoiser.denoise(noisy[i : i + 1], float(sigma[i])) for i in range(3)])
    torch.testing.assert_close(one_by_one, expected, rtol=1e-5, atol=1e-5)


def test_epsilon_vp_interpolates_or_rounds_the_time_and_never_the_scale():
    network = Function(lambda u, t: torch.ones_like(u))
    noisy = draw((1, 1, 3, 3), torch.float64)
    for nearest, asked, time in ((False, 410.4, 410.4), (True, 410.4, 410.0), (True, 410.6, 411.0)):
        sigma = VPSchedule().sigma(torch.tensor(asked, dtype=torch.float64)).reshape(1, 1, 1, 1)
        out = EpsilonVP(network, nearest=nearest).denoise(noisy, sigma)
        seen, t = network.seen[-1]
        assert t.tolist() == pytest.approx([time], abs=1e-6)
        torch.testing.assert_close(seen, noisy / (1 + sigma**2).sqrt())
        torch.testing.assert_close(out, noisy - sigma)


def test_epsilon_vp_without_noise_changes_nothing():
    noisy = draw((2, 1, 3, 3), torch.float32)
    assert torch.equal(EpsilonVP(Function(lambda u, t: u)).denoise(noisy, 0.0), noisy)
    assert EpsilonVP(nn.Identity()).sigmas.shape == (1000,)


# ---------------------------------------------------------------------------------------------------------- EDM


@settings(max_examples=50, deadline=None)
@given(log_sigma=st.floats(-6, 5), sigma_data=st.floats(0.05, 5))
def test_preconditioning_gives_input_and_target_unit_variance(log_sigma, sigma_data):
    sigma = torch.tensor(math.exp(log_sigma), dtype=torch.float64)
    model = Preconditioned(nn.Identity(), sigma_data)
    c = model.factors(sigma)
    assert (c.scale**2 * (sigma_data**2 + sigma**2)).item() == pytest.approx(1)
    target = ((1 - c.skip) ** 2 * sigma_data**2 + c.skip**2 * sigma**2) / c.out**2
    assert target.item() == pytest.approx(1)
    assert ((c.skip - 1) * sigma_data**2 + c.skip * sigma**2).item() == pytest.approx(0, abs=1e-9)  # least c_out
    assert c.noise.item() == pytest.approx(log_sigma / 4, abs=1e-9)
    assert (model.weight(sigma) * c.out**2).item() == pytest.approx(1)


def test_preconditioned_shows_the_network_what_the_table_says():
    noisy = draw((2, 1, 3, 4), torch.complex128)
    network = Function(lambda x, _: torch.full_like(x, 3.0))
    sigma = torch.tensor([2.0, 0.25], dtype=torch.float64).reshape(2, 1, 1, 1)
    out = Preconditioned(ComplexChannels(network), 0.5).denoise(noisy, sigma)
    seen, condition = network.seen[0]
    torch.testing.assert_close(seen[0, 0], noisy[0, 0].real / math.sqrt(4.25))
    assert condition.tolist() == pytest.approx([math.log(2.0) / 4, math.log(0.25) / 4])
    expected = 0.25 / 4.25 * noisy[0] + 2 * 0.5 / math.sqrt(4.25) * (3 + 3j)
    torch.testing.assert_close(out[0], expected)


def test_preconditioned_without_a_network_is_exact_for_white_images():
    noisy, zeros = draw((2, 1, 4, 4)), Function(lambda x, _: torch.zeros_like(x))
    model = Preconditioned(zeros, 0.7)
    prior = GaussianDenoiser(torch.zeros(1, 4, 4), torch.tensor(0.49))
    torch.testing.assert_close(model.denoise(noisy, 0.3), prior.denoise(noisy, 0.3), rtol=1e-6, atol=1e-6)
    assert torch.equal(model(noisy, 0.0), noisy)
    with pytest.raises(ValueError, match="positive"):
        Preconditioned(zeros, 0.0)


# ----------------------------------------------------------------------------------------------------- exact Gaussian


def random_covariance(n, dtype, seed=0):
    factor = draw((1, n, n), dtype, seed)[0]
    return factor @ factor.mH / n + 0.05 * torch.eye(n, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gaussian_with_any_covariance_against_a_linear_solve(dtype):
    shape, n = (2, 3, 4), 24
    mean, covariance = draw((1, *shape), dtype)[0], random_covariance(n, dtype)
    noisy = draw((3, *shape), dtype, seed=5)
    out = GaussianDenoiser.from_covariance(mean, covariance).denoise(noisy, 0.6)
    gain = covariance @ torch.linalg.inv(covariance + 0.36 * torch.eye(n, dtype=dtype))
    expected = mean + ((noisy - mean).flatten(1) @ gain.mT).reshape(noisy.shape)
    torch.testing.assert_close(out, expected)


def test_gaussian_is_tweedie_of_its_own_marginal():
    n, sigma = 6, 0.8
    mean, covariance = draw((1, 1, 2, 3))[0], random_covariance(6, torch.complex128)
    noisy = draw((1, 1, 2, 3), seed=3)
    # the marginal as a real Gaussian of twice the size, with its density from torch
    k = covariance + sigma**2 * torch.eye(n)
    real = torch.cat([torch.cat([k.real, -k.imag], 1), torch.cat([k.imag, k.real], 1)])
    pair = torch.cat([(noisy - mean).flatten().real, (noisy - mean).flatten().imag]).requires_grad_()
    torch.distributions.MultivariateNormal(torch.zeros(2 * n, dtype=torch.float64), real).log_prob(pair).backward()
    score = torch.complex(pair.grad[:n], pair.grad[n:]).reshape(1, 1, 2, 3)
    out = GaussianDenoiser.from_covariance(mean, covariance).denoise(noisy, sigma)
    torch.testing.assert_close(out, noisy + sigma**2 * score)


def fft(x):
    return torch.fft.fft2(x, norm="ortho")


def ifft(x):
    return torch.fft.ifft2(x, norm="ortho")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_stationary_prior_is_the_full_covariance_of_its_spectrum(dtype):
    y, x = 4, 5
    frequency = torch.fft.fftfreq(y)[:, None] ** 2 + torch.fft.fftfreq(x) ** 2
    spectrum = (1 / (0.05 + frequency)).double()[None]
    basis = fft(torch.eye(y * x, dtype=torch.complex128).reshape(-1, y, x)).flatten(1).mT
    covariance = basis.mH @ (spectrum.flatten()[:, None] * basis)
    mean, noisy = draw((1, 1, y, x), dtype)[0], draw((2, 1, y, x), dtype, seed=2)
    covariance = covariance if dtype.is_complex else covariance.real
    stationary = GaussianDenoiser(mean, spectrum, fft, ifft).denoise(noisy, torch.full((2, 1, 1, 1), 0.9).double())
    assert stationary.dtype == dtype
    torch.testing.assert_close(stationary, GaussianDenoiser.from_covariance(mean, covariance).denoise(noisy, 0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_samples_have_the_stated_moments_in_each_real_component(dtype):
    mean = torch.tensor([1.0, 2.0, 3.0]).to(dtype).reshape(1, 1, 3)
    covariance = torch.tensor([[2.0, 0.8, 0.0], [0.8, 1.0, -0.3], [0.0, -0.3, 0.5]]).to(dtype)
    draws = GaussianDenoiser.from_covariance(mean, covariance).sample(generators(0, 20000))
    centred = (draws - mean).flatten(1)
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.06)
    for part in (centred.real, centred.imag) if dtype.is_complex else (centred,):
        torch.testing.assert_close(part.mT @ part / len(part), covariance.real, rtol=0, atol=0.08)
    if dtype.is_complex:  # circular
        torch.testing.assert_close(centred.mT @ centred / len(centred), torch.zeros(3, 3).to(dtype), rtol=0, atol=0.12)


def test_samples_depend_on_their_own_generator_only():
    prior = GaussianDenoiser(torch.zeros(1, 4, 4, dtype=torch.complex64), torch.ones(1, 4, 4), fft, ifft)
    torch.testing.assert_close(prior.sample(generators(7, 5))[3:], prior.sample(generators(7, 2, first=3)))


def test_gaussian_takes_a_level_a_pixel_only_where_pixels_are_the_coefficients():
    mean, variance = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    noisy, levels = torch.ones(2, 1, 4, 4), torch.tensor([0.0, 1.0, 2.0, 3.0])
    lines = GaussianDenoiser(mean, variance).denoise(noisy, levels.reshape(1, 1, 1, 4))
    torch.testing.assert_close(lines[0, 0, 0], 1 / (1 + levels**2))
    for prior in (GaussianDenoiser(mean, variance), GaussianDenoiser(mean, variance, fft, ifft)):
        with pytest.raises(ValueError, match="sigma must be"):
            prior.denoise(noisy, levels)
    with pytest.raises(ValueError, match="sigma must be"):
        GaussianDenoiser(mean, variance, fft, ifft).denoise(noisy, levels.reshape(1, 1, 1, 4))
    assert torch.equal(GaussianDenoiser(mean, 0 * variance).denoise(noisy, 0.0), torch.zeros(2, 1, 4, 4))


def test_gaussian_refuses_what_is_not_a_covariance():
    mean = torch.zeros(1, 1, 3)
    for wrong, message in (
        (torch.eye(4), "must be"),
        (-torch.eye(3), "negative eigenvalue"),
        (torch.eye(3).cfloat(), "complex mean"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianDenoiser.from_covariance(mean, wrong)


def test_all_are_denoisers():
    prior = GaussianDenoiser(torch.zeros(1), torch.ones(1))
    for denoiser in (EpsilonVP(nn.Identity()), Preconditioned(nn.Identity()), prior):
        assert isinstance(denoiser, Denoiser)
