"""Ask what a prior trained on photographs with lost pixels is worth for other tasks, and when it beats a clean one.

    python benchmarks/do_priors_cross_tasks.py --fairface fairface_64.npz --pixels 0.2=P20 0.4=P40 0.6=P60 0.8=P80 \
        --markdown docs/results_cross_tasks.md

The question of Aali et al. 2024 (A-DPS): diffusion models trained on inpainting, each on photographs that lost a share
p of their pixels, restore from random sums (compressed sensing) and from averaged blocks (super-resolution) by A-DPS,
and a model of the same network trained on whole photographs by DPS. Every model's step towards the data is tuned on
training photographs for every task and amount. The priors of lost pixels are not shipped: each is minutes of
recipes/photos32_pixels.yaml. The shipped prior of lost tiles goes along, and so does MSM's. Every finished row is kept
beside the result: the same command goes on where it was stopped. --quick needs no data.
"""

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faces import AMBIENT, MSM_WEIGHTS, ORACLE, SHIPPED, colour_psnr, effort, fingerprint, restore_group, some, waves
from torch import Generator, Tensor

from msmri.io.output import atomic, environment, sha256, write_manifest
from msmri.io.photos import Photos, read_photos
from msmri.io.restored import photo_sheet
from msmri.io.tasks import Task, find_task, plain_input
from msmri.methods import load_method
from msmri.methods.msm import MSM
from msmri.methods.tuning import tune
from msmri.metrics import bootstrap_interval, ssim
from msmri.model.prior import load_prior
from msmri.report import markdown_table, write_csv

HERE = Path(__file__).parent
CLEAN, TILES, MSM_ROW = "whole photographs", "six of 16 tiles lost", "msm, six of 16 tiles lost"
CASES = [
    "sensing:0.05",
    "sensing:0.1",
    "sensing:0.25",
    "super-resolution:2",
    "super-resolution:4",
    "super-resolution:8",
]
TOGETHER = 6  # photographs restored at once


