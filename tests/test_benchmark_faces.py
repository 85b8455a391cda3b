import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msmri.config import build
from msmri.model.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]
NETWORK = {"use": "msmri.model.unet:UNet", "in_channels": 3, "out_channels": 3, "channels": [8], "blocks_per_level": 1,
           "conditions": 1, "patch": 2}  # fmt: skip
IMAGE = {"use": "msmri.model.ambient:ImageDenoiser", "network": NETWORK}
MODELS = {
    "faces_msm": {"use": "msmri.model.denoiser_partial:DenoiserPartial", "denoiser": IMAGE},
    "faces_ambient": {"use": "msmri.model.ambient:AmbientDenoiser", "network": {**NETWORK, "in_channels": 5}},
}
LAW = {"use": "msmri.physics.tiles:RandomTiles"}
FURTHER = {"use": "msmri.physics.tiles:FurtherTiles"}


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "faces.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run with the weights of MSM and of ambient diffusion, none of the oracle."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "weights").mkdir()
    for name, node in MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tensors = {key: value + 0.02 * torch.randn_like(value) for key, value in build(node).state_dict().items()}
        recipe = {"model": node, "data": {"size": 32, "law": LAW}, "loss": {"further": FURTHER}}
        header = {"format": "msmri-partial", "recipe": recipe, "step": 7, "cpu_hours": 0.1}
        save_checkpoint(folder / "weights" / f"{name}.safetensors", tensors, header)
    more = ["--quick", "--weights", folder / "weights", "--work", folder / "work", "--tasks", "box", "super-resolution"]
    arguments = [*more, "--out", folder / "faces.json", "--markdown", folder / "page.md"]
    return folder, arguments, run(*arguments)


def test_methods_with_weights_are_compared_and_the_others_named(quick):
    folder, _, result = quick
    assert result.returncode == 0, result.stderr
    record = json.loads((folder / "faces.json").read_text())
    assert record["left_out"] == ["msm, learned from noise", "oracle dps", "oracle ddnm"]
    assert "oracle ddnm: left out, no weights at faces_oracle.safetensors" in result.stdout
    found = {
        task: {row["method"] for row in record["rows"] if row["task"] == task} for task in ("box", "super-resolution")
    }
    both = {"input", "tv", "a-dps", "msm", "msm, paper's sampler"}
    assert found == {"box": both | {"biharmonic"}, "super-resolution": both | {"bicubic"}}
    assert len(record["rows"]) == 2 * 6 * 3 and {row["set"] for row in record["rows"]} == {"FairFace"}
    mean = {
        name: sum(row["psnr"] for row in record["rows"] if row["method"] == name) / 3
        for name in ("biharmonic", "bicubic")
    }
    assert min(mean.values()) > 30  # the waves are smooth
    assert all(0 < row["psnr"] < 60 and -1 < row["ssim"] <= 1 for row in record["rows"])
    assert set(record["generation"]) == {"one half of the real faces against the other", "msm", "ambient"}
    assert record["generation_counts"] == {"real": 12, "drawn": 8} and record["generation"]["msm"]["distance"] > 0
    assert record["training"]["msm"] == "7 steps, 0.1 CPU hours"
    page = (folder / "page.md").read_text()
    for said in ("## In words", "MSM is", "Left out for want of weights", "Nearest first: "):
        assert said in page
    assert "nan" not in page
    for name in ("faces_box.png", "faces_super-resolution.png", "faces_drawn.png"):
        assert (folder / "images" / name).stat().st_size > 0 and name in page
    assert (folder / "faces.csv").stat().st_size > 0


def test_a_second_run_takes_what_is_done(quick):
    folder, arguments, first = quick
    assert " dB\n" in first.stdout and "faces drawn" in first.stdout
    rows = json.loads((folder / "faces.json").read_text())["rows"]
    again = run(*arguments)
    assert again.returncode == 0 and " dB\n" not in again.stdout and "faces drawn" not in again.stdout
    assert json.loads((folder / "faces.json").read_text())["rows"] == rows
    assert again.stdout.split("# Faces")[1] == first.stdout.split("# Faces")[1]


def test_drawn_faces_alone_make_a_page_without_tasks(quick, tmp_path):
    _, arguments, _ = quick
    outputs = ["--tasks", "--out", tmp_path / "drawn.json", "--markdown", tmp_path / "page.md"]
    result = run(*arguments, *outputs)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "drawn.json").read_text())
    assert not record["rows"] and set(record["generation_training"]) == {"msm", "ambient"}
    page = (tmp_path / "page.md").read_text()
    assert "## Drawn faces" in page and "| 7 steps, 0.1 CPU hours |" in page and "| drawn from " in page
    assert "## Means" not in page and "PSNR" not in page


def test_lpips_is_reported_where_its_weights_are(load_benchmark, monkeypatch):
    faces = load_benchmark("faces")
    target = torch.linspace(-1, 1, 3 * 32 * 32).reshape(3, 32, 32)
    row = faces.quality(target, 0.5 * target)
    assert "lpips" not in row and row["psnr"] == pytest.approx(faces.colour_psnr(target, 0.5 * target))
    about = {"task": "box", "set": "FairFace", "face": "a", "method": "input", "seconds": 1.0, "NFE": 0}
    assert "lpips" not in faces.summarise([about | row], 0)
    monkeypatch.setattr(faces, "lpips", lambda a, b: (a - b).abs().amax((1, 2, 3)))
    row = faces.quality(target, 0.5 * target)
    assert row["lpips"] == pytest.approx(0.25) and "| lpips" in faces.summarise([about | row], 0)
