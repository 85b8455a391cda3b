"""Devices without one: what runs on a pretended CUDA device stays there, and does what it does on the CPU.

torch's fake tensors know their device and refuse operations that mix devices, but hold no values, so that a branch on
data ends a run. Those here have their values beside them, on the CPU. What they cannot tell is whether the kernels of
a real device compute the same; and gradients, for which autograd's engine asks a driver, are left out.
"""

import copy
import dataclasses

import pytest
import torch
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from msmri.cli.restore import moved as moved_by_restore
from msmri.measurement import Measurement
from msmri.methods.adps import AALD, ADPS, AOS, DDNM, DPS, DiffPIR
from msmri.methods.adps_training import AmbientLoss, CleanLoss
from msmri.methods.cg_sense import CGSense
from msmri.methods.generation import Generation
from msmri.methods.msm import MSM
from msmri.methods.msm_noisy import NoisyLinewiseMSM, NoisyMSM
from msmri.methods.msm_training import LinewiseMSM, NoiselessMSM
from msmri.methods.ssdu_training import Split, SSDULoss, SupervisedLoss
from msmri.methods.zero_filled import ZeroFilled
from msmri.model.ambient import AmbientDenoiser, FurtherPixels, ImageDenoiser
from msmri.model.denoiser import ComplexChannels, EpsilonVP, GaussianDenoiser, VPSchedule
from msmri.model.denoiser_partial import DenoiserPartial
from msmri.model.partial import MeasurementPartial
from msmri.model.prior import load_prior
from msmri.model.unet import UNet
from msmri.model.unrolled import ResNet, Unrolled
from msmri.physics.coils import combine, compress_coils, estimate_noise_std, noise_covariance, prewhiten
from msmri.physics.espirit import Espirit, espirit
from msmri.physics.fourier import centring_phase, fft2c, ifft2c
from msmri.physics.masks import RandomLines
from msmri.physics.operators import CoilFourier, Identity, Subsample, selected
from msmri.physics.restoration import BlockAverage, Blur, SignedHadamard
from msmri.physics.solve import conjugate_gradient, largest_eigenvalue
from msmri.physics.tiles import FurtherTiles, RandomTiles
from msmri.sampling import schedule
from msmri.sampling.aggregate import ImagePartial, aggregate, take
from msmri.sampling.guided import guided_euler
from msmri.sampling.likelihood import gradient_step, project, proximal
from msmri.sampling.reverse import Step, reverse_diffusion
from msmri.tensors import generators, normal_like
from msmri.testing import phantom_measurement
from msmri.train import _to_device

SHAPE = (24, 28)
WRONG = "same device"


