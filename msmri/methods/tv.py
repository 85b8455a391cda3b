"""Total-variation compressed sensing, solved by sigpy."""

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

REFERENCE = """@article{block2007undersampled,
  title = {Undersampled radial {MRI} with multiple coils. Iterative image reconstruction using a total variation
           constraint},
  author = {Block, Kai Tobias and Uecker, Martin and Frahm, Jens},
  journal = {Magnetic Resonance in Medicine}, volume = {57}, number = {6}, pages = {1086--1098}, year = {2007}
}"""
DIFFERENCES_POWER = 8.0  # bound on the largest eigenvalue of G^H G: 4 an axis, reached where a size is even


@dataclass(frozen=True)
class TotalVariation:
    """Minimise ``1/2 ||S E x - y||^2 + lambda ||G x||_1`` for circular finite differences G along y and x.

    Block et al. 2007. The problem and the primal-dual solver (Chambolle and Pock 2011) are those of
    ``sigpy.mri.app.TotalVariationRecon``, extended to several sets of maps (each set differenced by itself). Three
    differences: the weight is relative; the primal step is ``1 / (dual_step (max eig(E^H E) + 8))``, a bound in place
    of a power iteration from a random start, so that a result needs no seed; and the dual step is small, because with
    sigpy's default of 1 the solver is still far from the minimum after hundreds of iterations.

    Parameters
    ----------
    weight
        Regularisation relative to the peak of the slice's zero-filled image: ``lambda = weight * max |E^H S y|``, so
        that it does not depend on the units of the file. The default suits brain scans at R = 4 to 6;
        :func:`msmri.methods.tuning.tune` finds the best one for given validation scans.
    iterations
        Steps of the solver.
    dual_step
        Balances the primal and the dual step; changes how fast the solver converges, not where to.
    """

    weight: float = 5e-4
    iterations: int = 200
    dual_step: float = 0.01

    name: ClassVar[str] = "tv"
    reference: ClassVar[str] = REFERENCE
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {"weight": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)}

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and self.iterations >= 1 and self.dual_step > 0):
            raise InputError(
                f"tv cannot use weight={self.weight}, iterations={self.iterations}, dual_step={self.dual_step}",
                mend="the weight must not be negative, iterations at least 1, the step positive",
            )

    def __call__(self, measurement: Measurement, rng: Rng) -> Reconstruction:
        """Reconstruct each slice by itself; ``rng`` is not used."""
        image = solve_slices(measurement, self._solve)
        return point_estimate(image, measurement, weight=self.weight, iterations=self.iterations)

    def _solve(self, sense: "Linop", values: "np.ndarray", power: float) -> "np.ndarray":
        import sigpy.app

        differences = sigpy.linop.FiniteDifference(sense.ishape, axes=(-2, -1))
        return sigpy.app.LinearLeastSquares(
            sense,
            values,
            proxg=sigpy.prox.L1Reg(differences.oshape, self.weight),
            G=differences,
            tau=1 / (self.dual_step * (power + DIFFERENCES_POWER)),
            sigma=self.dual_step,
            max_iter=self.iterations,
            show_pbar=False,
        ).run()
