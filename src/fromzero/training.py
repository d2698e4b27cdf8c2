"""The training loop.

A training is a state and the page of code that moves it on. Every step is a pure function of the state, the recipe
and the images: order of examples, dropout masks and learning rate are functions of (seed, step), and which easy images
an epoch skips is part of the state, so a training that was stopped anywhere and taken up again ends in the same bits.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fromzero import augment, checkpoint, kernels
from fromzero.checkpoint import Checkpoint
from fromzero.data import Images, ImageSet, stratified_split
from fromzero.errors import FromzeroError, InputError, NonFiniteError, StoppedError
from fromzero.evaluate import Normalise, Outcomes, evaluate
from fromzero.machine import Machine, peak_memory_bytes
from fromzero.networks import layers, num_parameters
from fromzero.optim import learning_rate_at, set_learning_rate
from fromzero.recipe import Recipe
from fromzero.rng import permutation
from fromzero.runs import Row, Run
from fromzero.signals import StopSignals
from fromzero.state import Counters, State
from fromzero.timetable import Timetable

# By default a checkpoint is due after as long as was trained before it, from ten seconds to a minute, or later where
# saving is slow: then it takes this share of the time.
FIRST_SAVE_SECONDS, SAVE_SECONDS, SAVE_SHARE = 10.0, 60.0, 0.025
PROXY_EVERY = 4  # as airbench96 does: losses only rank images, and change slowly
LARGEST_GRADIENT = 1e18  # the square of ten times as much overflows a float


class Subset(NamedTuple):
    """Pixels uint8 (N, H, W, C) and labels int64 (N,) on the device."""

    pixels: Tensor
    labels: Tensor

    def take(self, indices: np.ndarray) -> Subset:
        """The images at `indices`, in that order (a copy, made by all threads)."""
        places = torch.from_numpy(indices)
        return Subset(self.pixels.index_select(0, places), self.labels[places])

    @classmethod
    def of(cls, images: Images) -> Subset:
        """The same memory as tensors."""
        return cls(torch.from_numpy(images.pixels), torch.from_numpy(images.labels))

    def to(self, device: str) -> Subset:
        return Subset(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """What a training reads: the images it learns from, a fixed part of them for the clean train accuracy, the
    validation images, and the test images, which are scored once."""

    train: Subset
    clean_train: Subset
    validation: Subset
    test: Subset
    normalise: Normalise

    @classmethod
    def of(cls, recipe: Recipe, images: ImageSet, device: str, *, copies_apart: bool = False) -> Data:
        """Split as the recipe says. The splits depend on the images alone, not on the seed. `copies_apart` is how runs
        were split that do not say that copies are together. Raises InputError where nothing can be held out."""
        train, test = Subset.of(images.train), Subset.of(images.test)
        validation = test
        if recipe.validation.source == "split" and images.validation is not None:
            validation = Subset.of(images.validation)
        elif recipe.validation.source == "split":
            # Only files of one's own are looked through: CIFAR-10 and the digits have no copies.
            copies = images.train.first_copies() if images.train.files and not copies_apart else None
            kept, held = stratified_split(images.train.labels, recipe.validation.fraction, "validation", copies)
            if not len(held):
                raise InputError(
                    f"{images.source}: each class has copies of one picture only; none is left for validation"
                )
            train, validation = train.take(kept), train.take(held)
        clean = train
        if recipe.clean_train_images < len(train.labels):
            share = recipe.clean_train_images / len(train.labels)
            some = stratified_split(train.labels.numpy(), share, "clean train")[1]
            clean = train.take(some) if len(some) else train  # no class can spare one
        train, clean, validation, test = (part.to(device) for part in (train, clean, validation, test))
        return cls(train, clean, validation, test, Normalise.of(recipe, train.pixels))


class Progress(NamedTuple):
    """Where a training stands after a step, or, with a row of metrics, after the evaluation of an epoch. The last row
    comes again, `ended`, when the summary is written and only the curves are still to be drawn."""

    counters: Counters
    epochs: int
    timetable: Timetable
    row: Row | None = None
    ended: bool = False


@dataclass
class Training:
    """A run that is being trained. Iterate over it to train: it yields a Progress after every step and every epoch,
    writes the run folder as it goes, and ends with summary.json and curves.png there.

    Raises StoppedError when stopped by Ctrl-C or SIGTERM (saved first), NonFiniteError when a value overflows.
    """

    run: Run
    recipe: Recipe
    images: ImageSet
    machine: Machine
    state: State
    data: Data
    checkpoint_minutes: float | None = None
    keep: int = 2
    lock: ExitStack = field(default_factory=ExitStack)

    def take_lock(self) -> None:
        """Become the run's one writer until the training ends or is closed."""
        self.lock.enter_context(self.run.lock())

    def close(self) -> None:
        """Let go of the run without training on."""
        self.lock.close()

    def __post_init__(self) -> None:
        self.timetable = Timetable.of(self.recipe, len(self.data.train.labels))
        if self.recipe.skip_easy:
            self.state.watch_losses(len(self.data.train.labels), self.machine.device)
        if self.recipe.compile and self.machine.device != "cpu":
            self.state.compile_network()
        self._began_at = self._saved_at = self._ticked_at = time.monotonic()
        self._save_seconds = 0.0  # of the last save here; what saves took before a resume says little of this disk

    def __iter__(self) -> Iterator[Progress]:
        recipe, counters = self.recipe, self.state.counters
        with self.lock, StopSignals() as stop, self._saving_what_an_overflow_leaves(), self._naming_the_compiler():
            self.machine.set_up()
            self._began_at = self._saved_at = self._ticked_at = time.monotonic()
            while counters.epoch < recipe.epochs:
                order = self._order()
                while counters.step < self.timetable.start_of(counters.epoch + 1):
                    start = (counters.step - self.timetable.start_of(counters.epoch)) * recipe.batch_size
                    self._step(order[start : start + recipe.batch_size])
                    self._tick()
                    yield Progress(counters, recipe.epochs, self.timetable)
                    self._save_if_due(stop.signal)
                row = self._measure(lambda: self._save_if_due(stop.signal))
                self._end_epoch(row)
                yield Progress(counters, recipe.epochs, self.timetable, row)
                self._save_if_due(stop.signal)
            self.save()
            self._finish()
            yield Progress(counters, recipe.epochs, self.timetable, self.run.metrics()[-1], ended=True)
            self._draw()

    def _order(self) -> Tensor:
        """The images of the epoch under way, int64 (N,), in the order in which it sees them."""
        counters = self.state.counters
        ranks = permutation(len(self.data.train.labels), self.recipe.seed, "order", counters.epoch)
        order = torch.from_numpy(ranks).to(self.machine.device)
        return order if self.state.skipped is None else order[~self.state.skipped[order]]

    def _step(self, indices: Tensor) -> None:
        """One optimizer step on the images at `indices`."""
        counters = self.state.counters
        rate = learning_rate_at(self.recipe, counters.step, self.timetable)
        progress = self.timetable.epochs_after(counters.step)
        batch = batch_at(self.data, indices, self.recipe, counters.epoch, counters.step, progress)
        images = self.timetable.later_images if counters.epoch else self.timetable.images
        batch = batch._replace(share=len(indices) / min(self.recipe.batch_size, images))
        if self.state.proxy is not None:
            self.state.proxy.counters.step = counters.step
            chosen = hardest(self.state.proxy, batch, rate, self.recipe, progress, self.machine)
            batch, indices = batch.take(chosen), indices[chosen]
        batch = mixed(batch, self.images.num_classes, self.recipe, counters.step)
        made = train_step(self.state, batch, rate, self.recipe, progress, self.machine)
        if self.state.losses is not None:
            self.state.losses[indices] = F.cross_entropy(made.logits, batch.labels, reduction="none")
        counters.step += 1
        self.state.update_average(self.recipe.ema_decay)
        counters.running_loss += made.loss * len(indices)
        counters.running_correct += made.correct
        counters.running_images += len(indices)

    def _measure(self, between: Callable[[], None]) -> Row:
        """The row of the epoch that has just been trained: the three accuracies, never confused, and their losses."""
        counters = self.state.counters
        outcomes = {
            split: self._evaluated(what, subset, between)
            for split, what, subset in (
                ("train", "train", self.data.clean_train),
                ("val", "validation", self.data.validation),
            )
        }
        self._tick()
        row: Row = {
            "epoch": counters.epoch + 1,
            "step": counters.step,
            "learning_rate": learning_rate_at(self.recipe, counters.step - 1, self.timetable),
            "train/running_loss": counters.running_loss / counters.running_images,
            "train/running_accuracy": counters.running_correct / counters.running_images,
        }
        for split, outcome in outcomes.items():
            row |= {f"{split}/loss": outcome.loss, f"{split}/accuracy": outcome.accuracy}
        return row | {"time/seconds": round(counters.seconds, 3)}

    def _evaluated(self, what: str, subset: Subset, between: Callable[[], None] = lambda: None) -> Outcomes:
        """Outcomes on a subset. Raises NonFiniteError."""
        try:
            return evaluate(self.state.scored, *subset, self.data.normalise, self.machine, between)
        except NonFiniteError as error:
            step = self.state.counters.step
            rate = learning_rate_at(self.recipe, step - 1, self.timetable)
            instead = _try_instead(rate, self.machine)
            raise NonFiniteError(f"after step {step}, on the {what} images, {error}; {instead}") from None

    def _end_epoch(self, row: Row) -> None:
        counters = self.state.counters
        self.run.append_metrics(row)
        counters.epoch += 1
        counters.running_loss, counters.running_correct, counters.running_images = 0.0, 0, 0
        if self.state.losses is not None:
            self.state.skip_easiest(self.timetable.images - self.timetable.later_images)
        if row["val/accuracy"] > counters.best_accuracy:
            counters.best_accuracy, counters.best_epoch = row["val/accuracy"], counters.epoch
            self.state.best_weights = {k: t.clone() for k, t in self.state.scored.state_dict().items()}

    def _save_if_due(self, stopped_by: int | None) -> None:
        """Save when asked to stop (then raise StoppedError), or when a checkpoint is due: after `checkpoint_minutes`,
        by default after ten seconds, and then after as long again, up to a minute or so."""
        if stopped_by is not None:
            self.save()
            self._draw()
            raise StoppedError(
                f"stopped and saved at step {self.state.counters.step}; go on with: {self.run.resume_command}",
                stopped_by,
            )
        if self.checkpoint_minutes is None:
            usual = min(max(self._saved_at - self._began_at, FIRST_SAVE_SECONDS), SAVE_SECONDS)
            due = max(usual, self._save_seconds / SAVE_SHARE)
        else:
            due = self.checkpoint_minutes * 60
        if time.monotonic() - self._saved_at >= due:
            self.save()

    @contextmanager
    def _saving_what_an_overflow_leaves(self) -> Iterator[None]:
        """When a value overflows, what the run has reached stays: its best weights and its curves."""
        try:
            yield
        except NonFiniteError:
            with suppress(OSError):  # that it overflowed says more
                self._save_best()
            self._draw()
            raise

    @contextmanager
    def _naming_the_compiler(self) -> Iterator[None]:
        """Where torch.compile fails, say so and what to do; a traceback of its own names neither."""
        try:
            yield
        except Exception as error:
            if self.state.compiled is None or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            why = " ".join(str(error).split("\n")[:2])
            raise FromzeroError(
                f"{self.run.path}: torch.compile failed ({why}); the run is at step {self.state.counters.step}, begin"
                " it again with --compile false"
            ) from None

    def save(self) -> None:
        """Write the state to the run's checkpoints; the best weights go first, so that `last` never outruns them."""
        started = time.monotonic()
        try:
            if self.run.path.is_dir():
                self.run.checkpoints.mkdir(exist_ok=True)  # somebody may have removed it, who still wants the run
            self._save_best()
            checkpoint.save(self.run.checkpoints, self.state.to_checkpoint(), self.keep)
        except OSError as error:
            raise FromzeroError(
                f"{self.run.checkpoints}: saving failed: {error.strerror}; {self.run.saved_before}"
            ) from None
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - started
        self.state.counters.saving_seconds += self._save_seconds

    def _save_best(self) -> None:
        """Write the best weights, unless they have been written. Raises OSError."""
        if self.state.best_weights is not None:
            tensors = {f"model/{name}": tensor for name, tensor in self.state.best_weights.items()}
            counters = self.state.counters
            best = {"epoch": counters.best_epoch, "val/accuracy": counters.best_accuracy}
            checkpoint.save_best(self.run.checkpoints, Checkpoint(tensors, best))
            self.state.best_weights = None

    def _finish(self) -> None:
        """Score the test images, once, and write the summary, which says that the run has ended."""
        counters, last = self.state.counters, self.run.metrics()[-1]
        if self.recipe.validation.source == "test":  # they have just been scored
            accuracy, loss = last["val/accuracy"], last["val/loss"]
        else:
            test = self._evaluated("test", self.data.test)
            accuracy, loss = test.accuracy, test.loss
        self._tick()
        self.run.write_summary(
            {
                "run": self.run.name,
                "recipe": self.recipe.name,
                "dataset": self.images.name,
                "seed": self.recipe.seed,
                "parameters": num_parameters(self.recipe.network, self.images.image_shape, self.images.num_classes),
                **{key: value for key, value in last.items() if not key.startswith("time/")},
                "val/source": self.recipe.validation.source,
                "best/epoch": counters.best_epoch,
                "best/val/accuracy": counters.best_accuracy,
                "test/accuracy": accuracy,
                "test/loss": loss,
                "time/seconds": round(counters.seconds, 3),
                "time/saving_seconds": round(counters.saving_seconds, 3),
                "time/images_per_second": round(
                    self.timetable.images_after(counters.step) / max(counters.seconds, 1e-9), 1
                ),
                "memory/peak_bytes": peak_memory_bytes(),
            }
        )

    def _draw(self) -> None:
        from fromzero.curves import draw_curves, validation_label

        try:
            if rows := self.run.metrics():
                validation = validation_label(self.recipe, own=self.images.validation is not None)
                draw_curves(rows, self.recipe, self.run.name, validation, self.run.path / "curves.png")
        except Exception as error:  # a picture is never worth a run
            warnings.warn(f"{self.run.path}/curves.png was not drawn: {error}", stacklevel=2)

    def _tick(self) -> None:
        now = time.monotonic()
        self.state.counters.seconds += now - self._ticked_at
        self._ticked_at = now