@dataclass(frozen=True)
class Prior:
    """One model of the comparison."""

    label: str
    weights: Path
    lost: float | None  # the share of pixels its photographs lost; None where it is not one of a series
    short: str  # above its pictures


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fairface", type=Path, default=None, help="npz with a split: test faces are reported")
    parser.add_argument("--pixels", nargs="*", default=[], metavar="P=WEIGHTS", help="priors of lost pixels")
    parser.add_argument("--shipped", type=Path, default=SHIPPED, help="folder of the other priors")
    parser.add_argument("--cases", nargs="*", default=CASES, metavar="TASK:AMOUNT")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--count", type=int, default=12, help="photographs")
    parser.add_argument("--validation", type=int, default=3, help="training photographs to tune on")
    parser.add_argument("--noise", type=float, default=0.02, help="of values in [-1, 1]")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--shown", type=int, default=4, help="photographs in a picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what a reader of the page should know about this run")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="forget rows of an earlier run")
    parser.add_argument("--work", type=Path, default=Path("runs/cross_tasks"), help="restored photographs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "do_priors_cross_tasks.json")
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    if options.quick:
        options.count, options.validation, options.steps, options.samples, options.shown = 2, 2, 3, 2, 2
        options.cases = ["sensing:0.25", "super-resolution:4"]
    elif options.fairface is None:
        parser.error("give --fairface, or --quick")
    return options


def read_priors(options: argparse.Namespace) -> list[Prior]:
    """List the clean prior, those of lost pixels by their share, that of lost tiles, and MSM's."""
    series = []
    for text in options.pixels:
        share, _, path = text.partition("=")
        try:
            lost = float(share)
        except ValueError:
            raise SystemExit(
                f"--pixels {text}: give the share of lost pixels and weights, as 0.4=last.safetensors"
            ) from None
        series.append(Prior(f"p = {lost:g}", Path(path), lost, f"p = {lost:g}"))
    series.sort(key=lambda prior: prior.lost or 0.0)
    return [
        Prior(CLEAN, options.shipped / ORACLE, 0.0, "clean"),
        *series,
        Prior(TILES, options.shipped / AMBIENT, None, "tiles"),
        Prior(MSM_ROW, options.shipped / MSM_WEIGHTS, None, "msm"),
    ]


def read_case(text: str) -> tuple[str, Task]:
    """Read ``task:amount``."""
    name, _, amount = text.partition(":")
    return text, find_task(name, float(amount) if amount else None)


def method_of(prior: Prior, options: argparse.Namespace) -> Any:
    """Give A-DPS with a prior, DPS with the clean one, MSM with its own."""
    model = load_prior(prior.weights)
    settings: dict[str, Any] = {"steps": options.steps, "samples": options.samples, "batch": 64}
    if prior.label == MSM_ROW:
        return MSM.preset("restoration", **settings, prior=model)
    return load_method("dps" if prior.label == CLEAN else "a-dps", **settings, weights=model)


def main() -> None:
    """Run, resume, and write the page and its figures."""
    options = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if options.quick:
        test, train = waves(options.count, options.size, "a"), waves(options.validation, options.size, "bb")
    else:
        test = some(read_photos(options.fairface, size=options.size, split="test"), options.count)
        train = some(read_photos(options.fairface, size=options.size, split="train"), options.validation)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = options.out.with_suffix(".rows.json")
    done: dict[str, dict[str, Any]] = {}
    if kept.exists() and not options.fresh:
        done = json.loads(kept.read_text("utf-8"))["rows"]
    priors, record = read_priors(options), {"environment": environment(), "seed": options.seed, "noise": options.noise}
    commit = record["environment"].get("commit")
    rows: list[dict[str, Any]] = []
    tuned: dict[str, float] = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    for name, task in map(read_case, options.cases):
        pictures[name] = {"input": inputs(task, test, options)}
        for prior in priors:
            method = method_of(prior, options)
            about = f"{name} | {options.noise:g} | {options.seed} | {options.size}"
            if getattr(method, "tunable", {}) and prior.label != MSM_ROW and not options.quick:
                setting = next(iter(method.tunable))
                key = f"{setting} | {about} | {len(train)} | {fingerprint(method, prior.weights)}"
                if key not in done:
                    cases = [task.degrade(train, range(len(train)), noise_std=options.noise, seed=1)]
                    best, _ = tune(replace(method, samples=1), cases, metric=colour_psnr, refinements=0)
                    done[key] = {"value": getattr(best, setting)}
                    write_manifest(kept, {"rows": done})
                tuned[f"{prior.label}, {name}"] = done[key]["value"]
                method = replace(method, **{setting: done[key]["value"]})
            found = restore(name, task, prior, method, test, options, done, kept, {"commit": commit})
            rows.extend(found[0])
            pictures[name][prior.label] = found[1]
            print(f"{name}, {prior.label}: {np.mean([row['psnr'] for row in found[0]]):.2f} dB", flush=True)
    record |= {
        "tuned": tuned,
        "training": {prior.label: effort(prior.weights) for prior in priors},
        "weights_sha256": {prior.label: sha256(prior.weights) for prior in priors},
        "verdict": verdict(rows, priors, options.seed),
    }
    write_manifest(options.out, record | {"rows": rows})
    write_csv(options.out.with_suffix(".csv"), rows)
    text = page(record, rows, priors, draw(options, test, rows, priors, pictures), options)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, "utf-8")


def inputs(task: Task, test: Photos, options: argparse.Namespace) -> Tensor:
    """Give what was measured of the shown photographs, as images."""
    index = range(min(options.shown, len(test)))
    return plain_input(task.degrade(test, index, noise_std=options.noise, seed=options.seed)).clamp(-1, 1)


def restore(
    name: str,
    task: Task,
    prior: Prior,
    method: Any,
    test: Photos,
    options: argparse.Namespace,
    done: dict[str, dict[str, Any]],
    kept: Path,
    where: dict[str, Any],
) -> tuple[list[dict[str, Any]], Tensor]:
    """Restore all photographs, or take what was kept; give the rows and the images to be shown."""
    state = fingerprint(method, prior.weights)
    rows, shown = [], torch.empty(0)
    for first in range(0, len(test), TOGETHER):
        index = range(first, min(first + TOGETHER, len(test)))
        about = f"{name} | {options.noise:g} | {options.seed} | {options.size} | {prior.label} | {state}"
        keys = [f"{about} | {test.names[k]}" for k in index]
        picture = options.work / f"{name.replace(':', '_')}-{prior.label.replace(' ', '_')}-{state}-{first}.pt"
        wanted = first < options.shown
        if not all(key in done for key in keys) or (wanted and not picture.exists()):
            one = task.degrade(test, index, noise_std=options.noise, seed=options.seed)
            plain = plain_input(one).clamp(-1, 1)
            fresh, images = restore_group(method, one, options.seed)
            assert one.target is not None
            for k, (key, values) in enumerate(zip(keys, fresh, strict=True)):
                truth = one.target[k]
                base = {"input_psnr": colour_psnr(truth, plain[k]), "input_ssim": ssim(truth, plain[k], data_range=2.0)}
                about_row = {"case": name, "prior": prior.label, "lost": prior.lost, "face": one.source[k]}
                done[key] = about_row | where | values | base
            if wanted:
                with atomic(picture) as part:
                    torch.save(images, part)
            write_manifest(kept, {"rows": done})
        rows += [done[key] for key in keys]
        if wanted:
            shown = torch.cat([shown, torch.load(picture, weights_only=True)])
    return rows, shown[: options.shown]


