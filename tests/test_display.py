"""What is printed while a training runs, and when."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fromzero import display, load_recipe
from fromzero.sessions import new_training
from fromzero.stats import wilson_interval
from fromzero.terminal import lasting_console, say
from fromzero.training import Training


@pytest.fixture
def training(tiny_images, tmp_path):
    """200 train images less a tenth in batches of 48: four steps an epoch, two epochs."""
    changes = {"epochs": 2, "batch_size": 48, "network.channels": [[4], [8]], "network.pool": 4, "network.dense": [16]}
    changes |= {"validation.source": "split", "precision": "float32"}
    return new_training(load_recipe("train1").override(changes), tiny_images, runs_dir=tmp_path, threads=1)


def lines(training, **console):
    out = io.StringIO()
    display.watch(training, Console(file=out, width=120, **console))
    return out.getvalue().splitlines()


def test_a_dumb_terminal_has_lines_like_a_file(training, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    first, *epochs, _, _, _, _ = lines(training, force_terminal=True)
    assert first == "  step 1/4 of epoch 1/2 done"
    assert [line[:13] for line in epochs] == ["epoch   1/2  ", "epoch   2/2  "]


def test_without_a_terminal_the_first_step_and_every_epoch_have_a_line(training):
    first, *epochs, result, place, page, wrong = lines(training)
    assert first == "  step 1/4 of epoch 1/2 done"
    assert [line[:13] for line in epochs] == ["epoch   1/2  ", "epoch   2/2  "]
    assert result.startswith("train 0.")
    assert place == f"curves and metrics: {training.run.path}"
    assert page == f"a page about it:    fromzero report {training.run.path}"
    assert wrong == f"what may be wrong:  fromzero diagnose {training.run.path}"


def test_names_are_printed_as_they_are(capsys):
    say(lasting_console(), "photos:100:50 [bold] :dog: 写真\u3000a\xa0b \x1b[2J")
    assert capsys.readouterr().out == "photos:100:50 [bold] :dog: 写真\u3000a\xa0b \\x1b[2J\n"


def test_without_a_terminal_a_long_epoch_has_lines_between(training, monkeypatch):
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    found = [line for line in lines(training) if line.startswith("  step")]
    assert [line.split()[1] for line in found] == [f"{n}/4" for n in (1, 2, 3, 4) * 2]
    pattern = r"  step 3/4 of epoch 2/2  running [01]\.\d{4}  [\d,]+ images/s  \d+ s left"
    assert re.fullmatch(pattern, found[6])


def test_the_display_on_a_terminal_ends_with_the_result_too(training):
    *_, result, place, _, _ = lines(training, force_terminal=True)
    assert "test 0." in result
    assert str(training.run.path) in place


def test_few_validation_images_are_said_to_be(training):
    says = "  note: 20 validation images give an accuracy to within ± 20 points at worst"
    assert f"{says}; --validation.fraction holds out more" in display.header(training).splitlines()
    training.close()


def test_of_a_fold_no_larger_fraction_is_advised(tiny_images, tmp_path):
    changes = {"network.channels": [[4], [8]], "network.pool": 4, "validation.source": "fold"}
    training = new_training(load_recipe("train1").override(changes), tiny_images, runs_dir=tmp_path, threads=1)
    said = display.header(training)
    training.close()
    assert "40 validation images give an accuracy" in said
    assert "--validation.fraction" not in said


def test_the_test_accuracy_has_its_interval(training):
    *_, result, _, _, _ = lines(training)
    share = training.run.summary["test/accuracy"]
    low, high = wilson_interval(share, 40)
    assert f", test {share:.4f} ({low:.4f}–{high:.4f}, 95 %) in " in result


def test_classes_with_few_images_are_named(tiny_images, tmp_path):
    labels = np.array([0] * 150 + [1] * 12 + [2] * 2 + list(range(3, 10)) * 5)
    part = replace(tiny_images.train, labels=labels, pixels=np.zeros((len(labels), 32, 32, 3), np.uint8))
    recipe = load_recipe("train1").override({"validation.source": "split"})
    run = new_training(recipe, replace(tiny_images, train=part), runs_dir=tmp_path)
    run.close()
    lines = display.header(run).splitlines()
    assert lines[1].endswith("; 40 test images")
    assert lines[1].startswith(f"  {len(run.data.train.labels)} of {len(part)} train images from ")
    name = tiny_images.class_names[0]
    note = (
        f"135 train images of '{name}', 1 of '{tiny_images.class_names[2]}': to always say '{name}' is right for 77% of"
    )
    (line,) = (line for line in lines if note in line)
    assert line.endswith("; --logit-adjustment 1 trains for all classes alike")
    adjusted = new_training(
        recipe.override({"logit_adjustment": 1}), replace(tiny_images, train=part), runs_dir=tmp_path
    )
    adjusted.close()
    assert any(line.endswith("of them") for line in display.header(adjusted).splitlines())
    assert not any("no validation image" in line for line in lines)
    rest = replace(part, labels=np.where(labels < 3, 0, labels))
    run = new_training(recipe, replace(tiny_images, train=rest), runs_dir=tmp_path)
    run.close()
    lines = display.header(run).splitlines()
    missing = ", ".join(tiny_images.class_names[1:3])
    assert f"  note: no train image of {missing}" in lines
    assert not any(", 0 of" in line for line in lines)
    own = replace(tiny_images, validation=tiny_images.test.take(np.flatnonzero(tiny_images.test.labels > 1)))
    run = new_training(recipe, own, runs_dir=tmp_path)
    run.close()
    missing = ", ".join(tiny_images.class_names[:2])
    assert f"  note: no validation image of {missing}" in display.header(run).splitlines()


def test_smoothed_labels_are_said_to_be(tiny_images, tmp_path):
    for smoothing, said in ((0.0, False), (0.1, True)):
        recipe = load_recipe("train1").override({"label_smoothing": smoothing})
        run = new_training(recipe, tiny_images, runs_dir=tmp_path)
        assert ("the running loss is against labels smoothed by 0.1" in display.header(run)) == said


def test_mirrored_images_are_said_to_be(tiny_images, tmp_path):
    for flip, said in (("none", False), ("random", True), ("alternating", True)):
        run = new_training(load_recipe("train1").override({"augment.flip": flip}), tiny_images, runs_dir=tmp_path)
        assert ("--augment.flip none" in display.header(run)) == said


def test_the_time_left_counts_nothing_that_comes_once(training, monkeypatch):
    clock = 0.0
    monkeypatch.setattr(display.time, "monotonic", lambda: clock)
    progress = display._timed(training)
    clock = 100.0  # to load, to compile, to make the first step
    assert next(progress).speed is None
    clock = 102.0
    now = next(progress)
    assert (now.progress.counters.step, now.speed) == (2, (24, 11))


def test_a_clock_that_stands_still_ends_no_training(training, monkeypatch):
    monkeypatch.setattr(display.time, "monotonic", lambda: 5.0)
    assert {now.speed for now in display._timed(training)} == {None}


def test_the_result_is_printed_before_the_curves_are_drawn(training, monkeypatch):
    out, drawn = io.StringIO(), []
    draw = Training._draw
    monkeypatch.setattr(Training, "_draw", lambda self: (drawn.append(out.getvalue()), draw(self)))
    display.watch(training, Console(file=out, width=120))
    assert len(drawn) == 1
    assert drawn[0] == out.getvalue()
    assert "test 0." in drawn[0]
    assert (training.run.path / "curves.png").stat().st_size > 1000


def test_what_a_recipe_leaves_out_is_said_and_counted(tiny_images, tmp_path):
    changes = {
        "epochs": 3,
        "validation.source": "split",
        "batch_size": 40,
        "validation.fraction": 0.2,
        "network.head": "mean",
        "network.channels": [[8]],
    }
    scaled = {"skip_easy": 0.5, "augment.scale": 0.5, "augment.scale_epochs": 1.0}
    run = new_training(load_recipe("train1").override(changes | scaled), tiny_images, runs_dir=tmp_path)
    lines = display.header(run).splitlines()
    assert "  up to epoch 1 on images of 16×16 pixels" in lines
    assert "  epochs after the first skip the 80 easiest images; running accuracy covers only the rest" in lines
    # 160 images of a quarter of the area, in four steps, then twice 80, in two steps
    assert [display._work(run, step) for step in (0, 2, 4, 5, 8)] == [0, 20, 40, 80, 200]
    run.close()
    mixing = load_recipe("train1").override(changes | {"augment.cutmix": 0.25})
    run = new_training(mixing, tiny_images, runs_dir=tmp_path)
    says = "  25 % of a step's images are mixed with another one; running accuracy uses the label of the larger part"
    assert says in display.header(run).splitlines()
    run.close()


@pytest.mark.parametrize(
    ("name", "side", "instead"),
    [
        ("few", 32, ""),
        ("few", 64, "32×32 pixels, these have 64×64: train on FOLDER without @64, or with --recipe few64"),
        ("few64", 32, "64×64 pixels, these have 32×32: train on FOLDER@64, or with --recipe few"),
    ],
)
def test_a_recipe_for_few_pictures_of_another_size_is_named(name, side, instead, tiny_images, tmp_path):
    pixels = np.zeros((200, side, side, 3), np.uint8)
    part = replace(tiny_images.train, pixels=pixels, labels=np.arange(200) % 2)
    recipe = load_recipe(name).override({"network.channels": [[4]]})
    run = new_training(recipe, replace(tiny_images, train=part, test=part), runs_dir=tmp_path)
    run.close()
    note = f"  note: --recipe {name} is made for images of {instead}"
    assert [line for line in display.header(run).splitlines() if "made for" in line] == ([note] if instead else [])


@pytest.mark.parametrize(("batch_size", "said"), [(200, "1 step an epoch"), (150, "2 steps an epoch"), (50, None)])
def test_few_steps_an_epoch_are_said(batch_size, said, tiny_images, tmp_path):
    changes = {"epochs": 1, "batch_size": batch_size, "network.channels": [[4]], "network.pool": 8}
    run = new_training(load_recipe("train1").override(changes), tiny_images, runs_dir=tmp_path)
    run.close()
    notes = [
        line
        for line in display.header(run).splitlines()
        if "with so few images --recipe few, with batches of 125 and more epochs, may reach a higher accuracy" in line
    ]
    assert [line.split(";")[0].removeprefix("  note: ") for line in notes] == ([said] if said else [])
