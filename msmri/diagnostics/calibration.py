"""Whether the spread of posterior samples tells the error: coverage of the intervals that samples predict."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from msmri.diagnostics import Finding, Progress, Run
from msmri.diagnostics.figures import Panel, draw_panels
from msmri.diagnostics.subjects import Subject, inside
from msmri.methods.msm import MSM
from msmri.tensors import spawn

QUICK = {"size": 32, "people": 1, "samples": 3, "numbers": (2, 3), "steps": 2, "likelihoods": ("none", "proximal")}
NEIGHBOURHOOD = 7  # pixels a side, over which error and std are also compared
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def pivots(samples: Tensor, truth: Tensor) -> Tensor:
    """Give ``(truth - mean) / (std sqrt(1 + 1 / S))`` for S samples (S, ...) of real values.

    If the truth is one more draw of the law of the samples, and that law is Gaussian, this has Student's t distribution
    with S - 1 degrees of freedom, exactly.
    """
    n = len(samples)
    spread = samples.std(0) * (1 + 1 / n) ** 0.5
    return (truth - samples.mean(0)) / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def interval_coverage(pivot: Tensor, n: int, levels: tuple[float, ...] = LEVELS) -> list[float]:
    """Give the share of truths inside the central intervals that ``n`` samples predict at each level."""
    from scipy.stats import t

    size = pivot.abs().flatten()
    return [float((size <= float(t.ppf(0.5 + level / 2, n - 1))).double().mean()) for level in levels]


def needed_factor(pivot: Tensor, n: int, *, level: float = 0.68) -> float:
    """Give what the std has to be multiplied by for the interval of one level to hold its share of truths."""
    from scipy.stats import t

    return float(torch.quantile(_some(pivot.abs().flatten()), level)) / float(t.ppf(0.5 + level / 2, n - 1))


def normal_coverage(error: Tensor, std: Tensor, levels: tuple[float, ...] = LEVELS) -> list[float]:
    """Give the share of errors inside the central intervals of normal laws of these standard deviations."""
    from scipy.stats import norm

    size = (error.abs() / std.clamp_min(torch.finfo(std.dtype).tiny)).flatten()
    return [float((size <= float(norm.ppf(0.5 + level / 2))).double().mean()) for level in levels]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two sets of values: 1 where one rises with the other."""
    ranks = [_some(values.flatten()).argsort().argsort().double() for values in (a, b)]
    first, second = (rank - rank.mean() for rank in ranks)
    return float((first * second).sum() / (first.norm() * second.norm()).clamp_min(1e-12))


def local_rms(values: Tensor, side: int = NEIGHBOURHOOD) -> Tensor:
    """Root mean square of an image (y, x) over ``side`` x ``side`` pixels around each one; beyond the edge are none."""
    pooled = torch.nn.functional.avg_pool2d(
        values.square()[None, None], side, stride=1, padding=side // 2, count_include_pad=False
    )
    return pooled[0, 0].sqrt()


