"""The arithmetic behind docs/benchmarks.md: work, ratios, ceilings, targets, verdicts, and the page made of them."""

import argparse
import copy
import inspect
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.__main__ as bench
from benchmarks import figures, lifetime, networks, page, targets, timing
from benchmarks.figures import Spread, Verdict
from benchmarks.targets import FROMZERO, KERAS_BF16, KERAS_FLOAT32, PLAIN_BF16, SIDES
from benchmarks.timing import Stopwatch, WorkerError
from fromzero.kernels import building
from fromzero.recipe import load_recipe
from fromzero.stats import fewest_pairs
from fromzero.study.definition import load_study

TRAIN3 = networks.describe(load_recipe("train3").network)


def test_work_of_train3_counted_by_hand():
    # Multiply-adds: 27·32 and 288·64 on 32×32, 576·128 on 16×16, 1152·256 on 8×8, 2304·512 on 4×4, three dense layers.
    first = 27 * 32 * 1024
    rest = 288 * 64 * 1024 + 576 * 128 * 256 + 1152 * 256 * 64 + 2304 * 512 * 16 + 8192 * 1024 + 1024 * 1024 + 1024 * 10
    assert networks.training_flop(TRAIN3) == 2 * (2 * first + 3 * rest)


def test_ratios_are_taken_pair_by_pair():
    # A slow hour halves both sides of a pair: the ratio stays 2, though medians of the two sides would say otherwise.
    assert Spread.of(figures.ratios([200, 100, 210], [100, 50, 100])) == (2.0, 2.0, 2.1)
    with pytest.raises(ValueError, match="zip"):
        figures.ratios([1, 2], [1])


def test_spread_shows_median_lowest_highest():
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == (2.5, 1.0, 10.0)
    assert Spread.of([1234.4, 1000, 2000]).text() == "1,234 (1,000–2,000)"
    assert Spread.of([0.5]).text(".2f") == "0.50"


@pytest.mark.parametrize(
    ("measured", "at_least", "met"),
    [(2.0, True, True), (1.99, True, False), (2.01, False, False), (2.0, False, True), (math.nan, True, False)],
)
def test_a_figure_that_falls_short_says_so(measured, at_least, met):
    line = Verdict("a ÷ b", Spread.of([measured]), 2.0, "×", at_least).line()
    assert ("FALLS SHORT" in line) is not met
    assert ("met" in line) is met
    assert f"target {'at least' if at_least else 'at most'} 2:" in line


def test_the_median_decides_not_the_best_round():
    assert not Verdict("a", Spread.of([1.0, 1.9, 9.0]), 2.0, "×", at_least=True).met


def test_ceiling_arithmetic():
    found = {"bfloat16": {"product": ("1024", 500.0), "convolution": ("a", 1000.0)}}
    assert targets.ceiling_gigaflops(found, "bfloat16") == 1000.0
    assert figures.images_per_second_at(1000.0, 0.5e9) == 2000.0
    assert targets.share_of_ceiling([500.0, 1000.0], "bfloat16", 0.5e9, [found, found]) == (0.375, 0.25, 0.5)


def test_every_target_of_the_steps_has_a_verdict():
    sides = {KERAS_FLOAT32: [100.0], KERAS_BF16: [250.0], PLAIN_BF16: [300.0], FROMZERO: [600.0]}
    verdicts = targets.step_verdicts({name: sides for name in ("train1", "train2", "train3")})
    words = {v.what: v.word for v in verdicts}
    assert len(words) == 8
    assert words["train1, fromzero ÷ Keras float32"] == "met"  # 6 of 4
    assert words["train3, fromzero ÷ Keras float32"] == "FALLS SHORT"  # 6 of 8
    assert words["train2, fromzero ÷ plain PyTorch bf16"] == "met"  # 2 of 2


def test_cold_starts_are_counted_in_epochs_of_keras():
    # 250 images a second: an epoch of 200 s, a tenth of it 20 s.
    assert figures.epoch_seconds(250.0) == 200.0
    cold = {
        "quick": {"seconds": [19.0, 22.0, 18.0], "keras_epoch_seconds": [200.0, 200.0, 200.0], "accuracy": [0.83] * 3}
    }
    time, accuracy = targets.cold_verdicts(cold)
    assert time.measured.median == pytest.approx(0.095)
    assert (time.word, accuracy.word) == ("met", "FALLS SHORT")
    assert targets.cold_verdicts({"other": cold["quick"]}) == []


