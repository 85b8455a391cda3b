import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from msmri.errors import InputError
from msmri.methods import load_method
from msmri.methods.cg_sense import CGSense
from msmri.metrics import psnr
from msmri.model.checkpoint import load_checkpoint, save_checkpoint
from msmri.physics.masks import RandomLines
from msmri.preparation import Preparation, measurements
from msmri.tensors import generators

ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = ["which_method_wins.py", "--quick", "--out", folder / "result.json", "--markdown", folder / "page.md"]
    return folder, arguments, run(*arguments)


def test_every_method_with_weights_is_compared(quick):
    folder, _, result = quick
    assert result.returncode == 0, result.stderr
    record = json.loads((folder / "result.json").read_text())
    rows = {row["method"]: row for row in record["rows"] if row["view"] == "file units"}
    expected = {
        "zero-filled",
        "cg-sense",
        "l1-wavelet",
        "tv",
        "zs-ssdu",
        "ssdu, columns",
        "msm",
        "msm, paper's sampler",
    }
    assert expected <= set(rows) and not set(rows) & set(record["left_out"])
    assert len({row["true_R"] for row in rows.values()}) == 1  # one mask for all
    assert all(15 < row["psnr"] < 50 and 0 < row["ssim"] < 1 for row in rows.values())
    assert rows["msm"]["psnr"] > rows["cg-sense"]["psnr"] > rows["zero-filled"]["psnr"]
    assert rows["all lines measured"]["psnr"] > rows["msm"]["psnr"]
    assert "**all lines measured**" not in result.stdout and "by the same maps: " in result.stdout
    assert rows["msm"]["error_per_std"] > 0 and rows["msm"]["NFE"] == 3
    assert any(row["view"] == "paper" for row in record["rows"])
    page = (folder / "page.md").read_text()
    assert "## In words" in page and "nan" not in page
    for name in ("result.csv", "result_simulated_against_R.png", "result_simulated_images.png"):
        assert (folder / name).stat().st_size > 0 and (name.endswith("csv") or name in page)


def test_a_second_run_takes_what_is_done(quick):
    _, arguments, first = quick
    again = run(*arguments)
    assert again.returncode == 0
    assert " dB, " in first.stdout.split("# Which method wins?")[0]
    assert " dB, " not in again.stdout.split("# Which method wins?")[0]
    assert again.stdout.split("# Which method wins?")[1].split("## Means")[1] in first.stdout
    rows = len(json.loads((quick[0] / "result.json").read_text())["rows"])
    assert f" {rows} of {rows} rows were computed in this run" in first.stdout.replace("\n", " ")
    assert f"0 of {rows} rows were computed in this run" in again.stdout


def test_a_run_without_what_was_kept_goes_on_from_the_published_result(quick, tmp_path):
    published = json.loads((quick[0] / "result.json").read_text())
    chosen = ["cg-sense", "l1-wavelet"]
    arguments = ["which_method_wins.py", "--quick", "--methods", *chosen, "--out", tmp_path / "result.json"]
    (tmp_path / "result.json").write_text(json.dumps(published | {"tuned_by_key": {"tv | abc": {"field": "weight"}}}))
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["rows"] == [row for row in published["rows"] if row["method"] in chosen]
    assert found["this_run"]["rows"] == 0
    assert "tv | abc" in found["tuned_by_key"] and len(found["keys"]) == len(found["rows"])


def test_processes_share_the_methods_out_and_find_the_same(quick, tmp_path):
    chosen = ["zero-filled", "cg-sense", "tv"]
    arguments = ["which_method_wins.py", "--quick", "--methods", *chosen, "--jobs", "2"]
    arguments += ["--out", tmp_path / "result.json", "--markdown", tmp_path / "page.md"]
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    alone = json.loads((quick[0] / "result.json").read_text())["rows"]
    found = json.loads((tmp_path / "result.json").read_text())
    both = [
        [(row["method"], row["psnr"]) for row in rows if row["method"] in chosen] for rows in (alone, found["rows"])
    ]
    assert sorted(both[1]) == sorted(both[0]) and len(both[0]) > len(chosen)
    told = found["this_run"]
    assert told["rows"] == told["of_rows"] == len(found["rows"]) and told["processes"] == 2
    assert " 2 processes of " in (tmp_path / "page.md").read_text()
    assert not [path for path in tmp_path.iterdir() if ".part_" in path.name]  # taken in
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "result.json").read_text())["this_run"]["rows"] == 0


