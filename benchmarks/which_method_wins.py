"""Compare every method on identical scans, masks and noise, at several accelerations, and say which wins, and where.

    python benchmarks/which_method_wins.py --simulated DIR --real SCAN ... --validation DIR --markdown docs/results.md

All scans are fully sampled and undersampled here. What a method has to be told (a weight, a step towards the data) is
tuned on the validation scans, never on those reported. Every finished row is kept beside the result, and the same
command goes on where it was stopped; without what was kept, from the published result. A learned method without
weights is left out, and the page says so.
The simulated scans of docs/results.md are the demo scan and, by recipes/simulate_brains.py VOLUMES OUT --full, those of
--split test --subjects 3 --slices 4, its validation scans those of --split validation --subjects 4 --slices 4; the
scans of docs/results_many_scans.md those of --split validation --slices 1, with --subjects 14 --seed 5 and with
--first 100 --subjects 6 --coils 16 --seed 16.
--jobs N works on N methods at once, each in a process of its own: give it the number of processors.
--quick is a small version for continuous integration: it uses the demo scan and needs no other data.
Writes results/which_method_wins.{json,csv}, figures, and with --markdown a page.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from msmri.allocation import keep_freed_memory
from msmri.distances import lpips
from msmri.errors import InputError
from msmri.io.fastmri import list_scans
from msmri.io.output import atomic, environment, sha256, write_manifest
from msmri.measurement import Measurement
from msmri.methods import load_method
from msmri.methods.tuning import tune
from msmri.metrics import bootstrap_interval, nmse, object_region, psnr, ssim
from msmri.model.ambient import FurtherLines
from msmri.model.checkpoint import load_checkpoint
from msmri.physics.masks import RandomLines
from msmri.physics.operators import CoilFourier, Subsample
from msmri.preparation import Preparation, measurements
from msmri.report import comparison_figure, line_plot, markdown_table, write_csv
from msmri.tensors import generators, normal_like

HERE = Path(__file__).parent
SHIPPED = Path(str(files("msmri"))) / "weights"
NOTHING, KSPACE, CLEAN, ITSELF = "nothing", "R = 4 k-space", "clean images", "the scan itself"
EVERYTHING = "nothing, but sees all lines"


@dataclass(frozen=True)
class Entry:
    """One row of the comparison."""

    method: str  # as in msmri.methods
    learned_from: str  # what its weights have seen
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None  # file name in msmri/weights
    option: str = "weights"  # the field that takes the weights
    scans: int | None = None  # at most so many of each group: slow methods
    accelerations: tuple[float, ...] | None = None  # only these: slow methods
    elsewhere: int = 0  # at most so many scans of each group at the other accelerations
    largest: int | None = None  # only matrices up to this in either direction: very slow methods
    whole: bool = False  # is shown the scan before it was undersampled


ADPS, ORACLE = "adps_r4.safetensors", "oracle.safetensors"
SLOW: dict[str, Any] = {"scans": 4, "accelerations": (4.0,), "elsewhere": 2}  # half a minute a slice
SLOWER: dict[str, Any] = {"scans": 2, "accelerations": (4.0,), "elsewhere": 1}
# about the time of training that its rivals had, on the same scans: what is left of MSM's lead
SHORT = "msm, shortly trained"
# from where the levels of training end, P~ the mask of the scan but for a line or two: as the weights tell, see ADPS
AMBIENT = {"samples": 2, "steps": 60}
# with P~ drawn by the law of training, from the largest noise on
PUBLISHED = {**AMBIENT, "sigma_max": 10.0, "prior_mask": "law", "further": FurtherLines(4.0)}
CEILING = "all lines measured"  # a perfect reconstruction: what maps and noise leave between it and the reference
ENTRIES: dict[str, Entry] = {
    CEILING: Entry("zero-filled", EVERYTHING, whole=True),
    "zero-filled": Entry("zero-filled", NOTHING),
    "cg-sense": Entry("cg-sense", NOTHING),
    "l1-wavelet": Entry("l1-wavelet", NOTHING),
    "tv": Entry("tv", NOTHING),
    "zs-ssdu": Entry("zs-ssdu", ITSELF, {"epochs": 20}, scans=1, accelerations=(4.0,), largest=160),
    "a-os": Entry("a-os", KSPACE, weights=ADPS),
    "a-ald": Entry("a-ald", KSPACE, AMBIENT, ADPS, **SLOW),
    "a-dps": Entry("a-dps", KSPACE, AMBIENT, ADPS, scans=4, accelerations=(4.0, 6.0), elsewhere=2),
    "a-dps, published sampler": Entry("a-dps", KSPACE, PUBLISHED, ADPS, **SLOWER),
    "ssdu": Entry("ssdu", KSPACE, weights="ssdu_r4.safetensors"),
    "ssdu, multi-mask": Entry("ssdu", KSPACE, weights="ssdu_multi_r4.safetensors"),
    "ssdu, columns": Entry("ssdu", KSPACE, weights="ssdu_columns_r4.safetensors"),
    "ssdu, columns, shortly trained": Entry("ssdu", KSPACE, weights="ssdu_columns_r4_short.safetensors"),
    "msm, paper's sampler": Entry(
        "msm",
        KSPACE,
        {"preset": "paper", "steps": 50, "samples": 2},
        "brain_r4.safetensors",
        option="prior",
        **SLOWER,
    ),
    SHORT: Entry("msm", KSPACE, weights="brain_r4_short.safetensors", option="prior", accelerations=(4.0, 6.0)),
    "msm": Entry("msm", KSPACE, weights="brain_r4.safetensors", option="prior"),
    "supervised twin of ssdu": Entry("ssdu", CLEAN, weights="supervised_r4.safetensors"),
    "oracle ddnm": Entry("ddnm", CLEAN, {"samples": 2, "sigma_max": 3.0}, ORACLE, **SLOW),
    "oracle diffpir": Entry("diffpir", CLEAN, {"samples": 2, "sigma_max": 3.0}, ORACLE, **SLOWER),
    "oracle dps": Entry("dps", CLEAN, {"samples": 2, "steps": 60, "sigma_max": 3.0}, ORACLE, **SLOW),
}
QUICK: dict[str, dict[str, Any]] = {
    "zs-ssdu": {"epochs": 1, "splits": 2},
    "a-ald": {"samples": 1, "steps": 3},
    "a-dps": {"samples": 1, "steps": 3},
    "msm, paper's sampler": {"preset": "paper", "steps": 3, "samples": 1},
    "msm": {"samples": 2, "steps": 2},
    "a-dps, published sampler": {"samples": 1, "steps": 3},
    "oracle ddnm": {"steps": 3},
    "oracle diffpir": {"steps": 3},
    "oracle dps": {"steps": 3},
}
METRICS = {"psnr": 2, "ssim": 4, "nmse": 4, "object_psnr": 2, "object_ssim": 4, "psnr_one_sample": 2}
METRICS |= {"lpips": 4, "error_per_std": 1, "NFE": 0, "seconds": 1, "peak_MiB": 0}
PANEL = ("zero-filled", "tv", "ssdu, columns", "ssdu", "a-dps", "msm", "oracle ddnm")


class Peak:
    """Peak growth of this process's resident memory during a block, in MiB, looked at every 10 ms (Linux)."""

    def __enter__(self) -> "Peak":
        """Start looking."""
        self.base = self.highest = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            self.highest = max(self.highest, self._now())

    @staticmethod
    def _now() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    @property
    def growth(self) -> float:
        """Give what was needed on top of what was held before."""
        return self.highest - self.base


