"""What an ISMRMRD header tells of a fastMRI file, read and written."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np

from msmri.errors import InputWarning

_SPACES = ("encodedSpace", "reconSpace")
_LINES = ("encodingLimits", "kspace_encoding_step_1")


@dataclass(frozen=True)
class Header:
    """What the ISMRMRD header of a fastMRI file tells.

    Parameters
    ----------
    encoded
        (rows, columns) of the encoded k-space: x and y of ISMRMRD.
    recon
        (rows, columns) of the image to give back.
    centre
        Index, among the acquired columns, of the central one; None if not told.
    maximum
        Index of the last acquired column; None if not told.
    """

    encoded: tuple[int, int]
    recon: tuple[int, int]
    centre: int | None = None
    maximum: int | None = None

    @property
    def padding_left(self) -> int:
        """First acquired column, as fastMRI computes it."""
        return self.encoded[1] // 2 - self.centre if self.centre is not None else 0

    @property
    def padding_right(self) -> int:
        """One past the last acquired column, as fastMRI computes it."""
        return self.padding_left + self.maximum + 1 if self.maximum is not None else self.encoded[1]


def write_header(header: Header) -> str:
    """Write a minimal valid ISMRMRD header; pixels are 1 mm wide and the field strength is not told."""
    from ismrmrd import xsd

    def space(matrix: tuple[int, int]) -> xsd.encodingSpaceType:
        rows, columns = matrix
        return xsd.encodingSpaceType(
            matrixSize=xsd.matrixSizeType(x=rows, y=columns, z=1),
            fieldOfView_mm=xsd.fieldOfViewMm(x=float(rows), y=float(columns), z=1.0),
        )

    rows, columns = header.encoded
    centre = columns // 2 if header.centre is None else header.centre
    maximum = columns - 1 if header.maximum is None else header.maximum
    limits = xsd.encodingLimitsType(
        kspace_encoding_step_0=xsd.limitType(minimum=0, maximum=rows - 1, center=rows // 2),
        kspace_encoding_step_1=xsd.limitType(minimum=0, maximum=maximum, center=centre),
    )
    encoding = xsd.encodingType(
        encodedSpace=space(header.encoded),
        reconSpace=space(header.recon),
        encodingLimits=limits,
        trajectory=xsd.trajectoryType.CARTESIAN,
    )
    conditions = xsd.experimentalConditionsType(H1resonanceFrequency_Hz=0)
    return xsd.ToXML(xsd.ismrmrdHeader(experimentalConditions=conditions, encoding=[encoding]))


def parse_header(xml: bytes | str) -> Header:
    """Parse an ISMRMRD header, with ismrmrd's own classes or, should they refuse it, element by element.

    Raises
    ------
    ValueError
        If the header is not XML or does not tell both matrix sizes.
    """
    from ismrmrd import xsd

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a value that cannot be converted is only warned of
            encoding = xsd.CreateFromDocument(xml).encoding[0]
        line = encoding.encodingLimits.kspace_encoding_step_1
        sizes = [space.matrixSize for space in (encoding.encodedSpace, encoding.reconSpace)]
        matrices = [(size.x, size.y) for size in sizes]
        limits = (line.center, line.maximum) if line is not None else (None, None)
    except Exception:
        try:
            root = ElementTree.fromstring(xml)
        except ElementTree.ParseError as error:
            raise ValueError(f"not XML: {error}") from error

        def number(*names: str) -> int | None:
            text = root.findtext("./" + "/".join(f"{{*}}{name}" for name in ("encoding", *names)))
            return int(text) if text is not None else None

        matrices = [(number(space, "matrixSize", "x"), number(space, "matrixSize", "y")) for space in _SPACES]
        limits = (number(*_LINES, "center"), number(*_LINES, "maximum"))
    if any(n is None or n < 1 for matrix in matrices for n in matrix):
        raise ValueError("no matrix sizes")
    return Header(matrices[0], matrices[1], *limits)


def read_header(file: h5py.File, path: Path) -> Header | None:
    """Read the header of an open file; warn and give None where there is none that can be used."""
    if "ismrmrd_header" not in file:
        told = f"{path}: no ismrmrd_header, so the image size is the reference's, or that of kspace"
        warnings.warn(told, InputWarning, stacklevel=3)
        return None
    text = np.asarray(file["ismrmrd_header"][()]).reshape(-1)
    try:
        return parse_header(text[0] if len(text) == 1 else text.tobytes())
    except (ValueError, TypeError) as error:
        told = f"{path}: ismrmrd_header cannot be read ({error}), so it is not used"
        warnings.warn(told, InputWarning, stacklevel=3)
        return None
