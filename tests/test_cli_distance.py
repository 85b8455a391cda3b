"""``msmri distance``: near the floor for images of one law, above it for spoilt ones; both sides have checksums."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from msmri.cli import app
from msmri.distances import INCEPTION_FILE, inception_distances, scattering_distance
from msmri.io import write_scan
from msmri.io.samples import SampleWriter
from msmri.physics.masks import RandomLines
from msmri.physics.simulate import coil_maps, crop_kspace, phantom, simulate_kspace, smooth_field

SIZE, COUNT = 64, 36
ROOT = Path(__file__).parents[1]


def phantoms(n, seed, shape=(SIZE, SIZE)):
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([phantom(shape, rng) * (1 + 0.1 * smooth_field(shape, rng)) for _ in range(n)]).abs()


def samples(path, images):
    """Write as msmri sample does."""
    images = images.to(torch.complex64) if images.ndim == 3 else images.float()
    with SampleWriter(path, len(images), tuple(images.shape[1:]), images.dtype) as writer:
        for k, image in enumerate(images):
            writer.write(k, image)
    return path


def results(path, images, **more):
    """Write as msmri recon does, or without complex images."""
    with h5py.File(path, "w") as file:
        file["reconstruction"] = images.abs().float().numpy()
        for name, value in more.items():
            file[name] = value
    return path


def photographs(path, images):
    np.savez(path, images=(255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return path


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["distance", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr, result.exception)
    return result


def scored(tmp_path, *arguments):
    invoke(*arguments, "-o", tmp_path / "scores.json", "--overwrite")
    return json.loads((tmp_path / "scores.json").read_text())


def says(result):
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    images = phantoms(COUNT, 1)
    results(folder / "a.h5", images[:20])
    results(folder / "b.h5", images[20:])
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return samples(tmp_path_factory.mktemp("drawn") / "samples.h5", phantoms(COUNT, 2))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, drawn, references):
    return scored(tmp_path_factory.mktemp("plain"), drawn, references)


def test_images_of_one_law_are_near_the_floor_and_spoilt_ones_are_not(tmp_path, references, plain):
    near = plain["scores"]["scattering"]
    assert 0.3 * near["floor"] < near["distance"] < 3 * near["floor"]
    assert near["excess"] == pytest.approx(near["distance"] - near["floor"])
    images = phantoms(COUNT, 2)
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(images[:, None], 5, 1, 2)[:, 0]
    for spoilt in (noisy, blurred):
        far = scored(tmp_path, samples(tmp_path / f"{id(spoilt)}.h5", spoilt), references)["scores"]["scattering"]
        assert far["distance"] > 10 * near["distance"]
        assert far["floor"] == near["floor"]  # of the same references, sizes and seed
    same = scored(tmp_path, samples(tmp_path / "same.h5", phantoms(COUNT, 1)), references)["scores"]["scattering"]
    assert same["distance"] == pytest.approx(0, abs=1e-4)


def test_the_json_tells_both_sides(tmp_path, drawn, references, plain):
    sums = {path: sha256(path.read_bytes()).hexdigest() for path in (drawn, *sorted(references.iterdir()))}
    for side, files, counts in (("drawn", [drawn], [36]), ("references", sorted(references.iterdir()), [20, 16])):
        told = plain[side]
        assert told["images"] == COUNT and told["size"] == [SIZE, SIZE] and told["kind"] == "magnitudes"
        assert told["files"] == [
            {"path": str(path), "images": n, "sha256": sums[path]} for path, n in zip(files, counts, strict=True)
        ]
    assert plain["settings"] == {"slices": None, "split": "all", "seed": 0}
    assert {"command", "seconds", "environment"} <= plain.keys() and "inception" not in plain["scores"]
    expected = scattering_distance(phantoms(COUNT, 1), phantoms(COUNT, 2), rng=torch.Generator().manual_seed(0))
    found = plain["scores"]["scattering"]
    assert found["distance"] == pytest.approx(expected.value, rel=1e-3)  # which is not symmetric in its shrinkage
    assert found["floor"] == pytest.approx(expected.floor, rel=1e-3)
    assert found["shrinkage"]["references"] == pytest.approx(expected.shrinkage[0], rel=1e-3)
    assert "exists already" in says(invoke(drawn, references, "-o", drawn, code=2))


def test_the_table(drawn, references):
    result = invoke(drawn.parent, references, "--slices", "0:9")  # the folder that msmri sample wrote
    assert "36 drawn images of 64 x 64 against 18 references" in result.stdout
    row = next(line for line in result.stdout.splitlines() if line.startswith("| Frechet"))
    assert [cell.strip() for cell in row.split("|")[4:6]] == ["36", "18"]
    assert "FID" not in result.stdout and "floor: " in result.stdout


def test_scans_are_brought_to_the_size_of_the_samples_as_the_benchmark_does(tmp_path, load_benchmark):
    script = load_benchmark("what_does_w_buy")
    from msmri.cli.distance import read_drawn, read_references

    shape, rng = (80, 72), torch.Generator().manual_seed(0)
    kspace = simulate_kspace(phantoms(4, 3, shape), coil_maps(shape, 3, rng), rng, noise_std=0.005)[0]
    write_scan(tmp_path / "scan.h5", kspace)
    ours = read_drawn(samples(tmp_path / "samples.h5", phantoms(3, 2, (48, 48))))
    expected, _ = script.references([str(tmp_path / "scan.h5")], 48, None)
    found = read_references([tmp_path / "scan.h5"], ours, None, "all")
    assert found.values.shape == (4, 48, 48)
    torch.testing.assert_close(found.values, expected)
    some = read_references([tmp_path / "scan.h5"], ours, "0,2,3", "all")
    torch.testing.assert_close(some.values, expected[[0, 2, 3]])

    mask = RandomLines(acceleration=3, centre_lines=12).draw(shape, rng)
    write_scan(tmp_path / "under.h5", torch.where(mask, kspace, 0), mask=mask[0, 0])
    assert "under.h5: is undersampled" in says(invoke(tmp_path / "samples.h5", tmp_path / "under.h5", code=2))


@pytest.mark.parametrize(
    ("shape", "wanted", "framed"),
    [((80, 60), (40, 40), (80, 80)), ((60, 80), (60, 40), (120, 80)), ((40, 36), (48, 48), (48, 48))],
)
def test_the_field_of_view_grows_to_the_shape_of_the_samples(shape, wanted, framed):
    from msmri.cli.distance import fit

    images = phantoms(2, 4, shape).to(torch.complex64)
    padded = torch.zeros(2, *framed, dtype=torch.complex64)
    top, left = (framed[0] - shape[0]) // 2, (framed[1] - shape[1]) // 2
    padded[:, top : top + shape[0], left : left + shape[1]] = images
    found = fit(images, wanted)
    torch.testing.assert_close(found, crop_kspace(padded, wanted).abs())
    assert found.shape[1:] == wanted and not found.is_complex()


def test_complex_results_are_resampled_before_the_magnitude(tmp_path):
    from msmri.cli.distance import read_drawn, read_references

    phase = torch.polar(torch.ones(96, 96), 2.5 * torch.arange(96.0).expand(96, 96))
    images = phantoms(3, 5, (96, 96)) * phase
    ours = read_drawn(samples(tmp_path / "samples.h5", phantoms(3, 2)))
    whole = results(tmp_path / "whole.h5", images, reconstruction_complex=images.to(torch.complex64).numpy())
    found = read_references([whole], ours, None, "all").values
    torch.testing.assert_close(found, crop_kspace(images.to(torch.complex64), (SIZE, SIZE)).abs())
    magnitudes = read_references([results(tmp_path / "abs.h5", images)], ours, None, "all").values
    torch.testing.assert_close(magnitudes, crop_kspace(images.abs().to(torch.complex64), (SIZE, SIZE)).abs())
    assert not torch.allclose(found, magnitudes, atol=0.05)


def test_samples_can_be_references_and_small_slices_are_told_of(tmp_path, drawn):
    assert "1 of" not in invoke(drawn, samples(tmp_path / "oracle.h5", phantoms(9, 6))).stderr
    small = invoke(drawn, results(tmp_path / "small.h5", phantoms(5, 6, (40, 36))))
    assert "5 references are smaller" in small.stderr


def test_photographs(tmp_path):
    colours = phantoms(30, 7)[:, None] * torch.rand(30, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    colours = (255 * (0.1 + 0.9 * colours / colours.amax())).round() / 255
    references = photographs(tmp_path / "references.npz", colours[:15])
    drawn = samples(tmp_path / "samples.h5", 2 * colours[15:] - 1)
    near = scored(tmp_path, drawn, references)
    assert near["drawn"]["kind"] == "colours" and near["references"]["images"] == 15
    assert near["references"]["files"][0]["sha256"] == sha256(references.read_bytes()).hexdigest()
    found = near["scores"]["scattering"]["distance"]
    expected = scattering_distance(colours[:15], colours[15:])
    assert found == pytest.approx(expected.value, rel=1e-3)
    as_photographs = scored(tmp_path, photographs(tmp_path / "drawn.npz", colours[15:]), references)
    assert as_photographs["scores"]["scattering"]["distance"] == pytest.approx(found, rel=1e-3)
    as_samples = scored(tmp_path, drawn, samples(tmp_path / "others.h5", 2 * colours[:15] - 1))
    assert as_samples["scores"]["scattering"]["distance"] == pytest.approx(found, rel=1e-3)
    assert "colours" in says(invoke(drawn, results(tmp_path / "grey.h5", phantoms(3, 0)), code=2))
    assert "--slices" in says(invoke(drawn, references, "--slices", "3", code=2))
    assert "split" in says(invoke(drawn, references, "--split", "tests", code=2))


def test_a_folder_of_photographs_has_one_checksum(tmp_path):
    from matplotlib.image import imsave

    from msmri.cli.distance import checksum

    folder = tmp_path / "photos"
    folder.mkdir()
    for k, image in enumerate(phantoms(4, 8)):
        imsave(folder / f"{k}.png", image.numpy(), cmap="viridis", format="png")
    drawn = samples(tmp_path / "samples.h5", torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    import PIL.Image

    for path in folder.iterdir():
        PIL.Image.open(path).convert("RGB").save(path)
    told = scored(tmp_path, drawn, folder)["references"]
    assert told["size"] == [32, 32] and told["files"] == [{"path": str(folder), "sha256": checksum(folder)}]
    (folder / "0.png").rename(folder / "9.png")
    assert checksum(folder) != told["files"][0]["sha256"]


class Pooled(torch.nn.Module):
    """Stands in for Inception: brightness of four quarters."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images[:, :1].float() / 16, 2).flatten(1)


