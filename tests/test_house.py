"""The shape of the project: imports run one way, and the public names are pinned."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import fromzero
from fromzero.arguments import parse
from fromzero.machine import NUMERIC_MODULES
from fromzero.recipe import field_types, load_recipe, parse_value, recipe_names
from fromzero.study.page import _anchor

SOURCE = Path(fromzero.__file__).parent
ROOT = Path(__file__).parents[1]

# Each module may import modules of the lines above its own, and of its own line where that is said.
ORDER = [
    ["errors", "rng", "files", "stats", "provenance"],
    ["shipped", "resources", "terminal", "records"],
    ["recipe", "kernels", "signals"],
    ["machine", "modules", "arguments", "timetable", "changes"],
    ["augment", "data", "networks", "optim", "runs", "checkpoint"],
    ["evaluate", "state", "curves", "evidence", "events"],
    ["splits", "diagnosis"],
    ["steps", "trained", "findings"],
    ["training", "probe", "card", "scores"],
    ["sessions", "verify", "report", "export", "compare"],
    ["study", "display"],
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
    for package in ("data", "kernels", "study"):
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


def test_a_source_digest_covers_what_a_training_computes_with():
    """All that training.py imports, and what that imports, but for what only reads, writes and reports."""
    harmless = {"checkpoint", "data", "errors", "curves", "runs", "signals", "resources"}
    reached, to_read = set(), ["training"]
    while to_read:
        name = to_read.pop()
        reached.add(name)
        paths = (SOURCE / name).glob("*.py") if (SOURCE / name).is_dir() else [SOURCE / f"{name}.py"]
        to_read += {found for path in paths for found in imports_of(path)} - reached - harmless - {*to_read}
    listed = {name.partition("/")[0] for name in NUMERIC_MODULES} - {"data"}
    assert reached - listed == {"files", "shipped"}, "which read and write"
    assert listed <= reached
    assert {"data/images", "kernels/__init__", "kernels/functions", "kernels/interface"} <= {*NUMERIC_MODULES}
    assert all((SOURCE / f"{name}.py").exists() for name in NUMERIC_MODULES)


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
    for name in fromzero.__all__:
        assert (getattr(fromzero, name).__doc__ or "").strip(), name


def test_the_guide_lists_what_is_in_a_run_folder(tiny_images, tmp_path):
    recipe = fromzero.load_recipe("train1").override({"epochs": 1, "network.channels": [[2]], "network.pool": 8})
    training = fromzero.new_training(recipe, tiny_images, runs_dir=tmp_path, threads=1)
    found = {path.name for path in training.run.path.iterdir()}
    for _ in training:
        pass
    found |= {path.name for path in training.run.path.iterdir()}
    assert {"lock", "writer.json", "curves.png"} <= found
    listing = (ROOT / "docs" / "guide.md").read_text("utf-8").split("## The run folder")[1].split("```")[1]
    found.add("splits.csv")  # of pictures
    assert found == set(re.findall(r"[\w.]+", " ".join(line[:28] for line in listing.splitlines()[2:])))


@pytest.mark.parametrize("name", ["train1", "train2", "train3"])
def test_a_recipes_header_says_what_came_of_it(name):
    header = (SOURCE / "recipes" / f"{name}.toml").read_text("utf-8").partition("\nname =")[0].replace("\n# ", " ")
    lines = (ROOT / "docs" / "results.md").read_text("utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| train {name[-1]} |"))
    running, _, validation, _, last_ten, _, time = (cell.strip("* ") for cell in row.strip("|").split("|")[-7:])
    assert f"Result: running {running}, validation {validation} (last ten epochs {last_ten.split()[0]})" in header
    assert "n = 1, seed 0." in header
    assert time.replace(" min", " minutes") in header
    assert f"Command: fromzero train cifar10 --recipe {name}" in header


@pytest.mark.parametrize("page", ["README", "docs/guide", "docs/pictures", "docs/walkthrough", "docs/results"])
def test_the_commands_on_a_page_are_commands(page):
    """Those in blocks and in the text, written out in full; what their recipes' fields are given fits."""
    text = (ROOT / f"{page}.md").read_text("utf-8").replace("\\\n", "")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if not language]
    blocks += re.findall(r"^    (?=fromzero)(.*)", text, re.MULTILINE)
    blocks += [" ".join(span.split()) for span in re.findall(r"`(fromzero [\w-]+ [^`]+)`", text)]
    commands = re.findall(r"^fromzero (?!.*--help)[^…|\[\n]*$", "\n".join(blocks), re.MULTILINE)
    assert len(commands) > 4
    for command in commands:
        arguments = parse(shlex.split(command, comments=True)[1:])
        if arguments.command == "train" and arguments.recipe in recipe_names():
            given = {path: parse_value(path, text) for path, text in vars(arguments).items() if path in field_types()}
            load_recipe(arguments.recipe).override(given)


def test_the_links_on_the_pages_lead_somewhere():
    pages = {page: page.read_text("utf-8") for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
    headings = {page: set(map(_anchor, re.findall(r"^#+ (.*)$", text, re.MULTILINE))) for page, text in pages.items()}
    links = [(page, link) for page, text in pages.items() for link in re.findall(r"\]\((?!http)([^)\s]+)\)", text)]
    assert len(links) > 100
    for page, link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in headings[target], f"{page.name}: {link}"
