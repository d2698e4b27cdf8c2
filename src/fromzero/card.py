"""A model card: what whoever is given a run's network should know of it, as a page in Markdown (Mitchell et al., 2019,
arXiv:1810.03993). It says what the run's folder records, and of what is not recorded that it is not."""

from __future__ import annotations

import re

from fromzero.data.pictures import PREPARED
from fromzero.errors import counted
from fromzero.networks import num_parameters
from fromzero.runs import Row
from fromzero.stats import wilson_interval
from fromzero.trained import Classifier


def card(classifier: Classifier) -> str:
    """The card of a run's network. Raises FromzeroError where the run's records are damaged."""
    classifier.run.check()
    run, names, (height, width, channels) = classifier.run, classifier.class_names, classifier.image_shape
    recipe, version = run.recipe, run.provenance.get("versions", {}).get("fromzero", "")
    parameters = num_parameters(recipe.network, classifier.image_shape, len(names))
    prepared = f": {PREPARED} to {width}×{height}" if channels == 3 else ""
    lines = [
        f"# {_plain(run.name)}",
        f"An image classifier of {len(names)} classes by fromzero {version}: recipe"
        f" {_code(recipe.name)}, seed {recipe.seed}; {parameters:,} parameters. {_origin(classifier)}",
        "",
        f"Classes, in the order of its output: {', '.join(map(_code, names))}.",
        "",
        "## Accuracy",
        *(f"- {line}" for line in _accuracies(classifier)),
        "",
        "## Input and output",
        f"Pixels as bytes, (N, {height}, {width}, {channels}){prepared}. Probabilities out, float32 (N, {len(names)}).",
        "",
        "## Trained on",
        _images(classifier),
        "",
        "## Before you use it",
        "- It names one of its classes whatever a picture shows, and has no word for none of them.",
        "- Its probabilities are the network's own, not how often it is right.",
        "- The test images came with those that it was trained on. Pictures that were taken in another way or place may"
        " well be recognised worse: measure it on such.",
        *(f"- {line}" for line in _findings(classifier)),
    ]
    return "\n".join(lines) + "\n"


def _origin(classifier: Classifier) -> str:
    """Where the weights come from."""
    run, found = classifier.run, classifier.checkpoint
    best = found.file.stem == "best"
    at = ", the best on validation" if best else f", at step {found.state.get('step', 0):,}"
    weights = f"Weights after epoch {found.epochs} of {run.recipe.epochs}{at}."
    origin = run.provenance["from"]
    if origin is None:
        return f"Trained from scratch. {weights}"
    return f"Trained on from the weights of another run, {_code(origin['run'])} ({_code(origin['recipe'])}). {weights}"


def _row(classifier: Classifier) -> Row | None:
    """The figures that were recorded of exactly these weights: a stop within an epoch leaves others."""
    found, rows = classifier.checkpoint, classifier.run.metrics()
    if not 1 <= found.epochs <= len(rows):
        return None
    row = rows[found.epochs - 1]
    return row if found.state.get("step", row["step"]) == row["step"] else None  # best weights do not know theirs


def _accuracies(classifier: Classifier) -> list[str]:
    """What is recorded of these weights."""
    run, row, provenance = classifier.run, _row(classifier), classifier.run.provenance
    if row is None:
        return ["Nothing is recorded of exactly these weights: `fromzero evaluate` scores them."]
    count = provenance["data"].get("images", {}).get("test")
    train = f"Train images, or a fixed part of them, without dropout and augmentation: {row['train/accuracy']:.4f}."
    seeds = "Of one training: another seed has other figures."
    if run.recipe.validation.source == "test":
        watched = "training was watched by the same images"
        if classifier.checkpoint.file.stem == "best":
            watched = "these weights were chosen by the same images, so it flatters"
        return [f"Test images: {_with_interval(row['val/accuracy'], count)}; {watched}.", train, seeds]
    test = "not recorded"
    if run.summary is not None and run.summary["epoch"] == row["epoch"]:
        test = _with_interval(run.summary["test/accuracy"], count)
        if any(before.get("summary") for before in provenance["resumed"]):
            test += "; they had been scored before, and the run was extended then"
    return [f"Test images: {test}.", f"Validation images: {row['val/accuracy']:.4f}.", train, seeds]


def _with_interval(accuracy: float, count: int | None) -> str:
    """An accuracy with its interval by the number of images, where that is recorded."""
    if not count:
        return f"**{accuracy:.4f}**"
    low, high = wilson_interval(accuracy, count)
    return f"**{accuracy:.4f}** ({low:.4f}–{high:.4f}, 95 % for {counted(count, 'image')})"


def _images(classifier: Classifier) -> str:
    """What it was trained on, in words."""
    data, source = classifier.run.provenance["data"], classifier.run.recipe.validation.source
    counts = data.get("images", {})
    of = ", ".join(counted(count, f"{split} image") for split, count in counts.items()) or "images that are not counted"
    held_out = ", a part of the train images held out" if source == "split" and "validation" not in counts else ""
    validation = "the test images" if source == "test" else "validation images"
    prints = ", ".join(f"{split} {found[:12]}" for split, found in data["fingerprints"].items())
    return f"{_code(data['name'])}: {of}; watched by {validation}{held_out}. fromzero's fingerprints: {prints}."


def _findings(classifier: Classifier) -> list[str]:
    """What `fromzero diagnose` said, where it was asked."""
    diagnosis = classifier.run.diagnosis
    if diagnosis is None:
        return ["The training was not looked at by `fromzero diagnose`."]
    of = f"`fromzero diagnose`, after epoch {diagnosis['epoch']}"
    found = [f"{of}: *{one['name']}*: {one['meaning']}; {one['evidence']}." for one in diagnosis["findings"]]
    return [*(found or [f"{of}: no finding."]), *(f"{of}: {_plain(remark)}" for remark in diagnosis["remarks"])]


def _plain(text: str) -> str:
    """Text on one line."""
    return re.sub(r"\s+", " ", text)


def _code(name: str) -> str:
    """A name as a code span, whatever it contains."""
    name = _plain(name)
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))
    return f"{fence} {name} {fence}" if "`" in name else f"`{name}`"
