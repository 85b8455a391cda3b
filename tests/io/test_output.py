import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import msmri.io.output as output
from msmri.errors import InputError
from msmri.io.output import (
    ReconstructionWriter,
    atomic,
    check_writable,
    environment,
    fingerprint,
    open_hdf5,
    read_maps,
    read_reconstruction,
    sha256,
    write_manifest,
    write_maps,
)

SHAPE = (6, 5)


def slices(n: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def contents(path: Path) -> dict[str, object]:
    with h5py.File(path) as file:
        return {**{name: np.asarray(file[name][()]).tolist() for name in file}, "attributes": dict(file.attrs)}


# reconstructions


def test_a_reconstruction_has_fastmris_layout(make_scan, tmp_path):
    images, source, path = slices(3), make_scan(), tmp_path / "out" / "deep" / "scan.h5"
    with ReconstructionWriter(path, 3, SHAPE, source=source, attributes={"acceleration": 4}) as writer:
        for index in (2, 0, 1):
            writer.write(index, images[index])
            assert not path.exists() and files(path.parent) == ["scan.h5.part"]
    assert files(path.parent) == ["scan.h5"]
    with h5py.File(path) as file, h5py.File(source) as scan:
        assert sorted(file) == ["ismrmrd_header", "reconstruction", "reconstruction_complex"]
        assert file["reconstruction"].dtype == np.float32 and file["reconstruction_complex"].dtype == np.complex64
        np.testing.assert_array_equal(file["reconstruction"], images.abs().numpy())
        np.testing.assert_array_equal(file["reconstruction_complex"], images.numpy())
        assert file["ismrmrd_header"][()] == scan["ismrmrd_header"][()]
        assert dict(file.attrs) == {**dict(scan.attrs), "acceleration": 4}


def test_std_is_written_with_several_samples_and_only_then(tmp_path):
    images, std = slices(2), slices(2, seed=1).abs()
    with ReconstructionWriter(tmp_path / "a.h5", 2, SHAPE, samples=4) as writer:
        with pytest.raises(ValueError, match="several samples"):
            writer.write(0, images[0])
        for index in range(2):
            writer.write(index, images[index], std=std[index])
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["reconstruction_std"], std.numpy())
        assert file["reconstruction_std"].dtype == np.float32
    with ReconstructionWriter(tmp_path / "b.h5", 1, SHAPE) as writer:
        with pytest.raises(ValueError, match="several samples"):
            writer.write(0, images[0], std=std[0])
        writer.write(0, images[0])


def test_double_precision_and_gradients_are_written_as_single(tmp_path):
    image = slices(1)[0].to(torch.complex128).requires_grad_()
    with ReconstructionWriter(tmp_path / "a.h5", 1, SHAPE) as writer:
        writer.write(0, image)
    assert read_reconstruction(tmp_path / "a.h5", "reconstruction_complex").dtype == torch.complex64
    assert read_reconstruction(tmp_path / "a.h5").dtype == torch.float32


def test_a_wrong_shape_is_refused(tmp_path):
    refused = pytest.raises(ValueError, match=r"\(6, 5\), got \(5, 6\)")
    with refused, ReconstructionWriter(tmp_path / "a.h5", 1, SHAPE) as writer:
        writer.write(0, slices(1)[0].T)
    assert files(tmp_path) == []


def test_fastmris_evaluation_reads_a_reconstruction(tmp_path):
    from argparse import Namespace

    from fastmri.evaluate import Metrics, evaluate, mse

    target = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(0))
    for name in ("target", "prediction"):
        (tmp_path / name).mkdir()
    with h5py.File(tmp_path / "target" / "a.h5", "w") as file:
        file["reconstruction_rss"] = target.numpy()
    with ReconstructionWriter(tmp_path / "prediction" / "a.h5", 2, (12, 12)) as writer:
        for index in range(2):
            writer.write(index, 0.5j * target[index])
    arguments = Namespace(
        target_path=tmp_path / "target", predictions_path=tmp_path / "prediction", acquisition=None, acceleration=None
    )
    metrics = evaluate(arguments, "reconstruction_rss")
    assert isinstance(metrics, Metrics)
    assert metrics.means()["MSE"] == pytest.approx(mse(target.numpy(), 0.5 * target.numpy()), rel=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError, SystemExit])