def test_unevenness():
    assert figures.unevenness({"50": [1.0, 2.0, 3.0], "100": [9.0, 9.0, 9.0], "1000": [1.0, 2.0, 9.0]}) == 1.0
    assert figures.unevenness({"100": [1.0, 2.0, 3.0], "1000": [1.0, 4.0, 9.0]}) == 2.0


def test_the_stopwatch_leaves_out_first_step_and_warm_up():
    now = iter([100.0, 101.0, 102.0, 103.0, 104.0, 105.0, 106.0, 107.0, 108.0])  # the first step ends at 100
    watch = Stopwatch(warm_up=2.0, seconds=5.0, clock=lambda: next(now))
    ticks = 1
    while not watch.tick(10):
        ticks += 1
    assert (ticks, watch.steps, watch.images_per_second) == (7, 5, 10.0)


RESULTS = {
    "about": {
        "date": "2026-01-02 03:04 UTC", "command": "python -m benchmarks", "commit": "0" * 40, 
        "cores": 2, "python": "3.11", "versions": {"torch": "2.13.0"}, "rounds": 2, "batch_size": 128,
        "load_before": 0.1, "load_after": 2.0, "minutes": 3.0, "precision": "bfloat16", "threads": 2,
        "processor": "P", "instructions": "AVX512 avx512_bf16",
    },
    "work": {"train3": {"parameters": 11_018_058, "flop": networks.training_flop(TRAIN3)}},
    "ways": {"train3": {KERAS_FLOAT32: {"fit": 100.0, "fit, XLA": 10.0}}},
    "steps": {"train3": {side: [100.0 * (n + 1), 110.0 * (n + 1)] for n, side in enumerate(SIDES)}},
    "ceiling": [
        {
            precision: {"product": ["1024", rate], "convolution": ["a", 2 * rate]}
            for precision, rate in (("bfloat16", 500.0), ("float32", 200.0))
        }
        | {"copy_gigabytes_per_second": 10.0}
    ] * 2,
    "cold": {
        "quick": {"seconds": [30.0], "end_seconds": [30.5], "keras_epoch_seconds": [200.0], "accuracy": [0.85],
                  "keras_way": "fit"},
    },
    "cold_failed": {"best": "no memory"},
    "lifetime": {
        "linear": [{"recipe": "train1", "block_steps": 10, "seconds": {"100": [1.0, 1.1], "200": [1.0, 1.1]}}] * 2,
        "start_seconds": [4.0, 5.0],
        "epochs": [
            {"recipe": "train3", "epoch_seconds": 100.0, "evaluation_seconds": seconds, "peak_bytes": 1.5e9}
            for seconds in (6.0, 9.0, 4.0)
        ],
        "late_by_early": [
            {"recipe": "train3", "block_steps": 10, "ratios": [1.0, ratio, 1.4]} for ratio in (1.1, 1.2, 1.3)
        ],
    },
}  # fmt: skip


