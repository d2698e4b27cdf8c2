"""What the records of a run hold, and reading them: JSON that is checked before anything relies on it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import pydantic

from fromzero.errors import FromzeroError, ReadError, is_passing

# What is read of a run's records, and so must be there and be of that type; whatever else they hold is kept.
FIGURES = tuple(f"{curve}{what}" for curve in ("train/", "train/running_", "val/") for what in ("accuracy", "loss"))
ROW_KEYS = ("epoch", "step", "learning_rate", *FIGURES, "time/seconds")
SUMMARY_KEYS = (
    "epoch",
    *(f"{of}/accuracy" for of in ("train", "val", "best/val", "test")),
    "test/loss",
    "time/seconds",
)


class _Machine(pydantic.BaseModel):
    device: str
    threads: int
    precision: str


class _Fingerprints(pydantic.BaseModel):
    train: str
    test: str


class _Normalise(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

    shift: list[float]
    scale: list[float]


class _Data(pydantic.BaseModel):
    name: str
    source: str
    fingerprints: _Fingerprints
    order: str
    classes: list[str] = pydantic.Field(min_length=1)
    image_shape: list[Annotated[int, pydantic.Field(ge=1, le=10_000)]] = pydantic.Field(min_length=3, max_length=3)
    normalise: _Normalise
    held_out: str | None = None
    images: dict[str, int] = {}
    subsets: dict[str, int] = {}


class _Ended(pydantic.BaseModel):
    epoch: int


class _Resumed(pydantic.BaseModel):
    machine: _Machine
    switches: dict[str, str] = {}
    epochs: list[int] = []
    summary: _Ended | None = None


class _Origin(pydantic.BaseModel):
    run: str
    path: str = ""
    started: str = ""
    recipe: str
    step: int | None
    left: list[str]
    seen: int | None = None
    seen_test: int | None = 0


class Provenance(pydantic.BaseModel):
    """provenance.json: where a run's figures come from. `origin`: the run from whose weights it began, as it was typed,
    its whole `path` and when it was `started`, the tensors that it `left` and how many of its validation images that
    one, or those it began with, had `seen` in training, and of its test images (`seen_test`), None where that cannot be
    told; `data.order`: digest of the images in their order, `data.held_out`: of those that it validates on; `resumed`:
    a note for each time that it was gone on with."""

    machine: _Machine
    switches: dict[str, str] = {}
    data: _Data
    started: str
    versions: dict[str, str] = {}
    commit: str | None
    recipe: dict[str, Any] = pydantic.Field(min_length=1)
    origin: _Origin | None = pydantic.Field(alias="from")
    resumed: list[_Resumed]


class _Finding(pydantic.BaseModel):
    name: str
    meaning: str
    evidence: str
    remedy: str
    study: str | None


class Diagnosis(pydantic.BaseModel):
    """diagnosis.json: what `diagnose` said, after which epoch and how many steps of the next."""

    epoch: int
    steps: int = 0
    findings: list[_Finding]
    remarks: list[str]
    cross_validated: bool | None = None


class _Doubtful(pydantic.BaseModel):
    image: int = pydantic.Field(ge=0)
    file: str | None
    label: str
    label_probability: float
    looks_like: str
    looks_like_probability: float


class FoldResult(pydantic.BaseModel):
    """folds/result.json: accuracy on all train images by networks that had not seen them, and its 95 % interval;
    `doubtful`: images that look like another class than their label's, the least likely first."""

    model_config = pydantic.ConfigDict(allow_inf_nan=False)

    recipe: str
    epochs: int
    folds: int
    images: int
    accuracy: float
    interval: list[float] = pydantic.Field(min_length=2, max_length=2)
    said_of_labels: str
    doubtful: list[_Doubtful]


def read_record(path: Path, model: type[pydantic.BaseModel], mend: str) -> dict[str, Any]:
    """The JSON object in that file, which holds what `model` asks for. Raises FromzeroError, with what to do (`mend`),
    when it is damaged or not there, ReadError when it cannot be read."""
    found = read_object(path, mend)
    try:
        model.model_validate(found, strict=True)
    except pydantic.ValidationError as error:
        raise FromzeroError(f"{path}: {damage(error)}; {mend}") from None
    return found


def damage(error: pydantic.ValidationError) -> str:
    """What is wrong first in a record, in words."""
    first = error.errors()[0]
    return f"damaged: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"


def read_object(path: Path, mend: str = "") -> dict[str, Any]:
    """The JSON object in that file. Raises FromzeroError when it is damaged or not there, with what to do then
    (`mend`), ReadError when it cannot be read."""
    then = f"; {mend}" if mend else ""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FromzeroError(f"{path}: damaged: {error}{then}") from None
    except OSError as error:
        if is_passing(error):
            raise ReadError(f"{path}: cannot be read: {error.strerror}") from None
        raise FromzeroError(f"{path}: {error.strerror}{then}") from None
    if not isinstance(found, dict):
        raise FromzeroError(f"{path}: damaged: expected an object{then}")
    return found


def is_figure(key: str, value: object) -> bool:
    """Whether a record may have that value there: a number; of an accuracy, a share."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    if abs(value) > sys.float_info.max or math.isnan(value):  # of integers that are no floats, too
        return False
    return 0 <= value <= 1 if key.endswith("accuracy") else True