def _some(values: Tensor, most: int = 1_000_000) -> Tensor:
    """Thin out evenly what is too long for a quantile."""
    return values[:: len(values) // most + 1]


def calibration(
    subject: Subject,
    *,
    size: int = 80,
    people: int = 2,
    coils: int = 6,
    noise_std: float = 0.01,
    samples: int = 8,
    numbers: tuple[int, ...] = (2, 4, 8),
    steps: int = 8,
    likelihoods: tuple[str, ...] = ("none", "proximal", "gradient"),
) -> Run:
    """Ask how often the truth lies in the intervals that posterior samples predict.

    By likelihood and by number of samples, on simulated people, whose true image is known exactly: magnitudes inside
    the object. A calibrated sampler holds 90 % of the truths in its 90 % intervals, with any number of samples: that
    the mean and the std of few samples are themselves uncertain is part of the interval (Student's t). Beside it the
    std as given, scaled to the error that hidden lines of the scan let expect, with intervals of normal laws.

    Parameters
    ----------
    samples, numbers
        Samples drawn of each person, and how many of them to judge by.
    likelihoods
        How the data correct estimates, see :class:`msmri.methods.msm.MSM`.
    """
    cases = [subject.measure(person) for person in subject.people(people, size, coils=coils, noise_std=noise_std)]
    wanted = tuple(n for n in numbers if 2 <= n <= samples) or (samples,)
    rows: list[dict[str, Any]] = []
    for done, likelihood in enumerate(likelihoods):
        yield Progress(done, len(likelihoods), f"likelihood {likelihood}")
        method = MSM(prior=subject.partial, samples=samples, steps=steps, likelihood=likelihood)  # type: ignore[arg-type]
        images, drawn, truths, stated = [], [], [], []
        for number, case in enumerate(cases):
            result = method(case, spawn(subject.rng(f"person {number}"), 1))
            found = result.samples[0].abs().cpu()
            spreads = [replace(result, samples=result.samples[:, :n]).std for n in wanted]
            stated.append([spread[0].cpu() for spread in spreads if spread is not None])
            assert case.target is not None
            where = inside(case.target[0].cpu())
            images.append((found, case.target[0].cpu(), where))
            drawn.append(found[:, where])
            truths.append(case.target[0].cpu()[where])
        values, truth = torch.cat(drawn, 1), torch.cat(truths)
        for which, n in enumerate(wanted):
            scaled = torch.cat([one[which][where] for one, (*_, where) in zip(stated, images)])
            pivot = pivots(values[:n], truth)
            error = (truth - values[:n].mean(0)).abs()
            rms_error = torch.cat([local_rms(whole - found[:n].mean(0))[where] for found, whole, where in images])
            rms_std = torch.cat([local_rms(found[:n].std(0))[where] for found, _, where in images])
            rows.append(
                {
                    "likelihood": likelihood,
                    "samples": n,
                    "levels": LEVELS,
                    "coverage": interval_coverage(pivot, n),
                    "factor the std needs": needed_factor(pivot, n),
                    "coverage of the std given": normal_coverage(error, scaled),
                    "rms std given": float(scaled.square().mean().sqrt()),
                    "rms error": float(error.square().mean().sqrt()),
                    "rms std": float(values[:n].var(0).mean().sqrt()),
                    "rank correlation of error and std": rank_correlation(error, values[:n].std(0)),
                    f"the same over {NEIGHBOURHOOD} x {NEIGHBOURHOOD} pixels": rank_correlation(rms_error, rms_std),
                    "bias": float((values[:n].mean(0) - truth).mean()),
                }
            )
    numbers_ = {
        "units": "the image's 99th percentile is 1; magnitudes inside the object",
        "people": [case.source[0] for case in cases],
        "rows": rows,
    }
    most = max(wanted)
    panels = [
        Panel(f"{most} samples", "stated probability", "share of truths inside", {
            f"likelihood {row['likelihood']}": list(zip(LEVELS, row["coverage"])) for row in rows
            if row["samples"] == most
        }, diagonal=True, limits=(0, 1)),
        Panel(f"Likelihood {likelihoods[0]}", "stated probability", "share of truths inside", {
            f"{row['samples']} samples": list(zip(LEVELS, row["coverage"])) for row in rows
            if row["likelihood"] == likelihoods[0]
        }, diagonal=True, limits=(0, 1)),
    ]  # fmt: skip
    return Finding(numbers_, _learned(rows, most), lambda path: draw_panels(path, panels))


def _learned(rows: list[dict[str, Any]], most: int) -> tuple[str, ...]:
    at, near = LEVELS.index(0.9), f"the same over {NEIGHBOURHOOD} x {NEIGHBOURHOOD} pixels"
    said = [
        f"Likelihood {row['likelihood']}, {row['samples']} samples: the 90 % intervals hold "
        f"{100 * row['coverage'][at]:.0f} % of the truths; the std needs a factor {row['factor the std needs']:.1f}; "
        f"rms error {row['rms error']:.4f}, rms std {row['rms std']:.4f}; their ranks correlate by "
        f"{row['rank correlation of error and std']:.2f} pixel by pixel and by {row[near]:.2f} over {NEIGHBOURHOOD} x "
        f"{NEIGHBOURHOOD} pixels."
        for row in rows
        if row["samples"] == most
    ]
    first = [row for row in rows if row["likelihood"] == rows[0]["likelihood"]]
    said += [
        f"Likelihood {row['likelihood']}, {row['samples']} samples, std as given, scaled by hidden lines of the scan: "
        f"rms {row['rms std given']:.4f} for an error of {row['rms error']:.4f}; 90 % intervals of normal laws hold "
        f"{100 * row['coverage of the std given'][at]:.0f} % of the truths."
        for row in rows
        if row["samples"] == most
    ]
    held = ", ".join(f"{100 * row['coverage'][at]:.0f} % with {row['samples']}" for row in first)
    said.append(f"By number of samples (likelihood {rows[0]['likelihood']}), 90 % intervals hold {held}.")
    return tuple(said)
