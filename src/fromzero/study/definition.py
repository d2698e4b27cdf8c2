"""A study as data: one claim, arms that differ in named recipe fields, comparisons, seeds and a scale.

A study is read from TOML and resolved completely before anything runs: every arm is a whole recipe. What does not fit
is an InputError that names the file and the line.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pydantic
from pydantic import Field

from fromzero.changes import DATA_FIELDS, differing_fields, notes_on_changes, value_text
from fromzero.data import split_name
from fromzero.errors import InputError, counted, nearest
from fromzero.recipe import Recipe, field_types, load_recipe
from fromzero.shipped import names_of, text_of
from fromzero.stats import Direction

METRICS = {  # what a row of metrics records, and what follows from it: key → whether it is a share (shown in points)
    "val/accuracy": True,
    "val/balanced_accuracy": True,  # the mean of the classes' accuracies
    "val/loss": False,
    "train/accuracy": True,
    "train/loss": False,
    "train/running_accuracy": True,
    "train/running_loss": False,
    "generalisation_gap": True,  # train/accuracy - val/accuracy
}
SETTING = ("epochs", "batch_size", *DATA_FIELDS)
CLAIM = "claim"
Refuse = Callable[[tuple[str, ...], str], NoReturn]  # (where in the file, what is wrong there)
TUNING_SEEDS_FROM = 1000  # beyond the seeds of the arms
MOST_SEEDS = TUNING_SEEDS_FROM
LONGEST_NAME = 100


class Contrast(NamedTuple):
    """One comparison of two arms. Holm's correction goes over those of one `group`; the group "claim" decides."""

    arm: str
    against: str
    metric: str
    direction: Direction
    margin: float
    group: str


@dataclass(frozen=True)
class Arm:
    """A way to train: a whole recipe (seed 0), the arm it is described by (the first, or the one it is `like`) and
    what it changes against that one, and the arm, if any, from whose last weights (same seed) it starts."""

    name: str
    recipe: Recipe
    like: str
    changes: dict[str, Any]
    after: str | None


@dataclass(frozen=True)
class Tuning:
    """A sweep: for each arm equally many values of one field, each trained with `seeds` seeds of their own."""

    field: str
    values: dict[str, tuple[float, ...]]
    seeds: int


