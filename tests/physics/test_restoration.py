import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmri.errors import InputError
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.physics.restoration import BlockAverage, Blur, SignedHadamard, walsh_hadamard
from msmri.physics.tiles import box_mask
from msmri.tensors import generators, normal_like
from msmri.testing import check_adjoint

DTYPES = [torch.float32, torch.complex64]
BATCHES = [(), (1,), (3,), (2, 3)]
SHAPES = [(8, 8), (7, 10), (9, 5), (5, 12)]


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def field(*shape, dtype=torch.float32, seed=0):
    return normal_like(torch.empty(1, *shape, dtype=dtype), generators(seed, 1))[0]


def lopsided(*shape, seed=0):
    """A kernel without any symmetry."""
    return torch.rand(shape, generator=stream(seed), dtype=torch.float64)


def cases(batch):
    for y, x in SHAPES:
        whole = (*batch, 3, y, x)
        yield Subsample(box_mask((y, x), (3, 2))), whole, whole
        for kernel in (lopsided(3, 3), lopsided(2, 5), lopsided(11, 13)):
            yield Blur(kernel), whole, whole
        yield Blur.gaussian(1.3), whole, whole
        for m in (1, y * x // 3, y * x):
            yield SignedHadamard.draw((y, x), m, stream()), whole, (*batch, 3, 1, m)
    for factor, y, x in [(1, 5, 4), (2, 6, 10), (3, 9, 15), (4, 4, 12), (5, 5, 5)]:
        yield BlockAverage(factor), (*batch, 2, y, x), (*batch, 2, y // factor, x // factor)
        chain = BlockAverage(factor) @ Blur(lopsided(3, 2))
        yield chain, (*batch, 2, y, x), (*batch, 2, y // factor, x // factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_every_operator_keeps_the_contract(batch, dtype):
    for operator, domain, codomain in cases(batch):
        assert check_adjoint(operator, domain, codomain, dtype=dtype) < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 15), st.integers(1, 9), st.data())
def test_any_size(y, x, factor, rows, columns, data):
    check_adjoint(BlockAverage(factor), (2, 1, y * factor, x * factor), (2, 1, y, x), dtype=torch.float32)
    check_adjoint(Blur(lopsided(rows, columns)), (1, y, x), (1, y, x))
    m = data.draw(st.integers(1, y * x))
    check_adjoint(SignedHadamard.draw((y, x), m, stream(m)), (2, y, x), (2, 1, m))


def test_double_precision_is_exact_to_double_precision():
    double = {"dtype": torch.complex128, "tolerance": 1e-13}
    check_adjoint(Blur(lopsided(3, 4)), (2, 7, 9), (2, 7, 9), **double)
    check_adjoint(SignedHadamard.draw((7, 9), 20, stream()), (2, 7, 9), (2, 1, 20), **double)
    check_adjoint(BlockAverage(3), (2, 6, 9), (2, 2, 3), **double)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pseudo_inverses_are_those_of_moore_and_penrose(dtype):
    """A A+ A = A, A+ A A+ = A+, and both products are Hermitian."""
    cases = [
        (BlockAverage(3), (2, 6, 9)),
        (Subsample(box_mask((6, 9), (3, 4))), (2, 6, 9)),
        (Identity(), (2, 6, 9)),
        (Blur(torch.tensor([[0.1, 0.2], [0.0, 1.0]])), (2, 7, 10)),
        (Blur.gaussian(1.5, cutoff=1e-6), (2, 7, 10)),
        (SignedHadamard.draw((8, 16), 50, stream()), (2, 8, 16)),
        (SignedHadamard.draw((7, 11), 30, stream()), (2, 7, 11)),
    ]
    for operator, shape in cases:
        x = field(*shape, dtype=dtype).to(torch.complex128 if dtype.is_complex else torch.float64)
        y = operator(x)
        y = y + field(*y.shape, dtype=y.dtype, seed=1)
        close = {"rtol": 1e-5, "atol": 1e-5}
        inverse = operator.pseudo_inverse
        torch.testing.assert_close(operator(inverse(operator(x))), operator(x), **close)
        torch.testing.assert_close(inverse(operator(inverse(y))), inverse(y), **close)
        x2, y2 = field(*x.shape, dtype=x.dtype, seed=2), field(*y.shape, dtype=y.dtype, seed=3)
        on_domain = torch.stack([inverse(operator(v)).flatten() for v in (x, x2)])
        on_range = torch.stack([operator(inverse(v)).flatten() for v in (y, y2)])
        for (one, two), a, b in [(on_domain, x, x2), (on_range, y, y2)]:
            torch.testing.assert_close(torch.vdot(one, b.flatten()), torch.vdot(a.flatten(), two), **close)


# averaged blocks


def test_block_averages_are_averages_of_blocks():
    image = torch.arange(24.0).reshape(1, 4, 6)
    assert BlockAverage(2)(image).tolist() == [[[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]]
    assert BlockAverage(2).pseudo_inverse(torch.tensor([[[1.0, 2.0]]])).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2]]]
    with pytest.raises(ValueError, match="blocks of 4 do not fill an image of 4 x 6"):
        BlockAverage(4)(image)
    with pytest.raises(InputError, match="blocks of 0"):
        BlockAverage(0)


