"""What a diagnosis leaves in the run folder: diagnosis.json, and for each remedy the study that tests it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from fromzero.data import split_name
from fromzero.diagnosis import Finding
from fromzero.errors import FromzeroError
from fromzero.evidence import Measures
from fromzero.files import write_atomically, write_json
from fromzero.recipe import Recipe
from fromzero.runs import Run

STUDY_SEEDS = 6  # the fewest pairs that can settle anything


def study_text(finding: Finding, recipe: Recipe, dataset: str | None = None) -> str:
    """The study, as TOML beside the run's recipe, that tests a finding's remedy: the recipe as it is and remedied, with
    the same seeds, on held-out train images. dataset: where they are, if not where the recipe says."""
    common: dict[str, Any] = {"epochs": recipe.epochs}  # which an extension changes in the run's recipe
    if dataset is not None:
        common["dataset"] = dataset
    if recipe.validation.source != "split":
        common["validation"] = {"source": "split"}
    return tomli_w.dumps(
        {
            "claim": f"With {finding.changed} validation accuracy is higher than without (against {finding.name}).",
            "base": "recipe.toml",
            "recipe": common,
            "arms": {"as-it-is": {}, "remedied": dict(finding.changes)},
            "scale": {"screen": {"seeds": STUDY_SEEDS}},
        }
    )


def write_findings(
    run: Run, found: Sequence[Finding], measures: Measures, source: str, epoch: int, *, no_labels: str = ""
) -> dict[str, Path]:
    """Write diagnosis.json into the run folder, and for each finding that a recipe field can mend the study that tests
    it: name → its file. source: where the images are now; epoch: after which the run was looked at;
    no_labels: why labels could not be judged, where they could not. Raises FromzeroError where the folder cannot be
    written."""
    recipe, data = run.recipe, run.provenance["data"]
    studies: dict[str, Path] = {}
    name, options = split_name(data["name"])
    # By the whole path: the recipe names a folder from wherever the run was begun, and CIFAR-10 may lie anywhere;
    # digits come with a library, and lie nowhere.
    dataset = None if name == "digits" else source + options
    known = asdict(measures) | {"trials": {f"{factor:g}": trial for factor, trial in measures.trials.items()}}
    try:
        for finding in found:
            if finding.changes:
                path = run.path / f"{run.name}-{finding.name}.toml"
                write_atomically(path, study_text(finding, recipe, dataset).encode())
                studies[finding.name] = path
        findings = [asdict(one) | {"study": studies[one.name].name if one.name in studies else None} for one in found]
        content = {"epoch": epoch, "findings": findings, "no_labels": no_labels, "measures": _finite(known)}
        write_json(run.path / "diagnosis.json", content)
    except OSError as error:
        raise FromzeroError(
            f"{run.path}: cannot be written: {error.strerror}, so no study was left there; make the folder writable, or"
            " copy it to one that is"
        ) from None
    return studies


def _finite(value: Any) -> Any:
    """The same with None for what is not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
