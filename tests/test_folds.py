"""Cross-validation: each train image judged once, by a network that has not seen it; and the labels it doubts."""

import csv
import html
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import fromzero
from fromzero import cli
from fromzero.data import stratified_folds
from fromzero.errors import FromzeroError, InputError, StoppedError
from fromzero.evaluate import outputs
from fromzero.runs import Run
from fromzero.splits import Data, validation_label
from fromzero.study import display, execution, folds
from fromzero.study.pools import Event
from fromzero.trained import load_trained

SMALL = {"epochs": 8, "network.channels": [[16], [32]], "batch_size": 50, "augment.flip": "none"}
CLASSES, WRONG = 4, 20  # wrong labels planted among the train pictures


def test_folds_are_a_partition_and_each_class_is_spread_evenly():
    labels = np.repeat(np.arange(4), (10, 41, 100, 3))
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    keys = np.random.default_rng(1).permutation(len(labels))
    found = stratified_folds(labels, 5, keys)
    counts = np.array([np.bincount(found[labels == label], minlength=5) for label in range(4)])
    assert (counts.max(1) - counts.min(1) <= 1).all()
    assert counts.sum(0).max() - counts.sum(0).min() <= 1
    assert counts.sum() == len(labels)
    assert found.tolist() != stratified_folds(labels, 5, keys[::-1]).tolist()


def test_copies_share_a_fold_and_a_class_of_one_picture_is_in_none():
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 2])
    keys = np.array([7, 7, 3, 9, 3, 4, 4, 1], np.uint64)
    found = stratified_folds(labels, 2, keys)
    assert found[0] == found[1]
    assert found[2] == found[4]
    assert {*found[:5].tolist()} == {0, 1}
    assert found[5:].tolist() == [-1, -1, -1]


def test_a_picture_in_two_classes_is_judged_by_a_network_that_has_not_seen_it():
    keys = np.random.default_rng(0).permutation(40).astype(np.uint64)
    labels = np.repeat([0, 1], 20)
    keys[20:24] = keys[:4]
    found = stratified_folds(labels, 5, keys)
    assert found[20:24].tolist() == found[:4].tolist()
    assert all(set(found[labels == label]) == set(range(5)) for label in (0, 1))


@pytest.mark.parametrize("with_own", [False, True])
def test_the_folds_of_a_recipe_hold_out_each_train_image_once(digits, with_own):
    images = replace(digits, validation=digits.test) if with_own else digits
    recipe = fromzero.load_recipe("few").override(SMALL | {"validation.source": "fold", "validation.folds": 3})
    held = []
    for fold in (1, 2, 3):
        one = recipe.override({"validation.fold": fold})
        data = Data.of(one, images, "cpu")
        assert data.held is not None
        assert len(data.train.labels) + len(data.held) == len(images.train)
        assert (data.validation.pixels.numpy() == images.train.pixels[data.held]).all()
        assert validation_label(one, images) == f"validation = fold {fold} of 3 of the train images, held out"
        held += data.held.tolist()
    assert sorted(held) == list(range(len(images.train)))


@pytest.fixture(scope="module")
def digits():
    return fromzero.load_images("digits")


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory):
    """A folder of pictures of four digits, of which 20 in train are in another class's folder, and who these are."""
    folder, wrong = tmp_path_factory.mktemp("pictures"), set()
    for split, part in (("train", digits.train), ("test", digits.test)):
        for index in np.flatnonzero(part.labels < CLASSES).tolist():
            label = int(part.labels[index])
            if split == "train" and len(wrong) < WRONG and index % 11 == 0:
                label = (label + 1) % CLASSES
                wrong.add(f"train/{label}/{index}.png")
            path = folder / split / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part.pixels[index]).save(path)
    assert len(wrong) == WRONG
    return folder, wrong


@pytest.fixture(scope="module")
def done(pictures, tmp_path_factory):
    """A run on them, cross-validated: the run, what happened, and what was said."""
    folder = tmp_path_factory.mktemp("runs")
    images = fromzero.load_images(str(pictures[0]))
    recipe = fromzero.load_recipe("few").override(SMALL | {"dataset": str(pictures[0])})
    run = fromzero.train(recipe, images, runs_dir=folder, threads=1)
    prepared = folds.prepare_folds(run, 3, jobs=2)
    happened = [(event.kind, event.cell.name) for event in prepared]
    return run, happened, folds.fold_result(prepared)


