"""The two things that travel through msmri: a Measurement goes in, a Reconstruction comes out."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from msmri.physics.coils import calibration_region, root_sum_of_squares
from msmri.physics.fourier import ifft2c
from msmri.physics.operators import LinearOperator, Subsample
from msmri.tensors import KSpace, Mask


@dataclass(frozen=True)
class Measurement:
    """One slice, or a batch of slices of one size, as measured.

    Parameters
    ----------
    values
        (batch, coil, ky, kx), zero where ``mask`` is False, in the file's units divided by ``scale``.
    mask
        Bool (batch, 1, 1 or ky, kx); belongs to the slice and never changes.
    encoding
        Image to full measurement: ``CoilFourier(maps)`` for MRI, ``Identity()`` for photographs, or what degraded them
        (:mod:`msmri.physics.restoration`), ``values`` and ``mask`` then having its shape; None until the coil maps have
        been estimated.
    noise_std
        Standard deviation of each real component of ``values``; 0 where unknown.
    scale
        (batch, 1, 1, 1), computed from measured data only; multiply by it to return to the file's units.
    source
        Where each slice came from, such as ``("scan.h5#7",)``.
    target
        Reference magnitude image (batch, y, x) in file units, for metrics only; no loss and no method reads it. Colour
        images (batch, 3, y, x).
    full_scale
        The brightness, in file units, that priors take for 1, where the kind of file fixes it: 1 for photographs in
        [-1, 1]. None where it follows from the centre of k-space, see :meth:`working_scale`.
    """

    values: KSpace
    mask: Mask
    encoding: LinearOperator | None = None
    noise_std: Tensor | float = 0.0
    scale: Tensor | float = 1.0
    source: tuple[str, ...] = ()
    target: Tensor | None = None
    full_scale: float | None = None

    @property
    def operator(self) -> LinearOperator:
        """The forward model A = S E of this measurement."""
        if self.encoding is None:
            raise ValueError(f"{self.source}: coil maps have not been estimated yet")
        return Subsample(self.mask) @ self.encoding

    @property
    def acceleration(self) -> Tensor:
        """True acceleration (batch,): number of k-space places over number of measured ones."""
        return 1.0 / self.mask.to(torch.float64).mean(dim=(-3, -2, -1))

    def centre_scale(self, *, fraction: float = 20 / 256, quantile: float = 0.99) -> Tensor:
        """Give the brightness (batch, 1, 1, 1) of the image made from the measured centre of k-space alone.

        The scale that priors of MRI work in: the 99th percentile of the root-sum-of-squares image of the central
        columns (20 of 256, the centre of every MSM mask, whatever else was measured), so that neither the
        acceleration nor anything unmeasured enters it.
        """
        height, width = self.values.shape[-2:]
        masks = self.mask.expand(len(self.values), *self.mask.shape[1:])
        scales = []
        for values, mask in zip(self.values, masks):  # each slice by its own mask
            rows, columns = calibration_region(mask, (height, width))
            columns = min(max(columns, 1), max(round(fraction * width), 1))
            rows = height if rows >= height else max(rows, 1)
            top, left = height // 2 - rows // 2, width // 2 - columns // 2
            block = (..., slice(top, top + rows), slice(left, left + columns))
            centre = torch.zeros_like(values)
            centre[block] = values[block]
            scales.append(torch.quantile(root_sum_of_squares(ifft2c(centre)), quantile))
        return torch.stack(scales).clamp_min(torch.finfo(scales[0].dtype).tiny)[:, None, None, None]

    def working_scale(self) -> Tensor:
        """Give what methods divide ``values`` by, (batch, 1, 1, 1): ``full_scale``, or :meth:`centre_scale` without."""
        if self.full_scale is None:
            return self.centre_scale()
        ones = torch.ones(len(self.values), 1, 1, 1, dtype=self.values.real.dtype, device=self.values.device)
        return self.full_scale * ones / self.scale

    def scaled(self, scale: Tensor) -> "Measurement":
        """Return the same measurement in units of ``scale`` (batch, 1, 1, 1) times the present ones."""
        noise = torch.as_tensor(self.noise_std, device=self.values.device) / scale
        return replace(self, values=self.values / scale, noise_std=noise, scale=self.scale * scale)


@dataclass(frozen=True)
class Reconstruction:
    """What a method returns.

    Parameters
    ----------
    samples
        Complex (batch, sample, y, x) in the file's units; one sample for a point estimate. Images of colours are real,
        (batch, sample, 3, y, x), and have a sign in place of a phase.
    details
        Numbers a method wants to report beside its images: NFE, iterations, regularisation weight.
    expected_error
        Root mean square error (batch,) of a pixel that the method expects, in the file's units; None if it cannot tell.
        The std is then scaled to it: how samples differ tells where errors are, but often not how large.
    """

    samples: Tensor
    details: dict[str, Any] = field(default_factory=dict)
    expected_error: Tensor | None = None

    @property
    def image(self) -> Tensor:
        """Mean over samples: complex (batch, y, x), or colours (batch, 3, y, x)."""
        return self.samples.mean(1)

    @property
    def magnitude(self) -> Tensor:
        """Magnitude of the mean (batch, y, x); the mean itself where it is real."""
        return self.image.abs() if self.image.is_complex() else self.image

    @property
    def std(self) -> Tensor | None:
        """Standard deviation to expect of the magnitude, or of colours, (batch, y, x); None for a single sample.

        That over the samples, scaled to ``expected_error`` where there is one.
        """
        if self.samples.shape[1] == 1:
            return None
        std = (self.samples.abs() if self.samples.is_complex() else self.samples).std(1)
        if self.expected_error is None:
            return std
        overall = std.square().flatten(1).mean(1).sqrt().clamp_min(torch.finfo(std.dtype).tiny)
        each = (-1, *(1,) * (std.ndim - 1))
        return std / overall.reshape(each) * self.expected_error.reshape(each)
