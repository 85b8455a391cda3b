import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from msmri.errors import InputError
from msmri.physics.masks import (
    LAWS,
    EquispacedLines,
    FastMRIEquispaced,
    FastMRIEquispacedFraction,
    FastMRIMagic,
    FastMRIRandom,
    GaussianLines,
    PoissonDisc,
    RandomLines,
    acceleration,
    blind_spots,
    centre_width,
    covering,
    draw_masks,
    law_from_name,
    require_coverage,
    slice_seed,
)
from msmri.tensors import generators

SHAPES = [(16, 32), (17, 25)]
INSTANCES = [
    *(law.example() for law in LAWS.values()),
    RandomLines(3.3, centre_lines=5),
    EquispacedLines(2.7, centre_lines=4),
    EquispacedLines(1.0),
    GaussianLines(2.5, centre_lines=6, spread=0.3),
    FastMRIRandom(2.5, centre_fraction=0.2),
    FastMRIEquispaced(5, centre_fraction=0.1),
    FastMRIEquispacedFraction(3.5, centre_fraction=0.1),
    FastMRIMagic(3, centre_fraction=0.1),
    PoissonDisc(3.0, centre_lines=4, crop_corners=True),
]
FASTMRI = {
    "random": FastMRIRandom,
    "equispaced": FastMRIEquispaced,
    "equispaced_fraction": FastMRIEquispacedFraction,
    "magic": FastMRIMagic,
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def columns(mask):
    return mask.flatten().nonzero().flatten().tolist()


# what every law promises


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("law", INSTANCES, ids=str)
def test_draws_are_boolean_seeded_and_hold_the_centre(law, shape):
    rows = 1 if law.lines else shape[0]
    probability = law.inclusion_probability(shape)
    masks = draw_masks(law, shape, generators(3, 6))
    assert masks.dtype == torch.bool and masks.shape == (6, 1, rows, shape[1])
    assert probability.shape == (1, rows, shape[1]) and probability.dtype == torch.float64
    assert (probability >= 0).all() and (probability <= 1).all()
    assert torch.equal(masks, draw_masks(law, shape, generators(3, 6)))
    assert torch.equal(masks[:2], draw_masks(law, shape, generators(3, 2)))
    if law.acceleration > 1:
        assert not torch.equal(masks, draw_masks(law, shape, generators(4, 6)))
    n_rows, n_columns = law.centre_size(shape)
    certain = (probability == 1) & masks.all(0)
    if law.lines:
        assert n_rows == shape[0] and certain.sum() >= n_columns
        assert centre_width(masks) >= n_columns - (n_columns % 2 == 0 and shape[1] % 2 == 1)
    else:
        top, left = shape[0] // 2 - n_rows // 2, shape[1] // 2 - n_columns // 2
        assert certain[0, top : top + n_rows, left : left + n_columns].all()


@pytest.mark.parametrize("law", INSTANCES, ids=str)
def test_draws_follow_the_stated_law(law):
    shape, draws = ((20, 30), 1000) if law.lines else ((16, 18), 200)
    probability = law.inclusion_probability(shape)
    stream = rng(11)
    frequency = torch.stack([law.draw(shape, stream) for _ in range(draws)]).double().mean(0)
    certain = (probability == 0) | (probability == 1)
    assert torch.equal(frequency[certain], probability[certain])
    # five standard deviations of a binomial; an estimated law adds its own error, from 200 draws as well
    variance = probability * (1 - probability) / draws * (1 if law.lines else 2)
    assert ((frequency - probability).abs() <= 5 * variance.sqrt() + (1e-9 if law.lines else 0.02)).all()
    assert 1 / frequency.mean() == pytest.approx(law.expected_acceleration(shape), rel=0.02)


def test_no_global_random_state_is_touched():
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for law in INSTANCES:
        law.draw((18, 20), rng())
        law.describe((18, 20))
        covering(law, (18, 20), 2, rng())
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1][0] == after[1][0] and np.array_equal(before[1][1], after[1][1]) and before[1][2:] == after[1][2:]
    assert before[2] == after[2]


