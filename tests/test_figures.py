"""The figures a run reports, against the same worked out by hand: from torch, from formulas, from the images."""

import hashlib
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fromzero
from fromzero import checkpoint, kernels, machine, modules, networks, training
from fromzero.optim import make_optimizer
from fromzero.recipe import Recipe
from fromzero.rng import permutation
from fromzero.sessions import extension_note, new_training, resumed_training
from fromzero.splits import Data, Subset
from fromzero.state import State
from fromzero.steps import Batch, train_step
from fromzero.timetable import Timetable

EVEN = Timetable(4, 4, 1)  # four steps an epoch

SMALL = {
    "name": "small",
    "epochs": 3,
    "batch_size": 48,  # of 160 images: the last batch of an epoch has 16
    "precision": "float32",
    "clean_train_images": 60,
    "network": {"channels": [[8], [12]], "block_dropout": 0.2, "dense": [16], "dense_dropout": 0.3},
    "validation": {"fraction": 0.2},
}


@pytest.fixture
def small():
    return Recipe.model_validate(SMALL)


def inputs(pixels):
    # Times 1/255, not over 255: where a map is flat, the last bit decides which pixel of a window is the largest.
    return pixels.permute(0, 3, 1, 2).float() * (1 / 255)


def outcome(model, subset):
    """(accuracy, mean loss) of `model` on `subset` in evaluation mode, with torch alone."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(inputs(subset.pixels)).double()
    model.train(was_training)
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, subset.labels, strict=True))
    return right / len(subset.labels), F.cross_entropy(logits, subset.labels).item()


def digests(part):
    """One digest an image, its label included; they are all different."""
    pixels, labels = torch.as_tensor(part.pixels).numpy(), torch.as_tensor(part.labels).tolist()
    found = [hashlib.sha256(bytes([n]) + image.tobytes()).hexdigest() for image, n in zip(pixels, labels, strict=True)]
    assert len(set(found)) == len(found)
    return set(found)


BY_HAND = {
    "adam": (
        {},
        lambda weights: torch.optim.Adam(weights, lr=1e-3, eps=1e-7, foreach=False, fused=False),
        lambda step: 1e-3,
    ),
    "sgd with everything": (
        {
            "optimizer.name": "sgd",
            "optimizer.learning_rate": 0.05,
            "optimizer.nesterov": True,
            "optimizer.weight_decay": 0.02,
            "schedule.name": "linear",
        },
        lambda weights: torch.optim.SGD(
            weights, lr=9.0, momentum=0.9, nesterov=True, weight_decay=0.02, foreach=False, fused=False
        ),
        lambda step: 0.05 * (1 - step / 8),
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_the_running_figures_are_the_means_over_an_epochs_images(case, small, tiny_images, tmp_path):
    """Two epochs with dropout against a loop of its own: plain losses of single images, plain torch optimizers."""
    changes, plain_optimizer, rate_at = BY_HAND[case]
    recipe = small.override({"epochs": 2, "seed": 5, **changes})
    run = new_training(recipe, tiny_images, runs_dir=tmp_path, threads=1)
    data = run.data
    images = len(data.train.labels)
    assert 0 < images % recipe.batch_size < recipe.batch_size
    model = State.initial(recipe, tiny_images.image_shape, tiny_images.num_classes, "cpu").model
    optimizer = plain_optimizer(model.parameters())
    expected, step = [], 0
    for epoch in range(2):
        losses, hits = [], []
        for indices in torch.from_numpy(permutation(images, 5, "order", epoch)).split(48):
            model.train()
            model.reseed(5, step)
            logits = model(inputs(data.train.pixels[indices]))
            each = F.cross_entropy(logits, data.train.labels[indices], reduction="none")
            losses += each.tolist()
            hits += (logits.argmax(1) == data.train.labels[indices]).tolist()
            optimizer.param_groups[0]["lr"] = rate_at(step)
            optimizer.zero_grad()
            each.mean().backward()
            optimizer.step()
            step += 1
        row = {"train/running_loss": math.fsum(losses) / images, "train/running_accuracy": sum(hits) / images}
        for split, subset in (("train", data.clean_train), ("val", data.validation)):
            row[f"{split}/accuracy"], row[f"{split}/loss"] = outcome(model, subset)
        expected.append(row | {"epoch": epoch + 1, "step": step, "learning_rate": rate_at(step - 1)})
    for _ in run:
        pass
    rows = run.run.metrics()
    assert len(rows) == 2
    assert 0 < rows[0]["train/running_accuracy"] < 1
    for row, by_hand in zip(rows, expected, strict=True):
        assert {key: row[key] for key in by_hand} == pytest.approx(by_hand, rel=1e-6)


def steps_saved(run, now):
    """The steps of the checkpoints that are there by the 11th step, on a clock by which a step takes 20 seconds."""
    saved, steps = [], 0
    iterator = iter(run)
    for progress in iterator:
        if (found := checkpoint.load(run.run.checkpoints / "last.safetensors").state["step"]) not in saved:
            saved.append(found)
        if progress.row is None:
            steps += 1
            now[0] += 20
        if steps == 11:
            break
    iterator.close()
    return saved


@pytest.mark.parametrize(
    ("options", "save_takes", "expected"),
    [
        ({}, 0, [0, 1, 2, 4, 7, 10]),  # after 20, 20, 40 seconds, then every minute
        ({}, 5, [0, 10]),  # 200 seconds, so that saving takes 2.5 % of them
        ({"checkpoint_minutes": 0.5}, 5, [0, 2, 4, 6, 8, 10]),
        ({"checkpoint_minutes": 2}, 0, [0, 6]),
    ],
)
def test_a_checkpoint_is_written_when_it_is_due(
    options, save_takes, expected, small, tiny_images, tmp_path, monkeypatch
):
    now, save = [1000.0], checkpoint.save

    def slow_save(*arguments, **keywords):
        now[0] += save_takes
        save(*arguments, **keywords)

    monkeypatch.setattr("fromzero.training.time.monotonic", lambda: now[0])
    monkeypatch.setattr("fromzero.checkpoint.save", slow_save)
    run = new_training(small, tiny_images, runs_dir=tmp_path, threads=1, **options)
    assert steps_saved(run, now) == expected


@pytest.mark.parametrize(("options", "expected"), [({}, [0, 1, 2, 4, 7, 10]), ({"checkpoint_minutes": 2}, [0, 6])])
def test_a_resumed_run_is_saved_as_often(options, expected, small, tiny_images, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("fromzero.training.time.monotonic", lambda: now[0])
    run = new_training(small, tiny_images, runs_dir=tmp_path, threads=1, checkpoint_minutes=100)
    run.close()
    assert steps_saved(resumed_training(run.run, tiny_images, **options), now) == expected


def test_every_resume_leaves_a_note_of_where_and_on_what(small, tiny_images, tmp_path):
    run = new_training(small, tiny_images, runs_dir=tmp_path, threads=1)
    assert run.run.provenance["resumed"] == []
    started = run.run.provenance
    for progress in run:
        if progress.counters.step == 5:
            run.save()
            break
    run.close()
    fromzero.resume(run.run, images=tiny_images)
    first_end = run.run.summary
    fromzero.resume(run.run, images=tiny_images, epochs=4)
    provenance = run.run.provenance
    assert {**provenance, "resumed": []} == started
    first, second = provenance["resumed"]
    assert (first["step"], second["step"]) == (5, 12)
    assert first["machine"] == second["machine"] == asdict(run.machine) == started["machine"]
    assert first["exact"] is True
    assert second["exact"] is True
    assert "epochs" not in first
    assert second["epochs"] == [3, 4]
    assert "summary" not in first
    assert second["summary"] == first_end
    assert first["versions"]["torch"] == torch.__version__
    other = resumed_training(run.run, tiny_images, epochs=5, threads=2, allow_inexact=True)
    other.close()
    third = run.run.provenance["resumed"][2]
    assert third["machine"] == started["machine"] | {"threads": 2}
    assert third["exact"] is False


def sgd_by_hand(w, g, state, lr, recipe):
    g = g + recipe.weight_decay * w
    state["v"] = recipe.momentum * state.get("v", 0) + g
    return w - lr * (g + recipe.momentum * state["v"] if recipe.nesterov else state["v"])


def adam_by_hand(w, g, state, lr, recipe):
    if recipe.name == "adam":
        g = g + recipe.weight_decay * w
    else:
        w = w - lr * recipe.weight_decay * w
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = recipe.beta1 * state.get("m", 0) + (1 - recipe.beta1) * g
    state["v"] = recipe.beta2 * state.get("v", 0) + (1 - recipe.beta2) * g**2
    mean, square = state["m"] / (1 - recipe.beta1**t), state["v"] / (1 - recipe.beta2**t)
    return w - lr * mean / (square.sqrt() + recipe.epsilon)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "changes",
    [
        {"name": "sgd"},
        {"name": "sgd", "momentum": 0.0},
        {"name": "sgd", "momentum": 0.0, "nesterov": True},
        {"name": "sgd", "momentum": 0.7, "nesterov": True},
        {"name": "adam", "beta1": 0.8, "beta2": 0.95, "epsilon": 0.01},
        {"name": "adamw", "beta1": 0.8, "beta2": 0.95, "epsilon": 0.01},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_optimizers_follow_their_formulas(changes, weight_decay, small):
    changes = {**changes, "weight_decay": weight_decay}
    recipe = small.override({f"optimizer.{name}": value for name, value in changes.items()}).optimizer
    random = torch.Generator().manual_seed(0)
    model = nn.Linear(7, 5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=random))
    expected = [weight.detach().double() for weight in model.parameters()]
    states = [{} for _ in expected]
    optimizer = make_optimizer(recipe, model)
    by_hand = sgd_by_hand if recipe.name == "sgd" else adam_by_hand
    for rate in (0.1, 0.2, 0.05, 0.1, 0.1):
        for n, weight in enumerate(model.parameters()):
            weight.grad = torch.randn(weight.shape, generator=random)
            expected[n] = by_hand(expected[n], weight.grad.double(), states[n], rate, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for weight, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), wanted, rtol=1e-5, atol=2e-6)


def test_held_out_images_are_train_images_that_are_not_learned_from(small, tiny_images):
    data = Data.of(small, tiny_images, "cpu")
    train, validation, test = digests(data.train), digests(data.validation), digests(data.test)
    assert not train & validation
    assert train | validation == digests(tiny_images.train)
    assert test == digests(tiny_images.test)
    assert not validation & test
    assert digests(data.clean_train) < train
    assert len(data.clean_train.labels) == 60
    of_class = tiny_images.train.labels.tolist().count
    assert data.validation.labels.bincount().tolist() == [round(0.2 * of_class(n)) for n in range(10)]
    whole = Data.of(small.override({"validation.source": "test"}), tiny_images, "cpu")
    assert digests(whole.train) == digests(tiny_images.train)
    assert digests(whole.validation) == digests(whole.test) == test


def test_no_step_sees_a_held_out_image(small, tiny_images, tmp_path, monkeypatch):
    seen = []

    def watched(state, batch, *others):
        seen.append(digests(Subset(batch.images.contiguous(), batch.labels)))
        return train_step(state, batch, *others)

    def normalised(part):
        return digests(Subset(run.data.normalise(part.pixels).contiguous(), part.labels))

    monkeypatch.setattr(training, "train_step", watched)
    run = new_training(small, tiny_images, runs_dir=tmp_path, threads=1)
    for _ in run:
        pass
    for epoch in range(3):
        batches = seen[4 * epoch : 4 * epoch + 4]
        assert [len(batch) for batch in batches] == [48, 48, 48, 16]
        assert set.union(*batches) == normalised(run.data.train)
    assert not set.union(*seen) & normalised(run.data.validation)


@pytest.mark.parametrize("source", ["split", "test"])
def test_each_rows_figures_are_measured_on_the_images_they_name(source, small, tiny_images, tmp_path):
    recipe = small.override({"validation.source": source})
    run = new_training(recipe, tiny_images, runs_dir=tmp_path, threads=1)
    parts = {"train": run.data.clean_train, "val": run.data.validation if source == "split" else run.data.test}
    for progress in run:
        if progress.row is None:
            continue
        for name, subset in parts.items():
            accuracy, loss = outcome(run.state.model, subset)
            assert progress.row[f"{name}/accuracy"] == accuracy
            assert progress.row[f"{name}/loss"] == pytest.approx(loss, rel=1e-6)
        elsewhere = outcome(run.state.model, run.data.test)[1]
        assert (progress.row["val/loss"] == pytest.approx(elsewhere, rel=1e-5)) is (source == "test")
    accuracy, loss = outcome(run.state.model, run.data.test)
    assert run.run.summary["test/accuracy"] == accuracy
    assert run.run.summary["test/loss"] == pytest.approx(loss, rel=1e-6)
    assert run.run.summary["val/source"] == source


def masks_of(recipe, images, folder):
    """What a training's dropout layers keep, at every step: they are given ones instead of what they would get."""
    run = new_training(recipe, images, runs_dir=folder, threads=1)
    run = replace(run, machine=replace(run.machine, kernels=kernels.NONE))  # which drop inside a convolution
    steps = {}

    def record(layer, given, kept):
        if layer.training:
            steps.setdefault(run.state.counters.step, []).append(kept.detach() != 0)

    layers = [module for module in run.state.model.modules() if isinstance(module, modules.Dropout)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, given: (torch.ones_like(given[0]),))
        layer.register_forward_hook(record)
    for _ in run:
        pass
    assert [len(steps[step]) for step in range(len(steps))] == [len(layers)] * 8
    return [tuple(mask.numpy().tobytes() for mask in steps[step]) for step in range(8)]


