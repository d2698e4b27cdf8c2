"""What a diagnosis rests on: the recipe, the rows of metrics, and what `probe` measured of a run. Plain data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fromzero.recipe import Recipe
from fromzero.runs import Row

FITTED = 0.9  # clean train accuracy from which a network counts as having learned what it was shown
SMALL_GAP = 0.08  # between train and validation accuracy
TRIAL_STEPS = 100  # of a short training at another rate, at most
UNMOVED = 1e-4  # of a loss, by which trials at other rates do not differ


class LayerMeasures(NamedTuple):
    """Of a layer with weights: norms of the gradient of the mean loss by them, and of them; the share of its units that
    no image activates, None where no ReLU follows."""

    name: str
    gradient: float
    weight: float
    inactive: float | None


class Copy(NamedTuple):
    """A file of the split `validation` or `test` whose picture a train file has too: to the byte, or nearly."""

    split: str
    file: str
    train_file: str
    exact: bool


class Copied(NamedTuple):
    """How many of `of` images are train images too: `exact` to the byte, `near` those included that look alike."""

    exact: int
    near: int
    of: int


class Copies(NamedTuple):
    """Which images of the splits `validation` and `test` are train images too; by_looks: whether looks tell copies, as
    they do not where images of other classes look as alike; found: all of them, where images are files."""

    splits: Mapping[str, Copied]
    by_looks: bool = True
    found: tuple[Copy, ...] = ()


class Surest(NamedTuple):
    """The `of` validation images whose likeliest class has the highest probabilities: `wrong` of them are labelled
    otherwise; `confidence` is the mean of those probabilities."""

    wrong: int
    of: int
    confidence: float


class Trial(NamedTuple):
    """Train loss at the end of a short training, infinite where it overflowed, and the standard error of its difference
    to that at the run's own rate."""

    loss: float
    standard_error: float


class Score(NamedTuple):
    """Mean loss and accuracy on the validation images."""

    loss: float
    accuracy: float


class Cooldown(NamedTuple):
    """Scores on the validation images after `steps` more steps from the run's last weights, made twice: with the rate
    held as it was (scored halfway, too), and with a rate that falls to zero. `before`: of the last weights themselves.
    The errors are standard errors over images, of `falling` minus the mean of `halfway` and `held`."""

    steps: int
    before: Score
    halfway: Score
    held: Score
    falling: Score
    loss_se: float
    accuracy_se: float


@dataclass(frozen=True)
class Measures:
    """What `probe` measured of a run. Losses in nats. recalls: accuracy by class on the validation images, None
    without any; train_counts, validation_counts: images by class; loss_se: standard error of the validation
    loss; plain_loss, dropout_loss: of the same train images, without and with dropout; changed_by_batch_norm: share
    of train images that get another class when batches of the recipe's size are normalised by themselves;
    seen_accuracies: on the same train images as they are and as augmented; map_sides: of the map that each
    convolution works on, in pixels. Where the run gave a reason to try, else empty and None: trials: factor on the
    learning rate → what the same `trial_steps` from the start came to; without_decay: what they came to at the run's
    rate without its weight decay; fit_accuracy: on a few images, after steps on nothing else; cooldown: where the
    rate is constant, what a falling one would have brought at the end. mirror_accuracy: the share of validation
    images and of their mirror images that a small network tells apart after a few steps on train images and theirs,
    None where they are too small."""

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    train_counts: tuple[int, ...]
    validation_counts: tuple[int, ...]
    recalls: tuple[float | None, ...]
    loss_se: float
    surest: Surest
    copies: Copies
    plain_loss: float
    dropout_loss: float
    changed_by_batch_norm: float
    train_accuracy: float
    seen_accuracies: tuple[float, float]
    layers: tuple[LayerMeasures, ...]
    map_sides: tuple[int, ...]
    trials: Mapping[float, Trial] = field(default_factory=dict)
    trial_steps: int = TRIAL_STEPS
    without_decay: Trial | None = None
    fit_accuracy: float | None = None
    cooldown: Cooldown | None = None
    mirror_accuracy: float | None = None

    @property
    def num_validation(self) -> int:
        """How many validation images there are."""
        return sum(self.validation_counts)

    @property
    def rates_tell(self) -> bool:
        """Whether the short trainings at other rates came to anything: not where all overflow, nor where none moves the
        loss, as no rate among them is then near one that works."""
        losses = [trial.loss for trial in self.trials.values()]
        finite = [loss for loss in losses if math.isfinite(loss)]
        return bool(finite) and max(losses) - min(finite) > UNMOVED * min(finite)


@dataclass(frozen=True)
class Evidence:
    """All that a rule may look at: the recipe, a row an epoch, one at least, and the measures."""

    recipe: Recipe
    rows: Sequence[Row]
    measures: Measures

    @property
    def last(self) -> Row:
        return self.rows[-1]

    @property
    def entropy(self) -> float:
        """The loss, in nats, of predicting the class frequencies of the train images, whatever an image shows."""
        total = sum(self.measures.train_counts)
        return -sum(n / total * math.log(n / total) for n in self.measures.train_counts if n)

    @property
    def fitted(self) -> bool:
        return self.measures.train_accuracy >= FITTED

    @property
    def gap(self) -> float:
        """Between clean train accuracy and validation accuracy, this with classes as frequent as they are in train:
        what another mix of classes costs is no overfitting. One epoch that fell out of line decides nothing: the median
        of the last three, where that is less."""
        counts, recalls = self.measures.train_counts, self.measures.recalls
        known = [(count, recall) for count, recall in zip(counts, recalls, strict=True) if recall is not None]
        in_all = sum(count for count, _ in known)
        as_train = sum(count * recall for count, recall in known) / in_all if in_all else self.last["val/accuracy"]
        usual = self.late_median(lambda row: row["train/accuracy"] - row["val/accuracy"])
        return float(min(self.last["train/accuracy"] - as_train, usual))

    def late_median(self, figure: Callable[[Row], float]) -> float:
        """The median of a figure over the last three epochs; of two, the higher."""
        return statistics.median_high(map(figure, self.rows[-3:]))

    @property
    def accuracies(self) -> str:
        row = self.last
        return f"accuracy {row['train/accuracy']:.3f} on train images, {row['val/accuracy']:.3f} on validation images"


def late_gain(rows: Sequence[Row]) -> float:
    """What the last quarter of the epochs, one at least, brought in train accuracy."""
    train = [row["train/accuracy"] for row in rows]
    return float(train[-1] - train[-1 - min(max(len(train) // 4, 1), len(train) - 1)])


def best_factor(trials: Mapping[float, Trial]) -> float:
    """The factor on the learning rate with the lowest loss, of equal ones that nearest to one."""
    return min(trials, key=lambda factor: (trials[factor].loss, abs(math.log(factor))))
