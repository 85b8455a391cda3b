"""How much the score depends on which masks were drawn: over noise levels, over w, and against the bound of MSM."""

import math
from typing import Any

import torch
from torch import Tensor

from msmri.diagnostics import Finding, Progress, Run
from msmri.diagnostics.figures import Panel, draw_panels
from msmri.diagnostics.gaussian import LineModel, gaussian_kl
from msmri.diagnostics.subjects import Subject, scaled
from msmri.measurement import Measurement
from msmri.model.denoiser import GaussianDenoiser
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.masks import MaskLaw, draw_masks
from msmri.physics.operators import LinearOperator
from msmri.sampling.aggregate import ImagePartial, PartialDenoiser
from msmri.tensors import KSpace, Rng, normal_like, spawn

QUICK = {"size": 32, "people": 1, "masks": 4, "sigmas": (1.0, 0.03, 0.01), "groups": (1, 2), "steps": 10,
         "trials": 60}  # fmt: skip


def partial_estimates(
    partial: PartialDenoiser, state: KSpace, masks: Tensor, encoding: LinearOperator, sigma: float
) -> KSpace:
    """Estimate the clean measurement from one state (1, coil, ky, kx) on each mask (w, 1, 1 or ky, kx) by itself."""
    level = torch.full((1, 1, 1, 1), sigma, dtype=state.real.dtype, device=state.device)
    with torch.inference_mode():
        return torch.cat([partial(state, mask[None], encoding, level) for mask in masks])


def aggregated_variance(estimates: KSpace, masks: Tensor, w: int) -> float:
    """Measure the variance over masks of the aggregated estimate of w masks, a real component, where masks reach.

    The masks are split into groups of w, each group averaged where it reaches, and the variance taken over groups at
    every place that two groups or more reach.

    Parameters
    ----------
    estimates
        (masks, coil, ky, kx), one a mask, zero outside it.
    masks
        Bool (masks, 1, 1 or ky, kx).
    """
    groups = len(masks) // w
    shown = masks[: groups * w].unflatten(0, (groups, w))
    count = shown.sum(1)
    mean = estimates[: groups * w].unflatten(0, (groups, w)).sum(1) / count.clamp_min(1)
    reached = (count > 0).expand(groups, 1, *estimates.shape[-2:])
    n = reached.sum(0)
    average = torch.where(reached, mean, 0).sum(0) / n.clamp_min(1)
    squares = torch.where(reached, (mean - average).abs().square(), 0).sum(0)
    places = (n > 1).expand_as(squares)
    if not bool(places.any()):
        return math.nan
    variance = squares / (n - 1).clamp_min(1)
    return float(variance[places].mean()) / (2 if estimates.is_complex() else 1)


def gaussian_image_partial(partial: Any, shape: tuple[int, int]) -> PartialDenoiser | None:
    """Make the published form of a partial denoiser around the exact denoiser of the prior's own power spectrum."""
    if not hasattr(partial, "prior_variance"):
        return None
    variance = partial.prior_variance(shape)[None]
    mean = torch.zeros(1, *shape, dtype=torch.complex64, device=variance.device)
    return ImagePartial(GaussianDenoiser(mean, variance, fft2c, ifft2c))


def measure(
    partial: PartialDenoiser,
    person: Measurement,
    law: MaskLaw,
    sigma: float,
    rng: Rng,
    *,
    masks: int,
    groups: tuple[int, ...],
    within: bool,
) -> dict[str, float]:
    """Measure the variance of the score over masks at one noise level of one person, a real component.

    ``within`` takes noise that an image could have, E m with m white, in place of white noise in every coil.
    """
    assert person.encoding is not None
    draws, noises = spawn(rng[0], 2)
    matrix = (person.values.shape[-2], person.values.shape[-1])
    if within:
        noise = person.encoding(normal_like(person.encoding.adjoint(person.values), [noises]))
    else:
        noise = normal_like(person.values, [noises])
    drawn = draw_masks(law, matrix, spawn(draws, masks)).to(person.values.device)
    found = partial_estimates(partial, person.values + sigma * noise, drawn, person.encoding, sigma)
    return {str(w): aggregated_variance(found, drawn, w) / sigma**4 for w in groups}


