import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import msmri.report as report
from msmri.errors import InputError
from msmri.report import comparison_figure, detail_region, line_plot, loss_curve, markdown_table, write_csv


def picture(shape=(48, 40), *, detail=(26, 20), seed=0):
    rng = np.random.default_rng(seed)
    y, x = (np.linspace(-1, 1, n) for n in shape)
    radius = np.hypot(y[:, None], x[None, :])
    image = 0.4 * (radius < 0.9) + 0.8 * ((radius > 0.82) & (radius < 0.9))  # a body with a bright rim
    top, left = detail
    image[top : top + 8, left : left + 8] += 0.2 * rng.random((8, 8))
    return image


def figure_arguments(**changes):
    target = picture() * np.linspace(0.5, 1, 40)
    images = {"zero-filled": 0.7 * target, "TV": 0.9 * target}
    metrics = {"zero-filled": {"psnr": 20.0, "ssim": 0.5}, "TV": {"psnr": 30.0, "ssim": 0.912}}
    mask = np.arange(40)[None, None, None] % 4 == 0
    return {"target": target, "images": images, "mask": mask, "metrics": metrics, "std": 0.1 * target, **changes}


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    save = report._save
    monkeypatch.setattr(report, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


# tables


def test_markdown_table():
    rows = [
        {"method": "tv", "psnr": 36.749, "slices": 3, "note": None},
        {"method": "a|b", "psnr": None, "slices": 12},
    ]
    assert markdown_table(rows, {"method": "", "psnr": ".2f", "slices": "", "note": ""}) == (
        "| method |  psnr | slices | note |\n"
        "| ------ | ----: | -----: | ---: |\n"
        "| tv     | 36.75 |      3 |    – |\n"
        "| a\\|b   |     – |     12 |    – |\n"
    )
    assert "| 0.1235 |" in markdown_table([{"x": np.float32(0.123456)}], ["x"])
    assert "| True |" in markdown_table([{"x": True}], ["x"])
    assert markdown_table([], ["x", "y"]).count("\n") == 2


def test_csv_round_trip(tmp_path):
    rows = [{"method": "tv", "psnr": 36.7}, {"method": "a, b", "ssim": 0.5}]
    path = tmp_path / "scores.csv"
    write_csv(path, rows)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{"method": "tv", "psnr": "36.7", "ssim": ""}, {"method": "a, b", "psnr": "", "ssim": "0.5"}]
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    class Unprintable:
        def __str__(self):
            raise RuntimeError("no")

    path = tmp_path / "scores.csv"
    write_csv(path, [{"a": 1}])
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_csv(path, [{"a": 2}, {"a": Unprintable()}])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "nowhere" / "scores.csv", tmp_path / "folder"):
        with pytest.raises(InputError, match=f"{place}: cannot be written"):
            write_csv(place, [{"a": 1}])
    with pytest.raises(InputError, match="cannot be written"):
        comparison_figure(tmp_path / "nowhere" / "figure.png", **figure_arguments())
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


# the comparison figure


def test_comparison_shows_every_part(tmp_path, drawn):
    path = tmp_path / "figure.png"
    comparison_figure(path, title="scan.h5, slice 3", **figure_arguments())
    (figure,) = drawn
    shown = texts(figure)
    assert shown.count("error ×5") == 2
    for text in (
        "Target",
        "zero-filled",
        "TV",
        "20.00 dB   SSIM 0.500",
        "30.00 dB   SSIM 0.912",
        "Mask, true R = 4.00",
    ):
        assert shown.count(text) == 1, text
    assert figure.texts[0].get_text() == "scan.h5, slice 3"
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 3 + 3 + 2 + 2 + 1  # images, details, errors, std, mask
    image = pixels(path)
    assert image.shape[:2] == pytest.approx(150 * figure.get_size_inches()[::-1], abs=1)
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


def test_comparison_draws_the_numbers_it_claims(tmp_path, drawn):
    arguments = figure_arguments()
    comparison_figure(tmp_path / "figure.png", zoom=(10, 5, 12, 10), **arguments)
    panels = [axes.images[0] for axes in drawn[0].axes if axes.images]
    white = np.percentile(arguments["target"], 99.5)
    grey = [panel for panel in panels if panel.get_cmap().name == "gray" and panel.get_array().max() <= 2]
    assert {panel.get_clim() for panel in panels if panel.get_array().dtype != bool} == {(0.0, white)}
    arrays = [np.asarray(panel.get_array()) for panel in panels]
    assert any(np.array_equal(a, 5 * abs(arguments["images"]["TV"] - arguments["target"])) for a in arrays)
    assert any(np.array_equal(a, 5 * arguments["std"]) for a in arrays)
    assert any(np.array_equal(a, arguments["images"]["TV"][10:22, 5:15]) for a in arrays)
    assert any(a.shape == (48, 40) and np.array_equal(a[7], arguments["mask"].ravel()) for a in arrays)
    assert len(grey) == 7
    bar = [axes for axes in drawn[0].axes if axes.get_ylabel() == "% of white"]
    assert [label.get_text() for label in bar[0].get_yticklabels()] == ["0", "5", "10", "15", "20"]
    assert np.allclose(bar[0].get_yticks(), np.linspace(0, white, 5))


