"""``msmri info``: describe scans, reconstructions and checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from msmri.cli import common
from msmri.cli.common import complain, guarded, one_line


@guarded
def info(
    files: Annotated[list[Path], typer.Argument(help="Scans or reconstructions (.h5), weights (.safetensors, .pt).")],
    debug: common.Debug = False,
) -> None:
    """Describe files: a scan's shape, sampling and noise, a reconstruction's content, a checkpoint's header."""
    failed = 0
    for path in files:
        try:
            if path.suffix == ".safetensors":
                lines = _safetensors(path)
            elif path.suffix in (".pt", ".pth", ".ckpt"):
                lines = _pickle(path)
            else:
                lines = _hdf5(path)
            width = max(map(len, lines))
            typer.echo(f"{path}\n" + "\n".join(f"  {key:<{width}}  {value}" for key, value in lines.items()))
        except Exception as error:
            if debug:
                import traceback

                traceback.print_exc()
            failed += 1
            complain(one_line(error, path))
    if failed:
        raise typer.Exit(common.MISTAKE)


def _hdf5(path: Path) -> dict[str, Any]:
    import h5py

    from msmri.io.output import open_hdf5

    with open_hdf5(path) as file:
        names = {name: f"{item.dtype} {item.shape}" for name, item in file.items() if isinstance(item, h5py.Dataset)}
        attributes = {name: str(value) for name, value in file.attrs.items()}
    if "kspace" in names or not {"reconstruction", "maps"} & names.keys():
        return _scan(path)
    return names | {f"attribute {name}": value for name, value in attributes.items()}


def _scan(path: Path) -> dict[str, Any]:
    from msmri.io.fastmri import open_scan
    from msmri.physics.coils import calibration_region, estimate_noise_std, root_sum_of_squares
    from msmri.physics.fourier import ifft2c

    with open_scan(path) as scan:
        slices, n_coils, rows, columns = scan.kspace_shape
        middle = scan.read(slices // 2)
        header = scan.header
        peak = float(root_sum_of_squares(ifft2c(middle.values)).max())
        noise = float(estimate_noise_std(middle.values, middle.mask))
        calibration = calibration_region(middle.mask, (middle.values.shape[-2], middle.values.shape[-1]))
        lines = {
            "k-space": f"{slices} slices, {n_coils} coils, {rows} x {columns}",
            "images": " x ".join(map(str, scan.output_shape)),
            "header": "none" if header is None else f"encoded {header.encoded}, recon {header.recon}",
            "target": scan.target_name or "none",
            "mask": "none in the file" if scan.mask is None else f"in the file, {scan.mask.shape}",
            "sampling": "undersampled" if scan.is_undersampled else "fully sampled",
            "true acceleration": f"{float(middle.acceleration[0]):.2f}, of the whole matrix (slice {slices // 2})",
            "calibration region": f"{calibration[0]} rows x {calibration[1]} columns",
            "zero-padded columns": f"{scan.padding[0]} left, {scan.padding[1]} right",
            "noise level": f"{noise:.4g} a real component, {100 * noise / peak:.3f} % of the image's peak",
        }
        return lines | {f"attribute {name}": str(value) for name, value in scan.attributes.items()}


def _safetensors(path: Path) -> dict[str, Any]:
    import json

    from msmri.model.checkpoint import checkpoint_checksum, read_header

    header = read_header(path)
    texts = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items() if key != "stages"
    }
    shortened = {key: text if len(text) <= 300 else f"{text[:300]}..." for key, text in texts.items()}
    trained: dict[str, Any] = {}
    for number, stage in enumerate(header.get("stages") or [], 1):
        hours = f", {stage['cpu_hours']:.2f} CPU hours" if "cpu_hours" in stage else ""
        trained[f"stage {number}"] = f"{stage.get('step', '?')} steps{hours}"
        trained[f"recipe of stage {number}"] = json.dumps(stage.get("recipe"))  # whole: to train it again
    if not trained and "recipe" in header:
        shortened["recipe"] = texts["recipe"]
    return {"sha256": checkpoint_checksum(path), **shortened, **trained}


def _pickle(path: Path) -> dict[str, Any]:
    from msmri.model.checkpoint import _load_pickle, _state_dict, checkpoint_checksum

    state = _state_dict(path, _load_pickle(path))  # tensors alone: a file that would run code is refused
    names = list(state)
    shapes = [f"{name} {tuple(state[name].shape)}" for name in (names[0], names[-1])]
    return {
        "sha256": checkpoint_checksum(path),
        "tensors": f"{len(names)}, {sum(value.numel() for value in state.values()):,} numbers",
        "first": shapes[0],
        "last": shapes[1],
    }
