"""Ask why faces drawn by MSM are grainy: errors by noise level, which levels make the grain, and what mends it.

    python benchmarks/why_are_msm_faces_grainy.py --fairface fairface_64.npz --markdown docs/results_faces_grain.md

First whole held-out faces under noise are estimated by the priors of ``faces.py``, as their samplers call them and in
other ways: how far from the oracle, and in which part of the spectrum. Then faces are drawn by one prior above a noise
level and by another below it. Then by other settings of the sampler, and by MSM priors that went on training: on low
noise levels alone (--low), and as before (--more). Every distance is to *training* faces, so that settings can be
chosen here and reported by ``faces.py`` on held-out ones. Errors and drawn faces are kept in --work: a run goes on
where it was stopped. --quick needs no data.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msmri.distances import frechet_distance, scattering_features
from msmri.io.output import atomic, environment, sha256, write_manifest
from msmri.io.photos import read_photos
from msmri.io.restored import photo_sheet
from msmri.model.checkpoint import load_checkpoint
from msmri.model.denoiser import VPSchedule
from msmri.model.prior import load_prior
from msmri.physics.masks import covering
from msmri.physics.operators import Identity
from msmri.report import markdown_table
from msmri.sampling.aggregate import aggregate
from msmri.sampling.reverse import Step, reverse_diffusion
from msmri.sampling.schedule import ancestral, karras
from msmri.tensors import Rng, generators, normal_like

SHIPPED = Path(str(files("msmri"))) / "weights"
LEVELS = (10.0, 3.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
BANDS = {"below 2": (0.0, 2.0), "2 to 5": (2.0, 5.0), "5 to 10": (5.0, 10.0), "above 10": (10.0, math.inf)}
MANY = 16  # masks of what stands for all masks
TRAINED = (0.03, 0.5)  # noise levels whose share of the training is told
SWITCHES = (1.0, 0.3, 0.1, 0.03)


@dataclass(frozen=True)
class Way:
    """How faces are drawn."""

    estimate: str  # as in ``Estimates``, at all levels but those of ``lower``
    lower: str = ""  # what estimates at noise levels below ``switch``
    switch: float = 0.0
    high: float = 40.0  # first noise level; 40 is where the training of MSM begins
    low: float = 0.01  # last noise level
    finer: float = 1.0  # times --steps
    eta: float = 1.0  # share of fresh noise, times that of the size of the step


WAYS: dict[str, Way] = {
    "oracle": Way("oracle"),
    "oracle, from 10": Way("oracle", high=10.0),
    "ambient": Way("ambient", high=10.0),
    "ambient, everything shown": Way("ambient, all shown", high=10.0),
    "ambient, until 0.05": Way("ambient", low=0.05, high=10.0),
    "ambient, no fresh noise": Way("ambient", eta=0.0, high=10.0),
    "msm": Way("msm, 3 masks"),
    "msm, 3 covering masks": Way("msm, 3 covering"),
    "msm, 8 covering masks": Way("msm, 8 covering"),
    "msm, 8 covering masks below 0.3": Way("msm, 3 masks", "msm, 8 covering", 0.3),
    "msm, everything shown": Way("msm, all shown"),
    "msm, from 10": Way("msm, 3 masks", high=10.0),
    "msm, until 0.05": Way("msm, 3 masks", low=0.05),
    "msm, until 0.1": Way("msm, 3 masks", low=0.1),
    "msm, no fresh noise": Way("msm, 3 masks", eta=0.0),
    "msm, twice the steps": Way("msm, 3 masks", finer=2.0),
    "msm from noise": Way("noisy, 3 masks"),
    "msm, more training on low noise used below 0.5": Way("msm, 3 masks", "low, 3 masks", 0.5),
    "msm, more training on all levels used below 0.5": Way("msm, 3 masks", "more, 3 masks", 0.5),
}
for _at in SWITCHES:
    WAYS[f"msm above {_at:g}, oracle below"] = Way("msm, 3 masks", "oracle", _at, high=10.0)
    WAYS[f"oracle above {_at:g}, msm below"] = Way("oracle", "msm, 3 masks", _at, high=10.0)
COMPARED = ("oracle", "ambient", "ambient, all shown", "msm, 1 mask", "msm, 3 masks", "msm, 8 masks", "msm, many masks",
            "msm, all shown", "noisy, 3 masks", "low, 3 masks")  # fmt: skip


class Estimates:
    """The ways to estimate a clean face from a noisy one, by name: ``PRIOR, HOW``."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self.paths = {name: path for name, path in paths.items() if path.exists()}
        self.prior: Callable[[str], Any] = cache(lambda name: load_prior(self.paths[name]))

    def known(self, name: str) -> bool:
        """Tell whether the prior's weights are there."""
        return name.split(",")[0] in self.paths

    def seen(self, name: str, rng: Rng, size: int) -> Tensor:
        """Draw the masks (w, n, 1, y, x) through which an estimate looks once."""
        which, _, how = name.partition(", ")
        if which == "oracle" or how == "all shown":
            return torch.ones(1, len(rng), 1, size, size, dtype=torch.bool)
        prior, matrix = self.prior(which), (size, size)
        if which == "ambient":
            return torch.stack([prior.further(prior.law.draw(matrix, one), one) for one in rng])[None]
        count, kind = how.split()
        number = MANY if count == "many" else int(count)
        if kind == "covering":
            return torch.stack([covering(prior.law, matrix, number, one) for one in rng], 1)
        return torch.stack([torch.stack([prior.law.draw(matrix, one) for _ in range(number)]) for one in rng], 1)

    @torch.inference_mode()
    def __call__(self, name: str, step: Step, masks: Tensor) -> Tensor:
        """Estimate; places that no mask of MSM reaches keep ``step.estimate``."""
        which, prior, sigma = name.split(",")[0], self.prior(name.split(",")[0]), float(step.sigma)
        if which == "oracle":
            return prior.denoise(step.state, sigma)
        if which == "ambient":
            return prior(torch.where(masks[0], step.state, 0.0), masks[0], sigma, Identity())
        total = torch.zeros_like(step.state)
        for few in masks.split(8):  # many masks would need much memory at once
            found = aggregate(
                prior, step._replace(estimate=total * 0), few, Identity(), torch.tensor(sigma).reshape(1, 1, 1, 1)
            )
            total = total + few.sum(0) * found
        count = masks.sum(0)
        return torch.where(count > 0, total / count.clamp_min(1), step.estimate)


