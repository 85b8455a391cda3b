import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msmri.config import build, load_recipe, parse_value
from msmri.errors import InputError
from msmri.physics.masks import RandomLines

RECIPE = """\
# a recipe
data: {path: scans, crop: 64}
mask: {use: "msmri.physics.masks:RandomLines", acceleration: 4, centre_lines: 8}
train:
  lr: 1e-4
  steps: 500_000
  stages: [1, 2.5, {name: last}]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_numbers_without_a_point_are_numbers(recipe):
    train = load_recipe(recipe)["train"]
    assert train["lr"] == 1e-4 and isinstance(train["lr"], float)
    assert train["steps"] == 500_000 and isinstance(train["steps"], int)


@given(st.floats(allow_nan=False))
def test_every_float_reads_back(value):
    text = repr(value).replace("inf", ".inf")
    assert parse_value(text) == value
    assert isinstance(parse_value(text), float)


@given(st.integers(-(10**9), 10**9))
def test_every_integer_stays_one(value):
    assert parse_value(str(value)) == value and isinstance(parse_value(str(value)), int)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("null", None),
        ("[1, 2e3]", [1, 2000.0]),
        ("db4", "db4"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("'1e-4'", "1e-4"),
        ("-.5", -0.5),
    ],
)
def test_values(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_nan_and_a_broken_value():
    assert math.isnan(parse_value(".nan"))
    with pytest.raises(InputError, match="cannot read the value"):
        parse_value("[1, 2")


def test_overrides_change_add_and_reach_into_lists(recipe):
    changes = [
        "train.lr=3e-5",
        "train.seed=7",
        "data.crop=null",
        "train.stages.2.name=end",
        "train.stages.0=9",
        "a=b=c",
    ]
    resolved = load_recipe(recipe, changes)
    assert resolved["train"] == {"lr": 3e-5, "steps": 500_000, "stages": [9, 2.5, {"name": "end"}], "seed": 7}
    assert resolved["data"] == {"path": "scans", "crop": None}
    assert resolved["a"] == "b=c"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trian.lr=1", "no section 'trian'.*'train'"),
        ("train.lr", "section.key=value"),
        ("=3", "section.key=value"),
        ("train..lr=3", "section.key=value"),
        ("train.lr.deep=1", "train.lr is a value"),
        ("train.stages.7=1", "no entry 7"),
        ("train.stages.x=1", "no entry x"),
        ("train.lr=[", "cannot read the value"),
    ],
)
def test_wrong_overrides_name_file_and_key(recipe, override, says):
    with pytest.raises(InputError, match=says) as caught:
        load_recipe(recipe, [override])
    assert str(caught.value).startswith(str(recipe))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", "line 2: key 'a' is given twice"),
        ("a: {b: 1, b: 1}\n", "key 'b' is given twice"),
        ("- 1\n- 2\n", "not a mapping"),
        ("", "not a mapping"),
        ("3: 4\n", "not a mapping"),
        ("a: [1, 2\nb: 3\n", "line"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1"),
        ("a: \x00\n", "not a YAML recipe"),
    ],
)
def test_broken_recipes(tmp_path, text, says):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_unreadable_recipes(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\x89HDF\xff\xfe")
    for path in (tmp_path / "none.yaml", tmp_path / "binary.yaml", tmp_path):
        with pytest.raises(InputError) as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)


def test_build_makes_nested_objects(recipe):
    built = build(load_recipe(recipe))
    assert built["mask"] == RandomLines(acceleration=4, centre_lines=8)
    assert built["data"] == {"path": "scans", "crop": 64}
    assert built["train"]["stages"][2] == {"name": "last"}


def test_caller_supplies_arguments():
    node = {"use": "msmri.physics.masks:RandomLines", "centre_lines": 8}
    assert build(node, acceleration=6.0) == RandomLines(acceleration=6.0, centre_lines=8)
    with pytest.raises(InputError, match="set by the program"):
        build(node | {"acceleration": 2}, acceleration=6.0)


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"use": "msmri.physics.masks:RandomLine"}, "did you mean 'RandomLines'"),
        ({"use": "msmri.physics.maks:RandomLines"}, "cannot import msmri.physics.maks"),
        ({"use": "msmri.physics.masks:RandomLines", "accelaration": 4}, "did you mean 'acceleration'"),
        ({"use": "msmri.physics.masks:RandomLines"}, "needs acceleration"),
        ({"use": "msmri.physics.masks:RandomLines", "acceleration": 0.5}, "below 1"),
        ({"use": "msmri.physics.masks:RandomLines", "acceleration": "four"}, "does not accept"),
        ({"use": "os:system", "command": "true"}, "'os' is not trusted"),
        ({"use": "msmri.io.output:os.system", "command": "true"}, "names no code"),
        ({"use": "msmri.io.output:Path"}, "no class or function of a trusted package"),
        ({"use": "msmri.io.output:_commit"}, "names no code"),
        ({"use": "msmri.io.output:DONE"}, "no class or function of a trusted package"),
        ({"use": 3}, "names no code"),
    ],
)
def test_what_build_refuses(node, says):
    with pytest.raises(InputError, match=f"model.inner: .*{says}"):
        build({"model": {"inner": node}})


def test_trust_is_given_by_package(tmp_path, monkeypatch):
    (tmp_path / "lab_masks.py").write_text("def spiral(turns=3):\n    return turns\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="'lab_masks' is not trusted"):
        build({"use": "lab_masks:spiral"})
    assert build({"use": "lab_masks:spiral", "turns": 5}, trust=("msmri", "lab_masks")) == 5