def test_every_step_has_dropout_masks_of_its_own(small, tiny_images, tmp_path):
    recipe = small.override({"epochs": 2, "batch_size": 40})  # four steps an epoch, all of one size
    first, again, other = (masks_of(recipe.override({"seed": n}), tiny_images, tmp_path) for n in (0, 0, 1))
    assert first == again
    for layer in zip(*(first + other), strict=True):
        assert len(set(layer)) == 16  # no step of either seed has the mask of another


def test_a_step_draws_its_masks_from_seed_and_step(small, tiny_images):
    """The loss of one batch, the weights left alone by a rate of zero."""
    here = machine.prepare("float32", device="cpu", threads=1)
    recipe = small.override({"optimizer.name": "sgd"})
    state = State.initial(recipe, tiny_images.image_shape, tiny_images.num_classes, "cpu")
    data = Data.of(recipe, tiny_images, "cpu")
    batch = Batch(data.normalise(data.train.pixels[:48]), data.train.labels[:48])

    def loss(seed, step):
        state.counters.step = step
        return train_step(state, batch, 0.0, recipe.override({"seed": seed}), 0.0, here)[0]

    places = [(seed, step) for seed in (0, 1) for step in (0, 1, 2, 7)]
    losses = [loss(*place) for place in places]
    assert len(set(losses)) == len(places)
    assert [loss(*place) for place in reversed(places)] == losses[::-1]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("linear", 0.5 * (1 - 9 / 12), 0.5 * (1 - 9 / 20)),
        ("cosine", 0.25 * (1 + math.cos(math.pi * 9 / 12)), 0.25 * (1 + math.cos(math.pi * 9 / 20))),
    ],
)
def test_extending_a_falling_rate_says_what_it_was_and_is(name, old, new, small):
    before = small.override({"schedule.name": name, "optimizer.learning_rate": 0.5})
    note = extension_note(before, before.override({"epochs": 5}), 9, EVEN)
    assert f"the {name} schedule now ends at epoch 5 instead of 3" in note
    assert f"is {new:g} (it was {old:g})" in note
    assert "not the run that 5 epochs at once would have been" in note
    assert "constant" not in note
    at_the_end = extension_note(before, before.override({"epochs": 6}), 12, EVEN)
    assert "is 0.25 (it was 0)" in at_the_end  # halfway, by either schedule


