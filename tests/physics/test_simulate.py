import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.simulate import (
    change_contrast,
    coil_maps,
    crop_kspace,
    loop_field,
    phantom,
    simulate_kspace,
    smooth_field,
    uniform,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_uniform_fills_its_interval():
    generator = rng()
    draws = [uniform(-2, 3, generator) for _ in range(2000)]
    assert -2 <= min(draws) < -1.95
    assert 2.95 < max(draws) < 3
    assert np.mean(draws) == pytest.approx(0.5, abs=0.15)


def test_the_field_on_the_axis_of_a_loop_is_the_textbooks():
    height = torch.tensor([0.0, 0.3, 1.0, 2.0], dtype=torch.float64)
    points = torch.stack([torch.zeros(4), torch.zeros(4), height], -1).double()
    field = loop_field(
        points, torch.zeros(3).double(), torch.tensor([0.0, 0.0, 2.0]).double(), radius=0.5, segments=200
    )
    # integral of dl x r / |r|^3 over the loop, with segments of unit length: n a / (a^2 + z^2)^(3/2)
    expected = 200 * 0.5 / (0.25 + height**2) ** 1.5
    assert torch.allclose(field[:, 2], expected, rtol=5e-3)  # a right-handed current, so along the axis
    assert torch.allclose(field[:, :2], torch.zeros(4, 2, dtype=torch.float64), atol=1e-9)


def test_the_field_turns_and_moves_with_its_loop():
    points = torch.tensor([[0.2, -0.1, 0.7], [1.0, 0.4, 0.3]]).double()
    axis, centre = torch.tensor([0.0, 0.0, 1.0]).double(), torch.tensor([0.1, 0.2, -0.5]).double()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=rng(), dtype=torch.float64))[0]
    turn = turn * torch.linalg.det(turn).sign()
    field = loop_field(points, centre, axis, radius=0.4, segments=400)
    turned = loop_field(points @ turn.mT, turn @ centre, turn @ axis, radius=0.4, segments=400)
    assert torch.allclose(turned, field @ turn.mT, rtol=1e-6, atol=1e-6)
    mirrored = loop_field(points, centre, -axis, radius=0.4, segments=400)
    assert torch.allclose(mirrored, -field, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(48, 40), (33, 51)])
@pytest.mark.parametrize("coils", [1, 4, 12])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_maps_have_unit_power_and_are_smooth(shape, coils, seed):
    maps = coil_maps(shape, coils, rng(seed))
    assert maps.shape == (1, 1, coils, *shape)
    assert maps.dtype == torch.complex64
    assert torch.allclose(maps.abs().square().sum(2), torch.ones(1, 1, *shape), atol=1e-5)
    steps = torch.cat([maps.diff(dim=-1).abs().flatten(), maps.diff(dim=-2).abs().flatten()])
    assert steps.square().mean().sqrt() < 0.15
    if coils > 1:
        centre = fft2c(maps).abs().square()
        y, x = shape[0] // 2, shape[1] // 2
        assert centre[..., y - 8 : y + 9, x - 8 : x + 9].sum() > 0.9 * centre.sum()


def test_coils_see_the_image_differently():
    maps = coil_maps((32, 32), 8, rng(3))[0, 0].flatten(1)
    correlation = (maps @ maps.mH).abs() / maps.norm(dim=1)[:, None] / maps.norm(dim=1)
    off = correlation[~torch.eye(8, dtype=torch.bool)]
    assert off.max() < 0.995
    assert off.mean() < 0.8


