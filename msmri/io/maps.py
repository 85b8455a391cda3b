"""What files of coil maps tell about their making, and whether that fits a reconstruction."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msmri.io.output import FINGERPRINT, fingerprint, open_hdf5, sha256

NAMES = {"input": "scan", "name": "name of the scan", "crop_to": "crop-to"}  # of settings, where told
DRAWN = ("seed", "name")  # what decides masks and noise where these are drawn
SHOWN = ("mask", "noise", *DRAWN)  # what decides how much of a scan the maps were shown
OTHER = ("input", "crop_to", "coils")  # what makes them maps of something else


def maps_settings(path: str | Path) -> dict[str, Any] | None:
    """Read what coil maps were made from, as written by ``msmri coils``; None where the file does not tell.

    Raises
    ------
    InputError
        If the file cannot be read.
    """
    with open_hdf5(path) as file:
        text = file.attrs.get(FINGERPRINT)
    try:
        found = json.loads(text) if text is not None else None
    except (ValueError, TypeError):
        return None
    return found if isinstance(found, dict) and found else None


def same_maps(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give settings as they are stored and compared: plain, and a given mask (1, 1, 1 or ky, kx) as its checksum."""
    plain: dict[str, Any] = json.loads(fingerprint(settings))
    mask = plain.get("mask")
    if isinstance(mask, list):
        digits = hashlib.sha256(json.dumps(mask).encode()).hexdigest()
        plain["mask"] = f"given, {digits[:16]}"
    return plain


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], *, keys: Sequence[str] = (*OTHER, *SHOWN)
) -> list[str]:
    """Tell in words in which ``keys`` of ``wanted`` the stored settings of coil maps differ from it.

    Seed and name count only where masks or noise are drawn by them; sets and ESPIRiT's settings are a choice and do
    not count. What older files do not tell was not to be chosen then.
    """
    before, now = (_relevant(same_maps(settings)) for settings in (stored, wanted))
    told = []
    for key in keys:
        if (key in DRAWN and not (key in before and key in now)) or before.get(key) == now.get(key):
            continue
        old, new, name = before.get(key), now.get(key), NAMES.get(key, key)
        if key == "mask" and isinstance(old, dict) and isinstance(new, dict) and old.get("law") == new.get("law"):
            fields = [field for field in sorted(old.keys() | new.keys()) if old.get(field) != new.get(field)]
            told += [f"mask's {field} {old.get(field)}, not {new.get(field)}" for field in fields]
        else:
            told.append(name if key == "input" else f"{name} {_short(old)}, not {_short(new)}")
    return told


def checksum(path: str | Path) -> str:
    """Give the SHA-256 checksum of a file, computed once as long as the file stays as it is."""
    found = Path(path).resolve()
    stat = found.stat()
    return _checksum(found, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _checksum(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def _relevant(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what decides the data that maps come from."""
    kept = {key: settings.get(key) for key in ("input", "mask", "crop_to", "coils")}
    kept["noise"] = settings.get("noise", 0.0)
    if isinstance(kept["mask"], dict) or kept["noise"]:
        kept |= {key: settings[key] for key in DRAWN if key in settings}
    return kept


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('law')} R={value.get('acceleration')}"
    return "none" if value is None else str(value)
