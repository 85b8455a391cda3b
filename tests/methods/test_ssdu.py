from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from msmri.errors import InputError
from msmri.interop.deepinv import from_coils, to_channels, to_coils
from msmri.io import write_scan
from msmri.io.dataset import FullScans, TrainingScans
from msmri.measurement import Measurement
from msmri.methods import load_method
from msmri.methods.ssdu import SSDU, ZeroShotSSDU
from msmri.methods.ssdu_training import Split, SSDULoss, SupervisedLoss, normalised_error
from msmri.model.checkpoint import save_checkpoint
from msmri.model.unrolled import ResNet, Unrolled
from msmri.physics.espirit import Espirit
from msmri.physics.masks import RandomLines, _arrival_probability, slice_seed
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.physics.simulate import coil_maps, phantom, simulate_kspace
from msmri.tensors import generators, normal_like
from msmri.testing import check_reconstructor, phantom_measurement
from msmri.train import train

NAN = float("nan")
POINTS = ("gaussian", "uniform")
LAWS = (*POINTS, "columns")
MODEL = {
    "use": "msmri.model.unrolled:Unrolled",
    "unrolls": 2,
    "cg_iterations": 4,
    "network": {"use": "msmri.model.unrolled:ResNet", "channels": 8, "blocks": 1},
}


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def omega(shape=(24, 30), *, n=1, share=0.3, columns=False, seed=0):
    size = (n, 1, 1, shape[1]) if columns else (n, 1, *shape)
    mask = torch.rand(size, generator=stream(seed)) < share
    mask[..., shape[1] // 2 - 2 : shape[1] // 2 + 2] = True
    return mask


def network(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Unrolled(ResNet(8, 1), **({"unrolls": 2, "cg_iterations": 4} | options))


def batch_of(n=2, shape=(24, 20)):
    batch = phantom_measurement(shape, slices=n, coils=3)
    return batch.scaled(batch.centre_scale())


# splits


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(9, 40), st.integers(9, 40)),
    law=st.sampled_from(LAWS),
    ratio=st.floats(0.05, 0.6),
    share=st.floats(0.3, 1.0),
    lines=st.booleans(),
    n=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_lambda_is_an_exact_part_of_omega(shape, law, ratio, share, lines, n, seed):
    mask = omega(shape, n=n, share=share, columns=lines or law == "columns", seed=seed)
    split = Split(law, ratio)
    try:
        held = split(mask, shape, generators(seed, n))
    except InputError:  # only where it is truly out of reach
        full = mask if law == "columns" else mask.expand(-1, -1, *shape)
        width = max(1, round(split.protected_columns * shape[1])) if law == "columns" else 4
        centre = full[..., shape[1] // 2 - width // 2 : shape[1] // 2 - width // 2 + width]
        if law != "columns":
            centre = centre[..., shape[0] // 2 - 2 : shape[0] // 2 + 2, :]
        counts = full.flatten(1).sum(1)
        wanted = [round(ratio * int(count)) for count in counts]
        assert any(w == 0 or w > int(c - inner.sum()) for w, c, inner in zip(wanted, counts, centre, strict=True))
        return
    assert held.dtype == torch.bool and not bool((held & ~mask).any())
    assert held.shape == ((n, 1, 1, shape[1]) if law == "columns" else (n, 1, *shape))
    total = mask.expand(-1, -1, *held.shape[-2:]).flatten(1).sum(1)
    assert held.flatten(1).sum(1).tolist() == [round(ratio * int(count)) for count in total]
    theta = mask & ~held
    assert torch.equal(theta | (held & mask), mask.expand_as(theta)) and not bool((theta & held).any())
    middle = (slice(None), 0, slice(shape[0] // 2 - 2, shape[0] // 2 + 2), slice(shape[1] // 2 - 2, shape[1] // 2 + 2))
    if law != "columns":
        assert not bool(held[middle].any())
    assert torch.equal(held, split(mask, shape, generators(seed, n)))
    assert torch.equal(held[-1:], split(mask[-1:], shape, generators(seed, n)[-1:]))  # whatever the batch


def test_other_seeds_give_other_splits():
    mask = omega()
    for law in LAWS:
        split = Split(law)
        drawn = {split(mask, (24, 30), [stream(seed)]).flatten().numpy().tobytes() for seed in range(8)}
        assert len(drawn) > 6, law


def test_central_columns_stay():
    mask = omega((8, 64), n=50, columns=True, share=0.5)
    split = Split("columns", protected_columns=6 / 64)
    held = split(mask, (8, 64), generators(0, 50))[:, 0, 0]
    assert not bool(held[:, 29:35].any()) and bool(held[:, 28].any() and held[:, 35].any())


@pytest.mark.parametrize("law", POINTS)
def test_probability_of_each_place(law):
    shape, n, spread = (7, 10), 4000, 0.3
    mask = torch.ones(1, 1, *shape, dtype=torch.bool).expand(n, -1, -1, -1)
    held = Split(law, 0.3, spread=spread, protected=(2, 2))(mask, shape, generators(5, n))
    y, x = (torch.arange(size, dtype=torch.float64) - size // 2 for size in shape)
    weight = -(y[:, None] ** 2 / (spread * 7) ** 2 + x**2 / (spread * 10) ** 2) / 2
    free = torch.ones(shape, dtype=torch.bool)
    free[2:4, 4:6] = False
    expected = torch.zeros(shape, dtype=torch.float64)
    expected[free] = _arrival_probability(weight[free] if law == "gaussian" else torch.zeros(66).double(), 21)
    error = held[:, 0].double().mean(0) - expected
    assert float((error.abs() / (expected * (1 - expected) / n).sqrt().clamp_min(1e-9))[free].max()) < 4.5
    assert not bool(held[:, 0, ~free].any())


def test_default_is_the_published_one():
    split = Split()
    assert (split.law, split.ratio, split.spread, tuple(split.protected)) == ("gaussian", 0.4, 0.25, (4, 4))
    assert SSDULoss().masks == 1 and SSDULoss().l1 == 0.5
    mask = omega((64, 64), share=0.25, columns=True)
    held = Split()(mask, (64, 64), [stream()])
    centre, rim = held[..., 24:40, :].sum(), held[..., :8, :].sum() + held[..., -8:, :].sum()
    assert 2 * int(rim) < int(centre)


def test_out_of_reach_is_said():
    mask = omega((6, 6), share=0.0)  # four columns
    with pytest.raises(InputError, match=r"a share 0\.9 of 24 measured places cannot be held back: 8 lie outside"):
        Split("uniform", 0.9)(mask, (6, 6), [stream()])
    with pytest.raises(InputError, match="of 4 measured columns cannot be held back"):
        Split("columns", 0.9, protected_columns=0.5)(mask[..., :1, :], (6, 6), [stream()])
    for wrong in ({"law": "disc"}, {"ratio": 0.0}, {"ratio": 1.0}, {"spread": 0.0}):
        with pytest.raises(InputError):
            Split(**wrong)


# the norm


def test_normalised_error_by_hand():
    values = torch.tensor([3 + 4j, 1j, 100.0, NAN], dtype=torch.complex64).reshape(1, 1, 1, 4)
    predicted = torch.tensor([3 + 1j, 2 + 1j, 0.0, 5.0], dtype=torch.complex64).reshape(1, 1, 1, 4)
    where = torch.tensor([True, True, False, False]).reshape(1, 1, 1, 4)
    l2, l1 = (9 + 4) ** 0.5 / 26**0.5, (3 + 2) / (3 + 4 + 1)
    for share in (0.0, 0.3, 0.5, 1.0):
        got = normalised_error(predicted, values, where, l1=share)
        assert got.shape == (1,) and float(got) == pytest.approx((1 - share) * l2 + share * l1)


def test_samples_have_norms_of_their_own():
    values = normal_like(torch.zeros(3, 2, 8, 8, dtype=torch.complex64), generators(0, 3))
    predicted = values + 0.1 * normal_like(values, generators(1, 3))
    where = omega((8, 8), n=3)
    together = normalised_error(predicted, values, where)
    loud = torch.tensor([1.0, 1e3, 1e-3]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(normalised_error(loud * predicted, loud * values, where), together)
    assert float(normalised_error(values, values, where).max()) == 0


# what enters the loss and what does not


class Recorder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.seen, self.images = model, [], []

    def forward(self, values, mask, encoding):
        self.seen.append((values, mask))
        self.images.append(self.model(values, mask, encoding))
        return self.images[-1]


def step(loss, model, batch, seed=0):
    model.zero_grad(set_to_none=True)
    value = loss(model, batch, stream(seed))
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def held_of(model, batch):
    values, theta = model.seen[-1]
    assert not bool(values[~theta.expand_as(values)].any())
    return batch.mask & ~theta


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("masks", [0, 1, 3])
def test_lambda_does_not_reach_the_network(law, masks):
    batch, loss = batch_of(), SSDULoss(Split(law), masks=masks)
    model = Recorder(network())
    first, _ = step(loss, model, batch)
    held = held_of(model, batch)
    omega_size = batch.mask.expand(-1, -1, *held.shape[-2:]).flatten(1).sum(1)
    assert held.flatten(1).sum(1).tolist() == [round(0.4 * int(count)) for count in omega_size]
    for changed in (lambda v: -3 * v + 1, lambda v: torch.zeros_like(v) + 1e4):
        other = replace(batch, values=torch.where(held, changed(batch.values), batch.values))
        second, _ = step(loss, model, other)
        assert torch.equal(model.images[-1], model.images[0]) and not torch.equal(second, first)
    elsewhere = replace(batch, values=torch.where(batch.mask & ~held, 2 * batch.values, batch.values))
    step(loss, model, elsewhere)
    assert not torch.equal(model.images[-1], model.images[0])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("poison", [NAN, float("inf"), 1e6])
def test_unmeasured_kspace_and_target_never_enter(law, poison):
    batch, loss, model = batch_of(), SSDULoss(Split(law)), network()
    value, gradient = step(loss, model, batch)
    assert bool(value.isfinite()) and all(bool(g.isfinite().all() and g.any()) for g in gradient.values())
    values = torch.where(batch.mask, batch.values, torch.full_like(batch.values, poison))
    got, other = step(loss, model, replace(batch, values=values, target=torch.full_like(batch.target, poison)))
    assert torch.equal(got, value)
    assert all(torch.equal(other[name], each) for name, each in gradient.items())


def test_only_lambda_is_compared():
    mask = omega((12, 16), n=2, share=0.4)
    values = Subsample(mask)(normal_like(torch.zeros(2, 1, 12, 16, dtype=torch.complex64), generators(0, 2)))
    batch = Measurement(values, mask, Identity(), source=("a", "b"))
    loss, answer = SSDULoss(), torch.zeros_like(values)
    model = Recorder(lambda *_: answer)
    assert float(loss(model, batch, stream())) == pytest.approx(1)
    held = held_of(model, batch)
    for outside in (7.0, NAN):
        answer = torch.where(held, 0, torch.full_like(values, outside))
        assert float(loss(model, batch, stream())) == pytest.approx(1)
    answer = torch.where(held, values, outside)
    assert float(loss(model, batch, stream())) == 0


def test_gradient_of_the_image_stays_inside_lambda():
    batch, image = batch_of(1), torch.zeros(1, 1, 24, 20, dtype=torch.complex64, requires_grad=True)
    model = Recorder(lambda *_: image)
    SSDULoss()(model, batch, stream()).backward()
    back = batch.encoding(image.grad)  # E E^H of something on Lambda: its normal equations reproduce it
    held = held_of(model, batch).expand_as(batch.values)
    error = torch.where(held, -batch.values, 0)
    l2, l1 = error.norm(), torch.view_as_real(error).abs().sum()
    sign = torch.complex(error.real.sign(), error.imag.sign())
    expected = batch.encoding.adjoint(0.5 * error / l2**2 + 0.5 * sign / l1)
    torch.testing.assert_close(image.grad, expected, rtol=1e-4, atol=1e-7)
    assert bool(back.isfinite().all())


# DeepInverse's splitting loss


class _Given:
    """The split that another loss drew, as DeepInverse's generator of splits."""

    def __init__(self, seen):
        self.seen = seen

    def step(self, batch_size, input_mask=None):
        return {"mask": self.seen.expand(batch_size, 2, -1, -1)}


class _Model(nn.Module):
    """Our network as one of DeepInverse's, which is told of the split by its own physics."""

    def __init__(self, model, seen, encoding):
        super().__init__()
        self.model, self.seen, self.encoding, self.given = model, seen, encoding, None

    def forward(self, y, physics):
        self.given = from_coils(y)
        return to_channels(self.model(self.given, self.seen > 0, self.encoding))


@pytest.mark.filterwarnings("ignore::UserWarning")  # DeepInverse says that a composed operator has no SVD
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", [(24, 20), (17, 23)])
def test_l2_term_is_deepinvs_splitting_loss(law, shape):
    """Theirs is, for C coils, the mean square of 2 C ky kx real numbers, over the share |Lambda| / (ky kx): the square

    of the residual's norm over 2 C |Lambda|. Ours is that norm over the norm of what was measured on Lambda. So

        theirs = ours^2 * ||y on Lambda||^2 / (2 C |Lambda|),

    with one split and one slice: theirs pools the slices of a batch, ours is a mean of each one's norm.
    """
    deepinv = pytest.importorskip("deepinv")
    batch, network_of = batch_of(2, shape), network()
    if law != "columns":
        mask = batch.mask & omega(shape, n=2, share=0.8)  # whole columns, with holes
        batch = replace(batch, values=Subsample(mask)(batch.values), mask=mask)
    ours, reckoned, gradients = [], [], []
    for i in range(2):
        one = replace(
            batch, values=batch.values[i : i + 1], mask=batch.mask[i : i + 1], source=batch.source[i : i + 1],
            encoding=CoilFourier(batch.encoding.maps[i : i + 1]),
        )  # fmt: skip
        recorder = Recorder(network_of)
        value, gradient = step(SSDULoss(Split(law), l1=0.0), recorder, one)
        theta = recorder.seen[-1][1].expand(1, 1, *shape)
        held = one.mask.expand(1, 1, *shape) & ~theta
        measured = one.mask.expand(1, 1, *shape).float()
        physics = deepinv.physics.MultiCoilMRI(measured, one.encoding.maps[:, 0], img_size=(2, *shape))
        loss = deepinv.loss.SplittingLoss(mask_generator=_Given(theta.float()), eval_n_samples=1)
        inner = _Model(network_of, theta, one.encoding)
        adapted = loss.adapt_model(inner).train()
        y, y_norm = to_coils(one.values), torch.where(held, one.values, 0).norm()
        network_of.zero_grad(set_to_none=True)
        image = adapted(y, physics, update_parameters=True)
        theirs = loss(image, y, physics, adapted)
        theirs.backward()
        assert torch.equal(inner.given, recorder.seen[-1][0])  # the same k-space reaches the network
        factor = y_norm**2 / (2 * y.shape[2] * held.sum())
        assert float(theirs) == pytest.approx(float(value**2 * factor), rel=1e-4)
        ours.append(float(value))
        reckoned.append(float((theirs / factor).sqrt()))
        for name, parameter in network_of.named_parameters():  # d theirs = 2 ours factor d ours
            expected = 2 * value * factor * gradient[f"model.{name}"]
            gradients.append(float((parameter.grad - expected).norm() / expected.norm()))
    assert max(gradients) < 1e-3
    together = SSDULoss(Split(law), l1=0.0)(network_of, batch, stream())
    assert float(together) == pytest.approx(sum(reckoned) / 2, rel=1e-4)
    assert ours[0] != pytest.approx(ours[1], rel=1e-3)


# fixed, several, new


def masks_seen(loss, batch, seeds):
    model = Recorder(lambda values, mask, encoding: torch.zeros(len(values), 1, 24, 20, dtype=torch.complex64))
    for seed in seeds:
        loss(model, batch, stream(seed))
    return [[mask[i].numpy().tobytes() for _, mask in model.seen] for i in range(len(batch.values))]


@pytest.mark.parametrize(("masks", "expected"), [(1, {1}), (3, {3}), (0, {30})])
def test_number_of_splits_of_a_slice(masks, expected):
    seen = masks_seen(SSDULoss(masks=masks), batch_of(), range(30))
    assert {len(set(each)) for each in seen} == expected
    assert not set(seen[0]) & set(seen[1])  # slices are split each by its own name
    again = masks_seen(SSDULoss(masks=masks), batch_of(), range(30))
    assert seen == again
    other = masks_seen(SSDULoss(masks=masks, seed=1), batch_of(), range(30))
    assert (seen == other) == (masks == 0)


def test_fixed_splits_go_by_the_name_not_by_the_place_in_the_batch():
    batch = batch_of(3)
    turned = replace(
        batch, values=batch.values.flip(0), mask=batch.mask.flip(0), source=batch.source[::-1],
        encoding=CoilFourier(batch.encoding.maps.flip(0)),
    )  # fmt: skip
    first, second = (masks_seen(SSDULoss(), each, [0]) for each in (batch, turned))
    assert first == second[::-1]
    nameless = replace(batch, source=())
    with pytest.raises(InputError, match="masks=0"):
        masks_seen(SSDULoss(), nameless, [0])
    assert masks_seen(SSDULoss(masks=0), nameless, [0])


def test_splits_do_not_share_random_numbers_with_the_slices_mask():
    shape = (24, 20)
    drawn = torch.rand((1, 1, 20), generator=stream(slice_seed("phantom-0#0", 0)), dtype=torch.float64)
    batch = batch_of(1, shape)
    seen = Recorder(lambda *_: torch.zeros(1, 1, *shape, dtype=torch.complex64))
    everything = replace(batch, mask=torch.ones(1, 1, 1, 20, dtype=torch.bool))
    SSDULoss(Split("columns", 0.5))(seen, everything, stream())
    lowest = drawn.flatten().argsort()[:10]
    assert set(lowest.tolist()) != set((~seen.seen[0][1]).flatten().nonzero().flatten().tolist())


# the supervised twin


def full_batch(n=2, shape=(24, 20)):
    batch = batch_of(n, shape)
    image = normal_like(torch.zeros(n, 1, *shape, dtype=torch.complex64), generators(0, n))
    return replace(
        batch, values=batch.encoding(image), mask=torch.ones(n, 1, 1, shape[1], dtype=torch.bool)
    ), image  # fmt: skip


def test_supervised_twin_sees_the_mask_of_the_guide_and_is_told_all():
    batch, image = full_batch()
    law = RandomLines(3, centre_fraction=0.2)
    loss = SupervisedLoss(law)
    model = Recorder(lambda *_: image)
    assert float(loss(model, batch, stream())) < 1e-5
    for i, name in enumerate(batch.source):
        assert torch.equal(model.seen[0][1][i], law.draw((24, 20), stream(slice_seed(name, 0))))
    assert not bool(model.seen[0][0][~model.seen[0][1].expand_as(batch.values)].any())
    away = torch.where(model.seen[0][1], 0, torch.ones_like(batch.values))
    assert float(loss(model, replace(batch, values=batch.values + away), stream())) > 0.01
    learner = network()
    _, gradient = step(loss, learner, batch)
    assert all(bool(g.any()) for g in gradient.values())
    masks = {model.seen[-1][1].numpy().tobytes() for k in range(9) if loss(model, batch, stream(k)) is not None}
    assert len(masks) == 1


def test_supervised_twin_wants_full_scans_but_bears_margins():
    batch, _ = full_batch()
    mask = batch.mask.clone()
    mask[..., :3] = False
    mask[..., -2:] = False
    margins = replace(batch, mask=mask)
    model = Recorder(network())
    assert bool(SupervisedLoss()(model, margins, stream()).isfinite())
    assert not bool(model.seen[0][1][..., :3].any())
    with pytest.raises(InputError, match="needs fully sampled scans; read them by FullScans"):
        SupervisedLoss()(model, batch_of(), stream())


# full scans


def full_scan(path, shape=(40, 36), *, slices=2, coils=4, seed=0, mask=None):
    rng = stream(seed)
    images = torch.stack([phantom(shape, rng) for _ in range(slices)])
    kspace, _ = simulate_kspace(images, coil_maps(shape, coils, rng), rng, noise_std=0.02)
    write_scan(
        path, kspace if mask is None else Subsample(mask)(kspace), mask=None if mask is None else mask[:, 0].numpy()
    )
    return kspace


def test_full_scans_are_batches_like_the_others(tmp_path):
    kspace = full_scan(tmp_path / "a.h5")
    data = FullScans(str(tmp_path), cache=str(tmp_path / "maps"))
    batch = data.batch(stream(), pixels=10**6)
    assert bool(batch.mask.all()) and batch.target is None and len(batch.values) == 2
    order = [int(name.split("#")[1]) for name in batch.source]
    torch.testing.assert_close(batch.values * batch.scale, kspace[order], rtol=1e-5, atol=1e-6)
    centre = torch.zeros(1, 1, 40, 36, dtype=torch.bool)
    centre[..., 8:32, 6:30] = True
    alone = torch.where(centre, kspace, 0)  # the maps come from the 24 x 24 centre and from nothing else
    expected = Espirit(crop=0.0)(alone, centre)[order]
    torch.testing.assert_close(batch.encoding.maps, expected, rtol=0, atol=2e-3)
    scale = Measurement(kspace, torch.ones(2, 1, 1, 36, dtype=torch.bool)).centre_scale()
    torch.testing.assert_close(batch.scale, scale[order])
    assert [file.name for file in (tmp_path / "maps").iterdir()] == ["a_full_maps.h5"]
    again = FullScans(str(tmp_path), cache=str(tmp_path / "maps")).batch(stream(), pixels=10**6)
    assert torch.equal(again.encoding.maps, batch.encoding.maps)
    assert bool(data.spectrum(stream()).isfinite().all())


def test_each_kind_of_scan_has_its_reader(tmp_path):
    mask = omega((40, 36), n=2, columns=True)
    full_scan(tmp_path / "a.h5", mask=mask)
    with pytest.raises(InputError, match=r"a\.h5: slice 0 is undersampled; give fully sampled scans"):
        FullScans(str(tmp_path)).batch(stream(), pixels=1)
    TrainingScans(str(tmp_path)).batch(stream(), pixels=1)
    mask[0] = True
    full_scan(tmp_path / "a.h5", mask=mask)
    with pytest.raises(InputError, match="slice 1 is undersampled"):
        FullScans(str(tmp_path)).batch(stream(), pixels=1)


# the methods


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_checkpoint(path, network().state_dict(), {"format": "msmri-partial", "recipe": {"model": MODEL}})
    return path


def test_ssdu_keeps_the_contract(weights):
    # untrained, but data consistency alone is far better than noise
    check_reconstructor(load_method("ssdu", weights=str(weights)))


@pytest.mark.parametrize("shape", [(24, 20), (27, 22)])
def test_ssdu_is_one_pass_on_all_that_was_measured(weights, shape):
    measurement = phantom_measurement(shape, slices=3, coils=3)
    scale = measurement.centre_scale()
    result = SSDU(weights)(measurement, generators(0, 3))
    with torch.no_grad():
        image = network()(measurement.values / scale, measurement.mask, measurement.encoding) * scale
    torch.testing.assert_close(result.samples, image, rtol=1e-4, atol=1e-5)
    assert result.details["NFE"] == 2 and result.details["mu"] == pytest.approx(0.05)
    one = SSDU(weights, batch=1)(measurement, generators(0, 3))
    torch.testing.assert_close(one.samples, result.samples, rtol=1e-4, atol=1e-5)


def test_ssdu_says_what_weights_it_wants(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("msmri.methods.ssdu.SHIPPED", "none.safetensors")
    with pytest.raises(InputError, match=r"train one with recipes/ssdu_small\.yaml or give weights="):
        SSDU()(phantom_measurement(), generators(0, 2))
    other = {"use": "msmri.model.unrolled:ResNet", "channels": 8, "blocks": 1}
    save_checkpoint(
        tmp_path / "r.safetensors", ResNet(8, 1).state_dict(), {"format": "msmri-partial", "recipe": {"model": other}}
    )
    with pytest.raises(InputError, match=r"r\.safetensors: the weights are not those of an unrolled network"):
        SSDU(tmp_path / "r.safetensors")(phantom_measurement(), generators(0, 2))
    with pytest.raises(InputError, match="needs coil maps"):
        SSDU(weights)(replace(phantom_measurement(), encoding=None), generators(0, 2))


def test_training_and_reconstruction_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("msmri.report.loss_curve", lambda path, records: None)
    scan = phantom_measurement((32, 28), coils=4, slices=2)
    write_scan(tmp_path / "scan.h5", scan.values, mask=scan.mask[:, 0].numpy())
    recipe = {
        "data": {"use": "msmri.io.dataset:TrainingScans", "path": str(tmp_path / "scan.h5")},
        "model": MODEL,
        "loss": {
            "use": "msmri.methods.ssdu_training:SSDULoss",
            "split": {"use": "msmri.methods.ssdu_training:Split", "law": "uniform", "ratio": 0.3},
            "masks": 2,
        },
        "train": {"steps": 60, "pixels": 2000, "learning_rate": 3e-3, "warm_up": 5, "save_every": 60, "ema": 0.9},
    }
    records = list(train(recipe, tmp_path / "run"))
    assert sum(r.loss for r in records[-10:]) / 10 < 0.93 * sum(r.loss for r in records[:5]) / 5
    trained = SSDU(tmp_path / "run" / "last.safetensors")(scan, generators(0, 2))
    assert trained.details["mu"] != pytest.approx(0.05, abs=1e-4)


QUICK = {
    "splits": 3,
    "epochs": 4,
    "patience": 2,
    "unrolls": 2,
    "cg_iterations": 4,
    "channels": 6,
    "blocks": 1,
    "patch": 1,
}


def test_zero_shot_splits_as_published():
    method = ZeroShotSSDU()
    assert (method.splits, method.ratio, method.validation_ratio, method.law) == (25, 0.4, 0.2, "uniform")


def test_zero_shot_keeps_the_contract():
    check_reconstructor(load_method("zs-ssdu", **QUICK), measurement=phantom_measurement((24, 20), coils=3))


def test_zero_shot_learns_and_stops():
    measurement = phantom_measurement((32, 28), slices=1, coils=4)
    method = ZeroShotSSDU(
        splits=4, epochs=20, patience=20, learning_rate=3e-3, unrolls=3, channels=12, blocks=2, patch=1
    )
    details = method(measurement, generators(0, 1)).details
    (curve,), (epochs,) = details["validation"], details["epochs"]
    assert len(curve) == epochs + 1 == 21 and min(curve) < 0.98 * curve[0]


def test_zero_shot_keeps_the_best_weights():
    measurement = phantom_measurement((24, 20), slices=1, coils=3)
    method = ZeroShotSSDU(**QUICK | {"learning_rate": 3e-3, "epochs": 12, "patience": 3})
    long = method(measurement, generators(1, 1))
    (curve,), (epochs,) = long.details["validation"], long.details["epochs"]
    best = curve.index(min(curve))
    assert best > 0 and epochs == min(best + 3, 12) < 12  # it stopped after three epochs without a gain
    short = replace(method, epochs=best)(measurement, generators(1, 1))
    assert short.details["validation"][0] == curve[: best + 1] and torch.equal(short.samples, long.samples)


def test_zero_shot_trains_each_slice_by_itself():
    measurement = phantom_measurement((24, 20), slices=2, coils=3)
    method = ZeroShotSSDU(**QUICK | {"learning_rate": 0.01})
    both = method(measurement, generators(7, 2))
    second = replace(
        measurement, values=measurement.values[1:], mask=measurement.mask[1:],
        encoding=CoilFourier(measurement.encoding.maps[1:]), target=None, source=(),
    )  # fmt: skip
    alone = method(second, generators(7, 1, first=1))
    assert torch.equal(both.samples[1:], alone.samples)
    assert both.details["validation"][1] == alone.details["validation"][0]
    other = method(second, generators(8, 1))
    assert not torch.equal(other.samples, alone.samples)
    assert len(both.details["epochs"]) == len(both.details["seconds"]) == len(both.details["mu"]) == 2


def test_zero_shot_may_start_from_weights(weights):
    measurement = phantom_measurement((24, 20), slices=1, coils=3)
    still = ZeroShotSSDU(**QUICK | {"weights": str(weights), "learning_rate": 1e-12})
    got = still(measurement, generators(0, 1))
    expected = SSDU(weights)(measurement, generators(0, 1))
    torch.testing.assert_close(got.samples, expected.samples, rtol=1e-4, atol=1e-4)
    assert got.details["epochs"] == [2] or got.details["epochs"][0] <= 4
    moved = replace(still, learning_rate=1e-2)(measurement, generators(0, 1))
    assert not torch.equal(moved.samples, expected.samples)


@pytest.mark.parametrize(
    "wrong", [{"splits": 0}, {"patience": 0}, {"learning_rate": 0.0}, {"ratio": 1.2}, {"law": "x"}]
)
def test_zero_shot_refuses_settings_without_meaning(wrong):
    with pytest.raises(InputError):
        ZeroShotSSDU(**wrong)