def paper_view(measurement: Measurement, full: Tensor, seed: int) -> Measurement:
    """Make a measurement by the conventions of Park et al. 2025: images between 0 and 1, noise of 0.01 added.

    The coil-combined image of the full k-space, its magnitude scaled to [0, 1] by its own minimum and maximum with the
    phase kept, is measured again through the maps; the target is that magnitude. Such scaling and such a target are
    not to be had from undersampled data: the rows are for reading beside the published ones, and for nothing else.
    """
    assert isinstance(measurement.encoding, CoilFourier)
    image = measurement.encoding.adjoint(full)
    magnitude = image.abs()
    low, high = magnitude.amin(), magnitude.amax()
    image = torch.sgn(image) * (magnitude - low) / (high - low)
    clean = measurement.encoding(image)
    noisy = clean + 0.01 * normal_like(clean, [Generator().manual_seed(seed)])
    values = Subsample(measurement.mask)(noisy)
    return replace(measurement, values=values, target=image.abs()[:, 0], noise_std=torch.full((1, 1, 1, 1), 0.01))


def prepared(
    path: Path, options: argparse.Namespace, view: str, acceleration: float, size: int | None, slices: list[int]
) -> list[tuple[Measurement, Measurement]]:
    """Undersample slices of a fully sampled scan, in one of the two conventions; beside each all of it."""
    setup = Preparation(law=RandomLines(acceleration), seed=options.seed, crop_to=size)
    pairs = []
    full = measurements(path, replace(setup, law=RandomLines(1.0)), slices)
    for one, whole in zip(measurements(path, setup, slices), full, strict=True):
        everything = replace(one, values=whole.values, mask=whole.mask)
        if view == "paper":
            one, everything = (paper_view(each, whole.values, options.seed) for each in (one, everything))
        pairs.append((one, everything))
    return pairs


