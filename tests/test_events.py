"""A run's curves as TensorBoard reads them."""

import json
import shutil
import sys

import pytest

import fromzero
from fromzero import cli
from fromzero.events import EVENTS, write_events

FIGURES = {
    "accuracy/train": "train/accuracy",
    "accuracy/train_running": "train/running_accuracy",
    "accuracy/val": "val/accuracy",
    "loss/train": "train/loss",
    "loss/train_running": "train/running_loss",
    "loss/val": "val/loss",
    "learning_rate": "learning_rate",
}
TRAIN = ["train", "digits", "--recipe", "quick", "--network.channels", "[[8],[8],[8]]", "--threads", "1"]


def curves_in(run):
    """{tag: [(epoch, value)]} of a run's event file."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run.path / EVENTS))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def is_up_to_date(run):
    rows, found = run.metrics(), curves_in(run)
    assert found.keys() == FIGURES.keys()
    for tag, key in FIGURES.items():
        assert found[tag] == [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in rows], tag
    return True


@pytest.fixture
def watched(tmp_path):
    """A run of two epochs, trained with --tensorboard."""
    pytest.importorskip("tensorboard")
    assert cli.main([*TRAIN, "--epochs", "2", "--runs-dir", str(tmp_path), "--tensorboard"]) == 0
    return fromzero.list_runs(tmp_path)[0]


def test_a_training_and_its_extension_are_there(watched):
    assert is_up_to_date(watched)
    before = (watched.path / EVENTS).read_bytes()
    assert cli.main(["resume", str(watched.path), "--epochs", "3"]) == 0
    assert len(watched.metrics()) == 3
    assert is_up_to_date(watched)
    assert (watched.path / EVENTS).read_bytes().startswith(before), "an open TensorBoard reads on"


def test_epochs_that_were_trained_again_replace_the_old_ones(watched):
    whole = (watched.path / EVENTS).read_bytes()
    watched.cut_metrics(1)
    write_events(watched)
    assert is_up_to_date(watched)
    assert whole.startswith((watched.path / EVENTS).read_bytes())


def test_runs_writes_those_of_all_runs_there(watched, capsys):
    bare = shutil.copytree(watched.path, watched.path.with_name("bare"), ignore=shutil.ignore_patterns(EVENTS))
    assert cli.main(["runs", "--runs-dir", str(bare.parent), "--tensorboard"]) == 0
    assert f"tensorboard --logdir {bare.parent}" in capsys.readouterr().out
    assert (bare / EVENTS).read_bytes() == (watched.path / EVENTS).read_bytes()


@pytest.mark.parametrize("started", ["yesterday", "0001-01-01T00:00:00"])
def test_runs_goes_on_behind_one_that_is_damaged(watched, started, capsys):
    damaged = shutil.copytree(watched.path, watched.path.with_name("damaged"), ignore=shutil.ignore_patterns(EVENTS))
    provenance = json.loads((damaged / "provenance.json").read_text("utf-8")) | {"started": started}
    (damaged / "provenance.json").write_text(json.dumps(provenance), "utf-8")
    assert cli.main(["runs", "--runs-dir", str(damaged.parent), "--tensorboard"]) == 0
    printed = capsys.readouterr()
    assert f"warning: {damaged}/provenance.json: damaged: started: not a time" in printed.err
    assert watched.name in printed.out
    assert not (damaged / EVENTS).exists()


@pytest.mark.filterwarnings("always")
def test_a_training_outlives_events_that_cannot_be_written(watched, capsys):
    (watched.path / EVENTS).unlink()
    (watched.path / EVENTS).mkdir()
    assert cli.main(["resume", str(watched.path), "--epochs", "3"]) == 0
    assert f"warning: {watched.path / EVENTS}: cannot be written: Is a directory" in capsys.readouterr().err
    assert watched.summary["epoch"] == 3


def test_without_the_package_nothing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    assert cli.main([*TRAIN, "--runs-dir", str(tmp_path), "--tensorboard"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not fromzero.list_runs(tmp_path)
