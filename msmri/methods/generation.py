"""Unconditional generation: images drawn from a prior that only ever saw undersampled measurements."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Generator, Tensor

from msmri.errors import InputError
from msmri.methods import FromPrior, told
from msmri.model.denoiser import Denoiser, VPSchedule
from msmri.physics.masks import MaskLaw, RandomLines, blind_spots, covering
from msmri.physics.operators import LinearOperator
from msmri.sampling import schedule
from msmri.sampling.aggregate import PartialDenoiser, aggregate, take
from msmri.sampling.reverse import Step, reverse_diffusion
from msmri.tensors import Image, KSpace, Rng, normal_like

HIGHEST = 10.0  # the noise, in scaled units, at which the training of msmri's own priors ends
LOWEST = 0.01
PAPER: Mapping[str, Any] = {
    "steps": 200,
    "masks_per_step": 3,
    "covering": False,
    "aggregate": "parallel",
    "eta": 1.0,
    "renewal": "constant",
    "schedule": "vp",
}
PRESETS: Mapping[str, Mapping[str, Any]] = {"default": {}, "paper": PAPER}
CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "schedule": (None, "karras", "vp"),
    "aggregate": ("parallel", "sequential"),
    "renewal": ("ancestral", "constant"),
}


@dataclass(frozen=True)
class Generation(FromPrior):
    """Draw images from the law that a partial denoiser has learned. Park et al. 2025, Algorithm 1.

    The diffusion runs in the space of full measurements, from pure noise: all lines carry the same noise at every
    step, and the denoiser is told so. Nothing is measured, so that everything is in the prior's own scaled units.
    """

    prior: str | Path | PartialDenoiser | Denoiser | None = None  # weights file or a denoiser; None: the shipped prior
    # to draw from
    steps: int = 50  # noise levels
    masks_per_step: int = 3  # w: network passes a step, each on a mask of its own; one where all masks show everything
    law: MaskLaw | None = None  # of the masks; None: that which the prior tells, of the masks trained on, else random
    # lines at R = 4
    covering: bool = True  # deal the masks of a step so that they reach most lines together; False: independent
    aggregate: Literal["parallel", "sequential"] = "parallel"  # how the masks of a step are run
    extrapolate: float = 0.0  # g: how far estimates are carried beyond those of their masks' halves, at three times the
    # passes; 0 as in the paper. At 4 drawn brains were harsh
    eta: float = 1.0  # share of fresh noise a step, 0 .. 1; 0 is deterministic but for the masks
    renewal: Literal["ancestral", "constant"] = "ancestral"  # fresh noise by the size of the step, or always eta
    schedule: Literal["karras", "vp"] | None = None  # EDM's ladder (rho 7), or every n-th of the levels trained on;
    # None: "vp" for networks that have such levels, as the published ones, else "karras"
    sigma_max: float | None = None  # highest noise level; None: that which the prior tells, else 10, for "vp" the
    # highest of the ladder
    sigma_min: float | None = None  # lowest noise level before 0; None: 0.01, for "vp" the lowest of the ladder
    batch: int = 4  # samples that go through the network at once, each with its masks_per_step masks if in parallel

    name: ClassVar[str] = "msm"
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("steps", "masks_per_step", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"generation cannot use {name}={getattr(self, name)}", mend="give 1 or more")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                options = ", ".join(option for option in known if option)
                raise InputError(f"generation: unknown {name} '{getattr(self, name)}'", mend=f"one of {options}")
        if not 0 <= self.eta <= 1:
            raise InputError(f"generation cannot use eta={self.eta}", mend="give 0 .. 1")
        if not 0 <= self.extrapolate < float("inf"):
            raise InputError(f"generation cannot use extrapolate={self.extrapolate}", mend="give 0 or more")
        low = LOWEST if self.sigma_min is None else self.sigma_min
        high = HIGHEST if self.sigma_max is None else self.sigma_max
        if not 0 < low < high < float("inf"):
            raise InputError(
                f"generation cannot use sigma_min={low}, sigma_max={high}", mend="give 0 < sigma_min < sigma_max"
            )

    @classmethod
    def preset(cls, name: str = "default", **changes: Any) -> Self:
        """Make the settings called ``name``, "default" or "paper" (the released code's), with ``changes`` on top.

        Raises
        ------
        InputError
            If there is no such preset.
        """
        if name not in PRESETS:
            raise InputError(f"generation has no preset '{name}'", mend=f"one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def __call__(
        self,
        encoding: LinearOperator,
        shape: tuple[int, int, int],
        rng: Rng,
        *,
        dtype: torch.dtype = torch.complex64,
        device: str | torch.device = "cpu",
    ) -> Image:
        """Draw one image a generator: (len(rng), set, y, x) in scaled units; arguments as in :meth:`iterate`.

        A sample depends on its own generator alone, not on the others nor on ``batch``.
        """
        groups = self._run(encoding, shape, rng, dtype, torch.device(device))
        return torch.cat([encoding.adjoint(step.estimate) for encoding, step in groups if not step.sigma > 0])

    def iterate(
        self,
        encoding: LinearOperator,
        shape: tuple[int, int, int],
        rng: Rng,
        *,
        dtype: torch.dtype = torch.complex64,
        device: str | torch.device = "cpu",
    ) -> Iterator[Step]:
        """Yield every step, in the space of measurements, for progress and figures; the last estimates are the result.

        Samples come ``batch`` at a time, each group down the whole ladder to sigma 0.

        Parameters
        ----------
        encoding
            From images to full measurements: coils and their Fourier transform, the same for all samples or one a
            sample, or the identity where images themselves are diffused.
        shape
            Of one image: (set or colour, y, x).
        rng
            One generator a sample.
        dtype
            Of the images and measurements, complex or real.
        device
            Where the encoding is and the prior is to be.

        Raises
        ------
        InputError
            If the law of masks never reaches some place, of which nothing could be said.
        """
        for _, step in self._run(encoding, shape, rng, dtype, torch.device(device)):
            yield step

    def _run(
        self, encoding: LinearOperator, shape: tuple[int, int, int], rng: Rng, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[LinearOperator, Step]]:
        """Yield every step of every group of samples, with the encoding of the group."""
        matrix = (shape[-2], shape[-1])
        partial = self._partial(device)
        law = self.law_of(partial)
        if count := int(blind_spots(law, matrix).sum()):
            raise InputError(
                f"mask law {law.name} never reaches {count} places of a {matrix[0]} x {matrix[1]} matrix",
                mend="use one that does, such as random-lines",
            )
        for first in range(0, len(rng), self.batch):
            streams = rng[first : first + self.batch]
            chosen = take(encoding, torch.arange(first, first + len(streams)))
            blank = torch.zeros(len(streams), *shape, dtype=dtype, device=device)
            for step in self._sample(partial, chosen, blank, streams):
                yield chosen, step

    @torch.inference_mode()  # holds inside the generator alone, not for the caller's code between two steps
    def _sample(self, partial: PartialDenoiser, encoding: LinearOperator, blank: Image, rng: Rng) -> Iterator[Step]:
        """Run one group of samples down the ladder."""
        start = torch.zeros_like(encoding(blank))
        matrix, device = (start.shape[-2], start.shape[-1]), start.device
        sigmas, law = self.ladder(partial), self.law_of(partial)
        w, g = self.passes(law, matrix), (0.0 if _shows_all(law, matrix) else self.extrapolate)
        repeated = take(encoding, torch.arange(len(start)).repeat(w))

        def draw(generator: Generator) -> Tensor:
            if self.covering:
                return covering(law, matrix, w, generator).to(device)
            return torch.stack([law.draw(matrix, generator) for _ in range(w)]).to(device)

        def halve(masks: Tensor) -> Tensor:
            split = [
                torch.stack([law.halve(mask, matrix, generator) for mask in own], 1)
                for own, generator in zip(masks.unbind(1), rng, strict=True)
            ]
            return torch.stack(split, 2)  # (2, w, batch, ...)

        def estimate(step: Step) -> KSpace:
            masks = torch.stack([draw(generator) for generator in rng], 1)
            sigma = step.sigma.reshape(1, 1, 1, 1)
            streams = rng if self.eta > 0 else None
            halves = halve(masks) if g else None
            return aggregate(
                partial, step, masks, encoding, sigma, self.aggregate,
                rng=streams, eta=self.eta, repeated=repeated, halves=halves, extrapolate=g,
            )  # fmt: skip

        eta = schedule.ancestral(sigmas, self.eta) if self.renewal == "ancestral" else self.eta
        begin = float(sigmas[0]) * normal_like(start, rng)
        yield from reverse_diffusion(estimate, begin, sigmas, rng=rng, eta=eta)

    def law_of(self, partial: PartialDenoiser | None = None) -> MaskLaw:
        """Give the law of the masks for a prior, by default this one's own."""
        prior: Any = self._partial(torch.device("cpu")) if partial is None else partial
        return self.law or told(prior, "law") or RandomLines(4.0)

    def passes(self, law: MaskLaw, matrix: tuple[int, int]) -> int:
        """Give the number of masks of a step: in parallel, those that show everything all say the same."""
        return 1 if self.aggregate == "parallel" and _shows_all(law, matrix) else self.masks_per_step

    def ladder(self, partial: PartialDenoiser | None = None) -> Tensor:
        """Give the noise levels for a prior, by default this one's own: falling, without the final 0."""
        prior: Any = self._partial(torch.device("cpu")) if partial is None else partial
        trained = told(prior, "sigmas")
        if (self.schedule or ("karras" if trained is None else "vp")) == "karras":
            high = (told(prior, "highest") or HIGHEST) if self.sigma_max is None else self.sigma_max
            return schedule.karras(high, LOWEST if self.sigma_min is None else self.sigma_min, self.steps)
        sigmas = schedule.vp(self.steps, VPSchedule().sigmas if trained is None else trained)
        if self.sigma_max is not None:
            sigmas = sigmas[sigmas <= self.sigma_max]
        if self.sigma_min is not None:
            sigmas = sigmas[sigmas >= self.sigma_min]
        if len(sigmas) == 0:
            raise InputError("generation: no level of schedule 'vp' is between sigma_min and sigma_max", mend="widen")
        return sigmas


def _shows_all(law: MaskLaw, matrix: tuple[int, int]) -> bool:
    """Tell whether every mask of a law holds every place."""
    return bool((law.inclusion_probability(matrix) >= 1).all())
