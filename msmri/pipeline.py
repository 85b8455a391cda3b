"""From files to files: every slice reconstructed by every method, written, scored and drawn."""

import dataclasses
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msmri.errors import InputError
from msmri.io.fastmri import Scan, open_scan
from msmri.io.output import (
    ReconstructionWriter,
    check_writable,
    environment,
    fingerprint,
    read_reconstruction,
    sha256,
    write_manifest,
)
from msmri.measurement import Measurement
from msmri.methods import Reconstructor
from msmri.metrics import object_region, psnr, scored, ssim
from msmri.physics.masks import MaskLaw, slice_seed
from msmri.preparation import (
    Preparation,
    calibrate,
    check_maps,
    maps_file,
    naming,
    read_slice,
    require_sampling,
    to_output,
)
from msmri.tensors import generators

SCALE_CONVENTION = "magnitude in the units of the input: orthonormal Fourier transform, coils combined with unit maps"


class Step(NamedTuple):
    """One slice reconstructed by one method, or found done by an earlier run (``seconds`` is None)."""

    path: Path
    slice: int
    method: str
    seconds: float | None
    total: int  # steps this file takes


@dataclass
class _Job:
    """One method on one file."""

    name: str
    method: Reconstructor
    output: Path
    settings: dict[str, Any]
    writer: ReconstructionWriter | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    details: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def manifest(self) -> Path:
        return self.output.with_suffix(".json")


