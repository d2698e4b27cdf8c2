"""Studies: what a file may say, which cells run, that stopping changes no answer, and what the answers are."""

import errno
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fromzero
from fromzero import cli as command_line
from fromzero import networks, stats
from fromzero.data import cifar, load_images
from fromzero.errors import BusyError, FromzeroError, InputError, ReadError, StoppedError, TooLargeError, WriteError
from fromzero.files import finite
from fromzero.recipe import load_recipe
from fromzero.runs import Run
from fromzero.study import pools, worker
from fromzero.study.answers import _compared, answer, record, sentence
from fromzero.study.cells import (
    OUTCOMES,
    Cell,
    Setting,
    _begun,
    _wait_for_writer,
    is_finished,
    read_outcomes,
    train_cell,
)
from fromzero.study.definition import CLAIM, METRICS, Contrast, _File, lines_of, load_study, study_names
from fromzero.study.display import study_header
from fromzero.study.execution import best_values, prepare_study, sweep
from fromzero.study.page import write_lessons
from fromzero.study.pools import _ray_events
from fromzero.study.results import ContrastResult, Spread, _commit, list_results, read_result
from fromzero.trained import last_checkpoint
from fromzero.verify import first_difference

LESSONS = [
    "early-dropout",
    "early-pooling",
    "ladder",
    "ladder-rates",
    "padding",
    "plateau",
    "save-and-continue",
    "sgd-vs-adam",
    "two-dense",
    "wide-dense-overfits",
]
MEDIUM = ("early-dropout", "early-pooling", "padding", "two-dense")

STUDY = """\
claim = "More units reach more."
base = "train1"

[recipe]
dataset = "{dataset}"
network.channels = [[4], [8]]
network.pool = 4
network.dense_dropout = 0.0
optimizer.learning_rate = 0.01
clean_train_images = 40
validation.source = "split"
validation.fraction = 0.3

[arms.narrow]
network.dense = [2]

[arms.wide]
network.dense = [32]

[scale.screen]
seeds = 6
epochs = 5
batch_size = 20

[scale.half]
images = 100
seeds = 2
epochs = 2
batch_size = 20
"""


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory, write_cifar):
    return write_cifar(tmp_path_factory.mktemp("study") / "tiny", per_batch=40)


@pytest.fixture(scope="module")
def text(data_folder):
    return STUDY.format(dataset=data_folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """(its file, its execution, the runs folder) of a study that was carried out without a stop."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "units.toml").write_text(text)
    execution = prepare_study(load_study(folder / "units.toml"), runs_dir=folder / "runs", keep_weights=True)
    events = list(execution)
    assert [e for e in events if e.kind in ("failed", "note")] == []
    return folder / "units.toml", execution, folder / "runs"


def written(tmp_path, text, name="units.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def rows_of(folder):
    """Every cell's rows of metrics, times left aside."""
    rows = {}
    for path in sorted((folder / "cells").glob("*/metrics.jsonl")):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        rows[path.parent.name] = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]
    return rows


def test_pairs_that_all_differ_alike_have_no_interval():
    contrast = Contrast("a", "b", "val/accuracy", "higher", 0.0, "claim")
    same = stats.compare([0.1] * 6, [0.1] * 6)
    assert stats.compare([0.4] * 7, [0.1] * 7).sd < 1e-12
    said = sentence(
        ContrastResult(contrast, same, 1.0, "undecided", 0.0, None, None, dict.fromkeys(range(6), 0), 6), 1, 6
    )
    assert (
        said
        == "a against b, val/accuracy higher: undecided; its 6 pairs all differ by +0.00 points, so they tell no spread"
    )


def test_pairs_that_tell_no_spread_have_no_figures_for_programs():
    contrast = Contrast("a", "b", "val/accuracy", "higher", 0.0, "claim")
    for gap, has_interval in (([0.1] * 6, False), ([0.1, 0.2, 0.1, 0.1, 0.1, 0.1], True)):
        found = stats.compare(np.array(gap), np.zeros(6))
        pairs = dict(enumerate(gap))
        result = ContrastResult(contrast, found, 0.03, "supported", 0.1, 7, stats.Interval(0.1, 0.1, 0.1), pairs, 6)
        known = finite(_compared(result))
        assert known["difference"]["mean"] == pytest.approx(np.mean(gap))
        figures = [known["difference"]["low"], *(known[name] for name in ("smallest", "seeds_needed", "new_images"))]
        assert [figure is not None for figure in figures] == [has_interval] * 4


@pytest.mark.parametrize(
    ("direction", "margin", "null", "said"),
    [
        ("higher", 0.0, (0.0,), "difference of 3.00 or more four times"),
        ("higher", 0.01, (-0.01,), "difference of 3.00 or more from −1.00 four times"),
        ("lower", 0.01, (0.01,), "difference of 3.00 or more from +1.00 four times"),
        ("different", 0.01, (-0.01, 0.01), "difference of 3.00 or more from ±1.00 four times"),
    ],
)
def test_what_so_many_pairs_find_counts_from_the_margin(direction, margin, null, said):
    """A true difference at that distance from the edge of what the claim denies is found four times out of five."""
    contrast = Contrast("a", "b", "val/accuracy", direction, margin, "claim")
    rng = np.random.default_rng(0)
    comparison = stats.compare(rng.normal(0, 0.01, 7), np.zeros(7), direction, margin)
    result = ContrastResult(contrast, comparison, 0.5, "undecided", 0.03, None, None, dict.fromkeys(range(7), 0.0), 7)
    assert result.null == null
    assert said in sentence(result, 1, 6)
    distance = stats.detectable_effect(7) * 0.01
    for edge in null:
        for side in (-1, 1) if len(null) == 1 else (-1 if edge < 0 else 1,):
            drawn = rng.normal(edge + side * distance, 0.01, (400, 7))
            found = np.mean([stats.compare(one, np.zeros(7), direction, margin).p <= stats.LEVEL for one in drawn])
            assert found == pytest.approx(stats.POWER, abs=0.08)


def test_a_spread_is_of_a_sample():
    assert Spread.of([1.0, 3.0]) == pytest.approx((2.0, math.sqrt(2)))
    assert Spread.of([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(Spread.of([1.0]).sd)


# ---- what a file may say


def test_the_nine_lessons_are_there_at_both_scales_and_some_between():
    assert study_names() == sorted([*LESSONS, "parts", "parts-of-best"])
    for name in study_names():
        scales = ["screen"] if name == "parts" else ["screen", "full", *(["medium"] if name in MEDIUM else [])]
        for scale in scales:
            study = load_study(name, scale)
            assert study.claim.endswith(".")
            assert bool(study.notes) == (name in LESSONS)
            assert study.seeds >= stats.FEWEST_PAIRS
            claims = [c for c in study.contrasts if c.group == "claim"]
            assert study.seeds >= stats.fewest_pairs(len(claims)), f"{name}: the claim could not be settled"
            for arm in study.arms.values():
                networks.layers(arm.recipe.network, (32, 32, 3), 10)
                assert arm.recipe.validation.source == "split"


@pytest.mark.parametrize("scale", ["screen", "full"])
@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("padding", "valid", "same-matched"),
        ("two-dense", "two", "one-matched"),
        ("early-pooling", "early", "twice"),
    ],
)
def test_arms_that_are_called_matched_have_as_many_parameters(name, one, two, scale):
    arms = load_study(name, scale).arms
    a, b = (networks.num_parameters(arms[arm].recipe.network, (32, 32, 3), 10) for arm in (one, two))
    assert a == pytest.approx(b, rel=2e-4)


def test_the_ladder_goes_up_one_change_at_a_time_and_each_is_left_out_once():
    study = load_study("ladder", "full")
    steps = [c for c in study.contrasts if c.group == "in order"]
    assert steps[0].against == "start"
    assert [c.against for c in steps[1:]] == [c.arm for c in steps[:-1]]
    top = study.arms[steps[-1].arm]
    left_out = [c.against for c in study.contrasts if c.group == "left out"]
    assert left_out == [f"no-{c.arm}" for c in steps[:-1]]  # the last step is left out in the arm before it
    for step in steps:
        assert study.arms[step.arm].changes, step
        assert study.arms[step.arm].like == step.against
    for name in left_out:
        assert study.arms[name].like == top.name
    start = load_recipe("train3")
    assert study.arms["start"].recipe.network == start.network
    assert study.arms["start"].recipe.optimizer == start.optimizer
    strong = load_recipe("strong")
    for part in ("network", "augment", "optimizer", "schedule", "label_smoothing", "normalise", "batch_size"):
        assert getattr(top.recipe, part) == getattr(strong, part), part


def test_the_parts_of_best_are_all_that_it_has_beyond_strong():
    arms = load_study("parts-of-best", "full").arms
    best, strong = load_recipe("best"), load_recipe("strong")
    parts = ("network", "augment", "optimizer", "schedule", "label_smoothing", "batch_size", "epochs", "hardest")
    for part in parts:
        assert getattr(arms["best"].recipe, part) == getattr(best, part), part
        assert getattr(arms["strong"].recipe, part) == getattr(strong, part), part
    taken = {path for name, arm in arms.items() if name != "strong" for path in arm.changes}
    assert taken == arms["strong"].changes.keys()


def test_the_same_seed_gives_arms_the_same_first_weights_where_shapes_agree():
    arms = load_study("padding", "full").arms
    one, two = (networks.build(arms[a].recipe.network, (32, 32, 3), 10, seed=3).state_dict() for a in ("valid", "same"))
    alike = [name for name in one if one[name].shape == two[name].shape]
    assert sum(name.startswith("conv2d") for name in alike) == 10
    assert all((one[name] == two[name]).all() for name in alike)


