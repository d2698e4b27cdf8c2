"""What a run's weights score: a record, which is JSON, and the same in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fromzero.data.decoding import unreadable
from fromzero.data.listing import SPLITS, labelled_pictures
from fromzero.data.pictures import DAMAGED_SHARE, TOO_MANY
from fromzero.errors import InputError, command_line, counted, some
from fromzero.evaluate import Outcomes, evaluate, probabilities
from fromzero.runs import Run
from fromzero.splits import Subset, validation_label
from fromzero.stats import wilson_interval
from fromzero.terminal import in_brackets
from fromzero.trained import Classifier, Trained

NOT_TRAINED_ON = "not_trained_on"  # of pictures of which others were
LISTED, CONFUSED = 10, 5  # mistakes, and pairs of classes, in the text; JSON has all


def own_scores(trained: Trained, views: str = "none") -> dict[str, Any]:
    """The scores on a run's own images; on its test images once it has ended. Raises NonFiniteError."""
    run, images, data = trained.run, trained.images, trained.data
    subsets = {"train": data.clean_train, "val": data.validation}
    if run.summary is not None:
        subsets["test"] = data.test
    return {
        **_how(trained, f"of {trained.reached}", views),
        "validation": run.recipe.validation.source,
        "notes": [*doubts(trained), validation_label(run.recipe, images), *images.notes],
        "scores": {
            name: _score(
                evaluate(trained.network, *subset, data.normalise, trained.machine, views=views), images.class_names
            )
            for name, subset in subsets.items()
        },
    }


def scores_on(folder: Path, classifier: Classifier, views: str = "none") -> dict[str, Any]:
    """The scores on the pictures of a folder with a folder for each class, or some of them, and on those of them that
    were not trained on where others were; those that cannot be read are noted. Raises InputError where these are more
    than DAMAGED_SHARE, as for training, and NonFiniteError."""
    run = classifier.run
    pictures = pictures_of(folder, classifier)
    step = classifier.checkpoint.state.get("step")
    within = f" (step {step:,})" if step and run.summary is None else ""
    outcomes = evaluate(classifier.network, *pictures.subset, classifier.normalise, classifier.machine, views=views)
    scored = {"these": outcomes}
    new = [index for index, seen in enumerate(pictures.trained_on) if not seen]
    if 0 < len(new) < len(pictures.paths):
        scored[NOT_TRAINED_ON] = Outcomes(*(of_all[new] for of_all in outcomes))
    return {
        **_how(classifier, f"of epoch {classifier.checkpoint.epochs}{within}, on {folder}", views),
        "left_out": pictures.left_out,
        "trained_on": sum(pictures.trained_on),
        "notes": [*doubts(classifier), *pictures.notes],
        "scores": {name: _score(of, classifier.class_names) for name, of in scored.items()},
        "mistakes": _mistakes(outcomes, pictures, classifier),
    }


def _mistakes(outcomes: Outcomes, pictures: Pictures, classifier: Classifier) -> list[dict[str, Any]]:
    """The pictures whose class was not predicted, those that the network is surest of first."""
    predictions = outcomes.predictions
    wrong = (predictions != outcomes.labels).nonzero().squeeze(1)
    said = predictions[wrong]
    sure = probabilities(outcomes.outputs[wrong], classifier.temperature).gather(1, said[:, None]).squeeze(1)
    names = classifier.class_names
    found = zip(wrong.tolist(), outcomes.labels[wrong].tolist(), said.tolist(), sure.tolist(), strict=True)
    return [
        {"picture": str(pictures.paths[at]), "label": names[label], "prediction": names[other], "probability": share}
        for at, label, other, share in sorted(found, key=lambda one: -one[3])
    ]


class Pictures(NamedTuple):
    """Labelled pictures of a folder, their files, how the SHA-256 (hex) of each begins and whether the weights were
    trained on it, how many could not be read and are left out, and what to know of them."""

    subset: Subset
    paths: list[Path]
    hashes: list[str]
    trained_on: list[bool]
    left_out: int
    notes: list[str]


