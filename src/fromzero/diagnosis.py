"""From what a run recorded and what was measured of it to what is wrong: findings, each with the figures that show it,
a remedy, and the recipe fields that a test of the remedy changes.

Pure functions of plain data. A rule looks at the evidence and answers with a finding or with None; RULES has them all,
causes before what they cause. The thresholds were chosen on trainings with faults planted in them; docs/diagnosis.md
lists them, and what the rules made of others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fromzero.changes import usual_epochs
from fromzero.errors import counted, some
from fromzero.evidence import SMALL_GAP, TRIAL_STEPS, Evidence, best_factor, late_gain
from fromzero.recipe import Recipe
from fromzero.stats import POWER, wilson_interval

BY_HEART = 0.97  # clean train accuracy from which a network may have learned labels, right or wrong, one by one
BALANCED = "val/balanced_accuracy"  # the figure of an epoch by which a remedy for all classes alike is compared
COPIES = "copies.csv"  # in the run folder: which images are copies of which
COPIED = 0.05  # share; of CIFAR-10's own test images 0.003 are found
IMBALANCED, RECALL_GAP = 8.0, 0.2  # images of the commonest class over those of the rarest; accuracy
WRONG, SURE, OVERSURE = 0.06, 0.6, 0.03  # share of wrong ones among the surest; their mean probability; beyond that
FEWEST_SURE = 25  # images, a tenth of the validation images
RATE_GAIN, LEARNED = 0.05, 0.5  # of the entropy of the classes, in loss; of the loss of the best trial
COLLAPSED, HAD_LEARNED = 0.98, 0.8  # of the entropy of the classes, as losses
DEAD = 0.9  # share of a layer's units
VANISHED = 1e-3  # norm of the first layer's gradient over that of the last
PULL = 0.5  # weight decay over gradient
SMALL_MAP = 1 / 8  # of the image's side
SMALL_BATCH, CHANGED = 32, 0.15  # images; share of predictions
HIDDEN, HARDER = 0.6, 0.15  # share of an image; accuracy
TOLD_APART, FEWEST_TOLD = 0.75, 25  # share of images and mirror images that are told apart; validation images
FEWEST_WRONG = 5  # validation images; with fewer no mirroring can be blamed for much
DROPPED, DROPOUT_LOSS = 0.7, 0.5  # rate; nats
COOLED = 0.02  # of the loss at a constant rate, that a falling one must save at least
LAST_GAIN, LATE_GAIN = 0.03, 0.1  # of train accuracy: by the last epoch, by the last quarter at a constant rate
LOSS_RISE, LARGE_GAP = 0.05, 0.3  # of the lowest validation loss; accuracy
UNALTERED_GAP = 0.15  # accuracy, where train images are fitted and shown as they are
FITS = 0.9  # accuracy on a few images
WIDE = 0.05  # half of an accuracy's 95 % interval
MOST_HELD_OUT = 0.25  # of the images, for validation


@dataclass(frozen=True)
class Finding:
    """A problem: its name, what it means, the figures that show it, what to do, and the recipe fields that a test of
    that changes, none where no field can mend it; metric: what is to be higher then."""

    name: str
    meaning: str
    evidence: str
    remedy: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    metric: str = "val/accuracy"

    @property
    def changed(self) -> str:
        """The changes in words."""
        return ", ".join(f"{path} = {json.dumps(value)}" for path, value in self.changes.items())


def diagnose(evidence: Evidence) -> list[Finding]:
    """What is wrong with a run, causes first. What another finding explains is left out."""
    found: list[Finding] = []
    recipe = evidence.recipe
    for name, rule in RULES.items():
        finding = rule(evidence)
        if finding is not None and not any(name in EXPLAINS.get(other.name, ()) for other in found):
            changes = {path: new for path, new in finding.changes.items() if recipe.override({path: new}) != recipe}
            metric = BALANCED if recipe.logit_adjustment else finding.metric  # what it is trained for
            found.append(replace(finding, changes=changes, metric=metric))
    return found


def _copies(e: Evidence) -> Finding | None:
    """Near-duplicates are no rarity: Barz and Denzler (2020, arXiv:1902.00423) found 3.3 % of CIFAR-10's test images in
    its train images, by a wider measure than this one."""
    copies = e.measures.copies
    many = {split: copied for split, copied in copies.splits.items() if copied.near >= COPIED * copied.of}
    if not many:
        return None
    certain = [split for split, copied in many.items() if copied.exact >= COPIED * copied.of]
    example = copies.found[0] if copies.found else None
    counts = [
        f"of {of:,} {split} images among those trained on, to the byte: {exact:,}"
        + (f", more that look almost like one there: {near - exact:,}" if copies.by_looks else "")
        for split, (exact, near, of) in copies.splits.items()
    ]
    some = f"some {' and '.join(certain or many)} images"
    return Finding(
        "copies",
        f"{some} are train images, too, so accuracies are too high"
        if certain
        else f"{some} look almost like train ones: if they are copies, accuracies are too high",
        "; ".join(counts)
        + (f"; such as {example.file} and {example.train_file}, all in the run's {COPIES}" if example else ""),
        "remove copies before splitting, or keep all copies of a picture in one split",
    )


def _are_uneven(counts: Iterable[int]) -> bool:
    """Whether the commonest class has too many of the images beside the rarest."""
    some = [count for count in counts if count]
    return max(some) >= IMBALANCED * min(some)


def _imbalance(e: Evidence) -> Finding | None:
    counts = {label: count for label, count in enumerate(e.measures.train_counts) if count}
    rarest, commonest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if not _are_uneven(counts.values()):
        return None
    middle = math.sqrt(counts[commonest] * counts[rarest])
    rare = [label for label, count in counts.items() if count < middle]
    rare_recall = _mean(e.measures.recalls[label] for label in rare)
    common_recall = _mean(e.measures.recalls[label] for label in counts if label not in rare)
    if not common_recall - rare_recall >= RECALL_GAP:
        return None
    names, held = e.measures.class_names, e.measures.validation_counts
    missed = [
        f"{names[label]!r} {recall:.2f} (of {counted(held[label], 'image')})"
        for label in sorted(counts, key=counts.__getitem__)
        if (recall := e.measures.recalls[label]) is not None
    ]
    remedy, changes = "collect more images of the rare classes", dict[str, float]()
    if not e.recipe.logit_adjustment:
        remedy = (
            "logit adjustment, which trains for the mean of the classes' accuracies (that of all images may fall);"
            " better, more images of the rare classes"
        )
        changes = {"logit_adjustment": 1.0}
    return Finding(
        "imbalance",
        "classes with few images are missed",
        f"{counts[commonest]:,} train images of {names[commonest]!r}, {counts[rarest]:,} of {names[rarest]!r};"
        f" recall on validation, the rarest first: {some(missed, most=5)}",
        f"{remedy}; look at accuracy by class (fromzero evaluate), not of all images",
        changes,
        metric=BALANCED,
    )


def _decay_too_strong(e: Evidence) -> Finding | None:
    """Where decay and gradient balance, nothing is learned any more that decay does not take back; where images are
    learned by heart all the same, little is left of the gradient, and that says nothing. Muon's own weights have no
    decay, and that of AdamW is no part of the gradient: there only steps without it can tell."""
    optimizer, decay, m = e.recipe.optimizer, e.recipe.optimizer.weight_decay, e.measures
    if not decay or m.train_accuracy >= BY_HEART:
        return None
    shown = ""
    if m.without_decay is not None and m.trials:
        own, without = m.trials[1.0].loss, m.without_decay
        if own - without.loss >= max(_gain_that_tells(e), 3 * without.standard_error):
            shown = f"train loss after {counted(m.trial_steps, 'step')} {own:.2f}, without decay {without.loss:.2f}"
    if not shown and optimizer.name != "adamw" and e.gap < SMALL_GAP:
        decayed = [layer for layer in m.layers if optimizer.name != "muon" or layer.name == "predictions"]
        worst = max(decayed, key=lambda layer: layer.weight / max(layer.gradient, 1e-9))
        pull = decay * worst.weight
        vanished = all(layer.weight < 1e-3 for layer in decayed)
        if vanished or (worst.gradient > 1e-6 and pull >= PULL * worst.gradient):  # of dead units there is no gradient
            shown = (
                f"weight decay {decay:g} times the norm of the weights of {worst.name} is {pull:.2g}, the norm of the"
                f" loss's gradient there {worst.gradient:.2g}; train accuracy {m.train_accuracy:.3f}"
            )
    if not shown:
        return None
    return Finding(
        "decay-too-strong",
        "weight decay pulls as hard as the images",
        shown,
        f"a weight decay of {decay / 100:g}",
        {"optimizer.weight_decay": float(f"{decay / 100:.3g}")},
    )


def _rates_of_dropout(recipe: Recipe) -> list[float]:
    """Of blocks and dense layers, where there is any."""
    rates = [block.dropout for block in recipe.network.blocks()] + [r for _, r in recipe.network.dense_layers()]
    return [rate for rate in rates if rate]


def _dropout_too_strong(e: Evidence) -> Finding | None:
    m, network = e.measures, e.recipe.network
    strongest = max(_rates_of_dropout(e.recipe), default=0.0)
    costs = m.dropout_loss - m.plain_loss
    if network.dropout_from_epoch >= max(e.last["epoch"], 1):
        return None  # it was off all the time
    if not strongest or e.fitted or (strongest < DROPPED and (costs < DROPOUT_LOSS or e.gap >= SMALL_GAP)):
        return None
    halved = {f"network.{name}": _halved(getattr(network, name)) for name in ("block_dropout", "dense_dropout")}
    return Finding(
        "dropout-too-strong",
        "dropout is so strong that the network does not even fit its train images",
        f"rates up to {strongest:g}; the same train images have a loss of {m.plain_loss:.2f} without dropout and of"
        f" {m.dropout_loss:.2f} with it; train accuracy {m.train_accuracy:.3f}",
        "half the rates",
        halved,
    )


def _collapse(e: Evidence) -> Finding | None:
    """A network that had learned and says nothing any more."""
    lowest = min(e.rows, key=lambda row: row["train/loss"])
    if e.last["train/loss"] < COLLAPSED * e.entropy or lowest["train/loss"] > HAD_LEARNED * e.entropy:
        return None
    rate = e.recipe.optimizer.learning_rate
    return Finding(
        "rate-too-high",
        "the learning rate is too high: the network had learned and lost it again",
        f"train loss {lowest['train/loss']:.2f} after epoch {lowest['epoch']}, {e.last['train/loss']:.2f} at the end,"
        f" as by predicting the class frequencies alone; peak rate {rate:g}",
        f"a peak rate of {rate / 3:.2g}",
        _rates(e.recipe, 1 / 3),
    )


def _other_rate(e: Evidence, direction: str) -> Finding | None:
    trials = e.measures.trials
    if not trials or e.fitted:
        return None
    if direction == "high" and all(math.isinf(trial.loss) for trial in trials.values()):
        rate, lower = e.recipe.optimizer.learning_rate, min(trials) / 1000
        return Finding(
            "rate-too-high",
            "the learning rate is too high: steps at it overflow",
            f"short trainings at peak rates from {rate:g} down to {rate * min(trials):g} all overflow",
            f"far lower rates, a peak of {rate * lower:g} or less",
            _rates(e.recipe, lower),
        )
    if not e.measures.rates_tell:
        return None
    best = best_factor(trials)
    gain = trials[1.0].loss - trials[best].loss
    enough = max(_gain_that_tells(e), 3 * trials[best].standard_error)
    if best == 1 or (best < 1) != (direction == "high") or gain < enough:
        return None
    # Short trainings favour high rates: a run that came much further in all its steps had no need of one.
    if direction == "low" and e.last["train/loss"] < LEARNED * trials[best].loss:
        return None
    # A network that cannot learn a few images at its best rate has another problem.
    if direction == "low" and e.measures.fit_accuracy is not None and e.measures.fit_accuracy < FITS:
        return None
    return Finding(
        f"rate-too-{direction}",
        f"the learning rate is too {direction}",
        rates_tried(e),
        f"a peak rate of {e.recipe.optimizer.learning_rate * best:g}",
        _rates(e.recipe, best),
    )


def rates_tried(e: Evidence) -> str:
    """The losses of the short trainings, by their rates, in words."""
    rate, steps = e.recipe.optimizer.learning_rate, counted(e.measures.trial_steps, "step")
    tried = ", ".join(f"{rate * factor:g}: {trial.loss:.2f}" for factor, trial in sorted(e.measures.trials.items()))
    return f"train loss after {steps}, by peak rate (the run's is {rate:g}): {tried}"


def _gain_that_tells(e: Evidence) -> float:
    """How much lower the loss of one short training must be than that of another: the fewer steps, the more."""
    return RATE_GAIN * e.entropy * math.sqrt(TRIAL_STEPS / max(e.measures.trial_steps, 1))


def _rates(recipe: Recipe, factor: float) -> dict[str, Any]:
    """All learning rates of a recipe times a factor."""
    rates = {
        f"optimizer.{kind}learning_rate": getattr(recipe.optimizer, f"{kind}learning_rate")
        for kind in ("", "head_", "bias_")
    }
    return {path: float(f"{rate * factor:.3g}") for path, rate in rates.items() if rate}


def _vanishing_gradients(e: Evidence) -> Finding | None:
    first, last = e.measures.layers[0], e.measures.layers[-1]
    if e.fitted or not 0 < first.gradient < VANISHED * last.gradient:
        return None
    return Finding(
        "vanishing-gradients",
        "gradients vanish on their way to the first layers, which learn nothing",
        f"norm of the gradient of {first.name} {first.gradient:.1e}, of {last.name} {last.gradient:.1e}; train accuracy"
        f" {e.measures.train_accuracy:.3f}",
        "batch normalisation, or fewer layers, or residual connections",
        _batch_norm_or_lower_rate(e.recipe),
    )


def _dead_units(e: Evidence) -> Finding | None:
    """Sparse is not dead: in healthy networks half of a dense layer's units are zero for all of a thousand images."""
    share, name = max(((layer.inactive or 0.0, layer.name) for layer in e.measures.layers), default=(0.0, ""))
    if e.fitted or share < DEAD:
        return None
    return Finding(
        "dead-units",
        "units have died: no image activates them, so no gradient reaches what is before them",
        f"{share:.0%} of the units of {name} are zero for all train images that were looked at; train accuracy"
        f" {e.measures.train_accuracy:.3f}",
        "batch normalisation, or a warm-up and a lower rate",
        _batch_norm_or_lower_rate(e.recipe),
    )


