import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmri.errors import InputError
from msmri.physics.masks import blind_spots, covering, draw_masks, law_from_name, require_coverage
from msmri.physics.tiles import FurtherTiles, RandomPixels, RandomTiles, box_mask
from msmri.tensors import generators
from msmri.testing import check_mask_law

P = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.99]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def on_its_grid(mask, grid=4):
    """Roll a mask of whole tiles so that they lie on the grid: (grid, grid) tiles, or None."""
    height, width = mask.shape[-2:]
    for down in range(height // grid):
        for right in range(width // grid):
            rolled = torch.roll(mask[0], (-down, -right), (0, 1))
            tiles = rolled.reshape(grid, height // grid, grid, width // grid)
            if bool((tiles == tiles[:, :1, :, :1]).all()):
                return tiles[:, 0, :, 0]
    return None


# the law


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("law", [RandomTiles, RandomPixels])
def test_the_stated_law_is_the_one_drawn(law, p):
    check_mask_law(law.dropping(p), shape=(16, 20), draws=300)
    check_mask_law(law.dropping(p), shape=(13, 11), draws=300)


@pytest.mark.parametrize(("p", "kept"), list(zip(P, [16, 15, 13, 10, 7, 4, 1])))
def test_tiles_kept(p, kept):
    law, shape = RandomTiles.dropping(p), (16, 24)
    assert law.kept == kept == 16 - math.floor(16 * p)
    masks = draw_masks(law, shape, generators(0, 30))
    assert set(masks.sum((1, 2, 3)).tolist()) == {kept * 4 * 6}
    assert torch.equal(law.inclusion_probability(shape), torch.full((1, *shape), kept / 16, dtype=torch.float64))
    assert not blind_spots(law, shape).any()
    require_coverage(law, shape)


def test_shares_of_whole_tiles_are_met_exactly():
    for grid in range(1, 8):
        for dropped in range(grid**2):
            assert RandomTiles(1 / (1 - dropped / grid**2), grid=grid).kept == grid**2 - dropped
    assert RandomTiles(1e12).kept == 1


def test_the_default_is_the_published_law():
    assert RandomTiles() == RandomTiles.dropping(0.4) == law_from_name("random-tiles", acceleration=1 / (1 - 0.4))
    assert RandomTiles().dropped == pytest.approx(0.4) and RandomTiles().kept == 10
    assert RandomTiles().expected_acceleration((128, 128)) == 1.6
    assert RandomTiles().describe((32, 32)) == (
        "random tiles: nominal 1.67, expected 1.60 (640.0 of 1024 places), 0 x 0 centre"
    )


def test_masks_are_tiles_rolled_by_less_than_one():
    found = {}
    for seed in range(400):
        mask = RandomTiles().draw((12, 20), rng(seed))
        tiles = on_its_grid(mask)
        assert tiles is not None and int(tiles.sum()) == 10
        rows, columns = (torch.nonzero(mask[0].int().diff(dim=axis).any(1 - axis)).flatten() for axis in (0, 1))
        found.setdefault((int((rows[0] + 1) % 3), int((columns[0] + 1) % 5)), []).append(seed)
    assert len(found) == 15  # all shifts of a tile of 3 x 5
    assert min(map(len, found.values())) > 10


def test_other_grids():
    mask = RandomTiles.dropping(0.5).draw((12, 12), rng())
    assert on_its_grid(mask) is not None
    coarse = RandomTiles(2.0, grid=2)
    assert coarse.kept == 2 and on_its_grid(coarse.draw((12, 12), rng()), 2) is not None
    with pytest.raises(InputError, match="0 tiles"):
        RandomTiles(2.0, grid=0)


def test_masks_have_no_place_of_their_own():
    """Neither tiles nor shifts favour any place: pairs of pixels one tile apart are alike all over the image."""
    masks = draw_masks(RandomTiles(), (8, 8), generators(0, 4000))[:, 0].double()
    both = (masks * torch.roll(masks, 2, -1)).mean(0)
    expected = 10 / 16 * 9 / 15
    assert float((both - expected).abs().max()) < 5 * (expected * (1 - expected) / 4000) ** 0.5


def test_pixels_are_independent():
    masks = draw_masks(RandomPixels.dropping(0.4), (6, 7), generators(0, 3000)).double().flatten(1)
    correlation = torch.corrcoef(masks.T) - torch.eye(42)
    assert float(correlation.abs().max()) < 5 / 3000**0.5
    assert float(masks.mean()) == pytest.approx(0.6, abs=0.01)


def test_channels_share_a_mask():
    for law in (RandomTiles(), RandomPixels()):
        assert law.draw((9, 13), rng()).shape == (1, 9, 13) and not law.lines


@pytest.mark.parametrize("shape", [(3, 16), (16, 3)])
def test_images_without_room_for_tiles_are_refused(shape):
    for use in (RandomTiles().draw, lambda s, r: RandomTiles().inclusion_probability(s)):
        with pytest.raises(InputError, match=f"{shape[0]} x {shape[1]} pixels cannot be cut into 4 x 4 tiles"):
            use(shape, rng())


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_impossible_shares_are_refused(p):
    for law in (RandomTiles, RandomPixels):
        with pytest.raises(InputError, match=law.name):
            law.dropping(p)


# covering


def test_a_draw_is_followed_by_its_complement_with_extra_tiles():
    for seed in range(20):
        one, two, three, four = (on_its_grid(mask) for mask in covering(RandomTiles(), (12, 20), 4, rng(seed)))
        for first, second in ((one, two), (three, four)):
            assert bool((first | second).all())
            assert int(first.sum()) == int(second.sum()) == 10 and int((first & second).sum()) == 4


def test_pairs_share_a_shift_and_the_next_pair_has_its_own():
    def edges(mask):
        return set((torch.nonzero(mask[0].int().diff(dim=0).any(1)).flatten() % 8).tolist())

    different = 0
    for seed in range(30):
        masks = covering(RandomTiles(), (32, 32), 4, rng(seed))
        assert edges(masks[0]) == edges(masks[1]) and len(edges(masks[0])) == 1
        different += edges(masks[0]) != edges(masks[2])
    assert 20 < different < 30


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(P), st.integers(4, 20), st.integers(4, 20), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99)
)
def test_each_round_covers_the_image(p, height, width, n, grid, seed):
    law = RandomTiles.dropping(p)
    masks = covering(law, (height, width), n, rng(seed))
    assert masks.shape == (n, 1, height, width) and masks.dtype == torch.bool
    assert torch.equal(masks, covering(law, (height, width), n, rng(seed)))
    rounds = math.ceil(16 / law.kept)
    for first in range(0, n - rounds + 1, rounds):
        assert bool(masks[first : first + rounds].any(0).all())
        if rounds > 1:
            reached = masks[first : first + rounds - 1].sum(0)
            assert int(reached.max()) <= 1  # nothing twice before everything once


def test_each_mask_of_a_covering_follows_the_law():
    law, shape, draws = RandomTiles.dropping(0.4), (8, 12), 1500
    stream = rng(1)
    masks = torch.stack([covering(law, shape, 3, stream) for _ in range(draws)])
    for place in range(3):
        frequency = masks[:, place].double().mean(0)
        assert float((frequency - 10 / 16).abs().max()) < 5 * (10 / 16 * 6 / 16 / draws) ** 0.5
        assert set(masks[:, place].sum((1, 2, 3)).tolist()) == {60}
    # as many pairs of neighbouring tiles, 2 x 3 pixels each, as in independent draws
    both = (masks[:, 1] & torch.roll(masks[:, 1], 3, -1)).double().mean()
    assert float(both) == pytest.approx(10 / 16 * 9 / 15, abs=0.01)


def test_what_must_be_included_is():
    include = torch.rand((1, 9, 10), generator=rng()) < 0.2
    masks = covering(RandomTiles(), (9, 10), 3, rng(5), include=include)
    assert masks[:, include].all()
    assert torch.equal(masks, covering(RandomTiles(), (9, 10), 3, rng(5)) | include)


def test_pixels_are_dealt_out_by_the_general_rule():
    masks = covering(RandomPixels.dropping(0.5), (10, 10), 4, rng())
    dealt = masks.sum(0)
    assert int(dealt.max()) - int(dealt.min()) <= 1 and not torch.equal(masks[0], masks[1])


# further masks


def test_further_tiles_take_whole_squares_from_what_was_measured():
    whole = torch.ones(1, 16, 20, dtype=torch.bool)
    for seed in range(20):
        gone = ~FurtherTiles()(whole, rng(seed))
        assert int(gone.sum()) == 4 * 5
        rows, columns = gone[0].any(1), gone[0].any(0)  # one square, perhaps around the edges
        assert torch.equal(gone[0], rows[:, None] & columns) and int(rows.sum()) == 4
        assert all(int((torch.roll(axis, 1) != axis).sum()) == 2 for axis in (rows, columns))
    mask = RandomTiles().draw((16, 20), rng(3))
    parts = [FurtherTiles()(mask, rng(seed)) for seed in range(300)]
    assert all(bool((part & ~mask).sum() == 0) and 0 < int((mask & ~part).sum()) <= 20 for part in parts)
    hidden = torch.stack([mask & ~part for part in parts]).any(0)
    assert torch.equal(hidden, mask)  # every measured place has a chance to be hidden


def test_the_place_hidden_lies_anywhere_in_its_square():
    pair = torch.zeros(1, 16, 16, dtype=torch.bool)
    pair[0, 5, 7:9] = True
    left = [(pair & ~FurtherTiles()(pair, rng(seed)))[0, 5, 7:9].tolist() for seed in range(1200)]
    for hidden, share in (([True, True], 3 / 4), ([True, False], 1 / 8), ([False, True], 1 / 8)):
        assert left.count(hidden) / 1200 == pytest.approx(share, abs=0.05)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 4), st.integers(1, 5), st.integers(0, 99))