@pytest.mark.parametrize("resume", [False, True])
def test_nothing_half_written_is_left_unless_it_shall_be_resumed(tmp_path, error, resume):
    path = tmp_path / "a.h5"
    with pytest.raises(error), ReconstructionWriter(path, 2, SHAPE, resume=resume) as writer:
        writer.write(0, slices(1)[0])
        raise error("stop")
    assert files(tmp_path) == (["a.h5.part"] if resume else [])


def test_slices_never_written_are_an_error_not_zeros(tmp_path):
    with (
        pytest.raises(ValueError, match=r"slices \[0, 2\] were not written"),
        ReconstructionWriter(tmp_path / "a.h5", 3, SHAPE) as writer,
    ):
        writer.write(1, slices(1)[0])
    assert files(tmp_path) == []


def test_resuming_finishes_identically(make_scan, tmp_path):
    images, source = slices(4), make_scan()
    options = {"source": source, "samples": 2, "settings": {"seed": 0, "method": "msm"}, "resume": True}
    with ReconstructionWriter(tmp_path / "whole.h5", 4, SHAPE, **options) as writer:
        for index in range(4):
            writer.write(index, images[index], std=images[index].abs())
    path = tmp_path / "resumed.h5"
    with pytest.raises(KeyboardInterrupt), ReconstructionWriter(path, 4, SHAPE, **options) as writer:
        assert writer.done.tolist() == [False] * 4
        for index in (0, 2):
            writer.write(index, images[index], std=images[index].abs())
        raise KeyboardInterrupt
    assert not path.exists()
    with ReconstructionWriter(path, 4, SHAPE, **options) as writer:
        assert writer.done.tolist() == [True, False, True, False]
        for index in np.flatnonzero(~writer.done):
            writer.write(index, images[index], std=images[index].abs())
    assert contents(path) == contents(tmp_path / "whole.h5")
    assert output.DONE not in contents(path) and output.FINGERPRINT not in contents(path)["attributes"]
    assert files(tmp_path) == ["resumed.h5", "scan.h5", "whole.h5"]


def test_without_resume_an_unfinished_file_is_started_again(tmp_path):
    path = tmp_path / "a.h5"
    with pytest.raises(KeyboardInterrupt), ReconstructionWriter(path, 2, SHAPE, resume=True) as writer:
        writer.write(0, slices(1)[0])
        raise KeyboardInterrupt
    with ReconstructionWriter(path, 2, SHAPE) as writer:
        assert not writer.done.any()
        for index in range(2):
            writer.write(index, slices(2)[index])
    assert files(tmp_path) == ["a.h5"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"settings": {"seed": 1, "R": 4}}, r"\(seed\)"),
        ({"settings": {"seed": 0}}, r"\(R\)"),
        ({"samples": 2}, r"\(samples\)"),
        ({"shape": (5, 6)}, r"\(output shape\)"),
        ({"n_slices": 3}, r"\(output shape\)"),
    ],
)
def test_an_unfinished_file_of_other_settings_is_not_continued(tmp_path, arguments, words):
    base = {"n_slices": 2, "shape": SHAPE, "settings": {"R": 4, "seed": 0}, "resume": True}
    path = tmp_path / "a.h5"
    with pytest.raises(KeyboardInterrupt), ReconstructionWriter(path, **base) as writer:
        writer.write(0, slices(1)[0])
        raise KeyboardInterrupt
    before = path.with_name("a.h5.part").read_bytes()
    with pytest.raises(InputError, match=words), ReconstructionWriter(path, **base | arguments):
        pass
    assert path.with_name("a.h5.part").read_bytes() == before
    with ReconstructionWriter(path, **base | {"settings": {"seed": 0, "R": 4}}) as writer:
        assert writer.done.tolist() == [True, False]
        writer.write(1, slices(1)[0])


@pytest.mark.parametrize("kind", ["text", "other"])
def test_a_foreign_unfinished_file_is_not_continued_and_not_deleted(tmp_path, kind):
    part = tmp_path / "a.h5.part"
    if kind == "text":
        part.write_text("hello")
    else:
        h5py.File(part, "w").close()
    with (
        pytest.raises(InputError, match=r"a\.h5\.part: .*delete it to start again"),
        ReconstructionWriter(tmp_path / "a.h5", 2, SHAPE, resume=True),
    ):
        pass
    assert files(tmp_path) == ["a.h5.part"]


