"""Image quality against a reference: NMSE, PSNR and SSIM with fastMRI's conventions, on magnitude images.

Every function takes ``(target, image)``, arrays or tensors of one slice (y, x) or of a volume (slices, y, x) in the
same units, and returns a float. The data range of PSNR and SSIM is the maximum of what is passed as the target:
pass volumes to get fastMRI's numbers.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from msmri.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    Array = Tensor | np.ndarray

CONVENTIONS = {
    "mse": "mean of squared differences, in squared image units",
    "nmse": "||image - target||^2 / ||target||^2 over the whole volume",
    "psnr": "scikit-image, in dB, data_range = max of the target volume",
    "ssim": "scikit-image, mean over slices, 7x7 uniform window, sample covariance, K1 = 0.01, K2 = 0.03, "
    "data_range = max of the target volume",
}
LOWER_IS_BETTER = frozenset({"mse", "nmse"})
WINDOW = 7  # pixels a side, scikit-image's default


def mse(target: "Array", image: "Array") -> float:
    """Mean squared error, in squared image units."""
    reference, estimate = _pair(target, image)
    return float(((reference - estimate) ** 2).mean())


def nmse(target: "Array", image: "Array") -> float:
    """Squared error over the energy of the target.

    Raises
    ------
    InputError
        If the target is zero everywhere.
    """
    import numpy as np

    reference, estimate = _pair(target, image)
    energy = np.linalg.norm(reference) ** 2
    if not energy > 0:
        raise InputError("the target is zero everywhere", mend="NMSE needs a target with signal")
    return float(np.linalg.norm(reference - estimate) ** 2 / energy)


def object_region(target: "Array", share: float = 0.1) -> "np.ndarray":
    """Mark where the mean of the target over SSIM's 7 x 7 window exceeds ``share`` of its maximum.

    Outside, a root-sum-of-squares target is the noise floor of its coils, which no denoised image has: over the whole
    field of view, metrics reward methods that leave as much noise in the background as the target holds.

    Parameters
    ----------
    target
        Magnitude, (y, x) or (slices, y, x); the maximum is that of all slices.

    Returns
    -------
    np.ndarray
        Of bools, shaped like the target.
    """
    from scipy.ndimage import uniform_filter

    reference, _ = _pair(target, target)
    mean = uniform_filter(reference.astype("float64"), size=WINDOW, axes=(-2, -1))
    return mean > share * _peak(reference, None)


def psnr(
    target: "Array", image: "Array", *, data_range: float | None = None, where: "np.ndarray | None" = None
) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images.

    Parameters
    ----------
    target, image
        Magnitude, (y, x) or (slices, y, x).
    data_range
        The peak; the maximum of the target without one.
    where
        Bools shaped like the target: only these pixels count (see :func:`object_region`).
    """
    import numpy as np
    from skimage.metrics import peak_signal_noise_ratio

    reference, estimate = _pair(target, image)
    peak = _peak(reference, data_range)
    if where is not None:
        where = _region(where, reference)
        reference, estimate = reference[where], estimate[where]
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(reference, estimate, data_range=peak))


def ssim(
    target: "Array", image: "Array", *, data_range: float | None = None, where: "np.ndarray | None" = None
) -> float:
    """Structural similarity, mean over slices (7x7 uniform window). Wang et al. 2004.

    Parameters
    ----------
    target, image
        Magnitude, (y, x) or (slices, y, x), at least 7 pixels along y and x.
    data_range
        Dynamic range; the maximum of the target (all slices together) without one.
    where
        Bools shaped like the target: only windows around these pixels count, all alike (see :func:`object_region`).
    """
    import numpy as np
    from skimage.metrics import structural_similarity

    reference, estimate = _pair(target, image)
    if min(reference.shape[-2:]) < WINDOW:
        raise InputError(f"images of {reference.shape[-2:]} are smaller than the {WINDOW}x{WINDOW} window of SSIM")
    peak = _peak(reference, data_range)
    shape = (-1, *reference.shape[-2:])
    slices = zip(reference.reshape(shape), estimate.reshape(shape), strict=True)
    if where is None:
        values = [structural_similarity(a, b, data_range=peak) for a, b in slices]
        return float(sum(values) / len(values))
    edge = WINDOW // 2  # where windows would leave the image
    inner = (slice(None), slice(edge, shape[-2] - edge), slice(edge, shape[-1] - edge))
    maps = np.stack([structural_similarity(a, b, data_range=peak, full=True)[1] for a, b in slices])
    counted = _region(where, reference).reshape(shape)[inner]
    if not counted.any():
        raise InputError(f"no whole {WINDOW}x{WINDOW} window lies around the pixels that count")
    return float(maps[inner][counted].mean())


