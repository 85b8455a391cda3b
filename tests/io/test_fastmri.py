import tracemalloc
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmri.errors import InputError, InputWarning
from msmri.io.fastmri import list_scans, open_scan, write_scan
from msmri.io.header import Header, parse_header, write_header
from msmri.io.kspace import centre_crop, crop_readout, normalise_mask, undersample
from msmri.measurement import Measurement
from msmri.physics.fourier import fft2c, ifft2c

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        yield


def rss(values: torch.Tensor) -> torch.Tensor:
    return ifft2c(values).abs().square().sum(1).sqrt()


def stored(path: Path, name: str = "kspace") -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][()]


def random_kspace(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


# reading


def test_a_multi_coil_slice_is_read_in_file_units(make_scan):
    path = make_scan()
    with open_scan(path) as scan:
        assert (scan.n_slices, scan.n_coils, scan.kspace_shape) == (3, 4, (3, 4, 48, 40))
        assert scan.attributes["acquisition"] == "AXT2"
        assert scan.mask is None and not scan.is_undersampled and scan.padding == (0, 0)
        assert bool(scan.acquired.all()) and scan.acquired.shape == (1, 1, 40)
        for index in range(3):
            measurement = scan.read(index)
            assert measurement.values.dtype == torch.complex64 and measurement.mask.dtype == torch.bool
            assert measurement.mask.shape == (1, 1, 1, 40) and bool(measurement.mask.all())
            assert torch.equal(measurement.values[0], torch.from_numpy(stored(path)[index]))
            assert measurement.source == (f"scan.h5#{index}",)
            assert measurement.scale == 1.0 and measurement.noise_std == 0.0
            torch.testing.assert_close(rss(measurement.values), measurement.target, rtol=1e-4, atol=1e-5)


def test_a_closed_scan_lets_go_of_its_file(make_scan):
    path = make_scan()
    with open_scan(path) as scan:
        pass
    assert not scan._file
    h5py.File(path, "r+").close()


def test_a_failed_check_lets_go_of_the_file(make_scan):
    path = make_scan(mask=np.ones(7), target=False)
    with pytest.raises(InputError):
        open_scan(path)
    h5py.File(path, "r+").close()


def test_a_single_coil_file_gets_a_coil_axis_and_its_own_reference(make_scan):
    path = make_scan(single=True)
    with h5py.File(path, "r+") as file:
        file["reconstruction_rss"] = np.zeros((3, 48, 40), np.float32)
    with open_scan(path) as scan:
        assert scan.kspace_shape == (3, 1, 48, 40) and scan.target_name == "reconstruction_esc"
        measurement = scan.read(1)
    assert measurement.values.shape == (1, 1, 48, 40)
    torch.testing.assert_close(rss(measurement.values), measurement.target, rtol=1e-4, atol=1e-5)


def test_a_multi_coil_file_prefers_the_root_sum_of_squares(make_scan):
    path = make_scan()
    with h5py.File(path, "r+") as file:
        file["reconstruction_esc"] = np.zeros((3, 48, 40), np.float32)
    with open_scan(path) as scan:
        assert scan.target_name == "reconstruction_rss"


def test_double_precision_and_big_endian_are_converted(make_scan):
    kspace = random_kspace(2, 3, 12, 10).numpy()
    for dtype in (np.complex128, ">c8"):
        with open_scan(make_scan(kspace=kspace.astype(dtype), shape=(12, 10), target=False)) as scan:
            assert torch.equal(scan.read(1).values[0], torch.from_numpy(kspace[1]))


def test_slices_of_several_sizes_are_read_from_several_files(make_scan):
    for shape in ((48, 40), (31, 45), (64, 33)):
        with open_scan(make_scan(f"{shape[0]}.h5", shape=shape, slices=1)) as scan:
            assert scan.read(0).values.shape == (1, 4, *shape) and scan.output_shape == shape


def test_an_index_outside_the_scan_is_refused(make_scan):
    with open_scan(make_scan()) as scan:
        for index in (3, -1):
            with pytest.raises(InputError, match=f"no slice {index}.*slices 0 to 2"):
                scan.read(index)


# readout oversampling and output shape


@pytest.mark.parametrize(("shape", "recon"), [((96, 40), (48, 32)), ((97, 41), (48, 33)), ((96, 40), (47, 40))])
def test_oversampled_readout_is_cropped_and_the_image_stays_equal(make_scan, shape, recon):
    path = make_scan(shape=shape, recon=recon)
    with open_scan(path) as scan, open_scan(path, crop_readout=False) as whole:
        measurement, full = scan.read(0), whole.read(0)
        assert measurement.values.shape == (1, 4, recon[0], shape[1]) and full.values.shape == (1, 4, *shape)
        assert scan.output_shape == recon
        torch.testing.assert_close(
            scan.crop_to_output(ifft2c(measurement.values)), scan.crop_to_output(ifft2c(full.values))
        )
        for one in (measurement, full):
            image = scan.crop_to_output(rss(one.values))
            torch.testing.assert_close(image, one.target, rtol=1e-4, atol=1e-5)


def test_the_crop_keeps_the_noise_std():
    noise = random_kspace(1, 4, 256, 64) * 2**0.5
    cropped = crop_readout(noise, 128)
    assert cropped.shape == (1, 4, 128, 64)
    assert cropped.real.std().item() == pytest.approx(1, rel=0.02)
    assert cropped.imag.std().item() == pytest.approx(1, rel=0.02)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.data())