@dataclass(frozen=True)
class Study:
    """A study at one scale, with the seeds `first_seed`, `first_seed` + 1 … `text` is its file, and `label` what the
    user calls that."""

    name: str
    claim: str
    notes: str
    remark: str
    metric: str
    arms: dict[str, Arm]
    contrasts: tuple[Contrast, ...]
    seeds: int
    first_seed: int
    scale: str
    tuning: Tuning | None
    base: Recipe
    text: str
    label: str

    @property
    def first(self) -> Arm:
        """The arm that others are compared with and described by, where they do not say otherwise."""
        return next(iter(self.arms.values()))

    def changes_of(self, arm: Arm) -> dict[str, Any]:
        """What an arm changes in the one it is described by; study and scale in the base, for the first arm, but for
        what `setting` says."""
        if arm.name != self.first.name:
            return arm.changes
        changes = differing_fields(self.base, arm.recipe)
        return {path: value for path, value in changes.items() if path not in SETTING}

    @property
    def seed_range(self) -> range:
        """The seeds that each arm is trained with."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def in_words(self, arm: Arm, mark: str = "") -> str:
        """What an arm is: base or other arm, what it changes in that, each change between marks, and where it starts.
        Of the first arm it leaves out what `setting` says."""
        changes = self.changes_of(arm)
        said = ", ".join(f"{mark}{path} = {value_text(value)}{mark}" for path, value in changes.items())
        if arm.name == self.first.name:
            said = f"{self.base.name} with {said}" if said else self.base.name
        elif not said or arm.like != self.first.name:
            said = f"like {arm.like}: {said}" if said else f"like {arm.like}"
        return said + (f"; starts from the weights of {arm.after}" if arm.after else "")

    def notes_on(self, arm: Arm, tuned: bool = False) -> list[str]:
        """What whoever wrote the arm should know of what it changes, and of what it leaves; tuned: a sweep sets a
        field."""
        swept = {self.tuning.field: None} if tuned and self.tuning else {}
        reference = self.base if arm.name == self.first.name else self.arms[arm.like].recipe
        return notes_on_changes(reference, arm.recipe, swept | self.changes_of(arm))

    def setting(self, own_validation: bool) -> str:
        """What arms that do not say otherwise have in common, in words; own_validation: the images have such."""
        recipe = self.first.recipe
        validation, held = recipe.validation, "validation images of their own"
        if validation.source == "fold":
            held = f"fold {validation.fold} of {validation.folds} for validation"
        elif not own_validation:
            held = f"{100 * validation.fraction:.4g}% of them for validation"
        return f"{held}, {counted(recipe.epochs, 'epoch')}, batches of {recipe.batch_size}"

    def refuse(self, path: tuple[str, ...], message: str) -> NoReturn:
        """Raise the InputError that names the line where `path` stands in the file."""
        refuse(self.label, lines_of(self.text), path, message)


class _Table(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Comparison(_Table):
    arm: str
    against: str | None = None
    metric: str | None = None
    direction: Direction | None = None
    margin: float | None = Field(None, ge=0)
    group: str = CLAIM


class _Tuning(_Table):
    field: str = "optimizer.learning_rate"
    values: dict[str, tuple[float, ...]]
    seeds: int = Field(2, ge=1, le=1000)


class _File(_Table):
    claim: str = Field(min_length=1)
    notes: str = ""
    remark: str = ""
    base: str
    metric: str = "val/accuracy"
    direction: Direction = "higher"
    margin: float = Field(0.0, ge=0)
    recipe: dict[str, Any] = {}
    arms: dict[str, dict[str, Any]]
    comparisons: tuple[_Comparison, ...] = ()
    scale: dict[str, dict[str, Any]]
    tuning: _Tuning | None = None


def figure(value: float, metric: str, *, sign: bool = False) -> str:
    """A difference of that metric: shares in points, losses in nats."""
    text = f"{100 * value:{'+' if sign else ''}.2f}" if METRICS[metric] else f"{value:{'+' if sign else ''}.4f}"
    return text.replace("-", "−")


def unit(metric: str) -> str:
    """In what `figure` shows that metric."""
    return "points" if METRICS[metric] else "nats"


def study_names() -> list[str]:
    """Names of the studies that come with fromzero."""
    return names_of("study")


def load_study(
    source: str | Path,
    scale: str = "screen",
    *,
    seeds: int | None = None,
    first_seed: int | None = None,
    name: str | None = None,
    base: Recipe | None = None,
    label: str | None = None,
) -> Study:
    """The built-in study of that name, or the one in that TOML file, at one of its scales.

    seeds, first_seed: how many, and from which on, instead of the scale's; name, base, label: instead of the file's (a
    study that has run keeps copies; the label is what the user called it). Raises InputError, naming file and line, for
    anything that does not fit.
    """
    text, label = text_of("study", source), label or str(source)
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{label}: not valid TOML: {error}") from None
    lines = lines_of(text)
    try:
        file = _File.model_validate(tree)
    except pydantic.ValidationError as error:
        _refuse_first(label, lines, error)

    def wrong(path: tuple[str, ...], message: str) -> NoReturn:
        refuse(label, lines, path, message)

    if scale != Path(scale).name:
        wrong(("scale", scale), f"scale {scale!r} cannot be part of a folder's name")
    if scale not in file.scale:
        raise InputError(f"{label}: has no scale {scale!r}{nearest(scale, file.scale)}")
    if base is None:
        beside = Path(source).parent / file.base
        recorded = Path(source).with_name("base.toml")
        if Path(source).name == "study.toml" and recorded.is_file() and recorded.with_name("study.json").is_file():
            beside = recorded  # in the folder that a study leaves
        try:
            base = load_recipe(beside if beside.is_file() else file.base)
        except InputError as error:
            wrong(("base",), str(error))
    name = name or Path(source).stem
    settings = dict(file.scale[scale])
    images, scale_arms = settings.pop("images", None), settings.pop("arms", {})

    def number(key: str, asked: int | None, given: Any, least: int, most: int, why: str = "") -> int:
        """What was asked for by an option, else what the scale says."""
        value = given if asked is None else asked
        if type(value) is int and least <= value <= most:
            return value
        alone = ": one run says nothing" * (key == "seeds" and value == 1)
        said = f"expected a number from {least} to {most:,}{why}, found {value!r}{alone}"
        if asked is None:
            wrong(("scale", scale, key), f"{key}: {said}")
        raise InputError(f"--{key.replace('_', '-')}: {said}")

    seeds = number("seeds", seeds, settings.pop("seeds", None), 2, MOST_SEEDS)
    latest, why = TUNING_SEEDS_FROM - seeds, f", so that the last is below {TUNING_SEEDS_FROM:,}"
    first_seed = number("first_seed", first_seed, settings.pop("first_seed", 0), 0, latest, why)
    common = _overridden(base, file.recipe, ("recipe",), wrong)
    common = _overridden(common, settings, ("scale", scale), wrong)
    if images is not None:
        if type(images) is not int or images < 1:
            wrong(("scale", scale, "images"), f"images: expected a number of train images, found {images!r}")
        stem, options = split_name(common.dataset)
        common = common.override({"dataset": f"{stem}{options.partition(':')[0]}:{images}"})
    arms = _arms(name, file.arms, scale_arms, scale, common, wrong)
    _refuse_unfair(arms, wrong)
    claim = " ".join(file.claim.split())
    if not claim.isprintable():
        wrong(("claim",), f"claim: {claim!r} has characters that cannot be printed")
    if file.metric not in METRICS:
        wrong(("metric",), _unknown_metric(file.metric))
    return Study(
        name=name,
        claim=claim,
        notes=file.notes,
        remark=file.remark,
        metric=file.metric,
        arms=arms,
        contrasts=_contrasts(file, arms, wrong),
        seeds=seeds,
        first_seed=first_seed,
        scale=scale,
        tuning=_tuning(file.tuning, arms, wrong),
        base=base,
        text=text,
        label=label,
    )


def lines_of(text: str) -> dict[tuple[str, ...], int]:
    """Line number (from 1) of every table and key of a valid TOML text by its path; the n-th of an array of tables
    has the number n in its path."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    counts: Counter[tuple[str, ...]] = Counter()
    statement, began = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement, began = (f"{statement}{line}\n", began) if statement else (f"{line}\n", number)
        try:
            paths = list(_paths(tomllib.loads(statement)))
        except (ValueError, RecursionError):  # an array or a text that goes on in the next line
            continue
        if paths and statement.lstrip().startswith("["):
            table = paths[-1]
            found.setdefault(table, began)
            if statement.lstrip().startswith("[["):
                counts[table] += 1
                table = (*table, str(counts[table] - 1))
                found[table] = began
        else:
            found |= {(*table, *path): began for path in paths}
        statement = ""
    return found


