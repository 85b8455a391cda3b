"""Figures of diagnostics: charts side by side, small enough for a page of documentation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from msmri.io.output import atomic
from msmri.report import MARKERS, SERIES

DPI, WIDTH, HEIGHT = 100, 4.4, 3.4  # pixels an inch; inches of a panel


@dataclass(frozen=True)
class Panel:
    """One chart: lines, or a picture."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)  # points by the name of the line
    log_x: bool = False
    log_y: bool = False
    level: tuple[float, str] | None = None  # a horizontal line and what it means
    diagonal: bool = False  # draw y = x
    picture: Tensor | None = None  # (rows, columns) in place of lines
    limits: tuple[float, float] | None = None  # of y, or of the picture's grey values


def draw_panels(path: str | Path, panels: Sequence[Panel]) -> None:
    """Draw charts side by side into one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * len(panels), HEIGHT), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_title(panel.title, fontsize=10, fontweight="bold")
        axes.set_xlabel(panel.x_label, fontsize=9)
        axes.set_ylabel(panel.y_label, fontsize=9)
        axes.tick_params(labelsize=8)
        if panel.picture is not None:
            low, high = panel.limits or (None, None)
            shown = axes.imshow(panel.picture.numpy(), cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
            figure.colorbar(shown, ax=axes, shrink=0.85).ax.tick_params(labelsize=8)
            continue
        axes.grid(True, color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for i, (name, points) in enumerate(panel.series.items()):
            x, y = zip(*sorted(points)) if points else ((), ())
            few = len(x) < 40
            marker = MARKERS[i % len(MARKERS)] if few else None
            style = "none" if name.startswith("·") else "-"  # single points, not a line
            axes.plot(
                x, y, color=SERIES[i % len(SERIES)], marker=marker, markersize=4, linewidth=1.3, linestyle=style,
                label=name.lstrip("· "),
            )  # fmt: skip
        if panel.level is not None:
            axes.axhline(panel.level[0], color="0.4", linewidth=1, linestyle="--", label=panel.level[1])
        if panel.diagonal:
            axes.axline((0, 0), slope=1, color="0.4", linewidth=1, linestyle="--", label="as stated")
        if panel.log_x:
            axes.set_xscale("log")
            places = sorted({x for points in panel.series.values() for x, _ in points})
            if 1 < len(places) <= 8:  # a few chosen values: name them
                axes.set_xticks(places, [f"{place:g}" for place in places])
                axes.set_xticks([], minor=True)
        if panel.log_y:
            axes.set_yscale("log")
        if panel.limits is not None:
            axes.set_ylim(*panel.limits)
        if len(panel.series) > 1 or panel.level is not None or panel.diagonal:
            axes.legend(frameon=False, fontsize=7.5)
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
