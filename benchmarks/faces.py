"""Ask whether MSM restores and draws faces as it does scans: methods by tasks, and how far drawn faces are from real.

    python benchmarks/faces.py --fairface fairface_64.npz --ffhq ffhq_64.npz --markdown docs/results_faces.md

Held-out faces of FairFace and all of FFHQ that are there, brought to the size the priors were trained on, are degraded
and restored by methods that never saw a whole face, by priors that did, and by classical ones. What a method has to be
told is tuned on training faces. Drawn faces are compared with held-out ones by the Frechet distance on scattering
features. Every finished group of rows is kept beside the result, drawn faces in --work: the same command goes on where
it was stopped. A method without weights in --weights is left out, in one line. Pictures show faces of FairFace alone,
whose licence allows it. --quick needs no data: smooth waves stand for faces.
"""

import argparse
import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from msmri.distances import frechet_distance, inception_distances, lpips, scattering_features
from msmri.errors import InputError
from msmri.io.output import atomic, environment, sha256, write_manifest
from msmri.io.photos import Photos, read_photos, to_pixels
from msmri.io.restored import photo_sheet
from msmri.io.tasks import find_task, plain_input
from msmri.measurement import Measurement
from msmri.methods import load_method
from msmri.methods.generation import Generation
from msmri.methods.msm import MSM
from msmri.methods.tuning import tune
from msmri.metrics import bootstrap_interval, psnr, ssim
from msmri.model.checkpoint import load_checkpoint
from msmri.model.prior import load_prior
from msmri.physics.masks import RandomLines, slice_seed
from msmri.physics.operators import Identity
from msmri.report import markdown_table, write_csv
from msmri.sampling.reverse import Step, reverse_diffusion
from msmri.sampling.schedule import ancestral, karras
from msmri.tensors import generators, normal_like

HERE = Path(__file__).parent
SHIPPED = Path(str(files("msmri"))) / "weights"
NOTHING, TILES, CLEAN = "nothing", "faces without 6 of 16 tiles", "whole faces"
NOISY = f"{TILES}, noise 0.1"
TOGETHER = 8  # faces restored at once
HOLES, ENLARGED = ("box", "random", "tiles"), ("super-resolution",)


@dataclass(frozen=True)
class Entry:
    """One row of the comparison."""

    method: str  # as in msmri.methods
    learned_from: str  # what its weights have seen
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None  # file name in --weights
    tasks: tuple[str, ...] | None = None  # only these
    faces: int | None = None  # at most so many of each set: slow methods


MSM_WEIGHTS, AMBIENT, ORACLE = "faces_msm.safetensors", "faces_ambient.safetensors", "faces_oracle.safetensors"
MSM_NOISY, GSURE = "faces_msm_noisy.safetensors", "faces_gsure.safetensors"
MANY = {"samples": 4, "batch": 64}
ENTRIES: dict[str, Entry] = {
    "biharmonic": Entry("biharmonic", NOTHING, tasks=HOLES),
    "bicubic": Entry("bicubic", NOTHING, tasks=ENLARGED),
    "tv": Entry("tv-image", NOTHING),
    "a-dps": Entry("a-dps", TILES, {**MANY, "steps": 100}, AMBIENT),
    "msm, paper's sampler": Entry("msm", TILES, {"preset": "paper-restoration", "batch": 64}, MSM_WEIGHTS, faces=16),
    "msm": Entry("msm", TILES, {"preset": "restoration", **MANY}, MSM_WEIGHTS),
    "msm, learned from noise": Entry("msm", NOISY, {"preset": "restoration", **MANY}, MSM_NOISY),
    "oracle dps": Entry("dps", CLEAN, {**MANY, "steps": 100}, ORACLE, faces=16),
    "oracle ddnm": Entry("ddnm", CLEAN, MANY, ORACLE),
}
QUICK: dict[str, dict[str, Any]] = {"tv": {"iterations": 10}, "msm, paper's sampler": {"steps": 2}}
QUICK |= {name: {"steps": 3, "samples": 2} for name, entry in ENTRIES.items() if "samples" in entry.options}
METRICS = {"psnr": 2, "ssim": 4, "lpips": 4, "psnr_one_sample": 2, "error_per_std": 2, "NFE": 0, "seconds": 2}
DRAWN = {"msm": MSM_WEIGHTS, "msm, learned from noise": MSM_NOISY, "ambient": AMBIENT, "gsure": GSURE}  # to draw from
DRAWN |= {"oracle": ORACLE}