def test_the_page_shows_every_part_and_what_falls_short(tmp_path):
    written = page.write(RESULTS, tmp_path / "benchmarks.md")
    assert [path.name for path in written] == ["benchmarks.png", "benchmarks.md"]
    assert (tmp_path / "benchmarks.png").stat().st_size < 300_000
    lines = (tmp_path / "benchmarks.md").read_text("utf-8").splitlines()
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == [
        "## Training steps",
        "## The processor's ceiling",
        "## Cold starts",
        "## Cost that grows as the work",
    ]
    text = "\n".join(lines)
    # 5 × against Keras float32 (8 wanted), 2.5 × and 1.25 × against the bf16 sides, 0.15 epochs, evaluation at 6 %.
    assert "train3, fromzero ÷ Keras float32: 5.00 ×, target at least 8: FALLS SHORT" in text
    assert "train3, fromzero ÷ Keras mixed_bfloat16: 2.50 ×, target at least 2: met" in text
    assert "0.150 epochs of Keras float32, train 3, target at most 0.1: FALLS SHORT" in text
    assert "6.00 (4.00–9.00) %, target at most 5: FALLS SHORT" in text
    assert "- Not measured in this run: train1, train2 ÷ Keras mixed_bfloat16; train1 ÷ Keras float32; " in text
    assert "; strong (time and accuracy); best (time and accuracy)" in text
    assert "Keras was trained by `fit`. best failed: no memory." in text
    assert "not to be trusted" not in text
    busy = RESULTS | {"about": RESULTS["about"] | {"load_before": 0.9}}
    assert "**Other work ran when it began, so these figures are not to be trusted.**" in page.text(busy)
    # A slow block in three is no growing cost; the rounds' medians are 1.1, 1.2 and 1.3.
    assert (
        "a step after an epoch ÷ one of a run just begun, in turn: 1.20 (1.10–1.30) ×, target at most 1.1: FALLS"
        in text
    )
    assert "peak memory on CIFAR-10: 1.50 GB, target at most 2: met" in text
    assert "| train3 | fromzero | 525 (500–550) |" in text
    assert "the processor has avx512_bf16" in text
    # The faster of product and convolution is 1,000 GFLOP/s; Keras float32 trains 100 and 110 images a second.
    allowed = 1000e9 / networks.training_flop(TRAIN3)
    assert f"the library's products allow: train3 {1 / ((100 / allowed + 110 / allowed) / 2):.1f} ×" in text


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("cc"), reason="AVX2 is x86's, kernels cc's")
def test_all_sides_can_be_held_to_avx2(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "ENVIRONMENT", {})
    monkeypatch.setattr(os, "environ", {**os.environ})
    timing.hold_to_avx2(tmp_path)
    assert os.environ.items() >= timing.ENVIRONMENT.items() >= timing.AVX2.items()
    assert timing.ENVIRONMENT["PATH"].startswith(f"{tmp_path}{os.pathsep}")
    wanted = inspect.getsource(building.made)
    assert all(f'"{name}"' in wanted and (tmp_path / name).is_file() for name in timing.COMPILERS)
    held = {**os.environ, "FROMZERO_HOME": str(tmp_path / "home")}
    made = "import torch; from fromzero.kernels import building; print(building.made(torch.float32).name)"
    name = subprocess.check_output([sys.executable, "-c", made], env=held, text=True).strip()
    (library,) = (tmp_path / "home" / "kernels").glob(f"{name}-*.so")
    if shutil.which("objdump"):
        assert "%zmm" not in subprocess.check_output(["objdump", "-d", library], text=True)
    version = subprocess.check_output([tmp_path / "cc", "--version"], text=True)
    assert version.splitlines()[0].endswith("-march=haswell")
    monkeypatch.setattr(timing, "AVX2_COMPILER", '#!/bin/sh\nexec {cc} "$@"\n')
    if "avx512f" in Path("/proc/cpuinfo").read_text("utf-8"):
        with pytest.raises(WorkerError, match="cannot be held to AVX2: it compiles for another"):
            timing.hold_to_avx2(tmp_path)