class Batch(NamedTuple):
    """What a step is made of: normalised images (B, C, H, W); labels int64 (B,), of mixed images those of the larger
    part; `share`, its size over that of a full batch, below 1 for an epoch's last one; of mixed images the share of
    each class in them, float32 (B, classes)."""

    images: Tensor
    labels: Tensor
    share: float = 1.0
    targets: Tensor | None = None

    def take(self, places: Tensor) -> Batch:
        """The images at `places`, in that order; as a batch it counts as before."""
        targets = None if self.targets is None else self.targets[places]
        return Batch(self.images[places], self.labels[places], self.share, targets)

    def loss(self, logits: Tensor, label_smoothing: float) -> Tensor:
        """The mean cross-entropy (nats) of logits (B, classes)."""
        targets = self.labels if self.targets is None else self.targets
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def batch_at(data: Data, indices: Tensor, recipe: Recipe, epoch: int, step: int, progress: float) -> Batch:
    """The train images at `indices` as a step sees them. progress: epochs done so far, fractions included."""
    augmentation, seed = recipe.augment, recipe.seed
    pixels = augment.gather(data.train.pixels, indices, augmentation, seed, epoch, step)
    if progress < augmentation.scale_epochs:
        pixels = augment.scaled(pixels, augmentation.scale)
    images = augment.cut_out(data.normalise(pixels), augmentation, seed, step)
    return Batch(images, data.train.labels[indices])


