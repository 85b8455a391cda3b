"""What diagnostics look at: scans as they are, people simulated from their images, and the prior."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from msmri.errors import InputError
from msmri.io.fastmri import open_scan
from msmri.io.kspace import centre_crop, undersample
from msmri.measurement import Measurement
from msmri.methods import FromPrior
from msmri.model.prior import shipped_prior
from msmri.physics.coils import estimate_noise_std, root_sum_of_squares
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.masks import MaskLaw, RandomLines, slice_seed
from msmri.physics.operators import CoilFourier
from msmri.physics.simulate import coil_maps, phantom, simulate_kspace
from msmri.sampling.aggregate import PartialDenoiser

DEMO = "demo_brain.h5"  # in msmri/data: simulated
WHITE = 0.99  # quantile of a simulated person's image that becomes 1


def demo_scan() -> Path:
    """Give the path of the scan that comes with the package, a simulated brain."""
    return Path(str(files("msmri") / "data" / DEMO))


@dataclass(frozen=True)
class Subject(FromPrior):
    """What is examined: scans, a prior, and the law of masks."""

    scans: Sequence[Path] = ()  # files of fastMRI's layout; the demo scan without any
    prior: Any = None  # weights file, or a denoiser; None: the shipped one
    # of the masks that the scans are undersampled with, and of those that sample
    law: MaskLaw = field(default_factory=lambda: RandomLines(4.0))
    matrix: tuple[int, int] = (256, 256)  # (ky, kx) that the law itself is looked at on
    seed: int = 0
    device: str = "cpu"

    @property
    def files(self) -> tuple[Path, ...]:
        """The scans, or the demo scan."""
        return tuple(self.scans) or (demo_scan(),)

    @property
    def weights(self) -> Path | None:
        """The file of the prior; None for a denoiser given as it is."""
        if self.prior is None:
            return shipped_prior()
        return Path(self.prior) if isinstance(self.prior, str | Path) else None

    @cached_property
    def partial(self) -> PartialDenoiser:
        """The prior as a partial denoiser, loaded once."""
        return self._partial(torch.device(self.device))

    def rng(self, name: str) -> Generator:
        """Start a generator that depends on the seed and a name alone."""
        return Generator().manual_seed(slice_seed(name, self.seed))

    def magnitudes(self, n: int) -> list[tuple[str, Tensor]]:
        """Take ``n`` slices, file by file, middle ones first: name and clean magnitude image (y, x) of each.

        The noise floor of the root-sum-of-squares image is taken off.

        Raises
        ------
        InputError
            If a scan is undersampled.
        """
        found: list[tuple[str, Tensor]] = []
        for turn in range(n):
            path, place = self.files[turn % len(self.files)], turn // len(self.files)
            with open_scan(path) as scan:
                order = sorted(range(scan.n_slices), key=lambda k: abs(k - scan.n_slices // 2))
                slice_ = scan.read(order[place % len(order)])
            if scan_undersampled(slice_.mask):
                raise InputError("is undersampled, so no person can be simulated from it", mend="give a full one",
                                 path=path)  # fmt: skip
            power = root_sum_of_squares(ifft2c(slice_.values))[0].square()
            noise = estimate_noise_std(slice_.values, slice_.mask)[0]
            clean = (power - 2 * slice_.values.shape[1] * noise.square()).clamp_min(0).sqrt()
            found.append((slice_.source[0], clean))
        return found

    def people(self, n: int, size: int, *, coils: int = 6, noise_std: float = 0.0) -> list[Measurement]:
        """Simulate ``n`` fully sampled people from the scans' images, with coils and phase of their own.

        The image is widened to a square and brought to ``size`` x ``size`` pixels by its k-space: a finer matrix than
        the scan's holds nothing that the scan did not. The maps are known, the target is exact, the brightness 1.

        Parameters
        ----------
        noise_std
            Of each real component of k-space, the 99th percentile of the image being 1.
        """
        found = []
        for turn, (name, image) in enumerate(self.magnitudes(n)):
            side = max(image.shape)
            fine = resample(centre_crop(image, (side, side)), size)
            found.append(self._simulate(fine, f"{name}/{turn}", coils, noise_std))
        return found

    def phantom(self, size: int, *, coils: int = 6, noise_std: float = 0.0) -> Measurement:
        """Simulate a head of ellipses, sharp at any size: the same ellipses and coils whatever the size."""
        image = phantom((size, size), self.rng("phantom"))
        return self._simulate(image, "phantom", coils, noise_std)

    def _simulate(self, image: Tensor, name: str, coils: int, noise_std: float) -> Measurement:
        shape = (image.shape[-2], image.shape[-1])
        rng = self.rng(name)
        target = image[None] / torch.quantile(image.flatten(), WHITE).clamp_min(1e-12)
        maps = coil_maps(shape, coils, rng)
        values, _ = simulate_kspace(target, maps, rng, noise_std=noise_std)
        mask = torch.ones(1, 1, 1, shape[1], dtype=torch.bool)
        made = Measurement(values, mask, CoilFourier(maps), noise_std=noise_std, source=(name,), target=target)
        return to(made, self.device)

    def measure(self, person: Measurement, *, law: MaskLaw | None = None) -> Measurement:
        """Undersample a person with the one mask that belongs to it."""
        law = self.law if law is None else law
        mask = law.draw((person.values.shape[-2], person.values.shape[-1]), self.rng(f"mask of {person.source[0]}"))
        return undersample(person, mask[None])


def scan_undersampled(mask: Tensor) -> bool:
    """Tell whether something between the first and last measured column is missing."""
    columns = mask.flatten(0, -3).all(0)
    lines = columns.any(0).nonzero().flatten()
    return not len(lines) or not bool(columns[:, int(lines[0]) : int(lines[-1]) + 1].all())


def resample(image: Tensor, size: int) -> Tensor:
    """Bring a magnitude image (y, x) to ``size`` x ``size`` by cropping or widening its k-space; brightness stays."""
    source = fft2c(image.to(torch.complex64))
    kept = [min(size, n) for n in image.shape]
    kspace = torch.zeros(size, size, dtype=torch.complex64)
    into, out = (
        tuple(slice(n // 2 - k // 2, n // 2 - k // 2 + k) for n, k in zip(whole, kept))
        for whole in ((size, size), image.shape)
    )
    kspace[into] = source[out]
    return (ifft2c(kspace).real * (size / image.numel() ** 0.5)).clamp_min(0)


def to(measurement: Measurement, device: str) -> Measurement:
    """Move a measurement to a device."""
    if device == "cpu":
        return measurement
    encoding = measurement.encoding
    moved = replace(encoding, maps=encoding.maps.to(device)) if isinstance(encoding, CoilFourier) else encoding
    return replace(measurement, values=measurement.values.to(device), mask=measurement.mask.to(device), encoding=moved)


def scaled(measurement: Measurement) -> Measurement:
    """Bring a measurement into the units of priors; the target follows."""
    scale = measurement.working_scale()
    target = None if measurement.target is None else measurement.target / scale[:, 0].cpu()
    return replace(measurement.scaled(scale), target=target, scale=torch.ones_like(scale))


def inside(target: Tensor, *, share: float = 0.1) -> Tensor:
    """Mark the pixels (y, x) of an object: brighter than a share of its white."""
    return target > share * torch.quantile(target.flatten(), WHITE)