def cases(options: argparse.Namespace, group: str, view: str) -> Iterator[tuple[str, float, Measurement, Measurement]]:
    """Yield (label, nominal R, measurement, the same fully sampled) of a group of scans."""
    sizes = [size or None for size in options.sizes] if group == "real" else [options.crop_to]
    scans = list_scans(getattr(options, group)) if getattr(options, group) else []
    for acceleration in options.accelerations:
        for path in scans:
            for size in sizes:
                slices = options.slices if group != "real" else [0]
                for one, whole in prepared(path, options, view, acceleration, size, slices):
                    yield one.source[0] + (f" at {size}" if size else ""), acceleration, one, whole


def score(method: Any, measurement: Measurement, seed: int, *, rescaled: bool = False) -> tuple[dict[str, Any], Tensor]:
    """Reconstruct one slice and measure all there is to measure; ``rescaled`` to [0, 1] first, as its target is."""
    blind = replace(measurement, target=None)
    with Peak() as peak:
        begun = time.perf_counter()
        result = method(blind, generators(seed, 1))
        seconds = time.perf_counter() - begun
    assert measurement.target is not None
    target, plain = measurement.target[0].numpy(), result.magnitude[0].numpy()
    image = (plain - plain.min()) / max(float(plain.max() - plain.min()), 1e-30) if rescaled else plain
    inside = object_region(target)
    row: dict[str, Any] = {
        "psnr": psnr(target, image),
        "ssim": ssim(target, image),
        "nmse": nmse(target, image),
        "object_psnr": psnr(target, image, where=inside),
        "object_ssim": ssim(target, image, where=inside),
        "seconds": seconds,
        "peak_MiB": peak.growth,
        "NFE": result.details.get("NFE", 0),
    }
    with contextlib.suppress(InputError):  # where its weights are
        row["lpips"] = float(lpips(measurement.target[:1], result.magnitude[:1]))
    if result.std is not None:
        spread = float(result.std.square().mean().sqrt())
        row["error_per_std"] = float(np.sqrt(np.mean((plain - target) ** 2))) / max(spread, 1e-30)
        single = result.samples[0, 0].abs().numpy()
        single = (single - single.min()) / max(float(single.max() - single.min()), 1e-30) if rescaled else single
        row["psnr_one_sample"] = psnr(target, single)
    return row, result.magnitude[0]


def weights_of(entry: Entry, label: str, given: dict[str, str]) -> Path | None:
    """Find the weights of an entry: those given, or those in msmri/weights; None if it needs none."""
    return Path(given[label]) if label in given else (SHIPPED / entry.weights if entry.weights else None)


def build(entry: Entry, changes: dict[str, Any], weights: Path | None) -> Any:
    """Make the method of an entry."""
    wanted = {**entry.options, **changes, **({entry.option: str(weights)} if weights else {})}
    if (preset := wanted.pop("preset", None)) is not None:
        from msmri.methods.msm import MSM

        return MSM.preset(preset, **wanted)
    return load_method(entry.method, **wanted)