def test_extending_a_constant_rate_says_that_it_stays(small):
    before = small.override({"optimizer.learning_rate": 0.03})
    for step in (0, 9, 12):
        note = extension_note(before, before.override({"epochs": 5}), step, EVEN)
        assert "constant" in note
        assert "stays 0.03" in note
        assert "not the run" not in note


def test_extending_a_run_in_its_warm_up_says_that_the_rate_still_rises(small):
    before = small.override({"optimizer.learning_rate": 0.03, "schedule.warmup_epochs": 1.5})
    note = extension_note(before, before.override({"epochs": 5}), 2, EVEN)
    assert note == (
        "the learning rate is 0.015 at this step, still in its warm-up: it rises to 0.03 by epoch 1.5 and then stays"
    )
    assert (
        extension_note(before, before.override({"epochs": 5}), 6, EVEN)
        == "the learning rate is constant: it stays 0.03"
    )


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("warmup", "step", "same"), [(0, 0, True), (0, 1, True), (0, 2, False)])
def test_extending_a_run_whose_rates_were_the_same_says_so(name, warmup, step, same, small):
    """Every rate so far, not only the next one, decides whether it is the run that would have been trained at once."""
    before = small.override({"schedule.name": name, "schedule.warmup_epochs": warmup})
    note = extension_note(before, before.override({"epochs": 5}), step, EVEN)
    assert ("this is the run that 5 epochs at once would have been" in note) is same
    assert ("this is not the run that 5 epochs at once would have been" in note) is not same


