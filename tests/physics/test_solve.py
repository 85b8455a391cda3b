import numpy as np
import pytest
import torch

from msmri.physics.operators import CoilFourier, Subsample
from msmri.physics.solve import conjugate_gradient, inner_product, largest_eigenvalue
from msmri.tensors import generators, normal_like


def systems(batch, n, dtype=torch.complex128, condition=100.0, seed=0):
    noise = normal_like(torch.empty(batch, n, n, dtype=dtype), generators(seed, batch))
    basis = torch.linalg.qr(noise)[0]
    values = torch.logspace(0, float(np.log10(condition)), n, dtype=torch.float64)
    return basis @ (values * basis.conj()).mT, values


def product(matrices):
    return lambda x: (matrices @ x[..., None])[..., 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_solves_what_a_dense_solver_solves(dtype, batch):
    matrices, _ = systems(batch, 12, dtype)
    right = normal_like(torch.empty(batch, 12, dtype=dtype), generators(1, batch))
    expected = torch.linalg.solve(matrices, right[..., None])[..., 0]
    solution = conjugate_gradient(product(matrices), right, iterations=40)
    assert torch.allclose(solution, expected, atol=1e-9)
    start = normal_like(right, generators(2, batch))
    again = conjugate_gradient(product(matrices), right, start=start, iterations=40)
    assert torch.allclose(again, expected, atol=1e-9)


def test_it_ends_after_as_many_steps_as_there_are_eigenvalues():
    basis = systems(1, 20)[0]
    vectors = torch.linalg.eigh(basis)[1]
    values = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64).repeat(7)[:20]
    matrix = vectors @ (values * vectors.conj()).mT
    right = normal_like(torch.empty(1, 20, dtype=torch.complex128), generators(1, 1))
    expected = torch.linalg.solve(matrix, right[..., None])[..., 0]
    assert torch.allclose(conjugate_gradient(product(matrix), right, iterations=3), expected, atol=1e-10)
    assert not torch.allclose(conjugate_gradient(product(matrix), right, iterations=2), expected, atol=1e-3)


def test_a_sample_does_not_depend_on_its_neighbours():
    easy, _ = systems(1, 12, condition=1.5)
    hard, _ = systems(1, 12, condition=1e4, seed=5)
    matrices = torch.cat([easy, hard])
    right = normal_like(torch.empty(2, 12, dtype=torch.complex128), generators(1, 2))
    right[0] *= 1e-6
    together = conjugate_gradient(product(matrices), right, iterations=60, tolerance=1e-3)
    for i in range(2):
        alone = conjugate_gradient(product(matrices[i : i + 1]), right[i : i + 1], iterations=60, tolerance=1e-3)
        assert torch.equal(alone[0], together[i])
    residual = (right - product(matrices)(together)).norm(dim=1) / right.norm(dim=1)
    assert (residual <= 1e-3).all()
    assert residual[0] > 1e-9  # the easy one stopped in time


def test_it_stops_at_the_tolerance_and_calls_no_more():
    matrices, _ = systems(1, 30, condition=1e3)
    right = normal_like(torch.empty(1, 30, dtype=torch.complex128), generators(1, 1))
    calls = []

    def normal(x):
        calls.append(1)
        return product(matrices)(x)

    conjugate_gradient(normal, right, iterations=1000, tolerance=1e-2)
    loose = len(calls)
    conjugate_gradient(normal, right, iterations=1000, tolerance=1e-6)
    assert 1 < loose < len(calls) - loose < 100
    calls.clear()
    conjugate_gradient(normal, right, iterations=4)
    assert len(calls) == 4


def test_a_zero_right_side_and_a_singular_operator_stay_finite():
    right = torch.zeros(2, 5, dtype=torch.complex64)
    right[1] = 1
    solution = conjugate_gradient(lambda x: x, right, iterations=3)
    assert torch.equal(solution, right)
    blind = conjugate_gradient(torch.zeros_like, right, iterations=3)
    assert not blind.any()


def test_images_of_any_rank():
    maps = normal_like(torch.empty(2, 1, 4, 9, 7, dtype=torch.complex128), generators(0, 2))
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[..., 1::3] = False
    operator = Subsample(mask) @ CoilFourier(maps)
    image = normal_like(torch.empty(2, 1, 9, 7, dtype=torch.complex128), generators(1, 2))
    found = conjugate_gradient(operator.normal, operator.adjoint(operator(image)), iterations=200)
    assert torch.allclose(found, image, atol=1e-6)


def test_inner_product_is_the_real_part_per_sample():
    a, b = (normal_like(torch.empty(3, 4, 5, dtype=torch.complex128), generators(s, 3)) for s in (0, 1))
    expected = [np.vdot(a[i].numpy(), b[i].numpy()).real for i in range(3)]
    assert inner_product(a, b).shape == (3, 1, 1)
    np.testing.assert_allclose(inner_product(a, b).flatten().numpy(), expected)
    np.testing.assert_allclose(inner_product(a.real, b.real).flatten(), (a.real * b.real).sum((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_largest_eigenvalue_is_numpys(dtype):
    matrices, _ = systems(3, 10, dtype)
    matrices = matrices * torch.tensor([1.0, 5.0, 0.02])[:, None, None]
    like = torch.empty(3, 10, dtype=dtype)
    found = largest_eigenvalue(product(matrices), like, generators(0, 3), iterations=500, tolerance=1e-10)
    expected = [np.linalg.eigvalsh(m.numpy())[-1] for m in matrices]
    assert found.shape == (3,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert (found.numpy() <= np.array(expected) * (1 + 1e-12)).all()


def test_largest_eigenvalue_of_an_encoding_is_the_largest_power_of_its_maps():
    maps = normal_like(torch.empty(2, 1, 4, 6, 5, dtype=torch.complex64), generators(0, 2))
    found = largest_eigenvalue(
        CoilFourier(maps).normal,
        torch.empty(2, 1, 6, 5, dtype=torch.complex64),
        generators(1, 2),
        iterations=3000,
        tolerance=1e-8,
    )
    power = maps.abs().square().sum((1, 2)).amax((1, 2))
    assert torch.allclose(found, power, rtol=1e-3)
