import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import msmri.methods as methods
from msmri.errors import InputError
from msmri.measurement import Measurement
from msmri.methods import available_methods, coil_maps, combine_sets, load_method, maps_power, sense_linop
from msmri.methods.cg_sense import CGSense
from msmri.methods.tuning import tune
from msmri.methods.tv import TotalVariation
from msmri.methods.wavelet import L1Wavelet
from msmri.methods.zero_filled import ZeroFilled
from msmri.metrics import nmse, psnr
from msmri.physics.fourier import fft2c
from msmri.physics.operators import CoilFourier, Identity
from msmri.tensors import generators

SHAPE = (32, 36)
CLASSICAL = [ZeroFilled(), CGSense(), L1Wavelet(iterations=15), TotalVariation(iterations=15)]
each_method = pytest.mark.parametrize("method", CLASSICAL, ids=lambda method: method.name)


def smooth_maps(shape=SHAPE, *, coils=4, sets=1, seed=0):
    rng = np.random.default_rng(seed)
    y, x = (np.linspace(-1, 1, n) for n in shape)
    maps = np.zeros((sets, coils, *shape), dtype=np.complex64)
    for s in range(sets):
        for c in range(coils):
            angle = 2 * np.pi * (c + 0.3 * s) / coils
            distance = (y[:, None] - np.sin(angle)) ** 2 + (x[None, :] - np.cos(angle)) ** 2
            phase = rng.uniform(-2, 2) * y[:, None] + rng.uniform(-2, 2) * x[None, :] + rng.uniform(0, 6)
            maps[s, c] = np.exp(-distance * (1 + s) + 1j * phase)
    maps /= np.sqrt((np.abs(maps) ** 2).sum((0, 1)))
    return torch.from_numpy(maps)[None]


def phantom(shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    y, x = (np.linspace(-1, 1, n) for n in shape)
    image = np.zeros(shape, dtype=np.complex64)
    for _ in range(6):
        centre, radius, value = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.15, 0.5, 2), rng.uniform(0.2, 1)
        inside = ((y[:, None] - centre[0]) / radius[0]) ** 2 + ((x[None, :] - centre[1]) / radius[1]) ** 2 < 1
        image += value * inside
    return torch.from_numpy(image * np.exp(1j * 0.7 * x[None, :]).astype(np.complex64))


def scan(batch=1, *, shape=SHAPE, sets=1, coils=4, noise=0.01, scale=1.0, seed=0, step=3):
    maps = torch.cat([smooth_maps(shape, coils=coils, sets=sets, seed=seed + i) for i in range(batch)])
    image = torch.stack([phantom(shape, seed + i) for i in range(batch)])
    weights = torch.tensor([1.0, 0.3])[:sets].reshape(1, sets, 1, 1)
    encoding = CoilFourier(maps)
    generator = torch.Generator().manual_seed(seed)
    full = encoding(image[:, None] * weights)
    full = full + noise * torch.randn(full.shape, dtype=full.dtype, generator=generator)
    mask = torch.zeros(batch, 1, 1, shape[1], dtype=torch.bool)
    for i in range(batch):
        mask[i, ..., i % step :: step] = True
    middle = shape[1] // 2
    mask[..., middle - 4 : middle + 4] = True
    scales = torch.full((batch, 1, 1, 1), scale)
    values = torch.where(mask, full, 0.0)
    return Measurement(values, mask, encoding, noise, scales, target=image.abs() * weights.norm() * scale)


def part(measurement, i):
    one = slice(i, i + 1)
    return replace(
        measurement,
        values=measurement.values[one],
        mask=measurement.mask[one],
        encoding=CoilFourier(measurement.encoding.maps[one]),
        scale=measurement.scale[one],
        target=measurement.target[one],
    )


def rng(batch=1):
    return generators(0, batch)


def relative(a, b):
    return float((a - b).norm() / b.norm())


# the contract


