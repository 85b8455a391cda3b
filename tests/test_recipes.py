import importlib.util
import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from msmri.cli import app
from msmri.config import build, load_recipe
from msmri.errors import InputError
from msmri.io import write_scan
from msmri.io.dataset import ReconstructedScans
from msmri.io.output import ReconstructionWriter, sha256
from msmri.io.restored import read_photo
from msmri.model.checkpoint import load_checkpoint, read_header, save_checkpoint
from msmri.model.prior import load_prior, shipped_prior
from msmri.physics.operators import Subsample
from msmri.testing import phantom_measurement
from msmri.train import TrainSettings, _rate, train

ROOT = Path(__file__).parents[1]
ALL = sorted((ROOT / "recipes").glob("*.yaml"))
OF_COMMANDS = [path for path in ALL if "command" in load_recipe(path)]
RECIPES = [path for path in ALL if path not in OF_COMMANDS]  # of training


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return load_recipe(request.param)


def script_of(name):
    """Load a script of recipes/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_there_are_recipes():
    assert "brain_r4_small" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
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
    if node["use"].endswith(":ReconstructedScans"):
        with ReconstructionWriter(folder / "scan.h5", len(scan.target), (32, 28)) as writer:
            for index, image in enumerate(scan.target):
                writer.write(index, image.to(torch.complex64))
        node["path"] = str(folder)
        return 2, 1
    full = node["use"].endswith(":FullScans")
    values = scan.encoding(scan.target[:, None].to(torch.complex64)) if full else scan.values
    write_scan(folder / "scan.h5", values, mask=None if full else scan.mask[:, 0].numpy())
    node["path"] = str(folder)
    return 2, min(10, node.get("max_coils", 8))


def test_a_shrunk_copy_trains(recipe, tmp_path, request):
    expected = write_data(recipe["data"], tmp_path / "data")
    shrink(recipe["model"])
    recipe["train"] |= {"steps": 2, "pixels": 1800}
    if "start" in recipe:  # from weights of full size, which exist
        build(load_recipe(ROOT / "recipes" / f"{request.node.callspec.id}.yaml")["model"]).load_state_dict(
            {name: value.float() for name, value in load_checkpoint(ROOT / recipe.pop("start"))[0].items()}
        )
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
    names = ("msm", "msm_noisy", "ambient", "oracle", "gsure")
    small = [load_recipe(ROOT / "recipes" / f"photos32_{name}.yaml") for name in names]
    assert all(one["train"] == small[0]["train"] for one in small)
    networks = [one["model"].get("denoiser", one["model"])["network"] for one in small]
    assert [one.pop("in_channels") for one in networks] == [3, 3, 5, 3, 3]
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
    "photos128_oracle_vp": (105.20e6, 128, 1e-5),
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


def prior_of(path, folder):
    """Write small weights in place of those that a recipe of another command names; give their path."""
    told = load_recipe(path)
    options = dict(option.split("=") for option in told.get("option", []))
    named = {told[key] for key in ("prior", "weights") if key in told}
    (file,) = named | {value for key, value in options.items() if key.endswith(".weights")}
    run = Path(file).parent
    assert run.parent == Path("runs") and ROOT / "recipes" / f"{run.name}.yaml" in RECIPES
    recipe = load_recipe(ROOT / "recipes" / f"{run.name}.yaml")
    shrink(recipe["model"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = {
            name: value + 0.01 * torch.randn_like(value) for name, value in build(recipe["model"]).state_dict().items()
        }
    weights = folder / "tiny.safetensors"
    save_checkpoint(weights, tensors, {"format": "msmri-partial", "recipe": recipe})
    return weights


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr, result.exception)
    return result


POSTERIOR = {"eta": 0.85, "schedule": "vp", "likelihood": "gradient", "start": "noise", "samples": 1, "steps": 2,
             "aggregate": "parallel", "include_measured": False}  # fmt: skip
DPS = {"samples": 1, "steps": 2, "sigma_max": None, "sigma_min": 0.004, "likelihood_step": 3.0}
DDNM = {"samples": 1, "steps": 2, "sigma_max": None, "sigma_min": 0.004, "eta": 0.85}
ORACLES = {"dps": DPS, "ddnm": DDNM}
TOLD = {  # what the manifest must tell of the sampler, after two steps instead of 200
    "brain64_generate": {
        "masks_per_step": 3,
        "extrapolate": 2.0,
        "eta": 1.0,
        "covering": True,
        "schedule": None,
        "sigma_max": 30.0,
    },
    "mri256_csmri": POSTERIOR | {"masks_per_step": 3, "data_weight": 2.0, "covering": False},
    "mri256_generate": {"masks_per_step": 3, "eta": 1.0, "covering": False, "schedule": "vp", "renewal": "constant"},
    "mri256_generate_oracle": {"masks_per_step": 1, "eta": 1.0, "schedule": None, "sigma_max": None},
    "photos128_box": POSTERIOR | {"masks_per_step": 2, "data_weight": 1.75, "covering": True},
    "photos128_generate": {"masks_per_step": 3, "eta": 1.0, "covering": True, "schedule": "vp", "renewal": "constant"},
    "photos128_generate_oracle": {"masks_per_step": 1, "eta": 1.0, "schedule": "vp", "renewal": "constant"},
    "photos128_super_resolution": POSTERIOR | {"masks_per_step": 2, "data_weight": 1.75, "covering": True},
}
NOISY = {f"{name}_noisy": name for name in TOLD if "oracle" not in name and not name.startswith("brain64")}
TOLD |= {name: TOLD[twin] for name, twin in NOISY.items()}
TOLD |= {name: ORACLES for name in ("mri256_csmri_oracle", "photos128_box_oracle", "photos128_super_resolution_oracle")}
DRAWN = {  # what sample says before it begins
    "brain64_generate": ("64 x 64", "50 steps from sigma 30 to 0.01", "3 masks a step of random lines: nominal 4.00"),
    "mri256_generate": ("256 x 256", "200 steps from sigma 1", "3 masks a step of random lines: nominal 4.00"),
    "mri256_generate_oracle": ("256 x 256", "200 steps from sigma 10 to 0.01", "1 masks a step of random lines: nomin"),
    "photos128_generate": ("128 x 128", "200 steps from sigma 1", "3 masks a step of random tiles: nominal 1.67"),
    "photos128_generate_oracle": ("128 x 128", "200 steps from sigma 1", "1 masks a step of random tiles: nominal 1"),
}
DRAWN |= {name: DRAWN[twin] for name, twin in NOISY.items() if twin in DRAWN}


def test_every_recipe_of_a_command_is_tried():
    assert [path.stem for path in OF_COMMANDS] == sorted(TOLD)


def subset(told, expected):
    return {name: told[name] for name in expected}


@pytest.mark.parametrize("path", [path for path in OF_COMMANDS if path.stem in DRAWN], ids=lambda path: path.stem)
def test_a_shrunk_copy_draws(path, tmp_path):
    out, prior = tmp_path / "out", prior_of(path, tmp_path)
    result = invoke("sample", "--recipe", path, "-o", out, "--prior", prior, "--dry-run")
    assert result.stdout.startswith(f"{load_recipe(path)['count']} images") and all(
        text in result.stdout for text in DRAWN[path.stem]
    )
    small = ["--count", "2", "--steps", "2", "--size", "16x16", "--coils", "3", "--device", "cpu"]
    invoke("sample", "--recipe", path, "-o", out, "--prior", prior, *small)
    with h5py.File(out / "samples.h5") as file:
        images = file["samples"][()]
    assert images.shape == ((2, 3, 16, 16) if path.stem.startswith("photos") else (2, 16, 16))
    assert np.isfinite(images).all() and np.abs(images[0] - images[1]).max() > 0.01
    manifest = json.loads((out / "samples.json").read_text())
    assert manifest["recipe"] == {"name": path.name, "content": load_recipe(path)}
    assert subset(manifest["settings"]["method"], TOLD[path.stem]) == TOLD[path.stem]
    acceleration = {
        "brain64_generate": 4,
        "mri256_generate": 4,
        "mri256_generate_oracle": 1,
        "photos128_generate": 1.6667,
        "photos128_generate_oracle": 1,
    }[path.stem.removesuffix("_noisy")]
    assert manifest["settings"]["method"]["law"]["acceleration"] == acceleration


def methods_of(name):
    """What the manifests must tell, by method."""
    return TOLD[name] if name.endswith("_oracle") else {"msm": TOLD[name]}


@pytest.mark.parametrize("name", ["mri256_csmri", "mri256_csmri_noisy", "mri256_csmri_oracle"])
def test_a_shrunk_copy_reconstructs(name, tmp_path):
    path, out = ROOT / "recipes" / f"{name}.yaml", tmp_path / "out"
    scan = phantom_measurement((32, 32), slices=1, noise_std=1e-4)
    write_scan(tmp_path / "scan.h5", scan.encoding(scan.target[:, None].to(torch.complex64)))
    prior = prior_of(path, tmp_path)
    small = ["--center-lines", "8", "--device", "cpu"]
    for method in methods_of(name):
        small += ["--option", f"{method}.steps=2"]
        small += ["--prior", prior] if method == "msm" else ["--option", f"{method}.weights={prior}"]
    invoke("recon", tmp_path / "scan.h5", "--recipe", path, "-o", out / "4", *small)
    invoke("recon", tmp_path / "scan.h5", "--recipe", path, "-o", out / "6", *small, "-R", "6")
    for acceleration in (4, 6):
        assert {found.name for found in (out / str(acceleration)).iterdir() if found.is_dir()} == set(methods_of(name))
        for method, told in methods_of(name).items():
            with h5py.File(out / str(acceleration) / method / "scan.h5") as file:
                image = file["reconstruction"][()]
            assert image.shape == (1, 32, 32) and np.isfinite(image).all() and image.max() > 0.1
            manifest = json.loads((out / str(acceleration) / method / "scan.json").read_text())
            assert manifest["recipe"] == {"name": path.name, "content": load_recipe(path)}
            assert subset(manifest["options"], told) == told
            assert manifest["settings"]["noise"] == 0.01 and manifest["mask"]["law"] == "random-lines"
            assert manifest["acceleration"]["nominal"] == acceleration and manifest["mask"]["centre_lines"] == 8


@pytest.mark.parametrize(("name", "amount"), [("box", 0.5), ("super_resolution", 4)])
@pytest.mark.parametrize("end", ["", "_noisy", "_oracle"])
def test_a_shrunk_copy_restores(name, amount, end, tmp_path):
    path, out = ROOT / "recipes" / f"photos128_{name}{end}.yaml", tmp_path / "out"
    data = {"use": "msmri.io.photos:"}
    write_data(data, tmp_path / "data")
    images = np.load(data["path"])["images"]
    np.savez(data["path"], images=images, split=[0] * 5 + [1] * 4)
    small = ["--weights", prior_of(path, tmp_path), "--size", "16", "--limit", "2", "--device", "cpu"]
    small += [word for method in methods_of(path.stem) for word in ("--option", f"{method}.steps=2")]
    result = invoke("restore", data["path"], "--recipe", path, "-o", out, *small)
    assert "2 photographs of 16 x 16" in result.stdout
    for method, expected in methods_of(path.stem).items():
        manifest = json.loads((out / method / "restored.json").read_text())
        assert manifest["finished"] and manifest["recipe"] == {"name": path.name, "content": load_recipe(path)}
        told = manifest["settings"]
        assert subset(told, expected) == expected
        assert (told["task"], told["amount"], told["noise"]) == (name.replace("_", "-"), amount, 0)
        rows = list(manifest["photographs"].values())
        assert len(rows) == 2 and all(np.isfinite(row["PSNR"]) for row in rows)
        assert read_photo(out / method / rows[0]["file"]).shape == (3, 16, 16)


@pytest.mark.parametrize("name", NOISY)
def test_twins_with_noise_differ_in_nothing_but_the_prior(name):
    noisy, quiet = (load_recipe(ROOT / "recipes" / f"{one}.yaml") for one in (name, NOISY[name]))
    kind = "prior" if "prior" in quiet else "weights"
    before, after = quiet.pop(kind), noisy.pop(kind)
    assert noisy == quiet
    folder = {"runs/mri256_r4": "runs/mri256_r4_noisy", "runs/photos128_msm": "runs/photos128_msm_noisy"}
    assert after == before.replace(str(Path(before).parent), folder[str(Path(before).parent)])


@pytest.mark.parametrize("name", ["mri256_csmri", "photos128_box", "photos128_super_resolution"])
def test_oracles_are_given_the_same_problem(name):
    oracle, ours = (load_recipe(ROOT / "recipes" / f"{one}.yaml") for one in (f"{name}_oracle", name))
    for key in ("method", "prior", "weights", "preset"):
        ours.pop(key, None)
    assert subset(oracle, ours) == ours and oracle["method"] == "dps,ddnm" and oracle["samples"] == 1
    assert {"dps.steps=200", "ddnm.steps=200"} <= set(oracle["option"])


def test_the_oracle_that_draws_is_the_twin_of_the_prior_with_holes():
    whole, holes = (load_recipe(ROOT / "recipes" / f"photos128_{name}.yaml") for name in ("oracle_vp", "msm"))
    assert all(whole[part] == holes[part] for part in ("model", "loss", "train"))
    assert (whole["data"]["path"], whole["data"]["size"]) == (holes["data"]["path"], holes["data"]["size"])


def test_the_second_round_is_the_twin_of_the_oracle():
    second, oracle, joint, first = (
        load_recipe(ROOT / "recipes" / f"brain64_{name}.yaml") for name in ("second", "oracle", "joint", "msm")
    )
    assert all(second[part] == oracle[part] for part in ("model", "loss", "train"))
    assert second["data"] == joint["data"] and all(joint[part] == first[part] for part in ("model", "loss"))


@pytest.mark.parametrize("name", ["mri256_r4_noisy", "photos128_msm_noisy"])
def test_training_with_noise_goes_on_from_its_warm_up(name, tmp_path):
    def stage(run, *changes):
        data = tmp_path / f"data_{run}"
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", list(changes))
        write_data(recipe["data"], data)
        shrink(recipe["model"])
        recipe["train"] |= {"steps": 2, "pixels": 1800}
        path = tmp_path / f"{run}.json"
        path.write_text(json.dumps(recipe))
        invoke("train", path, tmp_path / run, "--device", "cpu")
        return load_checkpoint(tmp_path / run / "last.safetensors")

    told = [line for line in (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines() if "msmri train" in line]
    first, second = (line.split("--set ")[1:] for line in told)
    assert first == ["loss.warm_up=true ", "train.steps=50000"] and second == ["start=runs/warm/last.safetensors"]
    warm, header = stage("warm", "loss.warm_up=true")
    assert header["recipe"]["loss"]["warm_up"] is True and "start" not in header["recipe"]
    start = tmp_path / "warm" / "last.safetensors"
    after, header = stage("noisy", f"start={start}")
    assert header["recipe"]["loss"]["warm_up"] is False and header["recipe"]["start"] == str(start)
    fresh, _ = stage("fresh")
    assert warm.keys() == after.keys() == fresh.keys()

    def apart(one, other):
        return sum(float((one[key].float() - other[key].float()).square().sum()) for key in one) ** 0.5

    assert apart(after, warm) > 0  # it has learned on,
    assert apart(after, fresh) > 0  # from there and not from the beginning
    prior = load_prior(tmp_path / "noisy" / "last.safetensors")
    assert all(bool(value.isfinite().all()) for value in prior.state_dict().values())


@pytest.mark.parametrize("name", ["mri256_r4", "photos128_msm"])
def test_priors_trained_with_noise_can_take_the_place_of_others(name):
    quiet, noisy = (load_recipe(ROOT / "recipes" / f"{name}{end}.yaml") for end in ("", "_noisy"))
    assert quiet["model"] == noisy["model"] and quiet["data"].get("size") == noisy["data"].get("size")


def test_options_go_before_the_recipe_one_by_one(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("command: restore\nmethod: msm\nlimit: 1\nfaulty: skip\noption: [msm.steps=9, msm.eta=0.5]\n")
    np.savez(tmp_path / "photos.npz", images=np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    more = ["--option", "msm.steps=1", "--limit", "2", "--samples", "1"]
    result = invoke("restore", tmp_path / "photos.npz", "--recipe", recipe, "-o", tmp_path / "out", *more)
    assert "2 photographs" in result.stdout
    told = json.loads((tmp_path / "out" / "msm" / "restored.json").read_text())["settings"]
    assert (told["steps"], told["eta"]) == (1, 0.5)


@pytest.mark.parametrize(
    ("command", "text", "says"),
    [
        ("sample", "command: sample\nstepz: 3", "no setting 'stepz'; did you mean 'steps'?"),
        ("sample", "command: sample\nout: drawn", "no setting 'out'"),
        ("sample", "command: recon\nmethod: msm", "is a recipe of msmri recon, not of msmri sample"),
        ("sample", "model: {}", "is a recipe of msmri train, not of msmri sample; those begin with 'command: sample'"),
        ("train", "command: sample\nsteps: 3", "is a recipe of msmri sample, not of msmri train"),
        ("sample", "command: sample\nsteps: many", "'steps' cannot be 'many'"),
        ("sample", "command: sample\nsteps: true", "'steps' cannot be True"),
        ("sample", "command: sample\nsteps: [1, 2]", "'steps' cannot be [1, 2]; give one value"),
        ("sample", "command: sample\ncount:", "'count' cannot be None; give one value"),
        ("sample", "command: sample\ncovering: often", "'covering' cannot be 'often'"),
        ("sample", "command: sample\nsteps: 0", "steps=0"),
        ("recon", "command: recon\noption: {msm: 3}", "'option' cannot be {'msm': 3}; give a list of values"),
        ("recon", "command: recon\nmask: spiral", "no mask law 'spiral'"),
        ("recon", "command: recon\nnoise: 0.1", "--noise 0.1 cannot be added; give 0 or more, and --mask"),
        ("restore", "command: restore\ntask: guess", "there is no task 'guess'"),
    ],
)
def test_wrong_recipes_of_a_command(command, text, says, tmp_path):
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text(text)
    words = [recipe, out] if command == "train" else ["--recipe", recipe, "-o", out]
    result = invoke(command, *words, *([] if command in ("sample", "train") else [tmp_path / "none"]), code=2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and says in line and not out.exists()


def test_scans_are_completed_from_their_own_lines(tmp_path, monkeypatch, capsys):
    script = script_of("complete_scans")
    scan = phantom_measurement((32, 28), slices=2, noise_std=1e-3)
    values = Subsample(scan.mask)(scan.values)
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write_scan(tmp_path / "in" / f"{name}.h5", values, mask=scan.mask[:, 0].numpy())
    command = ["complete_scans.py", str(tmp_path / "in"), str(tmp_path / "out"), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--part", "2/2"])
    script.main()
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["b.h5", "completed_2_of_2.json"]
    before = (tmp_path / "out" / "b.h5").read_bytes()
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    assert (tmp_path / "out" / "b.h5").read_bytes() == before  # not drawn again
    told = json.loads((tmp_path / "out" / "completed_1_of_1.json").read_text())
    assert told["steps"] == 2 and told["prior"] == sha256(shipped_prior())
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        images = torch.from_numpy(file["reconstruction_complex"][()])
        assert "reconstruction_std" not in file
    zero_filled = scan.encoding.adjoint(values)[:, 0].abs()
    left, least = ((one - scan.target).norm() / scan.target.norm() for one in (images.abs(), zero_filled))
    assert float(left) < 0.7 * float(least)
    data = ReconstructedScans(str(tmp_path / "out"))
    assert len(data) == 2 and data.batch(torch.Generator(), pixels=1).values.shape == (1, 1, 32, 28)
    monkeypatch.setattr(sys, "argv", [*command[:2], str(tmp_path / "other"), "--steps", "2", "--seed", "1"])
    script.main()
    with h5py.File(tmp_path / "other" / "a.h5") as file:
        assert np.abs(file["reconstruction_complex"][()] - images.numpy()).max() > 1e-3
    (tmp_path / "poisoned").mkdir()
    poisoned = torch.where(scan.mask, values, torch.full_like(values, 1e3))
    write_scan(tmp_path / "poisoned" / "a.h5", poisoned, mask=scan.mask[:, 0].numpy())
    monkeypatch.setattr(sys, "argv", [command[0], str(tmp_path / "poisoned"), str(tmp_path / "same"), "--steps", "2"])
    script.main()
    with h5py.File(tmp_path / "same" / "a.h5") as file:  # nothing unmeasured reaches what is trained on
        assert np.array_equal(file["reconstruction_complex"][()], images.numpy())
    whole = scan.encoding(scan.target[:, None].to(torch.complex64))
    write_scan(tmp_path / "whole.h5", whole)
    monkeypatch.setattr(sys, "argv", [*command[:1], str(tmp_path / "whole.h5"), *command[2:]])
    with pytest.raises(InputError, match=r"whole\.h5: is fully sampled"):
        script.main()
    monkeypatch.setattr(sys, "argv", [*command, "--seed", "1"])
    with pytest.raises(InputError, match="out: was made with another seed; repeat those settings"):
        script.main()
    assert (tmp_path / "out" / "b.h5").read_bytes() == before
    for share in ("3/2", "0/2", "half", "1/"):
        monkeypatch.setattr(sys, "argv", [*command, "--part", share])
        with pytest.raises(InputError, match=f"--part {share} is no share"):
            script.main()


def test_shipped_weights_name_the_data_and_licence_of_what_they_were_trained_on():
    ship = script_of("ship_weights")
    shipped = sorted((ROOT / "msmri" / "weights").glob("*.safetensors"))
    assert len(shipped) > 10
    for path in shipped:
        header = read_header(path)
        kind = ship.kind_of(header["recipe"])
        assert (header["data"], header["data_note"], header["weights_licence"]) == ship.KINDS[kind], path.name
        assert (kind == "photos") == path.name.startswith("faces"), path.name
