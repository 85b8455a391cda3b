"""Reconstruction methods: their contract, the table of those available, and what the classical ones share."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.measurement import Measurement, Reconstruction
from msmri.physics.operators import CoilFourier, Subsample
from msmri.sampling.aggregate import ImagePartial, PartialDenoiser
from msmri.tensors import Image, Maps, Rng

if TYPE_CHECKING:
    import numpy as np
    from sigpy.linop import Linop

GROUP = "msmri.methods"  # the entry-point group in which other packages announce their methods
BUILT_IN: Mapping[str, str] = {
    "zero-filled": "msmri.methods.zero_filled:ZeroFilled",
    "cg-sense": "msmri.methods.cg_sense:CGSense",
    "l1-wavelet": "msmri.methods.wavelet:L1Wavelet",
    "tv": "msmri.methods.tv:TotalVariation",
    "msm": "msmri.methods.msm:MSM",
    "ssdu": "msmri.methods.ssdu:SSDU",
    "zs-ssdu": "msmri.methods.ssdu:ZeroShotSSDU",
    "a-dps": "msmri.methods.adps:ADPS",
    "a-ald": "msmri.methods.adps:AALD",
    "a-os": "msmri.methods.adps:AOS",
    "dps": "msmri.methods.adps:DPS",
    "ddnm": "msmri.methods.adps:DDNM",
    "diffpir": "msmri.methods.adps:DiffPIR",
    "biharmonic": "msmri.methods.images:Biharmonic",
    "bicubic": "msmri.methods.images:Bicubic",
    "tv-image": "msmri.methods.images:TVImage",
}


class Reconstructor(Protocol):
    """What every method is: a measurement and one generator a slice go in, complex images, or real colours, come out.

    The built-in ones are frozen dataclasses, so that ``dataclasses.replace(method, weight=...)`` makes a variant, with
    three class attributes: ``name``, ``reference`` (a BibTeX entry) and ``tunable``, which maps each field that
    :func:`msmri.methods.tuning.tune` may choose to the grid of values it starts from (empty: nothing to choose).
    A method reads neither ``measurement.target`` nor anything outside ``measurement.mask``.
    """

    def __call__(self, measurement: Measurement, rng: Rng) -> Reconstruction:
        """Reconstruct every slice of the batch: samples (batch, sample, y, x) in the file's units."""
        ...


def available_methods() -> dict[str, EntryPoint]:
    """List every method by name without importing any: the built-in ones, then those of installed packages.

    A package that announces a name already taken is left out with a warning that says so.
    """
    methods = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    for found in entry_points(group=GROUP):
        known = methods.setdefault(found.name, found)
        if known.value != found.value:
            problem = f"method '{found.name}' of {_origin(found)} is left out: {_origin(known)} has one of that name"
            warnings.warn(problem, stacklevel=2)
    return methods


def load_method(name: str, **options: Any) -> Reconstructor:
    """Build the method called ``name`` with the fields given in ``options``.

    Raises
    ------
    InputError
        If there is no such method, if it has no such field, if a field's value is refused, or if the package that
        offers it cannot be imported.
    """
    methods = available_methods()
    if name not in methods:
        raise InputError(f"unknown method '{name}'", mend=f"available: {', '.join(methods)}")
    try:
        build = methods[name].load()
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise InputError(f"method '{name}' of {_origin(methods[name])} cannot be loaded ({cause})") from error
    parameters = inspect.signature(build).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [option for option in options if option not in parameters]
    if unknown and not open_ended:
        fields = ", ".join(parameters) or "none"
        raise InputError(f"method '{name}' has no option '{unknown[0]}'", mend=f"its options: {fields}")
    try:
        return build(**options)
    except TypeError as error:
        raise InputError(f"method '{name}' does not accept these options: {error}") from error


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} ({entry.value})" if entry.dist is not None else f"msmri ({entry.value})"


class FromPrior:
    """What samples with the partial denoiser that its field ``prior`` gives: a file, a denoiser, or the shipped one."""

    prior: Any
    draws: ClassVar[bool] = False  # whether the shipped one is that to draw from

    @cached_property
    def _loaded(self) -> dict[str, PartialDenoiser]:
        return {}

    def _partial(self, device: torch.device) -> PartialDenoiser:
        """Give the prior as a partial denoiser, loaded once a device."""
        found = self.prior
        if found is None or isinstance(found, (str, Path)):
            if (known := self._loaded.get(str(device))) is not None:
                return known
            from msmri.model.prior import load_prior, shipped_prior

            found = load_prior(shipped_prior(draws=self.draws) if found is None else found, device=str(device))
        self._loaded[str(device)] = ImagePartial(found) if hasattr(found, "denoise") else found
        return self._loaded[str(device)]


def told(prior: Any, name: str) -> Any:
    """Read what a prior, or the denoiser in it, tells of its training, such as ``law``; None if nothing."""
    inner = getattr(getattr(prior, "denoiser", prior), name, None)
    return getattr(prior, name, None) if inner is None else inner


