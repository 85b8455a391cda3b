"""SSDU: an unrolled network trained by splitting undersampled data, and its zero-shot form, trained on one scan.

Written from the papers: Yaman et al., Magnetic Resonance in Medicine 84:3172, 2020 (SSDU); Yaman et al., NMR in
Biomedicine 35:e4798, 2022 (several masks a slice); Yaman et al., International Conference on Learning Representations,
2022 (zero-shot); Aggarwal et al., IEEE Transactions on Medical Imaging 38:394, 2019 (MoDL, the unrolled network).

SSDU is covered by the patent application US 17/075,411 of the Regents of the University of Minnesota. It is here to be
compared with, in research; whoever wants to use it otherwise must see to the rights first.
"""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from msmri.errors import InputError
from msmri.measurement import Measurement, Reconstruction
from msmri.methods import coil_maps, point_estimate
from msmri.methods.ssdu_training import Split, normalised_error
from msmri.model.prior import load_prior
from msmri.model.unrolled import ResNet, Unrolled
from msmri.physics.operators import CoilFourier, Subsample
from msmri.tensors import Image, KSpace, Mask, Rng

SHIPPED = "ssdu_columns_r4.safetensors"  # in msmri/weights
REFERENCE = """@article{yaman2020self,
  title = {Self-supervised learning of physics-guided reconstruction neural networks without fully sampled reference
    data},
  author = {Yaman, Burhaneddin and Hosseini, Seyed Amir Hossein and Moeller, Steen and Ellermann, Jutta and
    U{\\u g}urbil, K{\\^a}mil and Ak{\\c c}akaya, Mehmet},
  journal = {Magnetic Resonance in Medicine}, volume = {84}, number = {6}, pages = {3172--3191}, year = {2020}
}"""
ZERO_SHOT_REFERENCE = """@inproceedings{yaman2022zero,
  title = {Zero-Shot Self-Supervised Learning for {MRI} Reconstruction},
  author = {Yaman, Burhaneddin and Hosseini, Seyed Amir Hossein and Ak{\\c c}akaya, Mehmet},
  booktitle = {International Conference on Learning Representations}, year = {2022}
}"""


