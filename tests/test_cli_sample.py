import json
import signal
from importlib.resources import files

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from msmri.cli import app
from msmri.config import build
from msmri.io import write_maps
from msmri.io.samples import SampleWriter, image_sheet, read_samples
from msmri.methods.generation import Generation
from msmri.model.checkpoint import save_checkpoint
from msmri.model.prior import load_prior
from msmri.physics.operators import CoilFourier, Identity
from msmri.physics.simulate import coil_maps

NETWORK = {"use": "msmri.model.unet:UNet", "in_channels": 4, "out_channels": 2, "channels": [8], "blocks_per_level": 1,
           "conditions": 4, "patch": 2}  # fmt: skip
MODEL = {"use": "msmri.model.partial:MeasurementPartial", "wiener_iterations": 2, "consistency_iterations": 1,
         "network": NETWORK}  # fmt: skip
SMALL = ["--count", "5", "--size", "24x20", "--coils", "3", "--steps", "3", "--device", "cpu", "--seed", "7"]


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    path = tmp_path_factory.mktemp("prior") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(MODEL)
        tensors = {name: value + 0.02 * torch.randn_like(value) if value.ndim > 1 else value
                   for name, value in model.state_dict().items()}  # fmt: skip
    save_checkpoint(path, tensors, {"format": "msmri-partial", "recipe": {"model": MODEL}})
    return path


def invoke(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr, result.exception)
    return result


def errors(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


def names(out):
    return sorted(path.name for path in out.iterdir()) if out.exists() else []


def test_sample_writes_images_a_sheet_and_how_they_were_made(tmp_path, prior):
    out = tmp_path / "out"
    result = invoke("sample", "-o", out, "--prior", prior, *SMALL, "--masks", "2", "--eta", "0.5")
    assert "5 images of 24 x 20" in result.stdout and "2 masks a step" in result.stdout
    assert names(out) == ["samples.h5", "samples.json", "samples.png"]
    with h5py.File(out / "samples.h5") as file:
        images = file["samples"][()]
        assert list(file) == ["samples"] and file.attrs["seed"] == 7 and "scaled" in file.attrs["units"]
    assert images.shape == (5, 24, 20) and images.dtype == np.complex64
    encoding = CoilFourier(coil_maps((24, 20), 3, torch.Generator().manual_seed(7)))
    method = Generation(load_prior(prior), steps=3, masks_per_step=2, eta=0.5)
    expected = method(encoding, (1, 24, 20), [torch.Generator().manual_seed(7 + k) for k in range(5)])
    np.testing.assert_allclose(images, expected[:, 0].numpy(), atol=1e-5)
    manifest = json.loads((out / "samples.json").read_text())
    settings = manifest["settings"]
    assert settings["method"]["masks_per_step"] == 2 and settings["method"]["law"]["acceleration"] == 4
    assert settings["coils"] == {"simulated": 3, "seed": 7} and settings["shape"] == [1, 24, 20]
    assert manifest["drawn by this run"] == 5 and manifest["seconds"] > 0 and len(manifest["ladder"]) == 3
    from matplotlib.image import imread

    assert imread(out / "samples.png").shape[:2] == (2 * 24 + 2, 3 * 20 + 4)


def test_neither_batch_nor_count_changes_a_sample(tmp_path, prior):
    invoke("sample", "-o", tmp_path / "a", "--prior", prior, *SMALL)
    invoke("sample", "-o", tmp_path / "b", "--prior", prior, *SMALL, "--batch", "2", "--count", "3")
    found, fewer = (read_samples(tmp_path / name / "samples.h5") for name in "ab")
    torch.testing.assert_close(fewer, found[:3], rtol=1e-5, atol=1e-6)
    assert float((found[0] - found[1]).abs().max()) > 0.05


def test_ctrl_c_keeps_what_is_finished(tmp_path, prior, monkeypatch):
    more = ["--prior", prior, *SMALL, "--batch", "2"]
    write = SampleWriter.write

    def stop(at):
        calls = []

        def counted(self, index, image, *, std=None):
            calls.append(index)
            write(self, index, image)
            if len(calls) == at:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(SampleWriter, "write", counted)
        return calls

    stop(3)
    result = invoke("sample", "-o", tmp_path / "out", *more, code=130)
    assert "--resume" in result.stderr and names(tmp_path / "out") == ["samples.h5.part"]
    result = invoke("sample", "-o", tmp_path / "out", *more, "--resume", "--steps", "2", code=2)
    assert "other settings (method)" in errors(result)[0]
    calls = stop(-1)
    invoke("sample", "-o", tmp_path / "out", *more, "--resume")
    assert calls == [3, 4] and names(tmp_path / "out") == ["samples.h5", "samples.json", "samples.png"]
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["drawn by this run"] == 2
    invoke("sample", "-o", tmp_path / "whole", *more)
    found, whole = (read_samples(tmp_path / name / "samples.h5") for name in ("out", "whole"))
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    # a run that was stopped between its images and its sheet
    (tmp_path / "out" / "samples.png").unlink()
    calls = stop(-1)
    invoke("sample", "-o", tmp_path / "out", *more, "--resume")
    assert not calls and len(names(tmp_path / "out")) == 3
    assert (
        "other settings" in errors(invoke("sample", "-o", tmp_path / "out", *more, "--resume", "--eta", "0", code=2))[0]
    )


def test_nothing_is_overwritten_or_left_behind(tmp_path, prior, monkeypatch):
    out = tmp_path / "out"
    invoke("sample", "-o", out, "--prior", prior, *SMALL, "--dry-run")
    assert names(out) == []
    monkeypatch.setattr(Generation, "iterate", lambda *_, **__: 1 / 0)
    result = CliRunner().invoke(app, ["sample", "-o", str(out), "--prior", str(prior), *SMALL])
    assert isinstance(result.exception, ZeroDivisionError) and not out.exists()
    monkeypatch.undo()
    invoke("sample", "-o", out, "--prior", prior, *SMALL, "--count", "1")
    assert "exists already" in errors(invoke("sample", "-o", out, "--prior", prior, *SMALL, code=2))[0]
    invoke("sample", "-o", out, "--prior", prior, *SMALL, "--overwrite")
    assert len(read_samples(out / "samples.h5")) == 5


def test_maps_of_a_scan_and_two_sets(tmp_path, prior):
    maps = torch.cat([coil_maps((24, 20), 4, torch.Generator().manual_seed(s)) for s in (0, 1)])
    write_maps(tmp_path / "maps.h5", torch.cat([maps, 0.1 * maps.flip(2)], 1))
    out = tmp_path / "out"
    invoke(
        "sample", "-o", out, "--prior", prior, *SMALL, "--count", "2", "--maps", tmp_path / "maps.h5", "--map-slice", 1
    )
    settings = json.loads((out / "samples.json").read_text())["settings"]
    assert settings["shape"] == [2, 24, 20] and settings["coils"]["slice"] == 1
    result = invoke("sample", "-o", out, "--prior", prior, "--maps", tmp_path / "maps.h5", "--map-slice", 2, code=2)
    assert "no slice 2" in errors(result)[0]


def test_sets_of_the_published_kind(tmp_path):
    from msmri.model.adm import ADMConfig, ADMUNet, export_state_dict

    network = ADMUNet(ADMConfig(16, 2, 2, 32, 1, (1, 2), (8,), head_channels=64))
    torch.save({"ema": export_state_dict(network)}, tmp_path / "published.pt")
    more = ["--prior", tmp_path / "published.pt", *SMALL, "--count", "1", "--size", "16x16"]
    result = invoke("sample", "-o", tmp_path / "out", "--preset", "paper", *more)
    assert "from sigma" in result.stdout and "3 masks a step" in result.stdout
    method = json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]["method"]
    assert (method["preset"], method["renewal"], method["covering"]) == ("paper", "constant", False)


