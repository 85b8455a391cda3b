import csv
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import msmri
from msmri.cli import app
from msmri.cli.common import find_slices
from msmri.cli.recon import checked_prior
from msmri.errors import InputError
from msmri.io import open_scan, read_maps, read_reconstruction, write_maps, write_scan
from msmri.methods.zero_filled import ZeroFilled
from msmri.model.checkpoint import load_checkpoint
from msmri.physics.coils import root_sum_of_squares
from msmri.physics.espirit import Espirit
from msmri.physics.fourier import ifft2c
from msmri.physics.masks import RandomLines, slice_seed
from msmri.physics.simulate import coil_maps, phantom, simulate_kspace
from msmri.pipeline import reconstruct_file
from msmri.preparation import Preparation

SIZE = 48
RETRO = ["--mask", "random-lines", "--acceleration", "4", "--center-lines", "10", "--device", "cpu"]
ROOT = Path(__file__).parents[1]


def simulated(slices: int = 2, coils: int = 4, seed: int = 0, shape: tuple[int, int] = (SIZE, SIZE)) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    images = torch.stack([phantom(shape, rng) for _ in range(slices)])
    return simulate_kspace(images, coil_maps(shape, coils, rng), rng, noise_std=0.005)[0]


def write(path: Path, kspace: torch.Tensor, **more) -> Path:
    more.setdefault("target", root_sum_of_squares(ifft2c(kspace)))
    write_scan(path, kspace, **more)
    return path


@pytest.fixture(scope="session")
def kspace() -> torch.Tensor:
    return simulated()


@pytest.fixture
def scan(tmp_path: Path, kspace) -> Path:
    return write(tmp_path / "scan.h5", kspace)


def invoke(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr, result.exception)
    return result


