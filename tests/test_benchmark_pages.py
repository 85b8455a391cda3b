"""Benchmarks whose full runs are long: what they count, and that pages say what their numbers say."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from msmri.measurement import Reconstruction
from msmri.model.adm import ADMUNet
from msmri.testing import phantom_measurement

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_diagnostics_is_what_its_numbers_say():
    say = load("what_do_diagnostics_say")
    text = say.PAGE.read_text("utf-8")
    assert say.page(text) == text, "run benchmarks/what_do_diagnostics_say.py --page"
    for name, (_, _, drawn) in say.RUNS.items():
        figure = say.IMAGES / f"diagnose_{name}.png"
        if say.result(name).exists() and drawn:
            assert figure.stat().st_size < 150_000, figure
        assert drawn or not figure.exists()
    with pytest.raises(SystemExit, match="no place for"):
        say.page(text.replace("<!-- choose-w -->", ""))


def test_images_of_one_scan_count_as_one(load_benchmark):
    wins = load_benchmark("which_method_wins")
    psnr = {"a.h5#0": (30.0, 28.0), "a.h5#0 at 128": (30.0, 29.0), "b.h5#0": (33.0, 27.0)}
    rows = [{"scan": scan, "method": m, "psnr": p[k]} for scan, p in psnr.items() for k, m in enumerate(("msm", "tv"))]
    assert wins.lead(rows, "msm", "tv", 0) == "+3.75 [+1.50, +6.00]"  # 1.5 and 6, drawn as two
    assert wins.lead(rows[:4], "msm", "tv", 0) == "+1.50" and wins.lead(rows, "msm", "none", 0) == ""
    tv = [row for row in rows if row["method"] == "tv"]
    assert wins.count(tv) == "2, 3 images" and wins.count(tv[::2]) == "2"


def test_rescaled_reconstructions_are_measured_between_0_and_1(load_benchmark):
    wins, one = load_benchmark("which_method_wins"), phantom_measurement(seed=3)
    target = one.target - one.target.amin()
    one = replace(one, target=target / target.amax())
    image = (3 * one.target + 0.5)[:, None].to(torch.complex64)

    class Wrong:
        def __call__(self, measurement, rng):
            assert measurement.target is None
            return Reconstruction(torch.stack([image, 2 * image], 1)[:, :, 0], {})

    plain, _ = wins.score(Wrong(), one, 0)
    found, shown = wins.score(Wrong(), one, 0, rescaled=True)
    assert plain["psnr"] < 10 and found["psnr"] > 60 and found["psnr_one_sample"] > 60
    assert float(shown.max()) > 1  # pictures stay as they are
    assert found["error_per_std"] == plain["error_per_std"]


def test_operations_are_counted_as_by_hand():
    """Convolutions, linear layers and attention of a small network: two operations a multiplication and addition."""
    heavy = load("how_heavy_is_full_size")
    network, size, counted = ADMUNet(heavy.QUICK).eval(), 32, []

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            counted.append(2 * output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1])
        elif isinstance(module, nn.Linear):
            counted.append(2 * output.numel() * module.in_features)
        elif type(module).__name__ == "Attention":  # scores, and their sums of values, at every place
            places = inputs[0].shape[-2] * inputs[0].shape[-1] if inputs[0].ndim == 4 else inputs[0].shape[1]
            counted.append(2 * 2 * places**2 * module.inner_dim)

    for module in network.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 2, size, size), torch.zeros(1))
    assert heavy.count_operations(heavy.QUICK, size) == pytest.approx(sum(counted), rel=1e-3)
    told = heavy.arithmetic(10**12, 10**9)
    assert told["TFLOP_a_reconstruction"] == 600 and told["seconds_a_reconstruction_by_TFLOP_per_second"]["10"] == 60
    assert told["TFLOP_of_training"] == 6e6 and told["GB_of_weights_float32"] == 4


def test_a_step_passes_as_many_images_as_masks():
    heavy = load("how_heavy_is_full_size")
    row = heavy.step(heavy.QUICK, 32, 3, 4)
    assert row["images_through_the_network"] == 3 and row["seconds"] > 0 and 0.1 < row["peak_memory_GB"] < 12


def test_a_training_step_of_ssdu_is_the_recipes_own():
    heavy = load("how_heavy_is_full_size")
    row = heavy.ssdu_step(True)
    assert (row["unrolls"], row["coils"], row["matrix"], row["checkpoint"]) == (2, 4, [32, 32], True)
    assert row["passes_through_the_network"] == 2 * row["unrolls"]  # once forward, once more in back-propagation
    assert row["parameters"] == 2 * 9 * 2 * 8 + 2 * 9 * 8**2 + 1  # first and last; the tied block and what follows; mu
    assert 0 <= row["growth_of_memory_GB"] < row["peak_memory_GB"] < 12
    assert f"{row['cpu_seconds']:.0f} s of one core" in load("what_do_diagnostics_say").training_step(
        row | {"load_of_the_machine_before": 0.0}
    )
