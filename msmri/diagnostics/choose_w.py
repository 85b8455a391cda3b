"""How many masks a step: a rule that looks at the spread of partial estimates, against a fixed number, cost alike."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from msmri.diagnostics import Finding, Progress, Run
from msmri.diagnostics.figures import Panel, draw_panels
from msmri.diagnostics.gaussian import LineModel
from msmri.diagnostics.subjects import Subject, scaled
from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.metrics import psnr
from msmri.model.partial import BLANK
from msmri.physics.masks import MaskLaw
from msmri.physics.operators import LinearOperator
from msmri.sampling import schedule
from msmri.sampling.aggregate import PartialDenoiser
from msmri.sampling.likelihood import proximal
from msmri.sampling.reverse import Step, reverse_diffusion
from msmri.tensors import KSpace, Mask, normal_like, spawn

QUICK = {"size": 32, "people": 1, "samples": 1, "steps": 3, "fixed": (1, 2), "tolerances": (0.5,), "lines_steps": 10,
         "trials": 60}  # fmt: skip
LEAST_NOISE = 1e-3  # of measured lines, in scaled units


class Spread:
    """Partial estimates of one state, mask after mask: their mean, and the variance of one of them. Welford 1962.

    Places that ``ignored`` marks, the measured ones, do not count for the variance: all masks hold them.
    """

    def __init__(self, like: KSpace, ignored: Mask) -> None:
        self.ignored, self.count = ignored, 0
        self._mean, self._squares = torch.zeros_like(like), torch.zeros_like(like.real)
        self._reached = torch.zeros_like(ignored, dtype=torch.int64)

    def add(self, estimate: KSpace, mask: Mask) -> None:
        """Take one more estimate (1, coil, ky, kx) and its mask (1, 1, 1 or ky, kx); nothing else counts."""
        self.count += 1
        self._reached = self._reached + mask
        difference = torch.where(mask, estimate - self._mean, 0)
        self._mean = self._mean + difference / self._reached.clamp_min(1)
        self._squares = self._squares + (difference.conj() * torch.where(mask, estimate - self._mean, 0)).real

    def mean(self, otherwise: KSpace) -> KSpace:
        """Give the mean where masks reached, and ``otherwise`` elsewhere."""
        return torch.where(self._reached > 0, self._mean, otherwise)

    def variance(self) -> float | None:
        """Variance of one estimate, a real component, where two masks or more reached; None where none did."""
        places = ((self._reached > 1) & ~self.ignored).expand_as(self._squares)
        if not bool(places.any()):
            return None
        each = self._squares / (self._reached - 1).clamp_min(1)
        return float(each[places].mean()) / (2 if self._mean.is_complex() else 1)


@dataclass(frozen=True)
class Adaptive:
    """Take masks until the mean's standard error is small against the fresh noise of the step.

    After two masks the variance of one estimate is known, ``v^2``; wanted is ``v^2 / w <= (tolerance fresh)^2``, so
    ``w = v^2 / (tolerance fresh)^2``. What the choice of masks adds to the state is then a stated share of what the
    sampler adds anyway. The last step adds nothing; its own noise level counts.
    """

    tolerance: float  # standard error of the estimate over the std of the fresh noise
    most: int = 8  # masks a step

    def wanted(self, variance: float | None, fresh: float) -> int:
        """Give the number of masks for a variance of one estimate and the std of the step's fresh noise."""
        if variance is None:
            return 3  # no two masks met anywhere: look again
        return min(self.most, max(2, math.ceil(variance / (self.tolerance * fresh) ** 2 - 1e-9)))