def shell(*arguments, before=(), **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, "-m", "msmri.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **more)


def errors(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


def left_over(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.is_file()] if out.exists() else []


def test_recon_writes_images_manifest_figure_and_scores(tmp_path, scan, kspace):
    out = tmp_path / "out"
    result = invoke("recon", scan, "-o", out, "--method", "zero-filled,cg-sense", *RETRO)
    assert "| cg-sense " in result.stdout and "true R" in result.stdout
    assert (out / "scan_slice1.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert [(row["file"], row["method"]) for row in rows] == [("scan.h5", "cg-sense"), ("scan.h5", "zero-filled")]
    assert float(rows[0]["psnr"]) > float(rows[1]["psnr"]) + 2

    law, shape = RandomLines(acceleration=4, centre_lines=10), (SIZE, SIZE)
    masks = [law.draw(shape, torch.Generator().manual_seed(slice_seed(f"scan.h5#{k}", 0))) for k in range(2)]
    manifest = json.loads((out / "zero-filled" / "scan.json").read_text())
    assert manifest["acceleration"]["nominal"] == 4
    assert manifest["acceleration"]["true"] == pytest.approx(np.mean([1 / m.double().mean() for m in masks]))
    assert not torch.equal(masks[0], masks[1])

    written = h5py.File(out / "zero-filled" / "scan.h5")
    for index, mask in enumerate(masks):
        undersampled = torch.where(mask, kspace[index : index + 1], 0)
        maps = Espirit(sets="auto")(undersampled, mask[None])
        expected = (maps[:, 0].conj() * ifft2c(undersampled)).sum(1)[0]
        np.testing.assert_allclose(written["reconstruction_complex"][index], expected.numpy(), atol=1e-5)
    assert "ismrmrd_header" in written and written["reconstruction"].dtype == np.float32
    assert "reconstruction_std" not in written and "done" not in written


def test_manifest_tells_how_to_repeat_and_to_judge(tmp_path, scan, monkeypatch):
    from hashlib import sha256

    import fastmri.evaluate

    out = tmp_path / "out"
    words = ["recon", scan, "-o", out, "--method", "cg-sense", "--option", "cg-sense.weight=1e-2", "--seed", 5, *RETRO]
    monkeypatch.setattr(sys, "argv", ["msmri", *map(str, words)])
    invoke(*words)
    manifest = json.loads((out / "cg-sense" / "scan.json").read_text())
    assert manifest["command"] == " ".join(["msmri", *map(str, words)])
    assert manifest["method"] == "cg-sense" and manifest["options"]["weight"] == 0.01 and manifest["seed"] == 5
    assert manifest["input"]["sha256"] == sha256(scan.read_bytes()).hexdigest()
    assert manifest["mask"]["law"] == "random-lines" and manifest["mask"]["centre_lines"] == 10
    assert {"msmri", "torch", "numpy"} <= manifest["environment"].keys()
    target = np.asarray(h5py.File(scan)["reconstruction_rss"])
    image = np.asarray(h5py.File(out / "cg-sense" / "scan.h5")["reconstruction"])
    assert manifest["metrics"]["data_range"] == pytest.approx(float(target.max()))
    assert "7x7" in manifest["metrics"]["conventions"]["ssim"]
    for name in ("nmse", "psnr", "ssim"):
        expected = np.asarray(getattr(fastmri.evaluate, name)(target, image)).item()
        assert manifest["metrics"][name] == pytest.approx(expected, rel=1e-6)
    first = manifest["slices"][0]
    assert first["slice"] == 0 and target[0].max() != target[1].max()
    for row, one, two in zip(manifest["slices"], target, image, strict=True):
        expected = fastmri.evaluate.psnr(one, two, maxval=target.max())
        assert row["psnr"] == pytest.approx(float(expected), rel=1e-6)
        expected = fastmri.evaluate.ssim(one[None], two[None], maxval=target.max()).item()
        assert row["ssim"] == pytest.approx(expected, rel=1e-6)
    assert first["details"]["weight"] == 0.01 and first["seconds"] > 0


def test_seed_and_mask_per_file(tmp_path, scan):
    def accelerations(name, *more):
        invoke("recon", scan, "-o", tmp_path / name, "--method", "zero-filled", *RETRO, *more)
        manifest = json.loads((tmp_path / name / "zero-filled" / "scan.json").read_text())
        return read_reconstruction(tmp_path / name / "zero-filled" / "scan.h5"), manifest["settings"]

    first, _ = accelerations("a")
    again, _ = accelerations("b")
    other, _ = accelerations("c", "--seed", "1")
    whole, settings = accelerations("d", "--mask-per", "file")
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, whole)
    assert settings["mask"]["one mask for each"] == "file"


def test_prospective_scan_is_used_as_it_is(tmp_path, kspace):
    mask = RandomLines(acceleration=3, centre_lines=12).draw((SIZE, SIZE), torch.Generator().manual_seed(1))
    path = write(tmp_path / "prospective.h5", torch.where(mask, kspace, 0), mask=mask[0, 0], target=None)
    out = tmp_path / "out"
    invoke("recon", path, "-o", out, "--method", "cg-sense")
    manifest = json.loads((out / "cg-sense" / "prospective.json").read_text())
    assert manifest["acceleration"]["nominal"] is None and manifest["metrics"] is None
    assert manifest["acceleration"]["true"] == pytest.approx(float(1 / mask.double().mean()))
    assert (out / "prospective_slice1.png").exists()
    result = invoke("recon", path, "-o", tmp_path / "again", "--method", "cg-sense", *RETRO, code=2)
    assert "undersampled already" in errors(result)[0] and "leave out --mask" in errors(result)[0]


def test_fully_sampled_scan_needs_a_mask(tmp_path, scan):
    result = invoke("recon", scan, "-o", tmp_path / "out", "--method", "zero-filled", code=2)
    assert str(scan) in errors(result)[0] and "--mask random-lines" in errors(result)[0]
    assert not (tmp_path / "out").exists()


def test_crop_slices_coils_and_a_mask_from_a_file(tmp_path, scan, kspace):
    out, mask = tmp_path / "out", tmp_path / "mask.npy"
    invoke("mask", "--shape", "32x32", "--center-lines", 12, "-o", mask)
    more = ["--mask", mask, "--crop-to", 32, "--coils", 3, "--slices", "1:9", "--device", "cpu"]
    invoke("recon", scan, "-o", out, "--method", "cg-sense", *more)
    assert read_reconstruction(out / "cg-sense" / "scan.h5").shape == (1, 32, 32)
    manifest = json.loads((out / "cg-sense" / "scan.json").read_text())
    assert [row["slice"] for row in manifest["slices"]] == [1]
    assert manifest["acceleration"] == {"nominal": None, "true": pytest.approx(32 / np.load(mask).sum())}
    full = root_sum_of_squares(ifft2c(kspace[1, :, 8:40, 8:40])) * 32 / SIZE
    assert manifest["metrics"]["data_range"] == pytest.approx(float(full.max()), rel=1e-5)
    assert manifest["metrics"]["psnr"] > 20
    more[more.index("--coils") + 1] = 4  # as many as there are: nothing to compress
    invoke("recon", scan, "-o", tmp_path / "all", "--method", "cg-sense", *more)
    compressed, every = (read_reconstruction(o / "cg-sense" / "scan.h5") for o in (out, tmp_path / "all"))
    assert not torch.equal(compressed, every) and (compressed - every).norm() < 0.3 * every.norm()
    result = invoke("recon", scan, "-o", tmp_path / "wrong", "--method", "cg-sense", "--mask", mask, code=2)
    assert str(scan) in errors(result)[0] and "does not fit" in errors(result)[0]


def test_dry_run_writes_nothing(tmp_path, scan):
    result = invoke("recon", scan, "-o", tmp_path / "out", "--method", "tv", *RETRO, "--dry-run")
    assert "2 of 2 slices, 4 coils" in result.stdout and "nominal 4.00" in result.stdout
    assert not (tmp_path / "out").exists()


def hostile(folder: Path, kspace: torch.Tensor) -> dict[str, str]:
    """Write bad files; by name, a word that the message must hold."""
    good = write(folder / "good_1.h5", kspace)
    (folder / "truncated.h5").write_bytes(good.read_bytes()[:20_000])
    (folder / "text.h5").write_text("not a scan")
    (folder / "empty.h5").write_bytes(b"")

    def raw(name: str, dataset: str, values: np.ndarray, mask: np.ndarray | None = None) -> None:
        with h5py.File(folder / name, "w") as file:
            file[dataset] = values
            if mask is not None:
                file["mask"] = mask

    values = kspace.numpy()
    raw("misnamed.h5", "k_space", values)
    raw("missing.h5", "other", np.zeros(3))
    raw("rank.h5", "kspace", values[0, 0])
    raw("dtype.h5", "kspace", np.abs(values))
    raw("mask_length.h5", "kspace", values, np.ones(SIZE - 3))
    broken = values.copy()
    broken[1, 2, 3, 4] = np.nan
    raw("nan.h5", "kspace", broken)
    broken = values.copy()
    broken[1, 2, 3, 4] = np.inf
    raw("infinite.h5", "kspace", broken)
    broken = values.copy()
    broken[1] = 0
    raw("zero_slice.h5", "kspace", broken)
    write(folder / "good_2.h5", kspace)
    return {
        "truncated.h5": "truncated",
        "text.h5": "not an HDF5",
        "empty.h5": "empty",
        "misnamed.h5": "rename 'k_space'",
        "missing.h5": "no dataset 'kspace'",
        "rank.h5": "2 axes",
        "dtype.h5": "not complex",
        "mask_length.h5": f"mask of length {SIZE}",
        "nan.h5": "slice 1 holds NaN",
        "infinite.h5": "slice 1 holds NaN or infinite",
        "zero_slice.h5": "slice 1 holds only zeros",
    }


def test_bad_files_fail_in_one_line_and_the_rest_is_done(tmp_path, kspace):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    bad = hostile(folder, kspace)
    result = invoke("recon", folder, "-o", out, "--method", "zero-filled,cg-sense", *RETRO, code=2)
    lines = errors(result)
    assert len(lines) == len(bad)
    for name, word in bad.items():
        (line,) = [line for line in lines if str(folder / name) in line]
        assert word in line and ";" in line, line
    assert f"{len(bad)} of {len(bad) + 2} files failed" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    expected = {f"{m}/good_{k}.{end}" for m in ("zero-filled", "cg-sense") for k in (1, 2) for end in ("h5", "json")}
    expected |= {"good_1_slice1.png", "good_2_slice1.png", "scores.csv"}
    assert {str(path.relative_to(out)) for path in left_over(out)} == expected


@pytest.mark.parametrize(
    ("lines", "word"),
    [((), "calibration region is 0"), ((23, 24, 25), "calibration region is 3")],
)
def test_calibration_missing_or_too_small(tmp_path, kspace, lines, word):
    mask = np.zeros(SIZE, dtype=bool)
    mask[1::3] = True
    mask[21:28] = False
    mask[list(lines)] = True
    path = write(tmp_path / "acs.h5", kspace * torch.from_numpy(mask), mask=mask, target=None)
    result = invoke("recon", path, "-o", tmp_path / "out", "--method", "cg-sense", code=2)
    assert str(path) in errors(result)[0] and word in errors(result)[0] and "--maps" in errors(result)[0]
    assert not (tmp_path / "out").exists()


def test_one_coil_works(tmp_path):
    path = write(tmp_path / "single.h5", simulated(coils=1))
    invoke("recon", path, "-o", tmp_path / "out", "--method", "zero-filled,cg-sense", *RETRO)
    assert (tmp_path / "out" / "cg-sense" / "single.json").exists()


def test_existing_and_unwritable_output(tmp_path, scan):
    out, more = tmp_path / "out", ["--method", "zero-filled", *RETRO]
    invoke("recon", scan, "-o", out, *more)
    before = (out / "zero-filled" / "scan.h5").read_bytes()
    result = invoke("recon", scan, "-o", out, *more, "--seed", 3, code=2)
    assert "exists already" in errors(result)[0] and str(out) in errors(result)[0]
    assert (out / "zero-filled" / "scan.h5").read_bytes() == before
    invoke("recon", scan, "-o", out, *more, "--seed", 3, "--overwrite")
    assert (out / "zero-filled" / "scan.h5").read_bytes() != before
    (tmp_path / "file").write_text("")
    result = invoke("recon", scan, "-o", tmp_path / "file", *more, code=2)
    assert "is not a directory" in errors(result)[0]
    inside = tmp_path / "zero-filled"
    inside.mkdir()
    scan.rename(inside / "scan.h5")
    result = invoke("recon", inside / "scan.h5", "-o", tmp_path, *more, "--overwrite", code=2)
    assert "would replace the input" in errors(result)[0]


# root may write anywhere, but for this capability
AS_USER = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(AS_USER) and shutil.which("setpriv") is None, reason="root may write anywhere")
def test_read_only_output(tmp_path, scan):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    for out in (folder, folder / "out"):
        result = shell("recon", scan, "-o", out, "--method", "zero-filled", *RETRO, before=AS_USER)
        assert result.returncode == 2 and not any(folder.iterdir())
        line, summary = result.stderr.splitlines()
        assert line.startswith("error:") and "cannot write" in line and "locked" in line and "1 of 1" in summary


def test_two_scans_of_one_name(tmp_path, scan, kspace):
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "scan.h5", kspace)
    inputs = [scan, tmp_path / "other" / "scan.h5"]
    result = invoke("recon", *inputs, "-o", tmp_path / "out", "--method", "zero-filled", "--overwrite", *RETRO, code=2)
    assert "has the same name" in errors(result)[0]


