"""Diagnosis: every rule on evidence made by hand, the measures on networks whose answer is known, and the command."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fromzero
from fromzero import cli, load_images, machine, probe
from fromzero.data.images import Images
from fromzero.diagnosis import (
    EXPLAINS,
    ON_VALIDATION,
    RULES,
    Finding,
    diagnose,
    hidden_by_few,
    large_gap,
    share_of_wrong_labels_seen,
    untried,
    why_labels_cannot_be_judged,
)
from fromzero.evaluate import evaluate
from fromzero.evidence import (
    Cooldown,
    Copied,
    Copies,
    Copy,
    Evidence,
    LayerMeasures,
    Measures,
    Score,
    Surest,
    Trial,
    best_factor,
)
from fromzero.findings import _copies_held_out, diagnosis_header, diagnosis_text, remarks, remedy_study, write_findings
from fromzero.recipe import load_recipe
from fromzero.sessions import new_training, resume
from fromzero.splits import Data
from fromzero.stats import wilson_interval
from fromzero.study.definition import load_study
from fromzero.trained import load_trained

RECIPE = load_recipe("train2").override({"validation.source": "split", "schedule.name": "linear"})


def trials(*losses, error=0.01):
    return {factor: Trial(loss, error) for factor, loss in zip((0.01, 0.1, 1.0, 10.0, 100.0), losses, strict=True)}


HEALTHY = Measures(
    image_shape=(32, 32, 3),
    class_names=("cat", "dog"),
    train_counts=(500, 500),
    validation_counts=(500, 500),
    recalls=(0.8, 0.82),
    loss_se=0.02,
    surest=Surest(2, 100, 0.97),
    copies=Copies({"validation": Copied(0, 3, 1000), "test": Copied(0, 0, 1000)}),
    plain_loss=0.4,
    dropout_loss=0.6,
    changed_by_batch_norm=0.0,
    train_accuracy=0.88,
    seen_accuracies=(0.88, 0.87),
    layers=(LayerMeasures("conv2d_1", 0.4, 5.0, 0.02), LayerMeasures("predictions", 0.5, 4.0, None)),
    map_sides=(32, 30, 14, 7, 3),
    trials=trials(0.69, 0.66, 0.5, 0.69, float("inf")),
    fit_accuracy=None,
    mirror_accuracy=0.5,
)
LN2 = float(np.log(2))


def rows(train=(0.6, 0.7, 0.8, 0.86, 0.88), val=(0.6, 0.68, 0.74, 0.77, 0.78), **curves):
    found = []
    for epoch, (a, b) in enumerate(zip(train, val, strict=True), 1):
        row = {"epoch": epoch, "step": 10 * epoch, "learning_rate": 1e-3 * (1 - epoch / 6), "time/seconds": epoch}
        row |= {"train/accuracy": a, "val/accuracy": b, "train/loss": LN2 * 2 * (1 - a), "val/loss": LN2 * 2 * (1 - b)}
        row |= {"train/running_accuracy": a - 0.05, "train/running_loss": LN2}
        found.append(row | {key: values[epoch - 1] for key, values in curves.items()})
    return found


def evidence(changes=None, measured=None, **of_rows):
    shown = rows(**of_rows)
    recalls = (shown[-1]["val/accuracy"],) * 2
    return Evidence(
        RECIPE.override(changes or {}), shown, replace(HEALTHY, **({"recalls": recalls} | (measured or {})))
    )


def remarked(run, found=(), **options):
    """The remarks of a diagnosis of that run, as text."""
    return " ".join(remarks(run, replace(evidence(**options), recipe=run.recipe), found))


HIGHER = trials(0.4, 0.3, 0.6, 0.69, float("inf"))
LOWER = trials(0.69, 0.69, 0.6, 0.5, 0.3)
LAYERS = [LayerMeasures("conv2d_1", 1e-7, 5.0, 0.1), LayerMeasures("predictions", 0.5, 4.0, None)]
FLAT = {"train": (0.5, 0.58, 0.6, 0.6, 0.6), "val": (0.5, 0.57, 0.58, 0.58, 0.58)}
PLANTED = {
    "copies": {"measured": {"copies": Copies({"validation": Copied(40, 60, 1000), "test": Copied(0, 0, 10_000)})}},
    "imbalance": {"measured": {"train_counts": (900, 30), "recalls": (0.95, 0.3)}},
    "decay-too-strong": {
        "changes": {"optimizer.weight_decay": 0.1},
        "measured": {
            "train_accuracy": 0.5,
            "layers": (LayerMeasures("conv2d_1", 0.4, 5.0, 0.0), HEALTHY.layers[1]),
        },
        **FLAT,
    },
    "rate-too-high": {"measured": {"trials": HIGHER, "train_accuracy": 0.6}},
    "rate-too-low": {"measured": {"trials": LOWER, "train_accuracy": 0.6}},
    "dropout-too-strong": {"changes": {"network.block_dropout": 0.8}, "measured": {"train_accuracy": 0.6}},
    "vanishing-gradients": {"measured": {"layers": LAYERS, "train_accuracy": 0.5}},
    "dead-units": {
        "measured": {
            "layers": [LayerMeasures("conv2d_1", 0.0, 5.0, 0.95), HEALTHY.layers[1]],
            "train_accuracy": 0.5,
        }
    },
    "pooling-too-early": {"measured": {"map_sides": (32, 4, 2)}},
    "batch-too-small": {
        "changes": {"network.batch_norm": True, "batch_size": 2},
        "measured": {"changed_by_batch_norm": 0.4, "train_accuracy": 0.6},
    },
    "augmentation-too-strong": {"changes": {"augment.flip": "random"}, "measured": {"seen_accuracies": (0.9, 0.6)}},
    "mirrored-images": {"changes": {"augment.flip": "random"}, "measured": {"mirror_accuracy": 0.97}},
    "rate-never-falls": {
        "changes": {"schedule.name": "constant"},
        "measured": {
            "cooldown": Cooldown(
                100, Score(1.2, 0.56), Score(1.3, 0.55), Score(1.3, 0.55), Score(1.1, 0.58), 0.02, 0.01
            )
        },
    },
    "label-noise": {"measured": {"surest": Surest(20, 100, 0.9)}},
    "overfitting": {
        "train": (0.6, 0.8, 0.95, 0.99, 1.0),
        "val": (0.6, 0.65, 0.64, 0.63, 0.62),
        "measured": {"train_accuracy": 1.0},
    },
    "stopped-early": {"changes": {"epochs": 5}, "measured": {"fit_accuracy": 0.99, "train_accuracy": 0.6}, **FLAT},
    "underfitting": {"measured": {"fit_accuracy": 0.3, "train_accuracy": 0.6}, **FLAT},
    "validation-too-small": {"measured": {"validation_counts": (30, 30)}},
}


def test_a_healthy_run_has_no_findings():
    assert diagnose(evidence()) == []


@pytest.mark.parametrize("name", RULES)
def test_a_rule_finds_what_was_planted_and_its_study_tests_the_remedy(name, tmp_path):
    planted = evidence(**PLANTED[name])
    found = diagnose(planted)
    assert [finding.name for finding in found] == [name]
    finding = found[0]
    assert finding.meaning
    assert finding.evidence
    assert finding.remedy
    if finding.changes:
        (tmp_path / "recipe.toml").write_text(planted.recipe.to_toml())
        (tmp_path / f"{name}.toml").write_text(remedy_study(finding, planted.recipe))
        study = load_study(tmp_path / f"{name}.toml")
        assert list(study.arms) == ["as-it-is", "remedied"]
        assert study.arms["remedied"].recipe == planted.recipe.override(finding.changes).override(
            {"name": study.arms["remedied"].recipe.name}
        )
        assert study.arms["remedied"].changes
    else:
        assert name in ("copies", "imbalance", "label-noise", "validation-too-small")


def test_who_shortened_a_recipe_is_pointed_to_its_own_epochs():
    def remedied(**changes):
        (found,) = diagnose(evidence({"epochs": 5} | changes, {"fit_accuracy": 0.99, "train_accuracy": 0.6}, **FLAT))
        return found.remedy, found.changes

    assert remedied() == ("the 50 epochs that train2 has", {"epochs": 50})
    assert remedied(name="own") == ("twice the epochs", {"epochs": 10})


def test_what_is_cut_out_against_overfitting_fits_what_is_trained_on(tmp_path):
    """A remedy that the study of it would refuse is none."""
    by_heart = {**PLANTED["overfitting"], "measured": {"train_accuracy": 1.0, "image_shape": (64, 64, 3)}}
    augment = {"augment.translate": 1, "augment.flip": "random", "network.batch_norm": True, "network.head": "mean"}
    for changes, size in (({}, 16), ({"augment.crop": 12}, 3), ({"augment.scale": 0.2, "augment.scale_epochs": 2}, 13)):
        (found,) = diagnose(evidence(augment | changes | {"network.block_dropout": 0.1}, **by_heart))
        assert found.changes == {"augment.cutout": size}


def test_augmentation_that_leaves_little_of_an_image_is_too_strong_where_nothing_is_learned():
    shifted = evidence({"augment.translate": 24, "augment.cutout": 8}, {"train_accuracy": 0.3})
    found = diagnose(shifted)
    assert [finding.name for finding in found] == ["augmentation-too-strong"]
    assert "of an image is left" in found[0].evidence
    assert found[0].changes == {"augment.translate": 6, "augment.cutout": 2}
    coloured = evidence({"augment.colour": 0.8, "augment.rotate": 90}, {"seen_accuracies": (0.9, 0.6)})
    assert [(finding.name, finding.changes) for finding in diagnose(coloured)] == [
        ("augmentation-too-strong", {"augment.colour": 0.2, "augment.rotate": 22.5})
    ]


def test_mirror_images_are_named_where_they_can_be_told_and_something_is_to_be_gained():
    def found(told, val=0.78, **measured):
        curves = {"train": (0.6, 0.7, 0.8, 0.86, val), "val": (0.6, 0.68, 0.74, 0.77, val)}
        changes = {"augment.flip": "alternating"}
        return [finding.name for finding in diagnose(evidence(changes, {"mirror_accuracy": told} | measured, **curves))]

    assert found(0.75) == ["mirrored-images"]
    assert found(0.74) == []
    assert found(None) == []
    assert found(1.0, val=0.995) == ["mirrored-images"]
    assert found(1.0, val=0.996) == []  # four wrong of a thousand
    assert found(1.0, validation_counts=(12, 12)) == ["validation-too-small"]
    # Where they cannot be recognised either, that is said.
    assert found(1.0, seen_accuracies=(0.9, 0.6)) == ["augmentation-too-strong"]


def test_no_mirroring_is_proposed_where_mirror_images_can_be_told():
    by_heart = {"train": (0.6, 0.8, 0.9, 0.98, 1.0), "val": (0.6, 0.62, 0.6, 0.58, 0.55)}
    shifted = {"augment.translate": 4, "network.batch_norm": True, "network.block_dropout": 0.0}

    def found(changes, told):
        measured = {"train_accuracy": 1.0, "mirror_accuracy": told}
        return diagnose(evidence(changes, measured, **by_heart))[0]

    assert found(shifted, 0.5).changes == {"augment.flip": "random"}
    assert found(shifted, 0.9).changes == {"augment.cutout": 8}
    assert "mirrored, too" in found({}, 0.5).remedy
    assert "mirrored" not in found({}, 0.9).remedy
    flipped = {"augment.flip": "random"}
    for unknown in ({"mirror_accuracy": None}, {"validation_counts": (10, 10)}):
        assert "mirrored-images" in untried(evidence(flipped, unknown))
        assert "mirrored-images" not in untried(evidence(measured=unknown))
    assert "mirrored-images" not in untried(evidence(flipped))


def test_a_network_that_had_learned_and_lost_it_had_too_high_a_rate():
    lost = evidence(train=(0.7, 0.8, 0.5, 0.5, 0.5), val=(0.7, 0.78, 0.5, 0.5, 0.5), measured={"train_accuracy": 0.5})
    found = diagnose(lost)
    assert [finding.name for finding in found] == ["rate-too-high"]
    assert "after epoch 2" in found[0].evidence
    assert found[0].changes == {"optimizer.learning_rate": 1.67e-4}


def test_a_falling_rate_is_proposed_where_it_helped_beyond_chance():
    def found(
        falling,
        held=(1.2, 0.55),
        halfway=(1.2, 0.55),
        before=(1.2, 0.56),
        loss_se=0.02,
        accuracy_se=0.01,
    ):
        scores = (Score(*score) for score in (before, halfway, held, falling))
        cooldown = Cooldown(100, *scores, loss_se, accuracy_se)
        return bool(diagnose(evidence({"schedule.name": "constant"}, {"cooldown": cooldown})))

    assert found((1.15, 0.56))
    assert not found((1.17, 0.56))  # within two standard errors
    assert not found((1.18, 0.56), loss_se=0.001)  # surely less, by less than 2 %
    assert not found((1.15, 0.56), before=(1.16, 0.56))  # the run had as little, and steps at its rate lost it
    assert found((1.15, 0.55), halfway=(1.25, 0.54), held=(1.18, 0.55))
    assert not found((1.15, 0.55), halfway=(1.25, 0.54), held=(1.16, 0.55))  # it learns, at either rate
    assert not found((1.15, 0.53))  # surer only
    assert found((1.3, 0.59))  # surer, so that mistakes cost more, and more often right
    assert not found((1.3, 0.59), before=(1.2, 0.58))
    assert not found((1.3, 0.59), halfway=(1.2, 0.54), held=(1.2, 0.58))
    assert not found((1.2, 0.55), loss_se=0.0, accuracy_se=0.0)
    assert not found((3.0, 0.0), loss_se=math.nan, accuracy_se=math.nan)


def test_what_is_learned_by_heart_leaves_little_gradient_beside_decay():
    planted = PLANTED["decay-too-strong"]
    by_heart = planted["measured"] | {"train_accuracy": 0.96}
    assert diagnose(evidence(planted["changes"], by_heart, train=(0.7, 0.96), val=(0.7, 0.8))) == []


def test_decoupled_decay_is_judged_by_steps_without_it():
    changes = {"optimizer.name": "adamw", "optimizer.weight_decay": 5.0}
    assert diagnose(evidence(changes, {"without_decay": Trial(0.48, 0.01)})) == []
    found = diagnose(evidence(changes, {"without_decay": Trial(0.3, 0.01)}))
    assert [finding.name for finding in found] == ["decay-too-strong"]
    assert "0.50, without decay 0.30" in found[0].evidence


def test_a_network_that_is_still_learning_is_no_judge_of_labels():
    fast = {"train": (0.3, 0.4, 0.5, 0.6, 0.7), "val": (0.3, 0.4, 0.45, 0.5, 0.6)}
    noise = PLANTED["label-noise"]["measured"]
    assert diagnose(evidence(measured=noise, **fast)) == []
    # At a constant rate one epoch that gains nothing says little, and the last quarter of them more.
    rising = {"train": (*np.linspace(0.2, 0.68, 19), 0.68), "val": (*np.linspace(0.18, 0.5, 19), 0.5)}
    assert [finding.name for finding in diagnose(evidence(measured=noise, **rising))] == ["label-noise"]
    constant = {"schedule.name": "constant"}
    assert diagnose(evidence(constant, noise, **rising)) == []
    slower = {"train": (*np.linspace(0.5, 0.68, 19), 0.68), "val": (*np.linspace(0.4, 0.5, 19), 0.5)}
    assert [finding.name for finding in diagnose(evidence(constant, noise, **slower))] == ["label-noise"]


def test_labels_are_judged_wherever_the_gap_is_not_called_overfitting():
    def found(gap, changes=None, **measured):
        curves = {"train": (0.5, 0.6, 0.7, 0.72, 0.73), "val": tuple(t - gap for t in (0.5, 0.6, 0.7, 0.72, 0.73))}
        noise = PLANTED["label-noise"]["measured"] | {"train_accuracy": 0.73} | measured
        return [finding.name for finding in diagnose(evidence(changes, noise, **curves))]

    assert found(0.31) == ["label-noise"]  # 0.3 and two standard errors of 1,000 images: 0.331
    assert found(0.34) == ["overfitting"]
    assert found(0.2, train_accuracy=0.93) == ["overfitting"]  # images that are fitted, and never altered
    assert found(0.2, {"augment.translate": 2}, train_accuracy=0.93) == ["label-noise"]


def test_a_gap_that_another_mix_of_classes_or_one_bad_epoch_makes_is_no_overfitting():
    mixed = {"train": (0.6, 0.8, 0.9, 0.95, 0.97), "val": (0.5, 0.55, 0.58, 0.6, 0.62)}
    assert [f.name for f in diagnose(evidence(measured={"train_accuracy": 0.97}, **mixed))] == ["overfitting"]
    rare = PLANTED["imbalance"]["measured"] | {"train_accuracy": 0.97}  # of the mix of train 0.93 are right
    assert [f.name for f in diagnose(evidence(measured=rare, **mixed))] == ["imbalance"]
    unknown = diagnose(evidence(measured={"train_accuracy": 0.97, "recalls": (None, None)}, **mixed))
    assert [finding.name for finding in unknown] == ["overfitting"]

    bad = {"train": (0.6, 0.8, 0.9, 0.95, 0.97), "val": (0.6, 0.75, 0.84, 0.87, 0.5)}
    assert diagnose(evidence(measured={"train_accuracy": 0.97}, **bad)) == []


def test_dropout_that_was_never_on_is_proposed_from_the_first_epoch():
    overfitting = {**PLANTED["overfitting"]}
    shifted = {"augment.translate": 4, "augment.flip": "none"}

    def changes(**network):
        fields = {f"network.{name}": value for name, value in network.items()}
        return diagnose(evidence(shifted | fields, **overfitting))[0].changes

    assert changes(block_dropout=0.0, dense_dropout=0.0) == {"network.block_dropout": 0.2}
    off = changes(block_dropout=0.0, dense_dropout=0.0, dropout_from_epoch=9.0)
    assert off == {"network.block_dropout": 0.2, "network.dropout_from_epoch": 0}
    assert changes(block_dropout=0.3, dropout_from_epoch=9.0) == {"network.dropout_from_epoch": 0}
    assert changes(block_dropout=0.3) == {"augment.flip": "random"}


def test_the_gap_that_counts_is_smaller_where_the_images_are_never_altered():
    by_heart = {"train": (0.6, 0.8, 0.9, 0.98, 1.0), "val": (0.6, 0.68, 0.74, 0.77, 0.78)}

    def found(changes=None, train_accuracy=1.0, **measured):
        return diagnose(evidence(changes, {"train_accuracy": train_accuracy} | measured, **by_heart))

    assert [finding.name for finding in found()] == ["overfitting"]
    assert found()[0].evidence.endswith("the same pixels")  # nothing follows: the validation loss does not rise
    assert "mirrored, too" in found()[0].remedy
    assert found()[0].changes == {"augment.translate": 4}
    mirrored = found({"augment.flip": "random"})[0]
    assert mirrored.evidence.endswith("the same pixels, mirrored or not")
    assert mirrored.remedy == "train images shifted by up to 4 pixels"
    assert [finding.name for finding in found({"augment.crop": 32, "network.head": "mean"})] == ["overfitting"]
    for altered in (
        {"augment.translate": 2},
        {"augment.cutout": 8},
        {"augment.cutmix": 0.5},
        {"augment.crop": 28},
        {"augment.colour": 0.1},
        {"augment.rotate": 5},
    ):
        assert found({"network.head": "mean", **altered}) == []
    assert found(train_accuracy=0.88) == []
    few = found(validation_counts=(50, 50))  # 0.15 and two standard errors: 0.23
    assert [finding.name for finding in few] == ["validation-too-small"]


def test_what_a_few_noisy_steps_say_of_rates_does_not_count():
    noisy = {"train_accuracy": 0.6, "trials": trials(0.4, 0.3, 0.6, 0.69, 0.7, error=0.15)}
    assert diagnose(evidence(measured=noisy)) == []


def test_a_run_that_learned_much_more_than_a_short_training_had_no_rate_too_low():
    low = PLANTED["rate-too-low"]["measured"]  # 0.3 at a higher rate
    assert [f.name for f in diagnose(evidence(measured=low, **{"train/loss": (0.6, 0.5, 0.4, 0.3, 0.2)}))] == [
        "rate-too-low"
    ]
    assert diagnose(evidence(measured=low, **{"train/loss": (0.6, 0.5, 0.4, 0.2, 0.1)})) == []


def test_a_network_that_is_as_often_wrong_as_it_says_is_no_sign_of_wrong_labels():
    assert diagnose(evidence(measured={"surest": Surest(20, 100, 0.8)})) == []


def test_causes_hide_what_they_cause():
    planted = PLANTED["rate-too-high"]["measured"] | PLANTED["dead-units"]["measured"]
    assert [f.name for f in diagnose(evidence(measured=planted))] == ["rate-too-high"]
    order = list(RULES)
    for cause, symptoms in EXPLAINS.items():
        assert all(name in RULES for name in (cause, *symptoms))
        assert all(order.index(name) > order.index(cause) for name in symptoms)


def test_notes_recipes_are_tested_on_held_out_images():
    finding = diagnose(evidence(**PLANTED["overfitting"]))[0]
    assert 'source = "split"' in remedy_study(finding, load_recipe("train2"))


# The measures.

SMALL = {
    "network.channels": [[16], [16]],
    "network.pool": 4,
    "network.dense": [16],
    "network.block_dropout": 0.0,
    "network.dense_dropout": 0.0,
    "network.padding": "same",
    "network.activation_layers": True,
    "epochs": 2,
    "batch_size": 20,
    "precision": "float32",
}


def trained(images, folder, changes=None, before=lambda model: None):
    training = new_training(RECIPE.override(SMALL | (changes or {})), images, runs_dir=folder, threads=1)
    before(training.state.model)
    for _ in training:
        pass
    return load_trained(training.run, images=images, threads=1)


def test_measuring_changes_nothing(tiny_images, tmp_path):
    found = trained(tiny_images, tmp_path, {"network.batch_norm": True, "augment.flip": "random"})
    weights = {name: tensor.clone() for name, tensor in found.network.state_dict().items()}
    files = {path: path.read_bytes() for path in found.run.path.rglob("*") if path.is_file()}
    first, second = probe.evidence_of(found).measures, probe.evidence_of(found).measures
    assert first == second
    assert all(torch.equal(tensor, found.network.state_dict()[name]) for name, tensor in weights.items())
    assert not found.network.training
    assert {path: path.read_bytes() for path in found.run.path.rglob("*") if path.is_file()} == files


def test_measures_of_a_network_without_dropout_batch_norm_and_augmentation(tiny_images, tmp_path):
    found = trained(tiny_images, tmp_path)
    m = probe.evidence_of(found).measures
    assert m.plain_loss == m.dropout_loss
    assert m.changed_by_batch_norm == 0
    assert m.seen_accuracies[0] == m.seen_accuracies[1]
    assert m.train_counts == (18,) * 10
    assert m.num_validation == 20
    assert m.map_sides == (32, 8)
    assert [layer.name for layer in m.layers] == ["conv2d_1", "conv2d_2", "dense_1", "predictions"]
    weight = found.network.get_parameter("conv2d_2.weight")
    assert m.layers[1].weight == pytest.approx(float(weight.norm().detach()))
    assert all(layer.gradient > 0 for layer in m.layers)
    assert m.layers[-1].inactive is None


def test_mirror_images_are_told_where_left_and_right_differ(tiny_images, tmp_path):
    pixels = tiny_images.train.pixels
    symmetric = replace(tiny_images.train, pixels=np.maximum(pixels, pixels[:, :, ::-1]))
    dated = replace(symmetric, pixels=symmetric.pixels.copy())
    dated.pixels[:, 28:, 24:] = 255  # in a corner, as a camera's date
    for train, least, most in ((symmetric, 0.5, 0.5), (dated, 0.5, 0.5), (load_images("digits:600").train, 0.8, 1)):
        images = replace(tiny_images, train=train)
        told = probe.evidence_of(trained(images, tmp_path, {"epochs": 1})).measures.mirror_accuracy
        assert least <= told <= most
    small = replace(tiny_images, train=replace(symmetric, pixels=symmetric.pixels[:, :9, :9]))
    data = Data.of(RECIPE.override(SMALL), replace(small, test=small.train), "cpu")
    assert probe._mirror_accuracy(RECIPE, data, machine.prepare("float32", device="cpu", threads=1)) is None


def test_dead_units_are_counted(tiny_images, tmp_path):
    def kill(model):
        model.get_parameter("conv2d_2.bias").data[:12] = -100.0

    m = probe.evidence_of(trained(tiny_images, tmp_path, before=kill)).measures
    inactive = {layer.name: layer.inactive for layer in m.layers}
    assert inactive["conv2d_2"] >= 12 / 16
    assert inactive["conv2d_1"] < 0.5


@pytest.mark.parametrize(("epochs", "skipped"), [(4, 0.0), (1000, 0.0), (4, 0.5)])
def test_a_trial_goes_through_the_runs_whole_course_in_no_more_steps(
    epochs, skipped, tiny_images, tmp_path, monkeypatch
):
    found = trained(tiny_images, tmp_path, {"batch_size": 20})
    changes = {"epochs": epochs, "optimizer.learning_rate": 0.01, "schedule.name": "linear", "skip_easy": skipped}
    recipe = found.run.recipe.override(changes | {"schedule.warmup_epochs": epochs / 4})
    watched = []
    real = probe.train_step

    def train_step(state, batch, rate, recipe, progress, here):
        watched.append((rate, progress))
        return real(state, batch, rate, recipe, progress, here)

    monkeypatch.setattr(probe, "train_step", train_step)
    steps = probe._trial_steps(recipe, found.data, seconds_a_step=0.001)
    trials, _ = probe._trials(recipe, found.data, found.machine, steps)
    per_epoch = -(-len(found.data.train.labels) // 20)
    assert steps == min(per_epoch + (epochs - 1) * math.ceil(per_epoch * (1 - skipped)), probe.TRIAL_STEPS)
    (own, progress), (tenth, _) = (zip(*watched[start : start + steps], strict=True) for start in (0, steps))
    assert len(watched) == len(trials) * steps
    assert max(own) == pytest.approx(0.01, rel=0.05)
    assert own[0] < 0.005
    assert own[-1] <= 0.01 / (0.75 * steps) * 1.5
    assert tenth == pytest.approx([0.1 * rate for rate in own])
    assert progress[0] == 0
    assert progress[-1] == pytest.approx(epochs * (1 - 1 / steps), rel=0.1)


def test_a_run_of_few_steps_has_no_trials(tiny_images, tmp_path):
    found = trained(tiny_images, tmp_path, {"batch_size": 500, "epochs": 2})
    measures = probe.evidence_of(found).measures
    assert measures.trials == {}
    assert not {"rate-too-high", "rate-too-low"} & {
        finding.name for finding in diagnose(Evidence(found.run.recipe, found.rows(), measures))
    }


def test_trials_tell_a_rate_that_is_too_low_or_too_high(tiny_images, tmp_path):
    low = probe.evidence_of(trained(tiny_images, tmp_path, {"optimizer.learning_rate": 1e-5})).measures
    high = probe.evidence_of(trained(tiny_images, tmp_path, {"optimizer.learning_rate": 0.5})).measures
    assert best_factor(low.trials) > 1
    assert best_factor(high.trials) < 1
    assert low.trials[1.0].standard_error == 0
    assert low.fit_accuracy > 0.9


def test_what_is_tried_without_decay_is_without_it(tiny_images, tmp_path):
    changes = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.01, "optimizer.weight_decay": 0.3}
    recipe = RECIPE.override(SMALL | changes)
    found = trained(tiny_images, tmp_path, changes)
    where = (found.data, found.machine, 10)
    with_decay, without = probe._trials(recipe, *where)
    same, none = probe._trials(recipe.override({"optimizer.weight_decay": 0.0}), *where)
    assert without.loss == same[1.0].loss != with_decay[1.0].loss
    assert none is None


def test_the_surest_are_a_tenth_and_their_labels_are_looked_at():
    sure = torch.linspace(0.99, 0.51, 40)
    probabilities = torch.stack([sure, 1 - sure], 1)
    labels = torch.tensor([1, 0, 0, 1] + [1] * 36)
    assert probe.surest_of(probabilities, labels) == Surest(2, 4, pytest.approx(float(sure[:4].mean())))


COOLED = {
    "schedule.name": "constant",
    "epochs": 2,
    "augment.translate": 2,
    "augment.flip": "alternating",
    "network.block_dropout": 0.2,
    "validation.fraction": 0.3,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.9},
        {"schedule.warmup_epochs": 1.0},
        {"augment.cutmix": 0.5},
        {"network.batch_norm": True, "batch_size": 40},
    ],
)
def test_steps_at_the_rate_as_it_was_are_those_that_the_run_would_have_made(changes, tiny_images, tmp_path):
    """So what a falling rate brings is compared with what going on would have brought."""
    found = trained(tiny_images, tmp_path, COOLED | changes)
    cooldown = probe.evidence_of(found).measures.cooldown
    steps = 2 * math.ceil(len(found.data.train.labels) / found.run.recipe.batch_size)
    assert cooldown.steps == steps
    assert cooldown.before.loss == pytest.approx(found.run.metrics()[-1]["val/loss"])
    resume(found.run, images=tiny_images, epochs=4, threads=1)
    assert found.run.metrics()[-1]["step"] == 2 * steps
    looks = [Score(row["val/loss"], row["val/accuracy"]) for row in found.run.metrics()[-2:]]
    assert [cooldown.halfway, cooldown.held] == [pytest.approx(look) for look in looks]
    assert cooldown.falling != cooldown.held
    assert (
        probe.evidence_of(found).measures.cooldown == cooldown
    )  # of the weights that were loaded, though the run has gone on


def test_what_a_falling_rate_brings_is_seen_where_the_rate_is_high(tmp_path):
    changes = {"schedule.name": "constant", "optimizer.learning_rate": 0.02, "epochs": 3, "batch_size": 16}
    found = trained(fromzero.load_images("digits"), tmp_path, changes | {"validation.fraction": 0.3})
    cooldown = probe.evidence_of(found).measures.cooldown
    assert cooldown.falling.loss < min(cooldown.held.loss, cooldown.before.loss)
    assert cooldown.falling.accuracy > max(cooldown.held.accuracy, cooldown.before.accuracy)
    assert (cooldown.halfway.loss + cooldown.held.loss) / 2 - cooldown.falling.loss > 2 * cooldown.loss_se > 0


def test_a_falling_rate_is_tried_where_a_run_that_skips_images_stands(tiny_images, tmp_path, monkeypatch):
    """Its later epochs have fewer steps, so as many steps are more epochs: beyond the warm-up, with dropout on."""
    changes = {"epochs": 6, "skip_easy": 0.5, "schedule.warmup_epochs": 5.0, "network.dropout_from_epoch": 5.0}
    found = trained(tiny_images, tmp_path, COOLED | changes)
    seen = []
    step = probe.train_step
    monkeypatch.setattr(probe, "train_step", lambda *given: seen.append(given[4]) or step(*given))
    assert probe.evidence_of(found).measures.cooldown is not None
    assert seen[0] == 6.0


def test_a_checkpoint_without_a_step_is_measured_all_the_same(tiny_images, tmp_path):
    found = trained(tiny_images, tmp_path, COOLED)
    bare = found.checkpoint._replace(state={})
    assert probe.evidence_of(found._replace(checkpoint=bare)).measures.cooldown is None


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule.name": "linear"},
        {"schedule.name": "cosine"},
        {"schedule.warmup_epochs": 9.0},
        {"batch_size": 500},
        {"validation.fraction": 0.1},  # 20 images
    ],
)
def test_a_falling_rate_is_not_tried_where_there_is_nothing_to_try(changes, tiny_images, tmp_path):
    assert probe.evidence_of(trained(tiny_images, tmp_path, COOLED | changes)).measures.cooldown is None


def test_a_rate_that_overflows_when_it_is_held_tells_nothing_of_one_that_falls(tiny_images, tmp_path, monkeypatch):
    found = trained(tiny_images, tmp_path, COOLED)

    def overflow(*arguments):
        raise fromzero.NonFiniteError("the loss is nan")

    monkeypatch.setattr(probe, "train_step", overflow)
    assert probe.evidence_of(found).measures.cooldown is None


@pytest.mark.parametrize("how", ["same", "mirrored", "brighter"])
def test_copies_are_found(how, tiny_images, tmp_path):
    test = tiny_images.test.pixels.copy()
    for place, label in enumerate(tiny_images.test.labels[:10]):
        image = tiny_images.train.pixels[tiny_images.train.labels == label][0]
        # Colours stretched about their mean, as far as there is room.
        brighter = np.clip(image.astype(float) * 1.1 + 3, 0, 255).astype(np.uint8)
        test[place] = {"same": image, "mirrored": image[:, ::-1], "brighter": brighter}[how]
    planted = replace(tiny_images, test=Images(test, tiny_images.test.labels), fingerprints={"train": "a", "test": "b"})
    before = probe.evidence_of(trained(tiny_images, tmp_path / "a", {"validation.source": "test"})).measures
    after = probe.evidence_of(trained(planted, tmp_path / "b", {"validation.source": "test"})).measures
    before, after = (measures.copies.splits["validation"] for measures in (before, after))
    assert after.of == before.of == 40
    assert after.exact == before.exact + (10 if how == "same" else 0)
    assert after.near == before.near + 10


# The command.

ARGUMENTS = ["--recipe", "train2", "--validation.source", "split", "--validation.fraction", "0.3", "--threads", "1"]
ARGUMENTS += ["--network.channels", "[[16],[16]]", "--network.pool", "4", "--network.dense", "[16]"]
ARGUMENTS += ["--network.padding", "same", "--network.activation_layers", "true", "--network.block_dropout", "0"]
ARGUMENTS += ["--network.dense_dropout", "0", "--epochs", "2", "--batch_size", "20", "--optimizer.learning_rate", "0.5"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, write_cifar):
    """A run at far too high a rate, in runs/ of the working folder."""
    data = write_cifar(tmp_path / "tiny", per_batch=40)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", data.name, *ARGUMENTS]) == 0
    capsys.readouterr()
    return fromzero.list_runs()[0]


def test_the_command_names_the_problem_and_the_study_that_it_writes_runs(run, tmp_path, monkeypatch, capsys):
    assert cli.main(["diagnose", str(run.path), "--threads", "1"]) == 0
    told = capsys.readouterr().out
    assert "1. rate-too-high: " in told
    study = run.path / f"{run.name}-rate-too-high.toml"
    assert f"fromzero study {study}" in told
    recorded = json.loads((run.path / "diagnosis.json").read_text("utf-8"))
    assert recorded["findings"][0]["name"] == "rate-too-high"
    assert set(recorded["measures"]["trials"]) >= {"0.01", "0.1", "1", "10", "100"}
    assert run.has_ended  # the folder is still a run's
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where the recipe's own name of the folder leads nowhere
    assert cli.main(["study", str(tmp_path / study), "--seeds", "2", "--jobs", "1", "--threads", "1"]) == 0
    assert "remedied against as-it-is, val/accuracy higher" in capsys.readouterr().out


def test_how_long_a_study_takes_is_said_by_its_epochs(run, monkeypatch):
    rows = [row | {"time/seconds": 30.0 * row["epoch"]} for row in run.metrics()]
    monkeypatch.setattr(run, "metrics", lambda: rows)
    for changes, took in (
        (
            {"epochs": 6},
            "one about as long as this one (60 s), the other 3 min 00 s: some 24 min 00 s of training in all",
        ),
        (
            {"optimizer.learning_rate": 0.1},
            "each about as long as this one (60 s): some 12 min 00 s of training in all",
        ),
        ({"batch_size": 5}, "6 pairs of runs"),
    ):
        found = [Finding("a", "b", "c", "d", changes)]
        told = diagnosis_text(run, found, {"a": run.path / "a.toml"}, [], columns=200)
        assert told.splitlines()[-1].endswith(took)


def test_a_runs_study_survives_that_the_run_is_extended_and_its_images_are_moved(run, tmp_path, capsys):
    assert cli.main(["diagnose", str(run.path), "--threads", "1"]) == 0
    study = run.path / f"{run.name}-rate-too-high.toml"
    before = load_study(study, "screen").arms["as-it-is"].recipe
    assert cli.main(["resume", str(run.path), "--epochs", "3", "--threads", "1"]) == 0
    assert load_study(study, "screen").arms["as-it-is"].recipe == before
    (tmp_path / "tiny").rename(tmp_path / "moved")
    capsys.readouterr()
    command = ["study", str(study), "--seeds", "2", "--jobs", "1", "--threads", "1"]
    assert cli.main(command) == 2
    assert f"its images are no longer at {tmp_path / 'tiny'}; --data-dir says where" in capsys.readouterr().err
    assert cli.main(["lessons"]) == 0
    assert cli.main([*command, "--data-dir", "moved"]) == 0


@pytest.mark.parametrize(("val", "said"), [(0.82, ""), (0.72, "Train accuracy is 0.16 above validation accuracy;")])
def test_a_gap_that_is_not_called_overfitting_is_said(run, val, said):
    told = remarked(run, val=(0.6, 0.66, 0.7, val, val))
    assert said in told
    assert ("It is not called overfitting" in told) == bool(said)


def test_labels_that_could_not_be_judged_are_not_called_right(run):
    by_heart = diagnose(evidence(measured={"train_accuracy": 0.99, "surest": Surest(20, 100, 0.97)}))
    assert by_heart == []
    why = why_labels_cannot_be_judged(evidence(measured={"train_accuracy": 0.99}))
    said = remarked(run, measured={"train_accuracy": 0.99})
    assert f"Wrong labels cannot be detected in this run: {why}." in said
    assert "label-noise" not in said
    few = evidence(measured={"train_accuracy": 0.99, "surest": Surest(0, 14, 0.97), "validation_counts": (70, 70)})
    assert why_labels_cannot_be_judged(few) == f"that takes 250 validation images, and it has 140; and {why}"
    assert why_labels_cannot_be_judged(evidence()) == ""
    assert "label-noise" in remarked(run)


def test_copies_of_pictures_held_out_are_told_from_those_trained_on():
    def said(*pairs):
        return _copies_held_out(SimpleNamespace(pictures=[{"split": split, "sha256": begin} for split, begin in pairs]))

    pictures = [("train", "a"), ("validation", "b"), ("validation", "c"), ("test", "a"), ("test", "b"), ("test", "d")]
    assert said(*pictures) == (
        "1 test picture is a validation picture, too, to the byte: not trained on, so not counted among the copies."
    )
    assert said(*pictures, ("test", "c")).startswith("2 test pictures are validation pictures, too")
    assert said(*pictures, ("train", "b")) == said(("test", "a"), ("train", "a")) == said(("test", "")) == ""
    assert _copies_held_out(SimpleNamespace(pictures=[{"split": "test"}, {"sha256": "b"}])) == ""  # of older runs


def test_shorter_trainings_must_tell_more():
    lower = 1.0 - 0.07 * evidence().entropy
    trials = {1.0: Trial(1.0, 0.0), 0.1: Trial(lower, 0.001), 10.0: Trial(2.0, 0.001)}
    learning = {"train": (0.3, 0.4, 0.5, 0.55, 0.6)}
    for steps, found in ((100, ["rate-too-high"]), (20, [])):
        e = evidence(measured={"trials": trials, "trial_steps": steps, "fit_accuracy": 1.0}, **learning)
        findings = [one for one in diagnose(e) if one.name == "rate-too-high"]
        assert [one.name for one in findings] == found
        assert all("train loss after 100 steps, by peak rate" in one.evidence for one in findings)


def test_few_validation_images_show_many_wrong_labels_only(run):
    assert "Wrong labels" not in remarked(run, measured={"surest": Surest(1, 200, 0.97)})
    said = remarked(run, measured={"surest": Surest(1, 33, 0.97), "validation_counts": (165, 165)})
    assert (
        "With 330 validation images, wrong labels would be found four times out of five where they are 20% or more."
        in said
    )
    assert "Even fewer" not in said
    said = remarked(run, measured={"surest": Surest(1, 14, 0.97), "validation_counts": (70, 70)})
    assert "that takes 250 validation images, and it has 140" in said
    for count, confidence, enough in ((33, 0.97, 5), (33, 0.85, 6), (100, 0.8, 23)):
        measured = [{"surest": Surest(wrong, count, confidence)} for wrong in (enough - 1, enough)]
        found = [[finding.name for finding in diagnose(evidence(measured=one))] for one in measured]
        assert found == [[], ["label-noise"]]
        share = share_of_wrong_labels_seen(evidence(measured=measured[0]))
        drawn = np.random.default_rng(0).binomial(count, [[share - 0.01], [share]], (2, 20_000))
        missed, seen = (drawn >= enough).mean(1)
        assert missed < 0.8 <= seen + 0.01
    assert "the network is not sure enough of any image" in remarked(run, measured={"surest": Surest(9, 33, 0.55)})


def test_a_few_copies_are_told_beside_the_findings(run):
    found = (Copy("test", "test/a.png", "train/b.png", True),)
    for count, are_few in ((1, True), (150, False)):
        copies = Copies({"test": Copied(count, count, 2000)}, found=found)
        e = replace(evidence(measured={"copies": copies}), recipe=run.recipe)
        findings = diagnose(e)
        assert [finding.name for finding in findings] == ([] if are_few else ["copies"])
        assert (
            "images may be train images, too: see the run's copies.csv" in " ".join(remarks(run, e, findings))
        ) == are_few


def test_of_how_many_rare_images_it_speaks():
    measured = {"class_names": ("a", "b", "c"), "train_counts": (900, 30, 20), "recalls": (0.95, 0.6, 0.0)}
    (found,) = diagnose(evidence(measured=measured | {"validation_counts": (989, 10, 1)}))
    missed = "recall on validation, the rarest first: 'c' 0.00 (of 1 image), 'b' 0.60 (of 10 images), 'a' 0.95 (of"
    assert missed in found.evidence


def test_the_remedy_of_rare_classes_is_compared_by_the_mean_of_the_classes(run):
    (found,) = diagnose(evidence(**PLANTED["imbalance"]))
    assert (found.changes, found.metric) == ({"logit_adjustment": 1.0}, "val/balanced_accuracy")
    study = remedy_study(found, run.recipe)
    assert 'metric = "val/balanced_accuracy"' in study
    assert "With logit_adjustment = 1.0 the mean of the classes' validation accuracies is higher" in study
    (again,) = diagnose(evidence(**PLANTED["imbalance"] | {"changes": {"logit_adjustment": 0.5}}))
    assert again.changes == {}
    assert again.remedy.startswith("collect more images of the rare classes; look at accuracy by class")
    coloured = {"augment.colour": 0.8, "logit_adjustment": 1.0}
    (other,) = diagnose(evidence(coloured, {"seen_accuracies": (0.9, 0.6)}))
    assert (other.name, other.metric) == ("augmentation-too-strong", "val/balanced_accuracy")


def test_weights_within_an_epoch_are_judged_by_their_own_figures(tiny_images, tmp_path):
    """And count once: a row more would look like an epoch that brought nothing."""
    training = new_training(RECIPE.override(SMALL | {"epochs": 3}), tiny_images, runs_dir=tmp_path, threads=1)
    for progress in training:
        if progress.counters.step == training.timetable.start_of(2) + 1:
            training.save()
            break
    training.close()
    rows = training.run.metrics()
    assert len(rows) == 2
    wrong = [row | {"val/accuracy": 0.123, "val/loss": 9.0} for row in rows]  # whoever takes them for its own
    (training.run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    looked_at = load_trained(training.run, images=tiny_images, threads=1)
    assert looked_at.steps_beyond == 1
    found = probe.evidence_of(looked_at)
    assert [row["epoch"] for row in found.rows] == [1, 2]
    assert (found.rows[0]["val/accuracy"], found.rows[0]["val/loss"]) == (0.123, 9.0)
    own = evaluate(looked_at.network, *looked_at.data.validation, looked_at.data.normalise, looked_at.machine)
    assert (found.last["val/accuracy"], found.last["val/loss"]) == (own.accuracy, own.loss)


def test_weights_within_the_first_epoch_have_no_running_accuracy(tiny_images, tmp_path):
    training = new_training(RECIPE.override(SMALL), tiny_images, runs_dir=tmp_path, threads=1)
    for progress in training:
        if progress.counters.step == 1:
            training.save()
            break
    training.close()
    looked_at = load_trained(training.run, images=tiny_images, threads=1)
    said = diagnosis_header(training.run, looked_at.rows(), looked_at.reached)
    assert "after epoch 0: train 0." in said
    assert "running" not in said
    assert said.endswith("note: looked at are the weights after epoch 0 and 1 step of the next, scored anew")


def test_as_many_validation_images_are_proposed_as_tell(run):
    (found,) = diagnose(
        evidence(
            measured={"validation_counts": (30, 30), "train_counts": (600, 600)}, val=(0.6, 0.68, 0.74, 0.77, 0.78)
        )
    )
    enough = int(re.search(r"about (\d+) validation images", found.remedy)[1])
    widths = [high - low for low, high in (wilson_interval(0.78, count) for count in (enough - 1, enough))]
    assert widths[0] >= 0.1 > widths[1]
    few = replace(found, remedy="fromzero cross-validate, which judges all train images")  # held out, most were missed
    assert diagnose(
        evidence(
            measured={"validation_counts": (30, 30), "train_counts": (300, 300)}, val=(0.6, 0.68, 0.74, 0.77, 0.78)
        )
    ) == [few]


def test_notes_on_the_images_stand_at_a_diagnosis_head(run):
    provenance = run.provenance
    noted = provenance | {"data": provenance["data"] | {"notes": ["2 pictures are in two classes"]}}
    other = SimpleNamespace(path=run.path, recipe=run.recipe, provenance=noted)
    header = diagnosis_header(run, rows())
    assert header.count("\n") == len(provenance["data"]["notes"])
    assert diagnosis_header(other, rows()).endswith("\n  note: 2 pictures are in two classes")


def test_few_validation_images_with_hardly_a_mistake_say_nothing_of_labels(run):
    nearly = (0.6, 0.8, 0.9, 0.97, 0.98)
    measured = {"validation_counts": (20, 20), "surest": Surest(0, 4, 0.9)}
    for val, said in ((nearly, "could not be judged: label-noise"), ((0.5,) * 5, "cross-validate")):
        few = replace(evidence(measured=measured, train=nearly, val=val), recipe=run.recipe)
        told = " ".join(remarks(run, few, diagnose(few)))
        assert said in told
        assert ("label-noise" in told) == (val is nearly)


def test_few_validation_images_hide_only_what_nothing_else_rules_out():
    assert set(ON_VALIDATION) <= RULES.keys()
    uneven = {"train_counts": (800, 100)}
    unfitted = evidence({"schedule.name": "constant"}, measured=uneven, train=(0.3, 0.4, 0.5, 0.55, 0.6))
    assert hidden_by_few(unfitted) == list(ON_VALIDATION)
    even = {"train_counts": (799, 100), "train_accuracy": 0.99}
    fitted = evidence({"schedule.name": "linear"}, measured=even)
    assert hidden_by_few(fitted) == ["label-noise", "overfitting"]


def test_a_gap_too_small_for_its_error_is_told_with_what_would_do(run):
    few = evidence(
        {"augment.translate": 2}, measured={"validation_counts": (50, 50), "train_accuracy": 0.99},
        train=(0.6, 0.8, 0.9, 0.97, 0.99), val=(0.5, 0.6, 0.66, 0.66, 0.66), val_loss=(1.0, 0.9, 0.9, 0.9, 0.9),
    )  # fmt: skip
    (told,) = (said for said in remarks(run, few, diagnose(few)) if said.startswith("Train accuracy is 0.33"))
    assert "called overfitting" not in told, "which could not be judged"
    many = replace(few, measures=replace(few.measures, validation_counts=(450, 450)))
    (told,) = (said for said in remarks(run, many, diagnose(many)) if said.startswith("Train accuracy is 0.33"))
    takes = f"that takes a gap of {large_gap(many)[1]:.2f} with 900 validation images (here 0.31, over the last epochs"
    assert f"It is not called overfitting: {takes}, classes weighted as in train), or a validation loss that" in told
    assert told.endswith("(here not at all).")
    assert 0.3 + 2 * math.sqrt(0.66 * 0.34 / 100) == pytest.approx(large_gap(few)[1])


def test_mirrored_images_are_not_cleared_where_nothing_could_show_their_cost(run):
    flipped = run.recipe.override({"augment.flip": "random"})
    right = (0.6, 0.8, 0.9, 0.98, 0.998)
    for told, val, judged in ((0.9, right, False), (0.6, right, True)):
        measured = {"mirror_accuracy": told, "train_accuracy": 1.0}
        e = replace(evidence(measured=measured, train=right, val=val), recipe=flipped)
        assert "mirrored-images" not in [finding.name for finding in diagnose(e)]
        said = " ".join(remarks(run, e, []))
        assert ("mirrored-images" in said) == judged
        assert ("too few are mistaken to tell whether that costs anything" in said) != judged
    measured = {"mirror_accuracy": 0.9, "seen_accuracies": (0.9, 0.5)}
    explained = replace(evidence({"augment.translate": 8, "augment.flip": "random"}, measured))
    found = diagnose(explained)
    assert [finding.name for finding in found] == ["augmentation-too-strong"]
    assert "too few are mistaken" not in " ".join(remarks(run, explained, found))


def test_a_network_that_is_hardly_ever_wrong_has_no_wrong_labels_to_find(run):
    right = (0.6, 0.8, 0.9, 0.98, 1.0)
    said = remarked(run, train=right, val=right, measured={"train_accuracy": 1.0, "surest": Surest(0, 33, 0.97)})
    assert said.startswith("Nothing found of: ")
    assert "label-noise" in said
    assert "Wrong labels" not in said
    assert "may" not in said


def test_a_run_that_overflowed_in_its_first_epoch_can_be_looked_at(tiny_images, tmp_path):
    changes = {"optimizer.learning_rate": 1e6, "optimizer.name": "sgd", "optimizer.momentum": 0.0}
    training = new_training(RECIPE.override(SMALL | changes), tiny_images, runs_dir=tmp_path, threads=1)
    with pytest.raises(fromzero.NonFiniteError):
        for _ in training:
            pass
    assert training.run.metrics() == []
    found = load_trained(training.run, images=tiny_images, threads=1)
    rows = found.rows()
    assert rows[0]["epoch"] == 0
    names = [finding.name for finding in diagnose(probe.evidence_of(found))]
    assert names[0] == "rate-too-high"


# What an attack on it found.


def test_rows_after_the_checkpoint_do_not_count(run, capsys):
    rows = run.metrics()
    run.write_recipe(run.recipe.override({"epochs": len(rows) + 2}))
    resumed = run.provenance["resumed"] + [{"machine": run.provenance["machine"], "epochs": [len(rows), len(rows) + 2]}]
    run.write_provenance({**run.provenance, "resumed": resumed})
    (run.path / "summary.json").unlink()
    run.append_metrics({**rows[-1], "epoch": len(rows) + 1})  # as a kill after it and before a save leaves it
    assert cli.main(["diagnose", str(run.path), "--threads", "1"]) == 0
    assert f"after epoch {len(rows)}: " in capsys.readouterr().out


def test_a_run_of_which_no_epoch_is_saved_is_judged_by_nothing(run, capsys, tmp_path):
    picture = tmp_path / "new" / "cat" / "a.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(picture)
    for path in run.checkpoints.iterdir():  # as an early kill leaves it
        if "step-0" not in path.name:
            path.unlink()
    (run.path / "summary.json").unlink()
    for command in ("diagnose", "report"):
        assert cli.main([command, str(run.path), "--threads", "1"]) == 1
        assert "no epoch of it has been saved yet: wait" in capsys.readouterr().err
    assert not (run.path / "diagnosis.json").exists()
    assert cli.main(["evaluate", str(run.path), "--threads", "1"]) == 0
    assert " weights, of epoch 0," in capsys.readouterr().out
    for command, these in (("predict", picture), ("evaluate", tmp_path / "new")):
        assert cli.main([command, str(run.path), str(these), "--threads", "1"]) == 0
        told = "".join(capsys.readouterr())
        assert told.count("these are the weights it began with; none has been saved since") == 1
    rows = len(run.metrics())
    assert cli.main(["resume", str(run.path), "--threads", "1"]) == 0
    assert f"{rows} epochs since the last checkpoint come again" in capsys.readouterr().out


def test_an_edited_recipe_and_missing_rows_are_refused(run, capsys):
    rows = (run.path / "metrics.jsonl").read_text()
    for damage, said in (("", "rows are missing"), (rows.replace('"val/accuracy": 0', '"val/accuracy": 7'), "damaged")):
        (run.path / "metrics.jsonl").write_text(damage)
        for command in ("diagnose", "report"):
            assert cli.main([command, str(run.path), "--threads", "1"]) == 1
            assert said in capsys.readouterr().err
    (run.path / "metrics.jsonl").write_text(rows)
    (run.path / "recipe.toml").write_text(run.recipe.override({"augment.translate": 9}).to_toml())
    assert cli.main(["diagnose", str(run.path), "--threads", "1"]) == 1
    assert "augment.translate is 9, but this run was trained with 0" in capsys.readouterr().err


def test_findings_are_told_where_the_folder_cannot_be_written(run, capsys):
    (run.path / "diagnosis.json").mkdir()
    assert cli.main(["diagnose", str(run.path), "--threads", "1"]) == 1
    told = capsys.readouterr()
    assert "1. rate-too-high: " in told.out
    assert "cannot be written" in told.err


def test_all_images_are_looked_for_among_the_train_images(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3000, 32, 32, 3), np.uint8)
    labels = np.arange(1500) % 2
    train, test = Images(pixels[:1500], labels), Images(np.concatenate([pixels[:300], pixels[1800:]]), labels)
    files = [tuple(f"{split}-{n}" for n in range(1500)) for split in ("train", "test")]
    train, test = (replace(part, files=names) for part, names in zip((train, test), files, strict=True))
    images = fromzero.ImageSet("squares", train, test, ("a", "b"), "made up", {"train": "a", "test": "b"})
    copies = probe._copies(trained(images, tmp_path, {"validation.source": "test"}))
    assert copies.splits == {"validation": Copied(300, 300, 1500)}
    assert [(one.file, one.train_file) for one in copies.found] == [(f"test-{n}", f"train-{n}") for n in range(300)]


def test_images_that_all_look_alike_are_no_copies(tmp_path):
    """One scene with a small difference, as parts before a camera are."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (32, 32, 3))

    def part(count):
        labels = np.arange(count) % 3
        pixels = np.repeat(scene[None], count, 0) + rng.normal(0, 3, (count, 32, 32, 3))
        pixels[np.arange(count), 4 * labels + 2] += 40
        return Images(np.clip(pixels, 0, 255).astype(np.uint8), labels)

    images = fromzero.ImageSet("parts", part(60), part(30), tuple("abc"), "made up", {"train": "a", "test": "b"})
    found = trained(images, tmp_path, {"validation.source": "test"})
    evidence = probe.evidence_of(found)
    assert evidence.measures.copies == Copies({"validation": Copied(0, 0, 30)}, by_looks=False)
    assert "Only copies to the byte were looked for" in " ".join(remarks(found.run, evidence, []))


