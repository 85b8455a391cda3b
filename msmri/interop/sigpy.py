"""SigPy: our operator, for one slice, as a Linop that its apps and algorithms take."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from msmri.errors import InputError
from msmri.physics.operators import CoilFourier, Composed, LinearOperator, Subsample

if TYPE_CHECKING:
    import sigpy


def to_linop(operator: LinearOperator, shape: Sequence[int] | None = None) -> "sigpy.linop.Linop":
    """Wrap the operator of one slice as a SigPy ``Linop`` on NumPy arrays.

    As with ``sigpy.mri.linop.Sense``, the image is (y, x), or (set, y, x) for several sets of maps, and k-space is
    (coil, ky, kx).

    Parameters
    ----------
    operator
        The operator; its batch axes must have length 1, since a Linop has none.
    shape
        Of the image (channel, y, x); not needed where the operator holds coil maps.

    Raises
    ------
    InputError
        If the operator is one of several slices, or the shape is not known.
    """
    from sigpy.linop import Linop

    parts = _parts(operator)
    for part in parts:
        batch = part.maps.shape[:-4] if isinstance(part, CoilFourier) else ()
        batch = part.mask.shape[:-3] if isinstance(part, Subsample) else batch
        if any(n != 1 for n in batch):
            raise InputError(f"an operator of {tuple(batch)} slices is no Linop", mend="make one Linop a slice")
    maps = next((part.maps for part in reversed(parts) if isinstance(part, CoilFourier)), None)
    if shape is None:
        if maps is None:
            raise InputError("the operator does not tell the shape of its image", mend="give shape=(channel, y, x)")
        shape = (maps.shape[-4], *maps.shape[-2:])
    image = tuple(shape)
    dtype = maps.dtype if maps is not None else torch.complex64
    device = maps.device if maps is not None else torch.device("cpu")
    inside = image[1:] if image[0] == 1 else image
    outside = tuple(operator(torch.zeros((1, *image), dtype=dtype, device=device)).shape[1:])

    def convert(array: np.ndarray, size: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype).reshape(1, *size)

    class OperatorLinop(Linop):
        """An msmri operator, or its adjoint, in SigPy's clothes."""

        def __init__(self, adjoint: bool) -> None:
            self.adjoint = adjoint
            ends = (inside, outside) if adjoint else (outside, inside)
            super().__init__(*ends, repr_str=type(operator).__name__ + (".H" if adjoint else ""))

        def _apply(self, array: np.ndarray) -> np.ndarray:
            if self.adjoint:
                result = operator.adjoint(convert(array, outside))
            else:
                result = operator(convert(array, image))
            return result.resolve_conj().cpu().numpy().reshape(self.oshape)

        def _adjoint_linop(self) -> Linop:
            return OperatorLinop(not self.adjoint)

        def _normal_linop(self) -> Linop:
            return self.H * self if self.adjoint else NormalLinop()

    class NormalLinop(Linop):
        """The normal operator, through the shortcut it may have."""

        def __init__(self) -> None:
            super().__init__(inside, inside, repr_str=f"{type(operator).__name__}.N")

        def _apply(self, array: np.ndarray) -> np.ndarray:
            return operator.normal(convert(array, image)).resolve_conj().cpu().numpy().reshape(inside)

        def _adjoint_linop(self) -> Linop:
            return self

    return OperatorLinop(adjoint=False)


def _parts(operator: LinearOperator) -> list[LinearOperator]:
    if isinstance(operator, Composed):
        return _parts(operator.outer) + _parts(operator.inner)
    return [operator]
