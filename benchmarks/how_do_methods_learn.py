r"""Ask how the quality of each learned method grows with its training: PSNR on validation scans against CPU hours.

    python benchmarks/how_do_methods_learn.py VALIDATION_SCANS --curve "ssdu, columns=ssdu:runs/ssdu" \
        --curve "msm=msm:runs/msm,runs/msm/last.safetensors" --curve "a-dps=a-dps:snapshots/adps_*.safetensors" \
        --options "a-dps={samples: 1, steps: 40}" --markdown docs/results_learning.md

A curve is LABEL=METHOD:WEIGHTS. The weights are files, patterns and folders (of those, their step_*.safetensors, which
train.keep_every leaves), with commas between them; how long they were trained is read from their headers. All of them
reconstruct the same fully sampled scans, undersampled here with the same masks. Zero-filled and CG-SENSE, its weight
tuned on these very scans, stand beside them. Every finished row is kept beside the result, and the same command goes
on where it was stopped, or takes in weights that have come since. With --keep the curves of the published JSON that are
not asked for now stay as they are, if they are of the same scans, undersampled in the same way.
Writes results/how_do_methods_learn.{json,png}, and with --markdown a page.
"""

import argparse
import glob
import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from msmri.config import parse_value
from msmri.errors import InputError
from msmri.io.fastmri import list_scans
from msmri.io.output import environment, fingerprint, sha256, write_manifest
from msmri.measurement import Measurement
from msmri.methods import load_method
from msmri.methods.tuning import tune
from msmri.metrics import psnr
from msmri.model.checkpoint import read_header
from msmri.physics.masks import RandomLines
from msmri.preparation import Preparation, measurements
from msmri.report import line_plot, markdown_table
from msmri.tensors import generators

HERE = Path(__file__).parent
ENOUGH = 0.1  # dB: a last quarter that gains no more than this has little left to learn
Case = tuple[str, Measurement]  # what tells a scan and its undersampling from others, and the scan


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a moment of a training run."""

    path: Path
    steps: int  # of all stages
    hours: float | None  # of all processors together; None: the header does not tell
    restarted: bool  # the run began from other weights, whose training is not counted


@dataclass(frozen=True)
class Curve:
    """A method, and its weights in the order of their training."""

    label: str
    method: str  # as in msmri.methods
    checkpoints: list[Checkpoint]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        """Tell whether the headers tell the time of training, and not the steps alone."""
        hours = [one.hours for one in self.checkpoints]
        return None not in hours and hours[-1] > 0  # type: ignore[operator]

    def build(self, checkpoint: Checkpoint) -> Any:
        """Make the method with some weights."""
        option = "prior" if self.method == "msm" else "weights"
        return load_method(self.method, **self.options, **{option: str(checkpoint.path)})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read from a header how long the weights were trained."""
    header = read_header(path)
    stages = header.get("stages") or [header]
    if not all("step" in stage for stage in stages):
        raise InputError("the header does not tell the steps of training", mend="give weights of msmri", path=path)
    hours = [stage.get("cpu_hours") for stage in stages]
    total = None if None in hours else float(sum(hours))
    return Checkpoint(path, sum(stage["step"] for stage in stages), total, "start" in stages[0].get("recipe", {}))


def read_curve(text: str, options: dict[str, dict[str, Any]]) -> Curve:
    """Read a curve from LABEL=METHOD:WEIGHTS,WEIGHTS; its checkpoints in the order of their training, each once."""
    label, equals, rest = (part.strip() for part in text.partition("="))
    method, colon, places = (part.strip() for part in rest.partition(":"))
    if not (label and equals and method and colon and places):
        raise InputError(f"{text!r} is not a curve", mend='write "ssdu=ssdu:runs/ssdu", LABEL=METHOD:WEIGHTS')
    paths: list[Path] = []
    for place in (part.strip() for part in places.split(",")):
        pattern = f"{glob.escape(place)}/step_*.safetensors" if Path(place).is_dir() else place
        found = [Path(place)] if Path(place).is_file() else sorted(map(Path, glob.glob(pattern)))  # noqa: PTH207
        if not found:
            raise InputError("no weights found", mend="name a file, a pattern or a folder of step_*", path=place)
        paths += found
    every = [read_checkpoint(path) for path in paths]
    timed = all(one.hours is not None for one in every)
    once = {(one.steps, one.hours): one for one in reversed(every)}  # last.safetensors may be the last step kept
    for one in every:
        if one not in once.values():
            print(f"{label}: {one.path.name} is left out, others were trained as long", flush=True)
    order = sorted(once.values(), key=lambda one: (one.hours if timed else 0, one.steps))
    return Curve(label, method, order, options.get(label, {}))


