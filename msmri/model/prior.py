"""Load a prior: the shipped one, one trained here, or published weights."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from msmri.config import build
from msmri.errors import InputError
from msmri.model.checkpoint import load_checkpoint, load_published

SHIPPED = "brain_r4.safetensors"  # in msmri/weights
DRAWS = "brain64_joint.safetensors"  # as well; axial slices of 64 x 64, all lines at once


def shipped_prior(*, draws: bool = False) -> Path:
    """Give the path of the demonstration prior that comes with the package: to reconstruct with, or to draw from."""
    return Path(str(files("msmri") / "weights" / (DRAWS if draws else SHIPPED)))


def load_prior(path: str | Path | None = None, *, device: str = "cpu", **published: Any) -> nn.Module:
    """Load a prior from a file: a partial denoiser trained by msmri, or an image denoiser of the published kind.

    Parameters
    ----------
    path
        ``.safetensors`` written by ``msmri train`` or ``msmri.model.checkpoint.convert_published``, or a published
        ``.pt``; the shipped demonstration prior without one.
    published
        Passed to :func:`msmri.model.checkpoint.load_published`, such as ``head_channels``.

    Raises
    ------
    InputError
        If the file cannot be read or does not hold a prior.
    """
    path = shipped_prior() if path is None else Path(path)
    if path.suffix != ".safetensors":
        return load_published(path, device=device, **published)
    tensors, header = load_checkpoint(path)
    if header.get("format") != "msmri-partial":
        return load_published(path, device=device, **published)
    model = build(header["recipe"]["model"])
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise InputError("the weights do not fit the recipe in their header", path=path) from error
    _tell_training(model, header["recipe"])
    return model.to(device).eval().requires_grad_(False)


def _tell_training(model: nn.Module, recipe: dict[str, Any]) -> None:
    """Write down what the prior was trained on where its recipe says so, for samplers.

    ``law`` is that of the masks of its training data, ``further`` what ambient training took away from those,
    ``varied`` whether that was any number of lines, ``levels`` mean and spread of the logarithm of noise levels, and
    ``highest`` their end.
    """
    loss = recipe.get("loss") or {}
    nodes = {"law": (recipe.get("data") or {}).get("law"), "further": loss.get("further")}
    if isinstance(nodes["law"], dict):
        for name, node in nodes.items():
            if isinstance(node, dict):
                setattr(model, name, build(node))
    model.varied = bool(isinstance(nodes["further"], dict) and nodes["further"].get("varied"))  # type: ignore[assignment]
    if isinstance(loss.get("sigma_max"), (int, float)):
        model.highest = float(loss["sigma_max"])  # type: ignore[assignment]
    if {"sigma_mean", "sigma_spread"} <= set(loss):
        model.levels = (float(loss["sigma_mean"]), float(loss["sigma_spread"]))  # type: ignore[assignment]