def test_a_draw_never_depends_on_other_draws_or_on_estimates():
    law, shape = PoissonDisc(3.5, centre_lines=3), (14, 15)
    first = law.draw(shape, rng(5))
    law.inclusion_probability(shape)
    assert torch.equal(first, law.draw(shape, rng(5)))


def test_a_returned_probability_is_the_callers_own():
    for law in (GaussianLines(4.0), PoissonDisc(4.0)):
        law.inclusion_probability((16, 16)).zero_()
        assert law.inclusion_probability((16, 16)).sum() > 0


# each law


@pytest.mark.parametrize(("nominal", "fraction"), [(4, 0.309), (6, 0.232), (8, 0.193)])
def test_random_lines_keep_the_published_fractions(nominal, fraction):
    law = RandomLines(nominal)
    assert law.nominal_acceleration == nominal
    assert 1 / law.expected_acceleration((256, 256)) == pytest.approx(fraction, abs=5e-4)
    expected = torch.full((256,), 1 / nominal, dtype=torch.float64)
    expected[118:138] = 1  # twenty columns around index 128
    assert torch.equal(law.inclusion_probability((256, 256)), expected.reshape(1, 1, 256))
    assert torch.equal(law.inclusion_probability((256, 256)), EquispacedLines(nominal).inclusion_probability((8, 256)))


@pytest.mark.parametrize(("width", "n"), [(256, 20), (320, 25), (96, 8), (33, 3)])
def test_the_centre_keeps_its_fraction_at_other_widths(width, n):
    assert RandomLines(4).centre_size((10, width)) == (10, n)


@pytest.mark.parametrize(
    ("width", "n", "expected"),
    [(8, 1, [4]), (8, 2, [3, 4]), (8, 3, [3, 4, 5]), (9, 1, [4]), (9, 2, [3, 4]), (9, 3, [3, 4, 5]), (9, 9, range(9))],
)
def test_the_centre_lies_around_zero_frequency(width, n, expected):
    assert columns(RandomLines(4, centre_lines=n).centre((5, width))) == list(expected)


@pytest.mark.parametrize("law", [RandomLines, EquispacedLines, GaussianLines])
def test_own_centres_are_fastmris_wherever_one_is_symmetric(law):
    for width, n in [(32, 4), (32, 5), (33, 5), (21, 1)]:
        start = (width - n + 1) // 2
        assert columns(law(4.0, centre_lines=n).centre((1, width))) == list(range(start, start + n))


def test_equispaced_lines_are_equally_spaced():
    for seed in range(8):
        taken = columns(EquispacedLines(4, centre_lines=0).draw((8, 34), rng(seed)))
        assert set(np.diff(taken)) == {4} and taken[0] < 4 and taken[-1] >= 30
        assert set(np.diff(columns(EquispacedLines(2.5, centre_lines=0).draw((8, 34), rng(seed))))) == {2, 3}


def test_gaussian_lines_are_counted_exactly():
    for width, nominal in [(64, 4.0), (65, 3.0), (40, 7.0)]:
        masks = draw_masks(GaussianLines(nominal, centre_lines=4), (8, width), generators(0, 20))
        assert set(masks.sum(-1).flatten().tolist()) == {round(width / nominal)}
        assert centre_width(masks) >= 4
    assert GaussianLines(4.0).expected_acceleration((8, 256)) == pytest.approx(4.0, rel=1e-8)


def test_gaussian_probability_equals_full_enumeration():
    # 7 columns, centre at 3, five others in all orders: successive draws in proportion to the weights that are left
    law = GaussianLines(7 / 4, centre_lines=1, spread=0.25)
    weight = {column: math.exp(-((column - 3) ** 2) / (2 * (0.25 * 7) ** 2)) for column in (0, 1, 2, 4, 5, 6)}
    expected = torch.zeros(7, dtype=torch.float64)
    expected[3] = 1
    for order in itertools.permutations(weight, 3):
        chance, left = 1.0, sum(weight.values())
        for column in order:
            chance *= weight[column] / left
            left -= weight[column]
        expected[list(order)] += chance
    torch.testing.assert_close(law.inclusion_probability((1, 7)).flatten(), expected, atol=1e-8, rtol=0)