def labels_csv(run):
    return list(csv.DictReader((run.path / "folds" / "labels.csv").read_text("utf-8").splitlines()))


def test_wrong_labels_are_the_most_doubtful(done, pictures):
    run, _, result = done
    listed = [row["file"] for row in result["doubtful"]]
    found = [len(pictures[1] & {*listed[:first]}) for first in (10, 2 * WRONG)]
    assert found[0] >= 7, "of the first ten; by chance none"
    assert found[1] >= 15, "of the 20 planted"
    table = labels_csv(run)
    images = fromzero.load_images(str(pictures[0]))
    assert sorted(row["file"] for row in table) == sorted(images.train.files)
    probabilities = [float(row["label_probability"]) for row in table]
    assert probabilities == sorted(probabilities)
    for row in table[:5]:
        at = int(row["image"])
        assert images.train.files[at] == row["file"]
        assert images.class_names[images.train.labels[at]] == row["label"] == row["file"].split("/")[1]
    assert result["surest"]["of"] == 58
    assert result["surest"]["wrong"] / 58 < 0.15  # of a thirtieth; a tenth of the images are few


def test_what_is_said_is_said_by_networks_that_did_not_see_it(done, pictures):
    run, _, result = done
    images = fromzero.load_images(str(pictures[0]))
    rows = {int(row["image"]): row for row in labels_csv(run)}
    right = 0
    for fold in (1, 2, 3):
        trained = load_trained(Run(run.path / "folds" / "of-3" / f"fold-{fold}"), images=images, threads=1)
        data = trained.data
        said = outputs(trained.network, data.validation.pixels, data.normalise, trained.machine).softmax(1)
        accuracy = (said.argmax(1) == data.validation.labels).double().mean().item()
        assert accuracy == pytest.approx(trained.run.summary["val/accuracy"])
        assert accuracy == pytest.approx(result["by_fold"][fold - 1])
        right += round(accuracy * len(data.held))
        for at, label, these in zip(data.held.tolist(), data.validation.labels.tolist(), said, strict=True):
            assert rows[at]["fold"] == str(fold)
            assert float(rows[at]["label_probability"]) == pytest.approx(these[label].item(), abs=1e-5)
            assert rows[at]["looks_like"] == images.class_names[these.argmax()]
    assert result["images"] == len(images.train) == sum(one["images"] for one in result["by_class"].values())
    assert result["accuracy"] == pytest.approx(right / len(images.train))
    mean = sum(one["images"] * one["accuracy"] for one in result["by_class"].values()) / result["images"]
    assert mean == pytest.approx(result["accuracy"])


def test_a_folds_run_is_an_ordinary_run(done, pictures, tmp_path):
    run = Run(done[0].path / "folds" / "of-3" / "fold-2")
    by_hand = fromzero.train(run.recipe, fromzero.load_images(str(pictures[0])), runs_dir=tmp_path, threads=1)
    assert [row["val/loss"] for row in by_hand.metrics()] == [row["val/loss"] for row in run.metrics()]
    assert run.recipe.validation.fold == 2
    assert run.provenance["data"]["held_out"] != done[0].provenance["data"]["held_out"]


def test_again_nothing_is_trained_but_what_is_missing(done, tmp_path):
    shutil.copytree(done[0].path, tmp_path / "run")
    run = Run(tmp_path / "run")
    again = folds.prepare_folds(run, 3, jobs=1)
    assert [event.kind for event in again] == ["finished"] * 3
    assert folds.fold_result(again) == done[2]
    weights = run.path / "folds" / "of-3" / "fold-3" / "checkpoints" / "last.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    happened = [event for event in again if event.kind != "progress"]
    assert [event.text for event in happened if event.kind == "note"] == [
        "fold-3: its weights, which are needed, are gone or damaged: trained anew, the old run is set-aside/fold-3-1"
    ]
    assert [event.cell.name for event in happened if event.kind == "finished"] == ["fold-1", "fold-2", "fold-3"]
    assert folds.fold_result(again) == done[2]


