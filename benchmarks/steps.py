"""Training steps a second: fromzero beside plain eager PyTorch, in one run.

Each side runs in a process of its own, the two in turn (A B A B …), because times on shared machines drift and
because allocator settings belong to a process. Plain is what a careful user writes: nn.Sequential in the textbook's
order, channels_last, bf16 autocast where the processor computes fast in it, a fused optimizer, images ready as float
tensors in memory. fromzero's side is the whole step of a real training: gathering uint8 images, normalising, seeded
dropout, checks for non-finite loss and gradients, the running accuracy.

    python benchmarks/steps.py [--rounds 5] [--recipes train1 train2 train3] [--batch-size 128]
"""

import argparse
import importlib
import statistics
import subprocess
import sys
import time

SIDES = ("plain", "fromzero")
NUM_IMAGES = 4096
WARM_UP_SECONDS, MEASURE_SECONDS = 1.5, 4.0


def measure(step, batch_size):
    """Images a second of `step(i)`: a warm-up, then as many steps as fit into the time."""
    i, start = 0, time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS:
        step(i)
        i += 1
    steps, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < MEASURE_SECONDS:
        step(i + steps)
        steps += 1
    return steps * batch_size / seconds


def random_images():
    import numpy as np

    from fromzero.data import Images, ImageSet

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8)
    images = Images(pixels, rng.integers(0, 10, NUM_IMAGES))
    fingerprints = {"train": "", "test": ""}
    return ImageSet("random", images, images, tuple("0123456789"), "random", fingerprints)


def fromzero_side(recipe, here):
    import torch

    from fromzero.runs import Run
    from fromzero.state import State
    from fromzero.training import Data, Training

    images = random_images()
    state = State.initial(recipe, images.image_shape, images.num_classes, here.device)
    training = Training(Run("unused"), recipe, images, here, state, Data.of(recipe, images, here.device))
    order = torch.randperm(len(training.data.train.labels))

    def step(i):
        start = i * recipe.batch_size % (3600 - recipe.batch_size + 1)
        training._step(order[start : start + recipe.batch_size])

    return step


def plain_side(recipe, here):
    import torch
    import torch.nn.functional as F
    from torch import nn

    channels, size, layers = 3, 32, []
    for block in recipe.network.blocks():
        for out in block.channels:
            layers += [nn.Conv2d(channels, out, 3, padding=1 if block.padding == "same" else 0), nn.ReLU()]
            channels, size = out, size - (0 if block.padding == "same" else 2)
        if block.pool > 1:
            layers.append(nn.MaxPool2d(block.pool))
            size //= block.pool
        if block.dropout:
            layers.append(nn.Dropout(block.dropout))
    layers.append(nn.Flatten())
    features = channels * size * size
    for units, rate in recipe.network.dense_layers():
        layers += [nn.Linear(features, units), nn.ReLU(), nn.Dropout(rate)]
        features = units
    model = nn.Sequential(*layers, nn.Linear(features, 10)).to(memory_format=torch.channels_last)
    rate = recipe.optimizer.learning_rate
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    more = {"momentum": recipe.optimizer.momentum} if recipe.optimizer.name == "sgd" else {}
    optimizer = kinds[recipe.optimizer.name](model.parameters(), lr=rate, fused=True, **more)
    data = random_images().train
    x = torch.from_numpy(data.pixels).float().div(255).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    y, order = torch.from_numpy(data.labels), torch.randperm(NUM_IMAGES)

    def step(i):
        start = i * recipe.batch_size % (3600 - recipe.batch_size + 1)
        batch = order[start : start + recipe.batch_size]
        with here.autocast():
            loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def worker(side, name, batch_size, threads):
    if side == "plain":  # torch before fromzero, which sets how waiting threads spin when it comes first
        importlib.import_module("torch")
    from fromzero import machine
    from fromzero.recipe import load_recipe

    recipe = load_recipe(name).override({"batch_size": batch_size})
    if side == "plain":
        machine.keep_large_buffers = lambda: False  # nor the allocator
    here = machine.prepare(recipe.precision, device="cpu", threads=threads)
    make = fromzero_side if side == "fromzero" else plain_side
    print(measure(make(recipe, here), batch_size), here.precision, here.threads)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", default=["train1", "train2", "train3"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker, arguments.batch_size, arguments.threads)
        return
    print(f"training steps of batch {arguments.batch_size}, images a second; {arguments.rounds} rounds in turn")
    print(f"{'':<8} {'plain PyTorch':>22} {'fromzero':>22} {'ratio, pair by pair':>26}")
    for name in arguments.recipes:
        rates = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                command = [sys.executable, __file__, "--worker", side, name, "--batch-size", str(arguments.batch_size)]
                command += ["--threads", str(arguments.threads)] if arguments.threads else []
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                rates[side].append(float(out[0]))
        ratios = [b / a for a, b in zip(rates["plain"], rates["fromzero"], strict=True)]
        cells = [spread(rates[side], ",.0f") for side in SIDES]
        short = "" if statistics.median(ratios) >= 1 else "  FALLS SHORT of plain PyTorch"
        print(f"{name:<8} {cells[0]:>22} {cells[1]:>22} {spread(ratios, '.2f') + ' ×':>26}{short}", flush=True)
    print(f"median (lowest–highest); {out[1]}, {out[2]} threads")


def spread(values, form):
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


if __name__ == "__main__":
    main()
