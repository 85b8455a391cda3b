"""The benchmark of grain in drawn faces: what it measures, and that its words follow its numbers."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from msmri.config import build
from msmri.measurement import Measurement
from msmri.methods.adps_training import CleanLoss
from msmri.methods.msm_training import NoiselessMSM
from msmri.model.checkpoint import save_checkpoint
from msmri.physics.operators import Identity
from msmri.physics.tiles import RandomTiles
from msmri.sampling.aggregate import aggregate
from msmri.sampling.reverse import Step
from msmri.tensors import generators

NETWORK = {"use": "msmri.model.unet:UNet", "in_channels": 3, "out_channels": 3, "channels": [8], "blocks_per_level": 1,
           "conditions": 1, "patch": 2}  # fmt: skip
IMAGE = {"use": "msmri.model.ambient:ImageDenoiser", "network": NETWORK}
AMBIENT = {"use": "msmri.model.ambient:AmbientDenoiser", "network": {**NETWORK, "in_channels": 5}}
LAW, FURTHER = {"use": "msmri.physics.tiles:RandomTiles"}, {"use": "msmri.physics.tiles:FurtherTiles"}
RECIPES = {
    "oracle": {"model": IMAGE, "data": {}, "loss": {"use": "msmri.methods.adps_training:CleanLoss"}},
    "ambient": {"model": AMBIENT, "data": {"law": LAW}, "loss": {"further": FURTHER}},
    "msm": {
        "model": {"use": "msmri.model.denoiser_partial:DenoiserPartial", "denoiser": IMAGE},
        "data": {"law": LAW},
        "loss": {"use": "msmri.methods.msm_training:NoiselessMSM", "sigma_max": 40.0},
    },
}


@pytest.fixture(scope="module")
def script(load_benchmark):
    return load_benchmark("why_are_msm_faces_grainy")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Small priors whose networks say something."""
    folder = tmp_path_factory.mktemp("weights")
    for name, recipe in RECIPES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            tensors = {k: v + 0.1 * torch.randn_like(v) for k, v in build(recipe["model"]).state_dict().items()}
        save_checkpoint(folder / f"faces_{name}.safetensors", tensors, {"format": "msmri-partial", "recipe": recipe})
    return folder


@pytest.fixture(scope="module")
def estimates(script, weights):
    return script.Estimates({name: weights / f"faces_{name}.safetensors" for name in [*RECIPES, "low"]})


@pytest.mark.parametrize(("cycles", "band"), [(1, 0), (3, 1), (7, 2), (12, 3)])
def test_power_is_found_in_its_band(script, cycles, band):
    wave = torch.cos(2 * torch.pi * cycles * torch.arange(32) / 32).expand(2, 3, 32, 32)
    power = script.spectrum(wave)
    assert int(power.argmax()) == band and power.sum() - power[band] < 1e-6 * power[band]


def test_share_of_training_is_that_of_the_losses(script, weights, tmp_path):
    """Levels that the losses show their models, counted."""
    header = {
        "format": "msmri-partial",
        "recipe": {**RECIPES["msm"], "loss": {**RECIPES["msm"]["loss"], "sigma_mean": -1}},
    }
    save_checkpoint(tmp_path / "faces_log.safetensors", {"a": torch.zeros(1)}, header)
    shown = []

    class Model(torch.nn.Module):
        def forward(self, state, *rest):
            shown.extend(rest[-1].flatten().tolist())
            return state

        def weight(self, sigma):
            return torch.ones_like(sigma)

    n = 40_000
    ones = torch.ones(n, 1, 1, 1)
    batch = Measurement(ones, torch.ones(1, 1, 1, 1, dtype=torch.bool), Identity(), torch.zeros(1))
    low, high = script.TRAINED
    log = NoiselessMSM(sigma_max=40.0, sigma_mean=-1.0)
    for name, loss in {"msm": NoiselessMSM(sigma_max=40.0), "oracle": CleanLoss(), "log": log}.items():
        shown.clear()
        loss(Model(), batch, torch.Generator().manual_seed(0))
        counted = sum(low <= sigma <= high for sigma in shown) / n
        told = script.training_share((tmp_path if name == "log" else weights) / f"faces_{name}.safetensors")
        assert told["share"] == pytest.approx(counted, abs=0.008)
        assert told["pixels"] == (1 if name == "oracle" else RandomTiles().kept / 16)


