"""What do the diagnostics say? Run them all, keep their numbers, and put what was learned into the page of docs.

    python benchmarks/what_do_diagnostics_say.py [--only NAME ...] [--scans DIRECTORY] [--training DIRECTORY]
    python benchmarks/what_do_diagnostics_say.py --page        # only write the page anew, from the numbers there

Every part of docs/diagnostics.md between ``<!-- NAME -->`` and ``<!-- end -->`` is written by this script from
results/diagnose_NAME.json; the prose around it is not. Each of RUNS is one call of ``msmri diagnose``, at the sizes
of its defaults; figures are of simulated data alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "diagnostics.md", ROOT / "docs" / "images"
# name of the part: the diagnostic, more arguments, whether there is a figure
RUNS: dict[str, tuple[str, list[str], bool]] = {
    "coverage": ("coverage", ["TRAINING"], True),
    "coverage_spaced": ("coverage", ["--law", "equispaced-lines"], True),
    "score-variance": ("score-variance", [], True),
    "noisy-reference": ("noisy-reference", [], True),
    "choose-w": ("choose-w", [], True),
    "resolution": ("resolution", [], True),
    "adapt": ("adapt", [], True),
    "adapt_scans": ("adapt", ["SCANS", "--option", "steps=30", "--option", "slices=1"], False),
    "calibration": ("calibration", [], True),
}


def result(name: str) -> Path:
    """Name the file of numbers of a part."""
    return RESULTS / f"diagnose_{name}.json"


def run(name: str, places: dict[str, list[str]]) -> None:
    """Run one diagnostic and keep its numbers and, if wanted, its figure."""
    diagnostic, more, drawn = RUNS[name]
    words = [word for argument in more for word in places.get(argument, [argument])]
    if any(argument in places and not places[argument] for argument in more):
        print(f"{name}: left out, it needs --{next(a for a in more if a in places).lower()}")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "msmri.cli", "diagnose", diagnostic, *words, "-o", folder]
        subprocess.run(command, check=True)
        found = json.loads((Path(folder) / f"{diagnostic}.json").read_text("utf-8"))
        found["command"] = " ".join(["msmri diagnose", diagnostic, *more])  # without the places on this machine
        result(name).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
        if drawn:
            IMAGES.mkdir(exist_ok=True)
            shutil.copyfile(Path(folder) / f"{diagnostic}.png", IMAGES / f"diagnose_{name}.png")


def part(name: str) -> str:
    """Write one part of the page."""
    if not result(name).exists():
        return "*Not run in a form that can be repeated yet.*"
    found = json.loads(result(name).read_text("utf-8"))
    learned = "\n".join(f"- {sentence}" for sentence in found["learned"])
    image = f"\n\n![{name}](images/diagnose_{name}.png)" if RUNS[name][2] else ""
    made = f"`{found['command']}`, {found['seconds']:.0f} s on {found['threads']} thread of a machine with other work"
    if "cpu_seconds" in found:
        made += f", {found['cpu_seconds']:.0f} s of them its own"
    prior = found["settings"].get("prior")
    told = f"{made}; prior SHA-256 `{prior[:16]}`" if prior else made
    return f"{learned}{image}\n\n*{told}; numbers: [`{result(name).name}`](../benchmarks/results/{result(name).name}).*"


def full_size() -> str:
    """Tell what the full-size network took: measured, and by arithmetic, kept apart."""
    found = json.loads((RESULTS / "how_heavy_is_full_size.json").read_text("utf-8"))
    told = found["arithmetic, not measured"]
    rows = [
        f"- w = {row['masks']}: {row['seconds']:.0f} s on {found['threads']} thread, peak memory of the process "
        f"{row['peak_memory_GB']:.1f} GB ({1e3 * row['TFLOP_per_second']:.0f} GFLOP/s; load of the machine "
        f"{found['load_of_the_machine_before']:.1f})."
        for row in found["one_posterior_step"]
    ]
    gpu = [
        f"- Not measured: a device that sustains {rate} TFLOP/s needs {seconds:.0f} s for a slice and sample, and "
        f"{told['hours_of_training_by_TFLOP_per_second'][rate]:,.0f} h for the million noiseless training steps."
        for rate, seconds in told["seconds_a_reconstruction_by_TFLOP_per_second"].items()
    ]
    return "\n".join(
        [
            f"- {found['parameters']:,} parameters, {found['TFLOP_a_pass']:.2f} TFLOP a pass of one image.",
            *rows,
            f"- Not measured: the published setting is {told['passes_a_reconstruction']} passes a slice and sample, "
            f"{told['TFLOP_a_reconstruction']:.0f} TFLOP.",
            *gpu,
            f"- Not measured: {told['GB_of_weights_float32']:.2f} GB of weights to sample, and to train at least "
            f"{told['GB_of_weights_gradients_Adam_and_average_float32']:.1f} GB without activations.",
            *([training_step(found["ssdu"])] if "ssdu" in found else []),
        ]
    )


def training_step(ssdu: dict[str, Any]) -> str:
    """Tell what one training step of SSDU's network took."""
    return (
        f"- One training step of SSDU's published network ({ssdu['unrolls']} unrolls, {ssdu['parameters']:,} "
        f"parameters, `{ssdu['recipe']}`) on {ssdu['coils']} coils at {' x '.join(map(str, ssdu['matrix']))}, "
        f"unrolls computed anew in back-propagation: memory grows by {ssdu['growth_of_memory_GB']:.1f} GB, "
        f"{ssdu['cpu_seconds']:.0f} s of one core ({ssdu['seconds']:.0f} s on {ssdu['threads']} thread; load of the "
        f"machine {ssdu['load_of_the_machine_before']:.1f})."
    )


def page(text: str) -> str:
    """Put every part into its place in the page."""
    for name in [*RUNS, "full-size"]:
        begin, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found:
            raise SystemExit(f"{PAGE} has no place for {name}")
        made = full_size() if name == "full-size" else part(name)
        _, closing, after = ("\n" + rest).partition(end)
        if not closing:
            raise SystemExit(f"{PAGE}: the part {name} has no end")
        text = before + begin + made + end + after
    return text


def main() -> None:
    """Run what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=None)
    parser.add_argument("--training", type=Path, default=None, help="undersampled scans that a prior learned from")
    parser.add_argument("--scans", type=Path, nargs="*", default=[], help="further scans to adapt the prior to")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args()
    places = {
        "TRAINING": [str(options.training)] if options.training else [],
        "SCANS": [str(path) for path in options.scans],
    }
    for name in [] if options.page else RUNS if options.only is None else options.only:
        run(name, places)
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
