"""Ask what noise costs: in training, in the data, when the sampler is told a wrong noise level, and without a phase.

    python benchmarks/what_does_noise_cost.py TEST_SCANS --validation SCANS --prior "noiseless=FILE" \
        --prior "noiseless, as short=FILE" --prior "noisy=FILE" --markdown docs/results_noise.md

Fully sampled simulated scans get white noise of known size and are undersampled here; the reference is the
root-sum-of-squares image before that. Classical methods have weights tuned on validation scans of the same noise. Which
priors learned from noisy measurements is read from their weights. A second part takes magnitude images for scans of one
coil: with Rician noise, as those do who have magnitudes only, against complex Gaussian noise of the same size. Finished
rows are kept beside the result, and the same command goes on where it was stopped. --quick is a small version.
Writes results/what_does_noise_cost.json, figures beside it and with --markdown a page.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from which_method_wins import effort, score

from msmri.io.fastmri import list_scans, open_scan
from msmri.io.output import atomic, environment, fingerprint, sha256, write_manifest
from msmri.measurement import Measurement, Reconstruction
from msmri.methods import load_method
from msmri.methods.msm import DATA_WEIGHT, ESTIMATE_ERROR, MSM
from msmri.methods.tuning import tune
from msmri.metrics import bootstrap_interval, object_region, psnr
from msmri.model.checkpoint import load_checkpoint
from msmri.model.prior import load_prior, shipped_prior
from msmri.physics.coils import estimate_noise_std, root_sum_of_squares
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.masks import RandomLines, slice_seed
from msmri.physics.operators import CoilFourier
from msmri.preparation import Preparation, measurements, read_slice
from msmri.report import comparison_figure, line_plot, markdown_table
from msmri.tensors import normal_like

RESULTS = Path(__file__).parent / "results"
COILS, GAUSSIAN, RICIAN = "all coils", "one coil, complex noise", "one coil, Rician magnitude"
ZERO, FULL, CONSTANT = "zero-filled", "fully sampled, nothing done", "constant pull, "  # then the prior's label
GRIDS = {"cg-sense": (1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0), "tv": (2e-4, 1e-3, 3e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)}
TOLD = (0.5, 2.0)  # wrong noise levels, in units of the true one
ENOUGH, SMALL = 1.0, 0.5  # dB: what a noisy prior may lose, and a wrong noise level
COLUMNS = {"object_psnr": (".2f", 1), "psnr": (".2f", 1), "object_ssim": (".3f", 1), "ssim": (".3f", 1)}
PLACES = ("inside", "outside")
COLUMNS |= {"bias_inside": ("+.1f", 100), "bias_outside": ("+.1f", 100), "seconds": (".1f", 1)}


@dataclass(frozen=True)
class Case:
    """One slice to reconstruct."""

    kind: str  # COILS, GAUSSIAN or RICIAN
    noise: float  # added: std of each real component, in units of the brightest pixel of the fully sampled image
    measurement: Measurement  # with the true noise level, and the image before noise was added as its target
    guess: float  # noise level that the undersampled k-space itself tells, in units of the true one
    full: Tensor | None = None  # the fully sampled noisy magnitude (1, y, x), of one coil


def noisy_image(magnitude: Tensor, std: float, rng: Generator, *, rician: bool) -> Tensor:
    """Add complex Gaussian noise to an image; if ``rician`` take the magnitude: ``sqrt((m + n1)^2 + n2^2)``."""
    clean = magnitude.to(torch.complex64)
    noisy = clean + std * normal_like(clean[None], [rng])[0]
    return noisy.abs().to(clean.dtype) if rician else noisy


def one_coil(whole: Measurement, kind: str, noise: float, options: argparse.Namespace) -> Case:
    """Make a scan of one coil of a magnitude image, with the same noise and mask for both kinds of noise."""
    target, name = whole.target, whole.source[0]
    std = noise * float(target.max())
    streams = [Generator().manual_seed(slice_seed(f"{name}{what}", options.seed)) for what in (" noise", "")]
    image = noisy_image(target[0], std, streams[0], rician=kind == RICIAN)
    mask = RandomLines(options.acceleration).draw((image.shape[-2], image.shape[-1]), streams[1]).reshape(1, 1, 1, -1)
    values = torch.where(mask, fft2c(image)[None, None], 0)
    encoding, noise_std = CoilFourier(torch.ones(1, 1, 1, *image.shape, dtype=values.dtype)), torch.full((1,) * 4, std)
    measurement = Measurement(values, mask, encoding, noise_std, 1.0, (name,), target)
    return Case(kind, noise, measurement, float(estimate_noise_std(values, mask)[0]) / std, image.abs()[None])


def cases_of(paths: list[str], kind: str, noise: float, options: argparse.Namespace) -> list[Case]:
    """Prepare all slices of one kind and noise; noise of all coils is what was added and the file's own, in power."""
    common: dict[str, Any] = {"seed": options.seed, "crop_to": options.crop_to}
    setup = Preparation(law=RandomLines(options.acceleration), noise=noise, sets=1, **common)
    found: list[Case] = []
    for path in list_scans(paths):
        with open_scan(path) as scan:
            whole = [read_slice(scan, k, Preparation(law=RandomLines(1.0), **common)) for k in options.slices]
        found += [one_coil(full, kind, noise, options) for full in whole] if kind != COILS else []
        for one, full in zip(measurements(path, setup, options.slices) if kind == COILS else [], whole):
            added = noise * root_sum_of_squares(ifft2c(full.values)).amax((-2, -1))
            true = torch.hypot(estimate_noise_std(full.values, full.mask), added).reshape(1, 1, 1, 1)
            found.append(Case(COILS, noise, replace(one, noise_std=true), float(one.noise_std / true)))
    return found


