"""Weights on disk: safetensors with the recipe in the header, and a safe import of the published ``.pt`` files."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msmri.errors import InputError, InputWarning
from msmri.model.adm import COLOUR_128, COMPLEX_256, ADMConfig, ADMUNet, import_state_dict
from msmri.model.denoiser import ComplexChannels, EpsilonVP, VPSchedule

HEADER, COMPLEX = "msmri", "msmri.complex"  # keys of the safetensors metadata
PUBLISHED = "adm"  # value of the header's "format" for converted published weights
HEAD_CHANNELS = 64  # width of an attention head of the published networks
NESTINGS = ("ema", "ema_state_dict", "model_ema", "state_dict", "model_state_dict", "model")  # preferred first


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header to a safetensors file, whole or not at all.

    Parameters
    ----------
    path
        The file; it is written under another name beside, and renamed when complete.
    tensors
        Tensors of any device and dtype by name; complex ones are kept as pairs of real numbers.
    header
        What JSON can hold: recipe, versions, checksums.

    Raises
    ------
    InputError
        If the place cannot be written to.
    """
    path = Path(path)
    metadata = {HEADER: json.dumps(header)}
    plain, paired, seen = {}, [], set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if value.is_complex():
            value = torch.view_as_real(value)
            paired.append(name)
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value  # the format refuses tensors that share memory
        seen.add(storage)
    if paired:
        metadata[COMPLEX] = json.dumps(paired)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # the usual rights of new files; the writer would leave it to its owner alone
        save_file(plain, partial, metadata=metadata)
        partial.chmod(mode)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be written ({_one_line(error)})", mend="choose another place", path=path) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def load_checkpoint(
    path: str | Path, *, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a file written by ``save_checkpoint``.

    Raises
    ------
    InputError
        If the file is missing, damaged, or of another kind.
    """
    tensors, metadata = _read_safetensors(Path(path), device)
    return tensors, _header(Path(path), metadata)


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header alone of a file written by ``save_checkpoint``; errors as in ``load_checkpoint``."""
    with _open_safetensors(Path(path)) as file:
        return _header(Path(path), file.metadata() or {})


def checkpoint_checksum(path: str | Path) -> str:
    """Give the SHA-256 of a file, in hexadecimal."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(Path(path), error) from error


def load_published(
    path: str | Path,
    *,
    head_channels: int | None = None,
    n_heads: int | None = None,
    in_channels: int | None = None,
    nearest: bool = False,
    device: str | torch.device = "cpu",
) -> EpsilonVP:
    """Load published MSM weights, or the file ``convert_published`` made of them, as a denoiser.

    Two real channels make a denoiser of complex images with one channel, other numbers one of real images.

    Parameters
    ----------
    path
        A ``.pt`` file with the state dict, flat or under ``ema`` or ``state_dict``, or a safetensors file.
    head_channels, n_heads
        Width of an attention head, or their number. The published networks, and converted files, know their own; no
        shape tells that of another network, which is taken to be 64 wide, with a warning.
    in_channels
        The number of real channels the weights must have; any without it.
    nearest
        Round times to whole steps, see ``EpsilonVP``.

    Raises
    ------
    InputError
        If the file is damaged, would run code, or does not hold a network of this family with so many channels.
    """
    path = Path(path)
    network, schedule = _read_network(path, head_channels=head_channels, n_heads=n_heads, in_channels=in_channels)
    door = ComplexChannels(network) if network.config.in_channels == 2 else network
    return EpsilonVP(door, schedule, nearest=nearest).to(device).eval()


def convert_published(
    path: str | Path,
    out: str | Path,
    *,
    head_channels: int | None = None,
    n_heads: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert published weights to safetensors with prediction type, schedule and network in the header, returned.

    Raises
    ------
    InputError
        As in ``load_published``, or if ``out`` exists and may not be overwritten.
    """
    path, out = Path(path), Path(out)
    if out.exists() and not overwrite:
        raise InputError("exists already", mend="choose another name or allow overwriting", path=out)
    network, schedule = _read_network(path, head_channels=head_channels, n_heads=n_heads)
    header = {
        "format": PUBLISHED,
        "prediction": "epsilon",
        "schedule": asdict(schedule),
        "network": asdict(network.config),
        "weights": {"file": path.name, "sha256": checkpoint_checksum(path)},
    }
    save_checkpoint(out, network.state_dict(), header)
    return read_header(out)