def test_extending_a_run_before_its_cooldown_is_the_run_trained_at_once(small):
    """Ten epochs of four steps, of which the last two cool down: what the length of the others is for."""
    before = small.override({"schedule.name": "cooldown", "epochs": 10})
    for step, same in ((0, True), (33, True), (34, False)):
        note = extension_note(before, before.override({"epochs": 20}), step, EVEN)
        assert ("this is the run that 20 epochs at once would have been" in note) is same


@pytest.mark.parametrize(("step", "same"), [(3, True), (4, True), (5, True), (6, False)])
def test_extending_a_run_around_the_end_of_its_warm_up(step, same, small):
    """Warm-up for four steps of a linear schedule: the fifth has the peak rate whatever the end."""
    before = small.override({"schedule.name": "linear", "schedule.warmup_epochs": 1, "optimizer.learning_rate": 0.4})
    note = extension_note(before, before.override({"epochs": 5}), step, EVEN)
    assert ("this is the run that" in note) is same
    assert ("(as it was, in warm-up)" in note) is (step < 4)
    assert ("(as it was)" in note) is (step == 4)


def test_a_run_extended_under_a_falling_rate_is_not_the_one_trained_at_once(small, tiny_images, tmp_path):
    recipe = small.override({"schedule.name": "linear", "epochs": 2})
    short = fromzero.train(recipe, tiny_images, runs_dir=tmp_path / "short", threads=1)
    rates = [row["learning_rate"] for row in fromzero.resume(short, images=tiny_images, epochs=3).metrics()]
    assert rates == pytest.approx([1e-3 * (1 - 3 / 8), 1e-3 * (1 - 7 / 8), 1e-3 * (1 - 11 / 12)])
    assert rates[1] != pytest.approx(1e-3 * (1 - 7 / 12))


