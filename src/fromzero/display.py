"""What a terminal shows of trainings while they run (elsewhere a line an epoch or half minute), and the table of
runs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from fromzero import augment
from fromzero.checkpoint import BEST
from fromzero.diagnosis import IMBALANCED
from fromzero.errors import FromzeroError, command_line, counted, one_line, printable, some
from fromzero.kernels import NONE
from fromzero.networks import num_parameters
from fromzero.runs import Row, Run
from fromzero.splits import validation_label
from fromzero.stats import FEW_FOR_VALIDATION, widest_error, wilson_interval
from fromzero.terminal import LINE_SECONDS, REFRESH_SECONDS, bars, can_redraw, duration, say
from fromzero.training import Progress, Training

NARROW_HIDES = ("began", "running", "seed", "train", "best", "time", "recipe")  # columns of runs, the first to go first
FEW_STEPS, FEW_BATCH = 8, 125  # an epoch; images a step
LARGEST_OF_FEW = 48  # pixels; nearer to 64 than to 32 beyond
NAMED_CLASSES = 10  # at the start of a training


def watch(training: Training, console: Console, after_epoch: Callable[[Run], None] | None = None) -> None:
    """Train to the end, showing how it goes and what came of it; `after_epoch` is called whenever the run has new
    figures, and that it fails is a warning. Raises what the training raises."""
    stands = _timed(training, after_epoch)
    if can_redraw(console):
        _watch_live(stands, console)
    else:
        _watch_lines(stands, console)
    say(console, outcome(training))
    for _ in stands:  # what is left, drawing, need not be waited for
        pass


def header(training: Training) -> str:
    """What is about to be trained, on what, and where it is kept."""
    here, recipe, images = training.machine, training.recipe, training.images
    parameters = num_parameters(recipe.network, images.image_shape, images.num_classes)
    kernels = "" if here.kernels == NONE else " by its own kernels"
    on_test = recipe.validation.source == "test"
    trained_on = f"{len(training.data.train.labels):,}"
    if training.data.held is not None:
        trained_on += f" of {len(images.train):,}"
    scored_at_the_end = "" if on_test else f"; {counted(len(training.data.test.labels), 'test image')}"
    lines = [
        f"{training.run.path}: {recipe.name} on {images.name}, {parameters:,} parameters, seed {recipe.seed}",
        f"  {trained_on} train images from {images.source}; {validation_label(recipe, images)}"
        f" ({len(training.data.validation.labels):,}){scored_at_the_end}",
        f"  {images.num_classes} classes: {one_line(some(images.class_names, most=NAMED_CLASSES))}",
        f"  {here.device}, {counted(here.threads, 'thread')}, {here.precision}{kernels}; {recipe.optimizer.name} at"
        f" {recipe.optimizer.learning_rate:g}, batches of {recipe.batch_size}, {counted(recipe.epochs, 'epoch')}",
    ]
    if here.why_no_kernels:
        lines.append(f"  by PyTorch's kernels, which are slower: {here.why_no_kernels}")
    lines += [f"  {remark}" for remark in _of_recipe(training)]
    lines += [
        f"  note: {note}"
        for note in (*images.notes, *_of_weights(training), *_of_classes(training), *_of_sizes(training))
    ]
    if training.state.counters.step:
        done = f"{training.state.counters.epoch} of {recipe.epochs} epochs done"
        lines.append(f"  going on at step {training.state.counters.step:,}, {done}")
    return "\n".join(lines)


def _of_weights(training: Training) -> Iterator[str]:
    """What its first weights make doubtful, and what became of its best ones."""
    yield from training.run.doubts
    to_come = training.state.counters.epoch < training.recipe.epochs
    if to_come and training.run.metrics() and not (training.run.checkpoints / BEST).exists():
        yield "the best weights of the epochs before are not there any more: best counts from here on"


def _of_classes(training: Training) -> Iterator[str]:
    """Notes on classes that have few images, beside the others or at all."""
    names = training.images.class_names
    of_train, of_validation = (
        part.labels.bincount(minlength=len(names)).tolist() for part in (training.data.train, training.data.validation)
    )
    if missing := [name for name, count in zip(names, of_train, strict=True) if not count]:
        yield f"no train image of {some(missing)}"
    present = [label for label, count in enumerate(of_train) if count]
    fewest, most = (choose(present, key=of_train.__getitem__) for choose in (min, max))
    if of_train[most] >= IMBALANCED * of_train[fewest]:
        share = of_train[most] / sum(of_train)
        yield (
            f"{of_train[most]:,} train images of {names[most]!r}, {of_train[fewest]:,} of {names[fewest]!r}: to always"
            f" say {names[most]!r} is right for {share:.0%} of them"
            + ("" if training.recipe.logit_adjustment else "; --logit-adjustment 1 trains for all classes alike")
        )
    if missing := [name for name, count in zip(names, of_validation, strict=True) if not count]:
        yield f"no validation image of {some(missing)}"


def _of_sizes(training: Training) -> Iterator[str]:
    """Notes on how many validation images, how large images and how many steps there are."""
    recipe, images, timetable = training.recipe, training.images, training.timetable
    if images.validation is not None and recipe.validation.source != "split":
        yield "the data set's own validation images are not used; --validation.source split uses them"
    if (count := len(training.data.validation.labels)) < FEW_FOR_VALIDATION:
        held_out = recipe.validation.source == "split" and training.data.held is not None
        more = "; --validation.fraction holds out more" if held_out else ""
        points = f"{100 * widest_error(count):.0f} points"
        yield f"{counted(count, 'validation image')} give an accuracy to within ± {points} at worst{more}"
    made_for = "few64" if min(images.image_shape[:2]) > LARGEST_OF_FEW else "few"
    for_few = recipe.name in ("few", "few64")
    if for_few and recipe.name != made_for:
        height, width = images.image_shape[:2]
        side, folder = (64, "FOLDER@64") if recipe.name == "few64" else (32, "FOLDER without @64")
        yield (
            f"--recipe {recipe.name} is made for images of {side}×{side} pixels, these have {width}×{height}: train on"
            f" {folder}, or with --recipe {made_for}"
        )
    if timetable.first_steps < FEW_STEPS and recipe.batch_size > FEW_BATCH:
        yield (
            f"{counted(timetable.first_steps, 'step')} an epoch; with so few images"
            f" {'' if for_few else f'--recipe {made_for}, with '}batches of {FEW_BATCH} and more epochs"
            f"{'' if for_few else ','} may reach a higher accuracy"
        )


def _of_recipe(training: Training) -> Iterator[str]:
    """What the recipe does to images, batches and labels that bears on the figures shown."""
    recipe, augmentation, timetable = training.recipe, training.recipe.augment, training.timetable
    if augmentation.flip != "none":
        yield "images are mirrored half of the time; for digits, letters, road signs: --augment.flip none"
    if augmentation.scales:
        size = "×".join(map(str, reversed(augment.smallest_size(augmentation, *training.images.image_shape[:2]))))
        yield f"up to epoch {augmentation.scale_epochs:g} on images of {size} pixels"
    if recipe.skip_easy and recipe.epochs > 1:
        skipped = timetable.images - timetable.later_images
        yield f"epochs after the first skip the {skipped:,} easiest images; running accuracy covers only the rest"
    if training.state.proxy is not None:
        parameters = num_parameters(recipe.proxy_network(), training.images.image_shape, training.images.num_classes)
        yield (
            f"each step trains on the hardest {100 * recipe.hardest:.4g} % of its batch, chosen by a proxy network of"
            f" {parameters:,} parameters; running accuracy covers only those"
        )
    if augmentation.cutmix:
        yield (
            f"{100 * augmentation.cutmix:.4g} % of a step's images are mixed with another one; running accuracy uses"
            " the label of the larger part"
        )
    if recipe.logit_adjustment:
        yield "the running loss is of outputs with the log of the classes' shares added, others are of plain ones"
    if recipe.label_smoothing:
        yield f"the running loss is against labels smoothed by {recipe.label_smoothing:g}, others against plain ones"


def epoch_line(now: Timed, *, narrow: bool = False) -> str:
    """One epoch in one line: the three accuracies, their losses, speed, time left. `narrow` fits 80 columns."""
    row = now.progress.row or {}
    accuracies = (
        f"epoch {row['epoch']:>3}/{now.training.recipe.epochs}  train {row['train/accuracy']:.4f}"
        f" (running {row['train/running_accuracy']:.4f})  val {row['val/accuracy']:.4f}"
    )
    if narrow:
        return accuracies + (f"  {duration(now.speed.seconds_left)} left" if now.speed else "")
    losses = f"loss {row['train/loss']:.3f} ({row['train/running_loss']:.3f}), val {row['val/loss']:.3f}"
    return f"{accuracies}  {losses}{_behind(now.speed)}"


def outcome(training: Training) -> str:
    """The end of a run in words."""
    summary = training.run.summary or {}
    is_test = summary["val/source"] == "test"
    low, high = wilson_interval(summary["test/accuracy"], len(training.data.test.labels))
    return "\n".join(
        [
            f"train {summary['train/accuracy']:.4f} (running {summary['train/running_accuracy']:.4f}),"
            f" val {summary['val/accuracy']:.4f} (best {summary['best/val/accuracy']:.4f} at epoch"
            f" {summary['best/epoch']}), test {summary['test/accuracy']:.4f} ({low:.4f}–{high:.4f}, 95 %)"
            f" in {duration(summary['time/seconds'])}" + ("; val is the test images" if is_test else ""),
            f"curves and metrics: {training.run.path}",
            f"a page about it:    {command_line('fromzero', 'report', training.run.path)}",
            f"what may be wrong:  {command_line('fromzero', 'diagnose', training.run.path)}",
        ]
    )


class Speed(NamedTuple):
    """How fast a training has gone since the display began."""

    images_per_second: float
    seconds_left: float

    def __str__(self) -> str:
        return f"{self.images_per_second:,.0f} images/s  {duration(self.seconds_left)} left"


class Timed(NamedTuple):
    """A Progress of `training`, with its speed from the second step on: what comes once, before the first, would be
    counted for every step."""

    training: Training
    progress: Progress
    speed: Speed | None

    @property
    def position(self) -> str:
        """Which step of its epoch it is at, and which epoch that is: `step 7/391 of epoch 2/30`."""
        return f"step {self.step} of epoch {self.epoch}"

    @property
    def step(self) -> str:
        counters, timetable = self.progress.counters, self.training.timetable
        return f"{counters.step - timetable.start_of(counters.epoch)}/{timetable.steps_in(counters.epoch)}"

    @property
    def epoch(self) -> str:
        epochs = self.training.recipe.epochs
        return f"{min(self.progress.counters.epoch + 1, epochs)}/{epochs}"

    @property
    def running(self) -> float:
        """Running train accuracy of the epoch so far."""
        return self.progress.counters.running_correct / max(self.progress.counters.running_images, 1)


def _timed(training: Training, after_epoch: Callable[[Run], None] | None = None) -> Iterator[Timed]:
    timetable, end = training.timetable, training.timetable.start_of(training.recipe.epochs)
    first: tuple[int, float] | None = None
    for progress in training:
        step, now = progress.counters.step, time.monotonic()
        first_step, began = first = first or (step, now)
        speed = None
        if step > first_step and now > began:  # some clocks stand still for several milliseconds
            images = timetable.images_after(step) - timetable.images_after(first_step)
            before, done, in_all = (_work(training, to) for to in (first_step, step, end))
            seconds = now - began
            speed = Speed(images / seconds, seconds * (in_all - done) / (done - before))
        if progress.row and after_epoch is not None:
            try:
                after_epoch(training.run)
            except Exception as error:  # what others make of its figures is never worth a run
                warnings.warn(str(error), stacklevel=2)
        yield Timed(training, progress, speed)


def _work(training: Training, step: int) -> float:
    """Images trained on in so many steps, a smaller one counted by its area."""
    augmentation, timetable = training.recipe.augment, training.timetable
    small = timetable.images_after(math.ceil(min(step, timetable.steps_before(augmentation.scale_epochs))))
    return timetable.images_after(step) - (1 - augmentation.scale**2) * small


def _watch_lines(stands: Iterator[Timed], console: Console) -> None:
    """A line an epoch, one for the first step, and one where nothing has been said for LINE_SECONDS."""
    said: float | None = None
    for now in stands:
        if now.progress.ended:
            return
        if now.progress.row:
            line = epoch_line(now)
        elif said is None:
            line = f"  {now.position} done"
        elif time.monotonic() - said >= LINE_SECONDS:
            line = f"  {now.position}  running {now.running:.4f}{_behind(now.speed)}"
        else:
            continue
        said = time.monotonic()
        console.print(line, highlight=False, soft_wrap=True)


def _behind(speed: Speed | None) -> str:
    """The speed as the end of a line."""
    return "" if speed is None else f"  {speed}"


def _watch_live(stands: Iterator[Timed], console: Console) -> None:
    with bars(console, bar_width=None, with_bar=console.width > 100) as live:
        task = live.add_task("starting", total=None, info="")
        last: Row | None = None
        shown = 0.0
        for now in stands:
            counters = now.progress.counters
            if now.progress.ended:
                return
            if now.progress.row:
                last = now.progress.row
                line = epoch_line(now, narrow=console.width < 115)
                live.console.print(line, highlight=False, soft_wrap=True)
            if counters.epoch == now.training.recipe.epochs:
                live.update(task, description="scoring the test images", total=1, completed=1, info="", refresh=True)
                continue
            if time.monotonic() - shown < REFRESH_SECONDS:
                continue
            shown = time.monotonic()
            three = f"running {now.running:.3f}" if counters.running_images else "running –"
            if last:
                three += f" train {last['train/accuracy']:.3f} val {last['val/accuracy']:.3f}"
            timetable = now.training.timetable
            live.update(
                task,
                description=f"epoch {now.epoch}",
                total=timetable.steps_in(counters.epoch),
                completed=counters.step - timetable.start_of(counters.epoch),
                info=f"{now.step} {three}{_behind(now.speed)}",
                refresh=True,
            )


def run_columns(run: Run) -> dict[str, str]:
    """A run's line in the table of runs, by column. Raises FromzeroError where its records cannot be read."""
    rows, recipe, summary = run.metrics(), run.recipe, run.summary
    last = rows[-1] if rows else None
    mark = "*" if recipe.validation.source == "test" else ""
    return {
        "run": printable(run.name),
        "began": _began(run),
        "recipe": recipe.name,
        "seed": str(recipe.seed),
        "epochs": f"{len(rows)}/{recipe.epochs}" + ("" if summary else " …"),
        "train": f"{last['train/accuracy']:.4f}" if last else "–",
        "running": f"{last['train/running_accuracy']:.4f}" if last else "–",
        "val": f"{last['val/accuracy']:.4f}{mark}" if last else "–",
        "best": f"{max(row['val/accuracy'] for row in rows):.4f}{mark}" if rows else "–",
        "test": f"{summary['test/accuracy']:.4f}" if summary else "–",
        "time": duration((summary or last)["time/seconds"]) if last else "–",
    }


def _began(run: Run) -> str:
    """When a run began, as a clock here shows it; of one whose provenance cannot be read the figures still count."""
    try:
        return f"{run.began:%Y-%m-%d %H:%M}"
    except FromzeroError:
        return "–"


def runs_table(lines: Sequence[dict[str, str]], columns: int | None) -> tuple[Table, int, tuple[str, ...]]:
    """The table of runs, how many characters wide it is, and what it leaves out to fit into `columns`, if it can: a
    figure or a name that is cut off is worse than one that is not shown. None: it may be as wide as it is."""
    for hidden in (NARROW_HIDES[:count] for count in range(len(NARROW_HIDES) + 1)):
        table = Table(box=None, header_style="bold", pad_edge=False)
        names = [name for name in (lines[0] if lines else ()) if name not in hidden]
        for name in names:
            table.add_column(name, justify="left" if name in ("run", "recipe") else "right", no_wrap=True)
        for line in lines:
            table.add_row(*(escape(line[name]) for name in names))
        wide = Console(width=10_000, emoji=False)
        width = Measurement.get(wide, wide.options, table).maximum
        if columns is None or width <= columns:
            break
    return table, width, hidden
