import pytest
import torch

from msmri.model.unet import UNet
from msmri.tensors import generators, normal_like


def small(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(**({"channels": (8, 16), "blocks_per_level": 1, "conditions": 3} | options))


def perturbed(**options):
    net = small(**options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return net.eval().requires_grad_(False)


def field(shape, seed=0):
    return normal_like(torch.zeros(shape), generators(seed, shape[0]))


@pytest.mark.parametrize("shape", [(32, 24), (17, 23), (21, 40), (5, 3), (1, 9)])
@pytest.mark.parametrize("patch", [1, 2])
def test_keeps_any_size(shape, patch):
    net = perturbed(patch=patch)
    out = net(field((2, 2, *shape)), field((2, 3), 1))
    assert out.shape == (2, 2, *shape)
    assert bool(torch.isfinite(out).all()) and float(out.std()) > 0.01


def test_starts_as_zero():
    net = small()
    assert not bool(net(field((1, 2, 16, 16)), field((1, 3))).any())


def test_channels_may_be_a_list_and_differ_in_and_out():
    net = perturbed(in_channels=3, out_channels=1, channels=[8, 8, 16])
    assert net(field((1, 3, 19, 16)), field((1, 3))).shape == (1, 1, 19, 16)
    assert net.multiple == 8


def test_number_of_parameters():
    assert sum(p.numel() for p in small().parameters()) == 46_120
    recipe = UNet(channels=(48, 80, 112), blocks_per_level=2, conditions=4, patch=2)
    assert sum(p.numel() for p in recipe.parameters()) == 3_903_240


def test_condition_matters_and_samples_do_not_mix():
    net = perturbed()
    image, condition = field((3, 2, 18, 21)), field((3, 3), 1)
    together = net(image, condition)
    alone = torch.cat([net(image[i : i + 1], condition[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    for entry in range(3):
        other = condition.clone()
        other[0, entry] += 1
        change = (net(image, other) - together).abs().amax((1, 2, 3))
        assert float(change[0]) > 1e-3 and float(change[1:].max()) < 1e-5


def test_every_parameter_learns_after_the_first_step():
    net = perturbed().requires_grad_(True)
    net(field((2, 2, 16, 16)), field((2, 3), 1)).square().mean().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert dead == []


def test_padding_is_cut_off_symmetrically():
    net = perturbed(patch=2)  # multiples of 4: 18 x 22 is padded by one pixel on every side
    image = field((1, 2, 18, 22))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode="reflect")
    condition = field((1, 3), 1)
    torch.testing.assert_close(net(image, condition), net(padded, condition)[..., 1:-1, 1:-1])
