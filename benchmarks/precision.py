"""Whether bfloat16 learns as well as float32: the notes' networks trained in both from the same seeds.

    python -m benchmarks.precision [--images 10000] [--epochs 5] [--seeds 0 1 2] [--full]

A pair shares weights, order of images and dropout masks; only the arithmetic differs. Reduced by default: a stratified
part of CIFAR-10's train images and few epochs, scored on all 10,000 test images, so that it ends within the hour;
--full takes all images and the recipes' own epochs. Writes build/precision.json, which `python -m benchmarks --render`
takes into docs/benchmarks.md.
"""

import argparse
import json
import tempfile
import time

from benchmarks import page
from benchmarks.timing import ROOT, default_data_dir

OUTPUT = ROOT / "build" / "precision.json"
RECIPES = ("train1", "train2", "train3")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="train images, a stratified part (10,000)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each run (5)")
    parser.add_argument("--full", action="store_true", help="all train images, the recipes' own epochs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two at least (0 1 2)")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME", help=" ".join(RECIPES))
    parser.add_argument("--data-dir", default=default_data_dir(), help="where CIFAR-10 is")
    parser.add_argument("--threads", type=int, help="CPU threads, by default all")
    arguments = parser.parse_args()
    if len(arguments.seeds) < 2:
        parser.error("--seeds: two at least")
    print(f"validation accuracy (10,000 test images) after training in bfloat16 and in float32, {scale(arguments)}")
    found = {"scale": scale(arguments), "date": time.strftime("%Y-%m-%d"), "recipes": {}}
    for name in arguments.recipes:
        found["recipes"][name] = pairs(name, arguments)
        for line in page.precision_lines(name, found["recipes"][name]):
            print(line, flush=True)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def scale(arguments):
    if arguments.full:
        return "all train images, the recipes' own epochs"
    return f"{arguments.images:,} train images, {arguments.epochs} epochs"


def pairs(name, arguments):
    """The last validation accuracies of both, one of each for every seed."""
    from fromzero import load_images, load_recipe

    part = "" if arguments.full else f":{arguments.images}"
    images = load_images(f"cifar10{part}", data_dir=arguments.data_dir)
    found = {"seeds": arguments.seeds, "bfloat16": [], "float32": []}
    for seed in arguments.seeds:
        for precision in ("bfloat16", "float32"):
            changes = {"seed": seed, "precision": precision, "validation.source": "test", "clean_train_images": 10}
            changes["skip_easy"] = 0.0  # so that a pair trains on the same images
            changes |= {} if arguments.full else {"epochs": arguments.epochs}
            recipe = load_recipe(name).override(changes)
            found[precision].append(trained_accuracy(recipe, images, arguments.threads))
    return found


def trained_accuracy(recipe, images, threads):
    import fromzero

    with tempfile.TemporaryDirectory() as folder:
        run = fromzero.train(recipe, images, runs_dir=folder, device="cpu", threads=threads)
        return run.metrics()[-1]["val/accuracy"]


if __name__ == "__main__":
    main()
