"""Images drawn from a prior, on disk: an HDF5 file that can be gone on with, and a sheet to look at."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.io.output import DONE, ReconstructionWriter, atomic, open_hdf5

SAMPLES = "samples"  # the dataset
WHITE, GAP = 0.995, 2  # quantile of each image that is white; pixels between two images of a sheet


class SampleWriter(ReconstructionWriter):
    """Write ``samples`` image by image, as :class:`ReconstructionWriter` does slices.

    Complex (count, y, x), or with ``dtype`` float32 and three sizes in ``shape`` colours (count, 3, y, x) within -1..1.
    """

    def __init__(
        self,
        path: str | Path,
        count: int,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.complex64,
        *,
        attributes: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        super().__init__(
            path, count, shape, attributes=attributes, settings=settings, resume=resume, overwrite=overwrite
        )
        self._types = {SAMPLES: np.float32 if dtype == torch.float32 else np.complex64}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rename the finished file into place; keep an unfinished one if it holds any image."""
        self.resume = kind is not None and bool(self.done.any())
        super().__exit__(kind, error, trace)

    def write(self, index: int, image: Tensor, *, std: Tensor | None = None) -> None:
        """Write image ``index``; it counts as done once its data are on the way to the disk."""
        if std is not None or image.shape != self.shape[1:]:
            raise ValueError(f"{self.path}: samples are single images {self.shape[1:]}, got {tuple(image.shape)}")
        file = self._open
        file[SAMPLES][index] = image.detach().cpu().numpy()
        file.flush()
        file[DONE][index] = True
        file.flush()


def read_samples(path: str | Path) -> Tensor:
    """Read the images, complex (count, y, x) or colours (count, 3, y, x), of a finished file.

    Raises
    ------
    InputError
        If it cannot be read or holds no samples.
    """
    with open_hdf5(path) as file:
        if SAMPLES not in file:
            raise InputError("holds no samples", mend="give a samples.h5 of msmri sample", path=path)
        return torch.from_numpy(file[SAMPLES][()])


def image_sheet(path: str | Path, images: Tensor, *, columns: int | None = None) -> None:
    """Write images as one PNG, pixel by pixel: magnitudes (count, y, x), each in a grey window of its own, or colours.

    Colours are (count, 3, y, x) within -1..1, and clipped to that.
    """
    from matplotlib.image import imsave

    count, (height, width) = len(images), images.shape[-2:]
    across = columns or math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    sheet = torch.ones(down * (height + GAP) - GAP, across * (width + GAP) - GAP, *images.shape[1:-2])
    for number, image in enumerate(images):
        top, left = number // across * (height + GAP), number % across * (width + GAP)
        if image.ndim == 3:
            shown = (image.movedim(0, -1).float() + 1) / 2
        else:
            shown = image.abs().float()
            shown = shown / torch.quantile(shown, WHITE).clamp_min(1e-12)
        sheet[top : top + height, left : left + width] = shown.clamp(0, 1)
    with atomic(path) as part:
        imsave(part, sheet.numpy(), cmap="gray", vmin=0, vmax=1, format="png")