def read_options(texts: list[str]) -> dict[str, dict[str, Any]]:
    """Read options of methods, LABEL={option: value}, by the label of their curve."""
    found = {}
    for text in texts:
        label, _, value = text.partition("=")
        found[label.strip()] = parse_value(value)
        if not isinstance(found[label.strip()], dict):
            raise InputError(f"{text!r} are not options", mend='write "a-dps={samples: 1, steps: 40}"')
    return found


def read_cases(options: argparse.Namespace) -> list[Case]:
    """Undersample the slices of every scan."""
    preparation = Preparation(law=RandomLines(options.acceleration), seed=options.seed, crop_to=options.crop_to)
    made = {"R": options.acceleration, "seed": options.seed, "crop_to": options.crop_to}
    cases = []
    for path in list_scans(options.scans):
        for one in measurements(path, preparation, options.slices):
            if one.target is None:
                raise InputError("has no target", mend="give fully sampled scans", path=path)
            cases.append((fingerprint({"slice": one.source[0], "scan": sha256(path)} | made), one))
    return cases


class Rows:
    """Results by key, kept in a file, so that an interrupted run goes on."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        self.commit = environment()["commit"]  # of the code that computes a row, which may be kept for later runs
        if path.exists() and not fresh:
            self.known = json.loads(path.read_text("utf-8"))["rows"]

    def keep(self, key: str, row: dict[str, Any]) -> None:
        """Add a row and write all of them."""
        self.known[key] = row | {"commit": self.commit}
        write_manifest(self.path, {"rows": self.known})


def evaluate(method: Any, identity: dict[str, Any], cases: list[Case], rows: Rows, seed: int) -> dict[str, Any]:
    """Reconstruct every scan, those not done yet, and give their PSNR and the mean seconds a slice.

    ``identity`` tells the method from others, together with its fields.
    """
    settings = {key: repr(getattr(method, key)) for key in getattr(method, "__dataclass_fields__", {})}
    settings = {key: value for key, value in settings.items() if key not in ("weights", "prior")}  # paths may change
    done = []
    for about, case in cases:
        key = fingerprint({"case": about, "settings": settings, **identity})
        if key not in rows.known:
            begun = time.perf_counter()
            found = method(replace(case, target=None), generators(seed, 1))
            seconds = time.perf_counter() - begun
            assert case.target is not None
            quality = psnr(case.target[0].numpy(), found.magnitude[0].numpy())
            rows.keep(key, {"psnr": quality, "seconds": seconds})
        done.append(rows.known[key])
    values = [row["psnr"] for row in done]
    seconds = float(np.mean([row["seconds"] for row in done]))
    commits = sorted({str(row["commit"]) for row in done})
    return {"psnr": float(np.mean(values)), "psnr_of_slices": values, "seconds": seconds, "commits": commits}


def tuned(name: str, cases: list[Case], refinements: int, rows: Rows) -> Any:
    """Make a method with its first tunable weight chosen on the scans, once."""
    method: Any = load_method(name)
    option = next(iter(method.tunable))
    key = fingerprint({"tuned": name, "cases": [about for about, _ in cases], "refinements": refinements})
    if key not in rows.known:
        best, _ = tune(method, [one for _, one in cases], refinements=refinements)
        rows.keep(key, {"option": option, "value": getattr(best, option)})
    return replace(method, **{option: rows.known[key]["value"]})


def amount(point: dict[str, Any]) -> str:
    """Tell how long weights were trained."""
    hours = f"{point['cpu_hours']:.2f} CPU hours, " if point["cpu_hours"] is not None else ""
    return f"{hours}{point['steps']} steps"


def last_quarter(times: list[float], qualities: list[float]) -> float | None:
    """Give what the last quarter of the time since the start of training gained, in dB.

    The quality at three quarters of the time is interpolated between the checkpoints before and after; None if none
    is as early as that.
    """
    if times[0] > 0.75 * times[-1]:
        return None
    return qualities[-1] - float(np.interp(0.75 * times[-1], times, qualities))


def in_words(label: str, curve: dict[str, Any], reference: float) -> str:
    """Say of a curve where it began and ended, and whether it was still learning."""
    points = curve["points"]
    first, last = points[0], points[-1]
    best = max(points, key=lambda point: point["psnr"])
    lead = last["psnr"] - reference
    end = f"{last['psnr']:.2f} dB ({amount(last)}), {abs(lead):.2f} dB {'above' if lead > 0 else 'below'} cg-sense; "
    name = f"**{label}** (`{curve['method']}`)"
    if len(points) == 1:
        return f"{name}: {end}one checkpoint tells nothing of its learning."
    said = f"{name}: from {first['psnr']:.2f} dB ({amount(first)}) to {end}"
    if last["psnr"] < best["psnr"] - ENOUGH:
        said += f"it had been at {best['psnr']:.2f} dB ({amount(best)}); "
    of_what = "time" if curve["timed"] else "steps"
    gain = curve["gain_of_last_quarter"]
    if gain is None:
        said += f"no checkpoint is early enough to tell what the last quarter of the {of_what} gained"
    elif gain > ENOUGH:
        said += f"the last quarter of the {of_what} still gained {gain:.2f} dB, so it was not done learning"
    elif gain < -ENOUGH:
        said += f"the last quarter of the {of_what} lost {-gain:.2f} dB"
    else:
        said += f"the last quarter of the {of_what} gained no more than {ENOUGH:g} dB ({round(gain, 2) + 0.0:+.2f} dB)"
    return said + (". Its training counts from the weights it started from." if curve["restarted"] else ".")


def page(record: dict[str, Any], figures: list[Path], markdown: Path, note: str) -> str:
    """Write the page of results."""
    references, curves = record["references"], record["curves"]
    base = references["cg-sense"]["psnr"]
    lines: list[dict[str, Any]] = [{"method": name, **one} for name, one in references.items()]
    lines += [{"method": label, **point} for label, curve in curves.items() for point in curve["points"]]
    for line in lines:
        line |= {"CPU hours": line.get("cpu_hours"), "PSNR, dB": line["psnr"], "seconds a slice": line["seconds"]}
        line["against cg-sense, dB"] = line["psnr"] - base
        line["weights"] = f"`{line['weights_sha256'][:12]}`" if "weights_sha256" in line else None
    formats = {"method": "", "steps": "", "CPU hours": ".3f", "PSNR, dB": ".2f", "against cg-sense, dB": "+.2f"}
    formats |= {"seconds a slice": ".1f", "weights": ""}
    with_options = [f"{label} `{json.dumps(curve['options'])}`" for label, curve in curves.items() if curve["options"]]
    settings = f" Settings that are not the defaults: {'; '.join(with_options)}." if with_options else ""
    crop = f"cropped to {record['crop_to']}" if record["crop_to"] else "full matrix"
    shown = "\n\n".join(f"![{path.stem}]({os.path.relpath(path, markdown.parent)})" for path in figures)
    words = "\n".join(f"- {in_words(label, curve, base)}" for label, curve in curves.items())
    return (
        "# How do the methods learn?\n\nWritten by `benchmarks/how_do_methods_learn.py`; do not edit by hand. "
        f"Scans: {', '.join(record['scans'])}, {crop}, nominal R {record['acceleration']:g} (true "
        f"{record['true_acceleration']:.2f}), seed {record['seed']}, `{json.dumps(record['environment'])}`.\n\n"
        "Mean PSNR of the magnitude, in file units, against the root-sum-of-squares of the fully sampled scans. All "
        "weights reconstruct the same undersampled scans with the same masks and coil maps. CPU hours are those of "
        "training, of all processors together, as the headers of the weights tell; steps of one method are not steps "
        f"of another. The weight of cg-sense ({references['cg-sense']['weight']:.3g}) was tuned on these very scans. "
        "Time runs from the start of training; the quality at three quarters of it is interpolated between "
        "checkpoints. Rows may come from several sittings, some while other programs ran: seconds are not to be "
        f"compared closely.{settings}\n\n{f'{note}' + chr(10) * 2 if note else ''}## In words\n\n{words}\n\n"
        f"## Figure\n\n{shown}\n\n## Every checkpoint\n\n{markdown_table(lines, formats)}"
    )


def draw(out: Path, record: dict[str, Any]) -> list[Path]:
    """Draw PSNR against CPU hours, and against steps the curves without them."""
    made = []
    charts = [("cpu_hours", "CPU hours of training", True, ""), ("steps", "steps of training", False, "_steps")]
    for key, label, timed, suffix in charts:
        chosen = {name: curve["points"] for name, curve in record["curves"].items() if curve["timed"] == timed}
        series = {name: [(point[key], point["psnr"]) for point in points] for name, points in chosen.items()}
        if series:
            end = max(point[0] for points in series.values() for point in points)
            series |= {name: [(0, one["psnr"]), (end, one["psnr"])] for name, one in record["references"].items()}
            made.append(out.with_name(f"{out.stem}{suffix}.png"))
            title = f"Validation scans, R = {record['acceleration']:g}"
            line_plot(made[-1], series, x_label=label, y_label="PSNR, dB", title=title)
    return made


def published(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Give the curves of an earlier result, if it was of the same scans, undersampled in the same way.

    Names may be the same and scans others, so that the zero-filled images have to be as good, too.

    Raises
    ------
    SystemExit
        If it was of others, or is not there.
    """
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else {}
    same = all(earlier.get(key) == record[key] for key in ("seed", "acceleration", "crop_to", "scans"))
    if same:
        before, now = (one["references"]["zero-filled"]["psnr_of_slices"] for one in (earlier, record))
        same = bool(np.allclose(before, now, atol=1e-3))
    if not same:
        raise SystemExit(f"{path}: no curves of the same scans are there to keep; leave out --keep")
    curves: dict[str, Any] = earlier["curves"]
    return curves


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", help="fully sampled scans that no training saw, or folders of them")
    parser.add_argument("--curve", action="append", required=True, metavar="LABEL=METHOD:WEIGHTS")
    parser.add_argument("--options", action="append", default=[], metavar="LABEL={OPTION: VALUE}")
    parser.add_argument("--acceleration", type=float, default=4.0)
    parser.add_argument("--slices", nargs="*", type=int, default=[1])
    parser.add_argument("--crop-to", type=int, default=None)
    parser.add_argument("--refinements", type=int, default=3, help="evaluations after the grid when tuning cg-sense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the published curves of which no weights are left")
    parser.add_argument("--note", default="", help="what a reader of the page should know about this run")
    parser.add_argument("--fresh", action="store_true", help="forget rows of an earlier run")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "how_do_methods_learn.json")
    parser.add_argument("--markdown", type=Path, default=None)
    return parser.parse_args()


