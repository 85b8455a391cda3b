"""What a run leaves to look at: tables (Markdown, CSV) and figures (PNG), each written whole or not at all."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from torch import Tensor

from msmri.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

    Array = Tensor | np.ndarray

DPI = 150
ERROR_GAIN = 5  # errors and standard deviations are drawn five times enhanced
WINDOW_PERCENTILE = 99.5  # of the reference image: the white of every grey panel
PANEL, GAP, MARGIN = 2.1, 0.07, 0.14  # inches
TITLE_HEIGHT, CAPTION_HEIGHT, HEADING_HEIGHT, BAR_WIDTH = 0.42, 0.26, 0.34, 0.8  # inches
ERROR_COLOURS = "inferno"
SHOWN_SCORES = {"psnr": "{:.2f} dB", "ssim": "SSIM {:.3f}", "object_ssim": "{:.3f} in the object"}
ERROR_TEXT = {"color": "white", "fontsize": 8, "ha": "left", "va": "top"}
INK, ACCENT = "#1a1a1a", "#ffb000"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito 2008
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":")  # when the colours begin again
FEW = 5  # series whose legend finds room among the lines


@contextmanager
def _replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary file beside ``path`` that takes its place on success and vanishes on failure."""
    path = Path(path)
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
            temporary = Path(file.name)
        try:
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", mend="choose a writable folder", path=path) from error


# tables


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]) -> str:
    """Format rows as an aligned Markdown table, numbers to the right.

    Columns are keys in order, or a mapping from key to format, such as ``{"method": "", "psnr": ".2f"}``. A missing
    value or None becomes a dash.
    """
    formats = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns, "")
    cells = [[_cell(row.get(name), form) for name, form in formats.items()] for row in rows]
    table = [[name.replace("|", "\\|") for name in formats], *cells]
    widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(formats))]
    right = [all(row.get(name) is None or _is_number(row.get(name)) for row in rows) for name in formats]
    rule = ["-" * (width - 1) + ":" if end else "-" * width for width, end in zip(widths, right)]
    lines = []
    for line in [table[0], rule, *table[1:]]:
        aligned = [text.rjust(w) if end else text.ljust(w) for text, w, end in zip(line, widths, right)]
        lines.append(f"| {' | '.join(aligned)} |\n")
    return "".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "–"
    plain = "" if isinstance(value, int) else ".4g"
    text = format(value, form or plain) if _is_number(value) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV with a header: every key that occurs, in order of first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with _replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


# figures


