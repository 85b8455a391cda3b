"""Ask what more masks a step (w) and more steps buy in generation: quality of samples, and seconds.

    python benchmarks/what_does_w_buy.py FULLY_SAMPLED_SCANS --markdown docs/results_generation.md

Samples of a prior are compared, by the Frechet distance on fixed scattering features, with coil-combined images of
fully sampled scans: of people like those trained on, which is what a prior should draw, and with --unseen of people it
has not seen. What a distance means is told by anchors: the references' other half, the references with random phases in
k-space (noise of the very same spectrum), and, with --oracle, plain diffusion with a prior of clean images. --other
names a second prior of the same data, --denser masks that show more lines than those trained on, --extrapolate how
far estimates are carried beyond those of halves of their masks (three passes a mask), all for one number of masks.
--second and --joint are priors of all lines at once, as --oracle is, that learned from reconstructions of undersampled
scans, with the network of --oracle and with that of --prior. With --against the distance to so many samples of --oracle
is told, too. With --inception, FID and KID as well. Interrupted, the same command goes on: every cell is written to the
JSON as it comes, and its images to --work. A cell of the published JSON stands, too, though its images are gone: the
few that the sheet shows are drawn again, and where its prior is not given now, none. A full run: --size 128
--count 3000 --steps 10 20 50 200.
"""

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msmri.distances import Distance, frechet_distance, inception_distances, scattering_features
from msmri.io.fastmri import list_scans, open_scan
from msmri.io.output import atomic, environment, fingerprint, sha256, write_manifest
from msmri.io.samples import image_sheet
from msmri.methods import combine_sets
from msmri.methods.generation import HIGHEST, Generation
from msmri.model.prior import load_prior, shipped_prior
from msmri.physics.espirit import Espirit
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.masks import MSM_CENTRE_FRACTION, RandomLines
from msmri.physics.operators import CoilFourier
from msmri.physics.simulate import coil_maps, crop_kspace
from msmri.report import line_plot, markdown_table
from msmri.tensors import generators, spawn

HERE = Path(__file__).parent
SHOWN = 2  # images of a cell in the sheet
FRESH = 10_000  # seeds of samples taken as references, beyond those of the cells
AGAINST = "distance to samples of the clean-image prior"


