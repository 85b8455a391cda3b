"""Complete undersampled scans by one posterior sample of every slice, for training the prior of the next round on them.

    python recipes/complete_scans.py data/upright data/upright_completed
    python recipes/complete_scans.py data/upright data/upright_again --prior runs/brain64_second/last.safetensors

As ``msmri recon --samples 1`` but with all slices of a file at once and coil maps that keep the background. What is
drawn is a sample and not a mean: no correction by the data or by the prior's own estimate follows. Files that are there
are left alone, so that an interrupted run goes on where it stopped, with the same settings; --part 1/2 and --part 2/2
share the work.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from msmri.errors import InputError
from msmri.io.fastmri import list_scans
from msmri.io.output import ReconstructionWriter, environment, sha256, write_manifest
from msmri.methods.msm import MSM
from msmri.model.prior import load_prior, shipped_prior
from msmri.physics.espirit import Espirit
from msmri.physics.masks import slice_seed
from msmri.preparation import Preparation, join, measurements
from msmri.tensors import generators


def share(text: str) -> tuple[int, int]:
    """Read k/n."""
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise InputError(f"--part {text} is no share", mend="give one such as 2/4: the second of four")
    return int(first), int(of)


def main() -> None:
    """Write the files that are missing, and how they were made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", help="undersampled scans, or folders of them")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prior", type=Path, default=None, help="weights; the shipped ones without it")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="k/n: only every n-th file, from the k-th on")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    part, parts = share(options.part)
    weights = options.prior or shipped_prior()
    method = MSM(
        prior=load_prior(weights, device=options.device),
        samples=1,
        steps=options.steps,
        likelihood="none",
        adapt=False,
        conditional_mean=0.0,
        batch=64,
    )
    preparation = Preparation(espirit=Espirit(crop=0.0, phase_reference="image"), sets=1, device=options.device)
    files = list_scans(options.scans)[part - 1 :: parts]
    told = {"prior": sha256(weights), "steps": options.steps, "seed": options.seed}
    for other in sorted(options.out.glob("completed_*.json")):
        before = json.loads(other.read_text("utf-8"))
        if differing := [name for name, value in told.items() if before.get(name) != value]:
            mend = "repeat those settings, or choose another folder"
            raise InputError(f"was made with another {' and '.join(differing)}", mend=mend, path=options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    write_manifest(options.out / f"completed_{part}_of_{parts}.json", {**told, "environment": environment()})
    begun = time.time()
    for number, path in enumerate(files, 1):
        out = options.out / path.name
        if out.exists():
            continue
        slices = measurements(path, preparation)
        if all(bool(one.mask.all()) for one in slices):
            raise InputError("is fully sampled: there is nothing to complete", path=path)
        streams = [generators(slice_seed(one.source[0], options.seed), 1)[0] for one in slices]
        images = method(join(slices), streams).image.cpu()
        size = (images.shape[-2], images.shape[-1])
        with ReconstructionWriter(out, len(images), size, source=path, settings=told) as writer:
            for index, image in enumerate(images):
                writer.write(index, image)
        print(f"{number} of {len(files)} files, {time.time() - begun:.0f} s", end="\r", flush=True)
    print(f"{len(files)} files are in {options.out}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
