"""A folder of pictures: fromzero from the start of its process to its end, beside Keras's tutorial, in turn.

    python -m benchmarks.pictures FOLDER [--recipe few] [--rounds 3]

Both train on the same pictures and score the same test pictures; Keras's side trains on the ones that fromzero holds
out for validation too, and validates on none. Prints every run, then means and the ratios of times. Keras's side needs
the environment that `make .venv-bench/.setup` makes.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import lifetime
from benchmarks.timing import ENVIRONMENT, ROOT, run_worker
from fromzero import files, machine


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--recipe", default="few")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, seeds from 0 (3)")
    parser.add_argument("--epochs", type=int, default=15, help="of Keras's side; 15 is the tutorial's (15)")
    arguments = parser.parse_args()
    dataset = os.path.abspath(arguments.folder)  # what it runs has another working folder
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder, "parts.json")
        parts.write_text(json.dumps(parts_of(dataset)), "utf-8")
        # Both sides decode the pictures in every run; what fromzero keeps of them is in a home of its own.
        home = Path(folder, "home")
        machine.prepare(device="cpu")  # compiles the kernels, where that was not done
        if (files.home() / "kernels").is_dir():
            shutil.copytree(files.home() / "kernels", home / "kernels")
        environment = ENVIRONMENT | {"FROMZERO_HOME": str(home)}
        for seed in range(arguments.rounds):
            shutil.rmtree(home / "pictures", ignore_errors=True)
            run = lifetime.cold_run(arguments.recipe, seed, dataset=dataset, environment=environment)
            ours.append({"accuracy": run["accuracy"], "seconds": run["end_seconds"]})
            say(f"fromzero {arguments.recipe}", seed, ours[-1])
            began = time.perf_counter()
            task = {"parts": str(parts), "seed": seed, "epochs": arguments.epochs}
            theirs.append(run_worker("tutorial_keras", task, ROOT / ".venv-bench" / "bin" / "python"))
            theirs[-1]["seconds"] = time.perf_counter() - began
            say("Keras's tutorial", seed, theirs[-1])
    for name, side in ((f"fromzero {arguments.recipe}", ours), ("Keras's tutorial", theirs)):
        accuracies = [run["accuracy"] for run in side]
        spread = f" ± {statistics.stdev(accuracies):.4f}" if len(side) > 1 else ""
        seconds = statistics.median(run["seconds"] for run in side)
        print(f"{name}: {statistics.mean(accuracies):.4f}{spread} (n = {len(side)}), {seconds:.0f} s (median)")
    ratios = sorted(other["seconds"] / own["seconds"] for own, other in zip(ours, theirs, strict=True))
    print(f"Keras ÷ fromzero, seconds: {statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})")


def parts_of(folder):
    """Of train and test each the files and their labels, as fromzero splits that folder."""
    from fromzero import load_images

    images = load_images(folder)
    return {
        name: ([str(Path(images.source, file)) for file in part.files], part.labels.tolist())
        for name, part in (("train", images.train), ("test", images.test))
    }


def say(side, seed, run):
    print(f"{side}, seed {seed}: test accuracy {run['accuracy']:.4f}, {run['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
