import pytest
import torch

from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.sampling.likelihood import gradient_step, project, proximal
from msmri.tensors import generators, normal_like


def draw(*shape, seed=0):
    return normal_like(torch.zeros(1, *shape, dtype=torch.complex64), generators(seed, 1))


def coils(sets=1, n=4, shape=(5, 8)):
    maps, _ = torch.linalg.qr(draw(*shape, n, sets)[0])
    return CoilFourier(maps.permute(3, 2, 0, 1)[None].contiguous())


MASK = torch.tensor([True, False, True, True, False, False, True, False]).reshape(1, 1, 1, 8)


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_gradient_step_moves_measured_places_towards_the_data(weight):
    z, y = draw(4, 5, 8), draw(4, 5, 8, seed=1)
    found = gradient_step(z, torch.where(MASK, y, 0), Subsample(MASK), weight)
    torch.testing.assert_close(found, torch.where(MASK, (1 - weight) * z + weight * y, z))


def test_gradient_step_is_the_gradient_of_half_the_squared_misfit():
    operator = Subsample(MASK) @ coils()
    x, y = draw(1, 5, 8).requires_grad_(), draw(4, 5, 8, seed=1)
    (operator(x) - y).abs().square().sum().div(2).backward()
    torch.testing.assert_close(gradient_step(x.detach(), y, operator, 0.3), x.detach() - 0.3 * x.grad)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("weight", [0.03, 2.0])
def test_proximal_solves_the_normal_equations(sets, weight):
    encoding = coils(sets)
    z, y = draw(4, 5, 8), draw(4, 5, 8, seed=1)
    poisoned = torch.where(MASK, y, torch.nan)
    measurement, image = proximal(z, poisoned, MASK, encoding, weight=weight, iterations=80)
    n = sets * 40
    matrix = (Subsample(MASK) @ encoding)(torch.eye(n, dtype=torch.complex64).reshape(n, sets, 5, 8)).flatten(1).mT
    right = matrix.mH @ torch.where(MASK, y, 0).flatten() + weight * encoding.adjoint(z).flatten()
    exact = torch.linalg.solve(matrix.mH @ matrix + weight * torch.eye(n), right)
    torch.testing.assert_close(image.flatten(), exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(measurement, encoding(image))


def test_proximal_of_single_pixels_is_a_weighted_mean():
    z, y = draw(1, 5, 8), draw(1, 5, 8, seed=1)
    _, image = proximal(z, y, MASK, Identity(), weight=0.25, iterations=3)
    torch.testing.assert_close(image, torch.where(MASK, (y + 0.25 * z) / 1.25, z))


def test_proximal_takes_a_weight_a_sample_and_a_start():
    encoding, z, y = coils(), torch.cat([draw(4, 5, 8, seed=s) for s in (0, 2)]), draw(4, 5, 8, seed=1)
    weight = torch.tensor([0.1, 3.0]).reshape(2, 1, 1, 1)
    both, images = proximal(z, y.expand(2, -1, -1, -1), MASK, encoding, weight=weight, iterations=60)
    for i, w in enumerate((0.1, 3.0)):
        alone, _ = proximal(z[i : i + 1], y, MASK, encoding, weight=w, iterations=60)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    again, _ = proximal(z, y.expand(2, -1, -1, -1), MASK, encoding, weight=weight, iterations=1, start=images)
    torch.testing.assert_close(again, both, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sets", [1, 2])
def test_project_keeps_what_images_produce_and_nothing_else(sets):
    encoding = coils(sets)
    made = encoding(draw(sets, 5, 8, seed=4))
    torch.testing.assert_close(project(made, encoding), made, rtol=1e-4, atol=1e-5)
    noisy = draw(4, 5, 8)
    once = project(noisy, encoding)
    torch.testing.assert_close(project(once, encoding), once, rtol=1e-4, atol=1e-5)
    power = float(once.abs().square().mean() / noisy.abs().square().mean())
    assert power == pytest.approx(sets / 4, abs=0.1)  # as many of the four coils' dimensions as there are sets
