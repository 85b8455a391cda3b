import warnings
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from msmri.errors import InputError
from msmri.io.dataset import ReconstructedScans, TrainingScans, UndersampledScans
from msmri.io.fastmri import Scan, open_scan, write_scan
from msmri.io.output import ReconstructionWriter
from msmri.measurement import Measurement
from msmri.methods.msm_training import LinewiseMSM
from msmri.model.partial import MeasurementPartial, radial_frequency
from msmri.physics.coils import estimate_noise_std
from msmri.physics.espirit import Espirit
from msmri.physics.fourier import fft2c
from msmri.physics.masks import RandomLines, draw_masks, slice_seed
from msmri.physics.operators import Subsample
from msmri.physics.simulate import coil_maps, phantom, simulate_kspace
from msmri.tensors import generators

LAW = RandomLines(acceleration=3, centre_fraction=0.2)


def scan(path, shape=(40, 36), *, slices=3, coils=4, seed=0, noise=0.02, undersampled=True, target=None):
    rng = torch.Generator().manual_seed(seed)
    images = torch.stack([phantom(shape, rng) for _ in range(slices)])
    kspace, _ = simulate_kspace(images, coil_maps(shape, coils, rng), rng, noise_std=noise)
    mask = draw_masks(LAW, shape, generators(seed, slices))
    values = Subsample(mask)(kspace) if undersampled else kspace
    write_scan(path, values, mask=mask[:, 0].numpy() if undersampled else None, target=target)
    return values, mask


def draws(data, n, *, pixels=40 * 36, seed=0):
    return [data.batch(torch.Generator().manual_seed(seed + i), pixels=pixels) for i in range(n)]


@pytest.fixture
def folder(tmp_path):
    for number, shape in enumerate([(40, 36), (33, 41)]):
        scan(tmp_path / f"s{number}.h5", shape, seed=number)
    return tmp_path


@pytest.mark.parametrize("blind", [(), (3, 30)])
def test_lines_that_no_scan_measured_are_told_of(tmp_path, blind):
    shape, rng = (32, 36), torch.Generator().manual_seed(0)
    image, maps = phantom(shape, rng).expand(10, *shape), coil_maps(shape, 4, rng)
    for number in range(2):
        mask = torch.zeros(1, 36, dtype=torch.bool)
        mask[:, 12:24], mask[:, number::2] = True, True  # every second line, and the others in the other scan
        mask[:, list(blind)] = False
        mask[:, :2] = False  # a margin
        mask[:, 34:] = False
        values = Subsample(mask[None, None])(simulate_kspace(image, maps, rng, noise_std=0.01)[0])
        write_scan(tmp_path / f"s{number}.h5", values, mask=mask[None].numpy())
    data = TrainingScans(str(tmp_path))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        draws(data, 12)
        draws(data, 3)
    about = [str(one.message) for one in told if "measured in none of" in str(one.message)]
    assert len(about) == (1 if blind else 0)
    assert not blind or about[0].startswith("2 of 36 lines are measured in none of 20 slices")


def test_scans_of_one_kind_share_a_batch(tmp_path):
    for number, shape in enumerate([(40, 36), (40, 36), (40, 36), (33, 41)]):
        scan(tmp_path / f"s{number}.h5", shape, seed=number)
    alone, shared = TrainingScans(str(tmp_path)), TrainingScans(str(tmp_path), scans_per_batch=3)
    known = {}
    for batch in draws(alone, 40, pixels=3 * 40 * 36):
        for i, source in enumerate(batch.source):
            known[source] = (batch.values[i], batch.mask[i], batch.scale[i], batch.noise_std[i], batch.encoding.maps[i])
    numbers = set()
    for batch in draws(shared, 30, pixels=3 * 40 * 36):
        files = [source.partition("#")[0] for source in batch.source]
        numbers.add(len(set(files)))
        assert len(set(batch.source)) == len(batch.source) == 3
        assert set(files) == {"s3.h5"} or "s3.h5" not in files  # never two matrices
        for i, source in enumerate(batch.source):
            now = (batch.values[i], batch.mask[i], batch.scale[i], batch.noise_std[i], batch.encoding.maps[i])
            assert all(torch.equal(a, b) for a, b in zip(known[source], now))
    assert numbers == {1, 2, 3}


