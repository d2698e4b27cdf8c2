"""Cross-validation of a run's recipe: its train images are dealt into folds, and each fold is judged by a network that
was trained on the others. So every train image is judged by one that has never seen it.

RUN/folds/
  runs/fold-1 …      an ordinary run for each fold, with its weights
  result.json        what they say of all these images
  labels.csv         every image with its label's probability, the most doubtful label first
  set-aside/         runs of other recipes or other numbers of folds; they count no more
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fromzero.changes import in_words
from fromzero.data import ImageSet
from fromzero.diagnosis import FEWEST_SURE, SURE
from fromzero.errors import FromzeroError, InputError, StoppedError, counted, printable, some, typed
from fromzero.evaluate import predict
from fromzero.evidence import Surest
from fromzero.files import csv_text, write_atomically, write_json
from fromzero.findings import images_of
from fromzero.machine import chosen_device
from fromzero.probe import surest_of
from fromzero.runs import FOLDS, Run, last_machine
from fromzero.splits import check_image_set
from fromzero.stats import wilson_interval
from fromzero.study.cells import Cell, Setting, is_finished
from fromzero.study.execution import alone_in, jobs_and_threads
from fromzero.study.pools import Event, on_this_machine
from fromzero.trained import check_unedited, load_trained, recorded_images

SHOWN, LISTED = 10, 100  # doubtful labels: as text, in result.json
NAMED_CLASSES = 10


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

    @property
    def folder(self) -> Path:
        return self.run.path / FOLDS

    def __iter__(self) -> Iterator[Event]:
        with alone_in(self.folder, "cross-validates this run"):
            waiting, failed = [], []
            for cell in self.cells:
                if is_finished(cell, self.images):
                    yield Event("finished", cell, 1.0, "done before")
                else:
                    waiting.append(cell)
            (self.folder / "runs").mkdir(exist_ok=True)
            try:
                for event in on_this_machine(waiting, self.setting, self.jobs, self.folder / "workers.log"):
                    failed += [event.cell.name] * (event.kind == "failed")
                    yield event
            except StoppedError as stopped:
                message = f"stopped; every run is saved; go on with: {self.command}"
                raise StoppedError(message, stopped.exit_code - 128) from None
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
    on_gpu = chosen_device(device).type == "cuda"
    num_jobs, threads_each = jobs_and_threads(jobs, threads, on_gpu)
    images = recorded_images(run, data_dir=data_dir, offline=offline)
    changes = {"dataset": images_of(run, images.source) or run.recipe.dataset, "validation.source": "fold"}
    cells = []
    for fold in range(1, folds + 1):
        recipe = run.recipe.override(changes | {"validation.folds": folds, "validation.fold": fold})
        path = (run.path / FOLDS / "runs" / f"fold-{fold}").resolve()
        cells.append(Cell(f"fold {fold}", recipe.seed, path, recipe, needs_weights=True))
    check_image_set(cells[0].recipe, images)
    if len(images.train) < 2 * folds:
        raise InputError(f"{run.path}: {folds} folds of {counted(len(images.train), 'train image')}: ask for fewer")
    options = {"--jobs": jobs, "--threads": threads, "--device": device * (device != "auto"), "--data-dir": data_dir}
    given = [str(word) for option, value in options.items() if value for word in (option, value)]
    command = typed("fromzero", "cross-validate", run.path, "--folds", str(folds), *given, *["--offline"] * offline)
    setting = Setting(cells[0].recipe.dataset, None, offline, device, threads_each)
    return CrossValidation(run, images, cells, setting, num_jobs, command)


def fold_header(found: CrossValidation) -> str:
    """What is about to be trained."""
    threads = counted(found.setting.threads or 1, "thread")
    recipe, train = found.cells[0].recipe, len(found.images.train)
    count = len(found.cells)
    return printable(
        f"{found.folder}: {in_words(found.run.recipe)}, {counted(recipe.epochs, 'epoch')}, seed {recipe.seed}\n"
        f"  {train:,} train images in {count} folds; {count} runs, each on about {train - round(train / count):,} of"
        f" them, {found.jobs} at a time, {threads} each"
    )


def fold_result(found: CrossValidation) -> dict[str, Any]:
    """What the folds' networks say of the images that they were not trained on, as JSON data, written to result.json
    and, image by image, to labels.csv. Raises FromzeroError where a run is not there, and NonFiniteError."""
    images = found.images
    labels, names = images.train.labels, images.class_names
    fold = np.zeros(len(labels), np.int64)
    probabilities = np.zeros((len(labels), len(names)), np.float32)
    for number, cell in enumerate(found.cells, 1):
        run = Run(cell.path)
        where = {key: last_machine(run.provenance)[key] for key in ("device", "threads")}
        trained = load_trained(run, images=images, **where)
        data = trained.data
        assert data.held is not None
        said = predict(trained.network, data.validation.pixels, data.normalise, trained.machine)
        fold[data.held], probabilities[data.held] = number, said.cpu().numpy()
    judged = np.flatnonzero(fold)
    own = probabilities[np.arange(len(labels)), labels]
    said = probabilities.argmax(1)
    right = said == labels
    # Of several ways to find the labels that had been made wrong, this one found most (docs/results.md).
    by_doubt = judged[np.argsort(own[judged], kind="stable")]
    surest = surest_of(torch.from_numpy(probabilities[judged]), torch.from_numpy(labels[judged]))
    rows = [
        {
            "image": index,
            "file": images.train.files[index] if images.train.files else None,
            "label": names[labels[index]],
            "label_probability": float(own[index]),
            "looks_like": names[said[index]],
            "looks_like_probability": float(probabilities[index, said[index]]),
            "fold": int(fold[index]),
        }
        for index in by_doubt.tolist()
    ]
    result = {
        "recipe": in_words(found.run.recipe),
        "epochs": found.run.recipe.epochs,
        "folds": len(found.cells),
        **_accuracy(right[judged]),
        "by_fold": [float(right[fold == number].mean()) for number in range(1, len(found.cells) + 1)],
        "by_class": {name: _accuracy(right[judged[labels[judged] == label]]) for label, name in enumerate(names)},
        "left_out": len(labels) - len(judged),
        "surest": surest._asdict(),
        "said_of_labels": _of_labels(surest, float(probabilities[judged].max(1).mean()), right[judged].mean()),
        "doubtful": [row for row in rows if row["label"] != row["looks_like"]][:LISTED],
    }
    write_json(found.folder / "result.json", result)
    text = csv_text(rows[0], (["" if value is None else str(value) for value in row.values()] for row in rows))
    write_atomically(found.folder / "labels.csv", text.encode("utf-8", "surrogateescape"))
    return result


def fold_text(found: CrossValidation, result: Mapping[str, Any]) -> str:
    """The same in words."""
    low, high = result["interval"]
    by_fold = result["by_fold"]
    shares = {name: one["accuracy"] for name, one in result["by_class"].items() if one["images"]}
    told = [f"{name} {shares[name]:.3f}" for name in sorted(shares, key=lambda name: shares[name])]
    lines = [
        f"{found.run.path}: {result['recipe']}, {result['folds']} folds, each train image judged by a network that was"
        " not trained on it",
        f"  accuracy {result['accuracy']:.4f} ({low:.4f}–{high:.4f}, 95 % for {counted(result['images'], 'image')};"
        " another seed moves it, too)",
        f"  by fold  {min(by_fold):.4f} to {max(by_fold):.4f}: {', '.join(f'{one:.4f}' for one in by_fold)}",
        *_own_validation(found.run),
        f"  by class, lowest first: {some(told, most=NAMED_CLASSES)}",
    ]
    if result["left_out"]:
        lines.append(f"  {counted(result['left_out'], 'image')} not judged: their class has no other picture")
    if found.run.provenance["from"]:
        lines.append("  note: the run began with the weights of another one, and these networks did not")
    shown = result["doubtful"][:SHOWN]
    lines.append(f"  labels: {result['said_of_labels']}{'; the most doubtful:' * bool(shown)}")
    for row in shown:
        named = row["file"] or f"train image {row['image']}"
        lines.append(
            f"    labelled {row['label']} ({row['label_probability']:.3f}), looks like {row['looks_like']}"
            f" ({row['looks_like_probability']:.3f}): {named}"
        )
    lines.append(f"  all images, most doubtful first: {found.folder / 'labels.csv'}")
    if shown:
        lines.append(f"  pictures of these:               {typed('fromzero', 'report', found.run.path)}")
    return printable("\n".join(lines))


def _own_validation(run: Run) -> list[str]:
    """What the run itself says by its validation images, which are fewer."""
    count = run.provenance["data"].get("subsets", {}).get("validation")
    if run.summary is None or run.recipe.validation.source == "test" or not count:
        return []
    low, high = wilson_interval(share := run.summary["val/accuracy"], count)
    return [f"  the run  {share:.4f} ({low:.4f}–{high:.4f}) on its own {counted(count, 'validation image')}"]


def _of_labels(surest: Surest, confidence: float, accuracy: float) -> str:
    """What the images that networks are surest of say about all labels; confidence, accuracy: of all of them.

    Networks err, too, so it is an upper bound; and far from the truth where they are surer than they are right, as
    those are that have learned their images by heart."""
    if surest.of < FEWEST_SURE:
        return f"how many are wrong takes {10 * FEWEST_SURE} images to say"
    if surest.confidence < SURE:
        return "the networks are not sure enough of any image to say how many are wrong"
    low, high = wilson_interval(surest.wrong / surest.of, surest.of)
    said = (
        f"of the {surest.of:,} images that the networks are surest of (probability {surest.confidence:.2f}),"
        f" {surest.wrong:,} are labelled otherwise: {low:.1%} to {high:.1%} (95 %)"
    )
    if not surest.wrong:
        return f"{said}; no sign of wrong labels"
    if confidence > accuracy:
        too_sure = f"these networks are too sure: {confidence:.2f} on average, right {accuracy:.2f}"
        return f"{said}; fewer labels may be wrong, as {too_sure}"
    return f"{said}; about that share of all labels is wrong, or less"


def _accuracy(right: np.ndarray) -> dict[str, Any]:
    """Of images that were right or not, bool (N,): how many, the share that was, and its 95 % interval."""
    if not len(right):
        return {"images": 0, "accuracy": None, "interval": None}
    share = float(right.mean())
    return {"images": len(right), "accuracy": share, "interval": list(wilson_interval(share, len(right)))}
