"""fastMRI: complex numbers as a last axis of 2, our mask laws as its MaskFunc, its SliceDataset as our Measurements."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from msmri.io.kspace import crop_readout, normalise_mask, undersample
from msmri.measurement import Measurement
from msmri.physics.masks import FastMRILaw, MaskLaw, slice_seed
from msmri.physics.operators import CoilFourier, Subsample
from msmri.tensors import KSpace, Maps, Mask

if TYPE_CHECKING:
    from fastmri.data.subsample import MaskFunc


def to_pairs(values: Tensor) -> Tensor:
    """Turn complex (...) into fastMRI's real (..., 2)."""
    return torch.view_as_real(values.resolve_conj())


def from_pairs(pairs: Tensor) -> Tensor:
    """Turn fastMRI's real (..., 2) into complex (...)."""
    return torch.view_as_complex(pairs.contiguous())


def to_mask_func(law: MaskLaw, *, seed: int | None = None) -> "MaskFunc":
    """Wrap a mask law as fastMRI's ``MaskFunc``: a float mask (1, ..., 1 or ky, kx, 1) and the number of centre lines.

    A call with a seed, as fastMRI's transforms make it from the file name, always gives the same mask; for a law of
    fastMRI it is the very mask that fastMRI draws. Calls without a seed draw one after the other from ``seed``.
    """
    from fastmri.data.subsample import MaskFunc

    class LawMaskFunc(MaskFunc):
        """An msmri mask law in fastMRI's clothes."""

        def __init__(self) -> None:
            super().__init__([0.0], [law.nominal_acceleration], seed=seed)
            self.law = law

        def __reduce__(self) -> tuple[Any, ...]:
            return _restore_mask_func, (law, seed)  # for the worker processes of a DataLoader

        def __call__(
            self, shape: Sequence[int], offset: int | None = None, seed: int | tuple[int, ...] | None = None
        ) -> tuple[Tensor, int]:
            """Draw a mask for data of ``shape`` (..., ky, kx, 2)."""
            if len(shape) < 3:
                raise ValueError(f"shape must be (..., ky, kx, 2), got {tuple(shape)}")
            matrix = (int(shape[-3]), int(shape[-2]))
            if seed is None:
                seed = int(self.rng.randint(0, 2**31 - 1))
            if isinstance(law, FastMRILaw):
                mask = law.draw_seeded(matrix, seed, offset)
            elif offset is not None:
                raise ValueError(f"mask law {law.name} has no offset to choose")
            else:
                mask = law.draw(matrix, torch.Generator().manual_seed(slice_seed(repr(seed), 0)))
            lead = (1,) * (len(shape) - 3)
            return mask.reshape(*lead, *mask.shape[-2:], 1).float(), law.centre_size(matrix)[1]

    return LawMaskFunc()


def _restore_mask_func(law: MaskLaw, seed: int | None) -> "MaskFunc":
    return to_mask_func(law, seed=seed)


@dataclass(frozen=True)
class MeasurementTransform:
    """A transform for ``fastmri.data.SliceDataset`` that gives a :class:`Measurement` in file units.

    Use a DataLoader with ``batch_size=None``: every slice is a batch of one. The mask of the file is applied where
    there is one; zero-padded margins told by the header count as not sampled.
    """

    law: MaskLaw | None = None  # undersample by this law; what the file holds without one
    seed: int = 0  # of the masks; each slice always gets its own, whatever the order
    coils: Callable[[KSpace, Mask], Maps] | None = None  # such as Espirit(), for the encoding; None leaves it open
    crop: bool = True  # remove readout oversampling, as far as the header's reconstruction matrix tells

    def __call__(
        self,
        kspace: np.ndarray,
        mask: np.ndarray | None,
        target: np.ndarray | None,
        attributes: Mapping[str, Any],
        name: str,
        index: int,
    ) -> Measurement:
        """Make the measurement of one slice from what SliceDataset read."""
        values = torch.from_numpy(np.asarray(kspace, dtype=np.complex64))
        values = values.reshape(1, -1, *values.shape[-2:])
        n_coils, rows, columns = values.shape[1:]
        column = torch.arange(columns)
        left, right = attributes.get("padding_left", 0), attributes.get("padding_right", columns)
        sampled: Mask = ((column >= left) & (column < right))[None, None, None]
        if mask is not None:
            own = mask[index] if mask.ndim == 3 and len(mask) > 1 else mask
            sampled = sampled & torch.from_numpy(normalise_mask(own, (1, n_coils, rows, columns)))[None]
        source = f"{name}#{index}"
        reference = None if target is None else torch.from_numpy(np.asarray(target, dtype=np.float32))[None]
        measurement = Measurement(Subsample(sampled)(values), sampled, source=(source,), target=reference)
        if self.law is not None:
            generator = torch.Generator().manual_seed(slice_seed(source, self.seed))
            measurement = undersample(measurement, self.law.draw((rows, columns), generator))
        kept, drawn = measurement.values, measurement.mask
        height = int(attributes["recon_size"][0]) if "recon_size" in attributes else rows
        if self.crop and drawn.shape[-2] == 1 and height < rows:
            kept = crop_readout(kept, height)
        encoding = CoilFourier(self.coils(kept, drawn)) if self.coils is not None else None
        return Measurement(kept, drawn, encoding, source=(source,), target=reference)
