import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from msmri.errors import InputError
from msmri.model.ambient import AmbientDenoiser, FurtherLines, FurtherPixels, ImageDenoiser
from msmri.model.denoiser import ComplexChannels, Preconditioned
from msmri.model.unet import UNet
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.tensors import generators, normal_like
from msmri.testing import check_denoiser


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.complex64):
    return normal_like(torch.zeros(*shape, dtype=dtype), generators(seed, shape[0]))


class Seen(nn.Module):
    """A network that answers with a linear mix of what it sees, and keeps what it was shown."""

    def __init__(self, out=2):
        super().__init__()
        self.out = out

    def forward(self, planes, condition):
        self.planes, self.condition = planes, condition
        return planes[:, : self.out] + 0.1 * planes[:, self.out : self.out + 1]


# further masks


@pytest.mark.parametrize(
    ("width", "acceleration", "dropped"),
    [(320, 2, 54), (320, 4, 16), (320, 6, 8), (320, 8, 5), (256, 2, 43), (256, 4, 13), (256, 6, 6), (256, 8, 4)],
)
def test_published_counts(width, acceleration, dropped):
    law = FurtherLines(acceleration, centre_fraction=20 / width)
    assert law.count(width) == dropped
    lines, centre = width // acceleration, slice(width // 2 - 10, width // 2 + 10)
    mask = torch.zeros(1, 1, width, dtype=torch.bool)
    mask[..., centre] = True
    outer = (~mask).flatten().nonzero().flatten()
    mask[..., outer[torch.randperm(len(outer), generator=stream())[: lines - 20]]] = True
    further = law(mask, stream(1))
    assert int(mask.sum()) == lines and int(further.sum()) == lines - dropped
    assert bool(further[..., centre].all()) and not bool((further & ~mask).any())


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 90), st.floats(1, 12), st.floats(0, 1), st.integers(0, 99))
def test_further_lines_of_any_mask(width, acceleration, share, seed):
    law = FurtherLines(acceleration)
    mask = torch.rand(1, 1, width, generator=stream(seed)) < share
    kept = mask.clone()
    further = law(mask, stream(seed))
    centre = round(width * 20 / 256)
    inner = torch.zeros(width, dtype=torch.bool)
    inner[width // 2 - centre // 2 : width // 2 - centre // 2 + centre] = True
    assert torch.equal(mask, kept) and further.dtype == torch.bool and not bool((further & ~mask).any())
    assert torch.equal(further[..., inner], mask[..., inner])
    outer = int((mask & ~inner).sum())
    expected = min(outer, math.floor(width / acceleration) - math.floor(width / (acceleration + 1)))
    assert int(mask.sum()) - int(further.sum()) == expected
    assert torch.equal(law(mask, stream(seed)), further)


def test_every_outer_line_goes_as_often():
    law, mask = FurtherLines(4.0), torch.ones(1, 1, 40, dtype=torch.bool)
    gone = torch.stack([~law(mask, generator)[0, 0] for generator in generators(0, 4000)]).double().mean(0)
    outer = torch.ones(40, dtype=torch.bool)
    outer[20 - 1 : 20 + 2] = False  # 3 of 40 centre lines
    assert not bool(gone[~outer].any())
    torch.testing.assert_close(gone[outer], torch.full((37,), 2 / 37, dtype=torch.float64), atol=0.016, rtol=0)


def test_two_dimensional_masks_lose_whole_columns():
    mask = torch.rand(1, 12, 30, generator=stream()) < 0.7
    further = FurtherLines(2.0)(mask, stream())
    gone = (mask & ~further).any(-2)
    assert int(gone.sum()) == 15 - 10 and not bool((further & gone[:, None]).any())


def test_further_pixels():
    mask = torch.rand(1, 200, 150, generator=stream()) < 0.4
    further = FurtherPixels(0.1)(mask, stream(1))
    assert not bool((further & ~mask).any())
    assert float(further.sum() / mask.sum()) == pytest.approx(0.9, abs=0.01)
    assert torch.equal(FurtherPixels(0.0)(mask, stream()), mask)


def test_any_number_of_further_lines():
    law, mask = FurtherLines(2.0, varied=True), torch.ones(1, 1, 40, dtype=torch.bool)
    gone = [40 - int(law(mask, stream(seed)).sum()) for seed in range(400)]
    assert law.count(40) == 7 and set(gone) == set(range(1, 8))
    assert max(gone.count(n) for n in range(1, 8)) < 90
    assert int(FurtherLines(2.0)(mask, stream()).sum()) == 33


@pytest.mark.parametrize("make", [lambda: FurtherLines(0.5), lambda: FurtherLines(4, 1.5), lambda: FurtherPixels(1.0)])
def test_refused_laws(make):
    with pytest.raises(InputError):
        make()


# the ambient network


def test_preconditioning_without_aliasing_is_edms():
    sigma = torch.tensor([0.02, 0.3, 1.0, 9.0]).reshape(-1, 1, 1, 1)
    ours, edm = AmbientDenoiser(Seen(), 0.4, aliasing=0.0), Preconditioned(Seen(), 0.4)
    for a, b in zip(ours.factors(sigma), edm.factors(sigma)):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.weight(sigma), edm.weight(sigma))


