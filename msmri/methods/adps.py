"""Ambient diffusion posterior sampling (A-DPS, A-ALD, A-OS), and DPS, DDNM, DiffPIR with a prior of clean images.

The first three see undersampled training data only and are the rivals of MSM; the others bound them from above. All of
them divide what was measured by ``measurement.working_scale()``; their noise levels and steps are in those units.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.measurement import Measurement, Reconstruction
from msmri.methods import combine_sets
from msmri.methods.references import AALI, CHUNG, JALAL, WANG, ZHU
from msmri.model.ambient import AmbientDenoiser, FurtherLines, FurtherMask
from msmri.model.denoiser import Denoiser
from msmri.physics.coils import estimate_noise_std
from msmri.physics.masks import MaskLaw, RandomLines
from msmri.physics.operators import Identity, LinearOperator, Subsample, selected
from msmri.physics.solve import conjugate_gradient
from msmri.sampling import schedule
from msmri.sampling.aggregate import take
from msmri.sampling.guided import guided_euler
from msmri.sampling.likelihood import proximal
from msmri.sampling.reverse import Step, reverse_diffusion
from msmri.tensors import Image, KSpace, Mask, Rng, Sigma, normal_like, spawn

AMBIENT, ORACLE = "adps_r4.safetensors", "oracle.safetensors"  # in msmri/weights
HIGHEST = 10.0  # noise level from which samplers begin where nobody tells another one
TRAINED = 1.75  # times the spread of the logarithm of the levels trained on: 96 % of them are below
FEW = FurtherLines(12.0)  # a line or two of a scan
NOISE_FLOOR = 1e-3  # least std of measured k-space, in scaled units


class AmbientEstimator(Protocol):
    """What ambient diffusion learns, such as :class:`msmri.model.ambient.AmbientDenoiser`."""

    def __call__(self, aliased: Image, mask: Mask, sigma: Sigma | float, encoding: LinearOperator) -> Image:
        """Estimate E[x0 | A~^H A~ (x0 + sigma n), A~], A~ being encoding and mask; images (batch, channel, y, x)."""
        ...


class Slice(NamedTuple):
    """One slice in scaled units, nothing outside the mask left in it; every batch axis is 1 long."""

    values: KSpace
    mask: Mask
    encoding: LinearOperator  # from images to full measurements
    degradation: LinearOperator  # from those to what values and mask are of; the identity if that is the same
    encoded: LinearOperator  # both together
    noise: float  # std of each real component of the measured values
    scale: Tensor  # what images are multiplied by to be in the file's units

    @property
    def operator(self) -> LinearOperator:
        """From images to the data."""
        return Subsample(self.mask) @ self.encoded

    def blank(self) -> Image:
        """Give an image of zeros."""
        return torch.zeros_like(self.operator.adjoint(self.values))


@dataclass(frozen=True)
class _Learned(ABC):
    """A method with weights that goes through a batch slice by slice; subclasses say how with ``_sample``."""

    weights: str | Path | Any | None = None  # file, or what it holds; None: the shipped weights, if there are any

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    shipped: ClassVar[str] = ""  # file in msmri/weights
    recipe: ClassVar[str] = ""  # that trains such weights

    @abstractmethod
    def _sample(self, model: Any, one: Slice, rng: Rng) -> Iterator[Step]:
        """Reconstruct one slice with one generator a sample: images (sample, set, y, x), the last state the result."""

    def _draws(self) -> tuple[int, int]:
        """Give the number of samples of a slice, and how many of them to draw at once."""
        return 1, 1

    def __call__(self, measurement: Measurement, rng: Rng) -> Reconstruction:
        """Reconstruct every slice: (batch, sample, y, x) in the file's units.

        The result depends on the generator of each slice alone, not on the batch it is in.
        """
        begin = time.perf_counter()
        images, taken = [], 0
        for one, step in self._run(measurement, rng):
            taken += len(step.state)
            if not step.sigma > 0:
                images.append(step.state * one.scale)
        stack = torch.cat(images)
        details = {
            "NFE": taken // len(stack),
            "samples": self._draws()[0],
            "seconds": time.perf_counter() - begin,
            **{field: getattr(self, field) for field in self.tunable},
        }
        return Reconstruction(combine_sets(stack.reshape(len(measurement.values), -1, *stack.shape[1:])), details)

    def iterate(self, measurement: Measurement, rng: Rng) -> Iterator[Step]:
        """Do what a call does and yield every step, in scaled units, for progress and figures.

        The samples of a slice come ``batch`` at a time, each group down the whole ladder to sigma 0.
        """
        for _, step in self._run(measurement, rng):
            yield step

    def _run(self, measurement: Measurement, rng: Rng) -> Iterator[tuple[Slice, Step]]:
        n = len(measurement.values)
        if len(rng) != n:
            raise ValueError(f"{n} slices need as many generators, got {len(rng)}")
        samples, together = self._draws()
        model = self._model(measurement.values.device)
        for index, generator in enumerate(rng):
            one = self._slice(measurement, index)
            streams = spawn(generator, samples)
            for first in range(0, samples, together):
                for step in self._sample(model, one, streams[first : first + together]):
                    yield one, step

    def _slice(self, measurement: Measurement, index: int) -> Slice:
        """Take one slice, scaled by its own centre lines, and find its noise."""
        where = measurement.source[index] if index < len(measurement.source) else None
        encoding, row = measurement.encoding, slice(index, index + 1)
        if encoding is None:
            raise InputError(f"{self.name} needs coil maps", mend="estimate them first (ESPIRiT)", path=where)
        if len(measurement.values) > 1:
            encoding = take(encoding, torch.tensor([index]))
        mask = measurement.mask[row] if len(measurement.mask) > 1 else measurement.mask
        values = Subsample(mask)(measurement.values[row])
        units = torch.as_tensor(measurement.scale, device=values.device).expand(len(measurement.values), 1, 1, 1)[row]
        scale = replace(measurement, values=values, mask=mask, scale=units).working_scale()
        values = values / scale
        if not bool(torch.isfinite(values.abs()).all()):
            raise InputError("k-space holds NaN or infinite values, or nothing at all", path=where)
        given = torch.as_tensor(measurement.noise_std).expand(len(measurement.values), 1, 1, 1)[index]
        noise = float(given.cpu() / scale.cpu())
        if noise == 0 and measurement.full_scale is None:  # as k-space tells its noise
            noise = float(estimate_noise_std(values, mask))
        done, full = encoding.factored()
        return Slice(values, mask, full, done, encoding, max(noise, NOISE_FLOOR), scale * units)

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        return {}

    def _model(self, device: torch.device) -> Any:
        """Give the network, loaded once a device."""
        found = self.weights
        if found is not None and not isinstance(found, (str, Path)):
            return found
        if (known := self._loaded.get(str(device))) is not None:
            return known
        from msmri.model.prior import load_prior

        mend = f"train some with recipes/{self.recipe}, or give weights=..."
        path = Path(str(files("msmri") / "weights" / self.shipped)) if found is None else Path(found)
        if found is None and not path.exists():
            raise InputError(f"{self.name} has no weights: none are shipped", mend=mend)
        model = load_prior(path, device=str(device))
        if not isinstance(model, AmbientDenoiser if self.shipped == AMBIENT else Denoiser):
            raise InputError(f"these are not weights for {self.name}", mend=mend, path=path)
        self._loaded[str(device)] = model
        return model


@dataclass(frozen=True)
class _Sampler(_Learned):
    samples: int = 1  # drawn for each slice; their mean is the image, their std the uncertainty
    batch: int = 4  # samples that go through the network at once
    steps: int = 100  # noise levels
    sigma_max: float | None = None  # highest noise level; None: where nearly all levels end that the weights were
    # trained on, if they tell, else 10
    sigma_min: float = 0.004  # lowest noise level before 0

    def __post_init__(self) -> None:
        for field in ("samples", "batch", "steps"):
            if getattr(self, field) < 1:
                raise InputError(f"{self.name} cannot use {field}={getattr(self, field)}", mend="give 1 or more")
        if not 0 < self.sigma_min < (HIGHEST if self.sigma_max is None else self.sigma_max) < float("inf"):
            raise InputError(
                f"{self.name} cannot use sigma_min={self.sigma_min}, sigma_max={self.sigma_max}",
                mend="give 0 < sigma_min < sigma_max",
            )
        for field in self.tunable:
            if not getattr(self, field) > 0:
                raise InputError(
                    f"{self.name} cannot use {field}={getattr(self, field)}", mend="give a positive number"
                )

    def _draws(self) -> tuple[int, int]:
        return self.samples, self.batch

    def _ladder(self, model: Any) -> Tensor:
        """Give the noise levels. Karras et al. 2022, eq. 5, rho 7."""
        highest, told = self.sigma_max, getattr(model, "levels", None)
        if highest is None:
            highest = HIGHEST if told is None else max(math.exp(told[0] + TRAINED * told[1]), 2 * self.sigma_min)
        return schedule.karras(highest, self.sigma_min, self.steps)

    def _noise(self, one: Slice, ladder: Tensor, rng: Rng) -> Image:
        """Draw images of pure noise at the highest level."""
        return float(ladder[0]) * normal_like(one.blank().expand(len(rng), -1, -1, -1), rng)


@dataclass(frozen=True)
class ADPS(_Sampler):
    """Sample with a prior learned from further-masked scans, guided through the network. Aali et al. 2024 (A-DPS).

    The prior sees the current image through a mask P~ of its own kind, drawn once a sample by the law of its training
    whatever the mask of the scan; the likelihood sees it through the mask of the scan. The authors' settings are 500
    steps and ``likelihood_step`` 1 on 384 x 320 images, one sample, and they return the state before the last step.
    """

    likelihood_step: float = 3.0  # l_ss, the step towards the data: to be tuned with the number of steps
    acceleration: float = 4.0  # of the training scans
    law: MaskLaw | None = None  # of the masks of the training data; None: what the weights tell, else random lines of
    # that acceleration
    further: FurtherMask | None = None  # what training took away from them; None: what the weights tell, else
    # ``FurtherLines`` of that acceleration; from the mask of the scan a line or two
    prior_mask: Literal["law", "scan"] | None = None  # where P~ comes from: that law, as published, or the mask of the
    # scan with further lines taken away, so that the network is shown lines that the data tell, which degraded data do
    # not; None: "scan" if the weights tell that training took away any number of lines, else "law"

    name: ClassVar[str] = "a-dps"
    reference: ClassVar[str] = AALI
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {"likelihood_step": (0.3, 1.0, 3.0, 10.0, 30.0)}
    shipped: ClassVar[str] = AMBIENT
    recipe: ClassVar[str] = "adps_small.yaml"
    at: ClassVar[Literal["estimate", "state"]] = "estimate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_mask not in ("law", "scan", None):
            raise InputError(f"{self.name} cannot use prior_mask={self.prior_mask}", mend="'law' or 'scan'")

    def prior_masks(
        self, shape: tuple[int, int], rng: Rng, model: AmbientEstimator | None = None, known: Mask | None = None
    ) -> Mask:
        """Draw P~ for images of ``shape``, one a generator: (sample, 1, 1 or ky, kx); parts of ``known`` if given."""
        law = self.law or getattr(model, "law", None) or RandomLines(self.acceleration)
        trained = FEW if known is not None else getattr(model, "further", None) or FurtherLines(self.acceleration)
        further = self.further or trained
        return torch.stack(
            [further(law.draw(shape, generator) if known is None else known, generator) for generator in rng]
        )

    def _sample(self, model: AmbientEstimator, one: Slice, rng: Rng) -> Iterator[Step]:
        part = isinstance(one.degradation, Identity)
        chosen = self.prior_mask or ("scan" if part and getattr(model, "varied", False) else "law")
        known = one.mask[0] if chosen == "scan" else None
        if known is not None and not part:
            raise InputError(
                f"{self.name}: prior_mask 'scan' needs data that are a part of a full measurement", mend="use 'law'"
            )
        *_, rows, columns = one.encoding(one.blank()).shape
        shown = Subsample(self.prior_masks((rows, columns), rng, model, known).to(one.values.device))
        seen = shown @ one.encoding

        def denoise(noisy: Image, sigma: float) -> Image:
            return model(seen.normal(noisy), shown.mask, sigma, one.encoding)

        ladder = self._ladder(model)
        start = self._noise(one, ladder, rng)
        return guided_euler(denoise, one.values, one.operator, start, ladder, step=self.likelihood_step, at=self.at)


@dataclass(frozen=True)
class AALD(ADPS):
    """A-DPS with the residual at the noisy image, without going back through the network. Aali et al. 2024 (A-ALD)."""

    name: ClassVar[str] = "a-ald"
    reference: ClassVar[str] = f"{AALI}\n{JALAL}"
    at: ClassVar[Literal["estimate", "state"]] = "state"


@dataclass(frozen=True)
class AOS(_Learned):
    """Ask the ambient prior once, at low noise, for the image behind the measured lines. Aali et al. 2024 (A-OS)."""

    sigma: float = 0.003  # noise level the network is told

    name: ClassVar[str] = "a-os"
    reference: ClassVar[str] = AALI
    shipped: ClassVar[str] = AMBIENT
    recipe: ClassVar[str] = "adps_small.yaml"

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise InputError(f"a-os cannot use sigma={self.sigma}", mend="give a positive number")

    def _sample(self, model: AmbientEstimator, one: Slice, rng: Rng) -> Iterator[Step]:
        if not isinstance(one.degradation, Identity):
            raise InputError(f"{self.name} needs data that are a part of a full measurement", mend="use a-dps")
        aliased = one.encoding.adjoint(one.values)
        with torch.no_grad():
            clean = model(aliased, one.mask, self.sigma, one.encoding)
        yield Step(clean, clean, clean.real.new_tensor(0.0))


@dataclass(frozen=True)
class DPS(_Sampler):
    """A-DPS with a prior that was trained on clean images: its upper bound (FS-DPS). Chung et al. 2023."""

    likelihood_step: float = 3.0  # as in A-DPS

    name: ClassVar[str] = "dps"
    reference: ClassVar[str] = CHUNG
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {"likelihood_step": (0.3, 1.0, 3.0, 10.0, 30.0)}
    shipped: ClassVar[str] = ORACLE
    recipe: ClassVar[str] = "oracle_small.yaml"

    def _sample(self, model: Denoiser, one: Slice, rng: Rng) -> Iterator[Step]:
        ladder = self._ladder(model)
        start = self._noise(one, ladder, rng)
        return guided_euler(model.denoise, one.values, one.operator, start, ladder, step=self.likelihood_step)


@dataclass(frozen=True)
class DDNM(_Sampler):
    """Put the data into the range space of every estimate, ``x0 + A^+ (y - A x0)``. Wang et al. 2023.

    With several coils A has no simple pseudo-inverse: conjugate gradients on ``A^H A x = A^H y`` from x0 on change
    nothing in the null space, and stopping them early keeps noise out of what the coils hardly determine.
    """

    iterations: int = 10  # conjugate-gradient steps
    eta: float = 0.85  # share of fresh noise, times what keeps the spread of samples exact

    name: ClassVar[str] = "ddnm"
    reference: ClassVar[str] = WANG
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {"iterations": (1, 2, 3, 5, 10, 20)}
    shipped: ClassVar[str] = ORACLE
    recipe: ClassVar[str] = "oracle_small.yaml"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.iterations >= 1 and 0 <= self.eta <= 1):
            raise InputError(
                f"ddnm cannot use iterations={self.iterations}, eta={self.eta}", mend="give 1 or more, and 0 .. 1"
            )

    def _sample(self, model: Denoiser, one: Slice, rng: Rng) -> Iterator[Step]:
        operator, known = one.operator, selected(one.mask, one.encoded)
        right, inverse = operator.adjoint(one.values), getattr(known, "pseudo_inverse", None)

        def estimate(step: Step) -> Image:
            with torch.no_grad():
                clean = model.denoise(step.state, float(step.sigma))
                if inverse is not None:
                    return clean + inverse(one.values - known(clean))
                each = right.expand_as(clean)
                return conjugate_gradient(operator.normal, each, start=clean, iterations=self.iterations)

        ladder = self._ladder(model)
        shares = schedule.ancestral(ladder, self.eta)
        return reverse_diffusion(estimate, self._noise(one, ladder, rng), ladder, rng=rng, eta=shares)


@dataclass(frozen=True)
class DiffPIR(_Sampler):
    """Put ``argmin ||A x - y||^2 + lambda (noise / sigma)^2 ||x - x0||^2`` in place of x0. Zhu et al. 2023."""

    regularisation: float = 7.0  # lambda
    zeta: float = 0.3  # share of fresh noise in power
    iterations: int = 10  # conjugate-gradient steps

    name: ClassVar[str] = "diffpir"
    reference: ClassVar[str] = ZHU
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {"regularisation": (1.0, 3.0, 7.0, 20.0, 50.0, 150.0)}
    shipped: ClassVar[str] = ORACLE
    recipe: ClassVar[str] = "oracle_small.yaml"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.iterations >= 1 and 0 <= self.zeta <= 1):
            raise InputError(
                f"diffpir cannot use iterations={self.iterations}, zeta={self.zeta}", mend="give 1 or more, and 0 .. 1"
            )

    def _sample(self, model: Denoiser, one: Slice, rng: Rng) -> Iterator[Step]:
        def estimate(step: Step) -> Image:
            sigma = float(step.sigma)
            with torch.no_grad():
                clean = model.denoise(step.state, sigma)
                rho = self.regularisation * (one.noise / sigma) ** 2
                full, data = one.encoding(clean), one.values.expand(len(clean), -1, -1, -1)
                how: Any = {"weight": rho, "iterations": self.iterations, "degradation": one.degradation}
                return proximal(full, data, one.mask, one.encoding, **how)[1]

        ladder = self._ladder(model)
        start = self._noise(one, ladder, rng)
        return reverse_diffusion(estimate, start, ladder, rng=rng, eta=self.zeta**0.5)