def pictures_of(folder: Path, classifier: Classifier) -> Pictures:
    """The pictures of a folder with a folder for each class, or some of them, prepared as the run's were. Raises
    InputError where more than DAMAGED_SHARE of them cannot be read, as for training."""
    run = classifier.run
    paths, truth, notes = labelled_pictures(folder, classifier.class_names)
    pixels, hashes, read, wrong = classifier.read_hashed(paths)
    if len(wrong) > DAMAGED_SHARE * len(paths):
        raise InputError(f"{unreadable(paths, wrong)}; {TOO_MANY}: repair or remove them")
    if wrong:
        notes.append(f"left out: {unreadable(paths, wrong)}")
    trained_on, of_training = _trained_on(run, hashes)
    source, asked = Path(run.provenance["data"]["source"]), folder.resolve()
    if not any(trained_on) and (asked == source or (asked.parent == source and asked.name.lower() in SPLITS["train"])):
        apart = command_line("fromzero", "evaluate", run.path)
        notes.append(f"the run was trained on pictures in it: this says little of new ones; its own test: {apart}")
    these = Subset(pixels, torch.from_numpy(truth[read]).to(classifier.machine.device))
    files = [paths[index] for index in read]
    return Pictures(these, files, hashes, trained_on, len(wrong), [*notes, *of_training])


def _trained_on(run: Run, hashes: Sequence[str]) -> tuple[list[bool], list[str]]:
    """Which of these files are, by their content, ones that the run or those with whose weights it began were trained
    on; and how many of them, and of those that validated it, in words."""
    notes, ever = [], set[str]()
    for one in run.lineage():
        known = _hashes_of("train", one)
        ever |= known
        of = "of the run" if one is run else f"of {one.path}, with whose weights it began"
        if seen := sum(begin in known for begin in hashes):
            are = "is a train picture" if seen == 1 else "are train pictures"
            notes.append(f"{seen:,} of these {len(hashes):,} pictures {are} {of}, to the byte")
        if not known and one is not run:
            notes.append(f"it began with the weights of {one.path}, which may have been trained on these pictures")
    if origin := one.provenance["from"]:
        notes.append(f"it began with the weights of {origin['run']}, which may have been trained on these pictures")
    on_test = run.recipe.validation.source == "test"
    validated = _hashes_of("test" if on_test else "validation", run) - ever
    if seen := sum(begin in validated for begin in hashes):
        notes.append(f"{seen:,} of these {len(hashes):,} pictures validated the run, to the byte")
    return [begin in ever for begin in hashes], notes


def _hashes_of(split: str, run: Run) -> set[str]:
    """How the SHA-256 (hex) of each picture of a split begins, as far as that is recorded."""
    return {row["sha256"] for row in run.pictures if row.get("split") == split and row.get("sha256")}


def doubts(of: Trained | Classifier) -> list[str]:
    """What speaks against taking these weights for the run's outcome."""
    found = []
    if of.run.summary is None:
        on_own_test = isinstance(of, Trained) and of.run.recipe.validation.source != "test"
        later = "; the test images are scored when it does, so that nothing is chosen by them" if on_own_test else ""
        found.append(f"the run has not ended{later}")
    if isinstance(of, Trained):
        found += of.run.doubts
    if of.checkpoint.state.get("step") == 0:
        found.append("these are the weights it began with; none has been saved since")
    return found


def _how(of: Trained | Classifier, what: str, views: str) -> dict[str, Any]:
    return {
        "run": str(of.run.path),
        "recipe": of.run.recipe.name,
        "checkpoint": of.checkpoint.file.stem,
        "epoch": of.checkpoint.epochs,
        "ended": of.run.summary is not None,
        "what": what,
        "tta": views,
        "device": of.machine.device,
        "precision": of.machine.precision,
    }