def interrupt(monkeypatch, *, at: int, how) -> None:
    """Let the zero-filled method be interrupted, or fail, in its ``at``-th call."""
    original, calls = ZeroFilled.__call__, []

    def call(self, measurement, rng):
        calls.append(measurement.source)
        assert measurement.target is None
        if len(calls) == at:
            how()
        return original(self, measurement, rng)

    monkeypatch.setattr(ZeroFilled, "__call__", call)


def test_ctrl_c_leaves_only_what_can_be_resumed(tmp_path, monkeypatch):
    path, out = write(tmp_path / "scan.h5", simulated(slices=4)), tmp_path / "out"
    arguments = ["recon", path, "--method", "cg-sense,zero-filled", *RETRO]
    with monkeypatch.context() as patch:
        interrupt(patch, at=3, how=lambda: signal.raise_signal(signal.SIGINT))
        result = invoke(*arguments, "-o", out, code=130)
    assert "--resume" in result.stderr and "Traceback" not in result.stderr
    names = {"cg-sense/scan.h5.part", "zero-filled/scan.h5.part"}
    assert {str(p.relative_to(out)) for p in left_over(out)} == names

    refused = invoke(*arguments, "-o", out, "--seed", 9, "--resume", code=2)
    assert "other settings (seed)" in errors(refused)[0]
    with monkeypatch.context() as patch:
        interrupt(patch, at=3, how=lambda: pytest.fail("only two slices were left to do"))
        invoke(*arguments, "-o", out, "--resume")
    invoke(*arguments, "-o", tmp_path / "whole")
    for method in ("cg-sense", "zero-filled"):
        resumed, whole = (read_reconstruction(folder / method / "scan.h5") for folder in (out, tmp_path / "whole"))
        assert torch.equal(resumed, whole)
        metrics = [json.loads((f / method / "scan.json").read_text())["metrics"] for f in (out, tmp_path / "whole")]
        assert metrics[0] == metrics[1]
    assert not list(out.rglob("*.part"))


