"""The shape of the project: imports run one way, and the public names are pinned."""

import ast
from pathlib import Path

import fromzero

SOURCE = Path(fromzero.__file__).parent

# Each module may import modules of the lines above its own, and of its own line where that is said.
ORDER = [
    ["errors", "rng", "files", "fused", "stats"],
    ["recipe", "machine", "signals"],
    ["augment", "data", "networks", "optim", "runs", "checkpoint"],
    ["evaluate", "state", "report"],
    ["training"],
    ["sessions", "verify"],
    ["study"],
    ["display"],
    ["cli"],
]


def imports_of(path):
    """Names of the fromzero modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "fromzero":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fromzero."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fromzero."))


def test_imports_run_one_way():
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    modules = {path.stem: [path] for path in SOURCE.glob("*.py") if not path.stem.startswith("__")}
    for package in ("data", "study"):
        modules[package] = list((SOURCE / package).glob("*.py"))
    assert modules.keys() == level.keys(), "every module has its place in ORDER"
    wrong = [
        f"{name} imports {imported}"
        for name, paths in modules.items()
        for path in paths
        for imported in imports_of(path)
        if imported != name and level.get(imported, 99) >= level[name]
    ]
    assert not wrong


def test_only_the_cli_and_the_display_print():
    for path in SOURCE.rglob("*.py"):
        if path.stem in ("cli", "display", "download"):
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
        assert not [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"], path


def test_the_public_names():
    assert fromzero.__all__ == [
        "FromzeroError",
        "ImageSet",
        "InputError",
        "NonFiniteError",
        "Recipe",
        "Run",
        "StoppedError",
        "list_runs",
        "load_images",
        "load_recipe",
        "load_run",
        "new_training",
        "resume",
        "resumed_training",
        "train",
    ]
    for name in fromzero.__all__:
        assert (getattr(fromzero, name).__doc__ or "").strip(), name
