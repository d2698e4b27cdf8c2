"""The loop: what it computes, what it records, and that stopping anywhere changes nothing."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path, PurePath

import filelock
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fromzero
from fromzero import checkpoint, curves, kernels, machine, optim, probe, training
from fromzero.data import Images, ImageSet
from fromzero.display import header
from fromzero.errors import FromzeroError, InputError, NonFiniteError, StoppedError, WriteError
from fromzero.evaluate import Normalise, Outcomes, evaluate, outputs, temperature
from fromzero.files import write_atomically
from fromzero.recipe import Recipe, load_recipe
from fromzero.runs import Run, create_run
from fromzero.sessions import new_training, resumed_training
from fromzero.splits import Data, check_image_set
from fromzero.state import State
from fromzero.steps import Batch, hardest, initial_state, mixed, train_step
from fromzero.timetable import Timetable
from fromzero.trained import last_checkpoint, load_classifier, load_network, load_trained
from fromzero.training import Training
from fromzero.verify import first_difference
from tests import faults

SMALL = {
    "name": "small",
    "epochs": 3,
    "batch_size": 48,
    "clean_train_images": 60,
    "network": {"channels": [[8], [12]], "block_dropout": 0.2, "dense": [16], "dense_dropout": 0.3},
    "validation": {"fraction": 0.2},
}


@pytest.fixture
def small():
    return Recipe.model_validate(SMALL)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "", "a\\b"])
def test_a_runs_name_is_one_folders(name, tiny_images, tmp_path):
    images = replace(tiny_images, name=name)
    with pytest.raises(InputError, match="is to be the name of a folder"):
        create_run(tmp_path / "runs", name)
    if "/" in name:
        with pytest.raises(InputError, match="is to be the name of a folder"):
            new_training("train1", images, runs_dir=tmp_path / "runs", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_options_that_cannot_be_are_refused_before_a_folder_is_made(tiny_images, tmp_path):
    begun = new_training("train1", tiny_images, runs_dir=tmp_path / "begun", threads=1)
    begun.close()
    for options in ({"keep": 0}, {"checkpoint_minutes": -1.0}, {"checkpoint_minutes": math.nan}):
        with pytest.raises(InputError, match="keep: 1 at least, checkpoint_minutes: 0 at least"):
            new_training("train1", tiny_images, runs_dir=tmp_path, **options)
        with pytest.raises(InputError, match="keep: 1 at least, checkpoint_minutes: 0 at least"):
            resumed_training(begun.run, tiny_images, **options)
    for names in (tuple(range(10)), ("a",) * 10):
        with pytest.raises(InputError, match="class_names: expected texts that differ"):
            new_training("train1", replace(tiny_images, class_names=names), runs_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_a_run_that_could_not_be_begun_leaves_nothing_and_says_so(tiny_images, tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Run, "write_recipe", lambda self, recipe: _within(self, full))
    with pytest.raises(WriteError, match="No space left on device; nothing is left of the run: mend that, then begin"):
        new_training("train1", tiny_images, runs_dir=tmp_path, threads=1)
    assert not [*tmp_path.iterdir()]


def _within(run, fails):
    with run._writing("recipe.toml"):
        fails()


@pytest.mark.parametrize("setting", ["matmul", "convolution", "oneDNN", "gradients"])
def test_what_torch_was_made_to_do_before_changes_no_bits(setting, tiny_images, tmp_path, monkeypatch):
    """Settings that notebooks make, each of which gives other bits, or none, where it is left as it is."""
    monkeypatch.setenv("FROMZERO_KERNELS", "off")
    changes = {"epochs": 2, "precision": "float32", "validation.source": "split"}
    small = load_recipe("train1").override(changes)

    def losses():
        run = fromzero.train(small, tiny_images, runs_dir=tmp_path, threads=2)
        if setting == "gradients":
            looked_at = load_trained(run, images=tiny_images)
            assert probe._layers(looked_at.network, looked_at.data, small, looked_at.machine)
        return [row["train/loss"] for row in run.metrics()]

    expected = losses()
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision
    try:
        match setting:
            case "matmul":
                torch.set_float32_matmul_precision("medium")
            case "convolution":
                conv.fp32_precision = "bf16"
            case "oneDNN":
                torch.backends.mkldnn.enabled = False
            case "gradients":
                torch.set_grad_enabled(False)
        assert losses() == expected
    finally:
        torch.set_grad_enabled(True)
        torch.backends.mkldnn.enabled = True
        conv.fp32_precision = before
        torch.set_float32_matmul_precision("highest")


def test_what_cannot_be_undone_in_torch_is_refused(tiny_images, tmp_path):
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode is on: nothing can be trained"):
        new_training("train3", tiny_images, runs_dir=tmp_path, threads=1)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(InputError, match=r"type is torch.float64 .* torch.set_default_dtype\(torch.float32\)"):
            new_training("train3", tiny_images, runs_dir=tmp_path, threads=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not [*tmp_path.iterdir()]
    flushed = (  # by the threads that compute in parallel, too
        "import torch; from fromzero import machine; torch.set_num_threads(2); torch.set_flush_denormal(True)\n"
        "torch.ones(2**20).add(1); machine.prepare('float32', device='cpu', threads=2)"
    )
    done = subprocess.run([sys.executable, "-c", flushed], capture_output=True, text=True, timeout=120)
    assert "torch.set_flush_denormal is on in this process" in done.stderr


def test_switches_of_math_libraries_that_change_bits_are_told_and_refused(tiny_images, tmp_path, monkeypatch):
    training = new_training(load_recipe("train1").override({"epochs": 2}), tiny_images, runs_dir=tmp_path, threads=1)
    training.close()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("MKL_VERBOSE", "0")  # which changes nothing
    with pytest.raises(
        FromzeroError, match=r"\(MKL_CBWR is 'COMPATIBLE', it was not set\), so the result would not be"
    ):
        resumed_training(training.run, images=tiny_images)
    gone_on = resumed_training(training.run, images=tiny_images, allow_inexact=True)
    gone_on.close()
    assert training.run.provenance["resumed"][-1]["switches"] == {"MKL_CBWR": "COMPATIBLE"}
    resumed_training(training.run, images=tiny_images).close()
    monkeypatch.delenv("MKL_CBWR")
    with pytest.raises(FromzeroError, match="MKL_CBWR is not set, it was 'COMPATIBLE'"):
        resumed_training(training.run, images=tiny_images)
    provenance = training.run.provenance
    for damaged in (None, [], {"MKL_CBWR": 1}):
        training.run.write_provenance(provenance | {"switches": damaged})
        with pytest.raises(FromzeroError, match="damaged: switches"):
            resumed_training(training.run, images=tiny_images)
    older = {**provenance, "resumed": []}
    del older["switches"]  # of which nothing is known
    training.run.write_provenance(older)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    resumed_training(training.run, images=tiny_images).close()


def test_what_the_first_weights_had_seen_of_validation_is_counted(tiny_images, tmp_path):
    def begun(fraction, **options):
        changes = {"epochs": 1, "validation.source": "split", "validation.fraction": fraction}
        training = new_training(
            load_recipe("train1").override(changes), tiny_images, runs_dir=tmp_path, threads=1, **options
        )
        training.close()
        return training

    first = begun(0.2)
    assert first.run.doubt_of("validation") == ""
    assert begun(0.2, start_from=first.run).run.doubt_of("validation") == ""
    larger = begun(0.4, start_from=first.run)
    seen = len({*larger.data.held.tolist()} - {*first.data.held.tolist()})
    assert seen > 0
    told = f"{seen} validation images are train images of {first.run.path}, with whose weights it began: validation fl"
    assert larger.run.doubt_of("validation").startswith(told)
    assert told in header(larger)
    provenance = first.run.provenance
    provenance["data"]["held_out"] = "0" * 64  # as an earlier fromzero, which split in another way
    first.run.write_provenance(provenance)
    assert "which may have been trained on its validation images" in begun(0.2, start_from=first.run).run.doubt_of(
        "validation"
    )
    third = begun(0.4, start_from=larger.run)  # whose weights may be those of the first
    assert "which may have been trained on its validation images" in third.run.doubt_of("validation")


def test_the_runs_before_one_are_followed_as_far_as_they_are_there(small, tiny_images, tmp_path):
    runs = [fromzero.train(small, tiny_images, runs_dir=tmp_path, threads=1)]
    for _ in range(2):
        runs.append(fromzero.train(small, tiny_images, runs_dir=tmp_path, threads=1, start_from=runs[-1]))
    assert [run.path for run in runs[2].lineage()] == [run.path for run in reversed(runs)]

    def changed(run, **changes):
        run.write_provenance(run.provenance | changes)

    first = runs[0].provenance
    last = {"run": str(runs[2].path), "started": runs[2].provenance["started"]}
    changed(runs[0], **{"from": runs[2].provenance["from"] | last})  # a ring
    assert len([*runs[2].lineage()]) == 3
    changed(runs[0], started="2100-01-01T00:00:00Z", **{"from": None})
    assert [run.path for run in runs[2].lineage()] == [runs[2].path, runs[1].path]
    runs[0].write_provenance(first)
    (runs[1].path / "provenance.json").write_text("{")
    assert [run.path for run in runs[2].lineage()] == [runs[2].path]


def test_the_runs_before_one_are_found_from_anywhere(small, tiny_images, tmp_path, monkeypatch):
    """Of two projects with runs of the same names; after all runs were moved; and from the old place after one was."""
    for project in ("other", "own"):
        (tmp_path / project).mkdir()
        monkeypatch.chdir(tmp_path / project)
        first = fromzero.train(small, tiny_images, runs_dir=Path("runs"), threads=1)
        first.write_provenance(first.provenance | {"started": f"2026-01-01T00:00:{len(project):02}Z"})
    then = fromzero.train(small, tiny_images, runs_dir=Path("runs"), threads=1, start_from=first)
    run = fromzero.load_run(then.path.resolve())
    monkeypatch.chdir(tmp_path / "other")
    assert [one.path.name for one in run.lineage()] == [then.path.name, first.path.name]
    assert [*run.lineage()][1].path.resolve() == tmp_path / "own" / first.path
    moved = Path(shutil.move(run.path.parent, tmp_path / "moved"))
    run = fromzero.load_run(moved / run.name)
    assert [one.path for one in run.lineage()] == [run.path, moved / first.path.name]
    (tmp_path / "own" / "runs").mkdir()
    shutil.move(moved / first.path.name, tmp_path / "own" / "runs")
    assert [one.path for one in run.lineage()] == [run.path, tmp_path / "own" / first.path]
    shutil.rmtree(tmp_path / "own")
    shutil.copytree(tmp_path / "other" / first.path, moved / first.path.name)  # another run, in the place of that
    assert [one.path for one in run.lineage()] == [run.path]


def test_a_run_folder_holds_everything(small, tiny_images, tmp_path):
    run = fromzero.train(small, tiny_images, runs_dir=tmp_path)
    assert run.path.name == f"{tiny_images.name}-{run.summary['parameters']}"
    assert run.recipe == small.override({"dataset": tiny_images.source})
    assert [row["epoch"] for row in run.metrics()] == [1, 2, 3]
    last = run.metrics()[-1]
    assert last["train/accuracy"] == run.summary["train/accuracy"]
    assert run.summary["best/val/accuracy"] == max(row["val/accuracy"] for row in run.metrics())
    assert 0 <= run.summary["test/accuracy"] <= 1
    assert run.summary["time/seconds"] > 0
    provenance = run.provenance
    assert provenance["data"]["fingerprints"] == tiny_images.fingerprints
    assert provenance["machine"]["threads"] >= 1
    assert (run.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in run.checkpoints.iterdir()}
    assert names == {"last.safetensors", "step-000000000.safetensors", "best.safetensors"}
    again = fromzero.train(small, tiny_images, runs_dir=tmp_path)
    assert again.path.name == run.path.name + "-2"
    assert first_difference(run, again) is None


def test_it_learns(small, tiny_images, tmp_path):
    run = fromzero.train(small.override({"epochs": 12}), tiny_images, runs_dir=tmp_path)
    assert run.summary["test/accuracy"] > 0.5  # ten classes
    assert run.summary["train/loss"] < run.metrics()[0]["train/loss"]


def test_a_step_is_plain_pytorch(small, tiny_images):
    """Two steps without dropout against the same written out with torch alone, in float32."""
    recipe = small.override(
        {"network.block_dropout": 0.0, "network.dense_dropout": 0.0, "optimizer.name": "sgd", "precision": "float32"}
    )
    here = machine.prepare("float32", device="cpu", threads=1)
    state = State.initial(recipe, tiny_images.image_shape, tiny_images.num_classes, "cpu")
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    head = nn.Sequential(nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 10))
    ours = [p for p in state.model.parameters()]
    theirs = [*plain.parameters(), *head.parameters()]
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            other.copy_(mine)
    sgd = torch.optim.SGD(theirs, lr=0.05, momentum=0.9)
    data = Data.of(recipe, tiny_images, "cpu")
    for start in (0, 48):
        pixels = data.train.pixels[start : start + 48]
        batch = Batch(data.normalise(pixels), data.train.labels[start : start + 48])
        loss, correct, logged = train_step(state, batch, 0.05, recipe, 0.0, here)
        x = pixels.permute(0, 3, 1, 2).float() / 255
        logits = head(plain(x).permute(0, 2, 3, 1).flatten(1))
        expected = F.cross_entropy(logits, batch.labels)
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        assert correct == (logged.argmax(1) == batch.labels).sum()
        torch.testing.assert_close(logged, logits, rtol=1e-4, atol=1e-5)
        sgd.zero_grad()
        expected.backward()
        sgd.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own(small, tiny_images, tmp_path):
    orders = {}
    for seed in (0, 1):
        run = new_training(small.override({"seed": seed, "epochs": 2}), tiny_images, runs_dir=tmp_path)
        seen = []
        run._step = lambda indices, seen=seen, run=run: (seen.append(indices.tolist()), count(run, indices))
        for _ in run:
            pass
        second = run.timetable.start_of(1)
        parts = (seen[:second], seen[second:])
        epochs = [[index for batch in part for index in batch] for part in parts]
        everything = list(range(len(run.data.train.labels)))
        assert all(sorted(epoch) == everything for epoch in epochs)
        assert epochs[0] != epochs[1]
        orders[seed] = epochs[0]
    assert orders[0] != orders[1]


def test_the_easiest_images_are_left_out_after_the_first_epoch(small, tiny_images, tmp_path):
    recipe = small.override({"skip_easy": 0.3, "epochs": 4, "batch_size": 48})
    run = new_training(recipe, tiny_images, runs_dir=tmp_path)
    everything = len(run.data.train.labels)
    assert (everything, run.timetable) == (160, (160, 112, 48))
    seen, losses, trained_on = [[]], torch.zeros(everything), train_step

    def watched(state, batch, *others):
        made = trained_on(state, batch, *others)
        (indices,) = batch_of
        losses[indices] = F.cross_entropy(made.logits, batch.labels, reduction="none")
        return made

    batch_of, step = [None], run._step
    run._step = lambda indices: (seen[-1].extend(indices.tolist()), batch_of.__setitem__(0, indices), step(indices))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", watched)
        for progress in run:
            if progress.row:
                hardest = losses.argsort(stable=True)[48:].tolist()
                seen.append([])
                if progress.counters.epoch < 4:
                    expected = set(hardest)
                    assert set(torch.nonzero(~run.state.skipped).flatten().tolist()) == expected
    assert [len(epoch) for epoch in seen] == [160, 112, 112, 112, 0]
    assert all(len(set(epoch)) == len(epoch) for epoch in seen)
    assert set(seen[1]) != set(seen[2])
    assert run.state.counters.step == run.timetable.start_of(4) == 4 + 3 * 3
    assert run.timetable.images_after(13) == 160 + 3 * 112
    assert [row["step"] for row in run.run.metrics()] == [4, 7, 10, 13]


def test_images_that_the_proxy_never_chose_are_not_the_easiest(small, tiny_images, tmp_path):
    """Their losses are not known. Taken for none at all, they would be skipped for ever, class by class, as of equal
    losses the first images go."""
    recipe = small.override(
        {"skip_easy": 0.3, "hardest": 0.5, "epochs": 6, "batch_size": 40, "network.batch_norm": True}
    )
    run = new_training(recipe, tiny_images, runs_dir=tmp_path)
    skipped = []
    for progress in run:
        if progress.row and progress.counters.epoch < 6:
            unknown = torch.isinf(run.state.losses)
            assert not (run.state.skipped & unknown).any()
            skipped.append(run.state.skipped.clone())
    assert all(one.sum() == 48 for one in skipped)
    assert any((one != skipped[0]).any() for one in skipped)
    for changes, refused in (({"hardest": 0.2}, True), ({"hardest": 0.3}, False)):
        with pytest.raises(InputError, match="lower skip_easy or raise hardest") if refused else nullcontext():
            new_training(recipe.override(changes), tiny_images, runs_dir=tmp_path).close()


def test_steps_are_made_of_the_images_that_are_hardest_for_the_proxy(small, tiny_images, tmp_path, monkeypatch):
    recipe = small.override(
        {
            "hardest": 0.4,
            "proxy_channels": [[4], [6]],
            "label_smoothing": 0.1,
            "augment.cutout": 8,
            "precision": "float32",
        }
    )
    run = new_training(recipe, tiny_images, runs_dir=tmp_path, device="cpu", threads=1)
    state, proxy, trained_on, steps = run.state, run.state.proxy, train_step, []
    assert [w.shape[0] for name, w in proxy.model.named_parameters() if w.dim() == 4] == [4, 6]
    drawn, chosen = [], []

    def choosing(proxy, batch, *others):
        proxy.model.train()
        proxy.model.reseed(recipe.seed, state.counters.step, dropout=False)
        drawn.append(
            F.cross_entropy(proxy.model(batch.images).float(), batch.labels, label_smoothing=0.1, reduction="none")
        )
        made = choose(proxy, batch, *others)
        keep = drawn[-1] >= drawn[-1].sort(descending=True).values[round(0.4 * len(batch.labels)) - 1]
        assert torch.equal(made, keep.nonzero()[:, 0])
        chosen.append(len(made))
        return made

    def watched(trained, batch, *others):
        steps.append((trained is proxy, state.counters.step, len(batch.labels)))
        return trained_on(trained, batch, *others)

    choose = hardest
    monkeypatch.setattr(training, "hardest", choosing)
    monkeypatch.setattr(training, "train_step", watched)
    monkeypatch.setattr("fromzero.steps.train_step", watched)  # the proxy's
    for progress in run:
        if progress.row is None and progress.counters.step == 4:
            assert progress.counters.running_images == sum(chosen)
    assert chosen == 3 * [19, 19, 19, 6]  # of 48, 48, 48 and 16
    assert [step for is_proxy, step, _ in steps if not is_proxy] == list(range(12))
    assert [step for is_proxy, step, _ in steps if is_proxy] == [0, 4, 8]
    assert run.timetable.images_after(12) == 3 * 160


def test_of_a_small_last_batch_one_image_is_trained_on(small, tiny_images, tmp_path, monkeypatch):
    recipe = small.override({"hardest": 0.2, "batch_size": 79, "epochs": 1})
    run, chosen = new_training(recipe, tiny_images, runs_dir=tmp_path, threads=1), []

    def choosing(*given):
        chosen.append(hardest(*given))
        return chosen[-1]

    monkeypatch.setattr(training, "hardest", choosing)
    for _ in run:
        pass
    assert [len(made) for made in chosen] == [16, 16, 1]  # of 79, 79 and 2


def test_labels_are_mixed_as_pixels_are(small, tiny_images, tmp_path, monkeypatch):
    recipe = small.override({"augment.cutmix": 0.5, "hardest": 0.5, "label_smoothing": 0.1, "precision": "float32"})
    run = new_training(recipe, tiny_images, runs_dir=tmp_path, device="cpu", threads=1)
    trained_on, seen = train_step, []

    def watched(trained, batch, *others):
        made = trained_on(trained, batch, *others)
        seen.append((trained is run.state.proxy, batch, made))
        return made

    monkeypatch.setattr(training, "train_step", watched)
    monkeypatch.setattr("fromzero.steps.train_step", watched)  # the proxy's
    for _ in run:
        pass
    assert all(batch.targets is None for is_proxy, batch, _ in seen if is_proxy)
    batches = [(batch, made) for is_proxy, batch, made in seen if not is_proxy]
    assert {len(batch.labels) for batch, _ in batches} == {24, 8}  # the harder half of 48 and of 16
    for batch, (loss, correct, logits) in batches:
        targets = batch.targets
        torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
        assert (targets > 0).sum(1).max() == 2  # of images whose labels differ
        assert torch.equal(targets.argmax(1), batch.labels)
        log_probabilities = logits.log_softmax(1)
        expected = -((0.9 * targets + 0.1 / tiny_images.num_classes) * log_probabilities).sum(1).mean()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        assert correct == (logits.argmax(1) == batch.labels).sum()


def test_mixing_shows_two_images_and_says_how_much_of_each(small):
    recipe = small.override({"augment.cutmix": 1.0})
    labels = torch.arange(500) % 4
    plain = Batch(labels.float()[:, None, None, None].expand(500, 1, 20, 20), labels)
    assert mixed(plain, 4, small, 0) is plain
    batch = mixed(plain, 4, recipe, 7)
    shown = torch.stack([(batch.images == label).flatten(1).float().mean(1) for label in range(4)], 1)
    torch.testing.assert_close(batch.targets, shown)
    assert batch.share == plain.share
    assert (batch.labels != labels).any()
    kept = batch.take(torch.tensor([3, 1]))
    assert torch.equal(kept.targets, batch.targets[[3, 1]])
    other = mixed(plain, 4, recipe, 8)
    assert not torch.equal(other.targets, batch.targets)


def test_losses_of_mixed_images_do_not_say_which_are_easy(small):
    with pytest.raises(InputError, match=r"skip_easy goes by the loss of each image, which augment\.cutmix mixes"):
        small.override({"skip_easy": 0.3, "augment.cutmix": 0.5})


def test_a_proxy_that_does_not_fit_is_refused(small, tiny_images, tmp_path):
    for changes, says in (
        ({"hardest": 0.5, "network.pool": [2, 2], "proxy_channels": [[4]]}, "proxy_channels: as .* pool has 2 values"),
        ({"hardest": 0.0}, "hardest: 0.0: input should be greater than 0"),
    ):
        with pytest.raises(InputError, match=says):
            small.override(changes)
    deep = small.override({"hardest": 0.5, "proxy_channels": [[4]] * 6})
    with pytest.raises(InputError, match="leaves no pixel of 32×32 images"):
        new_training(deep, tiny_images, runs_dir=tmp_path)


def test_a_timetable_counts_steps_and_images_of_unequal_epochs():
    table = Timetable(images=10, later_images=5, batch_size=4)  # steps: 3, then 2 an epoch
    assert [table.steps_in(epoch) for epoch in range(3)] == [3, 2, 2]
    assert [table.start_of(epoch) for epoch in range(4)] == [0, 3, 5, 7]
    assert [table.images_after(step) for step in range(8)] == [0, 4, 8, 10, 14, 15, 19, 20]
    assert [table.epochs_after(step) for step in (0, 3, 4, 5, 7)] == [0, 1, 1.5, 2, 3]
    assert [table.steps_before(epochs) for epochs in (0, 0.5, 1, 1.5, 3)] == [0, 1.5, 3, 4, 7]


def test_classes_of_one_image_have_a_clean_accuracy_too(small, tiny_images):
    part = tiny_images.train
    places = [int((part.labels == label).argmax()) for label in range(10)]
    few = dataclasses.replace(part, pixels=part.pixels[places], labels=part.labels[places])
    recipe = small.override({"validation.source": "test", "clean_train_images": 5})
    data = Data.of(recipe, dataclasses.replace(tiny_images, train=few), "cpu")
    assert len(data.clean_train.labels) == 10


def count(run, indices):
    run.state.counters.step += 1
    run.state.counters.running_images += len(indices)


def test_running_accuracy_is_the_mean_over_the_epoch_as_keras_prints_it(small, tiny_images, tmp_path):
    run = new_training(small.override({"epochs": 1}), tiny_images, runs_dir=tmp_path)
    right = images = 0
    for progress in run:
        if progress.loss is not None:
            right, images = progress.counters.running_correct, progress.counters.running_images
        elif progress.row:
            assert images == len(run.data.train.labels)
            assert progress.row["train/running_accuracy"] == right / images


def test_the_clean_train_accuracy_is_taken_in_evaluation_mode_on_a_fixed_part(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path)
    other = new_training(small.override({"seed": 9}), tiny_images, runs_dir=tmp_path)
    assert torch.equal(run.data.clean_train.pixels, other.data.clean_train.pixels)
    assert torch.equal(run.data.validation.pixels, other.data.validation.pixels)
    for _ in run:
        pass
    model = run.state.model.eval()
    with torch.inference_mode(), run.machine.autocast():
        predicted = model(run.data.normalise(run.data.clean_train.pixels)).argmax(1)
    expected = (predicted == run.data.clean_train.labels).double().mean().item()
    assert run.run.summary["train/accuracy"] == expected


def test_evaluating_leaves_the_weights_and_the_next_step_as_they_were(small, tiny_images, tmp_path):
    plain, probed = (new_training(small, tiny_images, runs_dir=tmp_path) for _ in range(2))
    for _ in plain:
        pass
    for progress in probed:
        if progress.row is None:
            evaluate(probed.state.model, *probed.data.test, probed.data.normalise, probed.machine)
    assert first_difference(plain.run, probed.run) is None


def test_standard_normalisation_has_mean_zero_and_deviation_one(small, tiny_images):
    data = Data.of(small.override({"normalise": "standard"}), tiny_images, "cpu")
    x = data.normalise(data.train.pixels)
    assert x.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (x.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-4


VARIANTS = {
    "adam": {},
    "sgd": {"optimizer.name": "sgd", "optimizer.learning_rate": 0.05, "optimizer.nesterov": True},
    "sgd without momentum": {"optimizer.name": "sgd", "optimizer.momentum": 0.0},
    "adamw cosine float32": {
        "optimizer.name": "adamw",
        "optimizer.weight_decay": 0.01,
        "schedule.name": "cosine",
        "schedule.warmup_epochs": 0.5,
        "precision": "float32",
    },
    "everything that makes fast": {
        "batch_size": 53,  # 160 train images: the last batch of an epoch has one
        "label_smoothing": 0.2,
        "ema_decay": 0.9,
        "network.channels": [[16, 16], [24, 24]],
        "skip_easy": 0.4,
        "network.pool": [4, 4],
        "network.pool_after": "first",
        "network.activation": "gelu",
        "network.batch_norm": True,
        "network.residual": True,
        "network.whitening": 1,
        "network.whitening_padding": "same",
        "network.initial": "dirac",
        "network.head": "mean",
        "network.logit_scale": 0.5,
        "network.dropout_from_epoch": 1.5,
        "augment.flip": "alternating",
        "augment.translate": 2,
        "augment.cutout": 8,
        "augment.scale": 0.5,
        "augment.scale_epochs": 1.25,
        "optimizer.name": "muon",
        "optimizer.learning_rate": 0.2,
        "optimizer.head_learning_rate": 0.4,
        "optimizer.bias_learning_rate": 0.05,
        "optimizer.weight_decay": 1e-3,
        "schedule.name": "linear",
    },
    "mixed images, the hardest of each batch": {
        "hardest": 0.6,
        "batch_size": 20,
        "label_smoothing": 0.1,
        "augment.cutmix": 0.7,
        "augment.cutout": 4,
    },
    "the hardest of each batch": {
        "hardest": 0.5,
        "skip_easy": 0.2,
        "batch_size": 20,
        "network.batch_norm": True,
        "network.whitening": 1,
        "network.head": "mean",
        "augment.cutout": 8,
        "augment.flip": "random",
        "augment.scale": 0.5,
        "augment.scale_epochs": 1.25,
        "optimizer.name": "muon",
        "optimizer.learning_rate": 0.1,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_at_every_kind_of_moment_ends_in_the_same_bits(variant, small, tiny_images, tmp_path):
    recipe = small.override(VARIANTS[variant])
    straight = fromzero.train(recipe, tiny_images, runs_dir=tmp_path / "straight")
    broken = new_training(recipe, tiny_images, runs_dir=tmp_path / "broken")
    # mid-epoch, the step before an epoch ends, mid-evaluation (the epoch's last step), and after an evaluation
    second, third = broken.timetable.start_of(1), broken.timetable.start_of(2)
    for stop_at in (1, second - 1, second, third + 1):
        with pytest.raises(StoppedError, match="fromzero resume"):
            for progress in broken:
                if progress.counters.step == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
        broken = resumed_training(broken.run, tiny_images)
    for _ in broken:
        pass
    assert first_difference(straight, broken.run) is None


def test_the_whitening_layer_sees_every_class_where_images_come_class_by_class(monkeypatch, tmp_path):
    labels = np.arange(40) // 10
    pixels = np.broadcast_to((20 + 60 * labels).astype(np.uint8)[:, None, None, None], (40, 32, 32, 3)).copy()
    part = Images(pixels, labels)
    prints = {"train": part.fingerprint(), "test": part.fingerprint()}
    images = ImageSet("sorted", part, part, tuple("abcd"), "made up", prints)
    recipe = load_recipe("quick").override({"validation.source": "test", "precision": "float32"})
    here = machine.prepare("float32", device="cpu", threads=1)
    data, seen = Data.of(recipe, images, "cpu"), []
    monkeypatch.setattr("fromzero.modules.whiten", lambda model, pixels: seen.append(pixels))
    monkeypatch.setattr("fromzero.steps.WHITENING_IMAGES", 8)
    initial_state(recipe, data, here)
    assert len(seen[0]) == 8
    assert len(seen[0].unique()) == 4
    mixed = dataclasses.replace(data, train=data.train.take(np.roll(np.arange(40), 5)))
    initial_state(recipe, mixed, here)
    assert torch.equal(seen[1], data.normalise(mixed.train.pixels[:8])), "of mixed images the first"
    initial_state(recipe.override({"network.whitening": 0}), data, here)
    assert len(seen) == 2


def test_an_edited_recipe_is_not_resumed(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path)
    for progress in run:
        if progress.counters.step == 5:
            run.save()
            break
    run.close()
    path = run.run.path / "recipe.toml"
    whole = path.read_text()
    path.write_text(whole.replace("batch_size = 48", "batch_size = 96"))
    told = r"recipe\.toml: batch_size is 96, but this run was trained with 48: put that back.*--from"
    with pytest.raises(FromzeroError, match=told):
        resumed_training(run.run.path, tiny_images)
    for load in (lambda: load_trained(run.run, images=tiny_images), lambda: load_classifier(run.run)):
        with pytest.raises(FromzeroError, match=told):  # weights may fit a recipe that they are not of
            load()
    path.write_text(whole)
    extended = resumed_training(run.run.path, tiny_images, epochs=4)
    extended.close()
    again = resumed_training(run.run.path, tiny_images)  # whose recipe has the new number of epochs
    assert again.recipe.epochs == 4
    again.close()
    path.write_text(whole.replace("epochs = 3", "epochs = 5"))
    with pytest.raises(FromzeroError, match="epochs is 5, but this run was trained with 4"):
        resumed_training(run.run.path, tiny_images)
    # A field that is newer than the run: it was trained as by that field's default.
    older = run.run.provenance
    del older["recipe"]["augment.cutmix"]
    run.run.write_provenance(older)
    path.write_text(again.recipe.to_toml().replace("cutmix = 0.0", "cutmix = 0.5"))
    with pytest.raises(FromzeroError, match=r"augment.cutmix is 0\.5, but this run was trained with 0\.0"):
        resumed_training(run.run.path, tiny_images)
    path.write_text(again.recipe.to_toml().replace("cutmix = 0.0\n", ""))
    resumed_training(run.run.path, tiny_images).close()


def test_rows_after_the_last_checkpoint_are_cut_not_doubled(small, tiny_images, tmp_path):
    straight = fromzero.train(small, tiny_images, runs_dir=tmp_path / "straight")
    broken = new_training(small, tiny_images, runs_dir=tmp_path / "broken")
    for progress in broken:
        if progress.counters.step == 2:
            broken.save()
        if progress.row and progress.row["epoch"] == 2:
            broken.close()  # as a kill would: no checkpoint since step 2, two rows written
            break
    assert len(broken.run.metrics()) == 2
    with open(broken.run.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "st')  # a row cut in half
    resumed = resumed_training(broken.run, tiny_images)
    assert resumed.state.counters.step == 2
    assert broken.run.metrics() == []
    for _ in resumed:
        pass
    assert first_difference(straight, resumed.run) is None


def test_a_run_killed_before_its_first_checkpoint_starts_anew(small, tiny_images, tmp_path):
    straight = fromzero.train(small, tiny_images, runs_dir=tmp_path / "straight")
    broken = new_training(small, tiny_images, runs_dir=tmp_path / "broken")
    for _ in zip(range(5), broken, strict=False):
        pass
    assert first_difference(straight, fromzero.resume(broken.run, images=tiny_images)) is None


def test_extending_a_constant_rate_equals_training_straight_through(small, tiny_images, tmp_path):
    long = fromzero.train(small.override({"epochs": 5}), tiny_images, runs_dir=tmp_path / "long")
    short = fromzero.train(small, tiny_images, runs_dir=tmp_path / "short")
    with pytest.raises(InputError, match="has ended after 3 epochs; to extend it: fromzero resume"):
        resumed_training(short, tiny_images)
    assert first_difference(long, fromzero.resume(short, images=tiny_images, epochs=5)) is None
    assert short.recipe.epochs == 5


def test_extending_a_run_before_its_cooldown_equals_training_straight_through(small, tiny_images, tmp_path):
    recipe = small.override({"schedule.name": "cooldown", "epochs": 5})
    long = fromzero.train(recipe.override({"epochs": 7}), tiny_images, runs_dir=tmp_path / "long")
    short = new_training(recipe, tiny_images, runs_dir=tmp_path / "short")
    for progress in short:
        if progress.row and progress.row["epoch"] == 3:
            short.save()
            break
    rates = [row["learning_rate"] for row in fromzero.resume(short.run, images=tiny_images, epochs=7).metrics()]
    assert first_difference(long, short.run) is None
    assert rates[:5] == [recipe.optimizer.learning_rate] * 5 > rates[5:]


def test_resuming_elsewhere_is_refused_by_name_unless_allowed(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path, threads=2).run
    with pytest.raises(FromzeroError, match=r"threads: 2 → 1.*leave --threads out, or --allow-inexact"):
        resumed_training(run, tiny_images, threads=1)
    assert resumed_training(run, tiny_images, threads=1, allow_inexact=True).machine.threads == 1
    provenance = run.provenance
    provenance["data"]["fingerprints"]["train"] = "0" * 64
    run.write_provenance(provenance)
    with pytest.raises(FromzeroError, match=r"are not those it was trained on \(train: (\d+), where it had \1, fing"):
        resumed_training(run, tiny_images)
    del provenance["data"]["images"]  # as in runs of before it was recorded
    run.write_provenance(provenance)
    with pytest.raises(FromzeroError, match=r"are not those it was trained on \(train: fingerprint"):
        resumed_training(run, tiny_images)


def test_save_then_train_again(small, tiny_images, tmp_path):
    first = fromzero.train(small, tiny_images, runs_dir=tmp_path)
    second = new_training(small.override({"optimizer.name": "sgd"}), tiny_images, runs_dir=tmp_path, start_from=first)
    weights = checkpoint.load(first.checkpoints / "last.safetensors").tensors
    assert all(torch.equal(t, weights[f"model/{name}"]) for name, t in second.state.model.state_dict().items())
    assert second.state.counters.step == 0
    second.close()
    killed = second.run  # before any step: the weights it started from must not be lost
    assert (
        first_difference(fromzero.resume(killed, images=tiny_images), train_from(first, small, tiny_images, tmp_path))
        is None
    )


def train_from(first, small, images, folder):
    return fromzero.train(small.override({"optimizer.name": "sgd"}), images, runs_dir=folder, start_from=first)


def test_weights_that_do_not_fit_are_refused_with_a_table(small, tiny_images, tmp_path):
    first = fromzero.train(small.override({"epochs": 1}), tiny_images, runs_dir=tmp_path)
    other = small.override({"network.dense": [20]})
    with pytest.raises(InputError) as caught:
        new_training(other, tiny_images, runs_dir=tmp_path / "other", start_from=first)
    assert "dense_1.weight" in str(caught.value)
    assert "(16, 768)" in str(caught.value)
    assert "(20, 768)" in str(caught.value)
    assert "conv2d_1" not in str(caught.value)
    assert not (tmp_path / "other").exists()
    taken = new_training(other, tiny_images, runs_dir=tmp_path / "other", start_from=first, partial=True)
    assert taken.run.provenance["from"]["left"] == ["dense_1.weight", "dense_1.bias", "predictions.weight"]


def test_weights_of_other_classes_are_taken_without_their_last_layer(small, tiny_images, tmp_path):
    first = fromzero.train(small.override({"epochs": 1}), tiny_images, runs_dir=tmp_path)
    others = dataclasses.replace(tiny_images, class_names=tuple(f"other {n}" for n in range(10)))
    with pytest.raises(InputError, match="its classes differ: number 1 is 'airplane' there and 'other 0' here"):
        new_training(small, others, runs_dir=tmp_path / "other", start_from=first)
    taken = new_training(small, others, runs_dir=tmp_path / "other", start_from=first, partial=True)
    assert all(name.startswith("predictions.") for name in taken.run.provenance["from"]["left"])
    assert taken.run.provenance["from"]["left"]


@pytest.mark.parametrize(("exact", "options"), [(True, {}), (False, {"threads": 2}), (False, {"epochs": 4})])
def test_best_weights_of_a_course_that_is_left_are_set_aside(exact, options, small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path, threads=1, checkpoint_minutes=1000)
    with pytest.raises(NonFiniteError):
        for progress in run:
            if progress.row is not None:  # the first epoch, which is the best one so far and was not saved
                run.state.model.get_parameter("predictions.weight").register_hook(lambda gradient: gradient * math.inf)
    best = run.run.checkpoints / checkpoint.BEST
    assert checkpoint.load(best).state["epoch"] == 1
    resumed = resumed_training(run.run, tiny_images, **options, allow_inexact=True)
    assert resumed.state.counters.epoch == 0
    assert best.exists() == exact
    assert best.with_suffix(".abandoned").exists() != exact
    resumed.close()
    # Killed before it has saved, it comes again to a checkpoint that names weights which are not there any more.
    resumed = resumed_training(run.run, tiny_images, allow_inexact=True)
    assert resumed.state.counters.best_epoch == 0
    for _ in resumed:
        pass
    assert checkpoint.load(best).state["epoch"] == resumed.run.summary["best/epoch"]


def test_best_weights_that_are_gone_are_looked_for_anew(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path)
    for progress in run:
        if progress.row is not None:
            run.save()
            break
    best = run.run.checkpoints / checkpoint.BEST
    assert checkpoint.load(best).state["epoch"] == 1
    best.unlink()
    resumed = resumed_training(run.run, tiny_images)
    assert resumed.state.counters.best_epoch == 0
    for _ in resumed:
        pass
    assert checkpoint.load(best).state["epoch"] == resumed.run.summary["best/epoch"] > 1


@pytest.mark.parametrize("poison", ["loss", math.inf, 1e30])
def test_non_finite_values_stop_before_the_weights_change(poison, small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path)
    before = None
    said = r"step 3: .*--optimizer.learning_rate \(it was [\d.e-]+\), or a warm-up"
    with pytest.raises(NonFiniteError, match=said) as caught:
        for progress in run:
            if progress.counters.step == 2:
                weight = run.state.model.get_parameter("predictions.weight")
                if poison == "loss":
                    with torch.no_grad():
                        weight[0, 0] = math.nan
                else:
                    weight.register_hook(lambda gradient: gradient * poison)
                before = {name: t.clone() for name, t in run.state.model.state_dict().items()}
    assert ("the loss is nan" if poison == "loss" else "the gradient of predictions.weight") in str(caught.value)
    after = run.state.model.state_dict()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_weights_that_no_longer_compute_end_in_an_error_not_in_an_accuracy(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path)
    with pytest.raises(NonFiniteError, match=r"train images, the network's loss is nan.*--optimizer.learning_rate"):
        for progress in run:
            if progress.row is None and progress.counters.step == run.timetable.start_of(1):
                with torch.no_grad():
                    run.state.model.get_parameter("predictions.weight")[0, 0] = math.nan
    assert run.run.metrics() == []
    assert run.run.summary is None


def test_a_training_that_overflows_keeps_its_best_weights_and_its_curves(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path)
    best = None
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        for progress in run:
            if progress.row is not None:
                best = {name: t.clone() for name, t in run.state.model.state_dict().items()}
                with torch.no_grad():
                    run.state.model.get_parameter("predictions.weight")[0, 0] = math.nan
    found = checkpoint.load(run.run.checkpoints / checkpoint.BEST)
    assert found.state["epoch"] == len(run.run.metrics()) == 1
    assert all(torch.equal(found.tensors[f"model/{name}"], tensor) for name, tensor in best.items())
    assert (run.run.path / "curves.png").exists()


def test_what_overflows_by_its_decay_is_told_so(small, tiny_images, tmp_path):
    recipe = small.override({"optimizer.name": "adamw", "optimizer.weight_decay": 1e6})
    said = r"try a lower --optimizer.weight_decay \(it was 1e\+06, at a learning rate of"
    with pytest.raises(NonFiniteError, match=said):
        fromzero.train(recipe, tiny_images, runs_dir=tmp_path, threads=1)


def test_test_images_that_cannot_be_scored_are_an_error(small, tiny_images, tmp_path):
    run = new_training(small.override({"validation.source": "split"}), tiny_images, runs_dir=tmp_path)
    with pytest.raises(NonFiniteError, match="on the test images, the network's loss is nan"):
        for progress in run:
            if progress.row is not None and progress.counters.epoch == small.epochs:
                with torch.no_grad():
                    run.state.model.get_parameter("predictions.weight")[0, 0] = math.nan
    assert run.run.summary is None


@pytest.mark.parametrize("where", ["break", "error"])
def test_a_loop_that_is_left_has_saved(where, small, tiny_images, tmp_path):
    straight = fromzero.train(small, tiny_images, runs_dir=tmp_path / "straight", threads=1)
    training = new_training(small, tiny_images, runs_dir=tmp_path, threads=1)
    with suppress(ZeroDivisionError):
        for progress in training:
            if progress.row:
                if where == "error":
                    1 / 0  # noqa: B018
                break
    assert last_checkpoint(training.run).epochs == 1
    run = fromzero.resume(training.run, images=tiny_images)
    assert first_difference(run, straight) is None


def test_asking_to_stop_ends_a_loop_over_trainings(small, tiny_images, tmp_path):
    def many():
        for seed in range(3):
            try:
                for _ in new_training(small.override({"seed": seed}), tiny_images, runs_dir=tmp_path, threads=1):
                    signal.raise_signal(signal.SIGINT)
            except Exception:
                pytest.fail("it is no error")

    with pytest.raises(StoppedError):
        many()
    assert len(fromzero.list_runs(tmp_path)) == 1


def test_a_full_disk_leaves_the_checkpoint_before_whole(small, tiny_images, tmp_path, monkeypatch):
    run = new_training(small, tiny_images, runs_dir=tmp_path)
    iterator = iter(run)
    for _ in range(3):
        next(iterator)
    run.save()
    whole = (run.run.checkpoints / "last.safetensors").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    next(iterator)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FromzeroError, match=r"No space left on device; checkpoints saved before are whole"):
        run.save()
    with pytest.warns(UserWarning, match="No space left on device; checkpoints saved before are whole"):
        iterator.close()  # which cannot save, either
    monkeypatch.undo()
    assert (run.run.checkpoints / "last.safetensors").read_bytes() == whole
    assert resumed_training(run.run, tiny_images).state.counters.step == 3
    other = new_training(small, tiny_images, runs_dir=tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:  # in which the system names no file
        write_atomically(tmp_path / "any", b"")
    assert caught.value.filename == str(tmp_path / "any")
    for name, write in (
        ("summary.json", lambda: other.run.write_summary({})),
        ("recipe.toml", lambda: other.run.write_recipe(other.recipe)),
        ("provenance.json", lambda: other.run.write_provenance({})),
        ("metrics.jsonl", lambda: other.run.cut_metrics(1)),
        ("splits.csv", lambda: other.run.write_splits("")),
    ):
        with pytest.raises(FromzeroError, match=rf"{name}: No space left on device; .* fromzero resume"):
            write()
    shutil.rmtree(other.run.checkpoints)
    with pytest.raises(FromzeroError, match=r"No space left on device; no checkpoint had been saved before; mend that"):
        other.save()


def test_an_extension_that_no_recipe_can_have_leaves_the_run_as_it_was(small, tiny_images, tmp_path):
    run = fromzero.train(small, tiny_images, runs_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with pytest.raises(InputError, match="epochs: 2000000"):
        resumed_training(run, tiny_images, epochs=2_000_000)
    assert before == {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    assert run.earlier_ends == []


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}, {"hardest": 0.5}])
def test_a_best_checkpoint_in_place_of_the_last_is_said_to_be(changes, small, tiny_images, tmp_path):
    run = fromzero.train(small.override(changes), tiny_images, runs_dir=tmp_path)
    shutil.copy(run.checkpoints / "best.safetensors", run.checkpoints / "last.safetensors")
    with pytest.raises(FromzeroError, match="holds weights but not the state of a training"):
        resumed_training(run, tiny_images, epochs=6)


@pytest.mark.parametrize(("kept", "asked", "left"), [(4, None, 4), (4, 2, 2), (1, None, 2)])
def test_a_resume_keeps_as_many_checkpoints_as_are_there(kept, asked, left, small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path, keep=kept)
    for _, _ in zip(range(5), run, strict=False):
        run.save()
    run.close()
    assert checkpoint.num_kept(run.run.checkpoints) == kept
    for _ in resumed_training(run.run, tiny_images, keep=asked):
        pass
    assert checkpoint.num_kept(run.run.checkpoints) == left


def test_weights_and_views_that_there_are_not_are_refused(small, tiny_images, tmp_path):
    run = fromzero.train(small, tiny_images, runs_dir=tmp_path)
    for load in (lambda: load_trained(run, "bset", images=tiny_images), lambda: fromzero.load_classifier(run, "bset")):
        with pytest.raises(InputError, match=r"no weights 'bset'; nearest: best"):
            load()
    classifier = fromzero.load_classifier(run)
    with pytest.raises(InputError, match=r"no views 'mirrors'; nearest: mirror"):
        classifier.predict(torch.from_numpy(tiny_images.test.pixels), "mirrors")


def test_images_without_fingerprints_are_refused(small, tiny_images, tmp_path):
    with pytest.raises(InputError, match=r"fingerprints has no test: Images\.fingerprint\(\)"):
        new_training(small, replace(tiny_images, fingerprints={"train": "a"}), runs_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_files_cannot_be_locked_nothing_is_trained(small, tiny_images, tmp_path, monkeypatch):
    def unsupported(self):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(type(filelock.FileLock(tmp_path / "lock")), "_acquire", unsupported)
    with pytest.raises(FromzeroError, match=r"lies where files cannot be locked.*--runs-dir"):
        new_training(small, tiny_images, runs_dir=tmp_path)


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used(small, tiny_images, tmp_path):
    straight = fromzero.train(small, tiny_images, runs_dir=tmp_path / "straight")
    run = new_training(small, tiny_images, runs_dir=tmp_path / "broken")
    for progress in run:
        if progress.counters.step in (2, 3):
            run.save()
        if progress.counters.step == 5:
            run.close()
            break
    last = run.run.checkpoints / "last.safetensors"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    with pytest.warns(UserWarning, match=r"last\.safetensors: damaged .*checksum.*using step-000000002"):
        resumed = resumed_training(run.run, tiny_images)
    for _ in resumed:
        pass
    assert first_difference(straight, resumed.run) is None


def test_a_training_that_was_left_writes_to_its_run_no_more(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path)
    stands = []
    for progress in run:
        stands.append(progress)
        if progress.counters.step == 3:
            run.save()
            break
    assert [progress.counters.step for progress in stands] == [1, 2, 3]
    for again in (lambda: next(iter(run)), run.save):
        with pytest.raises(FromzeroError, match=r"has ended or was left.*resumed_training"):
            again()
    ended = fromzero.resume(run.run, images=tiny_images)
    assert first_difference(fromzero.train(small, tiny_images, runs_dir=tmp_path), ended) is None
    twice = new_training(small, tiny_images, runs_dir=tmp_path)
    steps = iter(twice)
    next(steps)
    with pytest.raises(FromzeroError, match="has ended or was left"):
        next(iter(twice))
    assert next(steps).counters.step == 2
    twice.save()
    twice.close()
    other = resumed_training(twice.run, tiny_images)
    with pytest.raises(FromzeroError, match="has ended or was left"):
        list(steps)
    for _ in other:
        pass
    assert first_difference(ended, other.run) is None


def test_what_is_computed_between_steps_changes_no_bit(small, tiny_images, tmp_path):
    straight = fromzero.train(small, tiny_images, runs_dir=tmp_path, threads=1)
    run = new_training(small, tiny_images, runs_dir=tmp_path, threads=1)
    for _ in run:
        machine.prepare("float32" if run.machine.precision == "bfloat16" else "bfloat16", threads=2)
    assert first_difference(straight, run.run) is None


def test_an_evaluation_computes_as_its_machine_says(small, tiny_images, tmp_path):
    found = load_trained(fromzero.train(small, tiny_images, runs_dir=tmp_path), images=tiny_images, threads=1)
    of = (found.network, *found.data.validation, found.data.normalise, found.machine)
    before = evaluate(*of).losses
    machine.prepare("float32" if found.machine.precision == "bfloat16" else "bfloat16", threads=2)
    assert torch.equal(evaluate(*of).losses, before)
    assert torch.get_num_threads() == 1


def test_a_lock_whose_file_was_removed_is_still_held(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path).run
    (run.path / "lock").unlink()
    writer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (run.path / "writer.json").write_text(json.dumps({"host": socket.gethostname(), "pid": writer.pid}))
        with pytest.raises(FromzeroError, match=f"process {writer.pid} on"):
            resumed_training(run, tiny_images)
        # Of another host its process says nothing here, nor does one of this host that is our own.
        for host, pid in (("elsewhere", writer.pid), (socket.gethostname(), os.getpid())):
            (run.path / "writer.json").write_text(json.dumps({"host": host, "pid": pid}))
            (run.path / "lock").unlink(missing_ok=True)
            with run.lock():
                pass
    finally:
        writer.communicate()
    assert resumed_training(run, tiny_images)


def test_a_checkpoint_folder_that_was_removed_is_made_anew(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path)
    shutil.rmtree(run.run.checkpoints)
    for _ in run:
        pass
    assert (run.run.checkpoints / "last.safetensors").exists()
    again = new_training(small, tiny_images, runs_dir=tmp_path)
    iterator = iter(again)
    next(iterator)
    shutil.rmtree(again.run.path)
    with pytest.raises(FromzeroError, match="the folder was moved or removed"):
        again.save()
    again.close()


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("provenance.json", "recipe", 3),
        ("provenance.json", "recipe", {}),
        ("provenance.json", "resumed", [3]),
        ("provenance.json", "resumed", [{"machine": {}}]),
        ("provenance.json", "machine", {"device": "cpu", "threads": "two", "precision": "float32"}),
        ("provenance.json", "data", {"name": "a", "source": "b", "fingerprints": {}}),
        ("provenance.json", "from", "nothing"),
        ("metrics.jsonl", "epoch", "one"),
        ("metrics.jsonl", "epoch", 2),
        ("metrics.jsonl", "val/accuracy", None),
        ("metrics.jsonl", "val/loss", "x"),
        ("summary.json", "test/accuracy", True),
    ],
)
def test_what_a_run_recorded_is_read_by_type(file, key, value, small, tiny_images, tmp_path):
    run = fromzero.train(small.override({"epochs": 1}), tiny_images, runs_dir=tmp_path)
    content = json.loads((run.path / file).read_text())
    (run.path / file).write_text(json.dumps(content | {key: value}) + "\n")
    with pytest.raises(FromzeroError, match=rf"{file}: (damaged|line 1 is)"):
        resumed_training(run, tiny_images, epochs=2)


def test_figures_that_were_changed_in_one_record_are_damage(small, tiny_images, tmp_path):
    run = fromzero.train(small.override({"epochs": 1}), tiny_images, runs_dir=tmp_path)
    run.check()
    (row,) = run.metrics()
    (run.path / "metrics.jsonl").write_text(json.dumps(row | {"val/accuracy": row["val/accuracy"] / 2}) + "\n")
    with pytest.raises(
        FromzeroError, match=r"summary.json: damaged: val/accuracy: not as in metrics.jsonl; its weights"
    ):
        run.check()


@pytest.mark.parametrize("key", ["machine", "data", "started", "commit", "recipe", "from", "resumed"])
def test_where_a_run_comes_from_is_all_there(key, small, tiny_images, tmp_path):
    training_ = new_training(small, tiny_images, runs_dir=tmp_path)
    training_.close()
    content = training_.run.provenance
    del content[key]
    training_.run.write_provenance(content)
    with pytest.raises(FromzeroError, match=rf"provenance\.json: damaged: {key}: field required"):
        resumed_training(training_.run, tiny_images)


def test_what_to_do_about_a_damaged_record_is_said(small, tiny_images, tmp_path):
    run = fromzero.train(small, tiny_images, runs_dir=tmp_path)
    (run.path / "folds").mkdir()
    for name, read, then in (
        ("diagnosis.json", lambda: run.diagnosis, rf".*: fromzero diagnose {run.path} writes it anew"),
        ("folds/result.json", lambda: run.cross_validation, "remove it, or write it anew: fromzero cross-validate"),
        ("summary.json", lambda: run.summary, "remove it, then: fromzero resume"),
        ("provenance.json", lambda: run.provenance, "put it back from a copy"),
    ):
        for content in ("{", "[]"):
            (run.path / name).write_text(content)
            with pytest.raises(FromzeroError, match=rf"{name}: damaged: .*; {then}"):
                read()


def test_arrays_of_other_types_and_shapes_are_refused(small, tiny_images, tmp_path):
    """Of kernels that read memory as bytes, floats would be garbage, without a word."""
    train = tiny_images.train
    for wrong, said in (
        (Images(train.pixels.astype(np.float32), train.labels), "expected uint8 .*found float32"),
        (Images(train.pixels, train.labels.astype(np.int32)), "int64 .*labels int32"),
        (Images(train.pixels, train.labels[:-1]), "expected uint8"),
    ):
        with pytest.raises(InputError, match=said):
            new_training(small, dataclasses.replace(tiny_images, train=wrong), runs_dir=tmp_path)
    other = Images(tiny_images.test.pixels[:, :16], tiny_images.test.labels)
    with pytest.raises(InputError, match=r"test images are \(16, 32, 3\) and train images \(32, 32, 3\)"):
        new_training(small, dataclasses.replace(tiny_images, test=other), runs_dir=tmp_path)
    one = dataclasses.replace(tiny_images, class_names=("all",), train=Images(train.pixels, 0 * train.labels))
    with pytest.raises(InputError, match="expected two classes at least, found 1"):
        new_training(small, one, runs_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_training_that_could_not_begin_leaves_no_folder(small, tiny_images, tmp_path):
    calls = faults.count_calls(lambda: new_training(small, tiny_images, runs_dir=tmp_path / "whole").close())
    assert calls > 10
    for n in range(calls):
        error = faults.fail_nth_call(
            lambda: new_training(small, tiny_images, runs_dir=tmp_path / "runs"), n, errno.ENOSPC
        )
        left = [path.name for path in (tmp_path / "runs").iterdir()]
        assert len(left) == (error is None)
        shutil.rmtree(tmp_path / "runs")


def test_a_finished_run_whose_extension_could_not_begin_is_still_finished(small, tiny_images, tmp_path):
    ended = fromzero.train(small, tiny_images, runs_dir=tmp_path)
    shutil.copytree(ended.path, tmp_path / "kept")
    calls = faults.count_calls(lambda: resumed_training(ended, tiny_images, epochs=6).close())
    for n in range(calls):
        shutil.rmtree(ended.path)
        shutil.copytree(tmp_path / "kept", ended.path)
        faults.fail_nth_call(lambda: resumed_training(ended, tiny_images, epochs=6).close(), n, errno.ENOSPC)
        assert ended.recipe.epochs == 6 or ended.has_ended, n
        training_ = resumed_training(ended, tiny_images, epochs=6)
        assert training_.state.counters.epoch == 3
        training_.close()
    assert calls > 5


@pytest.mark.parametrize("at", ["scoring", "drawing"])
def test_a_signal_after_the_last_epoch_stops_too(at, small, tiny_images, tmp_path, monkeypatch):
    recipe = small.override({"validation.source": "split"})
    straight = fromzero.train(recipe, tiny_images, runs_dir=tmp_path / "straight")
    training_ = new_training(recipe, tiny_images, runs_dir=tmp_path / "broken")
    if at == "drawing":
        monkeypatch.setattr(Training, "_draw", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    else:
        scored = Training._evaluated
        stop = lambda self, what, *more: what == "test" and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        monkeypatch.setattr(Training, "_evaluated", lambda self, *given: stop(self, *given) or scored(self, *given))
    with pytest.raises(StoppedError, match="has ended" if at == "drawing" else "fromzero resume"):
        for _ in training_:
            pass
    monkeypatch.undo()
    if at == "scoring":
        for _ in resumed_training(training_.run, tiny_images):
            pass
    assert training_.run.summary["test/loss"] == straight.summary["test/loss"]


def test_curves_cut_off_the_few_losses_beside_which_nothing_would_be_seen():
    usual = [1.0 - step / 100 for step in range(57)]
    assert curves._highest_shown([2.3, *usual, 2.2]) is None
    most = curves._highest_shown([70_000.0, 12.0, *usual])
    assert max(usual) < most < 2
    falling = [2 * math.exp(-epoch / 8) for epoch in range(100)]
    assert curves._highest_shown(falling) is None
    assert curves._highest_shown([5.0] + 50 * [0.0]) is None


def test_a_run_has_a_name_from_inside_its_folder(small, tiny_images, tmp_path, monkeypatch):
    training_ = new_training(small, tiny_images, runs_dir=tmp_path)
    training_.close()
    monkeypatch.chdir(training_.run.checkpoints)
    assert fromzero.load_run("..").name == training_.run.name
    monkeypatch.chdir("..")
    assert fromzero.load_run(".").name == training_.run.name


def test_of_epochs_that_get_as_many_right_the_one_of_the_lowest_loss_is_best(small, tiny_images, tmp_path):
    training_ = new_training(small, tiny_images, runs_dir=tmp_path)
    rows = ((0.5, 1.0), (0.5, 0.9), (0.5, 1.1), (0.4, 0.1), (0.5, 0.9))
    for epoch, (accuracy, loss) in enumerate(rows, 1):
        row = {"epoch": epoch, "step": epoch, "learning_rate": 0.1, "time/seconds": 1.0}
        row |= {f"{split}/{what}": 0.5 for split in ("train", "train/running") for what in ("accuracy", "loss")}
        training_._end_epoch(row | {"val/accuracy": accuracy, "val/loss": loss})
    training_.close()
    assert training_.state.counters.best_epoch == 2


def test_a_run_has_one_writer_from_the_moment_it_is_loaded(small, tiny_images, tmp_path):
    first = new_training(small, tiny_images, runs_dir=tmp_path)
    with pytest.raises(FromzeroError, match="a training in this process still holds this run; end its loop, or close"):
        resumed_training(first.run, tiny_images)
    (first.run.path / "writer.json").write_text(json.dumps({"host": socket.gethostname(), "pid": 1}))
    with pytest.raises(FromzeroError, match="another process writes to this run: process 1 on"):
        resumed_training(first.run, tiny_images)
    first.close()
    second = resumed_training(first.run, tiny_images)
    with pytest.raises(FromzeroError, match="a training in this process still holds this run"):
        resumed_training(first.run, tiny_images)
    for _ in second:
        pass
    assert [row["epoch"] for row in first.run.metrics()] == [1, 2, 3]


def test_the_same_images_in_another_order_are_not_the_same(small, tiny_images, tmp_path):
    training_ = new_training(small, tiny_images, runs_dir=tmp_path)
    training_.close()
    order = np.roll(np.arange(len(tiny_images.train)), 7)
    turned = dataclasses.replace(tiny_images, train=tiny_images.train.take(order))
    assert turned.train.fingerprint() == tiny_images.train.fingerprint()
    with pytest.raises(FromzeroError, match="in another order"):
        resumed_training(training_.run, turned)


@pytest.mark.parametrize("lost", ["all but the best checkpoint", "rows"])
def test_a_run_that_lost_its_record_is_left_as_it_is(lost, small, tiny_images, tmp_path):
    run = fromzero.train(small, tiny_images, runs_dir=tmp_path)
    if lost != "rows":
        for path in run.checkpoints.iterdir():
            if path.stem != "best":
                path.unlink()
    else:
        lines = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run.path / "metrics.jsonl").write_text(lines[0])
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    way_on = "best epoch, .* --checkpoint best" if lost != "rows" else "fromzero train --recipe .*/recipe.toml --from"
    with pytest.raises(FromzeroError, match=f"nothing was changed; .*{way_on}"):
        resumed_training(run, tiny_images, epochs=5)
    assert before == {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}


def test_a_warm_start_survives_a_crash_between_the_renames_of_a_save(small, tiny_images, tmp_path):
    first = fromzero.train(small, tiny_images, runs_dir=tmp_path)
    second = new_training(small, tiny_images, runs_dir=tmp_path, start_from=first)
    second.close()
    (second.run.checkpoints / "last.safetensors").rename(second.run.checkpoints / "step-000000000.safetensors")
    assert resumed_training(second.run, tiny_images).state.counters.step == 0


def test_another_fromzero_is_another_machine(small, tiny_images, tmp_path, monkeypatch):
    run = fromzero.train(small, tiny_images, runs_dir=tmp_path)
    monkeypatch.setattr(machine, "_source_digest", lambda: "0" * 12)
    with pytest.raises(FromzeroError, match=r"fromzero: .* → .*--allow-inexact"):
        resumed_training(run, tiny_images, epochs=4)


def test_a_picture_that_cannot_be_drawn_costs_no_run(small, tiny_images, tmp_path, monkeypatch):
    run = fromzero.train(small.override({"name": "a$^$b"}), tiny_images, runs_dir=tmp_path)
    assert (run.path / "curves.png").exists()
    monkeypatch.setattr("fromzero.curves.curves_png", lambda *ignored: 1 / 0)
    with pytest.warns(UserWarning, match="was not drawn"):
        assert fromzero.train(small, tiny_images, runs_dir=tmp_path).summary


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({"schedule.name": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"schedule.name": "cosine"}, [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]),
        ({"schedule.name": "linear", "schedule.warmup_epochs": 1.0}, [0.5, 1.0, 1.0, 0.5]),
        ({"schedule.name": "cooldown", "epochs": 5}, [*[1.0] * 8, 1.0, 0.5]),
        ({"schedule.name": "cooldown", "epochs": 6, "schedule.warmup_epochs": 1.0}, [0.5, *[1.0] * 9, 1.0, 0.5]),
    ],
)
def test_the_learning_rate_is_a_pure_function_of_the_step(changes, expected, small):
    recipe = small.override({"epochs": 2, "optimizer.learning_rate": 1.0, **changes})
    rates = [optim.learning_rate_at(recipe, step, Timetable(2, 2, 1)) for step in range(2 * recipe.epochs)]
    assert rates == pytest.approx(expected)


def test_the_notes_recipes_say_that_they_validate_on_the_test_images(tiny_images, tmp_path):
    for name in ("train1", "train2", "train3"):
        assert load_recipe(name).validation.source == "test"
    recipe = Recipe.model_validate(SMALL | {"validation": {"source": "test"}})
    run = fromzero.train(recipe, tiny_images, runs_dir=tmp_path)
    assert run.summary["val/source"] == "test"
    assert run.summary["val/accuracy"] == run.summary["test/accuracy"]
    assert json.loads((run.path / "summary.json").read_text())["val/source"] == "test"


@pytest.mark.parametrize(("source", "test_scored"), [("test", 0), ("split", 1)])
def test_the_test_images_are_not_scored_twice(source, test_scored, small, tiny_images, tmp_path, monkeypatch):
    from fromzero import training

    scored = []
    monkeypatch.setattr(training, "evaluate", lambda *given: scored.append(given[2]) or evaluate(*given))
    recipe = small.override({"validation.source": source, "epochs": 2})
    run = new_training(recipe, tiny_images, runs_dir=tmp_path)
    for _ in run:
        pass
    assert len(scored) == 2 * 2 + test_scored
    found = evaluate(run.state.scored, *run.data.test, run.data.normalise, run.machine)
    assert (run.run.summary["test/accuracy"], run.run.summary["test/loss"]) == (found.accuracy, found.loss)


def test_class_with_one_image_cannot_be_split(small, tiny_images):
    part = tiny_images.train.take(np.flatnonzero(tiny_images.train.labels != 3))
    one = tiny_images.train.take(np.flatnonzero(tiny_images.train.labels == 3)[:1])
    images = fromzero.ImageSet(
        name="odd",
        train=type(part)(np.concatenate([part.pixels, one.pixels]), np.concatenate([part.labels, one.labels])),
        test=tiny_images.test,
        class_names=tiny_images.class_names,
        source="odd",
        fingerprints=tiny_images.fingerprints,
    )
    with pytest.raises(InputError, match="one train image"):
        check_image_set(small, images)


def test_the_comparison_names_the_first_difference(small, tiny_images, tmp_path):
    one, two = (fromzero.train(small, tiny_images, runs_dir=tmp_path) for _ in range(2))
    assert first_difference(one, two) is None
    found = checkpoint.load(two.checkpoints / "last.safetensors")
    found.tensors["model/dense_1.weight"][3, 5] += 1e-7
    checkpoint.save(two.checkpoints, found)
    assert first_difference(one, two) == (
        "last.safetensors: model/dense_1.weight differs in 1 of 12,288 values, first at [3, 5]"
    )
    rows = two.metrics()
    two.cut_metrics(1)
    two.append_metrics(rows[1] | {"val/loss": 9.0})
    assert first_difference(one, two).startswith("metrics: val/loss of epoch 2 is ")


def test_the_average_of_the_weights_is_what_is_scored_and_kept(small, tiny_images, tmp_path):
    recipe = small.override({"ema_decay": 0.8, "network.batch_norm": True, "precision": "float32"})
    run = new_training(recipe, tiny_images, runs_dir=tmp_path)
    average = {name: t.clone() for name, t in run.state.model.state_dict().items()}
    for progress in run:
        step = progress.counters.step
        if progress.loss is not None:
            decay = min(0.8, (1 + step) / (10 + step))
            for name, weight in run.state.model.state_dict().items():
                average[name] = decay * average[name] + (1 - decay) * weight
    for name, weight in run.state.average.state_dict().items():
        torch.testing.assert_close(weight, average[name], rtol=1e-4, atol=1e-6)
    network, _ = load_network(run.run, tiny_images.image_shape, tiny_images.num_classes, run.machine)
    assert all(torch.equal(t, network.state_dict()[name]) for name, t in run.state.average.state_dict().items())
    outcomes = evaluate(network, *run.data.validation, run.data.normalise, run.machine)
    assert outcomes.accuracy == run.run.summary["val/accuracy"]
    assert outcomes.loss == run.run.summary["val/loss"]
    recorded = json.loads(json.dumps(run.run.provenance["data"]["normalise"]))
    assert all(map(torch.equal, Normalise.from_json(recorded, "cpu"), run.data.normalise))
    unaveraged = evaluate(run.state.model, *run.data.validation, run.data.normalise, run.machine)
    assert unaveraged.loss != outcomes.loss
    second = new_training(recipe, tiny_images, runs_dir=tmp_path / "second", start_from=run.run)
    assert all(torch.equal(t, network.state_dict()[name]) for name, t in second.state.model.state_dict().items())
    assert all(torch.equal(t, network.state_dict()[name]) for name, t in second.state.average.state_dict().items())


def test_dropout_waits_for_its_epoch(small, tiny_images, tmp_path):
    """The first epoch is that of a run without dropout, the second is not."""
    none = small.override({"network.block_dropout": 0.0, "network.dense_dropout": 0.0})
    runs = [
        fromzero.train(recipe, tiny_images, runs_dir=tmp_path).metrics()
        for recipe in (small.override({"network.dropout_from_epoch": 1}), none, small)
    ]
    losses = [[row["train/running_loss"] for row in rows] for rows in runs]
    assert losses[0][0] == losses[1][0] != losses[2][0]
    assert losses[0][1] != losses[1][1]


def test_label_smoothing_is_in_the_loss_that_is_trained_not_in_what_is_scored(small, tiny_images, tmp_path):
    recipe = small.override({"label_smoothing": 0.3, "epochs": 1, "batch_size": 1000, "precision": "float32"})
    recipe = recipe.override({"network.block_dropout": 0.0, "network.dense_dropout": 0.0})
    run = new_training(recipe, tiny_images, runs_dir=tmp_path)
    pixels, labels = run.data.train
    with torch.no_grad():
        log_probabilities = run.state.model(run.data.normalise(pixels)).log_softmax(1)
    target = torch.full_like(log_probabilities, 0.03).scatter_(1, labels[:, None], 0.73)
    expected = -(target * log_probabilities).sum(1).mean().item()
    for _ in run:
        pass
    assert run.run.metrics()[0]["train/running_loss"] == pytest.approx(expected, rel=1e-5)
    scored = evaluate(run.state.model, *run.data.validation, run.data.normalise, run.machine)
    right = -run.state.model(run.data.normalise(run.data.validation.pixels)).log_softmax(1)
    by_hand = right.gather(1, run.data.validation.labels[:, None]).mean().item()
    assert scored.loss == pytest.approx(by_hand, rel=1e-5)


def test_logit_adjustment_is_in_the_loss_that_is_trained_not_in_what_is_scored(small, tiny_images, tmp_path):
    """Menon et al. (2021), equation 10: the log of each class's share, times tau, is added to the outputs."""
    labels = np.where(tiny_images.train.labels < 4, 0, tiny_images.train.labels)  # and 1, 2 and 3 have none
    images = replace(tiny_images, train=replace(tiny_images.train, labels=labels))
    changes = {"logit_adjustment": 0.7, "epochs": 1, "batch_size": 1000, "precision": "float32"}
    changes |= {"network.block_dropout": 0.0, "network.dense_dropout": 0.0}
    run = new_training(small.override(changes), images, runs_dir=tmp_path)
    pixels, labels = run.data.train
    with torch.no_grad():
        logits = run.state.model(run.data.normalise(pixels))
    counts = torch.tensor([max(int((labels == label).sum()), 1) for label in range(10)])
    expected = F.cross_entropy(logits + 0.7 * (counts / counts.sum()).log(), labels).item()
    assert expected != pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)
    for _ in run:
        pass
    row = run.run.metrics()[0]
    assert row["train/running_loss"] == pytest.approx(expected, rel=1e-5)
    scored = run.state.model(run.data.normalise(run.data.validation.pixels))
    assert row["val/loss"] == pytest.approx(F.cross_entropy(scored, run.data.validation.labels).item(), rel=1e-5)


