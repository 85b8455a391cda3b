from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from msmri.errors import InputError
from msmri.methods.generation import Generation
from msmri.model.denoiser import ComplexChannels, EpsilonVP, GaussianDenoiser, VPSchedule
from msmri.model.partial import MeasurementPartial
from msmri.model.prior import load_prior, shipped_prior
from msmri.physics.masks import FastMRIMagic, RandomLines
from msmri.physics.operators import CoilFourier, Identity, Subsample
from msmri.physics.tiles import RandomTiles
from msmri.sampling.aggregate import ImagePartial, aggregate
from msmri.sampling.reverse import Step
from msmri.sampling.schedule import ancestral, karras, vp
from msmri.tensors import generators, normal_like


def normal(shape, seed=0, dtype=torch.complex64):
    return normal_like(torch.zeros(1, *shape, dtype=dtype), generators(seed, 1))


def coils(n=1, shape=(6, 10), n_coils=3, seed=1):
    maps = torch.cat([normal((1, n_coils, *shape), seed + i) for i in range(n)])
    return CoilFourier(maps / maps.abs().square().sum(2, keepdim=True).sqrt())


def covariance(n, dtype, seed=5):
    """A covariance (n, n) with eigenvalues between about 0.1 and 4."""
    root = normal((n, n), seed, dtype)[0] / n**0.5
    return root @ root.mH + 0.1 * torch.eye(n, dtype=dtype)


def moments(variance, offset, method, chance):
    """Mean and variance that the sampler must end with, for one coefficient N(offset, variance).

    Its lines are reached by every mask with probability ``chance``, the others' lines tell nothing of it. The state is
    linear in (state, estimate, fresh noise), with other coefficients for each pattern of masks that reach the line.
    """
    w = method.masks_per_step
    if method.aggregate == "parallel":  # all masks that reach a line say the same of it
        w, chance = 1, 1 - (1 - chance) ** w
    sigmas = method.ladder(lambda *_: None)
    shares = ancestral(sigmas, method.eta) if method.renewal == "ancestral" else torch.full_like(sigmas, method.eta)
    first = torch.tensor([-offset, -offset], dtype=torch.float64)  # deviations of state and estimate from the mean
    second = first[:, None] * first[None, :]
    second[0, 0] += sigmas[0] ** 2
    for sigma, after, share in zip(sigmas, torch.cat([sigmas[1:], torch.zeros(1)]), shares):
        gain, new_first, new_second = variance / (variance + sigma**2), torch.zeros(2), torch.zeros(2, 2)
        moved = torch.block_diag(second, torch.eye(w + 1, dtype=torch.float64))  # w fresh noises inside, one at the end
        for pattern in product([False, True], repeat=w):
            weight = torch.tensor([chance if hit else 1 - chance for hit in pattern]).prod()
            x, estimates = torch.eye(3 + w, dtype=torch.float64)[0], []
            for number, hit in enumerate(pattern):
                if hit:
                    estimates.append(gain * x)
                    if method.aggregate == "sequential":
                        noise = torch.eye(3 + w, dtype=torch.float64)[2 + number]
                        kept = (1 - method.eta**2) ** 0.5 * (x - estimates[-1])
                        x = estimates[-1] + kept + method.eta * sigma * noise
            unit = torch.eye(3 + w, dtype=torch.float64)
            found = torch.stack(estimates).mean(0) if estimates else unit[1]
            state = found + after / sigma * (1 - share**2) ** 0.5 * (unit[0] - found) + after * share * unit[-1]
            step = torch.stack([state, found])
            new_first = new_first + weight * step[:, :2] @ first
            new_second = new_second + weight * step @ moved @ step.mT
        first, second = new_first, new_second
    return float(first[1]) + offset, float(second[1, 1] - first[1] ** 2)


def check_moments(found, mean, cov, *, bound=4.5):
    """Compare samples (n, d) with a mean and a covariance of each real component, by their own standard errors."""
    n = len(found)
    rest = found - mean
    error = (torch.view_as_real(rest) if rest.is_complex() else rest).std(0) / n**0.5
    bias = torch.view_as_real(rest.mean(0)) if rest.is_complex() else rest.mean(0)
    assert float((bias / error).abs().max()) < bound
    parts = 2 if rest.is_complex() else 1
    outer = rest[:, :, None] * rest[:, None, :].conj() / parts
    difference = outer.mean(0) - cov
    if rest.is_complex():
        outer, difference = torch.view_as_real(outer), torch.view_as_real(difference)
    error = (outer.var(0) / n).sqrt()
    assert float(error.max() / cov.abs().max()) < 0.05  # the test can see 5 % of the largest entry in a few errors
    assert float((difference / (error + 1e-5 * cov.abs().max())).abs().max()) < bound


