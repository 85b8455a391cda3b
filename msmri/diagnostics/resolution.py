"""The same prior on matrices of other sizes: quality and cost."""

import time
from typing import Any

import torch
from torch import Tensor

from msmri.diagnostics import Finding, Progress, Run
from msmri.diagnostics.figures import Panel, draw_panels
from msmri.diagnostics.subjects import Subject, scaled
from msmri.measurement import Measurement
from msmri.methods.cg_sense import CGSense
from msmri.metrics import psnr
from msmri.model.partial import BLANK
from msmri.sampling.aggregate import PartialDenoiser

QUICK = {"sizes": (32, 48)}
LEAST_NOISE = 1e-3  # of measured lines, in scaled units


def one_pass(partial: PartialDenoiser, case: Measurement) -> dict[str, Tensor]:
    """Estimate one scaled slice from its measured lines alone, all others blank, in one pass: magnitudes (y, x).

    "prior" is the estimate; "without networks", where the prior can tell, what its networks start from.
    """
    assert case.encoding is not None
    noise = torch.as_tensor(case.noise_std, dtype=case.values.real.dtype).to(case.values.device).clamp_min(LEAST_NOISE)
    blank = torch.where(case.mask, noise.reshape(-1, 1, 1, 1), torch.as_tensor(BLANK).to(noise))
    everything = torch.ones_like(case.mask)
    with torch.inference_mode():
        both = getattr(partial, "estimates", None)
        if both is not None:
            first, last = both(case.values, everything, case.encoding, blank)
            return {"prior": last[0, 0].abs(), "without networks": first[0, 0].abs()}
        if getattr(partial, "keeps_data", False):
            found = partial(case.values, everything, case.encoding, blank)
        else:  # an image denoiser is told one noise level: that of the data, on the measured lines
            found = partial(case.values, case.mask, case.encoding, noise.reshape(-1, 1, 1, 1))
        return {"prior": case.encoding.adjoint(found)[0, 0].abs()}


def resolution(
    subject: Subject,
    *,
    sizes: tuple[int, ...] = (96, 128, 256, 320, 512),
    coils: int = 6,
    noise_std: float = 0.01,
) -> Run:
    """Ask how well, and at what cost, one prior serves matrices it was not trained on.

    One network pass from the measured lines alone, on two subjects with the same field of view, law of masks and noise
    a pixel at every size: a simulated person, whose image holds nothing beyond the scan's own matrix, and a head of
    ellipses, which is sharp at any size.

    Parameters
    ----------
    noise_std
        Of each real component of k-space, the image being about 1.
    """
    rows: list[dict[str, Any]] = []
    on_cpu = subject.device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter  # other work on the machine does not count, where it can
    own, partial = max(subject.magnitudes(1)[0][1].shape), subject.partial
    one_pass(partial, scaled(subject.measure(subject.phantom(32, coils=2, noise_std=noise_std))))  # warm up, not timed
    for done, size in enumerate(sizes):
        people = {
            "person": subject.people(1, size, coils=coils, noise_std=noise_std)[0],
            "ellipses": subject.phantom(size, coils=coils, noise_std=noise_std),
        }
        for kind, person in people.items():
            yield Progress(2 * done + (kind == "ellipses"), 2 * len(sizes), f"{size} x {size}, {kind}")
            case = scaled(subject.measure(person))
            assert case.target is not None
            target = case.target[0]
            begun = clock()
            images = one_pass(partial, case)
            seconds = clock() - begun
            images["CG-SENSE"] = CGSense()(case, [subject.rng("least squares")]).magnitude[0]
            rows.append(
                {
                    "size": size,
                    "subject": kind,
                    "true acceleration": float(case.acceleration[0]),
                    "seconds a pass": seconds,
                    "microseconds a pass and pixel": 1e6 * seconds / size**2,
                    **{f"PSNR {name}": psnr(target, image.cpu()) for name, image in images.items()},
                }
            )
    numbers = {"matrix of the scan": own, "clock": "CPU" if on_cpu else "wall", "rows": rows}
    named = [key for key in rows[0] if key.startswith("PSNR ")]
    panels = [
        Panel(f"{kind[0].upper()}{kind[1:]}", "matrix", "PSNR, dB", {
            key.removeprefix("PSNR "): [(row["size"], row[key]) for row in rows if row["subject"] == kind]
            for key in named
        })
        for kind in ("person", "ellipses")
    ]  # fmt: skip
    panels.append(
        Panel("Cost", "matrix", f"seconds a pass ({numbers['clock']})", {
            kind: [(row["size"], row["seconds a pass"]) for row in rows if row["subject"] == kind]
            for kind in ("person", "ellipses")
        }, log_x=True, log_y=True)
    )  # fmt: skip
    return Finding(numbers, _learned(numbers), lambda path: draw_panels(path, panels))


def _learned(numbers: dict[str, Any]) -> tuple[str, ...]:
    said = []
    for kind in ("person", "ellipses"):
        rows = [row for row in numbers["rows"] if row["subject"] == kind]
        gains = ", ".join(f"{row['PSNR prior'] - row['PSNR CG-SENSE']:+.1f} at {row['size']}" for row in rows)
        said.append(f"{kind}: dB over CG-SENSE {gains}.")
        if "PSNR without networks" in rows[0]:
            added = ", ".join(
                f"{row['PSNR prior'] - row['PSNR without networks']:+.2f} at {row['size']}" for row in rows
            )
            said.append(f"{kind}: dB that the networks add {added}.")
    costs = [row for row in numbers["rows"] if row["subject"] == "person"]
    first, last = costs[0], costs[-1]
    dearer = last["microseconds a pass and pixel"] / first["microseconds a pass and pixel"]
    said.append(
        f"A pass takes {first['seconds a pass']:.2f} s ({numbers['clock']}) at {first['size']} and "
        f"{last['seconds a pass']:.1f} s at {last['size']}: {dearer:.1f} times as much a pixel."
    )
    said.append(
        f"The scan's own matrix is {numbers['matrix of the scan']}: beyond it the person's image is interpolated."
    )
    return tuple(said)