class Pretended(FakeTensorMode):
    """Fake tensors of any device, whose values are kept on the CPU; random draws must come from CPU generators."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.busy = False

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if self.busy:  # what a fake operation consists of
            return super().dispatch(func, types, args, kwargs)
        given, tree = tree_flatten((args, kwargs))
        if func is not torch.ops.aten.lift_fresh.default and any(map(_real, given)):
            given = [self._fake(x) for x in given]
            args, kwargs = tree_unflatten(given, tree)
        drawn = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        drawn = drawn and not (func is torch.ops.aten.dropout.default and not all(args[1:]))  # which does nothing
        streams = [x for x in given if isinstance(x, Generator)]
        assert streams or not drawn, f"{func} draws from global random state"
        self.busy = True
        try:
            with _disable_current_modes():
                there, named = tree_unflatten([_value(x) for x in given], tree)
                values = func(*there, **named)
            devices = {x.device for x in given if isinstance(x, Tensor) and x.ndim}
            if not any(isinstance(x, Tensor) for x in tree_leaves(values)):
                assert len(devices) <= 1, f"{func}: not on the {WRONG}"
                return values
            try:
                out = super().dispatch(func, types, args, kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):  # the values tell
                (device,) = devices
                out = tree_map(lambda x: self._like(x, device), values)
        finally:
            self.busy = False
        for fake, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
            if isinstance(value, Tensor):
                assert fake.shape == value.shape and fake.dtype == value.dtype
                assert not streams or fake.device.type == "cpu", f"{func} draws on another device than its generator"
                fake.value, fake.constant = value, None
        return out

    def _fake(self, x):
        """Give what was made outside the mode, which is on the CPU, as a fake tensor."""
        if not _real(x):
            return x
        fake = self.from_tensor(x)
        fake.value = x
        return fake

    def _like(self, value, device):
        with self:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _real(x):
    return isinstance(x, Tensor) and not isinstance(x, FakeTensor)


def _value(x):
    if isinstance(x, FakeTensor):
        return x.value
    return torch.device("cpu") if isinstance(x, torch.device) else x


def moved(x, device="cuda"):
    """Put a thing on a device, with whatever it consists of."""
    if isinstance(x, nn.Module):  # in place
        for part in x.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = nn.Parameter(weight.detach().to(device), weight.requires_grad)
            part._buffers.update({name: buffer.to(device) for name, buffer in part._buffers.items()})
        return x
    if dataclasses.is_dataclass(x):
        fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
        return dataclasses.replace(x, **{name: moved(value, device) for name, value in fields.items()})
    if isinstance(x, (tuple, list)) and not hasattr(x, "_fields"):
        return type(x)(moved(value, device) for value in x)
    return x.to(device) if isinstance(x, Tensor) else x


def tensors(result):
    """List the tensors of a result."""
    if isinstance(result, (list, tuple)):
        return [tensor for part in result for tensor in tensors(part)]
    if dataclasses.is_dataclass(result):
        result = [getattr(result, field.name) for field in dataclasses.fields(result)]
        return [tensor for part in result for tensor in tensors(part)]
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def alike(call, *things):
    """Check that a call gives on the pretended device what it gives on the CPU, and that all of it is there."""
    things, others = copy.deepcopy(things), things
    expected = tensors(call(*others))
    with Pretended():
        found = tensors(call(*moved(things)))
        assert len(found) == len(expected) > 0
        for one in found:
            assert one.device.type == "cuda", one
    for one, other in zip(found, expected):
        assert bool(torch.isfinite(other.abs()).all())
        torch.testing.assert_close(one.value.detach(), other.detach(), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a mode holds in one thread
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    monkeypatch.setattr("msmri.model.partial._FOLLOWING", (1, 1))


@pytest.fixture
def no_engine(monkeypatch):
    """Put ones in place of gradients, and nothing in place of training: autograd's engine asks a driver for streams."""
    monkeypatch.setattr(torch.autograd, "grad", lambda result, leaf: (torch.ones_like(leaf) * (result.detach() > 0),))
    monkeypatch.setattr(Tensor, "backward", lambda result: None)


@pytest.fixture(scope="module")
def scan() -> Measurement:
    """Two slices of 24 x 28 with 3 coils, scaled as for training."""
    scan = phantom_measurement(SHAPE, coils=3)
    scan = scan.scaled(scan.centre_scale())
    return dataclasses.replace(scan, target=None)


@pytest.fixture(scope="module")
def full() -> Measurement:
    """The same fully sampled."""
    scan = phantom_measurement(SHAPE, coils=3)
    image = scan.target[:, None].to(torch.complex64)
    mask = torch.ones(1, 1, 1, SHAPE[1], dtype=torch.bool)
    return dataclasses.replace(scan, values=scan.encoding(image), mask=mask, target=None)


class Small(nn.Module):
    """One convolution, shifted by what a condition says."""

    def __init__(self, inputs: int, outputs: int, conditions: int):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.shift = nn.Linear(conditions, outputs)

    def forward(self, channels: Tensor, condition: Tensor) -> Tensor:
        return self.convolution(channels).tanh() + self.shift(condition)[..., None, None]


def network(inputs=4, outputs=2, conditions=4, *, real=False):
    """Give a small network, or a small one of the kind that the priors have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not real:
            return Small(inputs, outputs, conditions)
        net = UNet(inputs, outputs, (8, 16), 1, conditions=conditions)
        nn.init.normal_(net.network.conv_out.weight, std=0.05)
    return net


def partial(*, real=False, **options):
    few = {"wiener_iterations": 1, "consistency_iterations": 1, **options}
    return MeasurementPartial(network(real=real), torch.linspace(0, -4, 48).exp(), **few)


class Timed(nn.Module):
    """A network of the published kind: image and time in, noise out."""

    def __init__(self):
        super().__init__()
        self.inner = network(2, 2, 1)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        return self.inner(image, time[:, None] / 1000)


def published():
    return DenoiserPartial(EpsilonVP(ComplexChannels(Timed()), nearest=True))


def unrolled(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Unrolled(ResNet(8, 1, patch=2), unrolls=2, cg_iterations=2, residual=True, **options)


def noisy(scan, sigma=0.3):
    """The scan's state at a noise level, all lines of it."""
    return scan.values + sigma * normal_like(scan.values, generators(1, len(scan.values)))