def test_published_weights_of_photographs_draw_colours_from_dealt_tiles(tmp_path):
    from msmri.model.adm import ADMConfig, ADMUNet, export_state_dict

    def write(channels):
        network = ADMUNet(ADMConfig(16, channels, channels, 32, 1, (1, 2), (8,), head_channels=64))
        torch.save({"ema": export_state_dict(network)}, tmp_path / "published.pt")
        return ["--prior", tmp_path / "published.pt", "--preset", "paper", "--steps", "2", "--count", "2"]

    more = [*write(3), "--covering", "--size", "16x20"]
    result = invoke("sample", "-o", tmp_path / "out", *more)
    assert "2 images of 16 x 20" in result.stdout and "random tiles: nominal 1.67" in result.stdout
    assert read_samples(tmp_path / "out" / "samples.h5").shape == (2, 3, 16, 20)
    manifest = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert manifest["settings"]["method"]["covering"] is True and manifest["recipe"] is None
    (line,) = errors(invoke("sample", "-o", tmp_path / "more", *write(4), code=2))
    assert "4 real channels" in line and "published.pt" in line


def test_estimates_carried_beyond_halves_of_masks(tmp_path, prior):
    drawn = []
    for weight in ("0", "2"):
        out = tmp_path / weight
        invoke("sample", "-o", out, "--prior", prior, *SMALL, "--count", "1", "--extrapolate", weight)
        told = json.loads((out / "samples.json").read_text())["settings"]["method"]["extrapolate"]
        assert told == float(weight)
        drawn.append(read_samples(out / "samples.h5"))
    assert bool(torch.isfinite(drawn[1].abs()).all()) and not torch.allclose(*drawn)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "big"], "cannot read --size big"),
        (["--size", "8x64"], "cannot read --size 8x64"),
        (["--count", "0"], "--count 0 is too small"),
        (["--eta", "2"], "eta=2"),
        (["--extrapolate", "-1"], "extrapolate=-1"),
        (["--masks", "0"], "masks_per_step=0"),
        (["--law", "spiral"], "no mask law 'spiral'"),
        (["--preset", "fast"], "no preset 'fast'"),
        (["--maps", "nowhere.h5"], "no such file"),
        (["--aggregate", "both"], "unknown aggregate"),
        (["--law", "fastmri-magic", "--size", "64x320"], "never reaches"),
        (["--prior", "none.safetensors"], "none.safetensors"),
    ],
)
def test_wrong_options(tmp_path, prior, options, says):
    result = invoke("sample", "-o", tmp_path / "out", "--prior", prior, *SMALL, *options, code=2)
    assert says in errors(result)[0] and not (tmp_path / "out").exists()


