"""L1-wavelet compressed sensing, solved by sigpy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from msmri.errors import InputError
from msmri.measurement import Measurement, Reconstruction
from msmri.methods import point_estimate, solve_slices
from msmri.tensors import Rng

if TYPE_CHECKING:
    import numpy as np
    from sigpy.linop import Linop

REFERENCE = """@article{lustig2007sparse,
  title = {Sparse {MRI}: The application of compressed sensing for rapid {MR} imaging},
  author = {Lustig, Michael and Donoho, David and Pauly, John M.},
  journal = {Magnetic Resonance in Medicine}, volume = {58}, number = {6}, pages = {1182--1195}, year = {2007}
}"""


@dataclass(frozen=True)
class L1Wavelet:
    """Minimise ``1/2 ||S E x - y||^2 + lambda ||W x||_1`` for a Daubechies wavelet transform W. Lustig et al. 2007.

    The problem and the accelerated proximal gradient solver are those of ``sigpy.mri.app.L1WaveletRecon``, extended
    to several sets of maps (each set transformed by itself). Two differences: the step is the exact bound
    1 / max eig(E^H E) in place of a power iteration from a random start, so that a result needs no seed, and the
    weight is relative.

    Parameters
    ----------
    weight
        Regularisation relative to the peak of the slice's zero-filled image: ``lambda = weight * max |E^H S y|``, so
        that it does not depend on the units of the file. The default suits brain scans at R = 4 to 6;
        :func:`msmri.methods.tuning.tune` finds the best one for given validation scans.
    iterations
        Steps of the solver.
    wavelet
        Name of the wavelet, as in PyWavelets.
    """

    weight: float = 5e-4
    iterations: int = 100
    wavelet: str = "db4"

    name: ClassVar[str] = "l1-wavelet"
    reference: ClassVar[str] = REFERENCE
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {"weight": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)}

    def __post_init__(self) -> None:
        import pywt

        if not (self.weight >= 0 and self.iterations >= 1):
            raise InputError(
                f"l1-wavelet cannot use weight={self.weight}, iterations={self.iterations}",
                mend="the weight must not be negative, iterations at least 1",
            )
        if self.wavelet not in pywt.wavelist(kind="discrete"):
            raise InputError(f"unknown wavelet '{self.wavelet}'", mend="use a PyWavelets name such as db4 or haar")

    def __call__(self, measurement: Measurement, rng: Rng) -> Reconstruction:
        """Reconstruct each slice by itself; ``rng`` is not used."""
        image = solve_slices(measurement, self._solve)
        return point_estimate(image, measurement, weight=self.weight, iterations=self.iterations)

    def _solve(self, sense: "Linop", values: "np.ndarray", power: float) -> "np.ndarray":
        import sigpy.app

        transform = sigpy.linop.Wavelet(sense.ishape, axes=(-2, -1), wave_name=self.wavelet)
        proximal = sigpy.prox.UnitaryTransform(sigpy.prox.L1Reg(transform.oshape, self.weight), transform)
        return sigpy.app.LinearLeastSquares(
            sense, values, proxg=proximal, alpha=1 / power, max_iter=self.iterations, show_pbar=False
        ).run()
