from dataclasses import replace

import pytest
import torch

from msmri.io import open_scan, write_scan
from msmri.physics.masks import RandomLines
from msmri.preparation import Preparation, read_slice
from msmri.testing import phantom_measurement

QUIET = Preparation(law=RandomLines(acceleration=2), seed=3)
NOISY = replace(QUIET, noise=0.05)


@pytest.fixture
def scan(tmp_path):
    full = phantom_measurement((64, 48), noise_std=0.0)
    write_scan(tmp_path / "scan.h5", 7 * full.encoding(full.target[:, None].to(torch.complex64)))
    with open_scan(tmp_path / "scan.h5") as opened:
        yield opened


def test_noise_is_a_share_of_the_brightest_pixel_in_each_real_component(scan):
    for index in range(2):
        quiet, noisy = (read_slice(scan, index, preparation) for preparation in (QUIET, NOISY))
        assert torch.equal(quiet.mask, noisy.mask) and torch.equal(quiet.target, noisy.target)
        noise = torch.view_as_real((noisy.values - quiet.values)[quiet.mask.expand_as(quiet.values)])
        expected = 0.05 * float(quiet.target.max())  # the scan is free of noise, its target the image itself
        for component in noise.unbind(-1):
            assert (
                float(component.std()) == pytest.approx(expected, rel=0.05) and abs(component.mean()) < 0.1 * expected
            )
        assert not bool(noisy.values[~quiet.mask.expand_as(quiet.values)].any())


def test_noise_goes_by_slice_and_seed_and_is_told(scan):
    every = torch.ones(1, 1, 1, 48, dtype=torch.bool)

    def noise(index, seed):
        quiet, noisy = (read_slice(scan, index, replace(one, law=every, seed=seed)) for one in (QUIET, NOISY))
        return (noisy.values - quiet.values).flatten()

    first = noise(0, 3)
    assert torch.equal(noise(0, 3), first)
    for other in (noise(1, 3), noise(0, 4)):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.05
    assert NOISY.describe()["noise"] == 0.05 and "noise" not in QUIET.describe()
