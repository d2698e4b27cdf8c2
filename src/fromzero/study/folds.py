"""Cross-validation of a run's recipe: its train images are dealt into folds, and each fold is judged by a network that
was trained on the others. So every train image is judged by one that has never seen it.

RUN/folds/
  of-5/fold-1 …      an ordinary run for each of five folds, with its weights
  result.json        what they say of all these images
  labels.csv         every image with its label's probability, the most doubtful label first
  set-aside/         runs of another recipe, or damaged ones; they count no more
  lock, workers.log  held by the process that trains them; what its workers said
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fromzero.changes import DATA_FIELDS, in_words
from fromzero.data import ImageSet, stratified_folds
from fromzero.errors import FromzeroError, InputError, command_line, counted, one_line, options_typed, some
from fromzero.evaluate import outputs
from fromzero.files import csv_text, write_atomically, write_json
from fromzero.findings import images_of
from fromzero.machine import chosen_device
from fromzero.probe import surest_of
from fromzero.runs import FOLDS, LABELS, Run
from fromzero.splits import check_image_set
from fromzero.stats import wilson_interval
from fromzero.study.cells import Cell, Setting, is_finished
from fromzero.study.execution import alone_in, jobs_and_threads
from fromzero.study.pools import Event, on_this_machine
from fromzero.terminal import duration, in_brackets
from fromzero.trained import check_unedited, load_trained, recorded_images

NAMED, PAIRS, LISTED = 10, 3, 1000  # classes and labels in the text, pairs of classes, labels in result.json


@dataclass
class CrossValidation:
    """The cross-validation of a run, about to be carried out. Iterate over it: it yields what happens to the runs of
    its folds, and leaves them in `folder`. Raises StoppedError when asked to stop, every run saved, and FromzeroError
    where one failed."""

    run: Run
    images: ImageSet
    cells: list[Cell]
    setting: Setting
    jobs: int
    command: str
    data_dir: Path | None = None

    @property
    def folder(self) -> Path:
        return self.run.path / FOLDS

    def __iter__(self) -> Iterator[Event]:
        with alone_in(self.folder, "cross-validates this run", self.command):
            waiting, failed = [], []
            for cell in self.cells:
                if is_finished(cell, self.images):
                    yield Event("finished", cell, 1.0, "done before")
                else:
                    waiting.append(cell)
            self.cells[0].path.parent.mkdir(exist_ok=True)
            for event in on_this_machine(waiting, self.setting, self.jobs, self.folder / "workers.log"):
                failed += [event.cell.name] * (event.kind == "failed")
                yield event
            if failed:
                raise FromzeroError(f"{self.folder}: {' and '.join(failed)} failed; to try again: {self.command}")


def prepare_folds(
    run: Run,
    folds: int,
    *,
    jobs: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    data_dir: Path | None = None,
    offline: bool = False,
) -> CrossValidation:
    """Check all that can be checked before anything is trained. jobs, threads: as of a study. Raises FromzeroError."""
    check_unedited(run)
    _own_validation(run)  # what is damaged there is said before anything is trained
    on_gpu = chosen_device(device).type == "cuda"
    num_jobs, threads_each = jobs_and_threads(jobs, threads, on_gpu, folds)
    images = recorded_images(run, data_dir=data_dir, offline=offline)
    changes = {"dataset": images_of(run, images.source) or run.recipe.dataset, "validation.source": "fold"}
    recipe = run.recipe.override(changes | {"validation.folds": folds, "validation.fold": 1})
    check_image_set(recipe, images)
    dealt = stratified_folds(images.train.labels, folds, images.train.content_keys())
    if (least := int(np.bincount(dealt[dealt >= 0], minlength=folds).min())) < 2:
        raise InputError(
            f"{run.path}: of {folds} folds of {counted(len(images.train), 'train image')}, copies together, one would"
            f" have {counted(least, 'image')}: ask for fewer folds"
        )
    cells = []
    for fold in range(1, folds + 1):
        path = (run.path / FOLDS / f"of-{folds}" / f"fold-{fold}").resolve()
        of_fold = recipe.override({"validation.fold": fold})
        cells.append(Cell(f"fold {fold}", path, of_fold, needs_weights=True))
    given = {
        "--folds": folds,
        "--jobs": jobs,
        "--threads": threads,
        "--device": None if device == "auto" else device,
        "--data-dir": data_dir,
        "--offline": offline,
    }
    command = command_line("fromzero", "cross-validate", run.path, *options_typed(given))
    setting = Setting(recipe.dataset, None, offline, device, threads_each)
    return CrossValidation(run, images, cells, setting, num_jobs, command, data_dir)


def fold_header(found: CrossValidation) -> str:
    """What is about to be trained."""
    threads = counted(found.setting.threads or 1, "thread")
    recipe, train, count = found.cells[0].recipe, len(found.images.train), len(found.cells)
    lines = [
        f"{found.folder}: {_of_recipe(found.run)}, {counted(recipe.epochs, 'epoch')}, seed {recipe.seed}",
        f"  {train:,} train images in {count} folds; {count} runs, each on about {train - round(train / count):,} of"
        f" them, {found.jobs} at a time, {threads} each; test images are not judged",
        *(f"  note: {note}" for note in found.images.notes),
    ]
    if took := found.run.seconds:
        at_once = f", less with {found.jobs} at a time" if found.jobs > 1 else ""
        lines.append(
            f"  a training like the run's takes {duration(took)}, all in turn {duration(count * took)}{at_once}"
        )
    if found.run.provenance["from"]:
        lines.append("  note: the run began with the weights of another one, and these begin with random ones")
    if found.run.earlier_ends:
        lines.append(f"  note: the run was extended; these train {recipe.epochs} epochs at once")
    return "\n".join(lines)


def fold_result(found: CrossValidation) -> dict[str, Any]:
    """What the folds' networks say of the images that they were not trained on, as JSON data, written to result.json
    and, image by image, to labels.csv. Raises FromzeroError where a run is not there, and NonFiniteError."""
    with alone_in(found.folder, "cross-validates this run", found.command):
        fold, probabilities = _judged(found)
        rows = _rows(found.images, fold, probabilities)
        result = _result(found, fold, probabilities, rows)
        text = csv_text(rows[0], (["" if value is None else str(value) for value in row.values()] for row in rows))
        write_atomically(found.folder / LABELS, text.encode("utf-8", "surrogateescape"))
        write_json(found.folder / "result.json", result)
    return result


def _judged(found: CrossValidation) -> tuple[np.ndarray, np.ndarray]:
    """Of each train image the fold that it was in, int64 (N,), 0 where in none, and what the network says that was not
    trained on it: probabilities float32 (N, classes)."""
    images, setting = found.images, found.setting
    fold = np.zeros(len(images.train), np.int64)
    probabilities = np.zeros((len(images.train), images.num_classes), np.float32)
    for number, cell in enumerate(found.cells, 1):
        trained = load_trained(cell.run, images=images, device=setting.device, threads=setting.threads)
        data = trained.data
        assert data.held is not None
        said = outputs(trained.network, data.validation.pixels, data.normalise, trained.machine)
        fold[data.held], probabilities[data.held] = number, said.softmax(1).cpu().numpy()
    return fold, probabilities


def _rows(images: ImageSet, fold: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
    """Each judged image and what is said of it, the least likely label first. Of several ways to find labels that had
    been made wrong this order found most (docs/log.md)."""
    labels, names = images.train.labels, images.class_names
    own, likeliest = probabilities[np.arange(len(labels)), labels], probabilities.argmax(1)
    judged = np.flatnonzero(fold)
    return [
        {
            "image": index,
            "file": images.train.files[index] if images.train.files else None,
            "label": names[labels[index]],
            "label_probability": float(own[index]),
            "looks_like": names[likeliest[index]],
            "looks_like_probability": float(probabilities[index, likeliest[index]]),
            "fold": int(fold[index]),
        }
        for index in judged[np.argsort(own[judged], kind="stable")].tolist()
    ]


def _result(
    found: CrossValidation, fold: np.ndarray, probabilities: np.ndarray, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    labels, names, judged = found.images.train.labels, found.images.class_names, np.flatnonzero(fold)
    right = probabilities.argmax(1) == labels
    doubtful = [row for row in rows if row["label"] != row["looks_like"]]
    surest = surest_of(torch.from_numpy(probabilities[judged]), torch.from_numpy(labels[judged]))
    return {
        "recipe": _of_recipe(found.run),
        "epochs": found.run.recipe.epochs,
        "folds": len(found.cells),
        **_accuracy(right[judged]),
        "by_fold": [float(right[fold == number].mean()) for number in range(1, len(found.cells) + 1)],
        "by_class": {name: _accuracy(right[judged[labels[judged] == label]]) for label, name in enumerate(names)},
        "left_out": len(labels) - len(judged),
        "surest": surest._asdict(),
        "said_of_labels": _of_labels(doubtful),
        "doubtful": doubtful[:LISTED],
    }


def fold_text(found: CrossValidation, result: Mapping[str, Any]) -> str:
    """The same in words."""
    by_fold = result["by_fold"]
    shares = {name: one["accuracy"] for name, one in result["by_class"].items() if one["images"]}
    told = [f"{name} {shares[name]:.3f}" for name in sorted(shares, key=lambda name: shares[name])]
    lines = [
        f"{found.run.path}: {result['recipe']}, {counted(result['epochs'], 'epoch')}, {result['folds']} folds, each"
        " train image judged by a network that was not trained on it",
        f"  accuracy {result['accuracy']:.4f} ({in_brackets(result['interval'], result['images'])};"
        " another seed moves it, too)",
        f"  by fold  {min(by_fold):.4f} to {max(by_fold):.4f}: {', '.join(f'{one:.4f}' for one in by_fold)}",
        *_own_validation(found.run),
        f"  by class, lowest first: {some(told, most=NAMED)}",
    ]
    if result["left_out"]:
        lines.append(f"  {counted(result['left_out'], 'image')} not judged: their class has no other picture")
    shown = result["doubtful"][:NAMED]
    lines.append(f"  labels: {result['said_of_labels']}{'; the least likely first:' * bool(shown)}")
    for row in shown:
        lines.append(
            f"    labelled {row['label']} ({row['label_probability']:.3f}), looks like {row['looks_like']}"
            f" ({row['looks_like_probability']:.3f}): {row['file'] or 'train image ' + str(row['image'])}"
        )
    lines.append(f"  all images, least likely labels first: {found.folder / LABELS}")
    if shown:
        moved = [] if found.data_dir is None else ["--data-dir", str(found.data_dir)]
        lines.append(f"  pictures of these: {command_line('fromzero', 'report', found.run.path, *moved)}")
        lines.append("  mend labels in a copy of the pictures: the run needs its own as they are")
    return "\n".join(map(one_line, lines))


def _of_recipe(run: Run) -> str:
    """Which recipe it is, but for what is said beside it."""
    return in_words(run.recipe, but=(*DATA_FIELDS, "epochs"))


def _own_validation(run: Run) -> list[str]:
    """What the run itself says by its validation images, which are fewer."""
    count = run.provenance["data"].get("subsets", {}).get("validation")
    if run.summary is None or run.recipe.validation.source == "test" or not count:
        return []
    low, high = wilson_interval(share := run.summary["val/accuracy"], count)
    return [f"  the run  {share:.4f} ({low:.4f}–{high:.4f}) on its own {counted(count, 'validation image')}"]


def _of_labels(doubtful: Sequence[Mapping[str, Any]]) -> str:
    """How many images look like another class than their label's. How many labels are wrong does not follow: networks
    err, most where classes are easily confused, and there labels are most easily wrong."""
    if not doubtful:
        return "each image looks like its label's class"
    pairs = Counter((row["label"], row["looks_like"]) for row in doubtful)
    most = [f"{label} like {other} ({count:,})" for (label, other), count in pairs.most_common(PAIRS)]
    look = "images look" if len(doubtful) > 1 else "image looks"
    return (
        f"{len(doubtful):,} {look} like another class than the label's ({some(most, most=PAIRS)}): all that the"
        " accuracy misses, be it networks' mistakes or wrong labels, which only looking at them can tell"
    )


def _accuracy(right: np.ndarray) -> dict[str, Any]:
    """Of images that were right or not, bool (N,): how many, the share that was, and its 95 % interval."""
    if not len(right):
        return {"images": 0, "accuracy": None, "interval": None}
    share = float(right.mean())
    return {"images": len(right), "accuracy": share, "interval": list(wilson_interval(share, len(right)))}