def combine_sets(image: Image) -> Tensor:
    """Combine the sets of a soft-SENSE image (..., set, y, x) into one complex image (..., y, x).

    The magnitude is the root of the sum of squares over the sets and the phase is that of the first set (zero where
    the first set is exactly zero), so that one set comes back unchanged. Uecker et al. 2014. The channels of a real
    image are colours and no sets: it comes back as it is, (..., colour, y, x).
    """
    if not image.is_complex():
        return image
    first = image[..., 0, :, :]
    if image.shape[-3] == 1:
        return first
    magnitude = torch.linalg.vector_norm(image, dim=-3)
    return magnitude * torch.where(first == 0, torch.ones_like(first), torch.sgn(first))


def point_estimate(image: Image, measurement: Measurement, **details: Any) -> Reconstruction:
    """Turn an image (batch, set, y, x) in the measurement's units into a one-sample result in the file's units."""
    return Reconstruction(combine_sets(image * measurement.scale)[:, None], details)


def coil_maps(measurement: Measurement) -> Maps:
    """Give the coil maps of a measurement as (batch, set, coil, y, x).

    Raises
    ------
    InputError
        If the measurement has no coil maps: not estimated yet, or not MRI at all.
    """
    if not isinstance(measurement.encoding, CoilFourier):
        where = measurement.source[0] if measurement.source else None
        raise InputError("this method needs coil maps", mend="estimate them first (ESPIRiT)", path=where)
    maps = measurement.encoding.maps
    return maps.reshape(-1, *maps.shape[-4:]).expand(measurement.values.shape[0], *maps.shape[-4:])


def maps_power(maps: Maps) -> Tensor:
    """Largest eigenvalue of ``E^H E`` for each slice of maps (batch, set, coil, y, x): real, shape (batch,).

    As ``E^H E`` couples only the sets of one pixel, it is the largest eigenvalue over pixels of a (set, set) matrix:
    exact, without iterations. It bounds ``E^H S E`` for every mask S, and so gives the step of gradient methods.
    """
    if maps.shape[1] == 1:
        return maps.abs().square().sum(dim=(1, 2)).amax(dim=(1, 2))
    gram = torch.einsum("bscyx,btcyx->byxst", maps.conj(), maps)
    return torch.linalg.eigvalsh(gram)[..., -1].amax(dim=(1, 2))


def solve_slices(measurement: Measurement, solve: "Callable[[Linop, np.ndarray, float], np.ndarray]") -> Image:
    """Reconstruct slice by slice on the CPU with a sigpy solver: image (batch, set, y, x), units of ``values``.

    Each slice is divided by ``max |E^H S y|``, the peak of its zero-filled image, before ``solve`` sees it and
    multiplied by it after. A regularisation weight inside ``solve`` is therefore relative to that peak and does not
    depend on the units of the file.

    Parameters
    ----------
    measurement
        With coil maps; what lies outside the mask is not read.
    solve
        Called with the SENSE operator of one slice as a sigpy Linop, the scaled k-space (coil, ky, kx) and the largest
        eigenvalue of the unmasked normal operator; returns the image in the Linop's shape: (y, x) for one set of maps
        and (set, y, x) for more.

    Raises
    ------
    InputError
        If there are no coil maps or the k-space is not finite.
    """
    maps = coil_maps(measurement)
    values = Subsample(measurement.mask)(measurement.values)
    batch, sets, _, y, x = maps.shape
    mask = measurement.mask.expand(batch, *measurement.mask.shape[-3:])
    peaks = measurement.operator.adjoint(values).abs().amax(dim=(1, 2, 3))
    powers = maps_power(maps)
    images = []
    for i in range(batch):
        peak = peaks[i]
        if not bool(torch.isfinite(peak)):
            where = measurement.source[i] if i < len(measurement.source) else None
            raise InputError("k-space holds NaN or infinite values", mend="mask them out", path=where)
        if not bool(peak > 0):
            images.append(torch.zeros(sets, y, x, dtype=values.dtype))
            continue
        sense = sense_linop(maps[i].cpu().numpy(), mask[i].cpu().numpy())
        image = solve(sense, (values[i] / peak).cpu().numpy(), float(powers[i]))
        images.append(torch.from_numpy(image).to(values.dtype).reshape(sets, y, x) * peak.cpu())
    return torch.stack(images).to(values.device)


def sense_linop(maps: "np.ndarray", mask: "np.ndarray") -> "Linop":
    """Build the SENSE operator of one slice from maps (set, coil, y, x) and a mask (1, 1 or ky, kx) as a sigpy Linop.

    With one set it is ``sigpy.mri.linop.Sense`` itself; with more, the same blocks with a sum over the sets.
    """
    import sigpy.mri

    weights = mask.astype(maps.real.dtype)
    if maps.shape[0] == 1:
        return sigpy.mri.linop.Sense(maps[0], weights=weights)
    sets, coils, y, x = maps.shape
    spread = sigpy.linop.Reshape((sets, 1, y, x), (sets, y, x))
    add = sigpy.linop.Sum((sets, coils, y, x), axes=(0,))
    transform = sigpy.linop.FFT((coils, y, x), axes=(-2, -1))
    select = sigpy.linop.Multiply((coils, y, x), weights)
    return select * transform * add * sigpy.linop.Multiply((sets, 1, y, x), maps) * spread
