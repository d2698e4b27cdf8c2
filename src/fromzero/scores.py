"""What a run's weights score: a record, which is JSON, and the same in words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fromzero.curves import validation_label
from fromzero.data.pictures import SPLITS, Wrong, labelled_pictures, unreadable
from fromzero.errors import InputError, counted
from fromzero.evaluate import Normalise, evaluate
from fromzero.machine import Machine
from fromzero.runs import Run
from fromzero.splits import Subset
from fromzero.stats import wilson_interval
from fromzero.trained import Classifier, Trained


def own_scores(trained: Trained, views: str = "none") -> dict[str, Any]:
    """The scores on a run's own images; on its test images once it has ended. Raises NonFiniteError."""
    run, images, data = trained.run, trained.images, trained.data
    subsets = {"train": data.clean_train, "val": data.validation}
    notes = [validation_label(run.recipe, own=images.validation is not None), *images.notes]
    if ended := run.summary is not None:
        subsets["test"] = data.test
    else:
        later = "; the test images are scored when it does, so that nothing is chosen by them"
        notes.insert(0, f"the run has not ended{later if run.recipe.validation.source == 'split' else ''}")
    weights = trained.checkpoint_path.stem
    return {
        **_how(run, f"{weights} weights, of {trained.reached}", weights, views, trained.machine),
        "ended": ended,
        "epoch": trained.epochs,
        "validation": run.recipe.validation.source,
        "notes": notes,
        "scores": _scores(trained.network, subsets, data.normalise, trained.machine, views, images.class_names),
    }


def scores_on(
    folder: Path, classifier: Classifier, weights: str, views: str = "none"
) -> tuple[dict[str, Any], list[Path], dict[int, Wrong]]:
    """The scores on the pictures of a folder with a folder for each class, or some of them; their paths, and what is
    wrong with those that cannot be read. weights: `last` or `best`, as they were loaded. Raises InputError where there
    is nothing to score, and NonFiniteError."""
    run, network, normalise, _, names, here = classifier
    paths, truth, notes = labelled_pictures(folder, names)
    pixels, read, wrong = classifier.read(paths)
    if not read:
        raise InputError(unreadable(paths, wrong))
    source, asked = Path(run.provenance["data"]["source"]), folder.resolve()
    if asked == source or (asked.parent == source and asked.name.lower() in SPLITS["train"]):
        apart = f"fromzero evaluate {shlex.quote(str(run.path))}"
        notes.append(f"the run was trained on pictures in it: this says little of new ones; its own test: {apart}")
    these = Subset(pixels, torch.from_numpy(truth[read]).to(here.device))
    record = {
        **_how(run, f"{weights} weights, on {folder}", weights, views, here),
        "notes": notes,
        "scores": _scores(network, {"these": these}, normalise, here, views, names),
    }
    return record, paths, wrong


def _how(run: Run, what: str, weights: str, views: str, here: Machine) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "recipe": run.recipe.name,
        "what": what,
        "checkpoint": weights,
        "tta": views,
        "device": here.device,
        "precision": here.precision,
    }


def _scores(
    network: nn.Module,
    subsets: Mapping[str, Subset],
    normalise: Normalise,
    here: Machine,
    views: str,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """By the name of the images: how many, accuracy with its 95 % interval by that number, mean loss in nats, and by
    class how many and their accuracy, None where there is no image."""
    found = {}
    for label, subset in subsets.items():
        outcomes = evaluate(network, *subset, normalise, here, views=views)
        images, classes = len(outcomes.labels), len(class_names)
        counts = np.bincount(outcomes.labels.cpu(), minlength=classes).tolist()
        recalls = [None if math.isnan(recall) else recall for recall in outcomes.recalls(classes)]
        found[label] = {
            "images": images,
            "accuracy": outcomes.accuracy,
            "interval": wilson_interval(outcomes.accuracy, images),
            "loss": outcomes.loss,
            "class_images": dict(zip(class_names, counts, strict=True)),
            "recalls": dict(zip(class_names, recalls, strict=True)),
        }
    return found


def scores_text(record: Mapping[str, Any]) -> str:
    """A record of scores in words; by class those of its last images."""
    lines = ["{run}: {recipe}, {what}, {device}, {precision}".format_map(record)]
    if record["tta"] != "none":
        lines.append(f"  with test-time augmentation ({record['tta']}): not to be compared with figures without")
    lines += [f"  note: {note}" for note in record["notes"]]
    for label, score in record["scores"].items():
        low, high = score["interval"]
        interval = f"{low:.4f}–{high:.4f}, 95 % for {counted(score['images'], 'image')}"
        shown = "train (clean)" if label == "train" else label
        lines.append(f"  {shown:<28} accuracy {score['accuracy']:.4f} ({interval})  loss {score['loss']:.4f}")
    counts = list(score["class_images"].values())
    each = f", {counted(counts[0], 'image')} each" if len(set(counts)) == 1 else ""
    by_class = (
        f"{name} {recall:.3f}{'' if each else f' (of {count:,})'}" if count else f"{name} no image"
        for (name, recall), count in zip(score["recalls"].items(), counts, strict=True)
    )
    return "\n".join([*lines, f"  {label} accuracy by class{each}: " + ", ".join(by_class)])
