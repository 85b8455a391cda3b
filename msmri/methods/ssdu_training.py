"""Self-supervision by data undersampling: how a slice's own lines are split, and the losses of SSDU and its twin.

Omega, all that was measured of a slice, is split into Theta, which the network sees, and Lambda, on which its result is
compared with what was measured. Yaman et al., Magnetic Resonance in Medicine 84:3172, 2020; several splits a slice:
Yaman et al., NMR in Biomedicine 35:e4798, 2022. The method is covered by a patent application, see
:mod:`msmri.methods.ssdu`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.physics.masks import MSM_CENTRE_FRACTION, MaskLaw, RandomLines, draw_masks, slice_seed
from msmri.physics.operators import Subsample
from msmri.tensors import KSpace, Mask, Rng, spawn


@dataclass(frozen=True)
class Split:
    """A random law for Lambda: exactly ``round(ratio |Omega|)`` measured places, drawn without replacement.

    "gaussian" prefers places near zero frequency (the published default), "uniform" does not, and both choose single
    places, also where whole columns were measured. "columns" takes whole columns, all alike. The authors draw Gaussian
    places one after the other until enough were met; exponential clocks draw by the same law, at once, and never hang.
    """

    law: Literal["gaussian", "uniform", "columns"] = "gaussian"
    ratio: float = 0.4  # rho: share of the measured places that goes to Lambda
    spread: float = 0.25  # "gaussian": standard deviation along each axis, as a share of the matrix
    protected: tuple[int, int] = (4, 4)  # rows and columns around zero frequency that stay in Theta
    protected_columns: float = MSM_CENTRE_FRACTION  # "columns": central share of the columns that stays in Theta

    def __post_init__(self) -> None:
        if self.law not in ("gaussian", "uniform", "columns"):
            raise InputError(f"there is no split '{self.law}'", mend="choose gaussian, uniform or columns")
        if not 0 < self.ratio < 1 or not self.spread > 0:
            raise InputError(
                f"cannot split with ratio={self.ratio}, spread={self.spread}", mend="give 0 < ratio < 1 and spread > 0"
            )

    def __call__(self, mask: Mask, shape: tuple[int, int], rng: Rng) -> Mask:
        """Draw Lambda for each slice of a batch.

        Parameters
        ----------
        mask
            Omega, (b, 1, 1 or ky, kx).
        shape
            (ky, kx) of the k-space.
        rng
            One generator a slice, so that the batch has no influence.

        Returns
        -------
        Mask
            (b, 1, ky, kx), for columns (b, 1, 1, kx): a part of ``mask``.

        Raises
        ------
        InputError
            If so many places cannot be had outside the protected centre.
        """
        if self.law == "columns":
            omega = mask.any(-2, keepdim=True)
            width = max(1, round(self.protected_columns * shape[1]))
            centre, log_weight = _block((1, shape[1]), (1, width)), torch.zeros(1, shape[1])
        else:
            omega = mask.expand(-1, -1, *shape)
            centre, log_weight = _block(shape, self.protected), torch.zeros(shape)
            if self.law == "gaussian":
                rows, columns = (((torch.arange(n) - n // 2) / (self.spread * n)).square() for n in shape)
                log_weight = -(rows[:, None] + columns) / 2
        omega = omega.cpu()
        free = omega & ~centre
        counts = [round(self.ratio * int(one.sum())) for one in omega]
        for count, one, places in zip(counts, omega, free, strict=True):
            if not 0 < count <= int(places.sum()):
                unit = "columns" if self.law == "columns" else "places"
                raise InputError(
                    f"a share {self.ratio:g} of {int(one.sum())} measured {unit} cannot be held back: "
                    f"{int(places.sum())} lie outside the protected centre",
                    mend="change the ratio or the protected centre",
                )
        uniform = torch.stack([torch.rand(log_weight.shape, generator=generator) for generator in rng])
        arrival = torch.log(-torch.log1p(-uniform)) - log_weight
        arrival = torch.where(free[:, 0], arrival, torch.inf).flatten(1)
        first = arrival.topk(max(counts), largest=False, sorted=True).indices
        kept = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        chosen = torch.zeros_like(arrival, dtype=torch.bool).scatter_(1, first, kept)
        return chosen.reshape(free.shape).to(mask.device)


def _block(shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Mark the central ``size`` (rows, columns) of a matrix."""
    block = torch.zeros(shape, dtype=torch.bool)
    top, left = (n // 2 - m // 2 for n, m in zip(shape, size))
    block[top : top + size[0], left : left + size[1]] = True
    return block


def normalised_error(predicted: KSpace, values: KSpace, where: Mask, *, l1: float = 0.5) -> Tensor:
    """Compare k-space on ``where``: a mean of the relative l2 and l1 errors of each sample, (b,). Yaman et al. 2020.

    The l1 norm is that of real and imaginary parts. ``l1`` is the share of its term.
    """
    nothing = torch.zeros((), dtype=values.dtype, device=values.device)
    values = torch.where(where, values, nothing)
    error = torch.view_as_real(torch.where(where, predicted - values, nothing)).flatten(1)
    size = torch.view_as_real(values).flatten(1)
    total = torch.zeros(len(values), device=values.device)
    for order, share in ((2, 1 - l1), (1, l1)):
        reference = torch.linalg.vector_norm(size, order, dim=1)
        norm = torch.linalg.vector_norm(error, order, dim=1)
        total = total + share * norm / reference.clamp_min(torch.finfo(reference.dtype).tiny)
    return total


def _slice_streams(batch: Measurement, n: int, seed: int, rng: Generator, *, label: str = "") -> list[Generator]:
    """Give every slice the stream of one of its ``n`` fixed draws, known by its name; a new one for ``n`` of 0.

    Without a label the first stream is that of the mask of the guide to training.
    """
    size = len(batch.values)
    if n == 0:
        return spawn(rng, size)
    if len(batch.source) == size:
        turn = torch.randint(0, n, (size,), generator=rng).tolist()
        names = [label + (name if k == 0 else f"{name}/{k}") for name, k in zip(batch.source, turn)]
        seeds = [slice_seed(name, seed) for name in names]
        return [torch.Generator().manual_seed(value) for value in seeds]
    raise InputError("the slices have no names, by which their fixed draws go", mend="use masks=0")


@dataclass(frozen=True)
class SSDULoss:
    """The loss of SSDU: the image made from Theta, measured again, against what was measured on Lambda.

    Nothing outside the slice's own mask enters, and nothing of Lambda enters the network, but for what the scale and
    the coil maps of the slice owe to its centre lines, as in the paper. Norms are taken a slice, and the mean over the
    batch follows (the authors' batches hold one slice). Margins that no scan reached are not measured here, while the
    authors call them measured zeros.
    """

    split: Split = field(default_factory=Split)
    masks: int = 1  # fixed splits of a slice: 1 is SSDU, K multi-mask SSDU, 0 a new split in every step. Of K splits a
    # step takes one at random, each pair being a training example: the expectation is the mean over all
    l1: float = 0.5  # share of the l1 term
    seed: int = 0  # of the fixed splits

    def __call__(self, model: nn.Module, batch: Measurement, rng: Generator) -> Tensor:
        """Return the mean normalised error on Lambda; ``model(values, mask, encoding)`` gives an image."""
        assert batch.encoding is not None
        shape = (batch.values.shape[-2], batch.values.shape[-1])
        mask = batch.mask.expand(len(batch.values), *batch.mask.shape[1:])
        held = self.split(mask, shape, _slice_streams(batch, self.masks, self.seed, rng, label="split/"))
        seen = mask & ~held
        image = model(Subsample(seen)(batch.values), seen, batch.encoding)
        return normalised_error(batch.encoding(image), batch.values, held & mask, l1=self.l1).mean()


@dataclass(frozen=True)
class SupervisedLoss:
    """The loss of the supervised twin: the same, but against all of k-space, which has to be fully sampled.

    Every slice is undersampled by a mask of its own, drawn from its name as in the guide to training, so that
    the twin sees the scans that self-supervised methods see, and beside them what these never see.
    """

    law: MaskLaw = field(default_factory=lambda: RandomLines(acceleration=4.0))
    masks: int = 1  # fixed masks of a slice; 0: a new one in every step
    l1: float = 0.5  # share of the l1 term
    seed: int = 0  # of the fixed masks

    def __call__(self, model: nn.Module, batch: Measurement, rng: Generator) -> Tensor:
        """Return the mean normalised error on all of k-space.

        Raises
        ------
        InputError
            If the slices are not fully sampled (but for margins that no scan reached).
        """
        assert batch.encoding is not None
        _require_full(batch)
        shape = (batch.values.shape[-2], batch.values.shape[-1])
        drawn = draw_masks(self.law, shape, _slice_streams(batch, self.masks, self.seed, rng))
        seen = batch.mask & drawn.to(batch.mask.device)
        image = model(Subsample(seen)(batch.values), seen, batch.encoding)
        return normalised_error(batch.encoding(image), batch.values, batch.mask, l1=self.l1).mean()


def _require_full(batch: Measurement) -> None:
    """Refuse a batch with columns missing between measured ones."""
    columns = batch.mask.all(-2).all(0).all(0).long()
    inside = columns.cummax(0).values & columns.flip(0).cummax(0).values.flip(0)
    if not bool(columns.any()) or not torch.equal(inside, columns):
        where = batch.source[0] if batch.source else None
        raise InputError("supervised training needs fully sampled scans", mend="read them by FullScans", path=where)