def test_cropping_in_kspace_is_cropping_the_image(rows, columns, data):
    kept = data.draw(st.integers(1, rows))
    image = random_kspace(2, rows, columns)
    torch.testing.assert_close(ifft2c(crop_readout(fft2c(image), kept)), centre_crop(image, (kept, columns)))


def test_unsampled_columns_stay_zero_through_the_crop(make_scan, column_mask):
    mask = column_mask()
    with open_scan(make_scan(shape=(96, 40), recon=(48, 40), mask=mask)) as scan:
        measurement = scan.read(2)
    assert measurement.values.shape[-2] == 48
    assert torch.equal(measurement.values.abs().amax((0, 1, 2)) > 0, torch.from_numpy(mask) > 0)
    assert torch.equal(measurement.mask[0, 0, 0], torch.from_numpy(mask) > 0)


def test_a_two_dimensional_mask_is_not_cropped(make_scan):
    mask = np.random.default_rng(0).random((96, 40)) < 0.4
    with open_scan(make_scan(shape=(96, 40), recon=(48, 40), mask=mask)) as scan:
        measurement = scan.read(0)
        assert measurement.values.shape == (1, 4, 96, 40) and measurement.mask.shape == (1, 1, 96, 40)
        assert scan.crop_to_output(rss(measurement.values)).shape == (1, 48, 40)
    assert torch.equal(measurement.mask[0, 0], torch.from_numpy(mask))
    assert torch.equal(measurement.values[0, 0] != 0, torch.from_numpy(mask))


def test_output_shape_without_reference_is_the_headers(make_scan):
    with open_scan(make_scan(shape=(96, 40), recon=(48, 30), target=False)) as scan:
        assert scan.output_shape == (48, 30)
        assert scan.read(0).target is None


def test_a_matrix_narrower_than_the_output_is_padded(make_scan):
    path = make_scan(shape=(64, 21), recon=(32, 21))
    with h5py.File(path, "r+") as file:
        file["ismrmrd_header"][()] = write_header(Header((64, 21), (32, 32), 10, 20)).encode()
        del file["reconstruction_rss"]
    with open_scan(path) as scan:
        assert scan.output_shape == (32, 32)
        image = rss(scan.read(0).values)
        output = scan.crop_to_output(image)
    assert output.shape == (1, 32, 32)
    assert torch.equal(output[..., 5:26], image) and output[..., :5].sum() + output[..., 26:].sum() == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.integers(1, 15), st.integers(1, 15), st.integers(1, 15))
def test_centre_crop_is_fastmris_and_padding_undoes_it(y, x, height, width):
    from fastmri.data.transforms import center_crop

    image = torch.arange(2.0 * y * x).reshape(2, y, x)
    result = centre_crop(image, (height, width))
    assert result.shape == (2, height, width)
    if height <= y and width <= x:
        assert torch.equal(result, center_crop(image, (height, width)))
    if height >= y and width >= x:
        assert torch.equal(center_crop(result, (y, x)), image) and result.sum() == image.sum()


# header


