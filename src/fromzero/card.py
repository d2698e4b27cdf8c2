"""A model card: what whoever is given a run's network should know of it, as a page in Markdown (Mitchell et al., 2019,
arXiv:1810.03993)."""

from __future__ import annotations

from typing import Any

from fromzero.data.pictures import PREPARED
from fromzero.errors import counted
from fromzero.networks import num_parameters
from fromzero.runs import last_machine
from fromzero.stats import wilson_interval
from fromzero.trained import Classifier


def card(classifier: Classifier) -> str:
    """The card of a run's network, from the run's folder alone. Raises FromzeroError where its records are damaged."""
    run, names, (height, width, channels) = classifier.run, classifier.class_names, classifier.image_shape
    recipe, data = run.recipe, run.provenance["data"]
    parameters = num_parameters(recipe.network, classifier.image_shape, len(names))
    version = run.provenance.get("versions", {}).get("fromzero", "")
    which = "best on validation" if classifier.checkpoint.file.stem == "best" else "the last"
    prepared = f": {PREPARED} to {width}×{height}" if channels == 3 else ""
    counts = data.get("images", {})
    of = ", ".join(f"{counted(count, f'{split} image')}" for split, count in counts.items()) or "as its run recorded"
    if "validation" not in counts and recipe.validation.source == "split":
        of += f"; {100 * recipe.validation.fraction:.4g} % of the train images were held out for validation"
    lines = [
        f"# {run.name}",
        f"An image classifier of {len(names)} classes, trained from scratch by fromzero {version}:"
        f" recipe `{recipe.name}`, seed {recipe.seed}; {parameters:,} parameters. Weights: {which}, of epoch"
        f" {classifier.checkpoint.epochs} of {recipe.epochs}.",
        "",
        f"Classes, in the order of its output: {', '.join(f'`{name}`' for name in names)}.",
        "",
        "## Accuracy",
        *(f"- {line}" for line in _accuracies(classifier)),
        "",
        "## Input and output",
        f"Pixels as bytes, (N, {height}, {width}, {channels}){prepared}. Probabilities out, float32 (N, {len(names)}).",
        "",
        "## Trained on",
        f"`{data['name']}`: {of}. SHA-256 of the train images"
        f" {data['fingerprints']['train'][:12]}…, of the test images {data['fingerprints']['test'][:12]}….",
        "",
        "## Before you use it",
        "- It names one of its classes whatever a picture shows, and has no word for none of them.",
        "- Its probabilities are the network's own, not how often it is right.",
        "- The test images came with those that it was trained on. Pictures that were taken in another way or place may"
        " well be recognised worse: measure it on such.",
        *(f"- {line}" for line in _findings(classifier)),
    ]
    return "\n".join(lines) + "\n"


def _accuracies(classifier: Classifier) -> list[str]:
    """What is recorded of these weights."""
    run, epoch = classifier.run, classifier.checkpoint.epochs
    rows, summary, provenance = run.metrics()[:epoch], run.summary, run.provenance
    if not rows:
        return ["Nothing is recorded of them: they are those that it began with."]
    val, train = rows[-1]["val/accuracy"], rows[-1]["train/accuracy"]
    if run.recipe.validation.source == "test":
        found = [f"Test images: {_with_interval(val, provenance)}; training was watched by the same images."]
    else:
        scored = summary is not None and summary["epoch"] == epoch
        test = _with_interval(summary["test/accuracy"], provenance) if summary and scored else "not scored"
        found = [f"Test images: {test}; they decided nothing.", f"Validation images: {val:.4f}."]
    found.append(f"Train images, without dropout and augmentation: {train:.4f}.")
    precision = last_machine(provenance)["precision"]
    return [*found, f"By one training, in {precision}: another seed has other figures."]


def _with_interval(accuracy: float, provenance: dict[str, Any]) -> str:
    """An accuracy on the test images with its interval by their number, where that is recorded."""
    count = provenance["data"].get("images", {}).get("test")
    if not count:
        return f"**{accuracy:.4f}**"
    low, high = wilson_interval(accuracy, count)
    return f"**{accuracy:.4f}** ({low:.4f}–{high:.4f}, 95 % for {counted(count, 'image')})"


def _findings(classifier: Classifier) -> list[str]:
    """What `fromzero diagnose` found, where it was asked."""
    diagnosis = classifier.run.diagnosis
    if diagnosis is None:
        return ["The training was not looked at by `fromzero diagnose`."]
    of = f"`fromzero diagnose`, after epoch {diagnosis['epoch']}"
    found = [f"{of}: *{one['name']}*: {one['meaning']}; {one['evidence']}." for one in diagnosis["findings"]]
    return found or [f"{of}, found nothing wrong."]
