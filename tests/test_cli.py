"""The command line as a user meets it: real processes, their output and exit codes."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path, PureWindowsPath

import pytest

import fromzero as library
from fromzero import arguments, cli
from fromzero.errors import command_line, printable
from fromzero.recipe import recipe_names
from fromzero.verify import Verification

FAST = [
    "--recipe",
    "train3",
    "--epochs",
    "2",
    "--network.channels",
    "[[4], [8]]",
    "--network.pool",
    "4",
    "--network.block_dropout",
    "0.1",
]
FAST += ["--network.activation_layers", "true", "--network.dense", "[16]", "--validation.source", "split"]


def fromzero(*arguments, cwd, timeout=120, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fromzero", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "HOME": str(cwd), **environment},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one finished small run on the digits in it."""
    folder = tmp_path_factory.mktemp("trained")
    done = fromzero("train", "digits", *FAST, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_words_behind_two_dashes_are_no_options():
    parsed = arguments.parse(["predict", "--json", "--", "run", "-x.jpg"])
    assert (str(parsed.RUN), [str(path) for path in parsed.PICTURE], parsed.json) == ("run", ["-x.jpg"], True)
    assert arguments.parse(["train", "--recipe", "few", "--", "-photos"]).DATASET == "-photos"
    parsed = arguments.parse(["predict", "run", "a.jpg", "--top", "2", "b.jpg"])
    assert [str(path) for path in parsed.PICTURE] == ["a.jpg", "b.jpg"]


def test_train_prints_a_line_an_epoch_and_where_the_run_is(trained):
    folder, printed = trained
    lines = printed.splitlines()
    assert re.search(r"runs/digits-\d+: train3 on digits", lines[0])
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 2
    pattern = r"epoch   1/2  train 0\.\d{4} \(running 0\.\d{4}\)  val 0\.\d{4} .* images/s  .* left"
    assert re.fullmatch(pattern, epochs[0])
    assert "\x1b" not in printed
    assert (folder / "runs").is_dir()


def test_runs_lists_and_evaluate_repeats_the_recorded_figures(trained):
    folder, _ = trained
    run = library.list_runs(folder / "runs")[0]
    listed = fromzero("runs", cwd=folder).stdout
    assert run.name in listed
    assert f"{run.summary['test/accuracy']:.4f}" in listed
    again = fromzero("evaluate", run.name, cwd=folder)
    assert f"test                         accuracy {run.summary['test/accuracy']:.4f}" in again.stdout
    assert "the run has not ended" not in again.stdout
    assert fromzero("evaluate", run.path, "--checkpoint", "best", cwd=folder).returncode == 0


def test_evaluate_prints_for_programs_what_it_says_in_words(trained, capsys):
    (run, *_) = library.list_runs(trained[0] / "runs")
    assert cli.main(["evaluate", str(run.path), "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["evaluate", str(run.path), "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert (found["run"], found["checkpoint"], found["tta"]) == (str(run.path), "last", "none")
    assert list(found["scores"]) == ["train", "val", "test"]
    for split, scores in found["scores"].items():
        assert scores["accuracy"] == run.summary[f"{split}/accuracy"]
        low, high = scores["interval"]
        line = f"accuracy {scores['accuracy']:.4f} ({low:.4f}–{high:.4f}, 95 % for {scores['images']:,} images)"
        assert line in said
    for name, recall in found["scores"]["test"]["recalls"].items():
        assert f"{name} {recall:.3f}" in said
    test = found["scores"]["test"]
    assert sum(test["class_images"].values()) == test["images"]
    assert f"accuracy by class (mean {test['balanced_accuracy']:.4f}): " in said
    taken_for = test["taken_for"]
    assert {name: sum(row.values()) for name, row in taken_for.items()} == test["class_images"]
    for name, precision in test["precisions"].items():
        answers = sum(row.get(name, 0) for row in taken_for.values())
        assert precision == (taken_for[name].get(name, 0) / answers if answers else None)
    confused = max((n, one, other) for one, row in taken_for.items() for other, n in row.items() if one != other)
    commonest = [
        f"{one} taken for {other} ({n})"
        for one, row in taken_for.items()
        for other, n in row.items()
        if n == confused[0]
    ]
    assert any(f"  confused: {told}" in said for told in commonest)
    assert found["notes"]
    assert all(f"  note: {note}\n" in said for note in found["notes"])


def test_a_run_stopped_within_an_epoch_is_evaluated_as_that(trained, tmp_path, capsys):
    recipe = library.list_runs(trained[0] / "runs")[0].recipe
    stopped = library.new_training(recipe, library.load_images("digits"), runs_dir=tmp_path, name="stopped", threads=1)
    for progress in stopped:
        if progress.counters.step == stopped.timetable.start_of(1) + 1:
            stopped.save()
            break
    assert cli.main(["evaluate", str(stopped.run.path), "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "last weights, of epoch 1 and 1 step of the next" in said
    assert "the test images are scored when it does" in said
    assert "the run has not ended" in said
    assert cli.main(["diagnose", str(stopped.run.path), "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "note: looked at are the weights after epoch 1 and 1 step of the next, scored anew" in said
    found = json.loads((stopped.run.path / "diagnosis.json").read_text())
    assert (found["epoch"], found["steps"]) == (1, 1)
    assert cli.main(["report", str(stopped.run.path), "--threads", "1"]) == 0
    page = stopped.run.path / "report.html"
    assert "and not for these weights" not in page.read_text("utf-8")
    capsys.readouterr()
    best = ["--checkpoint", "best"]  # of the end of the epoch
    assert cli.main(["report", str(stopped.run.path), "--threads", "1", *best]) == 0
    assert "and not for these weights" in page.read_text("utf-8")


def test_runs_says_when_a_run_began_by_the_clock_here(trained, capsys, monkeypatch):
    folder, _ = trained
    shutil.copytree(library.list_runs(folder / "runs")[0].path, folder / "dated" / "run")
    provenance = folder / "dated" / "run" / "provenance.json"
    provenance.write_text(json.dumps(json.loads(provenance.read_text()) | {"started": "2026-11-28T23:30:00Z"}))
    monkeypatch.setenv("TZ", "UTC-2")  # POSIX counts westwards: two hours ahead
    time.tzset()
    try:
        assert cli.main(["runs", "--runs-dir", str(folder / "dated")]) == 0
        assert " 2026-11-29 01:30 " in capsys.readouterr().out
        for damaged in ("{", provenance.read_text().replace("2026-11-28T23:", "9999-12-31T23:")):
            provenance.write_text(damaged)  # its figures still count
            assert cli.main(["runs", "--runs-dir", str(folder / "dated")]) == 0
            assert re.search(r"^run +– ", capsys.readouterr().out, re.MULTILINE)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_runs_cuts_nothing_off_on_a_narrow_terminal(trained, capsys, monkeypatch):
    folder, _ = trained
    run = library.list_runs(folder / "runs")[0]
    monkeypatch.setenv("COLUMNS", "50")
    assert cli.main(["runs", "--runs-dir", str(folder / "runs")]) == 0
    piped = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["runs", "--runs-dir", str(folder / "runs")]) == 0
    narrow = capsys.readouterr().out
    for printed in (piped, narrow):
        assert f"{run.summary['test/accuracy']:.4f}" in printed
        assert run.name in printed
    assert "running" in piped
    assert "not shown, as the terminal is narrow: began, running" in narrow


def test_runs_says_in_which_fields_they_differ_from_their_recipe(tmp_path, tiny_images, capsys):
    for changes in (
        {},
        {"seed": 3, "epochs": 2},
        {"augment.flip": "none"},
        {"augment.flip": "none", "ema_decay": 0.12345678},
    ):
        recipe = library.load_recipe("quick").override(changes)
        library.new_training(recipe, tiny_images, runs_dir=tmp_path, device="cpu", threads=1).close()
    assert cli.main(["runs", "--runs-dir", str(tmp_path)]) == 0
    name = library.list_runs(tmp_path)[0].name
    assert [line for line in capsys.readouterr().out.splitlines() if " with " in line] == [
        f"{name}-3: quick with augment.flip = none",
        f"{name}-4: quick with ema_decay = 0.12345678, augment.flip = none",
    ]


@pytest.mark.parametrize(("command", "code"), [("recipes", 2), ("lessons", 0)])
def test_output_that_is_closed_is_an_error_where_it_is_all_that_there_is(command, code, tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m fromzero {command} >&-", shell=True, capture_output=True, text=True, cwd=tmp_path
    )
    said = "fromzero: standard output is closed, and all that recipes does is print\n" if code else ""
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_a_number_of_thousands_of_digits_is_bad_input(tmp_path):
    for option in ("--seed", "--epochs"):
        done = fromzero("train", "digits:40", "--recipe", "train1", option, f"0x{'f' * 5000}", cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr[-300:]


@pytest.mark.skipif(sys.platform == "win32", reason="no folder is removed there while somebody is in it")
def test_a_folder_that_is_gone_is_said_to_be(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    command = f"cd {place} && rmdir {place} && {sys.executable} -m fromzero train digits"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the folder that you are in cannot be read" in done.stderr


def test_a_data_set_whose_name_is_no_text_is_refused(tmp_path, capsys):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/by\xff")
    assert cli.main(["train", name]) == 2
    assert "is no UTF-8: rename the folder" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["provenance.json", "summary.json", "metrics.jsonl"])
def test_records_without_a_bottom_are_damaged(trained, file, tmp_path, capsys):
    folder, _ = trained
    run = tmp_path / "run"
    shutil.copytree(library.list_runs(folder / "runs")[0].path, run)
    (run / file).write_text('{"a":' * 100_000)
    assert cli.main(["resume", str(run), "--epochs", "9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run}/{file}: " in line


def test_runs_explains_a_mark_only_where_there_is_one(tmp_path, tiny_images, capsys):
    recipe = library.load_recipe("train1").override({"epochs": 1, "batch_size": 500})
    training = library.new_training(recipe, tiny_images, runs_dir=tmp_path, device="cpu", threads=1)
    for epochs, marked in ((0, False), (1, True)):
        for _ in training if epochs else ():
            pass
        cli.main(["runs", "--runs-dir", str(tmp_path)])
        printed = capsys.readouterr().out
        assert f"{epochs}/1" in printed
        assert ("*" in printed) == ("flatters" in printed) == marked


def test_train_from_and_resume_with_more_epochs(trained):
    folder, _ = trained
    first = library.list_runs(folder / "runs")[0]
    again = fromzero("train", "digits", *FAST, "--from", first.name, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert f"starting from the weights of runs/{first.name} ({first.recipe.name}) at step" in again.stdout
    longer = fromzero("resume", library.list_runs(folder / "runs")[-1].name, "--epochs", "3", cwd=folder)
    assert "extended from 2 to 3 epochs: the learning rate is constant" in longer.stdout
    copied = folder / "copied"
    shutil.copytree(first.path, copied)
    shutil.copy(copied / "checkpoints" / "best.safetensors", copied / "checkpoints" / "last.safetensors")
    from_best = fromzero("train", "digits", *FAST, "--from", copied, cwd=folder)
    assert from_best.returncode == 0, from_best.stderr
    assert f"starting from the weights of {copied} ({first.recipe.name})\n" in from_best.stdout
    refused = fromzero("train", "digits", "--from", first.name, cwd=folder)
    assert refused.returncode == 2
    assert "do not fit this network" in refused.stderr
    assert "conv2d_1.weight" in refused.stderr


def test_a_verdict_on_resuming_says_how_often_it_was_tried(trained, capsys):
    folder, _ = trained
    run = library.list_runs(folder / "runs")[0]
    for happened, said in (
        (("SIGKILL",), "after 1 interruption; the run ended before the other 1 (more --epochs"),
        (("SIGKILL", "SIGTERM"), "after 2 interruptions\n"),
    ):
        cli._print_verification(Verification(run, happened, None), 2)
        assert said in capsys.readouterr().out


def test_weights_that_do_not_compute_are_refused_by_evaluate(trained, capsys, monkeypatch):
    folder, _ = trained
    run = library.list_runs(folder / "runs")[0]
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda logits, labels, **_: logits[:, 0] * math.nan)
    assert cli.main(["evaluate", str(run.path), "--threads", "1"]) == 1
    refused = capsys.readouterr().err
    assert f"{run.checkpoints}/last.safetensors: the network's loss is nan" in refused
    assert "try --checkpoint best" in refused


BAD = [
    (["trian"], "unknown command 'trian'; nearest: train"),
    (["evaluate", "x", "--json", ""], "argument FOLDER: "),
    (["train", "digits:500:200"], "'500:200' is no number of train images, as in digits:5000"),
    (["qqqq"], "unknown command 'qqqq'; see: fromzero --help"),
    (["val", "x"], "unknown command 'val'; here it is: fromzero evaluate"),
    (["train", "x", "--verbose"], "unknown option --verbose; see: fromzero train --help"),
    (["train", "x", "--imgsz", "3"], "unknown option --imgsz; here it is: @PIXELS behind the folder, as in photos@64"),
    (
        ["train", "x", "--class_weight", "3"],
        "unknown option --class_weight; here it is: --logit_adjustment 1, where rare",
    ),
    (["tune", "x"], "unknown command 'tune'; here it is: fromzero study"),
    (["resume", "x", "--gpu"], "unknown option --gpu; here it is: --device cuda"),
    (["train", "--epohcs", "3"], "unknown option --epohcs; nearest: --epochs"),
    (["train", "--optimizer.lr", "3"], "unknown option --optimizer.lr; nearest: --optimizer.learning_rate"),
    (
        ["train", "digits", "--recipe", "train1", "--validation.fraction", "0.5"],
        "has no effect with --validation.source test",
    ),
    (
        ["train", "digits", "--recipe", "few", "--validation.source", "fold", "--validation.fraction", "0.5"],
        "has no effect with --validation.source fold",
    ),
    (["train", "digits", "--recipe", "trian2"], "unknown recipe 'trian2'; nearest: train2"),
    (["train", "digits", "--optimizer.name", "adm"], "'adm' is not one of sgd, adam, adamw, muon; nearest: adam"),
    (["train", "digits", "--epochs", "many"], "epochs: 'many'"),
    (["train", "digits", "--epochs"], "argument --epochs: expected one argument"),
    (["train", "digits", "--network.padding", "vald"], "network.padding: 'vald' is not one of same, valid; nearest"),
    (["train", "digits", "--network.channels", "[[32], [], [8], [8]]"], "channels has a block without a convolution"),
    (["train", "digits", "--network.pool", "9"], "leaves no pixel of 32×32 images"),
    (["train", "digist"], "unknown data set 'digist': not a path that exists; nearest: digits"),
    (["train", "digits", "--from", "nothing"], "no run 'nothing'"),
    (["train", "digits", "--threads", "0"], "threads: 0"),
    (["train", "digits", "--device", "tpu"], "unknown device 'tpu'"),
    (["train", "digits", "--device", "cuda:99"], "'cuda:99' is not there"),
    (["train", "digits", "--keep", "0"], "--keep: 0"),
    (["train", "digits", "--dataset", "cifar10"], "two data sets, digits and --dataset cifar10: give one"),
    (["train", "digits", "more"], "unexpected argument 'more'"),
    (["train", "--epochs", "1", "digits", "more"], "unexpected argument 'more'"),
    (["evaluate", "nothing", "--checkpoint", "best", "folder", "more"], "unexpected argument 'more'"),
    (["train", "--data-dir", "nowhere"], "data folder nowhere"),
    (["train", "digits", "--data-dir", "."], "data folder .: digits come with scikit-learn"),
    (["train", ".", "--data-dir", "x"], "data folder x: where . is, its own path says; leave it out"),
    (["train", "--offline"], "cifar-10-binary.tar.gz"),
    (["resume", "nothing"], "no run 'nothing'"),
    (["resume"], "RUN"),
    (["evaluate", "nothing"], "no run 'nothing'"),
    (["evaluate", "x", "--checkpoint", "worst"], "worst"),
    (["--foo"], "unknown option --foo"),
    (["train", "digits", "--partial"], "--partial goes with --from"),
    (["train", "digits", "--checkpoint-minutes", "nan"], "--checkpoint-minutes: nan"),
    (["train", "digits", "--schedule.warmup_epochs", "1e308"], "schedule.warmup_epochs"),
    (["train", "digits", "--network.dense", "[100000000000]"], "network.dense"),
    (["train", "digits", "--network.dense", "512"], "network.dense: 512: a list is meant: [512]\n"),
    (["train", "digits", "--network.dense", "512,256"], "network.dense: '512,256': a list is meant: [512,256]\n"),
    (["train", "digits", "--threads", "99999999999999999999"], "threads: 99999999999999999999"),
    (["train", "digits", "--network.channels", "[32,64]"], "network.channels: 32: a list is meant: [[32]]\n"),
    (["train", "digits", "--name", "a\nb"], "name: 'a\\nb' has characters that cannot be printed"),
    (["train", "cifar10:many"], "'many' is no number of train images, as in cifar10:5000"),
    (["summary", "train1", "--classes", "9" * 5000], "--classes: 99999999999999999999 is not a whole number from 1"),
    (["train", "--", "digits", "--epochs", "1"], "--epochs stands behind --, which ends the options"),
    (["predict", "any", ""], "argument PICTURE: an empty name"),
    (["resume", ""], "argument RUN: an empty name"),  # as of an unset variable: not the folder that one is in
    (["train", "digits", "--from", ""], "argument --from: an empty name"),
    (["lessons", "--write", ""], "argument --write: an empty name"),
    (["runs", "--runs-dir", "a\0b"], "argument --runs-dir: a name with a NUL character"),
    (["verify-resume", "--epochs", "0"], "--epochs: 0 is not a whole number from 1 to 999,999,999"),
    (["verify-resume", "--threads", "0"], "--threads: 0 is not a whole number from 1 to 999,999,999"),
    (["--data-dir", "x", "train", "digits"], "unknown option --data-dir before a command"),
    (["runs", "--runs-dir", "nowhere"], "no folder nowhere"),
    (["summary", "train1", "--classes", "0"], "--classes: 0 is not a whole number from 1 to 999,999,999"),
    (["summary", "train9"], "unknown recipe 'train9'; nearest: train"),
    (["summary", "train1", "--image-shape", "4", "4", "3"], "leaves no pixel of 4×4 images"),
]


def test_what_other_tools_call_it_is_called_something_here():
    from fromzero.recipe import field_types

    options = {f"--{field}" for field in field_types()}
    options |= {name for name in arguments._parsers(None)[1]["train"]._option_string_actions}
    for here in arguments.ELSEWHERE.values():
        assert set(re.findall(r"--[\w.-]+", here)) <= options, here
    commands = {*arguments._parsers(None)[1], "--help"}
    assert set(arguments.COMMANDS_ELSEWHERE.values()) <= commands
    assert not commands & {*arguments.COMMANDS_ELSEWHERE}
    assert not {option.lstrip("-").replace("_", "-") for option in options} & {*arguments.ELSEWHERE}


def test_rates_that_another_optimizer_leaves_behind_are_named(tmp_path, capsys):
    from fromzero.changes import notes_on_changes
    from fromzero.recipe import load_recipe

    def note(*changes):
        values = dict(zip(changes[::2], changes[1::2], strict=True))
        base = load_recipe("few")
        return " ".join(notes_on_changes(base, base.override(values), values))

    assert not note()
    assert not note("optimizer.name", "muon")
    kinds = ["learning_rate 0.24", "head_learning_rate 0.2", "bias_learning_rate 0.2"]
    left = ", ".join(f"--optimizer.{kind}" for kind in kinds)
    assert note("optimizer.name", "adamw") == f"{left} as few has for muon; usual for adamw: 0.001"
    small = ["--network.channels", "[[4]]", "--network.dense", "[]", "--network.head", "mean", "--threads", "1"]
    small += ["--runs-dir", str(tmp_path), "--network.whitening", "0", "--epochs", "1", "--augment.scale", "1"]
    assert cli.main(["train", "digits", "--recipe", "quick", *small, "--optimizer.name", "adam"]) == 0
    assert "note: --optimizer.learning_rate 0.24, " in capsys.readouterr().out
    rates = {f"optimizer.{kind}learning_rate": 0.001 for kind in ("", "head_", "bias_")}
    assert not note("optimizer.name", "adamw", *(part for pair in rates.items() for part in pair))


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_with_exit_code_2(arguments, expected, tmp_path, capsys, monkeypatch):
    """In this process: the messages are the same, and a start of Python for each would take half a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FROMZERO_HOME", str(tmp_path))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("fromzero: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch_size", "7", "--optimizer.learning_rate=0.25"],
        ["--batch-size", "7", "--optimizer.learning-rate=0.25"],
        ["--batch-size=7", "--optimizer.learning-rate", "0.25"],
    ],
)
def test_options_may_be_written_with_hyphens_or_underscores(arguments):
    from fromzero.arguments import parse

    found = vars(parse(["train", "digits", *arguments, "--name", "a_b-c", "--runs_dir", "some_runs-here"]))
    assert (found["batch_size"], found["optimizer.learning_rate"], found["name"]) == ("7", "0.25", "a_b-c")
    assert str(found["runs_dir"]) == "some_runs-here"


def test_help_shows_one_spelling(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "--batch_size" in shown
    assert "--batch-size" not in shown


@pytest.mark.parametrize(
    ("arguments", "name"), [([], "strong"), (["--recipe", "best"], "best"), (["--recipe=quick"], "quick")]
)
def test_help_shows_the_values_of_the_recipe(arguments, name, capsys):
    from fromzero.recipe import load_recipe

    with pytest.raises(SystemExit):
        cli.main(["train", *arguments, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"passes over the train images; see skip_easy ({load_recipe(name).epochs})" in shown
    assert cli.main(["train", "--recipe", "nothing", "--help"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert cli.main(["train", "--help", "--recipe"]) == 2
    assert "see: fromzero train --help" in capsys.readouterr().err


def test_a_training_imports_nothing_that_it_does_not_need(tmp_path, write_cifar):
    """Up to the first step: no compiler of torch, no drawing, no downloading, no data set of another package."""
    folder = write_cifar(tmp_path / "set")
    program = (
        "import sys\n"
        "from fromzero import cli, display\n"
        "def watch(training, console, after_epoch):\n"
        "    steps = iter(training)\n"
        "    next(steps)\n"
        "    next(steps)\n"
        "    print('imported', *sorted(sys.modules), file=sys.stderr)\n"
        "    raise SystemExit\n"
        "display.watch = watch\n"
        f"cli.main(['train', {str(folder)!r}, '--recipe', 'train1', '--batch_size', '50', '--threads', '1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    imported = done.stderr.rpartition("imported ")[2].split()
    assert "torch" in imported, done.stderr
    unneeded = {"torch._dynamo", "sympy", "matplotlib", "sklearn", "scipy", "pooch", "requests"} & set(imported)
    assert not unneeded


def test_no_network_says_where_to_put_the_file_within_five_seconds(tmp_path):
    """A name server that never answers is the worst case; an address that drops packets is the next."""
    started = time.monotonic()
    blocked = {"FROMZERO_CIFAR10_MIRROR": "http://192.0.2.1:9", "FROMZERO_HOME": str(tmp_path), "no_proxy": "*"}
    done = fromzero("train", "cifar10", cwd=tmp_path, **blocked)
    seconds = time.monotonic() - started
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert seconds < 5 + 3, seconds  # three for starting Python on a busy machine


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_says_how_to_resume(number, code, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fromzero", "train", "digits", *FAST, "--epochs", "500"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(number)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert process.returncode == code
    command = re.fullmatch(r"fromzero: stopped and saved at step \d+; go on with: fromzero (resume \S+)\n", errors)
    assert command, errors
    assert list(tmp_path.glob("runs/*/checkpoints/last.safetensors"))


@pytest.mark.parametrize("arguments", [["-c", "import fromzero"], ["-m", "fromzero", "--help"]])
def test_importing_and_asking_for_help_do_not_import_torch(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fromzero" in imported
    assert not imported & {"torch", "numpy", "matplotlib", "sklearn", "rich", "pooch"}


def test_every_command_has_help(tmp_path, capsys):
    assert cli.COMMANDS.keys() == arguments._parsers(None)[1].keys()
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as left:
            cli.main([command, "--help"])
        assert left.value.code == 0
        assert command in capsys.readouterr().out


def test_a_second_signal_leaves_at_once_and_loses_nothing_that_was_saved(tmp_path):
    from fromzero import checkpoint

    process = subprocess.Popen(
        [sys.executable, "-m", "fromzero", "train", "digits", *FAST, "--epochs", "500", "--checkpoint-minutes", "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch   2"):
            break
    folder = next(tmp_path.glob("runs/*/checkpoints"))
    saved = checkpoint.load_last(folder).state["step"]
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in errors
    assert checkpoint.load_last(folder).state["step"] >= saved


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_ends_no_training(tmp_path):
    command = [sys.executable, "-u", "-m", "fromzero", "train", "digits", *FAST, "--epochs", "2", "--threads", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == "warning: output: No space left on device; nothing more is printed\n"
    (run,) = library.list_runs(tmp_path / "runs")
    assert run.has_ended


def test_a_damaged_run_is_named_and_does_not_hide_the_others(trained, capsys):
    import shutil

    folder, _ = trained
    runs = library.list_runs(folder / "runs")
    copy = folder / "copies"
    for name in ("provenance.json", "recipe.toml", "metrics.jsonl", "summary.json", "checkpoints/last.safetensors"):
        for content in (b"", b"{}", b"[1]\n[2]\n", b"\xff\xfe\x00"):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(runs[0].path, copy / "other")
            shutil.copytree(runs[0].path, copy / "whole")
            (copy / "other" / name).write_bytes(content)
            for words in (["evaluate", "other"], ["resume", "other", "--epochs", "9"]):
                if name == "checkpoints/last.safetensors":
                    continue  # the checkpoint before is used, with a warning
                if name in ("metrics.jsonl", "summary.json") and words[0] == "evaluate":
                    continue
                assert cli.main([*words, "--runs-dir", str(copy)]) in (1, 2), (name, content)
                errors = capsys.readouterr().err
                assert f"other/{name}" in errors
                assert errors.count("\n") == 1, errors
            assert cli.main(["runs", "--runs-dir", str(copy)]) == 0
            assert "whole" in capsys.readouterr().out


def test_whoever_stops_reading_does_not_stop_the_training(tmp_path):
    command = f"{sys.executable} -m fromzero train digits {' '.join(map(repr, FAST))} | head -n 1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert list(tmp_path.glob("runs/*/summary.json"))


def test_garbage_collection_is_as_it_was_after_importing():
    import gc

    from fromzero.cli import _importing

    before = gc.get_freeze_count()
    for turn in (gc.disable, gc.enable):
        turn()
        was_on = gc.isenabled()
        with pytest.raises(ImportError), _importing():
            assert not gc.isenabled()
            from fromzero import nothing  # noqa: F401
        assert gc.isenabled() is was_on
    assert gc.get_freeze_count() > before


def test_recipes_are_listed_with_what_they_are_for(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == recipe_names()
    assert [line for line in lines if "The default." in line] == [
        "strong   12 epochs  94 % on CIFAR-10, from scratch. The default."
    ]
    assert any("from scratch" in line and line.startswith("quick ") for line in lines)


def test_what_is_printed_moves_no_cursor():
    assert printable("a\x1b[31mé\t\nb") == "a\\x1b[31mé\\t\nb"


def test_commands_to_be_typed_have_paths_that_every_shell_takes():
    assert command_line("fromzero", "resume", Path("my runs") / "a") == "fromzero resume 'my runs/a'"
    assert (
        command_line("fromzero", "resume", PureWindowsPath(r"runs\digits-1602058"))
        == "fromzero resume runs/digits-1602058"
    )


def test_the_newest_run_on_a_folder_is_proposed_for_its_name(trained, tmp_path):
    run = library.list_runs(trained[0] / "runs")[0]
    shutil.copytree(run.path, tmp_path / "runs" / "digits-1")
    assert "; the newest on it: digits-1\n" in fromzero("predict", "digits", "a.png", cwd=tmp_path).stderr
    shutil.copytree(run.path, tmp_path / "runs" / "digits-2")
    os.utime(tmp_path / "runs" / "digits-1", (1, 1))
    assert "; the newest on it: digits-2\n" in fromzero("evaluate", "digits/", cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["evaluate", "R", "--checkpoint", "best", "F"], {"RUN": Path("R"), "FOLDER": Path("F"), "checkpoint": "best"}),
        (["compare", "R", "O", "--checkpoint", "best", "F"], {"OTHER": Path("O"), "FOLDER": Path("F")}),
        (["compare", "R", "--json", "O", "F"], {"OTHER": Path("O"), "FOLDER": Path("F"), "json": True}),
        (["compare", "R", "O"], {"FOLDER": None}),
        (["train", "--epochs", "3", "photos"], {"DATASET": "photos", "epochs": "3"}),
        (["report", "R", "--checkpoint", "best", "page.html"], {"RUN": Path("R"), "FILE": Path("page.html")}),
    ],
)
def test_words_may_stand_behind_options(words, given):
    found = vars(arguments.parse(words))
    assert {name: found[name] for name in given} == given
