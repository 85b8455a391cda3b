"""Receive coils: combination, calibration region, compression, noise."""

import math

import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.tensors import Image, KSpace, Maps, Mask


def root_sum_of_squares(coil_images: Tensor) -> Tensor:
    """Combine coil images (..., coil, y, x) into a magnitude (..., y, x) without maps. Roemer et al. 1990."""
    return torch.linalg.vector_norm(coil_images, dim=-3)


def combine(coil_images: Tensor, maps: Maps) -> Image:
    """Combine coil images (*batch, coil, y, x) into one image per set of maps (*batch, set, y, x).

    Sums ``conj(maps) * coil_images`` over coils. This is the least-squares combination for maps whose sets are
    orthonormal over coils, as ESPIRiT's are, and white noise (Roemer et al. 1990).
    """
    return torch.einsum("...scyx,...cyx->...syx", maps.conj(), coil_images)


def calibration_region(mask: Mask, shape: tuple[int, int] | None = None) -> tuple[int, int]:
    """Find the largest centred block of k-space that every mask of the batch samples fully.

    A block of width w begins at index ``n // 2 - w // 2``. Among the rectangles that fit, the one with the largest
    shorter side is taken, then the one with the larger area.

    Parameters
    ----------
    mask
        Bool (..., 1 or ky, kx).
    shape
        (ky, kx) of the k-space; needed where the mask holds one row for all, else the region is one row high.

    Returns
    -------
    tuple of int
        Rows and columns; (0, 0) where the very centre is not sampled.
    """
    sampled = (mask.flatten(0, -3).all(0) if mask.ndim > 2 else mask).cpu()
    if sampled.shape[0] == 1:
        columns = _centred_run(sampled[0])
        return (shape[0] if shape is not None else 1) if columns else 0, columns
    n_rows, best = sampled.shape[0], (0, 0)
    for rows in range(n_rows, 0, -1):
        first = n_rows // 2 - rows // 2
        columns = _centred_run(sampled[first : first + rows].all(0))
        if (min(rows, columns), rows * columns) > (min(best), best[0] * best[1]):
            best = (rows, columns)
        if columns == sampled.shape[1]:
            break
    return best


def _centred_run(line: Tensor) -> int:
    """Count the samples of the widest fully sampled block around the centre of one line."""
    centre = len(line) // 2
    holes = (~line).nonzero().flatten()
    below, above = holes[holes < centre], holes[holes >= centre]
    left = centre - (int(below[-1]) + 1) if len(below) else centre
    right = (int(above[0]) if len(above) else len(line)) - centre
    return min(2 * left + 1, 2 * right) if right else 0


def calibration_block(kspace: Tensor, rows: int, columns: int) -> Tensor:
    """Cut the central block (..., rows, columns) out of k-space."""
    top, left = kspace.shape[-2] // 2 - rows // 2, kspace.shape[-1] // 2 - columns // 2
    return kspace[..., top : top + rows, left : left + columns]


def principal_coils(block: Tensor) -> Tensor:
    """Find the unit vectors (..., coil, n) of the virtual coils of a block (..., coil, y, x), strongest first."""
    samples = block.flatten(-2)
    vectors = torch.linalg.eigh((samples @ samples.mH).cpu().to(torch.complex128))[1].flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * (largest.conj() / largest.abs())  # the phase of a vector is free: its largest entry is real
    return vectors.to(block)


def size(kspace: Tensor) -> tuple[int, int]:
    """Give the number of rows and columns of k-space."""
    return kspace.shape[-2], kspace.shape[-1]


def compress_coils(
    kspace: KSpace, n_coils: int, *, calibration_width: int | None = None, shared: bool = False
) -> tuple[KSpace, Tensor]:
    """Replace coils by the ``n_coils`` virtual coils with most energy. Huang et al. 2008.

    The rows of the matrix are orthonormal, so white noise stays white and keeps its level; prewhiten first.

    Parameters
    ----------
    kspace
        Complex (batch, coil, ky, kx), zero where not measured.
    n_coils
        Number of virtual coils; k-space is returned rotated, without loss, when it is the number of coils.
    calibration_width
        Width of the central block the energy is measured on; without it, all that was measured.
    shared
        Take one matrix for the whole batch, as for the slices of one volume, instead of one a slice.

    Returns
    -------
    kspace
        (batch, n_coils, ky, kx).
    matrix
        Complex (batch, n_coils, coil), with ``kspace_out = matrix @ kspace_in``.

    Raises
    ------
    InputError
        If there are fewer than ``n_coils`` coils.
    """
    if not 1 <= n_coils <= kspace.shape[1]:
        raise InputError(f"cannot compress {kspace.shape[1]} coils into {n_coils}")
    rows, columns = (n if calibration_width is None else min(n, calibration_width) for n in size(kspace))
    block = calibration_block(kspace, rows, columns)
    if shared:
        block = block.transpose(0, 1).flatten(1, 2)[None]
    matrix = principal_coils(block)[..., :n_coils].mH.resolve_conj().expand(len(kspace), -1, -1)
    return torch.einsum("bvc,bcyx->bvyx", matrix, kspace), matrix


