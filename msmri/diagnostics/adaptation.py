"""A prior fine-tuned on the very scan to be reconstructed, from its measured lines alone."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from msmri.diagnostics import Finding, Progress, Run
from msmri.diagnostics.figures import Panel, draw_panels
from msmri.diagnostics.subjects import Subject
from msmri.errors import InputError
from msmri.io.fastmri import open_scan
from msmri.io.kspace import centre_crop
from msmri.measurement import Measurement
from msmri.methods.msm import MSM
from msmri.methods.msm_training import LinewiseMSM
from msmri.metrics import psnr, ssim
from msmri.model.partial import BLANK
from msmri.physics.operators import CoilFourier, Subsample
from msmri.preparation import Preparation, join, measurements
from msmri.tensors import Mask, spawn

QUICK = {"steps": 2, "check_every": 1, "crop_to": 64, "slices": 1, "samples": 1, "sampler_steps": 2}
CENTRE = 20 / 256  # share of the columns around the centre that is never kept aside
LEAST_NOISE = 1e-3  # of measured lines, in scaled units


@dataclass(frozen=True)
class Check:
    """Where a fine-tuning stands."""

    step: int
    loss: float  # of the last training step; NaN before the first
    held_out: float  # error of the lines kept aside, in dB relative to their energy; NaN where not measured
    model: nn.Module  # the best so far by ``held_out``


def keep_aside(mask: Mask, share: float, rng: Generator) -> Mask:
    """Choose measured columns (b, 1, 1 or ky, kx) outside the centre to keep aside, one a slice or more."""
    width = mask.shape[-1]
    centre = torch.zeros(width, dtype=torch.bool)
    n = max(4, round(CENTRE * width))
    centre[width // 2 - n // 2 : width // 2 - n // 2 + n] = True
    aside = torch.zeros_like(mask)
    for chosen, own in zip(aside, mask):
        columns = (own.any(0).any(0).cpu() & ~centre).nonzero().flatten()
        some = columns[torch.randperm(len(columns), generator=rng)[: max(1, round(share * len(columns)))]]
        chosen[..., some] = own[..., some]
    return aside


def held_out_error(model: Any, scan: Measurement, aside: Mask) -> float:
    """Predict the lines kept aside from the other measured ones, in one pass: error over energy, in dB."""
    shown = scan.mask & ~aside
    noise = _noise(scan)
    error = energy = 0.0
    with torch.inference_mode():
        for k in range(len(scan.values)):
            one = _take(scan, [k])
            assert one.encoding is not None
            level = torch.where(shown[k : k + 1], noise[k : k + 1], torch.as_tensor(BLANK).to(noise))
            state = Subsample(shown[k : k + 1])(one.values)
            found = model(state, torch.ones_like(one.mask), one.encoding, level)
            rest = torch.where(aside[k : k + 1], found - one.values, 0)
            error += float(rest.abs().square().sum())
            energy += float(torch.where(aside[k : k + 1], one.values, 0).abs().square().sum())
    return 10 * math.log10(error / max(energy, 1e-30))


def adapt_prior(
    prior: nn.Module,
    scan: Measurement,
    rng: Generator,
    *,
    steps: int = 40,
    learning_rate: float = 1e-4,
    share: float = 0.1,
    check_every: int = 10,
) -> Iterator[Check]:
    """Fine-tune a copy of a prior on the measured lines of one scan; yield every step.

    The loss is that of the prior's training, one random slice a step. A share of the measured lines is kept aside: what
    predicts them best, the prior as it was included, is the model kept, so that a scan on which training only does harm
    gets its prior back.

    Parameters
    ----------
    scan
        All slices of one scan in scaled units, with coil maps.

    Raises
    ------
    InputError
        If the prior was not made for line-wise noise levels.
    """
    if not hasattr(prior, "scan_variance"):
        raise InputError(
            "this prior cannot be fine-tuned on a scan", mend="use one trained line-wise, as the shipped one"
        )
    aside = keep_aside(scan.mask, share, spawn(rng, 1)[0])
    shown = scan.mask & ~aside
    training = replace(scan, values=Subsample(shown)(scan.values), mask=shown, target=None)
    model, best = copy.deepcopy(prior), prior
    least = held_out_error(prior, scan, aside)
    yield Check(0, math.nan, least, best)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model.train()
    loss_of = LinewiseMSM(blind=0.6, sigma_min=0.01, logarithm=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(1, steps + 1):
        index = int(torch.randint(0, len(scan.values), (), generator=rng))
        loss = loss_of(model, _take(training, [index]), rng)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if bool(torch.isfinite(norm)):
            optimiser.step()
        held = math.nan
        if step % check_every == 0 or step == steps:
            held = held_out_error(model.eval(), scan, aside)
            model.train()
            if held < least:
                least, best = held, copy.deepcopy(model).eval().requires_grad_(False)
        yield Check(step, float(loss.detach()), held, best)


def _noise(scan: Measurement) -> Tensor:
    noise = torch.as_tensor(scan.noise_std, dtype=scan.values.real.dtype, device=scan.values.device)
    return noise.clamp_min(LEAST_NOISE).expand(len(scan.values), 1, 1, 1)


def _take(scan: Measurement, index: list[int]) -> Measurement:
    assert isinstance(scan.encoding, CoilFourier)
    return replace(
        scan, values=scan.values[index], mask=scan.mask[index], encoding=CoilFourier(scan.encoding.maps[index]),
        noise_std=_noise(scan)[index], scale=torch.as_tensor(scan.scale).expand(len(scan.values), 1, 1, 1)[index],
    )  # fmt: skip


def read_scan(path: Path, subject: Subject, *, slices: int, crop_to: int) -> tuple[list[Measurement], Measurement]:
    """Prepare the middle ``slices`` of a scan: one by one as a reconstruction sees them, and together in scaled units.

    Fully sampled scans are undersampled by the subject's law, and have targets; others are taken as they are.
    """
    with open_scan(path) as scan:
        first = max(0, scan.n_slices // 2 - slices // 2)
        chosen = range(first, min(scan.n_slices, first + slices))
        law = None if scan.is_undersampled else subject.law
        preparation = Preparation(
            law=law, seed=subject.seed, sets=1, crop_to=crop_to or None, device=subject.device
        )  # one set of maps: what the prior trains on
    each = measurements(path, preparation, chosen)
    together = [one.scaled(one.working_scale()) for one in each]
    return each, join(together)


def scores(prior: Any, cases: list[Measurement], seed: int, **options: Any) -> dict[str, float] | None:
    """Reconstruct every slice by MSM with a prior and score it; None where no slice has a target."""
    found: list[tuple[float, float]] = []
    for number, case in enumerate(cases):
        if case.target is None:
            continue
        method = MSM(prior=prior, **options)
        image = method(replace(case, target=None), spawn(Generator().manual_seed(seed + number), 1)).magnitude[0].cpu()
        target = case.target[0]
        image = centre_crop(image, (target.shape[-2], target.shape[-1]))
        found.append((psnr(target, image), ssim(target, image)))
    if not found:
        return None
    means = torch.tensor(found, dtype=torch.float64).mean(0)
    return {"PSNR": float(means[0]), "SSIM": float(means[1])}


def adaptation(
    subject: Subject,
    *,
    steps: int = 40,
    learning_rate: float = 1e-4,
    share: float = 0.1,
    check_every: int = 10,
    slices: int = 2,
    crop_to: int = 128,
    samples: int = 2,
    sampler_steps: int = 4,
) -> Run:
    """Ask whether fine-tuning the prior on the scan to be reconstructed helps, by lines kept aside and by the truth.

    Scan by scan, from its measured lines alone; then MSM reconstructs with the prior before and after, with the same
    seeds, both weighed on the scan as it does by default.

    Parameters
    ----------
    steps, learning_rate
        Of fine-tuning, one slice a step.
    share
        Of the measured lines outside the centre that is kept aside to judge by.
    slices, crop_to
        How many slices of each scan, and to how many rows and columns k-space is cropped; 0: not at all.
    samples, sampler_steps
        Of MSM.
    """
    rows: list[dict[str, Any]] = []
    files = subject.files
    prior: Any = subject.partial
    total = (steps + 2) * len(files)
    for place, path in enumerate(files):
        yield Progress(place * (steps + 2), total, f"{path.name}: before")
        each, scan = read_scan(path, subject, slices=slices, crop_to=crop_to)
        options = {"samples": samples, "steps": sampler_steps}
        before = scores(prior, each, subject.seed, **options)
        curve, best = [], prior
        for check in adapt_prior(prior, scan, subject.rng(path.name), steps=steps, learning_rate=learning_rate,
                                 share=share, check_every=check_every):  # fmt: skip
            best = check.model
            curve.append({"step": check.step, "loss": check.loss, "held-out error, dB": check.held_out})
            yield Progress(place * (steps + 2) + 1 + check.step, total, f"{path.name}: step {check.step}")
        measured = [point for point in curve if not math.isnan(point["held-out error, dB"])]
        chosen = min(measured, key=lambda point: point["held-out error, dB"])
        after = scores(best, each, subject.seed, **options) if chosen["step"] else before
        rows.append(
            {
                "scan": path.name,
                "slices": len(each),
                "matrix": list(scan.values.shape[-2:]),
                "true acceleration": float(scan.acceleration.mean()),
                "step kept": chosen["step"],
                "held-out error before, dB": measured[0]["held-out error, dB"],
                "held-out error kept, dB": chosen["held-out error, dB"],
                "before": before,
                "after": after,
                "curve": curve,
            }
        )
    numbers = {"rows": rows}
    panels = [
        Panel("Lines kept aside", "step", "error, dB", {
            row["scan"]: [(p["step"], p["held-out error, dB"]) for p in row["curve"]
                          if not math.isnan(p["held-out error, dB"])] for row in rows
        }),
        Panel("Training loss on the scan's own lines", "step", "log of relative error", {
            row["scan"]: [(p["step"], p["loss"]) for p in row["curve"] if not math.isnan(p["loss"])] for row in rows
        }),
    ]  # fmt: skip
    return Finding(numbers, _learned(rows), lambda path: draw_panels(path, panels))


def _learned(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    said = []
    for row in rows:
        text = (
            f"{row['scan']} (true R {row['true acceleration']:.1f}): lines kept aside were predicted with "
            f"{row['held-out error before, dB']:.2f} dB before and {row['held-out error kept, dB']:.2f} dB after step "
            f"{row['step kept']}"
        )
        if row["before"] is not None:
            gain = row["after"]["PSNR"] - row["before"]["PSNR"]
            text += (
                f"; the image has {row['before']['PSNR']:.2f} dB before, {row['after']['PSNR']:.2f} after ({gain:+.2f})"
            )
        said.append(text + ".")
    return tuple(said)