def comparison_figure(
    path: str | Path,
    *,
    images: Mapping[str, "Array"],
    target: "Array | None" = None,
    mask: "Array | None" = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    std: "Array | None" = None,
    zoom: tuple[int, int, int, int] | None = None,
    title: str | None = None,
) -> None:
    """Draw reconstructions of one slice side by side: images, a detail and errors, beside target and mask.

    All grey panels share one window, from 0 to the 99.5th percentile of the target (of the images' mean without
    a target). Errors and the standard deviation are enhanced five times and share one colour scale, whose end is the
    white of the grey window. Without a target (prospective data) there are no error panels.

    Parameters
    ----------
    path
        PNG file to write.
    images
        Magnitude (or complex) images (y, x) by the name to show; all of one size.
    target
        Reference image (y, x) in the same units.
    mask
        Sampling mask (1 or ky, kx), leading axes of length 1 allowed; shown with its true acceleration.
    metrics
        For each name, ``{"psnr": dB, "ssim": value}``; shown under the name, the best PSNR in bold.
    std
        Standard deviation of the magnitude over posterior samples (y, x).
    zoom
        Top, left, height and width of the detail in pixels; the most detailed place inside the body without it.
    title
        Heading of the figure.
    """
    import numpy as np

    pictures = {name: _magnitude(image, name) for name, image in images.items()}
    if not pictures:
        raise InputError("a figure needs at least one image")
    drawn = {"Target": _magnitude(target, "target"), **pictures} if target is not None else pictures
    spread = _magnitude(std, "standard deviation") if std is not None else None
    if len({picture.shape for picture in [*drawn.values(), *([] if spread is None else [spread])]}) > 1:
        sizes = ", ".join(f"{name} {picture.shape}" for name, picture in drawn.items())
        raise InputError(f"the images differ in size ({sizes})", mend="crop them to one size")
    reference = drawn["Target"] if target is not None else np.mean(list(pictures.values()), axis=0)
    white = float(np.percentile(reference, WINDOW_PERCENTILE)) or float(reference.max()) or 1.0
    box = zoom if zoom is not None else detail_region(reference)
    detail = (slice(box[0], box[0] + box[2]), slice(box[1], box[1] + box[3]))
    if min(box) < 0 or reference[detail].shape != tuple(box[2:]) or not reference[detail].size:
        raise InputError(f"the detail {box} does not lie inside the image {reference.shape}")

    side_mask = mask is not None and target is None  # with a target, the mask fills the target's empty error cell
    n_columns = len(drawn) + (spread is not None) + side_mask
    bar_column = len(drawn) + (target is None)  # right of the last coloured panel of the last row
    has_bar = (target is not None or spread is not None) and bar_column == n_columns
    scores = {name: score for name, score in (metrics or {}).items() if name in pictures}
    second_line = spread is not None or any(key in score for score in scores.values() for key in SHOWN_SCORES)
    title_height = TITLE_HEIGHT if second_line else CAPTION_HEIGHT
    captions = [title_height, 0.0, CAPTION_HEIGHT if mask is not None else 0.0][: 3 if target is not None else 2]
    grid = _grid(reference.shape, n_columns, captions, bar=has_bar, heading=title)
    best = max((score["psnr"] for score in scores.values() if "psnr" in score), default=None)
    coloured: AxesImage | None = None
    for column, (name, picture) in enumerate(drawn.items()):
        score, axes = scores.get(name, {}), grid.axes(0, column)
        line = "   ".join(form.format(score[key]) for key, form in SHOWN_SCORES.items() if key in score)
        _grey(axes, picture, white, box=box if column == 0 else None)
        _panel_title(axes, name, line, bold=best is not None and score.get("psnr") == best)
        _grey(grid.axes(1, column), picture[detail], white)
        if target is not None and column > 0:
            coloured = _enhanced(grid.axes(2, column), abs(picture - reference), white)
            coloured.axes.text(0.03, 0.97, f"error ×{ERROR_GAIN}", ERROR_TEXT, transform=coloured.axes.transAxes)
    if spread is not None:
        axes = grid.axes(0, len(drawn))
        coloured = _enhanced(axes, spread, white)
        _panel_title(axes, "Standard deviation", f"over posterior samples, ×{ERROR_GAIN}")
        _enhanced(grid.axes(1, len(drawn)), spread[detail], white)
    if mask is not None:
        _draw_mask(grid.axes(0, n_columns - 1) if side_mask else grid.axes(2, 0), mask, reference.shape)
    if coloured is not None:
        _colour_bar(grid, coloured, bar_column)
    _save(grid.figure, path)


@dataclass(frozen=True)
class _Grid:
    """A figure whose panels are placed in inches, so that no title is clipped whatever the number of panels."""

    figure: "Figure"
    height: float  # of a panel
    tops: tuple[float, ...]  # upper edge of each row

    def axes(self, row: int, column: int) -> "Axes":
        """Add the axes of one panel."""
        return self.place(MARGIN + column * (PANEL + GAP), self.tops[row], PANEL)

    def place(self, left: float, top: float, width: float) -> "Axes":
        """Add axes as high as a panel at a place in inches from the upper left corner."""
        across, down = self.figure.get_size_inches()
        return self.figure.add_axes((left / across, 1 - (top + self.height) / down, width / across, self.height / down))


def _grid(shape: tuple[int, ...], columns: int, captions: list[float], *, bar: bool, heading: str | None) -> _Grid:
    height = PANEL * min(max(shape[0] / shape[1], 0.4), 2.5)
    tops, top = [], MARGIN / 2 + (HEADING_HEIGHT if heading else 0.0)
    for caption in captions:  # one a row, in inches
        tops.append(top + caption)
        top = tops[-1] + height + GAP
    size = (2 * MARGIN + columns * (PANEL + GAP) - GAP + (BAR_WIDTH if bar else 0.0), top - GAP + MARGIN)
    figure = _new_figure(size)
    if heading:
        style = {"ha": "center", "va": "center", "fontsize": 12, "weight": "bold", "color": INK}
        _shrink(figure.text(0.5, 1 - (MARGIN + 0.12) / size[1], heading, style), size[0] - 2 * MARGIN)
    return _Grid(figure, height, tuple(tops))


