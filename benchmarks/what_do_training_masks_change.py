"""Ask what the masks of the training scans change: one fixed mask a slice or a new one in every step, R = 4, 6 or 8.

    python benchmarks/what_do_training_masks_change.py FULL_SCANS --validation SCANS --work DIR \
        --markdown docs/results_training_masks.md

FULL_SCANS are fully sampled training scans (recipes/simulate_brains.py --full), undersampled as they are read. Small
priors are trained by the same recipe on the same slices with the same seeds; only their masks differ. One is trained
twice, the second time from another seed and with the scans in another order: what that changes is how far two trainings
of one kind lie apart. All are then tried on other people's scans at several accelerations, the same masks and noise for
all. Runs are kept in --work and finished rows beside the result: interrupted (Ctrl-C), the same command goes on where
it stopped.
Writes results/what_do_training_masks_change.json and with --markdown a page.
"""

import argparse
import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, nn

from msmri.config import load_recipe
from msmri.io.fastmri import list_scans, open_scan
from msmri.io.output import environment, fingerprint, sha256, write_manifest
from msmri.measurement import Measurement
from msmri.methods.msm import MSM
from msmri.metrics import bootstrap_interval, psnr
from msmri.model.checkpoint import load_checkpoint
from msmri.model.prior import load_prior
from msmri.physics.masks import RandomLines
from msmri.preparation import Preparation, measurements
from msmri.report import markdown_table
from msmri.tensors import generators
from msmri.train import train

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "brain_r4_small.yaml"
VARIANTS: dict[str, dict[str, Any]] = {  # the first is what the others are compared with
    "fixed, R = 4": {},
    "fixed, R = 4, another seed": {"seed": 1},
    "redrawn, R = 4": {"redraw": True},
    "fixed, R = 6": {"acceleration": 6.0},
    "fixed, R = 8": {"acceleration": 8.0},
}
REFERENCE, NOTHING = next(iter(VARIANTS)), "no networks"
ONE_STEP = {"steps": 1, "samples": 1, "sigma_max": 100.0, "masks_per_step": 1, "law": RandomLines(1.0)}
SAMPLERS: dict[str, dict[str, Any]] = {
    "one step, networks not weighed": {**ONE_STEP, "adapt": False},
    "one step": ONE_STEP,
    "default": {},
}
ABOUT = {
    "one step, networks not weighed": "The estimate from the measured lines alone, networks as trained: training shows "
    "most here.",
    "one step": "The same, the networks weighed by how well they predict hidden lines of the scan.",
    "default": "MSM's default sampler, its masks by the law that the prior was trained on.",
}