def test_estimates_of_masks_are_averaged_and_the_others_held(script, estimates):
    rng = generators(0, 2)
    state = torch.randn(2, 3, 32, 32, generator=rng[0])
    step = Step(state, torch.full_like(state, 7.0), torch.tensor(0.4))
    few = estimates.seen("msm, 1 mask", rng, 32)
    assert few.shape == (1, 2, 1, 32, 32) and few.float().mean() == pytest.approx(10 / 16)
    found = estimates("msm, 1 mask", step, few)
    assert torch.equal(found == 7.0, ~few[0].expand_as(found))
    several = estimates.seen("msm, 11 masks", rng, 32)  # more than one group of masks
    sigma = torch.full((1, 1, 1, 1), 0.4)
    with torch.no_grad():
        expected = aggregate(estimates.prior("msm"), step, several, Identity(), sigma)
    torch.testing.assert_close(estimates("msm, 11 masks", step, several), expected, rtol=1e-4, atol=1e-5)
    assert bool(estimates.seen("msm, 3 covering", rng, 32).any(0).all())
    assert bool(estimates.seen("oracle", rng, 32).all()) and bool(estimates.seen("ambient, all shown", rng, 32).all())
    once = estimates.seen("ambient", rng, 32)
    assert once.shape == (1, 2, 1, 32, 32) and once.float().mean() < 10 / 16  # a further tile is hidden
    with torch.no_grad():
        torch.testing.assert_close(
            estimates("oracle", step, few), estimates.prior("oracle").denoise(state, 0.4), rtol=1e-5, atol=1e-6
        )
    assert not estimates.known("low, 3 masks") and estimates.known("msm, 3 masks")


def test_a_way_tells_who_estimates_where(script):
    """The ladder, its ends, the switch, and that ambient keeps one mask all the way."""
    asked, masks = [], []

    def seen(name, rng, size):
        masks.append(name)
        return SimpleNamespace(number=len(masks))

    class Fake:
        def __call__(self, name, step, mask):
            asked.append((round(float(step.sigma), 4), name, mask.number))
            return 0.1 * step.state

    fake = Fake()
    fake.seen = seen
    way = script.Way("a", "b", 0.5, high=4.0, low=0.1, finer=2.0)
    script.draw(way, fake, generators(0, 1), 4, 3)
    levels = [level for level, *_ in asked]
    assert len(levels) == 6 and levels[0] == 4.0 and levels[-1] == pytest.approx(0.1)
    assert [name for _, name, _ in asked] == ["a" if level >= 0.5 else "b" for level in levels]
    asked.clear(), masks.clear()
    script.draw(script.Way("ambient", high=4.0), fake, generators(0, 1), 4, 3)
    assert masks == ["ambient"] and {number for *_, number in asked} == {1}


def test_words_follow_the_numbers(script):
    drawn = {"oracle": 1.0, "ambient": 2.0, "msm": 3.0, "msm, until 0.1": 2.5,
             "msm above 0.3, oracle below": 1.2, "oracle above 0.3, msm below": 2.9}  # fmt: skip
    share = {"share": 0.5, "pixels": 1.0, "share_of_values": 0.5}
    record = {
        "errors": [{"sigma": s, "estimate": "msm, 3 masks", "dB": d} for s, d in ((1.0, 0.5), (0.1, 2.0))],
        "drawn": [{"way": name, "distance": value} for name, value in drawn.items()],
        "training": {"oracle": share, "msm": {"share": 0.2, "pixels": 0.5, "share_of_values": 0.1}},
    }
    text = "\n".join(script.words(record))
    assert "largest +2.0 dB at 0.1" in text and "More is made below that level" in text
    assert "5.0 times as many values" in text and "nearest first: oracle, ambient, msm" in text
    assert "nearest of 2, 'msm, until 0.1': 2.50" in text
    more = {"low noise": 1.5, "all levels": 2.6}
    drawn |= {f"msm, more training on {kind} used below 0.5": value for kind, value in more.items()}
    drawn |= {"msm above 0.3, oracle below": 3.2}
    record["drawn"] = [{"way": name, "distance": value} for name, value in drawn.items()]
    text = "\n".join(script.words(record))
    assert "More is made above that level" in text and "1.50 after low noise alone, 2.60 after all levels" in text


def test_a_quick_run_writes_page_and_pictures_and_goes_on(script, weights, tmp_path, monkeypatch, capsys):
    ways = ["oracle", "msm", "msm above 0.3, oracle below", "msm from noise"]
    line = ["--quick", "--weights", weights, "--work", tmp_path / "w", "--out", tmp_path / "o.json", "--ways", *ways]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, line), "--markdown", str(tmp_path / "page.md")])
    monkeypatch.setattr(script, "LEVELS", (1.0, 0.1))
    monkeypatch.setattr(script, "MANY", 2)
    script.main()
    record = json.loads((tmp_path / "o.json").read_text())
    assert [row["way"] for row in record["drawn"]] == ways[:3]  # no weights learned from noise
    assert all(row["dB"] == 0 for row in record["errors"] if row["estimate"] == "oracle")
    assert {row["estimate"] for row in record["errors"]} == {n for n in script.COMPARED if n.split(",")[0] in RECIPES}
    page = (tmp_path / "page.md").read_text()
    for name in ("o_errors.png", "o_drawn.png"):
        assert (tmp_path / "images" / name).stat().st_size > 0 and name in page
    assert "## In words" in page and "nan" not in page
    monkeypatch.setattr(script, "draw", None)  # a second run draws nothing
    script.main()
    again = json.loads((tmp_path / "o.json").read_text())
    assert again["drawn"] == record["drawn"] and again["errors"] == record["errors"]