def test_the_example_in_the_readme_is_a_study(tmp_path):
    readme = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")
    example = next(part for part in re.findall(r"```toml\n(.*?)```", readme, re.DOTALL) if "claim" in part)
    study = load_study(written(tmp_path, example))
    assert study.arms["two"].recipe.network.dense == (1024, 1024)
    assert (study.seeds, study.arms["one"].recipe.dataset) == (6, "cifar10:8000")
    with pytest.raises(InputError, match=r"line 5: unknown recipe field 'network\.dens'"):
        load_study(written(tmp_path, example.replace("two.network.dense", "two.network.dens")))


def test_the_page_on_studies_has_every_key_and_an_example_of_each(tmp_path):
    page = Path(__file__).parents[1].joinpath("docs/studies.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    path = written(tmp_path, example)
    for scale, (seeds, epochs) in {"screen": (8, 30), "quickly": (7, 10)}.items():
        study = load_study(path, scale)
        assert (study.seeds, study.arms["adam"].recipe.epochs) == (seeds, epochs)
        assert study.arms["adam"].recipe.label_smoothing == 0.1
        claims = [c for c in study.contrasts if c.group == "claim"]
        assert study.seeds >= stats.fewest_pairs(len(claims)) or scale == "quickly"
    table = "".join(line.partition(" | ")[0] for line in page.splitlines() if line.startswith("| `"))
    keys = {re.sub(r"[\[\]]|\.NAME", "", key) for key in re.findall(r"`([^`]+)`", table)}
    assert keys == {*_File.model_fields}
    assert all(f"`{metric}`" in page for metric in METRICS)
    assert [stats.fewest_pairs(n) for n in (1, 2, 3, 4, 6, 7)] == [6, 7, 7, 8, 8, 9]


def test_rates_of_another_optimizer_are_named_before_a_study_begins(tmp_path):
    """As the page's own example would have them, without the two fields that it sets for this."""
    page = Path(__file__).parents[1].joinpath("docs/studies.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    example = example.replace('"photos"', '"digits"')

    def notes(text):
        header = study_header(prepare_study(load_study(written(tmp_path, text)), runs_dir=tmp_path))
        return [line for line in header.splitlines() if line.startswith("  note: arm")]

    assert notes(example) == []
    (note,) = notes(re.sub(r"optimizer\.(head|bias)_learning_rate.*", "", example))
    assert "arm adam: --optimizer.head_learning_rate 0.2, --optimizer.bias_learning_rate 0.2 as units: smooth" in note
    for name in study_names():
        study = load_study(name)
        assert [note for arm in study.arms.values() for note in study.notes_on(arm)] == [], name


def test_lines_of_a_file():
    lines = lines_of('a = 1\n\n[b.c]\n"d.e" = 2\nf . g = [\n  3,\n]\n[[h]]\ni = 4\n[[h]]\ni = 5\n')
    assert lines[("a",)] == 1
    assert lines[("b", "c")] == 3
    assert lines[("b", "c", "d.e")] == 4
    assert lines[("b", "c", "f", "g")] == 5
    assert (lines[("h", "0", "i")], lines[("h", "1", "i")]) == (9, 11)
    lines = lines_of('r = """\n[x]\ny = 1\n"""\nc = [\n  [64],\n  [128]\n]\nd = {e = {f = 1}}\ng = 2\n')
    assert lines == {("r",): 1, ("c",): 5, ("d",): 9, ("d", "e"): 9, ("d", "e", "f"): 9, ("g",): 10}


COMPARISON = "\n[[comparisons]]\narm = {arm}\n"
TUNING = "\n[tuning.values]\nnarrow = [0.1, 0.2]\nwide = {wide}\n"
TUNED_DATA = '\n[tuning]\nfield = "validation.fraction"\nvalues = {narrow = [0.1, 0.2], wide = [0.1, 0.3]}\n'


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        (
            "network.dense = [32]",
            "network.dens = [32]",
            18,
            "unknown recipe field 'network.dens'; nearest: network.dense",
        ),
        ("network.dense = [32]", "network.dense = [2]", 17, "arm 'wide' is equal to arm 'narrow'"),
        ("network.dense = [32]", 'name = "other"\nnetwork.dense = [2]', 17, "arm 'wide' is equal to arm 'narrow'"),
        ('claim = "', 'claim = "\\u001b[31m', 1, "has characters that cannot be printed"),
        ("network.dense = [32]", 'like = ["narrow"]', 18, "like: no arm ['narrow'] above"),
        ("network.dense = [32]", "after = {}", 18, "after: no arm {} above"),
        ("[arms.wide]", f"[arms.{'w' * 101}]", 17, "a name has 100 letters at most"),
        ("seeds = 6", "seeds = 1001", 21, "expected a number from 2 to 1,000, found 1001"),
        ("[scale.half]", TUNED_DATA + "[scale.half]", 27, "validation.fraction says which images are used"),
        ("network.dense = [32]", "network.dense = [0]", 18, "network.dense: 0: input should be greater than"),
        ("network.dense = [32]", 'base = "few"', 18, "base: all arms have the study's; of two runs, fromzero compare"),
        ("network.dense = [32]", "validation.fraction = 0.2", 18, "other data than arm 'narrow' (validation.fraction)"),
        ("network.dense = [32]", 'dataset = "digits"', 18, "other data than arm 'narrow' (dataset)"),
        ("network.dense = [32]", "seed = 3", 18, "every arm is trained with the same seeds"),
        ("network.pool = 4", "network.pool = 4\nseed = 3", 8, "every arm is trained with the same seeds"),
        ("network.dense = [32]", 'after = "wider"\nepochs = 2', 18, "after: no arm 'wider' above"),
        ("network.dense = [32]", 'like = "wide"', 18, "like: no arm 'wide' above"),
        ('validation.source = "split"', 'validation.source = "test"', 11, "the test images decide nothing"),
        ('validation.source = "split"\n', "", 11, "the test images decide nothing"),
        ('base = "train1"', 'base = "train9"', 2, "unknown recipe 'train9'"),
        (
            'base = "train1"',
            'base = "train1"\nmetric = "val/acuracy"',
            3,
            "no run records 'val/acuracy'; nearest: val/acc",
        ),
        ('base = "train1"', 'base = "train1"\nmetric = "test/accuracy"', 3, "test figures decide nothing"),
        ('base = "train1"', 'base = "train1"\ndirection = "up"', 3, "direction: 'up'"),
        ('base = "train1"', 'base = "train1"\nmarginn = 1', 3, "unknown key 'marginn'; nearest: margin"),
        ("seeds = 6", "seeds = 1", 21, "one run says nothing"),
        ("seeds = 6", "", 20, "expected a number from 2 to 1,000, found None"),
        ("seeds = 6", "seeds = 6\nlearning_rat = 1", 22, "unknown recipe field 'learning_rat'"),
        ("seeds = 6", 'seeds = 6\nimages = "all"', 22, "expected a number of train images"),
        ("seeds = 6", "seeds = 6\narms.thin.epochs = 2", 22, "no arm 'thin'"),
        ("[arms.wide]\nnetwork.dense = [32]\n", "", 14, "two at least"),
        ("[scale.half]", COMPARISON.format(arm='"wider"') + "[scale.half]", 27, "arm: no arm 'wider'; nearest: wide"),
        ("[scale.half]", COMPARISON.format(arm='"narrow"') + "[scale.half]", 27, "compared with itself"),
        ("[scale.half]", TUNING.format(wide="[0.1]") + "[scale.half]", 26, "same budget"),
        ("[scale.half]", TUNING.format(wide="[0.1, 0.1000000001]") + "[scale.half]", 28, "two are equal to six digits"),
        ("[scale.half]", TUNING.format(wide="[0.1, -1.0]") + "[scale.half]", 28, "optimizer.learning_rate: -1.0"),
        ("[scale.half]", "[scale.half", 25, "not valid TOML"),
    ],
)
def test_bad_studies_are_refused_with_the_line(tmp_path, text, old, new, line, says):
    assert old in text
    path = written(tmp_path, text.replace(old, new))
    with pytest.raises(InputError) as caught:
        load_study(path)
    message = str(caught.value)
    assert says in message
    assert re.search(rf"units\.toml(, line {line}:|: not valid TOML.*line {line}\b)", message), message
    assert "\n" not in message


