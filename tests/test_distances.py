from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.linalg import sqrtm

from msmri.distances import (
    frechet_distance,
    gaussian_distance,
    inception_distances,
    lpips,
    scattering_distance,
    scattering_features,
    shrunk_covariance,
)
from msmri.errors import InputError
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.masks import RandomLines, draw_masks
from msmri.physics.simulate import phantom, smooth_field
from msmri.tensors import generators, normal_like


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(n, d, seed=0, scale=1.0):
    return scale * torch.randn((n, d), generator=rng(seed), dtype=torch.float64)


def phantoms(n, seed, size=64):
    stream = rng(seed)
    images = [phantom((size, size), stream) * (1 + 0.1 * smooth_field((size, size), stream)) for _ in range(n)]
    images = torch.stack(images)
    return (images + 0.01 * normal_like(images, generators(seed, n))).abs()


# --- the distance --------------------------------------------------------------------------------------------------


def test_known_gaussians():
    a, b = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 9.0])
    mean = torch.tensor([1.0, -2.0, 0.0])
    zero = torch.zeros(3)
    apart = gaussian_distance(mean, torch.diag(a), zero, torch.diag(b))
    assert apart == pytest.approx(5 + 1 + 0 + 9)  # |m|^2 + sum (sqrt a - sqrt b)^2, a singular covariance included
    assert gaussian_distance(zero, torch.diag(b), mean, torch.diag(a)) == pytest.approx(apart)
    assert gaussian_distance(mean, torch.diag(a), mean, torch.diag(a)) == pytest.approx(0, abs=1e-9)


def test_it_is_the_written_out_formula():
    first, second = (root.mT @ root for root in (draw(9, 5, 1), draw(9, 5, 2)))
    means = draw(2, 5, 3)
    root = sqrtm((first @ second).numpy())
    expected = float((means[0] - means[1]).square().sum() + first.trace() + second.trace()) - 2 * np.trace(root).real
    assert gaussian_distance(means[0], first, means[1], second) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("wrong", [torch.diag(torch.tensor([1.0, -1.0])), torch.tensor([[1.0, 0.5], [0.0, 1.0]])])
def test_what_is_no_covariance_is_refused(wrong):
    with pytest.raises(InputError, match="covariance"):
        gaussian_distance(torch.zeros(2), wrong, torch.zeros(2), torch.eye(2))


def test_shrinkage_follows_the_number_of_samples():
    weights = []
    for n in (5, 20, 200, 20_000):
        features = draw(n, 6, n) @ torch.linalg.cholesky(0.5 * torch.eye(6) + 0.5).double().mT
        found, weight = shrunk_covariance(features)
        plain = torch.cov(features.mT)
        torch.testing.assert_close(found.diagonal(), plain.diagonal())
        outside = ~torch.eye(6, dtype=torch.bool)
        torch.testing.assert_close(found[outside], (1 - weight) * plain[outside])
        weights.append(weight)
    assert weights == sorted(weights, reverse=True) and weights[-1] < 0.001
    # uncorrelated features: nearly all of the correlations is noise
    assert shrunk_covariance(draw(30, 6, 1))[1] > 0.5
    # the optimal weight for n = 20: variance over mean square of the entries to shrink, whose true value is 0.5
    root = torch.linalg.cholesky(0.5 * torch.eye(6) + 0.5).double().mT
    found = [shrunk_covariance(draw(20, 6, seed) @ root)[1] for seed in range(200)]
    entries = torch.stack([torch.cov((draw(20, 6, seed) @ root).mT)[0, 1] for seed in range(200)])
    assert np.mean(found) == pytest.approx(float(entries.var() / entries.square().mean()), abs=0.06)


def test_the_floor_is_the_bias_of_small_sets():
    root = torch.linalg.cholesky(0.5 * torch.eye(8) + 0.5).double().mT
    reference = draw(500, 8, 0) @ root
    values, floors = [], []
    for n in (8, 32):
        found = [frechet_distance(reference, draw(n, 8, 50 + s) @ root, rng=rng(s), trials=6) for s in range(30)]
        values.append(np.mean([d.value for d in found]))
        floors.append(np.mean([d.floor for d in found]))
        assert abs(np.mean([d.excess for d in found])) < 0.15 * floors[-1]
        assert found[0].counts == (500, n) and 0 <= found[0].means < found[0].value
    assert values[0] > 2 * values[1]
    shifted = frechet_distance(reference, draw(500, 8, 9) @ root + 2, rng=rng())
    assert shifted.value == pytest.approx(32, rel=0.05) and shifted.means == pytest.approx(32, rel=0.05)
    plain = frechet_distance(reference, draw(12, 8, 9) @ root, shrink=False, rng=rng())
    assert plain.shrinkage == (0, 0) and plain.floor > floors[1]
    assert np.isnan(frechet_distance(reference, reference).floor)