def detail_region(image: "Array") -> tuple[int, int, int, int]:
    """Find the most detailed place of a magnitude image: top, left, height and width of the window.

    Of all windows of 30 % of the sides, the one where the gradient magnitude varies most (largest standard
    deviation), among those that lie inside the body: not beyond its outline shrunk by 10 % of the shorter side, so that
    the bright rim of skin and fat does not win.
    """
    import numpy as np
    from scipy.ndimage import binary_erosion, binary_fill_holes, uniform_filter

    picture = _magnitude(image, "image")
    size = tuple(max(1, round(0.3 * n)) for n in picture.shape)
    smooth = uniform_filter(picture, max(3, min(picture.shape) // 40))
    body = binary_fill_holes(smooth > 0.1 * np.percentile(smooth, 99))
    inner = binary_erosion(body, iterations=max(1, round(0.1 * min(picture.shape))))
    gradient = inner * np.hypot(*np.gradient(picture)) if min(picture.shape) > 1 else np.zeros_like(picture)
    variance = uniform_filter(gradient**2, size) - uniform_filter(gradient, size) ** 2
    inside = uniform_filter(inner.astype(float), size)
    # only windows that the image holds whole; a filter of size n centred at i starts at i - n // 2
    rows, columns = (slice(n // 2, total - (n - 1) // 2) for n, total in zip(size, picture.shape))
    inside, variance = inside[rows, columns], variance[rows, columns]
    score = np.where(inside >= min(0.95, float(inside.max())), variance, -np.inf)
    top, left = np.unravel_index(int(score.argmax()), score.shape)
    return int(top), int(left), size[0], size[1]


def loss_curve(path: str | Path, records: Iterable[Mapping[str, Any]], *, title: str = "Training") -> None:
    """Draw the loss against the step: every value faint, its running mean on top, and validation losses if any.

    Records hold ``step`` and ``loss``, and where measured ``validation``; what is not finite is left out. The loss axis
    is logarithmic unless a value is zero or negative, as unbiased risk estimates may be.
    """
    import numpy as np
    from scipy.ndimage import uniform_filter1d

    kept = list(records)
    points = {key: [(r["step"], r[key]) for r in kept if r.get(key) is not None] for key in ("loss", "validation")}
    curves = {key: np.array(found, dtype=float).reshape(-1, 2) for key, found in points.items()}
    curves = {key: curve[np.isfinite(curve[:, 1])] for key, curve in curves.items()}
    if not len(curves["loss"]):
        raise InputError("there is no finite loss to draw", mend="give records with 'step' and 'loss'", path=path)
    figure, axes = _chart("step", "loss", title)
    steps, losses = curves["loss"].T
    span = max(1, len(losses) // 50)
    running = uniform_filter1d(losses, span)
    if span > 1:
        axes.plot(steps, losses, color=SERIES[0], alpha=0.25, linewidth=0.6)
    axes.plot(steps, running, color=SERIES[0], linewidth=1.6, label=f"loss, mean of {span}" if span > 1 else "loss")
    if len(curves["validation"]):
        axes.plot(*curves["validation"].T, color=SERIES[1], marker="o", markersize=3.5, label="validation")
    if min(float(curve[:, 1].min()) for curve in curves.values() if len(curve)) > 0:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def line_plot(
    path: str | Path,
    series: Mapping[str, Sequence[tuple[float, ...]]],
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
    log_x: bool = False,
) -> None:
    """Draw one line a series, such as PSNR against acceleration for each method.

    A series is a list of points ``(x, y)``, or ``(x, y, low, high)`` to get a band from low to high.
    """
    import numpy as np

    if not series:
        raise InputError("there is no series to draw", path=path)
    figure, axes = _chart(x_label, y_label, title)
    ends = []
    for i, (name, points) in enumerate(series.items()):
        if {len(point) for point in points} not in ({2}, {4}):
            raise InputError(f"the points of '{name}' are neither all (x, y) nor all (x, y, low, high)", path=path)
        x, y, *band = np.array(sorted(points), dtype=float).T
        again = i // len(SERIES)  # a colour that comes again has another marker: single points show no dashes
        colour, marker = SERIES[i % len(SERIES)], MARKERS[(i + again) % len(MARKERS)]
        dash = DASHES[again % len(DASHES)]
        (line,) = axes.plot(x, y, dash, color=colour, marker=marker, markersize=5, linewidth=1.5, label=name)
        ends.append((float(y[-1]), line))
        if band:
            axes.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
    if log_x:
        axes.set_xscale("log")
    if len(series) <= FEW:
        axes.legend(frameon=False, fontsize=9)
    else:  # beside the lines, in the order of their right ends
        figure.set_size_inches(8.4, 4.6)
        lines = [line for _, line in sorted(ends, key=lambda end: -end[0])]
        figure.legend(handles=lines, frameon=False, fontsize=9, loc="outside right upper")
    _save(figure, path)


# what the figures share


def _new_figure(size: tuple[float, float]) -> "Figure":
    """Make a white figure of a size in inches with its own canvas, apart from pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=size, dpi=DPI, facecolor="white")).figure


def _save(figure: "Figure", path: str | Path) -> None:
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})


def _chart(x_label: str, y_label: str, title: str | None) -> "tuple[Figure, Axes]":
    figure = _new_figure((6.4, 4.0))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, axisbelow=True)
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=11, fontweight="bold")
    return figure, axes


def _grey(axes: "Axes", picture: "np.ndarray", white: float, box: tuple[int, int, int, int] | None = None) -> None:
    from matplotlib.patches import Rectangle

    axes.set_axis_off()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=white, interpolation="auto")
    if box is not None:
        top, left, height, width = box
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=ACCENT, linewidth=1))


def _enhanced(axes: "Axes", picture: "np.ndarray", white: float) -> "AxesImage":
    axes.set_axis_off()
    return axes.imshow(ERROR_GAIN * picture, cmap=ERROR_COLOURS, vmin=0, vmax=white, interpolation="auto")


def _panel_title(axes: "Axes", name: str, second: str = "", *, bold: bool = False) -> None:
    """Write one or two lines above a panel, made smaller where they would be wider than the panel."""
    style = {"ha": "center", "va": "bottom", "color": INK, "transform": axes.transAxes}
    inch = DPI / axes.bbox.height  # in units of the panel's height
    lines = [(name, 10.0, "bold", 0.2 if second else 0.04), (second, 8.5, "bold" if bold else "normal", 0.04)]
    for text, size, weight, above in lines:
        _shrink(axes.text(0.5, 1 + above * inch, text, {**style, "fontsize": size, "weight": weight}), PANEL)


def _shrink(text: "Text", inches: float) -> None:
    width = text.get_window_extent().width / DPI
    if width > inches:
        text.set_fontsize(0.95 * float(text.get_fontsize()) * inches / width)  # hinting makes widths jump


def _draw_mask(axes: "Axes", mask: "Array", shape: tuple[int, ...]) -> None:
    import numpy as np

    lines = (mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)) != 0
    if lines.ndim > 2 and math.prod(lines.shape[:-2]) != 1:
        raise InputError(f"a figure shows the mask of one slice, not {lines.shape}")
    lines = lines.reshape(-1, lines.shape[-1])
    if len(lines) == 1:
        lines = np.broadcast_to(lines, (shape[0], lines.shape[1]))
    axes.set_axis_off()
    axes.imshow(lines, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    measured = float(lines.mean())
    _panel_title(axes, f"Mask, true R = {1 / measured:.2f}" if measured else "Mask, nothing measured")


def _colour_bar(grid: _Grid, coloured: "AxesImage", column: int) -> None:
    """Draw the scale of errors and standard deviations in percent of the grey window, before enhancement."""
    axes = grid.place(MARGIN + column * (PANEL + GAP) + 0.03, grid.tops[-1], 0.11)
    white = coloured.get_clim()[1]
    bar = grid.figure.colorbar(coloured, cax=axes)
    percents = range(0, 100 // ERROR_GAIN + 1, 5)
    bar.set_ticks([white * percent * ERROR_GAIN / 100 for percent in percents], labels=[str(p) for p in percents])
    bar.ax.tick_params(labelsize=8, length=2, pad=2)
    bar.set_label("% of white", fontsize=8, labelpad=3)
    bar.outline.set_visible(False)


def _magnitude(image: "Array", name: str) -> "np.ndarray":
    import numpy as np

    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise InputError(f"a figure shows one finite slice (y, x), but '{name}' has shape {array.shape} or holds NaN")
    return np.abs(array).astype(np.float64)
