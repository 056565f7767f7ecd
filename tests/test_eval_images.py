"""CIFAR and MNIST as questions: binary files in each of their formats, whole, cut and hostile."""

import os
import pickle

import benchmark_files as files
import numpy as np
import pytest
from PIL import Image

from fastprompt.eval import BENCHMARKS, InputError


def refused(name, root):
    with pytest.raises(InputError) as error:
        BENCHMARKS[name].questions(root)
    return str(error.value)


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_images_and_classes(classes, version, tmp_path):
    files.cifar(tmp_path, classes, version)
    questions = BENCHMARKS[f"cifar{classes}"].questions(tmp_path)
    names = [n.replace("_", " ") for n in (files.CIFAR10 if classes == 10 else files.CIFAR100)]
    assert [q.answers for q in questions] == [(names[n],) for n in (3, 8, 0)]
    assert questions[0].options == tuple(names) and ", ".join(names) in questions[0].text
    row = files.cifar_pixels(3)[1]  # 1024 red, then green, then blue, by rows
    pixels = np.array(questions[1].open())
    for y, x in ((0, 0), (0, 31), (5, 7), (31, 2)):
        assert pixels[y, x].tolist() == [row[c * 1024 + y * 32 + x] for c in range(3)]


class Evil:
    def __reduce__(self):
        return os.system, ("touch broken-into",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_may_make_arrays_and_nothing_else(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.cifar(tmp_path, 10)
    path = tmp_path / "cifar10/cifar-10-batches-py/test_batch"
    path.write_bytes(pickle.dumps({"data": Evil()}, protocol=protocol))
    assert "it wants posix.system, not an array" in refused("cifar10", tmp_path)
    assert not (tmp_path / "broken-into").exists()


def test_cifar_files_that_are_cut_or_wrong_are_named(tmp_path):
    files.cifar(tmp_path, 10)
    path = tmp_path / "cifar10/cifar-10-batches-py/test_batch"
    whole = path.read_bytes()
    for bad in (whole[:-20], b"", b"hello", pickle.dumps([1])):
        path.write_bytes(bad)
        assert f"{path}: want a" in refused("cifar10", tmp_path)
    labels = {b"data": files.cifar_pixels(2)}
    for labels[b"labels"], said in (([1], "want 2 labels"), ([1, 10], "image 1: want a label")):
        files.python2(path, labels)
        assert said in refused("cifar10", tmp_path)
    files.python2(path, {b"data": files.cifar_pixels(2)[:, :-1], b"labels": [1, 2]})
    assert f"{path}: want b'data', uint8 [N, 3072]" in refused("cifar10", tmp_path)
    files.cifar(tmp_path, 100, "binary")
    path = tmp_path / "cifar100/cifar-100-binary/test.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: want rows of 3074 bytes, got 9221" in refused("cifar100", tmp_path)


# ---- MNIST ----


@pytest.mark.parametrize("folder", ["mnist", "mnist/raw", "mnist/MNIST/raw"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist_images_and_digits(folder, end, tmp_path):
    files.mnist(tmp_path, end=end, folder=folder)
    questions = BENCHMARKS["mnist"].questions(tmp_path)
    assert [q.answers for q in questions] == [("7", "seven"), ("2", "two"), ("1", "one")]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    assert np.array_equal(np.array(questions[2].image), pixels[2])
    assert isinstance(questions[2].image, Image.Image)


def test_mnist_files_that_are_cut_or_wrong_are_named(tmp_path):
    files.mnist(tmp_path, end="")
    path, labels = (tmp_path / "mnist" / f"t10k-{n}-ubyte" for n in ("images-idx3", "labels-idx1"))
    whole, eleven = path.read_bytes(), labels.read_bytes()[:-1] + b"\x0b"
    path.write_bytes(whole[:-1])
    assert f"{path}: want [3, 28, 28] bytes after its head, got 2351" in refused("mnist", tmp_path)
    path.write_bytes(labels.read_bytes())
    assert f"{path}: want an IDX file of bytes with 3 axes" in refused("mnist", tmp_path)
    path.write_bytes(whole.replace(b"\x08", b"\x0d", 1))  # of floats
    assert f"{path}: want an IDX file of bytes with 3 axes" in refused("mnist", tmp_path)
    files.mnist(tmp_path, labels=(7, 2), end="", folder="other")
    labels.write_bytes((tmp_path / "other" / labels.name).read_bytes())
    path.write_bytes(whole)
    assert f"{labels}: want 3 labels" in refused("mnist", tmp_path)
    labels.write_bytes(eleven)
    assert f"{labels}: image 2: want a label below 10, got 11" in refused("mnist", tmp_path)
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(b"\x1f\x8b\x08")
    assert "want a whole gzip file" in refused("mnist", tmp_path)
