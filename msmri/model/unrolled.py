"""Unrolled reconstruction: a residual network and data consistency by conjugate gradients, in turn, weights shared."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint as recompute

from msmri.model.adm import pad_to_multiple, remove_padding
from msmri.physics.operators import LinearOperator, Subsample
from msmri.physics.solve import conjugate_gradient
from msmri.tensors import Image, KSpace, Mask


class ResNet(nn.Module):
    """Residual network without biases and norms, so that scaling its input scales its output. Yaman et al. 2020.

    First convolution; blocks of convolution, ReLU, convolution, times ``scale``, plus input; one more convolution,
    plus what the first gave; last convolution. All are 3 x 3 with zero padding, weights start as N(0, 0.05^2).

    Parameters
    ----------
    channels, blocks
        Width and number of residual blocks: 64 and 15 in the paper.
    tied
        Let both convolutions of a block share their weights, as the authors' code does: 592,128 parameters instead of
        1,145,088 at the paper's size.
    scale
        What a block's change is multiplied by.
    in_channels
        Real channels of input and output: real and imaginary part.
    patch
        Side of the pixel blocks that are folded into channels first; 1 in the paper. 2 is four times cheaper.
    zero_last
        Start with a network that gives zero, for ``Unrolled(residual=True)``, which then begins as plain least squares.
    """

    def __init__(
        self,
        channels: int = 64,
        blocks: int = 15,
        *,
        tied: bool = False,
        scale: float = 0.1,
        in_channels: int = 2,
        patch: int = 1,
        zero_last: bool = False,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.first = _convolution(in_channels * patch**2, channels)
        self.blocks = nn.ModuleList(_Block(channels, tied, scale) for _ in range(blocks))
        self.collect = _convolution(channels, channels)
        self.last = _convolution(channels, in_channels * patch**2)
        if zero_last:
            nn.init.zeros_(self.last.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Map real (b, in_channels, y, x) of any size to the same shape."""
        height, width = image.shape[-2:]
        padded = pad_to_multiple(image, self.patch)
        folded = nn.functional.pixel_unshuffle(padded, self.patch) if self.patch > 1 else padded
        first = self.first(folded.contiguous(memory_format=torch.channels_last))
        inner = first
        for block in self.blocks:
            inner = block(inner)
        inner = self.collect(inner) + first
        with torch.autocast(inner.device.type, enabled=False):  # the image itself is not rounded to bfloat16
            output = self.last(inner.to(self.last.weight.dtype))
        output = nn.functional.pixel_shuffle(output, self.patch) if self.patch > 1 else output
        return remove_padding(output, (height, width))


class _Block(nn.Module):
    def __init__(self, channels: int, tied: bool, scale: float) -> None:
        super().__init__()
        self.first = _convolution(channels, channels)
        self.second = None if tied else _convolution(channels, channels)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        second = self.first if self.second is None else self.second
        return torch.add(x, second(self.first(x).relu_()), alpha=self.scale)


def _convolution(n_in: int, n_out: int) -> nn.Conv2d:
    layer = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    nn.init.normal_(layer.weight, std=0.05)
    return layer


class Unconditioned(nn.Module):
    """A network that takes a condition vector, such as ``UNet``, as one that takes none: it always sees zeros.

    Lets SSDU be compared with other methods on one and the same backbone, as its authors advise.
    """

    def __init__(self, network: nn.Module, conditions: int = 4) -> None:
        super().__init__()
        self.network, self.conditions = network, conditions

    def forward(self, image: Tensor) -> Tensor:
        """Apply the network to real (b, c, y, x)."""
        return self.network(image, image.new_zeros(len(image), self.conditions))