def effort(path: Path) -> str:
    """Tell from the header of weights how long they were trained."""
    _, header = load_checkpoint(path)
    stages = header.get("stages") or [header]
    steps = " + ".join(str(stage.get("step", "?")) for stage in stages)
    hours = [stage["cpu_hours"] for stage in stages if "cpu_hours" in stage]
    some = "" if len(hours) == len(stages) else " in the stages that tell"
    return f"{steps} steps" + (f", {sum(hours):.1f} CPU hours{some}" if hours else "")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", nargs="*", default=[])
    parser.add_argument("--simulated", nargs="*", default=[])
    parser.add_argument("--validation", nargs="*", default=[], help="fully sampled scans, only to tune on")
    parser.add_argument("--accelerations", nargs="*", type=float, default=[2.0, 4.0, 6.0, 8.0])
    parser.add_argument("--methods", nargs="*", default=list(ENTRIES), choices=list(ENTRIES), help="labels of rows")
    parser.add_argument("--weights", nargs="*", default=[], metavar="LABEL=FILE", help="instead of those shipped")
    parser.add_argument("--sizes", nargs="*", type=int, default=[0, 128], help="of real scans; 0: the full matrix")
    parser.add_argument("--crop-to", type=int, default=None, help="of simulated scans")
    parser.add_argument("--slices", nargs="*", type=int, default=[1], help="of simulated and validation scans")
    parser.add_argument("--views", nargs="*", default=["file units", "paper"])
    parser.add_argument("--refinements", type=int, default=3, help="evaluations after the grid when tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what a reader of the page should know about this run")
    parser.add_argument("--jobs", type=int, default=1, help="methods at once, each in a process of its own")
    parser.add_argument("--rows-only", action="store_true", help="leave figures and page to a run of all methods")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="forget rows of an earlier run, but not what was tuned")
    parser.add_argument("--tune-again", action="store_true", help="forget what was tuned")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "which_method_wins.json")
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    if options.quick:
        demo = str(files("msmri") / "data" / "demo_brain.h5")
        options.simulated, options.validation, options.real = [demo], [demo], []
        options.accelerations, options.crop_to, options.refinements, options.slices = [4.0], 64, 0, [1]
    return options