def test_what_processes_finished_is_kept_when_one_fails(tmp_path):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"nothing of the kind")
    arguments = ["which_method_wins.py", "--quick", "--methods", "zero-filled", "ssdu", "--jobs", "2"]
    arguments += ["--weights", f"ssdu={torn}", "--out", tmp_path / "result.json"]
    failed = run(*arguments)
    assert failed.returncode != 0 and "failed: ssdu;" in failed.stderr
    assert not (tmp_path / "result.json").exists()
    kept = json.loads((tmp_path / "result.rows.json").read_text())["rows"]
    assert {row["method"] for row in kept.values()} == {"zero-filled"}
    (part,) = tmp_path.glob("result.part_*.rows.json")
    stale = {key: row | {"psnr": 99.0} for key, row in kept.items()}  # what a run that was cut off may leave
    part.write_text(json.dumps({"rows": stale}))
    arguments[arguments.index("--weights") : arguments.index("--out")] = ["--fresh"]
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"zero-filled", "ssdu"} and max(row["psnr"] for row in rows) < 99


def test_a_fresh_run_forgets_rows_and_not_what_was_tuned(quick, tmp_path):
    kept = tmp_path / "result.rows.json"
    rows = json.loads((quick[0] / "result.rows.json").read_text())["rows"]
    rows = {key: row for key, row in rows.items() if "zero-filled" not in key}  # these are to be computed
    tuned = {"tv at R = 4 | abc": {"field": "weight", "value": 0.5}}
    arguments = ["which_method_wins.py", "--quick", "--methods", "zero-filled", "--out", tmp_path / "result.json"]
    for more, left in (((), {**rows, **tuned}), (["--fresh"], tuned), (["--tune-again"], rows)):
        kept.write_text(json.dumps({"rows": {**rows, **tuned}}))
        assert run(*arguments, *more).returncode == 0
        found = json.loads(kept.read_text())["rows"]
        assert {key: row for key, row in found.items() if "zero-filled" not in key} == left
        record = json.loads((tmp_path / "result.json").read_text())["this_run"]
        assert record["rows"] == record["of_rows"] == len(found) - len(left) > 0
        assert record["tuned"] == 0 and record["threads"] == 1 and record["minutes"] > 0


# learning curves

SCAN = ROOT / "msmri" / "data" / "demo_brain.h5"


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """Give a folder with an untaught, a half-taught and the shipped network, whose names do not tell their order."""
    folder = tmp_path_factory.mktemp("learning")
    tensors, header = load_checkpoint(ROOT / "msmri" / "weights" / "ssdu_columns_r4.safetensors")
    (folder / "run").mkdir()
    for name, share, step, hours in [("c", 0.0, 10, 0.5), ("a", 0.6, 30, 1.5), ("b", 1.0, 40, 2.0)]:
        taught = {
            key: value * (share if key.endswith(("last.weight", "last.bias")) else 1) for key, value in tensors.items()
        }
        told = {"format": header["format"], "recipe": header["recipe"], "step": step, "cpu_hours": hours}
        save_checkpoint(folder / "run" / f"step_{name}.safetensors", taught, told)
    save_checkpoint(folder / "run" / "last.safetensors", taught, told)
    return folder


def learn(folder, *curves, more=()):
    named = [*more, *(part for curve in curves for part in ("--curve", curve))]
    small = ["--slices", "1", "--crop-to", "64", "--refinements", "0"]
    outputs = ["--out", folder / "learn.json", "--markdown", folder / "page.md"]
    return run("how_do_methods_learn.py", SCAN, *named, *small, *outputs)