def test_resume_skips_what_is_finished(tmp_path, scan, monkeypatch):
    arguments = ["recon", scan, "-o", tmp_path / "out", *RETRO, "--method"]
    invoke(*arguments, "zero-filled")
    interrupt(monkeypatch, at=1, how=lambda: pytest.fail("nothing was left to do"))
    result = invoke(*arguments, "zero-filled,cg-sense", "--resume")
    assert "| zero-filled" in result.stdout and "| cg-sense" in result.stdout
    result = invoke(*arguments, "zero-filled", "--resume", "--seed", 1, code=2)
    assert "was made with other settings (seed)" in errors(result)[0]


def test_a_defect_in_a_method_fails_the_file_not_the_run(tmp_path, kspace, monkeypatch):
    files = [write(tmp_path / f"scan_{k}.h5", kspace) for k in range(2)]

    def fail():
        raise RuntimeError("out of\nmemory")

    interrupt(monkeypatch, at=2, how=fail)
    result = invoke("recon", *files, "-o", tmp_path / "out", "--method", "zero-filled", *RETRO, code=2)
    (line,) = errors(result)
    assert str(files[0]) in line and "RuntimeError: out of memory" in line
    names = {path.name for path in left_over(tmp_path / "out")}
    assert names == {"scan_1.h5", "scan_1.json", "scan_1_slice1.png", "scores.csv"}
    assert "scan_0.h5" in result.stderr.splitlines()[-1]


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