def colour_psnr(target: Any, image: Any) -> float:
    """PSNR of colours in [-1, 1], clipped to that: data range 2."""
    return psnr(target, torch.as_tensor(image).clamp(-1, 1), data_range=2.0)


def waves(n: int, size: int, prefix: str) -> Photos:
    """Make smooth colour waves, for want of faces."""
    rng = np.random.default_rng(len(prefix))
    axis = np.linspace(0, 3, size)
    images = [[np.sin(a * axis[:, None] + b * axis + c) for c in range(3)] for a, b in rng.uniform(-2, 2, (n, 2))]
    return Photos(to_pixels(torch.tensor(np.array(images))), tuple(f"{prefix}{k}.png" for k in range(n)))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fairface", type=Path, default=None, help="npz with a split: test faces are reported")
    parser.add_argument("--ffhq", type=Path, default=None, help="further test faces, never shown in pictures")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder of faces_*.safetensors")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--count", type=int, nargs="+", default=[64], help="faces of each set, or one a set")
    parser.add_argument("--validation", type=int, default=6, help="training faces to tune on")
    parser.add_argument("--tasks", nargs="*", default=["box", "super-resolution", "random", "tiles", "sensing"])
    parser.add_argument("--methods", nargs="*", default=list(ENTRIES), choices=list(ENTRIES), help="labels of rows")
    parser.add_argument("--noise", type=float, default=0.02, help="of values in [-1, 1]")
    parser.add_argument("--generate", type=int, default=400, help="faces drawn from each prior")
    parser.add_argument("--steps", type=int, default=100, help="of drawing")
    parser.add_argument("--inception", type=Path, default=None, help="Inception's weights, for FID and KID")
    parser.add_argument("--shown", type=int, default=6, help="faces in a picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what a reader of the page should know about this run")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="forget rows of an earlier run")
    parser.add_argument("--work", type=Path, default=Path("runs/faces"), help="restored and drawn faces")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "faces.json")
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    if options.quick:
        options.count, options.validation, options.generate, options.steps, options.shown = [3], 2, 8, 3, 2
    elif options.fairface is None:
        parser.error("give --fairface, or --quick")
    return options


def read_sets(options: argparse.Namespace) -> tuple[dict[str, Photos], Photos, Photos]:
    """Give the test faces by the name of their set, training faces to tune on, and faces to compare drawn ones with."""
    if options.quick:
        return {"FairFace": waves(3, options.size, "a")}, waves(2, options.size, "bb"), waves(12, options.size, "ccc")
    test = read_photos(options.fairface, size=options.size, split="test")
    train = read_photos(options.fairface, size=options.size, split="train")
    sets = {"FairFace": some(test, options.count[0])}
    if options.ffhq is not None:
        sets["FFHQ"] = some(read_photos(options.ffhq, size=options.size), options.count[-1])
    return sets, some(train, options.validation), test


def some(photos: Photos, n: int) -> Photos:
    """Give the first photographs."""
    return replace(photos, pixels=photos.pixels[:n], names=photos.names[:n])


def build(entry: Entry, changes: dict[str, Any], weights: Any) -> Any:
    """Make the method of an entry."""
    wanted = {**entry.options, **changes}
    if (preset := wanted.pop("preset", None)) is not None:
        return MSM.preset(preset, **wanted, prior=weights)
    holder = {} if weights is None else {"prior" if entry.method == "msm" else "weights": weights}
    return load_method(entry.method, **wanted, **holder)


def fingerprint(method: Any, weights: Path | None) -> str:
    """Tell settings and weights apart, so that rows of other ones are not taken for these."""
    values = {name: repr(getattr(method, name)) for name in getattr(method, "__dataclass_fields__", {})}
    values |= {"weights": sha256(weights) if weights else "", "prior": ""}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def quality(target: Tensor, image: Tensor) -> dict[str, float]:
    """Compare a face (3, y, x) in [-1, 1] with the true one."""
    row = {"psnr": colour_psnr(target, image), "ssim": ssim(target, image, data_range=2.0)}
    with contextlib.suppress(InputError):  # where its weights are
        row["lpips"] = float(lpips((target[None] + 1) / 2, (image[None] + 1) / 2))
    return row


