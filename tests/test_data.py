"""Image sets: the same from every format, found in every usual place, refused with the file's name when damaged."""

import codecs
import contextlib
import importlib
import io
import operator
import os
import pickle
import runpy
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fromzero import resume, train
from fromzero.data import Images, ImageSet, cifar, load_images, stratified_split
from fromzero.data.images import own_name
from fromzero.errors import InputError
from fromzero.recipe import load_recipe
from fromzero.sessions import new_training
from fromzero.splits import Data
from fromzero.trained import load_trained, recorded_images
from tests.conftest import CIFAR10_NAMES

TEST_BATCH = {"binary": "test_batch.bin", "python": "test_batch"}
META = {"binary": "batches.meta.txt", "python": "batches.meta"}
LAYOUTS = pytest.mark.parametrize("layout", ["binary", "python"])


def refused(dataset, **options):
    """The one line with which `dataset` is refused."""
    with pytest.raises(InputError) as caught:
        load_images(dataset, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def equal(first, second):
    return all(
        np.array_equal(a.pixels, b.pixels) and np.array_equal(a.labels, b.labels)
        for a, b in ((first.train, second.train), (first.test, second.test))
    )


# Formats


@pytest.mark.parametrize("form", ["binary", "python", "binary.tar.gz", "python.tar.gz", "folder of the folder"])
def test_every_format_holds_the_same_images(form, tiny_images, tmp_path, write_cifar, tar_cifar):
    path = tmp_path / "cifar-10-batches-bin"
    write_cifar(path, "python" if "python" in form else "binary", per_batch=40)
    if "tar" in form:
        path = tar_cifar(path, tmp_path / f"cifar-10-{form}")
    found = load_images(tmp_path if "of" in form else path)
    assert equal(found, tiny_images)
    assert found.fingerprints == tiny_images.fingerprints
    assert found.class_names == tiny_images.class_names == tuple(CIFAR10_NAMES)
    assert str(path) in found.source


def test_shapes_types_and_names(tiny_images):
    assert tiny_images.train.pixels.shape == (200, 32, 32, 3)
    assert tiny_images.test.pixels.shape == (40, 32, 32, 3)
    assert tiny_images.train.pixels.dtype == np.uint8
    assert tiny_images.train.labels.dtype == np.int64
    assert (tiny_images.image_shape, tiny_images.num_classes, tiny_images.name) == ((32, 32, 3), 10, "tiny")


def test_pixels_are_in_place_by_channel_row_and_column(tmp_path, write_cifar):
    folder = write_cifar(tmp_path / "set", per_batch=1, batches=1, classes=2)
    record = bytearray(3073)
    record[1 + 2 * 1024 + 5 * 32 + 7] = 200  # blue, row 5, column 7
    (folder / "data_batch_1.bin").write_bytes(record)
    pixels = load_images(folder).train.pixels
    assert pixels[0, 5, 7, 2] == 200
    assert pixels.sum() == 200


@pytest.mark.parametrize("protocol", range(5))
def test_batches_pickled_by_python_3_are_read(protocol, tmp_path, write_cifar):
    folder = write_cifar(tmp_path / "set", "python")
    expected = load_images(folder)
    for name in ("data_batch_1", "test_batch"):
        content = pickle.loads((folder / name).read_bytes(), encoding="bytes")
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    assert load_images(folder).fingerprints == expected.fingerprints


@pytest.mark.parametrize(("batches", "classes"), [(1, 2), (12, 100)])
def test_any_number_of_batches_and_classes(batches, classes, tmp_path, write_cifar):
    found = load_images(write_cifar(tmp_path / "my set.v2", per_batch=classes, batches=batches, classes=classes))
    assert (found.num_classes, len(found.train), found.name) == (classes, batches * classes, "my-set")


def test_the_fingerprint_ignores_order_and_sees_every_byte(tiny_images):
    train, expected = tiny_images.train, tiny_images.fingerprints["train"]
    assert train.take(np.random.default_rng(0).permutation(len(train))).fingerprint() == expected
    pixels, labels = train.pixels.copy(), train.labels.copy()
    pixels[17, 3, 4, 1] ^= 1
    labels[17] = (labels[17] + 1) % 10
    assert len({expected, Images(pixels, train.labels).fingerprint(), Images(train.pixels, labels).fingerprint()}) == 3
    assert train.take(np.arange(199)).fingerprint() != expected
    assert Images(train.pixels, train.labels + 256).fingerprint() != expected


# CIFAR-10 itself


def test_cifar10_is_the_published_one(cifar10_dir):
    images = load_images("cifar10", data_dir=cifar10_dir)
    assert images.fingerprints == {
        "train": "55a61f79a40ece2ceda9fb5f9f7078f6ea2fc4952489cef56682bcf92cfcc260",
        "test": "325704b01eb92e1e2a6215ae6a916bb7db7de054af0c496be1c7be2e0fcfbf5f",
    }
    assert images.train.pixels.shape == (50_000, 32, 32, 3)
    assert images.test.pixels.shape == (10_000, 32, 32, 3)
    assert np.bincount(images.train.labels).tolist() == [5000] * 10
    assert images.class_names == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    counts = [np.bincount(images.train.pixels[..., channel].ravel(), minlength=256) for channel in range(3)]
    levels = np.arange(256) / 255
    means = [np.average(levels, weights=c) for c in counts]
    deviations = [np.average((levels - m) ** 2, weights=c) ** 0.5 for c, m in zip(counts, means, strict=True)]
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
    assert deviations == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-5)