def slope(points: dict[float, float]) -> float:
    """Fit the exponent of a power law to the values at the three lowest arguments."""
    low = sorted(points)[:3]
    x = torch.tensor(low, dtype=torch.float64).log()
    y = torch.tensor([points[key] for key in low], dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def gaussian_numbers(model: LineModel, groups: tuple[int, ...], trials: int, subject: Subject) -> dict[str, Any]:
    """Compare the divergence that w masks cause with its bound on Gaussian lines."""
    rows = []
    for w in groups:
        rng = subject.rng(f"lines {w}")
        as_proven = model.divergence(w, rng, trials=trials)
        as_run = model.divergence(w, rng, trials=trials, unbiased=False)
        rows.append(
            {
                "w": w,
                "bound v^2 C / w": model.bound(w, largest=True),
                "bound, step by step": model.bound(w),
                "divergence, moments": gaussian_kl(model.ideal[-1], model.moments(w)),
                "divergence, by draws": as_proven["kl"],
                "divergence of the sampler as run, moments": as_run["kl moments"],
                "spread of the sampler as run": as_run["spread"],
            }
        )
    return {
        "lines": model.n,
        "probability": model.probability,
        "steps": len(model.sigmas),
        "v^2 at the lowest levels": model.variances[-3:].tolist(),
        "rows": rows,
        "divergence of the truth from infinitely many masks": model.floor(),
    }


def score_variance(
    subject: Subject,
    *,
    size: int = 80,
    people: int = 1,
    coils: int = 6,
    masks: int = 12,
    groups: tuple[int, ...] = (1, 2, 4),
    sigmas: tuple[float, ...] = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003),
    steps: int = 40,
    trials: int = 1000,
) -> Run:
    """Ask whether the variance of the score over masks stays bounded as sigma falls, and whether the bound is followed.

    Theorem 1 of Park et al. 2025 bounds the divergence that w masks a step cause by v^2 C / w, v^2 being the variance
    of the score estimate. It says nothing where v^2 grows without limit. On simulated people v^2 is measured, on
    Gaussian lines everything is known.

    Parameters
    ----------
    size, people, coils
        Of the simulated people.
    masks, groups
        Masks drawn at each noise level, and the numbers w of them that are averaged.
    sigmas
        Noise levels, in scaled units.
    steps, trials
        Of the sampler on Gaussian lines, and sequences of masks there.
    """
    found = [scaled(person) for person in subject.people(people, size, coils=coils)]
    image = gaussian_image_partial(subject.partial, (size, size))
    variants: dict[str, tuple[PartialDenoiser, bool]] = {
        "the prior, noise in every coil": (subject.partial, False),
        "the prior, noise that an image can have": (subject.partial, True),
    }
    if image is not None:
        variants["Gaussian image denoiser, form as published"] = (image, False)
    values: dict[str, dict[float, dict[str, float]]] = {name: {} for name in variants}
    total, done = len(variants) * len(sigmas) + 1, 0
    for name, (partial, within) in variants.items():
        for sigma in sigmas:
            yield Progress(done, total, f"{name}, sigma {sigma:g}")
            rows = [
                measure(partial, person, subject.law, sigma, [subject.rng(f"{sigma:g} {number}")], masks=masks,
                        groups=groups, within=within)
                for number, person in enumerate(found)
            ]  # fmt: skip
            values[name][sigma] = {w: sum(row[w] for row in rows) / len(rows) for w in rows[0]}
            done += 1
    yield Progress(done, total, "Gaussian lines")
    model = LineModel.example(steps=steps)
    exact = gaussian_numbers(model, (1, 2, 4, 8), trials, subject)
    one = str(groups[0])
    numbers = {
        "units": "scaled; v^2 a real component of k-space, where masks reach",
        "people": [person.source[0] for person in found],
        "v^2": {name: [{"sigma": s, **row} for s, row in rows.items()] for name, rows in values.items()},
        "exponent of v^2 in sigma, three lowest levels": {
            name: slope({s: row[one] for s, row in rows.items()}) for name, rows in values.items()
        },
        "gaussian": exact,
    }
    panels = [
        Panel("Variance of the score over masks", "sigma", "v²", {
            **{name: [(s, row[one]) for s, row in rows.items()] for name, rows in values.items()},
            "variance of the noise's own score": [(s, s**-2) for s in sigmas],
        }, log_x=True, log_y=True),
        Panel("v² times w, the prior, noise in every coil", "sigma", "w v²", {
            f"w = {w}": [(s, w * row[str(w)]) for s, row in values["the prior, noise in every coil"].items()]
            for w in groups
        }, log_x=True, log_y=True),
        Panel("Gaussian lines: what w masks cost", "w", "divergence, nats", {
            name: [(row["w"], max(row[key], 1e-9)) for row in exact["rows"]]
            for name, key in (
                ("bound v² C / w", "bound v^2 C / w"), ("bound, step by step", "bound, step by step"),
                ("as the theorem assumes", "divergence, moments"),
                ("sampler as run", "divergence of the sampler as run, moments"),
            )
        }, log_x=True, log_y=True, level=(exact["divergence of the truth from infinitely many masks"],
                                          "truth against w = ∞")),
    ]  # fmt: skip
    return Finding(numbers, _learned(numbers), lambda path: draw_panels(path, panels))


def _learned(numbers: dict[str, Any]) -> tuple[str, ...]:
    said = [
        f"{name}: v^2 goes as sigma^{exponent:.1f} at the lowest levels "
        f"({'bounded' if exponent > -0.5 else 'not bounded'})."
        for name, exponent in numbers["exponent of v^2 in sigma, three lowest levels"].items()
    ]
    for name, rows in numbers["v^2"].items():
        row = min(rows, key=lambda row: row["sigma"])
        counts = sorted((key for key in row if key != "sigma"), key=int)
        said.append(
            f"{name}: at sigma = {row['sigma']:g} v^2 is {row[counts[0]] * row['sigma'] ** 2:.2g} times the power of "
            f"the noise's own score; w = {counts[-1]} divides it by {row[counts[0]] / row[counts[-1]]:.1f} where a "
            f"line is reached."
        )
    exact = numbers["gaussian"]
    first, last = exact["rows"][0], exact["rows"][-1]
    power = math.log(last["divergence, moments"] / first["divergence, moments"]) / math.log(last["w"] / first["w"])
    said += [
        f"Gaussian lines: the divergence falls as w^{power:.1f}, the bound as w^-1; the bound holds and is "
        f"{first['bound v^2 C / w'] / first['divergence, moments']:.0f} times too large at w = {first['w']} "
        f"({first['bound, step by step'] / first['divergence, moments']:.0f} times if taken step by step).",
        f"The truth differs from infinitely many masks by "
        f"{exact['divergence of the truth from infinitely many masks']:.3f} nats, which no w mends; the sampler as run "
        f"differs from them by {first['divergence of the sampler as run, moments']:.3f} at w = {first['w']} and by "
        f"{last['divergence of the sampler as run, moments']:.1g} at w = {last['w']}.",
    ]
    return tuple(said)