def score(target: Tensor, result: Any, index: int) -> dict[str, Any]:
    """Measure one restored face (3, y, x)."""
    row: dict[str, Any] = quality(target, result.image[index].clamp(-1, 1))
    if result.std is not None:
        spread = float(result.std[index].square().mean().sqrt())
        row["error_per_std"] = float((result.image[index] - target).square().mean().sqrt()) / max(spread, 1e-30)
        row["psnr_one_sample"] = colour_psnr(target, result.samples[index, 0])
    return row | {"NFE": result.details.get("NFE", 0)}


def restore_group(method: Any, measurement: Measurement, seed: int) -> tuple[list[dict[str, Any]], Tensor]:
    """Restore some faces, each with noise of its own by its name."""
    rng = [Generator().manual_seed(slice_seed(name, seed)) for name in measurement.source]
    begun = time.perf_counter()
    result = method(replace(measurement, target=None), rng)
    seconds = (time.perf_counter() - begun) / len(rng)
    assert measurement.target is not None
    rows = [score(target, result, k) | {"seconds": seconds} for k, target in enumerate(measurement.target)]
    return rows, result.image


def ambient_draw(model: Any, rng: list[Generator], size: int, steps: int) -> Tensor:
    """Draw faces from an ambient prior, each seen through one further mask all the way. Aali et al. 2024."""
    matrix = (size, size)
    masks = torch.stack([model.further(model.law.draw(matrix, generator), generator) for generator in rng])
    start = torch.zeros(len(rng), 3, size, size)
    sigmas = karras(10.0, 0.01, steps)

    def estimate(step: Step) -> Tensor:
        with torch.inference_mode():
            return model(torch.where(masks, step.state, 0.0), masks, float(step.sigma), Identity())

    begin = float(sigmas[0]) * normal_like(start, rng)
    *_, last = reverse_diffusion(estimate, begin, sigmas, rng=rng, eta=ancestral(sigmas))
    return last.estimate


def draw_faces(which: str, path: Path, options: argparse.Namespace) -> Tensor:
    """Draw faces (n, 3, y, x) from a prior."""
    model: Any = load_prior(path)
    images = []
    for first in range(0, options.generate, 32):
        rng = generators(options.seed, min(32, options.generate - first), first=first)
        if which == "ambient":
            images.append(ambient_draw(model, rng, options.size, options.steps))
            continue
        law = {"law": RandomLines(1.0), "covering": False, "masks_per_step": 1}
        if which.startswith("msm"):
            law = {"law": model.law, "masks_per_step": 3}
        method = Generation(model, steps=options.steps, batch=32, sigma_max=40.0, **law)
        images.append(method(Identity(), (3, options.size, options.size), rng, dtype=torch.float32))
        print(f"{which}: {first + len(rng)} faces drawn", flush=True)
    return torch.cat(images).clamp(-1, 1)


def judge_drawn(options: argparse.Namespace, real: Photos, record: dict[str, Any]) -> dict[str, Tensor]:
    """Draw from every prior and tell how far that is from held-out faces; give the images."""
    brightness = (real.values(range(len(real))) + 1) / 2
    features, rng = scattering_features(brightness), Generator().manual_seed(options.seed)
    half = frechet_distance(features[::2], features[1::2], rng=rng)
    record["generation"] = {
        "one half of the real faces against the other": {"distance": half.value, "floor": half.floor}
    }
    record["generation_counts"] = {"real": len(real), "drawn": options.generate}
    record["generation_training"] = {}
    drawn = {}
    for which, file in DRAWN.items():
        path = options.weights / file
        if not path.exists():
            continue
        name = f"{path.stem}-{sha256(path)[:12]}-{options.generate}-{options.steps}-{options.seed}-{options.size}.pt"
        if (options.work / name).exists() and not options.fresh:
            images = torch.load(options.work / name, weights_only=True)
        else:
            images = draw_faces(which, path, options)
            with atomic(options.work / name) as part:
                torch.save(images, part)
        found = frechet_distance(features, scattering_features((images + 1) / 2), rng=rng)
        row: dict[str, Any] = {"distance": found.value, "floor": found.floor, "excess": found.excess}
        if options.inception is not None:
            row |= inception_distances(brightness, (images + 1) / 2, weights=options.inception)
        record["generation"][which] = row
        record["generation_training"][which] = {"training": effort(path), "weights": f"`{sha256(path)[:12]}`"}
        drawn[which] = images
        print(f"{which}: distance {found.value:.2f}, floor {found.floor:.2f}", flush=True)
    return drawn