def test_what_else_is_refused(tmp_path, text, data_folder):
    path = written(tmp_path, text)
    for arguments, says in (
        ((path, "huge"), "no scale 'huge'"),
        (("paddin",), "unknown study 'paddin'; nearest: padding"),
        ((tmp_path / "none.toml",), "No such file"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            load_study(*arguments)
    for seeds in (1, 1001, 10**12):
        with pytest.raises(InputError, match=f"--seeds: expected a number from 2 to 1,000, found {seeds}(: one run|$)"):
            load_study(path, seeds=seeds)
    path.write_text("\ufeff" + text)  # as some editors begin a file
    study = load_study(path)
    for options, says in (
        ({"tune": True}, "--tune needs a [tuning] table"),
        ({"jobs": 0}, "--jobs: 0 is not from 1"),
        ({"threads": 9999}, "--threads: 9999 is not from 1"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            prepare_study(study, runs_dir=tmp_path, **options)
    on_ray = prepare_study(study, runs_dir=tmp_path, place="ray", device="cuda")  # the GPUs of its machines
    assert (on_ray.setting.device, on_ray.setting.threads) == ("cuda", 1)
    with pytest.raises(InputError, match="--device: cuda:1: on Ray it is auto, cpu or cuda"):
        prepare_study(study, runs_dir=tmp_path, place="ray", device="cuda:1")
    assert [pools._needs_gpu(*case) for case in (("auto", 0), ("auto", 2.0), ("cpu", 2.0), ("cuda", 1.0))] == [
        False,
        True,
        False,
        True,
    ]
    with pytest.raises(InputError, match="no machine of the Ray cluster has a GPU"):
        pools._needs_gpu("cuda", 0)
    too_many = written(tmp_path, text.replace("images = 100", "images = 201"), "many.toml")
    with pytest.raises(InputError, match="a part of the 200 train images"):
        prepare_study(load_study(too_many, "half"), runs_dir=tmp_path)
    shrunk = text.replace("network.dense = [32]", "network.pool = [8, 8]")
    with pytest.raises(InputError, match=r"line 17: arm 'wide': .* leaves no pixel"):
        prepare_study(load_study(written(tmp_path, shrunk)), runs_dir=tmp_path)
    assert not (tmp_path / "studies").exists(), "nothing was started"


# ---- a fixed part of the train images


def test_a_part_of_the_train_images_is_fixed_and_stratified(data_folder):
    whole, part = load_images(str(data_folder)), load_images(f"{data_folder}:100")
    assert part.name == f"{whole.name}:100"
    assert np.bincount(part.train.labels).tolist() == [10] * 10
    assert part.fingerprints["test"] == whole.fingerprints["test"]
    assert part.fingerprints["train"] not in (whole.fingerprints["train"], None)
    assert part.fingerprints == load_images(f"{data_folder}:100").fingerprints
    records = {image.tobytes() for image in whole.train.pixels}
    assert all(image.tobytes() in records for image in part.train.pixels)
    with pytest.raises(InputError, match="a part of the 200 train images has from 20 to 200"):
        load_images(f"{data_folder}:12")


def test_a_run_on_a_part_is_resumed_by_its_folder_alone(data_folder, tmp_path):
    recipe = load_study(written(tmp_path, STUDY.format(dataset=data_folder)), "half").arms["wide"].recipe
    assert recipe.dataset == f"{data_folder}:100"
    straight = fromzero.train(recipe.override({"epochs": 3}), load_images(recipe.dataset), runs_dir=tmp_path / "a")
    assert ":" not in straight.name
    run = fromzero.train(recipe, runs_dir=tmp_path / "b")
    assert first_difference(fromzero.resume(run, epochs=3), straight) is None


# ---- cells


def test_a_scales_images_are_in_place_of_the_bases(tmp_path):
    text = 'claim = "?"\nbase = "train1"\nrecipe.dataset = "digits:800"\nrecipe.validation.source = "split"\n'
    text += "arms.a = {}\narms.b.batch_size = 64\n[scale.screen]\nseeds = 2\nimages = 200\n"
    assert load_study(written(tmp_path, text)).arms["b"].recipe.dataset == "digits:200"
    assert load_study(written(tmp_path, text.replace("\nimages = 200", ""))).arms["a"].recipe.dataset == "digits:800"


def test_a_study_begun_anew_has_other_seeds_and_a_folder_of_its_own(tmp_path, text):
    text = text.replace("[scale.screen]\n", "[scale.screen]\nfirst_seed = 3\n")
    path = written(tmp_path, text)
    begun, anew = (prepare_study(load_study(path, first_seed=first), runs_dir=tmp_path) for first in (None, 6))
    assert [sorted({cell.seed for cell in one.cells}) for one in (begun, anew)] == [[*range(3, 9)], [*range(6, 12)]]
    assert [one.folder.name for one in (begun, anew)] == ["units-screen-from-seed-3", "units-screen-from-seed-6"]
    assert "--seeds 6 --first-seed 6" in anew.command
    assert "--first-seed 0" in prepare_study(load_study(path, first_seed=0), runs_dir=tmp_path).command
    few = prepare_study(
        load_study(written(tmp_path, text.replace("fraction = 0.3", "fraction = 0.002"))), runs_dir=tmp_path
    )
    assert "note: about 10 validation images, which give an accuracy to within ± 26 points" in study_header(few)
    few = replace(few, study=replace(few.study, metric="val/balanced_accuracy"))
    assert "10 validation images, and a class that has few of them counts as much as any; what" in study_header(few)
    with pytest.raises(InputError, match=r"--first-seed: expected a number from 0 to 994, so that .*, found 995"):
        load_study(path, first_seed=995)
    with pytest.raises(InputError, match=r"line 21: first_seed: expected .* found -1"):
        load_study(written(tmp_path, text.replace("first_seed = 3", "first_seed = -1")))


def test_a_scale_names_a_folder(tmp_path, text):
    path = written(tmp_path, text.replace("[scale.half]", '[scale."32/half"]'))
    load_study(path)
    with pytest.raises(InputError, match=r"line 25: scale '32/half' cannot be part of a folder's name"):
        load_study(path, "32/half")
    load_study(written(tmp_path, text.replace("[scale.half]", '[scale."half size"]')), "half size")


def test_a_study_may_validate_on_a_fold(tmp_path, text):
    on_fold = text.replace('source = "split"', 'source = "fold"\nvalidation.fold = 2')
    study = load_study(written(tmp_path, on_fold), "half")
    for own in (False, True):
        assert study.setting(own).startswith("fold 2 of 5 for validation, ")
    assert load_study(written(tmp_path, text), "half").setting(False).startswith("30% of them for validation, ")


def test_a_cell_in_a_lasting_worker_is_the_run_that_the_command_line_trains(finished, tmp_path):
    """To the bit: weights, optimizer, metrics. Seed 5's cells come last, after others in the same processes."""
    _, execution, _ = finished
    cell = next(c for c in execution.cells if c.name == "wide-seed5")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(cell.recipe.to_toml())
    command = [sys.executable, "-m", "fromzero", "train", "--recipe", recipe, "--threads", "1", "--runs-dir", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    alone = fromzero.list_runs(tmp_path)[0]
    assert first_difference(fromzero.Run(cell.path), alone) is None
    assert fromzero.Run(cell.path).recipe == alone.recipe.override({"name": cell.recipe.name})


@pytest.mark.skipif(sys.platform == "darwin", reason="names of its files are text")
def test_a_study_below_a_folder_whose_name_is_no_text(text, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    study = load_study(written(tmp_path, text), "half")
    assert [e for e in prepare_study(study, runs_dir=folder) if e.kind in ("failed", "note")] == []
    assert len(list(folder.glob("studies/units-half/cells/*/summary.json"))) == 4


def test_who_waits_for_a_writer_does_not_wait_where_nothing_can_be_written(finished, tmp_path, monkeypatch):
    run = fromzero.Run(shutil.copytree(finished[1].cells[0].path, tmp_path / "cell"))

    def acquire(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    began = time.monotonic()
    with pytest.raises(FromzeroError, match="cannot be written: Permission denied"):
        _wait_for_writer(run)
    assert time.monotonic() - began < 30


def test_a_study_done_before_is_left_alone(finished):
    file, execution, runs_dir = finished
    before = {p: p.stat().st_mtime_ns for p in (execution.folder / "cells").rglob("*") if p.is_file()}
    events = list(prepare_study(load_study(file), runs_dir=runs_dir))
    assert [e.kind for e in events] == ["finished"] * 12
    assert before == {p: p.stat().st_mtime_ns for p in (execution.folder / "cells").rglob("*") if p.is_file()}


def test_the_command_that_goes_on_has_the_options_that_were_given(finished, monkeypatch):
    file, execution, runs_dir = finished
    monkeypatch.setattr("fromzero.study.execution.load_images", lambda *given, **options: execution.images)
    assert execution.command.endswith(f"--runs-dir {runs_dir} --keep-weights")
    result = read_result(execution.folder)
    assert result.resume_command.startswith(f"{result.command} --runs-dir {runs_dir}")
    assert result.command == execution.command.partition(" --runs-dir")[0]  # for a page: nothing of this machine
    again = prepare_study(load_study(file), runs_dir=runs_dir, data_dir=Path("a b"), jobs=1, device="cpu", offline=True)
    study = f"fromzero study {file} --scale {again.study.scale} --seeds {again.study.seeds}"
    assert again.command == f"{study} --runs-dir {runs_dir} --data-dir 'a b' --jobs 1 --device cpu --offline"
    odd = file.with_name("one's own.toml")
    odd.write_text(file.read_text())
    plain = prepare_study(load_study(odd)).command
    assert shlex.split(plain)[2] == str(odd)
    assert plain == plain.strip()


def test_a_folder_named_from_elsewhere_is_where_data_dir_says(data_folder, tmp_path, text, monkeypatch):
    named = text.replace(str(data_folder), "photos")
    assert named != text
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="unknown data set 'photos': not a path that exists"):
        prepare_study(load_study(written(tmp_path, named), "half"), runs_dir=tmp_path)
    study = load_study(written(tmp_path, named), "half")
    prepared = prepare_study(study, runs_dir=tmp_path, data_dir=data_folder)
    assert prepared.setting.dataset.startswith(str(data_folder))


def test_outcomes_are_those_of_the_last_epoch(finished):
    _, execution, _ = finished
    for cell in execution.cells:
        run = fromzero.Run(cell.path)
        outcomes = read_outcomes(run)
        assert len(outcomes) == 60
        assert outcomes.mean() == pytest.approx(run.summary["val/accuracy"])


def test_a_cell_stopped_before_its_outcomes_were_kept_is_gone_on_with(data_folder, tmp_path, text):
    execution = prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1, keep_weights=True)
    list(execution)
    one, two, *_ = execution.cells
    ended = (one.path / "summary.json").stat().st_mtime_ns
    (one.path / OUTCOMES).unlink()
    (two.path / OUTCOMES).write_bytes(b"")  # as where the weights did not give the recorded accuracy
    assert [is_finished(cell, execution.images) for cell in (one, two)] == [False, True]
    assert read_outcomes(fromzero.Run(two.path)) is None
    assert [e.text for e in execution if e.kind == "finished" and e.cell == one] == [""]
    assert len(read_outcomes(fromzero.Run(one.path))) == 30
    assert (one.path / "summary.json").stat().st_mtime_ns == ended, "it was not trained again"


def test_a_cell_that_another_process_ended_meanwhile_is_finished(data_folder, tmp_path, text, monkeypatch):
    execution = prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1)
    cell = execution.cells[0]
    training = _begun(cell, execution.images, execution.setting, pytest.fail)
    monkeypatch.setattr("fromzero.study.cells._wait_for_writer", lambda run: list(training))
    assert list(train_cell(cell, execution.images, execution.setting, pytest.fail)) == [1.0]
    assert len(read_outcomes(fromzero.Run(cell.path))) == 30


def test_a_sweep_keeps_neither_outcomes_nor_weights(data_folder, tmp_path, text):
    recipe = load_study(written(tmp_path, text), "half").arms["wide"].recipe
    cell, images = Cell("wide", tmp_path / "tuning" / "wide-0.1-seed0", recipe), load_images(recipe.dataset)
    cell.path.parent.mkdir()
    list(train_cell(cell, images, Setting(recipe.dataset)))
    assert is_finished(cell, images)
    assert not (cell.path / OUTCOMES).exists()
    assert not (cell.path / "checkpoints").exists()


def test_what_starts_from_a_cell_that_is_trained_anew_is_trained_anew_all_the_way(data_folder, tmp_path, text):
    arms = '[arms.one]\n\n[arms.two]\nafter = "one"\n\n[arms.three]\nafter = "two"\n'
    path = written(tmp_path, text[: text.index("[arms.narrow]")] + arms + text[text.index("[scale.screen]") :])
    list(prepare_study(load_study(path, "half"), runs_dir=tmp_path, jobs=1))
    execution = prepare_study(load_study(path, "half"), runs_dir=tmp_path, jobs=1)
    (execution.cells[0].path / "checkpoints" / "last.safetensors").unlink()
    done = [e.cell.name for e in execution if e.kind == "finished" and not e.text]
    assert done == ["one-seed0", "two-seed0", "three-seed0"]


def test_a_cell_whose_recipe_has_changed_is_set_aside_and_trained_anew(data_folder, tmp_path, text):
    study = load_study(written(tmp_path, text), "half")
    execution = prepare_study(study, runs_dir=tmp_path, jobs=1)
    list(execution)
    kept = (execution.folder / "cells" / "wide-seed1" / "summary.json").stat().st_mtime_ns
    changed = text.replace("network.dense = [2]", "network.dense = [3]")
    again = prepare_study(load_study(written(tmp_path, changed), "half"), runs_dir=tmp_path, jobs=1)
    notes = sorted(e.text for e in again if e.kind == "note")
    assert len(notes) == 2
    assert "narrow-seed0: its recipe has changed (network.dense is [3]): trained anew, the old run is" in notes[0]
    assert (execution.folder / "set-aside" / "narrow-seed0-1" / "summary.json").exists()
    assert (execution.folder / "cells" / "wide-seed1" / "summary.json").stat().st_mtime_ns == kept
    result = read_result(execution.folder)
    assert result.arms["narrow"].n == "2"
    assert result.arms["narrow"].arm.recipe.network.dense == (3,)


def test_runs_that_the_study_would_train_anew_are_not_counted(tmp_path, text):
    arms = "[arms.half]\n\n[arms.again]\noptimizer.learning_rate = 0.02\n"
    text = text[: text.index("[arms.narrow]")] + arms + text[text.index("[scale.screen]") :]
    execution = prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1)
    list(execution)
    assert read_result(execution.folder).is_complete
    changed = text.replace("[arms.again]", '[arms.again]\nafter = "half"')
    (execution.folder / "study.toml").write_text(changed)  # as it is when the changed study is stopped at once
    result = read_result(execution.folder)
    assert [arm.n for arm in result.arms.values()] == ["2", "0 of 2"]
    assert (
        "  failed: again-seed0, again-seed1: it started from other weights; the same command trains it anew"
        in answer(result)
    )


def test_seeds_that_are_added_to_an_answer_are_said_to_be(tmp_path, text):
    def answered(seeds, of=text):
        execution = prepare_study(load_study(written(tmp_path, of), "half", seeds=seeds), runs_dir=tmp_path, jobs=1)
        list(execution)
        return read_result(execution.folder)

    assert not answered(2).cautions
    assert not answered(2).cautions
    more = answered(3)
    (caution,) = more.cautions
    assert "had figures with 2 seeds; where those decide how many there are, p is too small" in caution
    assert f"  note: {caution}" in answer(more)
    write_lessons([more], tmp_path / "page.md")
    assert "This study had figures with 2 seeds;" in (tmp_path / "page.md").read_text()
    assert "figures with 2 and 3 seeds" in answered(4, text + "# seeds are better raised here?").cautions[0]
    changed = answered(3, text.replace("dense = [2]", "dense = [3]")).cautions
    assert "its arms changed" in changed[1], "those of the other arm were seen"
    another = text.replace("dense = [2]", "dense = [5]").replace("dense = [32]", "dense = [4]")
    assert "its arms changed" in answered(3, another).cautions[1], "what is asked may still rest on what was seen"
    other_arms = another.replace("narrow", "thin").replace("wide", "thick")
    assert not answered(3, other_arms).cautions, "a study of other things in its place"


def test_images_that_were_changed_when_figures_were_seen_are_said_to_be(tmp_path, write_cifar):
    for number in (0, 1):
        write_cifar(tmp_path / f"set{number}", seed=number)

    def answered(number, seeds):
        of = STUDY.format(dataset=tmp_path / f"set{number}")
        execution = prepare_study(load_study(written(tmp_path, of), "half", seeds=seeds), runs_dir=tmp_path, jobs=1)
        list(execution)
        return read_result(execution.folder).cautions

    assert not answered(0, 2)
    assert "its images changed" in answered(1, 2)[-1]
    result = tmp_path / "studies" / "units-half" / "result.json"
    result.write_text("{}")
    seen = answered(0, 3)
    assert "had figures with 2 seeds" in seen[0]
    assert not result.exists(), "while something is to be trained it would be an old one"


def test_what_intervals_and_equal_pairs_do_not_say_is_said():
    contrast = Contrast("one", "two", "val/accuracy", "higher", 0.0, CLAIM)
    wide, narrow = stats.Interval(0.04, -0.01, 0.09), stats.Interval(0.04, 0.01, 0.07)

    def outcome(verdict, interval, new_images=None, trained_alike=False):
        compared = stats.compare([0.5, 0.6, 0.7], [0.4, 0.5, 0.65])._replace(difference=interval)
        return ContrastResult(contrast, compared, 0.03, verdict, 0.1, None, new_images, {0: 0.1}, 1, trained_alike)

    def remarked(*said, **named):
        return " ".join(outcome(*said, **named).remarks)

    assert remarked("supported", narrow) == remarked("undecided", wide) == ""
    assert "on other images of the same kind it may be otherwise" in remarked("supported", narrow, wide)
    assert remarked("undecided", wide, wide) == ""
    at_odds = [(verdict, interval) for verdict in ("supported", "undecided") for interval in (wide, narrow)]
    assert [outcome(*each).is_at_odds for each in at_odds] == [True, False, False, True]
    assert "every pair of networks is the same one" in remarked("undecided", wide, trained_alike=True)


def test_a_pair_that_is_far_from_all_others_is_named():
    contrast = Contrast("one", "two", "val/accuracy", "higher", 0.0, CLAIM)

    def remarked(*differences):
        compared = stats.compare(np.array(differences) + 0.5, np.full(len(differences), 0.5))
        pairs = dict(enumerate(differences, 3))
        return ContrastResult(contrast, compared, 0.03, "undecided", 0.1, None, None, pairs, len(pairs)).remarks

    (said,) = remarked(0.007, -0.035, -0.007, -0.832, -0.119, -0.063, -0.063)
    assert said == (
        "the pair of seed 6 (−83.20 points) is far from all others, whose mean is −4.67: look at its two runs"
    )
    assert not remarked(0.007, -0.035, -0.007, -0.232, -0.119, -0.063, -0.063)
    assert not remarked(0.007, -0.035, -0.832), "too few to say what is far"
    assert not remarked(*[0.01] * 7)
    assert not remarked(*[0.0] * 6, 0.0005), "one image"


def test_another_study_of_the_same_recipes_is_named(tmp_path, text):
    def answered(name, text, **options):
        file = tmp_path / f"{name}.toml"
        file.write_text(text)
        execution = prepare_study(load_study(file, "half", **options), runs_dir=tmp_path, jobs=1)
        list(execution)
        return read_result(execution.folder)

    first = answered("first", text)
    assert first.cautions == first.remarks == []
    turned = answered("turned", text.replace("higher", "lower"))
    (caution,) = turned.cautions
    assert caution.startswith("first-half compared such recipes with the same seeds; where its figures decide")
    assert caution.endswith("--first-seed 2")
    other = answered("other", text, first_seed=2)
    assert other.cautions == []
    assert other.remarks[0].startswith("first-half, turned-half compared such recipes with other seeds: its answer")
    assert answered("unlike", text.replace("dense = [2]", "dense = [3]"), first_seed=4).remarks == []


def test_a_study_can_be_repeated_from_its_folder(tmp_path, data_folder):
    (tmp_path / "own.toml").write_text('base = "train1"\nname = "own"\nepochs = 1\n')
    text = STUDY.format(dataset=data_folder)
    file = written(tmp_path, re.sub(r'base = ".*?"', 'base = "own.toml"', text, count=1))
    first = load_study(file, "half")
    execution = prepare_study(first, runs_dir=tmp_path / "runs", jobs=1)
    list(execution)
    copied = Path(shutil.copytree(execution.folder, tmp_path / "elsewhere" / "copy"))
    (copied / "other.toml").write_text(text)  # which has a base of its own
    assert load_study(copied / "other.toml", "half").base.name == "train1"
    again = load_study(copied / "study.toml", "half")
    assert [arm.recipe for arm in again.arms.values()] == [
        arm.recipe.override({"name": again.arms[name].recipe.name}) for name, arm in first.arms.items()
    ]


def test_a_record_that_is_lost_is_said_to_be(tmp_path, text):
    execution = prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1)
    list(execution)
    assert read_result(execution.folder).cautions == []
    for damaged in ("study.json", None, "study.toml"):  # nor is that forgotten
        if damaged:
            (execution.folder / damaged).write_text("{")
        list(execution)
        (caution,) = read_result(execution.folder).cautions
        assert "runs had ended when this study's record (study.json, or a file beside it) was lost" in caution


def test_seeds_that_are_added_are_said_to_be_when_the_images_have_moved(data_folder, tmp_path, text):
    moved = tmp_path / "moved"
    shutil.copytree(data_folder, moved)
    list(prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1))
    text = text.replace(str(data_folder), str(moved))
    execution = prepare_study(load_study(written(tmp_path, text), "half", seeds=3), runs_dir=tmp_path, jobs=1)
    assert [e.text for e in execution if e.kind == "finished"].count("done before") == 4
    (caution,) = read_result(execution.folder).cautions
    assert "had figures with 2 seeds" in caution


def test_what_is_asked_anew_of_runs_that_were_seen_is_said_to_be(tmp_path, text, capsys):
    third = text.replace("[scale.screen]", "[arms.wider]\nnetwork.dense = [48]\n\n[scale.screen]")

    def carried_out(of, seeds=2, folder="runs"):
        study = load_study(written(tmp_path, of), "half", seeds=seeds)
        execution = prepare_study(study, runs_dir=tmp_path / folder, jobs=1)
        list(execution)
        return read_result(execution.folder).cautions

    assert carried_out(text) == []
    (caution,) = carried_out(text.replace("More units reach more.", "Fewer units reach less."))
    assert command_line.main(["lessons", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert f"    note: {caution}\n" in capsys.readouterr().out
    assert "when this study had figures, its claim changed; where those decide what is asked, p is too small" in caution
    (caution,) = carried_out(third)
    assert "its claim and arms and comparisons changed" in caution
    (caution,) = carried_out(text.replace('base = "train1"', 'base = "train1"\ndirection = "lower"'))
    assert "its claim and arms and comparisons changed" in caution
    assert carried_out(third, folder="others") == []
    assert carried_out(third, folder="others") == []
    swapped = third.replace("[arms.wide]\nnetwork.dense = [32]\n\n", "").replace(
        "[scale.screen]", "[arms.wide]\nnetwork.dense = [32]\n\n[scale.screen]"
    )
    assert list(load_study(written(tmp_path, swapped)).arms) == ["narrow", "wider", "wide"]
    assert carried_out(swapped, folder="others") == []
    (caution,) = carried_out(third.replace("dense = [48]", "dense = [48]\nepochs = 3"), folder="others")
    assert "its arms changed" in caution


def test_a_study_that_was_stopped_had_figures_too(tmp_path, text):
    study = load_study(written(tmp_path, text), "half", seeds=3)
    for event in prepare_study(study, runs_dir=tmp_path, jobs=1):
        if event.kind == "finished":
            break
    execution = prepare_study(load_study(written(tmp_path, text), "half", seeds=2), runs_dir=tmp_path, jobs=1)
    list(execution)
    assert "had figures with 3 seeds" in read_result(execution.folder).cautions[0]


def test_a_study_that_was_killed_had_figures_too(tmp_path, text):
    """Nothing runs behind a kill, so what was there to look at is written down as soon as it is there."""
    study = load_study(written(tmp_path, text), "half", seeds=3)
    execution = prepare_study(study, runs_dir=tmp_path, jobs=1)
    for event in execution:
        if event.kind == "finished":
            shutil.copytree(execution.folder, tmp_path / "then" / "studies" / "units-half")
            break
    execution = prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path / "then", jobs=1)
    list(execution)
    assert "had figures with 3 seeds" in read_result(execution.folder).cautions[0]


def test_weights_that_are_gone_are_not_kept(tmp_path, text):
    study = load_study(written(tmp_path, text), "half")
    for keep, seeds, said in ((False, 2, ""), (True, 3, "of 4 runs that had ended before no weights are left to keep")):
        study = load_study(written(tmp_path, text), "half", seeds=seeds)
        execution = prepare_study(study, runs_dir=tmp_path, jobs=1, keep_weights=keep)
        notes = " ".join(event.text for event in execution if event.kind == "note")
        assert notes.startswith(said)
        assert bool(notes) == bool(said)


def test_an_arm_starts_from_weights_that_fit_only(tmp_path, text):
    path = written(tmp_path, text.replace("dense = [32]", 'dense = [32]\nafter = "narrow"'))
    says = "arm 'wide' cannot start from the weights of 'narrow': dense_1.bias differs"
    with pytest.raises(InputError, match=re.escape(says)):
        prepare_study(load_study(path), runs_dir=tmp_path)


def test_values_of_an_arm_that_starts_from_anothers_weights_cannot_be_swept(tmp_path, text):
    tuned = text.replace("[scale.screen]", "[tuning.values]\nnarrow = [0.1, 0.2]\nwide = [0.1, 0.2]\n[scale.screen]")
    tuned = tuned.replace("network.dense = [32]", 'network.dense = [2]\nafter = "narrow"')
    study = load_study(written(tmp_path, tuned), "half")
    prepare_study(study, runs_dir=tmp_path)
    with pytest.raises(InputError, match=r"line \d+: arm 'wide' starts from the weights of 'narrow': --tune would try"):
        prepare_study(study, runs_dir=tmp_path, tune=True)


@pytest.mark.parametrize("again", ['arm = "wide"', 'arm = "narrow"\nagainst = "wide"'])
def test_a_comparison_counts_once(tmp_path, text, again):
    twice = text + f'[[comparisons]]\narm = "wide"\n[[comparisons]]\n{again}\n'
    with pytest.raises(InputError, match="are compared twice"):
        load_study(written(tmp_path, twice))


def test_a_study_of_cifar10_by_its_path_comes_to_its_end(data_folder, tmp_path, text, monkeypatch):
    """As every study that `diagnose` leaves beside a run on CIFAR-10."""
    monkeypatch.setattr(cifar, "CIFAR10_FINGERPRINTS", load_images(data_folder).fingerprints)
    execution = prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1)
    assert execution.images.name == "cifar10:100"
    for cell in execution.cells:
        list(train_cell(cell, execution.images, execution.setting))
    assert {event.text for event in execution} == {"done before"}
    assert read_result(execution.folder).is_complete


def test_damaged_cells_are_named_and_trained_anew(data_folder, tmp_path, text):
    path = written(tmp_path, text)
    execution = prepare_study(load_study(path, "half"), runs_dir=tmp_path, jobs=1)
    list(execution)
    said = answer(read_result(execution.folder))
    cells = execution.folder / "cells"
    (cells / "wide-seed0" / "recipe.toml").write_text("x")
    (cells / "wide-seed1" / "provenance.json").write_text('{"machine": 3}')
    (cells / "narrow-seed0" / "summary.json").write_bytes(b"")
    (cells / "narrow-seed1" / "metrics.jsonl").unlink()
    result = read_result(execution.folder)
    assert [arm.n for arm in result.arms.values()] == ["0 of 2", "0 of 2"]
    assert "metrics.jsonl: rows are missing; the same command trains it anew" in "\n".join(answer(result))
    notes = {e.cell.name: e.text for e in prepare_study(load_study(path, "half"), runs_dir=tmp_path, jobs=1) if e.text}
    assert "wide-seed0: recipe.toml: not valid TOML" in notes["wide-seed0"]
    assert "provenance.json: damaged: machine" in notes["wide-seed1"]
    assert "summary.json: damaged" in notes["narrow-seed0"]
    assert "narrow-seed1: metrics.jsonl: rows are missing: trained anew, the old run is" in notes["narrow-seed1"]
    assert len(list((execution.folder / "set-aside").iterdir())) == 4
    assert answer(read_result(execution.folder)) == said
    (tmp_path / "studies" / "another").mkdir()
    recorded = json.loads((execution.folder / "study.json").read_text())
    for content in ("x", "{}", json.dumps(recorded | {"scale": 3}), json.dumps(recorded | {"image_shape": None})):
        (tmp_path / "studies" / "another" / "study.json").write_text(content)
        with pytest.warns(UserWarning, match=r"another/study\.json: damaged: .*"):
            assert [found.folder for found in list_results(tmp_path)] == [execution.folder]
    for seconds in ('"x"', "NaN", "null", "-1", "[]"):  # it takes part in no answer, and is counted anew
        damaged = re.sub(r'"seconds": [\d.]+', f'"seconds": {seconds}', json.dumps(recorded))
        (execution.folder / "study.json").write_text(damaged)
        list(prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1))
        assert 0 <= json.loads((execution.folder / "study.json").read_text())["seconds"] < recorded["seconds"]


