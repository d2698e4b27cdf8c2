"""Whole runs of fromzero: a worker for what happens inside a run, and cold starts of the command itself."""

import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from benchmarks.timing import ENVIRONMENT, ROOT, WorkerError, main_of_worker

RECIPE = "train3"
RESULT = re.compile(r"\btest 0\.\d+ in ")  # the line that says how a run has ended
LINEAR_RECIPE, LINEAR_IMAGES, LINEAR_REPEATS = "train1", (3_200, 6_400, 12_800), 3
# How old two runs are whose steps are compared: past an epoch of CIFAR-10 and what comes at its end, and hardly begun.
LATE_STEPS, WARM_UP_STEPS = 411, 20
BLOCKS, BLOCK_STEPS = 10, 10


def measure(what, **task):
    return {"start": start, "epoch": epoch, "linear": linear, "on_demand": on_demand}[what](**task)


def start(started, data_dir, threads):
    """Seconds from the start of this process (`started`, time.time() of who started it) to the end of the first step
    on CIFAR-10."""
    with tempfile.TemporaryDirectory() as folder:
        training = cifar10_training(folder, data_dir, threads)
        next(iter(training))
        seconds = time.time() - started
        training.close()
    return {"seconds": seconds}


def epoch(data_dir, threads):
    """An epoch on CIFAR-10 as a run: what its steps take, what evaluating 10,000 images takes (with the row of metrics
    that it ends in), the memory that the run says it needed."""
    with tempfile.TemporaryDirectory() as folder:
        training = cifar10_training(folder, data_dir, threads)
        ends, evaluated = [], 0.0
        for progress in training:
            if progress.row is None:
                ends.append(time.perf_counter())
            elif not progress.ended:  # which it is when the last checkpoint and the summary are written, too
                evaluated = time.perf_counter()
        summary = training.run.summary
    return {
        "recipe": RECIPE,
        "epoch_seconds": seconds_of(ends),
        "evaluation_seconds": evaluated - ends[-1],
        "peak_bytes": summary["memory/peak_bytes"],
    }


def late_by_early(data_dir, threads):
    """Seconds of steps of a run that has trained an epoch over those of a run that has just begun, block by block in
    turn, each run in a process of its own: 1 when a step costs the same all along. In turn, because over an epoch the
    machine's own speed changes by more than what is looked for."""
    with pace(data_dir, threads) as late, pace(data_dir, threads) as early:
        late(LATE_STEPS)
        early(WARM_UP_STEPS)
        ratios = [late(BLOCK_STEPS) / early(BLOCK_STEPS) for _ in range(BLOCKS)]
    return {"recipe": RECIPE, "block_steps": BLOCK_STEPS, "ratios": ratios}


@contextmanager
def pace(data_dir, threads):
    """A run in a process of its own that trains when it is told to: a function from a number of steps to the seconds
    that so many more of them take. It raises WorkerError."""
    task = {"what": "on_demand", "data_dir": data_dir, "threads": threads}
    command = [sys.executable, "-m", "benchmarks.lifetime", json.dumps(task)]
    with tempfile.TemporaryFile("w+") as said:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes)

        def seconds(steps):
            try:
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
                return float(process.stdout.readline())
            except (OSError, ValueError) as error:
                process.kill()
                status = process.wait()
                said.seek(0)
                raise WorkerError(f"on_demand ({status}): {said.read().strip()[-2000:]}") from error

        try:
            yield seconds
            process.communicate(timeout=60)  # no more lines: it removes its run and ends
        finally:
            process.kill()
            process.communicate()


def on_demand(data_dir, threads):
    """So many training steps as each line of the standard input says; prints the seconds that they take."""
    with tempfile.TemporaryDirectory() as folder:
        # A checkpoint would count as the steps that it falls between: none is due.
        training = cifar10_training(folder, data_dir, threads, epochs=10, checkpoint_minutes=10_000)
        steps = (progress for progress in training if progress.row is None)
        for line in sys.stdin:
            began = time.perf_counter()
            for _ in range(int(line)):
                next(steps)
            print(time.perf_counter() - began, flush=True)
        training.close()
    return {}


def linear(threads):
    """Seconds of an epoch's steps with fewer and more images, in turn."""
    from benchmarks.steps_torch import random_images
    from fromzero import load_recipe, new_training

    recipe = load_recipe(LINEAR_RECIPE).override({"epochs": 1, "clean_train_images": 10, "validation.source": "test"})
    seconds = {count: [] for count in LINEAR_IMAGES}
    for repeat in range(LINEAR_REPEATS + 1):
        for count in LINEAR_IMAGES:
            with tempfile.TemporaryDirectory() as folder:
                training = new_training(recipe, random_images(count), runs_dir=folder, device="cpu", threads=threads)
                ends = [time.perf_counter() for progress in training if progress.row is None]
            if repeat:  # the first time round warms up
                seconds[count].append(seconds_of(ends))
    return {"recipe": LINEAR_RECIPE, "seconds": seconds}


def cifar10_training(folder, data_dir, threads, epochs=1, **options):
    """So many epochs on all train images, validated on the 10,000 test images, about to begin."""
    from fromzero import load_images, load_recipe, new_training

    changes = {"epochs": epochs, "clean_train_images": 10, "validation.source": "test"}
    images = load_images("cifar10", data_dir=data_dir)
    recipe = load_recipe(RECIPE).override(changes)
    return new_training(recipe, images, runs_dir=folder, device="cpu", threads=threads, **options)


def seconds_of(ends):
    """The time that all steps take, from the moments at which they ended: the first began unseen and counts as the
    mean of the others."""
    return (ends[-1] - ends[0]) * len(ends) / (len(ends) - 1)


def cold_run(recipe, seed, data_dir, threads):
    """`fromzero train cifar10 --recipe RECIPE --seed SEED` as a user types it: seconds from the start of its process
    until the test accuracy is printed and until its end, and that accuracy (as its summary has it)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fromzero", "train", "cifar10", "--recipe", recipe, "--runs-dir", folder]
        command += ["--seed", str(seed)]
        command += ["--data-dir", str(Path(data_dir).resolve())] if data_dir else []
        command += ["--threads", str(threads)] if threads else []
        began, printed, seconds = time.perf_counter(), [], None
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes) as process:
            for line in process.stdout:
                printed.append(line)
                if RESULT.search(line):
                    seconds = time.perf_counter() - began
        end_seconds = time.perf_counter() - began
        if process.returncode != 0 or seconds is None:
            raise WorkerError(f"{recipe}: {''.join(printed).strip()[-2000:]}")
        (summary,) = Path(folder).glob("*/summary.json")
        accuracy = json.loads(summary.read_text("utf-8"))["test/accuracy"]
        return {"seconds": seconds, "end_seconds": end_seconds, "accuracy": accuracy}


if __name__ == "__main__":
    main_of_worker(measure)
