"""Measurement score-based diffusion (MSM): partial denoisers, their aggregation, posterior sampling."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Generator, Tensor

from msmri.errors import InputError
from msmri.measurement import Measurement, Reconstruction
from msmri.methods import FromPrior, combine_sets, told
from msmri.model.denoiser import Denoiser, VPSchedule
from msmri.model.partial import BLANK, CrossValidation
from msmri.physics.coils import calibration_region, estimate_noise_std
from msmri.physics.masks import MaskLaw, RandomLines, covering
from msmri.physics.operators import Identity, LinearOperator, Subsample, selected
from msmri.sampling import schedule
from msmri.sampling.aggregate import PartialDenoiser, aggregate, take
from msmri.sampling.likelihood import gradient_step, project, proximal
from msmri.sampling.reverse import Step, reverse_diffusion
from msmri.tensors import KSpace, Mask, Rng, Sigma, normal_like, spawn

REFERENCE = """@inproceedings{park2026measurement,
  title = {Measurement Score-Based Diffusion Model},
  author = {Park, Chicago Y. and Shoushtari, Shirin and An, Hongyu and Kamilov, Ulugbek S.},
  booktitle = {International Conference on Learning Representations}, year = {2026}, note = {arXiv:2505.11853}
}"""
NOISE_FLOOR = 1e-3  # least std of measured lines, in scaled units: no network was trained below
DATA_WEIGHT = {"proximal": 3.0, "gradient": 2.0, "none": 0.0}
ESTIMATE_ERROR = 0.03  # of measured lines in the prior's estimates, in scaled units: data of more noise pull less
PAPER: Mapping[str, Any] = {
    "steps": 200,
    "schedule": "vp",
    "sigma_max": float("inf"),
    "sigma_min": 0.0,
    "masks_per_step": 3,
    "covering": False,
    "eta": 0.85,
    "renewal": "constant",
    "likelihood": "gradient",
    "data_weight": 2.0,
    "start": "noise",
    "include_measured": False,
    "conditional_mean": 0.0,
    "samples": 1,
}
PAPER_RESTORATION: Mapping[str, Any] = {**PAPER, "masks_per_step": 2, "data_weight": 1.75, "covering": True}
RESTORATION: Mapping[str, Any] = {
    **PAPER_RESTORATION,
    "steps": 50,
    "eta": 1.0,
    "likelihood": "proximal",
    "data_weight": "noise",
    "signal_std": 0.5,
    "iterations": 10,  # little noise and other operators: farther from the end
    "relaxation": 1.75,
    "samples": 4,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": PAPER,
    "restoration": RESTORATION,
    "paper-restoration": PAPER_RESTORATION,
}


@dataclass(frozen=True)
class MSM(FromPrior):
    """Sample images from the posterior under a prior learned from undersampled measurements. Park et al. 2025.

    Inside, measurements are divided by ``measurement.working_scale()``; sigmas and weights are in those units.
    ``preset`` gives the published algorithm ("paper", and "paper-restoration" where images themselves are diffused) or
    this project's ("default", the defaults below, and "restoration").

    What is diffused is the full measurement that the prior knows: all coils' k-space, or the image itself. The data are
    a part of it, as in scans and inpainting, or any linear map of it that the measurement's encoding tells, as in
    super-resolution: these enter by ``likelihood`` alone.
    """

    prior: str | Path | PartialDenoiser | Denoiser | None = None  # weights file or a denoiser; None: the shipped prior
    samples: int = 4  # drawn for each slice; their mean is the image, their std the uncertainty
    steps: int = 8  # noise levels
    sigma_max: float = 0.5  # highest noise level; cuts the ladder of schedule "vp"
    sigma_min: float = 0.01  # lowest noise level before 0; cuts the ladder of schedule "vp"
    schedule: Literal["karras", "vp"] = "karras"  # EDM's ladder (rho 7), or every n-th of the levels trained on
    masks_per_step: int = 1  # w: network passes a step, each on a mask of its own
    law: MaskLaw | None = None  # of the sampling masks; None: the law of the masks trained on where the prior tells it,
    # else random lines
    acceleration: float = 4.0  # of those random lines: that of the masks trained on
    covering: bool = True  # deal the masks of a step so that they reach most lines together; False: independent
    include_measured: bool = True  # put the measured lines, with their own noise, into every mask, where data are a
    # part of what is diffused
    aggregate: Literal["parallel", "sequential"] = "parallel"  # how the masks of a step are run
    likelihood: Literal["proximal", "gradient", "none"] = "proximal"  # how estimates are corrected by the data; "none"
    # is exact for a prior that takes measured lines into its masks, but "proximal" has less error, with less spread
    data_weight: float | Literal["noise"] | None = None  # pull of the data: 1 / mu of "proximal", gamma of "gradient";
    # "noise": mu = noise_std^2 (1 / sigma^2 + 1 / signal_std^2); None: 2 of "gradient", 3 of "proximal", and if masks
    # hold the measured lines at most (0.03 / noise_std)^2, as the prior then estimates them better than they are
    signal_std: float = float("inf")  # of what a prior knows beforehand, in "noise": exact for a white Gaussian of that
    iterations: int = 6  # conjugate-gradient steps of "proximal", which begin near the end
    relaxation: float = 1.0  # share of the way to its solution; above 1 past it, as "gradient" goes with such a gamma
    project: bool = False  # remove from each estimate what no image can produce; "proximal" always does
    eta: float = 1.0  # share of fresh noise a step, 0 .. 1
    renewal: Literal["ancestral", "constant"] = "ancestral"  # fresh noise by the size of the step, or always eta
    adapt: bool = True  # weigh what the prior's networks add by how well they predict hidden lines of the scan itself,
    # where the prior can tell (the shipped one can)
    conditional_mean: float = 0.5  # with ``adapt``, share of the way that the samples are moved, all by as much, from
    # their mean to the prior's own estimate from all measured lines, where the prior can tell; 0: not at all
    calibrate: bool = True  # with ``adapt``, scale the std to the error those hidden lines let expect
    start: Literal["mean", "warm", "noise"] | None = None  # the prior's estimate from the measured lines alone, or
    # CG-SENSE, plus noise of sigma_max, or noise alone; None: "mean" if the prior takes blank lines, else "warm"
    batch: int = 4  # samples that go through the network at once, each with its masks_per_step masks if in parallel

    name: ClassVar[str] = "msm"
    reference: ClassVar[str] = REFERENCE
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {"data_weight": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)}

    def __post_init__(self) -> None:
        for field in ("samples", "steps", "masks_per_step", "iterations", "batch"):
            if getattr(self, field) < 1:
                raise InputError(f"msm cannot use {field}={getattr(self, field)}", mend="give 1 or more")
        for field, known in CHOICES.items():
            if getattr(self, field) not in known and not (field == "start" and self.start is None):
                raise InputError(f"msm: unknown {field} '{getattr(self, field)}'", mend=f"one of {', '.join(known)}")
        for field in ("eta", "conditional_mean"):
            if not 0 <= getattr(self, field) <= 1:
                raise InputError(f"msm cannot use {field}={getattr(self, field)}", mend="give 0 .. 1")
        lowest = 0 if self.schedule == "vp" else 1e-12
        if not lowest <= self.sigma_min < self.sigma_max:
            raise InputError(
                f"msm cannot use sigma_min={self.sigma_min}, sigma_max={self.sigma_max}",
                mend="give 0 < sigma_min < sigma_max",
            )
        if self.schedule == "karras" and self.sigma_max == float("inf"):
            raise InputError("msm cannot use sigma_max=inf with schedule 'karras'", mend="give a number such as 1.0")
        if self.likelihood == "gradient" and self.data_weight == "noise":
            raise InputError("msm: data_weight 'noise' is for likelihood 'proximal'", mend="give a number such as 2")
        for field in ("data_weight", "signal_std", "relaxation"):
            if isinstance(getattr(self, field), (int, float)) and not getattr(self, field) > 0:
                raise InputError(f"msm cannot use {field}={getattr(self, field)}", mend="give a positive number")
        RandomLines(self.acceleration)

    @classmethod
    def preset(cls, name: str = "default", **changes: Any) -> Self:
        """Make the method called ``name``, one of ``PRESETS``, with the fields in ``changes`` replaced.

        Raises
        ------
        InputError
            If there is no such preset.
        """
        if name not in PRESETS:
            raise InputError(f"msm has no preset '{name}'", mend=f"one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def __call__(self, measurement: Measurement, rng: Rng) -> Reconstruction:
        """Draw ``samples`` images of every slice: (batch, sample, y, x), real ones with colours, in the file's units.

        The result depends on the generator of each slice alone, not on the batch it is in nor on ``batch``.
        """
        begin = time.perf_counter()
        problem = _Problem.of(measurement)
        images, taken = [], 0
        prior = self._partial(problem.values.device)
        judged = self._cross_validate(prior, problem, rng)
        for encoding, step in self._run(problem, rng, judged):
            taken += len(step.state)
            if not step.sigma > 0:
                images.append(encoding.adjoint(step.estimate))
        stack = torch.cat(images).reshape(len(problem.values), self.samples, *images[0].shape[1:])
        own = [one.image for one in judged if one.image is not None]
        if self.conditional_mean > 0 and len(own) == len(problem.values):
            stack = stack + self.conditional_mean * (torch.cat(own)[:, None] - stack.mean(1, keepdim=True))
        first = int(self._start(prior, problem) == "mean")
        details = {
            "NFE": self.masks_per_step * taken // (len(stack) * self.samples) + first,
            "steps": taken // (len(stack) * self.samples),
            "samples": self.samples,
            "seconds": time.perf_counter() - begin,
            "noise_std": (problem.noise * problem.scale).flatten().tolist(),
        }
        unit = (problem.scale * measurement.scale)[:, None]
        expected = None
        if judged and self.calibrate:
            expected = torch.cat([one.error for one in judged]).sqrt() * unit.flatten()
            details["expected_error"] = expected.tolist()
        return Reconstruction(combine_sets(stack * unit), details, expected)

    def iterate(self, measurement: Measurement, rng: Rng) -> Iterator[Step]:
        """Sample as a call does; yield every step, in scaled k-space (sample, coil, ky, kx), for progress and figures.

        What a call does with finished samples, scaling and ``conditional_mean``, is not done here.
        Samples are numbered slice by slice and come ``batch`` at a time, each group down the whole ladder to sigma 0.
        """
        problem = _Problem.of(measurement)
        judged = self._cross_validate(self._partial(problem.values.device), problem, rng)
        for _, step in self._run(problem, rng, judged):
            yield step

    def _cross_validate(self, prior: PartialDenoiser, problem: "_Problem", rng: Rng) -> list[CrossValidation]:
        """Ask the prior how far its networks can be trusted on each slice; nothing if it cannot tell or need not."""
        if len(rng) != len(problem.values):
            raise ValueError(f"{len(problem.values)} slices need as many generators, got {len(rng)}")
        ask = getattr(prior, "cross_validate", None)
        if ask is None or not self.adapt:
            return []
        found = []
        for number, generator in enumerate(rng):
            one = problem.take(torch.tensor([number]))
            with torch.inference_mode():
                asked = (one.values, one.mask, one.encoding, one.noise, *spawn(generator, 1))
                found.append(ask(*asked, centre=one.centre, image=self.conditional_mean > 0))
        return found

    def _start(self, partial: PartialDenoiser, problem: "_Problem") -> str:
        if self.start == "mean" and not problem.part:
            raise InputError("msm: start 'mean' needs data that are a part of a full measurement", mend="use 'noise'")
        return self.start or ("mean" if problem.part and getattr(partial, "keeps_data", False) else "warm")

    def _law(self, partial: PartialDenoiser) -> MaskLaw:
        return self.law or told(partial, "law") or RandomLines(self.acceleration)

    def _ladder(self, partial: PartialDenoiser) -> Tensor:
        if self.schedule == "karras":
            return schedule.karras(self.sigma_max, self.sigma_min, self.steps)
        trained = told(partial, "sigmas")
        sigmas = schedule.vp(self.steps, VPSchedule().sigmas if trained is None else trained)
        sigmas = sigmas[(sigmas <= self.sigma_max) & (sigmas >= self.sigma_min)]
        if len(sigmas) == 0:
            raise InputError("msm: no level of schedule 'vp' is between sigma_min and sigma_max", mend="widen them")
        return sigmas

    def _run(
        self, problem: "_Problem", rng: Rng, judged: list[CrossValidation]
    ) -> Iterator[tuple[LinearOperator, Step]]:
        """Yield every step of every group of samples, with the encoding of the group."""
        n_slices = len(problem.values)
        prior = self._partial(problem.values.device)
        gains = torch.cat([one.gain for one in judged]) if judged else None
        streams = [stream for generator in rng for stream in spawn(generator, self.samples)]
        index = torch.arange(n_slices).repeat_interleave(self.samples)
        for first in range(0, len(streams), self.batch):
            chosen = slice(first, first + self.batch)
            group = problem.take(index[chosen])
            gain = None if gains is None else gains[index[chosen].to(gains.device)]
            partial = _for_one_run(prior, gain, group.centre)
            with torch.inference_mode():  # not around the yield: the caller's own code is not ours to change
                run = self._sample(partial, group, streams[chosen])
                step = next(run, None)
            while step is not None:
                yield group.encoding, step
                with torch.inference_mode():
                    step = next(run, None)

    def _sample(self, partial: PartialDenoiser, problem: "_Problem", rng: Rng) -> Iterator[Step]:
        """Run one group of samples down the ladder."""
        values, measured, encoding, noise = problem.values, problem.mask, problem.encoding, problem.noise
        first = problem.blank()
        batch, shape = len(values), (first.shape[-2], first.shape[-1])
        sigmas = self._ladder(partial)
        weight = self.data_weight if isinstance(self.data_weight, (int, float)) else DATA_WEIGHT[self.likelihood]
        law = self._law(partial)
        repeated = take(encoding, torch.arange(batch).repeat(self.masks_per_step))
        nothing = torch.zeros((), dtype=torch.bool, device=values.device)
        including = self.include_measured and problem.part
        included = measured if including else nothing

        def draw(generator: Generator, known: Mask) -> Tensor:
            if self.covering:
                include = known if including else None
                return covering(law, shape, self.masks_per_step, generator, include=include).to(values.device)
            masks = torch.stack([law.draw(shape, generator) for _ in range(self.masks_per_step)])
            return masks.to(values.device) | (known if including else nothing)

        def fitted(clean: KSpace, weight: float | Tensor, n: int) -> KSpace:
            h = problem.degradation
            return proximal(clean, values, measured, encoding, weight=weight, iterations=n, degradation=h)[0]

        def estimate(step: Step) -> KSpace:
            masks = torch.stack([draw(generator, known) for generator, known in zip(rng, measured, strict=True)], 1)
            sigma = step.sigma.reshape(1, 1, 1, 1)
            if including:
                step = step._replace(state=torch.where(measured, values, step.state))
                sigma = torch.where(included, noise, sigma)
            streams, fresh = (rng if self.eta > 0 else None), torch.where(included, 0.0, self.eta)
            clean = aggregate(
                partial, step, masks, encoding, sigma, self.aggregate, rng=streams, eta=fresh, repeated=repeated
            )
            if self.project and self.likelihood != "proximal":
                clean = project(clean, encoding)
            if self.likelihood == "gradient":  # what no mask reached was corrected when it was estimated
                mended = gradient_step(clean, values, problem.operator, weight)
                return torch.where(masks.any(0), mended, clean)
            if self.likelihood == "proximal":
                mu: float | Tensor = 1 / weight
                if self.data_weight == "noise":
                    mu = (noise / step.sigma).square() + (noise / self.signal_std).square()
                elif self.data_weight is None and including:
                    mu = (noise / ESTIMATE_ERROR).square().clamp_min(1 / weight)
                found = fitted(clean, mu, self.iterations)
                return found if self.relaxation == 1 else clean + self.relaxation * (found - clean)
            return clean

        start = self._start(partial, problem)
        if start == "mean":  # all unmeasured lines blank: at this noise a line says nothing
            first = partial(values, torch.ones_like(measured), encoding, torch.where(measured, noise, BLANK))
        elif start == "warm":  # CG-SENSE
            first = fitted(first, 3e-3, 30)
        eta = schedule.ancestral(sigmas, self.eta) if self.renewal == "ancestral" else self.eta
        begin = first + float(sigmas[0]) * normal_like(first, rng)
        yield from reverse_diffusion(estimate, begin, sigmas, rng=rng, eta=eta, first_estimate=first)


def _for_one_run(prior: PartialDenoiser, gain: Tensor | None, centre: Tensor) -> PartialDenoiser:
    """Give the prior for one run of sampling; one that can lets each estimate begin where the last one ended."""
    follow = getattr(prior, "following", None)
    if follow is not None:
        return follow(gain, centre)
    return prior if gain is None else _Gained(prior, gain)


@dataclass(frozen=True)
class _Gained:
    """A prior whose networks count by ``gain`` (batch, 1, 1, 1), also for several masks of the batch in a row."""

    prior: Any
    gain: Tensor

    @property
    def keeps_data(self) -> bool:
        return getattr(self.prior, "keeps_data", False)

    @property
    def law(self) -> MaskLaw | None:
        return getattr(self.prior, "law", None)

    def __call__(self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma) -> KSpace:
        gain = self.gain.repeat(len(state) // len(self.gain), 1, 1, 1)
        return self.prior(state, mask, encoding, sigma, gain)


CHOICES: Mapping[str, tuple[str, ...]] = {
    "schedule": ("karras", "vp"),
    "aggregate": ("parallel", "sequential"),
    "likelihood": ("proximal", "gradient", "none"),
    "renewal": ("ancestral", "constant"),
    "start": ("mean", "warm", "noise"),
}


@dataclass(frozen=True)
class _Problem:
    """What sampling needs of a measurement, in scaled units, nothing outside the mask left in it."""

    values: KSpace
    mask: Mask  # one a slice
    encoding: LinearOperator  # from images to full measurements, which are diffused
    degradation: LinearOperator  # from those to what values and mask are of; the identity if that is the same
    noise: Tensor  # std of each real component of measured values, (batch, 1, 1, 1)
    scale: Tensor  # (batch, 1, 1, 1)

    @classmethod
    def of(cls, measurement: Measurement) -> "_Problem":
        """Scale a measurement by what it tells of its brightness and find its noise."""
        if measurement.encoding is None:
            where = measurement.source[0] if measurement.source else None
            raise InputError("msm needs coil maps", mend="estimate them first (ESPIRiT)", path=where)
        mask = measurement.mask.expand(len(measurement.values), *measurement.mask.shape[1:])
        values = Subsample(mask)(measurement.values)
        scale = replace(measurement, values=values, mask=mask).working_scale()
        values = values / scale
        if not bool(torch.isfinite(values.abs()).all()):
            where = measurement.source[0] if measurement.source else None
            raise InputError("k-space holds NaN or infinite values, or nothing at all", path=where)
        noise = torch.as_tensor(measurement.noise_std, dtype=scale.dtype, device=scale.device)
        noise = noise.reshape(-1, 1, 1, 1) / scale
        if measurement.full_scale is None and not bool((noise > 0).all()):  # as k-space tells its noise
            noise = torch.where(noise > 0, noise, estimate_noise_std(values, mask).reshape(-1, 1, 1, 1))
        degradation, encoding = measurement.encoding.factored()
        return cls(values, mask, encoding, degradation, noise.clamp_min(NOISE_FLOOR), scale)

    @property
    def part(self) -> bool:
        """Whether the data are a part of what is diffused."""
        return isinstance(self.degradation, Identity)

    @cached_property
    def operator(self) -> LinearOperator:
        """From full measurements to data."""
        return selected(self.mask, self.degradation)

    @cached_property
    def centre(self) -> Tensor:
        """Number of lines in the fully sampled centre of k-space, which maps come from; (batch, 1, 1, 1)."""
        shape = (self.values.shape[-2], self.values.shape[-1])
        lines = [float(min(calibration_region(mask[None], shape))) for mask in self.mask] if self.part else [0.0]
        return self.scale.new_tensor(lines).expand(len(self.mask)).reshape(-1, 1, 1, 1)

    def blank(self) -> KSpace:
        """Give full measurements of zeros."""
        if self.part:
            return torch.zeros_like(self.values)
        return torch.zeros_like(self.degradation.adjoint(self.values))

    def take(self, index: Tensor) -> "_Problem":
        """Give the slices at ``index``, in that order."""
        on_device = index.to(self.values.device)
        return _Problem(
            self.values[on_device],
            self.mask[on_device],
            take(self.encoding, index),
            take(self.degradation, index),
            self.noise[on_device],
            self.scale[on_device],
        )