def _batch_norm_or_lower_rate(recipe: Recipe) -> dict[str, Any]:
    return _rates(recipe, 1 / 3) if recipe.network.batch_norm else {"network.batch_norm": True}


def _pooling_too_early(e: Evidence) -> Finding | None:
    sides, side, blocks = e.measures.map_sides, min(e.measures.image_shape[:2]), e.recipe.network.blocks()
    small = [s for s in sides if s <= SMALL_MAP * side]
    if len(sides) < 3 or 2 * len(small) < len(sides):
        return None
    pools = [block.pool for block in blocks]
    first = next((place for place, pool in enumerate(pools) if pool > 1), 0)
    remedy, milder = f"no pooling in block {first + 1}", [*pools[:first], 1, *pools[first + 1 :]]
    if max(pools) > 2:
        remedy, milder = "windows of 2 pixels", [min(pool, 2) for pool in pools]
    return Finding(
        "pooling-too-early",
        "maps are pooled to a few pixels before half of the convolutions have seen them",
        f"sides of the maps that the convolutions work on: {', '.join(map(str, sides))}; images of {side}",
        remedy,
        {"network.pool": milder},
    )


def _batch_too_small(e: Evidence) -> Finding | None:
    m, size = e.measures, e.recipe.batch_size
    if not e.recipe.network.batch_norm or size >= SMALL_BATCH or m.changed_by_batch_norm < CHANGED or e.fitted:
        return None
    return Finding(
        "batch-too-small",
        "batches are too small for batch normalisation: the network behaves differently when it is scored",
        f"normalised by batches of {size} as in training, {m.changed_by_batch_norm:.0%} of the same train images get"
        " another class than in evaluation",
        "batches of 64",
        {"batch_size": 64},
    )