def test_narrow_gaussian_lines_neither_overflow_nor_lose_count():
    law = GaussianLines(8.0, centre_lines=2, spread=0.01)
    probability = law.inclusion_probability((1, 128))
    assert probability.sum() == pytest.approx(16, abs=1e-6) and torch.isfinite(probability).all()
    assert law.draw((1, 128), rng()).sum() == 16
    assert blind_spots(law, (1, 128)).sum() > 60


@pytest.mark.parametrize("nominal", [1.3, 2.0, 4.0, 10.0])
def test_poisson_disc_meets_its_acceleration(nominal):
    law = PoissonDisc(nominal, centre_lines=4)
    drawn = [acceleration(law.draw((32, 28), rng(seed))) for seed in range(30)]
    assert np.mean(drawn) == pytest.approx(nominal, rel=0.03)
    assert np.std(drawn) < 0.06 * nominal
    assert law.expected_acceleration((32, 28)) == pytest.approx(nominal, rel=0.03)


def test_poisson_disc_keeps_its_distances():
    law, shape = PoissonDisc(9.0, centre_lines=4), (48, 40)
    distance = law.distance(shape)
    for seed in range(4):
        places = law.draw(shape, rng(seed))[0].nonzero()
        far = places[distance[places[:, 0], places[:, 1]] > 0.8].double()
        gaps = torch.cdist(far, far) + 1e3 * torch.eye(len(far))
        assert len(far) > 40
        assert gaps.min() > 2  # independent places at this density would nearly all have a closer neighbour
        assert gaps.min(0).values.max() < 12  # and no holes


def test_poisson_disc_has_the_density_of_sigpys():
    from sigpy.mri import poisson

    law, shape = PoissonDisc(4.0, centre_lines=4), (40, 32)
    ours = law.inclusion_probability(shape)[0]
    theirs = np.mean([abs(poisson(shape, 4, (4, 4), crop_corner=False, seed=seed)) for seed in range(10)], axis=0)
    distance = law.distance(shape)
    for inner, outer in [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1), (1, 1.5)]:
        ring = (distance >= inner) & (distance < outer)
        assert float(ours[ring].mean()) == pytest.approx(theirs[ring.numpy()].mean(), rel=0.25)


def test_poisson_disc_reaches_every_place_but_cropped_corners():
    assert not blind_spots(PoissonDisc(8.0), (20, 18)).any()
    law = PoissonDisc(4.0, crop_corners=True)
    corners = law.distance((20, 18)) > 1
    assert torch.equal(blind_spots(law, (20, 18))[0], corners) and 0.1 < corners.double().mean() < 0.3
    assert law.distance((20, 18)).amin(0).max() == 1 and law.distance((20, 18)).amin(1).max() == 1


# fastMRI


@pytest.mark.parametrize("width", [32, 48, 63, 101, 320])
@pytest.mark.parametrize(("nominal", "fraction"), [(4, 0.08), (8, 0.04), (3, 0.1)])
@pytest.mark.parametrize("kind", FASTMRI)
def test_fastmri_masks_are_fastmris_own(kind, nominal, fraction, width):
    from fastmri.data.subsample import create_mask_for_mask_type

    theirs = create_mask_for_mask_type(kind, [fraction], [nominal])
    law = FASTMRI[kind](nominal, centre_fraction=fraction)
    for seed in [0, 1, 2**32 - 1, tuple(map(ord, "file1000001.h5"))]:
        mask, centre = theirs((2, 9, width, 2), seed=seed)
        assert torch.equal(law.draw_seeded((9, width), seed), mask.bool().reshape(1, 1, width))
        assert law.centre_size((9, width)) == (9, centre)
        start = (width - centre + 1) // 2
        assert (law.inclusion_probability((9, width))[..., start : start + centre] == 1).all()


@pytest.mark.parametrize("kind", FASTMRI)
def test_fastmri_laws_default_to_the_published_centres(kind):
    for nominal, fraction in [(4, 0.08), (8, 0.04)]:
        assert FASTMRI[kind](nominal).centre_size((1, 320)) == (1, round(320 * fraction))


