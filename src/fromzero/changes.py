"""What is said of a recipe's changes: in which fields it differs from another one, and what whoever changed them should
know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fromzero.recipe import Recipe, default_of, load_recipe, recipe_names

DATA_FIELDS = (  # which images
    "dataset",
    "clean_train_images",
    *(f"validation.{field}" for field in ("source", "fraction", "folds", "fold")),
)
USUAL_RATES = {"sgd": 0.01, "adam": 0.001, "adamw": 0.001, "muon": 0.1}  # as in Keras; about as recipes here
# Fields that are given for nothing in some recipes, when they act, and the same in words.
ACTS_WHERE: tuple[tuple[tuple[str, ...], Callable[[Recipe], bool], str], ...] = (
    (("optimizer.nesterov",), lambda r: r.optimizer.name == "sgd", "with --optimizer.name sgd"),
    (("optimizer.momentum",), lambda r: r.optimizer.name in ("sgd", "muon"), "with --optimizer.name sgd or muon"),
    (("optimizer.muon_momentum",), lambda r: r.optimizer.name == "muon", "with --optimizer.name muon"),
    (
        ("optimizer.beta1", "optimizer.beta2", "optimizer.epsilon"),
        lambda r: r.optimizer.name in ("adam", "adamw"),
        "with --optimizer.name adam or adamw",
    ),
    (("network.dense_dropout",), lambda r: bool(r.network.dense), "behind hidden layers: --network.dense"),
    (
        ("network.whitening_directions", "network.whitening_padding"),
        lambda r: r.network.whitening > 0,
        "with --network.whitening",
    ),
    (("augment.scale",), lambda r: r.augment.scale_epochs > 0, "with --augment.scale_epochs"),
    (("augment.scale_epochs",), lambda r: r.augment.scale < 1, "with --augment.scale"),
    (("proxy_channels",), lambda r: r.hardest < 1, "with --hardest"),
    (
        ("validation.folds", "validation.fold"),
        lambda r: r.validation.source == "fold",
        "with --validation.source fold",
    ),
)


def differing_fields(one: Recipe, two: Recipe) -> dict[str, Any]:
    """Dotted path → value in `two`, as JSON has it, of every field in which two recipes differ, name and seed left
    aside."""
    before, now = one.fields(), two.fields()
    return {path: new for path, new in now.items() if before[path] != new and path not in ("name", "seed")}


def in_words(recipe: Recipe, but: Sequence[str] = ()) -> str:
    """A recipe as the one of its name that comes with fromzero now, with the fields in which they differ, but for some;
    of another recipe its name alone."""
    if recipe.name not in recipe_names():
        return recipe.name
    changes = differing_fields(load_recipe(recipe.name), recipe)
    told = ", ".join(
        f"{path} = {value_text(value)}" for path, value in changes.items() if path not in ("dataset", *but)
    )
    return f"{recipe.name} with {told}" if told else recipe.name


def notes_on_changes(base: Recipe, recipe: Recipe, changes: Mapping[str, Any]) -> list[str]:
    """What somebody should know who made `recipe` of `base` by these changes: the rates of another optimizer that it
    has now, and the changes that do nothing."""
    found = []
    before, now = base.optimizer, recipe.optimizer
    names = ("learning_rate", "head_learning_rate", "bias_learning_rate")
    rates = {name: getattr(now, name) for name in names if f"optimizer.{name}" not in changes and getattr(now, name)}
    if now.name != before.name and rates:
        left = ", ".join(f"--optimizer.{name} {rate:g}" for name, rate in rates.items())
        found.append(f"{left} as {base.name} has for {before.name}; usual for {now.name}: {USUAL_RATES[now.name]}")
    for paths, acts, where in ACTS_WHERE:
        idle = [f"--{path}" for path in paths if path in changes and recipe.fields()[path] != default_of(path)]
        if idle and not acts(recipe):
            found.append(f"{' and '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect here, only {where}")
    return found


def usual_epochs(recipe: Recipe) -> int:
    """The epochs of the recipe of its name that comes with fromzero; 0 where none does."""
    return load_recipe(recipe.name).epochs if recipe.name in recipe_names() else 0


def value_text(value: object) -> str:
    """A field's value in words that a recipe would take, figures without needless digits."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
