import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from msmri.errors import InputError
from msmri.interop import deepinv as to_deepinv
from msmri.interop import fastmri as to_fastmri
from msmri.interop.sigpy import to_linop
from msmri.io.fastmri import open_scan, write_scan
from msmri.methods.cg_sense import CGSense
from msmri.methods.zero_filled import ZeroFilled
from msmri.model.denoiser import GaussianDenoiser
from msmri.model.unrolled import Unrolled
from msmri.physics.espirit import Espirit
from msmri.physics.masks import LAWS, FastMRIEquispaced, PoissonDisc, RandomLines
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.physics.simulate import coil_maps
from msmri.tensors import generators, normal_like
from msmri.testing import (
    check_denoiser,
    check_mask_law,
    check_reconstructor,
    phantom_measurement,
)


def field(*shape, seed=0):
    return normal_like(torch.empty(1, *shape, dtype=torch.complex64), generators(seed, 1))[0]


def mask(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


# DeepInverse


def test_channels_and_back():
    image, kspace = field(2, 3, 5, 6), field(2, 4, 5, 6)
    assert torch.equal(to_deepinv.to_channels(image)[:, :3], image.real)
    assert torch.equal(to_deepinv.to_channels(image)[:, 3:], image.imag)
    assert torch.equal(to_deepinv.from_channels(to_deepinv.to_channels(image)), image)
    assert to_deepinv.to_coils(kspace).shape == (2, 2, 4, 5, 6)
    assert torch.equal(to_deepinv.to_coils(kspace)[:, 1], kspace.imag)
    assert torch.equal(to_deepinv.from_coils(to_deepinv.to_coils(kspace)), kspace)
    with pytest.raises(ValueError, match="3 channels are not pairs"):
        to_deepinv.from_channels(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("sets", [1, 2])
def test_our_operator_as_linear_physics(sets):
    operator = Subsample(mask(2, 1, 1, 7)) @ CoilFourier(field(2, sets, 3, 6, 7))
    physics = to_deepinv.to_physics(operator)
    x = to_deepinv.to_channels(field(2, sets, 6, 7, seed=1))
    assert abs(float(physics.adjointness_test(x))) < 1e-3 * float(x.norm())
    assert torch.allclose(physics.A_adjoint_A(x), physics.A_adjoint(physics.A(x)), atol=1e-5)
    assert torch.equal(physics.A(x), physics(x))


def test_our_physics_is_theirs():
    from deepinv.physics import MultiCoilMRI

    maps, lines = field(2, 1, 3, 6, 7), mask(2, 1, 1, 7)
    theirs = MultiCoilMRI(mask=lines.expand(-1, -1, 6, 7).float(), coil_maps=maps[:, 0], img_size=(6, 7))
    ours = to_deepinv.to_physics(Subsample(lines) @ CoilFourier(maps))
    x = to_deepinv.to_channels(field(2, 1, 6, 7, seed=1))
    y = theirs.A(x)
    assert torch.allclose(ours.A(x), y, atol=1e-5)
    assert torch.allclose(ours.A_adjoint(y), theirs.A_adjoint(y), atol=1e-5)
    back = to_deepinv.from_physics(theirs)
    assert torch.equal(back.outer.mask, lines)
    assert torch.equal(back.inner.maps, maps)
    assert to_deepinv.from_physics(ours) is ours.operator


def test_their_solvers_run_on_our_physics():
    given = phantom_measurement((20, 18), noise_std=0.0)
    full = CoilFourier(given.encoding.maps)
    operator = Subsample(torch.ones(1, 1, 1, 18, dtype=torch.bool)) @ full
    image = field(2, 1, 20, 18)
    solution = to_deepinv.to_physics(operator).A_dagger(to_deepinv.to_coils(operator(image)))
    assert torch.allclose(to_deepinv.from_channels(solution), image, atol=1e-2)


def test_noise_is_added_to_what_is_measured_alone():
    lines = mask(1, 1, 1, 40)
    physics = to_deepinv.to_physics(Subsample(lines) @ CoilFourier(field(1, 1, 8, 30, 40)), noise_std=0.3)
    y = to_deepinv.from_coils(physics(torch.zeros(1, 2, 30, 40)))
    full = lines.expand_as(y)
    assert not y[~full].any()
    assert y[full].real.std().item() == pytest.approx(0.3, rel=0.05)
    assert y[full].imag.std().item() == pytest.approx(0.3, rel=0.05)


def test_other_physics_is_refused():
    from deepinv.physics import Inpainting

    with pytest.raises(InputError, match="Inpainting is not multi-coil MRI"):
        to_deepinv.from_physics(Inpainting((1, 4, 4)))


def test_our_denoiser_is_one_of_theirs():
    prior = GaussianDenoiser(torch.full((1, 6, 7), 0.3 + 0.1j), torch.full((1, 6, 7), 0.5))
    wrapped = to_deepinv.to_denoiser(prior)
    noisy = field(2, 1, 6, 7)
    x = to_deepinv.to_channels(noisy)
    assert torch.allclose(to_deepinv.from_channels(wrapped(x, 0.4)), prior.denoise(noisy, 0.4))
    levels = torch.tensor([0.2, 0.9])
    expected = prior.denoise(noisy, levels[:, None, None, None])
    assert torch.allclose(to_deepinv.from_channels(wrapped(x, levels)), expected)
    scaled = to_deepinv.to_denoiser(prior, scale=50.0)
    assert torch.allclose(50 * to_deepinv.from_channels(scaled(x / 50, 0.4 / 50)), prior.denoise(noisy, 0.4), atol=1e-5)


def test_our_method_is_a_reconstructor_of_theirs():
    from deepinv.physics import GaussianNoise, MultiCoilMRI

    given = phantom_measurement((24, 20))
    y = to_deepinv.to_coils(given.values)
    expected = CGSense()(given, generators(0, 2)).image
    ours = to_deepinv.to_physics(given.operator, noise_std=0.01)
    full_mask = given.mask.expand(-1, -1, 24, 20).float()
    theirs = MultiCoilMRI(full_mask, given.encoding.maps[:, 0], img_size=(24, 20), noise_model=GaussianNoise(0.01))
    seen = []

    def method(measurement, rng):
        seen.append(measurement)
        return CGSense()(measurement, rng)

    model = to_deepinv.to_reconstructor(method)
    for physics in (ours, theirs):
        x = model(y, physics)
        assert x.shape == (2, 2, 24, 20)
        assert torch.allclose(to_deepinv.from_channels(x)[:, 0], expected, atol=1e-5)
    assert [m.noise_std for m in seen] == pytest.approx([0.01, 0.01])
    assert seen[1].mask.shape == given.mask.shape
    assert all(m.target is None for m in seen)


@pytest.mark.parametrize("shape", [(20, 18), (13, 16)])
@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("mu", [0.05, 0.7])
def test_unrolled_consistency_is_their_prox(shape, lines, mu):
    """Their prox of gamma |A x - y|^2 / 2 at z solves (A^H A + 1 / gamma) x = A^H y + z / gamma: gamma is 1 / mu."""
    import deepinv

    maps = coil_maps(shape, 3, torch.Generator().manual_seed(1)).expand(2, -1, -1, -1, -1)
    sampled = mask(2, 1, 1 if lines else shape[0], shape[1], seed=2)
    operator = Subsample(sampled) @ CoilFourier(maps)
    values = operator(field(2, 1, *shape)) + 0.1 * Subsample(sampled)(field(2, 3, *shape, seed=3))
    prior, full = field(2, 1, *shape, seed=4), sampled.expand(-1, -1, *shape).float()
    theirs = deepinv.physics.MultiCoilMRI(full, maps[:, 0], img_size=(2, *shape), max_iter=200, tol=1e-7)
    fidelity = deepinv.optim.data_fidelity.L2()
    right = fidelity.prox(to_deepinv.to_channels(prior), to_deepinv.to_coils(values), theirs, gamma=1 / mu)
    right = to_deepinv.from_channels(right)
    for warm in (False, True):
        model = Unrolled(torch.nn.Identity(), mu=mu, cg_iterations=60, warm_start=warm)
        found = model.consistency(prior, operator.adjoint(values), operator).detach()
        assert float((found - right).norm() / right.norm()) < 1e-4
    once = Unrolled(torch.nn.Identity(), mu=mu, cg_iterations=60, unrolls=1)  # z is the zero-filled image itself
    zero_filled = theirs.A_adjoint(to_deepinv.to_coils(values))
    right = fidelity.prox(zero_filled, to_deepinv.to_coils(values), theirs, gamma=1 / mu)
    found = once(values, sampled, CoilFourier(maps)).detach()
    assert float((to_deepinv.to_channels(found) - right).norm() / right.norm()) < 1e-4


# SigPy


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("shape", [(8, 8), (7, 10)])
def test_our_operator_as_a_linop(sets, shape):
    operator = Subsample(mask(1, 1, 1, shape[1])) @ CoilFourier(field(1, sets, 3, *shape))
    linop = to_linop(operator)
    image = field(1, sets, *shape, seed=1)
    kspace = field(1, 3, *shape, seed=2)
    inside = shape if sets == 1 else (sets, *shape)
    assert tuple(linop.ishape) == inside
    assert tuple(linop.oshape) == (3, *shape)
    x = image[0].numpy().reshape(inside)
    np.testing.assert_array_equal(linop(x), operator(image)[0].numpy())
    np.testing.assert_array_equal(linop.H(kspace[0].numpy()), operator.adjoint(kspace)[0].numpy().reshape(inside))
    np.testing.assert_allclose(linop.N(x), linop.H(linop(x)), atol=1e-5)
    np.testing.assert_allclose(linop.H.N(kspace[0].numpy()), linop(linop.H(kspace[0].numpy())), atol=1e-5)
    np.testing.assert_array_equal(linop.H.H(x), linop(x))


def test_it_is_sigpys_sense_and_their_apps_take_it():
    import sigpy
    import sigpy.mri

    given = phantom_measurement((24, 20), slices=1)
    linop = to_linop(given.operator)
    maps = given.encoding.maps[0, 0].numpy()
    sense = sigpy.mri.linop.Sense(maps, weights=given.mask[0].numpy().astype(np.float32))
    x = field(24, 20).numpy()
    np.testing.assert_allclose(linop(x), sense(x), atol=1e-5)
    app = sigpy.app.LinearLeastSquares(linop, given.values[0].numpy(), lamda=0.01, max_iter=60, show_pbar=False)
    ours = CGSense(weight=0.01, iterations=60)(given, generators(0, 1)).image[0]
    np.testing.assert_allclose(app.run(), ours.numpy(), atol=2e-3)


def test_several_slices_and_unknown_shapes_are_refused():
    with pytest.raises(InputError, match=r"2,.* slices is no Linop"):
        to_linop(CoilFourier(field(2, 1, 3, 4, 5)))
    with pytest.raises(InputError, match=r"2,.* slices is no Linop"):
        to_linop(Subsample(mask(2, 1, 1, 5)) @ CoilFourier(field(1, 1, 3, 4, 5)))
    with pytest.raises(InputError, match="shape of its image"):
        to_linop(Identity())
    linop = to_linop(Subsample(mask(1, 1, 5)), shape=(3, 4, 5))
    assert tuple(linop.ishape) == tuple(linop.oshape) == (3, 4, 5)


# fastMRI


def test_pairs_and_back():
    values = field(2, 3, 4)
    assert to_fastmri.to_pairs(values).shape == (2, 3, 4, 2)
    assert torch.equal(to_fastmri.to_pairs(values)[..., 1], values.imag)
    assert torch.equal(to_fastmri.from_pairs(to_fastmri.to_pairs(values)), values)
    assert torch.equal(to_fastmri.from_pairs(to_fastmri.to_pairs(values.conj())), values.conj())


@pytest.mark.parametrize("name", LAWS)
def test_every_law_is_a_mask_func(name):
    from fastmri.data.subsample import MaskFunc
    from fastmri.data.transforms import apply_mask

    law = LAWS[name].example()
    draw = to_fastmri.to_mask_func(law, seed=1)
    assert isinstance(draw, MaskFunc)
    data = to_fastmri.to_pairs(field(3, 24, 41))
    masked, drawn, n_centre = apply_mask(data, draw, seed=(1, 2, 3))
    assert drawn.shape == (1, 1 if law.lines else 24, 41, 1)
    assert drawn.dtype == torch.float32
    assert n_centre == law.centre_size((24, 41))[1]
    assert torch.equal(masked != 0, (drawn * data) != 0)
    assert torch.equal(draw(data.shape, seed=(1, 2, 3))[0], drawn)
    assert not all(torch.equal(draw(data.shape)[0], draw(data.shape)[0]) for _ in range(10))
    again = pickle.loads(pickle.dumps(draw))
    assert torch.equal(again(data.shape, seed=(1, 2, 3))[0], drawn)


def test_a_law_of_fastmri_is_fastmris_own():
    from fastmri.data.subsample import EquiSpacedMaskFunc

    theirs = EquiSpacedMaskFunc([0.08], [4])
    ours = to_fastmri.to_mask_func(FastMRIEquispaced(4, centre_fraction=0.08))
    for seed in [(1, 2), 7, (3,)]:
        assert torch.equal(ours((1, 20, 64, 2), seed=seed)[0], theirs((1, 20, 64, 2), seed=seed)[0])
    assert torch.equal(ours((1, 20, 64, 2), offset=2, seed=0)[0], theirs((1, 20, 64, 2), offset=2, seed=0)[0])
    with pytest.raises(ValueError, match="no offset"):
        to_fastmri.to_mask_func(RandomLines(4))((1, 20, 64, 2), offset=2)
    with pytest.raises(ValueError, match="shape must be"):
        ours((64, 2))


def test_slice_dataset_gives_measurements(tmp_path):
    from fastmri.data import SliceDataset

    given = phantom_measurement((24, 20), slices=3, noise_std=0.01)
    full = given.encoding(given.target[:, None].to(torch.complex64))
    write_scan(tmp_path / "scan.h5", full, target=given.target)
    law = RandomLines(3, centre_fraction=0.3)
    data = SliceDataset(tmp_path, "multicoil", transform=to_fastmri.MeasurementTransform(law, seed=5))
    slices = list(torch.utils.data.DataLoader(data, batch_size=None))
    assert [m.source for m in slices] == [(f"scan.h5#{i}",) for i in range(3)]
    for i, measurement in enumerate(slices):
        assert measurement.values.shape == (1, 4, 24, 20)
        assert measurement.mask.shape == (1, 1, 1, 20)
        assert torch.allclose(measurement.values, Subsample(measurement.mask)(full[i : i + 1]))
        assert torch.equal(measurement.target, given.target[i : i + 1])
        assert torch.equal(data[i].mask, measurement.mask)  # the same again, whatever the order
    assert not all(torch.equal(slices[0].mask, m.mask) for m in slices[1:])
    other = to_fastmri.MeasurementTransform(law, seed=6)
    redrawn = [SliceDataset(tmp_path, "multicoil", transform=other)[i].mask for i in range(3)]
    assert not all(torch.equal(m.mask, new) for m, new in zip(slices, redrawn))
    with_maps = to_fastmri.MeasurementTransform(law, coils=Espirit(crop=0.0))
    measurement = SliceDataset(tmp_path, "multicoil", transform=with_maps)[1]
    assert ZeroFilled()(measurement, generators(0, 1)).image.shape == (1, 24, 20)


def test_slice_dataset_and_our_reader_agree(tmp_path):
    from fastmri.data import SliceDataset

    given = phantom_measurement((48, 20), slices=2)
    kspace = given.values.clone()
    kspace[..., :2], kspace[..., -3:] = 0, 0
    stored = given.mask[0, 0, 0].clone()
    stored[:2], stored[-3:] = True, True  # fastMRI's masks count the margins as sampled
    kspace = Subsample(stored[None, None, None])(kspace)
    from msmri.io.header import Header

    header = Header((48, 20), (24, 20), 8, 14)  # two columns missing at the left, three at the right
    write_scan(tmp_path / "test.h5", kspace, mask=stored, header=header)
    with open_scan(tmp_path / "test.h5") as scan:
        data = SliceDataset(tmp_path, "multicoil", transform=to_fastmri.MeasurementTransform())
        for i in range(2):
            ours, theirs = scan.read(i), data[i]
            assert theirs.values.shape == (1, 4, 24, 20)
            assert not theirs.mask[..., :2].any()
            assert not theirs.mask[..., -3:].any()
            assert theirs.source == ours.source
            assert torch.allclose(theirs.values, ours.values)
        whole = to_fastmri.MeasurementTransform(crop=False)
        assert SliceDataset(tmp_path, "multicoil", transform=whole)[0].values.shape == (1, 4, 48, 20)


# the public checks themselves


@pytest.mark.parametrize("name", LAWS)
def test_every_law_passes_its_check(name):
    check_mask_law(LAWS[name].example(), slack=0.05 if name == PoissonDisc.name else 0.0)


class Overstated(RandomLines):
    def inclusion_probability(self, shape):
        return (super().inclusion_probability(shape) * 1.25).clamp_max(1)


class OffCentre(RandomLines):
    def centre(self, shape):
        return super().centre(shape).roll(2, -1)


class Unseeded(RandomLines):
    def draw(self, shape, rng):
        return super().draw(shape, torch.default_generator)


class Floats(RandomLines):
    def draw(self, shape, rng):
        return super().draw(shape, rng).float()


@pytest.mark.parametrize(
    ("law", "message"),
    [(Overstated, "not as frequent"), (OffCentre, "centre"), (Unseeded, "global"), (Floats, "not bool")],
)
def test_the_check_finds_a_broken_law(law, message):
    with pytest.raises(AssertionError, match=message):
        check_mask_law(law(3))


def test_an_exact_denoiser_passes_its_check():
    prior = GaussianDenoiser(torch.zeros(1, 1, 1, dtype=torch.complex64), torch.ones(1, 1, 1))
    check_denoiser(prior, clean=field(2, 1, 12, 9))


class Wrong:
    def __init__(self, change):
        self.change = change

    def denoise(self, noisy, sigma):
        return self.change(noisy, torch.as_tensor(sigma))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, s: x[..., :-1], "becomes"),
        (lambda x, s: x.real, "becomes"),
        (lambda x, s: x * float("nan"), "not finite"),
        (lambda x, s: x - x.mean(0, keepdim=True), "batch"),
        (lambda x, s: x / (1 + s.mean()), "batch"),
        (lambda x, s: x.mul_(1.5), "changes its input"),
        (lambda x, s: 3 * x, "times as far"),
    ],
)
def test_the_check_finds_a_broken_denoiser(change, message):
    with pytest.raises(AssertionError, match=message):
        check_denoiser(Wrong(change), clean=field(2, 1, 12, 9))