@pytest.mark.parametrize(("kind", "offsets"), [("equispaced", 4), ("equispaced_fraction", 5), ("magic", 2)])
def test_fastmri_offsets_are_all_counted(kind, offsets):
    law = FASTMRI[kind](4, centre_fraction=0.08)  # of 320 columns: spacing 5.44; magic's four offsets give two masks
    masks = {tuple(columns(law.draw_seeded((1, 320), seed))) for seed in range(60)}
    assert len(masks) == offsets


@pytest.mark.parametrize(
    "law",
    [
        FastMRIRandom(4, centre_fraction=0.3),  # fastMRI: silently the centre alone
        FastMRIEquispacedFraction(4, centre_fraction=0.25),  # fastMRI: ZeroDivisionError
        FastMRIEquispacedFraction(4, centre_fraction=0.3),  # fastMRI: ValueError low >= high
        FastMRIRandom(1, centre_fraction=1.0),  # fastMRI: ZeroDivisionError
        FastMRIEquispaced(4, centre_fraction=1.2),
    ],
    ids=str,
)
def test_fastmri_settings_that_cannot_be_drawn_are_refused(law):
    for use in (lambda: law.draw((8, 32), rng()), lambda: law.inclusion_probability((8, 32))):
        with pytest.raises(InputError, match="centre lines"):
            use()


def test_fastmri_accelerations_that_its_code_cannot_use_are_refused():
    for law in (FastMRIEquispaced, FastMRIMagic):
        with pytest.raises(InputError, match="whole number"):
            law(4.5)
        assert law(4.0).draw((8, 32), rng()).any()
    assert FastMRIRandom(4.5).expected_acceleration((8, 90)) == pytest.approx(4.5)


# blind spots


@pytest.mark.parametrize("law", [RandomLines(8), EquispacedLines(5.5), FastMRIRandom(4), GaussianLines(4)], ids=str)
def test_laws_that_reach_everything_are_accepted(law):
    assert not blind_spots(law, (16, 64)).any()
    require_coverage(law, (16, 64))


def test_blind_spots_are_found_and_refused():
    law = FastMRIMagic(4, centre_fraction=0.08)
    blind = blind_spots(law, (16, 320))
    seen = torch.stack([law.draw_seeded((16, 320), seed) for seed in range(80)]).any(0)
    assert torch.equal(blind, ~seen) and blind.sum() > 100
    with pytest.raises(InputError, match=rf"fastmri-magic .*never samples {int(blind.sum())} of 320 lines.*MSM"):
        require_coverage(law, (16, 320))
    with pytest.raises(InputError, match="never samples 9 of 12 lines"):
        require_coverage(GaussianLines(4, centre_lines=3), (16, 12))
    with pytest.raises(InputError, match="places"):
        require_coverage(PoissonDisc(3.0, centre_lines=4, crop_corners=True), (16, 18))


class Rare(RandomLines):
    """Takes all columns, but says that those outside the centre come once in ``acceleration`` masks."""

    def draw(self, shape, rng):
        return torch.ones(1, 1, shape[1], dtype=torch.bool)


def test_blind_is_what_is_met_less_than_once_in_a_million_masks():
    for rate, blind in ((5e3, False), (0.9e6, False), (1.1e6, True)):
        law = Rare(rate, centre_lines=4)
        assert int(blind_spots(law, (6, 20)).sum()) == 16 * blind
        assert int(covering(law, (6, 20), 1, rng()).sum()) == 20 - 16 * blind  # no card of the deck


# covering masks


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["random-lines", "equispaced-lines", "gaussian-lines", "fastmri-random", "fastmri-magic"]),
    nominal=st.integers(2, 6),
    width=st.integers(20, 48),
    n=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_covering_masks_waste_nothing(name, nominal, width, n, seed):
    law, shape = law_from_name(name, acceleration=nominal), (6, width)
    probability = law.inclusion_probability(shape)
    pool = (probability > 1e-6) & (probability < 1)
    assume(pool.any())  # magic lines at R = 2 are always the same
    masks = covering(law, shape, n, rng(seed))
    assert masks.shape == (n, 1, 1, width) and masks.dtype == torch.bool
    assert masks[:, probability == 1].all() and not masks[:, probability == 0].any()
    dealt = masks[:, pool].sum(0)
    assert int(dealt.max()) - int(dealt.min()) <= 1  # no place twice before every place once
    assert (dealt > 0).sum() == min(int(dealt.sum()), int(pool.sum()))
    assert torch.equal(masks, covering(law, shape, n, rng(seed)))