def _paths(tree: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The path of each key in nested tables, an outer one's before those within it."""
    for key, value in tree.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *path) for path in _paths(value))


def refuse(label: str, lines: Mapping[tuple[str, ...], int], path: tuple[str, ...], message: str) -> NoReturn:
    """Raise an InputError with the line of `path`, or of the nearest table around it that has one."""
    below = [line for known, line in lines.items() if known[: len(path)] == path]
    while path and path not in lines and not below:
        path = path[:-1]
        below = [line for known, line in lines.items() if path and known[: len(path)] == path]
    line = lines.get(path, min(below, default=0))
    raise InputError(f"{label}, line {line}: {message}" if line else f"{label}: {message}")


def _refuse_first(label: str, lines: Mapping[tuple[str, ...], int], error: pydantic.ValidationError) -> NoReturn:
    first = error.errors()[0]
    path = tuple(str(part) for part in first["loc"])
    shown = ".".join(path)
    if first["type"] == "missing":
        refuse(label, lines, path[:-1], f"{shown!r} is missing")
    if first["type"] == "extra_forbidden":
        inner: dict[str, type[_Table]] = {"comparisons": _Comparison, "tuning": _Tuning}
        model = inner.get(path[0], _File) if len(path) > 1 else _File
        refuse(label, lines, path, f"unknown key {shown!r}{nearest(path[-1], model.model_fields)}")
    message = "a table is meant" if first["type"] in ("dict_type", "model_type") else first["msg"]
    refuse(label, lines, path, f"{shown}: {first['input']!r}: {message[0].lower()}{message[1:]}")


