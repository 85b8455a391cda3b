"""Simulate undersampled multi-coil brain scans from magnitude volumes, one mask a slice, for training a prior.

    python recipes/simulate_brains.py VOLUMES_FOLDER OUT_FOLDER --split train --subjects 600 --seed 0
    python recipes/simulate_brains.py VOLUMES_FOLDER OUT_FOLDER --subjects 600 --seed 0 --noise 0.1  # the same, noisier

Every simulated subject gets its own volume, slice orientation, rotation, zoom, contrast curve, matrix, coils, phase,
noise level and masks, and is measured once: unsampled k-space is never written to the file. The split names decide
which people are used; those of the shipped prior have licences that allow redistribution (see NOTICE).
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Generator, Tensor

from msmri.io import write_scan
from msmri.physics.coils import root_sum_of_squares
from msmri.physics.fourier import ifft2c
from msmri.physics.masks import RandomLines, draw_masks, slice_seed
from msmri.physics.simulate import change_contrast, coil_maps, simulate_kspace, smooth_field, uniform

# volume: (file, weight, orientations by axis of the slices); s01 and s05 may be one person, as may s03 and s08
SPLITS = {
    "train": {
        "colin27_t1": ("brains_mixed.npz", 3, (0, 1, 2)),
        "s02_t1gd": ("brains_mixed.npz", 3, (0, 1, 2)),
        "s03_t2": ("brains_mixed.npz", 3, (0, 1, 2)),
        "s05_t1": ("brains_mixed.npz", 1, (0,)),
        "s06_t2flair": ("brains_mixed.npz", 3, (0,)),
        "s08_t1": ("brains_mixed.npz", 1, (0, 1, 2)),
        "s08_t2": ("brains_mixed.npz", 1, (0, 1, 2)),
        "s08_flair": ("brains_mixed.npz", 1, (0, 1, 2)),
        "ixi_012_t1": ("brains_ixi_2mm.npz", 1, (0,)),
        "ixi_015_t1": ("brains_ixi_2mm.npz", 1, (0,)),
    },
    "validation": {"s09_t1": ("brains_mixed.npz", 1, (0,)), "s01_pd": ("brains_mixed.npz", 1, (0,))},
    "test": {"s07_t1": ("brains_mixed.npz", 1, (0, 1, 2))},
}


def draw_slices(volume: np.ndarray, axis: int, n: int, rng: Generator) -> Tensor:
    """Take ``n`` slices that hold enough head from the middle four fifths along ``axis``, in 0..1."""
    stack = np.moveaxis(volume, axis, 0)
    if axis != 0:
        stack = stack[:, ::-1]  # superior end up
    filled = (stack > 20).mean((1, 2))
    candidates = np.flatnonzero(filled > 0.35 * filled.max())
    chosen = candidates[torch.randperm(len(candidates), generator=rng)[:n].numpy()]
    return torch.from_numpy(stack[np.sort(chosen)].astype(np.float32) / 255)


def place(slices: Tensor, rng: Generator, *, augment: bool, finer: float) -> tuple[Tensor, tuple[int, int]]:
    """Turn, flip, zoom and centre the slices on a grid, and choose the matrix to acquire.

    A share ``finer`` of the subjects is enlarged, as scans of high resolution, and cut along the rows, as the field of
    view is along the readout, to a band that costs no more than a whole slice of low resolution.
    """
    array = slices.numpy()
    enlarged = augment and finer > 0 and bool(torch.rand((), generator=rng) < finer)
    if augment:
        if torch.rand((), generator=rng) < 0.5:
            array = array[:, :, ::-1]
        array = np.rot90(array, int(torch.randint(0, 4, (), generator=rng)), (1, 2))
        angle = uniform(-20, 20, rng)
        array = ndimage.rotate(array, angle, axes=(1, 2), order=1, reshape=True)
        zoom = uniform(1.1, 1.8, rng) if enlarged else uniform(0.75, 1.1, rng)
        array = ndimage.zoom(array, (1, zoom, zoom * uniform(0.92, 1.08, rng)), order=3 if enlarged else 1).clip(0)
    rows, columns = (np.flatnonzero((array > 0.08).any((0, axis))) for axis in (2, 1))
    array = array[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if enlarged:
        rows = min(array.shape[1], max(72, 26_000 // array.shape[2]))
        top = int(torch.randint(0, array.shape[1] - rows + 1, (), generator=rng))
        array = array[:, top : top + rows]
    fill = 1.0 if enlarged else uniform(0.78, 0.96, rng), uniform(0.78, 0.96, rng)
    grid = [max(64, 2 * math.ceil(size / f / 2)) for size, f in zip(array.shape[1:], fill)]
    padded = np.zeros((len(array), *grid), np.float32)
    corner = [(g - s) // 2 for g, s in zip(grid, array.shape[1:])]
    padded[:, corner[0] : corner[0] + array.shape[1], corner[1] : corner[1] + array.shape[2]] = array
    keep = uniform(0.6, 1.0, rng) if augment else 1.0
    matrix = [max(64, 8 * round(g * keep / 8)) for g in grid]
    longest = 320 if enlarged else 224
    while max(matrix) > longest or matrix[0] * matrix[1] > 200 * 176:
        matrix = [max(64, 8 * round(0.9 * m / 8)) for m in matrix]
    grid_size = [max(g, m) for g, m in zip(grid, matrix)]
    widened = np.zeros((len(array), *grid_size), np.float32)
    corner = [(w - g) // 2 for w, g in zip(grid_size, grid)]
    widened[:, corner[0] : corner[0] + grid[0], corner[1] : corner[1] + grid[1]] = padded
    return torch.from_numpy(widened), (matrix[0], matrix[1])


def place_upright(slices: Tensor, side: int, rng: Generator) -> tuple[Tensor, tuple[int, int]]:
    """Put axial slices upright on a square grid, turned a little, for a matrix of ``side`` x ``side``."""
    array = slices.numpy()
    if torch.rand((), generator=rng) < 0.5:
        array = array[:, :, ::-1]
    array = ndimage.rotate(array, uniform(-6, 6, rng), axes=(1, 2), order=1, reshape=True).clip(0)
    rows, columns = (np.flatnonzero((array > 0.08).any((0, axis))) for axis in (2, 1))
    array = array[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    grid = max(side, 2 * math.ceil(max(array.shape[1:]) / uniform(0.82, 0.94, rng) / 2))
    padded = np.zeros((len(array), grid, grid), np.float32)
    corner = [(grid - size) // 2 for size in array.shape[1:]]
    padded[:, corner[0] : corner[0] + array.shape[1], corner[1] : corner[1] + array.shape[2]] = array
    return torch.from_numpy(padded), (side, side)


def simulate_subject(
    volumes: Path,
    split: str,
    rng: Generator,
    *,
    slices: int,
    augment: bool,
    finer: float = 0.0,
    noise: float | None = None,
    upright: int | None = None,
    coils: int | None = None,
) -> dict:
    """Draw one simulated subject: fully sampled k-space (slices, coil, ky, kx), noise level and where it came from.

    ``noise`` is the std of each real component of k-space over the subject's brightest pixel; drawn without it.
    ``upright`` is the side of the matrix of axial slices that look like one another, for priors to generate from.
    """
    names = list(SPLITS[split])
    weights = torch.tensor([float(SPLITS[split][name][1]) for name in names])
    name = names[int(torch.multinomial(weights, 1, generator=rng))]
    file, _, axes = SPLITS[split][name]
    with np.load(volumes / file) as archive:
        volume = archive[name]
    axis = axes[int(torch.randint(0, len(axes), (), generator=rng))] if upright is None else 0
    drawn = draw_slices(volume, axis, slices, rng)
    if upright is None:
        magnitude, matrix = place(drawn, rng, augment=augment, finer=finer)
    else:
        magnitude, matrix = place_upright(drawn, upright, rng)
    if augment and upright is None:
        magnitude = change_contrast(magnitude, rng)
    elif augment:
        magnitude = magnitude ** uniform(0.7, 1.3, rng)
    bias = torch.exp(uniform(0, 0.45, rng) * smooth_field((magnitude.shape[1], magnitude.shape[2]), rng, order=3))
    n_coils = (4, 6, 8, 8, 10, 12)[int(torch.randint(0, 6, (), generator=rng))]
    maps = coil_maps((magnitude.shape[1], magnitude.shape[2]), coils or n_coils, rng)
    # relative to the 99th percentile of the image, which is 1 to within some per cent here
    level = 10 ** uniform(-2.7, -1.5, rng)  # drawn in any case, so that the subject is the same with other noise
    image = magnitude * bias / torch.quantile((magnitude * bias).flatten()[::7], 0.99)
    if noise is not None:
        level = noise * float(image.max())
    kspace, _ = simulate_kspace(image, maps, rng, noise_std=level, shape=matrix)
    return {"kspace": kspace, "volume": name, "axis": axis, "noise_std": level}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=list(SPLITS), default="train")
    parser.add_argument("--subjects", type=int, default=600)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="number of the first subject")
    parser.add_argument("--acceleration", type=float, default=4.0)
    parser.add_argument("--finer", type=float, default=0.0, help="share of enlarged subjects in the train split")
    parser.add_argument("--centre", type=float, default=20 / 256, help="share of the columns always measured")
    parser.add_argument("--upright", type=int, help="axial slices, upright, on matrices of this side: for generation")
    parser.add_argument("--noise", type=float, help="std of each real component over the image's maximum; else random")
    parser.add_argument("--coils", type=int, help="coils of every subject; else 4 to 12")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="write fully sampled scans with their reference (tests)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    law = RandomLines(acceleration=options.acceleration, centre_fraction=options.centre)
    begun = time.time()
    for number in range(options.first, options.first + options.subjects):
        path = options.out / f"{options.split}_{number:04d}.h5"
        if path.exists():
            continue  # an interrupted run goes on where it stopped
        rng = Generator().manual_seed(slice_seed(f"{options.split}{number}", options.seed))
        subject = simulate_subject(
            options.volumes,
            options.split,
            rng,
            slices=options.slices,
            augment=options.split == "train",
            finer=options.finer,
            noise=options.noise,
            upright=options.upright,
            coils=options.coils,
        )
        kspace = subject.pop("kspace")
        attributes = {"acquisition": subject["volume"], "patient_id": f"{options.split}{number}"}
        attributes["simulation"] = json.dumps(subject)
        if options.full:
            target = root_sum_of_squares(ifft2c(kspace))
            write_scan(path, kspace, target=target, attributes=attributes, compress=True)
        else:
            names = [f"{path.name}#{index}" for index in range(len(kspace))]
            seeds = [Generator().manual_seed(slice_seed(name, options.seed)) for name in names]
            mask = draw_masks(law, (kspace.shape[-2], kspace.shape[-1]), seeds)
            kspace = torch.where(mask, kspace, torch.zeros((), dtype=kspace.dtype))
            write_scan(path, kspace, mask=mask[:, 0].numpy(), attributes=attributes, compress=True)
        if number % 20 == 0:
            print(f"{path.name} {tuple(kspace.shape)} {subject}  {time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
