"""The training loop.

A training is a state and the page of code that moves it on. Every step is a pure function of the state, the recipe
and the images: order of examples, dropout masks and learning rate are functions of (seed, step), and which easy images
an epoch skips is part of the state, so a training that was stopped anywhere and taken up again ends in the same bits.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fromzero import checkpoint
from fromzero.checkpoint import Checkpoint
from fromzero.data import ImageSet
from fromzero.errors import FromzeroError, NonFiniteError, StoppedError
from fromzero.evaluate import Outcomes, evaluate
from fromzero.files import write_atomically
from fromzero.machine import Machine
from fromzero.networks import num_parameters
from fromzero.optim import learning_rate_at
from fromzero.recipe import Recipe
from fromzero.resources import peak_memory
from fromzero.rng import permutation
from fromzero.runs import Row, Run
from fromzero.signals import StopSignals
from fromzero.splits import Data, Subset, validation_label
from fromzero.state import Counters, State
from fromzero.steps import batch_at, hardest, mixed, train_step, try_instead
from fromzero.timetable import Timetable

# By default a checkpoint is due after as long as was trained before it, from ten seconds to a minute, or later where
# saving is slow: then it takes this share of the time.
FIRST_SAVE_SECONDS, SAVE_SECONDS, SAVE_SHARE = 10.0, 60.0, 0.025


class Progress(NamedTuple):
    """Where a training stands after a step, with the loss (nats) of that step's images before it; or, with a row of
    metrics, after the evaluation of an epoch; or `ended`, when the summary is written and only the curves are still to
    be drawn."""

    counters: Counters
    row: Row | None = None
    ended: bool = False
    loss: float | None = None


@dataclass(repr=False)
class Training:
    """A run that is being trained. Iterate over it to train: it yields a Progress after every step and every epoch,
    writes the run folder as it goes, and ends with summary.json and curves.png there.

    Raises StoppedError when stopped by Ctrl-C or SIGTERM (saved first), NonFiniteError when a value overflows. When
    the loop is left, the run is saved and let go of, for others to write to it: `resumed_training` goes on with it.
    """

    run: Run
    recipe: Recipe
    images: ImageSet
    machine: Machine
    state: State
    data: Data
    checkpoint_minutes: float | None = None
    keep: int = 2
    lock: ExitStack = field(default_factory=ExitStack)  # held by the run's one writer, until it ends or is closed

    def __repr__(self) -> str:
        return f"<training of {self.run.path}, step {self.state.counters.step:,}>"

    def close(self) -> None:
        """Let go of the run without training on, or saving."""
        self._is_held = False
        self.lock.close()

    def __post_init__(self) -> None:
        self.timetable = Timetable.of(self.recipe, len(self.data.train.labels))
        if self.recipe.skip_easy:
            self.state.watch_losses(len(self.data.train.labels), self.machine.device)
        if self.recipe.compile and self.machine.device != "cpu":
            self.state.compile_network()
        self._began_at = self._saved_at = self._ticked_at = time.monotonic()
        self._saved = self._place
        self._save_seconds = 0.0  # of the last save here; what saves took before a resume says little of this disk
        self._is_held, self._is_iterated = True, False

    def __iter__(self) -> Iterator[Progress]:
        self._check_held(again=self._is_iterated)
        self._is_iterated = True
        recipe, counters = self.recipe, self.state.counters
        with closing(self), StopSignals() as stop, self._making_the_best_of_failures():
            self._began_at = self._saved_at = self._ticked_at = time.monotonic()

            def between() -> None:
                self._check_held()  # whoever iterates may have closed it
                self._save_if_due(stop.signal)

            while counters.epoch < recipe.epochs:
                order = self._order()
                while counters.step < self.timetable.start_of(counters.epoch + 1):
                    start = (counters.step - self.timetable.start_of(counters.epoch)) * recipe.batch_size
                    loss = self._step(order[start : start + recipe.batch_size])
                    self._tick()
                    yield Progress(replace(counters), loss=loss)
                    between()
                row = self._measure(between)
                self._end_epoch(row)
                yield Progress(replace(counters), row)
                between()
            self.save()
            self._finish(between)
            yield Progress(replace(counters), ended=True)
            self._draw()
            if stop.signal is not None:  # whoever trains one run after another is to stop here
                raise StoppedError(f"stopped; {self.run.path} has ended", stop.signal)

    @property
    def _place(self) -> tuple[int, int]:
        return self.state.counters.step, self.state.counters.epoch

    def _check_held(self, *, again: bool = False) -> None:
        if again or not self._is_held:
            raise FromzeroError(
                f"{self.run.path}: this training has ended or was left, and another may write to its run now; go on"
                " with a new one: fromzero.resumed_training(run)"
            )

    def _order(self) -> Tensor:
        """The images of the epoch under way, int64 (N,), in the order in which it sees them."""
        counters = self.state.counters
        ranks = permutation(len(self.data.train.labels), self.recipe.seed, "order", counters.epoch)
        order = torch.from_numpy(ranks).to(self.machine.device)
        return order if self.state.skipped is None else order[~self.state.skipped[order]]

    def _step(self, indices: Tensor) -> float:
        """One optimizer step on the images at `indices`; their loss before it."""
        self.machine.set_up()  # whoever iterates may have computed in another way meanwhile
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
            self.state.losses[indices] = batch.loss(made.logits, label_smoothing=0.0, reduction="none")
        counters.step += 1
        self.state.update_average(self.recipe.ema_decay)
        counters.running_loss += made.loss * len(indices)
        counters.running_correct += made.correct
        counters.running_images += len(indices)
        return made.loss

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
        row["val/balanced_accuracy"] = outcomes["val"].balanced_accuracy
        if self.recipe.validation.source != "test":  # nothing is fitted to test images
            row["val/temperature"] = outcomes["val"].temperature(self.recipe.logit_adjustment * self.data.log_shares)
        return row | {"time/seconds": round(counters.seconds, 3)}

    def _evaluated(self, what: str, subset: Subset, between: Callable[[], None]) -> Outcomes:
        """Outcomes on a subset. Raises NonFiniteError."""
        try:
            return evaluate(self.state.scored, *subset, self.data.normalise, self.machine, between)
        except NonFiniteError as error:
            step = self.state.counters.step
            rate = learning_rate_at(self.recipe, step - 1, self.timetable)
            instead = try_instead(rate, self.recipe, self.machine)
            raise NonFiniteError(f"after step {step}, on the {what} images, {error}; {instead}") from None

    def _end_epoch(self, row: Row) -> None:
        counters = self.state.counters
        self.run.append_metrics(row)
        counters.epoch += 1
        counters.running_loss, counters.running_correct, counters.running_images = 0.0, 0, 0
        if self.state.losses is not None:
            self.state.skip_easiest(self.timetable.images - self.timetable.later_images)
        accuracy, loss = row["val/accuracy"], row["val/loss"]
        # Of few validation images many epochs get as many right; the loss tells them apart.
        if (accuracy, -loss) > (counters.best_accuracy, -counters.best_loss):
            counters.best_epoch, counters.best_accuracy, counters.best_loss = counters.epoch, accuracy, loss
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
    def _making_the_best_of_failures(self) -> Iterator[None]:
        """When the loop is left, what the run has reached is saved; when a value overflows, its best weights and its
        curves are. Where torch.compile fails, say so and what to do; a traceback of its own names neither."""
        try:
            yield
        except GeneratorExit:
            if self._is_held and self._saved != self._place and not sys.is_finalizing():  # when nothing can be saved
                try:
                    self.save()
                except FromzeroError as error:  # whoever leaves does not wait for an answer
                    warnings.warn(str(error), stacklevel=2)
            raise
        except NonFiniteError:
            with suppress(OSError):  # that it overflowed says more
                self._save_best()
            self._draw()
            raise
        except Exception as error:
            if self.state.compiled is None or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            why = " ".join(str(error).split("\n")[:2])
            raise FromzeroError(
                f"{self.run.path}: torch.compile failed ({why}); the run is at step {self.state.counters.step}, begin"
                " it again with --compile false"
            ) from None

    def save(self) -> None:
        """Write the state to the run's checkpoints; the best weights go first, so that `last` never outruns them.

        Raises FromzeroError where that fails, or where the run is not held any more."""
        self._check_held()
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
        self._saved, self._saved_at = self._place, time.monotonic()
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

    def _finish(self, between: Callable[[], None]) -> None:
        """Score the test images, once, and write the summary, which says that the run has ended."""
        counters, last = self.state.counters, self.run.metrics()[-1]
        if self.recipe.validation.source == "test":  # they have just been scored
            found = {"test/accuracy": last["val/accuracy"], "test/loss": last["val/loss"]}
        else:
            test = self._evaluated("test", self.data.test, between)
            names = self.images.class_names
            by_class = dict(zip(names, test.by_class(len(names)), strict=True))
            found = {"test/accuracy": test.accuracy, "test/loss": test.loss, "test/by_class": by_class}
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
                **found,
                "time/seconds": round(counters.seconds, 3),
                "time/saving_seconds": round(counters.saving_seconds, 3),
                "time/images_per_second": round(
                    self.timetable.images_after(counters.step) / max(counters.seconds, 1e-9), 1
                ),
                "memory/peak_bytes": peak_memory(),
            }
        )

    def _draw(self) -> None:
        from fromzero.curves import curves_png

        try:
            if rows := self.run.metrics():
                picture = curves_png(rows, self.recipe, self.run.name, validation_label(self.recipe, self.images))
                write_atomically(self.run.path / "curves.png", picture)
        except Exception as error:  # a picture is never worth a run
            warnings.warn(f"{self.run.path}/curves.png was not drawn: {error}", stacklevel=2)

    def _tick(self) -> None:
        now = time.monotonic()
        self.state.counters.seconds += now - self._ticked_at
        self._ticked_at = now