# the pretended device itself


def test_the_pretended_device_has_values_and_refuses_what_a_real_one_would():
    stream = torch.Generator().manual_seed(0)
    with Pretended():
        here, there = torch.arange(3.0), torch.arange(3.0).to("cuda")
        picked = (there * 2)[there > 0]
        assert picked.device.type == "cuda" and picked.tolist() == [2.0, 4.0] and bool((picked > 3).any())
        assert torch.equal(there.nonzero().flatten().value, torch.tensor([1, 2]))
        for mix in (torch.add, torch.equal, lambda a, b: b.index_add(0, a.long(), b), lambda a, b: torch.cat([a, b])):
            with pytest.raises((RuntimeError, AssertionError), match=WRONG):
                mix(here, there)
        with pytest.raises(AssertionError, match="another device"):
            torch.randn(3, generator=stream, device="cuda")
        with pytest.raises(AssertionError, match="global random state"):
            torch.randn(3, device="cuda")


# physics


def test_fourier(scan):
    alike(lambda x: (fft2c(x), ifft2c(x)), scan.values)
    alike(lambda x: centring_phase((5, 6), dtype=torch.complex64, device=x.device), scan.values)


@pytest.mark.parametrize("sets", [1, 2])
def test_operators(scan, sets):
    coils = CoilFourier(scan.encoding.maps.repeat(1, sets, 1, 1, 1) / sets**0.5)
    image = coils.adjoint(scan.values)

    def every(coils, mask, image, values):
        select = Subsample(mask)
        both = select @ coils
        weight = mask.float() + 0.1
        return [
            *(coils(image), coils.adjoint(values), coils.normal(image), coils.weighted_normal(image, weight)),
            *(both(image), both.adjoint(values), both.normal(image), both.weighted_normal(image, weight)),
            *(select(values), select.pseudo_inverse(values), selected(mask, coils)(image)),
            *(coils.kspace_weight(weight), both.kspace_weight(weight), Identity()(image)),
            *(take(both, torch.tensor([1, 0]))(image), take(both, torch.tensor([1, 1]))(image)),
        ]

    alike(every, coils, scan.mask, image, scan.values)


def test_solvers(scan):
    def solve(operator, right):
        def normal(x):
            return operator.normal(x) + 0.1 * x

        tolerant = conjugate_gradient(normal, right, start=0.5 * right, iterations=5, tolerance=0.1)
        return conjugate_gradient(normal, right, iterations=3), tolerant

    right = scan.operator.adjoint(scan.values)
    alike(solve, scan.operator, right)
    alike(lambda a, x: largest_eigenvalue(a.normal, x, generators(0, 2), iterations=5), scan.operator, right)


def test_degradations(scan):
    image = scan.encoding.adjoint(scan.values)[..., :16, :16]
    sums = SignedHadamard.draw((16, 16), 100, generators(0, 1)[0])
    for operator in (BlockAverage(4), Blur.gaussian(1.0), sums):

        def every(a, x):
            y = a(x)
            return y, a.adjoint(y), a.pseudo_inverse(y), a.normal(x)

        alike(every, operator, image)


def test_coils_and_noise(scan, full):
    alike(estimate_noise_std, scan.values, scan.mask)
    alike(lambda scan: (scan.centre_scale(), scan.working_scale(), scan.acceleration), scan)
    alike(lambda x, maps: combine(ifft2c(x), maps), scan.values, scan.encoding.maps)
    alike(lambda x: (compress_coils(x, 2), compress_coils(x, 2, shared=True)), full.values)
    alike(lambda x: prewhiten(x, noise_covariance(x.flatten(2)[0])), noisy(full))


def test_espirit(full):
    values = noisy(full, 0.01)[:1]
    alike(lambda x: espirit(x, calibration_width=8, kernel_width=3, phase_reference="first"), values)
    alike(Espirit(kernel_width=3, max_calibration=8), values, full.mask)
    alike(Espirit(sets="auto", kernel_width=3, max_calibration=8, phase_reference="image"), values, full.mask)


# priors