# --- features ------------------------------------------------------------------------------------------------------

SHAPE = (64, 64)
CORRUPTIONS = {
    "blur": (lambda x, s: torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, s, s))), (0.5, 0.7, 2.0)),
    "noise": (lambda x, s: (x + s * normal_like(x, generators(9, len(x)))).abs(), (0.02, 0.04, 0.16)),
    "missing lines": (
        lambda x, r: ifft2c(fft2c(x.cfloat()) * draw_masks(RandomLines(r), SHAPE, generators(3, len(x)))[:, 0]).abs(),
        (1.1, 1.5, 4.0),
    ),
    "tile edges": (
        lambda x, s: (
            x * (1 + s * normal_like(torch.zeros(len(x), 4, 4), generators(4, len(x)))).abs().repeat_interleave(
                16, 1).repeat_interleave(16, 2)
        ),
        (0.25, 0.4, 0.7),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sets():
    return scattering_features(phantoms(50, 0)), phantoms(30, 1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_ordered_by_their_strength(sets, name):
    reference, others = sets
    corrupt, strengths = CORRUPTIONS[name]
    clean = frechet_distance(reference, scattering_features(others), rng=rng())
    assert abs(clean.excess) < 0.5 * clean.floor
    found = [frechet_distance(reference, scattering_features(corrupt(others, s))).value for s in strengths]
    assert found[0] > 1.5 * clean.value
    assert all(1.3 * a < b for a, b in pairwise(found))


def test_noise_of_the_same_spectrum_is_far_away(sets):
    reference, others = sets
    phase = torch.polar(torch.ones(30, 64, 64), 2 * torch.pi * torch.rand(30, 64, 64, generator=rng()))
    clouds = ifft2c(fft2c(others.cfloat()).abs() * phase).abs()
    assert frechet_distance(reference, scattering_features(clouds)).value > 5
    turned = frechet_distance(reference, scattering_features(others.mT)).value  # heads lying on their side
    assert 0.2 < turned < 5


def test_features_of_waves_are_in_the_place_of_their_scale_and_direction():
    grid = torch.arange(64, dtype=torch.float32)
    for scale, frequency in enumerate((22 / 64, 11 / 64, 6 / 64, 3 / 64)):
        wave = 1 + 0.5 * torch.cos(2 * torch.pi * frequency * grid)
        for turn, image in ((0, wave.expand(64, 64)), (2, wave[:, None].expand(64, 64))):
            first = scattering_features(image[None])[0, :16].reshape(4, 4)
            assert int(first.argmax()) == 4 * scale + turn
    halves = torch.ones(64, 64)
    halves[:, 20:] = 2
    along, across = scattering_features(halves[None])[0, -2:]
    assert float(along) == pytest.approx(float(torch.tensor(63 * (1 + 0.0017) / (1 + 63 * 0.0017)).log()), abs=0.01)
    assert float(across) == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(scattering_features(halves.mT[None])[0, -2:], torch.stack([across, along]))
    diagonal = 1 + 0.5 * torch.cos(2 * torch.pi * 8 / 64 * (grid[:, None] + grid))
    assert int(scattering_features(diagonal[None])[0, :16].argmax()) % 4 == 1


def test_features_know_no_units_no_batch_and_any_size():
    images = phantoms(20, 2)
    found = scattering_features(images)
    assert found.shape == (20, 51) and bool(torch.isfinite(found).all())
    torch.testing.assert_close(scattering_features(1e6 * images), found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scattering_features(images[17:]), found[17:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scattering_features(torch.polar(images, images)), found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scattering_features(images[:, None].expand(-1, 3, -1, -1)), found, rtol=1e-4, atol=1e-4)
    assert scattering_features(phantoms(2, 0, 33)).shape == scattering_features(phantoms(2, 0, 97)).shape == (2, 51)
    again = scattering_distance(images[:10].numpy(), images[10:], rng=rng())
    assert again.counts == (10, 10) and again.floor > 0


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 64, 64), torch.full((3, 64, 64), torch.nan), torch.ones(64, 64), torch.ones(3, 16, 16)]
)
def test_what_is_no_image_is_refused(images):
    with pytest.raises(InputError, match="image"):
        scattering_features(images)