def cell(rows: list[dict[str, Any]], case: str, label: str) -> dict[str, dict[str, Any]]:
    """Give the rows of a prior in a case by photograph."""
    return {row["face"]: row for row in rows if (row["case"], row["prior"]) == (case, label)}


def lead(rows: list[dict[str, Any]], case: str, label: str, over: str, seed: int) -> tuple[float, float, float]:
    """Give the mean of PSNR over another prior on the same photographs, with its 95 % interval."""
    own, other = cell(rows, case, label), cell(rows, case, over)
    gains = [row["psnr"] - other[face]["psnr"] for face, row in own.items()]
    mean, low, high = bootstrap_interval(gains, Generator().manual_seed(seed))
    return float(mean), float(low), float(high)


def verdict(rows: list[dict[str, Any]], priors: list[Prior], seed: int) -> list[str]:
    """Say for every case how the priors of lost pixels stand to the clean one."""
    said = []
    series = [prior.label for prior in priors if prior.lost] or [TILES]
    for case in dict.fromkeys(row["case"] for row in rows):
        parts = []
        for label in series:
            mean, low, high = lead(rows, case, label, CLEAN, seed)
            parts.append(f"{label} {mean:+.2f} [{low:+.2f}, {high:+.2f}]")
        above = [label for label in series if lead(rows, case, label, CLEAN, seed)[1] > 0]
        below = [label for label in series if lead(rows, case, label, CLEAN, seed)[2] < 0]
        if above:
            end = f"Better than clean training beyond doubt: {', '.join(above)}."
        elif len(below) == len(series):
            end = "Clean training is better than all of them beyond doubt."
        else:
            end = "None is better than clean training beyond doubt."
        rivals = [prior.label for prior in priors if prior.label not in (CLEAN, MSM_ROW)]
        best = min(rivals, key=lambda label: lead(rows, case, MSM_ROW, label, seed)[0])
        mean, low, high = lead(rows, case, MSM_ROW, best, seed)
        end += f" MSM is {mean:+.2f} [{low:+.2f}, {high:+.2f}] against the best A-DPS, {best}."
        said.append(f"{case}, minus the clean prior in dB: {'; '.join(parts)}. {end}")
    return said


