import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import msmri
from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.methods import load_method
from msmri.methods.adps import AALD, ADPS, AOS, DDNM, DPS, DiffPIR
from msmri.methods.adps_training import AmbientLoss, CleanLoss
from msmri.model.ambient import AmbientDenoiser, FurtherLines, FurtherPixels, ImageDenoiser
from msmri.model.checkpoint import save_checkpoint
from msmri.model.denoiser import GaussianDenoiser
from msmri.model.prior import load_prior
from msmri.model.unet import UNet
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.physics.restoration import BlockAverage
from msmri.sampling.guided import guided_euler
from msmri.sampling.schedule import karras
from msmri.tensors import generators, normal_like
from msmri.testing import check_reconstructor, phantom_measurement

NAN = float("nan")
SHIPPED = Path(msmri.__file__).parent / "weights" / "adps_r4.safetensors"


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.complex64):
    return normal_like(torch.zeros(*shape, dtype=dtype), generators(seed, shape[0]))


def coils(n=3, shape=(6, 10), *, batch=1, seed=1, dtype=torch.complex64):
    maps = normal(batch, 1, n, *shape, seed=seed, dtype=dtype)
    return CoilFourier(maps / maps.abs().square().sum(2, keepdim=True).sqrt())


def columns(width, *chosen):
    mask = torch.zeros(1, 1, 1, width, dtype=torch.bool)
    mask[..., list(chosen)] = True
    return mask


def dense(operator, shape, dtype=torch.complex64):
    """The matrix of an operator on images (1, *shape)."""
    n = torch.Size(shape).numel()
    return operator(torch.eye(n, dtype=dtype).reshape(n, 1, *shape)).flatten(1).mT


# --- the ambient loss ----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """h = W u, with a weight of 1 at every level."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, aliased, mask, sigma, encoding):
        return (aliased.flatten(1) @ self.matrix.mT).reshape(aliased.shape)

    def weight(self, sigma):
        return torch.ones_like(sigma)


class Recorder(nn.Module):
    def __init__(self, answer=None, weight=1.0):
        super().__init__()
        self.answer, self.level = answer, weight

    def forward(self, aliased, mask, sigma, encoding):
        self.aliased, self.mask, self.sigma = aliased, mask, sigma
        return torch.zeros_like(aliased) if self.answer is None else self.answer

    def weight(self, sigma):
        return self.level * torch.ones_like(sigma)


@dataclass(frozen=True)
class Always:
    mask: torch.Tensor

    def __call__(self, mask, rng):
        assert not bool((self.mask[0] & ~mask).any())
        return self.mask[0]


def gaussian_problem(n=6000, width=8, level=0.5, extra=1):
    """Slices of a correlated Gaussian prior, all sharing P~, each with some other lines in P; the exact answer."""
    double = torch.complex128
    encoding = coils(2, (1, width), dtype=double, seed=4)
    root = 0.4 * normal(width, width, seed=5, dtype=double) + torch.eye(width)
    covariance = root @ root.mH  # of each real component
    image = (normal(n, width, seed=6, dtype=double) @ root.mT).reshape(n, 1, 1, width)
    shown = columns(width, 3, 4, 6)
    mask = shown.repeat(n, 1, 1, 1)
    others = (~shown).flatten().nonzero().flatten()
    for _ in range(extra):
        chosen = others[torch.randint(0, len(others), (n,), generator=stream(7))]
        mask[torch.arange(n), 0, 0, chosen] = True
    wide = CoilFourier(encoding.maps.expand(n, -1, -1, -1, -1))
    batch = Measurement(Subsample(mask)(wide(image)), mask, wide)
    matrix = dense((Subsample(shown) @ encoding).normal, (1, width), double)
    noisy = matrix @ (covariance + level**2 * torch.eye(width)) @ matrix.mH
    best = covariance @ matrix.mH @ torch.linalg.pinv(noisy, hermitian=True, rtol=1e-9)  # E[x | u] = best u
    return batch, shown, matrix, best, level