def test_weights_that_would_run_code_and_other_bad_weights(tmp_path, scan, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"time_embed.0.weight": torch.zeros(2), "x": Evil()}, "evil_zip.pt")
    Path("damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    for name in ("evil.pt", "evil_zip.pt", "damaged.safetensors", "none.pt"):
        result = invoke("recon", scan, "-o", "out", "--prior", name, *RETRO, code=2)
        assert name in errors(result)[0] and len(result.stderr.splitlines()) == 1
    assert not Path("evil_was_here").exists() and not Path("out").exists()


def test_weights_for_photographs_are_refused(tmp_path, scan):
    from msmri.model.adm import ADMConfig, ADMUNet, export_state_dict

    network = ADMUNet(ADMConfig(16, 3, 3, 32, 1, (1, 2), (8,), head_channels=64))
    torch.save({"ema": export_state_dict(network)}, tmp_path / "faces.pt")
    result = invoke("recon", scan, "-o", tmp_path / "out", "--prior", tmp_path / "faces.pt", *RETRO, code=2)
    assert "faces.pt: the weights are for 3 real channels, not 2" in errors(result)[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["faces_msm", "faces_oracle", "faces_ambient", "ssdu_r4", "supervised_r4", "ssdu_columns_r4", "adps_r4"]
)
def test_shipped_weights_of_other_things_are_refused(tmp_path, scan, name):
    path = Path(msmri.__file__).parent / "weights" / f"{name}.safetensors"
    result = invoke("recon", scan, "-o", tmp_path / "out", "--prior", path, "--dry-run", *RETRO, code=2)
    assert f"{name}.safetensors: these are not weights of msm for complex images" in errors(result)[0]
    assert len(errors(result)) == 1 and "defect" not in errors(result)[0] and not (tmp_path / "out").exists()


def test_a_prior_of_whole_images_is_told_of(tmp_path, scan):
    weights = Path(msmri.__file__).parent / "weights"
    with pytest.warns(UserWarning, match="oracle.safetensors was trained on fully sampled scans"):
        checked_prior(weights / "oracle.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("brain_r4", "brain_r4_short", "brain_r4_noisy", "brain64_msm", "brain64_joint"):
            assert checked_prior(weights / f"{name}.safetensors").stem == name


def test_posterior_samples_from_python(tmp_path, scan):
    from msmri.methods.msm import MSM
    from msmri.model.denoiser import GaussianDenoiser

    prior = GaussianDenoiser(torch.zeros(1, SIZE, SIZE, dtype=torch.complex64), torch.full((1, SIZE, SIZE), 0.1))
    preparation = Preparation(law=RandomLines(acceleration=4, centre_lines=10))
    steps = reconstruct_file(scan, {"msm": MSM(prior=prior, samples=2, steps=3)}, tmp_path, preparation)
    assert [(step.slice, step.method, step.total) for step in steps] == [(0, "msm", 2), (1, "msm", 2)]
    spread = read_reconstruction(tmp_path / "msm" / "scan.h5", "reconstruction_std")
    assert spread.shape == (2, SIZE, SIZE) and 0 < float(spread.mean()) < 1
    manifest = json.loads((tmp_path / "msm" / "scan.json").read_text())
    assert manifest["options"]["prior"] == "GaussianDenoiser" and manifest["slices"][0]["details"]["samples"] == 2
    assert "park2026" in manifest["reference"]


def test_closing_the_generator_leaves_what_can_be_resumed(tmp_path, scan):
    preparation = Preparation(law=RandomLines(acceleration=4, centre_lines=10))
    steps = reconstruct_file(scan, {"zero-filled": ZeroFilled()}, tmp_path / "out", preparation)
    next(steps)
    steps.close()
    assert [path.name for path in left_over(tmp_path / "out")] == ["scan.h5.part"]
    steps = reconstruct_file(scan, {"zero-filled": ZeroFilled()}, tmp_path / "out", preparation, resume=True)
    assert [step.seconds is None for step in steps] == [True, False]


def test_memory_is_given_back_after_every_slice(tmp_path, scan, monkeypatch):
    import ctypes

    from msmri import pipeline

    given = []
    monkeypatch.setattr(pipeline, "_release_memory", lambda release=pipeline._release_memory: given.append(release()))
    preparation = Preparation(law=RandomLines(acceleration=4, centre_lines=10))
    steps = reconstruct_file(scan, {"zero-filled": ZeroFilled()}, tmp_path / "out", preparation)
    assert [(step.slice, len(given)) for step in steps] == [(0, 0), (1, 1)] and given == [None, None]
    monkeypatch.undo()

    def none_here(name):
        raise OSError("no C library by that name")

    monkeypatch.setattr(ctypes, "CDLL", none_here)
    assert pipeline._release_memory() is None  # a system without it goes without


def test_demo(tmp_path, monkeypatch, kspace):
    import importlib.resources

    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    result = invoke("demo", "-o", tmp_path / "out", "--method", "zero-filled", code=2)
    assert "demo scan is not part of this installation" in errors(result)[0]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "demo_brain.h5", kspace)
    for _ in range(2):  # a second run replaces the first
        result = invoke("demo", "-o", tmp_path / "out", "--method", "zero-filled,cg-sense", "--device", "cpu")
    assert "| cg-sense" in result.stdout and "Look at" in result.stdout
    assert (tmp_path / "out" / "demo_brain_slice1.png").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "l1wavelet"], "unknown method 'l1wavelet'"),
        (["--method", ","], "names no method"),
        (["--method", "tv", "--option", "tv.wieght=1"], "no option 'wieght'"),
        (["--method", "tv", "--option", "cg-sense.weight=1"], "which is not run"),
        (["--method", "tv", "--option", "weight"], "METHOD.field=value"),
        (["--method", "tv", "--samples", "3"], "--samples is of no use"),
        (["--method", "tv", "--sets", "3"], "not 1, 2 or auto"),
        (["--method", "tv", "--device", "toaster"], "no device 'toaster'"),
        (["--method", "tv", "--slices", "a"], "cannot read --slices"),
        (["--method", "tv", "--mask", "random-line"], "no mask law 'random-line'"),
        (["--method", "tv", "--mask-per", "day"], "not slice or file"),
        (["--method", "tv", "--crop-to", "3"], "too small"),
        (["--method", "tv", "--maps", "nowhere"], "no such file"),
        (["--method", "msm", "--preset", "fast"], "no preset 'fast'"),
    ],
)
def test_wrong_options(tmp_path, scan, options, says):
    result = invoke("recon", scan, "-o", tmp_path / "out", *options, code=2)
    assert says in errors(result)[0] and not (tmp_path / "out").exists()


