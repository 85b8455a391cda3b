import math
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from msmri.errors import InputError, InputWarning
from msmri.io.photos import ROUNDING, FullPhotos, TrainingPhotos, read_photos, to_pixels, to_values
from msmri.methods.adps_training import AmbientLoss, CleanLoss
from msmri.methods.msm_training import NoiselessMSM
from msmri.model.ambient import AmbientDenoiser, FurtherPixels, ImageDenoiser
from msmri.model.denoiser import EpsilonVP, GaussianDenoiser
from msmri.model.denoiser_partial import DenoiserPartial
from msmri.physics.operators import Identity, Subsample
from msmri.physics.tiles import FurtherTiles, RandomPixels, RandomTiles
from msmri.tensors import generators, normal_like

NAN = float("nan")


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, height=20, width=None, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width or height, 3), dtype=np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def write_npz(path, images, **more):
    np.savez(path, images=images, **more)
    return path


@pytest.fixture
def folder(tmp_path):
    """Numbered as FFHQ is: two test images, three to train on, in sub-folders."""
    place = tmp_path / "ffhq"
    for image, name in zip(
        pictures(5), ("00000/00007.png", "00000/00999.png", "01000/01000.png", "01000/01002.png", "69000/69999.png")
    ):
        save(place / name, image)
    return place


def names_of(data, n=30, *, pixels=400):
    return {name for i in range(n) for name in data.batch(stream(i), pixels=pixels).source}


# reading