def test_draws_are_seeded_and_differ():
    assert torch.equal(coil_maps((20, 20), 4, rng(1)), coil_maps((20, 20), 4, rng(1)))
    assert not torch.allclose(coil_maps((20, 20), 4, rng(1)), coil_maps((20, 20), 4, rng(2)), atol=0.1)
    before = torch.get_rng_state()
    image, maps = phantom((24, 20), rng()), coil_maps((24, 20), 3, rng())
    one, two = (simulate_kspace(image[None], maps, rng(4), noise_std=0.1)[0] for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_smooth_fields_are_normalised_and_smooth():
    field = smooth_field((64, 48), rng())
    assert field.shape == (64, 48)
    assert field.mean().item() == pytest.approx(0, abs=1e-5)
    assert field.std().item() == pytest.approx(1, abs=1e-4)
    assert field.diff(dim=0).abs().max() < 0.35
    assert field.diff(dim=1).abs().max() < 0.45


@pytest.mark.parametrize("seed", range(8))
def test_contrast_keeps_air_dark_and_grey_values_in_range(seed):
    image = torch.linspace(0, 1, 500).reshape(20, 25)
    changed = change_contrast(image, rng(seed))
    assert changed[0, 0] == 0
    assert changed.min() >= 0
    assert changed.max().item() == pytest.approx(1, abs=0.01)
    assert changed.flatten().diff().abs().max() < 0.05
    assert torch.equal(change_contrast(image.flip(0), rng(seed)), changed.flip(0))


@pytest.mark.parametrize(("old", "new"), [((32, 32), (16, 20)), ((31, 24), (15, 13)), ((12, 9), (12, 9))])
def test_cropping_kspace_keeps_the_mean_and_the_low_frequencies(old, new):
    image = torch.complex(*torch.randn(2, 3, *old, generator=rng(), dtype=torch.float64))
    small = crop_kspace(image, new)
    assert small.shape == (3, *new)
    assert torch.allclose(small.mean((-2, -1)), image.mean((-2, -1)))
    top, left = old[0] // 2 - new[0] // 2, old[1] // 2 - new[1] // 2
    factor = math.sqrt(new[0] * new[1] / (old[0] * old[1]))
    expected = fft2c(image)[:, top : top + new[0], left : left + new[1]] * factor
    assert torch.allclose(fft2c(small), expected)


def test_cropping_a_smooth_image_resamples_it():
    image = ndimage.gaussian_filter(np.pad(np.ones((20, 24)), ((22, 22), (20, 20))), 5)
    small = crop_kspace(torch.from_numpy(image).to(torch.complex128), (32, 32)).real.numpy()
    np.testing.assert_allclose(small, image[::2, ::2], atol=1e-3)


@pytest.mark.parametrize("shape", [(10, 8), (8, 10), (9, 8)])
def test_cropping_to_a_larger_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="cannot crop"):
        crop_kspace(torch.ones(8, 8), shape)


@pytest.mark.parametrize("shape", [None, (20, 18)])
def test_the_noise_has_the_stated_standard_deviation(shape):
    images = torch.stack([phantom((40, 36), rng(i)) for i in range(6)])
    kspace, clean = simulate_kspace(images, coil_maps((40, 36), 5, rng()), rng(1), noise_std=0.07, shape=shape)
    assert kspace.shape == clean.shape == (6, 5, *(shape or (40, 36)))
    assert kspace.dtype == clean.dtype == torch.complex64
    noise = torch.view_as_real(kspace - clean)
    for part in noise.unbind(-1):
        assert part.std().item() == pytest.approx(0.07, rel=0.03)
    assert abs((noise[0] * noise[1]).mean().item()) < 3e-4  # slices have noise of their own


def test_without_noise_the_combined_image_has_the_magnitude_of_the_phantom():
    images = torch.stack([phantom((40, 36), rng(i)) for i in range(3)])
    maps = coil_maps((40, 36), 5, rng())
    kspace, clean = simulate_kspace(images, maps, rng(1), noise_std=0.0)
    assert torch.equal(kspace, clean)
    combined = (maps[0, 0].conj() * ifft2c(clean)).sum(1)
    assert torch.allclose(combined.abs(), images, atol=1e-5)
    inside = images > 0.2
    phase = combined.angle()[inside]
    assert phase.std() > 0.05  # no scan is real


def test_phantoms_are_heads():
    image = phantom((64, 60), rng())
    assert image.shape == (64, 60)
    assert image.min() == 0
    assert image.max() <= 1
    assert not image[:3, :3].any()
    assert image[4, 30].item() == pytest.approx(0.9, abs=1e-6)  # the skull
    assert not torch.equal(image, phantom((64, 60), rng(1)))