@pytest.mark.parametrize("factor", [3, 5])
def test_block_averages_are_deepinvs_downsampling(factor):
    from deepinv.physics import Downsampling

    shape = (3, 4 * factor, 3 * factor)
    box = torch.full((1, 1, factor, factor), 1.0 / factor**2)
    theirs = Downsampling(img_size=shape, filter=box, factor=factor, padding="circular")
    image = field(2, *shape)
    # theirs centres the box on the pixels it keeps, 0, f, 2f, ..; ours begins there
    middle = factor // 2
    shifted = torch.roll(image, (-middle, -middle), (-2, -1))
    torch.testing.assert_close(BlockAverage(factor)(image), theirs.A(shifted), rtol=1e-5, atol=1e-5)
    low = field(2, 3, 4, 3, seed=1)
    back = torch.roll(theirs.A_adjoint(low), (middle, middle), (-2, -1))
    torch.testing.assert_close(BlockAverage(factor).adjoint(low), back, rtol=1e-5, atol=1e-5)


# blur


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5), (1, 1), (4, 4)])
def test_blur_is_the_sum_of_shifted_images(shape, kernel):
    image, weights = field(2, *shape, dtype=torch.float64), lopsided(*kernel)
    expected = sum(
        weights[i, j] * torch.roll(image, (i - kernel[0] // 2, j - kernel[1] // 2), (-2, -1))
        for i in range(kernel[0])
        for j in range(kernel[1])
    )
    torch.testing.assert_close(Blur(weights)(image), expected)


def test_a_kernel_wider_than_the_image_is_wrapped():
    image, weights = field(1, 4, 3, dtype=torch.float64), lopsided(9, 8)
    expected = sum(weights[i, j] * torch.roll(image, (i - 4, j - 4), (-2, -1)) for i in range(9) for j in range(8))
    torch.testing.assert_close(Blur(weights)(image), expected)


def test_gaussian_blur_is_scipys():
    from scipy.ndimage import gaussian_filter

    image = field(11, 17, dtype=torch.float64)
    expected = gaussian_filter(image.numpy(), 1.25, mode="wrap", truncate=4.0)
    np.testing.assert_allclose(Blur.gaussian(1.25)(image[None])[0].numpy(), expected, atol=1e-12)
    assert float(Blur.gaussian(3.0).kernel.sum()) == pytest.approx(1)
    assert Blur.gaussian(1.3, reach=2.0).kernel.shape == (7, 7)


@pytest.mark.parametrize("size", [(3, 3), (5, 3)])
def test_blur_is_deepinvs(size):
    from deepinv.physics import Blur as TheirBlur
    from deepinv.physics import BlurFFT

    kernel = lopsided(*size).float()
    image, other = field(2, 3, 9, 12), field(2, 3, 9, 12, seed=1)
    ours = Blur(kernel)
    for theirs in (
        TheirBlur(filter=kernel[None, None], padding="circular"),
        BlurFFT(img_size=(3, 9, 12), filter=kernel[None, None]),
    ):
        torch.testing.assert_close(ours(image), theirs.A(image), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.adjoint(other), theirs.A_adjoint(other), rtol=1e-4, atol=1e-4)


def test_frequencies_that_are_lost_do_not_come_back():
    blur = Blur.gaussian(4.0, cutoff=1e-2)
    image = field(1, 32, 32, dtype=torch.float64)
    noise = 1e-3 * field(1, 32, 32, dtype=torch.float64, seed=1)
    back = blur.pseudo_inverse(blur(image) + noise)
    assert float((back - blur.pseudo_inverse(blur(image))).norm()) < 1e2 * float(noise.norm())
    strength = blur.response((32, 32)).abs()
    lost = strength <= 1e-2
    spectrum, truth = torch.fft.fft2(back)[0], torch.fft.fft2(blur.pseudo_inverse(blur(image)))[0]
    assert 0.5 < lost.double().mean() < 1 and float(spectrum[lost].abs().max()) < 1e-9
    torch.testing.assert_close(truth[~lost], torch.fft.fft2(image)[0][~lost])


@pytest.mark.parametrize("kernel", [torch.ones(3), torch.ones(2, 2, dtype=torch.complex64), torch.ones(0, 3)])
def test_what_is_no_kernel_is_refused(kernel):
    with pytest.raises(InputError, match="cannot blur"):
        Blur(kernel)


def test_impossible_gaussians_are_refused():
    for std, reach in [(0.0, 4.0), (-1.0, 4.0), (1.0, 0.0)]:
        with pytest.raises(InputError, match="no Gaussian"):
            Blur.gaussian(std, reach=reach)


# compressed sensing


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_walsh_hadamard_is_scipys_matrix_and_deepinvs_transform(n):
    from deepinv.physics.singlepixel import hadamard_1d
    from scipy.linalg import hadamard

    values = field(3, n, dtype=torch.complex128)
    matrix = torch.from_numpy(hadamard(n)).to(values.dtype) / n**0.5
    torch.testing.assert_close(walsh_hadamard(values), values @ matrix)
    torch.testing.assert_close(walsh_hadamard(values), hadamard_1d(values))
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(values)), values)