def test_a_fold_that_an_earlier_fromzero_made_of_other_images_is_trained_anew(done, tmp_path):
    shutil.copytree(done[0].path, tmp_path / "run")
    again = folds.prepare_folds(Run(tmp_path / "run"), 3, device="cpu", jobs=2, threads=1)
    fold = Run(again.cells[1].path)
    provenance = fold.provenance
    provenance["data"]["held_out"] = "0" * 64
    fold.write_provenance(provenance)
    notes = [event.text for event in again if event.kind == "note"]
    assert notes == ["fold-2: an earlier fromzero made other folds: trained anew, the old run is set-aside/fold-2-1"]
    assert folds.fold_result(again) == done[2]


def test_another_number_of_folds_leaves_the_others_alone(done, tmp_path):
    shutil.copytree(done[0].path, tmp_path / "run")
    run = Run(tmp_path / "run")
    two = folds.prepare_folds(run, 2, jobs=16)
    assert two.jobs == 2
    assert not [event.text for event in two if event.kind in ("note", "failed")]
    result = folds.fold_result(two)
    assert len(result["by_fold"]) == result["folds"] == 2
    assert result["images"] == done[2]["images"]
    assert run.cross_validation == result
    three = folds.prepare_folds(run, 3)
    assert [event.kind for event in three] == ["finished"] * 3
    assert folds.fold_result(three) == done[2] == run.cross_validation


def test_copies_and_a_class_of_one_picture(digits, tmp_path):
    """Copies share a fold whatever the images come from; what cannot be held out is not judged."""
    twice = np.concatenate([np.arange(200), np.arange(200)])
    train = digits.train.take(twice)
    recipe = fromzero.load_recipe("few").override(SMALL | {"validation.source": "fold", "validation.folds": 4})
    images = replace(digits, train=train, fingerprints={"train": "a", "test": "b"})
    for fold in range(1, 5):
        data = Data.of(recipe.override({"validation.fold": fold}), images, "cpu")
        trained_on = {image.tobytes() for image in data.train.pixels.numpy()}
        assert not trained_on & {image.tobytes() for image in data.validation.pixels.numpy()}
    one = np.append(np.flatnonzero(digits.train.labels != 7)[:300], np.flatnonzero(digits.train.labels == 7)[:1])
    folder = tmp_path / "pictures"
    for split, part, chosen in (
        ("train", digits.train, one),
        ("val", digits.test, range(99)),
        ("test", digits.test, one[:99]),
    ):
        for index in chosen:
            path = folder / split / str(part.labels[index]) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part.pixels[index]).save(path)
    own = fromzero.load_recipe("few").override(SMALL | {"epochs": 1, "dataset": str(folder)})
    run = fromzero.train(own, runs_dir=tmp_path / "runs", threads=1)
    found = folds.prepare_folds(run, 2)
    assert list(found)[-1].kind == "finished"
    result = folds.fold_result(found)
    assert (result["images"], result["left_out"]) == (300, 1)
    assert "  1 image not judged: their class has no other picture" in folds.fold_text(found, result)
    named = set(re.findall(r">(\w+)/\d/\d+\.png<", fromzero_page(run.path)))
    assert named == {"train", "val"}


def test_it_is_stopped_and_gone_on_with(done, tmp_path):
    shutil.copytree(done[0].path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "folds")
    found = folds.prepare_folds(Run(tmp_path / "run"), 3, jobs=1)
    with pytest.raises(StoppedError, match=r"every run is saved; go on with: fromzero cross-validate .*run --folds 3"):
        for event in found:
            if event.kind == "progress" and 0 < event.share < 1:
                os.kill(os.getpid(), signal.SIGTERM)
    assert list(found)[-1].kind == "finished"
    assert folds.fold_result(found) == done[2]


