"""Zero-filled reconstruction: the adjoint of what was measured, coils combined with their maps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from msmri.errors import InputError
from msmri.measurement import Measurement, Reconstruction
from msmri.methods import point_estimate
from msmri.tensors import Rng

REFERENCE = """@article{roemer1990nmr,
  title = {The {NMR} phased array},
  author = {Roemer, P. B. and Edelstein, W. A. and Hayes, C. E. and Souza, S. P. and Mueller, O. M.},
  journal = {Magnetic Resonance in Medicine}, volume = {16}, number = {2}, pages = {192--225}, year = {1990}
}"""


@dataclass(frozen=True)
class ZeroFilled:
    """Inverse Fourier transform with zeros where nothing was measured, coils combined: ``E^H S y``.

    Roemer et al. 1990, for maps of unit root sum of squares and noise that is white across coils.
    """

    name: ClassVar[str] = "zero-filled"
    reference: ClassVar[str] = REFERENCE
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {}

    def __call__(self, measurement: Measurement, rng: Rng) -> Reconstruction:
        """Apply the adjoint; ``rng`` is not used."""
        if measurement.encoding is None:
            where = measurement.source[0] if measurement.source else None
            raise InputError("this method needs coil maps", mend="estimate them first (ESPIRiT)", path=where)
        return point_estimate(measurement.operator.adjoint(measurement.values), measurement)