def sampler(method: MSM, measurement: Measurement, *, noisy: bool) -> MSM:
    """End the ladder of MSM at the noise of a measurement: a prior learned from noisy ones knows nothing below it."""
    lowest = max(method.sigma_min, float(measurement.noise_std / measurement.working_scale()) if noisy else 0.0)
    return replace(method, sigma_min=lowest, sigma_max=max(method.sigma_max, 2 * lowest))


def object_psnr(target: Tensor, image: Tensor) -> float:
    """PSNR of one slice within the object, in dB."""
    return psnr(target, image, where=object_region(target))


def biases(target: Tensor, image: Tensor) -> dict[str, float]:
    """Give the mean of image minus target inside the object and outside it, in units of the target's maximum."""
    inside, error = torch.from_numpy(object_region(target)), (image - target) / target.max()
    return {"bias_inside": float(error[inside].mean()), "bias_outside": float(error[~inside].mean())}


def learned_from_noise(path: Path) -> bool:
    """Tell from the header of weights whether their loss was one for noisy measurements."""
    header = load_checkpoint(path)[1]
    losses = [one.get("recipe", {}).get("loss", {}) for one in (header, *(header.get("stages") or []))]
    return any(":Noisy" in loss.get("use", "") for loss in losses)


class Runner:
    """Runs what is not done yet, keeps every row, and the images to show."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.kept = options, options.out.with_suffix(".rows.json")
        self.done = json.loads(self.kept.read_text("utf-8"))["rows"] if self.kept.exists() else {}
        self.commit = environment().get("commit")
        self.priors, self.samplers, self.tuned, self.pictures = {}, {}, {}, {}
        for label, path in (one.split("=", 1) for one in options.prior):
            self.priors[label] = {"sha256": sha256(path), "training": effort(Path(path))}
            self.priors[label]["noisy"] = learned_from_noise(Path(path))
            self.samplers[label] = MSM(load_prior(path), options.samples, options.steps, batch=options.samples)

    def state(self, **settings: Any) -> str:
        """Make a short name for settings."""
        common = {name: getattr(self.options, name) for name in ("acceleration", "seed", "crop_to")}
        return hashlib.sha256(fingerprint(common | settings).encode()).hexdigest()[:12]

    def _keep(self, key: str, value: Any) -> None:
        self.done[key] = value
        write_manifest(self.kept, {"rows": self.done})

    def weight(self, name: str, kind: str, noise: float) -> float:
        """Tune a classical method on validation scans of this noise; one coil: of complex noise."""
        kind = GAUSSIAN if kind == RICIAN else kind
        files = [(path.name, sha256(path)) for path in list_scans(self.options.validation)]
        key = f"tuned {name} | {kind} | {noise:g} | {self.state(files=files, grid=GRIDS[name])}"
        if key not in self.done:
            found = [case.measurement for case in cases_of(self.options.validation, kind, noise, self.options)]
            best, _ = tune(load_method(name), found, metric=object_psnr, grid=GRIDS[name], refinements=0)
            self._keep(key, best.weight)
            print(f"{kind}, noise {noise:g}: {name} weight {self.done[key]:g}", flush=True)
        self.tuned[f"{name}, {kind}, noise {noise:g}"] = self.done[key]
        return self.done[key]

    def jobs(self, case: Case) -> Iterator[tuple[str, float, dict[str, Any], Any]]:
        """Yield (label, noise told over the true one, settings, method) of everything to run on a slice."""
        if case.full is not None:
            yield FULL, 1.0, {}, lambda *_: Reconstruction(case.full.to(torch.complex64)[:, None])
        yield ZERO, 1.0, {}, load_method(ZERO)
        for name in GRIDS:
            weight = self.weight(name, case.kind, case.noise)
            yield name, 1.0, {"weight": weight}, load_method(name, weight=weight)
        wrong = TOLD if case.kind == COILS and case.noise == self.options.rho else ()
        for label, method in self.samplers.items():
            constant = replace(method, data_weight=DATA_WEIGHT["proximal"])
            tries = [(CONSTANT + label, 1.0, constant)] if label in list(self.samplers)[: case.kind == COILS] else []
            for factor in (1.0, *wrong):
                told = replace(case.measurement, noise_std=factor * case.measurement.noise_std)
                tries.append((label, factor, sampler(method, told, noisy=self.priors[label]["noisy"])))
            for name, factor, one in tries:
                settings = {"method": repr(replace(one, prior=None)), "weights": self.priors[label]["sha256"]}
                yield name, factor, settings, one

    def run(self, case: Case, *, picture: bool) -> Iterator[dict[str, Any]]:
        """Yield the rows of one slice."""
        target, name = case.measurement.target, case.measurement.source[0]
        for label, factor, settings, method in self.jobs(case):
            key = f"{case.kind} | {case.noise:g} | {name} | {label} | told {factor:g} | {self.state(**settings)}"
            wanted = picture and factor == 1 and not label.startswith(CONSTANT)
            path = self.kept.with_suffix(f".{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy")
            if key not in self.done or (wanted and not path.exists()):
                told = replace(case.measurement, noise_std=factor * case.measurement.noise_std)
                values, image = score(method, told, self.options.seed)
                row = {"kind": case.kind, "noise": case.noise, "slice": name, "method": label, "told": factor}
                row |= {"guess": case.guess, "true_R": float(case.measurement.acceleration[0]), "commit": self.commit}
                if wanted:
                    with atomic(path) as part, part.open("wb") as file:
                        np.save(file, image.numpy())
                self._keep(key, row | values | biases(target[0], image))
                print(f"{key}: {values['object_psnr']:.2f} dB, {values['seconds']:.1f} s", flush=True)
            if wanted:
                self.shown, self.pictures[label] = case.measurement, torch.from_numpy(np.load(path))
            yield self.done[key]


def rows_of(rows: list[dict[str, Any]], method: str, **where: Any) -> list[dict[str, Any]]:
    """Take the rows of a method, of all coils and told the true noise unless said otherwise."""
    wanted = {"method": method, "told": 1.0, "kind": COILS} | where
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def paired(first: list[dict[str, Any]], second: list[dict[str, Any]], seed: int) -> tuple[float, float, float]:
    """Give first minus second in object PSNR on the same slices, with 95 % interval; slices of a scan are averaged."""
    others = {row["slice"]: row["object_psnr"] for row in second}
    scans: dict[str, list[float]] = {}
    for row in first:
        scans.setdefault(row["slice"].rpartition("#")[0], []).append(row["object_psnr"] - others[row["slice"]])
    return bootstrap_interval([float(np.mean(one)) for one in scans.values()], Generator().manual_seed(seed))


def in_words(mean: float, low: float, high: float) -> str:
    """Write a difference and its interval, if it has one."""
    return f"{mean:+.2f} dB" + (f" [{low:+.2f}, {high:+.2f}]" if low <= high else "")


def level_name(noise: float, rho: float) -> str:
    """Name a noise level."""
    return f"noise {noise:g} ({noise / rho:g} rho)" if noise else "the file's own noise"


def line(who: str, claim: str, found: dict[str, tuple[float, float, float]], least: float) -> str:
    """Say where a mean difference is at least ``least``."""
    answers = {name: "yes" if one[0] >= least else "no" for name, one in found.items()}
    texts = "; ".join(f"{name} {in_words(*one)}, {answers[name]}" for name, one in found.items())
    return f"- {who}: **{claim} in {list(answers.values()).count('yes')} of {len(found)} cases** ({texts}).\n"


def verdicts(record: dict[str, Any]) -> dict[str, str]:
    """Answer the questions in words, from the rows alone."""
    rows, seed, rho, priors = record["rows"], record["seed"], record["rho"], record["priors"]
    levels = sorted({row["noise"] for row in rows if row["kind"] == COILS})

    def by_level(first: str, second: str) -> dict[str, tuple[float, float, float]]:
        pairs = {n: [rows_of(rows, name, noise=n) for name in (first, second)] for n in levels}
        return {level_name(n, rho): paired(*pair, seed) for n, pair in pairs.items()}

    said = dict.fromkeys(("training", "tv", "told", "sampler", "rician"), "")
    for ours, other in ((a, b) for a in priors for b in priors if priors[a]["noisy"] and not priors[b]["noisy"]):
        said["training"] += line(f"*{ours}* minus *{other}*", f"within {ENOUGH:g} dB", by_level(ours, other), -ENOUGH)
    for label in priors:
        said["tv"] += line(f"*{label}* minus tv", "above it", by_level(label, "tv"), 0.0)
        true, *wrong = (rows_of(rows, label, noise=rho, told=factor) for factor in (1.0, *TOLD))
        costs = {f"told {t:g} times the noise": paired(part, true, seed) for t, part in zip(TOLD, wrong) if part}
        said["told"] += line(f"*{label}*", f"{SMALL:g} dB or less lost", costs, -SMALL) if costs else ""
        if rows_of(rows, CONSTANT + label):
            gains = by_level(label, CONSTANT + label)
            said["sampler"] += line(
                f"*{label}*, pull of the data that follows the noise minus constant pull", "no worse", gains, 0.0
            )
    for level, label in dict.fromkeys((row["noise"], row["method"]) for row in rows if row["kind"] == RICIAN):
        two = [rows_of(rows, label, noise=level, kind=kind) for kind in (RICIAN, GAUSSIAN)]
        found = paired(*two, seed)
        beyond = "**beyond chance**" if found[1] > 0 or found[2] < 0 else "within chance"
        beyond = beyond if found[1] <= found[2] else "a single scan"
        inside, outside = ([f"{100 * np.mean([r[f'bias_{x}'] for r in part]):+.1f} %" for part in two] for x in PLACES)
        where = f"inside {' against '.join(inside)}, outside {' against '.join(outside)}"
        said["rician"] += f"- Noise {level:g}, {label}: {in_words(*found)}, {beyond}; bias {where}.\n"
    return said


def table(rows: list[dict[str, Any]]) -> str:
    """Average over slices."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["noise"], row["kind"], row["method"], row["told"]), []).append(row)
    lines = []
    for (noise, kind, method, told), part in groups.items():
        entries: dict[str, Any] = {"noise": f"{noise:g}", "scan": kind.removeprefix("one coil, "), "method": method}
        entries |= {"noise told / true": f"{told:g}", "slices": len(part)}
        for name, (form, factor) in COLUMNS.items():
            entries[name.replace("_", " ")] = f"{factor * np.mean([row[name] for row in part]):{form}}"
        lines.append(entries)
    return markdown_table(lines, list(lines[0]))


