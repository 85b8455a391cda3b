import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