@pytest.mark.parametrize("error", ["normal", "kspace"])
def test_the_best_estimate_is_the_posterior_mean_given_what_is_shown(error):
    batch, shown, matrix, best, level = gaussian_problem()
    loss = AmbientLoss(Always(shown), error=error, sigma_mean=math.log(level), sigma_spread=0.0)

    def slope(answer):
        model = Linear(answer.clone())
        loss(model, batch, stream(8)).backward()
        return float((model.matrix.grad @ matrix.conj()).norm())

    reference = slope(torch.zeros_like(best))
    assert slope(best) < 0.015 * reference
    assert slope(1.05 * best) > 0.04 * reference
    # wrong: noise kept; nothing beyond what is shown estimated
    inverse = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-9)
    assert slope(inverse) > 0.1 * reference
    assert slope(inverse @ matrix @ best) > 0.05 * reference


def small_batch(n=3, shape=(12, 40), *, scale=1.0):
    encoding = coils(3, shape, batch=n)
    image = scale * normal(n, 1, *shape, seed=2)
    mask = (torch.rand(n, 1, 1, shape[1], generator=stream(3)) < 0.5) | columns(shape[1], 19, 20, 21)
    source = tuple(f"scan#{i}" for i in range(n))
    return Measurement(Subsample(mask)(encoding(image)), mask, encoding, source=source), image


def test_what_the_network_is_shown():
    batch, image = small_batch()
    model = Recorder()
    loss = AmbientLoss(FurtherLines(2.0), sigma_spread=0.0, sigma_mean=-30.0, sigma_min=1e-20)
    loss(model, batch, stream())
    assert not bool((model.mask & ~batch.mask).any())
    assert (batch.mask.sum((1, 2, 3)) - model.mask.sum((1, 2, 3))).tolist() == [20 - 13] * 3
    clean = (Subsample(model.mask) @ batch.encoding).normal(image)
    torch.testing.assert_close(model.aliased, clean)
    # the noise passes through A~^H A~: nothing of it is outside the span
    AmbientLoss(FurtherLines(2.0), sigma_spread=0.0, sigma_mean=3.0)(model, batch, stream())
    shown = Subsample(model.mask) @ batch.encoding
    noise = model.aliased - shown.normal(image)
    matrix = dense(CoilFourier(batch.encoding.maps[:1]), (12, 40))
    seen = Subsample(model.mask[:1])
    gram = matrix.mH @ seen(matrix.mT.reshape(-1, 3, 12, 40)).flatten(1).mT
    inner = torch.linalg.lstsq(gram, noise[0].flatten()[:, None], driver="gelsd").solution
    torch.testing.assert_close(gram @ inner, noise[0].flatten()[:, None], rtol=1e-3, atol=5e-3)
    power = torch.linalg.matrix_norm(gram).square() * 2 * 20.0855**2
    assert float(noise[0].abs().square().sum() / power) == pytest.approx(1, rel=0.15)


def test_the_loss_written_out():
    batch, image = small_batch()
    answer = normal(*image.shape, seed=9)
    share = batch.mask.float().mean((1, 2, 3))
    rest = batch.operator(answer - image)
    for error, each in (("normal", batch.operator.adjoint(rest)), ("kspace", rest)):
        expected = (3.0 * each.abs().square().sum((1, 2, 3)) / (2 * 480) / share).mean()
        got = AmbientLoss(FurtherLines(2.0), error=error)(Recorder(answer, 3.0), batch, stream())
        torch.testing.assert_close(got, expected)
    assert float(AmbientLoss()(Recorder(image), batch, stream())) < 1e-10


@pytest.mark.parametrize("error", ["normal", "kspace"])
@pytest.mark.parametrize("iterations", [0, 3])
def test_the_relative_loss_is_that_of_doing_nothing(error, iterations):
    loss = AmbientLoss(FurtherLines(2.0), error=error, weighting="relative")
    model = AmbientDenoiser(network(), 0.3, iterations=iterations)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.zero_()
    batch, image = small_batch()
    assert loss(model, batch, stream()).item() == pytest.approx(1, rel=1e-5)
    # each slice counts by itself, however bright it is: errors twice and half as large give (4 + 1 / 4 + 1) / 3
    times = torch.tensor([2.0, 0.5, 1.0]).reshape(-1, 1, 1, 1)

    class Wrong(nn.Module):
        def idle(self, aliased, mask, sigma, encoding):
            return torch.zeros_like(aliased)

        def forward(self, aliased, mask, sigma, encoding):
            return image * (1 + times)

    assert float(loss(Wrong(), batch, stream())) == pytest.approx((4 + 0.25 + 1) / 3, rel=1e-4)


