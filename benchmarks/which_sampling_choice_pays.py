"""Ask which choices of the sampler and of the shipped prior's parts pay, one change at a time, on validation scans.

    python benchmarks/which_sampling_choice_pays.py VALIDATION_SCANS --markdown docs/results_sampling.md
    python benchmarks/which_sampling_choice_pays.py VALIDATION_SCANS --only masks steps

Fully sampled scans are undersampled here; the defaults of MSM are chosen by these tables, so that the scans must not be
those of the results. Each table holds the default and variants of it: ``parts`` mixed ones, the others those of one
setting (masks a step, steps, aggregation, likelihood). Rows are PSNR of the mean of the samples, of the first sample
alone, and seconds, averaged over scans. Every finished slice is kept beside the result, so that the same command goes
on where it was stopped, and a variant that stands in two tables is run once. Writes
results/which_sampling_choice_pays.json.
"""

import argparse
import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, nn

from msmri.io.fastmri import list_scans
from msmri.io.output import environment, fingerprint, sha256, write_manifest
from msmri.measurement import Measurement
from msmri.methods.msm import DATA_WEIGHT, MSM
from msmri.metrics import bootstrap_interval, psnr
from msmri.model.prior import load_prior, shipped_prior
from msmri.physics.masks import RandomLines
from msmri.preparation import Preparation, measurements
from msmri.report import markdown_table
from msmri.tensors import generators

ONE_STEP = {
    "steps": 1,
    "samples": 1,
    "sigma_max": 100.0,
    "masks_per_step": 1,
    "acceleration": 1.0,
    "conditional_mean": 0.0,
}
PARTS: dict[str, dict[str, Any]] = {
    "default": {},
    "networks as trained, not weighed on the scan": {"adapt": False},
    "one step from blank (no sampling)": ONE_STEP,
    "one step, networks not weighed": {**ONE_STEP, "adapt": False},
    "one step, without networks": {**ONE_STEP, "adapt": False, "prior": {"networks": False}},
    "one step, without networks and sparse edges": {
        **ONE_STEP,
        "adapt": False,
        "prior": {"networks": False, "reweightings": 0},
    },
    "5 reweightings": {"prior": {"reweightings": 5}},
    "20 reweightings": {"prior": {"reweightings": 20}},
    "coil maps taken as exact": {"prior": {"map_error": 0.0}},
    "twice the error of coil maps": {"prior": {"map_error": 0.01}},
    "3 masks a step": {"masks_per_step": 3},
    "4 steps": {"steps": 4},
    "16 steps": {"steps": 16},
    "start from CG-SENSE at sigma 3": {"start": "warm", "sigma_max": 3.0},
    "from sigma 3": {"sigma_max": 3.0},
    "from sigma 0.1": {"sigma_max": 0.1},
    "deterministic (eta 0)": {"eta": 0.0},
    "no data correction (exact spread)": {"likelihood": "none"},
    "data correction of weight 10": {"data_weight": 10.0},
    "edges of every step from scratch": {"prior": {"following": None}},
    "independent masks": {"covering": False},
    "8 samples": {"samples": 8, "batch": 8},
}
DEFAULT: dict[str, dict[str, Any]] = {"default": {}}
GAMMAS = (0.5, 1.0, 2.0)  # of the gradient: half way to the data, the data, mirrored at the data (published)
PULLS: dict[str, dict[str, Any]] = {
    "no correction": {"likelihood": "none"},
    "proximal, weight 3": {"likelihood": "proximal", "data_weight": 3.0},
    **{f"gradient, gamma {gamma:g}": {"likelihood": "gradient", "data_weight": gamma} for gamma in GAMMAS},
}
SEEN, LEFT = {"include_measured": True}, {"include_measured": False}
SETS: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "parts": ("Parts and choices", "One change of the default in every row.", PARTS),
    "masks": (
        "Masks a step",
        "w masks are drawn in each step, dealt out so that they reach most lines together.",
        DEFAULT | {f"w = {w}": {"masks_per_step": w} for w in (1, 2, 3, 4, 8)},
    ),
    "steps": (
        "Steps",
        "Noise levels between the same highest and lowest one; a single step is at the highest.",
        DEFAULT | {f"steps = {n}": {"steps": n} for n in (1, 2, 4, 8, 16)},
    ),
    "aggregation": (
        "Aggregation",
        "With one mask a step both ways are the same. Masks that are dealt out hardly overlap beyond the measured "
        "lines, independent ones do.",
        DEFAULT
        | {
            f"{w} {kind} masks, {mode}": {"masks_per_step": w, "covering": covering, "aggregate": mode}
            for w, kind, covering in ((3, "dealt out", True), (3, "independent", False), (8, "independent", False))
            for mode in ("parallel", "sequential")
        },
    ),
    "estimate": (
        "The prior's own estimate",
        "The mean of the samples is moved by a share of the way to the prior's own estimate from all measured lines, "
        "corrected by the data as hidden lines tell.",
        DEFAULT | {f"share {share:g}": {"conditional_mean": share} for share in (0.0, 0.5, 1.0)},
    ),
    "likelihood": (
        "Likelihood",
        "MSM puts the measured lines into its masks where the prior can take them, which leaves a correction by the "
        "data little to do. In the second half of the rows it does not: the data then enter by the correction, as in "
        "the paper, and by the start. Gamma is the gradient's step size, 2 the published one.",
        DEFAULT
        | {name: SEEN | change for name, change in PULLS.items()}
        | {f"measured lines not in the masks: {name}": LEFT | change for name, change in PULLS.items()},
    ),
}