def posterior_image(
    partial: PartialDenoiser,
    measurement: Measurement,
    law: MaskLaw,
    rng: torch.Generator,
    sigmas: Tensor,
    choose: int | Adaptive,
) -> tuple[Tensor, list[int]]:
    """Draw one posterior image (y, x) of one scaled slice, and tell the masks that each step took.

    The sampler of MSM's defaults with independent masks: measured lines are in every mask with their own noise, the
    start is the prior's estimate with all other lines blank, noise is renewed by the size of the step.
    """
    assert measurement.encoding is not None
    encoding: LinearOperator = measurement.encoding
    values, measured = measurement.values, measurement.mask
    matrix = (values.shape[-2], values.shape[-1])
    noise = torch.as_tensor(measurement.noise_std, dtype=values.real.dtype).reshape(-1, 1, 1, 1)
    noise = noise.to(values.device).clamp_min(LEAST_NOISE)
    keeps = bool(getattr(partial, "keeps_data", False))
    shares = schedule.ancestral(sigmas)
    following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
    taken: list[int] = []

    def fit(clean: KSpace) -> KSpace:
        return clean if keeps else proximal(clean, values, measured, encoding, weight=0.1, iterations=10)[0]

    def estimate(step: Step) -> KSpace:
        number = len(taken)
        fresh = float(following[number] * shares[number]) or float(step.sigma)
        state = torch.where(measured, values, step.state)
        sigma = torch.where(measured, noise, step.sigma)
        spread, wanted = Spread(state, measured), choose if isinstance(choose, int) else 2
        while spread.count < wanted:
            mask = law.draw(matrix, rng)[None].to(values.device) | measured
            spread.add(partial(state, mask, encoding, sigma), mask)
            if isinstance(choose, Adaptive) and spread.count >= 2 and spread.count == wanted:
                wanted = max(wanted, choose.wanted(spread.variance(), fresh))
        taken.append(spread.count)
        return fit(spread.mean(step.estimate))

    with torch.inference_mode():
        blank = torch.where(measured, noise, torch.as_tensor(BLANK).to(noise))
        first = fit(partial(values, torch.ones_like(measured), encoding, blank))
        streams = spawn(rng, 1)
        begin = first + float(sigmas[0]) * normal_like(first, streams)
        steps = reverse_diffusion(estimate, begin, sigmas, rng=streams, eta=shares, first_estimate=first)
        *_, last = steps
        return encoding.adjoint(last.estimate)[0, 0], taken


def _row(name: str, images: list[list[Tensor]], targets: Sequence[Tensor], passes: list[int]) -> dict[str, Any]:
    """Score the mean of the samples of each person, and single samples."""
    means = [psnr(target, torch.stack(found).mean(0).abs().cpu()) for target, found in zip(targets, images)]
    single = [psnr(target, image.abs().cpu()) for target, found in zip(targets, images) for image in found]
    return {
        "variant": name,
        "passes a sample": sum(passes) / len(single),
        "PSNR of the mean": sum(means) / len(means),
        "PSNR of one sample": sum(single) / len(single),
    }


def choose_w(
    subject: Subject,
    *,
    size: int = 80,
    people: int = 2,
    coils: int = 6,
    noise_std: float = 0.01,
    samples: int = 2,
    steps: int = 8,
    fixed: tuple[int, ...] = (1, 3),
    tolerances: tuple[float, ...] = (0.3,),
    lines_steps: int = 40,
    trials: int = 1000,
) -> Run:
    """Ask whether choosing w step by step beats a fixed w, or more steps, at the same number of network passes.

    On the posterior of simulated people with the prior at hand, and on Gaussian lines, where the divergence from
    infinitely many masks is known and the passes can be shared out such that the bound is least.

    Parameters
    ----------
    fixed
        Numbers of masks a step; each is also spent on as many times more steps with one mask.
    tolerances
        Of the adaptive rule, see :class:`Adaptive`.
    lines_steps, trials
        Of the sampler on Gaussian lines, and sequences of masks there.
    """
    if 1 not in fixed:
        raise InputError("choose-w compares with one mask a step", mend="have 1 among fixed")
    cases = [scaled(subject.measure(person)) for person in subject.people(people, size, coils=coils,
                                                                          noise_std=noise_std)]  # fmt: skip
    targets = [case.target[0] for case in cases if case.target is not None]
    sigma_max, sigma_min = 0.5, 0.01  # as MSM's defaults
    plans: list[tuple[str, int | Adaptive, int]] = [(f"w = {w}", w, steps) for w in fixed]
    plans += [(f"w = 1, {w * steps} steps", 1, w * steps) for w in fixed if w > 1]
    plans += [(f"adaptive, tolerance {tolerance:g}", Adaptive(tolerance), steps) for tolerance in tolerances]
    total, rows = len(plans) + 1, []
    for done, (name, choose, length) in enumerate(plans):
        yield Progress(done, total, name)
        images, taken = [], []
        for number, case in enumerate(cases):
            streams = spawn(subject.rng(f"person {number}"), samples)
            drawn = [
                posterior_image(subject.partial, case, subject.law, stream,
                                schedule.karras(sigma_max, sigma_min, length), choose)
                for stream in streams
            ]  # fmt: skip
            images.append([image for image, _ in drawn])
            taken += [counts for _, counts in drawn]
        row = _row(name, images, targets, [sum(counts) for counts in taken])
        row["masks of each step, mean"] = torch.tensor(taken, dtype=torch.float64).mean(0).tolist()
        rows.append(row)
    yield Progress(total - 1, total, "Gaussian lines")
    model = LineModel.example(steps=lines_steps)
    lines = _gaussian_rows(model, trials, subject.rng)
    numbers = {"people": [case.source[0] for case in cases], "rows": rows, "gaussian": lines}
    panels = [
        Panel("Posterior of simulated people", "network passes a sample", "PSNR of the mean, dB", {
            name: [(row["passes a sample"], row["PSNR of the mean"]) for row in rows if test(row["variant"])]
            for name, test in FAMILIES.items()
        }),
        Panel("Masks of each step", "step", "masks", {
            row["variant"]: list(enumerate(row["masks of each step, mean"], 1))
            for row in rows if row["variant"].startswith("adaptive")
        }),
        Panel("Gaussian lines", "network passes a sample", "divergence from w = ∞, nats", {
            name: [(row["passes"], max(row[f"divergence, {plan}"], 1e-9)) for row in lines]
            for name, plan in (
                ("fixed w", "fixed"), ("shared out by the bound", "by the bound"),
                ("shared out by the spread", "by the spread"),
            )
        }, log_x=True, log_y=True),
    ]  # fmt: skip
    return Finding(numbers, _learned(numbers), lambda path: draw_panels(path, panels))