def test_an_existing_output_is_kept_unless_overwriting_is_asked(tmp_path):
    path = tmp_path / "a.h5"
    path.write_text("precious")
    for resume in (False, True):
        refused = pytest.raises(InputError, match=r"a\.h5: exists already")
        with refused, ReconstructionWriter(path, 1, SHAPE, resume=resume):
            pass
    assert path.read_text() == "precious" and files(tmp_path) == ["a.h5"]
    with pytest.raises(RuntimeError), ReconstructionWriter(path, 1, SHAPE, overwrite=True) as writer:
        raise RuntimeError
    assert path.read_text() == "precious" and files(tmp_path) == ["a.h5"]
    with ReconstructionWriter(path, 1, SHAPE, overwrite=True) as writer:
        writer.write(0, slices(1)[0])
    assert read_reconstruction(path).shape == (1, *SHAPE)


def test_a_bad_source_leaves_nothing(tmp_path):
    writer = ReconstructionWriter(tmp_path / "a.h5", 1, SHAPE, source=tmp_path / "gone.h5")
    with pytest.raises(InputError, match="no such file"), writer:
        pass
    assert files(tmp_path) == []


def test_writing_outside_the_block_is_refused(tmp_path):
    with pytest.raises(ValueError, match="with block"):
        ReconstructionWriter(tmp_path / "a.h5", 1, SHAPE).write(0, slices(1)[0])


SCRIPT = """
import sys, time, torch
from msmri.io.output import ReconstructionWriter
with ReconstructionWriter(sys.argv[1], 3, (6, 5), resume=sys.argv[2] == "resume") as writer:
    writer.write(0, torch.ones(6, 5, dtype=torch.complex64))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("sent", "mode", "left"),
    [(signal.SIGINT, "", []), (signal.SIGKILL, "resume", ["a.h5.part"])],
)
def test_ctrl_c_and_kill_leave_no_final_file(tmp_path, sent, mode, left):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "a.h5"), mode], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(sent)
    process.wait(20)
    process.stdout.close()
    assert files(tmp_path) == left
    if left:
        with ReconstructionWriter(tmp_path / "a.h5", 3, SHAPE, resume=True) as writer:
            assert writer.done.tolist() == [True, False, False]
            for index in (1, 2):
                writer.write(index, torch.ones(SHAPE, dtype=torch.complex64))
        assert bool((read_reconstruction(tmp_path / "a.h5") == 1).all())


# where to write


def test_a_writable_place_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "not" / "yet" / "a.h5")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a directory"):
        check_writable(tmp_path / "file" / "a.h5")
    with pytest.raises(InputError, match="is a directory"):
        check_writable(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="exists already"):
        check_writable(tmp_path / "file")
    check_writable(tmp_path / "file", overwrite=True)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"a\.h5: cannot write into .* \(Permission denied\); choose another"):
        check_writable(tmp_path / "new" / "a.h5")
    with pytest.raises(InputError), ReconstructionWriter(tmp_path / "new" / "a.h5", 1, SHAPE):
        pass
    assert files(tmp_path) == ["file"] and not (tmp_path / "new").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="as root: see test_cli")
def test_a_read_only_directory(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(InputError, match="Permission denied"):
            check_writable(tmp_path / "a.h5")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_replaces_whole_or_not_at_all(tmp_path, error):
    path = tmp_path / "new" / "a.txt"
    with atomic(path) as part:
        part.write_text("one")
        assert not path.exists() and part.parent == path.parent and part.suffix == ".part"
    with atomic(path) as first, atomic(path) as second:
        assert first != second
        first.write_text("two")
        second.write_text("two")
    with pytest.raises(error), atomic(path) as part:
        part.write_text("three")
        raise error
    assert path.read_text() == "two" and files(tmp_path) == ["new/a.txt"]


# reading back


def test_read_reconstruction_explains_itself(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["reconstruction"] = np.zeros((4, 4))
        file["other"] = np.zeros(3)
    with pytest.raises(InputError, match=r"'reconstruction' of 3 axes; it holds other, reconstruction"):
        read_reconstruction(tmp_path / "a.h5")
    with pytest.raises(InputError, match="'missing'"):
        read_reconstruction(tmp_path / "a.h5", "missing")
    with pytest.raises(InputError, match="no such file"):
        read_reconstruction(tmp_path / "b.h5")


def test_a_locked_and_a_special_file_are_refused(tmp_path):
    path = tmp_path / "a.h5"
    part = tmp_path / "b.h5.part"
    script = f"""
