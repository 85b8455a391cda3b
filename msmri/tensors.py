"""Shape aliases and the one function that draws noise."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Complex, Float, Inexact
from torch import Generator, Tensor

Image = Inexact[Tensor, "*batch channel y x"]  # MRI: complex, one channel per set of maps; photographs: real, 3
KSpace = Inexact[Tensor, "*batch coil ky kx"]  # measurement space, centred: zero frequency at index n // 2
Maps = Complex[Tensor, "*batch set coil y x"]  # coil sensitivities; set = 1, or 2 for soft-SENSE
Mask = Bool[Tensor, "*batch 1 ky kx"]  # ky = 1 for whole lines (columns), the usual Cartesian case
Sigma = Float[Tensor, "*batch 1 ky kx"]  # std of each real component; broadcasts against k-space or image
Rng = Sequence[Generator]  # one generator a sample, so that the batch size never changes a result


def normal_like(values: Tensor, rng: Rng) -> Tensor:
    """Draw standard normal noise of the shape, dtype and device of ``values``.

    Every real component has standard deviation 1, so a complex entry has variance 2 (``torch.randn`` would give 1).
    The first axis of ``values`` is the sample axis and must be as long as ``rng``; sample ``i`` is drawn from
    ``rng[i]`` alone, on the CPU, so that neither the batch size nor the device changes what a seed means.

    Raises
    ------
    ValueError
        If the number of generators is not the length of the first axis.
    """
    if len(rng) != values.shape[0]:
        raise ValueError(f"{values.shape[0]} samples need as many generators, got {len(rng)}")
    real = torch.float64 if values.dtype in (torch.float64, torch.complex128) else torch.float32
    shape = (*values.shape[1:], 2) if values.is_complex() else tuple(values.shape[1:])
    noise = torch.stack([torch.randn(shape, generator=generator, dtype=real) for generator in rng])
    if values.is_complex():
        noise = torch.view_as_complex(noise)
    return noise.to(device=values.device, dtype=values.dtype)


def generators(seed: int, n: int, *, first: int = 0) -> list[Generator]:
    """Make ``n`` independent CPU generators: sample ``first + i`` of ``seed`` always gets the same stream."""
    return spawn(torch.Generator().manual_seed(seed), first + n)[first:]


def spawn(rng: Generator, n: int) -> list[Generator]:
    """Start ``n`` independent CPU generators from one, which moves on by ``n`` draws."""
    return [torch.Generator().manual_seed(int(seed)) for seed in torch.randint(0, 2**62, (n,), generator=rng)]
