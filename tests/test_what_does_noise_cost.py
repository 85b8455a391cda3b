"""The benchmark of noise: its noise is what it says, nothing is run twice, and words follow from rows."""

import argparse
import json
import math
import sys
from dataclasses import replace

import h5py
import pytest
import torch
from torch import Generator

from msmri.config import build
from msmri.io import write_scan
from msmri.methods.msm import MSM
from msmri.metrics import object_region
from msmri.model.checkpoint import load_checkpoint, save_checkpoint
from msmri.physics.coils import estimate_noise_std
from msmri.physics.fourier import ifft2c
from msmri.testing import phantom_measurement

NETWORK = {"use": "msmri.model.unet:UNet", "in_channels": 4, "channels": [8, 8], "blocks_per_level": 1}
MODEL = {"use": "msmri.model.partial:MeasurementPartial", "network": NETWORK, "wiener_iterations": 3}
LOSSES = {"noiseless": "msm_training:LinewiseMSM", "noisy": "msm_noisy:NoisyLinewiseMSM"}


@pytest.fixture(scope="module")
def cost(load_benchmark):
    return load_benchmark("what_does_noise_cost")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two fully sampled phantoms with noise of 0.02 in the file."""
    folder = tmp_path_factory.mktemp("scans")
    for seed in (0, 1):
        scan = phantom_measurement((24, 52), slices=1, coils=3, seed=seed)
        clean = scan.encoding(scan.target[:, None].to(torch.complex64))
        rng = Generator().manual_seed(seed)
        noise = torch.complex(*(torch.randn(clean.shape, generator=rng) for _ in range(2)))
        write_scan(folder / f"s{seed}.h5", clean + 0.02 * noise)
    return folder


@pytest.fixture(scope="module")
def priors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("priors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = {name: value + 0.02 * torch.randn_like(value) for name, value in build(MODEL).state_dict().items()}
    for number, (label, loss) in enumerate(LOSSES.items()):
        recipe = {"model": MODEL, "loss": {"use": f"msmri.methods.{loss}"}}
        values = {name: value + 0.01 * number for name, value in tensors.items()}
        save_checkpoint(
            folder / f"{label}.safetensors", values, {"format": "msmri-partial", "recipe": recipe, "step": 7}
        )
    return folder


def options_for(**changes):
    values = {"seed": 0, "crop_to": None, "acceleration": 3.0, "slices": [0], "rho": 0.1, "steps": 2, "samples": 1}
    return argparse.Namespace(**{**values, **changes})


def test_noise_is_as_large_as_said(cost):
    clean = torch.zeros(200, 200)
    clean[:, 100:] = 1.0
    complex_one, rician = (
        cost.noisy_image(clean, 0.1, Generator().manual_seed(3), rician=which) for which in (False, True)
    )
    for part in (complex_one.real - clean, complex_one.imag):
        assert part.std().item() == pytest.approx(0.1, rel=0.02) and abs(part.mean().item()) < 2e-3
    torch.testing.assert_close(rician.real, complex_one.abs())  # sqrt((m + n1)^2 + n2^2) of the same noise
    assert not bool(rician.imag.any())
    assert rician.real[:, :100].mean().item() == pytest.approx(0.1 * math.sqrt(math.pi / 2), rel=0.02)  # Rayleigh
    assert rician.real[:, 100:].mean().item() - 1 == pytest.approx(0.1**2 / 2, abs=2e-3)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_true_noise_of_all_coils(cost, scans, noise):
    (plain, *_), (case, *_) = (
        cost.cases_of([scans / "s0.h5"], cost.COILS, level, options_for()) for level in (0, noise)
    )
    peak = float(plain.measurement.target.max())
    true = case.measurement.noise_std.item()
    own = plain.measurement.noise_std.item()
    with h5py.File(scans / "s0.h5") as file:
        full = torch.from_numpy(file["kspace"][:1])
    assert own == pytest.approx(estimate_noise_std(full, torch.ones(1, 1, 1, 52, dtype=torch.bool)).item(), rel=1e-5)
    assert true == pytest.approx(math.hypot(own, noise * peak), rel=1e-4)
    mask = case.measurement.mask
    assert torch.equal(mask, plain.measurement.mask) and torch.equal(case.measurement.target, plain.measurement.target)
    added = torch.view_as_real(
        (case.measurement.values - plain.measurement.values)[mask.expand_as(plain.measurement.values)]
    )
    assert added.std(correction=0).item() == pytest.approx(noise * peak, rel=0.05)
    told = estimate_noise_std(case.measurement.values, mask).item()
    assert case.guess == pytest.approx(told / true, rel=1e-5) and case.full is None


def test_one_coil_with_and_without_a_phase(cost, scans):
    options = options_for(acceleration=1.0)
    (one, _), (other, _) = (cost.cases_of([scans], kind, 0.1, options) for kind in (cost.GAUSSIAN, cost.RICIAN))
    target = one.measurement.target
    std = 0.1 * float(target.max())
    assert one.measurement.noise_std.item() == other.measurement.noise_std.item() == pytest.approx(std)
    images = [ifft2c(case.measurement.values)[:, 0] for case in (one, other)]
    torch.testing.assert_close(images[0].abs(), one.full)
    torch.testing.assert_close(images[1], one.full.to(torch.complex64), atol=1e-5, rtol=1e-4)
    assert torch.equal(one.full, other.full) and torch.equal(target, other.measurement.target)
    noise = torch.view_as_real(images[0] - target)
    assert noise.std().item() == pytest.approx(std, rel=0.05)
    torch.testing.assert_close(other.measurement.encoding(images[1][:, None]), other.measurement.values)
    (fewer, _), (twin, _) = (cost.cases_of([scans], kind, 0.1, options_for()) for kind in (cost.GAUSSIAN, cost.RICIAN))
    assert torch.equal(fewer.measurement.mask, twin.measurement.mask)
    torch.testing.assert_close(fewer.measurement.values, torch.where(fewer.measurement.mask, one.measurement.values, 0))


def test_the_sampler_follows_the_noise(cost, scans):
    (case,) = cost.cases_of([scans / "s0.h5"], cost.COILS, 0.1, options_for())
    scale = case.measurement.working_scale()

    def at(level, noisy=False):
        return cost.sampler(MSM(), replace(case.measurement, noise_std=level * scale), noisy=noisy)

    assert at(0.4) == MSM()
    suited = at(0.4, noisy=True)
    assert (suited.sigma_min, suited.sigma_max) == pytest.approx((0.4, 0.8), rel=1e-5)
    low = at(0.002, noisy=True)
    assert (low.sigma_min, low.sigma_max) == (MSM.sigma_min, MSM.sigma_max)


def test_biases_are_signed_and_in_units_of_the_maximum(cost, scans):
    target = cost.cases_of([scans / "s0.h5"], cost.COILS, 0.0, options_for())[0].measurement.target[0]
    inside = torch.from_numpy(object_region(target))
    image = target + target.max() * torch.where(inside, -0.25, 0.125)
    found = cost.biases(target, image)
    assert found["bias_inside"] == pytest.approx(-0.25) and found["bias_outside"] == pytest.approx(0.125)


def call(module, monkeypatch, folder, scans, priors, labels=("noiseless", "noisy")):
    given = [part for label in labels for part in ("--prior", f"{label}={priors / label}.safetensors")]
    outputs = ["--out", folder / "noise.json", "--markdown", folder / "page.md"]
    arguments = [scans, "--validation", scans / "s1.h5", "--quick", "--slices", 0, *given, *outputs]
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
    return json.loads((folder / "noise.json").read_text())


def test_a_run_goes_on_and_its_page_says_what_its_rows_say(cost, scans, priors, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "GRIDS", {"cg-sense": (0.01, 0.1), "tv": (0.003, 0.03)})
    score, calls, stop = cost.score, [], 9

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(cost, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        call(cost, monkeypatch, tmp_path, scans, priors)
    assert not (tmp_path / "noise.json").exists()
    stop = None
    record = call(cost, monkeypatch, tmp_path, scans, priors)
    # a scan: zero-filled, two classical, two priors, one sampler by default; at rho two wrong levels for each prior;
    # one coil: fully sampled, zero-filled, two classical, two priors, with both kinds of noise
    assert len(record["rows"]) == 2 * (6 + 6 + 4 + 2 * 6) and len(calls) == len(record["rows"]) + 1
    assert {label: prior["noisy"] for label, prior in record["priors"].items()} == {"noiseless": False, "noisy": True}
    assert all(0 < row["object_psnr"] < 60 for row in record["rows"])
    assert len({row["true_R"] for row in record["rows"]}) == 2  # a mask for each scan, the same for all
    full = [row for row in record["rows"] if row["method"] == cost.FULL]
    pairs = {(row["slice"], row["object_psnr"], row["bias_outside"]) for row in full}
    assert len(full) == 4 and len(pairs) == 2 and all(pair[2] > 0.05 for pair in pairs)
    told = [row for row in record["rows"] if row["told"] != 1]
    assert {(row["noise"], row["kind"]) for row in told} == {(0.1, cost.COILS)} and len(told) == 8
    text = (tmp_path / "page.md").read_text()
    assert "nan" not in text and "within 1 dB in " in text and "## Rician magnitudes" in text
    for name in ("noise_against_noise.png", "noise_images.png"):
        assert (tmp_path / name).stat().st_size > 0 and name in text
    calls.clear()
    again = call(cost, monkeypatch, tmp_path, scans, priors)
    assert not calls and again["rows"] == record["rows"] and (tmp_path / "page.md").read_text() == text
    figures = [tmp_path / name for name in ("noise_against_noise.png", "noise_images.png")]
    assert cost.page(again, figures, tmp_path) == text  # the page needs nothing but what was recorded
    tensors, header = load_checkpoint(priors / "noisy.safetensors")
    (tmp_path / "other").mkdir()
    save_checkpoint(
        tmp_path / "other" / "noisy.safetensors", {name: one + 0.01 for name, one in tensors.items()}, header
    )
    (tmp_path / "other" / "noiseless.safetensors").symlink_to(priors / "noiseless.safetensors")
    call(cost, monkeypatch, tmp_path, scans, tmp_path / "other")
    assert len(calls) == 2 * (1 + 3 + 2)  # the rows of the prior that changed


def row(cost, method, scan, psnr, *, noise=0.1, told=1.0, kind=None, bias=0.0):
    kind = kind or cost.COILS
    about = {"kind": kind, "noise": noise, "slice": f"{scan}.h5#1", "method": method, "told": told}
    return about | {"object_psnr": psnr, "bias_inside": bias, "bias_outside": 2 * bias}


def test_words_follow_from_rows(cost):
    priors = {"clean": {"noisy": False}, "short": {"noisy": False}, "noisy": {"noisy": True}}
    rows = []
    for k, scan in enumerate("ab"):
        for noise, lead in ((0.0, -1.5), (0.1, -0.8)):
            for label, psnr in (("clean", 30), ("short", 29.9), ("noisy", 30 + lead), ("tv", 29.0 + noise)):
                rows.append(row(cost, label, scan, psnr + k, noise=noise))
            rows.append(row(cost, cost.CONSTANT + "clean", scan, 30 + k - 50 * noise, noise=noise))
        rows += [row(cost, "noisy", scan, 29.2 + k - loss, told=t) for t, loss in ((0.5, 0.4), (2.0, 0.6 + 0.2 * k))]
        for kind, psnr, bias in ((cost.GAUSSIAN, 25, 0.01), (cost.RICIAN, 24, 0.05)):
            rows.append(row(cost, "tv", scan, psnr + k, kind=kind, bias=bias))
    record = {"rows": rows, "seed": 0, "rho": 0.1, "priors": priors}
    said = cost.verdicts(record)
    own, trained = "the file's own noise", "noise 0.1 (1 rho)"
    assert said["training"].splitlines() == [
        "- *noisy* minus *clean*: **within 1 dB in 1 of 2 cases** "
        f"({own} -1.50 dB [-1.50, -1.50], no; {trained} -0.80 dB [-0.80, -0.80], yes).",
        "- *noisy* minus *short*: **within 1 dB in 1 of 2 cases** "
        f"({own} -1.40 dB [-1.40, -1.40], no; {trained} -0.70 dB [-0.70, -0.70], yes).",
    ]
    assert f"*noisy* minus tv: **above it in 1 of 2 cases** ({own} -0.50 dB" in said["tv"]
    assert said["told"] == (
        "- *noisy*: **0.5 dB or less lost in 1 of 2 cases** (told 0.5 times the noise -0.40 dB [-0.40, -0.40], yes; "
        "told 2 times the noise -0.70 dB [-0.80, -0.60], no).\n"
    )
    assert f"**no worse in 2 of 2 cases** ({own} +0.00 dB [+0.00, +0.00], yes; {trained} +5.00 dB" in said["sampler"]
    assert said["rician"] == (
        "- Noise 0.1, tv: -1.00 dB [-1.00, -1.00], **beyond chance**; bias inside +5.0 % against +1.0 %, outside "
        "+10.0 % against +2.0 %.\n"
    )
    alone = cost.verdicts(record | {"rows": [one for one in rows if one["slice"] == "a.h5#1"]})
    assert ", a single scan;" in alone["rician"] and "nan" not in "".join(alone.values())
    assert cost.verdicts(record | {"priors": {"clean": priors["clean"]}})["training"] == ""


def test_differences_are_paired_over_scans(cost):
    first = [
        row(cost, "a", scan, 30 + lead) | {"slice": f"{scan}#{k}"}
        for scan, k, lead in [(0, 0, 1), (0, 1, 0), (1, 0, 2)]
    ]
    second = [one | {"object_psnr": 30} for one in reversed(first)]
    mean, low, high = cost.paired(first, second, 0)
    assert (mean, low, high) == pytest.approx((1.25, 0.5, 2.0))