def test_what_is_no_run_where_a_cells_folder_belongs_is_set_aside(data_folder, tmp_path, text):
    execution = prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1)
    cells = execution.folder / "cells"
    cells.mkdir(parents=True)
    (cells / "wide-seed0").write_text("a note")
    events = list(execution)
    assert [e.text for e in events if e.kind == "failed"] == []
    assert "wide-seed0: what was there is no run" in next(e.text for e in events if e.kind == "note")
    assert (execution.folder / "set-aside" / "wide-seed0-1").read_text() == "a note"
    (cells / "wide-seed0" / "recipe.toml").unlink()
    (cells / "wide-seed0" / "notes.txt").write_text("somebody's own")
    list(prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1))
    assert (execution.folder / "set-aside" / "wide-seed0-2" / "notes.txt").read_text() == "somebody's own"
    assert (cells / "wide-seed0" / "recipe.toml").exists()


def left_after_three_steps(execution):
    """The first cell, begun and saved."""
    cell = execution.cells[0]
    training = _begun(cell, execution.images, execution.setting, pytest.fail)
    steps = iter(training)
    for _ in range(3):
        next(steps)
    training.save()
    steps.close()
    training.close()
    return cell


def test_a_cell_that_no_longer_fits_into_memory_is_kept_and_goes_on_later(data_folder, tmp_path, text, monkeypatch):
    execution = prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1)
    cell = left_after_three_steps(execution)
    with monkeypatch.context() as patch:
        patch.setattr("fromzero.resources.available_memory", lambda: 1e3)
        with pytest.raises(TooLargeError, match="left as it was"):
            _begun(cell, execution.images, execution.setting, pytest.fail)
    again = _begun(cell, execution.images, execution.setting, pytest.fail)
    assert again.state.counters.step == 3
    again.close()
    shutil.rmtree(cell.path)
    (cell.path / "checkpoints").mkdir(parents=True)  # killed before it was a run: nothing to keep
    (cell.path / "metrics.jsonl").touch()
    _begun(cell, execution.images, execution.setting, pytest.fail).close()
    assert not (execution.folder / "set-aside").exists()


