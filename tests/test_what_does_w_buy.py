"""The benchmark of masks and steps in generation: it goes on where it stopped, and its words follow its numbers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from msmri.config import build
from msmri.io import write_scan
from msmri.model.checkpoint import save_checkpoint
from msmri.physics.simulate import coil_maps, phantom, simulate_kspace

NETWORK = {"use": "msmri.model.unet:UNet", "in_channels": 2, "out_channels": 2, "channels": [8], "blocks_per_level": 1,
           "conditions": 1, "patch": 2}  # fmt: skip
IMAGE = {"use": "msmri.model.ambient:ImageDenoiser", "network": NETWORK}


@pytest.fixture(scope="module")
def script(load_benchmark):
    return load_benchmark("what_does_w_buy")


def record(distances):
    return {"cells": {name: {"distance": value} for name, value in distances.items()}}


def test_words_follow_the_numbers(script):
    falling = {
        "w=1 steps=10": 5.0,
        "w=2 steps=10": 4.0,
        "w=4 steps=10": 3.0,
        "oracle steps=10": 1.5,
        "R=2 w=2 steps=10": 2.5,
        "second steps=10": 1.75,
        "joint steps=10": 1.25,
    }
    text = script.in_words(record(falling), [1, 2, 4], [10])
    assert "5.00 -> 4.00 -> 3.00; falls 2 of 2 times, least at w = 4." in text
    assert "Clean-image diffusion: 1.50. Masks of R=2, w=2: 2.50." in text
    assert "Diffusion of reconstructions: 1.75. The first prior's network on reconstructions: 1.25." in text
    rising = {"w=1 steps=10": 3.0, "w=2 steps=10": 3.5, "w=1 steps=20": 2.0, "w=2 steps=20": 1.0}
    text = script.in_words(record(rising), [1, 2], [10, 20])
    assert "falls 0 of 1 times, least at w = 1." in text and "falls 1 of 1 times, least at w = 2." in text
    assert "20 network passes an image, as steps x masks: 20 x 1: 2.00, 10 x 2: 3.50." in text


def test_runs_and_goes_on_where_it_stopped(script, tmp_path, monkeypatch, capsys):
    for folder in ("same", "unseen"):
        (tmp_path / folder).mkdir()
        rng = torch.Generator().manual_seed(len(folder))
        images = torch.stack([phantom((40, 36), rng) for _ in range(8)])
        kspace, _ = simulate_kspace(images, coil_maps((40, 36), 3, rng), rng, noise_std=0.01)
        write_scan(tmp_path / folder / "scan.h5", kspace)
    for name, model in {
        "prior": {"use": "msmri.model.denoiser_partial:DenoiserPartial", "denoiser": IMAGE},
        "oracle": IMAGE,
    }.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            tensors = build(model).state_dict()
        recipe = {"format": "msmri-partial", "recipe": {"model": model, "data": {}, "loss": {}}}
        save_checkpoint(tmp_path / f"{name}.safetensors", tensors, recipe)
    where = [
        str(tmp_path / name)
        for name in ("same", "unseen", "prior.safetensors", "oracle.safetensors", "out.json", "page.md", "work")
    ]
    same, unseen, prior, oracle, out, page, work = where
    command = ["what_does_w_buy.py", same, "--unseen", unseen, "--prior", prior, "--oracle", oracle, "--other", prior]
    command += ["--masks", "1", "2", "--steps", "2", "--size", "32", "--count", "3", "--coils", "2", "--centre", "0.2"]
    command += ["--denser", "2", "--extrapolate", "1.5"]
    command += ["--work", work, "--out", out, "--markdown", page]
    later = command.index("--oracle")
    monkeypatch.setattr(sys, "argv", [*command[:later], *command[later + 2 :]])
    script.main()
    said = "; then the second prior; then masks of R = 2; then estimates extrapolated with g = 1.5; the last row"
    assert said in Path(page).read_text("utf-8")
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    told = Path(page).read_text("utf-8")  # in the order of the rows: what was drawn later comes below
    ordered = "then masks of R = 2; then estimates extrapolated with g = 1.5; then the clean-image prior; the last row"
    assert f"; then the second prior; {ordered}" in told
    first = json.loads(Path(out).read_text("utf-8"))
    assert set(first["cells"]) == {
        "w=1 steps=2",
        "w=2 steps=2",
        "oracle steps=2",
        "other w=2 steps=2",
        "R=2 w=2 steps=2",
        "g=1.5 w=2 steps=2",
    }
    assert all(cell["distance to people not trained on"] > 0 for cell in first["cells"].values())
    text = Path(page).read_text("utf-8")
    assert "Extrapolated with g=1.5, w=2, three passes a mask: " in text
    assert "falls " in text and "To people not trained on" in text and "20.0% centre" in text
    for name in ("generation_w", "generation_passes", "generation_sheet"):
        assert (tmp_path / "images" / f"{name}.png").stat().st_size > 1000

    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(script, "draw", never)
    script.main()
    assert json.loads(Path(out).read_text("utf-8"))["cells"] == first["cells"]
    monkeypatch.setattr(sys, "argv", [*command, "--other", oracle])  # another second prior: it alone is drawn anew
    asked = []
    monkeypatch.setattr(script, "draw", lambda method, options, count: asked.append(method) or torch.rand(3, 32, 32))
    script.main()
    assert len(asked) == 1
    # the published result alone is left, and no prior of clean images: its cells stand, the sheet's images are redrawn
    published, counts = json.loads(Path(out).read_text("utf-8"))["cells"], []
    shutil.rmtree(work)
    monkeypatch.setattr(sys, "argv", [*command[:later], *command[later + 2 :], "--other", oracle])
    monkeypatch.setattr(
        script, "draw", lambda method, options, count: counts.append(count) or torch.rand(count, 32, 32)
    )
    script.main()
    assert json.loads(Path(out).read_text("utf-8"))["cells"] == published
    assert counts == [script.SHOWN] * 5  # w = 1, w = 2, the second prior, denser masks, and carried beyond
    told = Path(page).read_text("utf-8")
    assert "| oracle steps=2 " in told and "then the clean-image prior" not in told
    monkeypatch.setattr(script, "draw", never)
    elsewhere = [*command[:1], unseen, *command[2:]]  # other references under the same names
    monkeypatch.setattr(sys, "argv", elsewhere)
    with pytest.raises(AssertionError, match="drawn again"):
        script.main()
    monkeypatch.setattr(sys, "argv", [*command, "--second", oracle, "--joint", prior, "--against", "4"])
    # of all lines, as the oracle is, and the oracle's own samples as references
    asked.clear()
    monkeypatch.setattr(
        script, "draw", lambda method, options, count: asked.append(method) or torch.rand(count, 32, 32)
    )
    script.main()
    whole = [one for one in asked if one.law.acceleration == 1]
    # four references, the sheet's of the oracle, and the new ones'
    assert [(one.masks_per_step, one.steps) for one in whole] == [(1, 50), (1, 2), (1, 2), (1, 2)]
    text = Path(page).read_text("utf-8")
    assert "the prior of reconstructions; then the first prior's network on reconstructions; the last row" in text
    found = json.loads(Path(out).read_text("utf-8"))["cells"]
    assert found["second steps=2"]["distance"] > 0 and found["joint steps=2"]["distance"] > 0
    assert found["joint steps=2"][script.AGAINST] > 0 and script.AGAINST not in found["w=1 steps=2"]  # two images left
    assert (
        "| distance to samples of the clean-image prior |" in text and "\n| samples of the clean-image prior " in text
    )
    monkeypatch.setattr(script, "draw", never)
    monkeypatch.setattr(sys, "argv", [*command, "--centre", "0.3"])  # other masks: nothing of before counts
    with pytest.raises(AssertionError, match="drawn again"):
        script.main()
