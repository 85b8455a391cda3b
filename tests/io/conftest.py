from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest


def phantom_kspace(slices: int, coils: int, shape: tuple[int, int], object_rows: int, seed: int) -> np.ndarray:
    """Centred orthonormal k-space (slices, coil, ky, kx) of random ellipses seen by Gaussian coils, plus noise."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij")
    y, x = y / object_rows, x / shape[1]
    images = np.zeros((slices, coils, *shape), dtype=np.complex128)
    for one in images:
        body = np.zeros(shape)
        for _ in range(5):
            cy, cx, ry, rx = *rng.uniform(-0.2, 0.2, 2), *rng.uniform(0.05, 0.25, 2)
            body += rng.uniform(0.2, 1) * (((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1)
        for coil in range(coils):
            angle = 2 * np.pi * coil / coils
            maps = np.exp(-((y - 0.5 * np.sin(angle)) ** 2) - (x - 0.5 * np.cos(angle)) ** 2 + 1j * (angle + y))
            one[coil] = body * maps
    axes = (-2, -1)
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images, axes), norm="ortho"), axes)
    return kspace + 1e-3 * (rng.standard_normal(kspace.shape) + 1j * rng.standard_normal(kspace.shape))


def header_xml(encoded: tuple[int, int], recon: tuple[int, int], centre: int, maximum: int) -> bytes:
    from ismrmrd import xsd

    def space(rows: int, columns: int) -> object:
        fov = xsd.fieldOfViewMm(x=float(rows), y=float(columns), z=5.0)
        return xsd.encodingSpaceType(matrixSize=xsd.matrixSizeType(x=rows, y=columns, z=1), fieldOfView_mm=fov)

    lines = xsd.limitType(minimum=0, maximum=maximum, center=centre)
    encoding = xsd.encodingType(
        encodedSpace=space(*encoded),
        reconSpace=space(*recon),
        encodingLimits=xsd.encodingLimitsType(kspace_encoding_step_1=lines),
        trajectory=xsd.trajectoryType.CARTESIAN,
    )
    conditions = xsd.experimentalConditionsType(H1resonanceFrequency_Hz=123)
    return xsd.ToXML(xsd.ismrmrdHeader(experimentalConditions=conditions, encoding=[encoding])).encode()


@pytest.fixture
def make_scan(tmp_path: Path) -> Callable[..., Path]:
    """Write a fastMRI-like file with plain h5py: options name what is unusual about it."""

    def make(
        name: str = "scan.h5",
        *,
        slices: int = 3,
        coils: int = 4,
        shape: tuple[int, int] = (48, 40),
        recon: tuple[int, int] | None = None,
        padding: tuple[int, int] = (0, 0),
        header: bool = True,
        header_padding: tuple[int, int] | None = None,
        target: bool = True,
        single: bool = False,
        mask: np.ndarray | None = None,
        zero: np.ndarray | None = None,
        seed: int = 0,
        kspace: np.ndarray | None = None,
    ) -> Path:
        recon = recon or shape
        if kspace is None:
            kspace = phantom_kspace(slices, 1 if single else coils, shape, min(shape[0], recon[0]), seed)
            columns = np.arange(shape[1])
            kspace[..., (columns < padding[0]) | (columns >= shape[1] - padding[1])] = 0
            kspace = kspace[:, 0] if single else kspace
            images = np.abs(np.fft.ifft2(np.fft.ifftshift(kspace, (-2, -1)), norm="ortho"))
            images = np.fft.fftshift(images, (-2, -1))
            images = images if single else np.sqrt((images**2).sum(1))
            top, side = (shape[0] - recon[0]) // 2, (shape[1] - recon[1]) // 2
            images = images[:, top : top + recon[0], side : side + recon[1]].astype(np.float32)
            if zero is not None:
                kspace = np.where(zero, 0, kspace)
            kspace = kspace.astype(np.complex64)
        left, right = padding if header_padding is None else header_padding
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            chunks = (*[1] * (kspace.ndim - 2), *kspace.shape[-2:]) if kspace.ndim > 2 and kspace.size else None
            file.create_dataset("kspace", data=kspace, chunks=chunks)
            if header:
                xml = header_xml(shape, recon, shape[1] // 2 - left, shape[1] - left - right - 1)
                file["ismrmrd_header"] = xml
            if target:
                file["reconstruction_esc" if single else "reconstruction_rss"] = images
                file.attrs["max"], file.attrs["norm"] = float(images.max()), float(np.linalg.norm(images))
            if mask is not None:
                file["mask"] = mask
            file.attrs["acquisition"], file.attrs["patient_id"] = "AXT2", "someone"
        return path

    return make


@pytest.fixture
def column_mask() -> Callable[..., np.ndarray]:
    """Draw a column mask (kx,) uint8 with a full centre."""

    def draw(columns: int = 40, *, centre: int = 8, seed: int = 0) -> np.ndarray:
        mask = np.random.default_rng(seed).random(columns) < 0.3
        mask[columns // 2 - centre // 2 : columns // 2 + centre // 2] = True
        mask[[0, 1, -1]] = False
        return mask.astype(np.uint8)

    return draw
