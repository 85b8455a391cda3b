"""Simulate multi-coil k-space from a magnitude image: coils, phase, contrast, noise, undersampling."""

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Generator, Tensor

from msmri.physics.fourier import fft2c, ifft2c
from msmri.tensors import KSpace, Maps, normal_like, spawn


def uniform(low: float, high: float, rng: Generator) -> float:
    """Draw one number uniformly from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def loop_field(points: Tensor, centre: Tensor, axis: Tensor, *, radius: float, segments: int = 24) -> Tensor:
    """Integrate the field of a circular current loop at ``points`` (n, 3) by the law of Biot and Savart.

    Returns
    -------
    Tensor
        (n, 3), arbitrary units.
    """
    axis = axis / axis.norm()
    helper = torch.tensor([0.0, 0.0, 1.0]) if abs(float(axis[2])) < 0.9 else torch.tensor([1.0, 0.0, 0.0])
    first = torch.linalg.cross(axis, helper.to(axis))
    first = first / first.norm()
    second = torch.linalg.cross(axis, first)
    angle = torch.arange(segments, dtype=points.dtype) * (2 * math.pi / segments)
    wire = centre + radius * (angle.cos()[:, None] * first + angle.sin()[:, None] * second)
    current = -angle.sin()[:, None] * first + angle.cos()[:, None] * second
    away = points[:, None, :] - wire
    # the wire is 5 % of its radius thick, so that a point on it stays finite
    distance = (away.square().sum(-1) + (0.05 * radius) ** 2).sqrt()
    return (torch.linalg.cross(current.expand_as(away), away, dim=-1) / distance[..., None] ** 3).sum(1)


def coil_maps(shape: tuple[int, int], n_coils: int, rng: Generator, *, oblique: bool = True) -> Maps:
    """Draw sensitivities of loop coils on an elliptic cylinder around the field of view.

    The receive sensitivity of a loop is the conjugate of its transverse field, B_x - i B_y (Hoult 2000). Loops differ
    in distance, size, tilt and phase from draw to draw; with ``oblique``, the slice may cut the cylinder lengthwise.

    Returns
    -------
    Tensor
        Complex (1, 1, n_coils, y, x) with sum over coils of abs^2 = 1 everywhere.
    """
    coarse = 40
    grid = torch.linspace(-1, 1, coarse, dtype=torch.float64)
    v, u = torch.meshgrid(grid, grid, indexing="ij")
    plane = int(torch.randint(0, 3, (), generator=rng)) if oblique else 0
    offset = torch.full_like(u, uniform(-0.5, 0.5, rng))
    points = torch.stack([(u, v, offset), (u, offset, v), (offset, u, v)][plane], -1).reshape(-1, 3)
    rings = 1 if n_coils <= 6 else int(torch.randint(1, 3, (), generator=rng))
    semi = (uniform(1.15, 1.7, rng), uniform(1.15, 1.7, rng))
    turn, spread, radius = uniform(0, 2 * math.pi, rng), uniform(0.4, 0.9, rng), uniform(0.35, 0.8, rng)
    maps = []
    for coil in range(n_coils):
        ring, place = coil % rings, coil // rings
        angle = turn + 2 * math.pi * (place + 0.5 * ring) / math.ceil(n_coils / rings) + uniform(-0.15, 0.15, rng)
        height = (spread * (2 * ring - 1) if rings > 1 else 0.0) + uniform(-0.1, 0.1, rng)
        centre = torch.tensor([semi[0] * math.cos(angle), semi[1] * math.sin(angle), height], dtype=torch.float64)
        axis = torch.tensor([-math.cos(angle), -math.sin(angle), uniform(-0.3, 0.3, rng)], dtype=torch.float64)
        field = loop_field(points, centre, axis, radius=radius * uniform(0.85, 1.15, rng))
        transverse = torch.complex(field[:, 0], -field[:, 1])
        if plane != 0:  # a lengthwise slice sees the field along the cylinder as one of its transverse components
            transverse = torch.complex(field[:, 0], -field[:, 1] - 0.5 * field[:, 2])
        phase = uniform(0, 2 * math.pi, rng)
        maps.append((transverse * complex(math.cos(phase), math.sin(phase))).reshape(coarse, coarse))
    stack = torch.stack(maps)
    fine = torch.nn.functional.interpolate(
        torch.view_as_real(stack).permute(3, 0, 1, 2), size=shape, mode="bicubic", align_corners=True
    )
    stack = torch.complex(fine[0], fine[1])
    # receivers are wired in no order, and with unlike gains
    gain = torch.exp(0.15 * torch.randn(n_coils, generator=rng, dtype=torch.float64))[:, None, None]
    stack = stack[torch.randperm(n_coils, generator=rng)] * gain
    power = stack.abs().square().sum(0, keepdim=True).sqrt().clamp_min(1e-12)
    return (stack / power).to(torch.complex64)[None, None]


def smooth_field(shape: tuple[int, int], rng: Generator, *, order: int = 4) -> Tensor:
    """Draw a smooth real field (y, x) of unit variance from low-order cosines with random phases."""
    y = torch.linspace(0, 1, shape[0])[:, None]
    x = torch.linspace(0, 1, shape[1])[None, :]
    field = torch.zeros(shape)
    for row in range(order):
        for column in range(order):
            size = uniform(-1, 1, rng) / (1 + row**2 + column**2)
            phases = uniform(0, 2 * math.pi, rng), uniform(0, 2 * math.pi, rng)
            field = field + size * torch.cos(math.pi * row * y + phases[0]) * torch.cos(
                math.pi * column * x + phases[1]
            )
    return (field - field.mean()) / field.std().clamp_min(1e-6)


def change_contrast(image: Tensor, rng: Generator) -> Tensor:
    """Map the grey values (0..1) of a magnitude image through a random smooth curve, to vary tissue contrast.

    The curve starts at 0, so that air stays dark, and need not be monotone: T1- and T2-like orders both occur.
    """
    knots = torch.linspace(0, 1, 6)
    values = torch.rand(6, generator=rng)
    values[0] = 0.0
    mixture = uniform(0, 1, rng)
    values = mixture * values + (1 - mixture) * knots ** uniform(0.6, 1.6, rng)
    fine = torch.linspace(0, 1, 256)
    curve = torch.from_numpy(np.interp(fine.numpy(), knots.numpy(), values.numpy())).float()
    curve = torch.from_numpy(ndimage.gaussian_filter1d(curve.numpy(), 16.0, mode="nearest"))
    curve = (curve - curve[0]).clamp_min(0)
    position = image.clamp(0, 1) * 255
    low = position.floor().long().clamp(max=254)
    return (curve[low] + (position - low) * (curve[low + 1] - curve[low])) / curve.max().clamp_min(1e-3)


def crop_kspace(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resample images (..., y, x) to a smaller matrix by keeping the centre of their k-space (true Gibbs ringing).

    The mean intensity is preserved.
    """
    kspace = fft2c(image)
    top, left = image.shape[-2] // 2 - shape[0] // 2, image.shape[-1] // 2 - shape[1] // 2
    if shape[0] > image.shape[-2] or shape[1] > image.shape[-1]:
        raise ValueError(f"cannot crop {tuple(image.shape[-2:])} to {shape}")
    kept = kspace[..., top : top + shape[0], left : left + shape[1]]
    return ifft2c(kept) * math.sqrt(shape[0] * shape[1] / (image.shape[-2] * image.shape[-1]))


