"""Every promise of docs/reliability.md to its full number; writes that page. Some five minutes: make soak.

    python -m tests.soak [--scale 1.0] [--seed 0] [--only PART …] [--output docs/reliability.md]

A part is repeated exactly by its seed, but for the moments at which the system lets a signal through.
"""

import argparse
import platform
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

import fromzero
from fromzero import checkpoint, machine
from fromzero.data import Images, ImageSet
from fromzero.recipe import Recipe
from fromzero.verify import first_difference
from tests import faults

VARIANTS = {
    "optimizer": (
        {"name": "adam"},
        {"name": "adamw", "weight_decay": 0.01},
        {"name": "sgd", "learning_rate": 0.05, "nesterov": True},
        {"name": "sgd", "learning_rate": 0.05, "momentum": 0.0, "weight_decay": 1e-3},
        {"name": "muon", "learning_rate": 0.1, "bias_learning_rate": 0.05},
    ),
    "network": (
        {"channels": [[16], [24]], "block_dropout": 0.2, "dense": [16], "dense_dropout": 0.3},
        {
            "channels": [[16, 16], [24, 24]],  # from 16 on compiled kernels are used
            "pool_after": "first",
            "activation": "gelu",
            "batch_norm": True,
            "residual": True,
            "whitening": 2,
            "whitening_padding": "same",
            "initial": "dirac",
            "head": "max",
            "dense": [],
        },
        {"channels": [[8], [12]], "batch_norm": True, "dense": [16], "dense_dropout": 0.3, "dropout_from_epoch": 1.5},
    ),
    "augment": (
        {},
        {"flip": "alternating", "translate": 2, "cutout": 8},
        {"flip": "random", "rotate": 15.0, "colour": 0.2},
        {"cutmix": 0.5},
    ),
    "ema_decay": (0.0, 0.9),
    "skip_easy": (0.0, 0.0, 0.3),
    "hardest": (1.0, 1.0, 0.5),
    "label_smoothing": (0.0, 0.2),
    "schedule": ({}, {"name": "cosine", "warmup_epochs": 0.5}, {"name": "linear"}),
    "precision": ("float32", "bfloat16"),
    "normalise": ("unit", "standard"),
    "validation": ({"source": "split"}, {"source": "test"}),
}