def _augmentation_too_strong(e: Evidence) -> Finding | None:
    plain, augmented = e.measures.seen_accuracies
    augment = e.recipe.augment
    left = _share_left(e)
    unlike = augmented - plain >= HARDER
    if not unlike and plain - augmented < HARDER and (left > HIDDEN or e.fitted):
        return None
    milder: dict[str, Any] = {
        f"augment.{name}": getattr(augment, name) // 4 for name in ("translate", "cutout") if getattr(augment, name)
    }
    if augment.crop:
        milder["augment.crop"] = (augment.crop + min(e.measures.image_shape[:2])) // 2
    if augment.scales:
        milder["augment.scale_epochs"] = 0.0
    milder |= {f"augment.{name}": getattr(augment, name) / 4 for name in ("rotate", "colour") if getattr(augment, name)}
    mirrored_only = not milder and augment.flip != "none"
    return Finding(
        "augmentation-too-strong",
        "train images as augmented are unlike those that are scored"
        if unlike
        else "augmentation hides what the label says",
        f"accuracy on the same train images {plain:.3f} as they are, {augmented:.3f} as augmented"
        + (f"; {left:.0%} of an image is left on average" if left < 1 else ""),
        "no mirroring" if mirrored_only else "shift, crop, scale, turn, colour and cut out less",
        {"augment.flip": "none"} if mirrored_only else milder,
    )