import h5py
files = [h5py.File(name, 'w') for name in {[str(path), str(part)]}]
files[1]['a'] = range(1000)
files[1].flush()
print(flush=True)
input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "HDF5_USE_FILE_LOCKING": "TRUE"},
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(InputError, match="being written by another program"):
            open_hdf5(path)
        for resume in (False, True):  # another run is at it: neither truncated nor continued
            refused = pytest.raises(InputError, match=r"another run|in use")
            with refused, ReconstructionWriter(tmp_path / "b.h5", 1, SHAPE, resume=resume):
                pass
        assert part.stat().st_size > 1000
    finally:
        holder.communicate(b"\n", timeout=20)
    os.mkfifo(tmp_path / "pipe")
    begin = time.monotonic()
    with pytest.raises(InputError, match="not a regular file"):
        open_hdf5(tmp_path / "pipe")
    assert time.monotonic() - begin < 5


# coil maps


def test_coil_maps_come_back(tmp_path):
    maps = torch.randn(3, 2, 4, 6, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "cache" / "maps.h5"
    for given_maps in (maps, (one for one in maps), maps.to(torch.complex128)):
        write_maps(path, given_maps, attributes={"scan": "abc", "kernel": 6})
        assert torch.equal(read_maps(path), maps) and torch.equal(read_maps(path, index=1), maps[1])
    assert torch.equal(read_maps(path, attributes={"kernel": 6, "scan": "abc"}), maps)
    with pytest.raises(InputError, match="another scan or with other settings"):
        read_maps(path, attributes={"kernel": 5, "scan": "abc"})
    with pytest.raises(InputError, match="no slice 3; it holds 3"):
        read_maps(path, index=3)
    with h5py.File(path) as file:
        assert file["maps"].dtype == np.complex64
    assert files(tmp_path) == ["cache/maps.h5"]


def test_failing_maps_leave_the_old_ones(tmp_path):
    maps = torch.ones(2, 1, 3, 4, 4, dtype=torch.complex64)
    write_maps(tmp_path / "maps.h5", maps)

    def fail():
        yield maps[0] * 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_maps(tmp_path / "maps.h5", fail())
    with pytest.raises(ValueError, match="no maps"):
        write_maps(tmp_path / "maps.h5", [])
    assert torch.equal(read_maps(tmp_path / "maps.h5"), maps) and files(tmp_path) == ["maps.h5"]


# manifests


@dataclass
class Settings:
    sigma: float = 80.0
    path: Path = Path("a/b")


def test_a_manifest_is_plain_json(tmp_path):
    path = tmp_path / "manifest.json"
    write_manifest(
        path,
        {
            "settings": Settings(),
            "psnr": np.float32(30.5),
            "nan": float("nan"),
            "inf": torch.tensor(float("inf")),
            "list": (1, Path("x"), {"b", "a"}),
            "tensor": torch.arange(3),
            "none": None,
            "yes": True,
            7: "sept",
            "umlaut": "ü",
        },
    )
    text = path.read_text("utf-8")
    assert text.startswith('{\n  "settings": {\n    "sigma": 80.0,') and "ü" in text
    assert json.loads(text) == {
        "settings": {"sigma": 80.0, "path": "a/b"},
        "psnr": 30.5,
        "nan": None,
        "inf": None,
        "list": [1, "x", ["a", "b"]],
        "tensor": [0, 1, 2],
        "none": None,
        "yes": True,
        "7": "sept",
        "umlaut": "ü",
    }
    assert files(tmp_path) == ["manifest.json"]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.integers() | st.floats() | st.booleans() | st.none(), max_size=5))
def test_a_fingerprint_does_not_depend_on_order(chosen):
    assert fingerprint(chosen) == fingerprint(dict(reversed(chosen.items())))
    assert fingerprint({**chosen, "x" * 6: 1}) != fingerprint(chosen)


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_environment_is_told_and_is_plain(monkeypatch, tmp_path):
    told = environment()
    assert told["torch"] == torch.__version__ and told["numpy"] == np.__version__
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(told) >= {"msmri", "platform", "commit", "h5py"} and json.loads(json.dumps(told)) == told
    commit = told["commit"]
    assert commit is None or (len(commit.removesuffix("-dirty")) == 40 and int(commit.removesuffix("-dirty"), 16))
    monkeypatch.setattr(output, "__file__", str(tmp_path / "msmri" / "io" / "output.py"))
    assert environment()["commit"] is None
    (tmp_path / ".git").mkdir()
    assert environment()["commit"] is None