def mixed(batch: Batch, num_classes: int, recipe: Recipe, step: int) -> Batch:
    """The batch with its images mixed, where the recipe mixes them. Which are the hardest is asked before: a mixed
    image is harder than those that it is made of, whatever they are."""
    if not recipe.augment.cutmix:
        return batch
    images, own = augment.cut_mix(batch.images, recipe.augment, recipe.seed, step)
    others = batch.labels.roll(1)
    one, other = (F.one_hot(labels, num_classes) for labels in (batch.labels, others))
    targets = own[:, None] * one + (1 - own)[:, None] * other
    return batch._replace(images=images, labels=torch.where(own < 0.5, others, batch.labels), targets=targets)


class Step(NamedTuple):
    """What a step saw before it moved the weights: the batch's mean loss (nats), how many of its images were predicted
    right, and its logits, float32 (B, classes)."""

    loss: float
    correct: int
    logits: Tensor


def train_step(
    state: State, batch: Batch, learning_rate: float, recipe: Recipe, progress: float, machine: Machine
) -> Step:
    """Move the weights by one step on `batch`.

    progress: epochs done so far, fractions included. Raises NonFiniteError, the weights untouched, when the loss or a
    gradient is infinite or NaN, or a gradient beyond ± LARGEST_GRADIENT.
    """
    model, step = state.model, state.counters.step
    if not model.training:
        model.train()
    model.reseed(recipe.seed, step, dropout=progress >= recipe.network.dropout_from_epoch)
    model.weigh_batch(batch.share)
    with machine.autocast():
        logits = (state.compiled or model)(batch.images)
    logits = logits.float()
    loss = batch.loss(logits, recipe.label_smoothing)
    correct = (logits.argmax(1) == batch.labels).sum()
    loss.backward()
    # Read together, and when all is under way: on a GPU whoever reads waits for it, and it for what comes after.
    mean_loss, num_correct = torch.stack([loss.detach().double(), correct.double()]).tolist()
    wrong = "" if math.isfinite(mean_loss) else f"the loss is {mean_loss}"
    if not wrong and not kernels.within(state.optimizer.gradients(), LARGEST_GRADIENT):
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        name = next(name for name, gradient in gradients.items() if not kernels.within([gradient], LARGEST_GRADIENT))
        wrong = f"the gradient of {name} is not finite or beyond {LARGEST_GRADIENT:g}"
    if wrong:
        state.optimizer.zero_grad()
        instead = _try_instead(learning_rate, machine)
        raise NonFiniteError(
            f"step {step + 1}: {wrong}; the weights were not changed, checkpoints are whole: {instead}"
        )
    set_learning_rate(state.optimizer, learning_rate)
    with machine.autocast():
        state.optimizer.step()
    state.optimizer.zero_grad()
    return Step(mean_loss, int(num_correct), logits.detach())


