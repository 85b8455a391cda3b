import pytest
import torch

from msmri.tensors import generators, normal_like


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_every_real_component_has_standard_deviation_one(dtype):
    noise = normal_like(torch.empty(4, 100, 100, dtype=dtype), generators(0, 4))
    assert noise.dtype == dtype
    parts = torch.view_as_real(noise).movedim(-1, 0) if dtype.is_complex else noise[None]
    for part in parts:
        assert part.std().item() == pytest.approx(1, abs=0.02)
        assert part.mean().item() == pytest.approx(0, abs=0.02)
    if dtype.is_complex:
        assert noise.abs().square().mean().item() == pytest.approx(2, abs=0.05)
        assert abs((parts[0] * parts[1]).mean().item()) < 0.02


def test_double_precision_noise_has_more_than_single_precision():
    noise = normal_like(torch.empty(1, 50, dtype=torch.float64), generators(0, 1))
    assert not torch.equal(noise, noise.float().double())


def test_a_sample_does_not_depend_on_the_batch_around_it():
    like = torch.empty(5, 3, 7, dtype=torch.complex64)
    together = normal_like(like, generators(3, 5))
    for i in range(5):
        alone = normal_like(like[:1], generators(3, 1, first=i))
        assert torch.equal(alone[0], together[i])


def test_generators_are_independent_of_how_many_are_made():
    draws = [torch.rand(4, generator=g) for g in generators(7, 6)]
    assert all(torch.equal(a, torch.rand(4, generator=g)) for a, g in zip(draws, generators(7, 3)))
    assert all(torch.equal(a, torch.rand(4, generator=g)) for a, g in zip(draws[4:], generators(7, 2, first=4)))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], torch.rand(4, generator=generators(8, 1)[0]))


def test_successive_draws_differ():
    rng = generators(0, 2)
    like = torch.empty(2, 10)
    assert not torch.equal(normal_like(like, rng), normal_like(like, rng))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    normal_like(torch.empty(2, 10), generators(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_number_of_generators_is_refused():
    with pytest.raises(ValueError, match="3 samples need as many generators, got 2"):
        normal_like(torch.empty(3, 4), generators(0, 2))