@each_method
@pytest.mark.parametrize("shape", [(32, 36), (33, 27)])
@pytest.mark.parametrize("sets", [1, 2])
def test_contract(method, shape, sets):
    measurement = scan(2, shape=shape, sets=sets)
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    result = method(measurement, rng(2))
    assert result.samples.shape == (2, 1, *shape)
    assert result.samples.dtype == torch.complex64
    assert result.std is None
    assert torch.equal(result.samples, method(measurement, generators(99, 2)).samples)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


@each_method
def test_target_and_unmeasured_values_are_never_read(method):
    clean = scan(2)
    poisoned = replace(
        clean,
        values=torch.where(clean.mask, clean.values, torch.nan),
        target=torch.full_like(clean.target, torch.nan),
    )
    assert torch.equal(method(poisoned, rng(2)).samples, method(clean, rng(2)).samples)


@each_method
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_image_scales_with_kspace(method, sets, factor):
    measurement = scan(sets=sets)
    scaled = method(replace(measurement, values=measurement.values * factor), rng()).samples
    assert relative(scaled / factor, method(measurement, rng()).samples) < 5e-5


@each_method
def test_result_is_in_the_units_of_the_file(method):
    measurement = scan(2)
    scale = torch.tensor([3.0, 0.01]).reshape(2, 1, 1, 1)
    result = method(measurement.scaled(scale), rng(2)).samples
    assert relative(result, method(measurement, rng(2)).samples) < 2e-4


@each_method
@pytest.mark.parametrize("sets", [1, 2])
def test_slices_do_not_see_each_other(method, sets):
    batch = scan(3, sets=sets)
    loud = replace(batch, values=batch.values * torch.tensor([1.0, 1e4, 1e-3]).reshape(3, 1, 1, 1))
    together = method(loud, rng(3)).samples
    for i in range(3):
        assert relative(method(part(loud, i), rng()).samples, together[i : i + 1]) < 1e-6


@each_method
def test_global_phase_passes_through(method):
    measurement = scan()
    turned = method(replace(measurement, values=measurement.values * 1j), rng()).samples
    assert relative(turned, 1j * method(measurement, rng()).samples) < 2e-4


@each_method
def test_zero_slice_gives_zeros(method):
    measurement = replace(scan(2), values=scan(2).values * torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1))
    samples = method(measurement, rng(2)).samples
    assert torch.equal(samples[0], torch.zeros_like(samples[0]))
    assert samples[1].abs().max() > 0.1


@each_method
def test_two_sets_with_an_empty_second_are_one_set(method):
    one = scan()
    maps = torch.cat([one.encoding.maps, torch.zeros_like(one.encoding.maps)], dim=1)
    two = replace(one, encoding=CoilFourier(maps))
    if method.name == "l1-wavelet":  # a shared peak and step, and the second set never moves
        assert relative(method(two, rng()).samples, method(one, rng()).samples) < 1e-4
    else:
        assert relative(method(two, rng()).samples, method(one, rng()).samples) < 1e-5


@each_method
def test_missing_maps_are_an_input_error(method):
    blind = replace(scan(), encoding=None, source=("scan.h5#3",))
    with pytest.raises(InputError, match=r"scan.h5#3: .*coil maps.*ESPIRiT"):
        method(blind, rng())
    photograph = Measurement(torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool), Identity())
    if isinstance(method, ZeroFilled):  # needs no coils: what was measured, zero elsewhere
        assert torch.equal(method(photograph, rng()).image, photograph.values)
    else:
        with pytest.raises(InputError):
            method(photograph, rng())


@each_method
def test_reference_is_bibtex(method):
    assert method.reference.startswith("@article{")
    assert method.reference.count("{") == method.reference.count("}")
    assert "year" in method.reference


# zero-filled


def test_zero_filled_of_full_kspace_is_the_image():
    measurement = scan(noise=0.0)
    full = replace(
        measurement,
        values=measurement.encoding(phantom()[None, None]),
        mask=torch.ones_like(measurement.mask),
    )
    assert relative(ZeroFilled()(full, rng()).samples, phantom()[None, None]) < 1e-5


