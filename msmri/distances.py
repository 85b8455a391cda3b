"""How far apart two sets of images are: Frechet distances on fixed wavelet features, or on Inception's; and LPIPS.

The features that need no download are a scattering transform (Bruna and Mallat 2013): mean moduli of oriented wavelets
at four scales, and of the wavelets of those moduli. First-order means tell blur, noise and the direction of artefacts;
second-order ones tell edges from noise of the same spectrum, which no spectrum can. A 3 x 3 map of the brightness tells
whether there is a head in the middle, and the sharpest straight line along either axis tells of the edges of tiles
(steps below a fifth of the brightness do not stand out among the edges of piecewise constant phantoms). All are
relative to the mean brightness, most as logarithms, so that the brightness of an image does not matter and no scaling
by a reference is needed, and few (51), so that sets of some dozen images say something. They are not Inception's, and
distances on them compare only with one another.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Generator, Tensor, nn

from msmri.errors import InputError

if TYPE_CHECKING:
    import numpy as np

SCALES, ORIENTATIONS, MAP = 4, 4, 3  # octaves, directions, cells a side of the map of brightness
HIGHEST = 0.35  # cycles a pixel at the centre of the finest band, which also holds everything above
FLOOR = 1e-3  # of the mean brightness: what is weaker counts as nothing
SMALLEST, ENLARGED = 32, 64  # pixels a side of an image, and to what smaller ones are filled up
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
BACKBONES = {  # of LPIPS, by the names of torchvision's files
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
INCEPTION_SITE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"


@dataclass(frozen=True)
class Distance:
    """A Frechet distance with what is needed to judge it."""

    value: float  # squared distance of the two Gaussians, as usual for FID
    means: float  # the part of the means; the rest is of the covariances
    floor: float  # what two sets of these sizes drawn from one law give on average; NaN where not asked for
    shrinkage: tuple[float, float]  # weight of the diagonal in either covariance: 0 many images, 1 too few for any
    counts: tuple[int, int]  # images in either set

    @property
    def excess(self) -> float:
        """The value above its floor: near 0 for two sets of one law, whatever their size."""
        return self.value - self.floor


def gaussian_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Give the squared Frechet distance of two Gaussians. Dowson and Landau 1982.

    ``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))``. The last trace is that of ``(R C' R)^(1/2)`` with R the symmetric root
    of C, whose eigenvalues are real and not negative, so that singular covariances do no harm.

    Raises
    ------
    InputError
        If a covariance is not symmetric and positive semi-definite.
    """
    import numpy as np
    from scipy.linalg import eigh, eigvalsh

    first, second = (matrix.detach().cpu().double().numpy() for matrix in (covariance, other_covariance))
    for matrix in (first, second):
        if not np.allclose(matrix, matrix.T, atol=1e-8 * max(1.0, float(abs(matrix).max()))):
            raise InputError("a covariance is not symmetric")
    values, vectors = eigh(first)
    if min(values[0], eigvalsh(second)[0]) < -1e-8 * max(1.0, float(values[-1])):
        raise InputError("a covariance has a negative eigenvalue")
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root @ second @ root
    shared = np.sqrt(eigvalsh((product + product.T) / 2).clip(0)).sum()
    apart = float((mean.double() - other_mean.double()).square().sum())
    return apart + max(float(np.trace(first) + np.trace(second) - 2 * shared), 0.0)


def shrunk_covariance(features: Tensor) -> tuple[Tensor, float]:
    """Estimate a covariance (d, d) from few samples (n, d), with the weight that its diagonal was given.

    Correlations are shrunk towards zero by the share that minimises the expected squared error, estimated from the
    samples themselves; variances stay. Schaefer and Strimmer 2005, target D.
    """
    n = len(features)
    rest = features.double() - features.double().mean(0)
    scale = rest.square().sum(0).div(n - 1).sqrt()
    unit = rest / scale.clamp_min(1e-12)
    products = unit[:, :, None] * unit[:, None, :]
    mean = products.mean(0)
    spread = (products - mean).square().sum(0) * n / (n - 1) ** 3
    correlation = mean * n / (n - 1)
    outside = ~torch.eye(len(mean), dtype=torch.bool)
    power = correlation[outside].square().sum()
    weight = float((spread[outside].sum() / power).clamp(0, 1)) if power > 0 else 1.0
    correlation = torch.where(outside, (1 - weight) * correlation, correlation)
    return scale[:, None] * correlation * scale[None, :], weight