def known_rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Read rows and tuned values, by key, that are kept from an earlier run or are in the published result."""
    kept = options.out.with_suffix(".rows.json")
    if (source := next((path for path in (kept, options.out) if path.exists()), None)) is None:
        return {}
    earlier = json.loads(source.read_text())
    if source != kept:
        earlier["rows"] = dict(zip(earlier.get("keys", []), earlier["rows"])) | earlier.get("tuned_by_key", {})
    forgotten = {True: options.tune_again, False: options.fresh}  # by whether it is a tuned value
    return {key: value for key, value in earlier["rows"].items() if not forgotten["field" in value]}


def share_out(options: argparse.Namespace, done: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """Let processes compute the rows of a method each, ``options.jobs`` at a time, and take their rows into ``done``.

    Each keeps what is finished in files of its own, which a later run goes on from. Returns how much was computed,
    and the threads of a process.

    Raises
    ------
    SystemExit
        If a process failed; the rows of the others are kept.
    """
    kept = options.out.with_suffix(".rows.json")
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    surroundings = {"OMP_NUM_THREADS": str(threads), **os.environ}
    computed = {"rows": 0, "tuned": 0, "minutes of tuning": 0.0}
    waiting, failed = list(options.methods), []
    running: dict[subprocess.Popen[bytes], tuple[str, Path]] = {}
    # the slowest first, so that no processor waits for the last one
    waiting.sort(key=lambda label: ENTRIES[label].accelerations is None and not label.startswith("msm"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the others end with this one
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                label = waiting.pop(0)
                name = hashlib.sha256(label.encode()).hexdigest()[:8]
                out = options.out.with_name(f"{options.out.stem}.part_{name}.json")
                part = out.with_suffix(".rows.json")
                if options.fresh or options.tune_again or not part.exists():  # else of a run that was cut off
                    write_manifest(part, {"rows": done})
                for picture in kept.parent.glob(f"{kept.stem}.*.npy") if label in PANEL else ():
                    shutil.copy(picture, picture.with_name(picture.name.replace(kept.stem, part.stem)))
                forgetting = ("--fresh", "--tune-again")  # was done here, once
                own = [word for word in sys.argv[1:] if word not in forgetting]
                own += ["--methods", label, "--jobs", "1", "--rows-only", "--out", str(out)]
                process = subprocess.Popen([sys.executable, __file__, *own], env=surroundings)
                running[process] = (label, out)
            time.sleep(0.2)
            for process in [one for one in running if one.poll() is not None]:
                label, out = running.pop(process)
                part = out.with_suffix(".rows.json")
                done |= json.loads(part.read_text())["rows"]
                write_manifest(kept, {"rows": done})
                if process.returncode:
                    failed.append(label)
                    continue
                told = json.loads(out.read_text())["this_run"]
                computed = {name: computed[name] + told[name] for name in computed}
                for picture in out.parent.glob(f"{part.stem}.*.npy"):
                    picture.replace(picture.with_name(picture.name.replace(part.stem, kept.stem)))
                out.unlink()
                part.unlink()
    finally:
        for process in running:
            process.terminate()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; what the others computed is kept for the next run")
    return computed, threads


def main() -> None:
    """Run, resume, and write the figures."""
    keep_freed_memory()
    options = parse()
    given = dict(pair.split("=", 1) for pair in options.weights)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = options.out.with_suffix(".rows.json")
    done = known_rows(options)
    begun, computed = time.perf_counter(), {"rows": 0, "tuned": 0, "minutes of tuning": 0.0}
    threads, shared = torch.get_num_threads(), {}
    if options.jobs > 1:
        shared, threads = share_out(options, done)
    chosen: dict[str, tuple[Any, Path | None]] = {}
    missing = []
    for label in options.methods:
        path = weights_of(ENTRIES[label], label, given)
        if path is not None and not path.exists():
            missing.append(label)
            print(f"{label}: left out, no weights at {path.name}", flush=True)
            continue
        chosen[label] = build(ENTRIES[label], QUICK.get(label, {}) if options.quick else {}, path), path
    record = {"environment": environment(), "seed": options.seed, "left_out": missing}
    commit = record["environment"].get("commit")  # of the code that computes a row, which may be kept for later runs
    tuned: dict[str, Any] = {}
    pictures: dict[str, tuple[Measurement, dict[str, Tensor]]] = {}
    validation: dict[str, list[Measurement]] = {}

    scans = [] if options.quick else list_scans(options.validation)
    told = [[p.name, p.stat().st_size] for p in scans], options.slices[:1], options.crop_to, options.refinements
    tuned_on = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]  # values tuned on other scans are others

    def method_for(label: str, view: str, acceleration: float) -> Any:
        """Tune on the validation scans at this acceleration, once; in the paper's conventions at R = 4 for all."""
        method, path = chosen[label]
        ours = label.startswith("msm")
        if not getattr(method, "tunable", {}) or options.quick or (ours and view != "paper"):
            return method  # MSM's settings are its defaults, chosen by which_sampling_choice_pays.py
        name = next(iter(method.tunable))
        at = f"R = {acceleration:g}" if view != "paper" else "R = 4 in the paper's conventions"
        slow = ours or ENTRIES[label].accelerations is not None
        if slow and view != "paper":
            acceleration, at = 4.0, "R = 4"  # a minute a slice and step
        key = f"{label} at {at} | {fingerprint(method, path)} | {tuned_on}"
        if key not in done:
            started = time.perf_counter()
            if at not in validation:
                setup = (options, view, acceleration if view != "paper" else 4.0, options.crop_to, options.slices[:1])
                validation[at] = [one for p in scans for one, _ in prepared(p, *setup)]
            best, _ = tune(
                replace(method, samples=1) if slow else method,
                validation[at][:2] if slow and not ours else validation[at],
                refinements=0 if slow else options.refinements,
            )
            done[key] = {"field": name, "value": getattr(best, name)}
            computed["tuned"] += 1
            computed["minutes of tuning"] += (time.perf_counter() - started) / 60
            write_manifest(kept, {"rows": done})
            print(f"{at}: {label} {name} {done[key]['value']:.3g}", flush=True)
        tuned[f"{label}, {name} at {at}"] = done[key]["value"]
        return replace(method, **{name: done[key]["value"]})

    rows: list[dict[str, Any]] = []
    keys: list[str] = []  # what the rows depend on, by which a later run knows them
    for view in options.views:
        for group in ("real", "simulated") if view != "paper" else ("simulated",):
            counts: dict[tuple[str, float], int] = {}
            for scan, acceleration, one, whole in cases(options, group, view):
                for label in chosen:
                    entry = ENTRIES[label]
                    if entry.largest is not None and max(one.mask.shape[-1], one.values.shape[-2]) > entry.largest:
                        continue
                    number = counts[label, acceleration] = counts.get((label, acceleration), 0) + 1
                    chief = entry.accelerations is None or acceleration in entry.accelerations
                    most = (entry.scans or number) if chief else entry.elsewhere
                    if number > most or (view == "paper" and entry.accelerations):
                        continue
                    method = method_for(label, view, acceleration)
                    state = fingerprint(method, chosen[label][1])
                    how = "paper, rescaled" if view == "paper" else view
                    key = f"{how} | {group} | {scan} | {acceleration:g} | {label} | {state}"
                    wanted = view != "paper" and group == "simulated" and label in PANEL  # real scans have owners
                    panel = wanted and acceleration == 4.0 and number == 1
                    picture = kept.with_suffix(f".{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy")
                    if key not in done or (panel and not picture.exists()):
                        shown = whole if entry.whole else one
                        values, image = score(method, shown, options.seed, rescaled=view == "paper")
                        about = {"view": view, "group": group, "scan": scan, "nominal_R": acceleration}
                        about |= {"true_R": float(one.acceleration[0]), "method": label, "commit": commit}
                        done[key] = about | values
                        computed["rows"] += 1
                        if panel:
                            with atomic(picture) as part, part.open("wb") as file:
                                np.save(file, image.numpy())
                        write_manifest(kept, {"rows": done})
                        told = f"{label} {values['psnr']:.2f} dB, {values['seconds']:.1f} s"
                        print(f"{view}, {scan}, R {acceleration:g}: {told}", flush=True)
                    rows.append(done[key])
                    keys.append(key)
                    if panel:
                        pictures.setdefault(group, (one, {}))[1][label] = torch.from_numpy(np.load(picture))
    computed = {name: value + shared.get(name, 0) for name, value in computed.items()}
    minutes = (time.perf_counter() - begun) / 60
    run = {**computed, "minutes": minutes, "threads": threads, "processes": options.jobs, "of_rows": len(rows)}
    if options.rows_only:
        write_manifest(options.out, {"this_run": run})
        return
    effort_of = {label: effort(path) for label, (_, path) in chosen.items() if path is not None}
    sums = {label: sha256(path) for label, (_, path) in chosen.items() if path is not None}
    record |= {"tuned": tuned, "weights_sha256": sums, "training": effort_of}
    record["this_run"] = run
    values = {key: value for key, value in done.items() if "field" in value}
    write_manifest(options.out, record | {"rows": rows, "keys": keys, "tuned_by_key": values})
    write_csv(options.out.with_suffix(".csv"), rows)
    figures = draw(options.out, rows, pictures)
    text = page(record, rows, figures, options)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


