"""GSURE: its loss is the error of the estimate where something was measured, though it never sees a clean image."""

import pytest
import torch
from torch import Generator, nn

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.methods.gsure_training import GSURELoss
from msmri.physics.operators import CoilFourier, Identity
from msmri.tensors import normal_like


class Blur(nn.Module):
    """A linear denoiser that is no multiple of its input: its divergence is not all of what it does."""

    def __init__(self, own=0.6, beside=0.3):
        super().__init__()
        self.own, self.beside = nn.Parameter(torch.tensor(own)), beside
        self.seen = []

    def forward(self, image, sigma):
        self.seen.append((image.detach(), sigma))
        return self.own * image + self.beside * torch.roll(image, 1, -1) + 0.1

    def weight(self, sigma):
        return 1 + 1 / sigma.square()


def images(n, rho, seed=0, dtype=torch.float32, shape=(2, 6, 5)):
    """Give clean images, and what was measured of them: 60 % of the places, NaN elsewhere."""
    rng = Generator().manual_seed(seed)
    clean = torch.randn(n, *shape, generator=rng, dtype=dtype) * 0.8 + 0.3
    mask = torch.rand(n, 1, *shape[1:], generator=rng) < 0.6
    noise = normal_like(clean[None], [Generator().manual_seed(seed + 1)])[0]
    noisy = clean + torch.as_tensor(rho).reshape(-1, 1, 1, 1) * noise
    values = torch.where(mask, noisy, torch.tensor(float("nan"), dtype=noisy.dtype))
    level = torch.as_tensor(rho, dtype=torch.float32).reshape(-1, 1, 1, 1)
    return clean, Measurement(values, mask, encoding=Identity(), noise_std=level)


@pytest.mark.parametrize("rho", [0.0, 0.3, torch.tensor([0.2, 0.6]).repeat(3000)], ids=["clean", "noisy", "two levels"])
def test_the_mean_of_the_loss_is_the_true_error_of_what_was_measured(rho):
    clean, batch = images(6000, rho)
    model, loss = Blur(), GSURELoss(sigma_mean=-0.7, sigma_spread=0.5, sigma_min=0.05, step=0.1)
    with torch.no_grad():
        told, true = [], []
        for first in range(0, 6000, 30):  # the spread of the mean, from 200 batches
            part = slice(first, first + 30)
            level = batch.noise_std if batch.noise_std.numel() == 1 else batch.noise_std[part]
            some = Measurement(batch.values[part], batch.mask[part], encoding=Identity(), noise_std=level)
            model.seen.clear()
            told.append(loss(model, some, Generator().manual_seed(first)))
            state, sigma = model.seen[0]
            error = torch.where(batch.mask[part], model(state, sigma) - clean[part], 0).square().flatten(1).sum(1)
            count = 2 * batch.mask[part].flatten(1).sum(1)
            true.append((model.weight(sigma).flatten() * error / count).mean())
    difference = torch.stack(told) - torch.stack(true)
    spread = difference.std() / len(told) ** 0.5
    assert abs(difference.mean()) < 4 * spread + 1e-6
    assert spread < 0.02 * torch.stack(true).mean()  # far less than a forgotten term would make
    if not isinstance(rho, float) or rho > 0:
        assert spread < 0.1 * float(torch.as_tensor(rho).square().mean())


def test_all_places_have_the_noise_of_the_level_and_none_less_than_the_measurement():
    clean, batch = images(4000, 0.3)
    model = Blur()
    GSURELoss(sigma_mean=-2.0, sigma_spread=0.1)(model, batch, Generator().manual_seed(1))
    state, sigma = model.seen[0]
    assert bool((sigma == 0.3).all()) and len(model.seen) == 2  # all would be below 0.3; twice for the divergence
    inside, outside = (state - clean)[batch.mask.expand_as(clean)], state[~batch.mask.expand_as(clean)]
    assert float(inside.std()) == pytest.approx(0.3, rel=0.02)
    assert float(outside.std()) == pytest.approx(0.3, rel=0.02)
    model.seen.clear()
    GSURELoss(sigma_mean=0.0, sigma_spread=1e-6)(model, batch, Generator().manual_seed(1))
    state, _ = model.seen[0]
    assert float((state - clean)[batch.mask.expand_as(clean)].std()) == pytest.approx(1.0, rel=0.02)
    assert float(state[~batch.mask.expand_as(clean)].std()) == pytest.approx(1.0, rel=0.02)


def test_what_was_not_measured_cannot_be_seen_and_noiseless_images_need_one_pass():
    _, batch = images(8, 0.0)
    model = Blur()
    loss = GSURELoss()(model, batch, Generator().manual_seed(0))
    loss.backward()
    assert bool(loss.isfinite()) and bool(model.own.grad.isfinite()) and model.own.grad != 0
    assert len(model.seen) == 1
    filled = Measurement(batch.values.nan_to_num(7.0), batch.mask, encoding=Identity(), noise_std=batch.noise_std)
    assert GSURELoss()(model, filled, Generator().manual_seed(0)) == loss


def test_on_a_gaussian_prior_the_best_gain_is_that_of_the_posterior_mean():
    _, batch = images(20000, 0.3, seed=5, shape=(1, 4, 4))
    batch.values[batch.mask.expand_as(batch.values)] -= 0.3  # mean 0, variance 0.64
    loss = GSURELoss(sigma_mean=0.0, sigma_spread=1e-6, step=0.1)
    model = Blur(beside=0.0)
    model.forward = lambda image, sigma: model.own * image
    slope, gain = [], (0.2, 0.6)
    for own in gain:  # the loss is a parabola of the gain
        model.own.data.fill_(own)
        model.own.grad = None
        loss(model, batch, Generator().manual_seed(2)).backward()
        slope.append(float(model.own.grad))
    best = gain[0] - slope[0] * (gain[1] - gain[0]) / (slope[1] - slope[0])
    assert best == pytest.approx(0.64 / 1.64, abs=0.01)


def test_complex_images_count_two_components_a_place():
    clean, batch = images(4000, 0.4, dtype=torch.complex64)
    model, loss = Blur(own=0.2), GSURELoss(sigma_mean=0.0, sigma_spread=1e-6, step=0.1)
    with torch.no_grad():
        told = float(loss(model, batch, Generator().manual_seed(0)))
        state, sigma = model.seen[0]
        error = torch.where(batch.mask, model(state, sigma) - clean, 0).abs().square().flatten(1).sum(1)
    true = float((2 * error / (4 * batch.mask.flatten(1).sum(1))).mean())
    assert told == pytest.approx(true, rel=0.01)  # 15 % with half the components


def test_refuses_kspace_and_nonsense():
    _, batch = images(2, 0.0)
    coils = Measurement(batch.values, batch.mask, encoding=CoilFourier(torch.ones(2, 1, 2, 6, 5) + 0j))
    with pytest.raises(InputError, match="place by place"):
        GSURELoss()(Blur(), coils, Generator())
    for wrong in ({"sigma_min": 0.0}, {"step": 0.0}, {"noise_std": -1.0}, {"sigma_spread": -1.0}):
        with pytest.raises(InputError, match="gsure: no such"):
            GSURELoss(**wrong)