def test_fid_and_kid_with_weights_that_are_given(tmp_path, drawn, references, monkeypatch):
    pytest.importorskip("torchmetrics")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    asked = []
    monkeypatch.setattr("msmri.distances._inception", lambda path: asked.append(path) or Pooled())
    result = invoke(drawn, references, "--inception", weights, "-o", tmp_path / "scores.json")
    assert asked == [weights]
    assert "| FID, Inception" in result.stdout and "| KID, Inception" in result.stdout
    assert "3,000 are usual" in result.stderr
    told = json.loads((tmp_path / "scores.json").read_text())["scores"]["inception"]
    expected = inception_distances(phantoms(COUNT, 1), phantoms(COUNT, 2), network=Pooled(), subset=COUNT)
    assert {name: told[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert told["subset"] == COUNT and told["sha256"] == sha256(b"weights").hexdigest()


def test_wrong_weights(tmp_path, drawn, references, monkeypatch):
    missing = says(invoke(drawn, references, "--inception", tmp_path / "none.pth", code=2))
    assert "none.pth" in missing and INCEPTION_FILE in missing and "torch-fidelity/releases" in missing

    def damaged(path):
        raise RuntimeError("PytorchStreamReader failed")

    monkeypatch.setattr("msmri.distances._inception", damaged)
    assert "cannot be read as the weights" in says(invoke(drawn, references, "--inception", drawn, code=2))


def test_wrong_files(tmp_path, drawn, references):
    def drawing(name, values):
        with h5py.File(tmp_path / name, "w") as file:
            file["samples"] = values
        return tmp_path / name

    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    nothing = results(tmp_path / "nan.h5", torch.full((3, 64, 64), torch.nan))
    empty = tmp_path / "empty.h5"
    h5py.File(empty, "w").close()
    unfinished = tmp_path / "half"
    unfinished.mkdir()
    (unfinished / "samples.h5.part").write_bytes(b"x")
    part = drawing("half.h5", np.ones((4, 64, 64), np.float32))
    with h5py.File(part, "a") as file:
        file["done"] = np.zeros(4, bool)
    ones = np.random.default_rng(0).random((4, 64, 64), np.float32)
    cases = [
        (tmp_path / "none.h5", references, "no such file"),
        (text, references, "text.h5: is not an HDF5 file"),
        (references / "a.h5", references, "holds no samples"),
        (unfinished, references, "unfinished"),
        (part, references, "unfinished"),
        (drawing("flat.h5", ones[0]), references, "samples of shape (64, 64)"),
        (drawing("tiny.h5", ones[:, :20]), references, "20 x 64, too small"),
        (drawing("few.h5", ones[:2]), references, "few.h5: gives 2 images"),
        (drawing("black.h5", 0 * ones), references, "nothing at all"),
        (drawn, tmp_path / "none.h5", "none.h5: no such file"),
        (drawn, text, "text.h5: is not an HDF5 file"),
        (drawn, empty, "holds no k-space"),
        (drawn, nothing, "nan.h5: image 0"),
        (drawn, photographs(tmp_path / "photos.npz", torch.rand(4, 3, 64, 64)), "photos.npz"),
    ]
    for first, second, problem in cases:
        assert problem in says(invoke(first, second, code=2)), (first, second)
    assert "has no slices 99" in says(invoke(drawn, references, "--slices", "99", code=2))
    assert "2 images, too few" in says(invoke(drawn, references / "a.h5", "--slices", "3,5", code=2))
    assert "--split" in says(invoke(drawn, references, "--split", "test", code=2))


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom msmri.cli import app\nfrom typer.testing import CliRunner\n"
        "for name in ([], ['distance']):\n"
        "    result = CliRunner().invoke(app, [*name, '--help'])\n"
        "    assert result.exit_code == 0 and 'distance' in result.output\n"
        "heavy = {'torch', 'numpy', 'h5py', 'scipy', 'matplotlib', 'torchmetrics'} & set(sys.modules)\n"
        "print(heavy)\nsys.exit(bool(heavy))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