def test_what_is_held_to_avx2_computes_in_float32(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--held-to", "AVX2"])
    arguments = bench.parse()
    assert (arguments.precision, list(arguments.parts), len(arguments.sides)) == ("float32", ["steps", "cold"], 3)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--held-to", "AVX2", "--parts", "steps", "lifetime"])
    with pytest.raises(SystemExit):
        bench.parse()
    assert "--held-to AVX2 does without --parts lifetime" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert (bench.parse().precision, bench.parse().sides) == ("auto", SIDES)
    held = RESULTS | {"about": RESULTS["about"] | {"held_to": "AVX2", "instructions": "AVX2", "precision": "float32"}}
    held["ceiling"] = [{key: rate for key, rate in f.items() if key != "bfloat16"} for f in RESULTS["ceiling"]]
    held["steps"] = {"train3": {side: [100.0, 110.0] for side in arguments.sides}}
    text = page.text(held)
    assert "P, all sides held to AVX2; 2 cores" in text
    assert "Held to AVX2, PyTorch, oneDNN" in text
    assert "| bfloat16 |" not in text
    assert "times as fast as float32 here" not in text


def test_steps_with_adam_have_a_page_of_their_own_and_no_targets(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--optimizer", "adam"])
    arguments = bench.parse()
    assert (arguments.parts, arguments.output.name) == (["steps"], "benchmarks-adam.md")
    assert bench.results_of(arguments).name == "benchmarks-adam.json"
    assert bench.common(arguments)["optimizer"] == {"name": "adam", "learning_rate": 5e-4}
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--optimizer", "adam", "--parts", "cold"])
    with pytest.raises(SystemExit):
        bench.parse()
    assert "--optimizer adam does without --parts cold" in capsys.readouterr().err
    text = page.text(RESULTS | {"about": RESULTS["about"] | {"optimizer": "adam"}})
    assert "The targets are for SGD, and none is compared here." in text
    assert "Batches of 128, Adam, random images" in text
    assert page.verdict_lines(RESULTS | {"about": RESULTS["about"] | {"optimizer": "adam"}}) == []


def test_the_study_of_precisions_changes_nothing_else_in_the_notes_networks():
    study = load_study(Path(bench.__file__).with_name("precision.toml"))
    assert len(study.contrasts) == len(study.arms) / 2 == len(bench.RECIPES)
    assert study.seeds >= fewest_pairs(len(study.contrasts))
    for name, contrast in zip(bench.RECIPES, study.contrasts, strict=True):
        one, other = study.arms[contrast.arm].recipe, study.arms[contrast.against].recipe
        assert (one.precision, other.precision) == ("bfloat16", "float32")
        assert one.model_copy(update={"precision": other.precision, "name": other.name}) == other
        drawn = {"activation_layers": True, "dense_activation_layers": True}  # how a summary shows them, no more
        for part in ("network", "optimizer", "schedule", "augment", "batch_size"):
            ours, theirs = getattr(one, part), getattr(load_recipe(name), part)
            if part == "network":
                ours, theirs = (network.model_copy(update=drawn) for network in (ours, theirs))
            assert ours == theirs, (name, part)


def test_the_page_does_with_the_parts_there_are(tmp_path):
    results = copy.deepcopy({key: RESULTS[key] for key in ("about", "lifetime")})
    results["lifetime"] = {"epochs": [], "not_measured": {"an epoch": "no CIFAR-10"}}
    assert [path.name for path in page.write(results, tmp_path / "benchmarks.md")] == ["benchmarks.md"]
    assert "Not measured in every round: an epoch: no CIFAR-10" in (tmp_path / "benchmarks.md").read_text("utf-8")


def test_rounds_before_one_that_failed_are_kept(monkeypatch):
    left = [1.0, 2.0]

    def measure(*arguments, **options):
        if not left:
            raise WorkerError("worker:\nno memory")
        return left.pop()

    for name in ("with_fewer_and_more", "late_by_early"):
        monkeypatch.setattr(bench.lifetime, name, measure)
    monkeypatch.setattr(bench, "run_worker", lambda *arguments: {"seconds": 3.0})
    results = {}
    bench.run_lifetime(argparse.Namespace(rounds=3, threads=None, data_dir=None), results)
    found = results["lifetime"]
    assert (found["linear"], found["late_by_early"], found["start_seconds"]) == ([2.0, 1.0], [], [3.0] * 3)
    assert set(found["not_measured"].values()) == {"no memory"}
    assert len(found["not_measured"]) == 2


OLD = copy.deepcopy(RESULTS)
OLD["lifetime"]["linear"] = {"3200": [1.0]}  # as they once were


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (json.dumps(OLD), "does not hold what the page shows"),
        (json.dumps(RESULTS)[:-100], "does not hold what the page shows"),
        ("[]", "does not hold what the page shows"),
        (None, "is not there: measure first"),
    ],
)
def test_results_that_cannot_be_shown_are_refused_in_a_line(held, said, tmp_path, monkeypatch):
    if held is not None:
        (tmp_path / "benchmarks.json").write_text(held, "utf-8")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "benchmarks.json")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--render", "--output", str(tmp_path / "page")])
    with pytest.raises(SystemExit, match=said):
        bench.main()
    assert not (tmp_path / "page").exists()


