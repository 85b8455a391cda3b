"""Classical restoration of real images by scikit-image: biharmonic inpainting, bicubic enlargement, total variation."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.measurement import Measurement, Reconstruction
from msmri.physics.operators import Identity, LinearOperator, Subsample
from msmri.physics.restoration import BlockAverage
from msmri.physics.solve import largest_eigenvalue
from msmri.sampling.aggregate import take
from msmri.tensors import Image, Mask, Rng

if TYPE_CHECKING:
    import numpy as np

DAMELIN = """@article{damelin2018surface,
  title = {On Surface Completion and Image Inpainting by Biharmonic Functions: Numerical Aspects},
  author = {Damelin, S. B. and Hoang, N. S.}, year = {2018},
  journal = {International Journal of Mathematics and Mathematical Sciences}, pages = {3950312}
}"""
KEYS = """@article{keys1981cubic,
  title = {Cubic convolution interpolation for digital image processing}, author = {Keys, Robert G.}, year = {1981},
  journal = {IEEE Transactions on Acoustics, Speech, and Signal Processing}, volume = {29}, number = {6},
  pages = {1153--1160}
}"""
CHAMBOLLE = """@article{beck2009fast,
  title = {Fast Gradient-Based Algorithms for Constrained Total Variation Image Denoising and Deblurring Problems},
  author = {Beck, Amir and Teboulle, Marc}, journal = {IEEE Transactions on Image Processing}, year = {2009},
  volume = {18}, number = {11}, pages = {2419--2434}
}
@article{chambolle2004algorithm,
  title = {An algorithm for total variation minimization and applications}, author = {Chambolle, Antonin},
  journal = {Journal of Mathematical Imaging and Vision}, year = {2004}, volume = {20}, pages = {89--97}
}"""


@dataclass(frozen=True)
class _OneByOne(ABC):
    """What restores images one by one, in units where they lie between -1 and 1."""

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {}

    @abstractmethod
    def _restore(self, values: Tensor, mask: Mask, encoding: LinearOperator, rng: Rng) -> Image:
        """Restore one image (1, channel, y, x) from values that are zero outside the mask."""

    def __call__(self, measurement: Measurement, rng: Rng) -> Reconstruction:
        """Restore every image of the batch: (batch, 1, channel, y, x) in the file's units.

        Raises
        ------
        InputError
            If the values are complex or not finite, or the encoding is not one that the method can undo.
        """
        encoding, mask = measurement.encoding, measurement.mask
        if encoding is None or measurement.values.is_complex():
            raise InputError(f"{self.name} restores real images", mend="use a method for coils")
        scale = measurement.working_scale()
        values = Subsample(mask)(measurement.values) / scale
        if not bool(torch.isfinite(values).all()):
            raise InputError("an image holds NaN or infinite values")
        images = []
        for index, generator in enumerate(rng):
            known = mask[index : index + 1] if len(mask) > 1 else mask
            one = take(encoding, torch.tensor([index]))
            images.append(self._restore(values[index : index + 1], known, one, [generator]))
        return Reconstruction((torch.cat(images) * scale * measurement.scale)[:, None])


def _array(image: Tensor) -> "np.ndarray":
    """Give one image (1, channel, y, x) as float64 (y, x, channel), as scikit-image wants it."""
    return image[0].permute(1, 2, 0).cpu().double().numpy()


def _tensor(array: "np.ndarray", like: Tensor) -> Image:
    return torch.from_numpy(array).permute(2, 0, 1)[None].to(like)


@dataclass(frozen=True)
class Biharmonic(_OneByOne):
    """Fill what is lost by the smoothest surface, what is known stays. Damelin and Hoang 2018."""

    name: ClassVar[str] = "biharmonic"
    reference: ClassVar[str] = DAMELIN

    def _restore(self, values: Tensor, mask: Mask, encoding: LinearOperator, rng: Rng) -> Image:
        from skimage.restoration import inpaint_biharmonic

        if not isinstance(encoding, Identity):
            raise InputError(f"{self.name} fills in lost pixels alone", mend="use tv-image")
        lost = ~mask.expand(1, 1, *values.shape[-2:])[0, 0].cpu().numpy()
        return _tensor(inpaint_biharmonic(_array(values), lost, channel_axis=-1), values) if lost.any() else values


@dataclass(frozen=True)
class Bicubic(_OneByOne):
    """Enlarge averaged blocks by cubic interpolation. Keys 1981."""

    name: ClassVar[str] = "bicubic"
    reference: ClassVar[str] = KEYS

    def _restore(self, values: Tensor, mask: Mask, encoding: LinearOperator, rng: Rng) -> Image:
        from skimage.transform import resize

        if not isinstance(encoding, BlockAverage) or not bool(mask.all()):
            raise InputError(f"{self.name} enlarges small images alone", mend="use tv-image")
        shape = tuple(size * encoding.factor for size in values.shape[-2:])
        return _tensor(resize(_array(values), (*shape, values.shape[1]), order=3, mode="edge"), values)


@dataclass(frozen=True)
class TVImage(_OneByOne):
    """Minimise ``||A x - y||^2 / 2 + weight TV(x)`` by FISTA with Chambolle's denoiser. Beck and Teboulle 2009."""

    weight: float = 0.003  # of total variation, in units where images lie between -1 and 1
    iterations: int = 200  # of FISTA

    name: ClassVar[str] = "tv-image"
    reference: ClassVar[str] = CHAMBOLLE
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {"weight": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)}

    def __post_init__(self) -> None:
        if not (self.weight > 0 and self.iterations >= 1):
            raise InputError(
                f"{self.name} cannot use weight={self.weight}, iterations={self.iterations}",
                mend="give positive numbers",
            )

    def _restore(self, values: Tensor, mask: Mask, encoding: LinearOperator, rng: Rng) -> Image:
        from skimage.restoration import denoise_tv_chambolle

        operator = Subsample(mask) @ encoding
        image = encoding.adjoint(values)
        step = 1 / largest_eigenvalue(operator.normal, image, rng).clamp_min(1e-12).mul(1.02)
        ahead, momentum = image, 1.0
        for _ in range(self.iterations):
            moved = ahead - step * operator.adjoint(operator(ahead) - values)
            smooth = denoise_tv_chambolle(_array(moved), self.weight * float(step), max_num_iter=50, channel_axis=-1)
            found, following = _tensor(smooth, values), (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead, momentum = found + (momentum - 1) / following * (found - image), following
            image = found
        return image