def test_one_fixed_mask_and_nothing_else_in_every_draw(folder):
    data = TrainingScans(str(folder))
    assert len(data) == 2
    seen = {}
    for batch in draws(data, 40, pixels=2 * 40 * 36):
        assert len(batch.values) == 2 and batch.target is None
        for i, source in enumerate(batch.source):
            now = (batch.values[i], batch.mask[i], batch.scale[i], batch.noise_std[i], batch.encoding.maps[i])
            before = seen.setdefault(source, now)
            assert all(torch.equal(a, b) for a, b in zip(before, now))
        assert not bool(batch.values[~batch.mask.expand_as(batch.values)].any())
    assert sorted(seen) == [f"s{k}.h5#{i}" for k in range(2) for i in range(3)]
    masks = {tuple(mask.flatten().tolist()) for _, mask, *_ in seen.values()}
    assert len(masks) == 6  # each slice has its own


def test_values_are_those_of_the_file(folder):
    data = TrainingScans([str(folder / "s1.h5")])
    batch = data.batch(torch.Generator().manual_seed(3), pixels=1)
    index = int(batch.source[0].split("#")[1])
    with open_scan(folder / "s1.h5") as opened:
        direct = opened.read(index)
    assert torch.equal(batch.mask, direct.mask)
    assert torch.equal(batch.scale, direct.centre_scale())
    torch.testing.assert_close(batch.values * batch.scale, direct.values, rtol=1e-6, atol=1e-9)
    noise = estimate_noise_std(direct.values, direct.mask)
    torch.testing.assert_close((batch.noise_std * batch.scale).flatten(), noise.flatten())
    maps = Espirit(crop=0.0)(direct.values, direct.mask)
    torch.testing.assert_close(batch.encoding.maps, maps, rtol=0, atol=1e-3)


def test_depends_on_the_generator_alone(folder):
    state = torch.get_rng_state()
    first, second = (draws(TrainingScans(str(folder)), 6, seed=5) for _ in range(2))
    for a, b in zip(first, second):
        assert a.source == b.source and torch.equal(a.values, b.values)
    assert len({batch.source for batch in first}) > 2
    assert torch.equal(state, torch.get_rng_state())


def test_batch_size_follows_the_matrix(folder):
    data = TrainingScans(str(folder / "s0.h5"))
    factors = (0.01, 1, 1.6, 2.4, 99)
    sizes = [len(data.batch(torch.Generator(), pixels=round(n * 40 * 36)).values) for n in factors]
    assert sizes == [1, 1, 2, 2, 3]


def test_refuses_fully_sampled_scans(tmp_path):
    scan(tmp_path / "full.h5", undersampled=False)
    data = TrainingScans(str(tmp_path))
    with pytest.raises(InputError, match=r"full\.h5: the scan is fully sampled; undersample it once"):
        data.batch(torch.Generator(), pixels=1)
    with pytest.raises(InputError, match="fully sampled"):
        data.spectrum(torch.Generator())


def test_refuses_a_fully_sampled_slice_among_others(tmp_path):
    _, mask = scan(tmp_path / "mixed.h5")
    mask[0] = True
    full, _ = scan(tmp_path / "full.h5", undersampled=False)
    write_scan(tmp_path / "mixed.h5", torch.where(mask, full, 0), mask=mask[:, 0].numpy())
    (tmp_path / "full.h5").unlink()
    with pytest.raises(InputError, match=r"slice 0 is fully sampled"):
        TrainingScans(str(tmp_path)).batch(torch.Generator(), pixels=1)