@pytest.mark.parametrize("changes", [{"hardest": 0.5}, {"skip_easy": 0.3}])
def test_images_are_ranked_by_the_loss_that_is_trained(changes, small, tiny_images, tmp_path, monkeypatch):
    """A strong adjustment puts the rarest class's images above all others', whatever the network says."""
    order = np.argsort(tiny_images.train.labels != 7, kind="stable")[: len(tiny_images.train) // 2]
    labels = np.where(tiny_images.train.labels == 7, 7, 2)[order]
    labels[np.flatnonzero(labels == 7)[4:]] = 2
    images = replace(tiny_images, train=Images(tiny_images.train.pixels[order], labels))
    recipe = small.override({"logit_adjustment": 10.0, "epochs": 2, "batch_size": 1000, **changes})
    recipe = recipe.override({"optimizer.learning_rate": 1e-8})
    run, seen = new_training(recipe, images, runs_dir=tmp_path), []
    train = train_step

    def watching(state, batch, *others):
        if state is run.state:
            seen.append(batch.labels)
        return train(state, batch, *others)

    monkeypatch.setattr(training, "train_step", watching)
    for _ in run:
        pass
    rare = int((run.data.train.labels == 7).sum())
    assert 0 < rare < len(seen[-1]) < len(run.data.train.labels)
    assert int((seen[-1] == 7).sum()) == rare


def test_a_loop_sees_each_step_with_its_loss_each_epoch_once_and_the_end(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path, threads=1)
    steps, epochs, ends, summed, images = 0, [], 0, 0.0, 0
    for progress in run:
        assert (progress.loss is not None) + (progress.row is not None) + progress.ended == 1
        if progress.row:
            epochs.append(progress.row["epoch"])
            assert progress.row["train/running_loss"] == pytest.approx(summed / images)
            summed, images = 0.0, 0
        elif progress.ended:
            ends += 1
            assert run.run.summary
        else:
            steps += 1
            summed += progress.loss * (progress.counters.running_images - images)
            images = progress.counters.running_images
    assert (steps, epochs, ends) == (run.timetable.start_of(3), [1, 2, 3], 1)


def test_a_network_can_be_traced_though_its_kernels_cannot(tiny_images, tmp_path):
    recipe = load_recipe("few").override({"network.channels": [[8, 8], [8], [8]], "epochs": 1, "batch_size": 50})
    run = fromzero.train(recipe, tiny_images, runs_dir=tmp_path, threads=1)
    classifier = load_classifier(run, precision="float32", threads=1)
    seen = classifier.normalise(torch.from_numpy(tiny_images.test.pixels))
    with torch.no_grad():
        expected = classifier.network(seen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch prefers the other way, and warns of sizes that it takes for fixed
            traced = torch.jit.trace(classifier.network, seen[:2])
        exported = torch.export.export(classifier.network, (seen,)).module()
        assert torch.allclose(traced(seen), expected, atol=1e-5)
        assert torch.allclose(exported(seen), expected, atol=1e-5)


def test_balanced_accuracy_is_the_mean_over_the_classes_that_are_there():
    labels = torch.tensor([0] * 8 + [2] * 2)
    predictions = torch.tensor([0] * 8 + [0, 2])
    found = Outcomes(torch.zeros(10), F.one_hot(predictions, 3).float(), labels)
    assert (found.accuracy, found.balanced_accuracy) == (pytest.approx(0.9), pytest.approx(0.75))


@pytest.mark.parametrize("true", [0.5, 1.0, 2.0])
def test_the_temperature_is_found_from_which_labels_were_drawn(true):
    rng = np.random.default_rng(0)
    outputs = rng.normal(0, 2, (20_000, 10)).astype(np.float32)
    labels = (outputs / true + rng.gumbel(size=outputs.shape)).argmax(1)  # as the softmax says
    assert temperature(outputs, labels) == pytest.approx(true, rel=0.03)
    rare = np.log(np.array([0.91] + [0.01] * 9))
    labels = (outputs / true + rare + rng.gumbel(size=outputs.shape)).argmax(1)
    assert temperature(outputs, labels, rare) == pytest.approx(true, rel=0.05)


def test_a_few_images_that_are_all_right_do_not_make_a_network_sure_of_everything():
    outputs = np.tile([3.0, 0.0], (20, 1))
    assert 0.7 < temperature(outputs, np.zeros(20, int)) < 1
    assert temperature(outputs, np.ones(20, int)) > 100  # where all are wrong, nothing is sure


def test_probabilities_are_scaled_by_what_validation_says_and_never_by_test_images(small, tiny_images, tmp_path):
    run = fromzero.train(small.override({"validation.source": "split"}), tiny_images, runs_dir=tmp_path)
    trained = load_trained(run, images=tiny_images)
    classifier = fromzero.load_classifier(run)
    outcomes = evaluate(trained.network, *trained.data.validation, trained.data.normalise, trained.machine)
    found = outcomes.temperature(torch.zeros(tiny_images.num_classes))
    assert found == classifier.temperature == run.metrics()[-1]["val/temperature"]
    assert classifier.temperature != 1
    pixels = torch.from_numpy(tiny_images.test.pixels)
    plain = outputs(classifier.network, pixels, classifier.normalise, classifier.machine)
    scaled = classifier.predict(pixels)
    assert torch.allclose(scaled, (plain / classifier.temperature).softmax(1), atol=1e-6)
    best = fromzero.load_classifier(run, "best")
    assert best.temperature == run.metrics()[best.checkpoint.epochs - 1]["val/temperature"]
    metrics = run.path / "metrics.jsonl"
    text = metrics.read_text()
    value = str(classifier.temperature)
    for damaged, said in (
        ("[]\n" + text, "line 1 is damaged"),
        (text.rsplit("{", 1)[0], "is missing"),
        ("", "is missing"),
        *((text.replace(value, other), "val/temperature of epoch") for other in ('"x"', "1e-40", "9" * 400)),
    ):
        metrics.write_text(damaged)
        with pytest.warns(UserWarning, match=rf"probabilities are not calibrated: .*metrics\.jsonl: .*{said}"):
            assert fromzero.load_classifier(run).temperature == 1
    metrics.write_text(text.replace(f', "val/temperature": {value}', ""))  # as an earlier fromzero
    assert fromzero.load_classifier(run).temperature == 1
    on_test = fromzero.train(small.override({"validation.source": "test"}), tiny_images, runs_dir=tmp_path)
    assert "val/temperature" not in on_test.metrics()[-1]
    assert fromzero.load_classifier(on_test).temperature == 1


def test_arguments_of_other_types_are_refused_by_name(small, tiny_images, tmp_path):
    for arguments, options, complaint in (
        ((small, []), {}, "images: expected ImageSet | None, found list []"),
        ((small, tiny_images.train.pixels), {}, "images: expected ImageSet | None, found ndarray array("),
        (({"epochs": 1}, tiny_images), {}, "recipe: expected Recipe | str | Path, found dict {'epochs': 1}"),
        ((small, tiny_images), {"threads": 1.5}, "threads: expected int | None, found float 1.5"),
        ((small, tiny_images), {"checkpoint_minutes": "often"}, "checkpoint_minutes: expected float | None, found str"),
        ((small, tiny_images), {"device": 0}, "device: expected str | torch.device, found int 0"),
        ((small, tiny_images), {"runs_dir": None}, "runs_dir: expected str | Path, found NoneType None"),
    ):
        with pytest.raises(InputError) as refused:
            new_training(*arguments, **{"runs_dir": tmp_path, **options})
        assert str(refused.value).startswith(complaint)
        assert "\n" not in str(refused.value)
    with pytest.raises(TypeError, match=r"new_training\(\) got an unexpected keyword argument 'thread'"):
        new_training(small, tiny_images, thread=1)
    for call in (fromzero.load_run, fromzero.load_classifier, fromzero.load_trained, fromzero.resume):
        with pytest.raises(InputError, match=r"run: expected Run \| str \| Path, found int 3"):
            call(3)
    for call, what in ((fromzero.load_images, "dataset"), (fromzero.load_recipe, "source")):
        with pytest.raises(InputError, match=rf"{what}: expected str \| Path, found NoneType None"):
            call(None)
    assert not [*tmp_path.iterdir()]
    options = {"threads": np.int64(1), "keep": np.int32(3), "checkpoint_minutes": np.float32(2), "device": "cpu"}
    run = new_training(small, tiny_images, runs_dir=str(tmp_path), **options | {"device": torch.device("cpu")})
    assert fromzero.load_run(PurePath(run.run.path)).path == run.run.path
    run.close()
    assert run.run.provenance["machine"]["threads"] == 1


def test_a_crop_larger_than_the_images_or_before_a_flat_head_is_refused(small, tiny_images, tmp_path):
    for change in ("augment.crop", "augment.cutout", "augment.translate"):
        recipe = small.override({change: 40, "network.head": "mean"})
        with pytest.raises(InputError, match=f"{change}: 40 is more than the 32×32 images have"):
            new_training(recipe, tiny_images, runs_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match=r"augment\.crop .* it needs network\.head max or mean"):
        small.override({"augment.crop": 24})
    blank = {"augment.cutout": 20, "augment.scale": 0.5, "augment.scale_epochs": 1, "network.head": "mean"}
    with pytest.raises(
        InputError, match="cutout: 20 is more than the 16×16 images, as they are cropped and scaled, have"
    ):
        new_training(small.override(blank), tiny_images, runs_dir=tmp_path / "none")
    smaller = {"augment.scale": 0.1, "augment.scale_epochs": 1}
    with pytest.raises(InputError, match=r"augment\.scale .* it needs network\.head max or mean"):
        small.override(smaller)
    told = "leaves no pixel of 3×3 images.*; 32×32 images are trained on as 3×3: see augment.scale"
    with pytest.raises(InputError, match=told):
        new_training(small.override({**smaller, "network.head": "mean"}), tiny_images, runs_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_fewer_images_than_a_batch_are_a_whole_batch(small, tiny_images, tmp_path):
    """Else batch normalisation's statistics would hardly leave where they began."""
    recipe = small.override({"network.batch_norm": True, "batch_size": 10_000, "epochs": 12, "precision": "float32"})
    run = new_training(recipe, tiny_images, runs_dir=tmp_path)
    for _ in run:
        assert {norm.momentum for norm in run.state.model.batch_norms} <= {0.4}
    variances = [norm.running_var for norm in run.state.model.batch_norms]
    assert all(not torch.isclose(variance, torch.ones(()), rtol=0.01).all() for variance in variances)


def test_a_small_last_batch_resumes_to_the_bit_with_a_proxy(small, tiny_images, tmp_path):
    changes = {"network.batch_norm": True, "batch_size": 64, "hardest": 0.5, "epochs": 4, "augment.crop": 0}
    recipe = small.override(changes | {"network.block_dropout": 0.0})
    straight = fromzero.train(recipe, tiny_images, runs_dir=tmp_path / "straight")
    for stop_at in range(1, 12):
        training = new_training(recipe, tiny_images, runs_dir=tmp_path / f"stopped{stop_at}")
        for progress in training:
            if progress.row is None and progress.counters.step == stop_at:
                training.save()
                break
        resumed = fromzero.resume(training.run, images=tiny_images)
        assert first_difference(straight, resumed) is None


def test_larger_images_are_evaluated_fewer_at_a_time():
    seen = []

    class Watched(torch.nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.flatten(1)[:, :2]

    here = machine.prepare("float32", device="cpu", threads=1)
    as_bytes = Normalise(torch.zeros(3), torch.ones(3))
    for side, count, batches in ((8, 1001, [1000, 1]), (32, 1001, [1000, 1]), (224, 41, [20, 20, 1])):
        pixels, labels = torch.zeros((count, side, side, 3), dtype=torch.uint8), torch.zeros(count, dtype=torch.long)
        seen.clear()
        evaluate(Watched(), pixels, labels, as_bytes, here)
        assert seen == batches


def test_a_run_goes_on_in_the_precision_that_was_chosen_for_it(small, tiny_images, tmp_path, monkeypatch):
    """Whatever another machine would choose."""
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_bfloat16_features", list)
        begun = new_training(small, tiny_images, runs_dir=tmp_path, threads=1)
        assert (begun.recipe.precision, begun.machine.precision) == ("auto", "float32")
        begun.close()
    monkeypatch.setattr(machine, "_bfloat16_features", lambda: ["avx512_bf16"])
    monkeypatch.setattr(machine, "_kernels", lambda *_: kernels.Made(kernels.NONE, None))
    assert resumed_training(begun.run, tiny_images, allow_inexact=True).machine.precision == "float32"
    assert machine.prepare("auto", threads=1).precision == "bfloat16"