def test_the_best_psnr_is_bold(tmp_path, drawn):
    comparison_figure(tmp_path / "figure.png", **figure_arguments())
    weights = {t.get_text(): t.get_fontweight() for axes in drawn[0].axes for t in axes.texts}
    assert weights["30.00 dB   SSIM 0.912"] == "bold"
    assert weights["20.00 dB   SSIM 0.500"] == "normal"


@pytest.mark.parametrize("shape", [(48, 40), (64, 20), (15, 60)])
@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("with_std", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_nothing_is_clipped(tmp_path, drawn, shape, with_target, with_std, with_mask):
    target = picture(shape, detail=(4, 4))
    comparison_figure(
        tmp_path / "figure.png",
        images={"A remarkably long name that does not fit above one panel": target, "b": 0.5 * target},
        target=target if with_target else None,
        std=0.1 * target if with_std else None,
        mask=torch.ones(1, 1, 1, shape[1], dtype=torch.bool) if with_mask else None,
        metrics={"b": {"psnr": 12.345}},
        title="a heading " * 20,
    )
    (figure,) = drawn
    width, height = figure.bbox.width, figure.bbox.height
    renderer = figure.canvas.get_renderer()
    labels = [*figure.texts, *(text for axes in figure.axes for text in [*axes.texts, axes.yaxis.label])]
    for text in labels:
        box = text.get_window_extent(renderer)
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()
    boxes = [axes.bbox for axes in figure.axes]
    overlap = [
        (i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes)
        if i < j and min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]  # fmt: skip
    assert not overlap
    titles = [text for axes in figure.axes for text in axes.texts if "remarkably" in text.get_text()]
    assert titles[0].get_window_extent(renderer).width <= report.PANEL * report.DPI + 1
    assert ("error ×5" in texts(figure)) == with_target
    assert ("Mask, true R = 1.00" in texts(figure)) == with_mask


def test_width_grows_with_the_number_of_methods(tmp_path, drawn):
    target = picture()
    for n in (1, 4):
        comparison_figure(tmp_path / f"{n}.png", target=target, images={str(i): target for i in range(n)})
    grown = drawn[1].get_size_inches() - drawn[0].get_size_inches()
    assert grown == pytest.approx([3 * (report.PANEL + report.GAP), 0])


def test_figures_are_reproducible_and_leave_no_global_state(tmp_path):
    arguments = figure_arguments()
    images = {name: torch.from_numpy(image * np.exp(0.3j)) for name, image in arguments["images"].items()}
    comparison_figure(tmp_path / "a.png", **arguments)
    comparison_figure(
        tmp_path / "b.png", **{**arguments, "images": images, "target": torch.tensor(arguments["target"])}
    )
    assert np.allclose(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"), atol=2 / 255)
    comparison_figure(tmp_path / "c.png", **arguments)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    code = (
        "import sys, numpy as np; from msmri.report import comparison_figure; "
        "comparison_figure(sys.argv[1], images={'a': np.eye(32)}); assert 'matplotlib.pyplot' not in sys.modules"
    )  # in a process of its own: other packages' tests have loaded it into this one
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "d.png")], check=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, "at least one image"),
        ({"images": {"a": np.ones((4, 5))}}, r"differ in size \(Target \(48, 40\), a \(4, 5\)\)"),
        ({"std": np.ones((4, 5))}, "differ in size"),
        ({"images": {"a": np.ones((1, 48, 40))}}, r"'a' has shape \(1, 48, 40\)"),
        ({"images": {"a": np.full((48, 40), np.nan)}}, "'a' .* NaN"),
        ({"mask": np.ones((2, 1, 1, 40))}, "mask of one slice"),
        ({"zoom": (40, 0, 20, 20)}, "does not lie inside"),
        ({"zoom": (-4, 0, 20, 20)}, "does not lie inside"),
    ],
)
def test_bad_figure_input(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        comparison_figure(tmp_path / "figure.png", **figure_arguments(**changes))
    assert list(tmp_path.iterdir()) == []


def test_all_zero_images_can_be_drawn(tmp_path):
    comparison_figure(tmp_path / "figure.png", target=np.zeros((16, 16)), images={"a": np.zeros((16, 16))})


@pytest.mark.parametrize("detail", [(16, 12), (26, 20), (28, 12)])
@pytest.mark.parametrize("shape", [(48, 40), (49, 43)])
def test_detail_region_finds_the_detail_and_not_the_rim(shape, detail):
    top, left, height, width = detail_region(picture(shape, detail=detail))
    assert (height, width) == (round(0.3 * shape[0]), round(0.3 * shape[1]))
    rows = min(top + height, detail[0] + 8) - max(top, detail[0])
    columns = min(left + width, detail[1] + 8) - max(left, detail[1])
    assert min(rows, columns) > 0 and rows * columns > 32  # at least half of the detail
    y, x = (np.linspace(-1, 1, n) for n in shape)
    radius = np.hypot(y[top : top + height, None], x[None, left : left + width])
    assert (radius > 0.82).mean() < 0.1


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (5, 5), (16, 16)])
def test_detail_region_of_small_and_empty_images(shape):
    for image in (np.zeros(shape), np.ones(shape), np.random.default_rng(0).random(shape)):
        top, left, height, width = detail_region(image)
        assert min(top, left) >= 0 and min(height, width) >= 1
        assert top + height <= shape[0] and left + width <= shape[1]


