"""One training loop for any loss: deterministic batches, EMA, atomic checkpoints, exact resume; a record a step."""

import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from msmri import __version__
from msmri.config import build
from msmri.errors import InputError
from msmri.io.output import atomic
from msmri.model.checkpoint import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train."""

    steps: int = 10_000  # optimiser steps
    pixels: int = 49_152  # k-space places in a batch: the number of slices follows from their size
    learning_rate: float = 4e-4  # of AdamW, after warm-up
    final_rate: float = 0.02  # share of the learning rate left at the last step (cosine)
    warm_up: int = 200  # steps over which the learning rate rises
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999  # decay of the averaged weights, which are the ones shipped
    save_every: int = 200  # steps between checkpoints
    keep_every: int = 0  # steps between averaged weights kept for good, which are checkpoints too; 0: none are kept
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep_every < 0:
            raise InputError(f"keep_every of {self.keep_every} steps makes no sense", mend="give 0 or more")


def step_seed(seed: int, step: int) -> int:
    """Give the seed of one step of a run: torch reads 32 bits of it, so that both must be in those."""
    return (seed * 0x9E3779B1 + step) % 2**32  # 2^32 over the golden ratio: runs begin far from one another


def prepare(recipe: dict[str, Any]) -> tuple[TrainSettings, Any, Any, nn.Module]:
    """Build what a recipe names: settings, data, loss, and the model as it is before the first step.

    Raises
    ------
    InputError
        If the recipe is incomplete, or names what is not there.
    """
    missing = {"data", "model", "loss"} - set(recipe)
    if missing:
        raise InputError(f"the recipe lacks {', '.join(sorted(missing))}", mend="see recipes/ for complete ones")
    given = recipe.get("train") or {}
    unknown = set(given) - {f.name for f in fields(TrainSettings)}
    if unknown:
        raise InputError(
            f"unknown train settings: {', '.join(sorted(unknown))}",
            mend=f"known: {', '.join(f.name for f in fields(TrainSettings))}",
        )
    settings = TrainSettings(**given)
    data, loss = build(recipe["data"]), build(recipe["loss"])
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(settings.seed)  # initial weights only; the caller's generator is untouched
        model: nn.Module = build(recipe["model"])
    return settings, data, loss, model


def rehearse(recipe: dict[str, Any]) -> str:
    """Do what a run begins with, and tell in a line what it would train on; nothing is written.

    Builds every part of the recipe, reads the weights to start from, and draws the smallest batch of the first step,
    for which data are read and checked as in training.

    Raises
    ------
    InputError
        As :func:`train` would, as far as one batch tells.
    """
    settings, data, _, model = prepare(recipe)
    if "start" in recipe:
        _load(model, recipe["start"])
    batch = data.batch(Generator().manual_seed(step_seed(settings.seed, 0)), pixels=1)
    coils, *matrix = batch.values.shape[1:]
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    return (
        f"{len(data)} items of data; {batch.source[0]} is read: {coils} channels of "
        f"{' x '.join(map(str, matrix))}, {float(1 / batch.acceleration[0]):.0%} measured; "
        f"a model of {size:.2f} M parameters, {settings.steps} steps"
    )


def _load(model: nn.Module, path: str | Path) -> None:
    """Give a model the weights of a file."""
    tensors, _ = load_checkpoint(path)
    try:
        model.load_state_dict({name: value.float() for name, value in tensors.items()})
    except RuntimeError as error:
        mend = "start from weights of the same model"
        raise InputError("the weights do not fit the model", mend=mend, path=path) from error


class Record(NamedTuple):
    """What happened in one step."""

    step: int  # counted from 1
    n_steps: int
    loss: float
    seconds: float  # since this process began


def train(recipe: dict[str, Any], run: str | Path, *, device: str = "cpu", resume: bool = True) -> Iterator[Record]:
    """Train by a recipe, writing checkpoints and the loss curve into the folder ``run``.

    Batch, mask split and noise of step k depend on the seed and k alone, and the state is saved whole, so that a run
    that was killed and resumed ends with the same weights as one that was not.

    Parameters
    ----------
    recipe
        ``data``, ``model`` and ``loss`` are nodes for :func:`msmri.config.build`; ``train`` holds
        :class:`TrainSettings`; everything goes into the header of the weights.
    run
        Folder for ``state.pt`` (to resume), ``last.safetensors`` (averaged weights with the recipe in the header),
        ``step_000800.safetensors`` and the like (those of every ``keep_every``-th step), ``loss.csv`` and ``loss.png``.

    Raises
    ------
    InputError
        If the recipe is incomplete, or ``run`` holds a run of another recipe.
    """
    settings, data, loss, model = prepare(recipe)
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    state_file = run / "state.pt"
    model.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    first, history, spent = 0, [], 0.0
    if state_file.exists():
        if not resume:
            raise InputError("this folder holds a run", mend="resume it or choose another folder", path=run)
        saved = torch.load(state_file, map_location=device, weights_only=True)
        if saved["identity"] != _identity(recipe):
            raise InputError("this folder holds a run of another recipe", mend="choose another folder", path=run)
        model.load_state_dict(saved["model"])
        averaged = copy.deepcopy(model)
        averaged.load_state_dict(saved["averaged"])
        optimiser.load_state_dict(saved["optimiser"])
        first, history, spent = saved["step"], saved["history"], saved.get("cpu_seconds", math.nan)
    else:
        spectrum = getattr(model, "spectrum", None)
        if isinstance(spectrum, Tensor):
            spectrum.copy_(data.spectrum(Generator().manual_seed(settings.seed)).to(device))
        if "start" in recipe:
            _load(model, recipe["start"])
        averaged = copy.deepcopy(model)
    averaged.requires_grad_(False)
    begun, spent = time.monotonic(), spent - time.process_time()
    for step in range(first, settings.steps):
        rng = Generator().manual_seed(step_seed(settings.seed, step))
        batch = _to_device(data.batch(rng, pixels=settings.pixels), device)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, settings)
        value = loss(model, batch, rng)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        if bool(torch.isfinite(norm)):
            optimiser.step()
        with torch.no_grad():
            decay = min(settings.ema, (1 + step) / (10 + step))
            for average, current in zip(averaged.parameters(), model.parameters()):
                average.lerp_(current, 1 - decay)
        history.append(float(value.detach()))
        kept = settings.keep_every > 0 and (step + 1) % settings.keep_every == 0
        if kept or (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            told = {"step": step + 1, "cpu_seconds": spent + time.process_time()}
            names = ["last.safetensors", *([f"step_{step + 1:06d}.safetensors"] if kept else [])]
            _save(run, names, recipe, settings, told, model, averaged, optimiser, history)
        yield Record(step + 1, settings.steps, history[-1], time.monotonic() - begun)


def _identity(recipe: dict[str, Any]) -> str:
    """Name what must not change between a run and its resumption; more steps may be asked for."""
    kept = {key: value for key, value in recipe.items() if key in ("model", "loss")}
    kept["seed"] = (recipe.get("train") or {}).get("seed", 0)
    return json.dumps(kept, sort_keys=True, default=str)


def _rate(step: int, settings: TrainSettings) -> float:
    """Give the learning rate as a share of its largest: linear warm-up, then a cosine down to ``final_rate``."""
    warm = min(1.0, (step + 1) / max(1, settings.warm_up))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, settings.steps))))
    return warm * (settings.final_rate + (1 - settings.final_rate) * cosine)


def _to_device(batch: Any, device: str) -> Any:
    """Move a measurement to a device."""
    from dataclasses import replace

    from msmri.physics.operators import CoilFourier

    if device == "cpu":
        return batch
    encoding = batch.encoding
    if isinstance(encoding, CoilFourier):
        encoding = CoilFourier(encoding.maps.to(device))
    moved = {
        name: torch.as_tensor(getattr(batch, name)).to(device) for name in ("values", "mask", "noise_std", "scale")
    }
    return replace(batch, encoding=encoding, **moved)


def _save(
    run: Path,
    names: list[str],
    recipe: dict[str, Any],
    settings: TrainSettings,
    told: dict[str, Any],
    model: nn.Module,
    averaged: nn.Module,
    optimiser: torch.optim.Optimizer,
    history: list[float],
) -> None:
    """Write the averaged weights under every name, the loss curve, and last, for who resumes, the state."""
    from msmri.report import loss_curve, write_csv

    header = {
        "format": "msmri-partial",
        "recipe": recipe | {"train": asdict(settings)},
        "step": told["step"],
        # of all threads together, from the first step; a run begun before this was recorded does not know
        **({"cpu_hours": round(told["cpu_seconds"] / 3600, 3)} if math.isfinite(told["cpu_seconds"]) else {}),
        "msmri": __version__,
        "loss": [round(sum(history[i : i + 50]) / len(history[i : i + 50]), 5) for i in range(0, len(history), 50)],
    }
    tensors = {name: tensor.detach().float().cpu() for name, tensor in averaged.state_dict().items()}
    for name in names:
        save_checkpoint(run / name, tensors, header)
    write_csv(run / "loss.csv", [{"step": i + 1, "loss": value} for i, value in enumerate(history)])
    loss_curve(run / "loss.png", [{"step": i + 1, "loss": value} for i, value in enumerate(history)])
    state = {
        "identity": _identity(recipe),
        **told,
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimiser": optimiser.state_dict(),
        "history": history,
    }
    with atomic(run / "state.pt") as part:  # after the rest: a run killed before goes back and writes the rest again
        torch.save(state, part)