def test_a_cell_whose_records_cannot_be_written_is_kept_and_goes_on_later(data_folder, tmp_path, text, monkeypatch):
    execution = prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1)
    cell = left_after_three_steps(execution)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    for name in ("write_atomically", "write_json"):  # rows cut back, and which process writes
        with monkeypatch.context() as patch:
            patch.setattr(f"fromzero.runs.{name}", full)
            began = time.monotonic()
            with pytest.raises(WriteError, match="No space left on device; checkpoints saved before are whole"):
                list(train_cell(cell, execution.images, execution.setting, pytest.fail))
            assert time.monotonic() - began < 20, "it does not wait for a writer that there is not"
    assert not (execution.folder / "set-aside").exists()
    again = _begun(cell, execution.images, execution.setting, pytest.fail)
    assert again.state.counters.step == 3
    again.close()


@pytest.mark.parametrize("name", ["recipe.toml", "provenance.json", "metrics.jsonl", "last.safetensors"])
def test_a_cell_whose_files_cannot_be_read_now_is_kept(name, data_folder, tmp_path, text, monkeypatch):
    execution = prepare_study(load_study(written(tmp_path, text), "half"), runs_dir=tmp_path, jobs=1)
    cell = left_after_three_steps(execution)
    (cell.path / "metrics.jsonl").touch()

    def failing(method):
        def read(self, *arguments, **options):
            if self.name == name:
                raise OSError(errno.EMFILE, "Too many open files")
            return method(self, *arguments, **options)

        return read

    with monkeypatch.context() as patch:
        for method in ("read_text", "read_bytes"):
            patch.setattr(Path, method, failing(getattr(Path, method)))
        with pytest.raises(ReadError, match=rf"{name}.*Too many open files"):
            list(train_cell(cell, execution.images, execution.setting, pytest.fail))
    with Run(cell.path).lock(), pytest.raises(BusyError):  # somebody goes on with it by hand
        _begun(cell, execution.images, execution.setting, pytest.fail)
    assert not (execution.folder / "set-aside").exists()
    assert not list(cell.path.rglob("*.damaged"))
    again = _begun(cell, execution.images, execution.setting, pytest.fail)
    assert again.state.counters.step == 3
    again.close()