def test_refuses_a_folder_without_scans(tmp_path):
    with pytest.raises(InputError, match=r"no \.h5 file"):
        TrainingScans(str(tmp_path))


@pytest.mark.parametrize("poison", [np.nan, 1e30])
def test_never_reads_references(tmp_path, poison):
    target = np.random.default_rng(0).random((3, 40, 36), dtype=np.float32)
    scan(tmp_path / "a.h5", target=target)
    expected = draws(TrainingScans(str(tmp_path)), 4)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["reconstruction_rss"][...] = poison
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a reader would warn of NaN
        got = draws(TrainingScans(str(tmp_path)), 4)
    for a, b in zip(expected, got):
        assert a.source == b.source and torch.equal(a.values, b.values) and torch.equal(a.scale, b.scale)
        assert torch.equal(a.encoding.maps, b.encoding.maps) and b.target is None


def test_never_reads_what_the_mask_leaves_out(tmp_path):
    values, mask = scan(tmp_path / "a.h5")
    expected = draws(TrainingScans(str(tmp_path)), 4)
    junk = torch.where(mask, values, torch.full_like(values, 1e4))
    write_scan(tmp_path / "a.h5", junk, mask=mask[:, 0].numpy())
    for a, b in zip(expected, draws(TrainingScans(str(tmp_path)), 4)):
        assert torch.equal(a.values, b.values) and torch.equal(a.encoding.maps, b.encoding.maps)
        assert torch.equal(a.noise_std, b.noise_std) and torch.equal(a.scale, b.scale)


def test_compresses_coils(tmp_path):
    scan(tmp_path / "a.h5", coils=7)
    batch = TrainingScans(str(tmp_path), max_coils=4).batch(torch.Generator(), pixels=1)
    whole = TrainingScans(str(tmp_path)).batch(torch.Generator(), pixels=1)
    assert batch.values.shape == (1, 4, 40, 36) and batch.encoding.maps.shape == (1, 1, 4, 40, 36)
    assert not bool(batch.values[~batch.mask.expand_as(batch.values)].any())
    kept = float((batch.values * batch.scale).norm() / (whole.values * whole.scale).norm())
    assert 0.97 < kept <= 1.0001


def test_cached_maps_equal_computed_ones_and_are_used(folder, tmp_path):
    cache = tmp_path / "maps"
    plain, first, second = (draws(TrainingScans(str(folder), cache=c), 5) for c in (None, str(cache), str(cache)))
    assert sorted(file.name for file in cache.iterdir()) == ["s0_maps.h5", "s1_maps.h5"]
    for a, b, c in zip(plain, first, second):
        assert torch.equal(a.encoding.maps, b.encoding.maps) and torch.equal(a.encoding.maps, c.encoding.maps)
    with h5py.File(cache / "s0_maps.h5", "r+") as file:
        file["maps"][...] *= 2
    changed = draws(TrainingScans(str(folder / "s0.h5"), cache=str(cache)), 1)[0]
    original = draws(TrainingScans(str(folder / "s0.h5")), 1)[0]
    torch.testing.assert_close(changed.encoding.maps, 2 * original.encoding.maps, rtol=1e-2, atol=1e-3)


def test_refuses_cached_maps_of_other_coils_and_scans_of_one_name(folder, tmp_path):
    cache = tmp_path / "maps"
    draws(TrainingScans(str(folder / "s0.h5"), cache=str(cache)), 1)
    with pytest.raises(InputError, match=r"s0_maps\.h5: maps \(3, 1, 4, 40, 36\) do not fit .*delete the file"):
        draws(TrainingScans(str(folder / "s0.h5"), cache=str(cache), max_coils=3), 1)
    (tmp_path / "other").mkdir()
    scan(tmp_path / "other" / "s0.h5", seed=9)
    both = [str(folder / "s0.h5"), str(tmp_path / "other" / "s0.h5")]
    assert len(TrainingScans(both)) == 2
    with pytest.raises(InputError, match="two scans are called s0"):
        TrainingScans(both, cache=str(cache))


