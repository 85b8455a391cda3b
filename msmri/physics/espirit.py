"""Sensitivity maps of receive coils from the centre of k-space: ESPIRiT."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.physics.coils import (
    calibration_block,
    calibration_region,
    combine,
    estimate_noise_std,
    principal_coils,
    size,
)
from msmri.physics.fourier import ifft2c
from msmri.tensors import KSpace, Maps, Mask

Reference = Literal["principal", "first", "image"]
Item = TypeVar("Item")
Result = TypeVar("Result")

_SMALLEST_KERNEL = 3
_SQUARINGS = 16  # 2**16 power iterations at most: eigenvalues closer than one part in 10 000 need not be told apart
_PURITY = 1e-4  # a power is taken as rank one when its second eigenvalue is below half of this, before a last step
_LEAST_SIGNAL = 1e-4  # share of the calibration signal below which a second set of maps is not worth having
_SIGNAL_EIGENVALUE = 0.8  # a second eigenvalue above this speaks of signal, in choosing the number of sets
_CPU_BYTES, _GPU_BYTES = 2**22, 2**28  # of one stack of coil-by-coil matrices: a core's cache, a share of a GPU


@torch.no_grad()
def espirit(
    kspace: KSpace,
    *,
    calibration_width: int | tuple[int, int] = 24,
    kernel_width: int = 6,
    threshold: float = 0.02,
    crop: float = 0.8,
    sets: int = 1,
    phase_reference: Reference = "principal",
) -> tuple[Maps, Tensor]:
    """Estimate coil sensitivities from the centre of k-space by ESPIRiT. Uecker et al. 2014, eqs. 11-25.

    Every slice is treated by itself. The Gram matrices of the kernels are evaluated directly from their Fourier
    series a few rows at a time, so that beyond the result the memory is, for each thread, about six stacks of
    coil-by-coil matrices of 4 MB (of 256 MB on a GPU, one thread), or of one row of pixels where that is more.

    Parameters
    ----------
    kspace
        Complex (batch, coil, ky, kx); only the central block is read.
    calibration_width
        Rows and columns of the fully sampled central block, cut to the size of k-space.
    kernel_width
        Width of the square kernels in k-space samples.
    threshold
        Singular values below this share of the largest are taken as noise (sigpy's 0.02; BART's ``-t`` is its
        square, 0.001 by default).
    crop
        Maps are zero where their eigenvalue is not above this (BART's 0.8; sigpy takes 0.95); 0 keeps all.
    sets
        Number of sets of maps; 2 where the field of view is smaller than the object.
    phase_reference
        What has phase zero in each set: the ``"principal"`` virtual coil, that with most energy in the calibration
        block (as in BART; smooth maps), the ``"first"`` coil (as in sigpy), or the ``"image"``: the maps then hold
        the phase that the calibration block sees of the combined image, and what is left of the image is nearly real.

    Returns
    -------
    maps
        (batch, set, coil, y, x); within a set the sum over coils of ``abs(maps)**2`` is 1, or 0 where cropped.
    eigenvalues
        Real (batch, set, y, x), about 1 where the calibration data explain a signal, never much above.

    Raises
    ------
    InputError
        If the kernel does not fit into the block, or the block is all zero or not finite.
    """
    n_batch, n_coils, n_rows, n_columns = kspace.shape
    if isinstance(calibration_width, int):
        calibration_width = (calibration_width, calibration_width)
    block = calibration_block(kspace, min(calibration_width[0], n_rows), min(calibration_width[1], n_columns))
    if min(block.shape[-2:]) < kernel_width:
        size = " x ".join(map(str, block.shape[-2:]))
        raise InputError(f"kernels {kernel_width} wide do not fit into a calibration block of {size}")
    _check_block(block)
    sets = min(sets, n_coils)
    maps = kspace.new_zeros(n_batch, sets, n_coils, n_rows, n_columns)
    eigenvalues = maps.real.new_zeros(n_batch, sets, n_rows, n_columns)
    waves_y = _waves(n_rows, kernel_width).to(maps)
    waves_x = _waves(n_columns, kernel_width).to(maps)
    # many small operations: they are shared among threads by the slice and the piece, and never split themselves
    correlations = _on_threads(lambda values: _kernel_correlation(values, kernel_width, threshold), list(block))
    references = _on_threads(lambda values: _phase_reference(values, phase_reference), list(block))
    series = [correlation.to(maps) for correlation in correlations]
    on_cpu = maps.device.type == "cpu"
    step = (_CPU_BYTES if on_cpu else _GPU_BYTES) // (n_columns * n_coils**2 * maps.element_size())
    starts = range(0, n_rows, max(1, step))
    pieces = [(i, slice(y, y + starts.step)) for i in range(n_batch) for y in starts]

    def fill(piece: tuple[int, slice]) -> None:
        i, rows = piece
        lines = torch.einsum("yd,dep->yep", waves_y[rows], series[i].flatten(2))
        values, vectors = _eigenpairs((waves_x @ lines).reshape(-1, n_coils, n_coils), sets)
        eigenvalues[i, :, rows] = values.mT.reshape(sets, -1, n_columns)
        maps[i, :, :, rows] = vectors.permute(1, 2, 0).reshape(sets, n_coils, -1, n_columns)

    _on_threads(fill, pieces, n_threads=None if on_cpu else 1)
    for i in range(n_batch):
        phase = torch.einsum("c,scyx->syx", references[i].conj(), maps[i]).angle()
        if phase_reference == "image":
            seen = _low_resolution(block[i], (n_rows, n_columns))
            phase = -torch.einsum("scyx,cyx->syx", maps[i].conj(), seen).angle()
        maps[i] *= torch.polar(torch.ones_like(phase), -phase)[:, None]
    if crop > 0:
        maps *= (eigenvalues > crop)[:, :, None]
    return maps, eigenvalues


def _kernel_correlation(block: Tensor, kernel_width: int, threshold: float) -> Tensor:
    """Correlate the kernels that span a calibration block (coil, rows, columns) with one another.

    The kernels are the right singular vectors of the calibration matrix (one row a patch of k-space) with singular
    values above ``threshold`` times the largest. Their correlation needs no kernel by itself: it is the sum along
    the diagonals of equal shift of the projector onto their span. All in double precision and on the CPU, since the
    singular values are roots of the eigenvalues of a Gram matrix.

    Returns
    -------
    Tensor
        Complex128 (2k - 1, 2k - 1, coil, coil): the Fourier coefficients, over image space, of the matrices G of
        Uecker et al. 2014 (eq. 19), divided by the kernel's area so that signal gives an eigenvalue of 1.
    """
    n_coils, width, lags = block.shape[0], kernel_width, 2 * kernel_width - 1
    patches = block.cpu().to(torch.complex128).unfold(1, width, 1).unfold(2, width, 1)
    matrix = patches.permute(1, 2, 0, 3, 4).reshape(-1, n_coils * width**2)
    wide = matrix.shape[0] < matrix.shape[1]
    power, vectors = torch.linalg.eigh(matrix @ matrix.mH if wide else matrix.mH @ matrix)
    kept = power > threshold**2 * power[-1]
    span = vectors[:, kept]
    if wide:
        span = matrix.mH @ (span / power[kept].sqrt())
    projector = (span.conj() @ span.mT).reshape(n_coils, width, width, n_coils, width, width)
    correlation = projector.new_zeros(lags, lags, n_coils, n_coils)
    for y in range(width):
        for x in range(width):
            lag_y, lag_x = width - 1 - y, width - 1 - x
            correlation[lag_y : lag_y + width, lag_x : lag_x + width] += projector[..., y, x].permute(1, 2, 0, 3)
    return correlation / width**2


def _waves(n: int, kernel_width: int) -> Tensor:
    """Tabulate the Fourier series of a kernel correlation (n, 2k - 1), image centre at index ``n // 2``."""
    place = torch.arange(n, dtype=torch.float64) - n // 2
    lag = torch.arange(2 * kernel_width - 1, dtype=torch.float64) - (kernel_width - 1)
    return torch.polar(torch.ones((), dtype=torch.float64), 2 * math.pi / n * torch.outer(place, lag))


def _principal_vector(gram: Tensor) -> Tensor:
    """Find the unit eigenvectors (pixel, coil) of the largest eigenvalues of Hermitian matrices (pixel, coil, coil).

    Each matrix is squared over and over, so that n squarings do the work of 2**n power iterations; the trace of the
    square tells when only one direction is left, and those pixels are finished and dropped.
    """
    power = gram * _trace(gram).reciprocal()[:, None, None]
    vectors = gram.new_empty(gram.shape[:2])
    pending = torch.arange(len(gram), device=gram.device)
    for _ in range(_SQUARINGS):
        power = power @ power
        purity = _trace(power)
        power *= purity.reciprocal()[:, None, None]  # a complex division is three times as slow
        mixed = purity < 1 - _PURITY
        n_mixed = int(mixed.sum())
        if n_mixed == 0:
            break
        if n_mixed < 0.8 * len(power):
            vectors[pending[~mixed]] = _column(power[~mixed])
            power, pending = power[mixed], pending[mixed]
    vectors[pending] = _column(power)
    return vectors


def _trace(matrices: Tensor) -> Tensor:
    """Sum the real diagonals of matrices (pixel, coil, coil)."""
    return matrices.diagonal(dim1=-2, dim2=-1).real.sum(-1)


def _column(power: Tensor) -> Tensor:
    """Read the eigenvector (pixel, coil) off nearly rank-one matrices: one more power step from the largest column."""
    largest = power.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    column = power.gather(2, largest[:, None, None].expand(-1, power.shape[1], 1))
    vector = (power @ column).squeeze(-1)
    return vector * torch.linalg.vector_norm(vector, dim=-1, keepdim=True).reciprocal()


def _eigenpairs(gram: Tensor, sets: int) -> tuple[Tensor, Tensor]:
    """Find the ``sets`` largest eigenvalues (pixel, set) and vectors (pixel, set, coil) of Hermitian matrices."""
    # a small shift of the eigenvalues not found yet keeps every matrix positive, whatever rounding leaves over
    shift = 1e-6 * _trace(gram) + torch.finfo(gram.dtype).tiny
    gram = gram + shift[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    values, vectors = [], []
    for _ in range(sets):
        vector = _principal_vector(gram)[:, :, None]
        image = gram @ vector
        value = (vector.mH @ image).real
        values.append(value[:, 0, 0] - shift)
        vectors.append(vector[:, :, 0])
        if len(values) < sets:  # deflate: gram becomes P gram P for the projector P = 1 - vector vector^H
            image = image - value / 2 * vector
            gram = gram - torch.cat([vector, image], 2) @ torch.cat([image, vector], 2).mH
    return torch.stack(values, 1), torch.stack(vectors, 1)


def _on_threads(task: Callable[[Item], Result], items: list[Item], n_threads: int | None = None) -> list[Result]:
    """Do a task for all items on as many threads as torch uses (or ``n_threads``), torch using one thread in each.

    Splitting each short operation instead makes all threads wait for each other thousands of times, which costs
    several times the work itself when another program has one of the cores.
    """
    torch_threads = torch.get_num_threads()
    n_threads = torch_threads if n_threads is None else n_threads
    if n_threads == 1:
        return [task(item) for item in items]

    @torch.no_grad()  # which holds for one thread only, like the number of threads
    def alone(item: Item) -> Result:
        torch.set_num_threads(1)
        return task(item)

    try:
        with ThreadPoolExecutor(min(n_threads, len(items))) as pool:
            return list(pool.map(alone, items))
    finally:
        torch.set_num_threads(torch_threads)  # what threads to come will start with


def _check_block(block: Tensor) -> None:
    """Refuse calibration data from which nothing can be learned."""
    for i, values in enumerate(block):
        place = f" of slice {i}" if len(block) > 1 else ""
        if not bool(torch.isfinite(torch.view_as_real(values)).all()):
            raise InputError(f"the centre of k-space{place} holds NaN or infinite values")
        if not bool(values.any()):
            raise InputError(f"the centre of k-space{place} is all zero", mend="leave this slice out")


def _low_resolution(block: Tensor, shape: tuple[int, int]) -> Tensor:
    """Give the coil images (coil, y, x) of a calibration block (coil, rows, columns), tapered against ringing."""
    rows, columns = (torch.hann_window(n + 2, periodic=False, device=block.device)[1:-1] for n in size(block))
    kspace = block.new_zeros(len(block), *shape)
    calibration_block(kspace, *size(block)).copy_(block * rows[:, None] * columns)
    return ifft2c(kspace)


def _phase_reference(block: Tensor, kind: Reference) -> Tensor:
    """Give the coil weights (coil,) whose combination of the maps shall have phase zero."""
    if kind == "first":
        return torch.eye(len(block), dtype=block.dtype, device=block.device)[0]
    return principal_coils(block)[:, 0]


@dataclass(frozen=True)
class Espirit:
    """Estimate coil maps from whatever calibration lines a mask leaves; a setting of :func:`espirit`."""

    kernel_width: int = 6  # largest kernel; a block of n < 14 lines gets kernels of n // 2 - 1, at least 3
    threshold: float = 0.02  # singular values below this share of the largest are noise
    crop: float = 0.8  # maps are zero where the eigenvalue is not above this; 0 keeps all
    sets: int | Literal["auto"] = 1  # sets of maps; "auto" takes a second one where the image is folded onto itself
    max_calibration: int = 24  # rows and columns of the centre that are read at most
    phase_reference: Reference = "principal"  # what has phase zero: principal virtual coil, first coil or image
    second_set_share: float = 1 / 3  # "auto": share of what one set leaves unexplained that a second must explain

    def __post_init__(self) -> None:
        if self.sets not in (1, 2, "auto"):
            raise InputError(f"sets of maps: {self.sets!r} is not 1, 2 or 'auto'")

    def __call__(self, kspace: KSpace, mask: Mask) -> Maps:
        """Estimate maps (batch, set, coil, y, x) of k-space (batch, coil, ky, kx) sampled by ``mask``.

        Each slice is calibrated by itself, on its own mask. One coil needs no calibration: its map is 1 everywhere, or
        with ``phase_reference="image"`` the phase that the centre sees.
        Under ``sets="auto"`` the result has two sets when any slice needs them, the second one zero for the others.

        Raises
        ------
        InputError
            If the fully sampled centre is missing or less than 4 lines wide, all zero, or not finite.
        """
        n_batch, n_coils = kspace.shape[:2]
        masks = mask.expand(n_batch, *mask.shape[1:])
        if n_coils == 1 and self.phase_reference != "image":
            return kspace.new_ones(n_batch, 1, 1, *kspace.shape[-2:])
        if n_coils == 1:
            return torch.stack([self._phase(*one) for one in zip(kspace, masks, strict=True)])
        maps = [self._slice(kspace[i : i + 1], masks[i]) for i in range(n_batch)]
        sets = max(m.shape[1] for m in maps)
        return torch.cat([torch.cat([m, m.new_zeros(1, sets - m.shape[1], *m.shape[2:])], 1) for m in maps])

    def _region(self, kspace: KSpace, mask: Mask) -> tuple[int, int]:
        """Give the rows and columns of the centre that are read."""
        rows, columns = (min(n, self.max_calibration) for n in calibration_region(mask, size(kspace)))
        narrow, needed = min(rows, columns), _SMALLEST_KERNEL + 1
        if narrow < needed:
            raise InputError(
                f"the calibration region is {narrow} lines wide, at least {needed} are needed",
                mend="sample the centre of k-space fully or give maps with --maps",
            )
        return rows, columns

    def _phase(self, kspace: KSpace, mask: Mask) -> Maps:
        """Give the map (set, coil, y, x) of one coil that leaves its image nearly real: k-space (coil, ky, kx)."""
        seen = _low_resolution(calibration_block(kspace, *self._region(kspace, mask)), size(kspace))
        return torch.polar(torch.ones_like(seen.real), seen.angle())[None]

    def _slice(self, kspace: KSpace, mask: Mask) -> Maps:
        """Estimate the maps of a batch of one."""
        rows, columns = self._region(kspace, mask)
        maps, eigenvalues = espirit(
            kspace,
            calibration_width=(rows, columns),
            kernel_width=min(self.kernel_width, max(_SMALLEST_KERNEL, min(rows, columns) // 2 - 1)),
            threshold=self.threshold,
            crop=self.crop,
            sets=2 if self.sets == "auto" else self.sets,
            phase_reference=self.phase_reference,
        )
        if self.sets == "auto":
            noise = float(estimate_noise_std(kspace, mask[None]).square())
            if not self._is_folded(calibration_block(kspace, rows, columns), maps, eigenvalues, noise):
                maps = maps[:, :1]
        return maps

    def _is_folded(self, block: Tensor, maps: Maps, eigenvalues: Tensor, variance: float) -> bool:
        """Tell whether the second set of maps explains a good part of what the first leaves of the calibration data.

        Noise, of that ``variance`` in each real component, is alike in as many sets as there are coils.
        """
        kspace = block.new_zeros(block.shape[:2] + size(maps))
        calibration_block(kspace, *size(block)).copy_(block)
        trusted = eigenvalues > _SIGNAL_EIGENVALUE
        images = combine(ifft2c(kspace), maps) * trusted
        first, second = images.abs().square().sum((0, 2, 3))
        total = block.abs().square().sum()
        noise = 2 * variance * block[0, 0].numel()  # of one set, everywhere
        in_second = noise * float(trusted[:, 1].float().mean())
        left = float(total - first) - (block.shape[1] - 1) * noise
        least = max(_LEAST_SIGNAL * float(total), 2 * in_second, self.second_set_share * left)
        return float(second) - in_second > least  # a set found in noise fits it better than any other would
