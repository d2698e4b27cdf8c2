"""Two runs compared image by image: what differs, what is counted, and what is not claimed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fromzero
from fromzero import cli, compare
from fromzero.changes import differing_fields
from fromzero.compare import compare_runs, comparison_text
from fromzero.errors import FromzeroError, InputError
from fromzero.evaluate import evaluate
from fromzero.runs import Run
from fromzero.stats import compare_on_images
from fromzero.study.definition import load_study
from fromzero.trained import load_trained

SMALL = {"epochs": 2, "network.channels": [[8], [8]], "batch_size": 50}


def train(changes, images, folder):
    recipe = fromzero.load_recipe("few").override(SMALL | changes)
    return fromzero.train(recipe, images, runs_dir=folder, threads=1)


@pytest.fixture(scope="module")
def digits():
    return fromzero.load_images("digits")


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Three runs on the digits: the first, with another seed, and with half of the validation images."""
    folder = tmp_path_factory.mktemp("runs")
    changes = ({}, {"seed": 1}, {"validation.fraction": 0.1, "label_smoothing": 0.0})
    return [train(change, digits, folder) for change in changes]


def correct(run, images):
    side = load_trained(run, images=images)
    found = evaluate(side.network, *side.data.validation, side.data.normalise, side.machine)
    return (found.predictions == found.labels).numpy(), side.data.validation


def test_what_is_counted_is_what_evaluating_says(runs, digits):
    first, second = correct(runs[0], digits)[0], correct(runs[1], digits)[0]
    record = compare_runs(runs[0], runs[1])
    assert record["images"] == len(first)
    assert [run["accuracy"] for run in record["runs"]] == pytest.approx([first.mean(), second.mean()])
    assert record["only_first"] == (first & ~second).sum() > 0
    assert record["only_second"] == (second & ~first).sum()
    assert record["difference"]["mean"] == pytest.approx(second.mean() - first.mean())
    assert record["recipe"] == {"seed": (0, 1)}
    assert record["study"] is None
    assert "Their recipes are the same, but for the seed." in comparison_text(record)
    back = compare_runs(runs[1], runs[0])
    assert back["difference"]["mean"] == -record["difference"]["mean"]
    assert back["p"] == record["p"]


def test_images_are_compared_that_both_held_out(runs, digits):
    record = compare_runs(runs[0], runs[2])
    (ours, larger), (theirs, smaller) = correct(runs[0], digits), correct(runs[2], digits)
    of = {pixels.numpy().tobytes(): right for pixels, right in zip(larger.pixels, ours, strict=True)}
    in_both = [i for i, pixels in enumerate(smaller.pixels) if pixels.numpy().tobytes() in of]
    assert 2 <= record["images"] == len(in_both) < len(larger.labels)
    assert record["runs"][1]["accuracy"] == pytest.approx(theirs[in_both].mean())
    assert record["runs"][0]["accuracy"] == pytest.approx(
        np.mean([of[smaller.pixels[i].numpy().tobytes()] for i in in_both])
    )


def test_of_other_train_images_is_said_what_would_tell(runs, digits):
    record = compare_runs(runs[0], runs[1])
    said = "Which train images are better takes several seeds of each"
    assert said not in comparison_text(record)
    assert said in comparison_text(record | {"others": {"train images": ("a", "b")}})


def test_the_study_that_decides_is_written_and_can_be_carried_out(runs):
    record = compare_runs(runs[0], runs[2])
    assert record["study"]["command"].startswith(f"fromzero study {record['study']['file']}")
    study = load_study(record["study"]["file"])
    first, second = study.arms.values()
    assert first.recipe.label_smoothing == runs[0].recipe.label_smoothing
    assert second.recipe.label_smoothing == 0
    assert first.recipe.validation == second.recipe.validation == runs[0].recipe.validation
    assert [contrast.direction for contrast in study.contrasts] == ["higher"]
    text = comparison_text(record)
    assert "Which way to train is better they cannot tell" in text
    assert record["study"]["command"] in text