def load_unrolled(path: str | Path, *, device: str = "cpu") -> Unrolled:
    """Load an unrolled network written by ``msmri train``.

    Raises
    ------
    InputError
        If the file cannot be read or holds another model.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
        model = load_prior(path, device=device)
    if not isinstance(model, Unrolled):
        mend = "train one with recipes/ssdu_small.yaml"
        raise InputError("the weights are not those of an unrolled network", mend=mend, path=path)
    return model


def _scaled(measurement: Measurement) -> tuple[Measurement, CoilFourier]:
    """Divide k-space by its centre scale, zero outside the mask, one mask and one set of coil maps a slice."""
    encoding = CoilFourier(coil_maps(measurement))
    mask = measurement.mask.expand(len(measurement.values), *measurement.mask.shape[1:])
    clean = replace(measurement, values=Subsample(mask)(measurement.values), mask=mask)
    scaled = clean.scaled(clean.centre_scale())
    if not bool(torch.isfinite(scaled.values.abs()).all()):
        where = measurement.source[0] if measurement.source else None
        raise InputError("k-space holds NaN or infinite values", mend="mask them out", path=where)
    return scaled, encoding


@dataclass(frozen=True)
class SSDU:
    """Apply a trained unrolled network to all that was measured: one pass, Theta being Omega. Yaman et al. 2020.

    K-space is divided by ``measurement.centre_scale()`` inside. The weights may come from any training of an
    :class:`~msmri.model.unrolled.Unrolled`: self-supervised (``SSDULoss``) or supervised (``SupervisedLoss``).
    Covered by the patent application US 17/075,411, see the module.
    """

    weights: str | Path | None = None  # file of msmri train; None: the shipped one, if there is one
    batch: int = 4  # slices that go through the network at once

    name: ClassVar[str] = "ssdu"
    reference: ClassVar[str] = REFERENCE
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {}

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"ssdu cannot use batch={self.batch}", mend="give 1 or more")

    def __call__(self, measurement: Measurement, rng: Rng) -> Reconstruction:
        """Reconstruct every slice; ``rng`` is not used."""
        begin = time.perf_counter()
        scaled, encoding = _scaled(measurement)
        model = self._model(str(scaled.values.device))
        images = []
        for first in range(0, len(scaled.values), self.batch):
            part = slice(first, first + self.batch)
            with torch.inference_mode():
                images.append(model(scaled.values[part], scaled.mask[part], CoilFourier(encoding.maps[part])))
        details = {"NFE": model.unrolls, "mu": model.mu, "seconds": time.perf_counter() - begin}
        return point_estimate(torch.cat(images), scaled, **details)

    @cached_property
    def _loaded(self) -> dict[str, Unrolled]:
        return {}

    def _model(self, device: str) -> Unrolled:
        """Give the network, loaded once a device."""
        if device not in self._loaded:
            path = Path(str(files("msmri") / "weights" / SHIPPED)) if self.weights is None else Path(self.weights)
            if self.weights is None and not path.exists():
                mend = "train one with recipes/ssdu_small.yaml or give weights=..."
                raise InputError("no weights of SSDU come with this version of msmri", mend=mend)
            self._loaded[device] = load_unrolled(path, device=device)
        return self._loaded[device]


@dataclass(frozen=True)
class ZeroShotSSDU:
    """Train an unrolled network on the scan at hand and stop by its own held-out places. Yaman et al. 2022 (ZS-SSL).

    Of the measured places a share ``validation_ratio`` is held out; the rest is split ``splits`` times into what the
    network sees and what its result is compared with. An epoch is one step on each split. When ``patience`` epochs
    have not lowered the error on the held-out places, the best weights reconstruct from all that was measured. Every
    slice is trained by itself and depends on its own generator alone. Takes minutes a slice on a CPU; the authors' own
    numbers are 300 epochs, patience 25, and a network of 10 unrolls, 15 blocks and 64 channels without ``patch``.
    Covered by the patent application US 17/075,411, see the module.
    """

    weights: str | Path | None = None  # start from a trained network (its size is then used); None: from random weights
    splits: int = 25  # K, each a training example
    ratio: float = 0.4  # share of what is not held out on which a training step compares
    validation_ratio: float = 0.2  # share of the measured places held out to know when to stop
    law: Literal["uniform", "gaussian", "columns"] = "uniform"  # of all these splits
    epochs: int = 100  # at most
    patience: int = 10  # epochs without a lower error before stopping
    learning_rate: float = 5e-4  # of Adam, constant
    unrolls: int = 5
    cg_iterations: int = 5
    channels: int = 32  # of the network's blocks
    blocks: int = 4
    patch: int = 2  # side of the pixel blocks folded into channels

    name: ClassVar[str] = "zs-ssdu"
    reference: ClassVar[str] = ZERO_SHOT_REFERENCE
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {}

    def __post_init__(self) -> None:
        for field in ("splits", "epochs", "patience", "unrolls", "cg_iterations", "channels", "patch"):
            if getattr(self, field) < 1:
                raise InputError(f"zs-ssdu cannot use {field}={getattr(self, field)}", mend="give 1 or more")
        if not self.learning_rate > 0:
            raise InputError(f"zs-ssdu cannot use learning_rate={self.learning_rate}", mend="give a positive number")
        self._split(self.ratio), self._split(self.validation_ratio)

    def __call__(self, measurement: Measurement, rng: Rng) -> Reconstruction:
        """Train on each slice and reconstruct it.

        Details, one entry a slice: ``epochs`` done, ``validation`` error before the first and after each epoch,
        ``mu``, ``seconds``.
        """
        scaled, encoding = _scaled(measurement)
        if len(rng) != len(scaled.values):
            raise ValueError(f"{len(scaled.values)} slices need as many generators, got {len(rng)}")
        images: list[Tensor] = []
        details: dict[str, list[Any]] = {"epochs": [], "validation": [], "mu": [], "seconds": []}
        for index, generator in enumerate(rng):
            begin, one = time.perf_counter(), slice(index, index + 1)
            values, mask, maps = scaled.values[one], scaled.mask[one], CoilFourier(encoding.maps[one])
            model = self._start(generator, str(values.device))
            curve = self._train(model, values, mask, maps, generator)
            with torch.no_grad():
                images.append(model(values, mask, maps))
            seconds = time.perf_counter() - begin
            for key, value in zip(details, (len(curve) - 1, curve, model.mu, seconds), strict=True):
                details[key].append(value)
        return point_estimate(torch.cat(images), scaled, NFE=model.unrolls, **details)

    def _split(self, ratio: float) -> Split:
        return Split(self.law, ratio)

    def _start(self, generator: Generator, device: str) -> Unrolled:
        """Give the network to begin with, its random weights from ``generator``."""
        if self.weights is not None:
            return copy.deepcopy(load_unrolled(self.weights, device=device)).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(int(torch.randint(0, 2**62, (), generator=generator)))
            network = ResNet(self.channels, self.blocks, patch=self.patch, zero_last=True)
        model = Unrolled(
            network, unrolls=self.unrolls, cg_iterations=self.cg_iterations, residual=True, warm_start=True
        )
        return model.to(device)

    def _train(
        self, model: Unrolled, values: KSpace, mask: Mask, encoding: CoilFourier, generator: Generator
    ) -> list[float]:
        """Train on one slice (a batch of 1) and leave the best weights in the model; give the validation errors."""
        shape = (values.shape[-2], values.shape[-1])
        held = self._split(self.validation_ratio)(mask, shape, [generator]) & mask
        rest = mask & ~held
        compared = [self._split(self.ratio)(rest, shape, [generator]) & rest for _ in range(self.splits)]

        def error(seen: Mask, where: Mask) -> Tensor:
            image: Image = model(values, seen, encoding)
            return normalised_error(encoding(image), values, where).mean()

        def validate() -> float:
            with torch.no_grad():
                return float(error(rest, held))

        optimiser = torch.optim.Adam(model.parameters(), lr=self.learning_rate)
        curve = [validate()]
        best, weights = 0, copy.deepcopy(model.state_dict())
        for epoch in range(1, self.epochs + 1):
            for k in torch.randperm(self.splits, generator=generator).tolist():
                optimiser.zero_grad(set_to_none=True)
                error(rest & ~compared[k], compared[k]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
            curve.append(validate())
            if curve[-1] < curve[best]:
                best, weights = epoch, copy.deepcopy(model.state_dict())
            if epoch - best >= self.patience:
                break
        model.load_state_dict(weights)
        return curve
