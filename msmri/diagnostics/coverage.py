"""How well masks cover k-space: of a law, and of the scans of a data set."""

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msmri.diagnostics import Finding, Progress, Run
from msmri.diagnostics.figures import Panel, draw_panels
from msmri.diagnostics.subjects import Subject
from msmri.io.fastmri import open_scan
from msmri.physics.masks import MaskLaw, blind_spots, draw_masks
from msmri.tensors import spawn

BINS = 32  # parts of the width of k-space in which masks of different widths are compared
QUICK = {"draws": 200, "slices": 8, "places": 64}


class Counts(NamedTuple):
    """How often places were seen, alone and in pairs, in a number of masks."""

    masks: int
    places: Tensor  # (k,) which places of the flattened mask were looked at
    together: Tensor  # (k, k) in how many masks both were seen; the diagonal is how often each was

    @property
    def never(self) -> int:
        """How many places were in no mask."""
        return int((self.together.diagonal() == 0).sum())

    @property
    def pairs(self) -> int:
        """How many pairs of places there are, both of which were seen."""
        seen = int((self.together.diagonal() > 0).sum())
        return seen * (seen - 1) // 2

    @property
    def pairs_never(self) -> int:
        """How many pairs of places were never in one mask, though each was seen."""
        seen = self.together.diagonal() > 0
        apart = (self.together == 0) & seen[:, None] & seen[None, :]
        return int(apart.triu(1).sum())


def count_pairs(masks: Tensor, places: Tensor | None = None) -> Counts:
    """Count in how many masks (n, ...) places, or those chosen, were seen together."""
    flat = masks.flatten(1)
    chosen = torch.arange(flat.shape[1]) if places is None else places
    seen = flat[:, chosen].double()
    return Counts(len(flat), chosen, seen.mT @ seen)


def masks_to_reach(probability: Tensor, share: float) -> int:
    """Give the number of independent masks after which a place is missing with probability below 1 - ``share``.

    A place is missing from n independent masks with probability (1 - p)^n; all places are asked, by the sum of those.
    Places never sampled are left out.
    """
    p = probability.flatten().double()
    p = p[(p > 0) & (p < 1)]

    def missing(n: int) -> float:
        return float((n * torch.log1p(-p)).exp().sum())

    high = 1
    while len(p) and missing(high) > 1 - share:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if missing(middle) > 1 - share else (low, middle)
    return high


def describe_law(law: MaskLaw, matrix: tuple[int, int], counts: Counts) -> dict[str, Any]:
    """Tell what a law covers, by its stated probabilities and by draws."""
    probability = law.inclusion_probability(matrix)
    return {
        "law": law.name,
        "nominal acceleration": law.nominal_acceleration,
        "expected acceleration": 1 / float(probability.mean()),
        "unit": "lines" if law.lines else "places",
        "places": probability.numel(),
        "least probability": float(probability.min()),
        "blind spots": int(blind_spots(law, matrix).sum()),
        "masks until all are reached, 99 %": masks_to_reach(probability, 0.99),
        "draws": counts.masks,
        "pairs looked at": counts.pairs,
        "pairs never together": counts.pairs_never,
    }


def read_masks(subject: Subject, limit: int) -> tuple[dict[tuple[int, int], list[Tensor]], int]:
    """Read the masks of at most ``limit`` slices of the subject's scans by matrix, and count the full slices.

    Fully sampled slices count as drawn by nobody: they are left out.
    """
    found: dict[tuple[int, int], list[Tensor]] = {}
    full = taken = 0
    for path in subject.files:
        with open_scan(path) as scan:
            for index in range(scan.n_slices):
                if taken == limit:
                    return found, full
                taken += 1
                one = scan.read(index)
                if bool((one.mask | ~scan.acquired).all()):
                    full += 1
                    continue
                found.setdefault((one.values.shape[-2], one.values.shape[-1]), []).append(one.mask[0])
    return found, full


def in_bins(mask: Tensor, bins: int = BINS) -> Tensor:
    """Tell which of ``bins`` equal parts of the width of k-space hold a line of a mask (1, 1 or ky, kx): (1, bins)."""
    columns = mask.flatten(0, -2).any(0)
    place = torch.arange(len(columns)) * bins // len(columns)
    return torch.zeros(bins, dtype=torch.bool).index_add(0, place[columns], columns[columns])[None]


def _choose(total: int, most: int, subject: Subject) -> Tensor | None:
    """Choose places at random where there are too many for all pairs."""
    if total <= most:
        return None
    return torch.randperm(total, generator=subject.rng("places"))[:most].sort().values