def main() -> None:
    """Run, resume, and write the page and the pictures."""
    options = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    sets, validation, real = read_sets(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = options.out.with_suffix(".rows.json")
    done: dict[str, dict[str, Any]] = {}
    if kept.exists() and not options.fresh:
        done = json.loads(kept.read_text("utf-8"))["rows"]
    chosen: dict[str, tuple[Any, Path | None]] = {}
    missing = []
    for label in options.methods:
        entry = ENTRIES[label]
        path = options.weights / entry.weights if entry.weights else None
        if path is not None and not path.exists():
            missing.append(label)
            print(f"{label}: left out, no weights at {path.name}", flush=True)
            continue
        model = None if path is None else load_prior(path)
        chosen[label] = build(entry, QUICK.get(label, {}) if options.quick else {}, model), path
    record = {"environment": environment(), "seed": options.seed, "noise": options.noise, "left_out": missing}
    commit = record["environment"].get("commit")
    tuned: dict[str, Any] = {}

    def method_for(label: str, task: str) -> Any:
        """Tune on training faces for this task, once."""
        method, path = chosen[label]
        if not getattr(method, "tunable", {}) or ENTRIES[label].method in ("msm", "ddnm") or options.quick:
            return method  # MSM's settings are those of its presets; all tasks have the pseudo-inverse DDNM needs
        name = next(iter(method.tunable))
        key = f"{label} for {task}, noise {options.noise:g} | {len(validation)} | {fingerprint(method, path)}"
        if key not in done:
            cases = [find_task(task).degrade(validation, range(len(validation)), noise_std=options.noise, seed=1)]
            one = replace(method, samples=1) if hasattr(method, "samples") else method
            best, _ = tune(one, cases, metric=colour_psnr, refinements=0)
            done[key] = {"value": getattr(best, name)}
            write_manifest(kept, {"rows": done})
            print(f"{task}: {label} {name} {done[key]['value']:.3g}", flush=True)
        tuned[f"{label}, {name} for {task}"] = done[key]["value"]
        return replace(method, **{name: done[key]["value"]})

    rows, pictures = [], {}
    for task in options.tasks:
        for group, photos in sets.items():
            images: dict[str, Tensor] = {}
            for label in ["input", *chosen]:
                entry = ENTRIES.get(label)
                if entry is not None and entry.tasks is not None and task not in entry.tasks:
                    continue
                number = len(photos) if entry is None or entry.faces is None else min(len(photos), entry.faces)
                method = None if entry is None else method_for(label, task)
                state = "" if method is None else fingerprint(method, chosen[label][1])
                for first in range(0, number, TOGETHER):
                    index = range(first, min(first + TOGETHER, number))
                    about = (
                        f"{task} | {group} | {options.noise:g} | {options.seed} | {options.size} | {label} | {state}"
                    )
                    keys = [f"{about} | {photos.names[k]}" for k in index]
                    picture = options.work / f"{hashlib.sha256('|'.join(keys).encode()).hexdigest()[:16]}.pt"
                    wanted = group == "FairFace" and first < options.shown  # the others may not be shown
                    if all(key in done for key in keys) and (picture.exists() or not wanted):
                        rows.extend(done[key] for key in keys)
                    else:
                        one = find_task(task).degrade(photos, index, noise_std=options.noise, seed=options.seed)
                        if method is None:
                            found = plain_input(one).clamp(-1, 1)
                            assert one.target is not None
                            fresh = [quality(a, b) for a, b in zip(one.target, found, strict=True)]
                        else:
                            fresh, found = restore_group(method, one, options.seed)
                        for key, name, values in zip(keys, one.source, fresh, strict=True):
                            where = {"task": task, "set": group, "face": name, "method": label, "commit": commit}
                            done[key] = where | values
                            rows.append(done[key])
                        if wanted:
                            with atomic(picture) as part:
                                torch.save(found, part)
                        write_manifest(kept, {"rows": done})
                        mean = float(np.mean([values["psnr"] for values in fresh]))
                        print(f"{task}, {group}, {label}: {index.start} .. {index.stop - 1}, {mean:.2f} dB", flush=True)
                    if wanted:
                        images[label] = torch.cat(
                            [images.get(label, torch.empty(0)), torch.load(picture, weights_only=True)]
                        )
            if group == "FairFace":
                pictures[task] = images
    drawn = judge_drawn(options, real, record) if options.generate > 0 else {}
    used = {label: path for label, (_, path) in chosen.items() if path is not None}
    record |= {
        "tuned": tuned,
        "sets": {group: len(photos) for group, photos in sets.items()},
        "training": {label: effort(path) for label, path in used.items()},
        "weights_sha256": {label: sha256(path) for label, path in used.items()},
    }
    write_manifest(options.out, record | {"rows": rows})
    write_csv(options.out.with_suffix(".csv"), rows)
    figures = show(options, sets["FairFace"], pictures, drawn, real)
    text = page(record, rows, figures, options)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, "utf-8")


