"""How fast is a step? Sampling against bare network passes, ESPIRiT against SigPy and BART, SENSE against its FFTs.

And the memory of CG-SENSE on a large file.

All that is compared runs side by side in one run, in turn, and medians and ratios of medians are told: seconds alone
say more about the machine than about the program.

    python benchmarks/how_fast_is_a_step.py [--quick] [--only sampling,espirit,sense,memory,allocation]
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msmri.allocation import keep_freed_memory
from msmri.io.output import environment
from msmri.measurement import Measurement
from msmri.methods.msm import MSM
from msmri.model.adm import ADMConfig, ADMUNet
from msmri.model.denoiser import ComplexChannels, EpsilonVP
from msmri.model.partial import MeasurementPartial
from msmri.model.prior import load_prior, shipped_prior
from msmri.model.unet import UNet
from msmri.physics.espirit import espirit
from msmri.physics.masks import RandomLines, draw_masks
from msmri.physics.operators import CoilFourier, Subsample
from msmri.physics.simulate import coil_maps, phantom, simulate_kspace
from msmri.tensors import generators, normal_like
from msmri.testing import phantom_measurement

SEED = 0
RESULT = Path(__file__).parent / "results" / "how_fast_is_a_step.json"


def medians(runs: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, float]:
    """Run every function once to warm up, then all in turn, ``repeats`` times; median seconds of each.

    Every other round goes in reverse order, so that a machine that slows down favours nobody.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            begin = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def row(question: str, ours: float, others: float, target: str, met: bool | None, **more: Any) -> dict[str, Any]:
    """Make one row of the result: ours over others, or others over ours for a speed-up."""
    return {"question": question, "ours": ours, "other": others, "target": target, "met": met, **more}


class _Replay:
    """What a run of sampling asks of a prior and of its networks, to be asked again without the sampling around it."""

    def __init__(self, method: MSM, measurement: Measurement, prior: Any, networks: Sequence[torch.nn.Module]) -> None:
        self.passes: list[tuple[Any, tuple[Any, ...]]] = []
        hooks = [
            part.register_forward_pre_hook(lambda module, inputs: self.passes.append((module, inputs)))
            for part in networks
        ]
        self.low = getattr(prior, "reduced", False)
        method(measurement, generators(SEED, 1))
        for hook in hooks:
            hook.remove()

    def __call__(self) -> None:
        precision = torch.autocast("cpu", torch.bfloat16) if self.low else contextlib.nullcontext()
        with torch.inference_mode(), precision:
            for network, inputs in self.passes:
                network(*inputs)


class _Told:
    """A prior that notes what its partial denoiser is asked in every run of sampling, and can be asked it again."""

    def __init__(self, prior: MeasurementPartial) -> None:
        self.prior = prior
        self.runs: list[_Run] = []

    def __call__(self, *asked: Any) -> torch.Tensor:
        raise TypeError("every run of sampling follows itself: call following()")

    def following(self, gain: torch.Tensor | None = None, centre: torch.Tensor | None = None) -> "_Run":
        self.runs.append(_Run(self.prior.following(gain, centre)))
        return self.runs[-1]

    def replay(self) -> None:
        with torch.inference_mode():
            for run in self.runs:
                follow = self.prior.following()
                for asked in run.calls:
                    follow(*asked)


class _Run:
    """One run of a prior, with the arguments of every call."""

    keeps_data = True

    def __init__(self, partial: Callable[..., torch.Tensor]) -> None:
        self.partial = partial
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *asked: Any) -> torch.Tensor:
        self.calls.append(asked)
        return self.partial(*asked)


def sampling(quick: bool) -> list[dict[str, Any]]:
    """Compare posterior sampling with the network passes it makes, replayed with their own inputs."""
    shape, coils, steps, samples = ((48, 40), 4, 2, 1) if quick else ((256, 256), 8, 4, 2)
    measurement = phantom_measurement(shape, slices=1, coils=coils, seed=SEED)
    trained = shipped_prior().exists()
    if trained:
        prior: Any = load_prior()
    else:
        width = (16, 16) if quick else (48, 80, 112)
        prior = MeasurementPartial(UNet(channels=width, conditions=4), bfloat16=not quick).eval()
    # as published, but a quarter as wide, so that what is around the network counts for more
    narrow = ADMConfig(image_size=256, channels=32 if quick else 64)
    published = EpsilonVP(ComplexChannels(ADMUNet(narrow))).eval()
    # every level costs the same, so that few stand for all; what is asked of the prior once a slice, before sampling
    # (adapt), is neither a step nor a pass of one
    method = MSM(prior=prior, steps=steps, samples=samples, adapt=False)
    paper = MSM.preset("paper", prior=published, steps=1 if quick else 2)
    told: Any = _Told(prior)
    replace(method, prior=told)(measurement, generators(SEED, 1))
    ours = _Replay(method, measurement, prior, [prior.network, *prior.later])
    theirs = _Replay(paper, measurement, published, [published.network])
    runs: dict[str, Callable[[], Any]] = {
        "default": lambda: method(measurement, generators(SEED, 1)),
        "default denoisers": told.replay,
        "default networks": ours,
        "paper": lambda: paper(measurement, generators(SEED, 1)),
        "paper networks": theirs,
    }
    seconds = medians(runs, repeats=1 if quick else 3)
    size = f"{shape[0]}x{shape[1]}, {coils} coils"
    rows, calls = [], sum(len(run.calls) for run in told.runs)
    for preset, part, what, passes in (
        ("paper", "paper networks", "its bare U-Net passes", len(theirs.passes)),
        ("default", "default denoisers", "its bare calls of the partial denoiser", calls),
        ("default", "default networks", "its bare U-Net passes, without any solve", len(ours.passes)),
    ):
        ratio = seconds[preset] / seconds[part]
        question = f"posterior sampling, preset {preset}, {size} / {what}"
        row_of = row(question, seconds[preset], seconds[part], "<= 1.1", ratio <= 1.1, ratio=ratio)
        own = method if preset == "default" else paper
        rows.append({**row_of, "passes": passes, "steps": own.steps, "samples": own.samples, "shipped_prior": trained})
    return rows