class _Hermitian(torch.autograd.Function):
    """Apply a fixed Hermitian operator: its gradient is itself, and nothing need be kept for it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, operator: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.operator = operator  # type: ignore[attr-defined]
        return operator(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.operator(gradients[0]), None


class Unrolled(nn.Module):
    """Alternate a network and data consistency a fixed number of times, all weights shared.

    ``z = network(x)``, then ``x = argmin ||A x - y||^2 + mu ||x - z||^2`` by conjugate gradients, from the zero-filled
    image on: variable splitting with a quadratic penalty. Aggarwal et al. 2019 (MoDL), Yaman et al. 2020 (SSDU).
    The gradient is that of the iterations as they are, not of the converged solution. If the network is positively
    homogeneous, as ``ResNet`` is, so is the whole, and the units of k-space do not matter.

    Parameters
    ----------
    network
        Real (b, 2, y, x) to the same shape; every set of coil maps is an image of its own to it.
    unrolls, cg_iterations
        How often both steps are done, and the iterations of the second: 10 and 10 in SSDU.
    mu
        Weight of the penalty at first. Learned; kept positive, as the exponential of the parameter ``log_mu``.
    residual
        Let the network say what to add to ``x`` (as MoDL does) instead of ``z`` itself (as SSDU does).
    warm_start
        Begin the conjugate gradients from ``z`` and not from zero: one operator more, far fewer iterations needed.
    checkpoint
        Compute every unroll anew during back-propagation, which divides the memory by ``unrolls`` and costs a third.
    bfloat16
        Whether the network alone computes in bfloat16.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        unrolls: int = 10,
        cg_iterations: int = 10,
        mu: float = 0.05,
        residual: bool = False,
        warm_start: bool = False,
        checkpoint: bool = False,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        if unrolls < 1 or cg_iterations < 1 or not mu > 0:
            raise ValueError(f"unrolls={unrolls}, cg_iterations={cg_iterations} and mu={mu} must be positive")
        self.network = network
        self.log_mu = nn.Parameter(torch.tensor(math.log(mu)))
        self.unrolls, self.cg_iterations = unrolls, cg_iterations
        self.residual, self.warm_start = residual, warm_start
        self.recomputes, self.reduced = checkpoint, bfloat16  # nn.Module has a method called bfloat16

    @property
    def mu(self) -> float:
        """The weight of the penalty as it is now."""
        return math.exp(float(self.log_mu.detach()))

    def regularise(self, image: Image) -> Image:
        """Apply the network to a complex image (b, set, y, x): give ``z``."""
        seen = torch.stack([image.real, image.imag], 2).flatten(0, 1)
        cast = torch.autocast(image.device.type, torch.bfloat16) if self.reduced else nullcontext()
        with cast:
            output = self.network(seen)
        real, imaginary = output.to(image.real.dtype).unflatten(0, image.shape[:2]).unbind(2)
        output = torch.complex(real.contiguous(), imaginary.contiguous())
        return image + output if self.residual else output

    def consistency(self, prior: Image, zero_filled: Image, operator: LinearOperator) -> Image:
        """Solve ``(A^H A + mu) x = A^H y + mu prior`` by ``cg_iterations`` conjugate gradients."""
        mu = self.log_mu.exp()

        def normal(x: Tensor) -> Tensor:
            return _Hermitian.apply(x, operator.normal) + mu * x

        start = prior if self.warm_start else None
        return conjugate_gradient(normal, zero_filled + mu * prior, start=start, iterations=self.cg_iterations)

    def forward(self, values: KSpace, mask: Mask, encoding: LinearOperator) -> Image:
        """Reconstruct k-space (b, coil, ky, kx), of which only the places on ``mask`` are read, as (b, set, y, x)."""
        operator = Subsample(mask) @ encoding
        zero_filled = operator.adjoint(values)

        def unroll(x: Tensor) -> Tensor:
            return self.consistency(self.regularise(x), zero_filled, operator)

        image = zero_filled
        for _ in range(self.unrolls):
            if self.recomputes and torch.is_grad_enabled():
                image = recompute(unroll, image, use_reentrant=False, preserve_rng_state=False)
            else:
                image = unroll(image)
        return image