def _read_network(
    path: Path, *, head_channels: int | None, n_heads: int | None, in_channels: int | None = None
) -> tuple[ADMUNet, VPSchedule]:
    """Read the network, in float32, and the schedule from published or converted weights."""
    schedule = VPSchedule()
    try:
        if not _is_safetensors(path):
            state, header = _state_dict(path, _load_pickle(path)), {}
        else:
            tensors, metadata = _read_safetensors(path, "cpu")
            header = _header(path, metadata) if HEADER in metadata else {}
            state = tensors if header else _state_dict(path, tensors)
        if header and header.get("format") != PUBLISHED:
            raise InputError("holds weights trained by msmri, not published ones", mend="load it as a prior", path=path)
        for name, value in state.items():
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise InputError(f"tensor {name} is not made of finite real numbers", mend="fetch it again")
        if header:
            config, schedule = _description(path, header)
        else:
            config, state = import_state_dict(state, head_channels=head_channels or HEAD_CHANNELS, n_heads=n_heads)
        if in_channels is not None and config.in_channels != in_channels:
            raise InputError(
                f"the weights are for {config.in_channels} real channels, not {in_channels}",
                mend="choose weights of the same kind as the data (2 for complex images, 3 for colours)",
            )
        told = header or head_channels is not None or n_heads is not None
        if not told and config not in (COMPLEX_256, COLOUR_128):  # every network of the family has attention
            warnings.warn(
                f"{path} is none of the published networks, and no shape tells how wide its attention heads are: "
                f"{HEAD_CHANNELS} is taken, and wrong images come out if that is not so; give head_channels=... as in "
                "training, or convert it with msmri convert-weights --head-channels",
                InputWarning,
                stacklevel=4,
            )
    except InputError as error:
        raise error if error.path else InputError(error.problem, mend=error.mend, path=path) from None
    with torch.device("meta"):
        network = ADMUNet(config)
    try:
        network.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise InputError("the tensors do not fit the network in the header", path=path) from error
    return network, schedule


def _description(path: Path, header: Mapping[str, Any]) -> tuple[ADMConfig, VPSchedule]:
    try:
        if header["prediction"] != "epsilon":
            raise ValueError(f"prediction {header['prediction']}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in header["network"].items()}
        return ADMConfig(**fields), VPSchedule(**header["schedule"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the header does not describe a network ({_one_line(error)})", path=path) from error


def _load_pickle(path: Path) -> Any:
    """Unpickle tensors and plain containers; refuse, without running it, a file that asks for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # a damaged file makes the unpickler fail in any way whatever
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise InputError(
                f"refused: the file is a pickle that asks to run {wanted[1]}, weights need no code",
                mend="save the state dict alone, or convert it to safetensors, where it is trusted",
                path=path,
            ) from error
        raise InputError(
            "is not a readable weights file (truncated, or of another kind)", mend="fetch it again", path=path
        ) from error


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """Find the flat state dict in what a file holds, and strip wrappers such as ``module.`` from its names."""
    for key in NESTINGS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    mend = "give a file with the state dict of the network"
    if not isinstance(content, dict) or not content:
        raise InputError(f"holds a {type(content).__name__}, not weights", mend=mend, path=path)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"holds {type(value).__name__} under {name!r}, not a tensor", mend=mend, path=path)
    landmark = "time_embed.0.weight"
    prefix = next((name.removesuffix(landmark) for name in content if name.endswith(landmark)), "")
    return {name.removeprefix(prefix): value for name, value in content.items()}


def _is_safetensors(path: Path) -> bool:
    """Tell the format from the first bytes: the length of a JSON header, then its brace."""
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise _unreadable(path, error) from error


def _open_safetensors(path: Path, device: str | torch.device = "cpu") -> Any:
    if not _is_safetensors(path):
        raise InputError(
            "is not a safetensors file", mend="convert published .pt weights first, or fetch the file again", path=path
        )
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"is damaged or truncated ({_one_line(error)})", mend="fetch or write it again", path=path
        ) from error


def _read_safetensors(path: Path, device: str | torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _open_safetensors(path, device) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    for name in json.loads(metadata.get(COMPLEX, "[]")):
        tensors[name] = torch.view_as_complex(tensors[name])
    return tensors, metadata


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata[HEADER])
    except (KeyError, ValueError) as error:
        raise InputError("has no msmri header", mend="give a file that msmri wrote", path=path) from error
    if not isinstance(header, dict):
        raise InputError("has an msmri header that is not an object", mend="give a file that msmri wrote", path=path)
    return header


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot be read ({error.strerror or error})", mend="check the name and its rights", path=path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