def test_runs_without_common_images_are_refused(runs, tiny_images, digits, tmp_path):
    other = train({}, tiny_images, tmp_path)
    with pytest.raises(InputError, match="are the same run"):
        compare_runs(runs[0], runs[0])
    with pytest.raises(FromzeroError, match="have no class in common: nothing compares them"):
        compare_runs(runs[0], other)
    on_test = train({"validation.source": "test"}, digits, tmp_path)
    with pytest.raises(FromzeroError, match="no validation images in common"):
        compare_runs(runs[0], on_test)


def compare_runs_on(images, one, two):
    """As `compare_runs`, of runs whose images cannot be loaded by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fromzero.compare.load_trained", lambda run, *_, **__: load_trained(run, images=images[run.path]))
        return compare_runs(one, two)


def test_equal_images_at_other_places_are_known(runs, digits, tmp_path):
    back = replace(digits, train=digits.train.take(np.arange(len(digits.train))[::-1].copy()))
    other = train({}, back, tmp_path)
    record = compare_runs_on({runs[0].path: digits, other.path: back}, runs[0], other)
    ours = {pixels.tobytes() for pixels in correct(runs[0], digits)[1].pixels.numpy()}
    theirs = {pixels.tobytes() for pixels in correct(other, back)[1].pixels.numpy()}
    assert 2 <= record["images"] == len(ours & theirs) < len(ours)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of pictures with a folder for each of two classes, and one to score on."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 40), ("fresh", 10)):
        for value, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(60 * value, 140 + 60 * value, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def test_pictures_of_another_size_are_the_same_pictures(photos, tmp_path, capsys):
    sizes = [fromzero.load_images(f"{photos / 'train'}{size}") for size in ("", "@24")]
    runs = [train({}, images, tmp_path) for images in sizes]
    record = compare_runs(*runs)
    assert record["images"] == 12  # a fifth of what is left by the test images
    assert record["study"] is None  # whose arms have the same images
    assert list(record["recipe"]) == ["dataset"]
    text = comparison_text(record)
    assert "they cannot tell: other seeds make other networks. Nor can a study, whose runs share their images." in text
    assert f"fromzero cross-validate {runs[0].path} and fromzero cross-validate {runs[1].path}" in text
    smaller = train({"label_smoothing": 0.0}, sizes[1], tmp_path)
    assert compare_runs(runs[0], smaller)["study"] is None
    fresh = shutil.copytree(photos / "fresh", tmp_path / "fresh")
    (fresh / "dark" / "0.png").write_bytes(b"no picture")  # a twentieth, which may be left out
    assert cli.main(["compare", *(str(run.path) for run in runs), str(fresh), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["images"] == 19
    assert any("0.png" in note for note in record["notes"])


def test_recipes_as_they_come_are_called_by_their_names(runs, tmp_path):
    """Without training them: what the study says depends on recipes alone."""
    named = []
    for name in ("few", "strong"):
        run = shutil.copytree(runs[0].path, tmp_path / name)
        (run / "recipe.toml").write_text(fromzero.load_recipe(name).override({"dataset": "digits"}).to_toml())
        named.append(Run(run))
    changes = compare._recipe_changes(*named)
    study = load_study(compare._write_study(*named, changes, "digits"))
    assert study.claim == "strong reaches a higher validation accuracy than few."
    assert list(study.arms) == ["few", "strong"]
    assert study.arms["strong"].recipe.epochs == 12


def test_what_a_study_cannot_tell_is_said_beside_it(runs, digits, tmp_path):
    onward = fromzero.new_training(
        fromzero.load_recipe("few").override(SMALL | {"clean_train_images": 100, "label_smoothing": 0.0}),
        digits,
        runs_dir=tmp_path,
        start_from=runs[1],
        threads=1,
    )
    for _ in onward:
        pass
    record = compare_runs(runs[0], onward.run)
    assert not any("weights" in note for note in record["notes"])  # which held out the same images
    assert record["study_leaves_aside"] == ["clean_train_images", "begun with"]
    assert "its runs do not differ, as A and B do, in clean_train_images, begun with" in comparison_text(record)
    study = load_study(record["study"]["file"])
    assert study.claim == "With label_smoothing = 0 validation accuracy is higher than without."
    first, second = (arm.recipe for arm in study.arms.values())
    assert list(differing_fields(first, second)) == ["label_smoothing"]
    seen = fromzero.new_training(onward.recipe, digits, runs_dir=tmp_path, start_from=runs[2], threads=1)
    for _ in seen:
        pass
    (note,) = (note for note in compare_runs(runs[0], seen.run)["notes"] if "weights" in note)
    assert f"validation images are train images of {runs[2].path}, with whose weights it began" in note
    measured = train({"clean_train_images": 100}, digits, tmp_path)
    assert compare_runs(runs[0], measured)["study"] is None


def test_of_other_pictures_in_train_more_seeds_tell_and_of_other_sizes_cross_validation(photos, tmp_path):
    mended = shutil.copytree(photos / "train", tmp_path / "mended")
    moved = next((mended / "light").iterdir())
    moved.rename(mended / "dark" / f"moved-{moved.name}")
    one, two, larger = (
        train({}, fromzero.load_images(f"{name}"), tmp_path)
        for name in (photos / "train", mended, f"{photos / 'train'}@24")
    )
    told = comparison_text(compare_runs(one, two, photos / "fresh"))
    assert "Nor can a study, whose runs share their pictures: several seeds of each can, on pictures that none" in told
    assert "cross-validate" not in told
    assert f"fromzero cross-validate {larger.path}" in comparison_text(compare_runs(one, larger))


def test_a_classifier_takes_arrays_and_says_what_it_does_not_take(runs, digits):
    classifier = fromzero.load_classifier(runs[0])
    pixels = digits.test.pixels[:5]
    assert torch.equal(classifier.predict(pixels), classifier.predict(torch.from_numpy(pixels)))
    for wrong, found in ((pixels / 255, r"float64 \(5, 32, 32, 3\)"), (pixels[0], r"uint8 \(32, 32, 3\)")):
        with pytest.raises(InputError, match=rf"expected pixels uint8 \(N, 32, 32, 3\), found {found}"):
            classifier.predict(wrong)
    assert repr(digits) == "<digits: 1,438 train, 359 test images 32×32×3, 10 classes>"
    assert repr(digits.test) == "<359 images 32×32×3>"


def test_runs_of_some_classes_in_common_are_sent_to_pictures_of_those(runs, tmp_path):
    one, two = runs[0], tmp_path / "two"
    shutil.copytree(one.path, two)
    provenance = one.provenance
    provenance["data"]["classes"][1:] = [f"another {name}" for name in provenance["data"]["classes"][1:]]
    (two / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(FromzeroError, match=r"their classes differ .* on pictures of classes that both have: fromzero"):
        compare_runs(one, Run(two))


def test_other_switches_are_a_difference(runs, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert compare_runs(runs[0], train({}, digits, tmp_path))["others"] == {
        "switches": ("none", "ONEDNN_MAX_CPU_ISA=AVX2")
    }


def test_another_study_of_that_name_is_left_alone(runs):
    path = Path(compare_runs(runs[0], runs[2])["study"]["file"])
    path.write_text("another one")
    other = compare_runs(runs[0], runs[2])["study"]["file"]
    assert other == str(path.with_name(f"{path.stem}-2.toml"))
    assert path.read_text() == "another one"
    assert compare_runs(runs[0], runs[2])["study"]["file"] == other


def test_where_no_study_can_be_written_the_comparison_is_told_all_the_same(runs, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fromzero.compare.write_atomically", full)
    for path in runs[0].path.glob("*against*"):
        path.unlink()
    record = compare_runs(runs[0], runs[2])
    assert record["study"] is None
    assert any("No space left on device" in note for note in record["notes"])
    assert "cannot tell: other seeds make other networks.\n" in comparison_text(record) + "\n"


def test_one_name_of_a_class_spelled_in_two_ways_is_one_class(photos, tmp_path):
    runs = []
    for name in ("ros\u00e9", "rose\u0301"):
        folder = shutil.copytree(photos / "train", tmp_path / f"photos{len(runs)}")
        (folder / "light").rename(folder / name)
        runs.append(train({}, fromzero.load_images(folder), tmp_path))
    assert compare_runs(*runs)["images"] == runs[0].provenance["data"]["subsets"]["validation"]


def test_copies_count_once(photos, tmp_path):
    images = fromzero.load_images(photos / "train")
    runs = [train(changes, images, tmp_path) for changes in ({}, {"seed": 1})]
    once = compare_runs(*runs, photos / "fresh")
    for path in sorted((photos / "fresh" / "light").iterdir()):
        for number in range(3):
            shutil.copy(path, path.with_name(f"copy-{number}-{path.name}"))
    again = compare_runs(*runs, photos / "fresh")
    assert [again[key] for key in ("images", "only_first", "p")] == [once[key] for key in ("images", "only_first", "p")]
    assert "30 more images are copies, to the byte; each picture counts once" in again["notes"]


@pytest.mark.parametrize(
    ("only", "of", "said"),
    [
        ((3, 0), 100, "They differ on too few images to be told apart: that takes 6 at least."),
        ((6, 5), 100, "These images do not tell the two networks apart."),
        ((5, 1), 100, "These images do not tell the two networks apart."),
        ((3, 11), 1000, "These images do not quite tell the two networks apart."),
        ((3, 12), 1000, "These images tell the two networks apart: B is right more often."),
        ((12, 3), 1000, "These images tell the two networks apart: A is right more often."),
    ],
)
def test_the_verdict_follows_p(runs, only, of, said):
    first, second = np.zeros(of, bool), np.zeros(of, bool)
    first[: only[0]], second[only[0] : sum(only)] = True, True
    found = compare_on_images(first, second)
    record = compare_runs(runs[0], runs[1]) | found._asdict() | {"difference": found.difference._asdict()}
    assert said in comparison_text(record)


def test_a_picture_in_another_class_is_another_one(photos, tmp_path):
    folders = [shutil.copytree(photos / "train", tmp_path / name / "photos") for name in ("before", "after")]
    for path in sorted((folders[1] / "dark").iterdir()):
        path.rename(folders[1] / "light" / f"moved-{path.name}")
    for number in range(40):  # so that there is a class of that name
        shutil.copy(photos / "train" / "light" / f"{number}.png", folders[1] / "dark" / f"{number}.png")
    for path in sorted((folders[1] / "light").glob("[0-9]*")):
        path.unlink()
    runs = [train({}, fromzero.load_images(folder), tmp_path) for folder in folders]
    with pytest.raises(FromzeroError, match="no validation images in common"):
        compare_runs(*runs)


def test_how_far_a_run_has_come_is_a_difference(runs, digits, tmp_path):
    going = fromzero.new_training(runs[0].recipe, digits, runs_dir=tmp_path, threads=1)
    for progress in going:
        if progress.row:
            going.save()
            break
    record = compare_runs(runs[0], going.run)
    assert record["others"] == {"epochs to go": (0, 1)}
    assert "from A to B: epochs to go 0 → 1" in comparison_text(record)
    assert any(note.startswith("B: the run has not ended") for note in record["notes"])


def test_best_weights_and_unended_runs_are_said_to_be(runs, digits, tmp_path):
    assert any("flatter" in note for note in compare_runs(*runs[:2], which="best")["notes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(runs[1]), "summary", None)
        assert "A: the run has not ended" in comparison_text(compare_runs(*runs[:2]))