# charts


def line_data(figure):
    return {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}


def test_loss_curve(tmp_path, drawn):
    rng = np.random.default_rng(0)
    records = [{"step": 10 * i, "loss": float(np.exp(0.3 * rng.standard_normal()))} for i in range(1000)]
    records[500]["loss"] = float("nan")
    for i in (250, 750):
        records[i]["validation"] = 1.5
    loss_curve(tmp_path / "loss.png", iter(records))
    axes = drawn[0].axes[0]
    assert axes.get_yscale() == "log"
    lines = line_data(drawn[0])
    smooth, raw = lines["loss, mean of 19"], lines["_child0"]
    assert len(raw) == 999 and np.isfinite(raw).all()
    assert smooth[300, 1] == pytest.approx(np.mean([records[i]["loss"] for i in range(291, 310)]))
    assert lines["validation"].tolist() == [[2500, 1.5], [7500, 1.5]]


def test_loss_curve_of_negative_and_missing_losses(tmp_path, drawn):
    loss_curve(tmp_path / "loss.png", [{"step": 0, "loss": 1.0}, {"step": 1, "loss": -0.5}, {"step": 2}])
    assert drawn[0].axes[0].get_yscale() == "linear"
    assert line_data(drawn[0])["loss"].tolist() == [[0, 1.0], [1, -0.5]]
    with pytest.raises(InputError, match="no finite loss"):
        loss_curve(tmp_path / "none.png", [{"step": 0, "loss": float("inf")}])
    assert not (tmp_path / "none.png").exists()


def test_many_lines_differ_and_their_legend_stands_beside_them(tmp_path, drawn):
    series = {f"method {i}": [(2, i), (4, (7 * i) % 16)] for i in range(16)}
    line_plot(tmp_path / "line.png", series, x_label="R", y_label="PSNR (dB)")
    axes = drawn[0].axes[0]
    looks = {(line.get_color(), line.get_marker()) for line in axes.get_lines()}  # of single points too
    assert len(looks) == 16 and len({line.get_linestyle() for line in axes.get_lines()}) == 3
    assert axes.get_legend() is None
    (legend,) = drawn[0].legends
    ends = {name: points[-1][1] for name, points in series.items()}
    names = [text.get_text() for text in legend.get_texts()]
    assert names == sorted(series, key=lambda name: -ends[name])


def test_line_plot(tmp_path, drawn):
    series = {"MSM": [(6, 31, 30, 32), (4, 34, 33, 35)], "zero-filled": [(4, 26), (6, 24)]}
    line_plot(tmp_path / "line.png", series, x_label="R", y_label="PSNR (dB)", title="Brain")
    axes = drawn[0].axes[0]
    lines = line_data(drawn[0])
    assert lines["MSM"].tolist() == [[4, 34], [6, 31]]
    assert lines["zero-filled"].tolist() == [[4, 26], [6, 24]]
    assert len(axes.collections) == 1
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in band.tolist()} >= {(4, 33), (4, 35), (6, 30), (6, 32)}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("R", "PSNR (dB)", "Brain")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["MSM", "zero-filled"]
    for bad in ({}, {"a": [(1, 2), (1, 2, 3, 4)]}, {"a": [(1,)]}, {"a": []}):
        with pytest.raises(InputError):
            line_plot(tmp_path / "bad.png", bad, x_label="", y_label="")
    assert [file.name for file in tmp_path.iterdir()] == ["line.png"]
