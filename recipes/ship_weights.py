"""Turn the weights of training runs into the file that ships: half precision, with recipe, data and licences inside.

    python recipes/ship_weights.py RUN1/last.safetensors RUN2/last.safetensors msmri/weights/brain_r4.safetensors

The last run's averaged weights are written; the headers of all runs, in order, tell how they came about. A run may
also be a file that shipped, which tells its own.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from msmri.model.checkpoint import load_checkpoint, save_checkpoint

BRAINS = {
    "colin27_t1": "Colin27 (Holmes et al. 1998), Debian mricron-data; BSD-3-Clause as stated there",
    "s02_t1gd": "niivue/niivue-demo-images MR_Gd; BSD-2-Clause",
    "s03_t2": "niivue/niivue-demo-images M2208_T2w; BSD-2-Clause",
    "s05_t1": "niivue/niivue-demo-images register/T1_head_ext2; BSD-2-Clause",
    "s06_t2flair": "fepegar/torchio-data fernando/t2; MIT",
    "s08_t1, s08_t2, s08_flair": "neurolabusc/VolumeRenderingData stroke; MIT",
    "ixi_012_t1, ixi_015_t1": "IXI, brain-development.org; CC BY-SA 3.0",
}
FACES = {"fairface": "FairFace (Karkkainen and Joo 2021), 3,600 of its training images at 64 pixels; CC BY 4.0"}
SHARE_ALIKE = "MIT, except that IXI's share-alike terms (CC BY-SA 3.0) may apply to what derives from it"
# by kind of training data: what it was made from, how, and the licence of the weights
KINDS = {
    "undersampled": (
        BRAINS,
        "k-space simulated from these volumes by recipes/simulate_brains.py, undersampled once at R = 4",
        SHARE_ALIKE,
    ),
    "completed": (
        BRAINS,
        "k-space simulated from these volumes by recipes/simulate_brains.py, undersampled once at R = 4, and completed "
        "by recipes/complete_scans.py from those lines alone",
        SHARE_ALIKE,
    ),
    "full": (BRAINS, "fully sampled k-space simulated from these volumes by recipes/simulate_brains.py", SHARE_ALIKE),
    "photos": (FACES, "pixels averaged to the size of the recipe, then degraded as the recipe says", "MIT"),
}


def kind_of(recipe: dict[str, Any]) -> str:
    """Tell from a recipe what kind of data it trains on: whose licences the weights are under."""
    module, _, name = recipe["data"]["use"].partition(":")
    if module.endswith(".photos"):
        return "photos"
    return {"FullScans": "full", "ReconstructedScans": "completed"}.get(name, "undersampled")


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--note", default=None, help="what else to know about how the stages follow each other")
    parser.add_argument("--kind", choices=KINDS, help="of the training data; told by the recipe without it")
    parser.add_argument("--law", type=json.loads, help="node of the masks' law, where the recipe does not tell it")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    stages = []
    for path in options.runs:
        tensors, header = load_checkpoint(path)
        if "stages" in header:
            stages.extend(header["stages"])
            continue
        recipe = header["recipe"]
        paths = recipe["data"]["path"]
        several = isinstance(paths, list)
        named = [f"data/{Path(path).name}" for path in (paths if several else [paths])]
        recipe["data"] = {**recipe["data"], "path": named if several else named[0]}
        recipe["data"].pop("cache", None)
        if options.law is not None:
            recipe["data"].setdefault("law", options.law)
        if "start" in recipe:
            recipe["start"] = "the stage before"
        stages.append({key: header[key] for key in ("recipe", "step", "cpu_hours", "loss", "msmri") if key in header})
    # the spectrum spans more decades than half precision holds
    small = {name: t if name == "spectrum" or t.ndim < 2 else t.to(torch.float16) for name, t in tensors.items()}
    digest = hashlib.sha256()
    for name in sorted(small):
        digest.update(name.encode() + small[name].contiguous().numpy().tobytes())
    volumes, how, licence = KINDS[options.kind or kind_of(stages[-1]["recipe"])]
    shipped = {
        "format": header["format"],
        "recipe": stages[-1]["recipe"],
        "stages": stages,
        **({"stages_note": options.note} if options.note else {}),
        "data": volumes,
        "data_note": how,
        "weights_licence": licence,
        "tensors_sha256": digest.hexdigest(),
        "purpose": "demonstration; not for clinical use",
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(options.out, small, shipped)
    print(json.dumps({key: shipped[key] for key in ("tensors_sha256", "data")}, indent=2))
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