def evaluate(target: "Array", image: "Array", *, data_range: float | None = None) -> dict[str, float]:
    """Compute all metrics: ``{"nmse": ..., "psnr": ..., "ssim": ..., "mse": ...}``."""
    return {
        "nmse": nmse(target, image),
        "psnr": psnr(target, image, data_range=data_range),
        "ssim": ssim(target, image, data_range=data_range),
        "mse": mse(target, image),
    }


def scored(target: "Array", image: "Array", *, data_range: float | None = None) -> dict[str, Any]:
    """Compute all metrics together with what makes them comparable: the data range used and each one's convention."""
    conventions = dict(CONVENTIONS)
    if data_range is not None:
        for name in ("psnr", "ssim"):
            conventions[name] = conventions[name].replace("data_range = max of the target volume", "data_range given")
    peak = float(_peak(_pair(target, image)[0], data_range))
    return {**evaluate(target, image, data_range=data_range), "data_range": peak, "conventions": conventions}


def bootstrap_interval(
    values: Sequence[float], rng: Generator, *, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float, float]:
    """Mean of ``values`` (one a slice or a patient) with its percentile bootstrap interval. Efron 1979.

    Parameters
    ----------
    values
        Independent values; slices of one person are not.
    rng
        The generator that draws the resamples.
    level
        Coverage of the interval.
    resamples
        Number of resampled means.

    Returns
    -------
    tuple
        Mean, lower end, upper end. A single value has no interval: both ends are NaN.
    """
    sample = torch.as_tensor(values, dtype=torch.float64)
    if sample.ndim != 1 or len(sample) == 0 or not bool(torch.isfinite(sample).all()):
        raise InputError("a bootstrap interval needs a non-empty list of finite values")
    if not 0 < level < 1:
        raise InputError(f"the level of an interval lies between 0 and 1, not at {level}")
    if len(sample) == 1:
        return float(sample[0]), float("nan"), float("nan")
    picks = torch.randint(len(sample), (resamples, len(sample)), generator=rng)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(sample[picks].mean(1), tails)
    return float(sample.mean()), float(low), float(high)


METRICS: dict[str, Callable[["Array", "Array"], float]] = {"nmse": nmse, "psnr": psnr, "ssim": ssim, "mse": mse}


def _pair(target: "Array", image: "Array") -> "tuple[np.ndarray, np.ndarray]":
    """Check two magnitude images and return them as floating-point arrays, in their own precision."""
    import numpy as np

    arrays = []
    for name, values in (("target", target), ("image", image)):
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if np.iscomplexobj(array):
            raise InputError(f"the {name} is complex", mend="metrics compare magnitudes: take the absolute value")
        if array.dtype not in (np.float32, np.float64):
            array = array.astype(np.float64)  # differences of integers would wrap, half precision would overflow
        if not np.isfinite(array).all():
            raise InputError(f"the {name} holds NaN or infinite values")
        arrays.append(array)
    reference, estimate = arrays
    if reference.shape != estimate.shape:
        raise InputError(
            f"target {reference.shape} and image {estimate.shape} differ in shape", mend="crop one of them"
        )
    if reference.ndim not in (2, 3) or reference.size == 0:
        raise InputError(f"metrics take (y, x) or (slices, y, x), not {reference.shape}")
    return reference, estimate


def _region(where: "np.ndarray", reference: "np.ndarray") -> "np.ndarray":
    """Check the pixels that count."""
    if where.dtype != bool or where.shape != reference.shape or not where.any():
        raise InputError(f"the pixels that count are {where.dtype} {where.shape}", mend="mark some by bools")
    return where


def _peak(reference: "np.ndarray", data_range: float | None) -> float:
    """Give the data range in the precision of the reference, as fastMRI does."""
    peak = reference.max() if data_range is None else data_range
    if not 0 < peak < float("inf"):
        raise InputError(f"the data range is {peak}", mend="PSNR and SSIM need a target with signal")
    return peak