def fingerprint(method: Any, weights: Path | None) -> str:
    """Tell settings and weights apart, so that rows of other ones are not taken for these."""
    values = {name: repr(getattr(method, name)) for name in getattr(method, "__dataclass_fields__", {})}
    values |= {"weights": sha256(weights) if weights else "", "prior": ""}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def lead(rows: list[dict[str, Any]], method: str, rival: str, seed: int, name: str = "psnr") -> str:
    """Tell the mean of a method's PSNR or another metric less a rival's over the scans both have, with its interval.

    "" without any.

    Images of one scan, at two sizes or several slices, are no scans of their own: their mean is drawn as one.
    """
    ours = {row["scan"]: row[name] for row in rows if row["method"] == method}
    gain: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] == rival and row["scan"] in ours:
            gain.setdefault(row["scan"].split("#")[0], []).append(ours[row["scan"]] - row[name])
    if not gain:
        return ""
    mean, low, high = bootstrap_interval([float(np.mean(own)) for own in gain.values()], Generator().manual_seed(seed))
    return f"{mean:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if len(gain) > 1 else "")


def count(rows: list[dict[str, Any]]) -> str:
    """Tell how many scans rows are of, and how many images where these are more."""
    scans = len({row["scan"].split("#")[0] for row in rows})
    return f"{scans}" if scans == len(rows) else f"{scans}, {len(rows)} images"


def summarise(rows: list[dict[str, Any]], view: str, seed: int) -> str:
    """Average each method over the scans of a group and acceleration, with intervals of MSM's lead over it."""
    lines = []
    rows = [row for row in rows if row["view"] == view]
    for group, acceleration in sorted({(row["group"], row["nominal_R"]) for row in rows}):
        part = [row for row in rows if (row["group"], row["nominal_R"]) == (group, acceleration)]
        for label in dict.fromkeys(row["method"] for row in part):
            own = [row for row in part if row["method"] == label]
            true = np.mean([row["true_R"] for row in own])
            line = {"scans": f"{group} ({count(own)})", "R (true)": f"{acceleration:g} ({true:.2f})"}
            line |= {"method": label, "learned from": ENTRIES[label].learned_from}
            for name, digits in METRICS.items():
                found = [row[name] for row in own if name in row]
                if found or name != "lpips":  # no column where nobody has it
                    line[name.replace("_", " ")] = f"{np.mean(found):.{digits}f}" if found else ""
            line["msm minus it, dB"] = lead(part, "msm", label, seed) if label != "msm" else ""
            line["within the object, dB"] = lead(part, "msm", label, seed, "object_psnr") if label != "msm" else ""
            lines.append(line)
    return markdown_table(lines, list(lines[0])) if lines else ""


