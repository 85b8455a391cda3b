import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmri.errors import InputError
from msmri.metrics import (
    CONVENTIONS,
    LOWER_IS_BETTER,
    METRICS,
    bootstrap_interval,
    evaluate,
    mse,
    nmse,
    object_region,
    psnr,
    scored,
    ssim,
)

SHAPES = [(3, 24, 19), (1, 7, 9), (2, 33, 40)]


def volumes(shape, *, seed=0, dtype=np.float32, units=1.0):
    rng = np.random.default_rng(seed)
    target = rng.gamma(2.0, size=shape) * np.linspace(0.2, 1.0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    image = np.abs(target + 0.1 * rng.standard_normal(shape))
    return (units * target).astype(dtype), (units * image).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("units", [1.0, 1e-6, 1e4])
def test_equal_to_fastmri(shape, dtype, units):
    import fastmri.evaluate

    target, image = volumes(shape, dtype=dtype, units=units)
    for name, metric in METRICS.items():
        theirs = np.asarray(getattr(fastmri.evaluate, name)(target, image)).item()
        assert type(metric(target, image)) is float
        assert metric(target, image) == pytest.approx(theirs, rel=1e-12), name
    for metric, theirs in ((psnr, fastmri.evaluate.psnr), (ssim, fastmri.evaluate.ssim)):
        given_range = np.asarray(theirs(target, image, maxval=3.3 * units)).item()
        assert metric(target, image, data_range=3.3 * units) == pytest.approx(given_range, rel=1e-12)
        assert metric(target, image) != pytest.approx(given_range, rel=1e-4)


def test_closed_forms():
    target = np.array([[3.0, 0.0], [0.0, 4.0]])
    image = np.array([[3.0, 1.0], [0.0, 2.0]])
    assert mse(target, image) == pytest.approx(5 / 4)
    assert nmse(target, image) == pytest.approx(5 / 25)
    assert psnr(target, image) == pytest.approx(10 * math.log10(16 / 1.25))
    assert psnr(target, image, data_range=1.0) == pytest.approx(-10 * math.log10(1.25))


def test_constant_images_give_the_luminance_term_of_ssim():
    target, image = np.full((9, 9), 2.0), np.full((9, 9), 1.0)
    constant = (0.01 * 2.0) ** 2
    assert ssim(target, image) == pytest.approx((2 * 2 * 1 + constant) / (4 + 1 + constant))


def test_ssim_window_is_seven_uniform():
    target = np.random.default_rng(0).random((7, 7))
    image = np.random.default_rng(1).random((7, 7))
    covariance = np.cov(target.ravel(), image.ravel())  # of the one window that fits, sample covariance
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    means = target.mean(), image.mean()
    expected = (2 * means[0] * means[1] + c1) * (2 * covariance[0, 1] + c2)
    expected /= (means[0] ** 2 + means[1] ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2)
    assert ssim(target, image, data_range=2.0) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(InputError, match=r"\(6, 9\) are smaller than the 7x7 window"):
        ssim(np.ones((6, 9)), np.ones((6, 9)))


def test_volume_range_differs_from_slice_range():
    target, image = volumes((2, 16, 16))
    by_slice = np.mean([ssim(a, b) for a, b in zip(target, image)])
    assert ssim(target, image) != pytest.approx(by_slice, rel=1e-4)
    same_range = np.mean([ssim(a, b, data_range=target.max()) for a, b in zip(target, image)])
    assert ssim(target, image) == pytest.approx(same_range, rel=1e-9)


@pytest.mark.parametrize("name", list(METRICS))
def test_tensors_slices_and_integers(name):
    metric = METRICS[name]
    target, image = volumes((1, 16, 12))
    assert metric(torch.from_numpy(target).requires_grad_(), torch.from_numpy(image)) == metric(target, image)
    assert metric(target[0], image[0]) == pytest.approx(metric(target, image), rel=1e-6)
    bytes_target, bytes_image = (np.round(20 * x).astype(np.uint8) for x in (target, image))
    assert metric(bytes_target, bytes_image) == metric(bytes_target.astype(float), bytes_image.astype(float))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), exponent=st.integers(-20, 20))
def test_units_do_not_matter(seed, exponent):
    target, image = volumes((2, 12, 11), seed=seed, dtype=np.float64)
    factor = 2.0**exponent
    for metric in (nmse, psnr, ssim):
        assert metric(factor * target, factor * image) == pytest.approx(metric(target, image), rel=1e-9)
    assert mse(factor * target, factor * image) == pytest.approx(factor**2 * mse(target, image), rel=1e-9)


def test_perfect_image():
    target, _ = volumes((2, 12, 12))
    with np.errstate(all="raise"):
        assert evaluate(target, target.copy()) == {
            "nmse": 0.0,
            "psnr": math.inf,
            "ssim": pytest.approx(1.0),
            "mse": 0.0,
        }


