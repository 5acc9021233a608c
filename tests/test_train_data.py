"""The images: the official layout, what is refused, and the synthetic set."""

import hashlib
import os
import pickle
import struct
import sys

import numpy as np
import pytest
import torch

from fastlocal.train import data
from fastlocal.train.augment import PADDING, Augmenter, Normalizer
from fastlocal.train.config import Config
from fastlocal.train.data import ImageSet, load, read_cifar100, synthetic
from fastlocal.train.errors import UsageError


def entry_of(count):
    """A tiny part of the set, every pixel and label known."""
    pixels = (np.arange(count * 3072) % 251).astype(np.uint8).reshape(count, 3072)
    return {b"data": pixels, b"fine_labels": [i % 100 for i in range(count)], b"filenames": [b"a.png"] * count}


def write_cifar(folder, num_train=500, num_test=100, protocol=4):
    folder = folder / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", num_train), ("test", num_test)):
        (folder / name).write_bytes(pickle.dumps(entry_of(count), protocol=protocol))
    return folder


def as_python_2(entry):
    """The same entry as Python 2 and an old NumPy pickled it, as in the official archive."""

    def string(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    data = entry[b"data"]
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"\x87R"
    )
    shape = integer(data.shape[0]) + integer(data.shape[1]) + b"\x86"
    array += b"(" + integer(1) + shape + dtype + b"\x89" + string(data.tobytes()) + b"tb"
    labels = b"](" + b"".join(integer(label) for label in entry[b"fine_labels"]) + b"e"
    names = b"](" + b"".join(string(name) for name in entry[b"filenames"]) + b"e"
    items = string(b"data") + array + string(b"fine_labels") + labels + string(b"filenames") + names
    return b"\x80\x02}(" + items + b"u."


@pytest.mark.parametrize(
    "write", [as_python_2, lambda e: pickle.dumps(e, protocol=4), lambda e: pickle.dumps(e, protocol=5)]
)
def test_the_official_layout_is_read_pixel_by_pixel(tmp_path, write):
    (tmp_path / "train").write_bytes(write(entry_of(150)))
    images = read_cifar100(tmp_path / "train")
    assert images.images.shape == (150, 3, 32, 32)
    assert images.images[7, 2, 3, 4].item() == (7 * 3072 + 2 * 1024 + 3 * 32 + 4) % 251
    assert images.labels[123].item() == 23


def test_a_fifth_of_the_training_images_validates_whatever_the_seed(tmp_path):
    write_cifar(tmp_path)
    config = Config(dataset="cifar100", data_dir=tmp_path, batch_size=8)
    splits = load(config)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (400, 100, 100)
    other = load(Config(dataset="cifar100", data_dir=tmp_path, batch_size=8, seed=3))
    assert other.digest == splits.digest
    # Each image has pixels of its own: none is in two parts.
    keys = [bytes(image.numpy()) for part in (splits.train, splits.val) for image in part.images]
    assert len(set(keys)) == len(
        {bytes(image.numpy()) for image in read_cifar100(tmp_path / "cifar-100-python/train").images}
    )