def test_output_scale_is_the_expected_error_with_aliasing():
    # x0 - c_skip u for u = x0 - alias + sigma n with independent x0, alias, n, cos of c_skip chosen for no aliasing
    sd, alias, level = 0.4, 0.15, 0.2
    model = AmbientDenoiser(Seen(), sd, aliasing=alias)
    c = model.factors(torch.tensor(level))
    skip = sd**2 / (sd**2 + level**2)
    expected = (1 - skip) ** 2 * sd**2 + skip**2 * (level**2 + alias**2)
    assert float(c.out**2) == pytest.approx(expected) and float(model.weight(torch.tensor(level))) * expected == (
        pytest.approx(1)
    )
    assert float(model.weight(torch.tensor(1e-6))) == pytest.approx(1 / (alias**2 + 0.01**2), rel=1e-2)


@pytest.mark.parametrize("shape", [(3, 1, 9, 12), (2, 2, 8, 7)])
def test_the_written_out_equation(shape):
    network = Seen()
    model = AmbientDenoiser(network, 0.5, aliasing=0.2)
    u, sigma = normal(*shape), torch.linspace(0.1, 2.0, shape[0]).reshape(-1, 1, 1, 1)
    mask = torch.rand(shape[0], 1, 1, shape[-1], generator=stream()) < 0.5
    got = model(u, mask, sigma, Identity())
    skip, scale = 0.25 / (sigma**2 + 0.25), (sigma**2 + 0.25) ** -0.5
    out = (sigma**2 * skip + (0.2 * skip) ** 2) ** 0.5
    change = scale * (u + 0.1 * mask * (1 + 1j))
    torch.testing.assert_close(got, skip * u + out * change)
    assert network.planes.shape == (shape[0] * shape[1], 4, *shape[2:])
    assert network.condition.shape == (shape[0] * shape[1], 1)
    torch.testing.assert_close(network.condition[:: shape[1], 0], sigma.flatten().log() / 4)
    wide = scale.repeat_interleave(shape[1], 0).expand(-1, 1, *shape[2:])
    torch.testing.assert_close(network.planes[:, 3:], wide.contiguous())
    # each set is an image of its own
    alone = torch.cat([model(u[:, i : i + 1], mask, sigma, Identity()) for i in range(shape[1])], 1)
    torch.testing.assert_close(got, alone)


def test_photographs_keep_their_channels_together():
    network = Seen(3)
    model = AmbientDenoiser(network, 0.5, aliasing=0.0)
    u, mask = normal(2, 3, 6, 8, dtype=torch.float32), torch.rand(1, 1, 6, 8, generator=stream()) < 0.5
    assert model(u, mask, 0.7, Identity()).dtype == torch.float32 and network.planes.shape == (2, 5, 6, 8)
    torch.testing.assert_close(network.planes[:, 3:4], (mask / (0.49 + 0.25) ** 0.5).expand(2, -1, -1, -1))


def test_levels_below_the_lowest_are_taken_for_it():
    model, u = AmbientDenoiser(Seen(), 0.5, sigma_min=0.05), normal(2, 1, 6, 8)
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    at = {level: model(u, mask, level, Identity()) for level in (0.001, 0.05, 0.06)}
    assert torch.equal(at[0.001], at[0.05]) and not torch.equal(at[0.06], at[0.05])