def reconstruct_file(
    path: str | Path,
    methods: Mapping[str, Reconstructor],
    out: str | Path,
    preparation: Preparation,
    *,
    slices: slice | Sequence[int] | None = None,
    figure_slices: slice | Sequence[int] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Generator[Step, None, None]:
    """Reconstruct a file with every method, a step at a time.

    Written for each method are ``OUT/METHOD/NAME.h5`` and the manifest ``OUT/METHOD/NAME.json``, and for all of them
    the figures ``OUT/NAME_sliceK.png``. A failure leaves nothing behind; an interruption (Ctrl-C, or closing this
    generator) leaves ``OUT/METHOD/NAME.h5.part`` for ``resume``.

    Parameters
    ----------
    path
        A scan in the fastMRI layout.
    methods
        The methods by name.
    out
        The directory to write into; made where missing.
    preparation
        How slices become measurements.
    slices
        Which slices; all of them without it.
    figure_slices
        Of which of them to draw a figure; the middle one without it.
    resume
        Keep what an interrupted run with the same settings has done, finished files included.
    overwrite
        Replace outputs that exist.
    notes
        Further entries of the manifests, such as the command.

    Raises
    ------
    InputError
        If the file cannot be used or the output not be written; always names a file.
    """
    path, out = Path(path), Path(out)
    with naming(path), open_scan(path) as scan:
        require_sampling(scan, preparation)
        indices = choose_slices(slices, scan)
        wanted = range(scan.n_slices)[figure_slices] if isinstance(figure_slices, slice) else figure_slices
        drawn = [indices[len(indices) // 2]] if wanted is None else [index for index in indices if index in wanted]
        common = {"input": sha256(path), "slices": indices, **preparation.describe()}
        if preparation.maps is not None:
            common["maps"] = sha256(maps_file(preparation.maps, path))
            notes = {**(notes or {}), "maps": check_maps(scan, preparation)}
        jobs, pending = [], []
        for name, method in methods.items():
            job = _Job(name, method, out / name / f"{path.stem}.h5", {**common, **describe_method(name, method)})
            if job.output.absolute() == path.absolute():
                raise InputError("the output would replace the input", mend="choose another -o", path=path)
            jobs.append(job)
            finished = resume and _is_finished(job)
            if not finished:
                check_writable(job.output, overwrite=overwrite or (resume and not job.manifest.exists()))
                pending.append(job)
        begun = time.time()
        slices_read: dict[int, Measurement] = {}
        try:
            with ExitStack() as stack:
                for index in indices:
                    measurement = read_slice(scan, index, preparation)
                    slices_read[index] = replace(measurement, values=torch.empty(0))
                    if index == indices[0]:
                        shape = tuple(to_output(measurement.values[0, 0], scan, preparation).shape)
                        _open_writers(stack, pending, scan, len(indices), shape, resume=resume, overwrite=overwrite)
                    yield from _reconstruct_slice(scan, index, measurement, jobs, indices, preparation)
                    del measurement
                    _release_memory()
        except BaseException:
            for job in pending:  # directories that were made for nothing
                with suppress(OSError):
                    job.output.parent.rmdir()
            with suppress(OSError):
                out.rmdir()
            raise
        for job in pending:
            manifest = _manifest(job, slices_read, preparation, notes or {}, path)
            write_manifest(job.manifest, {**manifest, "file seconds": time.time() - begun})
        if pending:
            for index in drawn:
                _draw(out / f"{path.stem}_slice{index}.png", jobs, slices_read[index], indices.index(index), index)


def choose_slices(slices: slice | Sequence[int] | None, scan: Scan) -> list[int]:
    """Give the indices of the chosen slices of a scan; a range is cut to the slices there are.

    Raises
    ------
    InputError
        If there are none, or a single one does not exist.
    """
    every = range(scan.n_slices)
    chosen = list(every[slices]) if isinstance(slices, slice) else list(every if slices is None else slices)
    missing = [index for index in chosen if index not in every]
    if missing or not chosen:
        what = f"no slice {missing[0]}" if missing else "none of the chosen slices"
        raise InputError(f"has {what}", mend=f"it has slices 0 to {scan.n_slices - 1}", path=scan.path)
    return list(dict.fromkeys(chosen))


def describe_method(name: str, method: Reconstructor) -> dict[str, Any]:
    """Tell the method's name and options, and the checksums of the files among them."""
    names: list[str] = [f.name for f in dataclasses.fields(method)] if dataclasses.is_dataclass(method) else []
    options: dict[str, Any] = {}
    weights: dict[str, str] = {}
    for option in names:
        value = getattr(method, option)
        if isinstance(value, str | Path) and str(value) and Path(value).is_file():
            weights[option] = sha256(value)
        plain = value is None or isinstance(value, bool | int | float | str | Path | tuple | list)
        options[option] = value if plain else type(value).__qualname__
    return {"method": name, "options": options, "weights": weights}


def summary_row(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Give the row of a table that a manifest amounts to."""
    metrics = manifest.get("metrics") or {}
    return {
        "file": Path(manifest["input"]["file"]).name,
        "method": manifest["method"],
        "nominal R": manifest["acceleration"]["nominal"],
        "true R": manifest["acceleration"]["true"],
        **{name: metrics.get(name) for name in ("psnr", "ssim", "nmse", "object_psnr", "object_ssim")},
        "seconds": manifest["seconds"],
        "slices": len(manifest["slices"]),
    }


def _is_finished(job: _Job) -> bool:
    """Tell whether an earlier run with the same settings has finished this output."""
    if not (job.output.exists() and job.manifest.exists()):
        return False
    try:
        found = json.loads(job.manifest.read_text("utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        found = {}
    now = json.loads(fingerprint(job.settings))
    if found != now:
        differing = [key for key in now if found.get(key) != now[key]]
        raise InputError(
            f"was made with other settings ({', '.join(differing)})",
            mend="repeat those settings, choose another -o, or --overwrite",
            path=job.output,
        )
    return True


def _open_writers(
    stack: ExitStack, jobs: list[_Job], scan: Scan, n: int, shape: tuple[int, ...], *, resume: bool, overwrite: bool
) -> None:
    for job in jobs:
        writer = ReconstructionWriter(
            job.output,
            n,
            (shape[0], shape[1]),
            samples=getattr(job.method, "samples", 1),
            source=scan.path,
            attributes={"method": job.name, "slices": job.settings["slices"]},
            settings=job.settings,
            resume=resume,
            overwrite=overwrite or resume,
        )
        writer.__enter__()
        stack.push(_closing(writer))
        job.writer = writer


def _closing(writer: ReconstructionWriter) -> Any:
    """Close a writer such that an interruption leaves the unfinished file and any other failure does not."""

    def leave(kind: Any, error: Any, trace: Any) -> None:
        writer.resume = kind is not None and issubclass(kind, KeyboardInterrupt | GeneratorExit)
        writer.__exit__(kind, error, trace)

    return leave


def _reconstruct_slice(
    scan: Scan,
    index: int,
    measurement: Measurement,
    jobs: list[_Job],
    indices: list[int],
    preparation: Preparation,
) -> Iterator[Step]:
    """Run every method that has not done this slice yet, all with the same coil maps."""
    place, total, ready = indices.index(index), len(indices) * len(jobs), None
    for job in jobs:
        if job.writer is None or job.writer.done[place]:
            yield Step(scan.path, index, job.name, None, total)
            continue
        if ready is None:
            ready = calibrate(replace(measurement, target=None), scan, index, preparation)
        begun = time.perf_counter()
        rng = generators(slice_seed(measurement.source[0], preparation.seed), 1)
        result = job.method(ready, rng)
        image = to_output(result.image[0].detach().cpu(), scan, preparation)
        job.seconds[index] = time.perf_counter() - begun
        job.details[index] = result.details
        if not bool(torch.isfinite(torch.view_as_real(image)).all()):
            raise InputError(f"{job.name} gave NaN or infinite values for slice {index}", mend="change its options")
        std = result.std
        job.writer.write(place, image, std=None if std is None else to_output(std[0].cpu(), scan, preparation))
        yield Step(scan.path, index, job.name, job.seconds[index], total)


def _release_memory() -> None:
    """Give freed memory back to the system.

    The allocator of glibc keeps it, in pieces that k-space of the next slice may not fit into, so that a process grows
    from slice to slice, by more or less in every run. Other systems' allocators have no such function.
    """
    import ctypes

    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _manifest(
    job: _Job, read: Mapping[int, Measurement], preparation: Preparation, notes: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Gather what a reader needs to repeat and to judge a result; metrics are computed on the file as written."""
    images = read_reconstruction(job.output)
    accelerations = {index: float(measurement.acceleration[0]) for index, measurement in read.items()}
    scores, rows = score(images, [measurement.target for measurement in read.values()])
    slices = [
        {
            "slice": index,
            "true acceleration": accelerations[index],
            "seconds": job.seconds.get(index),
            "details": job.details.get(index),
            **row,
        }
        for index, row in zip(read, rows, strict=True)
    ]
    law = preparation.law
    return {
        **notes,
        "method": job.name,
        "options": job.settings["options"],
        "weights": job.settings["weights"],
        "reference": getattr(job.method, "reference", None),
        "input": {"file": str(path), "sha256": job.settings["input"]},
        "seed": preparation.seed,
        "mask": job.settings["mask"],
        "acceleration": {
            "nominal": law.nominal_acceleration if isinstance(law, MaskLaw) else None,
            "true": sum(accelerations.values()) / len(accelerations),
        },
        "scale": SCALE_CONVENTION,
        "seconds": sum(job.seconds.values()),
        "metrics": scores,
        "slices": slices,
        "device": preparation.device,
        "environment": environment(),
        "settings": job.settings,
    }


def score(images: Tensor, targets: Sequence[Tensor | None]) -> tuple[dict[str, Any] | None, list[dict[str, float]]]:
    """Score a volume (slices, y, x) against its targets (1, y, x): volume metrics, and PSNR and SSIM of each slice.

    The data range of all of them is the maximum of the target volume. Slices without a target are left out. Metrics
    within the object, which leave out the background where a target is noise, begin with ``object_``.
    """
    known = [place for place, target in enumerate(targets) if target is not None]
    rows: list[dict[str, float]] = [{} for _ in targets]
    if not known:
        return None, rows
    volume = torch.cat([target for target in targets if target is not None]).float()
    try:
        scores = scored(volume, images[known])
        peak, inside = scores["data_range"], object_region(volume)
        scores |= _within(volume, images[known], inside, peak)
        for place, target, region in zip(known, volume, inside, strict=True):
            rows[place] = {"psnr": psnr(target, images[place], data_range=peak)}
            rows[place]["ssim"] = ssim(target, images[place], data_range=peak)
            rows[place] |= _within(target, images[place], region, peak)
    except InputError as error:  # a target that cannot be compared with, such as zeros: no score, but a result
        return {"not computed": str(error)}, [{} for _ in targets]
    return scores, rows


def _within(target: Tensor, image: Tensor, region: Any, peak: float) -> dict[str, float]:
    """Score what lies within the object; nothing where there is too little of it."""
    try:
        return {
            "object_psnr": psnr(target, image, data_range=peak, where=region),
            "object_ssim": ssim(target, image, data_range=peak, where=region),
        }
    except InputError:
        return {}


def _draw(path: Path, jobs: list[_Job], measurement: Measurement, place: int, index: int) -> None:
    from msmri.report import SHOWN_SCORES, comparison_figure

    images, scores, std = {}, {}, None
    for job in jobs:
        images[job.name] = read_reconstruction(job.output)[place]
        row = json.loads(job.manifest.read_text("utf-8"))["slices"][place]
        scores[job.name] = {name: row[name] for name in SHOWN_SCORES if row.get(name) is not None}
        if std is None and getattr(job.method, "samples", 1) > 1:
            std = read_reconstruction(job.output, "reconstruction_std")[place]
    comparison_figure(
        path,
        images=images,
        target=None if measurement.target is None else measurement.target[0],
        mask=measurement.mask[0],
        metrics=scores,
        std=std,
        title=f"{jobs[0].output.stem}, slice {index}",
    )
