"""What a training looks like while it runs: a live display on a terminal; elsewhere a line an epoch or half minute."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from fromzero import training
from fromzero.networks import num_parameters
from fromzero.report import validation_label
from fromzero.runs import Row
from fromzero.training import Training

REFRESH_SECONDS = 0.25  # of the live display
LINE_SECONDS = 30.0  # without a terminal: the longest time without a line while steps are made


def watch(run: Training, console: Console) -> None:
    """Train to the end, showing how it goes and what came of it. Raises what the training raises."""
    progress = _timed(run)
    if console.is_terminal:
        _watch_live(progress, console)
    else:
        _watch_lines(progress, console)
    console.print(outcome(run), highlight=False, soft_wrap=not console.is_terminal, markup=False)
    for _ in progress:  # what is left, drawing, need not be waited for
        pass


def header(run: Training) -> str:
    """What is about to be trained, on what, and where it is kept."""
    here, recipe = run.machine, run.recipe
    parameters = num_parameters(run.recipe.network, run.images.image_shape, run.images.num_classes)
    counters = run.state.counters
    lines = [
        f"{run.run.path}: {recipe.name} on {run.images.name}, {parameters:,} parameters, seed {recipe.seed}",
        f"  {len(run.data.train.labels):,} train images from {run.images.source}; {validation_label(recipe)}"
        f" ({len(run.data.validation.labels):,})",
        f"  {here.device}, {here.threads} threads, {here.precision}; {recipe.optimizer.name} at"
        f" {recipe.optimizer.learning_rate:g}, batches of {recipe.batch_size}, {recipe.epochs} epochs",
    ]
    if counters.step:
        lines.append(f"  going on at step {counters.step:,}, {counters.epoch} of {recipe.epochs} epochs done")
    return "\n".join(lines)


def epoch_line(now: Timed, *, narrow: bool = False) -> str:
    """One epoch in one line: the three accuracies, their losses, speed, time left. `narrow` fits 80 columns."""
    row = now.row or {}
    accuracies = (
        f"epoch {row['epoch']:>3}/{now.epochs}  train {row['train/accuracy']:.4f}"
        f" (running {row['train/running_accuracy']:.4f})  val {row['val/accuracy']:.4f}"
    )
    if narrow:
        return f"{accuracies}  {duration(now.seconds_left)} left"
    losses = f"loss {row['train/loss']:.3f} ({row['train/running_loss']:.3f})  {row['val/loss']:.3f}"
    return f"{accuracies}  {losses}  {now.images_per_second:,.0f} images/s  {duration(now.seconds_left)} left"


def outcome(run: Training) -> str:
    """The end of a run in words."""
    summary = run.run.summary or {}
    is_test = summary["val/source"] == "test"
    return "\n".join(
        [
            f"train {summary['train/accuracy']:.4f} (running {summary['train/running_accuracy']:.4f}),"
            f" val {summary['val/accuracy']:.4f} (best {summary['best/val/accuracy']:.4f} at epoch"
            f" {summary['best/epoch']}), test {summary['test/accuracy']:.4f}"
            f" in {duration(summary['time/seconds'])}"
            + ("; val is the test images, as in the notes" if is_test else ""),
            f"curves and metrics: {run.run.path}",
        ]
    )


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


class Timed(training.Progress):
    """A Progress with the speed and the time left, as measured since the display began."""

    images_per_second: float = 0.0
    seconds_left: float = 0.0


def _timed(run: Training) -> Iterator[Timed]:
    first_step, started = run.state.counters.step, time.monotonic()
    images = len(run.data.train.labels)
    for progress in run:
        timed = Timed(*progress)
        seconds = time.monotonic() - started
        steps = progress.counters.step - first_step
        epochs_done = steps / progress.steps_per_epoch
        if steps:
            epochs_left = progress.epochs - progress.counters.step / progress.steps_per_epoch
            timed.images_per_second = epochs_done * images / seconds
            timed.seconds_left = seconds * epochs_left / epochs_done
        yield timed


def _watch_lines(progress: Iterator[Timed], console: Console) -> None:
    """A line an epoch, one for the first step, and one where nothing has been said for LINE_SECONDS."""
    said: float | None = None
    for now in progress:
        if now.ended:
            return
        if now.row:
            line = epoch_line(now)
        elif said is None:
            line = f"  step {_step(now)} of epoch {_epoch(now)} done"
        elif time.monotonic() - said >= LINE_SECONDS:
            line = (
                f"  step {_step(now)} of epoch {_epoch(now)}  running {_running(now):.4f}"
                f"  {now.images_per_second:,.0f} images/s  {duration(now.seconds_left)} left"
            )
        else:
            continue
        said = time.monotonic()
        console.print(line, highlight=False, soft_wrap=True)


def _step(now: Timed) -> str:
    """Which step of its epoch the training is at: `7/391`."""
    return f"{now.counters.step - now.counters.epoch * now.steps_per_epoch}/{now.steps_per_epoch}"


def _epoch(now: Timed) -> str:
    """Which epoch is being trained: `2/30`."""
    return f"{min(now.counters.epoch + 1, now.epochs)}/{now.epochs}"


def _running(now: Timed) -> float:
    """Running train accuracy of the epoch so far."""
    return now.counters.running_correct / max(now.counters.running_images, 1)


def _watch_live(progress: Iterator[Timed], console: Console) -> None:
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        *([BarColumn(bar_width=None)] if console.width > 100 else []),
        TextColumn("{task.fields[info]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bars:
        task = bars.add_task("starting", total=None, info="")
        last: Row | None = None
        shown = 0.0
        for now in progress:
            if now.ended:
                return
            if now.row:
                last = now.row
                line = epoch_line(now, narrow=console.width < 115)
                bars.console.print(line, highlight=False, soft_wrap=True)
            if time.monotonic() - shown < REFRESH_SECONDS:
                continue
            shown = time.monotonic()
            counters = now.counters
            three = f"running {_running(now):.3f}"
            if last:
                three += f" train {last['train/accuracy']:.3f} val {last['val/accuracy']:.3f}"
            bars.update(
                task,
                description=f"epoch {_epoch(now)}",
                total=now.steps_per_epoch,
                completed=counters.step - counters.epoch * now.steps_per_epoch,
                info=f"{_step(now)} {three} {now.images_per_second:,.0f} images/s {duration(now.seconds_left)} left",
                refresh=True,
            )
