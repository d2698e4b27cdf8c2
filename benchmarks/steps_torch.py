"""Training steps of fromzero and of plain eager PyTorch: a worker.

Plain is what a careful user writes: nn.Sequential in the textbook's order, channels_last, a fused optimizer, images
ready as float tensors in memory, in float32 or with bf16 autocast. fromzero's side is the whole step of a real
training, taken from its public iterator: gathering uint8 images, normalising, seeded dropout, checks for non-finite
values, the running accuracy.
"""

import contextlib
import tempfile

from benchmarks import networks
from benchmarks.targets import PLAIN_FLOAT32
from benchmarks.timing import Stopwatch, main_of_worker


def measure(side, recipe, description, precision, batch_size, threads, optimizer):
    if side == "fromzero":
        return fromzero_side(recipe, precision, batch_size, threads, optimizer)
    return plain_side(side, description, batch_size, threads, optimizer)


def fromzero_side(recipe, precision, batch_size, threads, optimizer):
    from fromzero import load_recipe, new_training

    changes = {"batch_size": batch_size, "epochs": 1000, "clean_train_images": 10, "validation.source": "test"}
    changes["precision"] = precision
    changes |= {f"optimizer.{field}": value for field, value in optimizer.items()}
    with tempfile.TemporaryDirectory() as folder:
        training = new_training(
            load_recipe(recipe).override(changes), random_images(), runs_dir=folder, device="cpu", threads=threads
        )
        stopwatch, step = Stopwatch(), 0
        for progress in training:
            done, step = progress.counters.step - step, progress.counters.step
            if done and stopwatch.tick(done * batch_size):
                break
        training.close()
    here = training.machine
    return {
        "images_per_second": stopwatch.images_per_second,
        "parameters": sum(p.numel() for p in training.state.model.parameters()),
        "precision": here.precision,
        "threads": here.threads,
        "processor": here.processor,
        "instructions": here.instructions,
        "versions": {"fromzero": here.fromzero, "torch": here.torch},
    }


def random_images(count=networks.NUM_IMAGES):
    """An image set of `count` random train images and 20 test images."""
    import numpy as np

    from fromzero.data import Images, ImageSet

    rng = np.random.default_rng(0)

    def part(count):
        pixels = rng.integers(0, 256, (count, *networks.IMAGE_SHAPE), dtype=np.uint8)
        return Images(pixels, np.arange(count) % networks.NUM_CLASSES)

    names = tuple(str(n) for n in range(networks.NUM_CLASSES))
    return ImageSet("random", part(count), part(20), names, "random", {"train": "", "test": ""})


def plain_side(side, description, batch_size, threads, optimizer):
    import torch
    import torch.nn.functional as F

    if threads:
        torch.set_num_threads(threads)
    precise = side == PLAIN_FLOAT32
    torch.manual_seed(0)
    model = plain_network(description).to(memory_format=torch.channels_last)
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer["name"]]
    others = {name: value for name, value in optimizer.items() if name not in ("name", "learning_rate")}
    moves = make(model.parameters(), lr=optimizer["learning_rate"], fused=True, **others)
    shape = (networks.NUM_IMAGES, *networks.IMAGE_SHAPE)
    x = torch.rand(shape).permute(0, 3, 1, 2)  # (N, C, H, W) in channels-last memory
    y = torch.randint(0, networks.NUM_CLASSES, shape[:1])
    stopwatch, enough = Stopwatch(), False
    while not enough:
        for batch in torch.randperm(len(x)).split(batch_size):
            with contextlib.nullcontext() if precise else torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x[batch]), y[batch])
            moves.zero_grad(set_to_none=True)
            loss.backward()
            moves.step()
            loss.item()
            if enough := stopwatch.tick(len(batch)):
                break
    return {
        "images_per_second": stopwatch.images_per_second,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
    }


def plain_network(description):
    from torch import nn

    modules, inputs = [], networks.IMAGE_SHAPE[-1]
    for layer in description:
        outputs = layer["shape"][-1]
        match layer["kind"]:
            case "Conv2D":
                modules.append(nn.Conv2d(inputs, outputs, 3, padding=1 if layer["padding"] == "same" else 0))
            case "Activation":
                modules.append(nn.ReLU())
            case "MaxPooling2D":
                modules.append(nn.MaxPool2d(layer["pool"]))
            case "Dropout":
                modules.append(nn.Dropout(layer["rate"]))
            case "Flatten":
                modules.append(nn.Flatten())
            case "Dense":
                modules.append(nn.Linear(inputs, outputs))
        inputs = outputs
    return nn.Sequential(*modules)


if __name__ == "__main__":
    main_of_worker(measure)