def _mirrored_images(e: Evidence) -> Finding | None:
    """Where images do not show which way round they are, a mirror image is one more of its class; where they do (visual
    chirality, Lin et al., CVPR 2020), half of what is learned is of images that are never scored. It may still help: of
    something that always faces one way a class may have more to show."""
    if not mirrors_one_way_round(e) or few_are_wrong(e):
        return None
    return Finding(
        "mirrored-images",
        "half of the train images are mirrored, and mirror images can be told from those that are scored",
        f"a small network tells {e.measures.mirror_accuracy:.0%} of the validation images and their mirror images apart"
        " (by chance: 50%)",
        "no mirroring, unless what is to be recognised later may come either way round, or only the background gives"
        " it away",
        {"augment.flip": "none"},
    )


def mirrors_one_way_round(e: Evidence) -> bool:
    """Whether train images are mirrored that show which way round they are."""
    return e.recipe.augment.flip != "none" and _one_way_round(e)


def few_are_wrong(e: Evidence) -> bool:
    """Whether validation has too few mistakes for mirroring to be blamed."""
    return round((1 - e.last["val/accuracy"]) * e.measures.num_validation) < FEWEST_WRONG


def _one_way_round(e: Evidence) -> bool:
    """Whether images show which way round they are."""
    return e.measures.num_validation >= FEWEST_TOLD and (e.measures.mirror_accuracy or 0.0) >= TOLD_APART