def test_slices_option():
    assert find_slices("2:5") == slice(2, 5) and find_slices(":") == slice(None) and find_slices("1,3") == [1, 3]
    with pytest.raises(InputError):
        find_slices("-1")


def test_a_slice_that_is_not_there(tmp_path, scan):
    more = ["--method", "zero-filled", *RETRO]
    result = invoke("recon", scan, "-o", tmp_path / "out", *more, "--slices", "7", code=2)
    assert "no slice 7" in errors(result)[0] and str(scan) in errors(result)[0]


def test_tuning_on_validation_scans(tmp_path, scan):
    validation = write(tmp_path / "validation.h5", simulated(slices=1, seed=5))
    more = ["--method", "zero-filled,cg-sense", *RETRO]
    result = invoke("recon", scan, "-o", tmp_path / "out", *more, "--tune", validation)
    manifest = json.loads((tmp_path / "out" / "cg-sense" / "scan.json").read_text())
    table = manifest["tuning"]["tables"]["cg-sense"]
    best = max(table, key=lambda row: row["psnr"])
    assert manifest["options"]["weight"] == best["weight"] and "chosen on 1 slices" in result.stdout
    result = invoke("recon", scan, "-o", tmp_path / "no", *more, "--tune", scan, code=2)
    assert "tune on other scans" in errors(result)[0]


def test_maps_are_cached_and_used(tmp_path, scan, kspace):
    maps = tmp_path / "maps"
    invoke("coils", scan, "-o", maps, "--device", "cpu")
    stored = read_maps(maps / "scan.h5")
    every = torch.ones(1, 1, 1, SIZE, dtype=torch.bool)
    assert stored.shape == (2, 1, 4, SIZE, SIZE)
    torch.testing.assert_close(stored[1:], Espirit()(kspace[1:], every))
    more = ["--method", "zero-filled", *RETRO]
    invoke("recon", scan, "-o", tmp_path / "given", *more, "--maps", maps, "--maps-as-they-are")
    invoke("recon", scan, "-o", tmp_path / "own", *more)
    given, own = (read_reconstruction(tmp_path / name / "zero-filled" / "scan.h5") for name in ("given", "own"))
    assert not torch.equal(given, own) and (given - own).norm() < 0.2 * own.norm()
    write_maps(maps / "scan.h5", torch.ones(2, 1, 3, SIZE, SIZE, dtype=torch.complex64))
    result = invoke("recon", scan, "-o", tmp_path / "no", *more, "--maps", maps, code=2)
    assert "do not fit" in errors(result)[0]
    assert "exists already" in errors(invoke("coils", scan, "-o", maps, code=2))[0]