def summarise(rows: list[dict[str, Any]], priors: list[Prior], tuned: dict[str, float], seed: int) -> str:
    """Average every prior over the photographs of a case."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        first = list(cell(rows, case, CLEAN).values())
        blank = {"psnr": f"{np.mean([row['input_psnr'] for row in first]):.2f}"}
        blank["ssim"] = f"{np.mean([row['input_ssim'] for row in first]):.4f}"
        rest = dict.fromkeys(["one sample", "error per std", "step", "seconds", "minus clean, dB"], "")
        lines.append({"case": case, "prior": "what was measured", **blank, **rest})
        for prior in priors:
            own = list(cell(rows, case, prior.label).values())
            line: dict[str, Any] = {"case": case, "prior": prior.label}
            for title, name, digits in (("psnr", "psnr", 2), ("ssim", "ssim", 4), ("one sample", "psnr_one_sample", 2)):
                line[title] = f"{np.mean([row[name] for row in own]):.{digits}f}"
            line["error per std"] = f"{np.mean([row['error_per_std'] for row in own]):.2f}"
            step = tuned.get(f"{prior.label}, {case}")
            line["step"] = "" if step is None else f"{step:g}"
            line["seconds"] = f"{np.mean([row['seconds'] for row in own]):.1f}"
            mean, low, high = lead(rows, case, prior.label, CLEAN, seed)
            line["minus clean, dB"] = "" if prior.label == CLEAN else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
            lines.append(line)
    return markdown_table(lines, list(lines[0]))


def draw(
    options: argparse.Namespace,
    test: Photos,
    rows: list[dict[str, Any]],
    priors: list[Prior],
    pictures: dict[str, dict[str, Tensor]],
) -> list[Path]:
    """Draw quality against the share of lost pixels, and a sheet of photographs a case."""
    import matplotlib.pyplot as plt

    folder = options.markdown.parent / "images" if options.markdown else options.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    series = [prior for prior in priors if prior.lost is not None]
    tasks = list(dict.fromkeys(case.partition(":")[0] for case in options.cases))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        for case in (case for case in options.cases if case.partition(":")[0] == task):
            shares = [prior.lost for prior in series]
            values = [np.mean([row["psnr"] for row in cell(rows, case, prior.label).values()]) for prior in series]
            (line,) = axis.plot(shares, values, marker="o", label=case.partition(":")[2])
            ours = np.mean([row["psnr"] for row in cell(rows, case, MSM_ROW).values()])
            axis.plot([0.4], [ours], marker="*", markersize=11, linestyle="", color=line.get_color())
        axis.set(title=task, xlabel="share of pixels lost in training (0: clean)", ylabel="PSNR in dB")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False, fontsize=8)
    figure.suptitle("A-DPS by what its prior was trained on; stars: MSM, trained with tiles lost", fontsize=10)
    made.append(folder / "cross_tasks.png")
    figure.savefig(made[-1], dpi=130)
    plt.close(figure)
    truth = test.values(range(min(options.shown, len(test))))
    for case in (options.cases[min(1, len(options.cases) - 1)], options.cases[-min(2, len(options.cases))]):
        images = pictures[case]
        made.append(folder / f"cross_tasks_{case.replace(':', '_').replace('.', '')}.png")
        lines = [[truth[k], *(image[k] for image in images.values())] for k in range(len(truth))]
        photo_sheet(made[-1], lines, ["truth", "input", *(prior.short for prior in priors)])
    return list(dict.fromkeys(made))


def page(
    record: dict[str, Any],
    rows: list[dict[str, Any]],
    priors: list[Prior],
    figures: list[Path],
    options: argparse.Namespace,
) -> str:
    """Write the page of results."""
    root = options.markdown.parent if options.markdown else Path()
    shown = "\n\n".join(f"![{path.stem}]({os.path.relpath(path, root)})" for path in figures)
    training = [
        {
            "prior": prior.label,
            "training": record["training"][prior.label],
            "weights": f"`{record['weights_sha256'][prior.label][:12]}`",
        }
        for prior in priors
    ]
    words = "\n".join(f"- {line}" for line in record["verdict"])
    return (
        "# Priors across tasks\n\nWritten by `benchmarks/do_priors_cross_tasks.py`; do not edit by hand. "
        f"Seed {options.seed}, `{json.dumps(record['environment'])}`.\n\n"
        "The question of Aali et al. 2024: what are diffusion models trained on inpainting worth for other tasks? "
        f"{options.count} held-out faces of {options.size} x {options.size} pixels, noise {options.noise:g} (values in "
        "[-1, 1]). p: share of single pixels lost in every training photograph; these priors and that of lost tiles "
        "restore by A-DPS, the clean one by DPS, both with a step towards the data tuned on "
        f"{options.validation} training faces for every case; MSM with its preset, untuned. Sensing: random sums "
        "measured, as a share of the pixels; super-resolution: side of the averaged blocks. Mean of "
        f"{options.samples} samples, {options.steps} steps; intervals: 95 % bootstrap of paired differences. "
        f"{options.note}\n\n## In words\n\n{words}\n\n## Training\n\n{markdown_table(training, list(training[0]))}\n\n"
        f"## Means\n\n{summarise(rows, priors, record['tuned'], options.seed)}\n\n## Pictures\n\n"
        "The faces shown are from FairFace (Karkkainen and Joo, WACV 2021; CC BY 4.0, reduced).\n\n"
        f"{shown}\n"
    )


if __name__ == "__main__":
    main()
