import json
import os
import pickle
import subprocess
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from msmri.errors import InputError, InputWarning
from msmri.model.adm import COLOUR_128, COMPLEX_256, ADMConfig, ADMUNet, export_state_dict
from msmri.model.checkpoint import (
    checkpoint_checksum,
    convert_published,
    load_checkpoint,
    load_published,
    read_header,
    save_checkpoint,
)
from msmri.model.denoiser import ComplexChannels, VPSchedule
from msmri.model.prior import load_prior

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="reference files are not here")

HEADER = {"recipe": {"mask": {"use": "msmri.physics.masks:RandomLines", "acceleration": 4}}, "seed": 0, "notes": ["é"]}


def tiny(channels=2, **options):
    """A small network with random weights everywhere, and its state dict under the published names."""
    config = ADMConfig(16, channels, channels, 32, 1, (1, 2), (8,), head_channels=64, **options)
    network = ADMUNet(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval(), export_state_dict(network)


@pytest.fixture(scope="module")
def mri():
    return tiny()


def tensors():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    return {
        "float": base,
        "half": base.bfloat16(),
        "double": base.double(),
        "complex": torch.view_as_complex(base.reshape(4, 3, 2)),  # shares memory with "float"
        "conjugate": torch.complex(base.double(), 2 * base.double()).conj(),
        "transposed": base.mT,
        "again": base,
        "scalar": torch.tensor(3),
        "bool": base > 0,
        "empty": torch.zeros(0, 2),
        "parameter": torch.nn.Parameter(base),
    }


def test_round_trip_keeps_every_bit_dtype_and_the_header(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_checkpoint(path, tensors(), HEADER)
    back, header = load_checkpoint(path)
    assert header == HEADER == read_header(str(path))
    assert back.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
        assert not back[name].requires_grad
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    with safe_open(path, framework="pt") as file:  # any reader of the format can see the recipe
        assert json.loads(file.metadata()["msmri"]) == HEADER


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_checkpoint(path, {"a": torch.ones(3)}, {"step": 1})
    before = checkpoint_checksum(path)

    def killed(tensors, target, **_):
        target.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr("msmri.model.checkpoint.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"a": torch.zeros(3)}, {"step": 2})
    assert checkpoint_checksum(path) == before and list(tmp_path.iterdir()) == [path]


def test_a_second_write_replaces_the_first(tmp_path):
    path, reader = tmp_path / "weights.safetensors", tmp_path / "reader"
    for step in (1, 2):
        save_checkpoint(path, {"a": torch.full((3,), float(step))}, {"step": step})
        if step == 1:
            os.link(path, reader)  # whoever holds the old file open keeps all of it
    assert load_checkpoint(path)[0]["a"].tolist() == [2, 2, 2] and read_header(path) == {"step": 2}
    assert load_checkpoint(reader)[0]["a"].tolist() == [1, 1, 1] and read_header(reader) == {"step": 1}


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be written") as caught:
        save_checkpoint(tmp_path / "nowhere" / "weights.safetensors", {"a": torch.ones(1)}, {})
    assert "nowhere" in str(caught.value) and "\n" not in str(caught.value)


def test_checksum_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert checkpoint_checksum(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint_checksum(tmp_path / "other")


def bad_files(folder, state):
    """Files that are no weights, by name, with what the error must say of each when loaded as published weights."""
    torch.save(state, folder / "whole.pt")
    whole = (folder / "whole.pt").read_bytes()
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "whole.safetensors")
    contents = {
        "truncated.pt": (whole[: len(whole) // 2], "not a readable weights file"),
        "headless.pt": (whole[200:], "not a readable weights file"),
        "old_truncated.pt": ((folder / "old.pt").read_bytes()[:5000], "not a readable weights file"),
        "short.safetensors": ((folder / "whole.safetensors").read_bytes()[:-100], "damaged or truncated"),
        "page.pt": (b"<html>404 not found</html>", "not a readable weights file"),
        "empty.pt": (b"", "not a readable weights file"),
        "broken.safetensors": (b"\x10\0\0\0\0\0\0\0{not json at all", "damaged or truncated"),
    }
    objects = {
        "list.pt": ([1, 2], "holds a list, not weights"),
        "nothing.pt": ({}, "holds a dict, not weights"),
        "tensor.pt": (torch.ones(3), "holds a Tensor, not weights"),
        "numbers.pt": ({"a": 1}, "holds int under 'a', not a tensor"),
        "integers.pt": ({**state, "out.2.bias": torch.ones(2, dtype=torch.int64)}, "out.2.bias is not made of finite"),
        "nan.pt": ({**state, "out.2.bias": torch.tensor([1.0, torch.nan])}, "out.2.bias is not made of finite"),
        "labels.pt": ({**state, "label_emb.weight": torch.ones(2, 2)}, "unknown tensor label_emb.weight"),
        "incomplete.pt": ({k: v for k, v in state.items() if k != "out.2.bias"}, r"lack tensor out\.2\.bias"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    for name, (content, _) in objects.items():
        torch.save(content, folder / name)
    save_checkpoint(folder / "own.safetensors", {"a": torch.ones(1)}, {"recipe": {}})
    header = {"format": "adm", "prediction": "v", "network": {}, "schedule": {}}
    save_checkpoint(folder / "v.safetensors", {"a": torch.ones(1)}, header)
    save_checkpoint(folder / "field.safetensors", {}, header | {"prediction": "epsilon", "network": {"depth": 3}})
    described = header | {"prediction": "epsilon", "network": asdict(tiny()[0].config)}
    save_checkpoint(folder / "other.safetensors", {"a": torch.ones(1)}, described)
    return {name: message for name, (_, message) in (contents | objects).items()} | {
        "own.safetensors": "trained by msmri",
        "v.safetensors": "prediction v",
        "field.safetensors": "depth",
        "other.safetensors": "do not fit the network",
        "missing.pt": "No such file",
        ".": "Is a directory",
    }


def test_what_is_no_weights_file_is_one_line_that_names_it(tmp_path, mri):
    for name, message in bad_files(tmp_path, mri[1]).items():
        with pytest.raises(InputError, match=message) as caught:
            load_published(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value), name
        with pytest.raises(InputError):
            convert_published(tmp_path / name, tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists(), name


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path, mri):
    bad_files(tmp_path, mri[1])
    save_file({"a": torch.ones(1)}, tmp_path / "list.safetensors", metadata={"msmri": "[1]"})
    for name, message in {
        "whole.pt": "convert published",
        "whole.safetensors": "has no msmri header",
        "list.safetensors": "not an object",
        "broken.safetensors": "damaged",
        "short.safetensors": "damaged",
        "missing": "cannot be read",
    }.items():
        for read in (load_checkpoint, read_header):
            with pytest.raises(InputError, match=message) as caught:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


class Call:
    """Pickles as a call of any function: what a malicious weights file does."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["zip", "old", "bare", "text"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, mri, kind, nested):
    trace, path = tmp_path / "executed", tmp_path / "weights.pt"
    for call in (
        Call(os.system, f"touch {trace}"),
        Call(exec, f"open({str(trace)!r}, 'w')"),
        Call(subprocess.check_call, ["touch", str(trace)]),
    ):
        content = {**mri[1], "out.2.bias": call} if nested else call
        if kind in ("zip", "old"):
            torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        else:
            path.write_bytes(pickle.dumps(call, protocol=2 if kind == "bare" else 0))
        for load in (load_published, lambda p: convert_published(p, tmp_path / "out"), load_checkpoint):
            with pytest.raises(InputError) as caught:
                load(path)
            assert not trace.exists() and not (tmp_path / "out").exists()
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)
            if load is not load_checkpoint:
                assert "refused" in str(caught.value) and "asks to run" in str(caught.value)
    pickle.loads(pickle.dumps(Call(os.system, f"touch {trace}")))  # the trap itself works
    assert trace.exists()


def test_published_weights_become_a_denoiser_of_complex_images(tmp_path, mri):
    network, state = mri
    path = tmp_path / "fmri_img256.pt"
    torch.save(OrderedDict(state), path)
    denoiser = load_published(path, head_channels=64, in_channels=2)
    assert denoiser.schedule == VPSchedule() and not denoiser.training
    image = torch.complex(*torch.randn(2, 3, 1, 14, 9, generator=torch.Generator().manual_seed(0)))
    sigma = VPSchedule().sigmas[torch.tensor([0, 300, 999])].reshape(3, 1, 1, 1)
    u = torch.view_as_real(image[:, 0] / (1 + sigma[:, 0].float() ** 2).sqrt()).movedim(-1, 1)
    with torch.no_grad():
        eps = network(u, torch.tensor([0.0, 300.0, 999.0]))
        out = denoiser.denoise(image, sigma)
    expected = image - sigma.float() * torch.complex(eps[:, :1], eps[:, 1:])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match=r"fmri_img256\.pt: the weights are for 2 real channels, not 3"):
        load_published(path, in_channels=3)  # whatever its heads


def test_published_weights_of_photographs_take_real_images(tmp_path):
    network, state = tiny(3, scale_shift_norm=False, resblock_updown=False)
    torch.save(state, tmp_path / "faces.pt")
    denoiser = load_published(tmp_path / "faces.pt", head_channels=64)
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = denoiser.denoise(image, float(VPSchedule().sigmas[500]))
        eps = network(image / (1 + VPSchedule().sigmas[500].float() ** 2).sqrt(), torch.tensor([500.0]))
    torch.testing.assert_close(out, image - VPSchedule().sigmas[500].float() * eps, rtol=1e-4, atol=1e-3)
    assert not any(isinstance(module, ComplexChannels) for module in denoiser.modules())


@pytest.mark.parametrize(
    "nest", ["flat", "ema", "state_dict", "both", "module.", "module.model.", "half", "safetensors"]
)
def test_wrappings_of_the_same_weights_are_seen_through(tmp_path, mri, nest):
    network, state = mri
    zeros = {name: torch.zeros_like(w) for name, w in state.items()}
    path = tmp_path / "weights.pt"
    if nest == "safetensors":
        save_file(state, path)
    else:
        content = {
            "flat": state,
            "ema": {"ema": state, "step": 5},
            "state_dict": {"state_dict": state, "epoch": 1, "optimizer": {"lr": 0.1}},
            "both": {"model": zeros, "ema": state},
            "half": {name: w.half() for name, w in state.items()},
        }.get(nest) or {nest + name: w for name, w in state.items()}
        torch.save(content, path)
    loaded = load_published(path, head_channels=64).network.network.state_dict()
    tolerance = 1e-3 if nest == "half" else 0
    for name, w in network.state_dict().items():
        torch.testing.assert_close(loaded[name], w, rtol=tolerance, atol=tolerance)


def test_conversion_keeps_the_function_and_says_what_it_is(tmp_path):
    network, state = tiny(n_heads=2)
    source, out = tmp_path / "published.pt", tmp_path / "converted.safetensors"
    torch.save(state, source)
    header = convert_published(source, out, n_heads=2)
    assert header == read_header(out) and header["prediction"] == "epsilon"
    assert header["schedule"] == {"n_steps": 1000, "beta_min": 1e-4, "beta_max": 0.02}
    assert header["weights"] == {"file": "published.pt", "sha256": checkpoint_checksum(source)}
    denoiser = load_published(out)  # a converted file knows its heads
    assert denoiser.network.network.config == network.config
    image = torch.complex(*torch.randn(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        assert torch.equal(denoiser.denoise(image, 0.5), load_published(source, n_heads=2).denoise(image, 0.5))
        assert not torch.allclose(
            denoiser.denoise(image, 9.0), load_published(source, head_channels=64).denoise(image, 9.0)
        )
    with pytest.raises(InputError, match="exists already"):
        convert_published(source, out)
    assert convert_published(source, out, n_heads=2, overwrite=True) == header


def test_loaded_weights_can_be_trained_on(tmp_path, mri):
    torch.save(mri[1], tmp_path / "weights.pt")
    denoiser = load_published(tmp_path / "weights.pt", head_channels=64).train()
    image = torch.complex(*torch.randn(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    denoiser.denoise(image, 1.0).abs().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in denoiser.parameters())


def golden():
    """The reference's network: its weights, which are a function of their names, input, time, output, head width."""
    file = np.load(REFERENCE / "adm_unet_golden.npz")
    rng, state, shapes = np.random.RandomState(int(file["seed"])), {}, json.loads(str(file["shapes"]))
    for name in sorted(shapes):
        w = rng.standard_normal(shapes[name]).astype(np.float32)
        w = w / np.sqrt(np.prod(w.shape[1:])) if w.ndim > 1 else 0.1 * w + float(name.endswith("weight"))
        state[name] = torch.from_numpy(w.astype(np.float32))
    width = json.loads(str(file["config"]))["num_head_channels"]
    return state, *(torch.from_numpy(file[name]) for name in "xty"), width


@needs_reference
def test_the_golden_network_is_reproduced_from_its_file(tmp_path):
    state, x, t, y, width = golden()
    torch.save({"ema": state}, tmp_path / "golden.pt")

    def error(**options):
        prior = load_prior(tmp_path / "golden.pt", **options).network
        with torch.no_grad():
            return float((getattr(prior, "network", prior)(x, t) - y).abs().max())

    assert error(head_channels=width) < 1e-4
    assert error(head_channels=64) > 0.1  # another width fits the same tensors, and is wrong
    with pytest.warns(InputWarning, match=r"golden\.pt .*how wide its attention heads are.*give head_channels="):
        assert error() > 0.1


def test_heads_that_no_shape_tells_are_warned_of(tmp_path, mri):
    path, out = tmp_path / "weights.pt", tmp_path / "out.safetensors"
    torch.save(mri[1], path)
    for load in (load_published, load_prior, lambda source: convert_published(source, out)):
        with pytest.warns(InputWarning, match="attention heads") as caught:
            load(path)
        assert len(caught) == 1 and "\n" not in str(caught[0].message)
        assert all(part in str(caught[0].message) for part in (str(path), "head_channels=", "--head-channels"))
    out.unlink()
    assert load_prior(path, head_channels=64).network.network.config == mri[0].config
    assert load_prior(path, n_heads=1).network.network.config.n_heads == 1
    convert_published(path, out, head_channels=32)
    assert load_prior(out).network.network.config.head_channels == 32  # a converted file knows


@needs_reference
@pytest.mark.parametrize(("file", "config"), [("fastmri256", COMPLEX_256), ("ffhq128", COLOUR_128)])
def test_heads_of_the_published_networks_are_known(tmp_path, file, config):
    shapes = json.loads((REFERENCE / f"published_checkpoint_{file}_keys.json").read_text())
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, tmp_path / "published.pt")
    network = load_prior(tmp_path / "published.pt").network
    assert (network.network if config.in_channels == 2 else network).config == config
    if config is COLOUR_128:
        narrow = load_prior(tmp_path / "published.pt", head_channels=32).network
        assert narrow.config.head_channels == 32