def test_the_summary_and_the_weights_kept_are_those_of_the_rows(small, tiny_images, tmp_path):
    recipe = small.override({"epochs": 6, "optimizer.learning_rate": 0.01})
    run = new_training(recipe, tiny_images, runs_dir=tmp_path, threads=1)
    weights = []
    for progress in run:
        if progress.row is not None:
            weights.append({name: t.clone() for name, t in run.state.model.state_dict().items()})
            if len(weights) == 5:  # make the last epoch a bad one
                with torch.no_grad():
                    run.state.model.get_parameter("predictions.weight").neg_()
    rows, summary = run.run.metrics(), run.run.summary
    accuracies = [row["val/accuracy"] for row in rows]
    best = accuracies.index(max(accuracies))
    assert 0 < best < 5, "a case in which first, best and last are three epochs"
    figures = {key: value for key, value in rows[-1].items() if not key.startswith("time/")}
    assert {"train/accuracy", "train/running_accuracy", "val/accuracy", "val/loss"} < figures.keys()
    assert {key: summary[key] for key in figures} == figures
    assert summary["epoch"] == 6
    assert summary["step"] == 24
    assert summary["best/epoch"] == rows[best]["epoch"] == best + 1
    assert summary["best/val/accuracy"] == accuracies[best]
    for name, epoch in (("best", best), ("last", 5)):
        found = checkpoint.load(run.run.checkpoints / f"{name}.safetensors")
        saved = {key.removeprefix("model/"): t for key, t in found.tensors.items() if key.startswith("model/")}
        assert saved.keys() == weights[epoch].keys()
        assert all(torch.equal(t, weights[epoch][key]) for key, t in saved.items())
        model = networks.build(recipe.network, tiny_images.image_shape, tiny_images.num_classes, seed=99)
        model.load_state_dict(saved)
        accuracy, loss = outcome(model, run.data.validation)
        assert accuracy == rows[epoch]["val/accuracy"]
        assert loss == pytest.approx(rows[epoch]["val/loss"], rel=1e-6)
        if name == "best":
            assert found.state == {"epoch": best + 1, "val/accuracy": accuracies[best]}
        else:
            assert (found.state["epoch"], found.state["step"]) == (6, 24)
            assert outcome(model, run.data.test)[0] == summary["test/accuracy"]