def test_a_missing_header_works_with_one_warning(make_scan):
    path = make_scan(header=False, shape=(48, 40), recon=(24, 40))
    with pytest.warns(InputWarning, match=r"scan\.h5: no ismrmrd_header") as caught, open_scan(path) as scan:
        assert scan.header is None and scan.output_shape == (24, 40)
        assert scan.read(0).values.shape == (1, 4, 24, 40)
        assert scan.padding == (0, 0)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(InputWarning), open_scan(make_scan(header=False, target=False)) as scan:
        assert scan.output_shape == (48, 40)


@pytest.mark.parametrize("header", [b"not xml", b"<a/>", b"\xff\xfe", b""])
def test_an_unreadable_header_is_a_missing_one(make_scan, header):
    path = make_scan()
    with h5py.File(path, "r+") as file:
        del file["ismrmrd_header"]
        file["ismrmrd_header"] = header
    with pytest.warns(InputWarning, match="cannot be read"), open_scan(path) as scan:
        assert scan.header is None and scan.read(0).values.shape == (1, 4, 48, 40)


def test_the_header_may_be_stored_in_any_way(make_scan):
    path = make_scan()
    xml = stored(path, "ismrmrd_header")
    for value in (xml.decode(), np.array([xml], dtype=object), np.bytes_(xml), np.frombuffer(xml, np.uint8)):
        with h5py.File(path, "r+") as file:
            del file["ismrmrd_header"]
            if isinstance(value, np.ndarray) and value.dtype == object:
                file.create_dataset("ismrmrd_header", data=value, dtype=h5py.special_dtype(vlen=bytes))
            else:
                file["ismrmrd_header"] = value
        with open_scan(path) as scan:
            assert scan.header == Header((48, 40), (48, 40), 20, 39)


def test_a_header_ismrmrd_refuses_is_read_element_by_element():
    header = Header((640, 368), (320, 320), 166, 331)
    xml = write_header(header)
    assert parse_header(xml) == header
    strange = xml.replace("<encoding>", "<unheardOf>1</unheardOf><encoding>")
    assert strange != xml and parse_header(strange) == header
    assert parse_header(xml.replace("http://www.ismrm.org/ISMRMRD", "urn:other")) == header
    assert parse_header(xml.replace("kspace_encoding_step_1", "other").encode()) == Header((640, 368), (320, 320))
    with pytest.raises(ValueError, match="invalid literal"):
        parse_header(xml.replace("640", "many"))


def test_header_numbers_equal_those_of_fastmri(make_scan):
    from fastmri.data import SliceDataset

    path = make_scan(shape=(96, 44), recon=(48, 40), padding=(3, 5))
    metadata = SliceDataset(path.parent, "multicoil").raw_samples[0].metadata
    with open_scan(path) as scan:
        assert scan.header.padding_left == metadata["padding_left"] == 3
        assert scan.header.padding_right == metadata["padding_right"] == 39
        assert (*scan.header.encoded, 1) == metadata["encoding_size"]
        assert (*scan.header.recon, 1) == metadata["recon_size"]


def test_somebody_elses_header_is_reported_and_does_not_enlarge_the_image(make_scan):
    path = make_scan(target=False)
    with h5py.File(path, "r+") as file:
        file["ismrmrd_header"][()] = write_header(Header((640, 320), (320, 32), 100, 250)).encode()
    with pytest.warns(InputWarning, match=r"\(640, 320\).*\(48, 40\)"), open_scan(path) as scan:
        assert scan.output_shape == (48, 32) and scan.padding == (0, 0)


# margins


@pytest.mark.parametrize("header", [True, False])
def test_margins_are_found_and_never_counted(make_scan, header):
    path = make_scan(padding=(3, 5), header=header)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        scan = open_scan(path)
    with scan:
        assert scan.padding == (3, 5) and not scan.is_undersampled
        expected = torch.ones(40, dtype=torch.bool)
        expected[:3] = expected[35:] = False
        assert torch.equal(scan.acquired, expected[None, None])
        measurement = scan.read(0)
        assert torch.equal(measurement.mask[0], scan.acquired) and measurement.target is not None
        again = undersample(measurement, torch.ones(1, 1, 1, 40, dtype=torch.bool))
        assert torch.equal(again.mask, measurement.mask)