def espirit_maps(quick: bool) -> list[dict[str, Any]]:
    """Compare ESPIRiT, one set of maps of one slice, with SigPy's and BART's."""
    import sigpy.mri

    coils, shape = (4, (40, 40)) if quick else (16, (320, 320))
    rng = torch.Generator().manual_seed(SEED)
    maps = coil_maps(shape, coils, rng)
    kspace, _ = simulate_kspace(phantom(shape, rng)[None], maps, rng, noise_std=1e-3)
    array = kspace[0].numpy()
    settings: dict[str, Any] = {"calib_width": 24, "thresh": 0.02, "kernel_width": 6, "crop": 0.8}
    runs: dict[str, Callable[[], Any]] = {
        "msmri": lambda: espirit(kspace, calibration_width=24, kernel_width=6, threshold=0.02, crop=0.8),
        "sigpy": lambda: sigpy.mri.app.EspiritCalib(array, **settings, show_pbar=False).run(),
    }
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("bart"):
            # BART's axes run from fast to slow, so that (coil, 1, rows, columns) is what it calls (x, y, 1, coil)
            base = Path(folder) / "kspace"
            base.with_suffix(".hdr").write_text(f"# Dimensions\n{shape[1]} {shape[0]} 1 {coils}\n")
            base.with_suffix(".cfl").write_bytes(np.ascontiguousarray(array, np.complex64).tobytes())
            command = ["bart", "ecalib", "-r", "24", "-k", "6", "-m", "1", "-c", "0.8", "kspace", "maps"]
            threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            runs["bart"] = lambda: subprocess.run(command, cwd=folder, env=threads, check=True, capture_output=True)
        seconds = medians(runs, repeats=1 if quick else 5)
    what = f"ESPIRiT, {coils} coils, {shape[0]}x{shape[1]}: times faster than "
    faster = seconds["sigpy"] / seconds["msmri"]
    rows = [row(what + "SigPy", seconds["msmri"], seconds["sigpy"], ">= 5", faster >= 5, ratio=faster)]
    if "bart" in seconds:
        faster = seconds["bart"] / seconds["msmri"]
        rows.append(row(what + "BART", seconds["msmri"], seconds["bart"], "> 1", faster > 1, ratio=faster))
    return rows


def sense(quick: bool) -> list[dict[str, Any]]:
    """Compare SENSE forward and adjoint with the FFTs inside."""
    batch, coils, shape = (1, 4, (40, 40)) if quick else (1, 16, (320, 320))
    maps = coil_maps(shape, coils, torch.Generator().manual_seed(SEED))
    encoding = CoilFourier(maps)
    operator = Subsample(draw_masks(RandomLines(acceleration=4), shape, generators(SEED, 1))) @ encoding
    image = normal_like(torch.empty(batch, 1, *shape, dtype=torch.complex64), generators(SEED, batch))
    kspace = encoding(image)

    def bare() -> None:
        torch.fft.ifft2(torch.fft.fft2(kspace, norm="ortho"), norm="ortho")

    runs = {
        "pair": lambda: encoding.adjoint(encoding(image)),
        "normal": lambda: operator.normal(image),
        "ffts": bare,
    }
    with torch.inference_mode():
        seconds = medians(runs, repeats=3 if quick else 51)
    what = f"SENSE, {coils} coils, {shape[0]}x{shape[1]}: "
    rows = []
    for name, label in {"pair": "forward + adjoint", "normal": "undersampled normal operator"}.items():
        ratio = seconds[name] / seconds["ffts"]
        target, met = ("<= 1.3", ratio <= 1.3) if name == "pair" else ("", None)
        rows.append(row(f"{what}{label} / its bare FFTs", seconds[name], seconds["ffts"], target, met, ratio=ratio))
    return rows


