"""DeepInverse: our operators, denoisers and methods as theirs, and their multi-coil MRI as our operator."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.methods import Reconstructor
from msmri.model.denoiser import Denoiser
from msmri.physics.operators import CoilFourier, Composed, LinearOperator, Subsample
from msmri.tensors import generators

if TYPE_CHECKING:
    import deepinv


def to_channels(values: Tensor) -> Tensor:
    """Turn complex (b, c, y, x) into DeepInverse's real (b, 2c, y, x): all real parts first, then all imaginary."""
    return torch.cat([values.real, values.imag], dim=1)


def from_channels(channels: Tensor) -> Tensor:
    """Turn DeepInverse's real (b, 2c, y, x) into complex (b, c, y, x)."""
    if channels.shape[1] % 2:
        raise ValueError(f"{channels.shape[1]} channels are not pairs of real and imaginary parts")
    return torch.complex(*channels.chunk(2, dim=1))


def to_coils(kspace: Tensor) -> Tensor:
    """Turn complex k-space (b, coil, ky, kx) into DeepInverse's real (b, 2, coil, ky, kx)."""
    return torch.view_as_real(kspace).movedim(-1, 1)


def from_coils(kspace: Tensor) -> Tensor:
    """Turn DeepInverse's real k-space (b, 2, coil, ky, kx) into complex (b, coil, ky, kx)."""
    return torch.view_as_complex(kspace.movedim(1, -1).contiguous())


def to_physics(operator: LinearOperator, *, noise_std: float | None = None) -> "deepinv.physics.LinearPhysics":
    """Wrap an operator of MRI as DeepInverse's ``LinearPhysics``, with real images (b, 2 sets, y, x).

    Parameters
    ----------
    operator
        From complex images to complex k-space; it stays at hand as the attribute ``operator``. A new mask makes a new
        operator and so new physics: ``A(x, mask=...)`` changes nothing.
    noise_std
        Standard deviation of each real component of k-space for ``physics(x)``, added where the mask is True; no
        noise without it.
    """
    from deepinv.physics import GaussianNoise, LinearPhysics

    class OperatorPhysics(LinearPhysics):
        """An msmri operator in DeepInverse's clothes."""

        def __init__(self) -> None:
            options = {} if noise_std is None else {"noise_model": GaussianNoise(sigma=noise_std)}
            super().__init__(**options)
            self.operator = operator

        def A(self, x: Tensor, **ignored: Any) -> Tensor:  # noqa: N802
            """Apply the operator."""
            return to_coils(self.operator(from_channels(x)))

        def A_adjoint(self, y: Tensor, **ignored: Any) -> Tensor:  # noqa: N802
            """Apply the adjoint."""
            return to_channels(self.operator.adjoint(from_coils(y)))

        def A_adjoint_A(self, x: Tensor, **ignored: Any) -> Tensor:  # noqa: N802
            """Apply adjoint(forward), through the operator's shortcut."""
            return to_channels(self.operator.normal(from_channels(x)))

        def noise(self, x: Tensor, **options: Any) -> Tensor:
            """Add noise to what is measured; the rest stays zero."""
            noisy = self.noise_model(x, **options)
            outer = self.operator.outer if isinstance(self.operator, Composed) else None
            return to_coils(outer(from_coils(noisy))) if isinstance(outer, Subsample) else noisy

    return OperatorPhysics()


def from_physics(physics: "deepinv.physics.Physics") -> LinearOperator:
    """Read the operator ``Subsample(mask) @ CoilFourier(maps)`` off DeepInverse physics.

    Raises
    ------
    InputError
        If it is neither two-dimensional ``MultiCoilMRI`` nor made by :func:`to_physics`.
    """
    from deepinv.physics import MultiCoilMRI

    operator = getattr(physics, "operator", None)
    if isinstance(operator, LinearOperator):
        return operator
    if not isinstance(physics, MultiCoilMRI) or physics.three_d:
        raise InputError(
            f"{type(physics).__name__} is not multi-coil MRI of slices",
            mend="use deepinv.physics.MultiCoilMRI or msmri.interop.deepinv.to_physics",
        )
    mask = physics.mask[:, :1] > 0
    if bool((mask == mask[..., :1, :]).all()):
        mask = mask[..., :1, :]
    return Subsample(mask) @ CoilFourier(physics.coil_maps[:, None])


def to_denoiser(denoiser: Denoiser, *, scale: float = 1.0) -> "deepinv.models.Denoiser":
    """Wrap a denoiser of complex images as DeepInverse's ``Denoiser`` of real (b, 2, y, x).

    Parameters
    ----------
    denoiser
        Of complex images.
    scale
        What 1 in DeepInverse's images (which assume 0 to 1) is in the units of ``denoiser``; sigma is scaled alike.
    """
    from deepinv.models import Denoiser as Base

    class WrappedDenoiser(Base):
        """An msmri denoiser in DeepInverse's clothes."""

        def __init__(self) -> None:
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x: Tensor, sigma: float | Tensor, **ignored: Any) -> Tensor:
            """Estimate the clean image; ``sigma`` is a number or (b,)."""
            levels = self._handle_sigma(sigma, batch_size=len(x), ndim=x.ndim, device=x.device, dtype=x.dtype)
            return to_channels(self.denoiser.denoise(from_channels(x * scale), levels * scale)) / scale

    return WrappedDenoiser()


def to_reconstructor(method: Reconstructor, *, seed: int = 0) -> "deepinv.models.Reconstructor":
    """Wrap a method as DeepInverse's ``Reconstructor``: ``model(y, physics)`` gives the mean image (b, 2, y, x).

    The physics must be ``MultiCoilMRI`` or come from :func:`to_physics`; its Gaussian noise level, if it has one, is
    told to the method. Images are in the units of ``y``, and the same ``y`` gives the same image.
    """
    from deepinv.models import Reconstructor as Base

    class WrappedReconstructor(Base):
        """An msmri method in DeepInverse's clothes."""

        def forward(self, y: Tensor, physics: "deepinv.physics.Physics", **ignored: Any) -> Tensor:
            """Reconstruct."""
            operator, values = from_physics(physics), from_coils(y)
            if not isinstance(operator, Composed) or not isinstance(operator.outer, Subsample):
                raise InputError("the operator has no mask", mend="give Subsample(mask) @ CoilFourier(maps)")
            noise = getattr(physics.noise_model, "sigma", 0.0)
            measurement = Measurement(
                operator.outer(values),
                operator.outer.mask.expand(len(values), -1, -1, -1),
                operator.inner,
                noise_std=float(torch.as_tensor(noise).float().mean()),
            )
            return to_channels(method(measurement, generators(seed, len(values))).image[:, None])

    return WrappedReconstructor()