def test_two_sets_of_maps(tmp_path, scan):
    invoke("coils", scan, "-o", tmp_path / "maps", "--sets", "2", *RETRO)
    assert read_maps(tmp_path / "maps" / "scan.h5").shape[1] == 2
    invoke("recon", scan, "-o", tmp_path / "out", "--method", "cg-sense", "--sets", "2", *RETRO)


def test_mask_describes_and_writes(tmp_path):
    out = tmp_path / "mask.npy"
    result = invoke("mask", "--shape", "64x256", "--acceleration", "6", "--seed", "3", "-o", out)
    drawn = RandomLines(acceleration=6).draw((64, 256), torch.Generator().manual_seed(3))
    assert np.array_equal(np.load(out), drawn[0, 0].numpy())
    assert "nominal 6.00" in result.stdout and "blind spots: 0" in result.stdout
    assert f"acceleration {1 / drawn.double().mean():.2f}" in result.stdout
    invoke("mask", "--shape", "48x40", "-o", tmp_path / "mask.png")
    result = invoke("mask", "--law", "fastmri-magic", "--shape", "320x320")
    assert "cannot train MSM" in result.stdout
    for wrong in (["--shape", "big"], ["-o", tmp_path / "mask.txt"], ["-o", out], ["--law", "spiral"]):
        assert errors(invoke("mask", *wrong, code=2))


def test_evaluate_equals_fastmri(tmp_path):
    import fastmri.evaluate

    targets, out = tmp_path / "targets", tmp_path / "out"
    targets.mkdir()
    for k in range(2):
        write(targets / f"scan_{k}.h5", simulated(seed=k, shape=(48, 40)))
    invoke("recon", targets, "-o", out, "--method", "zero-filled,cg-sense", *RETRO)
    scores = tmp_path / "scores.csv"
    result = invoke("evaluate", targets, out, "-o", scores, "--square")
    rows = {(row["method"], row["file"]): row for row in csv.DictReader(scores.read_text().splitlines())}
    assert len(rows) == 4
    metrics = fastmri.evaluate.Metrics(fastmri.evaluate.METRIC_FUNCS)
    for name in ("scan_0.h5", "scan_1.h5"):
        target = np.asarray(h5py.File(targets / name)["reconstruction_rss"])[:, 4:44]
        image = np.asarray(h5py.File(out / "cg-sense" / name)["reconstruction"])[:, 4:44]
        metrics.push(target, image)
        for metric in ("mse", "nmse", "psnr", "ssim"):
            expected = np.asarray(getattr(fastmri.evaluate, metric)(target, image)).item()
            assert float(rows["cg-sense", name][metric]) == pytest.approx(expected, rel=1e-6)
    assert f"{float(metrics.means()['PSNR']):.4g}" in result.stdout
    assert f"{float(metrics.stddevs()['PSNR']):.4g}" in result.stdout


def test_evaluate_of_chosen_slices_and_mistakes(tmp_path, kspace):
    targets, out = tmp_path / "targets", tmp_path / "out"
    targets.mkdir()
    path = write(targets / "scan.h5", kspace)
    invoke("recon", path, "-o", out, "--method", "zero-filled", "--slices", "1", *RETRO)
    invoke("evaluate", targets, out / "zero-filled", "-o", tmp_path / "scores.csv")
    (row,) = csv.DictReader((tmp_path / "scores.csv").read_text().splitlines())
    manifest = json.loads((out / "zero-filled" / "scan.json").read_text())
    assert float(row["psnr"]) == pytest.approx(manifest["metrics"]["psnr"])
    (out / "zero-filled" / "scan.h5").rename(out / "zero-filled" / "other.h5")
    result = invoke("evaluate", targets, out / "zero-filled", code=2)
    assert "other.h5" in errors(result)[0] and "targets have no reconstruction" in result.stderr
    assert "not a directory" in errors(invoke("evaluate", path, out, code=2))[0]