def _share_left(e: Evidence) -> float:
    """The share of an image's pixels that a training still sees, on average over shifts, cutouts and crops."""
    augment, left, hidden = e.recipe.augment, 1.0, 1.0
    for size in e.measures.image_shape[:2]:
        left *= _mean(max(0, size - abs(by)) / size for by in range(-augment.translate, augment.translate + 1))
        seen = augment.crop or size
        left *= seen / size
        starts = [centre - augment.cutout // 2 for centre in range(seen)]  # what is cut out is cut out of the crop
        hidden *= _mean((min(start + augment.cutout, seen) - max(start, 0)) / seen for start in starts)
    return left * (1 - hidden)


def _label_noise(e: Evidence) -> Finding | None:
    """Images that the network was never shown, that it is sure of and wrong about, more often than it says itself: a
    clean set has few of them, unless the network has learned its train images one by one, when being sure says
    nothing."""
    wrong, count, confidence = e.measures.surest
    low, high = wilson_interval(wrong / count, count)
    if why_labels_cannot_be_judged(e):
        return None
    if low < WRONG or wrong / count < 1 - confidence + OVERSURE:
        return None
    return Finding(
        "label-noise",
        "some labels may be wrong, or classes overlap",
        f"of the {count:,} validation images that the network is surest of (probability {confidence:.2f}), {wrong:,}"
        f" have another label: {low:.0%} to {high:.0%} (95 %)",
        "look at the images that it is sure of and wrong about (fromzero report shows them, fromzero"
        " cross-validate lists those of train, too), and mend the labels",
    )


def share_of_wrong_labels_seen(e: Evidence) -> float:
    """Which share of wrong ones among the images that the network is surest of would be found four times out of five;
    1 where none would."""
    from scipy.stats import binom

    _, count, confidence = e.measures.surest
    least = count * (1 - confidence + OVERSURE)
    enough = (n for n in range(1, count + 1) if n >= least and wilson_interval(n / count, count)[0] >= WRONG)
    needed = next(enough, count + 1)
    shares = (percent / 100 for percent in range(1, 100) if binom.sf(needed - 1, count, percent / 100) >= POWER)
    return next(shares, 1.0)


def hardly_mistaken(e: Evidence) -> bool:
    """Whether validation has fewer mistakes than the share of wrong labels that counts as a problem."""
    return bool(1 - e.last["val/accuracy"] < WRONG)


def why_labels_cannot_be_judged(e: Evidence) -> str:
    """Why nothing follows from what the network is sure of and wrong about; empty where something does."""
    by_heart = "the network knows its train images by heart, and is as sure where a label is wrong"
    knows = e.measures.train_accuracy >= BY_HEART
    if e.measures.surest.of < FEWEST_SURE:
        too_few = f"that takes {10 * FEWEST_SURE} validation images, and it has {e.measures.num_validation}"
        return too_few + f"; and {by_heart}" * knows
    if knows:
        return by_heart
    if _has_large_gap(e):
        return "the gap between train and validation is too large"
    if e.measures.surest.confidence < SURE:
        return "the network is not sure enough of any image"
    return "the network still learns" if _still_learning(e) else ""


def _still_learning(e: Evidence) -> bool:
    """Whether the train accuracy rises. By the last epoch; at a constant rate that is noisy, while a rate that falls
    brings its gain late, and is done then: so there the last quarter of the epochs counts, too."""
    if len(e.rows) < 2 or e.last["train/accuracy"] - e.rows[-2]["train/accuracy"] > LAST_GAIN:
        return True
    return e.recipe.schedule.name == "constant" and late_gain(e.rows) > LATE_GAIN


def _unaltered(e: Evidence) -> bool:
    """Whether every epoch shows the same pixels, mirrored or not."""
    augment = e.recipe.augment
    return _share_left(e) == 1 and not (augment.cutmix or augment.scales or augment.rotate or augment.colour)


def large_gap(e: Evidence) -> tuple[float, float]:
    """From which gap between train and validation accuracy on it is overfitting by itself: of many validation images,
    and of as many as there are, beyond its error."""
    accuracy = e.last["val/accuracy"]
    error = math.sqrt(accuracy * (1 - accuracy) / e.measures.num_validation)
    large = UNALTERED_GAP if e.fitted and _unaltered(e) else LARGE_GAP
    return large, large + 2 * error


def _has_large_gap(e: Evidence) -> bool:
    return e.gap >= large_gap(e)[1]


def loss_rise(e: Evidence) -> tuple[float, float]:
    """By how much the validation loss has risen from its lowest while the train loss fell, and from how much on that
    is more than images, or an epoch, make it move."""
    lowest = min(e.rows, key=lambda row: row["val/loss"])
    rise = min(e.last["val/loss"], e.late_median(lambda row: row["val/loss"])) - lowest["val/loss"]
    fell = e.last["train/loss"] < lowest["train/loss"]
    return rise if fell else 0.0, max(2 * e.measures.loss_se, LOSS_RISE * lowest["val/loss"])


def _overfitting(e: Evidence) -> Finding | None:
    lowest = min(e.rows, key=lambda row: row["val/loss"])
    rise, enough = loss_rise(e)
    rises = rise > enough
    if not (rises and e.gap > SMALL_GAP) and not _has_large_gap(e):
        return None
    augment = e.recipe.augment
    shown = e.accuracies
    if _unaltered(e):
        shown += f"; every epoch shows the same pixels{', mirrored or not' if augment.flip != 'none' else ''}"
    if rises:
        shown += (
            f"; validation loss {lowest['val/loss']:.2f} after epoch {lowest['epoch']}, {e.last['val/loss']:.2f}"
            f" (standard error {e.measures.loss_se:.2f}) at the end, while the train loss fell"
        )
    network = e.recipe.network
    changes: dict[str, Any] = {}
    if not augment.translate:
        changes["augment.translate"] = max(1, min(e.measures.image_shape[:2]) // 8)
        remedy = f"train images shifted by up to {changes['augment.translate']} pixels"
        if augment.flip == "none" and not _one_way_round(e):
            remedy += "; mirrored, too, where a mirrored one is still what its label says (augment.flip)"
    elif _rates_of_dropout(e.recipe) and network.dropout_from_epoch >= e.last["epoch"]:
        changes["network.dropout_from_epoch"] = 0
        remedy = "dropout from the first epoch on"
    elif not any(block.dropout for block in network.blocks()) and not network.batch_norm:
        changes |= {"network.block_dropout": 0.2, "network.dropout_from_epoch": 0}
        remedy = "dropout from the first block on"
    elif augment.flip == "none" and not _one_way_round(e):
        changes["augment.flip"] = "random"
        remedy = "train images mirrored, where a mirrored one is still what its label says; or more images"
    else:
        seen = augment.crop or min(e.measures.image_shape[:2])
        smallest = round(seen * augment.scale) if augment.scales else seen
        changes["augment.cutout"] = max(augment.cutout, min(seen // 4, smallest))
        remedy = "more images; or a square cut out of each"
        if changes["augment.cutout"] == augment.cutout:
            changes, remedy = {}, "more images"
    return Finding("overfitting", "the network learns its train images by heart", shown, remedy, changes)


def _no_rate_works(e: Evidence) -> bool:
    """Whether rates were tried and none came to anything: then nothing says what the network could learn."""
    return bool(e.measures.trials) and not e.measures.rates_tell


def _stopped_early(e: Evidence) -> Finding | None:
    fit = e.measures.fit_accuracy
    if e.fitted or e.gap >= SMALL_GAP or fit is None or fit < FITS or _no_rate_works(e):
        return None
    more, remedy = 2 * e.recipe.epochs, "twice the epochs"
    if (usual := usual_epochs(e.recipe)) > more:
        more, remedy = usual, f"the {usual} epochs that {e.recipe.name} has"
    ended = e.last["epoch"] >= e.recipe.epochs
    return Finding(
        "stopped-early",
        "training ended before the network had learned its train images"
        if ended
        else "the network has not learned its train images yet",
        f"{e.accuracies}; it can learn them: {fit:.2f} of a hundred, by steps on nothing else",
        remedy if ended else "the epochs that are left: fromzero resume",
        {"epochs": more} if ended else {},
    )


def _underfitting(e: Evidence) -> Finding | None:
    fit = e.measures.fit_accuracy
    if e.fitted or e.gap >= SMALL_GAP or fit is None or fit >= FITS or _no_rate_works(e):
        return None
    channels = [[2 * count for count in block] for block in e.recipe.network.channels]
    return Finding(
        "underfitting",
        "the network is too small for its train images, or learns them too slowly",
        f"{e.accuracies}; of a hundred train images it learns {fit:.2f} by steps on nothing else",
        "twice the channels",
        {"network.channels": channels},
    )


def _rate_never_falls(e: Evidence) -> Finding | None:
    """Steps at a high rate keep a network from settling: what a few at a falling one bring was there to be had. They
    must beat the mean of two scores at the rate held, as a single one is noisy where the rate is high, and the better
    of the two, as the network may still learn; and lower no loss at the cost of accuracy."""
    cooldown = e.measures.cooldown
    if cooldown is None:
        return None
    steps, before, halfway, held, falling, loss_se, accuracy_se = cooldown
    others = (before, halfway, held)
    mean_loss = (halfway.loss + held.loss) / 2
    beyond_accuracy = falling.accuracy - max(other.accuracy for other in others)
    lower = mean_loss - falling.loss > max(2 * loss_se, COOLED * mean_loss)
    lower = lower and min(other.loss for other in others) - falling.loss > loss_se
    if not (lower and beyond_accuracy > -2 * accuracy_se) and not beyond_accuracy > 2 * accuracy_se:
        return None
    return Finding(
        "rate-never-falls",
        "the learning rate never falls, so the last steps still throw the weights about",
        f"with {steps} more steps over which it falls to zero, validation loss {falling.loss:.2f}, accuracy"
        f" {falling.accuracy:.3f}; with the same steps at {e.recipe.optimizer.learning_rate:g} {held.loss:.2f},"
        f" {held.accuracy:.3f} ({halfway.loss:.2f}, {halfway.accuracy:.3f} after half of them); before them"
        f" {before.loss:.2f}, {before.accuracy:.3f}",
        "a rate that falls to zero over the last fifth of the steps",
        {"schedule.name": "cooldown"},
    )


def _validation_too_small(e: Evidence) -> Finding | None:
    count, accuracy = e.measures.num_validation, e.last["val/accuracy"]
    if _is_narrow(accuracy, count):
        return None
    low, high = wilson_interval(accuracy, count)
    enough, images = _enough_to_tell(accuracy), count + sum(e.measures.train_counts)
    remedy = "fromzero cross-validate, which judges all train images"
    if enough <= MOST_HELD_OUT * images:  # else training would miss them
        remedy += f"; or about {enough:,} validation images (a larger --validation.fraction where some are held out)"
    return Finding(
        "validation-too-small",
        "validation has too few images to tell better from worse",
        f"{count:,} images: an accuracy of {accuracy:.3f} may be {low:.3f} to {high:.3f} (95 %)",
        remedy,
    )


def _enough_to_tell(accuracy: float) -> int:
    """The images of which an accuracy has an interval that is not too wide."""
    return next(count for count in range(1, 1000) if _is_narrow(accuracy, count))


def _is_narrow(accuracy: float, count: int) -> bool:
    low, high = wilson_interval(accuracy, count)
    return high - low < 2 * WIDE


def hidden_by_few(e: Evidence) -> list[str]:
    """Which problems few validation images may hide: those that go by them, but for what other figures rule out."""
    ruled_out = {
        "imbalance": not _are_uneven(e.measures.train_counts),
        "stopped-early": e.fitted,
        "rate-never-falls": e.recipe.schedule.name != "constant",
    }
    return [name for name in ON_VALIDATION if not ruled_out.get(name)]


def untried(evidence: Evidence) -> list[str]:
    """The rules that go by steps which the run gave reason to try and which could not be made or came to nothing: it
    has too few steps or validation images, or too small ones, began with other weights, was still in its warm-up, its
    steps overflow, or no rate that was tried moves its loss."""
    m, names = evidence.measures, []
    if not evidence.fitted and not m.rates_tell:
        names += ["rate-too-high", "rate-too-low"]
    if not evidence.fitted and evidence.gap < SMALL_GAP and (m.fit_accuracy is None or _no_rate_works(evidence)):
        names += ["stopped-early", "underfitting"]
    if evidence.recipe.schedule.name == "constant" and m.cooldown is None:
        names += ["rate-never-falls"]
    if evidence.recipe.augment.flip != "none" and (m.mirror_accuracy is None or m.num_validation < FEWEST_TOLD):
        names += ["mirrored-images"]
    return names


RULES: dict[str, Callable[[Evidence], Finding | None]] = {
    "copies": _copies,
    "imbalance": _imbalance,
    "decay-too-strong": _decay_too_strong,
    "dropout-too-strong": _dropout_too_strong,
    "rate-too-high": lambda e: _collapse(e) or _other_rate(e, "high"),
    "rate-too-low": lambda e: _other_rate(e, "low"),
    "vanishing-gradients": _vanishing_gradients,
    "dead-units": _dead_units,
    "pooling-too-early": _pooling_too_early,
    "batch-too-small": _batch_too_small,
    "augmentation-too-strong": _augmentation_too_strong,
    "mirrored-images": _mirrored_images,
    "label-noise": _label_noise,
    "overfitting": _overfitting,
    "stopped-early": _stopped_early,
    "underfitting": _underfitting,
    "rate-never-falls": _rate_never_falls,
    "validation-too-small": _validation_too_small,
}
# What goes by validation images, of which few may hide it.
ON_VALIDATION = ("imbalance", "label-noise", "overfitting", "stopped-early", "rate-never-falls")
# What a finding is the likely cause of. Only a network that has learned can say that a label is wrong.
_UNLEARNED = ("label-noise", "stopped-early", "underfitting")
_STUCK = ("vanishing-gradients", "dead-units", *_UNLEARNED)
EXPLAINS: dict[str, tuple[str, ...]] = {
    "decay-too-strong": ("dropout-too-strong", "rate-too-high", "rate-too-low", *_STUCK),
    "dropout-too-strong": ("rate-too-high", "rate-too-low", *_STUCK),
    "rate-too-high": _STUCK,
    "rate-too-low": _STUCK,
    "vanishing-gradients": ("dead-units", *_UNLEARNED),
    "dead-units": _UNLEARNED,
    "pooling-too-early": _UNLEARNED,
    "batch-too-small": _UNLEARNED,
    "augmentation-too-strong": ("mirrored-images", *_UNLEARNED),
    "label-noise": ("stopped-early", "underfitting"),
}


def _mean(values: Iterable[float | None]) -> float:
    """Of those that are known; NaN of none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _halved(rates: float | tuple[float, ...]) -> Any:
    return [rate / 2 for rate in rates] if isinstance(rates, tuple) else rates / 2