def test_the_words_say_what_the_figures_are(done):
    run, _, result = done
    found = folds.prepare_folds(run, 3)
    text = folds.fold_text(found, result)
    low, high = result["interval"]
    assert f"accuracy {result['accuracy']:.4f} ({low:.4f}–{high:.4f}, 95 % for {result['images']} images;" in text
    assert f"the run  {run.summary['val/accuracy']:.4f}" in text
    assert len([line for line in text.splitlines() if line.startswith("    labelled ")]) == folds.NAMED
    first = result["doubtful"][0]
    assert f"    labelled {first['label']} ({first['label_probability']:.3f}), looks like {first['looks_like']}" in text
    recalls = [one["accuracy"] for one in sorted(result["by_class"].values(), key=lambda one: one["accuracy"])]
    (line,) = (line for line in text.splitlines() if "by class, lowest first: " in line)
    assert [float(share) for share in line.split()[5::2] for share in [share.strip(",")]] == pytest.approx(
        recalls, abs=1e-3
    )
    assert text.splitlines()[-2] == f"  pictures of these: fromzero report {run.path}"
    odd = result | {"doubtful": [first | {"file": "a\nb.png"}], "left_out": 2}
    odd_text = folds.fold_text(replace(found, data_dir=Path("there")), odd)
    assert "a\\nb.png" in odd_text
    assert "  2 images not judged: their class has no other picture" in odd_text
    assert odd_text.splitlines()[-2] == f"  pictures of these: fromzero report {run.path} --data-dir there"


def test_the_header_says_what_whoever_reads_the_answer_should_know(done):
    run = done[0]
    found = folds.prepare_folds(run, 3, device="cpu", jobs=2, threads=1)
    header = folds.fold_header(found)
    assert header.splitlines()[0].endswith(
        "folds: few with batch_size = 50, network.channels = [[16], [32]], augment.flip = none, 8 epochs, seed 0"
    )
    assert "in 3 folds; 3 runs, each on about 384 of them, 2 at a time, 1 thread each; test images are not" in header
    assert "note: the run" not in header
    assert found.command.endswith("--folds 3 --jobs 2 --threads 1 --device cpu")
    other = SimpleNamespace(
        path=run.path, recipe=run.recipe, provenance={"from": {"run": "other"}}, earlier_ends=[3], seconds=20.0
    )
    other.recipe = other.recipe.override({"validation.fraction": 0.3})  # which the folds do not have
    noted = folds.fold_header(replace(found, run=other, images=replace(found.images, notes=("one is broken",))))
    assert "\n  note: one is broken\n" in noted
    assert "\n  a training like the run's takes 20 s, all in turn 60 s, less with 2 at a time\n" in noted
    assert noted.splitlines()[0] == header.splitlines()[0]
    assert "note: the run began with the weights of another one, and these begin with random ones" in noted
    assert "note: the run was extended; these train 8 epochs at once" in noted


def test_of_a_run_validated_on_the_test_images_nothing_is_set_beside_it(digits, tmp_path):
    recipe = fromzero.load_recipe("few").override(
        SMALL | {"epochs": 1, "validation.source": "test", "dataset": "digits"}
    )
    run = fromzero.train(recipe, digits, runs_dir=tmp_path, threads=1)
    assert folds._own_validation(run) == []


def test_a_diagnosis_says_what_cross_validation_said(done, tmp_path, capsys):
    run, _, result = done
    copy = shutil.copytree(run.path, tmp_path / "run")
    asked = f"fromzero cross-validate {copy} looks for them"  # who has some dozens of validation images
    said = f"Cross-validation said: accuracy {result['accuracy']:.4f} ("
    for damaged in (False, True):
        if damaged:
            (copy / "folds" / "result.json").write_text("{}")
        assert cli.main(["diagnose", str(copy)]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert (said in text) is not damaged
        assert (asked in text) is damaged


def test_what_is_said_of_labels():
    rows = [{"label": label, "looks_like": other} for label, other in ("ab", "ab", "ba", "ca", "cb", "cb", "cb")]
    assert folds._of_labels(rows) == (
        "7 images look like another class than the label's (c like b (3), a like b (2), b like a (1)): all that the"
        " accuracy misses, be it networks' mistakes or wrong labels, which only looking at them can tell"
    )
    assert folds._of_labels(rows[:1]).startswith("1 image looks like another class than the label's")
    assert folds._of_labels([]) == "each image looks like its label's class"


def test_the_report_shows_the_doubtful(done, pictures, tmp_path):
    run, _, result = done
    page = tmp_path / "page.html"
    assert cli.main(["report", str(run.path), str(page)]) == 0
    text = page.read_text("utf-8")
    part = text.split("<h2>Doubtful labels</h2>")[1].split("<h2>")[0]
    assert part.count("<figure>") == min(24, len(result["doubtful"]))
    assert result["doubtful"][0]["file"] in part
    assert result["said_of_labels"] in html.unescape(part)
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "folds" / "result.json").write_text('{"folds": 3}')
    with pytest.warns(UserWarning, match=r"result.json: damaged: recipe: field required; remove it, or write it anew"):
        assert "Doubtful labels" not in fromzero_page(tmp_path / "run")
    (tmp_path / "run" / "folds" / "result.json").write_text(json.dumps(result | {"interval": [0.5]}))
    with pytest.warns(UserWarning, match=r"result.json: damaged: interval: list should have at least 2 items"):
        assert "Doubtful labels" not in fromzero_page(tmp_path / "run")
    (tmp_path / "run" / "folds" / "result.json").write_text(json.dumps(result))
    (tmp_path / "run" / "diagnosis.json").write_text("{")
    with pytest.warns(UserWarning, match=r"diagnosis.json: damaged"):
        assert "Doubtful labels" in fromzero_page(tmp_path / "run")
    (tmp_path / "run" / "diagnosis.json").unlink()
    shutil.rmtree(tmp_path / "run" / "folds")
    assert "Doubtful labels" not in fromzero_page(tmp_path / "run")


