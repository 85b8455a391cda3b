import json
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from msmri.cli import app
from msmri.errors import InputError
from msmri.io import open_scan, read_maps, read_reconstruction, write_maps, write_scan
from msmri.physics.coils import root_sum_of_squares
from msmri.physics.espirit import Espirit
from msmri.physics.fourier import ifft2c
from msmri.physics.masks import RandomLines
from msmri.physics.simulate import coil_maps, phantom, simulate_kspace
from msmri.preparation import Preparation, check_maps, measurements, read_slice

SIZE = 40
LAW = ["--mask", "random-lines", "-R", "3", "--center-lines", "10"]
CPU = ["--device", "cpu"]


def write(path: Path, *, undersampled: bool = False, seed: int = 0) -> Path:
    rng = torch.Generator().manual_seed(seed)
    images = torch.stack([phantom((SIZE, SIZE), rng) for _ in range(2)])
    kspace = simulate_kspace(images, coil_maps((SIZE, SIZE), 4, rng), rng, noise_std=0.005)[0]
    if undersampled:
        mask = RandomLines(acceleration=3, centre_lines=10).draw((SIZE, SIZE), rng)
        write_scan(path, torch.where(mask, kspace, 0), mask=mask)
    else:
        write_scan(path, kspace, target=root_sum_of_squares(ifft2c(kspace)))
    return path


@pytest.fixture
def scan(tmp_path) -> Path:
    return write(tmp_path / "scan.h5")


def invoke(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr, result.exception)
    return result


