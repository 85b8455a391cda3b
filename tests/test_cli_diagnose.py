import json
import signal

import pytest
import torch
from typer.testing import CliRunner

from msmri.cli import app
from msmri.config import build
from msmri.diagnostics import DIAGNOSTICS, coverage, load_diagnostic
from msmri.diagnostics.subjects import demo_scan
from msmri.io import write_scan
from msmri.io.output import sha256
from msmri.model.checkpoint import save_checkpoint
from msmri.testing import phantom_measurement

NETWORK = {"use": "msmri.model.unet:UNet", "in_channels": 4, "out_channels": 2, "channels": [8], "blocks_per_level": 1,
           "conditions": 4, "patch": 2}  # fmt: skip
MODEL = {"use": "msmri.model.partial:MeasurementPartial", "wiener_iterations": 2, "consistency_iterations": 1,
         "network": NETWORK}  # fmt: skip


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    path = tmp_path_factory.mktemp("prior") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(MODEL)
    save_checkpoint(path, model.state_dict(), {"format": "msmri-partial", "recipe": {"model": MODEL}})
    return path


def invoke(*arguments, code: int = 0):
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr, result.exception)
    return result


def refused(*arguments) -> str:
    lines = [line for line in invoke(*arguments, code=2).stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def names(out):
    return sorted(path.name for path in out.iterdir()) if out.exists() else []


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_every_diagnostic_leaves_a_figure_and_its_numbers(tmp_path, prior, name):
    out = tmp_path / "new" / "out"
    result = invoke(name, "-o", out, "--prior", prior, "--quick", "--seed", 3)
    assert names(out) == [f"{name}.json", f"{name}.png"]
    assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / f"{name}.png").stat().st_size < 150_000
    text = (out / f"{name}.json").read_text()
    found = json.loads(text)
    settings = found["settings"]
    assert settings["diagnostic"] == name and settings["seed"] == 3 and settings["law"]["name"] == "random-lines"
    assert settings["scans"] == {"demo_brain.h5": sha256(demo_scan())}
    assert settings["options"] == json.loads(json.dumps(load_diagnostic(name).settings({}, quick=True)))
    assert ("prior" in settings) == (name != "coverage") and settings.get("prior", sha256(prior)) == sha256(prior)
    assert found["learned"] and found["numbers"] and found["seconds"] > 0 and "commit" in found["environment"]
    assert all(sentence in result.stdout for sentence in found["learned"])
    assert "nan" not in " ".join(found["learned"])


def test_several_by_commas_go_on_after_an_interruption(tmp_path, prior, monkeypatch):
    out, real = tmp_path / "out", coverage.coverage
    more = ["-o", out, "--prior", prior, "--quick"]
    monkeypatch.setattr(coverage, "describe_law", lambda *_: signal.raise_signal(signal.SIGINT))
    assert "--resume" in invoke("coverage,score-variance", *more, code=130).stderr
    assert not out.exists() and coverage.coverage is real
    monkeypatch.undo()
    invoke("coverage", *more)
    before = (out / "coverage.json").stat().st_mtime_ns
    assert "exists already" in refused("coverage", *more)
    result = invoke("coverage,noisy-reference,coverage", *more, "--resume")
    assert "coverage (" not in result.stdout and (out / "coverage.json").stat().st_mtime_ns == before
    assert len(names(out)) == 4
    assert "made with other settings" in refused("coverage", *more, "--resume", "--seed", 1)
    invoke("coverage", *more, "--overwrite", "--seed", 1)
    assert json.loads((out / "coverage.json").read_text())["settings"]["seed"] == 1
    (out / "coverage.json").write_text("{")
    assert "made with other settings" in refused("coverage", *more, "--resume")


def test_options_law_and_scans_reach_the_diagnostic(tmp_path, prior):
    person = phantom_measurement((40, 32), slices=1)
    scan = tmp_path / "scan.h5"
    write_scan(scan, person.values, mask=person.mask[:, 0].numpy())
    out = tmp_path / "out"
    options = ["--option", "draws=50", "--law", "equispaced-lines", "-R", 3, "--shape", "16x30", "--center-lines", 4]
    invoke("coverage", scan, "-o", out, *options)
    numbers = json.loads((out / "coverage.json").read_text())["numbers"]
    assert numbers["law"]["law"] == "equispaced-lines" and numbers["law"]["places"] == 30
    assert numbers["law"]["draws"] == 50 and numbers["law"]["nominal acceleration"] == 3
    assert numbers["data"][0]["matrix"] == [40, 32] and numbers["data"][0]["slices"] == 1
    # adapting takes an undersampled scan as it was measured: no truth, but lines kept aside
    invoke("adapt", tmp_path, "-o", out, "--prior", prior, "--quick", "--option", "adapt.steps=1")
    (row,) = json.loads((out / "adapt.json").read_text())["numbers"]["rows"]
    assert row["before"] is row["after"] is None and row["scan"] == "scan.h5" and len(row["curve"]) == 2
    assert "is undersampled" in refused("resolution", scan, "-o", tmp_path / "none", "--prior", prior, "--quick")
    assert not (tmp_path / "none").exists()


def test_nothing_is_written_by_a_dry_run(tmp_path):
    result = invoke("all", "-o", tmp_path / "out", "--dry-run", "--quick")
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == list(DIAGNOSTICS)
    assert "draws=200" in result.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["luck"], "no diagnostic 'luck'"),
        (["coverage", "--option", "draws"], "cannot use --option draws"),
        (["coverage", "--option", "adapt.steps=3"], "cannot use --option adapt.steps=3"),
        (["coverage,adapt", "--option", "steps=3"], "cannot use --option steps=3"),
        (["coverage", "--option", "draw=3"], "no option 'draw'"),
        (["coverage", "--option", "draws=-1"], "draws cannot be -1"),
        (["adapt", "--option", "steps=[1"], "cannot read the value"),
        (["choose-w", "--option", "fixed=[2,4]"], "have 1 among fixed"),
        (["coverage", "--law", "spiral"], "no mask law 'spiral'"),
        (["coverage", "--shape", "big"], "cannot read --shape big"),
        (["coverage", "nowhere.h5"], "nowhere.h5"),
        (["adapt", "--prior", "none.safetensors"], "none.safetensors: no such file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, arguments, says):
    assert says in refused(*arguments, "-o", tmp_path / "out") and not (tmp_path / "out").exists()