def every_slice(rows: list[dict[str, Any]]) -> str:
    """Give the PSNR of every slice by every method."""
    lines: dict[tuple[str, float], dict[str, Any]] = {}
    labels = list(dict.fromkeys(row["method"] for row in rows))
    for row in rows:
        key = row["scan"], row["nominal_R"]
        first = {"scan": row["scan"], "R (true)": f"{row['nominal_R']:g} ({row['true_R']:.2f})"}
        line = lines.setdefault(key, first | dict.fromkeys(labels, ""))
        line[row["method"]] = f"{row['psnr']:.2f}"
    return markdown_table(list(lines.values()), ["scan", "R (true)", *labels])


def verdict(rows: list[dict[str, Any]], view: str = "file units") -> list[str]:
    """Say who wins among the methods that never saw clean data, and where MSM loses."""
    said = []
    best = [row for row in rows if row["view"] == view and row["method"] == CEILING]
    others = (CLEAN, EVERYTHING)
    rows = [row for row in rows if row["view"] == view and ENTRIES[row["method"]].learned_from not in others]
    for group, acceleration in sorted({(row["group"], row["nominal_R"]) for row in rows}):
        part = [row for row in rows if (row["group"], row["nominal_R"]) == (group, acceleration)]
        scans = {row["scan"] for row in part}
        means = {}
        for label in dict.fromkeys(row["method"] for row in part):
            own = [row["psnr"] for row in part if row["method"] == label]
            if len(own) == len(scans):  # slow methods that saw fewer scans are compared in the table only
                means[label] = float(np.mean(own))
        order = sorted(means, key=lambda label: -means[label])
        text = f"{group}, R = {acceleration:g}: **{order[0]}** is first with {means[order[0]]:.2f} dB"
        if len(order) > 1:
            text += f", {means[order[0]] - means[order[1]]:.2f} dB above {order[1]}"
        if "msm" in means and order[0] != "msm":
            text += f"; MSM loses to it by {means[order[0]] - means['msm']:.2f} dB"
        most = [row["psnr"] for row in best if (row["group"], row["nominal_R"]) == (group, acceleration)]
        text += f". All lines measured, combined by the same maps: {np.mean(most):.2f} dB" if most else ""
        said.append(text + ".")
    return said


def with_no_more_training(rows: list[dict[str, Any]], seed: int) -> list[str]:
    """Compare MSM after a short training with the rivals that learned from the same k-space."""
    said = []
    rows = [row for row in rows if row["view"] == "file units"]
    for group, acceleration in sorted({(row["group"], row["nominal_R"]) for row in rows if row["method"] == SHORT}):
        part = [row for row in rows if (row["group"], row["nominal_R"]) == (group, acceleration)]
        labels = dict.fromkeys(row["method"] for row in part)
        rivals = [name for name in labels if ENTRIES[name].learned_from == KSPACE and not name.startswith("msm")]
        leads = [f"{name} {lead(part, SHORT, name, seed)}" for name in rivals]
        said.append(f"{group}, R = {acceleration:g}: {'; '.join(leads)}")
    return said