@pytest.mark.parametrize("n", [0, 3, 12])
def test_other_lengths_are_refused(n):
    with pytest.raises(ValueError, match="power of two"):
        walsh_hadamard(torch.zeros(2, n))


def test_measurements_are_sums_with_random_signs():
    from scipy.linalg import hadamard

    operator = SignedHadamard.draw((5, 6), 12, stream(3))
    matrix = torch.from_numpy(hadamard(32)).double()[operator.rows][:, :30] * operator.signs.double().flatten()
    image = field(2, 3, 5, 6, dtype=torch.float64)
    assert set(operator.signs.unique().tolist()) == {-1.0, 1.0} and len(operator.rows.unique()) == 12
    torch.testing.assert_close(operator(image)[..., 0, :], image.flatten(-2) @ matrix.T / 32**0.5)


def test_it_is_deepinvs_structured_random_with_this_transform():
    from deepinv.physics import StructuredRandom

    operator = SignedHadamard.draw((8, 8), 64, stream())
    theirs = StructuredRandom(
        img_size=(1, 8, 8),
        output_size=(1, 8, 8),
        n_layers=1,
        transform_func=lambda x: walsh_hadamard(x.flatten(-2)).reshape(x.shape),
        transform_func_inv=lambda x: walsh_hadamard(x.flatten(-2)).reshape(x.shape),
        diagonals=[operator.signs[None]],
    )
    image = field(2, 1, 8, 8)
    expected = theirs.A(image).flatten(-2)[..., operator.rows]
    torch.testing.assert_close(operator(image)[..., 0, :], expected, rtol=1e-5, atol=1e-5)


def test_rows_are_orthonormal_for_a_power_of_two():
    operator = SignedHadamard.draw((8, 16), 40, stream())
    y = field(2, 1, 40)
    torch.testing.assert_close(operator(operator.adjoint(y)), y)
    torch.testing.assert_close(operator.pseudo_inverse(y), operator.adjoint(y))


def test_draws_come_from_the_given_stream_alone():
    before = torch.get_rng_state()
    one, again, other = (SignedHadamard.draw((9, 9), 20, stream(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.signs, again.signs) and torch.equal(one.rows, again.rows)
    assert not torch.equal(one.signs, other.signs) and not torch.equal(one.rows, other.rows)
    assert torch.equal(before, torch.get_rng_state())
    rows = torch.cat([SignedHadamard.draw((5, 6), 10, stream(seed)).rows for seed in range(30)])
    assert set(rows.tolist()) == set(range(32))  # of the padded transform, all alike


def test_impossible_measurements_are_refused():
    for m in (0, 31):
        with pytest.raises(InputError, match="of an image of 30 pixels"):
            SignedHadamard.draw((5, 6), m, stream())
    with pytest.raises(InputError, match="make no operator"):
        SignedHadamard(torch.ones(4), torch.arange(2))
    with pytest.raises(ValueError, match="does not fit signs"):
        SignedHadamard.draw((5, 6), 3, stream())(torch.zeros(1, 6, 5))


# with coils


def test_before_an_encoding_they_degrade_what_was_encoded():
    maps = field(1, 1, 4, 8, 12, dtype=torch.complex64)
    for inner in (Blur.gaussian(0.8), Subsample(box_mask((8, 12), (3, 3)))):
        check_adjoint(CoilFourier(maps) @ inner, (2, 1, 8, 12), (2, 4, 8, 12))
    check_adjoint(BlockAverage(2) @ Blur.gaussian(0.8), (2, 1, 8, 12), (2, 1, 4, 6))
    check_adjoint(SignedHadamard.draw((8, 12), 30, stream()) @ CoilFourier(maps), (2, 1, 8, 12), (2, 4, 1, 30))


def test_inpainting_is_deepinvs():
    from deepinv.physics import Inpainting

    mask = box_mask((8, 10), (3, 4))
    image = field(2, 3, 8, 10)
    theirs = Inpainting(img_size=(3, 8, 10), mask=mask.float())
    torch.testing.assert_close(Subsample(mask)(image), theirs.A(image))
    torch.testing.assert_close(Subsample(mask).pseudo_inverse(image), theirs.A_dagger(image))