def test_copies_with_another_label_do_not_hide_those_that_look_alike(tmp_path):
    rng = np.random.default_rng(0)
    train = Images(rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8), np.arange(60) % 2)
    test = Images(rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 2)
    test.pixels[:4] = train.pixels[1:5]  # of the other class
    test.pixels[10:20] = train.pixels[10:20] // 2  # of the same, darker
    images = fromzero.ImageSet("parts", train, test, tuple("ab"), "made up", {"train": "a", "test": "b"})
    evidence = probe.evidence_of(trained(images, tmp_path, {"validation.source": "test"}))
    assert evidence.measures.copies == Copies({"validation": Copied(4, 14, 40)})
    test.pixels[:4] = rng.integers(0, 256, (4, 32, 32, 3))
    test.pixels[:2] = train.pixels[1:3] // 2  # nor do a few that look alike
    found = trained(images, tmp_path / "near", {"validation.source": "test"})
    assert probe.evidence_of(found).measures.copies == Copies({"validation": Copied(0, 10, 40)})
    (found,) = (finding for finding in diagnose(evidence) if finding.name == "copies")
    assert "among those trained on, to the byte: 4, more that look almost like one there: 10" in found.evidence


def test_a_class_that_is_alike_all_over_has_no_copies(tmp_path):
    """As ones in handwriting; what is the same to the byte counts all the same."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (32, 32, 3))

    def part(count):
        labels = np.arange(count) % 3
        pixels = rng.integers(0, 256, (count, 32, 32, 3))
        pixels[labels == 1] = np.clip(scene + rng.normal(0, 3, (np.count_nonzero(labels == 1), 32, 32, 3)), 0, 255)
        return Images(pixels.astype(np.uint8), labels)

    train, test = part(60), part(30)
    test.pixels[1] = train.pixels[1]
    images = fromzero.ImageSet("parts", train, test, tuple("abc"), "made up", {"train": "a", "test": "b"})
    m = probe.evidence_of(trained(images, tmp_path, {"validation.source": "test"})).measures
    assert m.copies == Copies({"validation": Copied(1, 1, 30)})


def test_measures_do_not_depend_on_the_order_of_the_images(tiny_images, tmp_path):
    """Pictures come class by class; a batch of one class has other moments than one of all."""
    order = np.argsort(tiny_images.train.labels, kind="stable")
    by_class = replace(tiny_images, train=tiny_images.train.take(order))
    changes = {"network.batch_norm": True, "epochs": 8, "optimizer.learning_rate": 3e-3}
    mixed, sorted_ = (
        probe.evidence_of(trained(images, tmp_path / name, changes)).measures
        for name, images in (("mixed", tiny_images), ("sorted", by_class))
    )
    assert mixed.changed_by_batch_norm < 0.15
    assert sorted_.changed_by_batch_norm < 0.15


def test_dropout_that_was_never_on_a_flat_curve_and_dead_units_are_not_misread():
    off = {"network.block_dropout": 0.9, "network.dropout_from_epoch": 100.0}
    assert diagnose(evidence(off, {"train_accuracy": 0.6, "dropout_loss": 9.0})) == []
    flat = {"train": (1.0,) * 5, "val": (1.0,) * 5, "learning_rate": (1e-3,) * 5}
    assert diagnose(evidence({"schedule.name": "constant"}, {"train_accuracy": 1.0}, **flat)) == []
    dead = [LayerMeasures("conv2d_1", 0.0, 5.0, 1.0), LayerMeasures("predictions", 0.0, 4.0, None)]
    found = diagnose(evidence({"optimizer.weight_decay": 1e-7}, {"layers": dead, "train_accuracy": 0.5}))
    assert [finding.name for finding in found] == ["dead-units"]


def test_copies_are_certain_where_bytes_are_the_same():
    def said(validation, test):
        copies = Copies({"validation": Copied(*validation, 1000), "test": Copied(*test, 1000)})
        (found,) = diagnose(evidence(measured={"copies": copies}))
        return found.meaning

    assert said((60, 60), (0, 80)).startswith("some validation images are train images, too")
    assert said((60, 60), (50, 80)).startswith("some validation and test images are train images, too")
    assert said((0, 60), (0, 40)).startswith("some validation images look almost like train ones")


def test_a_remedy_that_changes_nothing_has_no_study():
    pooled = evidence({"network.pool": [1, 1, 1, 1]}, {"map_sides": (32, 4, 2)})
    assert [(finding.name, finding.changes) for finding in diagnose(pooled)] == [("pooling-too-early", {})]


@pytest.mark.parametrize(
    ("pool", "remedy", "milder"),
    [
        ([2, 2, 2, 2], "no pooling in block 1", [1, 2, 2, 2]),
        ([1, 2, 2, 2], "no pooling in block 2", [1, 1, 2, 2]),
        ([4, 2, 1, 3], "windows of 2 pixels", [2, 2, 1, 2]),
    ],
)
def test_what_pools_less_is_proposed(pool, remedy, milder):
    (found,) = diagnose(evidence({"network.pool": pool}, {"map_sides": (32, 4, 2)}))
    assert (found.remedy, found.changes) == (remedy, {"network.pool": milder})


def test_train_images_unlike_those_that_are_scored():
    found = diagnose(evidence({"augment.translate": 4}, {"seen_accuracies": (0.4, 0.8)}))
    assert [finding.name for finding in found] == ["augmentation-too-strong"]
    assert "unlike those that are scored" in found[0].meaning


def test_what_is_written_is_json(tiny_images, tmp_path):
    found = trained(tiny_images, tmp_path, {"optimizer.learning_rate": 0.5})
    measures = replace(probe.evidence_of(found).measures, without_decay=Trial(float("inf"), 0.0), loss_se=float("nan"))
    write_findings(found.run, [], [], measures, tiny_images.source, 1)
    text = (found.run.path / "diagnosis.json").read_text("utf-8")
    assert "Infinity" not in text
    assert "NaN" not in text
    assert json.loads(text)["measures"]["without_decay"] == {"loss": None, "standard_error": 0.0}


def test_a_run_that_began_with_weights_is_not_judged_by_other_first_steps(run, tmp_path, capsys):
    assert cli.main(["train", "tiny", *ARGUMENTS, "--from", str(run.path)]) == 0
    capsys.readouterr()
    second = fromzero.list_runs()[1]
    assert cli.main(["diagnose", str(second.path), "--threads", "1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "With so few validation images this could not be judged: " in told
    cannot = "Wrong labels cannot be detected in this run: that takes 250 validation images, and it has "
    assert cannot in told
    assert f"fromzero cross-validate {second.path} looks for them in all train images; some may be" in told
    rest = told.split("Not found: ")[1]
    assert "imbalance" in rest  # as many images of each class
    assert "label-noise" not in rest
    assert f"The run began with the weights of {run.path}: its first steps were not tried again" in told
    assert json.loads((second.path / "diagnosis.json").read_text("utf-8"))["measures"]["trials"] == {}


@pytest.mark.parametrize(("changes", "hinted"), [({}, True), ({"network.batch_norm": True}, False)])
def test_a_training_without_a_fault_is_not_called_the_best(run, changes, hinted):
    """It finds faults; that another recipe reaches more is none (docs/walkthrough.md)."""
    run.write_recipe(run.recipe.override({"name": "own", **changes}))
    too_few = diagnose(evidence(measured={"validation_counts": (50, 50)}))
    assert [finding.name for finding in too_few] == ["validation-too-small"]
    for steps, other in ((10, "few"), (10_000, "strong")):  # an epoch
        for found in ([], too_few):
            said = remarked(run, found, step=[steps * epoch for epoch in range(1, 6)])
            assert (f"Another recipe may still reach more: --recipe {other} has" in said) is hinted
    found = diagnose(evidence(**PLANTED["imbalance"]))
    assert found
    assert "--recipe few" not in remarked(run, found)


def test_a_network_is_not_called_small_where_no_rate_that_was_tried_works():
    low = {"train": (0.3, 0.35, 0.4, 0.45, 0.5), "val": (0.3, 0.35, 0.4, 0.44, 0.48)}
    overflowing = {"trials": trials(*[float("inf")] * 5), "train_accuracy": 0.5, "fit_accuracy": 0.0}
    (found,) = diagnose(evidence(measured=overflowing, **low))
    assert found.name == "rate-too-high"
    assert found.changes["optimizer.learning_rate"] < 1e-4 * RECIPE.optimizer.learning_rate
    assert "all overflow" in found.evidence
    unmoved = evidence(measured=overflowing | {"trials": trials(*[0.6931] * 5)}, **low)
    assert diagnose(unmoved) == []
    assert untried(unmoved) == ["rate-too-high", "rate-too-low", "stopped-early", "underfitting"]
    moved = evidence(measured=overflowing | {"trials": trials(0.69, 0.65, 0.6, 0.65, 0.69)}, **low)
    assert [found.name for found in diagnose(moved)] == ["underfitting"]


def test_what_could_not_be_tried_is_not_called_not_found(run):
    unlearned = {"train_accuracy": 0.5, "trials": {}}
    low = {"train": (0.3, 0.35, 0.4, 0.45, 0.5), "val": (0.3, 0.35, 0.4, 0.44, 0.48)}
    assert untried(evidence()) == []
    assert untried(evidence(measured=unlearned, **low)) == [
        "rate-too-high",
        "rate-too-low",
        "stopped-early",
        "underfitting",
    ]
    tried = unlearned | {"trials": trials(0.65, 0.62, 0.6, 0.62, 0.65), "fit_accuracy": 1.0}
    assert untried(evidence(measured=tried, **low)) == []
    constant = evidence({"schedule.name": "constant"})
    assert untried(constant) == ["rate-never-falls"]
    run.write_recipe(run.recipe.override({"schedule.name": "constant"}))
    said = remarked(run)
    assert "came to nothing: rate-never-falls." in said
    assert "rate-never-falls" not in said.partition("Nothing found of")[2].partition(".")[0]


def test_a_run_shorter_than_its_recipe_or_that_has_not_ended_is_told_so(run):
    run.write_recipe(run.recipe.override({"name": "few", "network.batch_norm": True}))
    told = f"few has 60 epochs, this run {run.recipe.epochs}: more of them may reach more."
    assert remarked(run).startswith(told)
    learning = {"train": (0.3, 0.4, 0.5, 0.55, 0.6), "val": (0.3, 0.4, 0.45, 0.5, 0.55)}
    assert "stopped-early" not in remarked(run, measured={"train_accuracy": 0.6}, **learning)
    constant = {"name": "own", "schedule.name": "constant"}
    run.write_recipe(run.recipe.override(constant))
    rising = remarked(run, train=(0.3, 0.4, 0.5, 0.6, 0.72))
    assert "Its train accuracy rose by 12 points in the last quarter of its epochs" in rising
    assert f"({run.resume_command} --epochs {2 * run.recipe.epochs}) may reach more" in rising
    assert rising.endswith("may reach more.")
    run.write_recipe(run.recipe.override({"network.batch_norm": False}))
    both = remarked(run, train=(0.3, 0.4, 0.5, 0.6, 0.72))
    assert "may reach more. Another recipe may still reach more: --recipe few" in both
    assert "last quarter" not in remarked(run)
    (run.path / "summary.json").unlink()
    said = remarked(run)
    assert f"The run has not ended; if it was stopped, fromzero resume {run.path} trains it on." in said
    assert "more of them" not in said
