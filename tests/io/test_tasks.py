import math

import numpy as np
import pytest
import torch

from msmri.errors import InputError
from msmri.io.photos import ROUNDING, Photos, to_values
from msmri.io.restored import BRIGHTEST, file_names, photo_sheet, read_photo, write_photo, write_spread
from msmri.io.tasks import TASKS, find_task, plain_input
from msmri.physics.operators import Identity, Subsample
from msmri.physics.restoration import BlockAverage


def photos(n=4, shape=(8, 12), seed=0):
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, *shape), generator=rng, dtype=torch.uint8)
    return Photos(pixels, tuple(f"{k}.png" for k in range(n)))


@pytest.mark.parametrize("name", TASKS)
def test_what_is_measured_follows_from_name_and_seed_alone(name):
    task = TASKS[name]
    both = task.degrade(photos(), [0, 1, 3], noise_std=0.1, seed=5)
    assert both.source == ("0.png", "1.png", "3.png") and both.full_scale == 1.0
    torch.testing.assert_close(both.target, to_values(photos().pixels[[0, 1, 3]]))
    assert float(both.noise_std[0]) == pytest.approx(math.hypot(0.1, ROUNDING))
    alone = task.degrade(photos(), [3], noise_std=0.1, seed=5)
    assert torch.equal(alone.values[0], both.values[2]) and torch.equal(alone.mask[0], both.mask[2])
    assert not torch.equal(task.degrade(photos(), [3], noise_std=0.1, seed=6).values, alone.values)
    clean = task.degrade(photos(), [0, 1, 3], seed=5)
    torch.testing.assert_close(clean.values, clean.operator(clean.target))
    assert torch.equal(clean.mask, both.mask)
    noise = (both.values - clean.values)[both.mask.expand_as(both.values)]
    assert 0.08 < float(noise.std()) < 0.12
    assert both.values.shape[-2:] == both.mask.shape[-2:] and plain_input(clean).shape == clean.target.shape


@pytest.mark.parametrize(("name", "share"), [("box", 0.25), ("random", 0.4), ("tiles", 6 / 16)])
def test_shares_that_are_lost(name, share):
    mask = TASKS[name].degrade(photos(40, (16, 24)), range(40)).mask
    assert float(1 - mask.float().mean()) == pytest.approx(share, abs=0.02)
    assert (name == "box") == bool((mask == mask[0]).all())


def test_operators_of_the_tasks():
    full = photos(1, (8, 16))
    small = TASKS["super-resolution"].degrade(full, [0])
    assert small.values.shape == (1, 3, 2, 4) and small.encoding == BlockAverage(4)
    torch.testing.assert_close(small.values[0, :, 0, 0], small.target[0, :, :4, :4].mean((-2, -1)))
    torch.testing.assert_close(plain_input(small)[0, :, 5, 6], small.values[0, :, 1, 1])
    assert TASKS["sensing"].degrade(full, [0]).values.shape == (1, 3, 1, 32)  # a quarter of the pixels
    one, two = (TASKS["sensing"].operator((8, 16), seed) for seed in (0, 1))
    assert not torch.equal(one.signs, two.signs)
    blurred = TASKS["blur"].degrade(full, [0])
    torch.testing.assert_close(blurred.values.mean((-2, -1)), blurred.target.mean((-2, -1)))
    assert float(blurred.values.std()) < 0.6 * float(blurred.target.std())
    torch.testing.assert_close(plain_input(blurred), blurred.values)


def test_photographs_that_are_degraded_already():
    given = photos(2, (4, 6))
    small = TASKS["super-resolution"].degraded(given, [0, 1], noise_std=0.1)
    assert small.target is None and torch.equal(small.values, to_values(given.pixels)) and bool(small.mask.all())
    assert small.encoding.adjoint(small.values).shape == (2, 3, 16, 24)
    box = TASKS["box"].degraded(given, [1])
    assert box.encoding == Identity() and not bool(box.mask[0, 0, 1:3, 2:5].any()) and int((~box.mask).sum()) == 2 * 3
    assert torch.equal(box.values, Subsample(box.mask)(to_values(given.pixels[[1]])))
    known = torch.ones(1, 4, 6, dtype=torch.bool)
    known[..., :3] = False
    lost = TASKS["random"].degraded(given, [0, 1], mask=known)
    assert torch.equal(lost.mask[1], known) and float(lost.values[..., :3].abs().max()) == 0
    for name, mask, says in (
        ("sensing", None, "no measurements"),
        ("random", None, "needs a mask"),
        ("blur", known, "needs no mask"),
        ("random", known[..., :5], "does not fit"),
        ("random", ~torch.ones_like(known), "nothing is known"),
    ):
        with pytest.raises(InputError, match=says):
            TASKS[name].degraded(given, [0], mask=mask)