def frechet_distance(
    reference: Tensor, features: Tensor, *, rng: Generator | None = None, shrink: bool = True, trials: int = 20
) -> Distance:
    """Give the Frechet distance of two sets of features (n, d) and (m, d), each taken as a Gaussian.

    The estimate is biased upwards, the more so the fewer images (Chong and Forsyth 2020). With ``rng`` the bias is
    estimated: two sets of the same sizes are drawn from the Gaussian of the reference, ``trials`` times, and their mean
    distance is the ``floor``.

    Parameters
    ----------
    shrink
        Shrink either covariance, see :func:`shrunk_covariance`; False: as they are, the usual FID.

    Raises
    ------
    InputError
        If a set has fewer than three images or holds NaN.
    """
    for each in (reference, features):
        if each.ndim != 2 or len(each) < 3 or each.shape[1] != reference.shape[1]:
            raise InputError(
                f"features of shape {tuple(each.shape)} make no distribution", mend="give 3 images or more"
            )
        if not bool(torch.isfinite(each).all()):
            raise InputError("features hold NaN or infinite values")
    value, apart, shrinkage = _distance(reference.double(), features.double(), shrink)
    floor = float("nan")
    if rng is not None:
        root = torch.linalg.cholesky(_covariance(reference.double(), shrink)[0] + 1e-9 * torch.eye(reference.shape[1]))

        def draw(n: int) -> Tensor:
            return torch.randn((n, len(root)), generator=rng, dtype=torch.float64) @ root.mT

        draws = [_distance(draw(len(reference)), draw(len(features)), shrink)[0] for _ in range(trials)]
        floor = sum(draws) / len(draws)
    return Distance(value, apart, floor, shrinkage, (len(reference), len(features)))


def _covariance(features: Tensor, shrink: bool) -> tuple[Tensor, float]:
    return shrunk_covariance(features) if shrink else (torch.cov(features.mT), 0.0)


def _distance(reference: Tensor, features: Tensor, shrink: bool) -> tuple[float, float, tuple[float, float]]:
    means = reference.mean(0), features.mean(0)
    (first, some), (second, other) = _covariance(reference, shrink), _covariance(features, shrink)
    value = gaussian_distance(means[0], first, means[1], second)
    return value, float((means[0] - means[1]).square().sum()), (some, other)


# fixed features


@lru_cache(maxsize=8)
def _wavelets(shape: tuple[int, int]) -> Tensor:
    """Make the filters (scale, orientation, ky, kx), in the order of ``torch.fft.fft2``: one side of k-space each.

    Octave-wide raised cosines of log frequency times a cubed cosine of the angle, as in steerable pyramids (Simoncelli
    and Freeman 1995); orientation 0 has its waves along x.
    """
    ky, kx = (torch.fft.fftfreq(n, dtype=torch.float64) for n in shape)
    radius = torch.hypot(ky[:, None], kx[None, :])
    octave = torch.log2(radius.clamp_min(1e-9) / HIGHEST)
    angle = torch.atan2(ky[:, None], kx[None, :].expand_as(radius))
    filters = []
    for scale in range(SCALES):
        place = octave + scale
        band = torch.where(place.abs() < 1, torch.cos(torch.pi / 2 * place.clamp(-1, 1)), 0.0)
        if scale == 0:
            band = torch.where(place > 0, 1.0, band)
        for turn in range(ORIENTATIONS):
            direction = torch.cos(angle - torch.pi * turn / ORIENTATIONS)
            filters.append(2 * band * direction.clamp_min(0) ** (ORIENTATIONS - 1))
    return torch.stack(filters).reshape(SCALES, ORIENTATIONS, *shape).float()