def errors(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


def recon(scan, out, *more, code=0):
    return invoke("recon", scan, "-o", out, "--method", "zero-filled", *CPU, *more, code=code)


def manifest(out: Path) -> dict:
    return json.loads((out / "zero-filled" / "scan.json").read_text())


@pytest.mark.parametrize(
    "options",
    [
        LAW,
        [*LAW, "--seed", "7", "--mask-per", "file"],
        [*LAW, "--noise", "0.02", "--coils", "3", "--crop-to", "32", "--sets", "1"],
    ],
)
def test_round_trip_of_retrospective_input(tmp_path, scan, options):
    invoke("coils", scan, "-o", tmp_path / "maps", *CPU, *options)
    recon(scan, tmp_path / "given", *options, "--maps", tmp_path / "maps")
    recon(scan, tmp_path / "own", *options)
    given, own = (read_reconstruction(tmp_path / name / "zero-filled" / "scan.h5") for name in ("given", "own"))
    torch.testing.assert_close(given, own)
    told = manifest(tmp_path / "given")["maps"]
    assert told["made from"]["name"] == "scan.h5" and "note" not in told
    assert told["made from"]["input"] == manifest(tmp_path / "given")["input"]["sha256"]
    assert "maps" not in manifest(tmp_path / "own")


def test_round_trip_of_prospective_input(tmp_path):
    scan = write(tmp_path / "scan.h5", undersampled=True)
    invoke("coils", scan, "-o", tmp_path / "maps", *CPU, "--seed", "5")  # nothing is drawn: the seed is of no matter
    recon(scan, tmp_path / "given", "--maps", tmp_path / "maps" / "scan.h5")
    recon(scan, tmp_path / "own")
    given, own = (read_reconstruction(tmp_path / name / "zero-filled" / "scan.h5") for name in ("given", "own"))
    torch.testing.assert_close(given, own)
    assert "note" not in manifest(tmp_path / "given")["maps"]


def test_round_trip_of_a_given_mask_of_two_axes(tmp_path):
    scan, places = write(tmp_path / "scan.h5"), np.random.default_rng(0).random((SIZE, SIZE)) < 0.5
    places[14:26, 14:26] = True
    np.save(tmp_path / "mask.npy", places)
    np.save(tmp_path / "other.npy", places | np.eye(SIZE, dtype=bool))
    invoke("coils", scan, "-o", tmp_path / "maps", *CPU, "--mask", tmp_path / "mask.npy")
    recon(scan, tmp_path / "out", "--mask", tmp_path / "mask.npy", "--seed", "4", "--maps", tmp_path / "maps")
    more = ["--mask", tmp_path / "other.npy", "--maps", tmp_path / "maps"]
    assert "mask given" in warned(recon(scan, tmp_path / "no", *more))[0]


def warned(result):
    return [line for line in result.stderr.splitlines() if line.startswith("warning:")]


@pytest.mark.parametrize(
    ("made", "used", "says"),
    [
        ([], LAW, "mask none, not random-lines R=3"),
        ([*LAW, "--seed", "1"], LAW, "seed 1, not 0"),
        (LAW, [*LAW, "-R", "4"], "mask's acceleration 3.0, not 4.0"),
        (LAW, [*LAW, "--center-lines", "12"], "mask's centre_lines 10, not 12"),
        ([*LAW, "--mask-per", "file"], LAW, "mask's one mask for each file, not slice"),
        (LAW, [*LAW, "--noise", "0.05"], "noise 0.0, not 0.05"),
        (LAW, [*LAW, "--mask", "equispaced-lines"], "mask random-lines R=3.0, not equispaced-lines"),
    ],
)
def test_maps_of_other_measurements_are_used_with_a_warning(tmp_path, scan, made, used, says):
    maps = tmp_path / "maps"
    invoke("coils", scan, "-o", maps, *CPU, *made)
    (line,) = warned(recon(scan, tmp_path / "out", *used, "--maps", maps))
    assert says in line and str(maps / "scan.h5") in line and "may flatter scores" in line
    assert line.count(", not ") == 1  # nothing else is said to differ
    assert says in manifest(tmp_path / "out")["maps"]["note"]
    assert not warned(recon(scan, tmp_path / "trusted", *used, "--maps", maps, "--maps-as-they-are"))
    assert says in manifest(tmp_path / "trusted")["maps"]["note"]


@pytest.mark.parametrize(
    ("made", "used", "says"),
    [
        ([*LAW, "--crop-to", "32"], LAW, "crop-to 32, not none"),
        ([*LAW, "--coils", "3"], LAW, "coils 3, not none"),
        ([*LAW, "--sets", "2"], [*LAW, "--sets", "1"], "sets 2, not 1"),
    ],
)
def test_maps_of_other_data_are_refused(tmp_path, scan, made, used, says):
    maps = tmp_path / "maps"
    invoke("coils", scan, "-o", maps, *CPU, *made)
    for more in ([], ["--dry-run"]):
        result = recon(scan, tmp_path / "out", *used, "--maps", maps, *more, code=2)
        (line,) = errors(result)
        assert says in line and str(maps / "scan.h5") in line and "--maps-as-they-are" in line
    assert not (tmp_path / "out").exists()
    assert line.count(", not ") == 1  # nothing else is said to differ


def test_maps_of_another_scan_are_refused_and_of_another_name_told_of(tmp_path, scan):
    invoke("coils", write(tmp_path / "maps" / "scan.h5", seed=3), "-o", tmp_path / "of-another", *CPU, *LAW)
    line = errors(recon(scan, tmp_path / "out", *LAW, "--maps", tmp_path / "of-another", code=2))[0]
    assert "(scan)" in line
    copy = tmp_path / "copy.h5"
    copy.write_bytes(scan.read_bytes())  # the same data, but masks are drawn by name
    invoke("coils", copy, "-o", tmp_path / "of-copy", *CPU, *LAW)
    line = warned(recon(scan, tmp_path / "out", *LAW, "--maps", tmp_path / "of-copy" / "copy.h5"))[0]
    assert "name of the scan copy.h5, not scan.h5" in line


def test_maps_as_they_are_and_the_manifest_tells(tmp_path, scan):
    invoke("coils", scan, "-o", tmp_path / "maps", *CPU)
    recon(scan, tmp_path / "out", *LAW, "--maps", tmp_path / "maps", "--maps-as-they-are")
    told = manifest(tmp_path / "out")["maps"]
    assert "mask none, not random-lines" in told["note"] and told["made from"]["mask"] is None
    line = errors(recon(scan, tmp_path / "no", *LAW, "--maps-as-they-are", code=2))[0]
    assert "without maps" in line


@pytest.mark.parametrize("text", [None, "{}", "not json"])
def test_maps_that_do_not_tell_are_used_with_a_warning(tmp_path, scan, text):
    invoke("coils", scan, "-o", tmp_path / "maps", *CPU, *LAW)
    with h5py.File(tmp_path / "maps" / "scan.h5", "r+") as file:
        del file.attrs["msmri_fingerprint"]
        if text is not None:
            file.attrs["msmri_fingerprint"] = text
    result = recon(scan, tmp_path / "out", *LAW, "--maps", tmp_path / "maps")
    (line,) = warned(result)
    assert "does not tell" in line and str(tmp_path / "maps" / "scan.h5") in line
    assert "unchecked" in manifest(tmp_path / "out")["maps"]["note"]


def test_python_callers_are_held_to_it_too(tmp_path, scan):
    write_maps(tmp_path / "maps.h5", torch.ones(2, 1, 4, SIZE, SIZE) + 0j, attributes={"input": "other", "mask": None})
    with pytest.raises(InputError, match=r"made from other data .*\(scan\)"):
        measurements(scan, Preparation(law=RandomLines(acceleration=3), maps=tmp_path / "maps.h5"))
    trusting = Preparation(law=RandomLines(acceleration=3), maps=tmp_path / "maps.h5", trust_maps=True)
    assert len(measurements(scan, trusting)) == 2


def test_options_without_effect_do_not_count(tmp_path, scan):
    invoke("coils", scan, "-o", tmp_path / "maps", *CPU, *LAW, "--coils", "9", "--crop-to", SIZE)
    preparation = Preparation(law=RandomLines(acceleration=3, centre_lines=10), maps=tmp_path / "maps")
    with open_scan(scan) as opened, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "note" not in check_maps(opened, preparation)


def test_settings_of_espirit(tmp_path, scan):
    settings = ["--kernel-width", "4", "--threshold", "0.05", "--eigenvalue-crop", "0.5", "--calibration-width", "8"]
    invoke("coils", scan, "-o", tmp_path / "maps", *CPU, *LAW, "--sets", "1", *settings)
    preparation = Preparation(law=RandomLines(acceleration=3, centre_lines=10))
    with open_scan(scan) as opened:
        slice_ = read_slice(opened, 1, preparation)
    chosen = Espirit(kernel_width=4, threshold=0.05, crop=0.5, max_calibration=8)
    stored = read_maps(tmp_path / "maps" / "scan.h5", index=1)
    torch.testing.assert_close(stored, chosen(slice_.values, slice_.mask)[0])
    recon(scan, tmp_path / "out", *LAW, "--maps", tmp_path / "maps")
    told = manifest(tmp_path / "out")["maps"]["made from"]["espirit"]
    assert told == {"kernel_width": 4, "threshold": 0.05, "crop": 0.5, "max_calibration": 8}


def test_dry_run_and_resume(tmp_path, scan):
    maps = tmp_path / "maps"
    write(tmp_path / "scan_2.h5", seed=2)
    both = ["coils", scan, tmp_path / "scan_2.h5", "-o", maps, *CPU, *LAW]
    result = invoke(*both, "--dry-run")
    assert "2 slices, 4 coils" in result.stdout
    invoke("coils", scan, "-o", maps, *CPU, *LAW)
    first = (maps / "scan.h5").stat().st_mtime_ns
    assert "exists already" in errors(invoke(*both, code=2))[0]
    (maps / "scan_2.h5").unlink()
    invoke(*both, "--resume")
    assert (maps / "scan.h5").stat().st_mtime_ns == first and (maps / "scan_2.h5").exists()
    line = errors(invoke(*both, "--resume", "--seed", "3", code=2))[0]
    assert "was made with other settings (seed)" in line
    invoke(*both, "--resume", "--seed", "3", "--overwrite")
    assert (maps / "scan.h5").stat().st_mtime_ns != first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--mask-per", "day"], "not slice or file"),
        (["--noise", "0.1"], "cannot be added"),
        (["--threshold", "1"], "--threshold 1 is no share"),
        (["--kernel-width", "2"], "--kernel-width 2 is too small"),
        (["--calibration-width", "3"], "--calibration-width 3 is too small"),
    ],
)
def test_wrong_options_of_coils(tmp_path, scan, options, says):
    assert says in errors(invoke("coils", scan, "-o", tmp_path / "maps", *options, code=2))[0]
    assert not (tmp_path / "maps").exists()
