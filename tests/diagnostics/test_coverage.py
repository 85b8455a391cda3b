import math

import pytest
import torch

from msmri.diagnostics import Progress, finish, load_diagnostic
from msmri.diagnostics.coverage import count_pairs, in_bins, masks_to_reach
from msmri.diagnostics.subjects import Subject
from msmri.errors import InputError
from msmri.io import write_scan
from msmri.physics.masks import EquispacedLines, FastMRIMagic, PoissonDisc, RandomLines, draw_masks
from msmri.physics.simulate import coil_maps, phantom, simulate_kspace
from msmri.tensors import generators


def found(subject, **options):
    diagnostic = load_diagnostic("coverage")
    return finish(diagnostic.function(subject, **diagnostic.settings({"draws": 300, **options})))


def test_pairs_are_counted_as_by_hand():
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool).reshape(3, 1, 1, 4)
    counts = count_pairs(masks)
    assert counts.together.tolist() == [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert in_bins(masks[0], 2).tolist() == [[True, False]] and in_bins(masks[1], 4).tolist() == masks[1, 0].tolist()
    wide = torch.zeros(1, 5, 9, dtype=torch.bool)
    wide[0, 3, 8] = True
    assert in_bins(wide, 4).tolist() == [[False, False, False, True]]
    assert (counts.never, counts.pairs, counts.pairs_never) == (1, 3, 1)  # 0-1 and 0-2 were seen, 1-2 never
    some = count_pairs(masks, torch.tensor([1, 2]))
    assert some.together.tolist() == [[2, 0], [0, 1]] and some.pairs_never == 1


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_masks_needed_to_reach_everything(share):
    p = torch.tensor([1.0, 0.25, 0.25, 0.5, 0.0])
    n = masks_to_reach(p, share)

    def missing(k):
        return 2 * 0.75**k + 0.5**k

    assert missing(n) <= 1 - share < missing(n - 1)
    assert masks_to_reach(torch.ones(3), 0.99) == 1


def test_random_lines_show_all_pairs_and_spaced_lines_do_not():
    random = found(Subject(law=RandomLines(4.0), matrix=(16, 40))).numbers["law"]
    assert random["blind spots"] == random["pairs never together"] == 0
    assert random["expected acceleration"] == pytest.approx(40 / (3 + 37 / 4))
    spaced = found(Subject(law=EquispacedLines(4.0, centre_lines=0), matrix=(16, 40))).numbers
    # whole spacing: two lines are together if and only if they are a multiple of 4 apart
    assert spaced["law"]["pairs never together"] == math.comb(40, 2) - 4 * math.comb(10, 2)
    assert spaced["largest difference of drawn and stated probability"] < 0.12


def test_blind_spots_are_told():
    finding = found(Subject(law=FastMRIMagic(4.0), matrix=(16, 320)))
    law = finding.numbers["law"]
    assert law["blind spots"] > 0 and law["least probability"] == 0
    assert f"{law['blind spots']} of 320 lines never sampled" in finding.learned[0]


def test_places_are_chosen_where_there_are_too_many_for_pairs():
    law = PoissonDisc(3.0, centre_lines=4)
    numbers = found(Subject(law=law, matrix=(20, 24)), draws=60, places=50).numbers["law"]
    assert numbers["unit"] == "places" and numbers["places"] == 480 and numbers["pairs looked at"] <= math.comb(50, 2)


def write_scans(folder, *, same):
    """Two files of three slices 24 x 20: one mask for all slices, or a mask each; one more file is full."""
    rng = torch.Generator().manual_seed(0)
    for number in range(3):
        images = torch.stack([phantom((24, 20), rng) for _ in range(3)])
        kspace, _ = simulate_kspace(images, coil_maps((24, 20), 3, rng), rng, noise_std=0.01)
        if number == 2:
            write_scan(folder / "full.h5", kspace)
            continue
        seeds = [torch.Generator().manual_seed(5) for _ in range(3)] if same else generators(number, 3)
        mask = draw_masks(RandomLines(4.0, centre_lines=6), (24, 20), seeds)
        write_scan(folder / f"scan{number}.h5", torch.where(mask, kspace, 0), mask=mask[:, 0].numpy())
    return sorted(folder.glob("*.h5"))


@pytest.mark.parametrize("same", [True, False])
def test_masks_of_a_data_set(tmp_path, same):
    files = write_scans(tmp_path, same=same)
    finding = found(Subject(files, matrix=(24, 20)))
    assert finding.numbers["fully sampled slices"] == 3
    (data,) = finding.numbers["data"]
    assert data["slices"] == 6 and data["matrix"] == (24, 20)
    assert data["different masks"] == (1 if same else 6)
    assert (data["pairs never together"] == 0) == same  # one mask: every pair it shows, and nothing else
    assert finding.numbers["all matrices"]["slices"] == 6
    assert not same or data["never seen"] == 20 - round(20 / data["mean acceleration"])
    limited = found(Subject(files, matrix=(24, 20)), slices=3)  # full.h5 comes first
    assert limited.numbers["data"] == [] and "no undersampled one" in limited.learned[-1]
    finding.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_progress_and_options():
    diagnostic = load_diagnostic("coverage")
    steps = diagnostic.function(Subject(matrix=(8, 20)), **diagnostic.settings({}, quick=True))
    assert next(steps) == Progress(0, 2, "200 masks of random-lines")
    assert diagnostic.settings({"draws": 7})["draws"] == 7
    with pytest.raises(InputError, match="no option 'drawn'"):
        diagnostic.settings({"drawn": 7})
    for wrong in (0, "many", 1.5, True):
        with pytest.raises(InputError, match="draws cannot be"):
            diagnostic.settings({"draws": wrong})
    assert load_diagnostic("adapt").settings({"crop_to": 0})["crop_to"] == 0
    with pytest.raises(InputError, match="levels cannot be"):
        load_diagnostic("noisy-reference").settings({"levels": [0.1, -0.1]})
    with pytest.raises(InputError, match="no diagnostic 'luck'"):
        load_diagnostic("luck")
    assert load_diagnostic("resolution").settings({"sizes": 32})["sizes"] == (32,)
    assert load_diagnostic("noisy-reference").settings({"levels": [1, 0.5]})["levels"] == (1, 0.5)