def draw(out: Path, record: dict[str, Any], one: Measurement, images: dict[str, Tensor]) -> list[Path]:
    """Draw PSNR against noise, and one slice at noise rho."""
    points: dict[str, dict[float, list[float]]] = {}
    for row in record["rows"]:
        if row["kind"] == COILS and row["told"] == 1:
            points.setdefault(row["method"], {}).setdefault(row["noise"], []).append(row["object_psnr"])
    series = {name: [(x, float(np.mean(y))) for x, y in found.items()] for name, found in points.items()}
    chart, panel = (out.with_name(f"{out.stem}_{what}.png") for what in ("against_noise", "images"))
    line_plot(chart, series, x_label="noise added, of the image's maximum", y_label="object PSNR, dB")
    target = one.target[0]
    scores = {name: {"psnr": object_psnr(target, image)} for name, image in images.items()}
    title = f"{one.source[0]}, {level_name(record['rho'], record['rho'])}, PSNR within the object"
    comparison_figure(panel, images=images, target=target, mask=one.mask[0, 0], metrics=scores, title=title)
    return [chart, panel]


def page(record: dict[str, Any], figures: list[Path], root: Path) -> str:
    """Write the page from what was recorded."""
    rows, said = record["rows"], verdicts(record)
    coils, single = ([row for row in rows if (row["kind"] == COILS) is many] for many in (True, False))
    guess, rician = ([r["guess"] for r in rows if (r["method"], r["kind"]) == (ZERO, k)] for k in (COILS, RICIAN))
    priors = [
        {"prior": label, "learned from": "added noise" if one["noisy"] else "scans as they are"}
        | {"training": one["training"], "weights": f"`{one['sha256'][:12]}`"}
        for label, one in record["priors"].items()
    ]
    tuned = "; ".join(f"{name}: {value:g}" for name, value in record["tuned"].items())
    scans = ", ".join(dict.fromkeys(row["slice"] for row in rows))
    scans += f", cropped to {record['crop_to']}" if record["crop_to"] else ""
    text = (
        "# What does noise cost?\n\nWritten by `benchmarks/what_does_noise_cost.py`; do not edit by hand. Seed "
        f"{record['seed']}, commit `{record['environment'].get('commit')}`.\n\nSimulated, fully sampled scans "
        f"({scans}), undersampled at nominal R = "
        f"{record['acceleration']:g} (true {np.mean([row['true_R'] for row in rows]):.2f}). Noise: std of each real "
        "component of k-space over the brightest pixel of the fully sampled image, added to that of the file; rho = "
        f"{record['rho']:g}. Reference: root sum of squares before noise was added. PSNR in dB, in words within the "
        "object. Coil maps are estimated from the noisy scans. Weights of cg-sense and tv are tuned on validation "
        f"scans of the same noise ({tuned}). MSM: {record['steps']} steps, {record['samples']} samples, told the true "
        "noise unless said otherwise, its pull to the data falling with the square of the noise where that is above "
        f"{record['estimate_error'] / DATA_WEIGHT['proximal'] ** 0.5:.3f} in scaled units; for priors that learned "
        "from noise its ladder ends at the noise. "
        "Intervals: 95 % bootstrap of the paired differences over scans. What k-space itself tells of its noise is "
        f"{np.mean(guess):.2f} times the true level ({min(guess):.2f} to {max(guess):.2f}).\n\n"
        f"{markdown_table(priors, list(priors[0]))}\n## What does learning from noisy measurements cost?\n\n"
        f"{said['training'] or 'No noisy prior, or nothing to compare it with, was given.'}\n"
        "## Is the data's noise the one trained on?\n\nAgainst total variation tuned at each noise:\n\n"
        f"{said['tv']}\nA wrong noise told to the sampler, data of noise rho, against the true one:\n\n"
        f"{said['told']}\nAgainst a pull of the data that does not know the noise:\n\n{said['sampler']}\n{table(coils)}"
    )
    if single:
        text += (
            "\n## Rician magnitudes taken for k-space\n\nThe reference as an image of one coil with a map of ones. "
            "Complex: Gaussian noise in both components. Rician: the magnitude of that very image, transformed to "
            "k-space and undersampled. Both are told the std of the components; k-space of Rician magnitudes itself "
            f"tells {np.mean(rician):.2f} times that. Bias: mean of image minus reference in per cent of the "
            "reference's maximum. Rician minus complex noise, and the bias of the former against the latter's:\n\n"
            f"{said['rician']}\n{table(single)}"
        )
    shown = "\n\n".join(f"![{path.stem}]({os.path.relpath(path, root)})" for path in figures)
    return f"{text}\n## Figures\n\n{shown}\n"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="*", help="fully sampled simulated scans, or folders of them")
    parser.add_argument("--validation", nargs="*", default=[], help="fully sampled scans, only to tune on")
    parser.add_argument("--prior", action="append", default=[], metavar="LABEL=FILE", help="the first also by default")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.05, 0.1, 0.2], help="added to k-space")
    parser.add_argument("--rician", nargs="*", type=float, default=[0.1], help="noise of magnitudes")
    parser.add_argument("--rho", type=float, default=0.1, help="noise that the noisy prior was trained at")
    parser.add_argument("--acceleration", type=float, default=4.0)
    parser.add_argument("--slices", nargs="+", type=int, default=[1])
    parser.add_argument("--crop-to", type=int, default=None)
    for name, number in (("--steps", 4), ("--samples", 2), ("--seed", 0)):
        parser.add_argument(name, type=int, default=number)
    parser.add_argument("--quick", action="store_true", help="little of everything; the demo scan unless given others")
    parser.add_argument("--out", type=Path, default=RESULTS / "what_does_noise_cost.json")
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    if options.quick:
        options.scans = options.scans or [str(files("msmri") / "data" / "demo_brain.h5")]
        options.validation = options.validation or options.scans
        options.noise, options.crop_to, options.steps, options.samples = [0.0], 64, 1, 1
    if not options.scans or not options.validation or any("=" not in one for one in options.prior):
        parser.error("give scans, --validation scans, and priors as LABEL=FILE (or --quick)")
    options.prior = options.prior or [f"shipped={shipped_prior()}"]
    options.noise = sorted({*options.noise, options.rho})
    return options


def main() -> None:
    """Run, resume, and write the figures."""
    options = parse()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runner, rows = Runner(options), []
    kinds = [(COILS, n) for n in options.noise] + [(kind, n) for n in options.rician for kind in (GAUSSIAN, RICIAN)]
    for kind, noise in kinds:
        for number, case in enumerate(cases_of(options.scans, kind, noise, options)):
            rows += runner.run(case, picture=(number, kind, noise) == (0, COILS, options.rho))
    told = {name: getattr(options, name) for name in ("seed", "rho", "acceleration", "crop_to", "steps", "samples")}
    record = {"environment": environment(), **told, "estimate_error": ESTIMATE_ERROR, "tuned": runner.tuned}
    record |= {"priors": runner.priors, "rows": rows}
    write_manifest(options.out, record)
    root = options.markdown.parent if options.markdown else Path()
    print(text := page(record, draw(options.out, record, runner.shown, runner.pictures), root))
    if options.markdown:
        options.markdown.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