@pytest.mark.parametrize("kind", ["small", "shipped", "published", "image", "oracle"])
def test_partial_denoisers(scan, kind):
    model = {
        "small": partial,
        "shipped": load_prior,
        "published": published,
        "image": lambda: ImagePartial(EpsilonVP(ComplexChannels(Timed()))),
        "oracle": lambda: DenoiserPartial(ImageDenoiser(network(2, 2, 1, real=True))),
    }[kind]()
    if kind == "shipped":  # as it is, but for the number of iterations
        assert len(model.later) == 2
        model.reweightings, model.reweighted_iterations, model.reduced = 1, 1, False
        model.wiener_iterations = model.consistency_iterations = 1
    sigma = torch.where(scan.mask, 0.05, 0.3)

    def estimate(model, state, mask, encoding, sigma):
        with torch.no_grad():
            one = model(state, mask, encoding, sigma)
            return one, model(state, mask | (sigma > 0.1), encoding, sigma.amax((-3, -2, -1), keepdim=True))

    alike(estimate, model, noisy(scan), scan.mask, scan.encoding, sigma)


def test_what_the_prior_tells_of_a_scan(scan):
    def every(model, values, mask, encoding, noise):
        with torch.no_grad():
            judged = model.cross_validate(values, mask, encoding, noise, torch.Generator().manual_seed(0))
            sigma = torch.where(mask, noise, 100.0)
            follow = model.following(judged.gain)
            first = follow(values, torch.ones_like(mask), encoding, sigma)
            second = follow(values.repeat(2, 1, 1, 1), torch.ones_like(mask), encoding, sigma)
            return judged.gain, judged.error, first, second, model.scan_variance(values, mask, noise)

    one, noise = take(scan.encoding, torch.tensor([0])), torch.full((1, 1, 1, 1), 0.02)
    alike(every, partial(reweightings=1, reweighted_iterations=1), scan.values[:1], scan.mask[:1], one, noise)


