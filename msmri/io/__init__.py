"""Reading and writing: scans in the fastMRI layout, reconstructions, coil maps, manifests."""

from msmri.errors import InputWarning
from msmri.io.fastmri import Scan, list_scans, open_scan, write_scan
from msmri.io.header import Header
from msmri.io.kspace import centre_crop, crop_readout, undersample
from msmri.io.output import (
    ReconstructionWriter,
    atomic,
    check_writable,
    environment,
    read_maps,
    read_reconstruction,
    sha256,
    write_manifest,
    write_maps,
)

__all__ = [
    "Header",
    "InputWarning",
    "ReconstructionWriter",
    "Scan",
    "atomic",
    "centre_crop",
    "check_writable",
    "crop_readout",
    "environment",
    "list_scans",
    "open_scan",
    "read_maps",
    "read_reconstruction",
    "sha256",
    "undersample",
    "write_manifest",
    "write_maps",
    "write_scan",
]