def test_info(tmp_path, scan):
    from safetensors.torch import save_file

    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, weights, metadata={"msmri": json.dumps({"format": "msmri-partial"})})
    torch.save({"first.weight": torch.zeros(2, 3), "last.bias": torch.zeros(4)}, tmp_path / "weights.pt")
    (tmp_path / "text.h5").write_text("no")
    result = invoke("info", scan, weights, tmp_path / "weights.pt", tmp_path / "text.h5", code=2)
    for text in ("2 slices, 4 coils, 48 x 48", "fully sampled", "msmri-partial", "2, 10 numbers", "last.bias (4,)"):
        assert text in result.stdout
    assert "not an HDF5" in errors(result)[0]
    with open_scan(scan) as opened:
        assert str(opened.attributes["patient_id"]) in result.stdout
    noise = float(result.stdout.split("noise level")[1].split()[0])
    assert 0.004 < noise < 0.05  # an upper bound in so small a matrix


def test_info_tells_how_shipped_weights_were_trained():
    weights = Path(msmri.__file__).parent / "weights"
    told = invoke("info", weights / "brain_r4.safetensors").stdout
    _, header = load_checkpoint(weights / "brain_r4.safetensors")
    assert len(header["stages"]) == 5
    for number, stage in enumerate(header["stages"], 1):
        (steps,) = [line.split(maxsplit=2)[2] for line in told.splitlines() if line.startswith(f"  stage {number} ")]
        assert steps.startswith(f"{stage['step']} steps")
        (recipe,) = [line for line in told.splitlines() if line.startswith(f"  recipe of stage {number} ")]
        assert json.loads(recipe[recipe.index("{") :]) == stage["recipe"]


@pytest.mark.parametrize("factor", [1e30, 1e-25])
def test_kspace_beyond_single_precision_is_refused(tmp_path, kspace, factor):
    path = write(tmp_path / "far.h5", kspace * factor, target=None)
    result = invoke("recon", path, "-o", tmp_path / "out", "--method", "cg-sense", *RETRO, code=2)
    assert re.search(r"far.h5: slice . holds k-space up to", errors(result)[0]) and "bring" in errors(result)[0]


def test_train_hands_over_the_recipe(tmp_path, monkeypatch):
    from types import SimpleNamespace

    import msmri.train

    recipe, seen = tmp_path / "recipe.yaml", {}
    recipe.write_text("train: {lr: 1e-3, steps: 4}\n")

    def train(recipe, run, *, device, resume):
        seen.update(recipe=recipe, run=run, device=device, resume=resume)
        for step in range(1, 5):
            if step == seen.get("stop"):
                raise KeyboardInterrupt
            yield SimpleNamespace(step=step, n_steps=4, loss=1 / step, seconds=0.1)

    monkeypatch.setattr(msmri.train, "train", train)
    more = ["--set", "train.lr=2e-4", "--device", "cpu"]
    result = invoke("train", recipe, tmp_path / "run", *more)
    assert seen["recipe"] == {"train": {"lr": 2e-4, "steps": 4}} and seen["resume"] and seen["device"] == "cpu"
    assert "4 steps, loss 0.25" in result.stdout
    seen["stop"] = 3
    result = invoke("train", recipe, tmp_path / "run", *more, "--no-resume", code=130)
    assert not seen["resume"] and "at step 2 of 4" in result.stderr
    monkeypatch.setattr(msmri.train, "rehearse", lambda recipe: f"would train with {recipe['train']['lr']}")
    result = invoke("train", recipe, tmp_path / "run", *more, "--dry-run")
    assert "lr: 0.0002" in result.stdout and "would train with 0.0002" in result.stdout
    seen.pop("stop")
    invoke("train", recipe, tmp_path / "run", *more, "--seed", "7")
    assert seen["recipe"] == {"train": {"lr": 2e-4, "steps": 4, "seed": 7}}
    assert str(recipe) in errors(invoke("train", recipe, tmp_path / "run", "--set", "trian.lr=1", code=2))[0]


def test_version():
    from msmri import __version__

    assert __version__ in invoke("--version").stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom msmri.cli import app\nfrom typer.testing import CliRunner\n"
        "for name in ([], ['recon'], ['train'], ['demo'], ['coils'], ['mask'], ['evaluate'], ['info']):\n"
        "    assert CliRunner().invoke(app, [*name, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'h5py', 'scipy', 'matplotlib', 'sigpy', 'diffusers'} & set(sys.modules)\n"
        "print(heavy)\nsys.exit(bool(heavy))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_exit_codes_of_the_program(tmp_path, scan):
    result = shell("recon", scan, tmp_path / "none.h5", "-o", tmp_path / "out", "--method", "zero-filled", *RETRO)
    assert result.returncode == 2
    assert result.stderr.splitlines()[0].startswith(f"error: {tmp_path / 'none.h5'}: no such file")
    assert "| zero-filled" in result.stdout
    manifest = json.loads((tmp_path / "out" / "zero-filled" / "scan.json").read_text())
    assert "--method zero-filled" in manifest["command"]