def test_learning_curves_are_in_the_order_of_training_and_go_on(snapshots):
    weights = snapshots / "run"
    first = learn(snapshots, f"ssdu, columns=ssdu:{weights / 'step_c.safetensors'}, {weights / 'step_b.safetensors'}")
    assert first.returncode == 0, first.stderr
    assert "(known)" not in first.stdout
    result = learn(snapshots, f"ssdu, columns=ssdu:{weights}, {weights}/la*.safetensors")
    assert result.returncode == 0, result.stderr
    assert [line.endswith("(known)") for line in result.stdout.splitlines() if " of 3, " in line] == [True, False, True]
    assert "last.safetensors is left out" in result.stdout
    record = json.loads((snapshots / "learn.json").read_text())
    points = record["curves"]["ssdu, columns"]["points"]
    assert [point["weights"] for point in points] == [f"step_{name}.safetensors" for name in "cab"]
    assert [(point["steps"], point["cpu_hours"]) for point in points] == [(10, 0.5), (30, 1.5), (40, 2.0)]
    (case,) = measurements(SCAN, Preparation(law=RandomLines(4.0), seed=0, crop_to=64), [1])
    blind = replace(case, target=None)

    def quality(method):
        return psnr(case.target[0].numpy(), method(blind, generators(0, 1)).magnitude[0].numpy())

    for point in points:
        expected = quality(load_method("ssdu", weights=str(weights / point["weights"])))
        assert point["psnr"] == pytest.approx(expected, abs=0.01)
    values = [point["psnr"] for point in points]
    assert values == sorted(values) and values[2] > values[0] + 0.5
    references = record["references"]
    assert references["zero-filled"]["psnr"] == pytest.approx(quality(load_method("zero-filled")), abs=0.01)
    best = max(quality(CGSense(weight=weight)) for weight in CGSense.tunable["weight"])
    assert references["cg-sense"]["psnr"] == pytest.approx(best, abs=0.01)
    gain = record["curves"]["ssdu, columns"]["gain_of_last_quarter"]
    assert gain == pytest.approx(values[2] - values[1], abs=1e-6)  # three quarters of 2 hours are 1.5
    page = (snapshots / "page.md").read_text()
    assert (
        f"from {values[0]:.2f} dB (0.50 CPU hours, 10 steps) to {values[2]:.2f} dB (2.00 CPU hours, 40 steps)" in page
    )
    assert "![learn](learn.png)" in page and "nan" not in page and str(snapshots) not in page
    assert (snapshots / "learn.png").stat().st_size > 0


def test_published_curves_stay_where_asked_if_they_are_of_the_same_scans(snapshots, tmp_path):
    one, other = (f"{name}=ssdu:{snapshots / 'run' / f'step_{file}.safetensors'}" for name, file in ("ab", "bc"))
    assert learn(tmp_path, one).returncode == 0
    first = json.loads((tmp_path / "learn.json").read_text())
    (tmp_path / "learn.rows.json").unlink()  # what is committed is left
    assert learn(tmp_path, other, more=["--keep"]).returncode == 0
    found = json.loads((tmp_path / "learn.json").read_text())
    assert list(found["curves"]) == ["a", "b"] and found["curves"]["a"] == first["curves"]["a"]
    assert "**a** (`ssdu`)" in (tmp_path / "page.md").read_text()
    found["references"]["zero-filled"]["psnr_of_slices"][0] += 0.1  # of other scans
    (tmp_path / "learn.json").write_text(json.dumps(found))
    failed = learn(tmp_path, other, more=["--keep"])
    assert failed.returncode != 0 and "no curves of the same scans" in failed.stderr
    assert json.loads((tmp_path / "learn.json").read_text()) == found
    assert learn(tmp_path, other).returncode == 0
    assert list(json.loads((tmp_path / "learn.json").read_text())["curves"]) == ["b"]


