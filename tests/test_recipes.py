from pathlib import Path

import numpy as np
import pytest
import torch

from msmri.config import build, load_recipe
from msmri.io import write_scan
from msmri.model.checkpoint import load_checkpoint
from msmri.model.prior import load_prior
from msmri.testing import phantom_measurement
from msmri.train import TrainSettings, _rate, train

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return load_recipe(request.param)


def test_there_are_recipes():
    assert "brain_r4_small" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_is_short_and_says_what_it_is(path):
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= 30 and lines[0].startswith("# ")


def test_builds(recipe):
    assert set(recipe) <= {"data", "model", "loss", "train", "start"}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # full-size networks need no memory here
        model = build(recipe["model"])
    assert sum(p.numel() for p in model.parameters()) > 1e5
    assert callable(build(recipe["loss"]))
    settings = TrainSettings(**recipe["train"])
    assert all(type(getattr(settings, key)) is type(getattr(TrainSettings(), key)) for key in recipe["train"])
    data = recipe["data"]
    paths = data["path"] if isinstance(data["path"], list) else [data["path"]]
    assert data["use"].split(":")[0] in ("msmri.io.dataset", "msmri.io.photos")
    assert not any(Path(path).is_absolute() for path in paths)


def shrink(node):
    """Make the networks in a node as narrow as they can be."""
    if not isinstance(node, dict):
        return
    if node.get("use", "").endswith(":ADMConfig"):
        node |= {"channels": 32, "blocks_per_level": 1, "channel_mult": [1, 1], "head_channels": 32}
        node |= {"attention_resolutions": [node["image_size"]]}
    elif "channels" in node:
        node["channels"] = 8 if isinstance(node["channels"], int) else [8] * len(node["channels"])
    for inner in node.values():
        shrink(inner)


def write_data(node, folder):
    """Write small data for a node to read, in place; give the batch and channels that 1,800 places make."""
    folder.mkdir()
    if node["use"].startswith("msmri.io.photos:"):
        images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / "photos.npz", images=images, split=np.zeros(9))
        node |= {"path": str(folder / "photos.npz"), "size": 16}
        return 7, 3
    scan = phantom_measurement((32, 28), coils=10)
    full = node["use"].endswith(":FullScans")
    values = scan.encoding(scan.target[:, None].to(torch.complex64)) if full else scan.values
    write_scan(folder / "scan.h5", values, mask=None if full else scan.mask[:, 0].numpy())
    node["path"] = str(folder)
    return 2, min(10, node.get("max_coils", 8))


def test_a_shrunk_copy_trains(recipe, tmp_path):
    expected = write_data(recipe["data"], tmp_path / "data")
    shrink(recipe["model"])
    recipe["train"] |= {"steps": 2, "pixels": 1800}
    records = list(train(recipe, tmp_path / "run"))
    assert [r.step for r in records] == [1, 2] and all(-10 < r.loss < 100 and r.loss != 0 for r in records)
    _, header = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert header["recipe"]["model"] == recipe["model"]
    prior = load_prior(tmp_path / "run" / "last.safetensors")
    batch = build(recipe["data"]).batch(torch.Generator(), pixels=1800)
    assert batch.values.shape[:2] == expected
    with torch.no_grad():
        assert bool(build(recipe["loss"])(prior, batch, torch.Generator()).isfinite())


def test_twins_differ_in_nothing_but_what_they_learn_from():
    names = ("msm", "msm_noisy", "ambient", "oracle")
    small = [load_recipe(ROOT / "recipes" / f"photos32_{name}.yaml") for name in names]
    assert all(one["train"] == small[0]["train"] for one in small)
    networks = [one["model"].get("denoiser", one["model"])["network"] for one in small]
    assert [one.pop("in_channels") for one in networks] == [3, 3, 5, 3]
    assert all(one == networks[0] for one in networks)
    assert all((one["data"]["path"], one["data"]["size"]) == (small[0]["data"]["path"], 32) for one in small)


PUBLISHED = {  # weights, pixels along each side, learning rate
    "mri256_r4": (138.28e6, 256, 5e-5),
    "mri256_r4_noisy": (138.28e6, 256, 5e-5),
    "mri256_oracle": (138.28e6, 256, 5e-5),
    "photos128_msm": (105.20e6, 128, 1e-5),
    "photos128_msm_noisy": (105.20e6, 128, 1e-5),
    "photos128_ambient": (105.20e6, 128, 1e-5),
    "photos128_oracle": (105.20e6, 128, 1e-5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_networks_are_those_of_the_paper(name):
    weights, size, rate = PUBLISHED[name]
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build(recipe["model"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(weights, abs=6e3)
    settings = TrainSettings(**recipe["train"])
    assert settings.pixels == 2 * size**2 and settings.steps == 10**6 and settings.learning_rate == rate
    assert all(_rate(step, settings) == 1 for step in (0, 10, 999_999))