def resolve(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Give the recipe of a variant: that of the file, its data undersampled here."""
    change = {"seed": 0, "redraw": False, "acceleration": 4.0} | VARIANTS[variant]
    recipe = load_recipe(options.recipe, options.settings)
    files = [str(path.resolve()) for path in list_scans(options.train)]
    law = {"use": "msmri.physics.masks:RandomLines", "acceleration": change["acceleration"]}
    files = files[: options.scans or None]
    if change["seed"]:  # other initial weights come from the seed, other batches from the order of the scans as well
        files = files[::-1]
    data = {"use": "msmri.io.dataset:UndersampledScans", "path": files, "law": law}
    data |= {"redraw": change["redraw"], "cache": str(options.work / "maps")}
    recipe["data"] = data | {name: recipe["data"][name] for name in ("max_coils",) if name in recipe["data"]}
    given = recipe.get("train", {})
    recipe["train"] = {"save_every": 50, **given, "steps": options.steps, "seed": given.get("seed", 0) + change["seed"]}
    return recipe


def run_folder(options: argparse.Namespace, variant: str, recipe: dict[str, Any]) -> Path:
    """Name the folder of a run by all that decides it, so that other settings never go on with it."""
    name = re.sub(r"\W+", "_", variant)
    decisive = recipe | {"data": {**recipe["data"], "cache": None}}
    return options.work / f"{name}_{hashlib.sha256(fingerprint(decisive).encode()).hexdigest()[:12]}"


def trained(recipe: dict[str, Any], run: Path, variant: str) -> Path:
    """Train, or go on training, and give the file of the weights."""
    weights, told = run / "last.safetensors", time.monotonic()
    if weights.exists() and load_checkpoint(weights)[1]["step"] >= recipe["train"]["steps"]:
        return weights
    for record in train(recipe, run):
        if time.monotonic() - told > 30 or record.step == record.n_steps:
            told = time.monotonic()
            words = f"step {record.step} of {record.n_steps}, loss {record.loss:.4g}, {record.seconds:.0f} s"
            print(f"training {variant}: {words}", flush=True)
    return weights


def sights(recipe: dict[str, Any]) -> dict[str, float]:
    """Count slices, how often one is seen on average, and the true acceleration to expect of their masks."""
    pixels, steps, law = recipe["train"]["pixels"], recipe["train"]["steps"], recipe["data"]["law"]["acceleration"]
    slices, drawn, rates = 0, [], []
    for path in recipe["data"]["path"]:
        with open_scan(path) as scan:
            shape = (scan.kspace_shape[2], scan.kspace_shape[3])
            drawn.append(max(1, min(scan.n_slices, round(pixels / (shape[0] * shape[1])))))
            slices += scan.n_slices
        rates.append(RandomLines(law).expected_acceleration(shape))
    return {"slices": slices, "sights": steps * float(np.mean(drawn)) / slices, "true_R": float(np.mean(rates))}


@contextlib.contextmanager
def silent(prior: nn.Module) -> Iterator[None]:
    """Let the networks of a prior add nothing for a while: its first estimate, and nothing that was trained."""
    parts = [prior.network, *prior.later]  # type: ignore[misc]
    hooks = [part.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output)) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def score(method: MSM, case: Measurement, seed: int, *, networks: bool) -> dict[str, Any]:
    """Reconstruct one slice."""
    assert case.target is not None
    begun = time.perf_counter()
    with contextlib.nullcontext() if networks else silent(method.prior):  # type: ignore[arg-type]
        found = method(case, generators(seed, 1))
    seconds = time.perf_counter() - begun
    return {"psnr": psnr(case.target[0].numpy(), found.magnitude[0].numpy()), "seconds": seconds}


def difference(
    rows: list[dict[str, Any]], variant: str, sampler: str, acceleration: float, seed: int
) -> tuple[float, float, float]:
    """Give the mean lead of a variant over the reference with its 95 % bootstrap interval, over scans."""
    here = [row for row in rows if row["sampler"] == sampler and row["nominal_R"] == acceleration]
    values = {(row["variant"], row["slice"]): row["psnr"] for row in here}
    scans: dict[str, list[float]] = {}
    for name, where in values:
        if name == variant:
            lead = values[variant, where] - values[REFERENCE, where]
            scans.setdefault(where.rpartition("#")[0], []).append(lead)
    return bootstrap_interval([float(np.mean(one)) for one in scans.values()], Generator().manual_seed(seed))


def sentences(rows: list[dict[str, Any]], seed: int) -> list[str]:
    """Say of every variant and sampler whether it differs from the reference by more than chance."""
    said = []
    levels = sorted({row["nominal_R"] for row in rows})
    present = list(dict.fromkeys(row["variant"] for row in rows))
    twin = next((name for name in present if name.endswith("another seed")), "")
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        for variant in present:
            if variant == REFERENCE:
                continue
            texts, beyond = [], []
            for level in levels:
                mean, low, high = difference(rows, variant, sampler, level, seed)
                apart = low > 0 or high < 0
                chance = abs(difference(rows, twin, sampler, level, seed)[0]) if twin in present else 0.0
                beyond.append(apart and abs(mean) > chance)
                verdict = f" [{low:+.2f}, {high:+.2f}]" if low <= high else " of a single scan"
                if variant != twin and low <= high:
                    verdict += (
                        ", within" if not apart else ", beyond" if beyond[-1] else ", another seed changes as much"
                    )
                texts.append(f"R = {level:g} {mean:+.2f} dB{verdict}")
            count = f"**beyond chance at {sum(beyond)} of {len(levels)} accelerations**"
            if variant == twin:
                count = "another training of the same kind, which tells what chance does"
            said.append(f"*{variant}* against *{REFERENCE}*, {sampler}: {count} ({'; '.join(texts)}).")
    return said


def page(record: dict[str, Any]) -> str:
    """Write the page from what was recorded."""
    rows, seed = record["rows"], record["seed"]
    levels = sorted({row["nominal_R"] for row in rows})
    tables = []
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        lines = []
        for variant in dict.fromkeys(row["variant"] for row in rows):
            line: dict[str, Any] = {"training masks": variant}
            for level in levels:
                here = [row for row in rows if (row["variant"], row["sampler"]) == (variant, sampler)]
                values = [row["psnr"] for row in here if row["nominal_R"] == level]
                line[f"R = {level:g}"] = f"{np.mean(values):.2f}"
                mean, low, high = difference(rows, variant, sampler, level, seed)
                interval = f" [{low:+.2f}, {high:+.2f}]" if low <= high else ""
                lead = "" if variant == REFERENCE else f"{mean:+.2f}{interval}"
                line[f"R = {level:g}, lead over *{REFERENCE}*"] = lead
            lines.append(line)
        title = f"### {sampler[0].upper()}{sampler[1:]}\n\n{ABOUT[sampler]}"
        tables.append(f"{title}\n\n{markdown_table(lines, list(lines[0]))}")
    runs = [
        {
            "training masks": name,
            "true R": f"{run['true_R']:.2f}",
            "steps": run["steps"],
            "slices": run["slices"],
            "times a slice was seen": f"{run['sights']:.1f}",
            "last loss": f"{run['loss']:.3f}",
            "weights": f"`{run['sha256'][:12]}`",
        }
        for name, run in record["runs"].items()
    ]
    scans = sorted({row["slice"] for row in rows})
    crop = f", cropped to {record['crop_to']}" if record["crop_to"] else ""
    said = "\n".join(f"- {line}" for line in sentences(rows, seed))
    return (
        "# What do training masks change?\n\nWritten by `benchmarks/what_do_training_masks_change.py`; do not edit by "
        f"hand. Seed {seed}, commit `{record['environment'].get('commit')}`.\n\nThe same slices, seeds and steps; only "
        "the masks of the training scans differ: one fixed mask a slice, or a new one in every step from the fully "
        f"sampled slice, as in the authors' released code. Tried on {len(scans)} slices of other people "
        f"({', '.join(scans)}{crop}), the same masks and noise for all; PSNR in dB. Intervals: 95 % bootstrap of the "
        "paired differences over scans. They hold what scans differ in, not what trainings do: *another seed* is the "
        "first variant trained once more, and a difference no larger than that says nothing. Beyond chance is what has "
        "an interval without 0 and is larger than the difference between these two. These are short trainings; "
        f"*{NOTHING}* is the first prior with its networks silenced, little more than its estimate of sparse edges."
        "\n\n"
        f"## In words\n\n{said}\n\n## Tables\n\n" + "\n".join(tables) + "\n## Training\n\n"
        "A fixed mask and a new one differ only for slices that are seen more than once. Losses are of lines hidden "
        f"from each variant's own masks and not to be compared.\n\n{markdown_table(runs, list(runs[0]))}"
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", nargs="+", help="fully sampled scans to train on, or their folder")
    parser.add_argument("--validation", nargs="+", required=True, help="fully sampled scans of other people")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs and of the training coil maps")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--scans", type=int, default=20, help="training scans taken of those given; 0: all")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="change a value of the recipe")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="variants")
    parser.add_argument("--samplers", nargs="+", default=["one step, networks not weighed", "default"],
                        choices=list(SAMPLERS))  # fmt: skip
    parser.add_argument("--accelerations", nargs="+", type=float, default=[4.0, 6.0, 8.0], help="of validation")
    parser.add_argument("--slices", nargs="+", type=int, default=[0], help="of every validation scan")
    parser.add_argument("--crop-to", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0, help="of validation masks and samples")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "what_do_training_masks_change.json")
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.only = [name for name in VARIANTS if name == REFERENCE or name in options.only]
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train and try all variants, taking what an earlier run has done."""
    about = environment()
    runs: dict[str, dict[str, Any]] = {}
    priors: dict[str, tuple[nn.Module, RandomLines]] = {}
    for variant in options.only:
        recipe = resolve(options, variant)
        weights = trained(recipe, run_folder(options, variant, recipe), variant)
        _, header = load_checkpoint(weights)
        runs[variant] = {"sha256": sha256(weights), "steps": header["step"], "loss": header["loss"][-1]}
        runs[variant] |= sights(recipe) | {"cpu_hours": header.get("cpu_hours"), "train": header["recipe"]["train"]}
        priors[variant] = load_prior(weights), RandomLines(recipe["data"]["law"]["acceleration"])
    kept = options.out.with_suffix(".rows.json")
    done: dict[str, dict[str, Any]] = json.loads(kept.read_text("utf-8"))["rows"] if kept.exists() else {}
    cases: list[tuple[float, Measurement]] = []
    for acceleration in options.accelerations:
        setup = Preparation(law=RandomLines(acceleration), seed=options.seed, crop_to=options.crop_to)
        for scan in list_scans(options.validation):
            cases += [(acceleration, one) for one in measurements(scan, setup, options.slices)]
    rows = []
    for sampler in options.samplers:
        for variant in (*options.only, NOTHING):
            prior, law = priors[REFERENCE if variant == NOTHING else variant]
            weighed = {"adapt": False} if variant == NOTHING else {}  # nothing to weigh
            method = MSM(prior=prior, **{"law": law, **SAMPLERS[sampler], **weighed})
            settings = {name: repr(value) for name, value in vars(method).items() if name != "prior"}
            settings |= {"variant": variant, "seed": options.seed, "crop_to": options.crop_to}
            settings |= {"weights": runs[REFERENCE if variant == NOTHING else variant]["sha256"]}
            state = hashlib.sha256(fingerprint(settings).encode()).hexdigest()[:12]
            for acceleration, case in cases:
                key = f"{sampler} | {variant} | {acceleration:g} | {case.source[0]} | {state}"
                if key not in done:
                    row = {"variant": variant, "sampler": sampler, "slice": case.source[0], "nominal_R": acceleration}
                    row |= {"true_R": float(case.acceleration[0]), "commit": about.get("commit")}
                    done[key] = row | score(method, case, options.seed, networks=variant != NOTHING)
                    write_manifest(kept, {"rows": done})
                    print(f"{key}: {done[key]['psnr']:.2f} dB, {done[key]['seconds']:.1f} s", flush=True)
                rows.append(done[key])
    record = {"environment": about, "seed": options.seed, "crop_to": options.crop_to, "runs": runs, "rows": rows}
    write_manifest(options.out, record)
    return record


def main() -> None:
    """Run, resume, and write the figures."""
    options = parse()
    try:
        record = measure(options)
    except KeyboardInterrupt:
        print("interrupted; repeat the command to go on", file=sys.stderr)
        raise SystemExit(130) from None
    text = page(record)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