# CG-SENSE


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("weight", [1e-3, 0.1])
def test_cg_sense_solves_the_normal_equations(sets, weight):
    shape = (6, 7)
    maps = smooth_maps(shape, sets=sets, coils=5).to(torch.complex128) * 3.0
    encoding = CoilFourier(maps)
    mask = torch.tensor([True, False, True, True, False, True, True]).reshape(1, 1, 1, 7)
    values = torch.randn(1, 5, *shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    measurement = Measurement(values, mask, encoding)
    n = sets * 42
    columns = [encoding(column.reshape(1, sets, *shape)) for column in torch.eye(n, dtype=torch.complex128)]
    matrix = torch.stack([(column * mask).flatten() for column in columns], dim=1)
    power = max(
        float(torch.linalg.matrix_norm(maps[0, :, :, i, j], ord=2)) ** 2
        for i in range(shape[0])
        for j in range(shape[1])
    )
    normal = matrix.mH @ matrix + weight * power * torch.eye(n, dtype=torch.float64)
    exact = torch.linalg.solve(normal, matrix.mH @ (values * mask).flatten()).reshape(1, sets, *shape)
    result = CGSense(weight=weight, iterations=400, tolerance=1e-12)(measurement, rng()).samples
    assert relative(result[:, 0], combine_sets(exact)) < 1e-8
    early = CGSense(weight=weight, iterations=2)(measurement, rng()).samples
    assert relative(early[:, 0], combine_sets(exact)) > 1e-4


def test_cg_sense_agrees_with_sigpy():
    import sigpy.mri

    measurement = scan()
    maps, mask = measurement.encoding.maps[0, 0].numpy(), measurement.mask[0].numpy().astype(np.float32)
    app = sigpy.mri.app.SenseRecon(
        measurement.values[0].numpy(), maps, lamda=0.02, weights=mask, max_iter=60, show_pbar=False
    )
    method = CGSense(weight=0.02, iterations=60)  # these maps have unit root sum of squares
    assert relative(method(measurement, rng()).samples[0, 0], torch.from_numpy(app.run())) < 1e-4


@pytest.mark.parametrize("sets", [1, 2, 3])
def test_maps_power_is_the_largest_eigenvalue(sets):
    maps = torch.cat([smooth_maps((5, 6), coils=4, seed=s) for s in range(2 * sets)]).reshape(2, sets, 4, 5, 6)
    maps = maps * torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1, 1)
    for i in range(2):
        norms = [torch.linalg.matrix_norm(maps[i, :, :, a, b], ord=2) ** 2 for a in range(5) for b in range(6)]
        assert float(maps_power(maps)[i]) == pytest.approx(float(max(norms)), rel=1e-5)


# the compressed-sensing methods against sigpy


def slice_for_sigpy(measurement):
    maps, mask = measurement.encoding.maps[0, 0].numpy(), measurement.mask[0].numpy().astype(np.float32)
    peak = float(measurement.operator.adjoint(measurement.values).abs().max())
    return measurement.values[0].numpy(), maps, mask, peak


@pytest.mark.parametrize("shape", [(32, 36), (33, 27)])
def test_l1_wavelet_agrees_with_sigpy(shape):
    import sigpy.mri

    measurement = scan(shape=shape)
    values, maps, mask, peak = slice_for_sigpy(measurement)
    app = sigpy.mri.app.L1WaveletRecon(
        values, maps, 2e-3 * peak, weights=mask, wave_name="db2", alpha=1.0, max_iter=25, show_pbar=False
    )
    method = L1Wavelet(weight=2e-3, iterations=25, wavelet="db2")
    assert relative(method(measurement, rng()).samples[0, 0], torch.from_numpy(app.run())) < 1e-4


def test_l1_wavelet_ends_where_sigpy_ends_with_its_own_step():
    import sigpy.mri

    measurement = scan()
    values, maps, mask, peak = slice_for_sigpy(measurement)
    app = sigpy.mri.app.L1WaveletRecon(values, maps, 1e-2 * peak, weights=mask, max_iter=300, show_pbar=False)
    method = L1Wavelet(weight=1e-2, iterations=300)
    assert relative(method(measurement, rng()).samples[0, 0], torch.from_numpy(app.run())) < 2e-3


