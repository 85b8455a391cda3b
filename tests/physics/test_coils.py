import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmri.errors import InputError
from msmri.physics.coils import (
    calibration_region,
    combine,
    compress_coils,
    estimate_noise_std,
    noise_covariance,
    prewhiten,
    root_sum_of_squares,
)
from msmri.physics.espirit import Espirit, espirit
from msmri.physics.fourier import fft2c, ifft2c
from msmri.physics.operators import CoilFourier
from msmri.tensors import generators, normal_like

SHARED = Path(__file__).parents[3] / "shared" / "data"
MPRAGE = SHARED / "kspace" / "brain_mprage_4ch.h5"
SMALL_FOV = SHARED / "kspace" / "brain_smallfov_8ch.h5"
T1 = SHARED / "kspace-no-licence-stated" / "brain_t1_8ch_a.h5"

needs_bart = pytest.mark.skipif(shutil.which("bart") is None, reason="BART is not installed")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def coil_images(shape, n_coils=4, radius=0.85, texture=0.0):
    """Give coil images of a smooth or textured ellipse and the true maps, unit norm: (coil, y, x) each."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape), indexing="ij")
    angle = 2 * math.pi * torch.arange(n_coils, dtype=torch.float64)[:, None, None] / n_coils
    far = (x - 1.5 * angle.cos()) ** 2 + (y - 1.5 * angle.sin()) ** 2
    maps = torch.polar(1 / far, 0.7 * (x * angle.sin() - y * angle.cos()) + angle)
    maps = maps / torch.linalg.vector_norm(maps, dim=0)
    edge = torch.sqrt(x**2 + (y / 0.9) ** 2) / radius
    image = torch.sigmoid((1 - edge) * 30) * (1 + 0.5 * torch.cos(5 * x + 2 * y) * torch.cos(4 * y))
    image = image * (1 + texture * torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    return (image * maps).to(torch.complex64), maps.to(torch.complex64)


def phantom(shape, n_coils=4, noise=0.0, seed=0, **kwargs):
    images, maps = coil_images(shape, n_coils, **kwargs)
    kspace = fft2c(images)[None]
    return kspace + noise * normal_like(kspace, generators(seed, 1)), maps


def folded_phantom(shape, columns, n_coils=8, texture=1.0):
    """Give k-space of a field of view of so many columns, narrower than the object."""
    images, _ = coil_images(shape, n_coils, texture=texture)
    folded = torch.zeros(n_coils, shape[0], columns, dtype=images.dtype)
    for x in range(shape[1]):
        folded[:, :, (x - shape[1] // 2 + columns // 2) % columns] += images[:, :, x]
    return fft2c(folded)[None]


def load(path):
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    import h5py

    with h5py.File(path) as file:
        return torch.from_numpy(file["kspace"][:1])


def residual(kspace, maps):
    images = ifft2c(kspace)
    explained = torch.einsum("bscyx,bsyx->bcyx", maps, combine(images, maps))
    return float(torch.linalg.norm(images - explained) / torch.linalg.norm(images))


def body(kspace):
    magnitude = root_sum_of_squares(ifft2c(kspace))[0]
    return magnitude > 0.1 * np.quantile(magnitude.numpy(), 0.99)


def agreement(maps, reference):
    return torch.linalg.vecdot(torch.as_tensor(reference), maps, dim=0)


def sigpy_maps(kspace, **kwargs):
    import sigpy.mri.app

    maps, eigenvalues = sigpy.mri.app.EspiritCalib(
        kspace[0].numpy(), crop=0, output_eigenvalue=True, show_pbar=False, **kwargs
    ).run()
    return torch.from_numpy(maps), torch.from_numpy(eigenvalues).squeeze()


def write_cfl(path, array):
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(str(n) for n in array.shape) + "\n")
    np.asarray(array, np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path):
    shape = [int(n) for n in path.with_suffix(".hdr").read_text().splitlines()[1].split()]
    return np.fromfile(path.with_suffix(".cfl"), np.complex64).reshape(shape, order="F")


def bart_maps(kspace, folder, *options):
    """Run ``bart ecalib``: maps (set, coil, y, x) and eigenvalues (set, y, x)."""
    write_cfl(folder / "kspace", kspace[0].permute(1, 2, 0)[:, :, None].numpy())
    names = [str(folder / name) for name in ("kspace", "maps", "eigenvalues")]
    subprocess.run(["bart", "ecalib", *options, *names], check=True, stdout=subprocess.DEVNULL)
    maps, eigenvalues = read_cfl(folder / "maps"), read_cfl(folder / "eigenvalues")
    maps = maps.reshape(*maps.shape[:2], maps.shape[3], -1).transpose(3, 2, 0, 1)
    eigenvalues = eigenvalues.reshape(*eigenvalues.shape[:2], -1).transpose(2, 0, 1)
    return torch.from_numpy(maps.copy()), torch.from_numpy(eigenvalues.copy()).abs()


def gram_matrices(kspace, width, kernel, threshold):
    """Build the (y, x, coil, coil) matrices as the paper does: one image-domain kernel after the other."""
    _, n_coils, ny, nx = kspace.shape
    data = kspace[0].numpy().astype(complex)
    top, left = ny // 2 - width // 2, nx // 2 - width // 2
    rows = [
        data[:, top + y : top + y + kernel, left + x : left + x + kernel].ravel()
        for y in range(width - kernel + 1)
        for x in range(width - kernel + 1)
    ]
    _, values, vectors = np.linalg.svd(np.array(rows), full_matrices=False)
    gram = np.zeros((ny, nx, n_coils, n_coils), complex)
    for vector in vectors[values > threshold * values[0]]:
        padded = np.zeros((n_coils, ny, nx), complex)
        y, x = ny // 2 - kernel // 2, nx // 2 - kernel // 2
        padded[:, y : y + kernel, x : x + kernel] = vector.reshape(n_coils, kernel, kernel)
        image = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(padded, axes=(1, 2))), axes=(1, 2)) * ny * nx
        gram += np.einsum("cyx,dyx->yxcd", image, image.conj()) / kernel**2
    return torch.from_numpy(gram)


def lines(n, *columns):
    mask = torch.zeros(1, 1, 1, n, dtype=torch.bool)
    for first, last in columns:
        mask[..., first:last] = True
    return mask


# --- ESPIRiT against theory and other programs


@pytest.mark.parametrize(("shape", "n_coils"), [((48, 40), 4), ((37, 45), 3), ((32, 33), 6)])
def test_maps_are_the_exact_eigenvectors(shape, n_coils):
    kspace, _ = phantom(shape, n_coils, noise=0.02)
    maps, values = espirit(kspace, calibration_width=20, kernel_width=5, crop=0, sets=2)
    exact, vectors = torch.linalg.eigh(gram_matrices(kspace, 20, 5, 0.02))
    for i, place in enumerate((-1, -2)):
        assert torch.allclose(values[0, i].double(), exact[..., place], atol=1e-4)
    overlap = torch.einsum("yxcs,tcyx->yxst", vectors[..., [-1, -2]].conj(), maps[0].to(vectors.dtype)).abs()
    apart = (exact[..., -1] - exact[..., -2] > 0.01) & (exact[..., -2] - exact[..., -3] > 0.01)
    assert apart.double().mean() > 0.9
    assert overlap[apart].diagonal(dim1=-2, dim2=-1).min() > 0.9999


@pytest.mark.parametrize(("shape", "width", "kernel"), [((48, 40), 24, 6), ((41, 35), 17, 5), ((32, 50), 16, 4)])
def test_maps_match_sigpy(shape, width, kernel):
    kspace, _ = phantom(shape, noise=0.02)
    maps, values = espirit(kspace, calibration_width=width, kernel_width=kernel, crop=0, phase_reference="first")
    reference, reference_values = sigpy_maps(kspace, calib_width=width, kernel_width=kernel, max_iter=500)
    inside = body(kspace)
    assert torch.allclose(values[0, 0][inside], reference_values[inside], atol=1e-4)
    assert torch.allclose(maps[0, 0][:, inside], reference[:, inside], atol=2e-3)
    assert agreement(maps[0, 0], reference)[inside].abs().min() > 1 - 1e-4


@needs_bart
@pytest.mark.bart
@pytest.mark.parametrize("shape", [(64, 48), (45, 52)])
def test_maps_match_bart(shape, tmp_path):
    kspace, _ = phantom(shape, 5, noise=0.02)
    maps, values = espirit(kspace, threshold=math.sqrt(0.001))
    reference, reference_values = bart_maps(kspace, tmp_path, "-r24", "-m1")
    inside = body(kspace) & (maps[0, 0].abs().sum(0) > 0)
    assert ((reference[0].abs().sum(0) > 0) == (maps[0, 0].abs().sum(0) > 0))[body(kspace)].float().mean() > 0.99
    product = agreement(maps[0, 0], reference[0])[inside]
    assert product.abs().quantile(0.01) > 0.999
    assert product.mean().abs() > 0.9995  # the same virtual coil has phase zero, up to one constant
    assert (values[0, 0] - reference_values[0])[inside].abs().median() < 1e-3


@pytest.mark.parametrize("path", [MPRAGE, T1], ids=lambda path: path.stem)
def test_real_scan_matches_sigpy(path):
    kspace = load(path)
    maps, values = espirit(kspace, crop=0)
    reference, reference_values = sigpy_maps(kspace)
    overlap = agreement(maps[0, 0], reference).abs()[body(kspace)]
    assert overlap.median() > 1 - 1e-6
    assert overlap.quantile(0.01) > 1 - 1e-4
    assert (values[0, 0] - reference_values).abs()[body(kspace)].max() < 1e-4
    assert residual(kspace, maps) == pytest.approx(residual(kspace, reference[None, None]), abs=1e-4)
    assert residual(kspace, maps) == pytest.approx(
        {"brain_mprage_4ch": 0.066, "brain_t1_8ch_a": 0.108}[path.stem], abs=2e-3
    )
    assert Espirit(sets="auto")(kspace, lines(kspace.shape[-1], (0, None))).shape[1] == 1


@needs_bart
@pytest.mark.bart
@pytest.mark.parametrize("path", [MPRAGE, T1], ids=lambda path: path.stem)
def test_real_scan_matches_bart(path, tmp_path):
    kspace = load(path)
    maps, _ = espirit(kspace, threshold=math.sqrt(0.001))
    reference, _ = bart_maps(kspace, tmp_path, "-r24", "-m1")
    product = agreement(maps[0, 0], reference[0])[body(kspace)]
    assert product.abs().median() > 0.99999
    assert product.abs().quantile(0.01) > 0.999
    assert residual(kspace, maps) == pytest.approx(
        residual(kspace, reference[:1, None].mT.mT.reshape(maps.shape)), abs=1e-3
    )


def test_small_field_of_view_needs_two_sets():
    kspace = load(SMALL_FOV)
    one, two = (espirit(kspace, sets=sets)[0] for sets in (1, 2))
    assert residual(kspace, two) == pytest.approx(0.112, abs=0.005)
    assert 0.15 < residual(kspace, one) < 0.45
    for width in (24, 10):
        mask = lines(168, (84 - width // 2, 84 + width // 2))
        assert Espirit(sets="auto")(kspace, mask).shape[1] == 2


@needs_bart
@pytest.mark.bart
def test_two_sets_match_bart(tmp_path):
    kspace = load(SMALL_FOV)
    maps, _ = espirit(kspace, sets=2, threshold=math.sqrt(0.001))
    reference, _ = bart_maps(kspace, tmp_path, "-r24", "-m2")
    # either program may mix the sets where their eigenvalues are equal, so compare what they span
    both = (maps[0].abs().sum(1) > 0).all(0) & (reference.abs().sum(1) > 0).all(0)
    shared = torch.einsum("scp,tcp->stp", maps[0, :, :, both].conj(), reference[:, :, both]).abs().square().sum((0, 1))
    assert both.float().mean() > 0.1
    assert shared.quantile(0.1) > 2 * 0.995
    assert residual(kspace, maps) == pytest.approx(residual(kspace, reference[None]), abs=5e-3)


def test_true_maps_are_found():
    kspace, truth = phantom((64, 56), 6)
    maps, values = espirit(kspace)
    inside = body(kspace)
    overlap = agreement(maps[0, 0], truth).abs()[inside]
    assert overlap.median() > 0.9999
    assert overlap.quantile(0.01) > 0.999
    assert residual(kspace, maps) < 0.02
    assert values[0, 0][inside].median() == pytest.approx(1, abs=2e-3)
    assert values.max() < 1.001


def test_maps_have_unit_norm_or_are_cropped():
    kspace, _ = phantom((48, 40), 5, radius=0.5)
    maps, values = espirit(kspace, sets=2, crop=0.8)
    power = maps.abs().square().sum(2)
    assert torch.allclose(power, (values > 0.8).float(), atol=1e-5)
    assert 0 < (values[:, 0] > 0.8).float().mean() < 0.9
    whole, _ = espirit(kspace, sets=2, crop=0)
    gram = torch.einsum("bscyx,btcyx->stbyx", whole.conj(), whole)
    assert torch.allclose(gram, torch.eye(2, dtype=gram.dtype)[:, :, None, None, None].expand_as(gram), atol=1e-4)


def test_phase_reference():
    kspace, _ = phantom((40, 48), 4, noise=0.01)
    first, _ = espirit(kspace, sets=2, crop=0, phase_reference="first")
    assert first[:, :, 0].imag.abs().max() < 1e-5
    assert first[:, :, 0].real.min() > -1e-6
    maps, _ = espirit(kspace, crop=0)
    block = kspace[0, :, 20 - 12 : 20 + 12, 24 - 12 : 24 + 12].reshape(4, -1)
    strongest = torch.linalg.svd(block)[0][:, 0]
    virtual = torch.einsum("c,cyx->yx", strongest.conj(), maps[0, 0])
    constant = virtual.mean() / virtual.mean().abs()
    assert (virtual / constant).imag.abs().max() < 1e-5
    inside = body(kspace)
    step = (maps[0, 0, :, :, 1:] * maps[0, 0, :, :, :-1].conj()).sum(0).angle()
    assert step[inside[:, 1:] & inside[:, :-1]].abs().max() < 0.5


def test_maps_with_the_phase_of_the_image_leave_it_nearly_real():
    kspace, _ = phantom((40, 48), 4, noise=0.01)
    usual, _ = espirit(kspace, sets=2, crop=0)
    maps, _ = espirit(kspace, sets=2, crop=0, phase_reference="image")
    same = torch.einsum("bscyx,bscyx->bsyx", usual.conj(), maps).abs()
    assert torch.allclose(same, torch.ones_like(same), atol=1e-4)  # a phase for every pixel is all that differs
    inside = body(kspace)
    before, after = (torch.einsum("cyx,cyx->yx", m[0, 0].conj(), ifft2c(kspace)[0])[inside] for m in (usual, maps))
    assert before.imag.square().sum() > 0.1 * before.abs().square().sum()
    assert after.imag.square().sum() < 0.02 * after.abs().square().sum()
    assert (after.real > 0).float().mean() > 0.98
    changed = kspace.clone()
    changed[..., :8] = 5.0  # outside the calibration block: nothing follows from it
    assert torch.equal(maps, espirit(changed, sets=2, crop=0, phase_reference="image")[0])


def test_slices_of_a_batch_do_not_see_each_other():
    kspace = torch.cat([phantom((40, 36), noise=0.01 * (i + 1), seed=i)[0] * 10.0**i for i in range(3)])
    maps, values = espirit(kspace, sets=2)
    torch.set_num_threads(2)
    for i in range(3):
        alone = espirit(kspace[i : i + 1], sets=2)
        assert torch.equal(maps[i : i + 1], alone[0])
        assert torch.equal(values[i : i + 1], alone[1])
    assert torch.get_num_threads() == 2


def test_only_the_calibration_block_is_read():
    kspace, _ = phantom((40, 36))
    maps, _ = espirit(kspace, calibration_width=(16, 12), kernel_width=5)
    kspace[..., :12, :] = kspace[..., 28:, :] = kspace[..., :12] = kspace[..., 24:] = math.nan
    assert torch.equal(espirit(kspace, calibration_width=(16, 12), kernel_width=5)[0], maps)


def test_chunks_of_rows_do_not_change_the_result(monkeypatch):
    kspace, _ = phantom((33, 40))
    maps, values = espirit(kspace)
    monkeypatch.setattr("msmri.physics.espirit._CPU_BYTES", 40 * 16 * 8 * 7)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        again = espirit(kspace)
        assert torch.allclose(again[0], maps, atol=1e-5)
        assert torch.allclose(again[1], values, atol=1e-5)
    # the workers' setting is not left behind, here or for threads to come
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


def test_double_precision_is_kept():
    kspace, _ = phantom((32, 32))
    maps, values = espirit(kspace.to(torch.complex128))
    assert maps.dtype == torch.complex128
    assert values.dtype == torch.float64
    assert torch.allclose(espirit(kspace)[0].to(maps.dtype), maps, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale):
    kspace, _ = phantom((32, 32))
    assert torch.allclose(espirit(kspace * scale)[0], espirit(kspace)[0], atol=1e-4)


def test_a_dead_coil_does_no_harm():
    kspace, _ = phantom((40, 36), noise=0.01)
    silent = torch.cat([torch.zeros_like(kspace[:, :1]), kspace], 1)
    maps, _ = espirit(silent, crop=0)
    assert maps[:, :, 0].abs().max() < 1e-4
    assert torch.allclose(maps[:, :, 1:], espirit(kspace, crop=0)[0], atol=1e-3)


def test_espirit_refuses_useless_calibration_data():
    kspace, _ = phantom((32, 32))
    with pytest.raises(InputError, match="6 wide do not fit into a calibration block of 24 x 5"):
        espirit(kspace, calibration_width=(24, 5))
    with pytest.raises(InputError, match="slice 1 is all zero"):
        espirit(torch.cat([kspace, torch.zeros_like(kspace)]))
    with pytest.raises(InputError, match="centre of k-space holds NaN"):
        espirit(kspace * math.nan)


# --- calibration region


@given(st.lists(st.booleans(), min_size=1, max_size=24))
@settings(deadline=None)
def test_calibration_region_of_lines(line):
    n = len(line)
    fits = [w for w in range(1, n + 1) if all(line[n // 2 - w // 2 : n // 2 - w // 2 + w])]
    mask = torch.tensor(line)[None, None, None]
    expected = max(fits, default=0)
    assert calibration_region(mask, (17, n)) == (17 if expected else 0, expected)
    assert calibration_region(mask) == (1 if expected else 0, expected)
    assert calibration_region(mask.expand(2, 1, 17, n)) == (17 if expected else 0, expected)


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (11, 8), (7, 20), (40, 3)])
def test_calibration_region_in_two_dimensions(rows, columns):
    mask = torch.zeros(1, 1, 50, 41, dtype=torch.bool)
    mask[..., 25 - rows // 2 : 25 - rows // 2 + rows, 20 - columns // 2 : 20 - columns // 2 + columns] = True
    mask[..., 25, :] = mask[..., ::9, ::9] = True
    assert calibration_region(mask) == (rows, columns)
    assert calibration_region(torch.cat([mask, torch.ones_like(mask)])) == (rows, columns)
    mask[..., 19:22] = True  # an area of 150, but only three wide
    assert calibration_region(mask) == ((rows, columns) if columns > 3 else (50, 3))
    assert calibration_region(torch.ones_like(mask)) == (50, 41)
    assert calibration_region(torch.zeros_like(mask)) == (0, 0)


def test_calibration_region_of_fastmri_masks():
    from fastmri.data.subsample import EquiSpacedMaskFunc

    for n, fraction in ((320, 0.08), (368, 0.04), (171, 0.1)):
        mask, n_low = EquiSpacedMaskFunc([fraction], [40])((1, n, 1), seed=1)
        rows, columns = calibration_region(mask.bool().reshape(1, 1, 1, n), (64, n))
        assert rows == 64
        assert n_low - 1 <= columns <= n_low + 1


# --- Espirit, the setting


def test_calibration_width_is_found_from_the_mask():
    kspace, _ = phantom((40, 48), noise=0.01)
    mask = lines(48, (16, 32), (2, 5), (40, 41))
    expected, _ = espirit(kspace, calibration_width=(24, 16))
    assert torch.equal(Espirit()(torch.where(mask, kspace, math.nan), mask), expected)
    wide = torch.ones_like(mask)
    assert torch.equal(Espirit(max_calibration=20)(kspace, wide), espirit(kspace, calibration_width=20)[0])


@pytest.mark.parametrize(("width", "kernel"), [(14, 6), (12, 5), (8, 3), (4, 3)])
def test_narrow_calibration_gets_smaller_kernels(width, kernel):
    kspace, _ = phantom((48, 48), noise=0.002)
    mask = lines(48, (24 - width // 2, 24 + width // 2))
    maps = Espirit()(kspace, mask)
    assert torch.equal(maps, espirit(kspace, calibration_width=(24, width), kernel_width=kernel)[0])
    assert residual(kspace, maps) < (0.1 if width >= 8 else 0.4)


def test_each_slice_has_its_own_mask():
    kspace = torch.cat([phantom((40, 40), noise=0.01, seed=i)[0] for i in range(2)])
    masks = torch.cat([lines(40, (12, 28)), lines(40, (16, 24))])
    maps = Espirit()(kspace, masks)
    for i in range(2):
        assert torch.equal(maps[i : i + 1], Espirit()(kspace[i : i + 1], masks[i : i + 1]))
    assert torch.equal(Espirit()(kspace, masks[:1])[1:], Espirit()(kspace[1:], masks[:1]))


@pytest.mark.parametrize(
    ("mask", "width"),
    [(lines(40, (0, 20), (21, 40)), 0), (lines(40, (19, 22)), 3), (lines(40, (20, 21)), 1), (lines(40), 0)],
)
def test_missing_calibration_says_what_to_do(mask, width):
    kspace, _ = phantom((40, 40))
    with pytest.raises(InputError, match=f"calibration region is {width} lines wide, at least 4 .*--maps"):
        Espirit()(kspace, mask)


def test_one_coil_needs_no_calibration():
    maps = Espirit(sets=2)(torch.zeros(2, 1, 9, 10, dtype=torch.complex64), lines(10))
    assert torch.equal(maps, torch.ones(2, 1, 1, 9, 10, dtype=torch.complex64))


@pytest.mark.parametrize("shape", [(40, 36), (33, 41)])
def test_one_coil_takes_the_phase_of_the_image_if_asked(shape):
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    phases = torch.stack([2.0 * y - x + 0.7, 1.5 * y * x])  # smooth
    inside = (y.square() + x.square() < 0.8).float() * (1 + 0.5 * torch.sin(9 * x))
    kspace = fft2c(torch.polar(inside.expand_as(phases), phases))[:, None]
    mask = lines(shape[1], (shape[1] // 2 - 8, shape[1] // 2 + 8))
    maps = Espirit(phase_reference="image")(torch.where(mask, kspace, torch.nan), mask)
    assert maps.shape == (2, 1, 1, *shape)
    torch.testing.assert_close(maps.abs(), torch.ones_like(maps.abs()))
    image = CoilFourier(maps).adjoint(kspace)[:, 0]
    left = image.imag[:, inside > 0].square().sum() / image.abs().square().sum()
    assert float(left) < 0.01 < 0.3 < float(torch.polar(inside, phases[0]).imag.square().sum() / inside.square().sum())
    assert bool((image.real[:, inside > 0] > 0).all())
    with pytest.raises(InputError, match="calibration region is 2 lines wide"):
        Espirit(phase_reference="image")(kspace, lines(shape[1], (shape[1] // 2 - 1, shape[1] // 2 + 1)))


def test_two_sets_only_where_the_image_is_folded():
    mask = lines(44, (12, 32))
    plain, folded = phantom((64, 44), 8, texture=1.0)[0], folded_phantom((64, 64), 44)
    setting = Espirit(sets="auto")
    for crop in (0.8, 0.0):
        assert Espirit(sets="auto", crop=crop)(plain, mask).shape[1] == 1
        assert Espirit(sets="auto", crop=crop)(folded, mask).shape[1] == 2
    assert residual(folded, setting(folded, mask)) < 0.3 * residual(folded, Espirit()(folded, mask))
    both = setting(torch.cat([plain, folded]), mask)
    assert torch.equal(both[:1, :1], setting(plain, mask))
    assert not both[0, 1].any()
    assert torch.equal(both[1:], setting(folded, mask))
    assert setting(phantom((64, 64), 8)[0], lines(64, (28, 36))).shape[1] == 1  # kernels of 3 leave a second set some


@pytest.mark.parametrize("level", [0.0, 0.02, 0.1])
def test_noise_is_no_reason_for_a_second_set(level):
    mask = lines(44, (12, 32))
    for kspace, sets in ((phantom((64, 44), 8, texture=1.0)[0], 1), (folded_phantom((64, 64), 44), 2)):
        brightest = float(root_sum_of_squares(ifft2c(kspace)).max())
        noisy = kspace + level * brightest * normal_like(kspace, generators(3, len(kspace)))
        if sets == 1 or level < 0.1:  # such noise hides what is folded
            assert Espirit(sets="auto")(noisy, mask).shape[1] == sets


def test_sets_are_checked():
    with pytest.raises(InputError, match="3 is not 1, 2 or 'auto'"):
        Espirit(sets=3)


# --- combination and compression


def test_combinations_agree_with_fastmri_and_truth():
    import fastmri

    images, maps = coil_images((21, 16), 5)
    expected = fastmri.rss(torch.view_as_real(images), dim=0)
    assert torch.allclose(root_sum_of_squares(images), torch.linalg.vector_norm(expected, dim=-1), atol=1e-5)
    image = torch.randn(2, 2, 21, 16, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    both = torch.linalg.qr(torch.stack([maps, maps.flip(-1)], -1).movedim(0, -2))[0].permute(3, 2, 0, 1)[None]
    coils = torch.einsum("bscyx,bsyx->bcyx", both.expand(2, -1, -1, -1, -1), image)
    assert torch.allclose(combine(coils, both), image, atol=1e-5)


def test_compression_keeps_energy_and_image():
    kspace = torch.cat([phantom((32, 40), 8)[0], 3 * phantom((32, 40), 8, radius=0.6)[0]])
    fewer, matrix = compress_coils(kspace, 5)
    assert fewer.shape == (2, 5, 32, 40)
    assert torch.allclose(matrix @ matrix.mH, torch.eye(5, dtype=matrix.dtype).expand(2, 5, 5), atol=1e-5)
    assert torch.allclose(fewer, (matrix @ kspace.flatten(2)).reshape(fewer.shape), atol=1e-4)
    energy = fewer.abs().square().sum((1, 2, 3)) / kspace.abs().square().sum((1, 2, 3))
    assert energy.min() > 0.98
    values = torch.linalg.svdvals(kspace.flatten(2)).square()
    assert torch.allclose(energy, values[:, :5].sum(1) / values.sum(1), atol=1e-4)
    strength = fewer.abs().square().sum((2, 3))
    assert (strength.diff(dim=1) < 0).all()
    largest = matrix.gather(2, matrix.abs().argmax(2, keepdim=True))  # which fixes the phase, and with it the result
    assert largest.imag.abs().max() < 1e-6
    assert largest.real.min() > 0
    before, after = (root_sum_of_squares(ifft2c(k)) for k in (kspace, compress_coils(kspace, 8)[0]))
    assert torch.allclose(before, after, atol=1e-4)
    close = root_sum_of_squares(ifft2c(fewer))
    assert torch.linalg.norm(close - before) < 0.1 * torch.linalg.norm(before)


def test_compression_of_a_volume_and_of_the_centre():
    kspace = torch.cat([phantom((32, 40), 6)[0], phantom((32, 40), 6, radius=0.6)[0].roll(2, 1)])
    _, shared = compress_coils(kspace, 3, shared=True)
    assert torch.equal(shared[0], shared[1])
    stacked = torch.cat(list(kspace), -1)
    assert torch.allclose(shared[0].abs(), compress_coils(stacked[None], 3)[1][0].abs(), atol=1e-4)
    separate, matrices = compress_coils(kspace, 3)
    assert not torch.allclose(matrices[0], matrices[1], atol=1e-2)
    assert torch.allclose(compress_coils(kspace[1:], 3)[0], separate[1:], atol=1e-5)
    poisoned = kspace.clone()
    poisoned[..., :12, :] = poisoned[..., 20:, :] = math.nan
    _, centre = compress_coils(poisoned, 3, calibration_width=8)
    assert torch.isfinite(torch.view_as_real(centre)).all()
    with pytest.raises(InputError, match="6 coils into 7"):
        compress_coils(kspace, 7)


# --- noise


def correlated_noise(n_coils, n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_coils, n_coils, dtype=torch.complex64, generator=rng) + 2 * torch.eye(n_coils)
    white = normal_like(torch.zeros(1, n_coils, n, dtype=torch.complex64), generators(seed, 1))[0]
    return mixing @ white, mixing @ mixing.mH


def test_noise_covariance_is_that_of_real_components():
    samples, truth = correlated_noise(4, 40_000)
    covariance = noise_covariance(samples)
    assert torch.allclose(covariance, truth, atol=0.03 * float(truth.abs().max()))
    assert torch.allclose(covariance.diagonal().real, samples.real.var(1), rtol=0.03)
    assert torch.allclose(torch.from_numpy(np.cov(samples.numpy())).to(covariance) / 2, covariance, atol=0.02)


def test_prewhitening_gives_white_noise_of_unit_real_components():
    samples, truth = correlated_noise(5, 4000)
    covariance = noise_covariance(samples)
    white = prewhiten(samples.reshape(5, 50, 80), covariance)
    assert torch.allclose(noise_covariance(white.flatten(1)), torch.eye(5, dtype=white.dtype), atol=1e-3)
    assert white.real.std() == pytest.approx(1, abs=0.02)
    fresh, _ = correlated_noise(5, 4000)
    batch = torch.stack([fresh, 2 * fresh]).reshape(2, 5, 50, 80)
    assert torch.allclose(prewhiten(batch, torch.stack([truth, 4 * truth]))[1], prewhiten(batch[0], truth), atol=1e-3)


def test_prewhitening_matches_sigpy():
    import sigpy.mri.util

    samples, _ = correlated_noise(3, 2000)
    kspace, _ = phantom((12, 15), 3)
    expected = sigpy.mri.util.whiten(kspace[0].numpy(), noise_covariance(samples).numpy())
    assert torch.allclose(prewhiten(kspace[0], noise_covariance(samples)), torch.from_numpy(expected), atol=1e-4)


def test_bad_noise_is_refused():
    samples, _ = correlated_noise(4, 3)
    with pytest.raises(InputError, match="3 noise samples are too few"):
        noise_covariance(samples)
    with pytest.raises(InputError, match="NaN"):
        noise_covariance(correlated_noise(2, 9)[0] * math.nan)
    with pytest.raises(InputError, match="not positive definite"):
        prewhiten(torch.zeros(2, 5, 5, dtype=torch.complex64), torch.diag(torch.tensor([1.0 + 0j, 0])))


def random_lines(n, acceleration, seed=0):
    keep = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 1 / acceleration
    return keep[None, None, None] | lines(n, (n // 2 - 6, n // 2 + 6))


@pytest.mark.parametrize("shape", [(64, 64), (96, 71), (63, 128)])
@pytest.mark.parametrize("acceleration", [1, 2, 4])
@pytest.mark.parametrize("sigma", [0.003, 0.05])
def test_noise_is_estimated_from_lines(shape, acceleration, sigma):
    images, _ = coil_images(shape)
    clean = fft2c(images).expand(6, -1, -1, -1)
    noisy = clean + sigma * normal_like(clean, generators(1, 6))
    mask = random_lines(shape[1], acceleration)
    estimate = estimate_noise_std(torch.where(mask, noisy, 0), mask)
    assert estimate.shape == (6,)
    assert ((estimate / sigma - 1).abs() < 0.15).all()
    assert estimate.mean() / sigma == pytest.approx(1, abs=0.05)
    assert torch.equal(estimate, estimate_noise_std(torch.where(mask, noisy, math.nan), mask))
    assert torch.equal(estimate[2:3], estimate_noise_std(torch.where(mask, noisy, 0)[2:3], mask))


def test_noise_is_estimated_from_scattered_samples():
    shape, sigma = (64, 72), 0.02
    kspace, _ = phantom(shape, noise=sigma)
    mask = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)) < 0.25
    mask[..., 26:38, 30:42] = True
    estimate = estimate_noise_std(torch.where(mask, kspace, math.nan), mask)
    assert estimate[0] == pytest.approx(sigma, rel=0.15)


def test_zero_padding_is_no_silence():
    sigma = 0.02
    kspace, _ = phantom((64, 64), noise=sigma)
    mask = random_lines(64, 2)
    padded = torch.zeros(1, 4, 90, 110, dtype=kspace.dtype)
    padded[..., 13:77, 23:87] = torch.where(mask, kspace, 0)
    wide = torch.zeros(1, 1, 1, 110, dtype=torch.bool)
    wide[..., 23:87] = mask[0]
    wide[..., :23] = wide[..., 87:] = True  # some files call the padding measured
    assert estimate_noise_std(padded, wide)[0] == pytest.approx(sigma, rel=0.15)
    assert estimate_noise_std(torch.zeros_like(padded), wide).tolist() == [0]


def test_noise_alone_is_estimated_without_bias():
    noise = normal_like(torch.zeros(20, 3, 64, 48, dtype=torch.complex64), generators(0, 20))
    assert estimate_noise_std(noise, lines(48, (0, 48))).mean() == pytest.approx(1, abs=0.02)
    uneven = noise * torch.tensor([1.0, 2.0, 3.0])[:, None, None]  # coils are averaged in power
    assert estimate_noise_std(uneven, lines(48, (0, 48))).mean() == pytest.approx(math.sqrt(14 / 3), rel=0.02)


@pytest.mark.parametrize(("path", "tolerance"), [(MPRAGE, 0.15), (T1, 0.15), (SMALL_FOV, 0.4)], ids=lambda p: str(p))
def test_noise_of_a_real_scan_is_that_of_its_background(path, tolerance):
    kspace = load(path)
    images = ifft2c(kspace)[0]
    corners = torch.stack(
        [images[:, y, x] for y in (slice(16), slice(-16, None)) for x in (slice(16), slice(-16, None))]
    )
    background = (corners.abs().flatten(2).median(-1).values.square().mean(1) / (2 * math.log(2))).sqrt().mean()
    for acceleration in (1, 4):
        mask = random_lines(kspace.shape[-1], acceleration)
        estimate = float(estimate_noise_std(torch.where(mask, kspace, 0), mask)[0])
        assert estimate == pytest.approx(float(background), rel=tolerance)
    # noise put on top is found again
    louder = kspace + 3 * estimate * normal_like(kspace, generators(0, 1))
    found = float(estimate_noise_std(louder, lines(kspace.shape[-1], (0, None)))[0])
    assert found == pytest.approx(math.sqrt(10) * estimate, rel=0.1)