CASES = [
    {"masks_per_step": 1},
    {"masks_per_step": 3},
    {"masks_per_step": 3, "aggregate": "sequential"},
    {"masks_per_step": 3, "aggregate": "sequential", "eta": 0.0},
    {"masks_per_step": 3, "eta": 0.5},
    {"masks_per_step": 3, "renewal": "constant"},
]


@pytest.mark.parametrize("changes", CASES, ids=lambda c: " ".join(map(str, c.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])
def test_masks_of_independent_lines_give_the_moments_of_the_exact_recursion(changes, dtype):
    """Columns are independent and alike, rows are not: any covariance, any mean, any number of masks."""
    rows, columns, n = 3, 20, 300
    cov, mean = covariance(rows, dtype), normal((rows,), 2, dtype)[0]
    whole = torch.kron(cov, torch.eye(columns, dtype=dtype))
    prior = GaussianDenoiser.from_covariance(mean[None, :, None].expand(1, rows, columns).contiguous(), whole)
    law = RandomLines(4.0, centre_fraction=0.0)
    method = Generation(prior, steps=20, law=law, covering=False, sigma_max=20.0, batch=n, schedule="karras", **changes)
    found = method(Identity(), (1, rows, columns), generators(0, n), dtype=dtype)
    assert found.shape == (n, 1, rows, columns) and found.dtype == dtype
    values, basis = torch.linalg.eigh(cov)
    offset = basis.mH @ mean
    parts = [
        [moments(float(v), float(part), method, 0.25) for part in torch.view_as_real(torch.complex(m.real, m.imag))]
        if dtype.is_complex
        else [moments(float(v), float(m), method, 0.25)]
        for v, m in zip(values, offset)
    ]
    expected = torch.stack([torch.complex(*torch.tensor([p[0] for p in two])) if len(two) == 2 else
                            torch.tensor(two[0][0]) for two in parts])  # fmt: skip
    spread = torch.tensor([sum(p[1] for p in two) / len(two) for two in parts])
    samples = found[:, 0].permute(0, 2, 1).reshape(-1, rows)
    check_moments(samples, basis @ expected.to(dtype), basis @ torch.diag(spread).to(dtype) @ basis.mH)


def test_finer_steps_approach_the_prior_and_renewed_noise_does_not():
    def variances(**changes):
        ladder = {"sigma_max": 50.0, "sigma_min": 0.003, "schedule": "karras"}
        coarse, fine = (moments(1.0, 0.0, Generation(steps=n, **ladder, **changes), 0.25)[1] for n in (200, 400))
        return fine, 2 * fine - coarse  # and its limit, as the error is of first order in the step

    fine, limit = variances(masks_per_step=3)
    assert 0.93 < fine < 0.95 and limit == pytest.approx(1, abs=0.01)
    assert variances(masks_per_step=3, eta=0.0)[1] == pytest.approx(1, abs=0.003)
    assert variances(masks_per_step=1)[0] < fine < variances(masks_per_step=5)[0]
    assert variances(masks_per_step=3, renewal="constant")[1] == pytest.approx(0.5, abs=0.01)
    assert variances(masks_per_step=3, aggregate="sequential")[1] < 0.9


@pytest.mark.parametrize("masks", [1, 3])
def test_all_lines_through_coils_give_any_prior(masks):
    shape, n = (1, 3, 4), 1500
    cov, mean = covariance(12, torch.complex64), 0.5 * normal(shape, 3)[0]
    prior = GaussianDenoiser.from_covariance(mean, cov)
    options = {"steps": 15, "law": RandomLines(1.0), "covering": False, "sigma_max": 20.0, "batch": n}
    method = Generation(prior, masks_per_step=masks, schedule="karras", **options)
    found = method(coils(shape=(3, 4)), shape, generators(1, n)).flatten(1)
    values, basis = torch.linalg.eigh(cov)
    offset = basis.mH @ mean.flatten()
    ends = [moments(float(v), 1.0, replace(method, masks_per_step=1), 1.0) for v in values]
    expected = basis @ (torch.tensor([end[0] for end in ends]) * offset)
    check_moments(found, expected, basis @ torch.diag(torch.tensor([end[1] for end in ends])).cfloat() @ basis.mH)


# --- the contract --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shrink:
    """A cheap partial denoiser that is not linear."""

    def __call__(self, state, mask, encoding, sigma):
        image = encoding.adjoint(torch.where(mask, state / (1 + sigma.square()), 0))
        return Subsample(mask)(encoding(image / (1 + image.abs())))


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("maps", [1, 5], ids=["shared maps", "maps of their own"])
def test_the_batch_never_changes_a_sample(mode, maps):
    method = Generation(Shrink(), steps=4, aggregate=mode, batch=5)
    encoding = coils(maps)
    found = method(encoding, (1, 6, 10), generators(0, 5))
    for size in (1, 2, 3):
        other = replace(method, batch=size)(encoding, (1, 6, 10), generators(0, 5))
        torch.testing.assert_close(other, found, rtol=1e-6, atol=1e-6)
    third = CoilFourier(encoding.maps[2:3]) if maps > 1 else encoding
    alone = method(third, (1, 6, 10), generators(0, 1, first=2))
    torch.testing.assert_close(alone[0], found[2], rtol=1e-6, atol=1e-6)
    assert float((found[0] - found[1]).abs().max()) > 0.1


def test_a_network_of_the_measurement_domain_runs_with_two_sets_of_maps():
    network = torch.nn.Conv2d(4, 2, 1)

    class Conditioned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = network

        def forward(self, image, condition):
            return 0.1 * self.layer(image)

    prior = MeasurementPartial(Conditioned()).requires_grad_(False)
    maps, _ = torch.linalg.qr(normal((2, 3, 6, 10), 2)[0].permute(2, 3, 1, 0))
    encoding = CoilFourier(maps.permute(3, 2, 0, 1)[None].contiguous())
    found = Generation(prior, steps=3, batch=2)(encoding, (2, 6, 10), generators(0, 3))
    assert found.shape == (3, 2, 6, 10) and bool(torch.isfinite(found.abs()).all())


def test_every_line_is_noise_and_the_denoiser_is_told_so():
    seen = []

    def spy(state, mask, encoding, sigma):
        seen.append((state, mask, sigma))
        return Subsample(mask)(0.0 * state + 3)

    method = Generation(spy, steps=3, masks_per_step=4, batch=50, covering=False)
    steps = list(method.iterate(Identity(), (1, 6, 40), generators(0, 50)))
    levels = karras(10.0, 0.01, 3)
    for (state, mask, sigma), level in zip(seen, levels, strict=True):
        assert state.shape == (200, 1, 6, 40) and mask.shape == (200, 1, 1, 40)
        torch.testing.assert_close(sigma, torch.full((200, 1, 1, 1), float(level)))
        assert not bool(mask.all(-1).any()) and len({str(one.tolist()) for one in mask}) > 150
    begin = torch.view_as_real(seen[0][0][:50])
    assert float(begin.std()) == pytest.approx(10.0, rel=0.02) and abs(float(begin.mean())) < 0.3
    reached = seen[0][1].reshape(4, 50, 1, 1, 40).any(0)
    estimate = steps[0].estimate
    assert bool((estimate[reached.expand_as(estimate)] == 3).all())
    assert bool((estimate[~reached.expand_as(estimate)] == 0).all())
    assert [float(step.sigma) for step in steps] == pytest.approx([*levels[1:].tolist(), 0.0])
    assert not torch.is_inference_mode_enabled() and [len(step.state) for step in steps] == [50] * 3


def test_one_mask_after_another_renews_the_share_of_noise_asked_for():
    seen = []

    def spy(state, mask, encoding, sigma):
        seen.append((state, mask))
        return Subsample(mask)(0.0 * state + 3)

    method = Generation(spy, steps=1, masks_per_step=2, aggregate="sequential", eta=0.6, batch=50)
    list(method.iterate(Identity(), (1, 6, 40), generators(0, 50)))
    (before, mask), (after, _) = seen
    reached = mask.expand_as(before)
    fresh = torch.view_as_real((after - 3 - 0.8 * (before - 3))[reached]) / 10
    assert float(fresh.std()) == pytest.approx(0.6, rel=0.03)
    assert torch.equal(after[~reached], before[~reached])


def test_the_callers_code_is_not_in_inference_mode():
    for _ in Generation(Shrink(), steps=2).iterate(Identity(), (1, 6, 10), generators(0, 1)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_dealt_masks_reach_more_lines():
    def reached(**changes):
        seen = []

        def spy(state, mask, encoding, sigma):
            seen.append(mask)
            return Subsample(mask)(state)

        list(Generation(spy, steps=1, masks_per_step=4, batch=20, **changes).iterate(
            Identity(), (1, 4, 64), generators(0, 20)))  # fmt: skip
        return float(seen[0].reshape(4, 20, 64).any(0).float().mean())

    assert reached() > 0.9 and 0.6 < reached(covering=False) < 0.8


def test_seeds():
    state = torch.get_rng_state()
    found = [Generation(Shrink(), steps=3)(coils(), (1, 6, 10), generators(seed, 2)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-2)
    assert torch.equal(state, torch.get_rng_state())


# --- carried beyond halves of the masks ----------------------------------------------------------------------------


def correlated(columns):
    """A stationary law along x whose lines of k-space tell of one another: images nonzero in the middle alone."""
    place = torch.arange(columns) - columns // 2
    spread = torch.exp(-0.5 * (place / 3.0) ** 2)
    return torch.diag(spread.square() + 1e-4).to(torch.complex64)


def test_extrapolated_samples_of_correlated_lines_come_nearer_to_the_prior():
    """In the image every place is a Gaussian by itself; through one coil its lines of k-space are correlated."""
    columns, n = 24, 600
    cov = correlated(columns)
    prior = GaussianDenoiser.from_covariance(torch.zeros(1, 1, columns, dtype=torch.complex64), cov)
    encoding = CoilFourier(torch.ones(1, 1, 1, 1, columns, dtype=torch.complex64))
    law = RandomLines(4.0, centre_fraction=0.0)
    method = Generation(prior, steps=30, masks_per_step=4, law=law, sigma_max=10.0, batch=n, schedule="karras")

    def apart(weight, masks=4, n=n):
        changed = replace(method, extrapolate=weight, masks_per_step=masks)
        found = changed(encoding, (1, 1, columns), generators(0, n)).flatten(1)
        power = float(found.abs().square().mean() / cov.diagonal().real.mean())
        return float(torch.linalg.norm(found.T @ found.conj() / n - cov) / torch.linalg.norm(cov)), power

    assert apart(0.0, masks=16, n=100)[1] < 0.1  # however many masks
    (narrow, little), (wider, more) = apart(0.0), apart(3.0)
    assert wider < 0.7 * narrow and little < 0.1 and 0.4 < more < 1, (narrow, little, wider, more)


def test_under_strong_noise_the_joint_estimate_is_at_twice_the_acceleration_less_one():
    """There evidence adds up line by line, so that what half a mask lacks of a whole one tells what all lines add."""
    columns, w, sigma = 16, 20000, 300.0
    cov = correlated(columns)
    prior = GaussianDenoiser.from_covariance(torch.zeros(1, 1, columns, dtype=torch.complex64), cov)
    encoding = CoilFourier(torch.ones(1, 1, 1, 1, columns, dtype=torch.complex64))
    order = torch.rand((w, columns), generator=torch.Generator().manual_seed(0)).argsort(-1).argsort(-1)
    rank = order.reshape(w, 1, 1, 1, columns)
    masks, halves = rank < 4, torch.stack([rank < 2, (rank >= 2) & (rank < 4)])  # R = 4
    step = Step(sigma * normal((1, 1, columns), 4), torch.zeros(1, 1, 1, columns) + 0j, torch.tensor(sigma))
    level, every = torch.full((1, 1, 1, 1), sigma), torch.ones(1, 1, 1, columns, dtype=torch.bool)
    joint = ImagePartial(prior)(step.state, every, encoding, level)

    def apart(weight):
        found = aggregate(ImagePartial(prior), step, masks, encoding, level, halves=halves, extrapolate=weight)
        return float(torch.linalg.norm(found - joint) / torch.linalg.norm(joint))

    none = apart(0.0)
    assert none > 0.5 and apart(6.0) < 0.05 and apart(2.0) == pytest.approx(none * (1 - 2 / 6), rel=0.02)


def test_lines_that_tell_nothing_of_one_another_are_not_extrapolated():
    cov = torch.diag(torch.linspace(0.2, 2, 6)).to(torch.complex64)
    prior = GaussianDenoiser.from_covariance(
        torch.zeros(1, 6, 10, dtype=torch.complex64), torch.kron(cov, torch.eye(10)).to(torch.complex64)
    )
    method = Generation(prior, steps=1, masks_per_step=2, batch=4, eta=0.0)
    found = [
        replace(method, extrapolate=g)(Identity(), (1, 6, 10), generators(0, 4), dtype=torch.complex64)
        for g in (0.0, 3.0)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_the_batch_never_changes_an_extrapolated_sample(mode):
    method = Generation(Shrink(), steps=4, aggregate=mode, batch=5, extrapolate=2.0)
    found = method(coils(5), (1, 6, 10), generators(0, 5))
    for size in (1, 2, 3):
        other = replace(method, batch=size)(coils(5), (1, 6, 10), generators(0, 5))
        torch.testing.assert_close(other, found, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, replace(method, extrapolate=0.0)(coils(5), (1, 6, 10), generators(0, 5)), atol=0.1)


def test_halves_of_masks_are_passes_of_their_own():
    seen = []

    def spy(state, mask, encoding, sigma):
        seen.append(mask)
        return Subsample(mask)(0.0 * state + mask.sum(-1, keepdim=True))

    law = RandomLines(2.0, centre_lines=4)
    method = Generation(spy, steps=1, masks_per_step=2, batch=3, law=law, extrapolate=0.5)
    step = list(method.iterate(Identity(), (1, 6, 40), generators(0, 3)))[-1]
    whole, first, second = seen
    centre = law.centre((6, 40))
    assert torch.equal(first | second, whole) and torch.equal(first & second, centre.expand_as(whole))
    assert int(((first & ~centre).sum(-1) - (second & ~centre).sum(-1)).abs().max()) <= 1
    held, less = whole.sum(-1, keepdim=True), (first.sum(-1, keepdim=True) + second.sum(-1, keepdim=True)) / 2
    each = torch.where(whole, held + 0.5 * (held - torch.where(centre, less, torch.where(
        first, first.sum(-1, keepdim=True), second.sum(-1, keepdim=True)))), 0).reshape(2, 3, 1, 1, 40)  # fmt: skip
    count = whole.reshape(2, 3, 1, 1, 40).sum(0)
    expected = (each.sum(0) / count.clamp_min(1)).expand(3, 1, 6, 40)
    torch.testing.assert_close(step.estimate.real, expected.float())


def test_tiles_are_not_halved():
    method = Generation(Shrink(), steps=1, law=RandomTiles.dropping(0.4), extrapolate=1.0)
    with pytest.raises(InputError, match="random-tiles cannot be halved"):
        method(Identity(), (3, 32, 32), generators(0, 1), dtype=torch.float32)


# --- settings ------------------------------------------------------------------------------------------------------


def eps_network():
    class Zero(torch.nn.Module):
        def forward(self, image, t):
            return 0 * image

    return EpsilonVP(ComplexChannels(Zero()))


def test_the_ladder_follows_the_prior():
    assert torch.equal(Generation(Shrink()).ladder(), karras(10.0, 0.01, 50))
    assert torch.equal(Generation(eps_network()).ladder(), vp(50, VPSchedule().sigmas))
    assert torch.equal(Generation(eps_network(), schedule="karras", sigma_max=3.0).ladder(), karras(3.0, 0.01, 50))
    cut = Generation(Shrink(), schedule="vp", sigma_max=5.0, sigma_min=0.1).ladder()
    assert float(cut.max()) <= 5 and float(cut.min()) >= 0.1 and len(cut) < 50
    paper = Generation.preset("paper", prior=eps_network(), batch=2)
    assert len(paper.ladder()) == 200 and float(paper.ladder()[0]) > 150
    assert (paper.masks_per_step, paper.eta, paper.renewal, paper.covering) == (3, 1.0, "constant", False)
    found = replace(paper, steps=3)(coils(), (1, 6, 10), generators(0, 3))
    assert found.shape == (3, 1, 6, 10)


def test_what_the_prior_tells_of_its_training_is_followed_unless_something_else_is_asked_for():
    class Telling(Shrink):
        law, highest = RandomLines(2.0, centre_fraction=0.2), 30.0

    partial = Telling()
    assert Generation(Shrink()).law_of() == RandomLines(4.0)
    assert Generation(partial).law_of() == partial.law
    assert Generation(partial, law=RandomLines(3.0)).law_of() == RandomLines(3.0)
    assert torch.equal(Generation(partial).ladder(), karras(30.0, 0.01, 50))
    assert torch.equal(Generation(partial, sigma_max=4.0).ladder(), karras(4.0, 0.01, 50))
    given = replace(Generation(partial, steps=3), law=partial.law, sigma_max=30.0)
    images = (one(coils(), (1, 6, 10), generators(0, 2)) for one in (replace(given, law=None, sigma_max=None), given))
    assert torch.equal(*images)


def test_a_prior_inside_a_prior_tells_as_well():
    class Around:
        denoiser, law, highest = Shrink(), RandomLines(2.0), 7.0

    method = Generation(Around())
    assert method.law_of() == RandomLines(2.0)
    assert float(method.ladder()[0]) == pytest.approx(7)


def test_one_pass_does_where_every_mask_shows_everything():
    asked = []

    def partial(state, mask, encoding, sigma):
        assert bool(mask.all())
        asked.append(len(state))
        return state / (1 + sigma.square())

    whole = RandomLines(1.0)
    method = Generation(partial, law=whole, steps=4, masks_per_step=3, extrapolate=2.0, batch=2)
    found = method(Identity(), (1, 6, 10), generators(0, 2))
    assert asked == [2] * 4 and method.passes(whole, (6, 10)) == 1
    alone = replace(method, masks_per_step=1, extrapolate=0.0)(Identity(), (1, 6, 10), generators(0, 2))
    assert torch.equal(found, alone)
    assert method.passes(RandomLines(4.0), (6, 10)) == 3
    assert replace(method, aggregate="sequential").passes(whole, (6, 10)) == 3  # each noises anew


def test_the_shipped_prior_is_the_one_to_draw_from():
    method = Generation()
    assert float(method.ladder()[0]) == pytest.approx(30)
    assert method.law_of() == load_prior(shipped_prior(draws=True)).law
    assert not torch.equal(method.ladder(), Generation(load_prior()).ladder())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps=0"),
        ({"masks_per_step": 0}, "masks_per_step=0"),
        ({"eta": 1.5}, "eta=1.5"),
        ({"extrapolate": -1.0}, "extrapolate=-1"),
        ({"extrapolate": float("nan")}, "extrapolate=nan"),
        ({"aggregate": "both"}, "one of parallel, sequential"),
        ({"schedule": "linear"}, "one of karras, vp"),
        ({"sigma_max": 0.001}, "sigma_min"),
        ({"sigma_max": float("inf")}, "sigma_max=inf"),
    ],
)
def test_impossible_settings_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        Generation(Shrink(), **changes)


def test_other_mistakes():
    with pytest.raises(InputError, match="no preset 'fast'"):
        Generation.preset("fast")
    with pytest.raises(InputError, match="never reaches 1"):
        Generation(Shrink(), law=FastMRIMagic(4.0))(Identity(), (1, 4, 320), generators(0, 1))
    with pytest.raises(InputError, match="between sigma_min and sigma_max"):
        Generation(eps_network(), sigma_max=1e-4, sigma_min=1e-5).ladder()


def test_colour_images_in_tiles():
    law = RandomTiles.dropping(0.4)
    zero = GaussianDenoiser(torch.full((3, 32, 32), 0.5), torch.full((3, 32, 32), 0.04))
    method = Generation(zero, steps=20, masks_per_step=2, law=law, sigma_max=20.0, schedule="karras")
    found = method(Identity(), (3, 32, 32), generators(0, 2), dtype=torch.float32)
    assert found.shape == (2, 3, 32, 32) and found.dtype == torch.float32
    assert float(found.mean()) == pytest.approx(0.5, abs=0.02) and 0.1 < float(found.std()) < 0.2