def test_levels():
    shape = (1, 8)
    n = 5000
    mask = columns(8, *range(8)).expand(n, -1, -1, -1)
    batch = Measurement(torch.zeros(n, 1, *shape, dtype=torch.complex64), mask, Identity())
    model = Recorder()
    AmbientLoss()(model, batch, stream())
    log = model.sigma.flatten().log()
    assert float(log.mean()) == pytest.approx(-1.2, abs=0.06) and float(log.std()) == pytest.approx(1.2, rel=0.04)
    assert float(log.min().exp()) == pytest.approx(0.01, rel=1e-4)
    noise = (model.aliased / model.sigma)[model.mask.expand_as(model.aliased)]
    assert float(noise.abs().square().mean()) == pytest.approx(2, rel=0.03)


def test_masks_redrawn_or_fixed():
    batch, _ = small_batch()
    fixed, redrawn = AmbientLoss(FurtherLines(2.0), redraw=False), AmbientLoss(FurtherLines(2.0))
    first, again = (fixed.further_masks(batch, generators(seed, 3)) for seed in (0, 1))
    assert torch.equal(first, again)
    other = fixed.further_masks(replace(batch, source=("a", "b", "c")), generators(0, 3))
    assert not torch.equal(first, other)
    one = replace(batch, values=batch.values[1:2], mask=batch.mask[1:2], source=batch.source[1:2])
    assert torch.equal(fixed.further_masks(one, generators(5, 1)), first[1:2])
    assert not torch.equal(
        redrawn.further_masks(batch, generators(0, 3)), redrawn.further_masks(batch, generators(1, 3))
    )
    with pytest.raises(InputError, match="names"):
        fixed(Recorder(), replace(batch, source=()), stream())


def network(in_channels=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = UNet(in_channels, 2, (8, 16), blocks_per_level=1, conditions=1)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.03 * torch.randn(parameter.shape))
    return made


@pytest.mark.parametrize("redraw", [True, False])
@pytest.mark.parametrize(("weighting", "iterations"), [("edm", 0), ("relative", 0), ("relative", 3)])
def test_unmeasured_kspace_and_target_never_enter(redraw, weighting, iterations):
    batch = phantom_measurement((24, 20), coils=3)
    batch = batch.scaled(batch.centre_scale())
    model = AmbientDenoiser(network(), 0.3, iterations=iterations)
    loss = AmbientLoss(FurtherLines(3.0), redraw=redraw, weighting=weighting)

    def gradient(given, seed=0):
        model.zero_grad(set_to_none=True)
        value = loss(model, given, stream(seed))
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in model.parameters())]

    before, clean = torch.get_rng_state(), gradient(batch)
    assert all(bool(each.isfinite().all()) for each in clean) and any(bool(each.any()) for each in clean[1:])
    for poison in (NAN, 1e6):
        values = torch.where(batch.mask, batch.values, torch.full_like(batch.values, poison))
        poisoned = gradient(replace(batch, values=values, target=torch.full_like(batch.target, poison)))
        assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(gradient(batch, seed=1)[0], clean[0])
    assert not torch.equal(gradient(replace(batch, values=1.1 * batch.values))[0], clean[0])


def test_the_lines_asked_for_are_not_shown():
    batch, _ = small_batch()
    model, loss = Recorder(), AmbientLoss(FurtherLines(2.0))
    loss(model, batch, stream())
    hidden = batch.mask & ~model.mask
    other = replace(batch, values=torch.where(hidden, batch.values + 5, batch.values))
    again = Recorder()
    assert not torch.equal(loss(again, other, stream()), loss(Recorder(), batch, stream()))
    assert torch.equal(again.aliased, model.aliased) and torch.equal(again.sigma, model.sigma)


def test_photographs_by_random_inpainting():
    image = normal(4, 3, 10, 12, dtype=torch.float32)
    mask = torch.rand(4, 1, 10, 12, generator=stream()) < 0.4
    batch = Measurement(Subsample(mask)(image), mask, Identity())
    model = Recorder(answer := normal(4, 3, 10, 12, seed=4, dtype=torch.float32))
    got = AmbientLoss(FurtherPixels(0.2), sigma_mean=-30.0, sigma_spread=0.0, sigma_min=1e-12)(model, batch, stream())
    expected = ((answer - image).square() * mask).sum((1, 2, 3)) / 360 / mask.float().mean((1, 2, 3))
    torch.testing.assert_close(got, expected.mean())
    torch.testing.assert_close(model.aliased, image * model.mask)
    assert 0 < int(model.mask.sum()) < int(mask.sum()) and not bool((model.mask & ~mask).any())


