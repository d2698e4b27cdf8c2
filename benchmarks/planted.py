"""Trainings with one fault planted in each, and healthy ones beside them: what `benchmarks.diagnosis` looks at.

A case is a recipe's change, or something done to the images or to the first weights, on one of several kinds of small
training (bases), so that its fault is known.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

TEST_IMAGES = 1000  # that a run is scored on at its end, which matters for the copies only

CIFAR = {"validation.source": "split", "validation.fraction": 0.2, "clean_train_images": 1000}
BASES: dict[str, dict[str, Any]] = {
    # Adam, ReLU, dropout: as the notes' networks, smaller.
    "plain": CIFAR
    | {
        "base": "train2",
        "images": 5000,
        "network.channels": [[16, 32], [64], [128]],
        "network.padding": "same",
        "network.activation_layers": True,
        "network.block_dropout": 0.1,
        "network.dense_dropout": 0.2,
        "augment.flip": "random",
        "augment.translate": 1,
        "optimizer.learning_rate": 1e-3,
        "schedule.name": "linear",
        "batch_size": 64,
        "epochs": 30,
    },
    # Muon, batch normalisation, GELU, label smoothing: as quick.
    "norm": CIFAR
    | {
        "base": "quick",
        "images": 5000,
        "skip_easy": 0.0,
        "network.channels": [[32], [64, 64], [128]],
        "augment.translate": 2,
        "augment.scale": 1.0,
        "augment.scale_epochs": 0.0,
        "optimizer.learning_rate": 0.12,
        "batch_size": 125,
        "epochs": 20,
    },
    # SGD with momentum, on 1,437 handwritten digits.
    "digits": {
        "base": "train1",
        "images": 0,
        "network.channels": [[16], [32], [64]],
        "network.dense": [32],
        "network.dense_dropout": 0.3,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.02,
        "schedule.name": "cosine",
        "batch_size": 32,
        "epochs": 20,
        "validation.source": "split",
        "validation.fraction": 0.2,
        "clean_train_images": 1000,
    },
    # AdamW, residual blocks, ReLU.
    "residual": CIFAR
    | {
        "base": "quick",
        "images": 4000,
        "skip_easy": 0.0,
        "label_smoothing": 0.0,
        "network.channels": [[24, 24], [48, 48], [96, 96]],
        "network.residual": True,
        "network.activation": "relu",
        "network.whitening": 0,
        "network.whitening_directions": 0,
        "network.initial": "glorot",
        "network.head": "max",
        "network.logit_scale": 1.0,
        "augment.translate": 2,
        "augment.scale": 1.0,
        "augment.scale_epochs": 0.0,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 2e-3,
        "optimizer.head_learning_rate": 0.0,
        "optimizer.bias_learning_rate": 0.0,
        "optimizer.weight_decay": 0.01,
        "schedule.name": "cosine",
        "batch_size": 100,
        "epochs": 20,
    },
}


@dataclass(frozen=True)
class Case:
    """A training with one fault, or a healthy one (`problem` None). changes: recipe fields, a number being a factor
    where it stands in `times`; images, weights: what is done to the data and to the first weights."""

    name: str
    problem: str | tuple[str, ...] | None
    changes: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    images: Callable[[Any, np.random.Generator], Any] | None = None
    weights: Callable[[Any], None] | None = None
    bases: tuple[str, ...] = tuple(BASES)

    @property
    def problems(self):
        """The names that are right, of which one will do."""
        return (self.problem,) if isinstance(self.problem, str) else (self.problem or ())


def kept(images, indices):
    train = images.train.take(indices)
    return replace(images, train=train, fingerprints=images.fingerprints | {"train": train.fingerprint()})


def few(images, rng):
    return kept(images, np.sort(rng.permutation(len(images.train))[: len(images.train) // 8]))


def mislabelled(share):
    def change(images, rng):
        def part(split):
            wrong = rng.random(len(split)) < share
            shift = rng.integers(1, images.num_classes, len(split))
            return replace(split, labels=np.where(wrong, (split.labels + shift) % images.num_classes, split.labels))

        train, test = part(images.train), part(images.test)
        prints = {"train": train.fingerprint(), "test": test.fingerprint()}
        return replace(images, train=train, test=test, fingerprints=prints)

    return change


def imbalanced(images, rng):
    """Of every other class one image in fifty."""
    rare = (images.train.labels % 2 == 1) & (rng.random(len(images.train)) > 0.02)
    for label in range(1, images.num_classes, 2):  # two at least, so that one can be held out
        members = np.flatnonzero(images.train.labels == label)
        rare[members[:3]] = False
    return kept(images, np.flatnonzero(~rare))


def copied(share):
    """A share of the train images stands there twice, so that validation has copies of what is trained on."""

    def change(images, rng):
        count = round(share * len(images.train) / (1 + share))
        order = rng.permutation(len(images.train))
        return kept(images, np.sort(np.concatenate([order[count:], order[count : 2 * count]])))

    return change


def scaled_weights(factor):
    def change(model):
        for weight in model.parameters():
            if weight.dim() > 1 and weight.requires_grad:
                weight.data.mul_(factor)

    return change


def low_biases(model):
    for name, weight in model.named_parameters():
        if name.endswith("bias") and not name.startswith("predictions"):
            weight.data.fill_(-5.0)


NO_BN = ("plain", "digits")
NO_AUGMENTATION = {"augment.flip": "none", "augment.translate": 0, "augment.cutout": 0}
NO_DROPOUT = {"network.block_dropout": 0.0, "network.dense_dropout": 0.0}
CASES = [
    Case("healthy", None),
    Case("healthy, dropout of a half", None, {"network.dense_dropout": 0.5, "network.dense": [256]}),
    Case("healthy, mild weight decay", None, {"optimizer.weight_decay": 5e-4}),
    Case("healthy, twice the channels", None, times={"network.channels": 2}),
    Case("healthy, a constant rate", None, {"schedule.name": "constant"}, bases=("digits",)),
    Case("healthy, a warm-up", None, {"schedule.warmup_epochs": 4.0, "schedule.name": "cosine"}),
    Case(
        "an eighth of the images, no dropout, no augmentation",
        "overfitting",
        NO_DROPOUT | NO_AUGMENTATION | {"label_smoothing": 0.0},
        times={"epochs": 2},
        images=few,
        bases=("plain", "norm", "residual"),
    ),
    Case(
        "no dropout, no augmentation, constant rate",
        "overfitting",
        NO_DROPOUT | NO_AUGMENTATION | {"label_smoothing": 0.0, "schedule.name": "constant"},
        bases=("plain",),
    ),
    Case("no augmentation", "overfitting", NO_AUGMENTATION, bases=("norm", "residual")),  # no fault of plain
    Case("two channels", "underfitting", {"channels": 2, "network.dense": [4], "network.whitening": 0}),
    Case("rate × 50", "rate-too-high", times={"optimizer.learning_rate": 50}),
    Case("rate ÷ 100", "rate-too-low", times={"optimizer.learning_rate": 0.01}),
    Case("a tenth of the epochs", "stopped-early", times={"epochs": 0.1}),
    Case(  # not of digits, which are fitted by then, nor of norm, whose rate is too high to stay
        "a third of the epochs at a constant rate",
        ("rate-never-falls", "stopped-early"),
        {"schedule.name": "constant"},
        times={"epochs": 0.34},
        bases=("plain", "residual"),
    ),
    Case("constant rate", "rate-never-falls", {"schedule.name": "constant"}, bases=("plain", "norm", "residual")),
    Case(
        "constant high rate",
        ("rate-never-falls", "rate-too-high"),
        {"schedule.name": "constant"},
        times={"optimizer.learning_rate": 4},
    ),
    Case("dropout of 0.8", "dropout-too-strong", {"network.block_dropout": 0.8}),
    Case("pooling by 8 at once", "pooling-too-early", {"first_pool": 8}),
    Case("weight decay of 0.1", "decay-too-strong", {"optimizer.weight_decay": 0.1}),
    Case("batches of 2", "batch-too-small", {"batch_size": 2, "epochs": 3}, bases=("norm", "residual")),
    Case("cutout of 28 pixels", "augmentation-too-strong", {"augment.cutout": 28}),
    Case("shifts of 24 pixels", "augmentation-too-strong", {"augment.translate": 24}),
    Case("mirrored digits", "mirrored-images", {"augment.flip": "random"}, bases=("digits",)),
    Case("biases at −5", "dead-units", weights=low_biases, bases=NO_BN),
    Case("first weights × 0.02", ("vanishing-gradients", "dead-units"), weights=scaled_weights(0.02), bases=NO_BN),
    Case("50 : 1", "imbalance", images=imbalanced),
    Case("copies, a quarter", "copies", images=copied(0.25)),
    Case("copies, a tenth", "copies", images=copied(0.1)),
    Case("a fifth of the labels wrong", "label-noise", images=mislabelled(0.2)),
    Case("two fifths of the labels wrong", "label-noise", images=mislabelled(0.4)),
    Case("few validation images", "validation-too-small", {"validation.fraction": 0.02}),
]


def recipe_of(base, case, seed):
    from fromzero import load_recipe

    changes = dict(BASES[base])
    recipe = load_recipe(changes.pop("base"))
    changes.pop("images")
    recipe = recipe.override(changes)
    changes = dict(case.changes)
    for path, factor in case.times.items():
        if path == "network.channels":
            changes[path] = [[round(c * factor) for c in block] for block in recipe.network.channels]
        else:
            old = recipe.fields()[path]
            changes[path] = max(1, round(old * factor)) if isinstance(old, int) else old * factor
            if path == "optimizer.learning_rate":
                for other in ("head", "bias"):
                    changes[f"optimizer.{other}_learning_rate"] = (
                        factor * recipe.fields()[f"optimizer.{other}_learning_rate"]
                    )
    if (channels := changes.pop("channels", None)) is not None:
        changes["network.channels"] = [[channels] * len(block) for block in recipe.network.channels]
    if (pool := changes.pop("first_pool", None)) is not None:
        changes["network.pool"] = [pool, *([2] * (len(recipe.network.channels) - 2)), 1]
    if recipe.optimizer.name == "adamw" and "optimizer.weight_decay" in changes:
        # Decoupled, it is multiplied by the rate. 5 was no fault yet: validation accuracy rose.
        changes["optimizer.weight_decay"] *= 1000 if case.problem else 50
    if not recipe.network.dense and case.problem is not None:
        changes.pop("network.dense", None)
        changes.pop("network.dense_dropout", None)
    return recipe.override(changes | {"name": f"{base}: {case.name}".replace(" : ", ":"), "seed": seed})


def images_of(base, case, data_dir):
    from fromzero.data import load_images

    count = BASES[base]["images"]
    images = load_images(f"cifar10:{count}" if count else "digits", data_dir=data_dir if count else None)
    if len(images.test) > TEST_IMAGES:
        images = replace(images, test=images.test.take(np.arange(TEST_IMAGES)))
    return images if case.images is None else case.images(images, np.random.Generator(np.random.PCG64(7)))


def name_of(base, case, seed):
    return f"{base}-{case.name}-{seed}".replace(" ", "_").replace(",", "")