FAMILIES: dict[str, Callable[[str], bool]] = {
    "fixed w": lambda name: name.startswith("w = ") and "steps" not in name,
    "one mask, more steps": lambda name: "steps" in name or name == "w = 1",
    "adaptive": lambda name: name.startswith("adaptive"),
}


def _gaussian_rows(model: LineModel, trials: int, rng: Callable[[str], torch.Generator]) -> list[dict[str, Any]]:
    """Compare three ways to spend the same passes on Gaussian lines by the divergence that they leave."""
    rows = []
    for w in (2, 4, 8):
        passes = w * (len(model.sigmas) - 1)
        plans: dict[str, int | list[int]] = {
            "fixed": w, "by the bound": model.share_out(passes),
            "by the spread": model.share_out(passes, rule="spread"),
        }  # fmt: skip
        row: dict[str, Any] = {"w": w, "passes": passes}
        for name, plan in plans.items():
            found = model.divergence(plan, rng(f"lines {w}"), trials=trials, unbiased=False)
            row |= {f"masks of each step, {name}": plan, f"divergence, {name}": found["kl moments"]}
            row |= {f"bound, {name}": model.bound(plan)}
        rows.append(row)
    return rows


def interpolate(points: list[tuple[float, float]], at: float) -> float:
    """Read a curve of (passes, value) at a number of passes, linear in their logarithm, held at its ends."""
    ordered = sorted(points)
    if at <= ordered[0][0]:
        return ordered[0][1]
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if at <= x1:
            share = math.log(at / x0) / math.log(x1 / x0)
            return (1 - share) * y0 + share * y1
    return ordered[-1][1]


def _learned(numbers: dict[str, Any]) -> tuple[str, ...]:
    said = []
    for key in ("PSNR of the mean", "PSNR of one sample"):
        curves = {
            name: sorted((row["passes a sample"], row[key]) for row in numbers["rows"] if test(row["variant"]))
            for name, test in FAMILIES.items()
        }
        (few, first), (many, last) = curves["fixed w"][0], curves["fixed w"][-1]
        said.append(
            f"{key}: from {few:.0f} to {many:.0f} passes a sample, {last - first:+.2f} dB with more masks a step, "
            f"{curves['one mask, more steps'][-1][1] - first:+.2f} dB with more steps of one mask."
        )
        for row in numbers["rows"]:
            if row["variant"].startswith("adaptive"):
                at, found = row["passes a sample"], row[key]
                masks, more = (found - interpolate(curves[name], at) for name in ("fixed w", "one mask, more steps"))
                said.append(
                    f"{key}, {row['variant']}, {at:.1f} passes: {masks:+.2f} dB against fixed w at as many passes, "
                    f"{more:+.2f} dB against more steps of one mask."
                )
    for plan, means in (("by the bound", "such that the bound is least"), ("by the spread", "by the adaptive rule")):
        ratios = [f"{row[f'divergence, {plan}'] / row['divergence, fixed']:.1f}" for row in numbers["gaussian"]]
        said.append(
            f"Gaussian lines: passes shared out {means} multiply the divergence by {', '.join(ratios)} at w = "
            f"{', '.join(str(row['w']) for row in numbers['gaussian'])}."
        )
    return tuple(said)