@pytest.mark.parametrize(
    ("name", "amount", "says"),
    [
        ("haze", None, "no task 'haze'"),
        ("box", -1.0, "cannot have amount"),
        ("random", 1.0, "no share below 1"),
        ("box", 1.0, "does not fit"),
        ("super-resolution", 2.5, "2.5 pixels"),
        ("super-resolution", 5.0, "do not fill"),
        ("sensing", 2.0, "measurements of an image"),
        ("blur", float("inf"), "cannot have amount"),
    ],
)
def test_refused_tasks(name, amount, says):
    with pytest.raises(InputError, match=says):
        find_task(name, amount).degrade(photos(1), [0])


# --- what is left on disk ---------------------------------------------------------------------------------------------


def test_file_names_are_safe_and_differ():
    names = ["a/1.png", "a_1.jpg", "../../etc/x", "..", "faces#3", "A_1.png", "new\nline?", ".hidden.png"]
    found = file_names(names)
    assert found == ["a_1", "a_1-1", "_.._etc_x", "photo", "faces#3", "A_1-5", "new_line_", "hidden"]
    assert not any("/" in name or name.startswith(".") for name in found)


def test_photographs_come_back_as_bytes(tmp_path):
    values = to_values(photos(1).pixels[0])
    write_photo(tmp_path / "a.png", values)
    torch.testing.assert_close(read_photo(tmp_path / "a.png"), values)
    write_photo(tmp_path / "b.png", values * 3)  # out of range: clipped, never wrapped around
    torch.testing.assert_close(read_photo(tmp_path / "b.png"), (values * 3).clamp(-1, 1), atol=1 / 255, rtol=0)
    (tmp_path / "c.png").write_bytes(b"no image")
    for name in ("c.png", "d.png"):
        with pytest.raises(InputError, match="missing or damaged"):
            read_photo(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_spread_and_sheet(tmp_path):
    from PIL import Image

    std = torch.zeros(3, 4, 5)
    std[:, 0, 0], std[0, 1, 1], std[:, 2, 2] = BRIGHTEST, 0.3 * BRIGHTEST, 2 * BRIGHTEST
    write_spread(tmp_path / "s.png", std)
    grey = np.array(Image.open(tmp_path / "s.png"))
    assert grey.shape == (4, 5) and (grey[0, 0], grey[1, 1], grey[2, 2], grey[3, 3]) == (255, 26, 255, 0)
    one, two = torch.full((3, 4, 6), -1.0), torch.full((3, 4, 6), 1.0)
    one[0] = 1  # red
    photo_sheet(tmp_path / "t.png", [[one, two], [None, one]], ["left", "right"])
    sheet = np.array(Image.open(tmp_path / "t.png"))
    assert sheet.shape == (14 + 2 * 96 + 2, 2 * 144 + 2, 3)  # 24 times as large
    assert (sheet[60, 60] == (255, 0, 0)).all() and (sheet[60, 200] == 255).all()
    assert (sheet[160, 60] == 255).all() and (sheet[160, 200] == (255, 0, 0)).all() and (sheet[:14] < 255).any()
    for titles, lines in (
        (["long words that need four lines of room here", "right"], 2),
        (["as long but free " * 2, ""], 1),
    ):
        photo_sheet(tmp_path / "t.png", [[one, two]], titles)
        sheet = np.array(Image.open(tmp_path / "t.png"))
        assert sheet.shape == (14 * lines + 96, 2 * 144 + 2, 3)
        assert (sheet[14 * lines : 14 * lines + 96, :144] == (255, 0, 0)).all()
        assert all((sheet[14 * k : 14 * (k + 1)] < 255).any() for k in range(lines))
        assert (sheet[: 14 * lines, 130:146] == 255).all() == (lines > 1)  # no title runs into the next
    with pytest.raises(InputError, match="one size"):
        photo_sheet(tmp_path / "u.png", [[one, two[:, :3]]], ["a", "b"])
    with pytest.raises(InputError, match="a title a column"):
        photo_sheet(tmp_path / "u.png", [[one]], ["a", "b"])