def test_the_fingerprints_that_the_order_stands_for_are_those_of_the_images(cifar10_dir, monkeypatch):
    images = load_images("cifar10", data_dir=cifar10_dir)
    assert images.order_digest == cifar.CIFAR10_ORDER
    assert images.fingerprints == {"train": images.train.fingerprint(), "test": images.test.fingerprint()}
    monkeypatch.setattr(cifar, "CIFAR10_FINGERPRINTS", {"train": "0" * 64, "test": "0" * 64})
    monkeypatch.setattr(cifar, "CIFAR10_ORDER", "0" * 64)  # nothing is known: the images themselves are looked at
    found = load_images(cifar10_dir / "cifar-10-batches-bin")
    assert (found.fingerprints, found.name) == (images.fingerprints, "cifar-10-batches-bin")


def test_cifar10_in_another_order_or_with_another_pixel_is_looked_at_image_by_image(cifar10_dir, tmp_path):
    for source in (cifar10_dir / "cifar-10-batches-bin").iterdir():
        (tmp_path / source.name).symlink_to(source)
    first, second = tmp_path / "data_batch_1.bin", tmp_path / "data_batch_2.bin"
    target = first.readlink(), second.readlink()
    first.unlink(), second.unlink()
    first.symlink_to(target[1]), second.symlink_to(target[0])
    found = load_images("cifar10", data_dir=tmp_path)
    assert found.fingerprints == cifar.CIFAR10_FINGERPRINTS
    assert found.order_digest != cifar.CIFAR10_ORDER
    content = bytearray(target[0].read_bytes())
    content[12345] ^= 1
    second.unlink()
    second.write_bytes(content)
    assert "the train images are not CIFAR-10's" in refused("cifar10", data_dir=tmp_path)


def test_a_run_finds_cifar10_again_in_an_archive_of_any_name(cifar10_dir, tmp_path, tar_cifar):
    place = tmp_path / "mine (1).tar"
    with tarfile.open(place, "w") as tar:
        tar.add(cifar10_dir / "cifar-10-batches-bin", "cifar-10-batches-bin")
    images = load_images(f"{place}:100")
    changes = {"dataset": f"{place}:100", "epochs": 1, "network.channels": [[4]], "network.pool": 4}
    recipe = load_recipe("train1").override(changes | {"network.dense": [], "validation.source": "split"})
    training = new_training(recipe, images, runs_dir=tmp_path / "runs", threads=1)
    training.close()
    run = training.run
    assert run.provenance["data"]["name"] == "cifar10:100"
    assert recorded_images(run).fingerprints == images.fingerprints
    moved = place.rename(tmp_path / "moved")
    assert recorded_images(run, data_dir=moved).fingerprints == images.fingerprints
    assert recorded_images(run, data_dir=cifar10_dir).fingerprints == images.fingerprints