def test_clean_loss():
    encoding = coils(3, (12, 16), batch=64)
    image = normal(64, 1, 12, 16, seed=2)
    full = torch.ones(64, 1, 1, 16, dtype=torch.bool)
    batch = Measurement(encoding(image), full, encoding)

    class Keep(nn.Module):
        def forward(self, noisy, sigma):
            self.noise = (noisy - image) / sigma
            return noisy

        def weight(self, sigma):
            return sigma**-2

    model = Keep()
    assert float(CleanLoss()(model, batch, stream())) == pytest.approx(1, rel=0.02)
    assert float(model.noise.real.std()) == pytest.approx(1, rel=0.02)
    margins = full.clone()
    margins[..., :2] = margins[..., -3:] = False
    CleanLoss()(model, replace(batch, mask=margins), stream())
    margins[..., 8] = False
    with pytest.raises(InputError, match="fully sampled"):
        CleanLoss()(model, replace(batch, mask=margins), stream())


# --- the samplers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["estimate", "state"])
def test_a_guided_step_written_out_in_matrices(at):
    encoding, mask = coils(), columns(10, 1, 4, 5, 8)
    operator = Subsample(mask) @ encoding
    a, d = dense(operator, (6, 10)), 0.1 * normal(60, 60, seed=2)
    values = Subsample(mask)(normal(1, 3, 6, 10, seed=3))
    start = normal(2, 1, 6, 10, seed=4)

    def denoise(noisy, sigma):
        return (noisy.flatten(1) @ d.mT).reshape(noisy.shape) / sigma

    first, last = guided_euler(denoise, values, operator, start, torch.tensor([2.0, 0.5]), step=0.7, at=at)
    for i in range(2):
        x, y = start[i].flatten(), values.flatten()
        for sigma, following, reached in ((2.0, 0.5, first), (0.5, 0.0, last)):
            clean = d @ x / sigma
            rest = y - a @ (clean if at == "estimate" else x)
            slope = -2 * (a @ d / sigma if at == "estimate" else a).mH @ rest  # of its square
            x = x + (following - sigma) * (x - clean) / sigma - 0.7 * slope / rest.norm()
            torch.testing.assert_close(reached.state[i].flatten(), x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(reached.estimate[i].flatten(), clean, rtol=1e-4, atol=1e-4)
            assert float(reached.sigma) == following


SHAPE = (12, 16)


def spectrum(shape=SHAPE):
    radius = torch.hypot(*torch.meshgrid(*[(torch.arange(n) - n // 2) / n for n in shape], indexing="ij"))
    return 1.0 / (1 + (8 * radius) ** 2) ** 1.5


def problem(*, noise=0.02, seed=3, batch=1):
    """Scans of images with a stationary Gaussian prior; prior in scaled units and posterior mean in the file's."""
    prior = GaussianDenoiser(torch.zeros(1, *SHAPE, dtype=torch.complex64), spectrum(), fft2c, ifft2c)
    encoding = coils(3, SHAPE)
    image = prior.sample(generators(seed, batch))
    mask = columns(16, 1, 4, 6, 7, 8, 9, 13)
    full = encoding(image)
    measured = Subsample(mask)(full + noise * normal(*full.shape, seed=seed + 1))
    measurement = Measurement(measured, mask.expand(batch, -1, -1, -1), encoding, noise)
    a, n = dense(Subsample(mask) @ encoding, SHAPE), image[0].numel()
    c = dense(lambda x: ifft2c(spectrum() * fft2c(x)), SHAPE)
    gain = c @ a.mH @ torch.linalg.pinv(a @ c @ a.mH + noise**2 * torch.eye(len(a)), hermitian=True, rtol=1e-6)
    mean = (measured.flatten(1) @ gain.mT).reshape(batch, *SHAPE)
    assert n == 192
    return measurement, image[:, 0], mean


@dataclass(frozen=True)
class Scaled:
    """The exact denoiser in the units a method works in."""

    scale: float

    def denoise(self, noisy, sigma):
        gain = spectrum() / self.scale**2
        return ifft2c(gain / (gain + float(sigma) ** 2) * fft2c(noisy))


@dataclass(frozen=True)
class ExactAmbient:
    """E[x | A~^H A~ (x + sigma n)] by dense matrices, one mask a sample."""

    encoding: CoilFourier
    scale: float

    def __call__(self, aliased, mask, sigma, encoding):
        c = dense(lambda x: ifft2c(spectrum() * fft2c(x)), SHAPE) / self.scale**2
        out = []
        for u, shown in zip(aliased, mask, strict=True):
            n = dense((Subsample(shown[None]) @ self.encoding).normal, SHAPE)
            inner = n @ (c + sigma**2 * torch.eye(len(c))) @ n.mH
            gain = c @ n.mH @ torch.linalg.pinv(inner, hermitian=True, rtol=1e-5)
            out.append((gain @ u.flatten()).reshape(u.shape))
        return torch.stack(out)


def error(image, reference):
    return float((image - reference).norm() / reference.norm())


def test_dps_comes_near_the_posterior_mean():
    measurement, _, mean = problem()
    prior = Scaled(float(measurement.centre_scale()))
    method = DPS(prior, samples=24, batch=24, steps=60, likelihood_step=3.0)
    result = method(measurement, generators(0, 1))
    zero_filled = measurement.operator.adjoint(measurement.values)[:, 0]
    assert result.samples.shape == (1, 24, *SHAPE) and result.details["NFE"] == 60
    got = error(result.image, mean)
    assert got < 0.12 < 0.5 < error(zero_filled, mean)
    for wrong in (0.3, 60.0):
        assert error(replace(method, likelihood_step=wrong)(measurement, generators(0, 1)).image, mean) > 2 * got


def test_a_dps_with_nothing_hidden_is_dps():
    measurement, _, _ = problem()
    prior = Scaled(float(measurement.centre_scale()))
    everything = torch.ones(1, 1, 1, 16, dtype=torch.bool)
    options = {"steps": 12, "samples": 2, "likelihood_step": 0.4}
    ambient = ADPS(
        lambda u, mask, sigma, encoding: prior.denoise(u, sigma), acceleration=1.0, further=Always(everything)
    )
    got = replace(ambient, **options)(measurement, generators(0, 1)).samples
    # the mask is drawn from the same streams, before the noise
    expected = []
    for seed in torch.randint(0, 2**62, (2,), generator=generators(0, 1)[0]).tolist():
        generator = stream(seed)
        torch.rand((1, 1, 16), generator=generator, dtype=torch.float64)
        start = 10 * normal_like(torch.zeros(1, 1, *SHAPE, dtype=torch.complex64), [generator])
        scale = measurement.centre_scale()
        *_, last = guided_euler(
            prior.denoise, measurement.values / scale, measurement.operator, start, karras(10, 0.004, 12), step=0.4
        )
        expected.append(last.state[:, 0] * scale[0])
    torch.testing.assert_close(got[0], torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_a_dps_and_a_ald_with_the_exact_ambient_prior():
    measurement, _, mean = problem()
    scale = float(measurement.centre_scale())
    prior = ExactAmbient(measurement.encoding, scale)
    further = FurtherLines(3.0, centre_fraction=0.25)
    method = ADPS(prior, samples=4, steps=25, likelihood_step=3.0, acceleration=2.0, further=further)
    zero_filled = error(measurement.operator.adjoint(measurement.values)[:, 0], mean)
    assert error(method(measurement, generators(0, 1)).image, mean) < 0.3 * zero_filled
    ald = AALD(prior, samples=4, steps=25, likelihood_step=3.0, acceleration=2.0, further=further)
    assert error(ald(measurement, generators(0, 1)).image, mean) < 0.3 * zero_filled


def test_what_the_ambient_prior_is_asked():
    measurement, _, _ = problem(batch=2)
    calls = []

    def prior(aliased, mask, sigma, encoding):
        calls.append((aliased.detach(), mask, sigma))
        return 0.9 * aliased

    method = ADPS(prior, samples=3, batch=3, steps=4, acceleration=3.0)
    steps = list(method.iterate(measurement, generators(0, 2)))
    assert [call[2] for call in calls] == karras(10.0, 0.004, 4).tolist() * 2 and len(steps) == 8
    for which in (0, 1):
        masks = [call[1] for call in calls[4 * which : 4 * which + 4]]
        assert masks[0].shape == (3, 1, 1, 16) and all(torch.equal(masks[0], mask) for mask in masks)
        assert not torch.equal(masks[0][0], masks[0][1])  # one a sample
        for i in (1, 2, 3):
            state = steps[4 * which + i - 1].state
            expected = (Subsample(masks[0]) @ measurement.encoding).normal(state)
            torch.testing.assert_close(calls[4 * which + i][0], expected)
    law = replace(method, acceleration=2.0)
    drawn = law.prior_masks((12, 320), generators(0, 200))
    outer = drawn.clone()
    outer[..., 160 - 12 : 160 + 13] = False
    assert bool(drawn[..., 148:173].all())
    assert float(outer.sum((1, 2, 3)).float().mean()) == pytest.approx(295 / 2 - 54, abs=2)


def test_prior_masks_may_be_parts_of_the_scans_own():
    measurement, _, _ = problem(batch=2)
    calls = []

    def prior(aliased, mask, sigma, encoding):
        calls.append(mask)
        return 0.9 * aliased

    further = FurtherLines(1.5, centre_fraction=0.0)
    method = ADPS(prior, samples=3, batch=3, steps=2, further=further, prior_mask="scan")
    list(method.iterate(measurement, generators(0, 2)))
    assert len(calls) == 4 and torch.equal(calls[0], calls[1])
    masks = measurement.mask.expand(2, -1, -1, -1)
    for which in (0, 1):
        drawn = calls[2 * which]
        gone = masks[which] & ~drawn
        assert drawn.shape == (3, 1, 1, 16) and not bool((drawn & ~masks[which]).any())
        assert gone.sum((1, 2, 3)).tolist() == [further.count(16)] * 3 and not torch.equal(drawn[0], drawn[1])
    coarse = Measurement(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool), BlockAverage(2), 0.1)
    with pytest.raises(InputError, match="part of a full measurement"):
        method(replace(coarse, full_scale=1.0), generators(0, 1))
    with pytest.raises(InputError, match="prior_mask"):
        ADPS(prior, prior_mask="own")


def told(tmp_path, loss, data=None):
    """A prior of A-DPS as a file of it tells what it was trained on."""
    network = {"use": "msmri.model.unet:UNet", "in_channels": 4, "channels": [8, 8], "blocks_per_level": 1}
    node = {"use": "msmri.model.ambient:AmbientDenoiser", "network": network | {"conditions": 1}}
    recipe = {"data": {"use": "msmri.io.dataset:TrainingScans", "path": "none"} | (data or {}), "model": node}
    recipe["loss"] = {"use": "msmri.methods.adps_training:AmbientLoss"} | loss
    model = AmbientDenoiser(UNet(in_channels=4, channels=(8, 8), blocks_per_level=1, conditions=1))
    path = tmp_path / "prior.safetensors"
    save_checkpoint(path, model.state_dict(), {"format": "msmri-partial", "recipe": recipe})
    return load_prior(path)


FURTHER = {"use": "msmri.model.ambient:FurtherLines", "acceleration": 1.6}


@pytest.mark.parametrize(
    ("loss", "highest"),
    [
        ({"sigma_mean": -3.0, "sigma_spread": 1.7}, math.exp(-3 + 1.75 * 1.7)),
        ({"sigma_mean": -9.0, "sigma_spread": 0.1}, 0.008),  # never below the lowest
        ({"sigma_mean": -3.0}, 10.0),  # half of it tells nothing
        ({}, 10.0),
    ],
)
def test_the_weights_tell_where_sampling_begins(tmp_path, loss, highest):
    prior, levels = told(tmp_path, loss), []
    measurement, _, _ = problem()

    class Noted:
        def __call__(self, aliased, mask, sigma, encoding):
            levels.append(sigma)
            return 0.9 * aliased

    Noted.levels = getattr(prior, "levels", None)
    list(ADPS(Noted(), steps=3).iterate(measurement, generators(0, 1)))
    assert levels == pytest.approx(karras(highest, 0.004, 3).tolist())
    levels.clear()
    list(ADPS(Noted(), steps=3, sigma_max=2.0).iterate(measurement, generators(0, 1)))  # unless one is given
    assert levels == pytest.approx(karras(2.0, 0.004, 3).tolist())


@pytest.mark.parametrize("varied", [True, False])
def test_the_weights_tell_which_lines_the_prior_is_shown(tmp_path, varied):
    further = {**FURTHER, "varied": True} if varied else FURTHER
    prior, masks = told(tmp_path, {"further": further}), []
    measurement, _, _ = problem()

    class Noted:
        def __call__(self, aliased, mask, sigma, encoding):
            masks.append(mask)
            return 0.9 * aliased

    Noted.varied = prior.varied
    own = measurement.mask.expand(64, -1, -1, -1)
    list(ADPS(Noted(), samples=64, batch=64, steps=1).iterate(measurement, generators(0, 1)))
    gone = (own & ~masks[0]).sum((1, 2, 3))
    inside = not bool((masks[0] & ~own).any())
    assert inside == varied
    if varied:
        assert gone.tolist() == [FurtherLines(12.0).count(16)] * 64
    masks.clear()
    published = ADPS(Noted(), samples=64, batch=64, steps=1, prior_mask="law")
    list(published.iterate(measurement, generators(0, 1)))
    assert bool((masks[0] & ~own).any())


def test_the_shipped_prior_of_a_dps_tells_both():
    prior = load_prior(SHIPPED)
    assert prior.varied and prior.levels == (-3.0, 1.7)


def test_a_ald_never_goes_back_through_the_network():
    measurement, _, _ = problem()

    def prior(aliased, mask, sigma, encoding):
        assert not torch.is_grad_enabled() and not aliased.requires_grad
        return 0.5 * aliased

    assert bool(torch.isfinite(AALD(prior, steps=3)(measurement, generators(0, 1)).image.abs()).all())


def test_a_os_is_one_call():
    measurement, _, _ = problem(batch=2)
    calls = []

    def prior(aliased, mask, sigma, encoding):
        calls.append((aliased, mask, sigma))
        return 2 * aliased

    result = AOS(prior)(measurement, generators(0, 2))
    torch.testing.assert_close(result.image, 2 * measurement.operator.adjoint(measurement.values)[:, 0])
    assert [call[2] for call in calls] == [0.003] * 2 and torch.equal(calls[0][1], measurement.mask[:1])
    torch.testing.assert_close(
        calls[0][0] * measurement.centre_scale()[:1], measurement.operator.adjoint(measurement.values)[:1]
    )
    assert result.details["NFE"] == 1


@pytest.mark.parametrize("method", [DDNM(steps=20, iterations=60), DiffPIR(steps=20, iterations=60)])
def test_noiseless_data_are_reproduced_and_the_rest_is_the_priors(method):
    measurement, _, mean = problem(noise=1e-6)
    prior = Scaled(float(measurement.centre_scale()))
    method = replace(method, weights=prior, samples=8, batch=8)
    result = method(measurement, generators(0, 1))
    for sample in result.samples[0]:
        assert error(measurement.operator(sample[None, None]), measurement.values) < 0.02
    zero_filled = error(measurement.operator.adjoint(measurement.values)[:, 0], mean)
    assert error(result.image, mean) < 0.5 * zero_filled
    assert float(result.std.mean()) > 0  # what was not measured differs between samples


def test_diffpir_weighs_data_by_their_noise():
    prior = None
    distances = []
    for noise in (0.02, 0.5):
        measurement, _, mean = problem(noise=noise)
        prior = Scaled(float(measurement.centre_scale()))
        method = DiffPIR(prior, samples=8, batch=8, steps=25, iterations=40, regularisation=1.0, zeta=1.0)
        distances.append(error(method(measurement, generators(0, 1)).image, mean))
    assert distances[0] < 0.3 and distances[1] < 0.6
    ignored = replace(method, regularisation=1e-4)(measurement, generators(0, 1)).image
    assert error(ignored, mean) > 1.3 * distances[1]  # trusting noise does harm


ALL = [ADPS(steps=6), AALD(steps=6), AOS(), DPS(steps=6), DDNM(steps=6), DiffPIR(steps=6)]


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_contract(method):
    ambient = isinstance(method, ADPS | AOS)
    weights = AmbientDenoiser(network(), 0.3) if ambient else ImageDenoiser(network(2), 0.3)
    method = replace(method, weights=weights.requires_grad_(False))
    check_reconstructor(method, measurement=phantom_measurement((24, 26), coils=3, slices=2), margin=-30.0)
    given = phantom_measurement((24, 26), coils=3, slices=2)
    together = method(given, generators(5, 2)).samples
    alone = replace(
        given,
        values=given.values[1:],
        mask=given.mask[1:],
        encoding=CoilFourier(given.encoding.maps[1:]),
        source=given.source[1:],
        target=given.target[1:],
    )
    torch.testing.assert_close(method(alone, generators(5, 1, first=1)).samples[0], together[1], rtol=1e-3, atol=1e-3)
    assert method.name in load_method(method.name).name and "@" in method.reference


def test_samples_do_not_depend_on_how_many_are_drawn_at_once():
    measurement, _, _ = problem(batch=2)
    prior = Scaled(float(measurement.centre_scale()[0]))
    one, many = (DDNM(prior, samples=3, batch=b, steps=5)(measurement, generators(0, 2)).samples for b in (1, 3))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)
    assert one.shape[:2] == (2, 3) and not torch.allclose(one[:, 0], one[:, 1])


def checkpoint(path, model, node):
    header = {"format": "msmri-partial", "recipe": {"model": node}}
    save_checkpoint(path, {name: value.float() for name, value in model.state_dict().items()}, header)
    return path


def test_weights_from_files(tmp_path):
    unet = {"use": "msmri.model.unet:UNet", "channels": [8, 16], "blocks_per_level": 1, "conditions": 1}
    ambient = {"use": "msmri.model.ambient:AmbientDenoiser", "sigma_data": 0.3, "network": unet | {"in_channels": 4}}
    clean = {"use": "msmri.model.ambient:ImageDenoiser", "sigma_data": 0.3, "network": unet | {"in_channels": 2}}
    first = AmbientDenoiser(network(), 0.3)
    files = (
        checkpoint(tmp_path / "a.safetensors", first, ambient),
        checkpoint(tmp_path / "o.safetensors", ImageDenoiser(network(2), 0.3), clean),
    )
    given = phantom_measurement((24, 26), coils=3, slices=1)
    loaded = ADPS(files[0], steps=3)(given, generators(0, 1)).samples
    expected = ADPS(first.requires_grad_(False), steps=3)(given, generators(0, 1)).samples
    torch.testing.assert_close(loaded, expected)
    assert DPS(str(files[1]), steps=3)(given, generators(0, 1)).samples.shape == (1, 1, 24, 26)
    for method, file in ((AOS, files[1]), (DDNM, files[0])):
        with pytest.raises(InputError, match="not weights for"):
            method(file)(given, generators(0, 1))


@pytest.mark.parametrize("kind", [ADPS, DDNM])
def test_missing_weights_say_how_to_get_some(kind, monkeypatch):
    monkeypatch.setattr(kind, "shipped", "nothing.safetensors")
    with pytest.raises(InputError, match="recipes/"):
        kind()(problem()[0], generators(0, 1))


def test_refused_measurements():
    measurement, _, _ = problem(batch=2)
    prior = Scaled(1.0)
    with pytest.raises(InputError, match="coil maps"):
        DPS(prior)(replace(measurement, encoding=None), generators(0, 2))
    with pytest.raises(InputError, match="NaN"):
        DPS(prior)(replace(measurement, values=measurement.values * NAN), generators(0, 2))

    class Unknown(Identity):  # an operator that nobody can take a slice of
        shared = False

    with pytest.raises(InputError, match="one slice"):
        DPS(prior)(replace(measurement, encoding=Unknown()), generators(0, 2))
    with pytest.raises(ValueError, match="generators"):
        DPS(prior)(measurement, generators(0, 1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a-dps", {"steps": 0}),
        ("a-dps", {"likelihood_step": 0.0}),
        ("dps", {"sigma_min": 10.0}),
        ("dps", {"sigma_max": float("inf")}),
        ("a-os", {"sigma": 0.0}),
        ("ddnm", {"eta": 1.5}),
        ("diffpir", {"zeta": -0.1}),
        ("diffpir", {"regularisation": -1.0}),
        ("a-ald", {"samples": 0}),
    ],
)
def test_refused_options(name, options):
    with pytest.raises(InputError):
        load_method(name, **options)