def test_which_cifar_100_it_is_is_told_by_its_bytes(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path)
    config = Config(dataset="cifar100", data_dir=tmp_path, batch_size=8)
    assert load(Config(synthetic_images=500)).source == "synthetic"
    assert load(config).source == "other"
    monkeypatch.setattr(data, "_RE_SPLIT", load(config).digest)
    assert load(config).source == "re-split"
    digests = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ("train", "test")}
    monkeypatch.setattr(data, "_OFFICIAL_MD5", digests)
    assert load(config).source == "official"
    # The same training images with other test images are not the official split.
    (folder / "test").write_bytes(pickle.dumps(entry_of(90), protocol=4))
    assert load(config).source == "other"


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Evil()}), "it names posix.system, and only NumPy arrays are let in"),
        (
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 100]}),
            "labels must lie in 0 … 99",
        ),
        (
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, -1]}),
            "labels must lie in 0 … 99",
        ),
        (
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1]}),
            "one whole-number label an image",
        ),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"fine_labels": [1, 2]}), r"is not \(n, 3072\) uint8"),
        (pickle.dumps({b"labels": []}), r"is not \(n, 3072\) uint8"),
        (pickle.dumps([1, 2]), r"is not \(n, 3072\) uint8"),
        (b"", "damaged or no CIFAR-100 file"),
        (b"<html>not found</html>", "damaged or no CIFAR-100 file"),
    ],
)
def test_what_is_no_cifar_file_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_cifar100(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("keep", [10, 1000, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = write_cifar(tmp_path) / "train"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="damaged or no CIFAR-100 file"):
        read_cifar100(path)


def test_a_missing_file_is_named_with_what_to_do(tmp_path):
    told = (
        r"cifar-100-python/train is missing: unpack .* fetch it with `fastlocal train --dataset cifar100 --download "
    )
    with pytest.raises(UsageError, match=told):
        load(Config(dataset="cifar100", data_dir=tmp_path))


def test_too_few_images_for_one_step_are_an_error():
    with pytest.raises(
        UsageError, match="4 workers with batches of 64 need at least 256 training images, there are 80"
    ):
        load(Config(synthetic_images=100))
    assert len(load(Config(synthetic_images=100, workers=4, batch_size=20)).train) == 80  # one step


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize("key", [b"data", b"fine_labels"])
def test_one_other_pixel_or_label_makes_another_digest(tmp_path, name, key):
    folder = write_cifar(tmp_path, num_train=50, num_test=10)
    config = Config(dataset="cifar100", data_dir=tmp_path, batch_size=8)
    digest, entry = load(config).digest, entry_of(50 if name == "train" else 10)
    if key == b"data":
        entry[key][3, 5] ^= 1
    else:
        entry[key][3] += 1
    (folder / name).write_bytes(pickle.dumps(entry))
    assert load(config).digest != digest


def test_synthetic_images_depend_on_the_seed_alone():
    first, again, other = synthetic(300, seed=0), synthetic(300, seed=0), synthetic(300, seed=1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert first.images.dtype == torch.uint8
    assert first.images.shape == (300, 3, 32, 32)
    assert len(first.labels.unique()) > 90
    # What is brighter than white is white: it does not begin again at black beside it.
    assert first.images.int().diff(dim=-1).abs().ge(230).float().mean() < 1e-4


def test_synthetic_classes_can_be_told_apart_but_not_by_their_mean_image():
    train, test = synthetic(20_000, seed=0), synthetic(1000, seed=1)
    means = torch.stack([train.images[train.labels == c].float().mean(0) for c in range(100)]).flatten(1)
    images = test.images.float().flatten(1)
    images = (images - images.mean(1, keepdim=True)) / images.std(1, keepdim=True)
    means = (means - means.mean(1, keepdim=True)) / means.std(1, keepdim=True)
    accuracy = (images @ means.T).argmax(1).eq(test.labels).float().mean().item()
    assert 0.05 < accuracy < 0.8  # chance is 0.01


def test_normalised_training_images_have_mean_zero_and_variance_one():
    images = synthetic(500, seed=0).images
    normal = Normalizer(images)(images).double()
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal.var((0, 2, 3), correction=0), torch.ones(3).double(), rtol=1e-5, atol=0)
    assert Normalizer(images)(images).is_contiguous(memory_format=torch.channels_last)


def test_images_of_one_grey_become_zero_and_not_nan():
    images = torch.full((4, 3, 32, 32), 7, dtype=torch.uint8)
    torch.testing.assert_close(Normalizer(images)(images), torch.zeros(4, 3, 32, 32), rtol=0, atol=1e-3)


def test_each_epoch_takes_every_image_once_in_an_order_of_its_own():
    augmenter = Augmenter(synthetic(60, seed=0), lambda images: images)
    generator = torch.Generator().manual_seed(0)
    orders = [augmenter.plan(generator)[0].tolist() for _ in range(2)]
    assert orders[0] != orders[1]
    assert list(map(sorted, orders)) == [list(range(60))] * 2


def test_augmentation_equals_a_loop_over_images():
    data = synthetic(60, seed=0)
    normalize = Normalizer(data.images)
    augmenter = Augmenter(data, normalize)
    plan = augmenter.plan(torch.Generator().manual_seed(1))
    images, labels = augmenter.batch(plan[:, 20:50])
    assert sorted(plan[0].tolist()) == list(range(60))
    for position in range(30):
        source, top, left, flip = plan[:, 20 + position].tolist()
        padded = torch.zeros(3, 32 + 2 * PADDING, 32 + 2 * PADDING, dtype=torch.uint8)
        padded[:, PADDING:-PADDING, PADDING:-PADDING] = data.images[source]
        expected = padded[:, top : top + 32, left : left + 32]
        if flip:
            expected = expected.flip(-1)
        assert torch.equal(images[position], normalize(expected[None])[0])
        assert labels[position] == data.labels[source]


def test_shifts_and_flips_cover_their_range_evenly():
    data = ImageSet(torch.zeros(9000, 3, 32, 32, dtype=torch.uint8), torch.zeros(9000, dtype=torch.int64))
    _, dy, dx, flip = Augmenter(data, lambda images: images).plan(torch.Generator().manual_seed(0))
    for shift in (dy, dx):
        counts = shift.bincount()
        assert len(counts) == 2 * PADDING + 1
        # 1000 expected of 9000, standard deviation 30
        assert 850 < counts.min() <= counts.max() < 1150
    assert 0.47 < flip.float().mean() < 0.53


def test_images_that_are_there_are_not_downloaded_over(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / name).write_bytes(b"another split")
    data.download(tmp_path)
    assert [(folder / name).read_bytes() for name in ("train", "test")] == [b"another split"] * 2


def test_half_of_the_files_are_not_taken_for_all(tmp_path, monkeypatch):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"alone")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UsageError, match="--download needs torchvision"):
        data.download(tmp_path)
