"""Data sets: reading the usual files, refusing damaged ones, and an order of examples that resumes."""

import gzip
import hashlib
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from altgrad import data, sources
from altgrad.errors import DataError, MissingExtraError, SettingError, UsageError
from altgrad.rng import Key

GENERATOR = np.random.default_rng(0)
GREY = {split: GENERATOR.integers(0, 256, (count, 28, 28), dtype=np.uint8) for split, count in (("train", 12), ("t10k", 5))}
COLOUR = {split: GENERATOR.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8) for split, count in (("train", 10), ("t10k", 2))}
LABELS = {split: (np.arange(count) % 10).astype(np.uint8) for split, count in (("train", 12), ("t10k", 5))}


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, *, compress=False, dot=False, **changed):
    """The four IDX files; `changed` maps train_labels and the like to other arrays or to None (left out)."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):
        for kind, array in (("images", GREY[split]), ("labels", LABELS[split])):
            array = changed.get(f"{split}_{kind}", array)
            if array is None:
                continue
            content = idx_bytes(array)
            name = f"{split}-{kind}{'.' if dot else '-'}idx{array.ndim}-ubyte"
            (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)


def write_cifar(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(5):
        records = np.hstack([np.full((2, 1), i, dtype=np.uint8), COLOUR["train"][2 * i : 2 * i + 2].reshape(2, -1)])
        (folder / f"data_batch_{i + 1}.bin").write_bytes(records.tobytes())
    (folder / "test_batch.bin").write_bytes(np.hstack([np.full((2, 1), 9, dtype=np.uint8), COLOUR["t10k"].reshape(2, -1)]).tobytes())


def write_npz(path, **changed):
    parts = {"x_train": GREY["train"], "y_train": LABELS["train"], "x_test": GREY["t10k"], "y_test": LABELS["t10k"], **changed}
    np.savez(path, **{name: part for name, part in parts.items() if part is not None})


def standardised(images, train):
    return torch.from_numpy((images.astype(np.float64) - train.mean()) / train.std()).float()


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_has_1437_to_train_on_and_360_to_test_on(digits):
    assert (digits.train_inputs.shape, digits.test_inputs.shape) == ((1437, 64), (360, 64))
    assert (digits.train_targets.shape, digits.test_targets.shape) == ((1437,), (360,))


def test_digits_is_stratified(digits):
    assert (digits.test_targets.bincount() - 36).abs().max() <= 1


def test_digits_is_float32_with_int64_labels_of_ten_classes(digits):
    assert (digits.train_inputs.dtype, digits.train_targets.dtype, digits.classes) == (torch.float32, torch.int64, 10)


def test_digits_training_inputs_have_mean_0_and_deviation_1(digits):
    assert digits.train_inputs.mean().abs() < 1e-5
    assert abs(digits.train_inputs.std(correction=0) - 1) < 1e-5


def test_digits_split_is_the_same_every_time(digits):
    again = data.load("digits")
    assert torch.equal(digits.test_inputs, again.test_inputs)
    assert digits.test_targets[:8].tolist() == again.test_targets[:8].tolist()


def test_digits_training_and_test_images_come_from_one_whole(digits):
    from sklearn.datasets import load_digits

    whole = np.sort(load_digits().data.sum(1))
    both = torch.cat([digits.train_inputs, digits.test_inputs]).double().sum(1)
    scale = (whole[-1] - whole[0]) / (both.max() - both.min()).item()
    assert np.allclose(np.sort((both - both.min()).numpy()) * scale + whole[0], whole, atol=1e-3)


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn.*altgrad\[data\]"):
        data.load("digits")


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize("dot", [False, True], ids=["dash", "dot"])
@pytest.mark.parametrize("where", ["", "mnist", "MNIST/raw"])
def test_idx_files_are_read_from_every_usual_place(tmp_path, compress, dot, where):
    write_idx(tmp_path / "mine" / where, compress=compress, dot=dot)
    found = data.load("mnist", data_dir=tmp_path / "mine")
    assert torch.allclose(found.test_inputs, standardised(GREY["t10k"], GREY["train"])[:, None], atol=1e-5)
    assert found.train_targets.tolist() == LABELS["train"].tolist()


def test_a_folder_of_the_sets_own_name_comes_first(tmp_path):
    write_idx(tmp_path, train_labels=LABELS["train"][::-1].copy())
    write_idx(tmp_path / "fashion-mnist")
    assert data.load("fashion-mnist", data_dir=tmp_path).train_targets.tolist() == LABELS["train"].tolist()


@pytest.mark.parametrize("where", ["", "cifar10", "cifar-10-batches-bin"])
def test_cifar_binary_files_are_read_in_order_and_standardised_per_channel(tmp_path, where):
    write_cifar(tmp_path / where)
    found = data.load("cifar10", data_dir=tmp_path)
    train = COLOUR["train"].astype(np.float64)
    mean, std = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), keepdims=True)
    assert torch.allclose(found.train_inputs, torch.from_numpy((train - mean) / std).float(), atol=1e-5)
    assert found.train_targets.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_npz_is_read(tmp_path):
    write_npz(tmp_path / "mnist.npz")
    found = data.load("mnist", data_dir=tmp_path)
    assert torch.allclose(found.train_inputs, standardised(GREY["train"], GREY["train"])[:, None], atol=1e-5)


def test_npz_with_channels_last_and_labels_in_a_column_is_read(tmp_path):
    train, test = COLOUR["train"].transpose(0, 2, 3, 1), COLOUR["t10k"].transpose(0, 2, 3, 1)
    write_npz(tmp_path / "cifar10.npz", x_train=train, y_train=np.arange(10)[:, None], x_test=test, y_test=np.zeros((2, 1), dtype=int))
    write_cifar(tmp_path / "binary")
    found = data.load("cifar10", data_dir=tmp_path)
    assert torch.equal(found.train_inputs, data.load("cifar10", data_dir=tmp_path / "binary").train_inputs)
    assert found.train_targets.tolist() == list(range(10))


def test_npz_scaled_to_one_gives_the_same_inputs_as_bytes(tmp_path):
    write_npz(tmp_path / "mnist.npz")
    write_npz(tmp_path / "fashion-mnist.npz", x_train=GREY["train"] / 255, x_test=GREY["t10k"] / 255)
    assert torch.allclose(data.load("mnist", data_dir=tmp_path).test_inputs, data.load("fashion-mnist", data_dir=tmp_path).test_inputs, atol=1e-5)


def test_moments_of_many_parts_equal_those_of_the_whole():
    images = torch.from_numpy(GENERATOR.integers(0, 256, (9000, 2, 3, 3), dtype=np.uint8))
    mean, std = data.moments(images)
    assert torch.allclose(mean, images.double().mean((0, 2, 3), keepdim=True), atol=1e-9)
    assert torch.allclose(std, images.double().std((0, 2, 3), keepdim=True, correction=0), atol=1e-9)


def test_a_missing_set_says_how_to_get_it():
    with pytest.raises(DataError, match=r"altgrad data get mnist; or put .*--data-dir"):
        data.load("mnist")


def test_the_pickled_version_of_cifar_is_named_and_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="pickles and are never read"):
        data.load("cifar10", data_dir=tmp_path)


def test_a_flipped_bit_in_the_cache_is_found(monkeypatch):
    folder = data.folder_of("mnist")
    write_idx(folder)
    pins = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setitem(sources.SETS, "mnist", replace(sources.SETS["mnist"], files=pins))
    assert len(data.load("mnist").train_inputs) == 12
    path = folder / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte is damaged.*altgrad data get mnist"):
        data.load("mnist")


def test_an_unknown_set_suggests_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'fashion-mnist'"):
        data.load("fashon-mnist")


def test_a_truncated_idx_file_is_named_with_both_sizes(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte.*{16 + 12 * 784 - 7} bytes, expected {16 + 12 * 784}"):
        data.load("mnist", data_dir=tmp_path)


def test_a_truncated_gz_file_is_named(tmp_path):
    write_idx(tmp_path, compress=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is damaged or truncated"):
        data.load("mnist", data_dir=tmp_path)


def test_a_flipped_bit_in_a_gz_file_is_found(tmp_path):
    write_idx(tmp_path, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        data.load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08", b"<html>not found</html>"], ids=["empty", "short", "html"])
def test_what_is_no_idx_file_is_named_with_its_first_bytes(tmp_path, content):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte is no IDX file.*expected 00000801"):
        data.load("mnist", data_dir=tmp_path)


def test_a_header_that_promises_too_much_allocates_nothing(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 28, 28) + b"\x00" * 100)
    with pytest.raises(DataError, match=f"116 bytes, expected {16 + 2**31 * 784}"):
        data.load("mnist", data_dir=tmp_path)


def test_images_of_another_size_are_refused(tmp_path):
    write_idx(tmp_path, train_images=GREY["train"][:, :, :14].copy())
    with pytest.raises(DataError, match=r"\[28, 14\], expected \[28, 28\]"):
        data.load("mnist", data_dir=tmp_path)


def test_an_idx_file_that_is_left_out_is_named(tmp_path):
    write_idx(tmp_path, train_labels=None)
    with pytest.raises(DataError, match="lacks train-labels-idx1-ubyte"):
        data.load("mnist", data_dir=tmp_path)


def test_fewer_labels_than_images_are_refused(tmp_path):
    write_idx(tmp_path, train_labels=LABELS["train"][:11])
    with pytest.raises(DataError, match="12 images and 11 labels"):
        data.load("mnist", data_dir=tmp_path)


def test_an_empty_set_is_refused(tmp_path):
    write_idx(tmp_path, t10k_images=GREY["t10k"][:0], t10k_labels=LABELS["t10k"][:0])
    with pytest.raises(DataError, match="test set has 0 images"):
        data.load("mnist", data_dir=tmp_path)


def test_labels_out_of_range_are_refused(tmp_path):
    write_idx(tmp_path, t10k_labels=np.array([0, 1, 2, 3, 10], dtype=np.uint8))
    with pytest.raises(DataError, match=r"test set lie in \[0, 10\]; they must lie in \[0, 9\]"):
        data.load("mnist", data_dir=tmp_path)


def test_images_that_are_all_alike_are_refused(tmp_path):
    write_idx(tmp_path, train_images=np.zeros_like(GREY["train"]))
    with pytest.raises(DataError, match=r"standard deviation \[0\.0\]"):
        data.load("mnist", data_dir=tmp_path)


def test_a_truncated_cifar_file_is_named_with_both_sizes(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.* 6145 bytes, expected a multiple of 3073"):
        data.load("cifar10", data_dir=tmp_path)


def test_a_cifar_batch_that_is_left_out_is_named(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_4\.bin"):
        data.load("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.array([{}] * 12, dtype=object)}, "never read"),
        ({"x_train": GREY["train"][:, :3]}, r"\[12, 3, 28\]"),
        ({"x_train": np.full((12, 28, 28), "a")}, "must be numbers"),
        ({"y_train": LABELS["train"].astype(float)}, "must be integers"),
        ({"y_train": LABELS["train"].astype(int) - 1}, r"\[-1, 8\]"),
        ({"x_train": np.full((12, 28, 28), np.nan)}, "finite"),
        ({"x_test": np.full((5, 28, 28), np.nan)}, "test images hold NaN"),
    ],
    ids=["absent", "pickled", "shape", "text", "float labels", "negative labels", "NaN to train on", "NaN to test on"],
)
def test_a_wrong_npz_is_refused(tmp_path, changed, said):
    write_npz(tmp_path / "mnist.npz", **changed)
    with pytest.raises(DataError, match=said):
        data.load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_npz_is_named(tmp_path, keep):
    path = tmp_path / "mnist.npz"
    write_npz(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"mnist\.npz is damaged"):
        data.load("mnist", data_dir=tmp_path)


def loader(sampler):
    return DataLoader(TensorDataset(torch.arange(23)), batch_size=4, sampler=sampler)


def test_a_dataloader_resumes_in_mid_epoch_with_the_same_batches():
    whole = [batch[0].tolist() for batch in loader(data.ResumableSampler(range(23), key=Key(3), epoch=2))]
    rest = [batch[0].tolist() for batch in loader(data.ResumableSampler(range(23), key=Key(3), epoch=2, start=8))]
    assert rest == whole[2:]


def test_an_epoch_visits_every_example_once():
    assert sorted(data.ResumableSampler(range(23), key=Key(3))) == list(range(23))


def test_epochs_and_keys_have_orders_of_their_own():
    orders = [tuple(data.ResumableSampler(range(23), key=Key(seed), epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_the_global_generators_do_not_matter_to_the_order():
    first = list(data.ResumableSampler(range(23), key=Key(3)))
    torch.rand(5)
    np.random.random(5)
    assert list(data.ResumableSampler(range(23), key=Key(3))) == first


def test_the_next_epoch_starts_at_its_first_example():
    sampler = data.ResumableSampler(range(23), key=Key(3), epoch=0, start=20)
    sampler.set_epoch(1)
    assert list(sampler) == list(data.ResumableSampler(range(23), key=Key(3), epoch=1))


def test_the_length_counts_what_is_left():
    assert len(loader(data.ResumableSampler(range(23), key=Key(3), start=8))) == 4


@pytest.mark.parametrize("wrong", [{"start": 24}, {"start": -1}, {"epoch": -1}])
def test_a_place_outside_the_epoch_is_refused(wrong):
    with pytest.raises(SettingError):
        data.ResumableSampler(range(23), key=Key(3), **wrong)
