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
AMBIENT = {"use": "msmri.model.ambient:AmbientDenoiser", "network": {**NETWORK, "in_channels": 5}}
TILES, PIXELS = ({"use": f"msmri.physics.tiles:Random{kind}"} for kind in ("Tiles", "Pixels"))
FURTHER_TILES, FURTHER_PIXELS = "msmri.physics.tiles:FurtherTiles", "msmri.model.ambient:FurtherPixels"
MODELS = {
    "faces_msm": (
        {"use": "msmri.model.denoiser_partial:DenoiserPartial", "denoiser": IMAGE},
        {"data": {"law": TILES}},
    ),
    "faces_ambient": (AMBIENT, {"data": {"law": TILES}, "loss": {"further": {"use": FURTHER_TILES}}}),
    "faces_oracle": (IMAGE, {"data": {}}),
    "p80": (AMBIENT, {"data": {"law": {**PIXELS, "acceleration": 5.0}}, "loss": {"further": {"use": FURTHER_PIXELS}}}),
}
LABELS = ["whole photographs", "p = 0.8", "six of 16 tiles lost", "msm, six of 16 tiles lost"]


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "do_priors_cross_tasks.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run of all kinds of priors, untrained."""
    folder = tmp_path_factory.mktemp("cross")
    for name, (node, recipe) in MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tensors = {key: value + 0.02 * torch.randn_like(value) for key, value in build(node).state_dict().items()}
        header = {"format": "msmri-partial", "recipe": {**recipe, "model": node}, "step": 7, "cpu_hours": 0.1}
        save_checkpoint(folder / f"{name}.safetensors", tensors, header)
    arguments = [
        "--quick",
        "--shipped",
        folder,
        "--pixels",
        f"0.8={folder / 'p80.safetensors'}",
        "--work",
        folder / "w",
    ]
    arguments += ["--out", folder / "rows.json", "--markdown", folder / "page.md"]
    return folder, arguments, run(*arguments)


def test_every_prior_restores_every_case(quick):
    folder, _, result = quick
    assert result.returncode == 0, result.stderr
    record = json.loads((folder / "rows.json").read_text())
    assert {(row["case"], row["prior"]) for row in record["rows"]} == {
        (case, label) for case in ("sensing:0.25", "super-resolution:4") for label in LABELS
    }
    assert len(record["rows"]) == 2 * 4 * 2
    assert {row["lost"] for row in record["rows"] if row["prior"] == "p = 0.8"} == {0.8}
    assert record["training"]["p = 0.8"] == "7 steps, 0.1 CPU hours"


def test_words_are_those_of_the_rows(quick):
    folder, _, _ = quick
    record, page = json.loads((folder / "rows.json").read_text()), (folder / "page.md").read_text()
    for case in ("sensing:0.25", "super-resolution:4"):
        psnr = {label: {} for label in LABELS}
        for row in record["rows"]:
            if row["case"] == case:
                psnr[row["prior"]][row["face"]] = row["psnr"]
        gain = sum(psnr["p = 0.8"][face] - psnr["whole photographs"][face] for face in psnr["p = 0.8"]) / 2
        (said,) = [line for line in record["verdict"] if line.startswith(case)]
        assert f"p = 0.8 {gain:+.2f} [" in said and f"- {said}" in page
        rivals = {label: sum(psnr[label].values()) / 2 for label in LABELS[1:3]}
        best = max(rivals, key=rivals.get)
        ours = sum(psnr[LABELS[3]].values()) / 2 - rivals[best]
        assert f"MSM is {ours:+.2f} [" in said and said.endswith(f"against the best A-DPS, {best}.")
        assert f"| {case}" in page
    for name in ("cross_tasks", "cross_tasks_sensing_025", "cross_tasks_super-resolution_4"):
        assert (folder / "images" / f"{name}.png").exists() and f"images/{name}.png" in page


def test_goes_on_where_it_stopped(quick):
    folder, arguments, _ = quick
    kept = folder / "rows.rows.json"
    rows = json.loads(kept.read_text())["rows"]
    key = next(key for key in rows if "p = 0.8" in key)
    rows[key]["psnr"] = 77.0  # kept as it is
    kept.write_text(json.dumps({"rows": rows}))
    assert run(*arguments).returncode == 0
    assert 77.0 in {row["psnr"] for row in json.loads((folder / "rows.json").read_text())["rows"]}


def test_what_a_prior_is_must_be_said(tmp_path):
    result = run("--quick", "--pixels", "some.safetensors", "--out", tmp_path / "rows.json")
    assert result.returncode != 0 and "give the share of lost pixels" in result.stderr and not any(tmp_path.iterdir())