def learnable_images(count=200, classes=10):
    rng = np.random.default_rng(0)
    patterns = rng.integers(40, 215, (classes, 4, 4, 3)).repeat(8, 1).repeat(8, 2)

    def part(n):
        labels = np.arange(n) % classes
        pixels = np.clip(patterns[labels] + rng.normal(0, 20, (n, 32, 32, 3)), 0, 255).astype(np.uint8)
        return Images(pixels, labels.astype(np.int64))

    train, test = part(count), part(count // 5)
    names = tuple(f"class{n}" for n in range(classes))
    return ImageSet(
        "patterns", train, test, names, "made up", {"train": train.fingerprint(), "test": test.fingerprint()}
    )


def random_recipe(rng):
    fields = {key: rng.choice(values) for key, values in VARIANTS.items()}
    if "cutmix" in fields["augment"]:  # which goes with all others
        fields["skip_easy"] = 0.0
    return Recipe.model_validate(
        {
            "name": "soak",
            "seed": rng.randrange(1000),
            "epochs": rng.choice([2, 3, 4]),
            "batch_size": rng.choice([33, 48, 64]),
            "clean_train_images": 60,
            **fields,
        }
    )


def kills_during_saves(folder, scale, seed):
    kills = round(1000 * scale)
    lost = faults.kill_saves(folder, kills, seed)
    return (
        f"{kills} SIGKILLs at random moments of back-to-back saves",
        f"{len(lost)} states that do not load or lost a save",
    )


def kills_during_runs(folder, scale, seed):
    """Runs killed one to five times each, against the same run straight through."""
    rng, images, runs = random.Random(seed), learnable_images(), round(100 * scale)
    interrupted, differing, lost = 0, [], []
    for n in range(runs):
        recipe = random_recipe(rng)
        straight = faults.in_child(
            lambda say, recipe=recipe: fromzero.train(recipe, images, runs_dir=folder / "straight", threads=1)
        )
        code, _ = faults.kill_after(*straight, 0, 0)
        assert code == 0
        (whole,) = fromzero.list_runs(folder / "straight")
        seconds = whole.summary[
            "time/seconds"
        ]  # of steps and saves: drawing after them takes longer, and loses nothing
        run, count, losses = faults.train_through_kills(
            recipe, images, folder / "killed", rng, kills=rng.randint(1, 5), seconds=0.6 * seconds
        )
        interrupted, lost = interrupted + count, lost + losses
        difference = first_difference(whole, run)
        if difference:
            differing.append((n, difference))
        shutil.rmtree(folder / "straight")
        shutil.rmtree(folder / "killed")
    for case in differing + lost:
        print("  ", case)
    return (
        f"{runs} runs of random recipes, {interrupted} interruptions by SIGKILL and SIGTERM (1 to 5 planned a run)",
        f"{runs - len(differing)} of {runs} end bit-identical to the uninterrupted run; {len(lost)} saves lost",
    )


def power_loss(folder, scale, seed):
    saves = max(4, round(40 * scale))
    states, lost = faults.power_loss(folder, saves)
    unnoticed = [kind for kind in ("fsync", "sync_folder") if not faults.power_loss(folder / kind, 3, lose=(kind,))[1]]
    assert not unnoticed
    return (
        f"{states} crash states: every prefix of the calls of {saves} saves, every choice of unsynced renames,"
        " unsynced writes dropped, torn (last 4 KiB) or whole",
        f"{len(lost)} lost; with a sync left out on purpose, losses are found",
    )


def failing_disk(folder, scale, seed):
    outcomes = list(faults.saves_under_failures(folder / "checkpoints"))
    bad = [n for n, _, found, error in outcomes if found < 3 or (error is None and found != 4)]
    return (
        f"ENOSPC and EIO at each call of a save ({len(outcomes)} cases)",
        f"{len(outcomes) - len(bad)} keep the checkpoint before, with an error, and save again later",
    )


def flipped_bytes(folder, scale, seed):
    data = checkpoint.encode(faults.small_checkpoint(7, 500))
    masks = [1 << bit for bit in range(8)] + [0xFF]
    missed = faults.flips_not_found(data, masks)
    return (
        f"every bit, and every whole byte, of a checkpoint of {len(data):,} bytes flipped, {len(data) * len(masks):,}"
        " files",
        f"{len(missed)} not found",
    )


def mutated_headers(folder, scale, seed):
    count = round(100_000 * scale)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    signal.alarm(1800)
    read = faults.mutated_headers_read(checkpoint.encode(faults.small_checkpoint(7, 100)), count, seed)
    signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return (
        f"{count:,} mutated headers ({time.monotonic() - started:.0f} s)",
        f"{read} read as whole, 0 other errors, 0 hangs, memory grew by {grown} MiB",
    )


PARTS = {
    part.__name__: part
    for part in (
        kills_during_saves,
        kills_during_runs,
        power_loss,
        failing_disk,
        flipped_bytes,
        mutated_headers,
    )
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full numbers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="write the page there")
    arguments = parser.parse_args()
    here = machine.prepare(threads=1)  # children are forked: no thread may have been started
    rows = []
    for number, name in enumerate(arguments.only):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            what, outcome = PARTS[name](Path(folder), arguments.scale, arguments.seed + number)
        rows.append((name.replace("_", " "), what, outcome, f"{time.monotonic() - started:.0f} s"))
        print(" | ".join(rows[-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(page(rows, arguments, here), "utf-8")


def page(rows, arguments, here):
    options = f" --scale {arguments.scale:g}" if arguments.scale != 1 else ""
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return PAGE.format(
        table=table,
        command=f"python -m tests.soak --seed {arguments.seed}{options} --output docs/reliability.md",
        date=time.strftime("%Y-%m-%d"),
        machine=f"{here.processor}, {here.instructions}, torch {here.torch}, Python {platform.python_version()}",
    )


PAGE = """# Reliability
What fromzero promises about a run, and the evidence. `make test` holds a fast slice of each part
(`tests/test_reliability.py`, `test_checkpoint.py`, `test_data.py`, `test_training.py`); the numbers below are from one
run of

    {command}

on {date}, on {machine}.

| part | what was done | what came of it | time |
|---|---|---|---|
{table}

- **Pickles.** fromzero writes none and reads none but CIFAR's python batches, by an unpickler that admits plain data:
  44 hostile or odd files, 25 of which run code in the ordinary unpickler, run nothing (`tests/test_data.py`).
- **One writer.** A second process on a run folder is refused with the first one's host and process id
  (`tests/test_training.py`); the lock of a process that died is free at once: the runs above were resumed right after
  SIGKILL.
- **Full and failing disks** while a checkpoint or a row of metrics is written: a clear error, a non-zero exit, the
  checkpoint before it whole.
- **Cost of saving**: 0.2 to 1.0 % of the time for the notes' trainings, two of them in part, at the default interval
  (docs/results.md); by default a run saves after ten seconds, then after as long again, up to a minute, or later where
  a save takes more than 2.5 % of the time.
- **On your own machine**: `fromzero verify-resume` trains a run straight and interrupted, as processes of their own,
  and compares every tensor.
- **What is not promised**: the same bits on another processor, thread count, device, precision or version of torch.
  `resume` says which of them differ and goes on only with `--allow-inexact`.
"""


if __name__ == "__main__":
    main()