@contextlib.contextmanager
def changed(prior: nn.Module, *, networks: bool = True, **attributes: Any) -> Iterator[None]:
    """Change attributes of a prior for a while, or let its networks add nothing."""
    before = {name: getattr(prior, name) for name in attributes}
    own = {name for name in attributes if name in vars(prior)}
    hooks = []
    if not networks:
        parts = [prior.network, *prior.later]  # type: ignore[misc]
        hooks = [part.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output)) for part in parts]
    for name, value in attributes.items():
        setattr(prior, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if name in own:
                setattr(prior, name, value)
            else:
                delattr(prior, name)  # a method of its class comes back
        for hook in hooks:
            hook.remove()


def told(method: MSM, change: dict[str, Any]) -> dict[str, Any]:
    """Name all that decides a row but the prior's weights: equal for variants that are the same in the end."""
    values = {field.name: repr(getattr(method, field.name)) for field in fields(method) if field.name != "prior"}
    if method.data_weight is None:  # what it stands for
        values["data_weight"] = repr(DATA_WEIGHT[method.likelihood])
    if method.masks_per_step == 1:
        values["aggregate"] = "either"
    return values | {"prior": change}


def score(method: MSM, change: dict[str, Any], case: Measurement, seed: int) -> dict[str, float]:
    """Reconstruct one slice."""
    assert case.target is not None
    begun = time.perf_counter()
    with changed(method.prior, **change):  # type: ignore[arg-type]
        found = method(case, generators(seed, 1))
    seconds = time.perf_counter() - begun
    target = case.target[0].numpy()
    mean, single = (psnr(target, image.numpy()) for image in (found.magnitude[0], found.samples[0, 0].abs()))
    return {"psnr": mean, "psnr_one_sample": single, "seconds": seconds}


def difference(rows: list[dict[str, Any]], others: list[dict[str, Any]], seed: int) -> str:
    """Give the mean of paired differences in PSNR with its 95 % bootstrap interval; slices of a scan are averaged."""
    scans: dict[str, list[float]] = {}
    for row, other in zip(rows, others, strict=True):
        scans.setdefault(row["slice"].rpartition("#")[0], []).append(row["psnr"] - other["psnr"])
    mean, low, high = bootstrap_interval([float(np.mean(one)) for one in scans.values()], Generator().manual_seed(seed))
    return f"{mean:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if len(scans) > 1 else "")


def table(found: dict[str, list[dict[str, Any]]], seed: int) -> str:
    """Write one set of variants, the default first."""
    default = next(iter(found.values()))
    levels = sorted({row["nominal_R"] for row in default})
    lines = []
    for name, rows in found.items():
        line = {"variant": name, "PSNR, mean of samples": f"{np.mean([row['psnr'] for row in rows]):.2f}"}
        line["against default"] = difference(rows, default, seed) if rows is not default else ""
        if len(levels) > 1:
            for level in levels:
                here = [row["psnr"] for row in rows if row["nominal_R"] == level]
                line[f"at R = {level:g}"] = f"{np.mean(here):.2f}"
        line["PSNR, one sample"] = f"{np.mean([row['psnr_one_sample'] for row in rows]):.2f}"
        line["seconds a slice"] = f"{np.mean([row['seconds'] for row in rows]):.1f}"
        lines.append(line)
    return markdown_table(lines, list(lines[0]))


def main() -> None:
    """Run, resume, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+")
    parser.add_argument("--only", nargs="+", default=list(SETS), choices=list(SETS), help="tables to make; all without")
    parser.add_argument("--prior", default=None)
    parser.add_argument("--accelerations", nargs="*", type=float, default=[4.0, 6.0])
    parser.add_argument("--crop-to", type=int, default=None)
    parser.add_argument("--slices", nargs="*", type=int, default=[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget rows of an earlier run")
    parser.add_argument("--markdown", type=Path, default=None)
    here = Path(__file__).parent / "results" / "which_sampling_choice_pays.json"
    parser.add_argument("--out", type=Path, default=here)
    options = parser.parse_args()
    prior = load_prior(options.prior)
    path = Path(options.prior) if options.prior else shipped_prior()
    checksum, about = sha256(path), environment()
    kept = options.out.with_suffix(".rows.json")
    done: dict[str, dict[str, Any]] = {}
    if kept.exists() and not options.fresh:
        done = json.loads(kept.read_text("utf-8"))["rows"]
    cases = []
    for acceleration in options.accelerations:
        preparation = Preparation(law=RandomLines(acceleration), seed=options.seed, crop_to=options.crop_to)
        for scan in list_scans(options.scans):
            cases += [(acceleration, one) for one in measurements(scan, preparation, options.slices)]
    common = {"weights": checksum, "seed": options.seed, "crop_to": options.crop_to}
    sets: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for group in options.only:
        for name, changes in SETS[group][2].items():
            method = MSM(prior=prior, **{key: value for key, value in changes.items() if key != "prior"})
            change, rows = changes.get("prior", {}), []
            settings = hashlib.sha256(fingerprint(common | told(method, change)).encode()).hexdigest()[:12]
            for acceleration, case in cases:
                key = f"{case.source[0]} | {acceleration:g} | {settings}"
                if key not in done:
                    row = {"slice": case.source[0], "nominal_R": acceleration, "commit": about.get("commit")}
                    done[key] = row | score(method, change, case, options.seed)
                    write_manifest(kept, {"rows": done})
                rows.append(done[key])
            sets.setdefault(group, {})[name] = rows
            mean, seconds = (np.mean([row[what] for row in rows]) for what in ("psnr", "seconds"))
            print(f"{group:12s} {name:55s} {mean:.2f} dB, {seconds:.1f} s a slice", flush=True)
    record = {"environment": about, "seed": options.seed, "prior_sha256": checksum, "crop_to": options.crop_to}
    write_manifest(options.out, record | {"sets": sets})
    if options.markdown:
        crop = f"cropped to {options.crop_to}" if options.crop_to else "full matrix"
        tables = "\n".join(
            f"## {SETS[group][0]}\n\n{SETS[group][1]}\n\n{table(found, options.seed)}" for group, found in sets.items()
        )
        options.markdown.write_text(
            "# Which sampling choice pays?\n\nWritten by `benchmarks/which_sampling_choice_pays.py`; do not edit by "
            f"hand. Scans: {', '.join(sorted({case.source[0] for _, case in cases}))}, {crop}, nominal R "
            f"{', '.join(f'{r:g}' for r in options.accelerations)}, seed {options.seed}, prior SHA-256 "
            f"`{checksum[:16]}`, commit `{about.get('commit')}`.\n\nPSNR in dB. Intervals: 95 % bootstrap of the "
            "paired differences over scans, slices and accelerations of a scan averaged first. Rows may come from "
            f"several sittings, some while other programs ran: seconds are not to be compared closely.\n\n{tables}",
            "utf-8",
        )


if __name__ == "__main__":
    main()
