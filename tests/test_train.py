import csv
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from msmri.config import build
from msmri.errors import InputError
from msmri.io import write_scan
from msmri.measurement import Measurement
from msmri.model.checkpoint import load_checkpoint, save_checkpoint
from msmri.model.prior import load_prior
from msmri.testing import phantom_measurement
from msmri.train import TrainSettings, _rate, rehearse, step_seed, train


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for seed, shape in enumerate([(32, 24), (27, 32)]):
        scan = phantom_measurement(shape, coils=3, seed=seed)
        write_scan(folder / f"s{seed}.h5", scan.values, mask=scan.mask[:, 0].numpy())
    return folder


@pytest.fixture
def recipe(scans):
    network = {"use": "msmri.model.unet:UNet", "in_channels": 4, "channels": [8, 8], "blocks_per_level": 1}
    return {
        "data": {"use": "msmri.io.dataset:TrainingScans", "path": str(scans)},
        "model": {
            "use": "msmri.model.partial:MeasurementPartial",
            "network": network,
            "wiener_iterations": 3,
            "consistency_iterations": 2,
        },
        "loss": {"use": "msmri.methods.msm_training:LinewiseMSM"},
        "train": {"steps": 6, "pixels": 1600, "learning_rate": 1e-3, "warm_up": 2, "save_every": 3},
    }


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Leave the loss curve, which takes longer than the steps, to the one test that looks for it."""
    if request.node.name != "test_files_of_a_run":
        monkeypatch.setattr("msmri.report.loss_curve", lambda path, records: None)


def state_of(run):
    return torch.load(run / "state.pt", weights_only=True)


def weights_of(run):
    return load_checkpoint(run / "last.safetensors")[0]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def stop_after(recipe, run, steps):
    running = train(recipe, run)
    records = [next(running) for _ in range(steps)]
    running.close()
    return records


@pytest.mark.parametrize("killed_after", [3, 5])
def test_resumed_run_ends_as_an_uninterrupted_one(recipe, tmp_path, killed_after):
    records = list(train(recipe, tmp_path / "whole"))
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6] and records[-1].n_steps == 6
    assert len(stop_after(recipe, tmp_path / "killed", killed_after)) == killed_after
    spent = state_of(tmp_path / "killed")["cpu_seconds"]
    assert state_of(tmp_path / "killed")["step"] == 3 and 0 < spent < 60
    rest = list(train(recipe, tmp_path / "killed"))
    assert [r.step for r in rest] == [4, 5, 6]
    assert [r.loss for r in rest] == [r.loss for r in records[3:]]
    assert_same(weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole"))
    one, other = state_of(tmp_path / "killed"), state_of(tmp_path / "whole")
    assert one["history"] == other["history"] and len(one["history"]) == 6
    assert spent < one["cpu_seconds"] < 60  # the time before the interruption counts
    assert_same(one["model"], other["model"])
    for a, b in zip(one["optimiser"]["state"].values(), other["optimiser"]["state"].values()):
        assert_same(a, b)
    assert list(train(recipe, tmp_path / "whole")) == []  # finished: nothing left to do


def test_files_of_a_run(recipe, tmp_path):
    seen = list(train(recipe, tmp_path))
    assert {f.name for f in tmp_path.iterdir()} == {"state.pt", "last.safetensors", "loss.csv", "loss.png"}
    with (tmp_path / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [float(row["loss"]) for row in rows] == [r.loss for r in seen]
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    _, header = load_checkpoint(tmp_path / "last.safetensors")
    assert header["format"] == "msmri-partial" and header["step"] == 6
    assert header["recipe"]["model"] == recipe["model"] and header["recipe"]["loss"] == recipe["loss"]
    assert header["recipe"]["train"]["steps"] == 6 and header["recipe"]["train"]["ema"] == TrainSettings().ema
    assert header["loss"] == [pytest.approx(sum(r.loss for r in seen) / 6, abs=1e-5)]
    assert all(r.seconds > 0 for r in seen) and header["cpu_hours"] == round(
        state_of(tmp_path)["cpu_seconds"] / 3600, 3
    )


def test_kept_weights_are_those_of_their_steps(recipe, tmp_path):
    recipe["train"] |= {"save_every": 4, "keep_every": 2, "ema": 0.5}
    seen = {}
    for record in train(recipe, tmp_path / "kept"):
        if record.step % 2 == 0:
            seen[f"step_{record.step:06d}.safetensors"] = load_checkpoint(tmp_path / "kept" / "last.safetensors")
            assert state_of(tmp_path / "kept")["step"] == record.step
    assert {f.name for f in (tmp_path / "kept").glob("*.safetensors")} == {*seen, "last.safetensors"}
    assert list(seen) == ["step_000002.safetensors", "step_000004.safetensors", "step_000006.safetensors"]
    for step, (name, (tensors, header)) in zip((2, 4, 6), seen.items()):
        kept, told = load_checkpoint(tmp_path / "kept" / name)
        assert_same(kept, tensors)
        assert told == header and told["step"] == step and "cpu_hours" in told
    first, second = (seen[f"step_00000{step}.safetensors"][0] for step in (2, 4))
    assert not all(torch.equal(first[name], second[name]) for name in first)
    del recipe["train"]["keep_every"]
    list(train(recipe, tmp_path / "none"))
    assert [f.name for f in (tmp_path / "none").glob("*.safetensors")] == ["last.safetensors"]
    assert_same(weights_of(tmp_path / "none"), weights_of(tmp_path / "kept"))


@pytest.mark.parametrize("killed", [3, "step_000004.safetensors", "state.pt"])
def test_a_resumed_run_keeps_the_same_weights(recipe, tmp_path, monkeypatch, killed):
    recipe["train"] |= {"save_every": 5, "keep_every": 2}
    list(train(recipe, tmp_path / "whole"))
    if killed == 3:
        stop_after(recipe, tmp_path / "killed", 3)
    else:  # while it saves at step 4, as it comes to that file
        with monkeypatch.context() as patch:
            write, save = save_checkpoint, torch.save

            def interrupted(path, tensors, header):
                if Path(path).name == killed:
                    raise KeyboardInterrupt
                write(path, tensors, header)

            def interrupted_state(state, path):
                if killed == "state.pt" and state["step"] == 4:
                    raise KeyboardInterrupt
                save(state, path)

            patch.setattr("msmri.train.save_checkpoint", interrupted)
            patch.setattr("torch.save", interrupted_state)
            with pytest.raises(KeyboardInterrupt):
                list(train(recipe, tmp_path / "killed"))
    assert state_of(tmp_path / "killed")["step"] == 2
    list(train(recipe, tmp_path / "killed"))
    names = sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert [name for name in names if name.startswith("step")] == [f"step_{k:06d}.safetensors" for k in (2, 4, 6)]
    assert sorted(f.name for f in (tmp_path / "killed").iterdir()) == names
    for name in names:
        if name.endswith(".safetensors"):
            one, other = (load_checkpoint(tmp_path / run / name) for run in ("killed", "whole"))
            assert_same(one[0], other[0])
            assert one[1] | {"cpu_hours": 0} == other[1] | {"cpu_hours": 0}


def test_the_file_is_the_averaged_model(recipe, tmp_path):
    list(train(recipe, tmp_path))
    saved = state_of(tmp_path)
    averaged = build(recipe["model"])
    averaged.eval().load_state_dict(saved["averaged"])
    prior = load_prior(tmp_path / "last.safetensors")
    assert not prior.training and not any(p.requires_grad for p in prior.parameters())
    batch = build(recipe["data"]).batch(torch.Generator(), pixels=1)
    sigma = torch.full((1, 1, 1, 1), 0.1)
    with torch.no_grad():
        got, expected = (m(batch.values, batch.mask, batch.encoding, sigma) for m in (prior, averaged))
        averaged.load_state_dict(saved["model"])
        latest = averaged(batch.values, batch.mask, batch.encoding, sigma)
    assert torch.equal(got, expected) and not torch.equal(got, latest)


@pytest.mark.parametrize(("ema", "decays"), [(0.999, (2 / 11, 3 / 12)), (0.2, (2 / 11, 0.2)), (0.0, (0.0, 0.0))])
def test_averaged_weights(recipe, tmp_path, ema, decays):
    recipe["train"] |= {"steps": 3, "save_every": 1, "ema": ema}
    states = [state_of(tmp_path) for _ in train(recipe, tmp_path)]
    names = [n for n, _ in build(recipe["model"]).named_parameters()]
    for before, after, decay in zip(states, states[1:], decays):
        assert not all(torch.equal(before["model"][n], after["model"][n]) for n in names)
        for name in names:
            expected = decay * before["averaged"][name] + (1 - decay) * after["model"][name]
            torch.testing.assert_close(after["averaged"][name], expected, rtol=1e-5, atol=1e-7)


def test_learning_rate():
    settings = TrainSettings(steps=100, warm_up=10, final_rate=0.1)
    rates = [_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.5, rel=0.01)
    assert rates[50] == pytest.approx(0.55) and _rate(100, settings) == pytest.approx(0.1)
    assert max(rates) == rates[9] and rates[9:] == sorted(rates[9:], reverse=True)
    assert _rate(0, TrainSettings(warm_up=0)) == 1


def test_spectrum_is_measured_on_the_data(recipe, tmp_path):
    stop_after(recipe, tmp_path, 3)
    expected = build(recipe["data"]).spectrum(torch.Generator().manual_seed(0))
    for part in ("model", "averaged"):
        assert torch.equal(state_of(tmp_path)[part]["spectrum"], expected)


def test_loss_decreases(recipe, tmp_path):
    recipe["data"]["path"] += "/s0.h5"
    recipe["train"] |= {"steps": 80, "pixels": 800, "learning_rate": 1e-2, "save_every": 80, "warm_up": 5, "ema": 0.9}
    list(train(recipe, tmp_path))
    data, loss = build(recipe["data"]), build(recipe["loss"])
    trained = load_prior(tmp_path / "last.safetensors")
    start = build(recipe["model"]).requires_grad_(False)  # the network is zero at first, whatever its other weights
    start.spectrum.copy_(trained.spectrum)
    totals = []
    for model in (start, trained):
        streams = [torch.Generator().manual_seed(1000 + i) for i in range(24)]
        with torch.no_grad():
            totals.append(sum(float(loss(model, data.batch(rng, pixels=800), rng)) for rng in streams) / 24)
    assert totals[1] < 0.9 * totals[0]


def test_global_generators_are_untouched(recipe, tmp_path):
    torch.manual_seed(7)
    numpy_state = np.random.get_state
    before = torch.get_rng_state(), repr(numpy_state()), random.getstate()
    stop_after(recipe, tmp_path / "a", 3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (repr(numpy_state()), random.getstate())
    torch.manual_seed(8)  # and have no influence
    stop_after(recipe, tmp_path / "b", 3)
    assert_same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


def test_every_seed_and_step_has_random_numbers_of_its_own():
    drawn = {
        tuple(torch.rand(4, generator=torch.Generator().manual_seed(step_seed(seed, step))).tolist())
        for seed in (0, 1, 2, 7, 123, 2**31)
        for step in (0, 1, 2, 999, 100_000)
    }
    assert len(drawn) == 30
    assert [step_seed(0, step) for step in (0, 5)] == [0, 5]


def test_seed_changes_the_run(recipe, tmp_path):
    losses = []
    for seed in (0, 1):
        recipe["train"]["seed"] = seed
        losses.append([r.loss for r in stop_after(recipe, tmp_path / str(seed), 2)])
    assert losses[0] != losses[1]


def test_refuses_another_recipe_in_the_same_folder(recipe, tmp_path):
    stop_after(recipe, tmp_path, 3)
    before = (tmp_path / "state.pt").read_bytes()
    others = [
        recipe | {"model": recipe["model"] | {"wiener_iterations": 4}},
        recipe | {"loss": recipe["loss"] | {"blind": 0.1}},
        recipe | {"train": recipe["train"] | {"seed": 5}},
    ]
    for other in others:
        with pytest.raises(InputError, match="holds a run of another recipe; choose another folder"):
            next(train(other, tmp_path))
    with pytest.raises(InputError, match="holds a run; resume it or choose another folder"):
        next(train(recipe, tmp_path, resume=False))
    assert (tmp_path / "state.pt").read_bytes() == before
    more = recipe | {"train": recipe["train"] | {"steps": 7}}
    assert [r.step for r in train(more, tmp_path)] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"step": 3}}, "unknown train settings: step; known: steps, pixels"),
        ({"train": {"keep_every": -1}}, "keep_every of -1 steps makes no sense; give 0 or more"),
        ({"loss": {"use": "msmri.methods.msm_training:LinewiseMSM", "blnd": 1}}, "has no argument 'blnd'"),
        ({"model": {"use": "os:system", "command": "true"}}, "not trusted"),
    ],
)
def test_refuses_what_it_does_not_know(recipe, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        next(train(recipe | change, tmp_path))


@pytest.mark.parametrize("part", ["data", "model", "loss"])
def test_refuses_an_incomplete_recipe(recipe, tmp_path, part):
    del recipe[part]
    with pytest.raises(InputError, match=f"the recipe lacks {part}"):
        next(train(recipe, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_rehearsal_tells_what_a_run_would_train_on(recipe, tmp_path):
    told = rehearse(recipe)
    (first,) = (name for name in ("s0", "s1") if name in told)
    size = "32 x 24" if first == "s0" else "27 x 32"
    assert told.startswith("2 items") and f"3 channels of {size}" in told and "6 steps" in told
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_finds_what_would_stop_a_run(recipe, scans, tmp_path):
    full = phantom_measurement((24, 24), coils=2)
    write_scan(tmp_path / "full.h5", full.encoding(full.target[:, None].to(torch.complex64)))
    for change, message in [
        ({"data": {**recipe["data"], "path": str(tmp_path / "none")}}, "none"),
        ({"data": {**recipe["data"], "path": str(tmp_path / "full.h5")}}, "full.h5"),
        ({"model": {**recipe["model"], "cascade": 2}}, "cascade"),
        ({"start": str(tmp_path / "full.h5")}, "full.h5"),
        ({"train": {"step": 3}}, "step"),
    ]:
        with pytest.raises(InputError, match=message):
            rehearse(recipe | change)


def test_starts_from_given_weights(recipe, tmp_path):
    stop_after(recipe, tmp_path / "first", 3)
    given = weights_of(tmp_path / "first")
    still = recipe["train"] | {"learning_rate": 0.0, "save_every": 1}
    second = recipe | {"start": str(tmp_path / "first" / "last.safetensors"), "train": still}
    stop_after(second, tmp_path / "second", 1)
    assert_same(state_of(tmp_path / "second")["model"], given)
    assert_same(weights_of(tmp_path / "second"), given)
    wider = recipe["model"] | {"network": recipe["model"]["network"] | {"channels": [16, 16]}}
    with pytest.raises(InputError, match=r"last\.safetensors: the weights do not fit the model"):
        next(train(second | {"model": wider}, tmp_path / "third"))


def test_a_step_that_is_not_finite_changes_no_weight(recipe, tmp_path, monkeypatch):
    from msmri.io.dataset import TrainingScans

    recipe["train"] |= {"steps": 3, "save_every": 1}
    draw = TrainingScans.batch
    calls = []

    def broken(self, rng, *, pixels) -> Measurement:
        calls.append(1)
        batch = draw(self, rng, pixels=pixels)
        return batch.scaled(torch.full_like(batch.scale, float("nan"))) if len(calls) == 2 else batch

    monkeypatch.setattr(TrainingScans, "batch", broken)
    states, losses = [], []
    for record in train(recipe, tmp_path):
        states.append(state_of(tmp_path)["model"])
        losses.append(record.loss)
    assert losses[1] != losses[1] and losses[2] == losses[2]
    assert_same(states[0], states[1])
    assert all(bool(value.isfinite().all()) for value in states[2].values())


def test_default_settings_are_trainable():
    settings = TrainSettings()
    assert settings.warm_up < settings.steps and settings.save_every < settings.steps and 0.9 < settings.ema < 1
