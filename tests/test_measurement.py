from dataclasses import FrozenInstanceError

import pytest
import torch

from msmri.measurement import Measurement, Reconstruction
from msmri.physics.coils import root_sum_of_squares
from msmri.physics.fourier import ifft2c
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.tensors import generators, normal_like
from msmri.testing import phantom_measurement


def kspace(batch=2, coils=3, y=32, x=40, seed=0):
    return normal_like(torch.empty(batch, coils, y, x, dtype=torch.complex64), generators(seed, batch))


def line_mask(*columns, x=40):
    mask = torch.zeros(1, 1, 1, x, dtype=torch.bool)
    mask[..., list(columns)] = True
    return mask


def measured(values, mask, **more):
    return Measurement(Subsample(mask)(values), mask.expand(len(values), -1, -1, -1), **more)


def test_the_operator_is_encoding_then_mask():
    given = phantom_measurement((20, 18), slices=2)
    image = kspace(2, 1, 20, 18)
    assert torch.equal(given.operator(image), Subsample(given.mask)(given.encoding(image)))
    with pytest.raises(ValueError, match=r"scan\.h5#3.*maps"):
        _ = Measurement(kspace(), line_mask(20), source=("scan.h5#3",)).operator


def test_acceleration_is_the_true_one_of_each_slice():
    mask = torch.cat([line_mask(*range(10)), line_mask(*range(20))])
    assert Measurement(kspace(), mask).acceleration.tolist() == [4.0, 2.0]
    places = torch.zeros(1, 1, 8, 10, dtype=torch.bool)
    places[..., :2, :5] = True
    assert Measurement(kspace(1, 2, 8, 10), places).acceleration.tolist() == [8.0]


def test_centre_scale_is_the_brightness_of_the_image_of_the_central_lines():
    values = kspace()
    given = measured(values, line_mask(2, *range(15, 26), 33))
    lines = round(40 * 20 / 256)
    centre = torch.zeros_like(values)
    left = 20 - lines // 2
    centre[..., left : left + lines] = values[..., left : left + lines]
    image = root_sum_of_squares(ifft2c(centre)).flatten(1)
    expected = torch.quantile(image, 0.99, dim=1)
    scale = given.centre_scale()
    assert scale.shape == (2, 1, 1, 1)
    assert torch.allclose(scale.flatten(), expected)
    assert torch.allclose(given.centre_scale(quantile=0.5).flatten(), torch.quantile(image, 0.5, dim=1))


def test_centre_scale_reads_nothing_but_the_measured_centre():
    values = kspace()
    few, many = line_mask(*range(18, 22)), line_mask(*range(18, 22), 3, 7, 30)
    scale = measured(values, few).centre_scale()
    assert torch.equal(measured(values, many).centre_scale(), scale)  # nor the acceleration
    changed = values.clone()
    changed[..., :16] = 1e6
    changed[..., 25:] = float("nan")
    mask = torch.cat([few, many])
    assert torch.equal(measured(changed, few).centre_scale(), scale)
    with_target = Measurement(Subsample(mask)(values), mask, target=torch.full((2, 32, 40), float("nan")))
    assert torch.equal(with_target.centre_scale(), scale)
    outside = Measurement(torch.where(few, values, torch.full_like(values, 1e6)), few.expand(2, -1, -1, -1))
    assert torch.equal(outside.centre_scale(), scale)


def test_centre_scale_of_a_slice_does_not_depend_on_its_neighbours_values():
    values = kspace()
    together = measured(values, line_mask(*range(17, 24))).centre_scale()
    for i in range(2):
        assert torch.allclose(
            measured(values[i : i + 1], line_mask(*range(17, 24))).centre_scale(), together[i : i + 1]
        )


def test_centre_scale_of_a_slice_does_not_depend_on_its_neighbours_masks():
    values, mask = kspace(), torch.cat([line_mask(*range(17, 24)), line_mask(20, 21)])
    together = Measurement(Subsample(mask)(values), mask).centre_scale()
    alone = Measurement(Subsample(mask[:1])(values[:1]), mask[:1]).centre_scale()
    assert torch.allclose(together[:1], alone)


