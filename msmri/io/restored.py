"""Restored photographs on disk: images, maps of how uncertain they are, and sheets to compare them on."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.io.output import atomic
from msmri.io.photos import to_pixels, to_values
from msmri.io.pictures import SUFFIXES

BRIGHTEST = 0.5  # standard deviation, of values in [-1, 1], that is the brightest of an uncertainty map
GAP, TITLE, SMALLEST = 2, 14, 96  # pixels between images of a sheet, of its titles, and a side of an image at least


def file_names(names: Sequence[str]) -> list[str]:
    """Make file names without suffix from names of photographs, whatever these hold; no two alike."""
    plain = []
    for name in names:
        stem = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name
        plain.append(re.sub(r"[^\w.#=+-]+", "_", stem).lstrip(".") or "photo")
    result = []
    for number, one in enumerate(plain):
        taken = one.lower() in {other.lower() for other in plain[:number]}
        result.append(f"{one}-{number}" if taken else one)
    return result


def write_photo(path: str | Path, values: Tensor) -> None:
    """Write colours (3, y, x) in [-1, 1] as an 8-bit PNG."""
    from PIL import Image

    with atomic(path) as part:
        Image.fromarray(to_pixels(values.detach().cpu()).permute(1, 2, 0).numpy()).save(part, format="PNG")


def read_photo(path: str | Path) -> Tensor:
    """Read a PNG that :func:`write_photo` wrote, as float32 (3, y, x).

    Raises
    ------
    InputError
        If it is not there or damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return to_values(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError("is missing or damaged", mend="make it again with --overwrite", path=path) from error


def write_spread(path: str | Path, std: Tensor) -> None:
    """Write the standard deviation over samples (3, y, x), its mean over colours, as a PNG: white is BRIGHTEST."""
    from PIL import Image

    grey = (255 * std.detach().cpu().mean(0) / BRIGHTEST).round().clamp(0, 255).to(torch.uint8)
    with atomic(path) as part:
        Image.fromarray(grey.numpy()).save(part, format="PNG")


def _break(title: str, width: float, length: Callable[[str], float]) -> list[str]:
    """Break a title between its words into lines of ``width`` at most, where single words let it."""
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or length(longer) <= width - 2:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def photo_sheet(path: str | Path, rows: Sequence[Sequence[Tensor | None]], titles: Sequence[str]) -> None:
    """Write photographs (3, y, x) in [-1, 1] as one PNG: a row each, columns with titles; None leaves a gap.

    Small photographs are enlarged by a whole number, every pixel a square. Titles reach to the next one that is not
    empty, and are broken into lines where that is not enough.
    """
    from PIL import Image, ImageDraw, ImageFont

    shapes = {tuple(image.shape[-2:]) for row in rows for image in row if image is not None}
    if len(shapes) != 1 or any(len(row) != len(titles) for row in rows):
        raise InputError(f"a sheet needs photographs of one size and a title a column, not {sorted(shapes)}", path=path)
    height, width = shapes.pop()
    enlarged = -(-SMALLEST // min(height, width))
    height, width = enlarged * height, enlarged * width
    font = ImageFont.load_default(size=10)
    places = [column for column, title in enumerate(titles) if title]
    broken = {}
    for column, following in zip(places, [*places[1:], len(titles)], strict=True):
        broken[column] = _break(titles[column], (following - column) * (width + GAP) - GAP, font.getlength)
    top = TITLE * max([1, *(len(lines) for lines in broken.values())])
    sheet = Image.new(
        "RGB", (len(titles) * (width + GAP) - GAP, top + len(rows) * (height + GAP) - GAP), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for column, lines in broken.items():
        for line, text in enumerate(lines):
            draw.text((column * (width + GAP) + 2, 1 + line * TITLE), text, fill=(0, 0, 0), font=font)
    for line, row in enumerate(rows):
        for column, image in enumerate(row):
            if image is None:
                continue
            picture = Image.fromarray(to_pixels(image.detach().cpu()).permute(1, 2, 0).numpy())
            large = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (column * (width + GAP), top + line * (height + GAP)))
    with atomic(path) as part:
        sheet.save(part, format="PNG")