def test_a_folder_a_zip_and_an_npz_hold_the_same(folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    names = tuple(file.relative_to(folder).as_posix() for file in files)
    with zipfile.ZipFile(tmp_path / "ffhq.zip", "w") as archive:
        for file, name in zip(files, names):
            archive.write(file, name)
        archive.writestr("__MACOSX/00000/._00007.png", b"junk")
        archive.writestr("LICENSE.txt", b"CC")
    (folder / ".hidden.png").write_bytes(b"junk")
    write_npz(tmp_path / "ffhq.npz", pictures(5), source=np.array(names))
    for path in (folder, tmp_path / "ffhq.zip", tmp_path / "ffhq.npz", str(folder)):
        photos = read_photos(path)
        assert photos.names == names and len(photos) == 5 and photos.shape == (20, 20) and not photos.skipped
        assert torch.equal(photos.pixels, torch.from_numpy(pictures(5)).permute(0, 3, 1, 2))
        assert photos.pixels.dtype == torch.uint8
    single = read_photos(files[2])
    assert single.names == ("01000.png",) and torch.equal(single.pixels[0], photos.pixels[2])


def test_numbers_tell_test_from_training_images(folder):
    test, train = (read_photos(folder, split=split).names for split in ("test", "train"))
    assert test == ("00000/00007.png", "00000/00999.png")
    assert train == ("01000/01000.png", "01000/01002.png", "69000/69999.png")
    save(folder / "7" / "2000px_00998.png", pictures(1)[0])  # the last number of the file's own name counts
    save(folder / "7" / "64px_01001.png", pictures(1)[0])
    assert read_photos(folder, split="test").names == (*test, "7/2000px_00998.png")


def test_without_numbers_the_order_counts(tmp_path):
    images = np.broadcast_to(pictures(1, 4), (1003, 4, 4, 3))
    names = np.array([f"{chr(97 + i // 260)}{chr(97 + i // 26 % 10)}{chr(97 + i % 26)}" for i in range(1003)])
    path = write_npz(tmp_path / "a.npz", images, source=names)
    assert read_photos(path, split="train").names == tuple(names[1000:])
    assert len(read_photos(path, split="test")) == 1000
    plain = write_npz(tmp_path / "b.npz", images)
    assert read_photos(plain, split="train").names == ("b#1000", "b#1001", "b#1002")
    names[5] = "z99999"  # one number among names without is no numbering
    assert len(read_photos(write_npz(tmp_path / "c.npz", images, source=names), split="test")) == 1000


def test_an_npz_may_bring_its_own_split(tmp_path):
    source = np.array([f"{number}.jpg" for number in (3, 1500, 20, 4000)])
    path = write_npz(tmp_path / "a.npz", pictures(4), source=source, split=np.array([0, 1, 0, 1], np.uint8))
    assert read_photos(path, split="train").names == ("3.jpg", "20.jpg")
    assert read_photos(path, split="test").names == ("1500.jpg", "4000.jpg")


def test_values_are_in_minus_one_to_one_and_come_back():
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_values(levels)
    assert float(values[0]) == -1 and float(values[255]) == 1 and torch.equal(to_pixels(values), levels)
    assert to_pixels(torch.tensor([-3.0, 2.0, 0.003, 0.005])).tolist() == [0, 255, 128, 128]
    fine = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    assert float((to_values(to_pixels(fine)) - fine).std()) == pytest.approx(ROUNDING, rel=0.01)


def test_they_are_reduced_by_the_mean_over_areas(tmp_path):
    image = pictures(1, 24)[0]
    save(tmp_path / "1.png", image)
    half = read_photos(tmp_path, size=12).values([0])[0]
    exact = to_values(torch.from_numpy(image)).permute(2, 0, 1)
    np.testing.assert_allclose(half, exact.reshape(3, 12, 2, 12, 2).mean((2, 4)), atol=1.01 / 255)
    uneven = read_photos(tmp_path, size=7).values([0])[0]  # pixels belong to the area that their middle lies in
    share = ((torch.arange(24) + 0.5) * 7 / 24).long() == torch.arange(7)[:, None]
    rows = share / share.sum(1, keepdim=True)
    np.testing.assert_allclose(uneven, rows @ exact @ rows.T, atol=1.01 / 255)
    assert torch.equal(read_photos(tmp_path, size=24).pixels[0], torch.from_numpy(image).permute(2, 0, 1))


@pytest.mark.parametrize(("shape", "box"), [((10, 17), (slice(None), slice(3, 13))), ((19, 8), (slice(5, 13), ...))])
def test_the_square_in_the_middle_is_cut_out(tmp_path, shape, box):
    image = pictures(1, *shape)[0]
    save(tmp_path / "1.png", image)
    photos = read_photos(tmp_path)
    assert torch.equal(photos.pixels[0], torch.from_numpy(image[box]).permute(2, 0, 1))
    with pytest.raises(InputError, match=rf"1\.png: is {shape[0]} x {shape[1]}, not square; mend it"):
        read_photos(tmp_path, fit="exact")


def test_exact_demands_the_size(tmp_path):
    save(tmp_path / "1.png", pictures(1, 12)[0])
    assert read_photos(tmp_path, fit="exact").shape == read_photos(tmp_path, fit="exact", size=12).shape == (12, 12)
    with pytest.raises(InputError, match="is 12 x 12, not 6 x 6"):
        read_photos(tmp_path, fit="exact", size=6)
    with pytest.raises(InputError, match="is 12 x 12, smaller than 13 x 13"):
        read_photos(tmp_path, size=13)


def test_cameras_that_were_turned(tmp_path):
    image = pictures(1, 12)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    save(tmp_path / "1.png", image, exif=exif)
    shown = torch.from_numpy(np.rot90(image, -1).copy()).permute(2, 0, 1)
    assert torch.equal(read_photos(tmp_path).pixels[0], shown)


def test_palettes_and_opaque_alpha_are_colour(tmp_path):
    image = (pictures(1, 12)[0] // 128) * 255
    Image.fromarray(image).convert("P", palette=Image.Palette.ADAPTIVE, colors=8).save(tmp_path / "1.png")
    Image.fromarray(image).convert("RGBA").save(tmp_path / "2.png")
    photos = read_photos(tmp_path)
    assert len(photos) == 2 and torch.equal(photos.pixels[0], photos.pixels[1])


def faults(place):
    """One good photograph and one of each that is at fault, with what is said of it."""
    save(place / "1000.png", pictures(1, 12)[0])
    save(place / "1001.png", pictures(1, 12)[0][..., 0])
    save(place / "1002.png", np.repeat(pictures(1, 12)[0][..., :1], 3, axis=-1))
    save(place / "1003.png", pictures(1, 12)[0])
    content = (place / "1003.png").read_bytes()
    (place / "1003.png").write_bytes(content[: len(content) // 2])
    (place / "1004.jpg").write_bytes(b"not an image")
    save(place / "1005.png", pictures(1, 8)[0])
    clear = np.concatenate([pictures(1, 12)[0], np.full((12, 12, 1), 200, np.uint8)], -1)
    save(place / "1006.png", clear)
    Image.fromarray(pictures(1, 12)[0][..., 0].astype(np.uint16) * 200).save(place / "1007.png")
    save(place / "1008.png", pictures(1, 14)[0])
    return {
        "1001.png": "is grey",
        "1002.png": "is grey",
        "1003.png": "is damaged",
        "1004.jpg": "is damaged or no image",
        "1005.png": "is 8 x 8, smaller than 10 x 10",
        "1006.png": "is transparent",
        "1007.png": "is grey",
    }


def test_what_is_at_fault_is_refused_or_skipped(tmp_path):
    told = faults(tmp_path)
    with pytest.warns(InputWarning, match=r"7 photographs are left out, the first is .*1001\.png: is grey"):
        photos = read_photos(tmp_path, size=10, faulty="skip")
    assert photos.names == ("1000.png", "1008.png") and len(photos.pixels) == 2
    assert len(photos.skipped) == 7
    for line, (name, what) in zip(photos.skipped, told.items()):
        assert line.startswith(f"{tmp_path / name}: {what}")
    with pytest.raises(InputError, match=r"1001\.png: is grey; mend it or leave it out"):
        read_photos(tmp_path, size=10)
    for name, what in told.items():
        with pytest.raises(InputError, match=f"{name}: {what}"):
            read_photos(tmp_path / name, size=10)


def test_photographs_of_other_sizes_are_at_fault(tmp_path):
    for number, size in enumerate((12, 12, 10)):
        save(tmp_path / f"{number}.png", pictures(1, size)[0])
    with pytest.raises(InputError, match=r"2\.png: is 10 pixels wide where others are 12"):
        read_photos(tmp_path)
    with pytest.warns(InputWarning, match="1 photographs"):
        assert len(read_photos(tmp_path, faulty="skip")) == 2
    assert read_photos(tmp_path, size=10).shape == (10, 10)


def test_damaged_archives(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.name)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    at = content.find(b"IDAT") + 40
    content[at : at + 8] = bytes(8)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.zip/00007\.png: (cannot be taken out|is damaged)"):
        read_photos(tmp_path / "a.zip")
    with pytest.warns(InputWarning):
        assert len(read_photos(tmp_path / "a.zip", faulty="skip")) == 4
    (tmp_path / "b.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"b\.zip: is not a readable zip file"):
        read_photos(tmp_path / "b.zip")


def test_npz_files_that_hold_no_photographs(tmp_path):
    grey = write_npz(tmp_path / "grey.npz", pictures(3)[..., 0])
    with pytest.raises(InputError, match=r"grey\.npz/grey#0: is grey"):
        read_photos(grey)
    for name, arrays, message in [
        ("a", {"other": pictures(2)}, "holds no images"),
        ("b", {"images": pictures(2) / 255.0}, r"holds images of float64 \(2, 20, 20, 3\)"),
        ("c", {"images": pictures(2), "split": np.zeros(3)}, r"holds 2 images but split \(3,\)"),
        ("d", {"images": pictures(2), "source": np.array([{}, {}])}, "is not a readable npz"),
        ("e", {"images": np.zeros((2, 8, 8, 5), np.uint8)}, "has 5 channels"),
    ]:
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(InputError, match=rf"{name}\.npz.*{message}"):
            read_photos(tmp_path / f"{name}.npz")
    for content in (b"", b"nonsense", grey.read_bytes()[:900]):
        (tmp_path / "f.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"f\.npz: is not a readable npz"):
            read_photos(tmp_path / "f.npz")
    with (tmp_path / "g.npz").open("wb") as file:
        np.save(file, pictures(2))
    with pytest.raises(InputError, match=r"g\.npz: is not a readable npz"):
        read_photos(tmp_path / "g.npz")


def test_nothing_to_read(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no photograph in .*empty"):
        read_photos(tmp_path / "empty")
    with pytest.raises(InputError, match="no photograph in an empty list"):
        read_photos([])
    with pytest.raises(InputError, match=r"gone: does not exist"):
        read_photos(tmp_path / "gone")
    with pytest.raises(InputError, match=r"no photograph of the split 'train' .*split: all"):
        read_photos(folder / "00000", split="train")
    with pytest.raises(InputError, match="photographs of 0 pixels"):
        read_photos(folder, size=0)
    for options in ({"split": "validation"}, {"fit": "stretch"}, {"faulty": "mend"}):
        with pytest.raises(InputError, match=r"photographs have no .*; one of"):
            read_photos(folder, **options)


def test_several_sources_and_names_that_come_twice(tmp_path, folder):
    other = write_npz(tmp_path / "more.npz", pictures(3, seed=1))
    assert len(read_photos([folder, other])) == 8
    with pytest.raises(InputError, match=r"two photographs are called 00000/00007\.png"):
        read_photos([folder, folder])


# measurements


def test_a_whole_photograph_as_a_measurement(folder):
    photos = read_photos(folder)
    given = photos.measurement([3, 1])
    assert given.values.dtype == torch.float32 and given.values.shape == (2, 3, 20, 20)
    assert torch.equal(given.values, to_values(photos.pixels[[3, 1]])) and torch.equal(given.target, given.values)
    assert given.mask.shape == (2, 1, 20, 20) and bool(given.mask.all()) and given.encoding == Identity()
    assert given.source == ("01000/01002.png", "00000/00999.png")
    assert torch.equal(given.operator(given.target), given.values)
    assert torch.allclose(given.noise_std, torch.full((2, 1, 1, 1), ROUNDING)) and torch.equal(
        given.scale, torch.ones(2, 1, 1, 1)
    )
    assert photos.measurement(torch.tensor([0]), target=False).target is None


def test_masks_and_noise_go_by_name(folder, tmp_path):
    photos, law = read_photos(folder), RandomTiles()
    both = photos.measurement([0, 2], law=law, noise_std=0.1)
    alone = photos.measurement([2], law=law, noise_std=0.1)
    assert torch.equal(both.values[1:], alone.values) and torch.equal(both.mask[1:], alone.mask)
    moved = read_photos(folder, split="train").measurement([0], law=law, noise_std=0.1)
    assert torch.equal(moved.values, alone.values)
    assert not torch.equal(both.mask[0], both.mask[1])
    seeded = photos.measurement([2], law=law, noise_std=0.1, seed=1)
    assert not torch.equal(seeded.mask, alone.mask)
    quiet = photos.measurement([2], law=law)
    assert torch.equal(quiet.mask, alone.mask)  # noise does not change the mask
    assert torch.equal(quiet.values, Subsample(quiet.mask)(quiet.target))
    state = torch.get_rng_state()
    photos.measurement([0], law=law, noise_std=0.1)
    assert torch.equal(state, torch.get_rng_state())


def test_noise_has_the_level_stated(tmp_path):
    path = write_npz(tmp_path / "a.npz", pictures(4, 64))
    given = read_photos(path).measurement(range(4), law=RandomPixels.dropping(0.3), noise_std=0.2)
    error = (given.values - given.target)[given.mask.expand_as(given.values)]
    assert float(error.std()) == pytest.approx(0.2, rel=0.02) and abs(float(error.mean())) < 0.005
    assert float(given.noise_std[0]) == pytest.approx(math.hypot(0.2, ROUNDING))
    assert not bool(given.values[~given.mask.expand_as(given.values)].any())
    flat = error.reshape(-1)
    assert float(torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))[0, 1]) == pytest.approx(0, abs=0.03)


def test_the_working_scale_is_the_readers(folder):
    given = read_photos(folder).measurement([0, 1], law=RandomTiles())
    assert torch.equal(given.working_scale(), torch.ones(2, 1, 1, 1))
    darker = replace(given, values=0.1 * given.values)
    assert torch.equal(darker.working_scale(), torch.ones(2, 1, 1, 1))  # not that of the picture
    factor = torch.tensor([250.0, 0.5]).reshape(2, 1, 1, 1)
    scaled = given.scaled(factor)
    assert torch.allclose(scaled.working_scale(), 1 / factor)
    assert torch.allclose(scaled.scaled(scaled.working_scale()).values, given.values)
    unknown = replace(given, full_scale=None, values=given.values.to(torch.complex64))
    assert torch.equal(unknown.working_scale(), unknown.centre_scale())


# training data


def test_one_fixed_mask_and_nothing_else_in_every_draw(folder):
    data, seen = TrainingPhotos(str(folder), noise_std=0.1), {}
    assert len(data) == 3
    for i in range(20):
        batch = data.batch(stream(i), pixels=2 * 400)
        assert len(batch.values) == 2 and batch.target is None
        for values, mask, name in zip(batch.values, batch.mask, batch.source):
            before = seen.setdefault(name, (values, mask))
            assert torch.equal(before[0], values) and torch.equal(before[1], mask)
            assert not bool(values[~mask.expand_as(values)].any())
    assert sorted(seen) == ["01000/01000.png", "01000/01002.png", "69000/69999.png"]
    assert len({tuple(mask.flatten().tolist()) for _, mask in seen.values()}) == 3
    direct = read_photos(folder).measurement([2], law=RandomTiles(), noise_std=0.1)
    assert torch.equal(seen["01000/01000.png"][0], direct.values[0])
    assert torch.equal(seen["01000/01000.png"][1], direct.mask[0])


def test_what_was_not_measured_is_not_even_in_memory(folder):
    data = TrainingPhotos(str(folder))
    kept = data.photos.pixels
    for name, image in zip(data.photos.names, kept):
        mask = next(b.mask[0] for b in (data.batch(stream(i), pixels=1) for i in range(50)) if b.source == (name,))
        assert not bool(image[~mask.expand_as(image)].any()) and bool(image[mask.expand_as(image)].any())
    assert kept.dtype == torch.uint8


def test_options_reach_the_reader(folder, tmp_path):
    data = TrainingPhotos(str(folder), size=10, split="all", law=RandomPixels.dropping(0.5), seed=3)
    batch = data.batch(stream(), pixels=500)
    assert len(data) == 5 and batch.values.shape == (5, 3, 10, 10)
    assert torch.equal(batch.mask, data.batch(stream(), pixels=500).mask)
    other = replace(data, seed=4).batch(stream(), pixels=500)
    assert other.source == batch.source and not torch.equal(other.mask, batch.mask)
    wide = pictures(1, 20, 30)[0]
    save(folder / "99999.png", wide)
    with pytest.raises(InputError, match="not square"):
        _ = TrainingPhotos(str(folder), fit="exact").photos
    save(folder / "99999.png", wide[..., 0])
    with pytest.raises(InputError, match="is grey"):
        _ = FullPhotos(str(folder)).photos
    with pytest.warns(InputWarning):
        assert len(FullPhotos(str(folder), faulty="skip")) == 3


def test_laws_with_blind_spots_are_refused(folder):
    class Blind(RandomPixels):
        def inclusion_probability(self, shape):
            probability = super().inclusion_probability(shape).clone()
            probability[0, 0, 0] = 0
            return probability

    with pytest.raises(InputError, match="never samples 1 of 400 places"):
        _ = TrainingPhotos(str(folder), law=Blind()).photos


@pytest.mark.parametrize("kind", [TrainingPhotos, FullPhotos])
def test_batches_depend_on_the_generator_alone(folder, kind):
    state = torch.get_rng_state()
    one, two = (kind(str(folder)).batch(stream(5), pixels=800) for _ in range(2))
    assert one.source == two.source and torch.equal(one.values, two.values)
    assert torch.equal(state, torch.get_rng_state())
    data = kind(str(folder))
    assert [len(data.batch(stream(), pixels=pixels).values) for pixels in (1, 400, 900, 10**6)] == [1, 1, 2, 3]
    assert len(names_of(data)) == 3


def test_full_photographs(folder):
    batch = FullPhotos(str(folder)).batch(stream(), pixels=10**6)
    whole = read_photos(folder, split="train")
    order = [whole.names.index(name) for name in batch.source]
    assert torch.equal(batch.values, whole.values(order)) and bool(batch.mask.all()) and batch.target is None


# losses


class Network(nn.Module):
    """A small convolutional network with a condition; everything it sees counts."""

    def __init__(self, in_channels=3):
        super().__init__()
        self.first, self.last = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.level = nn.Linear(1, 8)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=stream(parameter.numel()))

    def forward(self, channels, condition):
        return self.last((self.first(channels) + self.level(condition)[:, :, None, None]).tanh())


def cases():
    yield NoiselessMSM(), DenoiserPartial(ImageDenoiser(Network()))
    yield NoiselessMSM(sigma_max=1.0), DenoiserPartial(ImageDenoiser(Network(), bfloat16=True))
    yield AmbientLoss(FurtherTiles()), AmbientDenoiser(Network(5), aliasing=0.15)
    yield AmbientLoss(FurtherPixels(0.2), weighting="relative"), AmbientDenoiser(Network(5), aliasing=0.15)


def run(loss, model, batch):
    model.zero_grad(set_to_none=True)
    value = loss(model, batch, stream(2))
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("poison", [NAN, float("inf"), 1e6])
def test_unmeasured_pixels_and_target_never_enter_a_loss(folder, case, poison):
    loss, model = list(cases())[case]
    batch = TrainingPhotos(str(folder), noise_std=0.05).batch(stream(), pixels=1200)
    value, gradient = run(loss, model, batch)
    assert bool(value.isfinite()) and any(bool(g.any()) for g in gradient) and 0 < float(value) < 100
    poisoned = torch.where(batch.mask, batch.values, torch.full_like(batch.values, poison))
    got, got_gradient = run(loss, model, replace(batch, values=poisoned, target=torch.full_like(poisoned, poison)))
    assert torch.equal(got, value) and all(torch.equal(a, b) for a, b in zip(gradient, got_gradient))
    louder = replace(batch, values=1.1 * batch.values)
    assert not torch.equal(run(loss, model, louder)[0], value)


def test_the_oracle_learns_from_whole_photographs_only(folder):
    model = ImageDenoiser(Network())
    value, gradient = run(CleanLoss(), model, FullPhotos(str(folder)).batch(stream(), pixels=1200))
    assert bool(value.isfinite()) and any(bool(g.any()) for g in gradient)
    for law in (RandomTiles(), RandomPixels()):
        with pytest.raises(InputError, match="fully sampled"):
            CleanLoss()(model, TrainingPhotos(str(folder), law=law).batch(stream(), pixels=1200), stream())


class Shrink(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, state, mask, encoding, sigma):
        return self.gain * state


def test_the_loss_is_per_measured_real_component(tmp_path):
    """Doing nothing to s + sigma n costs sigma^2 / sigma^2 = 1 a component, real or complex."""
    batch = TrainingPhotos(str(write_npz(tmp_path / "a.npz", pictures(8, 32), split=np.zeros(8)))).batch(
        stream(), pixels=8192
    )
    loss = NoiselessMSM(sigma_min=2.0, sigma_max=2.0)
    assert float(loss(Shrink(1.0), batch, stream())) == pytest.approx(1, rel=0.03)
    measured = batch.values[batch.mask.expand_as(batch.values)]
    assert float(loss(Shrink(0.0), batch, stream())) == pytest.approx(float(measured.square().mean()) / 4, rel=1e-3)


# the partial denoiser


class Gaussian(nn.Module):
    """The exact denoiser of N(0, variance) in every pixel, as a module."""

    def __init__(self, variance):
        super().__init__()
        self.exact = GaussianDenoiser(torch.zeros(1, 1, 1), torch.tensor(variance))

    def forward(self, noisy, sigma):
        return self.exact.denoise(noisy, sigma)


def test_the_partial_is_the_written_out_equation():
    state, mask = normal_like(torch.zeros(3, 3, 9, 10), generators(0, 3)), RandomTiles().draw((9, 10), stream())
    sigma = torch.tensor([0.1, 1.0, 3.0]).reshape(3, 1, 1, 1)
    partial = DenoiserPartial(Gaussian(0.7))
    expected = torch.where(mask, state * 0.7 / (0.7 + sigma.square()), 0)
    torch.testing.assert_close(partial(state, mask, Identity(), sigma), expected)
    poisoned = torch.where(mask, state, NAN)
    by_place = torch.where(
        mask, sigma, 50.0
    ).clone()  # a level outside the mask does not count, the highest inside does
    by_place[:, :, mask[0].nonzero()[0][0], mask[0].nonzero()[0][1]] = 0.01
    torch.testing.assert_close(partial(poisoned, mask, Identity(), by_place), expected)

    class Mean(nn.Module):  # everything it sees counts everywhere
        def forward(self, noisy, sigma):
            return noisy.mean((-2, -1), keepdim=True).expand_as(noisy)

    mean = torch.where(mask, state, 0).mean((-2, -1), keepdim=True)
    got = DenoiserPartial(Mean())(poisoned, mask, Identity(), sigma)
    torch.testing.assert_close(got, torch.where(mask, mean, 0))


def test_the_partial_of_noise_predictors_and_its_parameters():
    class Predictor(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.5))

        def forward(self, u, t):
            assert t.shape == (len(u),)
            return self.gain * u

    partial = DenoiserPartial(EpsilonVP(Predictor()))
    assert [name for name, _ in partial.named_parameters()] == ["denoiser.network.gain"]
    state, mask = normal_like(torch.zeros(2, 3, 8, 8), generators(0, 2)), RandomTiles().draw((8, 8), stream())
    got = partial(state, mask, Identity(), torch.full((2, 1, 1, 1), 1.0))
    expected = torch.where(mask, state * (1 - 0.5 / 2**0.5), 0)
    torch.testing.assert_close(got, expected)


def test_training_finds_wieners_gain(tmp_path):
    """Independent Gaussian pixels with holes: the best one-parameter denoiser is v / (v + sigma^2)."""
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(127.5, 0.3 * 127.5, (64, 16, 16, 3)).round(), 0, 255).astype(np.uint8)
    data = TrainingPhotos(str(write_npz(tmp_path / "a.npz", images, split=np.zeros(64))))
    batch = data.batch(stream(), pixels=64 * 256)
    loss = NoiselessMSM(sigma_min=0.4, sigma_max=0.4)
    low, middle, high = (float(loss(Shrink(gain), batch, stream())) for gain in (0.0, 0.5, 1.0))
    best = (3 * low - 4 * middle + high) / (4 * (low - 2 * middle + high))
    assert best == pytest.approx(0.09 / (0.09 + 0.16), rel=0.02)


def test_nothing_warns_without_cause(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingPhotos(str(folder)).batch(stream(), pixels=400)