def test_weights_go_when_nothing_needs_them_and_a_warm_start_takes_them(data_folder, tmp_path, text):
    arms = '[arms.half]\n\n[arms.again]\nafter = "half"\n'
    path = written(tmp_path, text[: text.index("[arms.narrow]")] + arms + text[text.index("[scale.screen]") :])
    execution = prepare_study(load_study(path, "half"), runs_dir=tmp_path, jobs=1)
    order = [e.cell.name for e in execution if e.kind == "finished"]
    for seed in (0, 1):
        assert order.index(f"half-seed{seed}") < order.index(f"again-seed{seed}")
        again = fromzero.Run(execution.folder / "cells" / f"again-seed{seed}")
        assert Path(again.provenance["from"]["run"]).name == f"half-seed{seed}"
        assert not again.checkpoints.exists()
        with pytest.raises(FromzeroError, match=r"its weights are not there any more .*--keep-weights"):
            last_checkpoint(again)
        assert (execution.folder / "cells" / f"half-seed{seed}" / "checkpoints" / "last.safetensors").exists()
    images = load_images(f"{data_folder}:100")
    assert all(is_finished(cell, images) for cell in execution.cells)
    (execution.cells[0].path / "checkpoints" / "last.safetensors").unlink()
    assert not is_finished(execution.cells[0], images)
    notes = [e.text for e in prepare_study(load_study(path, "half"), runs_dir=tmp_path, jobs=1) if e.kind == "note"]
    assert "half-seed0: its weights, which are needed, are gone or damaged: trained anew" in notes[0]
    assert "again-seed0: half-seed0, from which it starts, is newer: trained anew" in notes[1]
    assert all(is_finished(cell, images) for cell in execution.cells)


def test_a_cell_does_not_start_from_weights_that_are_not_finished(data_folder, tmp_path, text):
    recipe = load_study(written(tmp_path, text), "half").arms["wide"].recipe
    cell = Cell("again", tmp_path / "cells" / "again-seed0", recipe, after=tmp_path / "cells" / "half-seed0")
    with pytest.raises(FromzeroError, match="half-seed0, from whose weights it starts, has not ended"):
        list(train_cell(cell, load_images(recipe.dataset), Setting(recipe.dataset)))


def test_a_failed_cell_is_reported_and_counted(tmp_path, text):
    wild = text.replace("network.dense = [32]", 'optimizer.name = "sgd"\noptimizer.learning_rate = 1e30')
    execution = prepare_study(load_study(written(tmp_path, wild), "half"), runs_dir=tmp_path, jobs=1)
    failed = [e for e in execution if e.kind == "failed"]
    assert {e.cell.name for e in failed} == {"wide-seed0", "wide-seed1"}
    assert "the loss is nan" in failed[0].text or "not finite" in failed[0].text
    result = read_result(execution.folder)
    assert result.arms["wide"].n == "0 of 2"
    assert result.verdict == "undecided"
    said = "\n".join(answer(result))
    assert "arm wide: n = 0 of 2" in said
    assert said.count("failed: wide-seed0") == 1
    write_lessons([result], tmp_path / "page.md")
    assert "**wide: n = 0 of 2** (wide-seed0" in (tmp_path / "page.md").read_text()


def test_where_runs_failed_or_are_missing_nothing_is_settled(finished, tmp_path):
    """Runs fail because of what their arm is; those that are left are another sample, and may say the opposite."""
    _, execution, _ = finished
    folder = tmp_path / "studies" / "units-screen"
    shutil.copytree(execution.folder, folder)
    described = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(described | {"seeds": 7}))
    result = read_result(folder)
    (found,) = result.contrasts
    assert (found.comparison.n, found.verdict, result.verdict) == (6, "undecided", "undecided")
    assert found.adjusted_p <= 0.05
    said = answer(result)
    assert "n = 6 of 7" in said[1]
    assert "undecided while pairs are missing" in said[1]
    assert "to settle" not in said[1]
    write_lessons([result], tmp_path / "page.md", ["units"])
    page = (tmp_path / "page.md").read_text()
    assert "### units, screen: undecided (12 of 14 runs)" in page
    assert "screen: **undecided** (12 of 14 runs)" in page
    assert "| 6 of 7 |" in page


def test_a_study_without_a_pair_has_a_record_of_the_same_shape(finished, tmp_path):
    _, execution, _ = finished
    folder = tmp_path / "units-screen"
    shutil.copytree(execution.folder, folder, ignore=shutil.ignore_patterns("cells"))
    found = json.loads(json.dumps(finite(record(read_result(folder)))))
    (comparison,) = found["comparisons"]
    assert (comparison["difference"], comparison["p"], comparison["pairs"]) == (None, None, {})
    assert (found["setting"]["epochs"], found["setting"]["batch_size"]) == (5, 20)
    assert not read_result(folder).is_begun
    for seed, has_interval in ((0, False), (1, True)):
        for cell in execution.cells:
            if cell.seed == seed:
                shutil.copytree(cell.path, folder / "cells" / cell.name)
        (comparison,) = record(read_result(folder))["comparisons"]
        assert len(comparison["pairs"]) == seed + 1
        assert (comparison["difference"] is not None) == has_interval