def spectrum(images: Tensor) -> Tensor:
    """Give the mean power of images (n, c, y, x) in every band of frequencies, in cycles a picture."""
    power = torch.fft.fft2(images, norm="ortho").abs().square().mean((0, 1))
    fy, fx = (torch.fft.fftfreq(n) * n for n in images.shape[-2:])
    radius = torch.hypot(fy[:, None], fx[None])
    return torch.stack([power[(radius >= low) & (radius < high)].mean() for low, high in BANDS.values()])


def errors(faces: Tensor, estimates: Estimates, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Estimate faces (n, 3, y, x) under noise; give every mean square error with its excess over the oracle's."""
    compared = {name.split(",")[0] for name in COMPARED}
    digests = "-".join(sha256(path)[:8] for name, path in estimates.paths.items() if name in compared)
    path = options.work / f"errors-{digests}-{len(faces)}-{MANY}-{options.seed}-{options.size}.json"
    if path.exists() and not options.fresh:
        return json.loads(path.read_text("utf-8"))["rows"]
    rows: list[dict[str, Any]] = []
    for sigma in LEVELS:
        rng = generators(options.seed, len(faces))
        noisy = faces + sigma * normal_like(faces, rng)
        step = Step(noisy, torch.zeros_like(noisy), torch.tensor(sigma))
        full = {}
        for which in ("msm", "noisy", "low"):  # what a sampler would hold where no mask of this step looks
            if estimates.known(which):
                name = f"{which}, many masks"
                full[which] = estimates(name, step, estimates.seen(name, rng, faces.shape[-1]))
        truth: tuple[float, Tensor] | None = None
        for name in filter(estimates.known, COMPARED):
            masks = estimates.seen(name, rng, faces.shape[-1])
            held = step._replace(estimate=full.get(name.split(",")[0], step.estimate))
            rest = estimates(name, held, masks) - faces
            error, bands = float(rest.square().mean()), spectrum(rest)
            truth = (error, bands) if truth is None else truth  # the oracle comes first
            reached = masks.any(0).expand_as(rest)
            excess = (error - truth[0]) / sigma**2
            row = {"sigma": sigma, "estimate": name, "error": error, "dB": 10 * math.log10(error / truth[0])}
            row |= {"excess_over_noise_power": excess, "error_where_seen": float(rest[reached].square().mean())}
            row |= {f"dB {band}": float(value) for band, value in zip(BANDS, 10 * (bands / truth[1]).log10())}
            rows.append(row)
        print(f"sigma {sigma:g}", *(f"{row['estimate']} {row['dB']:+.2f}" for row in rows[-9:]), sep=", ", flush=True)
    write_manifest(path, {"rows": rows})
    return rows


def draw(way: Way, estimates: Estimates, rng: Rng, size: int, steps: int) -> Tensor:
    """Draw faces (n, 3, y, x) in one way."""
    sigmas = karras(way.high, way.low, max(2, round(steps * way.finer)))
    start = torch.zeros(len(rng), 3, size, size)
    fixed = {"ambient": estimates.seen("ambient", rng, size)} if way.estimate == "ambient" else {}

    def estimate(step: Step) -> Tensor:
        name = way.lower if way.lower and float(step.sigma) < way.switch else way.estimate
        masks = fixed[name] if name in fixed else estimates.seen(name, rng, size)
        return estimates(name, step, masks)

    start = float(sigmas[0]) * normal_like(start, rng)
    *_, last = reverse_diffusion(estimate, start, sigmas, rng=rng, eta=ancestral(sigmas, way.eta))
    return last.estimate


def kept_faces(name: str, way: Way, estimates: Estimates, options: argparse.Namespace) -> Tensor:
    """Draw faces, or take those of an earlier run."""
    used = {part.split(",")[0] for part in (way.estimate, way.lower) if part}
    digests = "-".join(sha256(estimates.paths[which])[:8] for which in sorted(used))
    plain = "".join(letter if letter.isalnum() else "_" for letter in name)
    path = options.work / f"{plain}-{digests}-{options.draws}-{options.steps}-{options.seed}-{options.size}.pt"
    if path.exists() and not options.fresh:
        return torch.load(path, weights_only=True)
    groups = []
    for first in range(0, options.draws, 32):
        rng = generators(options.seed, min(32, options.draws - first), first=first)
        groups.append(draw(way, estimates, rng, options.size, options.steps))
    images = torch.cat(groups).clamp(-1, 1)
    with atomic(path) as part:
        torch.save(images, part)
    return images


def judge(reference: Tensor, images: Tensor) -> dict[str, float]:
    """Tell how far drawn faces are from others, and how much of their texture is not drawn into edges."""
    features, own = scattering_features((reference + 1) / 2), scattering_features((images + 1) / 2)
    apart = own.mean(0) - features.mean(0)
    power = 10 * (spectrum(images) / spectrum(reference)).log10()
    # moduli of the finest moduli over those: low for noise, high for edges
    row = {"distance": frechet_distance(features, own).value, "edges_for_texture": float(apart[16:28].mean())}
    return row | {"fine_power_dB": float(power[-1])}


def training_share(path: Path) -> dict[str, float]:
    """Tell from the recipe of weights what share of the training was at the noise levels of ``TRAINED``."""
    recipe = load_checkpoint(path)[1]["recipe"]
    loss = recipe["loss"]
    if loss.get("sigma_mean") is None and ("sigma_max" in loss or "MSM" in str(loss.get("use"))):
        low, high = (float(loss.get(key, other)) for key, other in (("sigma_min", 0.01), ("sigma_max", 157.0)))
        steps = [float(VPSchedule().t(torch.tensor(level, dtype=torch.float64))) for level in (low, high, *TRAINED)]
        share = (min(steps[3], steps[1]) - max(steps[2], steps[0])) / (steps[1] - steps[0])
    else:
        normal = torch.distributions.Normal(loss.get("sigma_mean", -1.2), loss.get("sigma_spread", 1.2))
        ends = normal.cdf(torch.tensor(TRAINED).log())
        share = float(ends[1] - ends[0])
    pixels = 10 / 16 if "law" in recipe["data"] else 1.0  # RandomTiles drops 6 of 16
    return {"share": share, "pixels": pixels, "share_of_values": share * pixels}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fairface", type=Path, default=None, help="npz with a split")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder of faces_*.safetensors")
    parser.add_argument("--low", type=Path, default=Path("none"), help="MSM weights that went on with low noise alone")
    parser.add_argument("--more", type=Path, default=Path("none"), help="MSM weights that went on as before as long")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--faces", type=int, default=48, help="held-out faces put under noise")
    parser.add_argument("--draws", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--shown", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/faces_grain"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "faces_grain.json")
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    if options.quick:
        options.faces, options.draws, options.steps, options.shown = 2, 4, 2, 2
    elif options.fairface is None:
        parser.error("give --fairface, or --quick")
    return options


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw error over the oracle's against noise level: the whole, and the finest band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for number, name in enumerate(dict.fromkeys(row["estimate"] for row in rows)):
        own = [row for row in rows if row["estimate"] == name]
        for axis, key in zip(axes, ("dB", f"dB {list(BANDS)[-1]}")):
            axis.plot(
                [row["sigma"] for row in own], [row[key] for row in own], label=name, ls="-" if number < 7 else "--"
            )
    for axis, title in zip(axes, ("whole error", "above 10 cycles a picture")):
        axis.set(xscale="log", xlabel="noise level", ylabel="dB over the oracle's error", title=title, ylim=(-0.25, 3))
    axes[1].legend(fontsize=7)
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=90)


