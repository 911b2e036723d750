"""Checkpoints: exact round trips, and what happens to damaged, foreign, newer and half-written ones."""

import errno
import hashlib
import json
import os
import pickle
import signal
import sys

import pytest
import torch

from altgrad import checkpoint, durable
from altgrad.errors import AltgradError, CheckpointError, SettingError


def same(a, b):
    """Equal to the bit: dtype, shape and every byte (NaN included)."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def some_tensors(seed):
    return {"w": torch.full((3, 2), float(seed)), "n": torch.tensor(seed)}


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tmp_path, step=10, tensors=some_tensors(10), meta={"lr": 0.1})
    checkpoint.save(tmp_path, step=20, tensors=some_tensors(20), meta={"lr": 0.1})
    return tmp_path


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3)], ids=str)
def test_every_dtype_and_shape_comes_back_to_the_bit(tmp_path, dtype, shape):
    tensor = torch.arange(6, dtype=torch.float64).mul(1.37).sub(2)[: max(1, torch.Size(shape).numel())].to(dtype)
    tensor = tensor[: torch.Size(shape).numel()].reshape(shape)
    path = checkpoint.save(tmp_path, step=0, tensors={"t": tensor}, meta={})
    assert same(checkpoint.load(path).tensors["t"], tensor)


def test_nan_payloads_and_signed_zeros_come_back_to_the_bit(tmp_path):
    tensor = torch.tensor([0x7FC00001, -(2**31), 0x7F800000], dtype=torch.int32).view(torch.float32)
    path = checkpoint.save(tmp_path, step=0, tensors={"t": tensor}, meta={})
    assert same(checkpoint.load(path).tensors["t"], tensor)


def test_views_that_are_not_contiguous_or_overlap_come_back(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": base.T, "row": base[1], "column": base[:, 2], "expanded": torch.ones(1).expand(5), "base": base}
    path = checkpoint.save(tmp_path, step=0, tensors=tensors, meta={})
    loaded = checkpoint.load(path).tensors
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_the_layout_in_memory_comes_back(tmp_path, dtype):
    """A product with a column-major matrix rounds differently from one with its row-major copy."""
    images = torch.randn(2, 3, 4, 5, dtype=dtype)
    tensors = {"columns": torch.randn(3, 4, dtype=dtype).T, "last": images.contiguous(memory_format=torch.channels_last), "mixed": images.permute(2, 0, 3, 1)}
    path = checkpoint.save(tmp_path, step=0, tensors=tensors, meta={})
    loaded = checkpoint.load(path).tensors
    assert {name: tensor.stride() for name, tensor in loaded.items()} == {name: tensor.stride() for name, tensor in tensors.items()}
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    weight = torch.randn(64, 64)
    path = checkpoint.save(tmp_path, step=0, tensors={"embedding": weight, "head": weight, "other": weight.clone()}, meta={})
    loaded = checkpoint.load(path).tensors
    assert loaded["embedding"] is loaded["head"]
    assert loaded["other"].data_ptr() != loaded["head"].data_ptr()
    assert (path / "tensors.safetensors").stat().st_size < 2.1 * weight.numel() * 4


def test_meta_floats_come_back_to_the_bit(tmp_path):
    meta = {"values": [0.1, 1e-323, 1.7976931348623157e308, float("inf"), -0.0, 3, True, None, "ü"], "nested": {"a": {}}}
    path = checkpoint.save(tmp_path, step=7, tensors={}, meta=meta)
    loaded = checkpoint.load(path)
    assert loaded.step == 7
    assert loaded.meta == meta
    assert str(loaded.meta["values"][4]) == "-0.0"


def test_latest_names_the_newest(folder):
    assert checkpoint.latest(folder).name == "step-00000020"


def test_only_the_newest_are_kept(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, step=step, tensors={}, meta={}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(SettingError, match="keep=0 is not allowed; it must be 1 or more"):
        checkpoint.save(tmp_path, step=0, tensors={}, meta={}, keep=0)


def test_saving_a_step_again_replaces_it(folder):
    checkpoint.save(folder, step=20, tensors={"w": torch.ones(1)}, meta={})
    assert list(checkpoint.load_latest(folder).tensors) == ["w"]
    assert not list(folder.glob("*.old"))


def test_going_back_keeps_the_new_checkpoint_though_later_steps_exist(folder):
    for step in (12, 14, 16):
        checkpoint.save(folder, step=step, tensors=some_tensors(step), meta={}, keep=1)
    assert checkpoint.load_latest(folder).step == 16


def test_format_version_1_is_still_read(tmp_path):
    """The bytes of format 1 written out by hand, so that a change of the format shows."""
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    raw = len(header).to_bytes(8, "little") + header + bytes.fromhex("0000803f000000c0")
    body = {
        "format": "altgrad-checkpoint",
        "version": 1,
        "step": 3,
        "tensors": {"w": {"shape": [2], "dtype": "float32"}, "v": {"shape": [2], "dtype": "float32", "same_as": "w"}},
        "meta": {"a": 1},
        "file": {"name": "tensors.safetensors", "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()},
    }
    body["sha256"] = hashlib.sha256((json.dumps(body, sort_keys=True) + "\n").encode()).hexdigest()
    (tmp_path / "tensors.safetensors").write_bytes(raw)
    (tmp_path / "manifest.json").write_text(json.dumps(body))
    step, tensors, meta = checkpoint.load(tmp_path)
    assert (step, meta, tensors["v"].tolist()) == (3, {"a": 1}, [1.0, -2.0])


# Damage: each must be refused, name the file, say what was found, and change nothing.


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def test_any_flipped_bit_of_the_tensors_is_refused(folder):
    file = checkpoint.latest(folder) / "tensors.safetensors"
    raw = file.read_bytes()
    for place in range(len(raw)):
        flip(file, place)
        with pytest.raises(CheckpointError, match=r"tensors\.safetensors is damaged: the sha256"):
            checkpoint.load_latest(folder)
        file.write_bytes(raw)


def test_any_changed_byte_of_the_manifest_is_refused_or_harmless(folder):
    path = checkpoint.latest(folder)
    good, raw = checkpoint.load(path), (path / "manifest.json").read_bytes()
    refused = 0
    for place in range(len(raw)):
        flip(path / "manifest.json", place)
        try:
            found = checkpoint.load(path)
            assert (found.step, found.meta) == (good.step, good.meta)  # white space
            assert all(same(found.tensors[name], tensor) for name, tensor in good.tensors.items())
        except CheckpointError:
            refused += 1
        (path / "manifest.json").write_bytes(raw)
    assert refused > 0.6 * len(raw)


DAMAGE = {
    "truncated tensors": (lambda p: cut(p / "tensors.safetensors"), r"tensors\.safetensors has \d+ bytes where its manifest says \d+"),
    "truncated manifest": (lambda p: cut(p / "manifest.json"), r"manifest\.json is damaged: it is not JSON"),
    "empty manifest": (lambda p: (p / "manifest.json").write_bytes(b""), r"manifest\.json is damaged"),
    "no tensors": (lambda p: (p / "tensors.safetensors").unlink(), r"tensors\.safetensors cannot be read \(No such file"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json cannot be read .* no altgrad checkpoint, or was never finished"),
    "foreign manifest": (lambda p: (p / "manifest.json").write_text('{"format": "pt"}'), r"is not altgrad's"),
    "list manifest": (lambda p: (p / "manifest.json").write_text("[1]"), r"is not altgrad's"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_with_the_file_and_what_was_found(folder, kind):
    damage, message = DAMAGE[kind]
    damage(checkpoint.latest(folder))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load_latest(folder)
    assert caught.value.exit_code == 4
    assert "--fallback" in str(caught.value)


def test_a_newer_format_is_refused_with_the_advice_to_upgrade(folder):
    file = checkpoint.latest(folder) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(CheckpointError, match=r"format version 2; this altgrad reads up to 1\. Upgrade altgrad"):
        checkpoint.load_latest(folder)


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"latest cannot be read .* There is no checkpoint in it"):
        checkpoint.load_latest(tmp_path)


def test_a_damaged_pointer_is_refused_and_lists_what_is_there(folder):
    for content in (b"", b"../../etc", b"\xff\xfe", b"step-0000002"):
        (folder / "latest").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"latest is damaged.*step-00000010, step-00000020"):
            checkpoint.latest(folder)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_refused_and_never_executed(tmp_path):
    mark = tmp_path / "executed"
    torch.save({"w": Bomb(mark)}, tmp_path / "zip.pt")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("zip.pt", "bare.pkl"):
        with pytest.raises(CheckpointError, match=f"{name} is a pickle .* It was not opened"):
            checkpoint.load(tmp_path / name)
    assert not mark.exists()


def test_a_pickle_in_place_of_the_tensors_is_refused_and_never_executed(folder, tmp_path):
    mark, path = tmp_path / "executed", checkpoint.latest(folder)
    (path / "tensors.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(CheckpointError, match="was cut off or replaced"):
        checkpoint.load(path)
    assert not mark.exists()


def test_a_damaged_newest_is_not_replaced_unasked(folder):
    cut(checkpoint.latest(folder) / "tensors.safetensors")
    with pytest.raises(CheckpointError, match="Earlier ones: step-00000010; take the newest good one with --fallback"):
        checkpoint.load_latest(folder)


@pytest.mark.parametrize("content", ["", "step-00000099\n", "nonsense"])
def test_a_damaged_pointer_calls_no_checkpoint_earlier(folder, content):
    (folder / "latest").write_text(content)
    with pytest.raises(CheckpointError, match=r"step-00000010, step-00000020\..* Take the newest good one of them with --fallback") as caught:
        checkpoint.load_latest(folder)
    assert "arlier" not in str(caught.value)


def test_a_damaged_pointer_before_damaged_checkpoints_calls_none_of_them_earlier(folder):
    (folder / "latest").write_text("")
    for step in (10, 20):
        cut(folder / f"step-000000{step}" / "tensors.safetensors")
    with pytest.raises(CheckpointError, match="There is no good one to fall back to"):
        checkpoint.load_latest(folder, fallback=True)


def test_fallback_takes_the_newest_good_one_and_says_so(folder):
    checkpoint.save(folder, step=30, tensors=some_tensors(30), meta={})
    cut(folder / "step-00000030" / "tensors.safetensors")
    cut(folder / "step-00000020" / "manifest.json")
    with pytest.warns(UserWarning, match=r"step-00000030.* Falling back to .*step-00000010, step 10"):
        assert checkpoint.load_latest(folder, fallback=True).step == 10


def test_fallback_without_a_good_one_is_refused(folder):
    for step in (10, 20):
        cut(folder / f"step-000000{step}" / "tensors.safetensors")
    with pytest.raises(CheckpointError, match="no earlier good one"):
        checkpoint.load_latest(folder, fallback=True)


# Trouble while writing.


@pytest.mark.parametrize("call", range(1, 6))
def test_a_full_disk_leaves_the_last_good_checkpoint_and_no_temporary_files(folder, monkeypatch, call):
    calls = {"left": call}

    def fsync(descriptor):
        calls["left"] -= 1
        if calls["left"] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(AltgradError, match=r"the disk is full: .*step-00000030.* Checkpoints written before stay") as caught:
        checkpoint.save(folder, step=30, tensors=some_tensors(30), meta={})
    assert caught.value.exit_code == 1
    assert checkpoint.load_latest(folder).step == 20
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".tmp")]


def test_a_folder_that_cannot_be_made_is_an_error_with_advice(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AltgradError, match=r"could not be written: Not a directory.*Check the path"):
        checkpoint.save(tmp_path / "file" / "checkpoints", step=0, tensors={}, meta={})


def test_latest_does_not_move_when_what_was_written_does_not_read_back(folder, monkeypatch):
    honest = durable.write

    def lossy(path, data):
        honest(path, data[:-1] if path.name == "tensors.safetensors" else data)

    monkeypatch.setattr(durable, "write", lossy)
    with pytest.raises(CheckpointError, match="bytes where its manifest says"):
        checkpoint.save(folder, step=30, tensors=some_tensors(30), meta={})
    monkeypatch.undo()
    assert checkpoint.load_latest(folder).step == 20


WATCHED_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def killed_save(folder, step, event_number):
    """Save in a forked child that gets SIGKILL just before its n-th file operation; True where it was killed, False where it got through."""
    child = os.fork()
    if child == 0:
        left = [event_number]

        def hook(event, arguments):
            if event in WATCHED_EVENTS:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            checkpoint.save(folder, step=step, tensors=some_tensors(step), meta={}, keep=2)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("step", [20, 30], ids=["same step again", "next step"])
def test_sigkill_before_any_file_operation_leaves_a_good_latest_checkpoint(tmp_path, step):
    kills = 0
    for event_number in range(1, 200):
        folder = tmp_path / str(event_number)
        for earlier in (5, 10, 20):
            checkpoint.save(folder, step=earlier, tensors=some_tensors(earlier), meta={})
        killed = killed_save(folder, step, event_number)
        found = checkpoint.load_latest(folder)
        assert found.step in {20, step}
        assert all(same(found.tensors[name], tensor) for name, tensor in some_tensors(found.step).items())
        checkpoint.save(folder, step=40, tensors=some_tensors(40), meta={}, keep=2)  # and the leftovers go with the next save
        assert all(p.name == "latest" or checkpoint.STEP_FOLDER.fullmatch(p.name) for p in folder.iterdir())
        kills += killed
        if not killed:
            break
    assert kills >= 10  # the save has that many operations to be killed at