def noise_covariance(samples: Tensor) -> Tensor:
    """Estimate the coil covariance of noise from noise-only samples (..., coil, n).

    Returns
    -------
    Tensor
        Complex (..., coil, coil), half of ``E[noise @ noise.mH]``: its diagonal is the variance of each *real
        component* of each coil, in keeping with ``sigma`` everywhere else.

    Raises
    ------
    InputError
        If there are fewer samples than coils, or values that are not finite.
    """
    n_coils, n = samples.shape[-2:]
    if n < n_coils:
        raise InputError(f"{n} noise samples are too few for the covariance of {n_coils} coils")
    if not bool(torch.isfinite(torch.view_as_real(samples)).all()):
        raise InputError("the noise samples hold NaN or infinite values")
    return samples @ samples.mH / (2 * n)


def prewhiten(kspace: KSpace, covariance: Tensor) -> KSpace:
    """Mix coils so that noise is white with standard deviation 1 in each real component. Pruessmann et al. 2001.

    Parameters
    ----------
    kspace
        Complex (*batch, coil, ky, kx).
    covariance
        Complex (coil, coil) or (*batch, coil, coil), as :func:`noise_covariance` returns it.

    Raises
    ------
    InputError
        If the covariance is not positive definite, as with a coil that records nothing.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance.cpu().to(torch.complex128))
    if bool(failed.any()):
        raise InputError(
            "the noise covariance is not positive definite",
            mend="drop coils that record nothing and give more noise samples than coils",
        )
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype)
    whitening = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).to(kspace)
    return torch.einsum("...dc,...cyx->...dyx", whitening, kspace)


def estimate_noise_std(kspace: KSpace, mask: Mask) -> Tensor:
    """Estimate the noise of each real component from measured data alone.

    Signal only adds to noise, so the level is taken where it is lowest among bands of (a) measured k-space by
    distance from the centre and, if whole columns were measured, (b) the outer half of the columns, transformed
    along the rows, where bands beyond the object hold noise alone. The level of a band is the median magnitude
    over ``sqrt(2 ln 2)``, found a coil and averaged in power over coils. Rows and columns that are exactly zero,
    such as padding, do not count.

    Each half of the values is read in the band that the other half finds the lowest, so that pure noise gives no
    bias: simulated line masks at R = 1 and 4 came out within 1 % on average and 3 % of spread at 64 x 64 with 4
    coils, 0.5 % and 0.7 % at 320 x 320 with 16. It is an upper bound where signal reaches every band, and follows
    whatever filter or interpolation shaped the noise.

    Parameters
    ----------
    kspace
        Complex (batch, coil, ky, kx).
    mask
        Bool (batch or 1, 1, 1 or ky, kx).

    Returns
    -------
    Tensor
        Real (batch,); 0 for a slice that is all zero.
    """
    masks = mask.expand(len(kspace), 1, *size(kspace))[:, 0]
    return torch.stack([_slice_noise(values, sampled) for values, sampled in zip(kspace, masks, strict=True)])


def _slice_noise(kspace: Tensor, sampled: Tensor) -> Tensor:
    """Estimate the noise (a number) of one slice (coil, ky, kx), sampled at (ky, kx)."""
    measured = sampled & (kspace != 0).any(0)
    rows, columns = measured.any(1).nonzero().flatten(), measured.any(0).nonzero().flatten()
    if len(rows) == 0:
        return kspace.real.new_zeros(())
    distance_y, distance_x = ((torch.arange(n, device=kspace.device) - n // 2).abs() for n in measured.shape)
    radius_y = distance_y / distance_y[rows].max().clamp_min(1)
    radius_x = distance_x / distance_x[columns].max().clamp_min(1)
    radius = (radius_y[:, None].square() + radius_x.square())[measured]
    levels = _band_levels(kspace[:, measured][:, radius.argsort()])
    if measured[rows][:, columns].float().mean() > 0.95:
        outer = columns[distance_x[columns] >= distance_x[columns].float().median()]
        lines = torch.where(sampled, kspace, 0)[:, rows][:, :, outer]
        hybrid = torch.fft.fft(lines, dim=1, norm="ortho")  # not centred: only magnitudes are looked at
        levels = torch.cat([levels, _band_levels(hybrid.flatten(1))])
    quietest = levels.argmin(0)  # chosen by one half, read from the other: the choice shall not favour low values
    return (levels[quietest[0], 1] + levels[quietest[1], 0]) / 2


def _band_levels(values: Tensor) -> Tensor:
    """Measure the noise level (band, half) of successive bands of values (coil, n), every other value for each half."""
    n_bands = min(max(values.numel() // 1024, 4), 16, values.shape[1] // 2)
    bands = values.abs().tensor_split(n_bands, dim=1)
    medians = torch.stack([torch.stack([band[:, half::2].median(-1).values for half in (0, 1)]) for band in bands])
    return medians.square().mean(-1).sqrt() / math.sqrt(2 * math.log(2))