def words(record: dict[str, Any]) -> list[str]:
    """Say what the numbers say."""
    said = []
    drawn = {row["way"]: row["distance"] for row in record["drawn"]}

    def largest(name: str, key: str) -> str | None:
        own = [row for row in record["errors"] if row["estimate"] == name]
        worst = max(own, key=lambda row: row[key], default=None)
        return None if worst is None else f"{worst[key]:+.1f} dB at {worst['sigma']:g}"

    for name in ("msm, 3 masks", "msm, many masks", "ambient"):
        if (found := largest(name, "dB")) is not None:
            said.append(f"Error over the oracle's, {name}: largest {found}.")
    for at in SWITCHES:
        pair = [drawn.get(f"{a} above {at:g}, {b} below") for a, b in (("msm", "oracle"), ("oracle", "msm"))]
        if pair[0] is not None and pair[1] is not None:
            text = f"MSM above {at:g} and the oracle below: distance {pair[0]:.2f}; the other way round: {pair[1]:.2f}."
            said.append(f"{text} More is made {'below' if pair[1] > pair[0] else 'above'} that level.")
    share = record["training"]
    if "msm" in share and "oracle" in share:
        said.append(
            f"Noise levels {TRAINED[0]:g} to {TRAINED[1]:g} are {100 * share['msm']['share']:.0f} % of what MSM was "
            f"trained on, of {share['msm']['pixels']:g} of the pixels; {100 * share['oracle']['share']:.0f} % of what "
            f"the oracle was, of all: {share['oracle']['share_of_values'] / share['msm']['share_of_values']:.1f} times "
            "as many values at equal steps."
        )
    for prefix in ("msm", "ambient"):
        own = {name: value for name, value in drawn.items() if name.startswith(prefix) and "oracle" not in name}
        if prefix in own and len(own) > 1:
            best = min(own, key=lambda name: own[name])
            said.append(
                f"{prefix}: as in the comparison {own[prefix]:.2f}; nearest of {len(own)}, '{best}': {own[best]:.2f}."
            )
    order = sorted({"oracle", "msm", "ambient"} & drawn.keys(), key=lambda name: drawn[name])
    said.append(f"Order as compared, nearest first: {', '.join(order)}.")
    both = [drawn.get(f"msm, more training on {kind} used below 0.5") for kind in ("low noise", "all levels")]
    if both[0] is not None and both[1] is not None:
        said.append(
            f"Trained on, and used below 0.5: {both[0]:.2f} after low noise alone, {both[1]:.2f} after all levels."
        )
    return said