def test_sheet_has_a_window_for_each_image(tmp_path):
    from matplotlib.image import imread

    images = torch.stack([torch.eye(8) * 3, torch.ones(8, 8) * 1e-3])
    image_sheet(tmp_path / "sheet.png", images, columns=1)
    sheet = imread(tmp_path / "sheet.png")[..., 0]
    assert sheet.shape == (18, 8)
    np.testing.assert_allclose(sheet[:8], np.eye(8), atol=0.01)
    assert (sheet[8:] == 1).all()


FACES = files("msmri") / "weights" / "faces_msm.safetensors"


def test_a_prior_of_photographs_draws_colours_by_its_own_law(tmp_path):
    from matplotlib.image import imread

    out, again = tmp_path / "out", tmp_path / "again"
    result = invoke(
        "sample", "-o", out, "--prior", FACES, "--count", "3", "--steps", "2", "--batch", "2", "--seed", "4"
    )
    assert "3 images of 32 x 32" in result.stdout and "random tiles" in result.stdout and "sigma 40" in result.stdout
    with h5py.File(out / "samples.h5") as file:
        images = torch.from_numpy(file["samples"][()])
        assert images.shape == (3, 3, 32, 32) and images.dtype == torch.float32 and "colours" in file.attrs["units"]
    method = Generation(load_prior(FACES), steps=2, sigma_max=40.0, law=load_prior(FACES).law)
    rng = [torch.Generator().manual_seed(4 + k) for k in range(3)]
    torch.testing.assert_close(images, method(Identity(), (3, 32, 32), rng, dtype=torch.float32), rtol=1e-3, atol=1e-3)
    sheet = imread(out / "samples.png")
    assert sheet.shape == (66, 66, 4)
    expected = ((images[1].movedim(0, -1) + 1) / 2).clamp(0, 1).numpy()
    np.testing.assert_allclose(sheet[:32, 34:, :3], expected, atol=1 / 254)
    settings = json.loads((out / "samples.json").read_text())["settings"]
    assert settings["shape"] == [3, 32, 32] and settings["method"]["law"]["name"] == "random-tiles"
    invoke(
        "sample", "-o", again, "--prior", FACES, "--count", "1", "--steps", "2", "--size", "48x32", "--sigma-max", "5"
    )
    assert read_samples(again / "samples.h5").shape == (1, 3, 48, 32)


def test_weights_that_do_not_draw_by_msm_are_refused(tmp_path):
    for name in ("faces_ambient", "faces_oracle"):
        weights = FACES.parent / f"{name}.safetensors"
        result = invoke("sample", "-o", tmp_path / "out", "--prior", weights, "--count", "1", code=2)
        (line,) = errors(result)
        assert name in line and "MSM recipe" in line
    assert names(tmp_path / "out") == []


def test_the_shipped_prior_draws_as_its_weights_tell(tmp_path):
    """No option but where to write: its size, its masks and its highest noise level."""
    result = invoke("sample", "-o", tmp_path / "out", "--dry-run")
    assert "16 images of 64 x 64 from brain64_joint.safetensors" in result.stdout
    assert "from sigma 30 to 0.01, 1 masks a step" in result.stdout and "nominal 1.00" in result.stdout


def test_the_prior_of_the_first_round_draws_by_its_masks(tmp_path):
    weights = files("msmri") / "weights" / "brain64_msm.safetensors"
    assert (load_prior(weights).law.acceleration, load_prior(weights).law.centre_fraction) == (4, 0.125)
    given = ("sample", "-o", tmp_path / "out", "--dry-run", "--prior", weights, "--size", "64x64")
    result = invoke(*given)
    assert "from sigma 30 to 0.01, 3 masks a step" in result.stdout and "8 centre lines" in result.stdout
    assert "nominal 4.00" in result.stdout
    given = invoke(*given, "-R", "3")
    assert "nominal 3.00" in given.stdout and "8 centre lines" in given.stdout