def test_margins_of_the_header_are_believed_only_where_data_are_zero(make_scan):
    with open_scan(make_scan(padding=(2, 0), header_padding=(4, 6))) as scan:
        assert scan.padding == (2, 0)
    with open_scan(make_scan(padding=(4, 6), header_padding=(1, 0))) as scan:
        assert scan.padding == (4, 6)


def test_outer_columns_of_an_undersampled_file_are_margins_only_by_the_header(make_scan, column_mask):
    mask = column_mask()  # never samples columns 0, 1 and 39
    zero = mask == 0
    with open_scan(make_scan(zero=zero)) as scan:
        assert scan.padding == (0, 0) and scan.is_undersampled
    with open_scan(make_scan(zero=zero, header_padding=(2, 0))) as scan:
        assert scan.padding == (2, 0) and scan.is_undersampled


# prospective undersampling


def test_a_mask_in_the_file_is_used(make_scan, column_mask):
    mask = column_mask()
    for stored_mask in (mask, mask.astype(bool), mask.astype(np.float32), mask[None], np.tile(mask, (48, 1))):
        with open_scan(make_scan(mask=stored_mask)) as scan:
            assert scan.mask.shape == (1, 1, 40) and scan.is_undersampled
            measurement = scan.read(0)
            assert torch.equal(measurement.mask, torch.from_numpy(mask > 0)[None, None, None])
            assert bool((measurement.values[..., mask == 0] == 0).all())
            assert measurement.acceleration.item() == pytest.approx(40 / mask.sum())
            assert measurement.target is not None  # the k-space was full: the reference is a true one


def test_a_mask_that_samples_all_leaves_the_scan_fully_sampled(make_scan):
    with open_scan(make_scan(mask=np.ones(40))) as scan:
        assert not scan.is_undersampled and scan.read(0).target is not None


def test_each_slice_may_have_its_own_mask(make_scan, column_mask):
    masks = np.stack([column_mask(seed=seed)[None] for seed in range(3)])
    with open_scan(make_scan(mask=masks)) as scan:
        assert scan.mask.shape == (3, 1, 40)
        for index in range(3):
            assert torch.equal(scan.read(index).mask[0, 0], torch.from_numpy(masks[index] > 0))


def test_sampled_columns_without_data_are_reported_and_taken_as_margins(make_scan, column_mask):
    mask = column_mask()
    mask[[1, 38]] = 1
    path = make_scan(mask=mask, padding=(2, 2), header_padding=(0, 0))
    with open_scan(path) as scan:
        with pytest.warns(InputWarning, match="2 columns that the mask calls sampled hold only zeros") as caught:
            assert scan.padding == (2, 2)
        assert len(caught) == 1 and caught[0].filename == __file__
        expected = mask.copy()
        expected[[1, 38]] = 0
        assert torch.equal(scan.read(0).mask[0, 0, 0], torch.from_numpy(expected) > 0)


def test_zero_columns_without_a_mask_give_the_mask(make_scan, column_mask):
    mask = column_mask()
    with open_scan(make_scan(zero=mask == 0, shape=(96, 40), recon=(48, 40))) as scan:
        assert scan.mask is None and scan.is_undersampled
        measurement = scan.read(1)
    assert measurement.mask.shape == (1, 1, 1, 40)
    assert torch.equal(measurement.mask[0, 0, 0], torch.from_numpy(mask) > 0)
    assert measurement.values.shape[-2] == 48


def test_two_dimensional_zeros_without_a_mask_give_the_mask(make_scan):
    mask = np.random.default_rng(1).random((48, 40)) < 0.5
    with open_scan(make_scan(zero=~mask)) as scan:
        assert scan.is_undersampled
        assert torch.equal(scan.read(0).mask[0, 0], torch.from_numpy(mask))


def test_a_zero_of_one_coil_and_a_few_stray_zeros_are_measured(make_scan):
    zero = np.zeros((4, 48, 40), bool)
    zero[0, :, 7] = True
    zero[:, 3, 5:12] = True
    with open_scan(make_scan(zero=zero)) as scan:
        assert not scan.is_undersampled and scan.read(0).mask.shape == (1, 1, 1, 40)
        assert bool(scan.read(0).mask.all())


