"""Estimates of the full measurement, corrected by what was measured; no differentiation through a network."""

from torch import Tensor

from msmri.physics.operators import Identity, LinearOperator, Subsample
from msmri.physics.solve import conjugate_gradient
from msmri.tensors import Image, KSpace, Mask


def gradient_step(estimate: KSpace, values: KSpace, operator: LinearOperator, weight: float | Tensor) -> KSpace:
    """Take one gradient step towards the data: ``z - weight H^+ (H z - y)``. Park et al. 2025 (MSM), section 3.

    H^+ is the pseudo-inverse where the operator has one, as in the authors' code, else the adjoint, as in the paper.
    For a selection both are the same.

    Parameters
    ----------
    estimate
        Full measurement z, (batch, coil, ky, kx).
    values
        Measured data y.
    operator
        H, from full measurement to data: ``Subsample(mask)``, or a degradation.
    weight
        Step size. 1 puts the data in place of the estimate, with a pseudo-inverse; 2, the published value for scans,
        mirrors the estimate at the data; above 2 it diverges.
    """
    back = getattr(operator, "pseudo_inverse", operator.adjoint)
    return estimate - weight * back(operator(estimate) - values)


def proximal(
    estimate: KSpace,
    values: KSpace,
    mask: Mask,
    encoding: LinearOperator,
    *,
    weight: float | Tensor,
    iterations: int = 8,
    start: Image | None = None,
    degradation: LinearOperator | None = None,
) -> tuple[KSpace, Image]:
    """Find the image near an estimate that fits the data: ``argmin ||S H E x - y||^2 + weight ||x - E^H z||^2``.

    It knows the coils, which the gradient step does not, so that measured lines correct the others as well. It is the
    posterior mean for an image known as ``E^H z`` up to white noise of std tau if ``weight = (noise_std / tau)^2``.

    Parameters
    ----------
    estimate
        Full measurement z, (batch, coil, ky, kx).
    values, mask, encoding
        Data y, the mask S they were measured on, and E; values outside the mask are not read.
    weight
        A positive number, or one a sample (batch, 1, 1, 1).
    iterations
        Conjugate-gradient steps.
    start
        First guess of the image; ``E^H z`` without one.
    degradation
        H, what is done to the full measurement before S selects of it; nothing without one.

    Returns
    -------
    measurement
        E x, (batch, coil, ky, kx).
    image
        x, (batch, set, y, x).
    """
    if degradation is not None and not isinstance(degradation, Identity):
        operator = Subsample(mask) @ (degradation @ encoding)
    else:
        operator = Subsample(mask) @ encoding
    centre = encoding.adjoint(estimate)

    def normal(x: Tensor) -> Tensor:
        return operator.normal(x) + weight * x

    right = operator.adjoint(values) + weight * centre
    image = conjugate_gradient(normal, right, start=centre if start is None else start, iterations=iterations)
    return encoding(image), image


def project(estimate: KSpace, encoding: LinearOperator) -> KSpace:
    """Remove what no image can produce: ``E E^H z``, a projection where the maps' squares add up to 1."""
    return encoding(encoding.adjoint(estimate))