def test_spectrum_finds_the_power_of_a_stationary_scan(tmp_path):
    shape, rng = (64, 60), torch.Generator().manual_seed(0)
    variance = (1.5 - 4 * radial_frequency(shape, torch.device("cpu"))).exp()
    maps = coil_maps(shape, 4, rng)
    image = torch.complex(*(variance.sqrt() * torch.randn(2, 3, *shape, generator=rng)).unbind(0))
    coils = (
        maps[0, 0]
        * torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(image, (1, 2)), norm="ortho"), (1, 2))[:, None]
    )
    kspace = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(coils, (2, 3)), norm="ortho"), (2, 3))
    mask = draw_masks(LAW, shape, generators(0, 3))
    write_scan(tmp_path / "a.h5", torch.where(mask, kspace, 0), mask=mask[:, 0].numpy())
    data = TrainingScans(str(tmp_path))
    spectrum = data.spectrum(torch.Generator())
    batch = data.batch(torch.Generator(), pixels=3 * 64 * 60)
    assert spectrum.shape == (48,) and bool((spectrum > 0).all())
    radius = torch.linspace(0, 1.5, 48)
    expected = (1.5 - 4 * radius).exp() * float(batch.scale.pow(-2).mean())
    middle = slice(6, 30)  # coils blur the very centre and corner
    assert float((spectrum[middle] / expected[middle]).log().abs().mean()) < 0.3
    assert abs(float((spectrum[middle] / expected[middle]).log().mean())) < 0.15


def test_spectrum_takes_the_noise_off(tmp_path):
    loud, quiet = tmp_path / "loud", tmp_path / "quiet"
    for place, noise in ((loud, 0.3), (quiet, 1e-4)):
        place.mkdir()
        scan(place / "a.h5", (64, 60), noise=noise)
    found = [TrainingScans(str(place)).spectrum(torch.Generator()) for place in (loud, quiet)]
    assert float((found[0][2:12] / found[1][2:12]).log().abs().mean()) < 0.5
    batch = TrainingScans(str(loud)).batch(torch.Generator(), pixels=1)
    power = float(4 * batch.noise_std.square())
    assert float(found[0][36:].mean()) < 0.3 * power  # would be at least that with the noise left in


def test_frozen_settings_do_not_leak_between_instances(folder):
    one, two = TrainingScans(str(folder)), TrainingScans(str(folder), calibration=replace(Espirit(crop=0.0), sets=2))
    assert one.calibration.sets == 1
    assert two.batch(torch.Generator(), pixels=1).encoding.maps.shape[1] == 2


# scans undersampled as they are read


def full_and_undersampled(folder, *, seed=0, coils=4):
    """Write full scans, and the same scans undersampled once as docs/train.md shows; give both folders."""
    for name in ("full", "once"):
        (folder / name).mkdir()
    for number, shape in enumerate([(40, 36), (33, 41)]):
        values, _ = scan(folder / "full" / f"s{number}.h5", shape, seed=number, coils=coils, undersampled=False)
        seeds = [slice_seed(f"s{number}.h5#{index}", seed) for index in range(len(values))]
        mask = draw_masks(LAW, shape, [torch.Generator().manual_seed(one) for one in seeds])
        write_scan(folder / "once" / f"s{number}.h5", torch.where(mask, values, 0), mask=mask[:, 0].numpy())
    return str(folder / "full"), str(folder / "once")


def assert_same(a, b):
    assert a.source == b.source and torch.equal(a.values, b.values) and torch.equal(a.mask, b.mask)
    assert torch.equal(a.encoding.maps, b.encoding.maps)
    assert torch.equal(a.noise_std, b.noise_std) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize(("coils", "seed"), [(4, 0), (7, 5)])