def test_other_images_are_not_taken_for_cifar10(tmp_path, write_cifar):
    folder = write_cifar(tmp_path / "cifar-10-batches-bin")
    message = refused("cifar10", data_dir=tmp_path)
    assert str(folder) in message
    assert cifar.CIFAR10_FINGERPRINTS["train"][:12] in message
    assert load_images(folder).fingerprints["train"][:12] in message


@pytest.mark.parametrize(
    ("place", "layout"),
    [
        ("fromzero/cifar-10-batches-bin", "binary"),
        ("fromzero/cifar-10-batches-py", "python"),
        ("fromzero/cifar-10-binary.tar.gz", "binary"),
        ("fromzero/cifar-10-python.tar.gz", "python"),
        ("data/cifar-10-batches-py", "python"),  # torchvision: root="data"
        ("data/cifar-10-python.tar.gz", "python"),
        (".keras/datasets/cifar-10-batches-py", "python"),  # Keras 2
        (".keras/datasets/cifar-10-batches-py.tar.gz", "python"),
        (".keras/datasets/cifar-10-batches-py-target/cifar-10-batches-py", "python"),  # Keras 3
        ("elsewhere/datasets/cifar-10-batches-py", "python"),  # KERAS_HOME
    ],
)
def test_cifar10_is_found_where_it_usually_is(place, layout, bare_machine, monkeypatch, write_cifar, tar_cifar):
    source = write_cifar(bare_machine / "source", layout)
    monkeypatch.setattr(cifar, "CIFAR10_FINGERPRINTS", load_images(source).fingerprints)
    assert "--data-dir" in refused("cifar10", offline=True)
    path = bare_machine / place
    path.parent.mkdir(parents=True)
    if path.suffix == ".gz":
        tar_cifar(source, path)
    else:
        source.rename(path)
    if place.startswith("elsewhere"):
        monkeypatch.setenv("KERAS_HOME", str(bare_machine / "elsewhere"))
    assert os.path.samefile(load_images("cifar10", offline=True).source, path)


def test_a_named_data_folder_is_the_only_place(bare_machine, monkeypatch, write_cifar):
    here = write_cifar(bare_machine / "data" / "cifar-10-batches-bin")
    monkeypatch.setattr(cifar, "CIFAR10_FINGERPRINTS", load_images(here).fingerprints)
    (bare_machine / "empty").mkdir()
    assert f"no CIFAR-10 under {bare_machine / 'empty'}" in refused("cifar10", data_dir=bare_machine / "empty")
    assert load_images("cifar10", data_dir=here).name == "cifar10"


@pytest.mark.parametrize("folder", ["nowhere", "file", "x" * 300])
def test_a_data_folder_that_is_none_is_named(folder, tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / folder) in refused("cifar10", data_dir=tmp_path / folder)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar-10", "nearest: cifar10"), ("digit", "nearest: digits"), ("./nowhere", "'./nowhere'"), ("x" * 300, "xxx")],
)
def test_an_unknown_data_set_is_named_with_the_nearest(name, hint, bare_machine):
    assert hint in refused(name)


# Damage


@LAYOUTS
def test_a_truncated_batch_is_named_with_what_was_expected_and_found(layout, tmp_path, write_cifar):
    file = write_cifar(tmp_path / "set", layout) / TEST_BATCH[layout]
    whole = file.read_bytes()
    for size in (0, 1, 3072, 3074, len(whole) - 1):
        file.write_bytes(whole[:size])
        message = refused(file.parent)
        assert str(file) in message
        assert "expected" in message
        assert f"found {size:,}" in message