def test_a_zero_filled_reference_is_not_a_reference(make_scan, column_mask):
    path = make_scan(zero=column_mask() == 0)
    with open_scan(path) as scan:
        target = scan.read(0).target
        assert target is not None
        zero_filled = np.concatenate([rss(scan.read(index).values).numpy() for index in range(3)])
    with h5py.File(path, "r+") as file:
        file["reconstruction_rss"][()] = zero_filled
    with open_scan(path) as scan, pytest.warns(InputWarning, match="zero-filled") as caught:
        assert scan.read(0).target is None
    assert caught[0].filename == __file__


# retrospective undersampling


def test_undersampling_zeroes_by_selection_and_composes(make_scan, column_mask):
    with open_scan(make_scan(padding=(3, 0))) as scan:
        measurement = scan.read(0)
    mask = torch.from_numpy(column_mask(seed=3) > 0)[None, None, None]
    mask[..., 1] = True  # a column of the margin
    result = undersample(measurement, mask)
    expected = mask.clone()
    expected[..., :3] = False
    assert torch.equal(result.mask, expected) and result.source == measurement.source
    assert torch.equal(result.values, measurement.values * expected)
    assert result.target is measurement.target and bool(measurement.mask[..., 3:].all())


def test_a_nan_outside_the_mask_does_not_leak():
    values = random_kspace(1, 2, 6, 8)
    mask = torch.arange(8)[None, None, None] % 2 == 0
    values[..., 1::2] = torch.nan
    result = undersample(Measurement(values, torch.ones(1, 1, 1, 8, dtype=torch.bool)), mask)
    assert bool(result.values.isfinite().all()) and bool((result.values[..., 1::2] == 0).all())