def test_what_is_said_of_a_curve():
    say = load("how_do_methods_learn")
    assert say.last_quarter([1, 3, 4], [20, 24, 27]) == pytest.approx(3)
    assert say.last_quarter([1, 2, 4], [20, 24, 27]) == pytest.approx(1.5)  # between two checkpoints
    assert say.last_quarter([3.5, 4], [24, 27]) is None and say.last_quarter([4], [27]) is None

    def told(qualities, **changes):
        points = [{"psnr": value, "steps": 100 * (i + 1), "cpu_hours": i + 1.0} for i, value in enumerate(qualities)]
        gain = say.last_quarter([point["cpu_hours"] for point in points], qualities)
        curve = {"method": "ssdu", "points": points, "timed": True, "restarted": False, "gain_of_last_quarter": gain}
        return say.in_words("mine", curve | changes, 25.0)

    assert "still gained 0.40 dB" in told([20, 25, 26, 26.4])
    assert "26.40 dB (4.00 CPU hours, 400 steps), 1.40 dB above cg-sense" in told([20, 25, 26, 26.4])
    assert "gained no more than 0.1 dB (+0.05 dB)." in told([20, 24, 24.5, 24.55])
    assert "0.45 dB below cg-sense" in told([20, 24, 24.5, 24.55])
    assert "had been" not in told([20, 24, 24.6, 24.55])
    assert "it had been at 27.00 dB (2.00 CPU hours, 200 steps)" in told([20, 27, 26, 25.5])
    assert "the last quarter of the time lost 0.50 dB" in told([20, 27, 26, 25.5])
    assert "of the steps" in told([20, 25, 26], timed=False)
    assert told([20, 25], restarted=True).endswith("from the weights it started from.")
    assert "one checkpoint tells nothing" in told([20])


def test_headers_tell_steps_and_hours_of_all_stages(tmp_path):
    learn = load("how_do_methods_learn")

    def write(name, header):
        save_checkpoint(tmp_path / f"step_{name}.safetensors", {}, header)

    write("1", {"stages": [{"step": 5, "cpu_hours": 0.25}, {"step": 7, "cpu_hours": 0.5}]})
    write("2", {"step": 3, "cpu_hours": 0.1, "recipe": {"start": "other.safetensors"}})
    write("20", {"step": 20, "cpu_hours": 0.05})  # many quick steps come first
    curve = learn.read_curve(f"x=ssdu:{tmp_path}", {"x": {"batch": 2}})
    told = [(one.steps, one.hours, one.restarted) for one in curve.checkpoints]
    assert told == [(20, 0.05, False), (3, 0.1, True), (12, 0.75, False)]
    assert curve.timed and curve.build(curve.checkpoints[0]).batch == 2
    write("3", {"step": 8})  # one of them without hours: by steps
    curve = learn.read_curve(f"msm=msm:{tmp_path}", {})
    assert [one.steps for one in curve.checkpoints] == [3, 8, 12, 20] and not curve.timed
    assert curve.build(curve.checkpoints[1]).prior == str(tmp_path / "step_3.safetensors")
    write("4", {})
    with pytest.raises(InputError, match=r"step_4\.safetensors: the header does not tell the steps"):
        learn.read_curve(f"x=ssdu:{tmp_path}", {})
    for wrong in ("ssdu", "x=ssdu", "=ssdu:a", "x=:a"):
        with pytest.raises(InputError, match="is not a curve"):
            learn.read_curve(wrong, {})
    with pytest.raises(InputError, match="no weights found"):
        learn.read_curve(f"x=ssdu:{tmp_path}/none*", {})
    assert learn.read_options(["a, b={samples: 1, sigma_max: 1.0}"]) == {"a, b": {"samples": 1, "sigma_max": 1.0}}
    with pytest.raises(InputError, match="are not options"):
        learn.read_options(["a=3"])