@LAYOUTS
def test_what_is_missing_is_named(layout, tmp_path, write_cifar):
    for name in (TEST_BATCH[layout].replace("test_batch", "data_batch_3"), TEST_BATCH[layout], META[layout]):
        folder = write_cifar(tmp_path / "set", layout)
        (folder / name).unlink()
        assert f"incomplete: {name} not there" in refused(folder)


@LAYOUTS
def test_a_label_without_a_name_is_damage(layout, tmp_path, write_cifar):
    folder = write_cifar(tmp_path / "set", layout, classes=4)
    write_cifar(tmp_path / "other", layout, classes=3)
    shutil.copy(tmp_path / "other" / META[layout], folder)
    assert "expected labels 0 to 2" in refused(folder)
    assert "found 3" in refused(folder)


@LAYOUTS
@pytest.mark.parametrize(
    "names", [b"", b"one\n", b"\x80\x02]q\x00.", b"\x80\x02}q\x00U\x0blabel_namesK\x01s.", b"\xff"]
)
def test_a_file_of_class_names_without_them_is_damage(layout, names, tmp_path, write_cifar):
    folder = write_cifar(tmp_path / "set", layout)
    (folder / META[layout]).write_bytes(names)
    assert str(folder / META[layout]) in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": None}, {"labels": []}, {"labels": [0]}, {"labels": [-1] * 20}, {"labels": [0.5] * 20},
        {"labels": [256] * 20}, {"labels": "x" * 20}, {"data": None}, {"data": b"x" * 20 * 3072}, {"data": [[1]]},
        {"data": np.zeros((20, 3071), np.uint8)}, {"data": np.zeros(3072 * 20, np.uint8)},
        {"data": np.zeros((19, 3072), np.uint8)}, {"data": np.zeros((20, 3072), np.float32)},
        {"data": np.zeros((20, 3072), np.int8)}, {"data": np.asfortranarray(np.zeros((20, 3072), np.uint8))},
    ],
)  # fmt: skip
def test_a_pickle_of_other_content_is_damage(change, tmp_path, write_cifar):
    file = write_cifar(tmp_path / "set", "python") / "data_batch_2"
    content = pickle.loads(file.read_bytes(), encoding="latin-1") | change
    file.write_bytes(pickle.dumps(content, 2))
    assert str(file) in refused(file.parent)


@pytest.mark.parametrize("path", ["empty folder", "other folder", "file", "empty file"])
def test_what_is_no_image_set_is_refused_by_name(path, tmp_path):
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "other folder").mkdir()
    (tmp_path / "other folder" / "letter.txt").write_text("Dear")
    (tmp_path / "file").write_bytes(b"not an archive\n" * 1000)
    (tmp_path / "empty file").touch()
    assert str(tmp_path / path) in refused(tmp_path / path)


