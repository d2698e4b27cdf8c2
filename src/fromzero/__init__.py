"""Train small image classifiers from scratch, resume them exactly, and see what goes wrong on the way.

    import fromzero

    recipe = fromzero.load_recipe("train3").override({"epochs": 10})
    run = fromzero.train(recipe, fromzero.load_images("cifar10"))
    run.summary["test/accuracy"]

Names are imported when they are first used, so that `import fromzero` costs next to nothing.
"""

import os
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fromzero.data import ImageSet, load_images
    from fromzero.errors import FromzeroError, InputError, NonFiniteError, StoppedError
    from fromzero.recipe import Recipe, load_recipe
    from fromzero.runs import Run, list_runs, load_run
    from fromzero.sessions import new_training, resume, resumed_training, train
    from fromzero.trained import load_classifier, load_trained

# Before torch is loaded: threads that wait for the others spin a short while, then sleep. The default spins so long
# that on a machine with other work a step can take twenty times as long; on an idle one this costs nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = metadata.version("fromzero")

_HOMES = {
    "FromzeroError": "errors",
    "ImageSet": "data",
    "InputError": "errors",
    "StoppedError": "errors",
    "NonFiniteError": "errors",
    "Recipe": "recipe",
    "Run": "runs",
    "list_runs": "runs",
    "load_classifier": "trained",
    "load_images": "data",
    "load_recipe": "recipe",
    "load_run": "runs",
    "load_trained": "trained",
    "new_training": "sessions",
    "resume": "sessions",
    "resumed_training": "sessions",
    "train": "sessions",
}

__all__ = [
    "FromzeroError",
    "ImageSet",
    "InputError",
    "NonFiniteError",
    "Recipe",
    "Run",
    "StoppedError",
    "list_runs",
    "load_classifier",
    "load_images",
    "load_recipe",
    "load_run",
    "load_trained",
    "new_training",
    "resume",
    "resumed_training",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fromzero.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fromzero' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