def main() -> None:
    """Run, resume, and write the figures."""
    options = parse()
    try:
        given = read_options(options.options)
        curves = [read_curve(text, given) for text in options.curve]
        labels = [curve.label for curve in curves]
        if len(set(labels)) < len(labels) or not set(given) <= set(labels):
            raise InputError("labels of curves differ, and options name one", mend=f"labels: {', '.join(labels)}")
        for curve in curves:
            curve.build(curve.checkpoints[0])  # wrong options are told before hours are spent
        cases = read_cases(options)
    except InputError as error:
        raise SystemExit(str(error)) from error
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out.with_suffix(".rows.json"), fresh=options.fresh)
    references: dict[str, dict[str, Any]] = {}
    for name in ("zero-filled", "cg-sense"):
        method = tuned(name, cases, options.refinements, rows) if name == "cg-sense" else load_method(name)
        references[name] = evaluate(method, {"method": name}, cases, rows, options.seed)
        references[name] |= {"weight": getattr(method, "weight", None)}
        print(f"{name}: {references[name]['psnr']:.2f} dB", flush=True)
    record: dict[str, Any] = {
        "environment": environment(),
        "seed": options.seed,
        "acceleration": options.acceleration,
        "true_acceleration": float(np.mean([float(one.acceleration[0]) for _, one in cases])),
        "crop_to": options.crop_to,
        "scans": [one.source[0] for _, one in cases],
        "references": references,
    }
    earlier = published(options.out, record) if options.keep else {}
    learned: dict[str, dict[str, Any]] = {}
    for curve in curves:
        points: list[dict[str, Any]] = []
        for number, checkpoint in enumerate(curve.checkpoints, 1):
            weights, before = sha256(checkpoint.path), len(rows.known)
            point: dict[str, Any] = {"weights": checkpoint.path.name, "weights_sha256": weights}
            point |= {"steps": checkpoint.steps, "cpu_hours": checkpoint.hours}
            identity = {"method": curve.method, "options": curve.options, "weights": weights}
            point |= evaluate(curve.build(checkpoint), identity, cases, rows, options.seed)
            points.append(point)
            known = "" if len(rows.known) > before else " (known)"
            told = f"{point['psnr']:.2f} dB, {point['seconds']:.1f} s a slice{known}"
            print(f"{curve.label}, {number} of {len(curve.checkpoints)}, {amount(point)}: {told}", flush=True)
        times = [point["cpu_hours" if curve.timed else "steps"] for point in points]
        learned[curve.label] = {
            "method": curve.method,
            "options": curve.options,
            "timed": curve.timed,
            "restarted": any(one.restarted for one in curve.checkpoints),
            "gain_of_last_quarter": last_quarter(times, [point["psnr"] for point in points]),
            "points": points,
        }
    record["curves"] = earlier | learned
    write_manifest(options.out, record)
    figures = draw(options.out, record)
    text = page(record, figures, options.markdown or options.out, options.note)
    print(f"\n{text}")
    if options.markdown:
        options.markdown.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
