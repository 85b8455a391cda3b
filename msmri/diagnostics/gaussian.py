"""A Gaussian on which MSM can be followed exactly: what w masks a step do to the law of the samples, in closed form.

The full measurement is a few real lines z ~ N(0, covariance); a mask shows each with probability p. Then the partial
denoiser is a matrix, the sampler is linear in its state, and every law below is Gaussian given the masks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from msmri.physics.operators import LinearOperator
from msmri.sampling import schedule
from msmri.tensors import KSpace, Mask, Sigma


@dataclass(frozen=True)
class GaussianPartial:
    """The exact partial denoiser of real lines (batch, 1, 1, n): ``E[z_S | z_S + sigma n]`` on the mask S."""

    covariance: Tensor  # (n, n)

    keeps_data: ClassVar[bool] = True  # lines known almost exactly stay as they are

    def matrix(self, mask: Tensor, sigma: Tensor | float) -> Tensor:
        """Give the matrix (..., n, n) for masks (..., n): zero in rows and columns outside the mask.

        ``sigma`` is a number, or one for each line (..., n).
        """
        m = mask.to(self.covariance)
        signal = m[..., :, None] * self.covariance * m[..., None, :]
        noisy = signal + torch.diag_embed(m * sigma**2 + (1 - m))  # 1 outside the mask, where nothing else is
        return torch.linalg.solve(noisy, signal).mT

    def __call__(self, state: KSpace, mask: Mask, encoding: LinearOperator, sigma: Sigma) -> KSpace:
        """Estimate the lines on the mask, each with its own noise."""
        levels = sigma.to(state).expand_as(state)
        return (self.matrix(mask.expand_as(state), levels) @ torch.where(mask, state, 0)[..., None])[..., 0]


def gaussian_kl(p: Tensor, q: Tensor) -> float:
    """Kullback-Leibler divergence of N(0, p) from N(0, q): ``(tr q^-1 p - n + ln det q / det p) / 2``, in nats."""
    n = p.shape[-1]
    lower = torch.linalg.cholesky(q)
    ratio = torch.linalg.solve_triangular(lower, torch.linalg.cholesky(p), upper=False)
    return 0.5 * (float(ratio.square().sum()) - n - 2 * float(ratio.diagonal().log().sum()))


@dataclass(frozen=True)
class LineModel:
    """Lines, the law of their masks, and the ladder of noise levels of an ancestral sampler."""

    covariance: Tensor  # (n, n), of the lines
    probability: float  # of each line to be in a mask, independently
    sigmas: Tensor  # falling noise levels, 1-D; the law of the state at the last of them is what is compared

    @classmethod
    def example(cls, *, lines: int = 8, reach: float = 2.0, probability: float = 0.5, steps: int = 40) -> "LineModel":
        """Make lines whose correlation falls with their distance over ``reach``, and a ladder from 10 to 0.05."""
        place = torch.arange(lines, dtype=torch.float64)
        covariance = torch.exp(-(place[:, None] - place[None, :]).abs() / reach)
        return cls(covariance, probability, schedule.karras(10.0, 0.05, steps))

    @property
    def n(self) -> int:
        """The number of lines."""
        return len(self.covariance)

    @property
    def partial(self) -> GaussianPartial:
        """The exact partial denoiser."""
        return GaussianPartial(self.covariance)

    @cached_property
    def patterns(self) -> tuple[Tensor, Tensor]:
        """All masks, bool (2^n, n), and their probabilities."""
        masks = torch.tensor(list(product([False, True], repeat=self.n)))
        p = torch.where(masks, self.probability, 1 - self.probability).double().prod(1)
        return masks, p

    @cached_property
    def _steps(self) -> list[tuple[float, float, float]]:
        """Noise level, share kept of the old noise, and std of the fresh noise of each step."""
        found = []
        for sigma, after in zip(self.sigmas[:-1].tolist(), self.sigmas[1:].tolist()):
            kept = after**2 / sigma**2  # ancestral: eta^2 = 1 - kept, noise kept sqrt(1 - eta^2) after / sigma
            found.append((sigma, kept, after * math.sqrt(1 - kept)))
        return found

    @cached_property
    def means(self) -> list[Tensor]:
        """The mean estimate ``E[D_S z | line in S]`` of every step, a matrix (n, n): what infinitely many masks do."""
        masks, p = self.patterns
        return [
            torch.einsum("m,mij->ij", p, self.partial.matrix(masks, sigma)) / self.probability
            for sigma, _, _ in self._steps
        ]

    @cached_property
    def ideal(self) -> list[Tensor]:
        """Covariance of the state at every level when infinitely many masks are used."""
        found = [self.sigmas[0] ** 2 * torch.eye(self.n, dtype=torch.float64)]
        for (_, kept, fresh), mean in zip(self._steps, self.means):
            move = kept * torch.eye(self.n, dtype=torch.float64) + (1 - kept) * mean
            found.append(move @ found[-1] @ move.mT + fresh**2 * torch.eye(self.n, dtype=torch.float64))
        return found

    @cached_property
    def _deviations(self) -> list[Tensor]:
        """By how much the unbiased one-mask score of every mask differs from their mean, (2^n, n, n) a step."""
        masks, _ = self.patterns
        eye, found = torch.eye(self.n, dtype=torch.float64), []
        for (sigma, _, _), mean in zip(self._steps, self.means):
            one = (self.partial.matrix(masks, sigma) - torch.diag_embed(masks.double())) / self.probability
            found.append((one - (mean - eye)) / sigma**2)
        return found

    def _scatter(self, step: int, state: Tensor) -> Tensor:
        """Covariance over masks and states of the one-mask score, about its mean over masks, (n, n)."""
        return torch.einsum("m,mij,jk,mlk->il", self.patterns[1], self._deviations[step], state,
                            self._deviations[step])  # fmt: skip

    @cached_property
    def variances(self) -> Tensor:
        """Variance v^2 of the unbiased one-mask score estimate, summed over lines, at every step.

        The estimate is ``S^T s_S(z) / p``, s_S the score of the lines of one mask: its mean over masks is the score
        of infinitely many masks, and w masks divide its variance by w. The state is that of :attr:`ideal`.
        """
        return torch.stack([self._scatter(k, self.ideal[k]).trace() for k in range(len(self._steps))])

    def moments(self, w: int) -> Tensor:
        """Give the covariance of samples made with w masks a step and the unbiased estimate, exactly."""
        eye = torch.eye(self.n, dtype=torch.float64)
        covariance = self.ideal[0]
        for number, ((sigma, kept, fresh), mean) in enumerate(zip(self._steps, self.means)):
            move = kept * eye + (1 - kept) * mean
            added = ((1 - kept) * sigma**2) ** 2 * self._scatter(number, covariance) / w
            covariance = move @ covariance @ move.mT + added + fresh**2 * eye
        return covariance

    @cached_property
    def weights(self) -> Tensor:
        """What a unit of score variance costs in divergence at every step: ``((1 - kept) sigma^2 / fresh)^2 / 2``."""
        return torch.tensor([0.5 * ((1 - kept) * sigma**2 / fresh) ** 2 for sigma, kept, fresh in self._steps])

    def bound(self, w: float | Sequence[float], *, largest: bool = False) -> float:
        """Bound the divergence of the ideal law from that of w masks a step: ``v^2 C / w``. Park et al. 2025.

        Theorem 1 there. By the chain rule over the steps and the convexity of the divergence, its form for a ladder of
        steps is ``sum_t weight_t v_t^2 / w_t``; with ``largest``, every v_t^2 is replaced by the largest, as there.
        """
        masks = torch.as_tensor(w, dtype=torch.float64).expand(len(self._steps))
        variances = self.variances.max().expand(len(self._steps)) if largest else self.variances
        return float((self.weights * variances / masks).sum())

    def divergence(self, w: int | Sequence[int], rng: Generator, *, trials: int = 2000, unbiased: bool = True) -> dict:
        """Measure how far the law of w masks a step (or a number for each) is from that of infinitely many.

        Parameters
        ----------
        trials
            Sequences of masks. Given one, the law is Gaussian and known exactly; over all, it is their mixture.
        unbiased
            Use the estimate of the theorem, ``z + sigma^2 sum_i S_i^T s_i / (w p)``. Otherwise that of the sampler:
            the mean of the masks that hold a line, and the last estimate where none does.

        Returns
        -------
        dict
            ``kl``: divergence of the ideal law from the mixture, by draws; ``kl moments``: from the Gaussian of the
            mixture's covariance, in closed form given that; ``spread``: variance of the samples over the ideal one.
        """
        counts = [w] * len(self._steps) if isinstance(w, int) else list(w)
        n, eye = self.n, torch.eye(self.n, dtype=torch.float64)
        # the covariance of (state, last estimate), given the masks so far
        joint = torch.zeros(trials, 2 * n, 2 * n, dtype=torch.float64)
        joint[:, :n, :n] = self.sigmas[0] ** 2 * eye
        for (sigma, kept, fresh), masks_here in zip(self._steps, counts):
            shape = (trials, masks_here, n)
            masks = torch.rand(shape, generator=rng, dtype=torch.float64) < self.probability
            single = self.partial.matrix(masks, sigma)
            count = masks.sum(1).double()
            if unbiased:
                shown = torch.diag_embed(count / (masks_here * self.probability))
                from_state = eye + single.sum(1) / (masks_here * self.probability) - shown
                from_last = torch.zeros_like(from_state)
            else:
                from_state = single.sum(1) / count.clamp_min(1)[..., None]
                from_last = torch.diag_embed((count == 0).double())
            estimate = torch.cat([from_state, from_last], 2)
            state = (1 - kept) * estimate
            state[:, :, :n] += kept * eye
            move = torch.cat([state, estimate], 1)
            joint = move @ joint @ move.mT
            joint[:, :n, :n] += fresh**2 * eye
        covariances = joint[:, :n, :n]
        ideal, mixed = self.ideal[-1], covariances.mean(0)
        return {
            "kl": _mixture_kl(ideal, covariances, rng),
            "kl moments": gaussian_kl(ideal, mixed),
            "spread": float(mixed.trace() / ideal.trace()),
        }

    def floor(self) -> float:
        """Give the divergence of the noisy truth from the law of infinitely many masks: what no number mends."""
        truth = self.covariance + self.sigmas[-1] ** 2 * torch.eye(self.n, dtype=torch.float64)
        return gaussian_kl(truth, self.ideal[-1])

    @cached_property
    def spreads(self) -> Tensor:
        """Variance over masks of the estimates of a line by masks that show it, mean over lines, at every step."""
        masks, p = self.patterns
        found = []
        for (sigma, _, _), mean, state in zip(self._steps, self.means, self.ideal):
            rest = torch.where(masks[..., None], self.partial.matrix(masks, sigma) - mean, 0)
            found.append(torch.einsum("m,mij,jk,mik->", p, rest, state, rest) / self.probability / self.n)
        return torch.stack(found)

    def share_out(self, total: float, *, rule: Literal["bound", "spread"] = "bound") -> list[int]:
        """Spend ``total`` masks over the steps, at least one each, rounded such that the sum is ``total``.

        "bound" makes the bound least: w_t ~ v_t sqrt(weight_t). "spread" makes the squared standard error of the mean
        estimate the same share of the fresh noise's variance at every step: w_t ~ spread_t / fresh_t^2.
        """
        if rule == "bound":
            wish = (self.weights * self.variances).sqrt()
        else:
            wish = self.spreads / torch.tensor([fresh**2 for _, _, fresh in self._steps])
        low, high = 0.0, total / float(wish.min())
        for _ in range(100):  # the scale at which the sum, each at least 1, is the total
            middle = (low + high) / 2
            low, high = (middle, high) if float((middle * wish).clamp_min(1).sum()) < total else (low, middle)
        real = (low * wish).clamp_min(1)
        whole = real.floor()
        rest = round(total - float(whole.sum()))
        whole[(real - whole).argsort(descending=True)[: max(rest, 0)]] += 1
        return [int(value) for value in whole]


def _mixture_kl(ideal: Tensor, covariances: Tensor, rng: Generator, *, draws: int = 2000) -> float:
    """Estimate the divergence of N(0, ideal) from the mixture of N(0, each covariance), in nats."""
    n = len(ideal)
    z = torch.randn(draws, n, generator=rng, dtype=torch.float64) @ torch.linalg.cholesky(ideal).mT
    parts = []
    for one in covariances.split(200):
        lower = torch.linalg.cholesky(one)
        white = torch.linalg.solve_triangular(lower, z.mT.expand(len(one), n, draws), upper=False)
        parts.append(-0.5 * white.square().sum(1) - lower.diagonal(dim1=1, dim2=2).log().sum(1)[:, None])
    mixed = torch.logsumexp(torch.cat(parts), 0) - math.log(len(covariances))
    lower = torch.linalg.cholesky(ideal)
    white = torch.linalg.solve_triangular(lower, z.mT, upper=False)
    ratio = -0.5 * white.square().sum(0) - lower.diagonal().log().sum() - mixed
    return float((torch.expm1(-ratio) + ratio).mean())  # E[exp(-ratio)] = 1: the same mean, far less scatter
