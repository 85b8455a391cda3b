import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.operators import CoilFourier, Composed, Identity, LinearOperator, Subsample
from msmri.tensors import generators, normal_like
from msmri.testing import check_adjoint

SHAPES = [(8, 8), (7, 10), (9, 5), (5, 12)]


def field(*shape, dtype=torch.complex64, seed=0):
    return normal_like(torch.empty(1, *shape, dtype=dtype), generators(seed, 1))[0]


def random_mask(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def cases():
    for y, x in SHAPES:
        for batch in [(), (1,), (3,), (2, 3)]:
            lines, places = random_mask(*batch, 1, 1, x), random_mask(*batch, 1, y, x)
            yield Identity(), (*batch, 3, y, x), (*batch, 3, y, x)
            yield Subsample(lines), (*batch, 4, y, x), (*batch, 4, y, x)
            yield Subsample(places) @ Identity(), (*batch, 4, y, x), (*batch, 4, y, x)
            for sets in (1, 2):
                encoding = CoilFourier(field(*batch, sets, 4, y, x))
                yield encoding, (*batch, sets, y, x), (*batch, 4, y, x)
                yield Subsample(lines) @ encoding, (*batch, sets, y, x), (*batch, 4, y, x)
                yield Subsample(places) @ encoding, (*batch, sets, y, x), (*batch, 4, y, x)


def test_every_operator_keeps_the_contract():
    count = 0
    for operator, domain, codomain in cases():
        assert check_adjoint(operator, domain, codomain) < 1e-6
        count += 1
    assert count == 4 * 4 * 9


def test_double_precision_is_exact_to_double_precision():
    encoding = CoilFourier(field(2, 1, 3, 7, 10, dtype=torch.complex128))
    check_adjoint(encoding, (2, 1, 7, 10), (2, 3, 7, 10), dtype=torch.complex128, tolerance=1e-13)
    check_adjoint(Subsample(random_mask(1, 1, 9)), (2, 3, 4, 9), (2, 3, 4, 9), dtype=torch.float64, tolerance=1e-13)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_any_size(y, x, coils, sets, batch):
    operator = Subsample(random_mask(batch, 1, 1, x)) @ CoilFourier(field(batch, sets, coils, y, x))
    check_adjoint(operator, (batch, sets, y, x), (batch, coils, y, x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sets", [1, 2])
def test_coil_fourier_is_what_it_says(shape, sets):
    maps, image = field(3, sets, 4, *shape), field(3, sets, *shape, seed=1)
    coils = sum(maps[:, s] * image[:, s, None] for s in range(sets))
    encoding = CoilFourier(maps)
    assert torch.allclose(encoding(image), fft2c(coils), atol=1e-5)
    kspace = field(3, 4, *shape, seed=2)
    expected = torch.stack([(maps[:, s].conj() * ifft2c(kspace)).sum(1) for s in range(sets)], 1)
    assert torch.allclose(encoding.adjoint(kspace), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_set_is_sigpys_sense(shape):
    import sigpy.mri

    maps, mask = field(1, 1, 4, *shape), random_mask(1, 1, 1, shape[1])
    image, kspace = field(1, 1, *shape, seed=1), field(1, 4, *shape, seed=2)
    sense = sigpy.mri.linop.Sense(maps[0, 0].numpy(), weights=mask[0].numpy().astype(np.float32))
    ours = Subsample(mask) @ CoilFourier(maps)
    np.testing.assert_allclose(ours(image)[0].numpy(), sense(image[0, 0].numpy()), atol=1e-5)
    np.testing.assert_allclose(ours.adjoint(kspace)[0, 0].numpy(), sense.H(kspace[0].numpy()), atol=1e-5)
    np.testing.assert_allclose(ours.normal(image)[0, 0].numpy(), sense.N(image[0, 0].numpy()), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_set_is_deepinvs_multicoil_mri(shape):
    from deepinv.physics import MultiCoilMRI

    maps, mask = field(2, 1, 4, *shape), random_mask(2, 1, 1, shape[1])
    image, kspace = field(2, 1, *shape, seed=1), field(2, 4, *shape, seed=2)
    theirs = MultiCoilMRI(mask=mask.expand(-1, -1, *shape).float(), coil_maps=maps[:, 0], img_size=shape)
    ours = Subsample(mask) @ CoilFourier(maps)
    seen = theirs.A(torch.view_as_real(image[:, 0]).movedim(-1, 1))
    assert torch.allclose(torch.complex(seen[:, 0], seen[:, 1]), ours(image), atol=1e-5)
    back = theirs.A_adjoint(torch.view_as_real(kspace).movedim(-1, 1))
    assert torch.allclose(torch.complex(back[:, 0], back[:, 1])[:, None], ours.adjoint(kspace), atol=1e-5)


def test_subsample_keeps_exactly_the_mask_and_lets_no_nan_through():
    mask = random_mask(2, 1, 1, 9)
    values = field(2, 3, 4, 9)
    select = Subsample(mask)
    full = mask.expand_as(values)
    assert torch.equal(select(values)[full], values[full])
    assert not select(values)[~full].any()
    poisoned = torch.where(mask, values, torch.full_like(values, float("nan")))
    assert torch.equal(select(poisoned), select(values))
    assert torch.equal(select.adjoint(poisoned), select(values))
    assert torch.equal(select.normal(poisoned), select(values))
    encoding = CoilFourier(field(2, 1, 3, 4, 9))
    assert torch.isfinite((select @ encoding).adjoint(poisoned)).all()


def test_the_shortcut_of_the_normal_operator_is_taken():
    class Spy(Identity):
        calls = 0

        def weighted_normal(self, x, weight):
            Spy.calls += 1
            return super().weighted_normal(x, weight)

    mask = random_mask(1, 1, 6)
    x = field(2, 3, 5, 6)
    assert torch.equal((Subsample(mask) @ Spy()).normal(x), Subsample(mask)(x))
    assert Spy.calls == 1


def test_composition_applies_the_inner_operator_first():
    class Double(Identity):
        def __call__(self, x):
            return 2 * x

        adjoint = __call__

    class Shift(LinearOperator):
        def __call__(self, x):
            return torch.roll(x, 1, -1)

        def adjoint(self, y):
            return torch.roll(y, -1, -1)

    mask = torch.tensor([True, False, False])[None, None]
    x = torch.tensor([1.0, 2.0, 3.0])[None, None]
    both = Subsample(mask) @ Shift()
    assert isinstance(both, Composed)
    assert both(x).tolist() == [[[3.0, 0.0, 0.0]]]
    assert (Shift() @ Subsample(mask))(x).tolist() == [[[0.0, 1.0, 0.0]]]
    assert both.adjoint(x).tolist() == [[[0.0, 0.0, 1.0]]]
    assert (Double() @ Double() @ Double())(x).tolist() == [[[8.0, 16.0, 24.0]]]
    check_adjoint(Double() @ Shift() @ Subsample(mask), (2, 1, 3), (2, 1, 3), dtype=torch.float32)


def test_maps_broadcast_over_a_batch_of_images():
    maps = field(1, 1, 3, 6, 7)
    image = field(4, 1, 6, 7)
    encoding = CoilFourier(maps)
    expected = torch.cat([encoding(image[i : i + 1]) for i in range(4)])
    assert torch.allclose(encoding(image), expected, atol=1e-6)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("weight", [(), (1, 1, 9), (3, 1, 1, 9), (3, 1, 7, 9), (3, 5, 7, 9), (5, 7, 9)])
@pytest.mark.parametrize("together", [1, 2, 4, 5])
def test_coils_in_groups_are_all_coils(monkeypatch, together, weight, sets):
    encoding, image = CoilFourier(field(1, sets, 5, 7, 9)), field(3, sets, 7, 9, seed=1)
    values = torch.rand(weight, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("msmri.physics.operators._CACHED", together * 3 * 7 * 9)
    assert len(encoding._groups(image)) == -(-5 // together)
    kept = image.clone()
    found = encoding.weighted_normal(image, values)
    assert torch.equal(image, kept)
    torch.testing.assert_close(found, encoding.adjoint(values * encoding(image)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [(4, 1, 1, 9), (1, 1, 1, 9)])
def test_a_weight_may_have_a_batch_that_the_image_has_not(weight):
    encoding, image = CoilFourier(field(1, 1, 5, 7, 9)), field(1, 1, 7, 9, seed=1)
    values = torch.rand(weight, generator=torch.Generator().manual_seed(2))
    expected = encoding.adjoint(values * encoding(image))
    torch.testing.assert_close(encoding.weighted_normal(image, values), expected, rtol=1e-5, atol=1e-5)


def test_the_more_precise_of_kspace_and_maps_decides():
    encoding = CoilFourier(field(1, 1, 3, 6, 7, dtype=torch.complex128))
    assert encoding.adjoint(field(1, 3, 6, 7)).dtype == torch.complex128
    assert CoilFourier(encoding.maps.to(torch.complex64)).adjoint(field(1, 3, 6, 7)).dtype == torch.complex64


def test_maps_and_weights_have_gradients():
    maps, image, weight = (
        field(1, 2, 4, 5, dtype=torch.complex128),
        field(1, 4, 5, dtype=torch.complex128),
        torch.rand(4, 5),
    )
    maps, image, weight = (x.detach().requires_grad_() for x in (maps, image, weight.double()))
    assert torch.autograd.gradcheck(lambda m, x, w: CoilFourier(m).weighted_normal(x, w), (maps, image, weight))
    assert torch.autograd.gradcheck(
        lambda m, y: CoilFourier(m).adjoint(y), (maps, field(2, 4, 5, dtype=torch.complex128))
    )


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="maps must be complex"):
        CoilFourier(torch.ones(1, 2, 4, 4))
    with pytest.raises(ValueError, match="maps must be complex"):
        CoilFourier(field(2, 4, 4))
    encoding = CoilFourier(field(1, 1, 2, 4, 6))
    for shape in [(1, 2, 4, 6), (1, 1, 6, 4)]:
        with pytest.raises(ValueError, match="does not fit maps"):
            encoding(field(*shape))


class WrongAdjoint(CoilFourier):
    def adjoint(self, y):
        return torch.roll(super().adjoint(y), 1, -1)


class WrongConjugate(CoilFourier):
    def adjoint(self, y):
        image = (self._shifted_maps[..., 0, :, :, :] * torch.fft.ifft2(y, norm="ortho")).sum(-3, True)
        return torch.fft.fftshift(image, dim=(-2, -1))


class WrongNormal(CoilFourier):
    def normal(self, x):
        return 1.001 * super().normal(x)


class RealPart(CoilFourier):
    def __call__(self, x):
        return super().__call__(x.real.to(x.dtype))


class Detached(CoilFourier):
    def __call__(self, x):
        return super().__call__(x).detach() + 0 * x.sum()


class InPlace(Identity):
    def __call__(self, x):
        return x.mul_(1)

    def adjoint(self, y):
        return y.add_(1e-3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WrongAdjoint, "differ by"),
        (WrongConjugate, "differ by"),
        (WrongNormal, "normal"),
        (RealPart, "differ by|not linear"),
        (Detached, "gradient"),
    ],
)
def test_the_check_finds_a_broken_operator(kind, message):
    operator = kind(field(2, 1, 3, 7, 10))
    with pytest.raises(AssertionError, match=message):
        check_adjoint(operator, (2, 1, 7, 10), (2, 3, 7, 10))


def test_the_check_finds_an_operator_that_changes_its_input():
    with pytest.raises(AssertionError, match="changes its input"):
        check_adjoint(InPlace(), (2, 3, 4), (2, 3, 4))
