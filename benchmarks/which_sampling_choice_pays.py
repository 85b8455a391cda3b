"""Ask which choices of the sampler and of the shipped prior's parts pay, one change at a time, on validation scans.

    python benchmarks/which_sampling_choice_pays.py VALIDATION_SCANS --markdown docs/results_sampling.md

Fully sampled scans are undersampled here; the defaults of MSM are chosen by this table, so that the scans must not be
those of the results. Rows are PSNR of the mean of the samples, of the first sample alone, and
seconds, averaged over scans. Writes results/which_sampling_choice_pays.json.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from msmri.io.fastmri import list_scans
from msmri.io.output import environment, sha256, write_manifest
from msmri.methods.msm import MSM
from msmri.metrics import psnr
from msmri.model.prior import load_prior, shipped_prior
from msmri.physics.masks import RandomLines
from msmri.preparation import Preparation, measurements
from msmri.report import markdown_table
from msmri.tensors import generators

ONE_STEP = {"steps": 1, "samples": 1, "sigma_max": 100.0, "masks_per_step": 1, "acceleration": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
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


@contextlib.contextmanager
def changed(prior: nn.Module, *, networks: bool = True, **attributes: Any) -> Iterator[None]:
    """Change attributes of a prior for a while, or let its networks add nothing."""
    before = {name: getattr(prior, name) for name in attributes}
    hooks = []
    if not networks:
        parts = [prior.network, *prior.later]
        hooks = [part.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output)) for part in parts]
    for name, value in attributes.items():
        setattr(prior, name, value)
    yield
    for name, value in before.items():
        setattr(prior, name, value)
    for hook in hooks:
        hook.remove()


def main() -> None:
    """Run and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+")
    parser.add_argument("--prior", default=None)
    parser.add_argument("--accelerations", nargs="*", type=float, default=[4.0, 6.0])
    parser.add_argument("--crop-to", type=int, default=None)
    parser.add_argument("--slices", nargs="*", type=int, default=[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, default=None)
    here = Path(__file__).parent / "results" / "which_sampling_choice_pays.json"
    parser.add_argument("--out", type=Path, default=here)
    options = parser.parse_args()
    prior = load_prior(options.prior)
    cases = []
    for acceleration in options.accelerations:
        preparation = Preparation(law=RandomLines(acceleration), seed=options.seed, crop_to=options.crop_to)
        for path in list_scans(options.scans):
            cases += measurements(path, preparation, options.slices)
    rows = []
    for name, changes in VARIANTS.items():
        method = MSM(prior=prior, **{key: value for key, value in changes.items() if key != "prior"})
        mean, single, begun = [], [], time.perf_counter()
        for case in cases:
            with changed(prior, **changes.get("prior", {})):
                found = method(case, generators(options.seed, 1))
            target = case.target[0].numpy()
            mean.append(psnr(target, found.magnitude[0].numpy()))
            single.append(psnr(target, found.samples[0, 0].abs().numpy()))
        seconds = (time.perf_counter() - begun) / len(cases)
        rows.append({"variant": name, "psnr": mean, "psnr_one_sample": single, "seconds": seconds})
        print(f"{name:45s} {np.mean(mean):.2f} {np.mean(single):.2f} {seconds:.1f} s", flush=True)
    path = Path(options.prior) if options.prior else shipped_prior()
    scans = [case.source[0] for case in cases]
    record = {"environment": environment(), "seed": options.seed, "prior_sha256": sha256(path), "scans": scans}
    write_manifest(options.out, {**record, "crop_to": options.crop_to, "rows": rows})
    lines = [
        {
            "variant": row["variant"],
            "PSNR, mean of samples": f"{np.mean(row['psnr']):.2f}",
            "against default": f"{np.mean(row['psnr']) - np.mean(rows[0]['psnr']):+.2f}",
            "PSNR, one sample": f"{np.mean(row['psnr_one_sample']):.2f}",
            "seconds a slice": f"{row['seconds']:.1f}",
        }
        for row in rows
    ]
    table = markdown_table(lines, list(lines[0]))
    crop = f"cropped to {options.crop_to}" if options.crop_to else "full matrix"
    if options.markdown:
        options.markdown.write_text(
            "# Which sampling choice pays?\n\nWritten by `benchmarks/which_sampling_choice_pays.py`; do not edit by "
            f"hand. Scans: {', '.join(sorted(set(scans)))}, {crop}, nominal R "
            f"{', '.join(f'{r:g}' for r in options.accelerations)}, seed {options.seed}, prior SHA-256 "
            f"`{sha256(path)[:16]}`, commit `{environment().get('commit')}`.\n\n{table}\n"
        )


if __name__ == "__main__":
    main()