def scattering_features(images: "Tensor | np.ndarray") -> Tensor:
    """Describe magnitude or colour images by 51 numbers each, see the head of this module: (n, 51).

    Parameters
    ----------
    images
        Magnitude (n, y, x), or colour (n, colour, y, x), of which the mean over colours counts; complex ones by their
        magnitude. Any matrix of 64 pixels a side or more; frequencies are counted in cycles a pixel, so that only
        images of equal pixel size compare. Smaller ones are filled up with their mirror image.

    Raises
    ------
    InputError
        If they are no images, not finite, or black.
    """
    values = torch.as_tensor(images)
    values = (values.abs() if values.is_complex() else values).detach().cpu().float()
    if values.ndim == 4:
        values = values.mean(1)
    if values.ndim != 3 or min(values.shape) < 1 or min(values.shape[-2:]) < SMALLEST:
        raise InputError(f"{tuple(values.shape)} are no images", mend=f"give (n, y, x) of {SMALLEST} pixels or more")
    if not bool(torch.isfinite(values).all()) or not bool((values.abs().amax((-2, -1)) > 0).all()):
        raise InputError("an image holds NaN or infinite values, or nothing at all")
    return torch.cat([_describe(group) for group in values.split(16)])


def _describe(images: Tensor) -> Tensor:
    level = images.abs().mean((-2, -1))
    cells = nn.functional.adaptive_avg_pool2d(images[:, None], MAP).flatten(1) / level[:, None]
    edges = []
    for axis in (-1, -2):  # the mean step across every line between two columns, or two rows: the largest over the mean
        profile = images.diff(dim=axis).abs().mean(-3 - axis) + FLOOR * level[:, None]
        edges.append((profile.amax(1) / profile.mean(1)).log())
    margins = [max(0, ENLARGED - n) for n in images.shape[-2:]]
    if any(margins):
        top, left = (margin // 2 for margin in margins)
        images = nn.functional.pad(images[:, None], (left, margins[1] - left, top, margins[0] - top), "reflect")[:, 0]
    filters = _wavelets((images.shape[-2], images.shape[-1]))
    waves = torch.fft.ifft2(torch.fft.fft2(images)[:, None, None] * filters).abs()
    first = waves.mean((-2, -1))  # (n, scale, orientation)
    nothing, turn = FLOOR * level[:, None, None], torch.arange(ORIENTATIONS)
    turned = ((turn[:, None] + turn) % ORIENTATIONS).expand(len(images), -1, -1)  # by how much the second is turned
    second = []
    for fine in range(SCALES - 1):
        envelope = torch.fft.fft2(waves[:, fine])[:, :, None]
        for coarse in range(fine + 1, SCALES):
            rough = torch.fft.ifft2(envelope * filters[coarse]).abs().mean((-2, -1))
            ratio = ((rough + nothing) / (first[:, fine, :, None] + nothing)).log()
            second.append(ratio.gather(2, turned).mean(1))
    relative = (first / level[:, None, None] + FLOOR).log()
    return torch.cat([relative.flatten(1), *second, cells, torch.stack(edges, 1)], 1)


def scattering_distance(
    reference: "Tensor | np.ndarray", images: "Tensor | np.ndarray", *, rng: Generator | None = None
) -> Distance:
    """Give the Frechet distance of two sets of images on :func:`scattering_features`, with its floor if ``rng``."""
    return frechet_distance(scattering_features(reference), scattering_features(images), rng=rng)


# networks of ImageNet


def inception_distances(
    reference: Tensor,
    images: Tensor,
    *,
    weights: str | Path | None = None,
    network: nn.Module | None = None,
    subset: int = 100,
    batch: int = 32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """Compute FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) as torchmetrics does.

    Magnitude images are windowed to 0..1 by their own maximum and repeated to three channels, as in Park et al. 2025.

    Parameters
    ----------
    reference, images
        Magnitude (n, y, x), complex ones by their magnitude; or colour (n, 3, y, x) within 0..1.
    weights
        Inception's weights, the file of torch-fidelity; its place in the torch hub's cache without one. Nothing is
        downloaded.
    network
        Another network instead: (n, 3, y, x) uint8 to (n, d).
    subset
        Images in each of KID's subsets, at most as many as there are.

    Returns
    -------
    dict
        ``fid``, ``kid`` and ``kid_std``.

    Raises
    ------
    InputError
        If torchmetrics, torch-fidelity or the weights are missing; it says how to get them.
    """
    sets = [_colours(reference), _colours(images)]
    smallest = min(map(len, sets))
    if smallest < 3:
        raise InputError(f"{smallest} images are too few for FID and KID", mend="give some hundred")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise InputError("FID and KID need torchmetrics", mend="pip install 'msmri[scores]'") from error
    chosen = (_inception(weights) if network is None else network).to(device).eval()
    with torch.inference_mode():
        features = [torch.cat([chosen(group.to(device)) for group in values.split(batch)]).cpu() for values in sets]
    passing: Any = nn.Identity()  # either metric takes the features as they are: the network runs once
    passing.num_features = features[0].shape[1]
    fid = FrechetInceptionDistance(feature=passing).set_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics tells that KID keeps all features
        kid = KernelInceptionDistance(feature=passing, subset_size=min(subset, smallest))
    for real, values in zip((True, False), features):
        fid.update(values, real=real)
        kid.update(values, real=real)
    with torch.random.fork_rng(devices=[]):  # KID draws its subsets from the global generator, which is put back
        torch.random.manual_seed(seed)
        mean, std = kid.compute()
    return {"fid": float(fid.compute()), "kid": float(mean), "kid_std": float(std)}


def lpips(
    targets: Tensor, images: Tensor, *, backbone: Literal["alex", "vgg", "squeeze"] = "alex", device: str = "cpu"
) -> Tensor:
    """Compute the learned perceptual distance of every pair, (n,). Zhang et al. 2018 (LPIPS), by torchmetrics.

    Both magnitudes of a pair are windowed by the maximum of the target and clipped to 0..1; the backbone needs 32
    pixels a side (64 for some). Nothing is downloaded.

    Parameters
    ----------
    targets, images
        (n, y, x), complex ones by their magnitude; or colour (n, 3, y, x) within 0..1.
    backbone
        The network whose features are compared; its ImageNet weights have to be in the torch hub's cache.

    Raises
    ------
    InputError
        If torchmetrics or the backbone's weights are missing; it says how to get them. Or if shapes do not fit.
    """
    if targets.shape != images.shape:
        raise InputError(f"targets {tuple(targets.shape)} and images {tuple(images.shape)} differ in shape")
    file = BACKBONES[backbone]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise InputError(
            "the weights of LPIPS are not there", mend=f"get https://download.pytorch.org/models/{file}", path=path
        )
    try:
        import torchvision  # noqa: F401  (torchmetrics does not say clearly that it is missing)
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except ImportError as error:
        raise InputError("LPIPS needs torchmetrics and torchvision", mend="pip install 'msmri[scores]'") from error
    values = [(x.abs() if x.is_complex() else x).detach().float() for x in (targets, images)]
    if targets.ndim == 3:
        window = values[0].amax((-2, -1), keepdim=True).clamp_min(1e-12)
        values = [(x / window)[:, None].expand(-1, 3, -1, -1) for x in values]
    if values[0].ndim != 4 or values[0].shape[1] != 3:
        raise InputError(f"{tuple(targets.shape)} are no images", mend="give (n, y, x) or (n, 3, y, x)")
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torchvision tells of its older ways to name weights
        metric = LearnedPerceptualImagePatchSimilarity(backbone, normalize=True).to(device)
        pairs = zip(*(x.clamp(0, 1).to(device).split(1) for x in values), strict=True)
        return torch.stack([metric(one, other) for one, other in pairs]).cpu()


def _colours(images: Tensor) -> Tensor:
    """Give uint8 (n, 3, y, x)."""
    values = (images.abs() if images.is_complex() else images).detach().cpu().float()
    if values.ndim == 3:
        values = (values / values.amax((-2, -1), keepdim=True).clamp_min(1e-12))[:, None].expand(-1, 3, -1, -1)
    if values.ndim != 4 or values.shape[1] != 3:
        raise InputError(f"{tuple(values.shape)} are no images", mend="give (n, y, x) or (n, 3, y, x)")
    return (255 * values.clamp(0, 1)).round().to(torch.uint8)


def _inception(weights: str | Path | None) -> nn.Module:
    """Load the network of FID from a file that is there already."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE if weights is None else Path(weights)
    if not path.is_file():
        raise InputError(
            "Inception's weights are not there",
            mend=f"get {INCEPTION_FILE} from {INCEPTION_SITE} and put it there, or use the scattering distance",
            path=path,
        )
    try:
        import torch_fidelity  # noqa: F401  (torchmetrics does not say clearly that it is missing)
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise InputError("Inception needs torch-fidelity", mend="pip install 'msmri[scores]'") from error
    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