def test_a_worker_whose_gpu_fails_goes(monkeypatch):
    """All that it would ask of the GPU fails from then on; another process can go on with the cell."""

    def gone(code):
        raise SystemExit(code)

    monkeypatch.setattr(worker.os, "_exit", gone)
    monkeypatch.setattr(worker, "images_of", lambda setting: None)
    task = worker.Task(None, None)

    def failing(error):
        def fail(*given):
            raise error

        monkeypatch.setattr(worker, "train_cell", fail)

    failing(RuntimeError("a shape"))
    assert worker.outcome_of(task) == {"failed": "RuntimeError: a shape"}
    failing(torch.AcceleratorError("CUDA error"))
    with pytest.raises(SystemExit):
        worker.outcome_of(task)


def test_a_worker_that_dies_is_replaced_and_its_cell_ends_in_the_same_bits(finished, tmp_path, monkeypatch):
    file, whole, _ = finished
    workers = []
    start = pools._Worker.__init__

    def noted(self, *arguments):
        start(self, *arguments)
        workers.append(self)

    monkeypatch.setattr(pools._Worker, "__init__", noted)
    execution = prepare_study(load_study(file, seeds=2), runs_dir=tmp_path, jobs=1)
    killed = 0
    notes = []
    for event in execution:
        if event.kind == "note":
            notes.append(event.text)
        if event.kind == "progress" and event.share > 0 and killed < 2:
            workers[-1].process.kill()
            killed += 1
    assert killed == 2
    assert notes
    assert all("its process ended with signal 9: going on with it" in note for note in notes)
    assert rows_of(execution.folder) == {k: v for k, v in rows_of(whole.folder).items() if k[-1] in "01"}


def test_two_processes_do_not_carry_out_the_same_study(tmp_path, text):
    study = load_study(written(tmp_path, text), "half")
    one, two = (prepare_study(study, runs_dir=tmp_path) for _ in range(2))
    events = iter(one)
    next(events)
    with pytest.raises(FromzeroError, match="another process carries this study out"):
        next(iter(two))
    events.close()


def test_stopping_saves_every_cell(tmp_path, text):
    long = text.replace("epochs = 2", "epochs = 500")
    execution = prepare_study(load_study(written(tmp_path, long), "half"), runs_dir=tmp_path)
    seen = set()
    with pytest.raises(StoppedError, match=r"every run is saved; go on with: fromzero study") as caught:
        for event in execution:
            if event.kind == "progress" and event.share > 0:
                seen.add(event.cell.name)
            if seen:
                os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143
    cell = fromzero.Run(execution.folder / "cells" / seen.pop())
    assert last_checkpoint(cell).state["step"] > 0


def cli(*arguments):
    return [sys.executable, "-W", "ignore", "-m", "fromzero", *map(str, arguments)]


def test_a_study_killed_at_random_five_times_ends_with_the_same_answer(finished, tmp_path):
    file, whole, _ = finished
    rng = random.Random(os.environ.get("FROMZERO_KILLS", "1"))
    command = cli("study", file, "--runs-dir", tmp_path, "--keep-weights")
    folder = tmp_path / "studies" / "units-screen"
    kills, deadline = [], time.monotonic() + 300
    while len(kills) < 5:
        assert time.monotonic() < deadline
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        done = len(list(folder.glob("cells/*/summary.json")))
        limit = time.monotonic() + 60
        while len(list(folder.glob("cells/*/metrics.jsonl"))) <= done and time.monotonic() < limit:
            time.sleep(0.01)  # until a cell is under way that was not before
        time.sleep(rng.uniform(0, 0.3))
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if len(list(folder.glob("cells/*/summary.json"))) == 12:
            pytest.fail("it was over before it could be killed five times")
        assert process.returncode in (-number, 128 + number), errors
        kills.append(number)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert rows_of(folder) == rows_of(whole.folder)
    for cell in whole.cells:
        assert first_difference(fromzero.Run(cell.path), fromzero.Run(folder / "cells" / cell.name)) is None
    assert answer(read_result(folder)) == answer(read_result(whole.folder))


# ---- answers


def test_the_answer_is_what_the_run_folders_say(finished):
    _, execution, runs_dir = finished
    result = read_result(execution.folder)
    rows = rows_of(execution.folder)
    wide, narrow = ([rows[f"{arm}-seed{s}"][-1]["val/accuracy"] for s in range(6)] for arm in ("wide", "narrow"))
    differences = np.subtract(wide, narrow)
    found = result.contrasts[0]
    assert found.comparison.n == 6
    assert found.comparison.difference.mean == pytest.approx(differences.mean())
    assert found.comparison.p == stats.sign_flip_p(differences)
    assert found.comparison.correlation == pytest.approx(np.corrcoef(wide, narrow)[0, 1])
    assert list(found.pairs.values()) == pytest.approx(list(differences))
    assert found.verdict == "supported", "32 units against 2, the arms of this test, are told apart by any seed"
    assert result.verdict == "supported"
    assert found.new_images.mean == pytest.approx(differences.mean())
    assert found.smallest == pytest.approx(stats.detectable_effect(6) * differences.std(ddof=1))
    assert result.is_complete
    assert [r.folder for r in list_results(runs_dir)] == [execution.folder]
    said = answer(result)
    assert said[0].startswith("units (screen): supported. More units reach more.")
    assert f"{100 * differences.mean():+.2f}" in said[1]
    assert "n = 6" in said[1]


def test_fewer_than_six_pairs_read_undecided_however_clear(finished):
    _, execution, _ = finished
    described = json.loads((execution.folder / "study.json").read_text())
    try:
        (execution.folder / "study.json").write_text(json.dumps(described | {"seeds": 5}))
        result = read_result(execution.folder)
    finally:
        (execution.folder / "study.json").write_text(json.dumps(described))
    assert result.verdict == "undecided"
    assert "5 pairs can settle nothing: 6 at least" in answer(result)[1]


def test_the_generalisation_gap_and_losses_are_metrics(finished, tmp_path, text):
    _, execution, _ = finished
    gap = text.replace('base = "train1"', 'base = "train1"\nmetric = "generalisation_gap"\ndirection = "lower"')
    (execution.folder / "study.toml").write_text(gap)
    try:
        found = read_result(execution.folder).contrasts[0]
    finally:
        (execution.folder / "study.toml").write_text(text)
    rows = rows_of(execution.folder)
    gaps = {name: r[-1]["train/accuracy"] - r[-1]["val/accuracy"] for name, r in rows.items()}
    expected = [gaps[f"wide-seed{s}"] - gaps[f"narrow-seed{s}"] for s in range(6)]
    assert list(found.pairs.values()) == pytest.approx(expected)
    assert found.new_images is None


def test_the_mean_of_the_classes_accuracies_is_a_metric_where_it_was_recorded(finished, text):
    _, execution, _ = finished
    balanced = text.replace('base = "train1"', 'base = "train1"\nmetric = "val/balanced_accuracy"')
    rows, records = rows_of(execution.folder), execution.folder / "cells" / "wide-seed0" / "metrics.jsonl"
    before = records.read_text()
    (execution.folder / "study.toml").write_text(balanced)
    try:
        found = read_result(execution.folder)
        pairs = found.contrasts[0].pairs
        expected = [
            rows[f"wide-seed{s}"][-1]["val/balanced_accuracy"] - rows[f"narrow-seed{s}"][-1]["val/balanced_accuracy"]
            for s in range(6)
        ]
        assert list(pairs.values()) == pytest.approx(expected)
        assert found.contrasts[0].new_images is None
        assert "points" in answer(found)[1]
        assert "other images may well say otherwise" in " ".join(answer(found))
        older = [json.loads(line) for line in before.splitlines()]
        for row in older:
            del row["val/balanced_accuracy"]
        records.write_text("".join(json.dumps(row) + "\n" for row in older))
        with pytest.raises(FromzeroError, match=r"wide-seed0: an earlier fromzero did not record its val/balanced_acc"):
            read_result(execution.folder)
        (execution.folder / "study.toml").write_text(text)
        assert "val/balanced_accuracy" not in record(read_result(execution.folder))["arms"]["wide"]["runs"][0]
    finally:
        (execution.folder / "study.toml").write_text(text)
        records.write_text(before)


def test_of_more_than_two_arms_the_means_are_told(finished, text):
    _, execution, _ = finished
    assert not any("by arm" in line for line in answer(read_result(execution.folder)))
    result = read_result(execution.folder)
    three = replace(result, arms=result.arms | {"other": result.arms["narrow"]})
    (line,) = (line for line in answer(three) if "by arm" in line)
    spreads = {name: Spread.of([*arm.values("val/accuracy").values()]) for name, arm in result.arms.items()}
    told = {name: f"{name} {100 * s.mean:.2f} ± {100 * s.sd:.2f}" for name, s in spreads.items()}
    assert told["wide"] in line
    assert line.count(told["narrow"].partition(" ")[2]) == 2
    first = max(spreads, key=lambda name: spreads[name].mean)
    assert line.startswith(
        "  val/accuracy by arm, mean ± standard deviation: " + (told[first] if first == "wide" else "")
    )


def test_pages_link_to_names_with_spaces(finished, tmp_path):
    _, execution, _ = finished
    folder = tmp_path / "studies" / "my units-screen"
    shutil.copytree(execution.folder, folder)
    described = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(described | {"name": "My units"}))
    write_lessons([read_result(folder)], tmp_path / "my page.md", ["My units"])
    page = (tmp_path / "my page.md").read_text()
    assert "](my%20page/my%20units-screen.png)" in page
    assert (tmp_path / "my page" / "my units-screen.png").exists()
    assert "[My units](#my-units)" in page


