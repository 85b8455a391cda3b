import csv
import json
import signal
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from msmri.cli import app
from msmri.config import build
from msmri.io.restored import read_photo
from msmri.io.tasks import TASKS
from msmri.methods.msm import MSM
from msmri.metrics import psnr
from msmri.model.checkpoint import save_checkpoint
from msmri.model.prior import load_prior, shipped_prior
from msmri.physics.masks import slice_seed
from msmri.physics.tiles import FurtherTiles, RandomTiles

module = import_module("msmri.cli.restore")  # the package knows the command by that name

NETWORK = {"use": "msmri.model.unet:UNet", "in_channels": 3, "out_channels": 3, "channels": [8], "blocks_per_level": 1,
           "conditions": 1, "patch": 2}  # fmt: skip
IMAGE = {"use": "msmri.model.ambient:ImageDenoiser", "sigma_data": 0.5, "network": NETWORK}
MODELS = {
    "faces_msm": {"use": "msmri.model.denoiser_partial:DenoiserPartial", "denoiser": IMAGE},
    "faces_oracle": IMAGE,
    "faces_ambient": {"use": "msmri.model.ambient:AmbientDenoiser", "network": {**NETWORK, "in_channels": 5}},
}
LAW = {"use": "msmri.physics.tiles:RandomTiles", "acceleration": 4.0}
FURTHER = {"use": "msmri.physics.tiles:FurtherTiles", "count": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of small networks with small random weights, trained on photographs of 16 pixels by their header."""
    folder = tmp_path_factory.mktemp("weights")
    for name, node in MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(node)
            tensors = {key: value + 0.02 * torch.randn_like(value) for key, value in model.state_dict().items()}
        recipe = {"model": node, "data": {"size": 16, "law": LAW}, "loss": {"further": FURTHER}}
        save_checkpoint(folder / f"{name}.safetensors", tensors, {"format": "msmri-partial", "recipe": recipe})
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """An npz of 10 smooth photographs of 32 pixels, 7 of them for training."""
    rng = np.random.default_rng(0)
    waves = np.linspace(0, 3, 32)
    images = [[np.sin(a * waves[:, None] + b * waves + c) for c in range(3)] for a, b in rng.uniform(-2, 2, (10, 2))]
    pixels = np.rint(127.5 * (np.moveaxis(np.array(images), 1, -1) + 1)).astype(np.uint8)
    path = tmp_path_factory.mktemp("faces") / "faces.npz"
    np.savez(path, images=pixels, source=[f"folder/{k}.jpg" for k in range(10)], split=[0] * 7 + [1] * 3)
    return path


def invoke(*arguments, code: int = 0):
    result = CliRunner().invoke(app, ["restore", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr, result.exception)
    return result


def errors(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


FAST = ["--option", "msm.steps=3", "--device", "cpu", "--seed", "4"]


def test_photographs_are_degraded_restored_and_scored(tmp_path, faces, weights):
    out = tmp_path / "out"
    more = ["--weights", weights, *FAST, "--samples", "2", "--noise", "0.02", "--split", "test"]
    result = invoke(faces, "-o", out, "--task", "super-resolution", "--amount", "2", "--method", "bicubic,msm", *more)
    assert "3 photographs of 16 x 16" in result.stdout and "| bicubic" in result.stdout
    stems = ["folder_7", "folder_8", "folder_9"]
    expected = {f"bicubic/{stem}.png" for stem in stems} | {
        f"msm/{stem}{end}.png" for stem in stems for end in ("", "_spread")
    }
    assert set(names(out)) == expected | {"bicubic/restored.json", "msm/restored.json", "sheet.png", "scores.csv"}
    record = json.loads((out / "msm" / "restored.json").read_text())
    told = record["settings"]
    assert record["finished"] and told["steps"] == 3 and told["samples"] == 2 and told["noise"] == 0.02
    assert (told["task"], told["amount"], told["size"], told["method"]) == ("super-resolution", 2, [16, 16], "msm")
    assert told["likelihood"] == "proximal" and len(told["weights"]) == 64  # the preset, and a checksum
    # the same by hand
    from msmri.io.photos import read_photos

    photos = read_photos(faces, size=16, split="test")
    task = module.dataclasses.replace(TASKS["super-resolution"], amount=2.0)
    measurement = task.degrade(photos, range(3), noise_std=0.02, seed=4)
    method = MSM.preset("restoration", prior=load_prior(weights / "faces_msm.safetensors"), steps=3, samples=2)
    rng = [torch.Generator().manual_seed(slice_seed(name, 4)) for name in photos.names]
    mean = method(measurement, rng).image.clamp(-1, 1)
    for k, stem in enumerate(stems):
        found = read_photo(out / "msm" / f"{stem}.png")
        torch.testing.assert_close(found, mean[k], atol=1.1 / 255, rtol=0)
        row = record["photographs"][f"folder/{7 + k}.jpg"]
        assert row["PSNR"] == pytest.approx(psnr(measurement.target[k], mean[k], data_range=2.0), abs=0.05)
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["input"] * 3 + ["bicubic"] * 3 + ["msm"] * 3
    scores = {
        kind: np.mean([float(row["PSNR"]) for row in rows if row["method"] == kind]) for kind in ("input", "bicubic")
    }
    assert scores["bicubic"] > scores["input"] + 3 and f"{scores['bicubic']:.2f}" in result.stdout
    assert np.array(Image.open(out / "sheet.png")).shape == (14 + 3 * 98 - 2, 4 * 98 - 2, 3)


def test_weights_tell_what_they_were_trained_on(weights):
    prior = load_prior(weights / "faces_ambient.safetensors")
    assert prior.law == RandomTiles(4.0) and prior.further == FurtherTiles(2)
    assert not hasattr(load_prior(), "law")  # whose recipe has none


@pytest.mark.parametrize("task", TASKS)
def test_every_task_by_every_kind_of_method(tmp_path, faces, weights, task):
    fits = {"box": "biharmonic", "random": "biharmonic,a-os", "super-resolution": "bicubic"}.get(task, "tv-image")
    fast = ["a-dps.steps=2", "ddnm.steps=2", "dps.steps=2", "diffpir.steps=2", "tv-image.iterations=3"]
    run = f"msm,a-dps,ddnm,dps,diffpir,{fits}"
    fast = [part for text in fast for part in ("--option", text) if text.split(".")[0] in run]
    invoke(
        faces, "-o", tmp_path, "--task", task, "--method", run, "--weights", weights, *FAST, *fast, "--limit", "1",
        "--samples", "2",
    )  # fmt: skip
    made = {name for name in names(tmp_path) if name.endswith("folder_0.png")}
    assert made == {f"{name}/folder_0.png" for name in run.split(",")}
    assert (tmp_path / "ddnm" / "folder_0_spread.png").exists()


def test_a_method_that_cannot_do_the_task_leaves_the_others(tmp_path, faces):
    result = invoke(faces, "-o", tmp_path, "--size", 16, "--method", "bicubic,biharmonic", "--limit", "1", code=2)
    assert errors(result) == ["error: bicubic: bicubic enlarges small images alone; use tv-image"]
    assert names(tmp_path) == ["biharmonic/folder_0.png", "biharmonic/restored.json", "scores.csv", "sheet.png"]


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(tmp_path, faces, weights, monkeypatch):
    more = ["--weights", weights, *FAST, "--samples", "2"]
    monkeypatch.setattr(module, "TOGETHER", 4)
    calls, call = [], MSM.__call__

    def stopping(self, measurement, rng):
        calls.append(measurement.source)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return call(self, measurement, rng)

    monkeypatch.setattr(MSM, "__call__", stopping)
    result = invoke(faces, "-o", tmp_path / "out", *more, code=130)
    assert "--resume" in result.stderr
    record = json.loads((tmp_path / "out" / "msm" / "restored.json").read_text())
    assert not record["finished"] and len(record["photographs"]) == 4
    assert not [name for name in names(tmp_path / "out") if name.endswith(".part")]
    result = invoke(faces, "-o", tmp_path / "out", *more, code=2)
    assert "exists already" in errors(result)[0]
    result = invoke(faces, "-o", tmp_path / "out", *more, "--resume", "--noise", "0.1", code=2)
    assert "other settings" in errors(result)[0]
    invoke(faces, "-o", tmp_path / "out", *more, "--resume")
    assert [len(source) for source in calls] == [4, 4, 4, 2] and calls[2][0] == "folder/4.jpg"
    assert json.loads((tmp_path / "out" / "msm" / "restored.json").read_text())["finished"]
    invoke(faces, "-o", tmp_path / "whole", *more)
    for k in range(10):
        found, whole = (read_photo(tmp_path / run / "msm" / f"folder_{k}.png") for run in ("out", "whole"))
        torch.testing.assert_close(found, whole, atol=1.1 / 255, rtol=0)
    before = len(calls)
    invoke(faces, "-o", tmp_path / "out", *more, "--resume")  # all there
    assert len(calls) == before
    invoke(faces, "-o", tmp_path / "out", *more, "--overwrite", "--noise", "0.1", "--limit", "2")
    assert len(json.loads((tmp_path / "out" / "msm" / "restored.json").read_text())["photographs"]) == 2


def test_photographs_that_are_degraded_already(tmp_path, faces, weights):
    more = ["--limit", "2", "--measured"]
    invoke(faces, "-o", tmp_path / "a", "--task", "super-resolution", "--amount", "2", "--method", "bicubic", *more)
    assert read_photo(tmp_path / "a" / "bicubic" / "folder_1.png").shape == (3, 64, 64)
    assert (
        json.loads((tmp_path / "a" / "bicubic" / "restored.json").read_text())["photographs"]["folder/1.jpg"]["PSNR"]
        is None
    )
    assert np.array(Image.open(tmp_path / "a" / "sheet.png")).shape[1] == 2 * 130 - 2  # no truth to show
    known = np.full((32, 32), 255, np.uint8)
    known[4:9, 20:] = 0
    Image.fromarray(known).save(tmp_path / "known.png")
    np.save(tmp_path / "known.npy", known > 0)
    for name in ("known.png", "known.npy"):
        options = ["--task", "random", "--mask", tmp_path / name, "--method", "biharmonic", *more, "--overwrite"]
        invoke(faces, "-o", tmp_path / "b", *options)
        restored, original = read_photo(tmp_path / "b" / "biharmonic" / "folder_0.png"), np.load(faces)["images"][0]
        original = torch.from_numpy(original).permute(2, 0, 1) / 127.5 - 1
        kept = torch.from_numpy(known > 0).expand(3, -1, -1)
        torch.testing.assert_close(restored[kept], original[kept], atol=1e-6, rtol=0)
        assert 0.001 < float((restored - original)[~kept].abs().mean()) < 0.2


def test_dry_run_and_single_images(tmp_path, faces):
    rng = np.random.default_rng(1)
    for name in ("one.png", "two.png"):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / name)
    result = invoke(tmp_path / "one.png", "-o", tmp_path / "out", "--method", "biharmonic", "--dry-run")
    assert "1 photographs of 20 x 20" in result.stdout and not (tmp_path / "out").exists()
    invoke(tmp_path / "one.png", tmp_path / "two.png", "-o", tmp_path / "out", "--method", "biharmonic")
    assert {"biharmonic/one.png", "biharmonic/two.png"} <= set(names(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "haze"], "there is no task 'haze'"),
        (["--amount", "-1"], "cannot have amount"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--method", ","], "names no method"),
        (["--option", "steps=3"], "not METHOD.field=value"),
        (["--option", "tv-image.weight=3"], "of a method that is run"),
        (["--option", "msm.magic=3"], "no option 'magic'"),
        (["--preset", "fast"], "no preset 'fast'"),
        (["--limit", "0"], "--limit 0 is too small"),
        (["--noise", "-1"], "--noise is negative"),
        (["--mask", "x.png"], "--mask is for"),
        (["--size", "64"], "smaller than 64 x 64"),
        (["--split", "best"], "no split 'best'"),
        (["--weights", "nowhere.safetensors"], "no weights for photographs"),
        (["--weights", str(shipped_prior())], "not weights of msm for images of three colours"),
        (["--task", "super-resolution", "--amount", "3"], "do not fill"),
        (["--task", "sensing", "--measured"], "no measurements of task"),
        (["--method", "a-dps", "--weights", "OWN/faces_oracle.safetensors"], "not weights of a-dps"),
        (["--method", "ddnm", "--weights", "OWN/faces_ambient.safetensors"], "not weights of ddnm"),
        (["--method", "msm", "--weights", "OWN/faces_ambient.safetensors"], "not weights of msm"),
    ],
)
def test_wrong_options(tmp_path, faces, weights, options, says):
    options = [option.replace("OWN", str(weights)) for option in options]
    given = [] if "--weights" in options else ["--weights", weights]
    result = invoke(faces, "-o", tmp_path / "out", *given, *options, code=2)
    assert len(errors(result)) == 1 and says in errors(result)[0] and not (tmp_path / "out").exists()


def test_wrong_inputs(tmp_path, faces):
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "grey.png")
    more = ["-o", tmp_path / "out", "--method", "biharmonic"]
    for path, says in ((tmp_path / "none", "does not exist"), (tmp_path, "damaged or no image")):
        assert says in errors(invoke(path, *more, code=2))[0]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "good.png")
    result = invoke(tmp_path, *more, "--faulty", "skip")
    assert "2 photographs are left out" in result.stderr and "biharmonic/good.png" in names(tmp_path / "out")
    (tmp_path / "out" / "biharmonic" / "restored.json").write_text("{")
    assert "is damaged" in errors(invoke(tmp_path, *more, "--faulty", "skip", "--resume", code=2))[0]