def draw(
    out: Path, rows: list[dict[str, Any]], pictures: dict[str, tuple[Measurement, dict[str, Tensor]]]
) -> list[Path]:
    """Draw quality against acceleration, quality against time, and panels of images."""
    made = []
    rows = [row for row in rows if row["view"] == "file units" and row["method"] != CEILING]
    for group in dict.fromkeys(row["group"] for row in rows):
        part = [row for row in rows if row["group"] == group]
        scans = len({row["scan"] for row in part})
        series: dict[str, list[tuple[float, ...]]] = {}
        speed: dict[str, list[tuple[float, ...]]] = {}
        for label in dict.fromkeys(row["method"] for row in part):
            own = [row for row in part if row["method"] == label]
            for acceleration in sorted({row["nominal_R"] for row in own}):
                here = [row for row in own if row["nominal_R"] == acceleration]
                if len(here) < scans:  # means over other scans are no points of the same curve
                    continue
                series.setdefault(label, []).append((acceleration, float(np.mean([row["psnr"] for row in here]))))
                if acceleration == 4.0:
                    seconds = max(float(np.mean([row["seconds"] for row in here])), 1e-3)
                    speed[label] = [(seconds, float(np.mean([row["psnr"] for row in here])))]
        charts = {"R": (series, "nominal acceleration R"), "seconds": (speed, "seconds a slice, R = 4")}
        for name, (lines, x_label) in charts.items():
            if lines:
                path, title = out.with_name(f"{out.stem}_{group}_against_{name}.png"), f"{group} scans"
                line_plot(path, lines, x_label=x_label, y_label="PSNR, dB", title=title, log_x=name == "seconds")
                made.append(path)
    for group, (one, images) in pictures.items():
        path = out.with_name(f"{out.stem}_{group}_images.png")
        target = one.target[0]  # type: ignore[index]
        scores = {name: {"psnr": psnr(target, image), "ssim": ssim(target, image)} for name, image in images.items()}
        title = f"{one.source[0]}, nominal R = 4 (true {float(one.acceleration[0]):.2f})"
        spec = {"target": target, "mask": one.mask[0, 0], "metrics": scores, "title": title}
        comparison_figure(path, images=images, **spec)
        made.append(path)
    return made


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
    verdicts = "\n".join(f"- {line}" for line in verdict(rows))
    if short := with_no_more_training(rows, options.seed):
        verdicts += f"\n\n*{SHORT}* minus rivals that learned from the same k-space (hours of each below), dB:\n\n"
        verdicts += "\n".join(f"- {line}" for line in short)
    run = record["this_run"]
    ran = f"{run['rows']} of {run['of_rows']} rows were computed in this run, in {run['minutes']:.0f} minutes with "
    processes = f"{run['processes']} processes of " if run["processes"] > 1 else ""
    ran += f"{processes}{run['threads']} thread{'s' * (run['threads'] > 1)}; {run['tuned']} values were tuned in "
    ran += f"{run['minutes of tuning']:.0f} minutes{' of one process' * bool(processes)}; the rest was kept."
    text = (
        "# Which method wins?\n\nWritten by `benchmarks/which_method_wins.py`; do not edit by hand. "
        f"Seed {options.seed}, `{json.dumps(record['environment'])}`.\n\n"
        "Every method sees the same undersampled scans, with the same masks and the same coil maps. Magnitude against "
        "the root-sum-of-squares of the fully sampled scan, in file units. *Object* metrics leave out the background, "
        "where such a target is noise. Weights and steps towards the data are tuned on validation scans. Intervals: "
        "95 % bootstrap of the paired differences over scans; the images of a scan, at two sizes, count as one. NFE: "
        "network passes a sample. Error / std: root mean square error over the root mean square of the predicted "
        "spread. Peak MiB: growth of the process while it ran. A method that reports fewer scans is slow and was run "
        "on the first ones only, with what was tuned at R = 4. "
        f"*{CEILING[0].upper()}{CEILING[1:]}* is the fully sampled scan combined by the same maps: what its PSNR lacks "
        "no reconstruction can be blamed for, being noise in the background of the reference and errors of maps.\n\n"
        f"{ran} {options.note}\n\n{left_out}## In words\n\n{verdicts}\n\n## Training\n\n{trained}\n\n## Means\n\n"
        f"{summarise(rows, 'file units', options.seed)}\n\n## PSNR of every slice, dB\n\n"
        f"{every_slice([row for row in rows if row['view'] == 'file units'])}\n"
    )
    if any(row["view"] == "paper" for row in rows):
        text += (
            "\n## In the conventions of the MSM paper\n\nSimulated people; images scaled to [0, 1] by their own "
            "minimum and maximum, Gaussian noise of 0.01 added, the target the clean magnitude; every reconstruction "
            "is scaled in the same way before it is measured, as theirs are. To be read beside the published rows, not "
            "to be compared with the table above. Weights, MSM's pull of the data among them, are tuned on validation "
            "scans in the same conventions, at R = 4 for all.\n\n"
            + "\n".join(f"- {line}" for line in verdict(rows, "paper"))
            + f"\n\n{summarise(rows, 'paper', options.seed)}\n"
        )
    return text + f"\n## Figures\n\n{shown}\n"


if __name__ == "__main__":
    main()