def test_undersampled_on_reading_is_undersampled_once(tmp_path, coils, seed):
    full, once = full_and_undersampled(tmp_path, seed=seed, coils=coils)
    ours, theirs = UndersampledScans(full, law=LAW, seed=seed, max_coils=5), TrainingScans(once, max_coils=5)
    for number in range(8):
        streams = [torch.Generator().manual_seed(number) for _ in range(2)]
        assert_same(*(data.batch(rng, pixels=3000) for data, rng in zip((ours, theirs), streams)))
        assert torch.equal(streams[0].get_state(), streams[1].get_state())
    assert torch.equal(ours.spectrum(torch.Generator()), theirs.spectrum(torch.Generator()))
    assert all(torch.equal(held.places, held.mask) for held in ours._scans.values())  # nothing else is kept
    with pytest.raises(InputError, match="is undersampled"):
        UndersampledScans(once, law=LAW).batch(torch.Generator(), pixels=1)


def test_masks_drawn_anew_are_all_that_differs(tmp_path):
    full, _ = full_and_undersampled(tmp_path)
    fixed, redrawn = (UndersampledScans(full, law=LAW, redraw=redraw) for redraw in (False, True))
    with_all = UndersampledScans(full, law=RandomLines(1.0), redraw=True)
    seen, alone = {}, {}
    for number in range(12):
        rng, other = (torch.Generator().manual_seed(number) for _ in range(2))
        a, b = fixed.batch(rng, pixels=3000), redrawn.batch(other, pixels=3000)
        whole = with_all.batch(torch.Generator().manual_seed(number), pixels=3000)
        assert torch.equal(rng.get_state(), other.get_state())  # the loss draws the same numbers after it
        assert a.source == b.source and torch.equal(a.encoding.maps, b.encoding.maps)
        assert torch.equal(a.scale, b.scale) and torch.equal(a.noise_std, b.noise_std)
        assert not bool(b.values[~b.mask.expand_as(b.values)].any())
        expected = torch.where(b.mask, whole.values * whole.scale, 0)
        torch.testing.assert_close(b.values * b.scale, expected, rtol=1e-5, atol=1e-6)
        for source, old, new in zip(a.source, a.mask, b.mask):
            assert not torch.equal(old, new)
            seen.setdefault(source, []).append(new)
            alone.setdefault(source, []).append(old)
    assert all(torch.equal(masks[0], mask) for masks in alone.values() for mask in masks)
    masks = torch.cat([mask for masks in seen.values() for mask in masks if mask.shape[-1] == 36])
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks) > 8
    share = LAW.inclusion_probability((40, 36)).float().mean()
    assert abs(float(masks.float().mean()) - float(share)) < 0.06
    assert torch.equal(fixed.spectrum(torch.Generator()), redrawn.spectrum(torch.Generator()))
    again = UndersampledScans(full, law=LAW, redraw=True)
    assert_same(*(data.batch(torch.Generator().manual_seed(3), pixels=3000) for data in (redrawn, again)))


class FirstTwo(torch.nn.Module):
    def forward(self, image, condition):
        return 0.1 * image[:, :2]


@pytest.mark.parametrize("redraw", [False, True])
def test_nothing_outside_the_masks_reaches_the_loss(tmp_path, monkeypatch, redraw):
    full, _ = full_and_undersampled(tmp_path, coils=6)
    model = MeasurementPartial(FirstTwo(), wiener_iterations=2)
    first = UndersampledScans(full, law=LAW)
    masks = {}
    for number in range(2):
        loaded = first._load(number)
        masks |= dict(zip(loaded.source, loaded.mask[:, None]))
    read, allowed = Scan.read, {}

    def poisoned(self, index):
        item = read(self, index)
        where = allowed.get(item.source[0])
        return item if where is None else replace(item, values=torch.where(where, item.values, torch.nan))

    def look(number):
        rng = torch.Generator().manual_seed(number)
        batch = UndersampledScans(full, law=LAW, redraw=redraw, max_coils=5).batch(rng, pixels=3000)
        return batch, LinewiseMSM()(model, batch, rng)

    monkeypatch.setattr(Scan, "read", poisoned)
    for number in range(4):
        allowed.clear()
        batch, loss = look(number)
        allowed |= masks  # coil maps and the like come from these
        if redraw:
            allowed |= {name: masks[name] | mask for name, mask in zip(batch.source, batch.mask)}
        again, same = look(number)
        assert_same(batch, again)
        assert bool(loss.isfinite()) and torch.equal(loss, same)
        if redraw:  # the poison is there: masks of their own would meet it
            allowed |= masks
            assert bool(look(number)[0].values.isnan().any())