def effort(path: Path) -> str:
    """Tell from the header of weights how long they were trained."""
    _, header = load_checkpoint(path)
    stages = header.get("stages") or [header]
    steps = " + ".join(str(stage.get("step", "?")) for stage in stages)
    hours = [stage["cpu_hours"] for stage in stages if "cpu_hours" in stage]
    some = "" if len(hours) == len(stages) else " in the stages that tell"
    return f"{steps} steps" + (f", {sum(hours):.1f} CPU hours{some}" if hours else "")


def show(
    options: argparse.Namespace,
    photos: Photos,
    pictures: dict[str, dict[str, Tensor]],
    drawn: dict[str, Tensor],
    real: Photos,
) -> list[Path]:
    """Draw a panel a task, and drawn faces beside real ones."""
    folder = options.markdown.parent / "images" if options.markdown else options.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    shown = min(options.shown, len(photos))
    for task, images in pictures.items():
        truth = photos.values(range(shown))
        lines = [[truth[k], *(image[k] for image in images.values())] for k in range(shown)]
        made.append(folder / f"faces_{task}.png")
        photo_sheet(made[-1], lines, ["truth", *images])
    if drawn:
        across = min(8, options.generate, len(real))
        columns = {"real": real.values(range(across)), **drawn}
        rows = [list(images[:across]) for images in columns.values()]
        made.append(folder / "faces_drawn.png")
        photo_sheet(made[-1], rows, [", ".join(columns) + " (from above)", *[""] * (across - 1)])
    return made