@pytest.mark.parametrize("shape", [(32, 36), (33, 27)])
def test_tv_agrees_with_sigpy(shape):
    import sigpy.mri

    measurement = scan(shape=shape)
    values, maps, mask, peak = slice_for_sigpy(measurement)
    steps = {"sigma": 0.05, "tau": 1 / (0.05 * 9)}
    app = sigpy.mri.app.TotalVariationRecon(
        values, maps, 2e-3 * peak, weights=mask, max_iter=25, show_pbar=False, **steps
    )
    method = TotalVariation(weight=2e-3, iterations=25, dual_step=0.05)
    assert relative(method(measurement, rng()).samples[0, 0], torch.from_numpy(app.run())) < 1e-4


def test_tv_is_nearer_the_minimum_than_sigpy_with_its_own_step():
    import sigpy.mri

    measurement = scan()
    values, maps, mask, peak = slice_for_sigpy(measurement)
    sense, weight = sense_linop(maps[None], mask), 1e-3 * peak

    def objective(image):
        differences = [image - np.roll(image, 1, axis) for axis in (0, 1)]
        return 0.5 * np.linalg.norm(sense(image) - values) ** 2 + weight * np.abs(differences).sum()

    def theirs(iterations, **steps):
        return sigpy.mri.app.TotalVariationRecon(
            values, maps, weight, weights=mask, max_iter=iterations, show_pbar=False, **steps
        ).run()

    ours = TotalVariation(weight=1e-3)(measurement, rng()).samples[0, 0].numpy()
    minimum = objective(theirs(1000, sigma=0.05, tau=2.2))
    assert objective(ours) == pytest.approx(minimum, rel=0.01)
    assert objective(theirs(200)) > 1.02 * minimum


@pytest.mark.parametrize("method", [L1Wavelet(iterations=60), TotalVariation(iterations=60)], ids=lambda m: m.name)
def test_regularisation_is_applied_to_both_sets(method):
    measurement = scan(sets=2, noise=0.03)
    heavy = replace(method, weight=0.03)(measurement, rng()).magnitude[0]
    light = replace(method, weight=1e-5)(measurement, rng()).magnitude[0]
    variation = [float(torch.diff(image, dim=0).abs().sum()) for image in (heavy, light)]
    assert variation[0] < 0.9 * variation[1]


