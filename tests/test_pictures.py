"""Folders of pictures: their shapes, what is refused, what is kept, and that a training takes them."""

import csv
import hashlib
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from benchmarks.pictures import parts_of
from fromzero import Run, checkpoint, cli, list_runs, load_images, load_recipe
from fromzero.card import card
from fromzero.data import decoding, listing, split_name, split_recorded, stratified_split
from fromzero.errors import FromzeroError, InputError
from fromzero.files import csv_text
from fromzero.sessions import new_training, resumed_training
from fromzero.splits import Data
from fromzero.trained import load_classifier, load_trained

COLORS = {"blue": (20, 40, 200), "green": (30, 180, 60), "red": (210, 30, 40)}
CHANGES = ["--network.channels", "[[4],[8]]", "--network.pool", "4", "--network.dense", "[16]", "--epochs", "2"]
CHANGES += ["--recipe", "train1", "--precision", "float32", "--threads", "1", "--validation.source", "split"]


@pytest.fixture(autouse=True)
def kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FROMZERO_HOME", str(tmp_path / "home"))


def painted(color, seed, size=(32, 32)):
    """Noise around a colour."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8))


def write(folder, count=10, seed=0, **options):
    """A folder with `count` pictures of each colour."""
    for color in COLORS:
        (folder / color).mkdir(parents=True)
        for n in range(count):
            painted(color, 1000 * seed + n, **options).save(folder / color / f"{n:03}.png")
    return folder


def test_a_folder_a_class_becomes_train_and_a_fifth_test(tmp_path):
    images = load_images(write(tmp_path / "my photos", count=20))
    assert images.class_names == ("blue", "green", "red")
    assert images.name == "my-photos"
    assert (len(images.train), len(images.test), images.validation) == (48, 12, None)
    assert images.image_shape == (32, 32, 3)
    assert np.bincount(images.test.labels).tolist() == [4, 4, 4]
    assert images.notes == ("no folder test: a fifth of each class is kept for it (identical files stay together)",)
    for part in (images.train, images.test):
        for label, color in enumerate(COLORS):
            mean = part.pixels[part.labels == label].mean((0, 1, 2))
            assert mean == pytest.approx(COLORS[color], abs=15)


def test_the_fifth_goes_by_contents_and_copies_stay_together(tmp_path):
    folder = write(tmp_path / "a", count=20)
    held = load_images(folder).test
    for path in list(folder.glob("*/*.png")):
        path.rename(path.with_name(f"x{path.name[::-1][4:]}.png"))
    assert load_images(folder).test.fingerprint() == held.fingerprint()
    for color in COLORS:  # 4 of 20 held out; 19 of 24 stay in train, as copies go where the first is
        for n in range(4):
            shutil.copy(next((folder / color).iterdir()), folder / color / f"copy{n}.png")
    images = load_images(folder)
    assert not [note for note in images.notes if "too, to the byte" in note]


def test_few_pictures_change_sides_when_some_are_taken_away(tmp_path):
    def parts(images):
        data = Data.of(load_recipe("few"), images, "cpu")
        return [{image.numpy().tobytes() for image in part.pixels} for part in (data.train, data.validation, data.test)]

    folder = write(tmp_path / "a", count=60)
    before = parts(load_images(folder))
    for color in COLORS:
        (folder / color / "007.png").unlink()
    after = parts(load_images(folder))
    for part in range(3):
        elsewhere = set.union(*(before[other] for other in range(3) if other != part))
        assert len(after[part] & elsewhere) <= 2 * len(COLORS)


def test_the_size_of_pictures_moves_none_to_another_side(tmp_path):
    def held(images):
        indices = stratified_split(images.train.labels, 0.2, images.train.content_keys())[1]
        return {images.train.files[index] for index in indices}

    folder = write(tmp_path / "a", count=30, size=(24, 24))
    before = held(load_images(folder))
    assert len(before) == 3 * 5
    assert held(load_images(f"{folder}@48")) == before
    painted("red", 999, size=(30, 20)).save(folder / "red" / "other.png")
    assert load_images(folder).image_shape == (32, 32, 3)
    assert len(held(load_images(folder)) - before) <= 2


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such pipes")
def test_pipes_are_no_pictures_and_no_data_sets(tmp_path):
    folder = write(tmp_path / "a", count=10)
    os.mkfifo(tmp_path / "pipe")
    (folder / "red" / "linked.png").symlink_to(tmp_path / "pipe")
    os.mkfifo(folder / "red" / "pipe.png")
    images = load_images(folder)
    assert not [file for file in images.train.files + images.test.files if "linked" in file or "pipe" in file]
    with pytest.raises(InputError, match="is neither a folder nor a file"):
        load_images(tmp_path / "pipe")


def test_one_name_written_in_two_ways_is_one_class_or_none(tmp_path):
    folder = write(tmp_path / "a", count=10)
    (folder / "red").rename(folder / "caf\u00e9")
    shutil.copytree(folder / "blue", folder / "cafe\u0301")
    with pytest.raises(InputError, match="are one name, written in two ways: rename one, or put both together"):
        load_images(folder)
    shutil.rmtree(folder / "cafe\u0301")
    split = tmp_path / "split"
    shutil.copytree(folder, split / "train")
    shutil.copytree(folder, split / "test")
    (split / "test" / "caf\u00e9").rename(split / "test" / "cafe\u0301")
    assert load_images(split).counts["test"] == 10 * len(COLORS)


def test_what_lies_where_one_stands_does_not_change_a_runs_images(tmp_path, monkeypatch):
    folder = write(tmp_path / "photos", count=10)
    training = new_training(
        load_recipe("few64").override({"epochs": 1}), load_images(f"{folder}@64"), runs_dir=tmp_path / "runs"
    )
    training.close()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "photos@64").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert load_trained(training.run).images.image_shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("name", "source", "parts"),
    [
        ("photos@64:500", "/a/photos", ("photos", "@64:500")),
        ("photos@64", "/a/photos@64", ("photos@64", "")),
        ("cifar10:40", "/data", ("cifar10", ":40")),
        ("a:b", "/elsewhere", ("a:b", "")),
        ("digits", "scikit-learn", ("digits", "")),
    ],
)
def test_the_name_of_an_image_set_and_its_options(name, source, parts):
    assert split_recorded(name, source) == parts


def test_names_of_files_stay_in_their_line(tmp_path, capsys):
    folder = write(tmp_path / "a", count=40)
    (folder / "red" / "bad\nfromzero: all is well.png").write_text("no picture")
    (note,) = (note for note in load_images(folder).notes if "left out" in note)
    assert r"bad\nfromzero: all is well.png" in note
    assert "\n" not in note


def test_a_larger_size_is_proposed_for_larger_pictures(tmp_path):
    assert "@64" not in " ".join(load_images(write(tmp_path / "a", count=10, size=(40, 30))).notes)
    assert "as FOLDER@64, with --recipe few64, to 64×64" in " ".join(
        load_images(write(tmp_path / "c", count=10, size=(90, 80))).notes
    )


def test_a_part_may_know_no_files(tmp_path):
    images = load_images(write(tmp_path / "a", count=10))
    images = replace(images, test=replace(images.test, files=()))
    training = new_training(load_recipe("few").override({"epochs": 1}), images, runs_dir=tmp_path)
    training.close()
    assert "test,red,," in (training.run.path / "splits.csv").read_text("utf-8").replace("\r", "")


def test_a_run_validated_on_another_split_is_refused(tmp_path):
    images = load_images(write(tmp_path / "a", count=10))
    training = new_training(load_recipe("few").override({"epochs": 1}), images, runs_dir=tmp_path)
    training.close()
    load_trained(training.run, images=images)
    provenance = training.run.provenance
    for held_out in ("0" * 64, None):
        provenance["data"]["held_out"] = held_out
        training.run.write_provenance(provenance)
        for load in (load_trained, resumed_training):
            with pytest.raises(FromzeroError, match="an earlier fromzero held out other pictures"):
                load(training.run, images=images)


def test_pictures_that_are_gone_or_new_are_named(tmp_path):
    folder = write(tmp_path / "a", count=10)
    training = new_training(load_recipe("few").override({"epochs": 1}), load_images(folder), runs_dir=tmp_path)
    training.close()
    (folder / "red" / "004.png").rename(folder / "red" / "fresh.png")
    with pytest.raises(FromzeroError, match=r"in another order.*; gone: red/004\.png; new: red/fresh\.png"):
        load_trained(training.run)
    (folder / "red" / "fresh.png").unlink()
    with pytest.raises(FromzeroError, match=r"are not those it was trained on .*recorded \w+…; gone: red/004\.png\)"):
        load_trained(training.run)
    for table in (b"split,class,file\ntrain\n", b"\xff", b""):  # nothing is said by what is damaged
        (training.run.path / "splits.csv").write_bytes(table)
        with pytest.raises(FromzeroError, match=r"recorded \w+…(; new: .*)?\); put them back"):
            load_trained(training.run)


def test_copies_are_listed_by_file(tmp_path, capsys, monkeypatch):
    """To the byte, and pictures that were saved again, a little smaller."""
    folder, fresh = write(tmp_path / "set" / "train", count=20), tmp_path / "set" / "test"
    rng = np.random.default_rng(0)
    for color in COLORS:
        (fresh / color).mkdir(parents=True)
        for place in (folder / color, fresh / color):
            for n in range(20):  # in large squares, which JPEG keeps
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
                Image.fromarray(pixels).save(place / f"{n:03}.png")
    shutil.copy(folder / "red" / "003.png", fresh / "red" / "a, b.png")
    for n in range(5):
        with Image.open(folder / "blue" / f"{n:03}.png") as picture:
            picture.save(fresh / "blue" / f"again-{n}.jpg", quality=98, subsampling=0)
    assert cli.main(["train", str(tmp_path / "set"), *CHANGES, "--runs-dir", str(tmp_path / "runs")]) == 0
    assert "1 of the 66 test pictures are in train too, to the byte: test/red/a, b.png" in capsys.readouterr().out
    (run,) = list_runs(tmp_path / "runs")
    monkeypatch.setattr("fromzero.probe.AT_ONCE", 7)
    assert cli.main(["diagnose", str(run.path), "--threads", "1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    with open(run.path / "copies.csv", newline="", encoding="utf-8") as file:
        found = {row["file"]: (row["split"], row["train_file"], row["to_the_byte"]) for row in csv.DictReader(file)}
    again = {f"test/blue/again-{n}.jpg": ("test", f"train/blue/{n:03}.png", "nearly") for n in range(5)}
    kept = {row[2] for row in csv.reader((run.path / "splits.csv").read_text().splitlines()) if row[0] == "train"}
    expected = again | {"test/red/a, b.png": ("test", "train/red/003.png", "yes")}
    assert found == {file: (split, of, how) for file, (split, of, how) in expected.items() if of in kept}
    assert len(found) > 2
    assert "copies.csv" in told
    assert all(file in told for file in list(found)[:1])
    copies = run.diagnosis["measures"]["copies"]["splits"]
    assert sum(copied["near"] for copied in copies.values()) == len(found)


def test_a_run_lists_which_file_was_in_which_split(tmp_path):
    folder = write(tmp_path / "a, b", count=20)
    images = load_images(folder)
    recipe = load_recipe("few").override({"epochs": 1})
    training = new_training(recipe, images, runs_dir=tmp_path / "runs")
    training.close()
    with open(training.run.path / "splits.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(images.train) + len(images.test) == 60
    by_split = {split: [row for row in rows if row["split"] == split] for split in ("train", "validation", "test")}
    subsets = training.run.provenance["data"]["subsets"]
    assert {split: len(found) for split, found in by_split.items()} == subsets
    for split, subset in (("train", training.data.train), ("validation", training.data.validation)):
        pixels = [np.asarray(Image.open(folder / row["file"]).convert("RGB")) for row in by_split[split]]
        assert np.array_equal(np.stack(pixels), subset.pixels.numpy())
        assert [images.class_names.index(row["class"]) for row in by_split[split]] == subset.labels.tolist()
    assert all((folder / row["file"]).parent.name == row["class"] for row in rows)
    digests = [hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest() for row in rows]
    assert all(digest.startswith(row["sha256"]) and row["sha256"] for digest, row in zip(digests, rows, strict=True))
    own = write(tmp_path / "own" / "train", count=5).parent
    write(own / "val", count=3, seed=1)
    images = replace(load_images(own), validation=load_images(own).test)
    for source, name in (("split", "validation"), ("test", "unused")):
        changes = {"epochs": 1, "validation.source": source}
        training = new_training(recipe.override(changes), images, runs_dir=tmp_path / "runs")
        training.close()
        assert (training.run.path / "splits.csv").read_text().count(f"{name},") == len(images.validation)
        validated = load_trained(training.run, images=images).validation_images
        assert validated is (images.validation if source == "split" else images.test)


def test_tables_hold_whatever_files_are_called(tmp_path):
    rows = [["a, b", "c\rd"], ["e\nf", 'g"h'], ["", "i"]]
    for some in (rows, rows[1:]):
        (tmp_path / "table.csv").write_bytes(csv_text(("one", "two"), some).encode())
        with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
            assert list(csv.reader(file)) == [["one", "two"], *some]


def test_train_val_and_test_are_taken_as_they_are(tmp_path):
    write(tmp_path / "set" / "Train", count=8)
    write(tmp_path / "set" / "valid", count=3, seed=1)
    write(tmp_path / "set" / "test", count=2, seed=2)
    images = load_images(tmp_path / "set")
    assert images.validation is not None
    assert (len(images.train), len(images.validation), len(images.test)) == (24, 9, 6)
    assert images.notes == ()
    recipe = load_recipe("train1")
    data = Data.of(recipe.override({"validation.source": "split"}), images, "cpu")
    assert (len(data.train.labels), len(data.validation.labels)) == (24, 9)
    assert np.array_equal(data.validation.pixels.numpy(), images.validation.pixels)
    on_test = Data.of(recipe.override({"validation.source": "test"}), images, "cpu")
    assert len(on_test.validation.labels) == 6
    assert set(images.fingerprints) == {"train", "validation", "test"}


def test_without_test_val_is_kept_for_it(tmp_path):
    write(tmp_path / "set" / "train", count=8)
    write(tmp_path / "set" / "val", count=3, seed=1)
    images = load_images(tmp_path / "set")
    assert (len(images.train), images.validation, len(images.test)) == (24, None, 9)
    assert images.notes == ("no folder test: val is kept for the test",)


def test_classes_that_a_part_has_no_picture_of_are_named(tmp_path):
    write(tmp_path / "set" / "train", count=8)
    write(tmp_path / "set" / "test", count=3, seed=1)
    shutil.rmtree(tmp_path / "set" / "test" / "red")
    (tmp_path / "set" / "test" / "red").mkdir()
    assert load_images(tmp_path / "set").notes == ("no test picture of red",)


def test_a_folder_is_called_as_it_was_asked_for(tmp_path, monkeypatch):
    write(tmp_path / "Train_Data", count=4)
    (tmp_path / "photos").symlink_to(tmp_path / "Train_Data")
    assert load_images(tmp_path / "photos").name == "photos"
    monkeypatch.chdir(tmp_path / "Train_Data")
    assert load_images(".").name == load_images("../Train_Data/").name == "Train_Data"


def test_pictures_in_two_parts_are_counted(tmp_path):
    write(tmp_path / "set" / "train", count=8)
    write(tmp_path / "set" / "test", count=3)
    assert load_images(tmp_path / "set").notes == (
        "9 of the 9 test pictures are in train too, to the byte: test/blue/000.png, test/blue/001.png,"
        " test/blue/002.png and 6 more",
    )


@pytest.mark.parametrize(
    ("size", "spec", "shape", "note"),
    [
        ((48, 20), "", (20, 48, 3), ""),
        (
            (65, 65),
            "",
            (32, 32, 3),
            "pictures of 65×65 pixels, cut to squares and scaled to 32×32; as FOLDER@64, with --recipe few64, to 64×64",
        ),
        ((90, 70), "@40", (40, 40, 3), "pictures of 90×70 pixels, cut to squares and scaled to 40×40"),
        ((40, 40), "@40", (40, 40, 3), ""),
        ((8, 8), "@40", (40, 40, 3), "pictures of 8×8 pixels, cut to squares and scaled to 40×40"),
    ],
)
def test_pictures_are_scaled_where_they_must_be(size, spec, shape, note, tmp_path):
    folder = write(tmp_path / "set", count=4, size=size)
    images = load_images(f"{folder}{spec}")
    assert images.image_shape == shape
    assert [n for n in images.notes if n.startswith("pictures")] == ([note] if note else [])
    assert images.name == f"set{spec}"
    few = load_images(f"{folder}{spec}:6")
    assert (few.name, len(few.train), few.image_shape) == (f"set{spec}:6", 6, shape)


def test_the_middle_is_kept_upright_and_on_white(tmp_path):
    def read(picture, name, **options):
        folder = tmp_path / name
        for place in (folder / split / color for split in ("train", "test") for color in COLORS):
            place.mkdir(parents=True)
            picture.save(place / f"0{options.get('ending', '.png')}", **options.get("save", {}))
        return load_images(f"{folder}@32").train.pixels[0]

    stripes = np.zeros((60, 180, 3), np.uint8)
    stripes[:, 60:120] = 255, 0, 0  # what the square in the middle has
    assert (read(Image.fromarray(stripes), "wide")[:, 4:28].mean((0, 1)) == (255, 0, 0)).all()
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:32] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise: the top is then on the right
    found = read(Image.fromarray(halves), "turned", ending=".jpg", save={"exif": turned, "quality": 95})
    assert found[:, 20:].mean() > 240
    assert found[:, :12].mean() < 15
    clear = Image.new("RGBA", (32, 32), (0, 0, 255, 0))
    assert (read(clear, "clear") == 255).all()
    deep = Image.fromarray(np.full((32, 32), 0x8000, np.uint16))
    with pytest.raises(InputError, match=r"6 of 6 pictures cannot be read.*more than 8 bits a channel"):
        read(deep, "deep")


def test_decoded_pictures_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    folder = write(tmp_path / "set", count=5)
    first = load_images(folder)
    decoded = []
    decode = decoding._decode
    monkeypatch.setattr(decoding, "_decode", lambda *given: decoded.append(given[0]) or decode(*given))
    assert load_images(folder).order_digest == first.order_digest
    assert not decoded
    os.utime(folder / "red" / "000.png", (1, 1))
    assert load_images(folder).order_digest == first.order_digest
    assert len(decoded) == 15
    (kept,) = (tmp_path / "home" / "pictures").iterdir()
    kept.write_bytes(kept.read_bytes()[:2000])
    assert load_images(folder).order_digest == first.order_digest
    assert len(decoded) == 30
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").write_text("no folder can be made here")
    assert load_images(folder).order_digest == first.order_digest


def damaged(tmp_path, change):
    folder = write(tmp_path / "set", count=4)
    change(folder)
    with pytest.raises(InputError) as said:
        load_images(folder)
    assert "\n" not in str(said.value)
    return str(said.value)


def test_what_is_no_picture_is_named(tmp_path):
    def change(folder):
        whole = (folder / "red" / "001.png").read_bytes()
        (folder / "red" / "001.png").write_bytes(whole[: len(whole) // 2])
        for n in range(3):
            (folder / "blue" / f"{n:03}.png").write_bytes(b"not a picture")

    said = damaged(tmp_path, change)
    assert f"{tmp_path / 'set'}: 4 of 12 pictures cannot be read (no PNG, JPEG, BMP, GIF, WEBP or TIFF: " in said
    assert said.endswith("; more than 5%, too many to leave out: repair or remove them")
    named = [str(tmp_path / "set" / name) for name in ("blue/000.png", "blue/001.png", "blue/002.png", "red/001.png")]
    assert all(name in said for name in named), "so that all can be removed before the next try"


def test_a_few_damaged_pictures_are_left_out_and_named(tmp_path, monkeypatch):
    folder, without = write(tmp_path / "set", count=20), write(tmp_path / "without", count=20)
    damaged_one = folder / "red" / "003.png"
    damaged_one.write_bytes(damaged_one.read_bytes()[:-100])
    (without / "red" / "003.png").unlink()
    for _ in range(2):  # decoded, and as kept
        images = load_images(folder)
        assert images.fingerprints == load_images(without).fingerprints
        assert images.train.files + images.test.files == (
            load_images(without).train.files + load_images(without).test.files
        )
        (note,) = images.notes[:1]
        assert note.startswith("left out: 1 of 60 pictures cannot be read (")
        assert note.endswith(": red/003.png)")
    for n in range(4, 7):
        (folder / "red" / f"{n:03}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"4 of 60 pictures cannot be read .*more than 5%"):
        load_images(folder)
    for path in (folder / "red").iterdir():
        if int(path.stem) in range(3, 7):
            path.unlink()
    (folder / "white").mkdir()
    (folder / "white" / "000.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 57 pictures cannot be read .*all pictures of a class"):
        load_images(folder)  # all of a class
    shutil.rmtree(folder / "white")
    read = Path.read_bytes

    def unreachable(path):
        if path.name == "010.png":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", unreachable)
    with pytest.raises(InputError, match=r"3 of 56 pictures cannot be read .*Permission denied: .*010\.png\); some"):
        load_images(folder)  # no damage: they may be there the next time


def test_exif_that_is_none_turns_nothing(tmp_path):
    folder = write(tmp_path / "set", count=4)
    for path in folder.glob("*/*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), exif=b"Exif\0\0" + b"no TIFF at all", quality=95)
        path.unlink()
    images = load_images(folder)
    assert images.counts["train"] + images.counts["test"] == 12
    assert not [note for note in images.notes if "left out" in note]


def test_pictures_turned_in_any_format_or_with_damaged_exif_keep_their_size(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    odd = turned.tobytes().replace(b"\x01\x12\0\x03", b"\x01\x12\0\x02")  # the number as text
    odd = odd.replace(b"\x12\x01\x03\0", b"\x12\x01\x02\0")
    for ending, exif, shape in ((".jpg", turned, (48, 20)), (".tif", turned, (48, 20)), (".jpeg", odd, (20, 48))):
        folder = tmp_path / ending
        for color in COLORS:
            (folder / color).mkdir(parents=True)
            for n in range(3):
                painted(color, n, size=(48, 20)).save(folder / color / f"{n}{ending}", exif=exif)
        images = load_images(folder)
        assert images.image_shape == (*shape, 3), ending
        assert not [note for note in images.notes if "scaled" in note]


def test_names_that_only_begin_like_those_of_systems_are_pictures_and_classes(tmp_path):
    folder = write(tmp_path / "set", count=4)
    (folder / "red").rename(folder / "__background__")
    (folder / "blue" / "000.png").rename(folder / "blue" / "@user_1.png")
    (folder / "blue" / "001.png").rename(folder / "blue" / "__1.png")
    images = load_images(folder)
    assert images.class_names == ("__background__", "blue", "green")
    assert images.counts["train"] + images.counts["test"] == 12


def test_what_is_left_out_is_said(tmp_path):
    folder = write(tmp_path / "set", count=4)
    (folder / "red" / "linked").symlink_to(folder / "red")
    (folder / "red" / "a.heic").write_bytes(b"")
    (folder / "loose.png").write_bytes(b"")
    for unseen in (".DS_Store", "Thumbs.db", "red/._000.png"):
        (folder / unseen).write_bytes(b"")
    for unseen in ("@eaDir", "__MACOSX", "red/.thumbnails", "red/@eaDir"):
        (folder / unseen).mkdir()
        shutil.copy(folder / "red" / "000.png", folder / unseen)
    found, notes = listing.pictures_at([folder / "red"])
    assert [p.name for p in found] == ["000.png", "001.png", "002.png", "003.png"]
    assert notes == [
        f"{folder}/red: not read, 1 of .heic: a.heic; as JPEG or PNG they would be",
        f"{folder}/red: not read, being no pictures by their names or places: linked",
    ]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.CR2").write_bytes(b"")
    with pytest.raises(InputError, match=r"no pictures .* in it; not read, 1 of \.cr2: a\.CR2"):
        listing.pictures_at([tmp_path / "raw"])
    unread, others = (note for note in load_images(folder).notes if note.startswith("not read"))
    assert unread == "not read, 1 of .heic: red/a.heic; as JPEG or PNG they would be"
    assert others == "not read, being no pictures by their names or places: loose.png, red/linked"
    (folder / "red" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"gone\.png: cannot be read: No such file"):
        load_images(folder)


def test_folders_within_a_class_are_of_that_class(tmp_path):
    folder, flat = write(tmp_path / "set", count=6), write(tmp_path / "flat", count=6)
    (folder / "red" / "2021" / "may").mkdir(parents=True)
    (folder / "red" / "empty").mkdir()
    (folder / "red" / "2021" / "a.txt").write_text("notes")
    (folder / "red" / "000.png").rename(folder / "red" / "2021" / "000.png")
    (folder / "red" / "001.png").rename(folder / "red" / "2021" / "may" / "001.png")
    images = load_images(folder)
    assert images.fingerprints == load_images(flat).fingerprints
    assert "pictures in a folder within a class are of that class: red/2021" in images.notes
    assert "not read, being no pictures by their names or places: red/2021/a.txt" in images.notes
    (folder / "blue").rename(tmp_path / "was")
    (folder / "blue").mkdir()
    (tmp_path / "was").rename(folder / "blue" / "2021")
    assert load_images(folder).fingerprints == images.fingerprints
    shutil.copytree(folder / "blue" / "2021", folder / "blue" / "2022")
    with pytest.raises(
        InputError, match="blue: has no pictures of its own but folders with such, 2021, 2022; if those"
    ):
        load_images(folder)
    shutil.rmtree(folder / "red")
    shutil.rmtree(folder / "green")
    with pytest.raises(InputError, match=r"expected a folder for each of .*blue has folders in it: if those are the"):
        load_images(folder)


def test_copies_stay_together_when_validation_is_held_out(tmp_path):
    folder = write(tmp_path / "set", count=15)
    for path in list(folder.glob("*/*.png")):
        for n in range(2):
            shutil.copy(path, path.with_name(f"{path.stem}-{n}.png"))
    images = load_images(folder)
    recipe = load_recipe("few").override({"validation.fraction": 0.25})
    data = Data.of(recipe, images, "cpu")
    train, held = ({image.numpy().tobytes() for image in part.pixels} for part in (data.train, data.validation))
    assert not train & held
    assert np.bincount(data.validation.labels).tolist() == [9, 9, 9]
    assert len(data.train.labels) == len(images.train) - 27


def test_pictures_in_two_classes_are_named(tmp_path):
    folder = write(tmp_path / "set", count=6)
    assert not [note for note in load_images(folder).notes if "two classes" in note]
    shutil.copy(folder / "red" / "002.png", folder / "blue" / "same.png")
    assert (
        "1 picture is in two classes, to the byte, so a label of each is wrong: blue/same.png and red/002.png"
        in load_images(folder).notes
    )


def test_copies_in_a_class_are_named(tmp_path):
    folder = write(tmp_path / "set", count=6)
    assert not [note for note in load_images(folder).notes if "to the byte" in note]
    shutil.copy(folder / "red" / "002.png", folder / "red" / "again.png")
    said = "of others in their class, to the byte, and each counts in all figures: red/002.png and red/again.png"
    assert f"1 picture is a copy {said}" in load_images(folder).notes
    shutil.copy(folder / "red" / "002.png", folder / "red" / "more.png")
    assert f"2 pictures are copies {said} and 1 more" in load_images(folder).notes


def test_a_class_may_be_called_train_and_a_run_may_lie_in_the_folder(tmp_path, monkeypatch):
    write(tmp_path / "vehicles", count=4)
    (tmp_path / "vehicles" / "red").rename(tmp_path / "vehicles" / "train")
    assert load_images(tmp_path / "vehicles").class_names == ("blue", "green", "train")
    monkeypatch.chdir(tmp_path / "vehicles")
    assert cli.main(["train", ".", *CHANGES]) == 0
    assert cli.main(["evaluate", "vehicles-987", "--threads", "1"]) == 0
    assert load_images(tmp_path / "vehicles").class_names == ("blue", "green", "train")


@pytest.mark.filterwarnings("ignore:runs/set-987")  # of the damaged checkpoint
def test_a_run_is_scored_on_other_pictures_of_its_classes(tmp_path, monkeypatch, capsys):
    write(tmp_path / "set", count=10)
    others = write(tmp_path / "others", count=12, seed=3)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "set", *CHANGES]) == 0
    (run,) = list_runs()
    assert cli.main(["evaluate", str(run.path), "set", "--threads", "1"]) == 0
    _, own, new, *said = capsys.readouterr().out.partition(f"{run.path}: train1, last weights")[2].splitlines()
    trained_on, validated = (run.provenance["data"]["subsets"][name] for name in ("train", "validation"))
    assert own.startswith("  these pictures  ")
    assert f"for {30 - trained_on} images)" in new
    assert new.startswith("  those not trained on  ")
    assert f"  note: {validated} of these 30 pictures validated the run, to the byte" in said
    shutil.copytree(tmp_path / "set", tmp_path / "copied")
    assert cli.main(["evaluate", str(run.path), "copied", "--threads", "1"]) == 0
    said = f"note: {trained_on} of these 30 pictures are train pictures of the run, to the byte"
    assert said in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(tmp_path / "set")  # which nobody need take along
    (others / "red").rename(others / "was-red")
    capsys.readouterr()
    command = ["evaluate", str(run.path), "others", "--threads", "1"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "others: expected a folder for each class, called as the run's classes are (blue, green, red)" in said
    shutil.rmtree(others / "was-red")
    (others / "blue" / "damaged.png").write_bytes(b"")
    (others / "blue" / "a.heic").write_bytes(b"")
    (others / "loose.png").write_bytes(b"")
    assert cli.main(command) == 0
    first, scores, recalls, *mistakes, unread, others_, damaged = capsys.readouterr().out.splitlines()
    assert damaged == "  note: left out: 1 of 25 pictures cannot be read (empty: others/blue/damaged.png)"
    assert unread == "  note: not read, 1 of .heic: blue/a.heic; as JPEG or PNG they would be"
    assert others_ == "  note: not read, being no pictures by their names or places: loose.png"
    assert first.startswith(f"{run.path}: train1, last weights, of epoch 2, on others, cpu, float32")
    pictures = [str(path) for path in sorted(others.glob("*/0*.png"))]
    assert len(pictures) == 24
    assert cli.main(["predict", str(run.path), *pictures, "--threads", "1"]) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    right = [Path(picture).parent.name == name for name, _, picture in told]
    assert f"accuracy {sum(right) / 24:.4f} (" in scores
    wrong = [(float(sure), name, path) for (name, sure, path), ok in zip(told, right, strict=True) if not ok]
    assert len(wrong) > 10  # so many are listed
    confused, header, *listed = mistakes
    assert confused.startswith("  confused: ")
    assert header == f"  mistakes, by the network or in the label, the surest 10 of {len(wrong)} (--json lists all):"
    surest = pytest.approx(sorted((sure for sure, _, _ in wrong), reverse=True)[:10], abs=6e-4)  # rounded twice
    assert [float(line.split("(")[1].split(")")[0]) for line in listed] == surest
    shown = {path: (name, sure) for sure, name, path in wrong}
    for line in listed:
        path = line.rsplit(": ", 1)[1]
        name, sure = shown[str(tmp_path / path)]
        assert float(line.split("(")[1].split(")")[0]) == pytest.approx(sure, abs=6e-4)
        assert line.startswith(f"    labelled {Path(path).parent.name}, looks like {name} (")
        assert line.endswith(f"): {path}")
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mistakes"]
    assert {str(tmp_path / one["picture"]): one["prediction"] for one in found} == {
        path: name for _, name, path in wrong
    }
    blue, green = sum(right[:12]) / 12, sum(right[12:]) / 12
    mean = f"(mean {(blue + green) / 2:.4f})"
    assert recalls == f"  accuracy by class {mean}: blue {blue:.3f} (of 12), green {green:.3f} (of 12), red no image"
    assert cli.main([*command, "--data-dir", "set"]) == 2
    assert "--data-dir is where a run's own images are, and others are scored" in capsys.readouterr().err
    assert cli.main([*command, "--precision", "bfloat16"]) == 0
    assert "on others, cpu, bfloat16" in capsys.readouterr().out
    shutil.copytree(others / "blue", others / "train" / "blue")
    shutil.copytree(others / "blue", others / "val" / "blue")
    assert cli.main(command) == 2  # the images of which it was trained are not proposed where there are others
    assert f"found train; if that is a split, name it: {others.name}/val" in capsys.readouterr().err
    for split in ("train", "val"):
        shutil.rmtree(others / split)
    (run.checkpoints / "last.safetensors").write_bytes(b"")
    assert cli.main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["checkpoint"], record["epoch"], record["ended"]) == ("step-000000000", 0, True)
    assert "these are the weights it began with; none has been saved since" in record["notes"]
    (run.path / "summary.json").unlink()
    assert cli.main(command) == 0
    assert "  note: the run has not ended\n" in capsys.readouterr().out
    (others / "blue" / "second.png").write_bytes(b"")  # too many for a figure
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "2 of 26 pictures cannot be read" in said
    assert said.endswith("; more than 5%, too many to leave out: repair or remove them\n")
    (others / "blue" / "second.png").unlink()
    few = "13 pictures in it, and in no class folder; expected a folder for each class"
    refused = {"nowhere": "no folder", "runs": "expected a folder for each class", str(others / "blue"): few}
    for folder, why in refused.items():
        assert cli.main(["evaluate", str(run.path), folder, "--threads", "1"]) == 2
        assert f"{folder}: {why}" in capsys.readouterr().err


def test_what_earlier_weights_were_trained_on_is_counted_in_another_folder(tmp_path, monkeypatch, capsys):
    """The same pictures, split anew by hand: half of the test pictures were train pictures of the first run."""
    folder = write(tmp_path / "set", count=20)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "set", *CHANGES]) == 0
    (first,) = list_runs()
    trained = [Path(row["file"]) for row in first.pictures if row["split"] == "train"]
    for split in ("train", "test"):
        for color in COLORS:
            (tmp_path / "anew" / split / color).mkdir(parents=True)
    for number, file in enumerate(sorted(path.relative_to(folder) for path in folder.glob("*/*.png"))):
        shutil.copy(folder / file, tmp_path / "anew" / ("test" if number % 3 == 0 else "train") / file)
    moved = [path.relative_to(tmp_path / "anew" / "test") for path in (tmp_path / "anew" / "test").glob("*/*.png")]
    seen = len({*trained} & {*moved})
    assert seen > 3
    capsys.readouterr()
    assert cli.main(["train", "anew", "--from", str(first.path), *CHANGES]) == 0
    told = f"{seen} test images are train images of {first.path}, with whose weights it began: test flatters"
    assert told in " ".join(capsys.readouterr().out.split())
    second = next(run for run in list_runs() if run.name.startswith("anew"))
    assert told in second.doubts
    assert f"({told})" in card(load_classifier(second))
    capsys.readouterr()
    for command in (["evaluate", second.path, "anew/test"], ["compare", first.path, second.path, "anew/test"]):
        assert cli.main([*map(str, command), "--threads", "1"]) == 0
        said = f"{seen} of these {len(moved)} pictures are train pictures of {first.path}, with whose weights it began"
        assert said in " ".join(capsys.readouterr().out.split())
    for split in ("train", "test"):  # by other names they are the same pictures
        for color in COLORS:
            (tmp_path / "anew" / split / color).rename(tmp_path / "anew" / split / f"{color}ish")
    assert cli.main(["train", "anew", "--from", str(first.path), "--partial", *CHANGES]) == 0
    (third,) = (run for run in list_runs() if run.name == "anew-987-2")
    assert told in third.doubts
    recipe = (first.path / "recipe.toml").read_text()
    (first.path / "recipe.toml").unlink()  # of a run before the one that is asked for
    assert cli.main(["train", "anew", "--from", str(third.path), *CHANGES]) == 0
    (first.path / "recipe.toml").write_text(recipe)
    for split in ("train", "test"):
        for color in COLORS:
            (tmp_path / "anew" / split / f"{color}ish").rename(tmp_path / "anew" / split / color)
    shutil.rmtree(first.path)
    assert cli.main(["evaluate", str(second.path), "anew/test", "--threads", "1"]) == 0
    assert "may have been trained on these pictures" in " ".join(capsys.readouterr().out.split())


def test_many_copies_do_not_fill_the_test_set(tmp_path):
    for seed in range(4):
        folder = write(tmp_path / str(seed), count=30, seed=seed)
        for n in range(20):
            shutil.copy(folder / "red" / "000.png", folder / "red" / f"copy{n}.png")
        images = load_images(folder)
        assert np.bincount(images.test.labels).tolist()[:2] == [6, 6]
        assert 8 <= np.bincount(images.test.labels)[2] <= 10
        assert not [note for note in images.notes if "too, to the byte" in note]
    for path in list((folder / "blue").iterdir())[1:]:
        shutil.copy(next((folder / "blue").iterdir()), path)
    assert np.bincount(load_images(folder).test.labels, minlength=3)[0] in (0, 1)


def test_a_folder_of_another_shape_is_refused(tmp_path):
    def emptied(folder):
        for path in (folder / "green").iterdir():
            path.unlink()
        (folder / "green" / "a.heic").write_bytes(b"")

    assert "green: expected the pictures of a class (.png, .jpg," in damaged(tmp_path / "1", emptied)
    said = damaged(tmp_path / "2", lambda folder: [shutil.rmtree(folder / color) for color in ("red", "blue")])
    assert "set: expected a folder for each of at least two classes" in said
    assert "found green" in said
    said = damaged(tmp_path / "3", lambda folder: [shutil.rmtree(path) for path in folder.iterdir()])
    assert said.endswith("found nothing")
    write(tmp_path / "4" / "test")
    with pytest.raises(InputError, match="4: has test, but no train with class folders"):
        load_images(tmp_path / "4")
    write(tmp_path / "4" / "train")
    (tmp_path / "4" / "test" / "pink").mkdir()
    with pytest.raises(InputError, match=r"pink: a class that .*train does not have"):
        load_images(tmp_path / "4")
    (tmp_path / "4" / "training" / "red").mkdir(parents=True)
    with pytest.raises(InputError, match=r"has train and training, which mean the same|training and train"):
        load_images(tmp_path / "4")
    for wrong in ("@abc", ":10@64", "@99999", ":abc"):
        with pytest.raises(InputError, match="may come @PIXELS"):
            load_images(f"{tmp_path / '4'}{wrong}")
    with pytest.raises(InputError, match="@0: images are from 1 to 512 pixels wide"):
        load_images(f"{tmp_path / '4'}@0")
    alone = write(tmp_path / "5", count=1)
    with pytest.raises(InputError, match="class 'blue' has one picture, too few to keep some for the test"):
        load_images(alone)


def test_a_run_on_pictures_goes_on_to_the_same_bits_even_when_they_have_moved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "photos", count=15, size=(50, 40))
    assert cli.main(["train", "photos@32", *CHANGES]) == 0
    shown = capsys.readouterr().out
    assert "note: pictures of 50×40 pixels, cut to squares and scaled to 32×32" in shown
    assert "note: no folder test: a fifth of each class is kept for it (identical files stay together)" in shown
    assert cli.main(["resume", "photos-32-987", "--epochs", "3", "--threads", "1"]) == 0
    (tmp_path / "photos").rename(tmp_path / "moved")
    capsys.readouterr()
    assert cli.main(["resume", "photos-32-987", "--epochs", "4", "--threads", "1"]) == 2
    assert "its images are no longer at" in capsys.readouterr().err
    assert cli.main(["resume", "photos-32-987", "--epochs", "4", "--threads", "1", "--data-dir", "moved"]) == 0
    assert cli.main(["evaluate", "photos-32-987", "--threads", "1"]) == 0  # where they are now is known by now
    assert cli.main(["train", "moved@32", *CHANGES, "--epochs", "4"]) == 0
    ends = (tmp_path / "runs" / name / "checkpoints" / "last.safetensors" for name in ("photos-32-987", "moved-32-987"))
    one, two = map(load_file, ends)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_predictions_of_the_test_pictures_are_as_right_as_the_summary_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "set" / "train", count=15, size=(50, 40))
    write(tmp_path / "set" / "test", count=7, seed=1, size=(40, 70))
    assert cli.main(["train", "set", *CHANGES]) == 0
    summary = Run(tmp_path / "runs" / "set-987").summary
    (tmp_path / "set" / "train").rename(tmp_path / "elsewhere")  # the run's folder alone says all that is needed
    capsys.readouterr()
    assert cli.main(["predict", "set-987", "set/test", "--threads", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [path for *_, path in lines] == [str(path) for path in sorted(Path("set/test").glob("*/*"))]
    assert len(lines) == 21
    right = [label == Path(path).parent.name for label, _, path in lines]
    assert sum(right) / 21 == pytest.approx(summary["test/accuracy"])
    assert sum(right) > 0
    assert all(1 / 3 <= float(probability) <= 1 for _, probability, _ in lines)
    one = next((tmp_path / "set" / "test" / "red").iterdir())
    assert cli.main(["predict", "set-987", str(one), "--tta", "mirror", "--checkpoint", "best", "--threads", "1"]) == 0
    shown = capsys.readouterr()
    assert "--tta mirror shows mirror images, and this run was trained without" in shown.err
    assert shown.out.endswith(f"{one}\n")
    assert cli.main(["predict", "set-987", str(one), "--top", "9", "--threads", "1"]) == 0
    *three, path = capsys.readouterr().out.split()
    assert path == str(one)
    assert sorted(three[::2]) == sorted(COLORS)
    assert sum(map(float, three[1::2])) == pytest.approx(1, abs=2e-4)
    assert cli.main(["predict", "set-987", str(one), "--top", "2", "--json", "--threads", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["picture"] == str(one)
    assert list(told["classes"]) == three[:3:2]
    assert cli.main(["predict", "set-987", str(one), "--top", "0"]) == 2
    assert "--top: 0 is not a whole number from 1 to 999,999,999" in capsys.readouterr().err
    for wrong, said in (
        ("nowhere", "1 of 1 picture cannot be read (No such file or directory: nowhere)"),
        ("runs/set-987/checkpoints", "checkpoints: no pictures"),
        ("runs/set-987/recipe.toml", "1 of 1 picture cannot be read"),
    ):
        assert cli.main(["predict", "set-987", wrong]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "new\x1b[31m\n").mkdir()
    shutil.copy(one, tmp_path / "new\x1b[31m\n")
    (tmp_path / "new\x1b[31m\n" / "b.HEIC").write_bytes(b"")
    assert cli.main(["predict", "set-987", "new\x1b[31m\n", "--threads", "1"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0].endswith(f"  new\\x1b[31m\\n/{one.name}")
    assert "not read, 1 of .heic: b.HEIC" in told.err
    (tmp_path / "set" / "test" / "red" / "half.png").write_bytes(one.read_bytes()[:200])
    assert cli.main(["predict", "set-987", "set/test", "--threads", "1"]) == 2
    told = capsys.readouterr()
    assert [line.split() for line in told.out.splitlines()] == lines
    assert ": set/test/red/half.png)" in told.err
    last = tmp_path / "runs" / "set-987" / "checkpoints" / "last.safetensors"
    found = checkpoint.load(last)
    for tensor in found.tensors.values():
        tensor.fill_(float("nan"))
    checkpoint.save(last.parent, found, keep=1)
    assert cli.main(["predict", "set-987", str(one), "--threads", "1"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "outputs are no numbers: its weights are too large to compute with; try --checkpoint best" in told.err


def test_what_a_training_on_pictures_says_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val", "test"):
        write(tmp_path / "set" / split, count=4, seed=len(split))
    assert cli.main(["train", "set", *CHANGES]) == 0
    assert "  3 classes: blue, green, red\n" in capsys.readouterr().out
    assert cli.main(["train", "set", *CHANGES, "--validation.fraction", "0.4"]) == 2
    assert "holds nothing out: " in capsys.readouterr().err


def test_a_picture_that_is_left_out_does_not_decide_the_size(tmp_path):
    folder = write(tmp_path / "set", count=10, size=(28, 28))
    painted("red", 0, size=(200, 100)).save(folder / "red" / "x.png")
    (folder / "red" / "x.png").write_bytes((folder / "red" / "x.png").read_bytes()[:-200])
    images = load_images(folder)
    assert images.image_shape == (28, 28, 3)
    assert [note[:9] for note in images.notes] == ["left out:", "no folder"]


def test_copies_of_one_picture_leave_too_few_for_validation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("set", "test"), count=4)
    for color in COLORS:
        Path("set", "train", color).mkdir(parents=True)
        for n in range(5):
            painted(color, 7).save(Path("set", "train", color, f"{n}.png"))
    assert cli.main(["train", "set", *CHANGES]) == 2
    assert "only 0 images can be held out for validation, where two are needed" in capsys.readouterr().err
    for n in range(2, 5):
        Path("set", "train", "red", f"{n}.png").unlink()
    painted("red", 8).save(Path("set", "train", "red", "1.png"))
    assert cli.main(["train", "set", *CHANGES]) == 2
    assert "only 1 image can be held out for validation, where two are needed" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_what_the_benchmark_gives_to_keras_are_the_pictures_that_fromzero_has(tmp_path):
    folder = write(tmp_path / "set", count=10)
    images = load_images(folder)
    for name, part in (("train", images.train), ("test", images.test)):
        paths, labels = parts_of(folder)[name]
        assert [np.asarray(Image.open(path)).tolist() for path in paths] == part.pixels.tolist()
        assert [images.class_names[label] for label in labels] == [Path(path).parent.name for path in paths]


def test_a_path_may_have_the_signs_of_options(tmp_path):
    folder = write(tmp_path / "me@64:5" / "photos", count=5)
    assert split_name(f"{folder}@16:12") == (str(folder), "@16:12")
    assert split_name(str(folder)) == (str(folder), "")
    assert split_name(str(folder.parent)) == (str(folder.parent), "")
    sized = folder.parent / f"{folder.name}@16"
    sized.mkdir()
    assert split_name(f"{sized}:12") == (str(sized), ":12")  # which load_images takes, too
    sized.rmdir()
    assert load_images(f"{folder}@16").image_shape == (16, 16, 3)


def test_the_recipe_in_the_run_folder_names_the_pictures_that_were_handed_in(tmp_path):
    images = load_images(f"{write(tmp_path / 'photos', count=5)}@16")
    recipe = load_recipe("train1").override({"epochs": 1, "network.channels": [[2]]})
    assert recipe.dataset == "cifar10"
    training = new_training(recipe, images, runs_dir=tmp_path, threads=1)
    training.close()
    assert load_images(training.run.recipe.dataset).fingerprints == images.fingerprints


def test_what_became_of_a_runs_pictures_is_said(tmp_path, monkeypatch, capsys):
    write(tmp_path / "set", count=10)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "set", *CHANGES]) == 0
    (run,) = list_runs(tmp_path / "runs")
    path = str(run.path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a path that began here would lead to other pictures
    assert load_images(run.recipe.dataset).fingerprints == run.provenance["data"]["fingerprints"]
    assert cli.main(["evaluate", path, "--data-dir", "nowhere"]) == 2
    assert "data folder nowhere is not there; the images of" in capsys.readouterr().err
    other = write(tmp_path / "other", count=10, seed=7)
    assert cli.main(["evaluate", path, "--data-dir", str(other)]) == 1
    assert (
        f"or train anew on them: fromzero train {other} --recipe {path}/recipe.toml; other" in capsys.readouterr().err
    )
    (tmp_path / "set" / "red").rename(tmp_path / "set" / "a red")  # the first class now
    assert cli.main(["evaluate", path]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}/set has 1 class that it was not trained on (a red) and has none called red" in said
    assert f"fromzero train --recipe {path}/recipe.toml --from {path} --partial" in said
    assert cli.main(["evaluate", path, str(other / "red")]) == 2
    said = capsys.readouterr().err
    assert "10 pictures in it, and in no class folder; expected" in said
    assert f"red is a class: name the folder that it lies in, {other}" in said


def test_pictures_come_as_files_bytes_or_what_pillow_has_read(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "set", count=10)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "set", *CHANGES, "--run-name", "mine"]) == 0
    assert [run.name for run in list_runs()] == ["mine"]
    classifier, path = load_classifier("mine"), folder / "red" / "003.png"
    content = path.read_bytes()
    with path.open("rb") as file, Image.open(path) as opened:
        pixels, read, wrong = classifier.read([path, str(path), content, io.BytesIO(content), file, opened, b"no"])
    assert (read, [*wrong]) == ([0, 1, 2, 3, 4, 5], [6])
    _, read, wrong = classifier.read([file, path])
    assert (read, wrong[0].why) == ([1], "read of closed file")
    for one in (path, content, io.BytesIO(content)):
        with pytest.raises(InputError, match="expected a list of pictures"):
            classifier.read(one)
    assert all(torch.equal(one, pixels[0]) for one in pixels)
    with pytest.raises(InputError, match="expected paths, bytes, binary files or Pillow's images, found int"):
        classifier.read([path, 3])
    assert classifier.predict(pixels[:0]).shape == (0, 3)
    for odd in (["a.png"], pixels[0], pixels.float(), np.zeros((2, 3))):
        with pytest.raises(InputError, match=r"expected pixels uint8 \(N, "):
            classifier.predict(odd)
    capsys.readouterr()
    assert cli.main(["predict", "mine", str(path), "--threads", "1"]) == 0
    expected = capsys.readouterr().out.replace(str(path), "-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert cli.main(["predict", "mine", "-", "--threads", "1"]) == 0
    assert capsys.readouterr().out == expected
    shutil.copy(path, tmp_path / "-")
    assert cli.main(["predict", "mine", "./-", "--threads", "1"]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(["predict", "mine", "-"]) == 2
    assert "-: there is no standard input" in capsys.readouterr().err
    for name in ("a/b", ""):
        assert cli.main(["train", "set", *CHANGES, "--run-name", name]) == 2
    assert "is to be the name of a folder" in capsys.readouterr().err


def test_a_page_does_not_go_among_pictures(tmp_path, monkeypatch, capsys):
    write(tmp_path / "set", count=10)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "set", *CHANGES, "--run-name", "mine"]) == 0
    assert cli.main(["report", "mine", "set"]) == 2
    assert "set: is a folder of pictures, which fromzero evaluate runs/mine set scores" in capsys.readouterr().err
    (tmp_path / "apart" / "test" / "red").mkdir(parents=True)
    for place in ("apart", "set/red"):
        assert cli.main(["report", "mine", place]) == 2
    assert not [*tmp_path.glob("**/report.html")]
    (tmp_path / "runs" / "mine" / "red").mkdir()  # its own folder may hold what it likes
    assert cli.main(["report", "mine"]) == 0
    assert cli.main(["report", "mine", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()


def test_names_that_may_mean_another_thing_are_told(tmp_path, monkeypatch, capsys):
    """A folder called as a split, or as a data set that is known by name; a text where a list belongs."""
    folder = write(tmp_path / "set", count=10)
    (folder / "red").rename(folder / "test")
    assert "the folder test, without folders in it, is a class here and no split" in load_images(folder).notes
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "set", *CHANGES]) == 0
    (run,) = list_runs()
    with pytest.raises(InputError, match="expected a list of pictures"):
        load_classifier(run).read("set/test/000.png")
    (tmp_path / "broken.png").write_bytes(b"")
    capsys.readouterr()
    pictures = ["set/test/000.png", "broken.png"]
    assert cli.main(["predict", str(run.path), *pictures, "--json", "--threads", "1"]) == 2
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["classes"].keys() == {"blue", "green", "test"}
    assert second == {"picture": "broken.png", "error": "empty"}
    (tmp_path / "digits").mkdir()
    with pytest.warns(UserWarning, match=r"digits is the data set of that name; for the folder: \./digits"):
        load_images("digits")