def test_a_run_that_fails_leaves_the_last_results_alone(tmp_path, monkeypatch):
    def fails(arguments, results):
        results["steps"] = {"train1": {}}
        raise WorkerError("no memory")

    monkeypatch.setattr(bench, "RESULTS", tmp_path / "benchmarks.json")
    monkeypatch.setattr(bench, "UNFINISHED", tmp_path / "unfinished.json")
    monkeypatch.setattr(bench, "run_steps", fails)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--parts", "steps"])
    (tmp_path / "benchmarks.json").write_text("whole", "utf-8")
    with pytest.raises(WorkerError):
        bench.main()
    assert (tmp_path / "benchmarks.json").read_text("utf-8") == "whole"
    assert json.loads((tmp_path / "unfinished.json").read_text("utf-8"))["steps"] == {"train1": {}}


def test_a_run_that_trains_when_it_is_told_to(cifar10_dir):
    with lifetime.pace(recipe="train1", data_dir=str(cifar10_dir), threads=None) as seconds:
        assert seconds(2) > seconds(0) >= 0


def test_what_stops_such_a_run_is_said(tmp_path):
    with (
        lifetime.pace(recipe="train1", data_dir=str(tmp_path), threads=None) as seconds,
        pytest.raises(WorkerError, match="cifar-10"),
    ):
        seconds(1)


def test_every_planted_fault_is_a_recipe_that_differs_from_the_healthy_one():
    from benchmarks import planted
    from fromzero.diagnosis import RULES

    for case in planted.CASES:
        assert set(case.problems) <= set(RULES)
        for base in case.bases:
            healthy = planted.recipe_of(base, planted.CASES[0], 3)
            recipe = planted.recipe_of(base, case, 3)
            same = recipe.override({"name": healthy.name}) == healthy
            assert same == (case is planted.CASES[0] or bool(case.images and not case.changes) or bool(case.weights))


def test_trainings_at_a_constant_rate_have_seeds_of_their_own():
    from benchmarks import diagnosis

    def row(case, seed, problem=(), found=()):
        return {"base": "plain", "case": case, "seed": seed, "problem": problem, "found": found} | {
            "autotrainer": [],
            "seconds": 1.0,
        }

    both = ("rate-never-falls", "rate-too-high")
    rows = [row("healthy", 31), row("healthy", 30), row("constant high rate", 40, both, both)]
    assert diagnosis.seeds_of(rows, residual=False) == "seeds 30, 31; at a constant rate 40"
    assert diagnosis.seeds_of(rows[:1], residual=False) == "seed 31"
    assert "of 2 findings 2 are the planted fault (1.000)" in "\n".join(diagnosis.summary(rows))


def test_what_counts_as_named():
    from benchmarks import diagnosis

    def row(problem, found, autotrainer=()):
        return {
            "base": "plain",
            "case": "made up",
            "problem": problem,
            "found": found,
            "seed": 1,
            "seconds": 2.0,
            "autotrainer": autotrainer,
            "train": 0.5,
            "val": 0.5,
        }

    rows = [
        row(["copies"], ["copies"]),
        row(["copies"], ["imbalance", "copies"]),
        row(["copies"], ["imbalance"], ["slow convergence"]),
        row([], []),
        row([], ["overfitting"], ["oscillating"]),
    ]
    assert [diagnosis.verdict(r) for r in rows] == ["first", "named", "missed", "silent", "false alarm"]
    text = "\n".join(diagnosis.summary(rows))
    assert "2 of 3 trainings (0.667), and the first of them in 1" in text
    assert "of 5 findings 2 are the planted fault (0.400)" in text
    assert "1 of 2 have no finding" in text
    assert "raise something in 1 of 3 faulty ones and in 1 of 2 healthy ones" in text
    assert "| copies | 3 | 2 | 1 | imbalance 2 | slow convergence 1 |" in text
    assert "| nothing: healthy | 2 | – | – | overfitting 1 | oscillating 1 |" in text