@pytest.mark.parametrize("mode", ["w:gz", "w", "w:bz2", "w:xz"])
def test_a_damaged_archive_is_refused_by_name(mode, tmp_path, write_cifar):
    archive = tmp_path / "set.tar"
    with tarfile.open(archive, mode) as tar:
        tar.add(write_cifar(tmp_path / "set"), "set")
    whole = archive.read_bytes()
    load_images(archive)
    for size in (1, 100, len(whole) // 3, int(len(whole) * 0.9)):
        archive.write_bytes(whole[:size])
        assert str(archive) in refused(archive)
    if mode != "w":  # a plain tar has no checksum of its contents
        archive.write_bytes(whole[: len(whole) // 2] + b"damage" + whole[len(whole) // 2 + 6 :])
        assert str(archive) in refused(archive)


def test_a_file_that_is_no_archive_is_not_called_damaged(tmp_path, write_cifar):
    folder = write_cifar(tmp_path / "set")
    said = refused(folder / "test_batch.bin")
    assert "neither a folder nor an archive" in said
    assert "delete" not in said


# Malice


def tar_of(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, str(target)
    return member, b""


@pytest.mark.parametrize("under", ["../../", "/", "a/../../../", "cifar-10-batches-bin/../../../"])
def test_nothing_is_written_where_an_archive_says(under, tmp_path, write_cifar):
    folder, inside = write_cifar(tmp_path / "set"), tmp_path / "deep" / "down"
    inside.mkdir(parents=True)
    evil = tmp_path.relative_to("/") / "evil" if under == "/" else "evil"
    members = [(tarfile.TarInfo(f"{under}{evil}/{f.name}"), f.read_bytes()) for f in folder.iterdir()]
    archive = tar_of(inside / "set.tar.gz", (tarfile.TarInfo(f"{under}{evil}"), b"evil"), *members)
    before = sorted(tmp_path.rglob("*"))
    found = load_images(archive)
    assert equal(found, load_images(folder))
    assert sorted(tmp_path.rglob("*")) == before
    unpacked = cifar.unpack(archive)
    after = [*before, unpacked, *(unpacked / f.name for f in folder.iterdir())]
    assert sorted(tmp_path.rglob("*")) == sorted(after)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_links_and_devices_in_an_archive_are_not_followed(kind, tmp_path, write_cifar):
    folder = write_cifar(tmp_path / "set")
    files = {f.name: f.read_bytes() for f in sorted(folder.iterdir())}
    for target in (folder / "data_batch_1.bin", "data_batch_2.bin", "../../etc/passwd"):
        members = [(tarfile.TarInfo(name), data) for name, data in files.items() if name != "data_batch_1.bin"]
        archive = tar_of(tmp_path / "set.tar.gz", *members, link("data_batch_1.bin", target, kind))
        assert "data_batch_1.bin not there" in refused(archive)


@pytest.mark.parametrize("size", [-512, 10**12])
def test_an_archive_that_lies_about_sizes_costs_no_time_and_no_memory(size, tmp_path):
    members = io.BytesIO()
    for name in ("first", "test_batch.bin"):
        header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
        if name != "first":
            header[124:136] = size.to_bytes(12, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        members.write(header)
    archive = tmp_path / "set.tar"
    archive.write_bytes(members.getvalue() + bytes(1024))
    assert f"claims {size:,} bytes" in refused(archive)


class Reduce:
    """Pickled, it is a call of the function with the arguments, then a change of the outcome's state."""

    def __init__(self, function, arguments, *state):
        self.reduction = function, arguments, *state

    def __reduce__(self):
        return self.reduction


BYTE = np.dtype("u1")
ROWS = bytes(20 * 3072)


def array(shape=(20, 3072), dtype=BYTE, raw=ROWS):
    return Reduce(np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, shape, dtype, False, raw))


SHELL, PYTHON = "touch canary", "open('canary', 'w').close()"
TOUCH = Reduce(os.system, (SHELL,))
WORD = b"X\x0c\0\0\0" + SHELL.encode()
OBJECTS = np.empty(1, object)
OBJECTS[0] = TOUCH
GETATTR = Reduce(getattr, (Reduce(importlib.import_module, ("os",)), "system"))
# Read in the ordinary way, each of these leaves a file named canary in the working folder.
LIVE = {
    **{f"os.system in protocol {n}": pickle.dumps(TOUCH, n) for n in range(6)},
    "posix.system": b"cposix\nsystem\n(" + WORD + b"tR.",
    "opcode INST": b"(" + WORD + b"ios\nsystem\n.",
    "opcode OBJ": b"(cos\nsystem\n" + WORD + b"o.",
    "opcode STACK_GLOBAL, dotted": b"\x80\x04\x8c\x06shutil\x8c\x09os.system\x93(" + WORD + b"tR.",
    "eval": pickle.dumps(Reduce(eval, (PYTHON,))),
    "exec": pickle.dumps(Reduce(exec, (PYTHON,)), 2),
    "a method by its dotted name": pickle.dumps(Reduce(Path.touch, (Path("canary"),))),
    "subprocess.call": pickle.dumps(Reduce(subprocess.call, (["touch", "canary"],))),
    "runpy": pickle.dumps(Reduce(runpy._run_code, (PYTHON, {}))),
    "a pickle in a pickle": pickle.dumps(Reduce(pickle.loads, (pickle.dumps(TOUCH),))),
    "getattr and importlib": pickle.dumps(GETATTR, 0)[:-1] + b"(" + WORD + b"tR.",
    "attrgetter": pickle.dumps(operator.attrgetter("system"), 0)[:-1] + b"(cposixpath\nos\ntR(" + WORD + b"tR.",
    "deep in lists": pickle.dumps([{"data": (1, [TOUCH])}]),
    "a key": pickle.dumps({TOUCH: 1}),
    "beside images": pickle.dumps({"data": np.zeros((20, 3072), np.uint8), "labels": [0] * 20, "more": TOUCH}, 2),
    "an admitted call's argument": pickle.dumps(Reduce(np.dtype, (TOUCH,)), 2),
    "an admitted object's state": pickle.dumps(array(raw=TOUCH), 2),
    "array of objects": pickle.dumps(OBJECTS, 2),
    "batch with an array of objects": pickle.dumps({"data": OBJECTS, "labels": [0]}, 2),
}
# These try to get further by what is admitted, or by rarer ways.
ODD = {
    "Popen": pickle.dumps(Reduce(subprocess.Popen, (["touch", "canary"],))),
    "opcode NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + WORD + b"\x85\x81.",
    "opcode EXT1": b"\x80\x02\x82\x01.",
    "opcode PERSID": b"Pcanary\n.",
    "codecs.decode": pickle.dumps(Reduce(codecs.decode, (b"gbhpu", "rot13"))),
    "code object": b"ctypes\nFunctionType\n(ctypes\nCodeType\n)R}tR.",
    "dtype of objects": pickle.dumps({"data": array(dtype=np.dtype("O")), "labels": [0] * 20}, 2),
    "dtype of fields": pickle.dumps({"data": array(dtype=np.dtype([("a", "O")])), "labels": [0] * 20}, 2),
    "dtype that is text": pickle.dumps({"data": array(dtype="u1"), "labels": [0] * 20}, 2),
    "more shape than bytes": pickle.dumps({"data": array(shape=(10**12, 3072)), "labels": [0] * 20}, 2),
    "negative shape": pickle.dumps({"data": array(shape=(-1, 3072)), "labels": [0] * 20}, 2),
    "array without state": pickle.dumps({"data": Reduce(np.ndarray, ((20, 3072),)), "labels": [0] * 20}, 2),
    "state of an admitted class": b"cnumpy\nndarray\n(K\x01K\x02tb.",
    "state of an admitted function": b"c_codecs\nencode\n(N}X\x0c\0\0\0__defaults__(K\x01K\x02tstb.",
    "attribute of an admitted name": b"\x80\x04\x8c\x07_codecs\x8c\x0fencode.__self__\x93.",
    "lines in a name": b"\x80\x04\x8c\x02a\n\x8c\x02b\n\x93.",
    "no dict": pickle.dumps([1, 2, 3]),
    "recursion": b"(" * 10**5 + b"l" * 10**5 + b".",
    "nothing": b".",
}


@pytest.mark.parametrize("name", [*LIVE, *ODD])
def test_a_pickle_with_code_is_refused_and_runs_nothing(name, tmp_path, monkeypatch, write_cifar):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    if name in LIVE:
        with contextlib.suppress(Exception):
            pickle.loads(LIVE[name])
        canary.unlink()
    for member in ("data_batch_1", "test_batch", "batches.meta"):
        folder = write_cifar(tmp_path / "set", "python", batches=1)
        (folder / member).write_bytes((LIVE | ODD)[name])
        assert str(folder / member) in refused(folder)
    assert not canary.exists()


def test_a_refused_pickle_leaves_nothing_behind_for_the_next_one(tmp_path, monkeypatch, write_cifar):
    monkeypatch.chdir(tmp_path)
    expected = load_images(write_cifar(tmp_path / "set", "python"))
    for payload in (LIVE | ODD).values():
        with contextlib.suppress(InputError):
            cifar._read_python_batch(payload, "payload")
    assert equal(load_images(tmp_path / "set"), expected)
    with pytest.raises(TypeError):
        cifar._PlainUnpickler(io.BytesIO()).find_class("_codecs", "encode")()


# Digits, splits


def test_digits_are_the_same_everywhere_and_always():
    digits = load_images("digits")
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert digits.image_shape == (32, 32, 3)
    assert digits.class_names == tuple("0123456789")
    assert digits.fingerprints == load_images("digits").fingerprints
    assert {split: f[:12] for split, f in digits.fingerprints.items()} == {
        "train": "58d7f78f3732",
        "test": "0e2bdac65ae4",
    }
    share = np.bincount(digits.test.labels) / np.bincount(np.append(digits.train.labels, digits.test.labels))
    assert share == pytest.approx([0.2] * 10, abs=0.005)
    assert digits.train.pixels.max() == 255
    assert np.array_equal(digits.train.pixels[:, ::4, ::4, 0].repeat(4, 1).repeat(4, 2), digits.train.pixels[..., 2])


def test_names_of_folders_are_never_those_of_known_sets_and_fit_into_a_files_name():
    assert own_name("digits", "pictures") == "digits-pictures"
    assert own_name("my photos (2)", "pictures") == "my-photos-2"
    assert own_name("??", "pictures") == "pictures"
    assert own_name("日本" * 100, "pictures") == "日本" * 33
    assert own_name("x" * 250, "pictures") == "x" * 200


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_a_split_holds_out_its_share_of_each_class_and_loses_none(fraction):
    labels = np.repeat(np.arange(4), (10, 40, 100, 3))
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    kept, held = stratified_split(labels, fraction, "purpose")
    assert np.array_equal(np.sort(np.append(kept, held)), np.arange(len(labels)))
    assert np.array_equal(kept, np.sort(kept))
    assert np.array_equal(held, np.sort(held))
    counts = [min(max(round(fraction * n), 1), n - 1) for n in (10, 40, 100, 3)]
    assert np.bincount(labels[held]).tolist() == counts


def test_arrays_are_images_and_a_run_on_them_takes_no_others_for_them(tmp_path):
    rng = np.random.default_rng(0)

    def part(count):
        return rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), [n % 3 for n in range(count)]

    images = ImageSet.of(["a", "b", "c"], part(60), part(12))
    assert (images.name, images.counts, images.train.labels.dtype) == ("arrays", {"train": 60, "test": 12}, np.int64)
    assert images.fingerprints["train"] == images.train.fingerprint()
    changes = {"network.channels": [[4]], "network.pool": 4, "network.dense": [], "epochs": 1}
    recipe = load_recipe("train1").override(changes | {"validation.source": "split"})
    run = train(recipe, images, runs_dir=tmp_path, threads=1)
    assert run.recipe.dataset == "arrays (in memory)"
    with pytest.raises(InputError, match=r"unknown data set 'arrays \(in memory\)'"):
        train(run.recipe, runs_dir=tmp_path, threads=1)
    assert resume(run, images=images, epochs=2).summary["epoch"] == 2
    given = "it was trained on arrays, which are not kept; from Python give them again"
    with pytest.raises(InputError, match=given):
        load_trained(run)
    classifier = load_trained(run, images=images)
    assert classifier.images is images
    for pixels, labels in ((part(9)[0] / 255, [0] * 9), (part(9)[0], [0.5] * 9), (part(9)[0][0], [0])):
        with pytest.raises(InputError, match=r"expected pixels uint8 \(N, H, W, C\)"):
            ImageSet.of(["a", "b"], (pixels, labels), part(9))
    for labels in (np.zeros((9, 1), int), [0] * 8):
        with pytest.raises(InputError, match="expected a label for each of 9 images"):
            ImageSet.of(["a", "b"], (part(9)[0], labels), part(9))


def test_copies_in_arrays_stay_together_and_are_told():
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 2
    some = np.concatenate((np.arange(40), np.arange(40), np.arange(40)))  # as who copies rare ones would
    test = (np.concatenate((pixels[:3], pixels[3:5] // 2)), np.append(labels[:3], [0, 0]))
    images = ImageSet.of(["a", "b"], (pixels[some], labels[some]), test)
    assert images.notes == (
        "3 of the 5 test images are train images too, to the byte",
        "80 of the 120 train images are copies of others",
    )
    recipe = load_recipe("train1").override({"validation.source": "split", "validation.fraction": 0.3})
    data = Data.of(recipe, images, "cpu")
    known, held = ({image.tobytes() for image in part.pixels.numpy()} for part in (data.train, data.validation))
    assert len(held) >= 8
    assert not known & held
    assert images.subset(60).notes == ()
    other = labels[some].copy()
    other[45:60] = 1 - other[45:60]  # of copies in two classes none can be held out
    mixed = ImageSet.of(["a", "b"], (pixels[some], other), test)
    assert mixed.notes == images.notes
    data = Data.of(recipe, mixed, "cpu")
    known, held = ({image.tobytes() for image in part.pixels.numpy()} for part in (data.train, data.validation))
    assert held
    assert not known & held
    again = ImageSet.of(images.class_names, images.train.take(np.arange(40)), images.test, images.test)
    assert again.notes == tuple(
        f"3 of the 5 {split} images are train images too, to the byte" for split in ("test", "validation")
    )
    with pytest.raises(InputError, match=r"of grey images pixels\[\.\.\., None\]"):
        ImageSet.of(["a", "b"], (pixels[..., 0], labels), test)
    with pytest.raises(InputError, match=r"channels seem to come first: pixels\.transpose\(0, 2, 3, 1\)"):
        ImageSet.of(["a", "b"], (np.zeros((40, 3, 16, 16), np.uint8), labels), test)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_copies_neither_fill_what_is_held_out_nor_lie_on_both_sides(fraction):
    for seed in range(50):
        rng = np.random.default_rng(seed)
        keys = np.concatenate((rng.permutation(30), np.full(20, 7), rng.permutation(12) + 20)).astype(np.uint64)
        labels = np.repeat((0, 1), (50, 12))  # ten pictures are in both
        kept, held = stratified_split(labels, fraction, keys)
        assert not {*keys[kept]} & {*keys[held]}
        counts = np.bincount(labels[held], minlength=2)
        assert 1 <= counts[0] <= round(fraction * 50)
        assert 1 <= counts[1] <= 2  # of the two that are in no other class
    assert not len(stratified_split(np.array([0, 0, 1, 1]), fraction, np.array([5, 5, 5, 5]))[1])


def test_a_split_depends_on_labels_fraction_and_purpose_alone():
    labels = np.arange(1000) % 10
    first = stratified_split(labels, 0.2, "a")
    np.random.seed(5)
    np.random.rand(7)
    again, other = stratified_split(labels.copy(), 0.2, "a"), stratified_split(labels, 0.2, "b")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])
    assert first[1][:5].tolist() == [5, 13, 23, 31, 34]


def test_a_fingerprint_tells_labels_beyond_a_byte():
    pixels = np.zeros((2, 2, 2, 3), np.uint8)
    prints = {Images(pixels, np.array([0, label])).fingerprint() for label in (0, 1, 255, 256, 257, 511)}
    assert len(prints) == 6