@pytest.mark.parametrize("sets", [1, 2, 3])
def test_sense_linop_is_our_operator(sets):
    measurement = scan(shape=(12, 15), sets=2)
    maps = smooth_maps((12, 15), sets=sets)
    operator = replace(measurement, encoding=CoilFourier(maps)).operator
    linop = sense_linop(maps[0].numpy(), measurement.mask[0].numpy())
    image = torch.randn(1, sets, 12, 15, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    theirs = linop(image[0].numpy().reshape(linop.ishape))
    assert relative(torch.from_numpy(theirs)[None], operator(image)) < 1e-5
    back = linop.H(theirs).reshape(sets, 12, 15)
    assert relative(torch.from_numpy(back)[None], operator.adjoint(operator(image))) < 1e-5


def test_methods_are_ordered_as_expected():
    measurement = scan(shape=(64, 64), noise=0.01, step=4)
    scores = {
        name: psnr(measurement.target[0], load_method(name)(measurement, rng()).magnitude[0])
        for name in ("zero-filled", "cg-sense", "l1-wavelet", "tv")
    }
    assert scores["zero-filled"] + 3 < scores["cg-sense"] < scores["l1-wavelet"] < scores["tv"]


@pytest.mark.parametrize(
    "options",
    [
        (CGSense, {"weight": -1.0}),
        (CGSense, {"iterations": 0}),
        (L1Wavelet, {"wavelet": "db99"}),
        (L1Wavelet, {"weight": -1}),
        (TotalVariation, {"dual_step": 0.0}),
        (TotalVariation, {"weight": float("nan")}),
    ],
)
def test_bad_field_values(options):
    build, fields = options
    with pytest.raises(InputError):
        build(**fields)


def test_infinite_kspace_names_the_slice():
    measurement = replace(scan(2), source=("a.h5#0", "a.h5#1"))
    values = measurement.values.clone()
    values[1, 0, 0, measurement.mask[1, 0, 0].nonzero()[0]] = torch.inf
    with pytest.raises(InputError, match=r"a\.h5#1"):
        TotalVariation(iterations=1)(replace(measurement, values=values), rng(2))


# combining sets


@settings(max_examples=30, deadline=None)
@given(sets=st.integers(1, 3), seed=st.integers(0, 100))
def test_combination_keeps_energy_and_first_phase(sets, seed):
    image = torch.randn(2, sets, 3, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    combined = combine_sets(image)
    assert torch.allclose(combined.abs(), image.abs().square().sum(1).sqrt())
    assert torch.allclose(combined.angle(), image[:, 0].angle(), atol=1e-5)


def test_combination_where_the_first_set_is_zero():
    image = torch.tensor([0.0 + 0j, 3j]).reshape(1, 2, 1, 1)
    assert combine_sets(image).item() == pytest.approx(3.0)
    colours = torch.rand(1, 3, 4, 4)
    assert combine_sets(colours) is colours  # the channels of a real image are no sets


def test_unbatched_maps_serve_the_whole_batch():
    measurement = scan(2)
    shared = replace(measurement, encoding=CoilFourier(measurement.encoding.maps[0]))
    assert coil_maps(shared).shape == measurement.encoding.maps.shape
    assert ZeroFilled()(shared, rng(2)).samples.shape == (2, 1, *SHAPE)


# the table of methods


def test_built_in_methods_need_no_installation():
    names = list(available_methods())
    assert names[:5] == ["zero-filled", "cg-sense", "l1-wavelet", "tv", "msm"]
    for method in CLASSICAL:
        assert type(load_method(method.name)) is type(method)
    assert load_method("tv", weight=0.25) == TotalVariation(weight=0.25)


def test_unknown_names_and_options():
    with pytest.raises(
        InputError, match="unknown method 'sense'; available: zero-filled, cg-sense, l1-wavelet, tv, msm"
    ):
        load_method("sense")
    with pytest.raises(
        InputError, match="'cg-sense' has no option 'lamda'; its options: weight, iterations, tolerance"
    ):
        load_method("cg-sense", lamda=1.0)
    with pytest.raises(InputError, match="does not accept these options"):
        load_method("tv", weight="much")


def plug_ins(monkeypatch, **values):
    found = [EntryPoint(name.replace("_", "-"), value, methods.GROUP) for name, value in values.items()]
    monkeypatch.setattr(methods, "entry_points", lambda group: found if group == methods.GROUP else [])


def test_plug_ins_are_found_and_a_broken_one_harms_nobody(monkeypatch):
    plug_ins(monkeypatch, mine="msmri.methods.zero_filled:ZeroFilled", broken="no_such_package.recon:Mine")
    assert {"mine", "broken", "tv"} <= set(available_methods())
    assert isinstance(load_method("mine"), ZeroFilled)
    assert isinstance(load_method("zero-filled"), ZeroFilled)
    with pytest.raises(InputError, match=r"'broken' of .*no_such_package\.recon:Mine.*ModuleNotFoundError"):
        load_method("broken")


def test_a_plug_in_cannot_take_the_place_of_a_built_in(monkeypatch):
    plug_ins(monkeypatch, tv="msmri.methods.zero_filled:ZeroFilled")
    with pytest.warns(UserWarning, match="method 'tv' of .*ZeroFilled.* is left out"):
        assert isinstance(load_method("tv"), TotalVariation)
    plug_ins(monkeypatch, tv=methods.BUILT_IN["tv"])  # the package's own announcement, once installed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        available_methods()


def test_no_heavy_import_before_it_is_needed():
    code = (
        "import sys, msmri.methods.wavelet, msmri.methods.tv, msmri.methods.cg_sense, msmri.methods.zero_filled;"
        "print([m for m in ('sigpy', 'matplotlib', 'skimage', 'fastmri', 'pywt') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# tuning


def test_tune_finds_the_best_weight():
    validation = [scan(2, noise=0.05, seed=5), scan(noise=0.05, seed=9)]
    best, table = tune(CGSense(), validation)
    weights, scores = [row["weight"] for row in table], [row["psnr"] for row in table]
    assert weights == sorted(weights)
    assert {row["stage"] for row in table} == {"grid", "refined"}
    assert {row["slices"] for row in table} == {3}
    assert best.weight == weights[int(np.argmax(scores))]
    dense = np.geomspace(best.weight / 3, best.weight * 3, 15)
    means = []
    for weight in dense:
        values = [psnr(m.target[i], CGSense(weight=weight)(m, rng(len(m.values))).magnitude[i])
                  for m in validation for i in range(len(m.values))]  # fmt: skip
        means.append(np.mean(values))
    assert max(scores) > max(means) - 0.01
    assert abs(np.log(dense[int(np.argmax(means))] / best.weight)) < 0.2
    assert best.iterations == CGSense().iterations


@pytest.mark.parametrize("factors", [(0.15, 1.4, 8.0), (0.125, 0.7, 6.0)])  # the best lies below, above the middle
def test_tune_refines_on_both_sides_of_the_best_grid_point(factors):
    validation = [scan(noise=0.05)]
    best, _ = tune(CGSense(), validation, refinements=12)
    again, table = tune(CGSense(), validation, grid=[factor * best.weight for factor in factors], refinements=12)
    assert again.weight == pytest.approx(best.weight, rel=0.15)
    assert max(table, key=lambda row: row["psnr"])["stage"] == "refined"


def test_tune_minimises_errors_and_takes_a_grid():
    validation = [scan(noise=0.1)]
    by_error, table = tune(CGSense(), validation, metric=nmse, grid=[1.0, 1e-3, 0.1, 0.01], refinements=0)
    assert [row["weight"] for row in table] == [1e-3, 0.01, 0.1, 1.0]
    assert by_error.weight == min(table, key=lambda row: row["nmse"])["weight"]


def test_tune_keeps_whole_numbers_whole():
    seen = []

    class Spy(CGSense):
        tunable: ClassVar = {"iterations": (1, 3, 8, 20)}

        def __call__(self, measurement, rng):
            seen.append(self.iterations)
            return super().__call__(measurement, rng)

    best, table = tune(Spy(weight=1e-3), [scan(noise=0.05)], refinements=6)
    assert seen == [1, 3, 8, 20] and all(type(one) is int for one in seen)  # nothing between them
    assert type(best.iterations) is int and best.iterations == max(table, key=lambda row: row["psnr"])["iterations"]
    assert best.iterations > 1


def test_tune_warns_at_the_edge_of_the_grid():
    with pytest.warns(UserWarning, match="best weight, 0.3, is at the lower end of its grid"):
        best, _ = tune(CGSense(), [scan(noise=0.0)], grid=[0.3, 0.6, 0.9], refinements=3)
    assert 0.3 <= best.weight <= 0.6


def test_tune_hides_the_target_from_the_method():
    seen = []

    class Spy(CGSense):
        def __call__(self, measurement, rng):
            seen.append(measurement.target)
            return super().__call__(measurement, rng)

    tune(Spy(), [scan(noise=0.05)], grid=[0.001, 0.03, 1.0], refinements=0)
    assert seen == [None, None, None]


def test_tune_refuses_what_it_cannot_tune():
    with pytest.raises(InputError, match="'zero-filled' has no weight"):
        tune(ZeroFilled(), [scan()])
    with pytest.raises(InputError, match="targets"):
        tune(CGSense(), [replace(scan(), target=None)])
    with pytest.raises(InputError, match="targets"):
        tune(CGSense(), [])
    with pytest.raises(InputError, match="positive"):
        tune(CGSense(), [scan()], grid=[0.0, 1.0])
    with pytest.raises(InputError, match="'iterations' of method 'cg-sense' cannot be tuned; tunable: weight"):
        tune(CGSense(), [scan()], field="iterations")


def test_fft_convention_of_the_phantom():
    full = fft2c(phantom()[None])
    assert full.abs().flatten().argmax() == (SHAPE[0] // 2) * SHAPE[1] + SHAPE[1] // 2