@settings(max_examples=25, deadline=None)
@given(width=st.integers(16, 40), rows=st.integers(1, 5), n=st.integers(1, 6), seed=st.integers(0, 1000))
def test_covering_masks_include_what_they_must_and_deal_the_rest(width, rows, n, seed):
    law, shape = RandomLines(3, centre_lines=3), (rows, width)
    include = law.draw(shape, rng(seed + 1))
    masks = covering(law, shape, n, rng(seed), include=include)
    assert masks[:, include].all()
    dealt = masks[:, ~include].sum(0)
    assume(dealt.numel() > 0)
    assert int(dealt.max()) - int(dealt.min()) <= 1


@pytest.mark.parametrize("law", [law for law in INSTANCES if law.name != "random-tiles"], ids=str)
def test_halves_share_what_is_sure_and_split_the_rest_evenly(law):
    shape = (37, 41)
    sure = law.inclusion_probability(shape) >= 1
    for seed in range(5):
        mask = law.draw(shape, rng(seed))
        first, second = halves = law.halve(mask, shape, rng(seed))
        assert halves.dtype == torch.bool and halves.shape == (2, *mask.shape)
        assert torch.equal(first | second, mask) and torch.equal(first & second, mask & sure)
        assert 0 <= int(first.sum()) - int(second.sum()) <= 1
        assert torch.equal(halves, law.halve(mask, shape, rng(seed)))


def test_covering_masks_keep_the_law():
    law, shape, draws = RandomLines(4, centre_lines=4), (6, 32), 500
    probability = law.inclusion_probability(shape)
    include = torch.zeros(1, 1, 32, dtype=torch.bool)
    include[..., ::5] = True
    stream = rng(0)
    for chosen in (None, include):
        masks = torch.stack([covering(law, shape, 3, stream, include=chosen) for _ in range(draws)])
        expected = probability if chosen is None else torch.where(chosen, 1.0, probability)
        frequency = masks.double().mean((0, 1))
        assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / (3 * draws)).sqrt()).all()
        for place in range(3):  # each of the three masks, not only their mean
            size = masks[:, place].sum(-1).double()
            free = expected[expected < 1]
            assert float(size.mean()) == pytest.approx(float(expected.sum()), abs=0.5)
            assert float(size.var()) == pytest.approx(float((free * (1 - free)).sum()), rel=0.25)
    union = masks.any(1).double().mean()
    independent = torch.where(include, 1.0, 1 - (1 - probability) ** 3).mean()
    assert union > independent + 0.05


def test_covering_masks_of_other_laws():
    sizes = covering(GaussianLines(4, centre_lines=3), (6, 40), 5, rng()).sum(-1)
    assert (sizes == 10).all()
    shape = (16, 18)
    law = PoissonDisc(4.0, centre_lines=3)
    masks = covering(law, shape, 4, rng())
    dealt = masks.sum(0)[~law.centre(shape)]
    assert masks.shape == (4, 1, *shape) and int(dealt.max()) - int(dealt.min()) <= 1
    line = torch.zeros(1, 1, 18, dtype=torch.bool)
    line[..., 3] = True
    assert covering(law, shape, 2, rng(), include=line)[..., 3].all()
    # a place of a whole-line law counts as given only if all of its column is
    partly = torch.zeros(1, *shape, dtype=torch.bool)
    partly[:, :8, 3] = True
    masks = covering(RandomLines(2, centre_lines=2), shape, 2, rng(), include=partly)
    assert masks.shape == (2, 1, *shape) and masks[..., :8, 3].all() and masks[..., 8:, 3].any()


# names, descriptions, single masks