def _flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every leaf, dotted keys taken apart."""
    for key, value in tree.items():
        here = (*path, *key.split("."))
        if isinstance(value, dict):
            yield from _flat(value, here)
        else:
            yield here, value


def _overridden(recipe: Recipe, tree: Mapping[str, Any], where: tuple[str, ...], wrong: Refuse) -> Recipe:
    """`recipe` with the fields of a table changed; complaints name the line of the field."""
    changes = {".".join(path): value for path, value in _flat(tree)}
    if "seed" in changes:
        wrong((*where, "seed"), "seed: every arm is trained with the same seeds; how many, say under [scale]")
    for path in changes:
        if path not in field_types():
            what = f"unknown recipe field {path!r}{nearest(path, field_types())}"
            if path == "base":
                what = "base: all arms have the study's; of two runs, fromzero compare writes a study of their recipes"
            wrong((*where, *path.split(".")), what)
    try:
        return recipe.override(changes)
    except InputError as error:
        said = str(error).removeprefix("recipe: ")
        named = next((p for p in changes if said.startswith(f"{p}:") or p.rpartition(".")[2] in said), "")
        wrong((*where, *named.split(".")) if named else where, said)


def _arms(
    study: str, tables: Mapping[str, Any], scale_tables: Any, scale: str, common: Recipe, wrong: Refuse
) -> dict[str, Arm]:
    if len(tables) < 2:
        wrong(("arms",), f"a study compares arms: expected two at least, found {len(tables)}")
    if not isinstance(scale_tables, dict) or not all(isinstance(table, dict) for table in scale_tables.values()):
        wrong(("scale", scale, "arms"), "arms: expected a table for each arm")
    for name in scale_tables:
        if name not in tables:
            wrong(("scale", scale, "arms", name), f"no arm {name!r}{nearest(name, tables)}")
    recipes: dict[str, Recipe] = {}
    arms: dict[str, Arm] = {}
    for name, table in tables.items():
        if not re.fullmatch(r"[\w.+-]+", name):
            wrong(("arms", name), f"arm {name!r}: a name has letters, digits, '-', '_', '+' and '.' only")
        if len(name) > LONGEST_NAME:
            wrong(("arms", name), f"arm {name!r}: a name has {LONGEST_NAME} letters at most, as its runs are called so")
        differences = dict(table)
        like, after = differences.pop("like", None), differences.pop("after", None)
        for key, value in (("like", like), ("after", after)):
            if value is not None and not (isinstance(value, str) and value in arms):
                wrong(("arms", name, key), f"{key}: no arm {value!r} above{nearest(str(value), arms)}")
        recipe = recipes[like] if like else common
        recipe = _overridden(recipe, differences, ("arms", name), wrong)
        recipe = _overridden(recipe, scale_tables.get(name, {}), ("scale", scale, "arms", name), wrong)
        recipes[name] = recipe
        reference = like or next(iter(recipes))
        twin = next(
            (a for a in arms.values() if not differing_fields(recipes[a.name], recipe) and a.after == after), None
        )
        if twin:
            wrong(("arms", name), f"arm {name!r} is equal to arm {twin.name!r}: nothing to compare")
        named = recipe.override({"name": f"{study}: {name}", "seed": 0})
        arms[name] = Arm(name, named, reference, differing_fields(recipes[reference], recipe), after)
    return arms


def _refuse_unfair(arms: Mapping[str, Arm], wrong: Refuse) -> None:
    first = next(iter(arms.values()))
    if first.recipe.validation.source == "test":
        wrong(
            ("recipe", "validation", "source"),
            'validation.source is test: the test images decide nothing; put validation.source = "split" under [recipe]',
        )
    for arm in arms.values():
        differing = differing_fields(first.recipe, arm.recipe)
        if field := next((field for field in DATA_FIELDS if field in differing), None):
            wrong(
                ("arms", arm.name, *field.split(".")),
                f"arm {arm.name!r} has other data than arm {first.name!r} ({field}): arms are compared on the same"
                " images and seeds; put the field under [recipe]",
            )


def _contrasts(file: _File, arms: Mapping[str, Arm], wrong: Refuse) -> tuple[Contrast, ...]:
    first, *others = arms
    given = file.comparisons or tuple(_Comparison(arm=name) for name in others)
    contrasts: list[Contrast] = []
    for number, row in enumerate(given):
        here = ("comparisons", str(number))
        against = row.against or first
        for key, name in (("arm", row.arm), ("against", against)):
            if name not in arms:
                wrong((*here, key), f"{key}: no arm {name!r}{nearest(name, arms)}")
        if row.arm == against:
            wrong((*here, "arm"), f"arm {row.arm!r} is compared with itself")
        metric = row.metric or file.metric
        if metric not in METRICS:
            wrong((*here, "metric"), _unknown_metric(metric))
        same = {(row.arm, against, metric, row.group), (against, row.arm, metric, row.group)}
        if any((c.arm, c.against, c.metric, c.group) in same for c in contrasts):
            wrong(
                (*here, "arm"),
                f"arms {row.arm!r} and {against!r} are compared twice by {metric}: give one of them another group",
            )
        margin = file.margin if row.margin is None else row.margin
        contrasts.append(Contrast(row.arm, against, metric, row.direction or file.direction, margin, row.group))
    if not any(contrast.group == CLAIM for contrast in contrasts):
        wrong(("comparisons",), f"no comparison is of the group {CLAIM!r}, which decides")
    return tuple(contrasts)


def _tuning(table: _Tuning | None, arms: Mapping[str, Arm], wrong: Refuse) -> Tuning | None:
    if table is None:
        return None
    if table.field in DATA_FIELDS:
        wrong(("tuning", "field"), f"{table.field} says which images are used: arms are compared on the same ones")
    if table.field not in field_types():
        wrong(("tuning", "field"), f"unknown recipe field {table.field!r}{nearest(table.field, field_types())}")
    for name in table.values:
        if name not in arms:
            wrong(("tuning", "values", name), f"no arm {name!r}{nearest(name, arms)}")
    missing = [name for name in arms if name not in table.values]
    if missing:
        wrong(("tuning", "values"), f"no values for arm {missing[0]!r}: every arm gets the same budget")
    for name, values in table.values.items():
        if len({f"{value:g}" for value in values}) < len(values):  # by which their runs are called
            wrong(("tuning", "values", name), f"values of arm {name!r}: two are equal to six digits")
    lengths = {len(values) for values in table.values.values()}
    if len(lengths) > 1 or min(lengths) < 2:
        wrong(("tuning", "values"), "every arm gets the same budget: equally many values, two at least")
    for name, values in table.values.items():
        for value in values:
            _overridden(arms[name].recipe, {table.field: value}, ("tuning", "values", name), wrong)
    return Tuning(table.field, {name: tuple(sorted(table.values[name])) for name in arms}, table.seeds)


def _unknown_metric(metric: str) -> str:
    if metric.startswith("test/"):
        return f"{metric}: test figures decide nothing; they are shown beside. Known: {', '.join(METRICS)}"
    return f"no run records {metric!r}{nearest(metric, METRICS)}"