@pytest.mark.parametrize("method", [ZeroFilled(), CGSense()])
def test_methods_pass_their_check(method):
    assert check_reconstructor(method) > 15


def cheat(measurement, rng):
    return replace(ZeroFilled()(measurement, rng), samples=measurement.target[:, None].to(torch.complex64))


def peek(measurement, rng):
    values = measurement.values + 0 * measurement.values.sum()
    return ZeroFilled()(replace(measurement, values=values), rng)


def unseeded(measurement, rng):
    result = ZeroFilled()(measurement, rng)
    return replace(result, samples=result.samples * (1 + 0.01 * torch.rand(())))


def clocked():
    calls = []

    def method(measurement, rng):
        calls.append(1)
        result = ZeroFilled()(measurement, rng)
        return replace(result, samples=result.samples * len(calls))

    return method


def own_units(measurement, rng):
    return ZeroFilled()(replace(measurement, scale=1.0), rng)


def noise(measurement, rng):
    like = torch.empty(len(measurement.values), 1, *measurement.values.shape[-2:], dtype=torch.complex64)
    return replace(ZeroFilled()(measurement, rng), samples=normal_like(like, rng) * measurement.scale * 0 + 1e-3j)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (cheat, "target"),
        (peek, "unmeasured"),
        (unseeded, "global"),
        (clocked(), "same seed"),
        (own_units, "units"),
        (noise, "noise alone"),
    ],
)
def test_the_check_finds_a_broken_method(method, message):
    with pytest.raises(AssertionError, match=message):
        check_reconstructor(method)