def test_descriptions():
    random_lines = "random lines: nominal 4.00, expected 3.24 (79.0 of 256 lines), 20 centre lines"
    assert RandomLines(4).describe((256, 256)) == random_lines
    assert PoissonDisc(4.0, centre_lines=4).describe((24, 20)).startswith("poisson disc: nominal 4.00, expected ")
    assert PoissonDisc(4.0, centre_lines=4).describe((24, 20)).endswith(" of 480 places), 4 x 4 centre")
    assert PoissonDisc(4.0, centre_fraction=0.25).centre_size((24, 20)) == (6, 5)


def test_laws_by_name():
    assert list(LAWS) == [
        *("random-lines", "equispaced-lines"),
        *("fastmri-random", "fastmri-equispaced", "fastmri-equispaced-fraction", "fastmri-magic"),
        *("gaussian-lines", "poisson-disc", "random-tiles", "random-pixels"),
    ]
    assert law_from_name("random-lines", acceleration=6, centre_lines=8) == RandomLines(6, centre_lines=8)
    assert law_from_name("fastmri-magic", acceleration=4, centre_lines=None) == FastMRIMagic(4)
    with pytest.raises(InputError, match=r"'radial'.*random-lines.*poisson-disc"):
        law_from_name("radial", acceleration=4)
    with pytest.raises(InputError, match=r"no option spread.*centre_fraction"):
        law_from_name("random-lines", acceleration=4, spread=0.1)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("nominal", [0.99, 0, -4, math.nan, math.inf])
def test_impossible_accelerations_are_refused(name, nominal):
    with pytest.raises(InputError, match="acceleration"):
        law_from_name(name, acceleration=nominal)


@pytest.mark.parametrize("name", ["random-lines", "equispaced-lines", "gaussian-lines", "poisson-disc"])
@pytest.mark.parametrize("option", [{"centre_lines": 33}, {"centre_lines": -1}, {"centre_fraction": 1.1}])
def test_centres_that_do_not_fit_are_refused(name, option):
    law = law_from_name(name, acceleration=4, **option)
    for use in (lambda: law.draw((32, 32), rng()), lambda: law.inclusion_probability((32, 32))):
        with pytest.raises(InputError, match="do not fit a matrix of 32"):
            use()


def test_budgets_that_cannot_be_met_are_refused():
    with pytest.raises(InputError, match="9 centre lines leave nothing of the 8 of 32"):
        GaussianLines(4, centre_lines=9).draw((8, 32), rng())
    assert GaussianLines(4, centre_lines=8).draw((8, 32), rng()).sum() == 8
    with pytest.raises(InputError, match="spread"):
        GaussianLines(4, spread=0.0)
    with pytest.raises(InputError, match="cannot be met on a 16 x 16 matrix with a 12 x 12 centre"):
        PoissonDisc(4, centre_lines=12).draw((16, 16), rng())


def test_true_acceleration():
    mask = torch.zeros(1, 1, 10, dtype=torch.bool)
    assert acceleration(mask) == math.inf
    mask[..., :4] = True
    assert acceleration(mask) == 2.5
    assert acceleration(mask.expand(3, 1, 7, 10)) == 2.5


@pytest.mark.parametrize(
    ("sampled", "width", "n"),
    [
        ([4], 8, 1),
        ([3, 4], 8, 2),
        ([4, 5], 8, 1),
        ([3, 4, 5], 8, 3),
        ([0, 2, 3, 4, 5, 7], 8, 4),
        (range(8), 8, 8),
        (range(9), 9, 9),
        ([3, 5], 8, 0),
        ([3, 4, 5], 9, 3),
        ([3, 4], 9, 2),
    ],
)
def test_centre_width(sampled, width, n):
    mask = torch.zeros(1, 1, width, dtype=torch.bool)
    mask[..., list(sampled)] = True
    assert centre_width(mask) == n
    assert mask[..., width // 2 - n // 2 : width // 2 - n // 2 + n].all()
    assert centre_width(mask.expand(2, 1, 5, width)) == n
    holed = mask.expand(2, 1, 5, width).clone()
    holed[1, 0, 3, width // 2] = False
    assert centre_width(holed) == 0


def test_slice_seeds_are_the_same_on_every_machine():
    assert slice_seed("scan.h5#7", 0) == 9171890962415269237
    seeds = {slice_seed(f"scan.h5#{i}", seed) for i in range(100) for seed in range(3)}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
