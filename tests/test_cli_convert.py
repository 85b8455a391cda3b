import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from msmri.cli import app
from msmri.io.output import sha256
from msmri.model.adm import ADMConfig, ADMUNet, export_state_dict
from msmri.model.checkpoint import read_header
from msmri.model.prior import load_prior

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


def invoke(*arguments, code: int = 0):
    result = CliRunner().invoke(app, ["convert-weights", *map(str, arguments)])
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr, result.exception)
    return result


def refused(*arguments) -> str:
    lines = invoke(*arguments, code=2).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def published(channels, **options):
    """Weights of a small network of the family, random everywhere, under their published names."""
    network = ADMUNet(ADMConfig(16, channels, channels, 32, 1, (1, 2), (8,), **options))
    generator = torch.Generator().manual_seed(channels)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network, export_state_dict(network)


@pytest.mark.parametrize(("channels", "kind"), [(2, "MRI"), (3, "photographs")])
def test_the_converted_file_is_the_same_prior_and_says_what_it_is(tmp_path, channels, kind):
    network, state = published(channels)
    source, out = tmp_path / "published_R4.pt", tmp_path / "new" / "weights.safetensors"
    torch.save({"ema": state}, source)
    result = invoke(source, out)
    assert kind in result.stdout and "predicts epsilon" in result.stdout and str(out) in result.stdout
    header = read_header(out)
    assert header["weights"] == {"file": "published_R4.pt", "sha256": sha256(source)}
    assert header["prediction"] == "epsilon" and header["network"]["in_channels"] == channels
    assert header["network"]["image_size"] == network.config.image_size
    assert header["schedule"] == {"n_steps": 1000, "beta_min": 1e-4, "beta_max": 0.02}
    with safe_open(out, framework="pt") as file:  # any reader sees the header
        assert json.loads(file.metadata()["msmri"]) == header
    shape = (2, 1, 16, 12) if channels == 2 else (2, 3, 16, 12)
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noisy = torch.complex(noisy, noisy.flip(-1)) if channels == 2 else noisy
    priors = [load_prior(source, head_channels=64), load_prior(out)]
    assert all(torch.equal(a, b) for a, b in zip(*(prior.state_dict().values() for prior in priors)))
    with torch.no_grad():
        before, after = (prior.denoise(noisy, 0.7) for prior in priors)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)  # memory mapped or not: rounding may differ
    assert not torch.allclose(before, noisy)


@pytest.mark.skipif(not REFERENCE.exists(), reason="reference files are not here")
def test_the_golden_network_stays_golden(tmp_path):
    golden = np.load(REFERENCE / "adm_unet_golden.npz")
    rng, state = np.random.RandomState(int(golden["seed"])), {}
    shapes = json.loads(str(golden["shapes"]))
    for name in sorted(shapes):  # the recipe of the reference: weights are a function of their names
        w = rng.standard_normal(shapes[name]).astype(np.float32)
        w = w / np.sqrt(np.prod(w.shape[1:])) if w.ndim > 1 else 0.1 * w + float(name.endswith("weight"))
        state[name] = torch.from_numpy(w.astype(np.float32))
    torch.save(state, tmp_path / "golden.pt")
    width = json.loads(str(golden["config"]))["num_head_channels"]
    invoke(tmp_path / "golden.pt", tmp_path / "golden.safetensors", "--head-channels", width)
    network = load_prior(tmp_path / "golden.safetensors").network
    network = getattr(network, "network", network)  # inside the door between complex images and real channels
    x, t, y = (torch.from_numpy(golden[name]) for name in "xty")
    with torch.no_grad():
        assert float((network(x, t) - y).abs().max()) < 1e-4


def test_heads_are_kept_where_the_file_cannot_tell_them(tmp_path):
    torch.save(published(2, n_heads=2)[1], tmp_path / "in.pt")
    invoke(tmp_path / "in.pt", tmp_path / "out.safetensors", "--heads", 2)
    assert load_prior(tmp_path / "out.safetensors").network.network.config.n_heads == 2


class Call:
    """Pickles as a call of any function: what a malicious weights file does."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_a_file_that_would_run_code_is_refused_and_leaves_nothing(tmp_path):
    trace, out = tmp_path / "executed", tmp_path / "out.safetensors"
    torch.save({**published(2)[1], "out.2.bias": Call(os.system, f"touch {trace}")}, tmp_path / "evil.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Call(os.system, f"touch {trace}"), protocol=2))
    for name in ("evil.pt", "bare.pt"):
        assert "asks to run" in refused(tmp_path / name, out)
    assert not trace.exists() and not out.exists()


def test_mistakes_are_one_line(tmp_path):
    state = published(2)[1]
    source, out = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save(state, source)
    assert "No such file" in refused(tmp_path / "none.pt", out)
    assert "name a .safetensors file" in refused(source, tmp_path / "out.pt")
    assert "--head-channels 0 is too small" in refused(source, out, "--head-channels", 0)
    assert "cannot be split into heads" in refused(source, out, "--head-channels", 48)
    torch.save({name: w for name, w in state.items() if name != "out.2.bias"}, tmp_path / "part.pt")
    assert "lack tensor out.2.bias" in refused(tmp_path / "part.pt", out)
    (tmp_path / "page.pt").write_bytes(b"<html>")
    assert "page.pt: is not a readable weights file" in refused(tmp_path / "page.pt", out)
    assert not out.exists()
    invoke(source, out)
    before = out.read_bytes()
    assert "exists already" in refused(source, out) and out.read_bytes() == before
    assert "replace the input" in refused(out, out, "--overwrite")
    invoke(source, out, "--overwrite")
    (tmp_path / "file").touch()
    assert "not a directory" in refused(source, tmp_path / "file" / "out.safetensors")
