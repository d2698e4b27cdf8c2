"""What a terminal shows of studies while they run; elsewhere a line for each run that ends."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fromzero.data import ImageSet
from fromzero.errors import counted, printable
from fromzero.networks import num_multiply_adds, num_parameters
from fromzero.recipe import Recipe
from fromzero.stats import FEW_FOR_VALIDATION, fewest_pairs, widest_error
from fromzero.study.cells import Cell
from fromzero.study.execution import Execution
from fromzero.study.pools import Event
from fromzero.terminal import REFRESH_SECONDS, bars, can_redraw, duration, say
from fromzero.timetable import Timetable

# What a forward pass costs an image besides multiplications, and a cell besides images, in multiply-adds: rough.
OVERHEAD_IMAGE, OVERHEAD_CELL = 4_000_000, 20_000_000_000


def study_header(execution: Execution) -> str:
    """What is about to be compared, with how many runs, and what they can settle."""
    study, setting = execution.study, execution.setting
    shape, num_classes = execution.images.image_shape, execution.images.num_classes
    lines = [f"{execution.folder}: {study.claim}"]
    for arm in study.arms.values():
        parameters = num_parameters(arm.recipe.network, shape, num_classes)
        cost = num_multiply_adds(arm.recipe.network, shape, num_classes)
        size = f"{parameters:,} parameters, {cost / 1e6:.1f} M multiply-adds"
        lines.append(f"  {arm.name}: {size}; {study.in_words(arm)}")
    runs = f"{len(study.arms)} arms × {study.seeds} seeds{f' from {study.first_seed} on' * bool(study.first_seed)}"
    if execution.trials:
        runs += f" after {len(execution.trials)} runs of tuning"
    where = (
        "on Ray"
        if execution.place == "ray"
        else f"{execution.jobs} at a time, {counted(setting.threads or 1, 'thread')} each"
    )
    setting_in_words = study.setting(execution.images.validation is not None)
    lines.append(f"  {runs}, {where}; {len(execution.images.train):,} train images, {setting_in_words}")
    lines += [f"  note: {note}" for note in execution.images.notes]
    held_out, count = _num_validation(study.first.recipe, execution.images)
    if count < FEW_FOR_VALIDATION:
        worst = f"which give an accuracy to within ± {100 * widest_error(count):.0f} points at worst"
        if study.metric == "val/balanced_accuracy":
            worst = "and a class that has few of them counts as much as any"
        lines.append(
            f"  note: {'about ' * bool(held_out)}{counted(count, 'validation image')}, {worst}; what they settle need"
            " not hold for others"
        )
    for arm in study.arms.values():
        lines += [f"  note: arm {arm.name}: {note}" for note in study.notes_on(arm, execution.tuned)]
    for group in dict.fromkeys(c.group for c in study.contrasts):
        comparisons = sum(c.group == group for c in study.contrasts)
        fewest = fewest_pairs(comparisons)
        if study.seeds < fewest:
            lines.append(
                f"  note: with {study.seeds} seeds, {counted(comparisons, 'comparison')} ({group}) can only read"
                f" undecided; from --seeds {fewest} on something can be settled"
            )
    return "\n".join(lines)


def watch_cells(name: str, cells: Sequence[Cell], images: ImageSet, events: Iterable[Event], console: Console) -> None:
    """Show what happens to cells. Raises what `events` raises."""
    progress = _Progress(cells, images)
    if not can_redraw(console):
        for event in events:
            if line := progress.take(event):
                say(console, line)
        return
    with bars(console) as live:
        task = live.add_task(name, total=1.0, info="")
        shown = 0.0
        for event in events:
            if line := progress.take(event):
                live.console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
            if line or time.monotonic() - shown >= REFRESH_SECONDS:
                shown = time.monotonic()
                live.update(task, completed=progress.share, info=escape(progress.info), refresh=True)


class _Progress:
    """How far all cells are, and how long they will take, from their events. The rest takes as long as its work at the
    speed of what was done since this process began."""

    def __init__(self, cells: Sequence[Cell], images: ImageSet):
        self.work = {cell.path: _work(cell.recipe, images) for cell in cells}
        self.shares = dict.fromkeys(self.work, 0.0)
        self.before: dict[Path, float] = {}  # what was done when this process first heard of a cell
        self.running: dict[Path, str] = {}
        self.ended = 0
        self.began = time.monotonic()

    def take(self, event: Event) -> str | None:
        """Note what happened; the line to print for it, if any."""
        cell = event.cell
        if event.kind == "note":
            return f"note: {event.text}"
        if event.kind in ("started", "progress"):
            self.running[cell.path] = cell.name
            if event.kind == "progress":
                self.before.setdefault(cell.path, event.share)
                self.shares[cell.path] = max(event.share, self.shares[cell.path])
            return None
        self.running.pop(cell.path, None)
        self.shares[cell.path] = 1.0
        self.ended += 1
        if event.kind == "finished" and event.text:
            self.before[cell.path] = 1.0
            return None
        head = f"[{self.ended}/{len(self.work)}] {cell.name}"
        if event.kind == "failed":
            return f"{head}  failed: {event.text}"
        summary = cell.run.summary or {}
        return (
            f"{head}  train {summary['train/accuracy']:.4f}  val {summary['val/accuracy']:.4f}"
            f"  {duration(summary['time/seconds'])}  {self.time_left}"
        )

    @property
    def share(self) -> float:
        done = sum(self.work[path] * share for path, share in self.shares.items())
        return done / sum(self.work.values())

    @property
    def time_left(self) -> str:
        done_here = sum(self.work[p] * (share - self.before.get(p, 0.0)) for p, share in self.shares.items())
        left = sum(self.work[path] * (1 - share) for path, share in self.shares.items())
        if done_here <= 0:
            return "time left: not known yet"
        return f"{duration((time.monotonic() - self.began) * left / done_here)} left"

    @property
    def info(self) -> str:
        return f"{self.ended}/{len(self.work)} runs, {self.time_left}; {', '.join(self.running.values())}"


def _num_validation(recipe: Recipe, images: ImageSet) -> tuple[int, int]:
    """How many train images are held out, about, and how many validation images there are."""
    if recipe.validation.source != "fold" and images.validation is not None:
        return 0, len(images.validation)
    share = 1 / recipe.validation.folds if recipe.validation.source == "fold" else recipe.validation.fraction
    held_out = max(round(share * len(images.train)), images.num_classes)
    return held_out, held_out


def _work(recipe: Recipe, images: ImageSet) -> float:
    """Roughly what a cell of that recipe takes, in multiply-adds."""
    held_out, validation = _num_validation(recipe, images)
    train = len(images.train) - held_out
    timetable = Timetable.of(recipe, train)
    # A backward pass costs two forward.
    trained_on = 3 * recipe.hardest * timetable.images_after(timetable.start_of(recipe.epochs))
    scored = recipe.epochs * (validation + min(recipe.clean_train_images, train)) + len(images.test) + validation
    size = num_multiply_adds(recipe.network, images.image_shape, images.num_classes) + OVERHEAD_IMAGE
    return float(size * (trained_on + scored) + OVERHEAD_CELL)