def test_reduced_precision_stays_on_the_device(scan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # or autocast to it would be refused
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    model, seen = partial(bfloat16=True), []
    with Pretended(), torch.no_grad():
        there, here = moved(model), moved(scan)
        there.network.network.convolution.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
        estimate = there(here.values, here.mask, here.encoding, torch.full((1, 1, 1, 1), 0.3).to("cuda"))
    assert seen == [torch.bfloat16] and estimate.device.type == "cuda" and estimate.dtype == torch.complex64


def test_gaussian_denoiser(scan):
    image = scan.encoding.adjoint(scan.values)
    prior = GaussianDenoiser(torch.zeros(1, *SHAPE, dtype=torch.complex64), torch.rand(1, *SHAPE), fft2c, ifft2c)
    alike(lambda prior, x: (prior.denoise(x, 0.3), prior.sample(generators(0, 2))), prior, image)
    with Pretended():  # a prior made on the CPU serves images anywhere
        assert prior.denoise(image.to("cuda"), 0.3).device.type == "cuda"


# training


LOSSES = {
    "noiseless": (NoiselessMSM(), published),
    "noiseless log-normal": (NoiselessMSM(sigma_mean=-1.2), partial),
    "linewise": (LinewiseMSM(), partial),
    "noisy": (NoisyMSM(), published),
    "noisy log-normal": (NoisyMSM(sigma_mean=-1.2, stop_gradient=False), published),
    "noisy warm-up": (NoisyMSM(warm_up=True, noise_std=0.1), published),
    "noisy linewise": (NoisyLinewiseMSM(), partial),
    "ambient": (AmbientLoss(), lambda: AmbientDenoiser(network(4, 2, 1))),
    "ambient relative": (
        AmbientLoss(FurtherPixels(), error="kspace", weighting="relative"),
        lambda: AmbientDenoiser(network(4, 2, 1), iterations=2),
    ),
    "ambient kept": (AmbientLoss(FurtherTiles(), redraw=False), lambda: AmbientDenoiser(network(4, 2, 1))),
    "ssdu": (SSDULoss(), unrolled),
    "ssdu multi": (SSDULoss(Split("uniform"), masks=3), lambda: unrolled(warm_start=True)),
    "ssdu columns": (SSDULoss(Split("columns", 0.2), masks=0), lambda: unrolled(checkpoint=True)),
    "clean": (CleanLoss(), lambda: ImageDenoiser(network(2, 2, 1))),
    "supervised": (SupervisedLoss(masks=0), unrolled),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(scan, full, name):
    loss, make = LOSSES[name]
    batch = full if name in ("clean", "supervised") else scan
    if "tiles" in str(loss).lower():
        batch = dataclasses.replace(batch, mask=batch.mask.expand(-1, -1, *SHAPE).clone())

    def step(model, batch):
        value = loss(model, batch, torch.Generator().manual_seed(3))
        assert value.requires_grad
        return value

    alike(step, make().train(), batch)


def test_a_step_of_the_optimiser():
    def step(model):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 0.1)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimiser.step()
        return norm, list(model.parameters())

    alike(step, partial())


def test_batches_are_moved_whole(scan):
    with Pretended():
        for move in (_to_device, moved_by_restore):
            found = move(scan, "cuda")
            everything = (found.values, found.mask, found.noise_std, found.scale, found.encoding.maps)
            assert all(x.device.type == "cuda" for x in everything)
        sums = dataclasses.replace(scan, encoding=SignedHadamard.draw(SHAPE, 100, generators(0, 1)[0]))
        operator = moved_by_restore(sums, "cuda").encoding
        assert operator.signs.device.type == operator.rows.device.type == "cuda"


# sampling


def test_schedules():
    trained = VPSchedule().sigmas
    alike(lambda s: (schedule.vp(10, s), schedule.ancestral(schedule.vp(10, s), 0.8)), trained)
    alike(lambda s: (VPSchedule().sigma(s), VPSchedule().t(s)), trained[::100].float())
    alike(lambda t: VPSchedule().sigma(t), torch.arange(4))


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_aggregation(scan, mode):
    masks = torch.stack([RandomLines(4.0).draw(SHAPE, g) for g in generators(0, 6)]).reshape(3, 2, 1, 1, SHAPE[1])

    def average(model, state, masks, encoding, sigma):
        step = Step(state, torch.ones_like(state), sigma.amax())
        eta = torch.where(masks[0], 0.5, 1.0)
        with torch.no_grad():
            return aggregate(model, step, masks, encoding, sigma, mode, rng=generators(0, 2), eta=eta)

    sigma = torch.full((2, 1, 1, 1), 0.3)
    alike(average, ImagePartial(published().denoiser), noisy(scan), masks, scan.encoding, sigma)


def test_likelihood_steps(scan):
    def steps(z, y, mask, encoding, blur, weight):
        return [
            gradient_step(z, y, Subsample(mask), 2.0),
            gradient_step(z, y, Subsample(mask) @ encoding @ blur, weight) if z.shape[1] == 1 else z,
            *proximal(z, y, mask, encoding, weight=0.3, iterations=3),
            *proximal(z, y, mask, encoding, weight=weight, iterations=3, start=encoding.adjoint(y), degradation=blur),
            project(z, encoding),
        ]

    weight = torch.full((2, 1, 1, 1), 0.3)
    alike(steps, noisy(scan), scan.values, scan.mask, scan.encoding, Blur.gaussian(1.0), weight)


@pytest.mark.parametrize("eta", [0.0, 0.7, "ancestral"])
def test_reverse_diffusion(scan, eta):
    def run(start, sigmas):
        shares = schedule.ancestral(sigmas) if eta == "ancestral" else eta

        def estimate(step):
            return step.state / (1 + step.sigma.square())

        return list(reverse_diffusion(estimate, start, sigmas, rng=generators(0, 2), eta=shares))

    alike(run, noisy(scan), torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))  # the ladder on the device
    sigmas = schedule.karras(1.0, 0.1, 3)
    alike(lambda start: run(start, sigmas), noisy(scan))  # and as schedules make it


@pytest.mark.parametrize("at", ["estimate", "state"])
def test_guided_sampling(scan, at, no_engine):
    def run(model, values, operator, start):
        sigmas = schedule.karras(1.0, 0.1, 3)
        return list(guided_euler(model.denoise, values, operator, start, sigmas, step=1.0, at=at))

    start = normal_like(scan.encoding.adjoint(scan.values), generators(0, 2))
    alike(run, ImageDenoiser(network(2, 2, 1)), scan.values, scan.operator, start)