def fromzero_page(run):
    from fromzero.report import report

    return report(load_trained(run, threads=1))


def test_cores_that_folds_leave_idle_go_to_their_threads(monkeypatch):
    monkeypatch.setattr(execution, "num_threads", lambda: 16)
    assert execution.jobs_and_threads(None, None, False, 5) == (5, 3)
    assert execution.jobs_and_threads(3, None, False, 5) == (3, 1)
    assert execution.jobs_and_threads(16, 2, False, 5) == (5, 2)
    assert execution.jobs_and_threads(None, None, False) == (16, 1)
    assert execution.jobs_and_threads(None, None, True, 5) == (1, 16)


def test_a_fold_is_as_much_work_as_a_split_of_its_size(digits):
    recipe = fromzero.load_recipe("few").override(SMALL | {"validation.fraction": 0.2})
    of_split = display._work(recipe, digits)
    fold = recipe.override({"validation.source": "fold", "validation.fraction": 0.5})
    assert display._work(fold, digits) == of_split
    own = replace(digits, validation=digits.test)
    assert display._work(fold, own) == of_split != display._work(recipe, own)


def test_bad_input_gets_one_line(done, pictures, tmp_path, capsys):
    run = done[0]
    for arguments, says in (
        (["--folds", "1"], "validation.folds: 1: input should be greater than or equal to 2"),
        (
            ["--folds", "300"],
            "of 300 folds of 576 train images, copies together, one would have 1 image: ask for fewer",
        ),
        (["--folds", "0"], "0 is not a whole number"),
        (["--jobs", "2000"], "--jobs: 2000 is not from 1 to 1024"),
        (["--data-dir", str(tmp_path / "none")], "is not there"),
    ):
        assert cli.main(["cross-validate", str(run.path), *arguments]) == 2
        err = capsys.readouterr().err
        assert says in err, err
        assert err.count("\n") == 1
    assert cli.main(["cross-validate", str(tmp_path)]) == 2
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "folds" / "lock").unlink(missing_ok=True)
    first, second = (folds.prepare_folds(Run(tmp_path / "run"), 3) for _ in range(2))
    going = iter(first)
    next(going)
    with pytest.raises(FromzeroError, match="another process cross-validates this run; wait for it"):
        next(iter(second))
    going.close()


def test_a_failed_fold_is_said(done, monkeypatch):
    found = folds.prepare_folds(done[0], 3)
    monkeypatch.setattr(folds, "is_finished", lambda cell, images: False)
    failing = [Event("failed", found.cells[1], text="its process ended")]
    monkeypatch.setattr(folds, "on_this_machine", lambda *args: iter(failing))
    with pytest.raises(FromzeroError, match=r"folds: fold-2 failed; to try again: fromzero cross-validate"):
        list(found)


def test_a_fold_is_one_of_the_folds():
    with pytest.raises(InputError, match="fold 6 is not one of 5 folds: they are numbered from 1"):
        fromzero.load_recipe("few").override({"validation.fold": 6})