def page(record: dict[str, Any], figures: list[Path], options: argparse.Namespace) -> str:
    """Write the page."""
    root = options.markdown.parent if options.markdown else Path()
    shown = "\n\n".join(f"![{path.stem}]({os.path.relpath(path, root)})" for path in figures)
    columns = {"sigma": "g", "estimate": "", "dB": "+.2f", "excess_over_noise_power": ".4f", "error_where_seen": ".2e"}
    columns |= {f"dB {band}": "+.2f" for band in BANDS}
    drawn = {"way": "", "distance": ".2f", "edges_for_texture": "+.2f", "fine_power_dB": "+.1f"}
    shares = [{"prior": name, **values} for name, values in record["training"].items()]
    trained = {"prior": "", "share": ".2f", "pixels": ".3f", "share_of_values": ".2f"}
    said = "\n".join(f"- {line}" for line in words(record))
    return (
        "# Grain of drawn faces\n\nWritten by `benchmarks/why_are_msm_faces_grainy.py`; do not edit by hand. "
        f"Seed {options.seed}, `{json.dumps(record['environment'])}`.\n\n## In words\n\n{said}\n\n"
        f"## Errors by noise level\n\n{options.faces} held-out faces. dB: mean square error over the oracle's, then in "
        "bands of frequencies, in cycles a picture. Excess over noise power: what the error is above the oracle's, by "
        "the square of the noise level; its integral over the logarithm of that, times the number of values, bounds "
        "how far drawn faces diverge from real ones (Girsanov; the oracle stands for the best estimate). Places "
        f"that no mask of MSM reaches keep its estimate from {MANY} masks. Ambient sees one mask, as when it draws.\n\n"
        f"{markdown_table(record['errors'], columns)}\n## Drawn faces\n\nFrechet distance on scattering features of "
        f"{options.draws} drawn faces to 400 *training* faces, {options.steps} steps. Edges for texture: second-order "
        "scattering of the finest scale less that of real faces; the lower, the more of the fine structure is "
        "noise. Fine power: above 10 cycles a picture, over that of real faces. 'A above L, B below': A estimates at "
        "noise levels above L.\n\n"
        f"{markdown_table(record['drawn'], drawn)}\n## Training\n\nShare of the training at noise levels "
        f"{TRAINED[0]:g} to {TRAINED[1]:g}, by the recipe in the weights.\n\n{markdown_table(shares, trained)}\n"
        f"## Pictures\n\n{shown}\n"
    )