def references(paths: list[str], size: int, slices: int | None) -> tuple[Tensor, list[str]]:
    """Combine the coils of fully sampled slices, widen them to squares and resample to (n, size, size)."""
    images, names = [], []
    for path in list_scans(paths):
        with open_scan(path) as scan:
            for index in range(scan.n_slices)[:slices]:
                one = scan.read(index)
                if not bool(one.mask.all()):
                    raise SystemExit(f"{path} is undersampled: references must be fully sampled")
                maps = Espirit(crop=0.0)(one.values, one.mask)  # the background stays, as in samples
                image = combine_sets(CoilFourier(maps).adjoint(one.values))
                side = max(size, *image.shape[-2:])
                margins = [side - n for n in image.shape[-2:]]
                square = torch.nn.functional.pad(
                    image,
                    (margins[1] // 2, margins[1] - margins[1] // 2, margins[0] // 2, margins[0] - margins[0] // 2),
                )
                images.append(crop_kspace(square, (size, size)).abs())
                names.append(f"{path.name}#{index}")
    return torch.cat(images), names


def scrambled(images: Tensor, seed: int) -> Tensor:
    """Give every place of k-space a random phase: clouds of the same spectrum."""
    kspace = fft2c(images.to(torch.complex64))
    turn = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    return ifft2c(kspace.abs() * torch.polar(torch.ones_like(turn), 2 * torch.pi * turn)).abs()


def imbalance(features: Tensor) -> float:
    """Mean log ratio of fine waves along x, where lines are left out, to those along y: line artefacts."""
    return float((features[:, [0, 4]] - features[:, [2, 6]]).mean())


def judged(distance: Distance, features: Tensor) -> dict[str, Any]:
    return {
        "distance": distance.value,
        "means": distance.means,
        "floor": distance.floor,
        "excess": distance.excess,
        "shrinkage": distance.shrinkage,
        "images": distance.counts[1],
        "imbalance": imbalance(features),
    }


def kept(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Read the images of a cell, if they are there."""
    if not path.exists():
        return None
    images = torch.load(path, weights_only=True).float()
    return images if images.shape == shape else None


def draw(method: Generation, options: argparse.Namespace, count: int) -> Tensor:
    """Draw the first ``count`` magnitude images, every one through simulated coils of its own."""
    shape = (options.size, options.size)
    images = []
    for first in range(0, count, method.batch):
        streams = generators(options.seed, min(method.batch, count - first), first=first)
        # the coils of a sample are its own and the same in all cells, and so is its noise
        maps = torch.cat([coil_maps(shape, options.coils, *spawn(stream, 1)) for stream in streams])
        encoding = CoilFourier(maps.to(options.device))
        images.append(method(encoding, (1, *shape), streams, device=options.device)[:, 0].abs().cpu())
    return torch.cat(images)


def main() -> None:
    """Run what is missing and write the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", help="fully sampled scans, or folders of them")
    parser.add_argument("--slices", type=int, default=None, help="only so many of each scan")
    parser.add_argument("--prior", type=Path, default=None)
    parser.add_argument("--unseen", nargs="*", default=[], help="fully sampled scans of people not trained on")
    parser.add_argument("--other", type=Path, default=None, help="a second prior of undersampled data")
    parser.add_argument("--denser", nargs="*", type=float, default=[], help="draw by masks of these R besides")
    parser.add_argument("--extrapolate", nargs="*", type=float, default=[], help="draw with these g besides")
    parser.add_argument("--besides", type=int, default=2, help="masks a step of --other, --denser and --extrapolate")
    parser.add_argument("--note", default="", help="what a reader of the page should know about this run")
    parser.add_argument("--oracle", type=Path, default=None, help="a prior of clean images, for plain diffusion")
    parser.add_argument(
        "--against", type=int, default=0, help="samples of --oracle, at 50 steps, as further references"
    )
    parser.add_argument("--second", type=Path, default=None, help="a prior of reconstructions, for plain diffusion")
    parser.add_argument("--joint", type=Path, default=None, help="the same with the network of --prior")
    parser.add_argument("--masks", nargs="*", type=int, default=[1, 2, 3, 4, 8])
    parser.add_argument("--steps", nargs="*", type=int, default=[10, 20, 50])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--coils", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--acceleration", type=float, default=4.0)
    parser.add_argument("--centre", type=float, default=MSM_CENTRE_FRACTION, help="share of columns in every mask")
    parser.add_argument("--aggregate", default="parallel")
    parser.add_argument("--independent", action="store_true", help="masks drawn independently, as published")
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--sigma-max", type=float, default=None)
    parser.add_argument("--inception", type=Path, default=None, help="Inception's weights, for FID and KID")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/what_does_w_buy"), help="the images drawn")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "what_does_w_buy.json")
    options = parser.parse_args()

    targets, names = references(options.scans, options.size, options.slices)
    files: dict[str, Path] = {"prior": options.prior or shipped_prior().with_name("brain64_msm.safetensors")}
    whole = {"oracle": options.oracle, "second": options.second, "joint": options.joint}  # drawn from all lines at once
    files |= {name: path for name, path in {**whole, "other": options.other}.items() if path is not None}
    told = ("size", "count", "coils", "acceleration", "centre", "aggregate", "independent", "eta", "sigma_max", "seed")
    settings = {name: getattr(options, name) for name in told}
    sums = {name: sha256(path) for name, path in files.items()}
    settings |= {"sha256": {"prior": sums["prior"]}, "references": names}  # other priors may come later
    work = options.work / f"{abs(hash_of(settings)):012x}"
    features = scattering_features(targets)
    unseen = None
    if options.unseen:
        unseen = scattering_features(references(options.unseen, options.size, options.slices)[0])
    rng = torch.Generator().manual_seed(options.seed)
    anchors = {
        "one half of the references against the other": frechet_distance(features[::2], features[1::2], rng=rng),
        "references with random phases in k-space": frechet_distance(
            features, scattering_features(scrambled(targets, options.seed)), rng=rng
        ),
    }
    if unseen is not None:
        anchors["people not trained on"] = frechet_distance(features, unseen, rng=rng)
    record: dict[str, Any] = {
        "environment": environment(),
        "settings": settings,
        "imbalance of references": imbalance(features),
        "anchors": {name: {"distance": d.value, "floor": d.floor} for name, d in anchors.items()},
        "cells": {},
    }
    cells = [(f"w={w} steps={n}", {"masks_per_step": w, "steps": n}) for n in options.steps for w in options.masks]
    plain: dict[str, Any] = {"masks_per_step": 1, "law": RandomLines(1.0), "covering": False}
    for name in [name for name in whole if name in files]:
        cells += [(f"{name} steps={n}", {**plain, "prior": name, "steps": n}) for n in options.steps]
    if options.other is not None:
        second = {"masks_per_step": options.besides, "prior": "other"}
        cells += [(f"other w={options.besides} steps={n}", {**second, "steps": n}) for n in options.steps]
    for dense in options.denser:
        more = {"masks_per_step": options.besides, "law": RandomLines(dense, centre_fraction=options.centre)}
        cells += [(f"R={dense:g} w={options.besides} steps={n}", {**more, "steps": n}) for n in options.steps]
    for g in options.extrapolate:
        carried = {"masks_per_step": options.besides, "extrapolate": g}
        cells += [(f"g={g:g} w={options.besides} steps={n}", {**carried, "steps": n}) for n in options.steps]
    if options.out.exists():
        before = json.loads(options.out.read_text("utf-8"))
        same = all(  # the scans themselves, and not their names alone
            math.isclose(one["distance"], before.get("anchors", {}).get(name, one)["distance"], rel_tol=1e-3)
            for name, one in record["anchors"].items()
        )
        if same and fingerprint(before.get("settings", {})) == fingerprint(settings):
            record["cells"] = before["cells"]
            record["anchors"] = before["anchors"] | record["anchors"]
            record |= {"against": before["against"]} if "against" in before else {}
    loaded: dict[str, Any] = {}
    common = {
        "law": RandomLines(options.acceleration, centre_fraction=options.centre),
        "aggregate": options.aggregate,
        "covering": not options.independent,
        "eta": options.eta,
        "sigma_max": options.sigma_max,
        "batch": options.batch,
    }
    drawn: dict[str, Tensor] = {}
    clean = None
    if options.against and options.oracle is not None:
        shape = (options.against, options.size, options.size)
        path = work / f"against_{options.against}_{sums['oracle'][:8]}.pt"
        images = kept(path, shape)
        if images is None:
            loaded["oracle"] = load_prior(files["oracle"], device=options.device)
            method = Generation(**{**common, **plain, "steps": 50, "prior": loaded["oracle"]})
            images = draw(
                method, argparse.Namespace(**{**vars(options), "seed": options.seed + FRESH}), options.against
            )
            with atomic(path) as part:
                torch.save(images.half(), part)
        clean = scattering_features(images.half().float())
        record["against"] = {"count": options.against, "steps": 50, "sha256": sums["oracle"]}
        found = frechet_distance(features, clean, rng=rng)
        record["anchors"]["samples of the clean-image prior"] = {"distance": found.value, "floor": found.floor}
    for name, changes in cells:
        which = changes.get("prior", "prior")
        path = work / f"{name.replace(' ', '_')}_{sums[which][:8]}.pt"
        images = kept(path, (options.count, options.size, options.size))
        row = record["cells"].get(name, {})
        row = row if row.get("prior_sha256") == sums[which] else {"prior_sha256": sums[which]}
        done = "distance" in row and (options.inception is None or "fid" in row)
        if images is None:
            if which not in loaded:
                loaded[which] = load_prior(files[which], device=options.device)
            method = Generation(**{**common, **changes, "prior": loaded[which]})
            begun = time.perf_counter()
            images = draw(method, options, min(SHOWN, options.count) if done else options.count)
            if not done:
                row = {"prior_sha256": sums[which]}
                row["seconds an image"] = (time.perf_counter() - begun) / options.count
                row["commit"] = record["environment"].get("commit")
                with atomic(path) as part:
                    torch.save(images.half(), part)
            images = images.half().float()
        drawn[name] = images
        compared = clean is not None and len(images) == options.count and row.get("against") != sums["oracle"]
        if "distance" not in row or compared:
            found = scattering_features(images)
        if "distance" not in row:
            row |= judged(frechet_distance(features, found, rng=rng), found)
            if unseen is not None:
                row["distance to people not trained on"] = frechet_distance(unseen, found, rng=rng).value
        if compared:
            row[AGAINST] = frechet_distance(clean, found, rng=rng).value
            row["against"] = sums["oracle"]
        if options.inception is not None and "fid" not in row:
            row |= inception_distances(targets, images, weights=options.inception, device=options.device)
        record["cells"][name] = row
        write_manifest(options.out, record)
        print(
            f"{name:20s} distance {row['distance']:.2f}  {row.get('seconds an image', float('nan')):.1f} s", flush=True
        )
    if options.markdown:
        write_page(options, record, drawn, targets)


def hash_of(settings: dict[str, Any]) -> int:
    """Name the folder of a run's images."""
    import zlib

    return zlib.crc32(fingerprint(settings).encode())


def in_words(record: dict[str, Any], masks: list[int], steps: list[int]) -> str:
    """Say what the distances say: with more masks, with more steps, and against the other priors."""
    cells, lines, passes = record["cells"], [], {}
    for n in steps:
        found = [cells[f"w={w} steps={n}"]["distance"] for w in masks]
        falls = sum(after < before for before, after in pairwise(found))
        text = f"{n} steps, w = {', '.join(map(str, masks))}: {' -> '.join(f'{d:.2f}' for d in found)}"
        text += f"; falls {falls} of {len(found) - 1} times, least at w = {masks[found.index(min(found))]}."
        for name, row in cells.items():
            if not name.startswith("w=") and name.endswith(f" steps={n}"):
                first, masks_, *_ = name.split()
                who = {
                    "oracle": "Clean-image diffusion",
                    "second": "Diffusion of reconstructions",
                    "joint": "The first prior's network on reconstructions",
                    "other": f"The second prior, {masks_}",
                }.get(first)
                carried = (
                    f"Extrapolated with {first}, {masks_}, three passes a mask" if first.startswith("g=") else None
                )
                text += f" {who or carried or f'Masks of {first}, {masks_}'}: {row['distance']:.2f}."
        lines.append(text)
        for w, distance in zip(masks, found):
            passes.setdefault(w * n, []).append((distance, f"{n} x {w}"))
    for count, several in sorted(passes.items()):
        if len(several) > 1:
            text = ", ".join(f"{name}: {distance:.2f}" for distance, name in sorted(several))
            lines.append(f"{count} network passes an image, as steps x masks: {text}.")
    return "".join(f"- {line}\n" for line in lines)


def spelled(name: str) -> str:
    """Say what cells beside those of the prior were drawn from."""
    kind = name.split()[0]
    if kind.startswith("g="):
        return f"estimates extrapolated with g = {kind[2:]}"
    known = {
        "oracle": "the clean-image prior",
        "second": "the prior of reconstructions",
        "joint": "the first prior's network on reconstructions",
        "other": "the second prior",
    }
    return known.get(kind, kind.replace("R=", "masks of R = "))


def write_page(options: argparse.Namespace, record: dict[str, Any], drawn: dict[str, Tensor], targets: Tensor) -> None:
    """Write tables, curves and sheets."""
    folder = options.markdown.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    cells, settings = record["cells"], record["settings"]

    def table(key: str, form: str) -> str:
        rows = [
            {"w": w, **{f"{n} steps": cells[f"w={w} steps={n}"].get(key) for n in options.steps}} for w in options.masks
        ]
        return markdown_table(rows, {"w": "", **{f"{n} steps": form for n in options.steps}})

    def series(x: str) -> dict[str, list[tuple[float, ...]]]:
        found: dict[str, list[tuple[float, ...]]] = {}
        for n in options.steps:
            points = [(w if x == "w" else w * n, cells[f"w={w} steps={n}"]["distance"]) for w in options.masks]
            found[f"{n} steps"] = points
        return found

    label = "Frechet distance (scattering)"
    line_plot(folder / "generation_w.png", series("w"), x_label="masks a step, w", y_label=label)
    line_plot(
        folder / "generation_passes.png", series("passes"), x_label="network passes an image", y_label=label, log_x=True
    )
    shown = min(SHOWN, options.count)
    rows = [torch.cat([drawn[f"w={w} steps={n}"][:shown] for n in options.steps]) for w in options.masks]
    besides = list(dict.fromkeys(cell.rpartition(" ")[0] for cell in cells if not cell.startswith("w=")))
    besides = [name for name in besides if all(f"{name} steps={n}" in drawn for n in options.steps)]
    rows += [torch.cat([drawn[f"{name} steps={n}"][:shown] for n in options.steps]) for name in besides]
    rows.append(targets[torch.arange(shown * len(options.steps)) * len(targets) // (shown * len(options.steps))])
    image_sheet(folder / "generation_sheet.png", torch.cat(rows), columns=shown * len(options.steps))
    anchors = [
        {"images": name, "distance": a["distance"], "floor of such sets": a["floor"]}
        for name, a in record["anchors"].items()
    ]
    anchors += [
        {"images": name, "distance": row["distance"], "floor of such sets": row["floor"], AGAINST: row.get(AGAINST)}
        for name, row in cells.items()
        if not name.startswith("w=")
    ]
    inception = "".join(
        f"{name}, masks w down, steps across:\n\n{table(key, form)}\n"
        for name, key, form in (("FID (Inception)", "fid", ".1f"), ("KID (Inception)", "kid", ".4f"))
        if all(key in row for row in cells.values())
    )
    apart = "".join(
        f"To {key[12:]}:\n\n{table(key, '.2f')}\n"
        for key in ("distance to people not trained on", AGAINST)
        if any(key in cells[f"w={w} steps={n}"] for w in options.masks for n in options.steps)
    )
    columns = {"images": "", "distance": ".2f", "floor of such sets": ".2f"}
    columns |= {AGAINST: ".2f"} if any(AGAINST in row for row in cells.values()) else {}
    others = "".join(f"; then {spelled(name)}" for name in besides)
    steps = ", ".join(map(str, options.steps))
    note = f" {options.note}" if options.note else ""
    said = in_words(record, options.masks, options.steps)
    options.markdown.write_text(
        "# What do more masks a step buy in generation?\n\nWritten by `benchmarks/what_does_w_buy.py`; do not edit by "
        f"hand. {settings['count']} samples a cell at {settings['size']} x {settings['size']} through "
        f"{settings['coils']} simulated coils, {settings['aggregate']} aggregation, nominal R "
        f"{settings['acceleration']:g} with {settings['centre']:.1%} centre, masks "
        f"{'independent' if settings['independent'] else 'dealt out'}, eta {settings['eta']:g}, noise from "
        f"{settings['sigma_max'] or HIGHEST:g}, seed {settings['seed']}, prior SHA-256 "
        f"`{settings['sha256']['prior'][:16]}`, commit `{record['environment'].get('commit')}`. References: "
        f"{len(settings['references'])} coil-combined slices of fully sampled scans.{note}"
        f"\n\n## In words\n\n{said}\n## Distances\n\nFrechet distance on scattering features (see "
        f"`msmri/distances.py`; lower is better), masks w down, steps across:\n\n{table('distance', '.2f')}\n{apart}"
        "Floor: the mean distance of two such sets of one "
        f"law:\n\n{table('floor', '.2f')}\nWhat such distances mean:\n\n"
        f"{markdown_table(anchors, columns)}\n"
        f"Seconds an image:\n\n{table('seconds an image', '.1f')}\nArtefacts of lines: mean log ratio of fine waves "
        f"along the undersampled axis to those across; {record['imbalance of references']:+.2f} in the references:\n\n"
        f"{table('imbalance', '+.2f')}\n{inception}"
        "![Distance against w](images/generation_w.png)\n\n"
        "![Distance against network passes](images/generation_passes.png)\n\n"
        f"Samples: a row each for w = {', '.join(map(str, options.masks))}, from left to right {steps} steps "
        f"({shown} samples each, the same seeds in all cells){others}; the last row shows references.\n\n"
        "![Samples](images/generation_sheet.png)\n",
        "utf-8",
    )


if __name__ == "__main__":
    main()