def test_centre_scale_follows_the_units_and_survives_silence():
    values = kspace()
    mask = line_mask(*range(17, 24))
    assert torch.allclose(measured(1000 * values, mask).centre_scale(), 1000 * measured(values, mask).centre_scale())
    silent = measured(torch.zeros_like(values), mask)
    assert (silent.centre_scale() > 0).all()
    assert torch.isfinite(silent.scaled(silent.centre_scale()).values.abs()).all()


def test_centre_scale_of_a_two_dimensional_mask_uses_its_block():
    values = kspace(1, 3, 32, 40)
    mask = torch.zeros(1, 1, 32, 40, dtype=torch.bool)
    mask[..., 13:19, 16:25] = True
    mask[..., ::5, ::7] = True
    scale = measured(values, mask).centre_scale()
    changed = values.clone()
    changed[..., :13, :] = 1e5
    changed[..., 19:, :] = 1e5
    assert torch.equal(measured(changed, mask).centre_scale(), scale)


def test_scaled_keeps_the_product_with_the_scale():
    given = phantom_measurement((24, 20), noise_std=0.02)
    factor = torch.tensor([4.0, 0.5])[:, None, None, None]
    scaled = given.scaled(factor)
    assert torch.allclose(scaled.values * scaled.scale, given.values)
    assert torch.allclose(scaled.values * factor, given.values)
    assert torch.allclose(scaled.noise_std.flatten(), torch.tensor([0.005, 0.04]))
    twice = scaled.scaled(factor)
    assert torch.allclose(twice.scale.flatten(), torch.tensor([16.0, 0.25]))
    assert torch.allclose(twice.values * twice.scale, given.values)
    assert scaled.mask is given.mask
    assert scaled.target is given.target
    assert scaled.source == given.source


def test_scaled_by_its_own_brightness_has_brightness_one():
    given = phantom_measurement((24, 20))
    assert torch.allclose(given.scaled(given.centre_scale()).centre_scale(), torch.ones(2, 1, 1, 1))


def test_measurements_are_frozen():
    given = Measurement(kspace(), line_mask(20), Identity())
    with pytest.raises(FrozenInstanceError):
        given.scale = 2.0
    assert isinstance(phantom_measurement((12, 10)).encoding, CoilFourier)


def test_reconstruction_summarises_its_samples():
    samples = kspace(2, 4, 5, 6)
    result = Reconstruction(samples)
    assert torch.allclose(result.image, samples.mean(1))
    assert torch.allclose(result.magnitude, samples.mean(1).abs())
    assert torch.allclose(result.std, samples.abs().std(1, correction=1))
    one = Reconstruction(samples[:, :1])
    assert torch.equal(one.image, samples[:, 0])
    assert one.std is None
    assert Reconstruction(samples).details is not one.details


@pytest.mark.parametrize("colours", [False, True])
def test_an_expected_error_scales_the_std_and_nothing_else(colours):
    shape = (2, 5, 3, 8, 9) if colours else (2, 5, 8, 9)
    samples = torch.randn(shape, dtype=torch.float32 if colours else torch.complex64, generator=generators(0, 1)[0])
    plain, told = Reconstruction(samples), Reconstruction(samples, {}, torch.tensor([0.5, 7.0]))
    torch.testing.assert_close(told.std.square().flatten(1).mean(1).sqrt(), torch.tensor([0.5, 7.0]))
    ratio = (told.std / plain.std).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert torch.equal(told.image, plain.image)
    still = Reconstruction(samples[:, :1].expand_as(samples), {}, torch.tensor([0.5, 7.0]))
    assert bool(torch.isfinite(still.std).all())
    assert Reconstruction(samples[:, :1], {}, torch.tensor([0.5, 7.0])).std is None
