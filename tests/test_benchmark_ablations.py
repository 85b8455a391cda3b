"""The benchmarks of one setting at a time: nothing is run twice, and pages say what their numbers say."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from msmri.config import build
from msmri.io import write_scan
from msmri.methods.msm import MSM
from msmri.model.checkpoint import load_checkpoint, save_checkpoint
from msmri.model.prior import load_prior
from msmri.testing import phantom_measurement

ROOT = Path(__file__).parents[1]
NETWORK = {"use": "msmri.model.unet:UNet", "in_channels": 4, "channels": [8, 8], "blocks_per_level": 1}
MODEL = {"use": "msmri.model.partial:MeasurementPartial", "network": NETWORK, "wiener_iterations": 3}


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_scans(folder, seeds):
    folder.mkdir()
    for seed in seeds:
        scan = phantom_measurement((24, 52), coils=3, seed=seed)
        write_scan(folder / f"s{seed}.h5", scan.encoding(scan.target[:, None].to(torch.complex64)))
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans") / "validation", (0, 1))


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    path = tmp_path_factory.mktemp("prior") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = {name: value + 0.02 * torch.randn_like(value) for name, value in build(MODEL).state_dict().items()}
    save_checkpoint(path, tensors, {"format": "msmri-partial", "recipe": {"model": MODEL}})
    return path


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr("msmri.report.loss_curve", lambda path, records: None)


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


# which_sampling_choice_pays


def arguments_for(scans, prior, out, *groups):
    return [scans, "--prior", prior, "--accelerations", 3, "--out", out, "--only", *groups]


def test_rows_are_run_once_and_go_on_after_an_interruption(scans, prior, tmp_path, monkeypatch):
    module, calls = load("which_sampling_choice_pays"), []

    def invented(method, change, case, seed):
        calls.append(method)
        if len(calls) == stop:
            raise KeyboardInterrupt
        psnr = 30 + method.masks_per_step + 0.1 * (method.data_weight or 3) + 0.01 * len(method.likelihood)
        return {"psnr": psnr, "psnr_one_sample": psnr - 1, "seconds": 1.0}

    monkeypatch.setattr(module, "score", invented)
    stop, groups = None, ("masks", "likelihood")
    call(module, monkeypatch, *arguments_for(scans, prior, tmp_path / "whole.json", *groups))
    assert len(calls) == 2 * (5 + 9)  # the default stands four times in the tables
    whole = json.loads((tmp_path / "whole.json").read_text())["sets"]
    assert [list(found) for found in whole.values()] == [list(module.SETS[group][2]) for group in groups]
    calls, stop = [], 6
    with pytest.raises(KeyboardInterrupt):
        call(module, monkeypatch, *arguments_for(scans, prior, tmp_path / "parts.json", *groups))
    assert not (tmp_path / "parts.json").exists()
    stop = None
    call(module, monkeypatch, *arguments_for(scans, prior, tmp_path / "parts.json", *groups))
    assert len(calls) == 2 * (5 + 9) + 1
    assert json.loads((tmp_path / "parts.json").read_text())["sets"] == whole
    tensors, header = load_checkpoint(prior)  # other weights: all anew
    save_checkpoint(tmp_path / "other.safetensors", {name: one + 0.01 for name, one in tensors.items()}, header)
    calls = []
    call(module, monkeypatch, *arguments_for(scans, tmp_path / "other.safetensors", tmp_path / "parts.json", "masks"))
    assert len(calls) == 2 * 5


def test_a_page_of_real_rows(scans, prior, tmp_path, monkeypatch):
    module = load("which_sampling_choice_pays")
    few = {"default": {}, "proximal": module.PULLS["proximal, weight 3"]}
    few |= {f"left, {gamma}": {**module.LEFT, **module.PULLS[f"gradient, gamma {gamma}"]} for gamma in (1, 2)}
    few = {name: {**change, "samples": 1, "steps": 3} for name, change in few.items()}
    monkeypatch.setitem(module.SETS, "likelihood", ("Likelihood", "About.", few))
    arguments = arguments_for(scans / "s0.h5", prior, tmp_path / "result.json", "likelihood")
    call(module, monkeypatch, *arguments, "--markdown", tmp_path / "page.md")
    found = json.loads((tmp_path / "result.json").read_text())["sets"]["likelihood"]
    values = [rows[0]["psnr"] for rows in found.values()]
    assert values[0] == values[1] and len(set(values)) == 3 and all(10 < value < 50 for value in values)
    page = (tmp_path / "page.md").read_text()
    assert "## Likelihood\n\nAbout." in page and "nan" not in page and f"| {values[2]:.2f} " in page


def test_every_variant_is_a_sampler_of_its_own(prior):
    module, model = load("which_sampling_choice_pays"), load_prior(prior)
    expected = {"masks": [1, 2, 3, 4, 8], "steps": [1, 2, 4, 8, 16]}
    for group, field in (("masks", "masks_per_step"), ("steps", "steps")):
        assert [one[field] for one in module.SETS[group][2].values() if one] == expected[group]
    for group, (_, _, changes) in module.SETS.items():
        assert next(iter(changes.items())) == ("default", {})
        told = []
        for change in changes.values():
            method = MSM(prior=model, **{key: value for key, value in change.items() if key != "prior"})
            told.append(json.dumps(module.told(method, change.get("prior", {})), sort_keys=True))
        doubles = {"parts": 0, "aggregation": 0}.get(group, 1)  # the default, again by its own name
        assert len(set(told)) == len(told) - doubles, group
    kinds = {(c.get("include_measured"), c["likelihood"]) for c in module.SETS["likelihood"][2].values() if c}
    assert len(kinds) == 6


def test_changes_of_a_prior_are_undone(prior):
    module, model = load("which_sampling_choice_pays"), load_prior(prior)
    inputs = torch.ones(1, 1, 8, 8, dtype=torch.complex64), torch.zeros(1, 4)
    seen = torch.stack([inputs[0], inputs[0]], 2).flatten(0, 1)
    with pytest.raises(RuntimeError), module.changed(model, networks=False, reweightings=7, following=None):
        assert model.reweightings == 7 and model.following is None
        assert not bool(model.network(seen, inputs[1]).abs().any())
        raise RuntimeError
    assert model.reweightings == 0 and callable(model.following)
    assert bool(model.network(seen, inputs[1]).abs().any())


def test_differences_are_paired_over_scans():
    module = load("which_sampling_choice_pays")
    default = [{"slice": f"{scan}.h5#{k}", "psnr": 30.0 + k} for scan in "ab" for k in range(2)]
    leads = [1.0, 0.0, 0.1, 0.3]  # scan a: 0.5, scan b: 0.2
    rows = [row | {"psnr": row["psnr"] + lead} for row, lead in zip(default, leads)]
    assert module.difference(rows, default, 0) == "+0.35 [+0.20, +0.50]"
    assert module.difference(rows[:2], default[:2], 0) == "+0.50"


# what_do_training_masks_change


@pytest.fixture(scope="module")
def masks():
    return load("what_do_training_masks_change")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("training") / "full", (10, 11, 12))


def arguments_of(training, scans, folder, **changes):
    model = {"model.cascades": 1, "model.reweightings": 0, "model.bfloat16": "false", "train.save_every": 2}
    model |= {
        "model.network.channels": "[8, 8]",
        "train.pixels": 1300,
        "train.warm_up": 1,
        "train.learning_rate": 0.003,
    }
    settings = [part for name, value in model.items() for part in ("--set", f"{name}={value}")]
    given = {"validation": scans, "work": folder / "work", "steps": 4, "scans": 2, "out": folder / "result.json"}
    given |= {"markdown": folder / "page.md", "samplers": "one step, networks not weighed", **changes}
    rest = [part for name, value in given.items() for part in (f"--{name}", value)]
    return [training, *settings, "--accelerations", 3, 4, *rest]


def test_priors_differ_in_their_masks_alone(masks, training, scans, tmp_path, monkeypatch):
    arguments = arguments_of(training, scans, tmp_path)
    steps = []

    def stopped(recipe, run):
        for record in train(recipe, run):
            steps.append((run.name, record.step))
            if len(steps) == stop:
                raise KeyboardInterrupt
            yield record

    train, stop = masks.train, 11  # the third run, after its third step: the state is of the second
    monkeypatch.setattr(masks, "train", stopped)
    with pytest.raises(SystemExit) as error:
        call(masks, monkeypatch, *arguments)
    assert error.value.code == 130 and not (tmp_path / "result.json").exists()
    stop = None
    call(masks, monkeypatch, *arguments)
    assert len(steps) == 11 + 2 + 8
    record = json.loads((tmp_path / "result.json").read_text())
    assert list(record["runs"]) == list(masks.VARIANTS)
    assert len({run["sha256"] for run in record["runs"].values()}) == 5
    assert all(run["steps"] == 4 and run["slices"] == 4 and run["sights"] == 1.0 for run in record["runs"].values())
    assert len({run["loss"] for run in record["runs"].values()}) == 5
    rates = [run["true_R"] for run in record["runs"].values()]
    assert rates[0] == rates[1] == rates[2] < rates[3] < rates[4]
    kept = {path.name.rpartition("_")[0]: path for path in (tmp_path / "work").iterdir() if path.name != "maps"}
    recipes = {name: load_checkpoint(path / "last.safetensors")[1]["recipe"] for name, path in kept.items()}
    assert len(recipes) == 5
    first = recipes["fixed_R_4"]
    assert len(first["data"]["path"]) == 2 and first["train"]["seed"] == 0
    for name, recipe in recipes.items():
        assert recipe["model"] == first["model"] and recipe["loss"] == first["loss"], name
        assert recipe["data"]["path"] == first["data"]["path"][:: -1 if name.endswith("another_seed") else 1]
        assert recipe["data"]["law"]["acceleration"] == float(name.split("_")[2])
        assert recipe["data"]["redraw"] == name.startswith("redrawn")
        assert recipe["train"]["seed"] == int(name.endswith("another_seed"))
    assert len(record["rows"]) == 6 * 2 * 2 and all(5 < row["psnr"] < 60 for row in record["rows"])
    page = (tmp_path / "page.md").read_text()
    assert "nan" not in page and page == masks.page(record)
    assert page.count("**beyond chance") == 4

    monkeypatch.setattr(masks, "train", None)  # all is done: neither trained nor tried again
    monkeypatch.setattr(masks, "score", None)
    (tmp_path / "page.md").unlink()
    call(masks, monkeypatch, *arguments)
    assert (tmp_path / "page.md").read_text().split("##", 1)[1] == page.split("##", 1)[1]
    with pytest.raises(TypeError):  # other settings: another run
        call(masks, monkeypatch, *arguments_of(training, scans, tmp_path, steps=5))


def row(variant, scan, psnr, *, level=4.0):
    return {"variant": variant, "sampler": "default", "slice": f"{scan}#0", "nominal_R": level, "psnr": psnr}


def test_words_follow_from_intervals_and_from_the_twin(masks):
    leads = {
        "fixed, R = 4": (0.0, 0.0, 0.0),
        "fixed, R = 4, another seed": (0.1, 0.2, 0.3),  # 0.2 in the mean
        "redrawn, R = 4": (0.12, 0.15, 0.18),  # sure, but no more than another seed
        "fixed, R = 6": (-0.5, -0.6, -0.7),
        "fixed, R = 8": (-1.0, 1.0, 0.1),
    }
    rows = [row(name, f"s{k}.h5", 30 + k + lead) for name, values in leads.items() for k, lead in enumerate(values)]
    said = masks.sentences(rows, 0)
    assert ["**beyond chance at 1 of 1" in line for line in said] == [False, False, True, False]
    assert "another training of the same kind" in said[0] and "R = 4 +0.20 dB [+0.10, +0.30]" in said[0]
    assert "R = 4 +0.15 dB [+0.12, +0.18], another seed changes as much" in said[1]
    assert "R = 4 -0.60 dB [-0.70, -0.50], beyond" in said[2]
    assert "R = 4 +0.03 dB [-1.00, +1.00], within" in said[3]
    alone = masks.sentences([one for one in rows if one["slice"] == "s0.h5#0"], 0)
    assert all("of a single scan" in line and "at 1 of 1" not in line for line in alone)