def test_undersampling_checks_its_mask():
    measurement = Measurement(random_kspace(1, 2, 6, 8), torch.ones(1, 1, 1, 8, dtype=torch.bool))
    for shape in ((1, 1, 1, 7), (1, 1, 5, 8)):
        with pytest.raises(InputError, match=r"does not fit k-space of \(6, 8\)"):
            undersample(measurement, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(InputError, match="leaves nothing"):
        undersample(measurement, torch.zeros(1, 1, 1, 8, dtype=torch.bool))
    assert undersample(measurement, torch.ones(1, 6, 8, dtype=torch.bool)).mask.shape == (1, 1, 6, 8)


# hostile files


def hostile(make_scan, tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bad.h5"
    good = random_kspace(2, 3, 12, 10).numpy()
    arrays = {
        "rank 2": good[0, 0],
        "rank 5": good[..., None],
        "real": good.real,
        "real pairs": np.stack([good.real, good.imag], -1),
        "integers": good.real.astype(np.int16),
        "no slices": good[:0],
        "no coils": good[:, :0],
        "no rows": good[:, :, :0],
        "single, no slices": good[:0, 0],
        "text": np.array([b"kspace"]),
        "compound": np.zeros((2, 3, 12, 10), dtype=[("real", "f4"), ("imag", "f4")]),
    }
    if kind in arrays:
        with h5py.File(path, "w") as file:
            file["kspace"] = arrays[kind]
    elif kind in ("truncated", "half"):
        content = make_scan().read_bytes()
        path.write_bytes(content[: 600 if kind == "truncated" else len(content) // 2])
    elif kind == "text file":
        path.write_text("subject,scanner\n")
    elif kind == "empty file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "group":
        with h5py.File(path, "w") as file:
            file["kspace/real"] = good.real
    elif kind == "dangling":
        with h5py.File(path, "w") as file:
            file["kspace"] = h5py.SoftLink("/nowhere")
    elif kind == "nothing":
        h5py.File(path, "w").close()
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("directory", "is a directory"),
        ("truncated", "truncated or damaged"),
        ("half", "truncated or damaged"),
        ("text file", "not an HDF5 file"),
        ("empty file", "0 bytes"),
        ("nothing", "no dataset 'kspace'; it holds no datasets"),
        ("dangling", "no dataset 'kspace'"),
        ("group", "no dataset 'kspace'; it holds kspace/real"),
        ("rank 2", r"2 axes \(12, 10\); store it as \(slices, coil, ky, kx\)"),
        ("rank 5", "5 axes"),
        ("real", "not complex but float32; store it as one complex64 array"),
        ("real pairs", "not complex but float32; store it as one complex64 array"),
        ("integers", "not complex but int16"),
        ("compound", "a compound of its parts"),
        ("text", "not complex"),
        ("no slices", "no slices"),
        ("single, no slices", "no slices"),
        ("no coils", "no coils"),
        ("no rows", "no rows"),
    ],
)
def test_a_hostile_file_is_refused_in_one_line_that_names_it(make_scan, tmp_path, kind, words):
    path = hostile(make_scan, tmp_path, kind)
    with pytest.raises(InputError, match=words) as caught:
        open_scan(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert caught.value.path == path and caught.value.mend


@pytest.mark.parametrize(
    "name", ["Kspace", "KSPACE", "k_space", "ksp", "k-space", "kspace_full", "data/kspace", "kspac"]
)
def test_a_near_miss_is_suggested(tmp_path, name):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["something/else"] = np.zeros(3)
        file["mask"] = np.zeros(3)
        file[name] = np.zeros((1, 1, 4, 4), np.complex64)
    with pytest.raises(InputError, match=f"rename '{name}' to 'kspace'"):
        open_scan(tmp_path / "a.h5")


def test_no_near_miss_lists_what_is_there(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["reconstruction"] = np.zeros(3)
        file["mask"] = np.zeros(3)
    with pytest.raises(InputError, match="it holds mask, reconstruction"):
        open_scan(tmp_path / "a.h5")


def test_an_ismrmrd_raw_file_is_recognised():
    path = SHARED / "fixtures" / "ismrmrd_shepp_logan_64_8ch.h5"
    if not path.exists():
        pytest.skip("no shared data")
    with pytest.raises(InputError, match="ISMRMRD raw file; convert"):
        open_scan(path)


@pytest.mark.parametrize("shape", [(39,), (41,), (40, 48), (2, 1, 40), ()])
def test_a_mask_of_the_wrong_length_names_both(make_scan, shape):
    path = make_scan(mask=np.ones(shape), target=False)
    with pytest.raises(InputError, match=r"mask has shape \(.*kspace has 40 columns.*length 40") as caught:
        open_scan(path)
    assert str(shape) in str(caught.value)


def test_a_mask_must_be_zeros_and_ones():
    shape = (3, 4, 48, 40)
    with pytest.raises(InputError, match="samples nothing"):
        normalise_mask(np.zeros(40), shape)
    with pytest.raises(InputError, match="0 and 1"):
        normalise_mask(np.full(40, np.nan), shape)
    with pytest.raises(InputError, match="0 and 1"):
        normalise_mask(np.full(40, b"yes"), shape)


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "NaN"), (np.inf, "infinite"), (complex(0, -np.inf), "infinite"), (0, "only zeros")]
)
def test_a_bad_slice_is_named_and_the_others_are_read(make_scan, value, words):
    path = make_scan()
    with h5py.File(path, "r+") as file:
        if value == 0:
            file["kspace"][1] = 0
        else:
            file["kspace"][1, 2, 3, 4] = value
    with open_scan(path) as scan:
        with pytest.raises(InputError, match=rf"scan\.h5: slice 1 .*{words}"):
            scan.read(1)
        assert not scan.is_undersampled and scan.padding == (0, 0)
        scan.read(0), scan.read(2)


def test_doubles_too_large_for_single_precision_are_refused(make_scan):
    kspace = random_kspace(1, 2, 12, 10).numpy().astype(np.complex128)
    kspace[0, 0, 0, 0] = 1e300
    path = make_scan(kspace=kspace, shape=(12, 10), target=False)
    with open_scan(path) as scan, pytest.raises(InputError, match="slice 0"):
        scan.read(0)


def test_a_scan_without_one_usable_slice_says_why(make_scan):
    path = make_scan(kspace=np.zeros((3, 2, 12, 10), np.complex64), shape=(12, 10), target=False)
    with open_scan(path) as scan, pytest.raises(InputError, match="slice 1 holds only zeros"):
        _ = scan.padding


def test_a_mask_that_misses_all_data_is_refused(make_scan):
    mask = np.zeros(40)
    mask[:3] = 1
    with open_scan(make_scan(mask=mask, padding=(4, 0))) as scan, pytest.raises(InputError, match="where the mask"):
        scan.read(0)


def test_a_damaged_slice_is_named(make_scan):
    kspace = random_kspace(3, 2, 32, 32).numpy()
    path = make_scan(target=False)
    write_scan(path, kspace, compress=True)
    with h5py.File(path) as file:
        chunk = file["kspace"].id.get_chunk_info_by_coord((1, 0, 0, 0))
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    with open_scan(path) as scan:
        with pytest.raises(InputError, match="slice 1 is damaged"):
            scan.read(1)
        scan.read(2)


def test_an_unfitting_reference_is_left_out_with_a_warning(make_scan):
    path = make_scan()
    with h5py.File(path, "r+") as file:
        del file["reconstruction_rss"]
        file["reconstruction_rss"] = np.zeros((2, 48, 40), np.float32)
    with pytest.warns(InputWarning, match="reconstruction_rss has shape"), open_scan(path) as scan:
        assert scan.read(0).target is None
    path = make_scan()
    with h5py.File(path, "r+") as file:
        file["reconstruction_rss"][0, 3, 3] = np.nan
    with open_scan(path) as scan:
        with pytest.warns(InputWarning, match="slice 0 is not finite"):
            assert scan.read(0).target is None
        assert scan.read(1).target is not None


# streaming


def test_reading_one_slice_reads_no_other(make_scan, monkeypatch):
    path = make_scan(slices=5)
    read: list[object] = []
    original = h5py.Dataset.__getitem__

    def spy(self, key, *rest, **options):
        if self.name == "/kspace":
            read.append(key)
        return original(self, key, *rest, **options)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    with open_scan(path) as scan:
        assert read == []
        scan.read(4)
        assert read == [4]
        assert scan.padding == (0, 0) and not scan.is_undersampled and bool(scan.acquired.all())
        assert read == [4, 2]


def test_memory_does_not_grow_with_the_number_of_slices(tmp_path):
    peaks = []
    for slices in (2, 24):
        path = tmp_path / f"{slices}.h5"
        write_scan(path, random_kspace(slices, 4, 64, 64))
        tracemalloc.start()
        with open_scan(path) as scan:
            assert not scan.is_undersampled
            for index in range(slices):
                scan.read(index)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_slice = 4 * 64 * 64 * 8
    assert peaks[1] < peaks[0] + one_slice // 2 and peaks[1] < 24 * one_slice / 4


# lists of files


def test_files_and_directories_are_listed_once_and_sorted(tmp_path, monkeypatch):
    for name in ("b.h5", "a.h5", ".hidden.h5", "c.txt", "d.h5.part", "sub/e.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [path.name for path in list_scans([tmp_path / "b.h5", tmp_path, tmp_path / "gone.h5"])]
    assert names == ["b.h5", "a.h5", "gone.h5"]
    assert list_scans([str(tmp_path / "sub")]) == [tmp_path / "sub" / "e.h5"]
    monkeypatch.chdir(tmp_path)
    assert list_scans(["b.h5", tmp_path / "b.h5"]) == [Path("b.h5")]


def test_an_empty_list_is_an_error(tmp_path):
    for paths in ([tmp_path], []):
        with pytest.raises(InputError, match=r"no \.h5 file"):
            list_scans(paths)


# writing


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_written_is_read(tmp_path, column_mask, compress):
    kspace, mask = random_kspace(3, 4, 24, 40), torch.from_numpy(column_mask())
    target = random_kspace(3, 20, 36).abs()
    path = tmp_path / "a.h5"
    write_scan(path, kspace, mask=mask, target=target, attributes={"acquisition": "AXT1"}, compress=compress)
    assert sorted(tmp_path.iterdir()) == [path]
    with h5py.File(path) as file:
        assert file["kspace"].chunks == ((1, 1, 24, 40) if compress else None)
        assert file["kspace"].compression == ("gzip" if compress else None)
    with open_scan(path, crop_readout=False) as scan:
        assert scan.header == Header((24, 40), (20, 36), 20, 39) and scan.output_shape == (20, 36)
        assert scan.attributes["acquisition"] == "AXT1" and scan.attributes["patient_id"] == "a"
        assert scan.attributes["max"] == pytest.approx(target.max().item())
        assert scan.attributes["norm"] == pytest.approx(target.norm().item())
        measurement = scan.read(2)
    assert torch.equal(measurement.values[0], torch.where(mask > 0, kspace[2], 0))
    assert torch.equal(measurement.target[0], target[2])


def test_a_single_coil_scan_and_a_header_of_ones_own(tmp_path):
    kspace = random_kspace(2, 24, 40).to(torch.complex128).numpy()
    header = Header((24, 40), (12, 30), 17, 35)
    for form in (header, write_header(header)):
        write_scan(tmp_path / "a.h5", kspace, target=np.ones((2, 12, 30)), header=form)
        assert stored(tmp_path / "a.h5").dtype == np.complex64
        with open_scan(tmp_path / "a.h5") as scan:
            assert scan.header == header and scan.n_coils == 1 and scan.target_name == "reconstruction_esc"
    assert (header.padding_left, header.padding_right) == (3, 39)


def test_wrong_arrays_are_not_written(tmp_path):
    path, good = tmp_path / "a.h5", random_kspace(2, 3, 8, 8)
    for arguments in ({"kspace": good.real}, {"kspace": good[0, 0]}, {"kspace": good, "target": torch.ones(3, 8, 8)}):
        with pytest.raises(ValueError, match="must be"):
            write_scan(path, **arguments)
    with pytest.raises(InputError, match="8 columns"):
        write_scan(path, good, mask=torch.ones(7))
    assert list(tmp_path.iterdir()) == []


def test_fastmris_own_dataset_reads_what_is_written(tmp_path, column_mask):
    from fastmri.data import SliceDataset
    from fastmri.data.transforms import UnetDataTransform

    kspace, target, mask = random_kspace(2, 3, 32, 40), random_kspace(2, 16, 16).abs(), column_mask()
    header = Header((32, 40), (16, 16), 18, 35)
    write_scan(tmp_path / "multi.h5", kspace, target=target, mask=mask, header=header)
    dataset = SliceDataset(tmp_path, "multicoil")
    assert len(dataset) == 2
    values, read_mask, read_target, attributes, name, index = dataset[1]
    np.testing.assert_array_equal(values, kspace[1].numpy())
    np.testing.assert_array_equal(read_mask, mask)
    np.testing.assert_array_equal(read_target, target[1].numpy())
    assert (attributes["padding_left"], attributes["padding_right"]) == (2, 38)
    assert attributes["recon_size"] == (16, 16, 1) and attributes["max"] == pytest.approx(target.max().item())
    assert (name, index) == ("multi.h5", 1)
    assert SliceDataset(tmp_path, "multicoil", transform=UnetDataTransform("multicoil"))[0].image.shape == (16, 16)


def test_fastmris_own_dataset_reads_a_single_coil_scan(tmp_path):
    from fastmri.data import SliceDataset

    kspace, target = random_kspace(2, 16, 16), torch.ones(2, 16, 16)
    write_scan(tmp_path / "single.h5", kspace, target=target)
    values, mask, read_target, *_ = SliceDataset(tmp_path, "singlecoil")[0]
    np.testing.assert_array_equal(values, kspace[0].numpy())
    assert mask is None and read_target.shape == (16, 16)


# real scans


@pytest.mark.parametrize(
    ("name", "coils", "matrix", "undersampled"),
    [
        ("kspace/brain_mprage_4ch.h5", 4, (256, 256), False),
        ("kspace/brain_smallfov_8ch.h5", 8, (320, 168), False),
        ("kspace-no-licence-stated/brain_t1_8ch_a.h5", 8, (230, 180), False),
        ("kspace-undersampled/brain_poisson_8ch.h5", 8, (230, 180), True),
    ],
)
def test_real_scans_open(name, coils, matrix, undersampled):
    path = SHARED / name
    if not path.exists():
        pytest.skip("no shared data")
    with open_scan(path) as scan:
        assert (scan.n_slices, scan.n_coils, scan.output_shape) == (1, coils, matrix)
        assert scan.is_undersampled == undersampled and scan.padding == (0, 0)
        if undersampled:
            with pytest.warns(InputWarning, match="zero-filled"):
                measurement = scan.read(0)
            assert measurement.target is None and measurement.mask.shape == (1, 1, *matrix)
            assert measurement.acceleration.item() == pytest.approx(1 / 0.124, rel=0.01)
        else:
            measurement = scan.read(0)
            assert measurement.mask.shape == (1, 1, 1, matrix[1]) and bool(measurement.mask.all())
            torch.testing.assert_close(rss(measurement.values), measurement.target, rtol=1e-3, atol=1e-2)
