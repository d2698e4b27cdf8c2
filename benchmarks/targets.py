"""What fromzero means to reach, and the verdicts on a run's results. Pure functions."""

import statistics
from typing import NamedTuple

from benchmarks import figures
from benchmarks.figures import Spread, Verdict

FROMZERO = "fromzero"
PLAIN_BF16, PLAIN_FLOAT32 = "plain PyTorch bf16", "plain PyTorch float32"
KERAS_BF16, KERAS_FLOAT32 = "Keras mixed_bfloat16", "Keras float32"
POLICIES = {KERAS_FLOAT32: "float32", KERAS_BF16: "mixed_bfloat16"}
SIDES = (KERAS_FLOAT32, KERAS_BF16, PLAIN_FLOAT32, PLAIN_BF16, FROMZERO)

# How many times as many images a second fromzero is to train as a side, with SGD, for each network that has a target.
SPEEDUPS = {
    KERAS_BF16: {"train1": 2.0, "train2": 2.0, "train3": 2.0},
    KERAS_FLOAT32: {"train1": 4.0, "train3": 8.0},
    PLAIN_BF16: {"train1": 2.0, "train2": 2.0, "train3": 2.0},
}


class Goal(NamedTuple):
    """What a recipe is to reach, and in less time than Keras in float32 takes for so many epochs of train 3."""

    keras_epochs: float
    accuracy: float


GOALS = {"quick": Goal(0.1, 0.84), "strong": Goal(1.5, 0.94), "best": Goal(12, 0.96)}
IDLE = 0.5  # the load average up to which nothing else runs
EVEN = 0.1  # a step's time, and an image's, may differ by this share and still count as the same


def step_verdicts(steps):
    """steps: {network: {side: [images a second in each round]}}."""
    return [
        Verdict(f"{name}, {FROMZERO} ÷ {side}", speedup(sides, side), SPEEDUPS[side][name], "×", at_least=True)
        for name, sides in steps.items()
        for side in SPEEDUPS
        if name in SPEEDUPS[side] and {side, FROMZERO} <= sides.keys()
    ]


def speedup(sides, side):
    """How many times as many images a second fromzero trains as `side`, from the pairs of each round."""
    return Spread.of(figures.ratios(sides[FROMZERO], sides[side]))


def share_of_ceiling(rates, precision, flop, ceilings):
    """The share of the processor's measured ceiling in `precision` that training at these rates uses, by rounds."""
    reached = [figures.images_per_second_at(ceiling_gigaflops(found, precision), flop) for found in ceilings]
    return Spread.of(figures.ratios(rates, reached))


def ceiling_gigaflops(found, precision):
    """The fastest that the processor was seen to compute in `precision`: a matrix product or a convolution."""
    return max(rate for _, rate in found[precision].values())


def cold_verdicts(cold):
    """cold: {recipe: {"seconds": […], "keras_epoch_seconds": […], "accuracy": […]}}, pair by pair."""
    verdicts = []
    for name, found in cold.items():
        if name not in GOALS:
            continue
        goal = GOALS[name]
        epochs = Spread.of(figures.ratios(found["seconds"], found["keras_epoch_seconds"]))
        accuracy = Spread.of(found["accuracy"])
        unit = "epochs of Keras float32, train 3"
        verdicts += [
            Verdict(
                f"{name}, process start to printed result", epochs, goal.keras_epochs, unit, at_least=False, form=".3f"
            ),
            Verdict(f"{name}, test accuracy", accuracy, goal.accuracy, "", at_least=True, form=".4f"),
        ]
    return verdicts


def lifetime_verdicts(lifetime):
    """Whether cost grows as the work does, from the lifetime part."""
    verdicts = []
    if linear := lifetime.get("linear"):
        ratios = [figures.unevenness(found["seconds"]) for found in linear]
        fewest, *_, most = sorted(int(images) for images in linear[0]["seconds"])
        what = f"{linear[0]['recipe']}, a step of a run on {most:,} images ÷ one of a run on {fewest:,}, in turn"
        verdicts.append(_at_most(what, ratios, 1 + EVEN, "×"))
    if epochs := lifetime.get("epochs"):
        name = epochs[0]["recipe"]
        shares = [100 * epoch["evaluation_seconds"] / epoch["epoch_seconds"] for epoch in epochs]
        memory = [epoch["peak_bytes"] / 1e9 for epoch in epochs]
        verdicts += [
            _at_most(f"{name}, peak memory on CIFAR-10", memory, 2.0, "GB"),
            _at_most(f"{name}, evaluating 10,000 images ÷ an epoch", shares, 5.0, "%"),
        ]
    if late := lifetime.get("late_by_early"):
        ratios = [statistics.median(found["ratios"]) for found in late]
        what = f"{late[0]['recipe']}, a step after an epoch ÷ one of a run just begun, in turn"
        verdicts.append(_at_most(what, ratios, 1 + EVEN, "×"))
    if starts := lifetime.get("start_seconds"):
        verdicts.append(_at_most("train3 on CIFAR-10, process start to first step", starts, 8.0, "s"))
    return verdicts


def not_measured(results):
    """What has a target and no verdict, as a part was left out or failed."""
    steps, lifetime = results.get("steps", {}), results.get("lifetime", {})
    missing = []
    for side, least in SPEEDUPS.items():
        names = [name for name in least if not {side, FROMZERO} <= steps.get(name, {}).keys()]
        missing += [f"{', '.join(names)} ÷ {side}"] if names else []
    missing += [f"{name} (time and accuracy)" for name in GOALS if name not in results.get("cold", {})]
    known = {
        "linear": "time a step with more images",
        "epochs": "memory and evaluation",
        "late_by_early": "time a step after an epoch",
        "start_seconds": "start to first step",
    }
    return missing + [what for key, what in known.items() if not lifetime.get(key)]


def _at_most(what, values, target, unit):
    return Verdict(what, Spread.of(values), target, unit, at_least=False)