def simulate_kspace(
    magnitude: Tensor, maps: Maps, rng: Generator, *, noise_std: float, shape: tuple[int, int] | None = None
) -> tuple[KSpace, Tensor]:
    """Encode magnitude images with a random phase through coils, crop the matrix and add white noise.

    Parameters
    ----------
    magnitude
        Real (slices, y, x).
    maps
        Complex (1, 1, coil, y, x) on the grid of ``magnitude``; all slices share them.
    noise_std
        Standard deviation of each real component of each coil's k-space.
    shape
        Acquired matrix; the grid of ``magnitude`` where not given. A finer grid than the matrix avoids simulating
        and reconstructing with the same discretisation.

    Returns
    -------
    kspace
        Complex64 (slices, coil, ky, kx), fully sampled and noisy.
    clean
        The same without noise.
    """
    size = magnitude.shape[-2:]
    strength = uniform(0.2, 2.5, rng)
    phase = strength * smooth_field((size[0], size[1]), rng) + uniform(0, 2 * math.pi, rng)
    drift = uniform(-0.5, 0.5, rng) * smooth_field((size[0], size[1]), rng)
    steps = torch.linspace(-1, 1, magnitude.shape[0])[:, None, None]
    image = torch.polar(magnitude.float(), (phase + steps * drift).float())
    coils = maps[0, 0] * image[:, None]
    clean = fft2c(coils if shape is None else crop_kspace(coils, shape)).to(torch.complex64)
    noise = normal_like(clean, spawn(rng, len(clean)))
    return clean + noise_std * noise, clean


def phantom(shape: tuple[int, int], rng: Generator, *, ellipses: int = 12) -> Tensor:
    """Draw a head-like phantom (y, x) in 0..1: skull, brain and random ellipses inside, after Shepp and Logan 1974."""
    y = torch.linspace(-1, 1, shape[0])[:, None]
    x = torch.linspace(-1, 1, shape[1])[None, :]
    head = ((x / 0.72) ** 2 + (y / 0.92) ** 2 <= 1).float()
    brain = ((x / 0.66) ** 2 + (y / 0.86) ** 2 <= 1).float()
    image = 0.9 * head - 0.55 * brain
    for _ in range(ellipses):
        centre = uniform(-0.4, 0.4, rng), uniform(-0.55, 0.55, rng)
        axes = uniform(0.04, 0.3, rng), uniform(0.04, 0.3, rng)
        angle, value = uniform(0, math.pi, rng), uniform(-0.25, 0.35, rng)
        u = (x - centre[0]) * math.cos(angle) + (y - centre[1]) * math.sin(angle)
        v = (y - centre[1]) * math.cos(angle) - (x - centre[0]) * math.sin(angle)
        image = image + value * ((u / axes[0]) ** 2 + (v / axes[1]) ** 2 <= 1).float() * brain
    return image.clamp(0, 1)