def _score(outcomes: Outcomes, class_names: Sequence[str]) -> dict[str, Any]:
    """How many images, accuracy with its 95 % interval by that number, mean loss in nats; by class how many, the share
    of them that is found (recall) and of those taken for it the share that is right (precision), None where there is
    none; and of each class how many were taken for which (those that any were)."""
    images, classes = len(outcomes.labels), len(class_names)
    by_class = outcomes.by_class(classes)
    confusions = outcomes.confusions(classes)
    said = confusions.sum(0).tolist()
    return {
        "images": images,
        "accuracy": outcomes.accuracy,
        "interval": wilson_interval(outcomes.accuracy, images),
        "balanced_accuracy": outcomes.balanced_accuracy,
        "loss": outcomes.loss,
        "class_images": {name: count for name, (_, count) in zip(class_names, by_class, strict=True)},
        "recalls": {
            name: right / count if count else None for name, (right, count) in zip(class_names, by_class, strict=True)
        },
        "precisions": {
            name: right / count if count else None
            for name, (right, _), count in zip(class_names, by_class, said, strict=True)
        },
        "taken_for": {
            name: {other: count for other, count in zip(class_names, row, strict=True) if count}
            for name, row in zip(class_names, confusions.tolist(), strict=True)
        },
    }


def _confused(score: Mapping[str, Any]) -> str:
    """Which class is taken for which, the commonest first; empty where none is."""
    found = [
        (count, f"{name} taken for {other} ({count:,})")
        for name, row in score["taken_for"].items()
        for other, count in row.items()
        if other != name
    ]
    return some([told for _, told in sorted(found, key=lambda one: -one[0])], most=CONFUSED)


def scores_text(record: Mapping[str, Any]) -> str:
    """A record of scores in words; by class those of its last images."""
    lines = ["{run}: {recipe}, {checkpoint} weights, {what}, {device}, {precision}".format_map(record)]
    if record["tta"] != "none":
        lines.append(f"  with test-time augmentation ({record['tta']}): not comparable with figures without")
    shown = {"train": "train (clean)", "these": "these pictures", NOT_TRAINED_ON: "those not trained on"}
    if "these" in record["scores"] and record["trained_on"] == record["scores"]["these"]["images"]:
        shown["these"] = "these, all trained on"
    for label, score in record["scores"].items():
        interval = in_brackets(score["interval"], score["images"])
        lines.append(
            f"  {shown.get(label, label):<28} accuracy {score['accuracy']:.4f} ({interval})  loss {score['loss']:.4f}"
        )
    counts = list(score["class_images"].values())
    each = f", {counted(counts[0], 'image')} each" if len(set(counts)) == 1 else ""
    by_class = (
        f"{name} {recall:.3f}{'' if each else f' (of {count:,})'}" if count else f"{name} no image"
        for (name, recall), count in zip(score["recalls"].items(), counts, strict=True)
    )
    mean = "" if each else f" (mean {score['balanced_accuracy']:.4f})"
    of = {"these": "", NOT_TRAINED_ON: "their "}.get(label, f"{label} ")
    lines.append(f"  {of}accuracy by class{mean}{each}: " + ", ".join(by_class))
    if confused := _confused(score):
        lines.append(f"  confused: {confused}")
    if mistakes := record.get("mistakes"):
        more = f", the surest {LISTED} of {len(mistakes):,} (--json lists all)" if len(mistakes) > LISTED else ""
        among = f" among all {record['scores']['these']['images']:,}" if NOT_TRAINED_ON in record["scores"] else ""
        lines.append(f"  mistakes{among}, by the network or in the label{more}:")
    for one in (mistakes or [])[:LISTED]:
        lines.append("    labelled {label}, looks like {prediction} ({probability:.3f}): {picture}".format_map(one))
    return "\n".join([*lines, *(f"  note: {note}" for note in record["notes"])])
