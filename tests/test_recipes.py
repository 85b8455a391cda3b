from pathlib import Path

import pytest
import torch

from msmri.config import build, load_recipe
from msmri.io import write_scan
from msmri.model.checkpoint import load_checkpoint
from msmri.model.prior import load_prior
from msmri.testing import phantom_measurement
from msmri.train import TrainSettings, train

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
    with torch.random.fork_rng(devices=[]):
        model = build(recipe["model"])
    assert sum(p.numel() for p in model.parameters()) > 1e5
    assert callable(build(recipe["loss"]))
    settings = TrainSettings(**recipe["train"])
    assert all(type(getattr(settings, key)) is type(getattr(TrainSettings(), key)) for key in recipe["train"])
    data = recipe["data"]
    paths = data["path"] if isinstance(data["path"], list) else [data["path"]]
    assert data["use"].startswith("msmri.io.dataset:") and not any(Path(path).is_absolute() for path in paths)


def test_a_shrunk_copy_trains(recipe, tmp_path):
    scan = phantom_measurement((32, 28), coils=10)
    (tmp_path / "data").mkdir()
    if recipe["data"]["use"].endswith(":FullScans"):
        write_scan(tmp_path / "data" / "scan.h5", scan.encoding(scan.target[:, None].to(torch.complex64)))
    else:
        write_scan(tmp_path / "data" / "scan.h5", scan.values, mask=scan.mask[:, 0].numpy())
    recipe["data"]["path"] = str(tmp_path / "data")
    channels = recipe["model"]["network"]["channels"]
    recipe["model"]["network"]["channels"] = 8 if isinstance(channels, int) else [8] * len(channels)
    recipe["train"] |= {"steps": 2, "pixels": 1800}
    records = list(train(recipe, tmp_path / "run"))
    assert [r.step for r in records] == [1, 2] and all(-10 < r.loss < 100 and r.loss != 0 for r in records)
    _, header = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert header["recipe"]["model"] == recipe["model"]
    prior = load_prior(tmp_path / "run" / "last.safetensors")
    batch = build(recipe["data"]).batch(torch.Generator(), pixels=1800)
    assert batch.values.shape[:2] == (2, min(10, recipe["data"].get("max_coils", 8)))
    with torch.no_grad():
        assert bool(build(recipe["loss"])(prior, batch, torch.Generator()).isfinite())