def test_what_is_no_distribution_is_refused():
    for wrong in (draw(2, 4), draw(5, 3), torch.full((5, 4), torch.nan)):
        with pytest.raises(InputError):
            frechet_distance(draw(5, 4), wrong)


# --- Inception -----------------------------------------------------------------------------------------------------


class Pooled(torch.nn.Module):
    """Stands in for Inception: brightness of four quarters."""

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        assert int(images.amax()) == 255
        return torch.nn.functional.adaptive_avg_pool2d(images[:, :1].float() / 16, 2).flatten(1)


def test_fid_and_kid_are_of_the_features_of_the_network():
    pytest.importorskip("torchmetrics")
    images, other = phantoms(40, 0), phantoms(30, 1)
    state = torch.get_rng_state()
    same = inception_distances(images, other, network=Pooled(), batch=7)
    shifted = inception_distances(images, torch.roll(other, 12, -1), network=Pooled())
    assert torch.equal(state, torch.get_rng_state())
    assert same == pytest.approx(inception_distances(images, other, network=Pooled()), rel=1e-6)
    windowed = [(255 * x / x.amax((-2, -1), keepdim=True)).round().to(torch.uint8) for x in (images, other)]
    features = [Pooled()(x[:, None].expand(-1, 3, -1, -1)) for x in windowed]
    assert same["fid"] == pytest.approx(frechet_distance(*features, shrink=False).value, rel=1e-3)
    assert shifted["fid"] > 5 * same["fid"] and shifted["kid"] > same["kid"] + 3 * same["kid_std"]


def test_missing_weights_are_told_of(tmp_path):
    images = phantoms(3, 0, 32)
    with pytest.raises(InputError, match=r"none\.pth.*not there.*torch-fidelity.*scattering"):
        inception_distances(images, images, weights=tmp_path / "none.pth")
    with pytest.raises(InputError, match="too few"):
        inception_distances(images[:2], images, network=Pooled())
    with pytest.raises(InputError, match="no images"):
        inception_distances(images[:, None], images, network=Pooled())


@pytest.fixture
def squeezenet(tmp_path, monkeypatch):
    """Put random weights of LPIPS's smallest backbone where torch looks for them."""
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(state, tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")


def test_lpips_is_of_windowed_pairs(squeezenet):
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as reference

    targets = 7 * phantoms(2, 0, 64)
    images = torch.stack([targets[0], 0.5 * targets[1] + 0.5 * torch.roll(targets[1], 9, -1)])
    found = lpips(targets, images, backbone="squeeze")
    assert found.shape == (2,) and abs(float(found[0])) < 1e-6 and float(found[1]) > 1e-4
    window = targets[1].amax()
    pair = [(x[1] / window).clamp(0, 1).expand(1, 3, -1, -1) for x in (targets, images)]
    assert float(found[1]) == pytest.approx(float(reference(*pair, net_type="squeeze", normalize=True)), rel=1e-4)
    torch.testing.assert_close(lpips(3 * targets, torch.polar(3 * images, images), backbone="squeeze"), found)
    colours = [(x / x.amax((-2, -1), keepdim=True))[:, None].expand(-1, 3, -1, -1) for x in (targets, targets)]
    assert float(lpips(colours[0], colours[1].flip(-1), backbone="squeeze").min()) > 1e-4


def test_lpips_tells_what_is_missing(squeezenet):
    images = phantoms(2, 0, 64)
    with pytest.raises(InputError, match=r"alexnet.*not there.*download\.pytorch\.org"):
        lpips(images, images)
    with pytest.raises(InputError, match="differ"):
        lpips(images, images[:1], backbone="squeeze")
    with pytest.raises(InputError, match="no images"):
        lpips(images[:, None], images[:, None], backbone="squeeze")