def test_worse_images_score_worse():
    target, image = volumes((2, 20, 20))
    worse = evaluate(target, np.abs(target + 3 * (image - target)))
    for name, value in evaluate(target, image).items():
        assert (worse[name] > value) == (name in LOWER_IS_BETTER), name


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_bad_input(metric):
    target, image = volumes((2, 12, 12))
    holed = image.copy()
    holed[1, 2, 3] = np.nan
    for bad, message in [
        (image[:, :-1], "differ in shape"),
        (image[:1], "differ in shape"),
        (holed, "the image holds NaN"),
        (image + 0j, "the image is complex"),
    ]:
        with pytest.raises(InputError, match=message):
            metric(target, bad)
    with pytest.raises(InputError, match="the target holds NaN"):
        metric(holed, image)
    with pytest.raises(InputError, match="not \\(12,\\)"):
        metric(target[0, 0], image[0, 0])


@pytest.mark.parametrize("metric", [nmse, psnr, ssim])
def test_target_without_signal(metric):
    with pytest.raises(InputError, match="signal"):
        metric(np.zeros((8, 8)), np.ones((8, 8)))


def test_scored_says_what_was_compared():
    target, image = volumes((2, 12, 12))
    record = scored(target, image)
    assert record["data_range"] == target.max()
    assert {name: record[name] for name in METRICS} == evaluate(target, image)
    assert record["conventions"] == CONVENTIONS
    assert "7x7" in CONVENTIONS["ssim"] and "max of the target volume" in CONVENTIONS["ssim"]
    chosen = scored(target, image, data_range=10.0)
    assert chosen["psnr"] == psnr(target, image, data_range=10.0)
    assert chosen["data_range"] == 10.0
    assert chosen["conventions"]["ssim"].endswith("data_range given")


def test_bootstrap_interval_covers_like_the_normal_one():
    values = np.random.default_rng(0).normal(30.0, 2.0, 400)
    mean, low, high = bootstrap_interval(values.tolist(), torch.Generator().manual_seed(0))
    half = 1.96 * values.std() / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.02), pytest.approx(mean + half, abs=0.02))
    narrow = bootstrap_interval(values.tolist(), torch.Generator().manual_seed(0), level=0.5)
    assert narrow[2] - narrow[1] == pytest.approx(2 * 0.6745 * half / 1.96, rel=0.05)


def test_bootstrap_interval_is_seeded_and_checked():
    values = [1.0, 2.0, 4.0, 9.0]
    state = torch.random.get_rng_state()
    first = bootstrap_interval(values, torch.Generator().manual_seed(3))
    assert first == bootstrap_interval(values, torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.random.get_rng_state())
    assert 1.0 <= first[1] < first[0] < first[2] <= 9.0
    single = bootstrap_interval([5.0], torch.Generator())
    assert single[0] == 5.0 and math.isnan(single[1]) and math.isnan(single[2])
    for bad in ([], [1.0, math.nan], [[1.0], [2.0]]):
        with pytest.raises(InputError):
            bootstrap_interval(bad, torch.Generator())
    with pytest.raises(InputError):
        bootstrap_interval(values, torch.Generator(), level=95)


def test_only_the_pixels_that_count():
    target, image = volumes((2, 33, 40))
    everywhere = np.ones(target.shape, dtype=bool)
    assert psnr(target, image, where=everywhere) == pytest.approx(psnr(target, image), rel=1e-6)
    assert ssim(target, image, where=everywhere) == pytest.approx(ssim(target, image), rel=1e-6)
    half = everywhere.copy()
    half[..., 20:] = False
    spoiled = image.copy()
    spoiled[..., 23:] = 0  # three pixels further than any window around the left half reaches
    for metric in (psnr, ssim):
        assert metric(target, spoiled, where=half) == metric(target, image, where=half)
        assert metric(target, spoiled) < metric(target, image)
    assert psnr(target, image, where=half) == pytest.approx(
        psnr(target[..., :20], image[..., :20], data_range=float(target.max())), rel=1e-6
    )
    spoiled[..., 22] = 0
    assert ssim(target, spoiled, where=half) < ssim(target, image, where=half)


def test_object_region_leaves_out_the_noise_floor():
    floor = np.abs(np.random.default_rng(0).standard_normal((2, 40, 40))) * 0.02
    target = floor.copy()
    target[:, 10:30, 12:28] += 1.0
    region = object_region(target)
    assert region[:, 10:30, 12:28].all()
    assert not region[:, :6].any() and not region[..., :8].any()
    assert np.array_equal(object_region(target * 1e-7), region)
    assert not object_region(target, share=0.99)[:, 10].any()


@pytest.mark.parametrize("where", [np.zeros((9, 9), dtype=bool), np.ones((9, 9)), np.ones((9, 8), dtype=bool)])
def test_bad_pixels_are_refused(where):
    target = np.ones((9, 9))
    for metric in (psnr, ssim):
        with pytest.raises(InputError, match="count"):
            metric(target, target, where=where)
    corner = np.zeros((9, 9), dtype=bool)
    corner[0, 0] = True
    with pytest.raises(InputError, match="window"):
        ssim(target, target, where=corner)