GENERATIONS = {
    "default": lambda: Generation(partial(), steps=2, batch=2, masks_per_step=2),
    "sequential": lambda: Generation(partial(), steps=1, aggregate="sequential", masks_per_step=2),
    "extrapolated": lambda: Generation(partial(), steps=1, masks_per_step=2, extrapolate=1.0),
    "paper": lambda: Generation.preset("paper", prior=published(), steps=2),
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_generation(scan, name):
    def draw(method, encoding):
        shape, place = (1, *SHAPE), encoding.maps.device
        if name == "default":
            return list(method.iterate(encoding, shape, generators(0, 2), device=place))
        return method(encoding, shape, generators(0, 2), device=place)

    alike(draw, GENERATIONS[name](), scan.encoding)


def sampler(prior=None, **options):
    return MSM(prior or partial(), **{"samples": 1, "steps": 1, "iterations": 2, "batch": 4, **options})


METHODS = {
    "msm": lambda: sampler(partial(reweightings=1, reweighted_iterations=1), samples=2),
    "msm sequential": lambda: sampler(masks_per_step=2, aggregate="sequential", adapt=False),
    "msm warm": lambda: sampler(adapt=False, start="warm", covering=False, data_weight="noise"),
    "msm gradient": lambda: sampler(adapt=False, likelihood="gradient", project=True, eta=0.5),
    "msm alone": lambda: sampler(adapt=False, likelihood="none", include_measured=False),
    "msm paper": lambda: MSM.preset("paper", prior=published(), steps=2),
    "a-dps": lambda: ADPS(AmbientDenoiser(network(4, 2, 1)), samples=2, steps=1),
    "a-dps scan": lambda: ADPS(AmbientDenoiser(network(4, 2, 1)), steps=1, prior_mask="scan"),
    "a-ald": lambda: AALD(AmbientDenoiser(network(4, 2, 1)), steps=1),
    "a-os": lambda: AOS(AmbientDenoiser(network(4, 2, 1))),
    "dps": lambda: DPS(ImageDenoiser(network(2, 2, 1)), steps=1),
    "ddnm": lambda: DDNM(ImageDenoiser(network(2, 2, 1)), steps=2, iterations=1),
    "diffpir": lambda: DiffPIR(ImageDenoiser(network(2, 2, 1)), steps=1, iterations=2),
    "cg-sense": lambda: CGSense(iterations=3),
    "zero-filled": ZeroFilled,
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(scan, name, no_engine):
    alike(lambda method, scan: method(scan, generators(0, 2)), METHODS[name](), scan)


@pytest.mark.parametrize("name", ["msm paper", "a-os"])
def test_methods_that_have_to_find_the_noise(scan, name):
    unknown = dataclasses.replace(scan, noise_std=0.0, scale=1.0)
    alike(lambda method, scan: method(scan, generators(0, 2)), METHODS[name](), unknown)


@pytest.mark.parametrize("name", ["msm alone", "ddnm"])
def test_steps(scan, name):
    alike(lambda method, scan: list(method.iterate(scan, generators(0, 2))), METHODS[name](), scan)


def restoring(task):
    """Two real images of 3 colours, 16 x 16, and what a task makes of them."""
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    operators = {
        "inpainting": Identity(),
        "super-resolution": BlockAverage(4),
        "deblurring": Blur.gaussian(1.0),
        "sums": SignedHadamard.draw((16, 16), 64, generators(0, 1)[0]),
    }
    values = operators[task](image)
    mask = torch.ones(2, 1, *values.shape[-2:], dtype=torch.bool)
    if task == "inpainting":
        mask = torch.stack([RandomTiles(2.0).draw((16, 16), g) for g in generators(1, 2)])
        values = Subsample(mask)(values)
    one = torch.ones(2, 1, 1, 1)
    return Measurement(values, mask, operators[task], noise_std=0.05 * one, scale=one, full_scale=1.0)


@pytest.mark.parametrize("task", ["inpainting", "super-resolution", "deblurring", "sums"])
def test_restoring(task, no_engine):
    class Coloured(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(3, 3, 1)

        def forward(self, image, time):
            return self.inner(image, time[:, None] / 1000)

    law = RandomTiles(2.0)
    model = DenoiserPartial(EpsilonVP(Coloured()))
    ambient = AmbientDenoiser(network(5, 3, 1))
    methods = [
        MSM.preset("restoration", prior=model, law=law, steps=1, samples=1, iterations=1),
        MSM.preset("paper-restoration", prior=model, law=law, steps=1),
        ADPS(ambient, steps=1, law=law, further=FurtherTiles()),
    ]
    for method in methods:
        alike(
            lambda method, scan: method(scan, generators(0, 2)),
            method,
            restoring(task),
        )
