"""How good the pseudo-clean references of noisy training are, and what learning from them costs."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from msmri.diagnostics import Finding, Progress, Run
from msmri.diagnostics.figures import Panel, draw_panels
from msmri.diagnostics.subjects import Subject, scaled
from msmri.measurement import Measurement
from msmri.physics.operators import Subsample
from msmri.sampling.aggregate import PartialDenoiser
from msmri.tensors import KSpace, Rng, normal_like

QUICK = {"size": 32, "people": 1, "levels": (0.02, 0.2)}
ASKED = 25.0  # dB, below which references may supervise too little: the question of the paper


def reference(partial: PartialDenoiser, person: Measurement, rho: float, rng: Rng) -> tuple[KSpace, KSpace]:
    """Add noise of std rho to the measured lines of a clean person and denoise them at that level.

    Returns
    -------
    tuple
        The noisy lines, and the pseudo-clean reference ``D_S(y, rho)``, both zero outside the mask.
    """
    assert person.encoding is not None
    noisy = Subsample(person.mask)(person.values + rho * normal_like(person.values, rng))
    level = torch.full((len(noisy), 1, 1, 1), rho, dtype=noisy.real.dtype, device=noisy.device)
    with torch.inference_mode():
        return noisy, Subsample(person.mask)(partial(noisy, person.mask, person.encoding, level))


def image_psnr(clean: Tensor, found: Tensor) -> float:
    """PSNR in dB of complex images, the error complex and the peak that of the clean magnitude."""
    error = float((clean - found).abs().square().mean())
    return 10 * math.log10(float(clean.abs().max()) ** 2 / max(error, 1e-20))


def excess_error(variance: Tensor, rho: float, sigma: float) -> float:
    """Tell by how many dB a denoiser trained on pseudo-clean references is worse than one trained on clean data.

    For coefficients N(0, variance), exactly. A reference made at level rho has the law N(0, v^2 / (v + rho^2)), and
    below rho the denoiser learned is the one of that law; its squared error on clean data is compared with the least
    possible, both summed over coefficients.
    """
    v = variance.double().flatten()
    learned = v.square() / (v + rho**2)
    gain = learned / (learned + sigma**2)
    error = (1 - gain).square() * v + gain.square() * sigma**2
    least = v * sigma**2 / (v + sigma**2)
    return 10 * math.log10(float(error.sum() / least.sum()))


def noisy_reference(
    subject: Subject,
    *,
    size: int = 112,
    people: int = 2,
    coils: int = 6,
    levels: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8),
) -> Run:
    """Ask how good references are over the noise rho, and at which rho they are worth less than 25 dB.

    MSM's training on noisy measurements takes ``D_S(y, rho)`` for clean where the diffusion's noise is below rho.
    The people are clean here, so that the reference can be compared with what it stands for: image by image,
    combined from the measured lines alone.

    Parameters
    ----------
    levels
        Values of rho: std of each real component, where the 99th percentile of the image is about 1.
    """
    found = [scaled(subject.measure(person)) for person in subject.people(people, size, coils=coils)]
    spectrum = getattr(subject.partial, "prior_variance", None)
    rows: list[dict[str, Any]] = []
    for done, rho in enumerate(levels):
        yield Progress(done, len(levels), f"rho {rho:g}")
        row: dict[str, Any] = {"rho": rho, "reference dB": 0.0, "noisy dB": 0.0, "reference NMSE of k-space": 0.0}
        for number, person in enumerate(found):
            assert person.encoding is not None
            noisy, clean = reference(subject.partial, person, rho, [subject.rng(f"{rho:g} {number}")])
            truth = person.encoding.adjoint(person.values)
            row["reference dB"] += image_psnr(truth, person.encoding.adjoint(clean)) / people
            row["noisy dB"] += image_psnr(truth, person.encoding.adjoint(noisy)) / people
            rest = (clean - person.values).abs().square().sum() / person.values.abs().square().sum()
            row["reference NMSE of k-space"] += float(rest) / people
        if spectrum is not None:
            variance = spectrum((size, size))
            row["share of k-space above the noise"] = float((variance > rho**2).double().mean())
            for part in (0.5, 0.25, 0.1):
                row[f"loss in dB at sigma = {part:g} rho"] = excess_error(variance, rho, part * rho)
        rows.append(row)
    numbers = {
        "units": "scaled; rho is the std of each real component",
        "people": [person.source[0] for person in found],
        "rows": rows,
        "rho at which references fall below 25 dB": crossing(rows, ASKED),
        "rho at which noisy data fall below 25 dB": crossing(rows, ASKED, key="noisy dB"),
    }
    panels = [
        Panel("Reference against what was measured", "rho", "PSNR, dB", {
            "pseudo-clean reference": [(row["rho"], row["reference dB"]) for row in rows],
            "noisy measurement": [(row["rho"], row["noisy dB"]) for row in rows],
        }, log_x=True, level=(ASKED, "25 dB")),
    ]  # fmt: skip
    if spectrum is not None:
        panels.append(
            Panel("What learning from it costs (Gaussian)", "PSNR of the reference, dB", "loss of the denoiser, dB", {
                f"at sigma = {part:g} rho": [(row["reference dB"], row[f"loss in dB at sigma = {part:g} rho"])
                                             for row in rows] for part in (0.5, 0.25, 0.1)
            })
        )  # fmt: skip
    return Finding(numbers, _learned(numbers), lambda path: draw_panels(path, panels))


def crossing(rows: list[dict[str, Any]], level: float, *, key: str = "reference dB") -> float | None:
    """Find the rho at which a curve falls through a level, on a logarithmic axis; None if it does not."""
    ordered = sorted(rows, key=lambda row: row["rho"])
    for low, high in pairwise(ordered):
        if low[key] >= level > high[key]:
            share = (low[key] - level) / (low[key] - high[key])
            return math.exp((1 - share) * math.log(low["rho"]) + share * math.log(high["rho"]))
    return None


def _learned(numbers: dict[str, Any]) -> tuple[str, ...]:
    rows, rho = numbers["rows"], numbers["rho at which references fall below 25 dB"]
    said = [
        f"At rho = {row['rho']:g} the reference has {row['reference dB']:.1f} dB, the measurement itself "
        f"{row['noisy dB']:.1f} dB."
        for row in (rows[0], rows[len(rows) // 2], rows[-1])
    ]
    said.append(
        f"References fall below 25 dB at rho = {rho:.3f}."
        if rho is not None
        else "References do not cross 25 dB between these levels."
    )
    if "loss in dB at sigma = 0.1 rho" in rows[0]:
        key = "loss in dB at sigma = 0.1 rho"
        hurt = [row for row in sorted(rows, key=lambda row: row["rho"]) if row[key] > 0.5]
        worst = max(rows, key=lambda row: row[key])
        said.append(
            f"A Gaussian of this spectrum, learned from such references, denoises at sigma = rho / 10 up to "
            f"{worst[key]:.1f} dB worse than from clean data (rho = {worst['rho']:g}); "
            + (
                f"the first of these levels where it loses more than 0.5 dB is rho = {hurt[0]['rho']:g}, where the "
                f"reference still has {hurt[0]['reference dB']:.1f} dB."
                if hurt
                else "it loses less than 0.5 dB at all levels."
            )
        )
    return tuple(said)