def hardest(
    proxy: State, batch: Batch, learning_rate: float, recipe: Recipe, progress: float, machine: Machine
) -> Tensor:
    """Where in `batch` the recipe's share of it is whose loss is highest for the proxy, one image at least: int64 (N,),
    ascending. The proxy is itself trained on those every PROXY_EVERY steps. Raises what `train_step` raises."""
    proxy.model.train()
    proxy.model.reseed(recipe.seed, proxy.counters.step, dropout=False)
    proxy.model.weigh_batch(batch.share)
    with torch.no_grad(), machine.autocast():
        logits = proxy.model(batch.images)
    losses = F.cross_entropy(logits.float(), batch.labels, label_smoothing=recipe.label_smoothing, reduction="none")
    count = max(1, round(recipe.hardest * len(batch.labels)))
    chosen = losses.argsort(descending=True, stable=True)[:count].sort().values
    if proxy.counters.step % PROXY_EVERY == 0:
        train_step(proxy, batch.take(chosen), learning_rate, recipe, progress, machine)
    return chosen


def _try_instead(learning_rate: float, machine: Machine) -> str:
    precise = "" if machine.precision == "float32" else ", or --precision float32"
    return f"try a lower --optimizer.learning_rate (it was {learning_rate:g}), or a warm-up{precise}"