def test_a_page_says_where_the_code_was_not_what_its_commit_has():
    assert [_commit({"commit": commit}) for commit in ("a" * 40, f"{'a' * 40}-dirty", None)] == [
        "aaaaaaa",
        "aaaaaaa with changes",
        "a commit that was not recorded",
    ]


def test_the_page_is_written_from_the_folders(finished, tmp_path):
    _, _, runs_dir = finished
    results = list_results(runs_dir)
    (tmp_path / "docs").mkdir()
    write_lessons(results, tmp_path / "docs" / "lessons.md")
    page = (tmp_path / "docs" / "lessons.md").read_text()
    for name in LESSONS:
        assert f"## {name}" in page
        assert f"`fromzero study {name}`" in page
    mean = 100 * results[0].contrasts[0].comparison.difference.mean
    assert f"**{mean:+.2f}**" in page
    assert "### units, screen: supported" in page
    assert "--scale screen --seeds 6" in page
    picture = tmp_path / "docs" / "lessons" / "units-screen.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 100_000
    assert "](lessons/units-screen.png)" in page
    assert "| narrow | train1 with `network.channels = [[4], [8]]`, `network.pool = 4`" in page
    assert f"fromzero at {results[0].commits[0]}" in page
    with pytest.raises(InputError, match=r"lessons is no \.md file by its name"):
        write_lessons(results, tmp_path / "lessons")
    blocked = tmp_path / "file"
    blocked.write_text("")
    for place in (blocked, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"page.md: no folder {place}"):
            write_lessons(results, place / "page.md")
    (tmp_path / "own").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_lessons(results, tmp_path / "own.md")
    write_lessons(results, tmp_path / "units.md", ["units"])
    own = (tmp_path / "units.md").read_text()
    assert own.startswith("# Studies\n")
    assert "200 train images of tiny" in own
    assert "notes" not in own
    assert "a quarter of the width" not in own
    assert "padding" not in own
    with pytest.raises(InputError, match=r"no study 'unit' comes with fromzero or was run here; nearest: units"):
        write_lessons(results, tmp_path / "units.md", ["unit"])


def test_what_a_study_found_is_there_for_programs(finished):
    file, execution, runs_dir = finished
    result = read_result(execution.folder)
    subprocess.run(cli("study", file, "--runs-dir", runs_dir), check=True, capture_output=True, timeout=120)
    found = json.loads((execution.folder / "result.json").read_text())
    (comparison,) = found["comparisons"]
    values = {
        arm: [found["arms"][arm]["runs"][str(seed)]["val/accuracy"] for seed in range(6)] for arm in ("narrow", "wide")
    }
    differences = np.subtract(values["wide"], values["narrow"])
    assert list(comparison["pairs"].values()) == pytest.approx(differences.tolist())
    assert comparison["difference"]["mean"] == pytest.approx(differences.mean())
    assert (comparison["p"], comparison["verdict"]) == (result.contrasts[0].comparison.p, "supported")
    assert (found["verdict"], found["complete"], found["seeds"]) == ("supported", True, 6)
    assert found["arms"]["narrow"]["changes"]["network.dense"] == [2]
    assert found["arms"]["wide"]["changes"] == {"network.dense": [32]}
    assert found["images"]["name"] == "tiny"


def test_tuning_gives_every_arm_the_same_budget_and_shows_all_of_it(tmp_path, text):
    values = '[tuning]\nfield = "optimizer.learning_rate"\nseeds = 2\n'
    values += "[tuning.values]\nnarrow = [1e-5, 1e-2]\nwide = [1e-2, 1e30]\n\n"
    tuned = text.replace("[scale.screen]", values + "[scale.screen]")
    tuned = tuned.replace("[recipe]", '[recipe]\noptimizer.name = "sgd"')
    study = load_study(written(tmp_path, tuned), "half")
    execution = prepare_study(study, runs_dir=tmp_path, tune=True, jobs=1)
    assert len(execution.trials) == 8
    events = list(execution)
    assert execution.folder.name == "units-half-tuned"
    scores = sweep(study, execution.folder, execution.images.fingerprints)
    assert scores["wide"][1e30] == [None, None]
    other = tuned.replace('optimizer.name = "sgd"', 'optimizer.name = "sgd"\noptimizer.momentum = 0.5')
    of_another = sweep(load_study(written(tmp_path, other), "half"), execution.folder, execution.images.fingerprints)
    assert {score for values in of_another.values() for row in values.values() for score in row} == {None}
    assert {e.cell.name for e in events if e.kind == "failed"} == {"wide-1e+30-seed1000", "wide-1e+30-seed1001"}
    best = best_values(scores)
    assert best["wide"] == 1e-2
    assert best["narrow"] == max((1e-5, 1e-2), key=lambda v: np.mean(scores["narrow"][v]))
    for cell in execution.cells:
        assert cell.seed < 1000
        assert fromzero.Run(cell.path).recipe.optimizer.learning_rate == best[cell.arm]
    result = read_result(execution.folder)
    assert result.ran.tuned
    assert result.is_complete
    write_lessons([result], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "**on the edge of what was tried**" in page
    assert "1e+30: diverged or missing" in page
    assert "tuned: `optimizer.learning_rate = 0.01`" in page
    assert "  arm wide: optimizer.learning_rate = 0.01" in answer(result)
    assert any(said.startswith("arm wide: optimizer.learning_rate = 0.01 is on the edge") for said in result.remarks)
    assert record(result)["sweep"]["wide"][1e30] == [None, None]


# ---- the command line


def test_the_command_line(finished, tmp_path):
    file, _, runs_dir = finished
    command = cli("study", file, "--runs-dir", runs_dir, "--seeds", "6")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "wide: 1,794 parameters" in done.stdout
    assert "M multiply-adds; train1 with network.channels = [[4], [8]], " in done.stdout
    assert "200 train images, 30% of them for validation, 5 epochs, batches of 20" in done.stdout
    assert "units (screen): supported." in done.stdout
    assert "\x1b" not in done.stdout
    listed = subprocess.run(cli("lessons", "--runs-dir", runs_dir), capture_output=True, text=True)
    assert "units: More units reach more.\n  screen: supported (12 of 12 runs)" in listed.stdout
    assert "note:" not in listed.stdout
    assert "not run yet: fromzero study padding" in listed.stdout
    page = tmp_path / "lessons.md"
    subprocess.run(cli("lessons", "--runs-dir", runs_dir, "--write", page), check=True)
    assert "### units, screen: supported" in page.read_text()
    wrong = subprocess.run(cli("study", "paddin"), capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.strip().count("\n") == 0


# ---- Ray


def test_on_ray_the_cluster_says_how_many_runs_at_once(tmp_path, text):
    with pytest.raises(InputError, match="--jobs: on Ray, as many runs are trained at once as the cluster has cores"):
        prepare_study(load_study(written(tmp_path, text)), runs_dir=tmp_path, place="ray", jobs=2)


def test_a_run_that_another_machine_kept_to_itself_is_no_result(tmp_path, text):
    """As where run folders lie on no shared path."""
    cell = prepare_study(load_study(written(tmp_path, text)), runs_dir=tmp_path).cells[0]
    ray = SimpleNamespace(get=lambda task: {"done": True}, wait=lambda tasks, timeout: (tasks, []))
    train = SimpleNamespace(remote=lambda task: object())
    events = list(_ray_events(ray, train, [cell], Setting("digits"), SimpleNamespace(signal=None)))
    assert [event.kind for event in events] == ["started", "failed"]
    assert "its run folder is not here" in events[1].text
    ray.get = lambda task: {"stopped": True}  # by the same signal as the study
    stopped = _ray_events(ray, train, [cell], Setting("digits"), SimpleNamespace(signal=15))
    assert next(stopped).kind == "started"
    with pytest.raises(StoppedError):
        next(stopped)


def test_images_are_named_for_workers_that_stand_elsewhere(data_folder, tmp_path, text, monkeypatch):
    monkeypatch.chdir(data_folder.parent)
    beside = text.replace(str(data_folder), data_folder.name)
    setting = prepare_study(load_study(written(tmp_path, beside), "half"), runs_dir=tmp_path).setting
    assert setting.dataset == f"{data_folder.resolve()}:100"
    execution = prepare_study(load_study(written(tmp_path, beside), "half"), runs_dir=tmp_path)
    assert {cell.recipe.dataset for cell in execution.cells} == {setting.dataset}


def test_two_ray_workers_one_killed_end_with_the_same_bits(finished, tmp_path):
    """In a process of its own: Ray keeps threads, sockets and warnings to itself there."""
    pytest.importorskip("ray")
    file, whole, _ = finished
    script = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
from fromzero.study.definition import load_study
from fromzero.study import results
from fromzero.study.execution import prepare_study
execution = prepare_study(load_study({str(file)!r}), runs_dir=Path({str(tmp_path)!r}), place="ray", keep_weights=True)
killed = 0
failed = []
for event in execution:
    if event.kind == "failed":
        failed.append(event.text)
    if not killed and event.kind == "progress" and event.share > 0:
        writer = Path(event.cell.path, "writer.json")
        if writer.exists():
            import json
            os.kill(json.loads(writer.read_text())["pid"], signal.SIGKILL)
            killed += 1
print("killed", killed, "failed", failed, "complete", results.read_result(execution.folder).is_complete)
"""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "killed 1 failed [] complete True" in done.stdout
    assert rows_of(tmp_path / "studies" / "units-screen") == rows_of(whole.folder)
    for cell in whole.cells:
        other = fromzero.Run(tmp_path / "studies" / "units-screen" / "cells" / cell.name)
        assert first_difference(fromzero.Run(cell.path), other) is None
