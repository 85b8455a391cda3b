"""K-space and masks brought to size: undersampled, cropped, checked."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.physics.fourier import ifft2c
from msmri.physics.operators import Subsample
from msmri.tensors import KSpace, Mask


def undersample(measurement: Measurement, mask: Mask) -> Measurement:
    """Undersample a measurement: keep what both its own mask and ``mask`` (..., 1 or ky, kx) sample.

    The measurement's own mask is False in the margins, so columns that were never acquired do not count as sampled.

    Raises
    ------
    InputError
        If the mask does not fit k-space or leaves nothing.
    """
    rows, columns = measurement.values.shape[-2:]
    if mask.shape[-1] != columns or mask.shape[-2] not in (1, rows):
        raise InputError(
            f"a mask of {tuple(mask.shape[-2:])} does not fit k-space of {(rows, columns)}",
            mend="draw the mask for that size",
        )
    kept = measurement.mask & mask.to(device=measurement.mask.device, dtype=torch.bool)
    if not bool(kept.flatten(1).any(1).all()):
        raise InputError("the mask leaves nothing of k-space", mend="lower the acceleration")
    return replace(measurement, values=Subsample(kept)(measurement.values), mask=kept)


def crop_readout(kspace: KSpace, rows: int) -> KSpace:
    """Crop the image of ``kspace`` (..., ky, kx) to its ``rows`` central rows, along ky alone.

    The transforms are orthonormal on either size, so pixel values and the standard deviation of white noise in
    k-space both stay as they were. One coil is done after the other, so that little is held beside the result.
    """
    columns = kspace.shape[-1]
    coils = kspace.reshape(-1, *kspace.shape[-2:])
    cropped = coils.new_empty(len(coils), rows, columns)
    for coil, kept in zip(coils, cropped):
        image = torch.fft.fftshift(torch.fft.ifft(torch.fft.ifftshift(coil, dim=-2), dim=-2, norm="ortho"), dim=-2)
        image = torch.fft.ifftshift(centre_crop(image, (rows, columns)), dim=-2)
        kept.copy_(torch.fft.fftshift(torch.fft.fft(image, dim=-2, norm="ortho"), dim=-2))
    return cropped.reshape(*kspace.shape[:-2], rows, columns)


def centre_crop(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Crop images (..., y, x) about their centre, as ``fastmri.data.transforms.center_crop``.

    An axis shorter than asked is padded with zeros instead, such that cropping it back gives the image again.
    """
    for axis, size in zip((-2, -1), shape):
        n = image.shape[axis]
        if n >= size:
            image = image.narrow(axis, (n - size) // 2, size)
        else:
            before = (size - n) // 2
            margins = (before, size - n - before)
            image = torch.nn.functional.pad(image, margins if axis == -1 else (0, 0, *margins))
    return image


def normalise_mask(mask: np.ndarray, shape: tuple[int, int, int, int], *, path: Path | None = None) -> np.ndarray:
    """Bring a stored mask to bool (1 or slices, 1 or ky, kx); ky becomes 1 where all rows are alike.

    Raises
    ------
    InputError
        If the mask fits neither the columns nor the matrix of k-space, is not finite, or samples nothing.
    """
    slices, _, rows, columns = shape
    flat = np.squeeze(mask)
    if mask.ndim == 3 and mask.shape[0] == slices and mask.shape[1] in (1, rows) and mask.shape[2] == columns:
        result = mask
    elif flat.shape == (columns,):
        result = flat[None, None]
    elif flat.shape == (rows, columns):
        result = flat[None]
    else:
        raise InputError(
            f"mask has shape {mask.shape}, but kspace has {columns} columns (and {rows} rows)",
            mend=f"store a mask of length {columns}",
            path=path,
        )
    if result.dtype.kind not in "buif" or not np.isfinite(result).all():
        raise InputError("mask is not made of 0 and 1", mend="store it as bool or uint8", path=path)
    result = result != 0
    if not result.any((1, 2)).all():
        raise InputError("mask samples nothing", mend="store True where k-space was sampled", path=path)
    return result[:, :1] if (result == result[:, :1]).all() else result


def is_zero_filled(values: KSpace, target: Tensor) -> bool:
    """Tell whether the reference (1, y, x) is just the root-sum-of-squares of the undersampled k-space."""
    zero_filled = centre_crop(ifft2c(values).abs().square().sum(1).sqrt(), (target.shape[-2], target.shape[-1]))
    return bool((zero_filled - target).norm() <= 1e-3 * target.norm())