def summarise(rows: list[dict[str, Any]], seed: int) -> str:
    """Average each method over the faces of a task and set, with intervals of MSM's lead over it on the same faces."""
    lines = []
    for task, group in dict.fromkeys((row["task"], row["set"]) for row in rows):
        part = [row for row in rows if (row["task"], row["set"]) == (task, group)]
        ours = {row["face"]: row for row in part if row["method"] == "msm"}
        for label in dict.fromkeys(row["method"] for row in part):
            own = [row for row in part if row["method"] == label]
            seen = ENTRIES[label].learned_from if label in ENTRIES else ""
            line: dict[str, Any] = {
                "task": task,
                "faces": f"{group} ({len(own)})",
                "method": label,
                "learned from": seen,
            }
            for name, digits in METRICS.items():
                found = [row[name] for row in own if row.get(name) is not None]
                if found or name != "lpips" or any("lpips" in row for row in rows):  # no column where nobody has it
                    line[name.replace("_", " ")] = f"{np.mean(found):.{digits}f}" if found else ""
            gain = [ours[row["face"]]["psnr"] - row["psnr"] for row in own if row["face"] in ours]
            line["msm minus it, dB"] = ""
            if gain and label != "msm":
                mean, low, high = bootstrap_interval(gain, Generator().manual_seed(seed))
                line["msm minus it, dB"] = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
            lines.append(line)
    return markdown_table(lines, list(lines[0])) if lines else ""


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Say for every task and set how MSM stands to the input and to the best that never saw a whole face."""
    said = []
    for task, group in dict.fromkeys((row["task"], row["set"]) for row in rows):
        part = [row for row in rows if (row["task"], row["set"]) == (task, group)]
        ours = {row["face"]: row["psnr"] for row in part if row["method"] == "msm"}
        if not ours:
            continue
        leads = {}
        for label in dict.fromkeys(row["method"] for row in part):
            own = [row for row in part if row["method"] == label and row["face"] in ours]
            leads[label] = float(np.mean([ours[row["face"]] - row["psnr"] for row in own]))
        text = f"{task}, {group}: MSM is {leads['input']:+.2f} dB against the input"
        others = {k for k, entry in ENTRIES.items() if entry.method != "msm" and entry.learned_from != CLEAN}
        rivals = {label: lead for label, lead in leads.items() if label in others}
        if rivals:
            best = min(rivals, key=lambda label: rivals[label])
            text += f" and {rivals[best]:+.2f} dB against {best}, the best other method that never saw a whole face"
        said.append(text + ".")
    return said


def page(record: dict[str, Any], rows: list[dict[str, Any]], figures: list[Path], options: argparse.Namespace) -> str:
    """Write the page of results."""
    root = options.markdown.parent if options.markdown else Path()
    shown = "\n\n".join(f"![{path.stem}]({os.path.relpath(path, root)})" for path in figures)
    training = [
        {"method": label, "training": text, "weights": f"`{record['weights_sha256'][label][:12]}`"}
        for label, text in record["training"].items()
    ]
    trained = markdown_table(training, list(training[0])) if training else "nothing"
    left_out = f"Left out for want of weights: {', '.join(record['left_out'])}.\n\n" if record["left_out"] else ""
    tuning = "".join(f"- {name}: {value:.3g}\n" for name, value in record["tuned"].items()) or "- nothing\n"
    amounts = "".join(f"- {task}: {find_task(task).amount:g}, {find_task(task).what}\n" for task in options.tasks)
    words = "\n".join(f"- {line}" for line in verdict(rows))
    text = (
        "# Faces\n\nWritten by `benchmarks/faces.py`; do not edit by hand. "
        f"Seed {options.seed}, `{json.dumps(record['environment'])}`.\n\n"
        f"Faces of {options.size} x {options.size} pixels.{' ' * bool(rows)}"
    )
    if rows:
        text += (
            f"{len(options.tasks)} task{'s' * (len(options.tasks) > 1)} with noise of {options.noise:g} (values in "
            "[-1, 1]), the same for all methods. PSNR of colours with data range 2, SSIM the mean over colours, both "
            "of the mean of the samples where a method draws several. Error / std: root mean square error over that "
            "of the predicted spread. NFE: network passes a sample. Intervals: 95 % bootstrap of paired differences "
            "over faces. A method that reports fewer faces is slow and was run on the first ones only.\n\n"
            f"{amounts}\n{options.note}\n\n{left_out}## In words\n\n{words}\n\n## Training\n\n{trained}\n\n"
            f"Chosen on {options.validation} training faces:\n\n{tuning}\n## Means\n\n"
            f"{summarise(rows, options.seed)}\n"
        )
    else:
        text += f"{' ' * bool(options.note)}{options.note}\n"
    if "generation" in record:
        counts = record["generation_counts"]
        lines = [{"faces": name, **values} for name, values in record["generation"].items()]
        learned = [{"drawn from": name, **values} for name, values in record["generation_training"].items()]
        columns = {name: "" if name == "faces" else ".2f" for line in lines for name in line}
        near = sorted(set(record["generation"]) & set(DRAWN), key=lambda name: record["generation"][name]["distance"])
        text += (
            f"\n## Drawn faces\n\nFrechet distance on scattering features (`msmri/distances.py`; lower is better) of "
            f"{counts['drawn']} drawn faces to {counts['real']} held-out ones; floor: what two such sets of one law "
            f"give on average, excess: what is above it. {options.steps} steps. Nearest first: {'; '.join(near)}. "
            f"Why in this order: `why_are_msm_faces_grainy.py`.\n\n{markdown_table(lines, columns)}\n"
            f"{markdown_table(learned, list(learned[0])) if learned else ''}"
        )
    return text + (
        "\n## Pictures\n\nThe faces shown are from FairFace (Karkkainen and Joo, WACV 2021; CC BY 4.0, reduced), or "
        f"drawn by priors trained on it.\n\n{shown}\n"
    )


if __name__ == "__main__":
    main()