def check_image_set(recipe: Recipe, images: ImageSet) -> None:
    """Refuse what cannot be trained on. Raises InputError."""
    own = [("validation", images.validation)] if images.validation is not None else []
    for split, part in (("train", images.train), ("test", images.test), *own):
        if len(part) < 2:
            raise InputError(f"{images.source}: only {len(part)} {split} images")
        if part.labels.min() < 0 or part.labels.max() >= images.num_classes:
            raise InputError(f"{images.source}: {split} labels are not all from 0 to {images.num_classes - 1}")
    height, width = images.image_shape[:2]
    for change in ("crop", "translate"):
        if (pixels := getattr(recipe.augment, change)) > min(height, width):
            raise InputError(f"augment.{change}: {pixels} is more than the {height}×{width} images have")
    smallest = augment.smallest_size(recipe.augment, height, width)
    if recipe.augment.cutout > min(smallest):
        as_what = "" if smallest == (height, width) else ", as they are cropped and scaled,"
        size = f"{smallest[0]}×{smallest[1]}"
        raise InputError(f"augment.cutout: {recipe.augment.cutout} is more than the {size} images{as_what} have")
    proxies = [recipe.proxy_network()] if recipe.hardest < 1 else []
    try:
        for network in (recipe.network, *proxies):
            layers(network, (*smallest, images.image_shape[2]), images.num_classes)
    except InputError as error:
        if smallest == (height, width):
            raise
        sizes = f"{height}×{width} images are trained on as {smallest[0]}×{smallest[1]}"
        raise InputError(f"{error}; {sizes}: see augment.scale and augment.crop") from None
    if recipe.validation.source == "split" and images.validation is None:
        present, counts = torch.from_numpy(images.train.labels).unique(return_counts=True)
        if (counts < 2).any():
            name = images.class_names[int(present[counts < 2][0])]
            raise InputError(
                f"{images.source}: class {name!r} has one train image left, too few to hold some out: add images of it"
            )
