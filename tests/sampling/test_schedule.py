import pytest
import torch

from msmri.model.denoiser import VPSchedule
from msmri.sampling.schedule import ancestral, geometric, karras, vp


def test_karras_is_the_published_formula():
    n, high, low, rho = 18, 80.0, 0.002, 7
    expected = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    assert karras(high, low, n).tolist() == pytest.approx(expected)
    assert karras(3.0, 0.1, 1).tolist() == pytest.approx([3.0])


def test_geometric_divides_by_one_factor():
    assert geometric(100.0, 0.01, 5).tolist() == pytest.approx([100, 10, 1, 0.1, 0.01])


def test_vp_takes_every_fifth_level_of_a_thousand():
    trained = VPSchedule().sigmas
    assert torch.equal(vp(200, trained), trained[list(range(995, -1, -5))])
    assert torch.equal(vp(1000, trained), trained.flip(0))
    assert len(vp(300, trained)) == 300
    with pytest.raises(ValueError, match="1000"):
        vp(1001, trained)


def test_ancestral_is_the_variance_of_the_reverse_step():
    sigmas = torch.tensor([4.0, 2.0, 0.5])
    fresh = (ancestral(sigmas) * torch.tensor([2.0, 0.5, 0.0])).square()
    # s_up^2 = s_next^2 (s^2 - s_next^2) / s^2
    assert fresh.tolist() == pytest.approx([4 * 12 / 16, 0.25 * 3.75 / 4, 0.0])
    torch.testing.assert_close(ancestral(sigmas, 0.5), 0.5 * ancestral(sigmas))


@pytest.mark.parametrize("ladder", [karras, geometric])
def test_impossible_ladders_are_refused(ladder):
    for arguments in ((1.0, 0.0, 5), (0.1, 1.0, 5), (float("inf"), 0.1, 5), (1.0, 0.1, 0)):
        with pytest.raises(ValueError, match="sigma_min"):
            ladder(*arguments)