class _Volume:
    """K-space (slices, coil, ky, kx) that is simulated slice by slice, so that writing it takes no memory."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.shape, self.ndim = shape, 4
        self.rng = torch.Generator().manual_seed(SEED)
        self.maps = coil_maps(shape[2:], shape[1], self.rng)
        self.mask = draw_masks(RandomLines(acceleration=4), shape[2:], generators(SEED, 1))

    def __getitem__(self, index: int) -> np.ndarray:
        image = phantom(self.shape[2:], self.rng)[None]
        return torch.where(self.mask, simulate_kspace(image, self.maps, self.rng, noise_std=1e-3)[0], 0)[0].numpy()


def memory(quick: bool) -> list[dict[str, Any]]:
    """Measure the peak memory of ``msmri recon --method cg-sense`` on a file, in a process of its own."""
    from msmri.io.fastmri import write_scan
    from msmri.io.header import Header

    slices, coils, rows, columns = (2, 4, 96, 64) if quick else (16, 20, 640, 320)
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        volume: Any = _Volume((slices, coils, rows, columns))
        header = Header((rows, columns), (rows // 2, columns), columns // 2, columns - 1)
        scan = Path(folder) / "scan.h5"
        write_scan(scan, volume, mask=volume.mask.flatten(), header=header)
        size = scan.stat().st_size
        command = [sys.executable, "-m", "msmri.cli", "recon", str(scan), "--method", "cg-sense", "-o", f"{folder}/out"]
        begin = time.perf_counter()
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": paths}
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()}")
        seconds = time.perf_counter() - begin
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    peak = usage.ru_maxrss * unit
    what = f"CG-SENSE from the command line, {slices} slices, {coils} coils, {rows}x{columns}: peak memory, GB"
    return [row(what, peak, size, "< 2", peak < 2e9, ratio=peak / 1e9, file_bytes=size, seconds=seconds)]


def allocation(quick: bool) -> list[dict[str, Any]]:
    """Compare a reconstruction whose freed memory is given back with the command line, which keeps it."""
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    asked = ["recon", str(root / "msmri" / "data" / "demo_brain.h5"), "--mask", "random-lines", "-R", "4"]
    asked += ["--method", "cg-sense"] if quick else ["--method", "msm"]
    starts = {"kept": ["-m", "msmri.cli"], "given back": ["-c", "from msmri.cli import app; app()"]}
    with tempfile.TemporaryDirectory() as folder:

        def start(name: str) -> None:
            out = tempfile.mkdtemp(dir=folder)
            command = [sys.executable, *starts[name], *asked, "-o", f"{out}/out"]
            subprocess.run(command, env={**own, "PYTHONPATH": paths}, check=True, capture_output=True)

        seconds = medians({name: lambda name=name: start(name) for name in starts}, repeats=1 if quick else 3)  # type: ignore[misc]
    ratio = seconds["given back"] / seconds["kept"]
    what = "msmri recon of the demo scan, start of Python included: seconds with freed memory given back / kept"
    return [row(what, seconds["kept"], seconds["given back"], "", None, ratio=ratio)]


PARTS: Mapping[str, Callable[[bool], list[dict[str, Any]]]] = {
    "sampling": sampling,
    "espirit": espirit_maps,
    "sense": sense,
    "memory": memory,
    "allocation": allocation,
}


def versions() -> dict[str, str | None]:
    """Tell the versions of what is compared."""
    found: dict[str, str | None] = {}
    for name in ("torch", "sigpy", "numpy", "diffusers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if shutil.which("bart"):
        found["bart"] = subprocess.run(["bart", "version"], capture_output=True, text=True).stdout.strip()
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    lines = ["| question | measured | target | met |", "|---|---|---|---|"]
    met = {True: "yes", False: "**no**", None: ""}
    lines += [f"| {r['question']} | {r['ratio']:.2f} | {r['target']} | {met[r['met']]} |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: to see that it runs; the numbers mean nothing"
    )
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, by commas")
    parser.add_argument(
        "--out", type=Path, help=f"JSON file to write; {RESULT.name} in results/ without it, and none with --quick"
    )
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    kept = keep_freed_memory()  # as the command line does, for ours and for what it is compared with
    rows = []
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += [{"part": name, **found} for found in PARTS[name](arguments.quick)]
        if arguments.quick:  # such sizes answer nothing
            rows = [{**found, "met": None} for found in rows]
    result = {
        "seed": SEED,
        "quick": arguments.quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "versions": versions(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "freed_memory_kept": kept,
        "load_at_end": os.getloadavg()[0],
        "rows": rows,
    }
    print(table(rows))
    out = arguments.out or (None if arguments.quick else RESULT)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\n{out}", file=sys.stderr)


if __name__ == "__main__":
    main()