def test_further_tiles_of_any_mask(height, width, count, grid, seed):
    mask = torch.rand((1, height, width), generator=rng(seed)) < 0.6
    kept, law = mask.clone(), FurtherTiles(count, grid)
    part = law(mask, rng(seed))
    assert part.shape == mask.shape and not bool((part & ~mask).any()) and torch.equal(mask, kept)
    assert torch.equal(part, law(mask, rng(seed)))
    most = count * math.ceil(height / grid) * math.ceil(width / grid)
    assert bool(mask.any()) * min(count, 1) <= int((mask & ~part).sum()) <= most


def test_impossible_further_tiles_are_refused():
    for options in ({"count": -1}, {"grid": 0}):
        with pytest.raises(InputError, match="no such FurtherTiles"):
            FurtherTiles(**options)


# boxes


def test_boxes():
    assert (~box_mask((256, 256), (128, 128)))[0, 64:192, 64:192].all()
    assert int((~box_mask((256, 256), (128, 128))).sum()) == 128**2
    mask = box_mask((5, 7), (2, 3), at=(3, 1))
    assert (~mask).nonzero().tolist() == [[0, y, x] for y in (3, 4) for x in (1, 2, 3)]
    assert box_mask((5, 7), (5, 3)).any() and box_mask((5, 7), (0, 0)).all()


@pytest.mark.parametrize(
    ("box", "at"),
    [((6, 1), None), ((1, 8), None), ((5, 7), None), ((-1, 2), None), ((2, 2), (4, 0)), ((2, 2), (0, -1))],
)
def test_boxes_that_do_not_fit_are_refused(box, at):
    with pytest.raises(InputError, match="does not fit an image of 5 x 7"):
        box_mask((5, 7), box, at=at)