def coverage(subject: Subject, *, draws: int = 4000, slices: int = 500, places: int = 512) -> Run:
    """Ask how often the law and the data set reach each place of k-space, and which pairs are ever seen together.

    A prior learns E[clean | noisy part] for the parts that masks show. A place in no mask gets no supervision; two
    places never in one mask leave their correlation unknown, whatever the number of slices.

    Parameters
    ----------
    draws
        Masks drawn of the law.
    slices
        Read at most so many slices of the scans.
    places
        Most places for which pairs are counted; chosen at random where there are more.
    """
    law, matrix = subject.law, subject.matrix
    yield Progress(0, 2, f"{draws} masks of {law.name}")
    shape = law.inclusion_probability(matrix).shape
    chosen = _choose(math.prod(shape), places, subject)
    counts = count_pairs(draw_masks(law, matrix, spawn(subject.rng("draws"), draws)), chosen)
    numbers: dict[str, Any] = {"law": describe_law(law, matrix, counts), "data": []}
    yield Progress(1, 2, "masks of the scans")
    groups, full = read_masks(subject, slices)
    for size, masks in groups.items():
        wide = max(mask.shape[-2] for mask in masks)
        stack = torch.stack([mask.expand(1, wide, mask.shape[-1]) for mask in masks])
        found = count_pairs(stack, _choose(stack[0].numel(), places, subject))
        numbers["data"].append(
            {
                "matrix": size,
                "slices": len(masks),
                "different masks": len(Counter(mask.numpy().tobytes() for mask in masks)),
                "mean acceleration": 1 / float(stack.double().mean()),
                "places looked at": len(found.places),
                "never seen": found.never,
                "pairs, each of which was seen": found.pairs,
                "pairs never together": found.pairs_never,
                "fewest slices a place is in": int(found.together.diagonal().min()),
            }
        )
    numbers["data"].sort(key=lambda one: -one["slices"])
    numbers["fully sampled slices"] = full
    if groups:
        every = count_pairs(torch.stack([in_bins(mask) for masks in groups.values() for mask in masks]))
        numbers["all matrices"] = {
            "matrices": len(groups),
            "slices": every.masks,
            "parts of the width": BINS,
            "never seen": every.never,
            "pairs, each of which was seen": every.pairs,
            "pairs never together": every.pairs_never,
            "fewest slices a pair is in": int(every.together.min()),
        }
    frequency = counts.together.diagonal() / draws
    stated = law.inclusion_probability(matrix).flatten()[counts.places]
    numbers["largest difference of drawn and stated probability"] = float((frequency - stated).abs().max())
    order = counts.places.double().tolist()
    lines = {
        "stated by the law": list(zip(order, stated.tolist())),
        "drawn": list(zip(order, frequency.tolist())),
    }
    shares = counts.together / draws
    panels = [
        Panel(f"{law.name}, R = {law.acceleration:g}", "line" if law.lines else "place", "probability", lines,
              limits=(0, 1.05)),
        Panel("Share of masks that hold both", "line" if law.lines else "place (chosen)", "", picture=shares,
              limits=(0, max(0.05, 4 * float(shares.median())))),
    ]  # fmt: skip
    return Finding(numbers, _learned(numbers), lambda path: draw_panels(path, panels))


def _learned(numbers: dict[str, Any]) -> tuple[str, ...]:
    law = numbers["law"]
    said = [
        f"{law['law']} at nominal R {law['nominal acceleration']:g}: true R {law['expected acceleration']:.2f}, "
        f"{law['blind spots']} of {law['places']} {law['unit']} never sampled, "
        f"{law['pairs never together']} of {law['pairs looked at']} pairs never in one of {law['draws']} masks; "
        f"{law['masks until all are reached, 99 %']} independent masks reach all others with 99 % certainty.",
    ]
    said += [
        f"The {one['slices']} undersampled slices of {one['matrix'][0]} x {one['matrix'][1]} have "
        f"{one['different masks']} different masks: {one['never seen']} of {one['places looked at']} places never "
        f"seen, {one['pairs never together']} of {one['pairs, each of which was seen']} pairs never together."
        for one in numbers["data"][:1]
    ]
    if len(numbers["data"]) > 1:
        every = numbers["all matrices"]
        said.append(
            f"All {every['slices']} undersampled slices, of {every['matrices']} matrices, by {BINS} parts of the "
            f"width: {every['never seen']} never seen, {every['pairs never together']} pairs never together, every "
            f"pair in {every['fewest slices a pair is in']} slices or more."
        )
    if not numbers["data"]:
        said.append(f"The scans hold {numbers['fully sampled slices']} fully sampled slices and no undersampled one.")
    return tuple(said)