def main() -> None:
    """Run, resume, and write the page."""
    options = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if options.quick:
        axis = torch.linspace(0, 6, options.size)
        reference = torch.stack([torch.sin(k / 9 * axis[:, None] + axis).expand(3, -1, -1) for k in range(20)])
        held_out = reference[:2]
    else:
        train = read_photos(options.fairface, size=options.size, split="train")
        reference = train.values(torch.linspace(0, len(train) - 1, 400).long().tolist())
        held_out = read_photos(options.fairface, size=options.size, split="test").values(range(options.faces))
    paths = {name: options.weights / f"faces_{name}.safetensors" for name in ("oracle", "ambient", "msm")}
    paths |= {"noisy": options.weights / "faces_msm_noisy.safetensors", "low": options.low, "more": options.more}
    estimates = Estimates(paths)
    record: dict[str, Any] = {
        "environment": environment(),
        "seed": options.seed,
        "training": {name: training_share(path) for name, path in estimates.paths.items()},
        "weights_sha256": {name: sha256(path) for name, path in estimates.paths.items()},
        "errors": errors(held_out, estimates, options),
        "drawn": [],
    }
    sheet = []
    for name in options.ways:
        way = WAYS[name]
        if not all(estimates.known(part) for part in (way.estimate, way.lower) if part):
            continue
        images = kept_faces(name, way, estimates, options)
        row = {"way": name} | judge(reference, images)
        record["drawn"].append(row)
        sheet.append(list(images[: options.shown]))
        print(f"{name}: {row['distance']:.2f}, edges {row['edges_for_texture']:+.2f}", flush=True)
    write_manifest(options.out, record)
    folder = options.markdown.parent / "images" if options.markdown else options.out.parent
    figures = [folder / f"{options.out.stem}_{what}.png" for what in ("errors", "drawn")]
    plot(record["errors"], figures[0])
    photo_sheet(figures[1], sheet, ["rows as in the table", *[""] * (len(sheet[0]) - 1)])
    text = page(record, figures, options)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