# reconstructed scans


def completed(path, shape=(40, 36), *, slices=3, seed=0, std=False):
    """Write what recon writes of a scan; give the complex images."""
    rng = torch.Generator().manual_seed(seed)
    magnitude = torch.stack([phantom(shape, rng) for _ in range(slices)])
    ramp = torch.linspace(-1, 1, shape[1])
    images = torch.polar(7.0 * magnitude, (1.5 * ramp).expand_as(magnitude))
    with ReconstructionWriter(path, slices, shape, samples=1 + std) as writer:
        for index, image in enumerate(images):
            writer.write(index, image, std=magnitude[index] if std else None)
    return images


@pytest.mark.parametrize("shape", [(40, 36), (33, 41)])
def test_reconstructions_are_scans_of_one_coil(tmp_path, shape):
    images = completed(tmp_path / "a.h5", shape)
    law = RandomLines(1.0)
    batch = ReconstructedScans(str(tmp_path), law=law).batch(torch.Generator(), pixels=10**6)
    order = [int(name.removeprefix("a.h5#")) for name in batch.source]
    assert sorted(order) == [0, 1, 2] and bool(batch.mask.all()) and batch.target is None
    assert batch.values.shape == (3, 1, *shape)
    torch.testing.assert_close((batch.encoding.adjoint(batch.values) * batch.scale)[:, 0], images[order])
    whole = Measurement(fft2c(images[order])[:, None], torch.ones(1, 1, 1, shape[1], dtype=torch.bool))
    torch.testing.assert_close(batch.scale, whole.centre_scale())
    real = ReconstructedScans(str(tmp_path), calibration=Espirit(phase_reference="image"))
    found = real.batch(torch.Generator(), pixels=10**6)
    assert found.source == batch.source
    left = found.encoding.adjoint(found.values)[:, 0]
    torch.testing.assert_close(left.abs(), images[order].abs() / batch.scale[:, 0], atol=1e-3, rtol=1e-3)
    assert float(left.imag.norm() / left.norm()) < 0.2 < float(images.imag.norm() / images.norm())
    assert bool(real.spectrum(torch.Generator()).isfinite().all())


def test_samples_of_several_seeds_stand_side_by_side(tmp_path):
    for seed in (1, 2):
        completed(tmp_path / str(seed) / "a.h5", seed=seed)
    data = ReconstructedScans([str(tmp_path / "1"), str(tmp_path / "2")], scans_per_batch=2)
    assert len(data) == 2
    sizes = {len(data.batch(torch.Generator().manual_seed(k), pixels=4 * 40 * 36).values) for k in range(9)}
    assert sizes == {3, 4}  # one file or both


def test_what_is_no_sample_is_refused(tmp_path):
    def refused(match):
        with pytest.raises(InputError, match=match):
            ReconstructedScans(str(tmp_path)).batch(torch.Generator(), pixels=1)

    completed(tmp_path / "a.h5", std=True)
    refused(r"a\.h5: holds means of several samples, .*; reconstruct with --samples 1")
    (tmp_path / "a.h5").unlink()
    scan(tmp_path / "a.h5")
    refused(r"a\.h5: has no dataset 'reconstruction_complex'")
    completed(tmp_path / "b.h5", slices=1)
    (tmp_path / "a.h5").unlink()
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        file["reconstruction_complex"][0, 3, 3] = np.nan
    refused(r"b\.h5: reconstruction_complex does not hold finite complex images")
