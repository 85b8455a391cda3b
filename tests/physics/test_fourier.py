import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmri.physics.fourier import centring_phase, fft2c, ifft2c
from msmri.tensors import generators, normal_like

SHAPES = [(8, 8), (7, 10), (9, 5), (1, 6), (16, 3)]


def field(*shape, dtype=torch.complex128):
    return normal_like(torch.empty(1, *shape, dtype=dtype), generators(0, 1))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_sum_that_defines_it(shape):
    image = field(*shape)
    waves = []
    for n in shape:
        index = torch.arange(n, dtype=torch.float64) - n // 2
        waves.append(torch.exp(-2j * torch.pi * torch.outer(index, index) / n) / n**0.5)
    assert torch.allclose(fft2c(image), waves[0] @ image @ waves[1].mT, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_fastmris_and_numpys(shape):
    import fastmri

    image = field(2, 3, *shape)
    pairs = torch.view_as_real(image)
    assert torch.allclose(fft2c(image), torch.view_as_complex(fastmri.fft2c(pairs)), atol=1e-12)
    assert torch.allclose(ifft2c(image), torch.view_as_complex(fastmri.ifft2c(pairs)), atol=1e-12)
    reference = np.fft.fftshift(
        np.fft.fft2(np.fft.ifftshift(image.numpy(), axes=(-2, -1)), norm="ortho"), axes=(-2, -1)
    )
    np.testing.assert_allclose(fft2c(image).numpy(), reference, atol=1e-12)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_it_is_unitary(rows, columns, batch):
    image, kspace = field(batch, rows, columns), field(batch, rows, columns).conj() * 1j
    assert torch.allclose(ifft2c(fft2c(image)), image, atol=1e-12)
    assert torch.allclose(fft2c(ifft2c(kspace)), kspace, atol=1e-12)
    assert torch.allclose(
        torch.vdot(fft2c(image).ravel(), kspace.ravel()), torch.vdot(image.ravel(), ifft2c(kspace).ravel())
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_is_at_the_centre_of_kspace(shape):
    kspace = fft2c(torch.ones(shape, dtype=torch.complex128))
    expected = torch.zeros(shape, dtype=torch.complex128)
    expected[shape[0] // 2, shape[1] // 2] = (shape[0] * shape[1]) ** 0.5
    assert torch.allclose(kspace, expected, atol=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, (641, 322)])
def test_the_phase_turns_an_uncentred_transform_into_a_centred_one(shape):
    image = field(2, *shape)
    phase = centring_phase(shape, dtype=torch.complex128, device=torch.device("cpu"))
    assert torch.allclose(phase.abs(), torch.ones(shape, dtype=torch.float64))
    shifted = torch.fft.ifftshift(image, dim=(-2, -1))
    assert torch.allclose(torch.fft.fft2(phase * shifted, norm="ortho"), fft2c(image), atol=1e-11)
    back = torch.fft.fftshift(phase.conj() * torch.fft.ifft2(image, norm="ortho"), dim=(-2, -1))
    assert torch.allclose(back, ifft2c(image), atol=1e-11)


def test_single_precision_stays_single():
    image = field(5, 6, dtype=torch.complex64)
    assert fft2c(image).dtype == ifft2c(image).dtype == torch.complex64