def small(in_channels, out_channels=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(in_channels, out_channels, (8, 16), blocks_per_level=1, conditions=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=stream(3)))
    return network.requires_grad_(False)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_with_a_real_network(bfloat16):
    model = AmbientDenoiser(small(4), 0.5, bfloat16=bfloat16)
    u = normal(2, 1, 13, 18)
    mask = torch.rand(2, 1, 1, 18, generator=stream()) < 0.5
    levels = torch.tensor([0.1, 1.0]).reshape(-1, 1, 1, 1)
    got = model(u, mask, levels, Identity())
    assert got.shape == u.shape and got.dtype == u.dtype and bool(torch.isfinite(got.abs()).all())
    for i, level in enumerate((0.1, 1.0)):
        torch.testing.assert_close(
            got[i], model(u[i : i + 1], mask[i : i + 1], level, Identity())[0], rtol=2e-2, atol=2e-2
        )
    assert not torch.allclose(got, model(u, ~mask, levels, Identity()), atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 1, 7, 10), (3, 2, 6, 5)])
def test_solved_images_take_the_place_of_aliased_ones(shape):
    maps = normal(shape[0], shape[1], 3, *shape[2:]) / 3
    encoding = CoilFourier(maps)
    mask = torch.rand(shape[0], 1, 1, shape[-1], generator=stream()) < 0.6
    sigma, known = torch.linspace(0.1, 2.0, shape[0]).reshape(-1, 1, 1, 1), Subsample(mask) @ encoding
    network, plain = Seen(), Seen()
    size = shape[1] * shape[2] * shape[3]
    # more steps than unknowns: the solve is exact but for rounding
    model = AmbientDenoiser(network, 0.5, aliasing=0.2, iterations=2 * size, damping=0.1)
    image = normal(*shape)
    u = known.normal(image) + 0.1 * image
    torch.testing.assert_close(model.begin(u, mask, encoding), image, rtol=1e-4, atol=1e-4)
    original = AmbientDenoiser(plain, 0.5, aliasing=0.2)
    assert original.begin(u, mask, encoding) is u
    torch.testing.assert_close(
        model(u, mask, sigma, encoding), original(image, mask, sigma, encoding), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(network.planes, plain.planes, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        model.idle(u, mask, sigma, encoding), 0.25 / (sigma**2 + 0.25) * image, atol=1e-4, rtol=1e-4
    )


def test_few_steps_of_the_solve_are_conjugate_gradients():
    encoding, mask = CoilFourier(normal(1, 1, 3, 8, 9)), torch.rand(1, 1, 1, 9, generator=stream()) < 0.5
    known, u = Subsample(mask) @ encoding, normal(1, 1, 8, 9)
    model = AmbientDenoiser(Seen(), iterations=1, damping=0.3)
    energy = (known(u).abs().square().sum() + 0.3 * u.abs().square().sum()) / u.abs().square().sum()
    torch.testing.assert_close(model.begin(u, mask, encoding), u / energy)


@pytest.mark.parametrize(("sigma_data", "aliasing", "sigma_min"), [(0, 0.1, 0.01), (0.5, -1, 0.01), (0.5, 0.1, 0)])
def test_refused_deviations(sigma_data, aliasing, sigma_min):
    with pytest.raises(InputError):
        AmbientDenoiser(Seen(), sigma_data, aliasing=aliasing, sigma_min=sigma_min)


@pytest.mark.parametrize(("iterations", "damping"), [(-1, 0.1), (3, -0.1)])
def test_refused_solves(iterations, damping):
    with pytest.raises(InputError):
        AmbientDenoiser(Seen(), iterations=iterations, damping=damping)


# the oracle's network


def test_image_denoiser_is_a_denoiser():
    model = ImageDenoiser(small(2), 0.5)
    check_denoiser(model)
    check_denoiser(ImageDenoiser(small(3, 3), 0.5), shapes=((3, 16, 16), (3, 17, 22)), dtype=torch.float32)
    sets = normal(2, 2, 10, 12)
    torch.testing.assert_close(
        model.denoise(sets, 0.3), torch.cat([model.denoise(sets[:, i : i + 1], 0.3) for i in (0, 1)], 1)
    )


def test_image_denoiser_is_edms_around_the_same_network():
    class Affine(nn.Module):
        def forward(self, planes, condition):
            return 0.3 * planes + condition.reshape(-1, 1, 1, 1)

    noisy, sigma = normal(3, 1, 6, 8), torch.tensor([0.01, 0.5, 4.0]).reshape(-1, 1, 1, 1)
    expected = Preconditioned(ComplexChannels(Affine()), 0.3).denoise(noisy, sigma)
    torch.testing.assert_close(ImageDenoiser(Affine(), 0.3).denoise(noisy, sigma), expected)
